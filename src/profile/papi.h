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
/* Reading the kernel's counters takes a hundredth of a short step, with what it pushes out of the caches. So they are read where
 * a phase ends, and TR_PAPI_READ_NS after the last time where none does: counts are exact for phases, and what is sampled is no
 * older than that and a step. */
#define TR_PAPI_READ_NS 50000000u
/* Main thread, before a step's work begins: what is counted from here on, until a call with another phase, belongs to this
 * phase; TR_PHASE_NONE: to none, the steps are over. At first: TR_PHASE_NONE. NULL: nothing. */
void tr_papi_begin(tr_papi *papi, tr_phase phase, uint64_t now_ns);
/* Main thread, when a step is done, which may be behind the begin of others. trireme's own counters (sde.h) have counted it by
 * now: what they have more than at the last call belongs to its phase. NULL: nothing. */
void tr_papi_step(tr_papi *papi, tr_phase phase, uint64_t now_ns);
/* Main thread: nothing is counted until it is called with false; tr_papi_step does nothing meanwhile. What a bench of what
 * counting costs needs. NULL: nothing. */
void tr_papi_rest(tr_papi *papi, bool rest);
/* What the profile samples: values as they were read last, from any thread. Valid until close. */
tr_profile_counters tr_papi_counters(tr_papi *papi);
/* Events are counted in the threads made later too. */
bool tr_papi_inherits(const tr_papi *papi);
/* Main thread. */
void tr_papi_close(tr_papi *papi);

#endif
