#include <config.h>

#include <math.h>
#include <string.h>

#include "base/size.h"
#include "kernels/cpu/cpu_priv.h"
#include "kernels/cpu/packed.h"
#include "kernels/limits.h"

/* Mixture of experts (model.md 6): which experts a row takes, the experts themselves, and their
 * weighted sum. */

enum { EXPERTS_MAX = TR_CPU_EXPERTS_MAX, GROUPS_MAX = EXPERTS_MAX, COMBINE_CHUNK = 1024 };
_Static_assert(2 * EXPERTS_MAX <= TR_TEAM_COUNTERS, "a counter for both phases of every expert");

/* ---- router ---- */

/* Index of the largest b that is not taken, the first of equals; -1: all are taken. */
static int best_of(const float *b, const uint8_t *taken, int n)
{
    int best = -1;
    for (int i = 0; i < n; i++)
        if (!taken[i] && (best < 0 || b[i] > b[best])) best = i;
    return best;
}

/* With a bias the sum of a group's two best, without one its best. */
static float group_score(const float *b, int n, int has_bias)
{
    float first = -INFINITY, second = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (b[i] > first) {
            second = first;
            first = b[i];
        } else if (b[i] > second) {
            second = b[i];
        }
    }
    return has_bias && n > 1 ? first + second : first;
}

/* b = -inf outside the topk_group best groups. */
static void mask_groups(float *b, const struct tr_router_args *a)
{
    const int n = a->n_experts / a->n_group;
    float score[GROUPS_MAX];
    uint8_t keep[GROUPS_MAX] = {0};

    for (int g = 0; g < a->n_group; g++)
        score[g] = group_score(b + g * n, n, a->bias != NULL);
    for (int i = 0; i < a->topk_group; i++) {
        int g = best_of(score, keep, a->n_group);
        if (g >= 0) keep[g] = 1;
    }
    for (int g = 0; g < a->n_group; g++)
        for (int i = 0; i < n && !keep[g]; i++)
            b[g * n + i] = -INFINITY;
}

static void route_row(const struct tr_router_args *a, int r)
{
    const float *logits = a->logits + (size_t)r * (size_t)a->n_experts;
    int32_t *expert = a->expert + (size_t)r * (size_t)a->k;
    float *weight = a->weight + (size_t)r * (size_t)a->k;
    TR_SCRATCH float s[EXPERTS_MAX];
    TR_SCRATCH float b[EXPERTS_MAX];
    float sum = 0;
    uint8_t taken[EXPERTS_MAX] = {0};

    for (int e = 0; e < a->n_experts; e++) {
        s[e] = 1.0f / (1.0f + expf(-logits[e]));
        b[e] = a->bias ? s[e] + a->bias[e] : s[e];
        if (isnan(b[e])) b[e] = -INFINITY; /* any k experts, so long as they are k */
    }
    if (a->n_group > 1) mask_groups(b, a);
    for (int j = 0; j < a->k; j++) {
        int e = best_of(b, taken, a->n_experts);
        taken[e] = 1;
        expert[j] = e;
        weight[j] = s[e];
        sum += s[e];
    }
    for (int j = 0; j < a->k; j++) {
        if (a->norm_topk) weight[j] /= sum + 1e-20f;
        weight[j] *= a->scaling;
    }
}

typedef struct router_work {
    const struct tr_router_args *a;
    int n;
} router_work;

static void router_member(void *ctx, int i, int n)
{
    const router_work *w = ctx;
    for (int r = tr_team_part(w->n, i, n); r < tr_team_part(w->n, i + 1, n); r++)
        route_row(w->a, r);
}

tr_status tr_cpu_router(tr_device *d, tr_lane lane, const struct tr_router_args *a)
{
    router_work w = {a, tr_live_rows(a->n, a->n_max)};
    (void)lane;
    if (a->n_experts < 1 || a->n_experts > EXPERTS_MAX || a->k < 1 || a->k > a->n_experts ||
        a->n_group < 1 || a->n_experts % a->n_group != 0)
        return tr_cpu_fail(d, TR_E_USAGE,
                           "router: %d of %d experts in %d groups (at most %d experts)", a->k,
                           a->n_experts, a->n_group, EXPERTS_MAX);
    tr_device_run(d, (double)w.n * a->n_experts * (8 + a->k), router_member, &w);
    return TR_OK;
}

