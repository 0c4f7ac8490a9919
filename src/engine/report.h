/* What a step sampled, as bytes: from the rank that has a replica's results to the leader, which has only the plan. */
#ifndef TR_ENGINE_REPORT_H
#define TR_ENGINE_REPORT_H

#include "model/model.h"

/* Of a plan's step: the token of every head row; rank, logprob, top_token and top_logprob if anybody wants log-probabilities
 * (TR_PLAN_HAS_SCORES). 0: no head rows. */
size_t tr_report_bytes(const tr_plan *plan);
size_t tr_report_bytes_max(const tr_plan_limits *limits);

void tr_report_write(void *report, const tr_plan *plan, const tr_step_output *out);
/* Points into the report, which may still be on its way; arrays that are not in it are NULL. */
tr_step_output tr_report_read(void *report, const tr_plan *plan);

#endif
