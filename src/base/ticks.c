#include <config.h>

#include "base/ticks.h"

#include <stdbool.h>
#ifdef __x86_64__
#include <cpuid.h>
#include <sys/prctl.h>
#endif

#include "base/clock.h"

static const uint64_t span_ns = 1000000; /* of an anchor */
static const uint64_t measure_ns = 10000000;
/* After this time the rate is measured again: the system's clock is slewed, by at most 500 ppm. */
static const uint64_t base_ns = 1000000000;
static const uint64_t slack_ns = 1000;
/* Rates that are believed, 1 to 10 GHz: fine enough, and tr_ticks_at stays within 64 bits. */
static const uint64_t scale_min = (UINT64_C(1) << 32) / 10, scale_max = UINT64_C(1) << 32;

__extension__ typedef unsigned __int128 u128;

/* ---- the anchor ------------------------------------------------------------------------------------------------------ */

static void give_up(tr_ticks *t)
{
    t->state = TR_TICKS_CLOCK;
    t->span = 0;
}

static void set_base(tr_ticks *t, uint64_t count, uint64_t ns)
{
    t->base_count = count;
    t->base = ns;
}

/* The rate since the base, which moves here. false: none that can be believed. */
static bool measure(tr_ticks *t, uint64_t count, uint64_t ns)
{
    const uint64_t ticks = count - t->base_count;
    const u128 scale = ticks ? ((u128)(ns - t->base) << 32) / ticks : 0;

    set_base(t, count, ns);
    if (scale < scale_min || scale > scale_max) return false;
    t->scale = (uint64_t)scale;
    t->span = (span_ns << 32) / t->scale;
    return true;
}

/* The counter has gone on as its rate says. */
static bool as_expected(const tr_ticks *t, uint64_t count, uint64_t ns)
{
    const uint64_t ticks = count - t->count, gone = ns - t->ns;
    const u128 told = (u128)ticks * t->scale >> 32, off = told > gone ? told - gone : gone - told;

    return off <= slack_ns + gone / 512; /* the slew of before may have been the other way */
}

uint64_t tr_ticks_anchor(tr_ticks *t, uint64_t count, uint64_t ns)
{
    switch (t->state) {
    case TR_TICKS_NEW:
        set_base(t, count, ns);
        t->state = TR_TICKS_MEASURING;
        break;
    case TR_TICKS_MEASURING:
        if (ns - t->base < measure_ns) break;
        t->state = TR_TICKS_ANCHORED;
        if (!measure(t, count, ns)) give_up(t);
        break;
    case TR_TICKS_ANCHORED:
        if (!as_expected(t, count, ns)) {
            set_base(t, count, ns);
            if (++t->strikes == TR_TICKS_STRIKES) give_up(t);
        } else if (ns - t->base >= base_ns && !measure(t, count, ns)) {
            give_up(t);
        }
        break;
    case TR_TICKS_CLOCK:
        break;
    }
    t->count = count;
    t->ns = ns;
    return tr_ticks_tell(t, ns);
}

/* ---- the counter ------------------------------------------------------------------------------------------------------- */

#ifdef __x86_64__

#define LEAF_POWER 0x80000007u /* of CPUID */

enum {
    TRIES = 8,
    TIGHT = 2048,       /* ticks: a microsecond or two */
    INVARIANT = 1 << 8, /* in edx of that leaf */
};

typedef struct reading {
    uint64_t count, ns;
    uint64_t width; /* ticks that the reading took */
} reading;

/* Both, as near to each other as the better of two tries has them: nothing came in between. */
static reading read_both(void)
{
    reading best = {.width = UINT64_MAX};

    for (int i = 0; i < 2; i++) {
        const uint64_t from = __rdtsc(), ns = tr_now_ns();
        _mm_lfence();
        const uint64_t width = __rdtsc() - from;
        if (width < best.width) best = (reading){from + width / 2, ns, width};
    }
    return best;
}

/* It is there, runs at one rate whatever the processor does, may be read by this process, and is worth it: under some virtual
 * machines each reading is a trap. */
static bool is_fit(void)
{
    unsigned a, b, c, d;
    int may = 0;
    uint64_t alone = UINT64_MAX, with = UINT64_MAX;

    if (!__get_cpuid(LEAF_POWER, &a, &b, &c, &d) || !(d & INVARIANT)) return false;
    if (prctl(PR_GET_TSC, &may) != 0 || may != PR_TSC_ENABLE) return false;
    for (int i = 0; i < TRIES; i++) {
        const uint64_t from = __rdtsc(), width = __rdtsc() - from, both = read_both().width;
        if (width < alone) alone = width;
        if (both < with) with = both;
    }
    return with <= TIGHT && alone < with - alone;
}

uint64_t tr_ticks_ask(tr_ticks *t)
{
    if (t->state == TR_TICKS_NEW && !is_fit()) give_up(t);
    if (t->state == TR_TICKS_CLOCK) return tr_ticks_tell(t, tr_now_ns());
    const reading r = read_both();
    /* Where something came in between this is the time still, but no anchor. */
    return r.width <= TIGHT ? tr_ticks_anchor(t, r.count, r.ns) : tr_ticks_tell(t, r.ns);
}

#else

uint64_t tr_ticks_ask(tr_ticks *t)
{
    give_up(t);
    return tr_ticks_tell(t, tr_now_ns());
}

#endif
