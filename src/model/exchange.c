/* Rows to the ranks that hold their experts, and back (parallel.md 2.4, 5.1): expert parallelism where the ranks of the MoE
 * group have different rows (data or context parallelism).
 *
 * Ranks of one attention group have the same rows, so each takes a stretch of them. The sum over the attention group, which the
 * shared expert needs anyway, goes in its two halves: each member gets the sum of its own rows, adds what the experts say to it,
 * and gives the rows to the others. So the sum of a row is made in one order whoever has taken it: which row of a step a request
 * is depends on its neighbours, its numbers do not (architecture.md 4). A row goes once to every rank that holds one of its experts; what
 * comes back is the weighted sum over that rank's experts, and the sums are added in the order of the ranks. Rows travel in
 * rounds of a fixed size, so that the memory does not depend on how uneven the router is; the number of rounds is agreed once a
 * step.
 *
 * Steps of few rows, as those that decode, take another way: all rows go to all members, or are there already, and of each row
 * every member's sum comes back, zero where it has none of its experts. Nothing depends on the router, so the host has no part
 * in it and the step can be a graph; the sums are added in the same order and are the same numbers. */
#include <config.h>

#include "model/model_priv.h"
#include "model/note.h"

size_t tr_model_travel_act(const tr_model *m, const tr_moe_weights *w)
{
    return w->gate_up.format == TR_W_E4M3_B128 ? tr_record_act(m->ops, m->config->hidden_size)
                                               : tr_act_bytes(m->ops);
}

static size_t record_of(const tr_model *m, const tr_moe_weights *w)
{
    return tr_dispatch_bytes(m->config->hidden_size, m->config->num_experts_per_tok,
                             tr_model_travel_act(m, w));
}

/* The norm's codes of the pass's rows; q NULL: they travel as they are. */
static tr_quantised codes_of(const tr_model *m, const tr_moe_weights *w)
{
    return tr_model_travel_act(m, w) == TR_CODES ? m->ws.quant[TR_QUANT_HIDDEN] : (tr_quantised){0};
}

/* From a block's scales to the next one's, as the operations that make them have it. */
static int scale_stride(int n_max)
{
    return (n_max + 3) / 4 * 4;
}

/* Records between all members: counts are [members], in records of `bytes`. */
static tr_status travel(tr_model *m, const void *send, const int32_t *n_send, void *recv,
                        const int32_t *n_recv, size_t bytes, tr_ticket *ticket, tr_err *err)
{
    size_t to[TR_MEMBERS_MAX], from[TR_MEMBERS_MAX];
    const int n = tr_comm_size(m->groups.moe);
    for (int i = 0; i < n; i++) {
        to[i] = (size_t)n_send[i] * bytes;
        from[i] = (size_t)n_recv[i] * bytes;
    }
    return tr_comm_all_to_all(m->groups.moe, send, to, recv, from, ticket, err);
}

static int sum(const int32_t *n, int members)
{
    int total = 0;
    for (int i = 0; i < members; i++)
        total += n[i];
    return total;
}

static double bytes_of(const int32_t *n, int members, size_t bytes)
{
    return (double)sum(n, members) * (double)bytes;
}

/* Rows each member of the attention group takes; the last ones may find fewer, or none. */
static int stretch(const tr_model *m, const tr_pass *p)
{
    const int tp = tr_comm_size(m->groups.attn_tp);
    return (p->n + tp - 1) / tp;
}

/* This rank's rows of a round: [*first, *first + the result). */
static int rows_of_round(const tr_model *m, const tr_pass *p, int i_round, int *first)
{
    const int each = stretch(m, p), begin = tr_comm_rank(m->groups.attn_tp) * each;
    const int end = begin + each < p->n ? begin + each : p->n;

    *first = begin + i_round * m->moe_share;
    if (*first >= end) {
        *first = 0;
        return 0;
    }
    return end - *first < m->moe_share ? end - *first : m->moe_share;
}

