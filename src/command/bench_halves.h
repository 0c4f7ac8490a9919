/* The halves of a layer, timed alone: its attention, and its feed-forward network (dense, or experts), without the norms before
 * them. On a host by its clock. On a device by stamps between the halves, in steps of their own behind the timed ones, since a
 * stamp keeps a kernel from beginning under the end of the one before it; so the halves add up to a little more than the layer
 * of a step without stamps. */
#ifndef TR_COMMAND_BENCH_HALVES_H
#define TR_COMMAND_BENCH_HALVES_H

#include <stdio.h>

#include "command/open.h"

typedef struct tr_bench_halves tr_bench_halves;

/* The regions of `opened` (kept), whose model exists, get a tree, which must not be there yet. TR_E_MEMORY. */
tr_status tr_bench_halves_open(tr_bench_halves **out, tr_opened *opened, tr_err *err);
void tr_bench_halves_close(tr_bench_halves *h); /* before the model is closed; may be NULL */

/* Around the steps of one phase that count. h may be NULL: nothing happens. */
tr_status tr_bench_halves_begin(tr_bench_halves *h, tr_err *err);
/* What has come since: for each half a line and a JSON line with what a layer took and its roofline. what: "decode", "prefill". */
void tr_bench_halves_end(tr_bench_halves *h);
void tr_bench_halves_print(const tr_bench_halves *h, const tr_ceilings *ceilings, const char *what,
                           int sequences, int context, FILE *out);

/* The least time for an operation's bytes and flops: the larger of both over the ceilings. */
double tr_bench_roofline(const tr_ceilings *c, const char *op, double bytes, double flops);

#endif
