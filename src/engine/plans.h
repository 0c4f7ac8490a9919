/* The plans of all replicas for one step, one block behind the other, as they travel (wire.h). They come from another rank, so
 * every rank checks all of them, the leader too: one path. */
#ifndef TR_ENGINE_PLANS_H
#define TR_ENGINE_PLANS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "model/plan.h"

/* at[n_replicas]: where each plan begins. TR_E_COMM, naming the replica, where they are not n_replicas good plans and nothing
 * else. */
tr_status tr_plans_check(const void *plans, size_t bytes, int n_replicas,
                         const tr_plan_limits *limits, uint64_t *at, tr_err *err);
/* Of checked plans, one replica's. */
const tr_plan *tr_plans_of(const void *plans, const uint64_t *at, int replica);
/* Rows of all replicas together. */
int64_t tr_plans_rows(const void *plans, const uint64_t *at, int n_replicas);
/* The replicas have about as many rows as each other: their ranks should take alike long. */
bool tr_plans_even(const void *plans, const uint64_t *at, int n_replicas);

#endif