/* This rank's rows of a round as records, and how many each member gets and gives. */
static tr_status dispatch(tr_model *m, const tr_pass *p, const tr_moe_weights *w, int i_round,
                          int32_t *n_send, int32_t *n_recv, tr_err *err)
{
    const tr_config *c = m->config;
    const int members = tr_comm_size(m->groups.moe);
    size_t word[TR_MEMBERS_MAX];
    tr_ticket ticket = {0};
    int first;
    const int n_rows = rows_of_round(m, p, i_round, &first);
    const tr_quantised codes = codes_of(m, w);

    tr_note(m, tr_work_moe_dispatch(m->moe_share, c->hidden_size, c->num_experts_per_tok,
                                    tr_model_travel_act(m, w)));
    tr_status st =
        TR_RUN(m, moe_dispatch, err, .n = p->rows.n, .first = first, .step = 1, .n_rows = n_rows,
               .k = c->num_experts_per_tok, .d = c->hidden_size, .n_local = w->n_local,
               .n_ep = members / m->groups.n_xt, .n_xt = m->groups.n_xt, .expert = m->ws.expert,
               .weight = m->ws.weight, .x = m->ws.normed, .q = codes.q, .q_scale = codes.scale,
               .ld_scale = scale_stride(p->n_max), .record = m->ws.moe.out,
               .count = m->ws.moe.count, .origin = m->ws.moe.origin);
    if (st == TR_OK)
        st =
            tr_model_fetch_words(m, n_send, m->ws.moe.count, (size_t)members * sizeof *n_send, err);
    for (int i = 0; i < members; i++)
        word[i] = sizeof *n_send;
    tr_comm *host = tr_comm_host(m->groups.moe); /* it reads the counts */
    if (st == TR_OK) st = tr_comm_all_to_all(host, n_send, word, n_recv, word, &ticket, err);
    return tr_model_await(m, host, st, ticket, 4.0 * members, err);
}

/* What came, through this rank's experts: y [n_in, hidden], weighted. Kernels are launched for n_max rows. */
static tr_status experts(tr_model *m, const tr_moe_weights *w, int n_in, int n_max, tr_err *err)
{
    const tr_config *c = m->config;
    const int d = c->hidden_size, k = c->num_experts_per_tok;
    const bool codes = tr_model_travel_act(m, w) == TR_CODES;
    tr_acts in = {.n_max = n_max, .d = d, .scale_pow2 = c->scale_ue8m0, .quantised = codes};
    if (codes) {
        in.q = m->ws.moe.q;
        in.q_scale = m->ws.moe.q_scale;
        in.ld = (size_t)d;
    } else {
        in.x = m->ws.moe.in;
        in.ld = record_of(m, w) / tr_act_bytes(m->ops);
    }

    tr_note(m, codes ? tr_work_moe_dispatch(n_in, d, k, TR_CODES) : tr_work_moe_pack(n_in, 2 * k));
    tr_status st =
        TR_RUN(m, moe_receive, err, .record = m->ws.moe.in, .n_rows = n_in, .k = k, .d = d,
               .expert = m->ws.moe.expert, .weight = m->ws.moe.weight, .n_out = m->ws.moe.n,
               .q = in.q, .q_scale = in.q_scale, .ld_scale = scale_stride(n_max));
    tr_note(m, tr_work_moe_pack(n_in, k));
    if (st == TR_OK)
        st = TR_RUN(m, moe_pack, err, .n = m->ws.moe.n, .n_max = n_max, .k = k,
                    .e_first = w->e_first, .n_local = w->n_local, .expert = m->ws.moe.expert,
                    .start = m->ws.start, .pair = m->ws.pair, .rows = tr_model_expert_rows(m));
    /* one pair a row: how many of its choices are here, the device knows */
    tr_note(m, tr_work_moe(n_in, tr_expected_hits(m->config, w->n_local, n_in), m->ops, &w->gate_up,
                           &w->down));
    if (st == TR_OK)
        st = TR_RUN(m, moe, err, .n = m->ws.moe.n, .n_max = n_max, .k = k, .n_local = w->n_local,
                    .gate_up = &w->gate_up, .down = &w->down, .in = in, .start = m->ws.start,
                    .pair = m->ws.pair, .out = m->ws.expert_out, .workspace = m->ws.scratch,
                    .workspace_bytes = m->ws.scratch_bytes);
    tr_note(m, tr_work_moe_combine(n_in, k, d));
    if (st == TR_OK)
        st = TR_RUN(m, moe_combine, err, .n = m->ws.moe.n, .n_max = n_max, .k = k, .d = d,
                    .e_first = w->e_first, .n_local = w->n_local, .expert = m->ws.moe.expert,
                    .weight = m->ws.moe.weight, .y = m->ws.expert_out, .out = m->ws.moe.y);
    return st;
}

