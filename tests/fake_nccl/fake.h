/* What the parts of the fake device have of each other. */
#ifndef TR_TESTS_FAKE_H
#define TR_TESTS_FAKE_H

#include <stdbool.h>

#include "kernels/cuda/push.h"
#include "kernels/cuda/swap.h"
#include "kernels/kernels.h"

/* The CPU's norm, at once. */
bool fake_norm(const struct tr_norm_args *a);
/* Changes the table if FAKE_W8A8 says so (fake_w8a8.c); true: norms leave codes. */
bool fake_w8a8(const tr_ops *cpu_ops, tr_ops *table);
tr_status fake_w8a8_norm(tr_device *device, tr_lane lane, const struct tr_norm_args *a);
/* Is that the environment's FAKE_PEERS (fake_peer.c)? */
bool fake_told(const char *what);
/* The exchange, when its turn in the stream has come (fake_push.c). */
void fake_push(const tr_cuda_push_group *g, const tr_cuda_push_args *a);
void fake_swap(const tr_cuda_swap_group *g, const tr_cuda_swap_args *a);

#endif
