#include <config.h>

#include "command/bench_halves.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"

enum { NODES_MAX = 4096, N_HALVES = 3 };

static const char *const names[N_HALVES] = {"attention", "dense", "experts"};

struct tr_bench_halves {
    tr_opened *opened;
    tr_region_node *before, *after; /* [NODES_MAX] */
    int n_before, n_after;
};

double tr_bench_roofline(const tr_ceilings *c, const char *op, double bytes, double flops)
{
    static const struct {
        const char *op;
        double of_fp8; /* rate of its products, of the e4m3 ones; on a CPU they are fp32 */
    } ops[] = {{"linear", 1},      {"moe", 1},         {"index_logits", 1}, {"sparse_mla", 0.5},
               {"dense_mha", 0.5}, {"mla_query", 0.5}, {"mla_value", 0.5}};
    double rate = c->fma_flops_per_s;

    for (size_t i = 0; i < sizeof ops / sizeof *ops && c->fp8_flops_per_s > 0; i++)
        if (strcmp(op, ops[i].op) == 0) rate = c->fp8_flops_per_s * ops[i].of_fp8;
    const double move = bytes / c->read_bytes_per_s, compute = flops / rate;
    return move > compute ? move : compute;
}

tr_status tr_bench_halves_open(tr_bench_halves **out, tr_opened *opened, tr_err *err)
{
    tr_bench_halves *h = calloc(1, sizeof *h);

    *out = NULL;
    if (!h) return tr_fail(err, TR_E_MEMORY, "out of memory");
    h->opened = opened;
    h->before = tr_calloc(NODES_MAX, sizeof *h->before);
    h->after = tr_calloc(NODES_MAX, sizeof *h->after);
    if (!h->before || !h->after || !tr_regions_grow(&opened->regions, "main", NODES_MAX)) {
        free(h->before);
        free(h->after);
        free(h);
        return tr_fail(err, TR_E_MEMORY, "out of memory for regions");
    }
    *out = h;
    return TR_OK;
}

void tr_bench_halves_close(tr_bench_halves *h)
{
    if (!h) return;
    tr_model_time(h->opened->model, 0, NULL);
    tr_regions_prune(&h->opened->regions);
    free(h->before);
    free(h->after);
    free(h);
}

tr_status tr_bench_halves_begin(tr_bench_halves *h, tr_err *err)
{
    if (!h) return TR_OK;
    h->n_before = tr_regions_look(&h->opened->regions, h->before, NODES_MAX);
    return tr_model_time(h->opened->model, 1, err);
}

void tr_bench_halves_end(tr_bench_halves *h)
{
    if (!h) return;
    tr_model_time(h->opened->model, 0, NULL);
    h->n_after = tr_regions_look(&h->opened->regions, h->after, NODES_MAX);
}

/* Of node i, of all phases, since begin. */
static tr_region_numbers since(const tr_bench_halves *h, int i)
{
    tr_region_numbers n = {0};

    for (int p = 0; p <= TR_N_PHASES; p++) {
        const tr_region_numbers *to = &h->after[i].in[p];
        const tr_region_numbers from =
            i < h->n_before ? h->before[i].in[p] : (tr_region_numbers){0};
        n.count += to->count - from.count;
        n.incl_ns += to->incl_ns - from.incl_ns;
        n.gpu_count += to->gpu_count - from.gpu_count;
        n.gpu_ns += to->gpu_ns - from.gpu_ns;
        n.bytes += to->bytes - from.bytes;
        n.flops += to->flops - from.flops;
    }
    return n;
}

static const char *name_of(const tr_bench_halves *h, int i)
{
    const int id = h->after[i].id;
    return id >= 0 ? h->opened->regions.total[id].name : "";
}

static bool below(const tr_bench_halves *h, int i, const char *name)
{
    for (; i >= 0; i = h->after[i].parent)
        if (strcmp(name_of(h, i), name) == 0) return true;
    return false;
}

void tr_bench_halves_print(const tr_bench_halves *h, const tr_ceilings *ceilings, const char *what,
                           int sequences, int context, FILE *out)
{
    const bool on_host = h->opened->ops->caps & TR_CAP_HOST;

    for (int k = 0; k < N_HALVES; k++) {
        uint64_t calls = 0, timed = 0, ns = 0;
        double least = 0;
        for (int i = 0; i < h->n_after; i++) {
            const tr_region_numbers n = since(h, i);
            if (strcmp(name_of(h, i), names[k]) == 0) {
                calls += n.count;
                timed += on_host ? n.count : n.gpu_count;
                ns += on_host ? n.incl_ns : n.gpu_ns;
            } else if (below(h, i, names[k])) {
                least += tr_bench_roofline(ceilings, name_of(h, i), n.bytes, n.flops);
            }
        }
        if (timed == 0 || calls == 0) continue;
        const double each = (double)ns * 1e-9 / (double)timed, roof = least / (double)calls;
        fprintf(out, "    %-10s %10.2f us a layer (%ju timed), roofline %10.2f us %6.2f\n",
                names[k], each * 1e6, (uintmax_t)timed, roof * 1e6, each / roof);
        fprintf(out,
                "{\"bench\": \"half\", \"kind\": \"%s\", \"half\": \"%s\", \"sequences\": %d, "
                "\"context\": %d, \"timed\": %ju, \"layer_s\": %.9g, \"roofline_s\": %.9g}\n",
                what, names[k], sequences, context, (uintmax_t)timed, each, roof);
    }
    fflush(out);
}