/* ---- pairs by expert ---- */

/* A counting sort; start is the counter first, then the cursor of each expert, then what it should
 * be. */
tr_status tr_cpu_moe_pack(tr_device *d, tr_lane lane, const struct tr_moe_pack_args *a)
{
    const int n_pairs = tr_live_rows(a->n, a->n_max) * a->k;
    (void)d, (void)lane;

    memset(a->start, 0, (size_t)(a->n_local + 1) * sizeof *a->start);
    for (int i = 0; i < n_pairs; i++) {
        int e = a->expert[i] - a->e_first;
        if (e >= 0 && e < a->n_local) a->start[e + 1]++;
    }
    for (int e = 0; e < a->n_local; e++)
        a->start[e + 1] += a->start[e];
    for (int i = 0; i < n_pairs; i++) {
        int e = a->expert[i] - a->e_first;
        if (e >= 0 && e < a->n_local) a->pair[a->start[e]++] = i;
    }
    memmove(a->start + 1, a->start, (size_t)a->n_local * sizeof *a->start);
    a->start[0] = 0;
    for (int e = 0; a->rows && e < a->n_local; e++)
        a->rows[e] += (uint64_t)(a->start[e + 1] - a->start[e]);
    return TR_OK;
}

/* ---- the experts ---- */

/* Of one call: rows in the order of `pair`. gate_up [n_pairs, 2 inner]; silu(gate) * up replaces
 * gate. */
typedef struct moe_work {
    const tr_device *d;
    const struct tr_moe_args *a;
    int n_pairs, inner;
    int32_t *row; /* [n_pairs]: pair / k */
    float *gate_up;
} moe_work;

size_t tr_cpu_moe_workspace(int n_max, int k, int d, int d_inner)
{
    (void)d;
    if (n_max <= 0 || k <= 0 || d_inner <= 0) return 0;
    size_t n_pairs = (size_t)n_max * (size_t)k;
    return n_pairs * (2 * (size_t)d_inner * sizeof(float) + sizeof(int32_t));
}

/* Units of 16 inner columns, a panel of gate and one of up, so that whoever has both can go on to
 * silu. Where up begins inside a panel an expert is one unit. */
static int inner_units(int inner)
{
    return inner % TR_PANEL == 0 ? inner / TR_PANEL : 1;
}

static void expert_inner(const tr_device *d, const moe_work *w, int e, tr_pieces *units)
{
    const struct tr_moe_args *a = w->a;
    const int first = a->start[e], n_rows = a->start[e + 1] - first,
              n_units = inner_units(w->inner);
    float *gate_up = w->gate_up + (size_t)first * 2 * (size_t)w->inner;
    tr_gemm g = {
        .w = a->gate_up,
        .i_mat = e,
        .x = a->in.x,
        .ldx = a->in.ld,
        .row_index = w->row + first,
        .y = gate_up,
        .ldy = 2 * (size_t)w->inner,
        .n_rows = n_rows,
    };
    const int width = w->inner % TR_PANEL == 0 ? TR_PANEL : w->inner; /* of a unit */
    int begin, end;

    if (width == TR_PANEL) {
        d->k.gemm(&g, units);
        units->offset = n_units;
        d->k.gemm(&g, units);
        units->offset = 0;
    } else if (tr_piece(units, 0, &begin, &end)) {
        tr_cpu_gemm_panels(d, &g, 0, tr_n_panels(2 * w->inner));
    }
    for (int p = 0; tr_piece(units, p, &begin, &end); p++) {
        for (int r = 0; r < n_rows; r++) {
            float *gate = gate_up + (size_t)r * 2 * (size_t)w->inner + begin * width;
            tr_swiglu_row(d, gate, gate, gate + w->inner, (end - begin) * width);
        }
    }
}