/* Sums of this member's rows over the attention group, into their place. */
static tr_status sum_own(tr_model *m, const tr_pass *p, tr_act *out, tr_err *err)
{
    tr_comm *tp = m->groups.attn_tp;
    const size_t n = (size_t)stretch(m, p) * (size_t)m->config->hidden_size;
    tr_ticket ticket = {0};

    if (tr_comm_size(tp) == 1) return TR_OK;
    tr_act *own = tr_model_act_at(m, out, (size_t)tr_comm_rank(tp) * n);
    tr_status st = tr_comm_reduce_scatter(tp, out, own, n, m->ops->act, &ticket, err);
    return tr_model_await(m, tp, st, ticket, (double)n * (double)tr_act_bytes(m->ops), err);
}

/* Everybody's rows to everybody. */
static tr_status tell_own(tr_model *m, const tr_pass *p, tr_act *out, tr_err *err)
{
    tr_comm *tp = m->groups.attn_tp;
    const size_t n = (size_t)stretch(m, p) * (size_t)m->config->hidden_size;
    size_t bytes[TR_MEMBERS_MAX];
    tr_ticket ticket = {0};

    if (tr_comm_size(tp) == 1) return TR_OK;
    for (int i = 0; i < tr_comm_size(tp); i++)
        bytes[i] = n * tr_act_bytes(m->ops);
    const tr_act *own = tr_model_act_at(m, out, (size_t)tr_comm_rank(tp) * n);
    tr_status st = tr_comm_all_gather(tp, own, out, bytes, &ticket, err);
    return tr_model_await(m, tp, st, ticket, (double)bytes[0], err);
}

/* What this member's own rows begin with: the shared expert's sum. */
static tr_status begin_own(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_act *out,
                           tr_status (*shared)(tr_model *, const tr_pass *, const tr_moe_weights *,
                                               tr_err *),
                           tr_err *err)
{
    tr_status st = shared(m, p, w, err);
    return st == TR_OK ? sum_own(m, p, out, err) : st;
}

tr_status tr_moe_exchange(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_act *out,
                          tr_status (*shared)(tr_model *, const tr_pass *, const tr_moe_weights *,
                                              tr_err *),
                          tr_err *err)
{
    const tr_config *c = m->config;
    const int members = tr_comm_size(m->groups.moe);
    const size_t record = record_of(m, w), row = (size_t)c->hidden_size * tr_act_bytes(m->ops);
    int32_t n_send[TR_MEMBERS_MAX], n_recv[TR_MEMBERS_MAX];
    tr_status st = TR_OK;
    tr_ticket ticket = {0};

    for (int i = 0; i < p->rounds && st == TR_OK; i++) {
        st = dispatch(m, p, w, i, n_send, n_recv, err);
        if (st != TR_OK) return st;
        st = travel(m, m->ws.moe.out, n_send, m->ws.moe.in, n_recv, record, &ticket, err);
        if (st == TR_OK && i == 0 && !m->no_overlap) st = begin_own(m, p, w, out, shared, err);
        st = tr_model_await(m, m->groups.moe, st, ticket, bytes_of(n_send, members, record), err);
        if (st == TR_OK && i == 0 && m->no_overlap) st = begin_own(m, p, w, out, shared, err);
        if (st == TR_OK) st = experts(m, w, sum(n_recv, members), m->moe_rows, err);
        if (st != TR_OK) return st;
        st = travel(m, m->ws.moe.y, n_recv, m->ws.moe.back, n_send, row, &ticket, err);
        st = tr_model_await(m, m->groups.moe, st, ticket, bytes_of(n_recv, members, row), err);
        tr_note(m, tr_work_moe_return(sum(n_send, members), c->hidden_size));
        if (st == TR_OK)
            st = TR_RUN(m, moe_return, err, .n_rows = sum(n_send, members), .d = c->hidden_size,
                        .n_members = members, .count = m->ws.moe.count, .origin = m->ws.moe.origin,
                        .y = m->ws.moe.back, .out = out);
    }
    return st == TR_OK ? tell_own(m, p, out, err) : st;
}

