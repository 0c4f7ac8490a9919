/* Which replica of a data-parallel job takes the next request. On the leader's main thread; only asks the schedulers.
 *
 * Requests that begin with the same tokens should meet in one replica, where the prompt's pages are already in the cache or
 * about to be: elsewhere they would be computed again. But replicas run in step, so the fullest one decides how long a job
 * takes, and a prefix that everybody shares must not leave the others idle. So a request follows its prefix as long as that
 * replica does not get more than its share of all there is to do now, the queue included; the rest goes where there is least. */
#ifndef TR_ENGINE_REPLICAS_H
#define TR_ENGINE_REPLICAS_H

#include "engine/request.h"
#include "engine/scheduler.h"

/* Of [n_replicas] schedulers the one for `next`; n_queued: requests that wait behind it. -1: none wants another one
 * now, or it should wait for one that does not. */
int tr_replica_choose(tr_scheduler *const *scheduler, int n_replicas, const tr_request *next,
                      int n_queued);

/* Sums over all. */
tr_scheduler_stats tr_replicas_stats(tr_scheduler *const *scheduler, int n_replicas);

#endif