static void expert_down(const tr_device *d, const moe_work *w, int e, tr_pieces *panels)
{
    const struct tr_moe_args *a = w->a;
    const int first = a->start[e];
    tr_gemm g = {
        .w = a->down,
        .i_mat = e,
        .x = w->gate_up + (size_t)first * 2 * (size_t)w->inner,
        .ldx = 2 * (size_t)w->inner,
        .y = a->out,
        .ldy = (size_t)a->down->n_out,
        .out_index = a->pair + first,
        .n_rows = a->start[e + 1] - first,
    };
    d->k.gemm(&g, panels);
}

typedef void expert_fn(const tr_device *d, const moe_work *w, int e, tr_pieces *units);

typedef struct expert_phase {
    expert_fn *fn;
    int n_units;       /* of an expert */
    size_t unit_bytes; /* of weights */
    int counter;       /* of expert 0's pieces */
} expert_phase;

/* A unit costs its rows and, for reading and expanding the weights, about four more. */
static int64_t unit_cost(const moe_work *w, int e)
{
    enum { READING = 4 };
    const int n_rows = w->a->start[e + 1] - w->a->start[e];
    return n_rows > 0 ? n_rows + READING : 0;
}

static int64_t total_cost(const moe_work *w, int n_units)
{
    int64_t total = 0;
    for (int e = 0; e < w->a->n_local; e++)
        total += n_units * unit_cost(w, e);
    return total;
}

/* Thread i of n does its share of the units of every used expert, and no more: shares are consecutive and of equal cost. */
static void phase_part(const tr_device *d, const moe_work *w, const expert_phase *phase, int i,
                       int n)
{
    TR_SCRATCH tr_pieces own;
    const int64_t total = total_cost(w, phase->n_units);
    const int64_t low = total * i / n, high = total * (i + 1) / n;
    int64_t base = 0;

    for (int e = 0; e < w->a->n_local && base < high; e++) {
        const int64_t cost = unit_cost(w, e);
        if (cost == 0) continue;
        int64_t begin = low > base ? (low - base + cost - 1) / cost : 0;
        int64_t end = (high - base + cost - 1) / cost;
        if (end > phase->n_units) end = phase->n_units;
        if (begin < end) {
            tr_pieces_own(&own, (int)begin, (int)end);
            phase->fn(d, w, e, &own);
        }
        base += phase->n_units * cost;
    }
}

/* Thread i of n begins where its share would, and takes units of one expert after another until none is left of any. */
static void phase_shared(const tr_device *d, const moe_work *w, const expert_phase *phase, int i,
                         int n)
{
    TR_SCRATCH tr_pieces units;
    const int n_local = w->a->n_local;
    const int64_t low = total_cost(w, phase->n_units) * i / n;
    int64_t base = 0;
    int e = 0;

    for (; e + 1 < n_local && base + phase->n_units * unit_cost(w, e) <= low; e++)
        base += phase->n_units * unit_cost(w, e);
    for (int k = 0; k < n_local; k++, e = e + 1 < n_local ? e + 1 : 0) {
        if (unit_cost(w, e) == 0) continue;
        tr_pieces_shared(&units, d->team, phase->counter + e, phase->n_units, 1, 0,
                         phase->unit_bytes);
        phase->fn(d, w, e, &units);
    }
}

static int most_rows(const struct tr_moe_args *a)
{
    int most = 0;
    for (int e = 0; e < a->n_local; e++)
        if (a->start[e + 1] - a->start[e] > most) most = a->start[e + 1] - a->start[e];
    return most;
}

