#include <config.h>

#include "base/region.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"

int tr_region_id(tr_regions *r, const char *static_name)
{
    if (!r) return -1;
    for (int i = 0; i < r->n; i++)
        if (r->total[i].name == static_name || strcmp(r->total[i].name, static_name) == 0) return i;
    if (r->n == TR_REGIONS_MAX) return -1;
    r->total[r->n].name = static_name;
    return r->n++;
}

void tr_region_begin(tr_regions *r, int id)
{
    if (!r) return;
    /* Deeper than the stack: counted, so that ends match begins, but not timed. */
    if (r->depth >= TR_REGION_DEPTH) {
        r->depth++;
        return;
    }
    uint64_t now = tr_now_ns();
    r->open[r->depth] = id;
    r->begun_ns[r->depth] = now;
    r->child_ns[r->depth] = 0;
    r->depth++;
    if (r->sink.begin) r->sink.begin(r->sink.ctx, id, now);
}

void tr_region_end(tr_regions *r, double bytes, double flops)
{
    if (!r || r->depth == 0) return;
    r->depth--;
    if (r->depth >= TR_REGION_DEPTH) return;
    uint64_t now = tr_now_ns();
    int id = r->open[r->depth];
    uint64_t inclusive = now - r->begun_ns[r->depth];
    if (r->depth > 0) r->child_ns[r->depth - 1] += inclusive;
    if (id >= 0) {
        tr_region_total *t = &r->total[id];
        t->calls++;
        t->inclusive_ns += inclusive;
        t->exclusive_ns += inclusive - r->child_ns[r->depth];
        t->bytes += bytes;
        t->flops += flops;
    }
    if (r->sink.end) r->sink.end(r->sink.ctx, id, now, bytes, flops);
}

void tr_regions_reset(tr_regions *r)
{
    for (int i = 0; i < r->n; i++)
        r->total[i] = (tr_region_total){.name = r->total[i].name};
}

static int longest_first(const void *a, const void *b)
{
    const tr_region_total *x = *(const tr_region_total *const *)a,
                          *y = *(const tr_region_total *const *)b;
    if (x->exclusive_ns != y->exclusive_ns) return x->exclusive_ns < y->exclusive_ns ? 1 : -1;
    return strcmp(x->name, y->name);
}

void tr_regions_print(const tr_regions *r, FILE *out)
{
    const tr_region_total *order[TR_REGIONS_MAX];
    double sum = 0;
    int n = 0;
    for (int i = 0; i < r->n; i++)
        if (r->total[i].calls > 0) {
            order[n++] = &r->total[i];
            sum += (double)r->total[i].exclusive_ns;
        }
    qsort(order, (size_t)n, sizeof *order, longest_first);
    fprintf(out, "# %-22s %10s %12s %7s %10s %10s\n", "region", "calls", "ms", "share", "GB/s",
            "Gflop/s");
    for (int i = 0; i < n; i++) {
        double ns = (double)order[i]->exclusive_ns;
        fprintf(out, "  %-22s %10ju %12.3f %6.1f%%", order[i]->name, (uintmax_t)order[i]->calls,
                ns * 1e-6, sum > 0 ? 100 * ns / sum : 0.0);
        bool known = ns > 0;
        if (known && order[i]->bytes > 0)
            fprintf(out, " %10.2f", order[i]->bytes / ns);
        else
            fprintf(out, " %10s", "-");
        if (known && order[i]->flops > 0)
            fprintf(out, " %10.2f\n", order[i]->flops / ns);
        else
            fprintf(out, " %10s\n", "-");
    }
}
