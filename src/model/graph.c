/* Steps that decode, as records of what they launch (CUDA graphs), and time on the device of all steps (base/device_time.h). */
#include <config.h>

#include "base/clock.h"
#include "model/model_priv.h"
#include "model/plan.h"

enum {
    LEAST_CONTEXT = 4096, /* that a record is for; others are for 4, 16, .. times as much */
    A_LAYER = 3,          /* stamped regions: itself and its halves */
    OUTSIDE = 2,          /* those outside layers: the head, --sync-check */
    PAIRS = 8192, /* of stamps: three prefill steps of 61 layers with some 20 operations each */
};

/* ---- records ----------------------------------------------------------------------------------------------------------- */

static bool on_device(const tr_comm *group)
{
    return tr_comm_size(group) == 1 || tr_comm_device(group);
}

/* Exchanges can be recorded where a device makes them, and the host has not to count first what travels. What goes to another
 * stage is waited for in a later step. */
static bool groups_can_be_graph(const tr_model *m, const tr_pass *p)
{
    return tr_comm_size(m->groups.pp) == 1 && on_device(m->groups.attn_tp) &&
           (!m->moe_exchange || (p->each > 0 && on_device(m->groups.moe)));
}

/* A step that decodes: one row a sequence, the host has no part in it. */
bool tr_graph_fits(const tr_model *m, const tr_pass *p)
{
    return (m->ops->caps & TR_CAP_GRAPH) && !m->probe && !m->sync_check && !m->finite &&
           !p->split && groups_can_be_graph(m, p) && p->n <= TR_GRAPH_ROWS && p->n <= m->max_rows &&
           p->plan->n_spans == p->n && p->plan->n_head_rows > 0;
}

/* A head that is cut over members reads what it sampled (head.c), unless all rows are greedy and nobody wants scores. */
static bool head_can_be_graph(const tr_model *m, const tr_pass *p)
{
    return !m->weights->slice.head_partial ||
           ((p->plan->flags & TR_PLAN_GREEDY) && !(p->plan->flags & TR_PLAN_HAS_SCORES));
}

static void set_mode(tr_model *m, tr_comm_mode mode)
{
    tr_comm *const group[] = {m->groups.attn_tp, m->groups.attn_cp, m->groups.moe, m->groups.pp};
    for (int i = 0; i < 4; i++)
        tr_comm_set_mode(group[i], mode);
}

/* Record the step into *out with room for n_max rows and max_context keys. */
static tr_status record(tr_model *m, const tr_pass *p, tr_step *step, const tr_step_graph *g,
                        tr_graph **out, tr_err *err)
{
    tr_pass room = *p;
    room.n_max = room.n_head = room.rows.n_max = g->n_max;
    room.rows.max_context = g->max_context;
    tr_status st = m->ops->graph_begin(m->device, TR_LANE_MAIN);
    if (st != TR_OK) return tr_fail(err, st, "graph: %s", m->ops->error(m->device));
    set_mode(m, TR_COMM_RECORD);
    st = tr_model_network(m, &room, step, g->has_head, err);
    set_mode(m, TR_COMM_RUN);
    if (st != TR_OK) {
        tr_model_back(m);
        m->ops->graph_end(m->device, TR_LANE_MAIN, NULL);
        return st;
    }
    st = m->ops->graph_end(m->device, TR_LANE_MAIN, out);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "graph: %s", m->ops->error(m->device));
}

/* The same step as before with other rows, as a kind: a record of it may have room for more. */
static tr_step_graph kind_of(const tr_model *m, const tr_pass *p)
{
    const uint32_t kinds = TR_PLAN_HAS_DENSE | TR_PLAN_HAS_ABSORBED | TR_PLAN_HAS_SELECTION;
    tr_step_graph g = {.n_max = 1,
                       .max_context = LEAST_CONTEXT,
                       .each = p->each,
                       .flags = p->plan->flags & kinds,
                       .has_head = head_can_be_graph(m, p)};

    while (g.n_max < p->n)
        g.n_max *= 2;
    if (g.n_max > m->max_rows) g.n_max = m->max_rows;
    while (g.max_context < p->plan->max_context)
        g.max_context *= 4;
    if (g.max_context > m->max_model_len) g.max_context = m->max_model_len;
    return g;
}

/* The operations are in the record: what they move and compute is noted as ever. */
static tr_status note(tr_model *m, tr_pass *p, tr_step *step, const tr_step_graph *g, tr_err *err)
{
    m->replaying = true;
    set_mode(m, TR_COMM_NOTE);
    tr_status st = tr_model_network(m, p, step, g->has_head, err);
    set_mode(m, TR_COMM_RUN);
    m->replaying = false;
    return st;
}

