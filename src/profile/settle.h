/* At the end of a run, when all ranks are there: one tree of regions for all, one clock. Main thread, collective over
 * `control`, also for a rank whose profile has failed or which has none. */
#ifndef TR_PROFILE_SETTLE_H
#define TR_PROFILE_SETTLE_H

#include "mpi/comm.h"
#include "profile/profile.h"

/* After tr_profile_stop. Rows of /regions become the same on all ranks, whatever ran only on some; where a row has moved, and
 * where the clock has drifted by more than a microsecond, what was written is corrected. drift_ppb: how fast rank 0's
 * clock has gained on this one since the profile's offset was measured, at begun_ns of this rank's clock. p may be NULL. The
 * status is the communicator's, or TR_E_MEMORY on all ranks where one lacks it; failures of the file are warnings. */
tr_status tr_profile_settle(tr_profile *p, tr_comm *control, double drift_ppb, uint64_t begun_ns,
                            tr_err *err);

#endif