/* ---- few rows ---------------------------------------------------------------------------------------------------------- */

/* Replicas in the MoE group, and the rows that each of a replica's members tells the others. */
static int replicas(const tr_model *m)
{
    return tr_comm_size(m->groups.moe) / m->moe_same;
}

static int told(const tr_model *m, int each)
{
    return (each + m->moe_same - 1) / m->moe_same;
}

/* One row of every replica, or a few: what would travel in any case is so little that all may get all of it. */
static bool fits(const tr_model *m, uint64_t n)
{
    enum { MOST_ROWS = 1024 }; /* of all replicas together */
    const int members = tr_comm_size(m->groups.moe), n_ep = members / m->groups.n_xt,
              k = m->config->num_experts_per_tok;
    const uint64_t back = (uint64_t)m->moe_share * (uint64_t)(k < n_ep ? k : n_ep) *
                          (uint64_t)m->groups.n_xt; /* rows that ws.moe.back has room for */

    if (!m->moe_same || n > TR_GRAPH_ROWS) return false;
    const uint64_t share = (uint64_t)told(m, (int)n), of_replica = share * (uint64_t)m->moe_same;
    const uint64_t all = of_replica * (uint64_t)replicas(m),
                   come = m->moe_same > 1 ? all : of_replica;
    return all <= MOST_ROWS && all <= (uint64_t)m->moe_rows && come * (uint64_t)members <= back;
}

/* This member's experts on the rows that it has itself: y [each, hidden]. */
static tr_status experts_here(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_err *err)
{
    const int d = m->config->hidden_size, k = m->config->num_experts_per_tok;

    tr_status st = tr_model_experts(m, p, w, err);
    tr_note(m, tr_work_moe_combine(p->n, k, d));
    if (st == TR_OK)
        st = TR_RUN(m, moe_combine, err, .n = p->rows.n, .n_max = p->n_max, .k = k, .d = d,
                    .e_first = w->e_first, .n_local = w->n_local, .expert = m->ws.expert,
                    .weight = m->ws.weight, .y = m->ws.expert_out, .out = m->ws.moe.y);
    return st;
}

/* The rows of all replicas to all members, and this one's experts on them: y [replicas * same * told, hidden]. */
static tr_status experts_of_all(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_err *err)
{
    const tr_config *c = m->config;
    const int members = tr_comm_size(m->groups.moe), share = told(m, p->each);
    const size_t record = record_of(m, w);
    const tr_quantised codes = codes_of(m, w);
    size_t bytes[TR_MEMBERS_MAX];
    tr_ticket ticket = {0};

    tr_note(m, tr_work_moe_dispatch(share, c->hidden_size, c->num_experts_per_tok,
                                    tr_model_travel_act(m, w)));
    tr_status st =
        TR_RUN(m, moe_offer, err, .n = p->rows.n,
               .first = tr_comm_rank(m->groups.moe) % m->moe_same * share, .n_rows = share,
               .k = c->num_experts_per_tok, .d = c->hidden_size, .expert = m->ws.expert,
               .weight = m->ws.weight, .x = m->ws.normed, .q = codes.q, .q_scale = codes.scale,
               .ld_scale = scale_stride(p->n_max), .record = m->ws.moe.out);
    for (int i = 0; i < members; i++)
        bytes[i] = (size_t)share * record;
    if (st == TR_OK)
        st = tr_comm_all_gather(m->groups.moe, m->ws.moe.out, m->ws.moe.in, bytes, &ticket, err);
    st = tr_model_await(m, m->groups.moe, st, ticket, (double)bytes[0], err);
    return st == TR_OK ? experts(m, w, members * share, members * share, err) : st;
}

/* What every member's experts made of this replica's rows: back [members, ld, hidden], of which they are rows *at and on. Begun.
 * Replicas of one member each get theirs alone; members of a larger one want the same rows, which an all-to-all does not give. */
