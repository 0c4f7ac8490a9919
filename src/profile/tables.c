/* The datasets that are written whole with every flush: regions and their numbers, communicators, experts, counters by
 * phase. */
#include <config.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/profile_priv.h"

/* ---- regions -------------------------------------------------------------------------------------------------------- */

static bool make_room(tr_profile *p, int n)
{
    if (n <= p->region_room) return true;
    const int room = n > 2 * p->region_room ? n : 2 * p->region_room;
    void *region = realloc(p->region, (size_t)room * sizeof *p->region);
    if (region) p->region = region;
    void *column = realloc(p->column, (size_t)room * sizeof(uint64_t));
    if (column) p->column = column;
    if (!region || !column) return false;
    p->region_room = room;
    return true;
}

/* Nodes that were not there before become rows; a parent is always there before its children. */
static tr_status map_stream(tr_profile *p, tr_prof_stream *s, tr_err *err)
{
    const int n = tr_regions_look(s->regions, s->node, s->nodes_max);

    if (!make_room(p, p->n_regions + n - s->n_nodes))
        return tr_fail(err, TR_E_MEMORY, "out of memory for %d regions", p->n_regions + n);
    for (int i = s->n_nodes; i < n; i++) {
        const tr_region_node *node = &s->node[i];
        const tr_region_total *t = &s->regions->total[node->id];
        tr_prof_region *r = &p->region[p->n_regions];
        *r = (tr_prof_region){.id = (uint32_t)p->n_regions,
                              .parent = node->parent < 0 ? -1 : (int32_t)s->row[node->parent],
                              .kind = (uint8_t)t->kind,
                              .depth = (uint8_t)node->depth,
                              .layer = (int16_t)node->layer,
                              .group = (int16_t)t->group};
        memcpy(r->name, t->name, strnlen(t->name, sizeof r->name - 1));
        s->row[i] = (uint32_t)p->n_regions++;
    }
    s->n_nodes = n;
    return TR_OK;
}

tr_status tr_profile_map_regions(tr_profile *p, tr_err *err)
{
    tr_status st = TR_OK;
    for (int i = 0; i < p->n_streams && st == TR_OK; i++)
        st = map_stream(p, &p->stream[i], err);
    return st;
}

/* Sum over phases [from, to). */
static tr_region_numbers sum(const tr_region_node *node, int from, int to)
{
    tr_region_numbers s = {0};

    for (int i = from; i < to; i++) {
        const tr_region_numbers *n = &node->in[i];
        if (!n->count) continue;
        if (!s.count || n->min_ns < s.min_ns) s.min_ns = n->min_ns;
        if (n->max_ns > s.max_ns) s.max_ns = n->max_ns;
        s.count += n->count;
        s.incl_ns += n->incl_ns;
        s.excl_ns += n->excl_ns;
        s.sumsq += n->sumsq;
        s.bytes += n->bytes;
        s.flops += n->flops;
        s.gpu_count += n->gpu_count;
        s.gpu_ns += n->gpu_ns;
    }
    return s;
}

static uint64_t whole(double x)
{
    return x > 0 ? (uint64_t)llround(x) : 0;
}

/* Time of a communicator's own regions is time in which this thread computed nothing. What lies around them (the model's
 * exchange, ...) has its own exclusive time, which is none of theirs. */
static uint64_t exposed(const tr_prof_region *r, const tr_region_numbers *n)
{
    const bool communicates = r->kind == TR_KIND_COMM || r->kind == TR_KIND_WAIT;
    return communicates && r->group >= 0 ? n->excl_ns : 0;
}

static void fill(tr_profile *p, tr_dataset_id id, int from, int to)
{
    uint64_t *u = p->column;
    double *f = p->column;

    for (int k = 0; k < p->n_streams; k++) {
        const tr_prof_stream *s = &p->stream[k];
        for (int i = 0; i < s->n_nodes; i++) {
            const tr_region_numbers n = sum(&s->node[i], from, to);
            const uint32_t row = s->row[i];
            switch (id) {
            case TR_D_COUNT:
                u[row] = n.count;
                break;
            case TR_D_TIME_INCL:
                u[row] = n.incl_ns;
                break;
            case TR_D_TIME_EXCL:
                u[row] = n.excl_ns;
                break;
            case TR_D_TIME_MIN:
                u[row] = n.min_ns;
                break;
            case TR_D_TIME_MAX:
                u[row] = n.max_ns;
                break;
            case TR_D_TIME_SUMSQ:
                f[row] = n.sumsq;
                break;
            case TR_D_BYTES:
                u[row] = whole(n.bytes);
                break;
            case TR_D_FLOPS:
                f[row] = n.flops;
                break;
            case TR_D_GPU_NS:
                u[row] = n.gpu_ns;
                break;
            case TR_D_GPU_COUNT:
                u[row] = n.gpu_count;
                break;
            default:
                u[row] = exposed(&p->region[row], &n);
                break;
            }
        }
    }
}

