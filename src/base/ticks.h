/* Monotonic time for who reads it every few microseconds: regions (base/region.h). Where the processor has a counter of constant rate
 * that reads faster than the system's clock (x86-64's time stamp counter: 14 ns against 23 on a virtual machine of two Sapphire
 * Rapids cores, a loop of each), it is read and put on CLOCK_MONOTONIC by an anchor: a pair of both, renewed when it is a
 * millisecond old, so that what is told is never further from that clock than the two drift apart within a millisecond, tens of
 * nanoseconds. Told times never go backwards: where an anchor lies behind what has been told, time stands still until it is there.
 *
 * Everything is judged by CLOCK_MONOTONIC alone, at every anchor: neither the wall clock nor what the kernel says of the counter has
 * any influence. A counter that jumps (a suspended or moved machine, processors out of step) is believed again from the next anchor
 * on; after the third time, or where its rate changes, CLOCK_MONOTONIC is asked each time, as it is on other machines and in the
 * first 10 ms, in which the rate is measured.
 *
 * One tr_ticks belongs to one thread; it is plain data, zeroed at first, and needs no release. */
#ifndef TR_BASE_TICKS_H
#define TR_BASE_TICKS_H

#include <stdint.h>
#ifdef __x86_64__
#include <x86intrin.h>
#endif

enum { TR_TICKS_STRIKES = 3 };

typedef enum tr_ticks_state {
    TR_TICKS_NEW,
    TR_TICKS_MEASURING, /* base is there, a rate is not */
    TR_TICKS_ANCHORED,
    TR_TICKS_CLOCK, /* for good */
} tr_ticks_state;

typedef struct tr_ticks {
    uint64_t span;             /* ticks that the anchor lasts; 0: there is none */
    uint64_t count, ns;        /* the anchor */
    uint64_t scale;            /* ns of a tick, in 2^-32 */
    uint64_t last_ns;          /* told last */
    uint64_t base_count, base; /* ns: from where the rate is measured */
    tr_ticks_state state;
    int strikes; /* anchors that were not where they were expected */
} tr_ticks;

/* Now, by CLOCK_MONOTONIC, when the counter cannot tell: a new anchor, or without any. */
uint64_t tr_ticks_ask(tr_ticks *t);

/* A time is told. */
static inline uint64_t tr_ticks_tell(tr_ticks *t, uint64_t ns)
{
    if (ns > t->last_ns) t->last_ns = ns;
    return t->last_ns;
}

/* The time at a count that the anchor lasts to, count - t->count < t->span: 24 bits of ticks, 32 of scale. */
static inline uint64_t tr_ticks_at(tr_ticks *t, uint64_t count)
{
    return tr_ticks_tell(t, t->ns + ((count - t->count) * t->scale >> 32));
}

/* ns, never less than before. The counter is read without a fence: a region's begin or end may be off by the instructions in flight,
 * and what one region loses by that the next one gains. */
static inline uint64_t tr_ticks_now(tr_ticks *t)
{
#ifdef __x86_64__
    if (t->span) {
        const uint64_t count = __rdtsc();
        if (count - t->count < t->span) return tr_ticks_at(t, count);
    }
#endif
    return tr_ticks_ask(t);
}

/* Both clocks at one moment, as tr_ticks_ask reads them where the counter is fit for it: the next anchor. Returns the time. */
uint64_t tr_ticks_anchor(tr_ticks *t, uint64_t count, uint64_t ns);

#endif