static bool make_stamps(tr_model *m, tr_step_graph *g)
{
    const int pairs = A_LAYER * m->weights->slice.layers.n + OUTSIDE;

    if (g->cannot_stamp || g->set) return g->set != NULL;
    g->cannot_stamp = m->ops->stamps_create(m->device, 2 * pairs, &g->stamps) != TR_OK;
    if (!g->cannot_stamp) g->set = tr_stamp_set_create(g->stamps, pairs);
    g->cannot_stamp = !g->set;
    return !g->cannot_stamp;
}

/* One step in m->stamp_every is run from a second record, which has stamps around its layers and their halves; *run: the record
 * for this one. *made: it was made now, and its operations have been noted. */
static tr_status prepare(tr_model *m, tr_pass *p, tr_step *step, tr_step_graph *g, tr_graph **run,
                         bool *made, tr_err *err)
{
    tr_device_times *t = tr_model_times(m);
    const bool due = t && ++m->n_replays % (uint64_t)m->stamp_every == 0 && make_stamps(m, g);

    if (!g->graph) {
        const tr_status st = record(m, p, step, g, &g->graph, err);
        *run = g->graph;
        *made = true;
        return st;
    }
    *run = g->graph;
    if (due && !g->stamped) {
        tr_device_times_mode(t, TR_STAMP_RECORD, g->set);
        tr_status st = record(m, p, step, g, &g->stamped, err);
        tr_device_times_mode(t, TR_STAMP_STEP, NULL);
        *made = true;
        if (st == TR_OK) *run = g->stamped;
        if (st != TR_E_MEMORY) return st;
        tr_stamp_set_free(g->set);
        g->set = NULL;
        g->cannot_stamp = true;
        return TR_OK;
    }
    if (due && !tr_stamp_set_busy(g->set)) {
        tr_device_times_mode(t, TR_STAMP_REPLAY, g->set);
        *run = g->stamped;
    }
    return TR_OK;
}

/* Run as it is, after its record came to nothing for want of memory: its operations have been noted. */
static tr_status run_unrecorded(tr_model *m, tr_pass *p, tr_step *step, tr_err *err)
{
    tr_regions *regions = m->regions;

    step->memory->no_records = true;
    m->regions = NULL;
    const tr_status st = tr_model_network(m, p, step, true, err);
    m->regions = regions;
    return st;
}

/* The first step of its kind makes the record. With members it is the second one that does: the first has made NCCL's connections,
 * which is nothing to be recorded. All members take the same steps. */
tr_status tr_graph_network(tr_model *m, tr_pass *p, tr_step *step, tr_err *err)
{
    const bool warm_up = tr_comm_size(m->groups.attn_tp) > 1 || m->moe_exchange;
    struct tr_step_memory *s = step->memory;
    const tr_step_graph g = kind_of(m, p);
    tr_graph *run = NULL;
    bool made = false;
    int i;

    for (i = 0; i < s->n_graphs; i++)
        if (s->graph[i].n_max == g.n_max && s->graph[i].max_context == g.max_context &&
            s->graph[i].each == g.each && s->graph[i].flags == g.flags &&
            s->graph[i].has_head == g.has_head)
            break;
    if (i == TR_STEP_GRAPHS || (s->no_records && (i == s->n_graphs || !s->graph[i].graph)))
        return tr_model_network(m, p, step, true, err);
    if (i == s->n_graphs) {
        s->graph[s->n_graphs++] = g;
        if (warm_up) return tr_model_network(m, p, step, true, err);
    }
    tr_device_times_mode(tr_model_times(m), TR_STAMP_STEP, NULL);
    tr_status st = prepare(m, p, step, &s->graph[i], &run, &made, err);
    if (st == TR_E_MEMORY && !warm_up) return run_unrecorded(m, p, step, err);
    if (st != TR_OK) return st;
    st = m->ops->graph_run(m->device, TR_LANE_MAIN, run);
    if (st != TR_OK) return tr_fail(err, st, "graph: %s", m->ops->error(m->device));
    if (!made) st = note(m, p, step, &g, err); /* while it runs */
    if (st != TR_OK) return st;
    return g.has_head ? TR_OK : tr_model_head(m, p, step, err);
}

/* ---- records made ahead ------------------------------------------------------------------------------------------------ */

/* A step of n rows that see up to max_context keys, of sequences whose lengths the device knows. */
static const tr_plan *plan_of(tr_plan_builder *b, int n, int max_context)
{
    tr_plan_begin(b, 0, 0);
    for (int slot = 0; slot < n; slot++)
        if (tr_plan_add_decode(b, slot) < 0) return NULL;
    return tr_plan_seal(b, max_context);
}