static bool phase_ran(const tr_profile *p, int phase)
{
    for (int k = 0; k < p->n_streams; k++)
        for (int i = 0; i < p->stream[k].n_nodes; i++)
            if (p->stream[k].node[i].in[phase].count) return true;
    return false;
}

static bool timed_on_gpu(const tr_profile *p)
{
    for (int k = 0; k < p->n_streams; k++)
        for (int i = 0; i < p->stream[k].n_nodes; i++)
            for (int phase = 0; phase <= TR_N_PHASES; phase++)
                if (p->stream[k].node[i].in[phase].gpu_count) return true;
    return false;
}

static tr_status write_regions(tr_profile *p, tr_err *err)
{
    const bool has_gpu = timed_on_gpu(p);
    const uint64_t n = (uint64_t)p->n_regions, dims[] = {1, n};
    char path[64];

    tr_status st = tr_prof_file_scale(p->file, TR_AXIS_REGION, 0, n, err);
    if (st == TR_OK)
        st = tr_prof_file_put(p->file, &tr_datasets[TR_D_REGIONS], NULL, &n, p->region, err);
    for (int i = 0; i < TR_N_DATASETS && st == TR_OK; i++) {
        const tr_dataset *d = &tr_datasets[i];
        if (!(d->flags & TR_DATASET_PHASES)) continue;
        if ((i == TR_D_GPU_NS || i == TR_D_GPU_COUNT) && !has_gpu) continue;
        fill(p, (tr_dataset_id)i, 0, TR_N_PHASES + 1);
        st = tr_prof_file_put(p->file, d, NULL, dims, p->column, err);
        for (int phase = 0; phase < TR_N_PHASES && st == TR_OK; phase++) {
            if (!phase_ran(p, phase)) continue;
            fill(p, (tr_dataset_id)i, phase, phase + 1);
            tr_dataset_phase_path(path, sizeof path, d, (tr_phase)phase);
            st = tr_prof_file_put(p->file, d, path, dims, p->column, err);
        }
    }
    return st;
}

/* ---- everything else -------------------------------------------------------------------------------------------------- */

/* The main thread's pictures, as they were last asked for. */
static void copy_tables(tr_profile *p, int *n_windows, uint64_t *window_steps)
{
    const tr_profile_options *o = &p->o;
    const size_t layers = (size_t)o->n_layers;

    pthread_mutex_lock(&p->lock);
    memcpy(p->copy.comm, p->now.comm, (size_t)o->n_comm * sizeof *p->now.comm);
    memcpy(p->copy.overlap, p->now.overlap, layers * sizeof *p->now.overlap);
    memcpy(p->copy.rank_tokens, p->now.rank_tokens, layers * sizeof(uint64_t));
    memcpy(p->copy.expert_tokens, p->now.expert_tokens,
           layers * (size_t)o->n_experts * sizeof(uint64_t));
    for (int i = 0; i < o->n_matrices; i++)
        memcpy(p->copy.sent[i], p->now.sent[i], (size_t)o->world * sizeof(uint64_t));
    *n_windows = p->n_windows;
    *window_steps = p->window_steps;
    memcpy(p->window_copy, p->window, (size_t)p->n_windows * layers * sizeof(uint64_t));
    pthread_mutex_unlock(&p->lock);
}

/* The first row of the main stream that has this name. */
static uint32_t row_of(const tr_profile *p, uint32_t id)
{
    const tr_prof_stream *s = &p->stream[0];
    for (int i = 0; p->n_streams && i < s->n_nodes; i++)
        if ((uint32_t)s->node[i].id == id) return s->row[i];
    return TR_PROFILE_NO_REGION;
}

