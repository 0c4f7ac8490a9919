#include <config.h>

#include "engine/plans.h"

const tr_plan *tr_plans_of(const void *plans, const uint64_t *at, int replica)
{
    return (const tr_plan *)(const void *)((const char *)plans + at[replica]);
}

tr_status tr_plans_check(const void *plans, size_t bytes, int n_replicas,
                         const tr_plan_limits *limits, uint64_t *at, tr_err *err)
{
    tr_err why = {0};
    size_t begin = 0;

    for (int d = 0; d < n_replicas; d++) {
        at[d] = begin;
        const tr_plan *plan = tr_plans_of(plans, at, d);
        if (bytes - begin < sizeof *plan || plan->bytes > bytes - begin ||
            tr_plan_check(plan, plan->bytes, limits, &why))
            return tr_fail(err, TR_E_COMM, "step plan of replica %d refused: %s", d,
                           why.text[0] ? why.text : "it is cut off");
        begin += plan->bytes;
    }
    if (begin != bytes)
        return tr_fail(err, TR_E_COMM, "step plans of %zu bytes in %zu", begin, bytes);
    return TR_OK;
}

int64_t tr_plans_rows(const void *plans, const uint64_t *at, int n_replicas)
{
    int64_t n = 0;

    for (int d = 0; d < n_replicas; d++)
        n += tr_plans_of(plans, at, d)->n_rows;
    return n;
}

bool tr_plans_even(const void *plans, const uint64_t *at, int n_replicas)
{
    int32_t least = INT32_MAX, most = 0;

    for (int d = 0; d < n_replicas; d++) {
        const int32_t n = tr_plans_of(plans, at, d)->n_rows;
        least = n < least ? n : least;
        most = n > most ? n : most;
    }
    return most - least <= most / 5;
}
