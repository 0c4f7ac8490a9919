#include <config.h>

#include "engine/drain.h"

#include <stddef.h>

#include "base/stop.h"

enum { MEMORY = 64 }; /* requests whose mean is looked at, about */

void tr_drain_begin(tr_drain *d, const tr_drain_options *options)
{
    *d = (tr_drain){.options = *options};
    if (d->options.term_grace_s > d->options.grace_s) d->options.term_grace_s = d->options.grace_s;
}

void tr_drain_step(tr_drain *d, uint64_t ns, bool generates)
{
    const double t = (double)ns;

    d->step_ns *= 0.95; /* the longest of the last ones: a spell of long prompts is forgotten */
    if (t > d->step_ns) d->step_ns = t;
    if (generates && t > 0 && (d->fastest_ns <= 0 || t < d->fastest_ns)) d->fastest_ns = t;
}

void tr_drain_request(tr_drain *d, uint64_t ns)
{
    const uint64_t n = ++d->n_requests < MEMORY ? d->n_requests : MEMORY;
    d->request_ns += ((double)ns - d->request_ns) / (double)n;
}

/* Nanoseconds from now to the budget's end without its margin, 0 where that has passed. */
static double left_ns(const tr_drain *d, uint64_t now_ns)
{
    const double left = d->options.end_ns > now_ns ? (double)(d->options.end_ns - now_ns) : 0;
    const double margin = d->options.margin_s * 1e9;
    return left > margin ? left - margin : 0;
}

/* Everybody leaves at `until` at the latest. */
static void drain_until(tr_drain *d, uint64_t until_ns)
{
    if (!d->draining || until_ns < d->until_ns) d->until_ns = until_ns;
    d->draining = true;
}

bool tr_drain_look(tr_drain *d, uint64_t now_ns, uint64_t word)
{
    const tr_drain_options *o = &d->options;

    if (word > d->word) {
        const double grace_s = tr_stop_word_urgent(word) ? o->term_grace_s : o->grace_s;
        /* A second rank's signal of the same urgency does not begin the grace anew: the earlier end stays. */
        d->word = word;
        drain_until(d, now_ns + (uint64_t)(grace_s * 1e9));
    }
    if (!o->end_ns) return d->draining;
    const double left = left_ns(d, now_ns);
    if (d->draining) {
        drain_until(d, now_ns + (uint64_t)left);
    } else if (left <= d->request_ns + d->step_ns) {
        drain_until(d, now_ns + (uint64_t)left);
    }
    return d->draining;
}

bool tr_drain_over(const tr_drain *d, uint64_t now_ns)
{
    return d->draining && (now_ns >= d->until_ns || (double)(d->until_ns - now_ns) <= d->step_ns);
}

int64_t tr_drain_tokens(const tr_drain *d, uint64_t now_ns)
{
    if (!d->draining || d->fastest_ns <= 0) return INT64_MAX;
    if (now_ns >= d->until_ns) return 0;
    const double n = (double)(d->until_ns - now_ns) / d->fastest_ns;
    return n < 1e15 ? (int64_t)n : INT64_MAX;
}

const char *tr_drain_reason(const tr_drain *d)
{
    if (!d->draining) return NULL;
    return d->word ? tr_stop_word_name(d->word) : "the time budget";
}