static tr_status write_experts(tr_profile *p, int n_windows, uint64_t window_steps, tr_err *err)
{
    const uint64_t layers = (uint64_t)p->o.n_layers, experts = (uint64_t)p->o.n_experts,
                   rank_dims[] = {1, layers}, expert_dims[] = {layers, experts},
                   window_dims[] = {1, (uint64_t)n_windows, layers};
    tr_status st = tr_prof_file_put(p->file, &tr_datasets[TR_D_EXPERT_TOKENS], NULL, expert_dims,
                                    p->copy.expert_tokens, err);
    if (st == TR_OK)
        st = tr_prof_file_put(p->file, &tr_datasets[TR_D_RANK_TOKENS], NULL, rank_dims,
                              p->copy.rank_tokens, err);
    if (st == TR_OK)
        st = tr_prof_file_put(p->file, &tr_datasets[TR_D_WINDOW_TOKENS], NULL, window_dims,
                              p->window_copy, err);
    if (st == TR_OK)
        st = tr_prof_file_number(p->file, tr_datasets[TR_D_WINDOW_TOKENS].path, "window_steps",
                                 (int64_t)window_steps, err);
    return st;
}

const char *tr_profile_counter_path(char *text, size_t n, const char *folder, const char *source,
                                    const char *name)
{
    const int at = snprintf(text, n, "%s/%s/", folder, source);

    snprintf(text + at, n - (size_t)at, "%s", name);
    for (char *c = text + at; *c; c++)
        if (*c == '/') *c = '|';
    return text;
}

static tr_status write_counters(tr_profile *p, const tr_profile_counters *c, tr_err *err)
{
    char path[256], folder[64];
    const uint64_t one = 1;
    tr_status st = TR_OK;

    for (int i = 0; i < c->n && st == TR_OK; i++) {
        const tr_dataset *d = &tr_datasets[TR_D_COUNTER];
        tr_profile_counter_path(path, sizeof path, d->path, c->source, c->name[i]);
        st = tr_prof_file_append(p->file, d, path, 0, NULL, err);
        if (st == TR_OK) st = tr_prof_file_text(p->file, path, "source", c->source, err);
        if (st == TR_OK) st = tr_prof_file_text(p->file, path, "units", c->units[i], err);
        if (st == TR_OK && c->absent[i])
            st = tr_prof_file_text(p->file, path, "absent", c->absent[i], err);
    }
    for (int phase = 0; phase < TR_N_PHASES && c->phase && st == TR_OK; phase++) {
        if (!phase_ran(p, phase)) continue;
        c->phase(c->ctx, (tr_phase)phase, p->values);
        snprintf(folder, sizeof folder, "/phase/%s/counters", tr_phase_names.name[phase]);
        for (int i = 0; i < c->n && st == TR_OK; i++) {
            const double value = c->absent[i] ? (double)NAN : p->values[i];
            tr_profile_counter_path(path, sizeof path, folder, c->source, c->name[i]);
            st = tr_prof_file_put(p->file, &tr_datasets[TR_D_PHASE_COUNTER], path, &one, &value,
                                  err);
        }
    }
    return st;
}

tr_status tr_profile_write_tables(tr_profile *p, tr_err *err)
{
    const tr_profile_options *o = &p->o;
    const uint64_t comm_dims[] = {1, (uint64_t)o->n_comm}, peer_dims[] = {1, (uint64_t)o->world},
                   layer_dims[] = {1, (uint64_t)o->n_layers};
    char path[64];
    int n_windows;
    uint64_t window_steps;

    tr_status st = tr_profile_map_regions(p, err);
    if (st == TR_OK) st = write_regions(p, err);
    copy_tables(p, &n_windows, &window_steps);
    for (int i = 0; i < o->n_comm; i++)
        p->copy.comm[i].region = row_of(p, p->copy.comm[i].region);
    if (st == TR_OK && o->n_comm)
        st = tr_prof_file_put(p->file, &tr_datasets[TR_D_COMM_OPS], NULL, comm_dims, p->copy.comm,
                              err);
    for (int i = 0; i < o->n_matrices && st == TR_OK; i++) {
        snprintf(path, sizeof path, "/comm/matrix/%s", p->matrix[i]);
        st = tr_prof_file_put(p->file, &tr_datasets[TR_D_COMM_MATRIX], path, peer_dims,
                              p->copy.sent[i], err);
    }
    if (st == TR_OK && o->n_layers)
        st = tr_prof_file_put(p->file, &tr_datasets[TR_D_OVERLAP_CP], NULL, layer_dims,
                              p->copy.overlap, err);
    if (st == TR_OK && o->n_layers && o->n_experts)
        st = write_experts(p, n_windows, window_steps, err);
    for (int i = 0; i < p->n_sources && st == TR_OK; i++)
        st = write_counters(p, &p->source[i], err);
    return st;
}