static tr_status collect(tr_model *m, const tr_pass *p, size_t *ld, size_t *at, tr_ticket *ticket,
                         tr_err *err)
{
    const int members = tr_comm_size(m->groups.moe), n = replicas(m);
    const size_t row = (size_t)m->config->hidden_size * tr_act_bytes(m->ops),
                 of_replica =
                     n > 1 ? (size_t)told(m, p->each) * (size_t)m->moe_same : (size_t)p->each;
    size_t bytes[TR_MEMBERS_MAX];

    *at = 0;
    *ld = of_replica;
    if (m->moe_same > 1) {
        *ld = of_replica * (size_t)n;
        *at = of_replica * (size_t)(tr_comm_rank(m->groups.moe) / m->moe_same);
    }
    for (int i = 0; i < members; i++)
        bytes[i] = *ld * row;
    if (m->moe_same > 1)
        return tr_comm_all_gather(m->groups.moe, m->ws.moe.y, m->ws.moe.back, bytes, ticket, err);
    return tr_comm_all_to_all(m->groups.moe, m->ws.moe.y, bytes, m->ws.moe.back, bytes, ticket,
                              err);
}

tr_status tr_moe_tell(tr_model *m, const tr_pass *p, const tr_moe_weights *w, tr_act *out,
                      tr_status (*shared)(tr_model *, const tr_pass *, const tr_moe_weights *,
                                          tr_err *),
                      tr_err *err)
{
    const int members = tr_comm_size(m->groups.moe), d = m->config->hidden_size;
    size_t ld = 0, at = 0;
    tr_ticket ticket = {0};

    tr_status st = replicas(m) > 1 ? experts_of_all(m, p, w, err) : experts_here(m, p, w, err);
    if (st != TR_OK) return st;
    st = collect(m, p, &ld, &at, &ticket, err);
    if (st == TR_OK && m->no_overlap) st = tr_model_await(m, m->groups.moe, st, ticket, 0, err);
    if (st == TR_OK && !tr_model_forks(m, p)) st = shared(m, p, w, err);
    if (st == TR_OK) st = tr_model_join(m, p, err);
    if (st == TR_OK) st = tr_model_reduce(m, p, m->groups.attn_tp, out, err);
    if (st == TR_OK && !m->no_overlap)
        st = tr_model_await(m, m->groups.moe, st, ticket,
                            (double)members * (double)ld * d * (double)tr_act_bytes(m->ops), err);
    tr_note(m, tr_work_moe_add(p->n, d, members));
    if (st == TR_OK)
        st =
            TR_RUN(m, moe_add, err, .n = p->rows.n, .n_max = p->n_max, .d = d, .n_members = members,
                   .ld = ld, .y = tr_model_act_at(m, m->ws.moe.back, at * (size_t)d), .out = out);
    return st;
}

/* Every replica has its own rows, or none; if those of one are dispatched those of all are: where one has a prompt. */
tr_status tr_moe_rounds(tr_model *m, tr_pass *p, tr_err *err)
{
    uint64_t most[3] = {(uint64_t)stretch(m, p), (uint64_t)p->n,
                        p->split || tr_plan_phase(p->plan) == TR_PHASE_PREFILL};
    tr_ticket ticket = {0};

    p->rounds = p->each = 0;
    if (!m->moe_exchange) return TR_OK;
    tr_comm *host = tr_comm_host(m->groups.moe);
    tr_status st = tr_comm_all_max_u64(host, most, 3, &ticket, err);
    st = tr_model_await(m, host, st, ticket, sizeof most, err);
    p->rounds = (int)((most[0] + (uint64_t)m->moe_share - 1) / (uint64_t)m->moe_share);
    if (st != TR_OK || most[2] || most[1] == 0) return st;
    /* As many as a record of the step has room for (graph.c), whatever the members make of it. */
    uint64_t each = 1;
    while (each < most[1])
        each *= 2;
    if (each > (uint64_t)m->max_rows) each = (uint64_t)m->max_rows;
    if (fits(m, each)) p->each = (int)each;
    return st;
}
