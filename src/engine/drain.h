/* When a run that is to end must end: the signals of any rank, the time budget, and what can still be finished before
 * (parallel.md 10.3). Arithmetic alone: no clock, no MPI; every call says what time it is (tr_now_ns). On the leader's main
 * thread. Plain data, begun by tr_drain_begin.
 *
 * Once draining nothing new is begun. USR1 and INT leave what runs `grace_s`, TERM `term_grace_s`, and the budget until
 * margin_s before its end, at the latest in any case. The budget begins to drain when what is left is shorter than a request
 * takes on average; before the first has finished nothing is known and everything is begun. */
#ifndef TR_ENGINE_DRAIN_H
#define TR_ENGINE_DRAIN_H

#include <stdbool.h>
#include <stdint.h>

typedef struct tr_drain_options {
    double grace_s, term_grace_s; /* after USR1 or INT, after TERM; 0: the next step boundary */
    uint64_t end_ns;              /* the time budget's end; 0: none */
    double margin_s;              /* before end_ns: saving and leaving */
} tr_drain_options;

typedef struct tr_drain {
    tr_drain_options options;
    uint64_t word;     /* the most urgent asked so far (base/stop.h) */
    bool draining;     /* begin nothing */
    uint64_t until_ns; /* draining: everybody leaves by then */
    double step_ns;    /* how long steps take at most, lately */
    double fastest_ns; /* the shortest step that gave tokens; 0: none yet */
    double
        request_ns; /* how long a request runs on average, from its beginning; 0: none has finished */
    uint64_t n_requests;
} tr_drain;

void tr_drain_begin(tr_drain *d, const tr_drain_options *options);
/* A step took so long; generates: it had no prompt rows, so it is what a token costs. */
void tr_drain_step(tr_drain *d, uint64_t ns, bool generates);
/* A request has finished, so long after it was begun. */
void tr_drain_request(tr_drain *d, uint64_t ns);
/* word: what all ranks together were asked so far. True: draining. */
bool tr_drain_look(tr_drain *d, uint64_t now_ns, uint64_t word);
/* Draining, and another step would not end in time. */
bool tr_drain_over(const tr_drain *d, uint64_t now_ns);
/* Draining: tokens that a choice can gain at the very most before the end, by the fastest step so far; INT64_MAX: not known. */
int64_t tr_drain_tokens(const tr_drain *d, uint64_t now_ns);
/* "USR1", "the time budget"; NULL: not draining. */
const char *tr_drain_reason(const tr_drain *d);

#endif