static tr_status record_ahead(tr_model *m, tr_step *step, tr_plan_builder *b, int n, int context,
                              int *made, tr_err *err)
{
    struct tr_step_memory *s = step->memory;
    const tr_plan *plan = plan_of(b, n, context);
    if (!plan) return tr_fail(err, TR_E_USAGE, "a plan of %d decoded rows does not fit", n);
    tr_pass p = {.plan = plan, .rows = s->rows, .n = n, .n_max = n, .n_head = n};
    if (s->n_graphs == TR_STEP_GRAPHS || s->no_records || !tr_graph_fits(m, &p)) return TR_OK;
    tr_step_graph *g = &s->graph[s->n_graphs];
    *g = kind_of(m, &p);
    step->plan = plan;
    const tr_status st = record(m, &p, step, g, &g->graph, err);
    step->plan = NULL;
    if (st == TR_E_MEMORY) s->no_records = true;
    if (st != TR_OK) return s->no_records ? TR_OK : st;
    s->n_graphs++;
    ++*made;
    return TR_OK;
}

tr_status tr_step_record(tr_step *step, tr_model *m, int n_rows, tr_step_records *sum, tr_err *err)
{
    const tr_plan_limits limits = tr_model_limits(m);
    const int most = n_rows < limits.n_slots ? n_rows : limits.n_slots,
              room = most < TR_GRAPH_ROWS ? most : TR_GRAPH_ROWS,
              k = limits.index_topk < m->max_model_len ? limits.index_topk : m->max_model_len;
    tr_status st = TR_OK;

    /* Members' first step must be a run: it makes their connections. */
    if (!(m->ops->caps & TR_CAP_GRAPH) || tr_comm_size(m->groups.attn_tp) > 1 || m->part)
        return TR_OK;
    const uint64_t begun = tr_now_ns(), before = m->ops->memory_left(m->device);
    tr_plan_builder *b = tr_plan_builder_create(&limits);
    if (!b) return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_regions *regions = m->regions;
    m->regions = NULL;
    for (int n = 1; n / 2 < room && st == TR_OK; n *= 2) {
        const int rows = n < room ? n : room;
        st = record_ahead(m, step, b, rows, k, &sum->n, err);
        for (int c = LEAST_CONTEXT; k < m->max_model_len && c / 4 < m->max_model_len && st == TR_OK;
             c *= 4)
            st = record_ahead(m, step, b, rows, c < m->max_model_len ? c : m->max_model_len,
                              &sum->n, err);
    }
    m->regions = regions;
    tr_plan_builder_free(b);
    const uint64_t after = m->ops->memory_left(m->device);
    sum->ns += tr_now_ns() - begun;
    sum->bytes += before > after ? before - after : 0;
    sum->no_memory |= step->memory->no_records;
    return st;
}

void tr_graph_drop(tr_model *m, tr_step_graph *g)
{
    if (g->graph) m->ops->graph_free(m->device, g->graph);
    if (g->stamped) m->ops->graph_free(m->device, g->stamped);
    if (g->stamps) m->ops->stamps_free(m->device, g->stamps);
    tr_stamp_set_free(g->set);
}

/* ---- time on the device ---------------------------------------------------------------------------------------------- */

static bool stamp(void *ctx, void *set, int i)
{
    tr_model *m = ctx;
    return m->ops->stamp(m->device, m->lane, set ? set : m->stamps, i) == TR_OK;
}

static bool between(void *ctx, void *set, int from, int to, uint64_t *ns)
{
    tr_model *m = ctx;
    return m->ops->stamps_between(m->device, set ? set : m->stamps, from, to, ns) == TR_OK;
}

static int passed(void *ctx, uint64_t ticket)
{
    tr_model *m = ctx;
    return m->ops->done(m->device, TR_LANE_MAIN, ticket);
}

tr_device_times *tr_model_times(const tr_model *m)
{
    return m->timing ? m->times : NULL;
}

tr_status tr_model_time(tr_model *m, int every, tr_err *err)
{
    const tr_stamp_source source = {m, stamp, between, passed};

    if (every <= 0) {
        tr_device_times_collect(tr_model_times(m));
        m->timing = false;
        return TR_OK;
    }
    if (!m->ops->stamps_create || !m->regions) return TR_OK;
    if (!m->stamps && m->ops->stamps_create(m->device, 2 * PAIRS, &m->stamps) != TR_OK)
        return tr_fail(err, TR_E_DEVICE, "%d moments of the device's clock cannot be had",
                       2 * PAIRS);
    if (!m->times) m->times = tr_device_times_create(m->regions, &source, PAIRS);
    if (!m->times) return tr_fail(err, TR_E_MEMORY, "out of memory");
    m->timing = true;
    m->stamp_every = every;
    return TR_OK;
}

int64_t tr_model_times_lost(const tr_model *m)
{
    return m->times ? (int64_t)tr_device_times_lost(m->times) : -1;
}

bool tr_model_step_time(tr_model *m, uint64_t step, tr_device_step *out)
{
    tr_device_times_collect(tr_model_times(m));
    return tr_device_times_of(tr_model_times(m), step, out);
}

void tr_graph_close(tr_model *m)
{
    tr_device_times_free(m->times);
    if (m->stamps) m->ops->stamps_free(m->device, m->stamps);
}
