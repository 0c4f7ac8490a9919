/* PAPI's events, by name, for the profile. Each is added alone: one that cannot be counted here is absent with PAPI's own
 * reason, and never zero. Counted are the thread that opens and all threads it makes afterwards (the device's threads,
 * reader and writer), where the kernel lets events be inherited. Built without PAPI all events are absent. */
#ifndef TR_PROFILE_PAPI_H
#define TR_PROFILE_PAPI_H

#include <stdbool.h>

#include "profile/profile.h"

typedef struct tr_papi tr_papi;

/* events: "NAME,NAME", as many as there are, one that comes again counts once; NULL: software events, and cycles and
 * instructions where there are any. Main thread, before the device is opened. NULL: out of memory. */
tr_papi *tr_papi_open(const char *events);
/* Main thread, at the end of a step: what was counted since the last call belongs to this phase; TR_PHASE_NONE: to
 * none, it came between or before steps. NULL: nothing. */
void tr_papi_step(tr_papi *papi, tr_phase phase);
/* Main thread: nothing is counted until it is called with false; tr_papi_step does nothing meanwhile. What a bench of what
 * counting costs needs. What was counted since the last step belongs to no phase. NULL: nothing. */
void tr_papi_rest(tr_papi *papi, bool rest);
/* What the profile samples: values up to the last tr_papi_step, from any thread. Valid until close. */
tr_profile_counters tr_papi_counters(tr_papi *papi);
/* Events are counted in the threads made later too. */
bool tr_papi_inherits(const tr_papi *papi);
/* Main thread. */
void tr_papi_close(tr_papi *papi);

#endif
