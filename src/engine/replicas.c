#include <config.h>

#include "engine/replicas.h"

#include <stdbool.h>

/* A replica may have this share of the average, and this many choices more, before prefixes do not count any more. The
 * replicas of a job then differ by 1.25 / 0.75 at most where one prefix is all there is. */
static const double most_share = 1.25;
enum { SPARE = 1 };

typedef struct candidate {
    int replica; /* -1: none */
    int known;   /* tokens of the prompt it has or will have */
    int choices; /* it has, running and waiting */
    bool waits;  /* some of them wait: it will not run dry */
    bool wants;
} candidate;

static candidate look(const tr_scheduler *s, int replica, const tr_request *next)
{
    const tr_scheduler_stats stats = tr_scheduler_stats_get(s);
    return (candidate){.replica = replica,
                       .known = next ? tr_scheduler_known(s, next) : 0,
                       .choices = stats.running + stats.waiting,
                       .waits = stats.waiting > 0,
                       .wants = tr_scheduler_wants(s)};
}

static bool better(const candidate *a, const candidate *b)
{
    if (b->replica < 0) return true;
    return a->known != b->known ? a->known > b->known : a->choices < b->choices;
}

int tr_replica_choose(tr_scheduler *const *scheduler, int n_replicas, const tr_request *next,
                      int n_queued)
{
    candidate fewest = {.replica = -1}, best = {.replica = -1};
    double all = n_queued + next->params.n;

    for (int d = 0; d < n_replicas; d++) {
        const candidate c = look(scheduler[d], d, NULL);
        all += c.choices;
        if (c.wants && better(&c, &fewest)) fewest = c;
    }
    if (n_replicas == 1 || fewest.replica < 0) return fewest.replica;
    const double most = most_share * all / n_replicas + SPARE;
    for (int d = 0; d < n_replicas; d++) {
        const candidate c = look(scheduler[d], d, next);
        if (c.choices + next->params.n <= most && better(&c, &best)) best = c;
    }
    if (best.replica < 0 || !best.known) return fewest.replica;
    if (best.wants) return best.replica;
    return fewest.waits ? -1
                        : fewest.replica; /* full now; nobody suffers if it waits for that one */
}

tr_scheduler_stats tr_replicas_stats(tr_scheduler *const *scheduler, int n_replicas)
{
    tr_scheduler_stats t = {0};

    for (int d = 0; d < n_replicas; d++) {
        const tr_scheduler_stats s = tr_scheduler_stats_get(scheduler[d]);
        t.steps += s.steps;
        t.prefill_tokens += s.prefill_tokens;
        t.decode_tokens += s.decode_tokens;
        t.mixed_decode_tokens += s.mixed_decode_tokens;
        t.generated_tokens += s.generated_tokens;
        t.preemptions += s.preemptions;
        t.finished += s.finished;
        t.failed += s.failed;
        t.continued += s.continued;
        t.prompt_tokens += s.prompt_tokens;
        t.cached_tokens += s.cached_tokens;
        t.pages_evicted += s.pages_evicted;
        t.running += s.running;
        t.waiting += s.waiting;
        t.pages_held += s.pages_held;
        t.pages_cached += s.pages_cached;
        t.pages_total += s.pages_total;
    }
    return t;
}
