/* Shared by summary.c (regions) and summary_tables.c (steps, requests, communication, experts) and
 * summary_counters.c. */
#ifndef TR_PROFILE_SUMMARY_PRIV_H
#define TR_PROFILE_SUMMARY_PRIV_H

#include "profile/summary.h"

tr_status tr_summary_steps(tr_summary *s, tr_reader *r, tr_err *err);
tr_status tr_summary_requests(tr_summary *s, tr_reader *r, tr_err *err);
tr_status tr_summary_comms(tr_summary *s, tr_reader *r, tr_err *err);
/* After the layers: fills their imbalance. */
tr_status tr_summary_experts(tr_summary *s, tr_reader *r, tr_err *err);
tr_status tr_summary_cache(tr_summary *s, tr_reader *r, tr_err *err);
tr_status tr_summary_counters(tr_summary *s, tr_reader *r, tr_err *err);

#endif
