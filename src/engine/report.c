#include <config.h>

#include "engine/report.h"

#include <string.h>

enum { WORD = 4, SCORES = 2 + 2 * TR_MAX_LOGPROBS }; /* words of a head row beside its token */

static bool has_scores(const tr_plan *plan)
{
    return plan->flags & TR_PLAN_HAS_SCORES;
}

size_t tr_report_bytes(const tr_plan *plan)
{
    return (size_t)plan->n_head_rows * WORD * (has_scores(plan) ? 1 + SCORES : 1);
}

size_t tr_report_bytes_max(const tr_plan_limits *limits)
{
    return (size_t)limits->n_head_max * WORD * (1 + SCORES);
}

tr_step_output tr_report_read(void *report, const tr_plan *plan)
{
    const size_t n = (size_t)plan->n_head_rows;
    int32_t *word = report;
    tr_step_output out = {.n_head = plan->n_head_rows, .token = word};

    if (!has_scores(plan)) return out;
    out.rank = word + n;
    out.logprob = (float *)(void *)(word + 2 * n);
    out.top_token = word + 3 * n;
    out.top_logprob = (float *)(void *)(word + (3 + TR_MAX_LOGPROBS) * n);
    return out;
}

void tr_report_write(void *report, const tr_plan *plan, const tr_step_output *out)
{
    const tr_step_output to = tr_report_read(report, plan);
    const size_t bytes = (size_t)plan->n_head_rows * WORD;

    memcpy(to.token, out->token, bytes);
    if (!has_scores(plan)) return;
    memcpy(to.rank, out->rank, bytes);
    memcpy(to.logprob, out->logprob, bytes);
    memcpy(to.top_token, out->top_token, bytes * TR_MAX_LOGPROBS);
    memcpy(to.top_logprob, out->top_logprob, bytes * TR_MAX_LOGPROBS);
}
