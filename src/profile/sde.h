/* trireme's own counters as software-defined events of PAPI: sde:::trireme::steps, ::tokens_prefill, ::tokens_decode,
 * ::tokens_accepted, ::pages_used, ::bytes_<GROUP>. Whatever reads PAPI (TAU, Score-P, HPCToolkit, --papi of this program) can
 * count them. libsde is opened when it is there. Main thread. */
#ifndef TR_PROFILE_SDE_H
#define TR_PROFILE_SDE_H

#include "profile/schema.h"

enum { TR_SDE_GROUPS = 8 };

typedef struct tr_sde tr_sde;

/* Before PAPI is asked for events. groups[n], n <= TR_SDE_GROUPS: names. NULL: no libsde here, or out of memory; every other
 * call then does nothing. */
tr_sde *tr_sde_open(const char *const *groups, int n);
/* After a step. bytes[n]: sent in each group so far. */
void tr_sde_step(tr_sde *sde, const tr_prof_step *step, const uint64_t *bytes);
void tr_sde_close(tr_sde *sde);

#endif