static void moe_member(void *ctx, int i, int n)
{
    const moe_work *w = ctx;
    const expert_phase inner = {.fn = expert_inner,
                                .n_units = inner_units(w->inner),
                                .unit_bytes = 2 * tr_packed_view(w->a->gate_up, 0).panel_bytes};
    const expert_phase down = {.fn = expert_down,
                               .n_units = tr_n_panels(w->a->down->n_out),
                               .unit_bytes = tr_packed_view(w->a->down, 0).panel_bytes,
                               .counter = EXPERTS_MAX};
    const int shared = n > 1 && w->a->n_local <= EXPERTS_MAX &&
                       tr_pieces_pay(most_rows(w->a), (size_t)down.n_units * down.unit_bytes);

    (shared ? phase_shared : phase_part)(w->d, w, &inner, i, n);
    tr_team_barrier(w->d->team);
    (shared ? phase_shared : phase_part)(w->d, w, &down, i, n);
}

tr_status tr_cpu_moe(tr_device *d, tr_lane lane, const struct tr_moe_args *a)
{
    const int d_model = a->down->n_out, n_pairs = a->start[a->n_local];
    moe_work w = {.d = d, .a = a, .n_pairs = n_pairs, .inner = a->gate_up->n_out / 2};
    (void)lane;

    if (a->gate_up->n_out != 2 * a->down->n_in || a->gate_up->n_in != a->in.d)
        return tr_cpu_fail(d, TR_E_USAGE, "moe: gate_up [%d, %d] and down [%d, %d] for %d inputs",
                           a->gate_up->n_out, a->gate_up->n_in, d_model, a->down->n_in, a->in.d);
    if (a->workspace_bytes < tr_cpu_moe_workspace(n_pairs, 1, d_model, w.inner))
        return tr_cpu_fail(d, TR_E_USAGE, "moe: workspace of %zu bytes for %d rows",
                           a->workspace_bytes, n_pairs);
    w.gate_up = a->workspace;
    w.row = (int32_t *)(void *)(w.gate_up + (size_t)n_pairs * 2 * (size_t)w.inner);
    for (int i = 0; i < n_pairs; i++)
        w.row[i] = a->pair[i] / a->k;

    tr_device_run(d, 3.0 * n_pairs * w.inner * d_model, moe_member, &w);
    return TR_OK;
}

/* ---- weighted sum ---- */

typedef struct combine_work {
    const tr_device *d;
    const struct tr_moe_combine_args *a;
    int n, n_chunks;
} combine_work;

/* Columns [begin, begin + width) of row r. */
static void combine_row(const tr_device *d, const struct tr_moe_combine_args *a, int r,
                        size_t begin, size_t width)
{
    float *out = a->out + (size_t)r * (size_t)a->d + begin;

    if (!a->shared)
        memset(out, 0, width * sizeof *out);
    else if (a->shared != a->out)
        memcpy(out, a->shared + (size_t)r * (size_t)a->d + begin, width * sizeof *out);
    for (int j = 0; j < a->k; j++) {
        size_t pair = (size_t)r * (size_t)a->k + (size_t)j;
        int e = a->expert[pair] - a->e_first;
        if (e >= 0 && e < a->n_local)
            d->k.axpy(out, a->weight[pair], a->y + pair * (size_t)a->d + begin, (int)width);
    }
}

static void combine_member(void *ctx, int i, int n)
{
    const combine_work *w = ctx;
    const int end = tr_team_part(w->n * w->n_chunks, i + 1, n);

    for (int u = tr_team_part(w->n * w->n_chunks, i, n); u < end; u++) {
        int begin = u % w->n_chunks * COMBINE_CHUNK, left = w->a->d - begin;
        combine_row(w->d, w->a, u / w->n_chunks, (size_t)begin,
                    (size_t)(left < COMBINE_CHUNK ? left : COMBINE_CHUNK));
    }
}

tr_status tr_cpu_moe_combine(tr_device *d, tr_lane lane, const struct tr_moe_combine_args *a)
{
    combine_work w = {d, a, tr_live_rows(a->n, a->n_max),
                      (int)tr_ceil_div((size_t)a->d, COMBINE_CHUNK)};
    (void)lane;
    tr_device_run(d, (double)w.n * a->k * a->d, combine_member, &w);
    return TR_OK;
}
