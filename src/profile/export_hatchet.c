#include <config.h>

#include <math.h>

#include "profile/export.h"

/* Seconds, counts and bytes of one region: of a rank, or the mean of all with the largest. */
static void metrics(FILE *out, const tr_reader *r, int region, int rank)
{
    const tr_reader_about *about = tr_reader_about_of(r);
    double incl = 0, excl = 0, count = 0, bytes = 0, flops = 0, exposed = 0, most = 0, n = 0;
    int most_rank = 0;
    for (int i = 0; i < about->n_ranks; i++) {
        if (!tr_reader_has(r, i) || (rank >= 0 && i != rank)) continue;
        const tr_reader_cell *c = &tr_reader_cells(r, i)[region];
        n++;
        incl += (double)c->incl_ns * 1e-9;
        excl += (double)c->excl_ns * 1e-9;
        exposed += (double)c->exposed_ns * 1e-9;
        count += (double)c->count;
        bytes += (double)c->bytes;
        flops += c->flops;
        if ((double)c->incl_ns * 1e-9 > most) {
            most = (double)c->incl_ns * 1e-9;
            most_rank = i;
        }
    }
    if (n < 1) n = 1;
    /* All nodes have the same keys: Hatchet takes the columns from one of them. */
    fprintf(out,
            "{\"time (inc)\": %.9f, \"time\": %.9f, \"count\": %.17g, \"bytes\": %.17g, \"flops\": "
            "%.17g, \"exposed\": %.9f, \"max time (inc)\": %.9f, \"max rank\": %d}",
            incl / n, excl / n, count / n, bytes / n, flops / n, exposed / n, most, most_rank);
}

static void open_node(FILE *out, const tr_reader *r, int region, int rank)
{
    const tr_reader_region *g = &tr_reader_regions(r)[region];
    char name[96];
    if (g->kind == TR_KIND_LAYER && g->layer >= 0)
        snprintf(name, sizeof name, "%s %d", g->name, g->layer);
    else
        snprintf(name, sizeof name, "%s", g->name);
    fputs("{\"frame\": {\"name\": ", out);
    tr_export_quote(out, name);
    fputs(", \"type\": \"region\"}, \"metrics\": ", out);
    metrics(out, r, region, rank);
    fputs(", \"children\": [", out);
}

/* Children of `parent` behind `after`; -1: none. */
static int next_child(const tr_reader *r, int parent, int after)
{
    const tr_reader_region *g = tr_reader_regions(r);
    for (int i = after + 1; i < tr_reader_about_of(r)->n_regions; i++)
        if (g[i].parent == parent) return i;
    return -1;
}

tr_status tr_export_hatchet(FILE *out, tr_reader *r, int rank, tr_err *err)
{
    const tr_reader_about *about = tr_reader_about_of(r);
    const tr_reader_region *g = tr_reader_regions(r);
    if (about->n_regions == 0)
        return tr_fail(err, TR_E_INPUT, "%s: no regions in it, and Hatchet needs one", about->path);
    if (rank >= 0 && !tr_reader_has(r, rank))
        return tr_fail(err, TR_E_USAGE, "--rank %d: not in %s", rank, about->path);
    int at = -1;    /* the node that is open */
    int after = -1; /* its last child that was written */
    bool first = true;
    fputs("[", out);
    for (;;) {
        const int child = next_child(r, at, after > at ? after : at);
        if (child >= 0) {
            fprintf(out, "%s\n%*s", first ? "" : ",", g[child].depth + 1, "");
            open_node(out, r, child, rank);
            at = child;
            after = -1;
            first = true;
            continue;
        }
        if (at < 0) break;
        fputs("]}", out);
        after = at;
        at = g[at].parent;
        first = false;
    }
    fputs("\n]\n", out);
    return TR_OK;
}
