/* The flight recorder: what this rank's main thread does, and its last 256 communications (parallel.md 10.2). The main
 * thread writes, the watchdog's thread reads: every function takes the recorder's lock, which nobody holds for long.
 * All functions take NULL for "no recorder" and then do nothing. */
#ifndef TR_MPI_FLIGHT_H
#define TR_MPI_FLIGHT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TR_FLIGHT_MAX = 256, TR_FLIGHT_DEPTH = 4 };

typedef struct tr_flight tr_flight;

typedef struct tr_flight_record {
    uint64_t id;        /* counts from 1 over all groups */
    char group[16];     /* communicator's name; of those with one name it is the one of */
    int first, members; /* this rank of the world and as many members */
    const char *op;     /* static string */
    uint64_t
        number; /* from 1, the same on all members: of the communicator's collectives; of sends and receives, this rank's own */
    uint64_t bytes, step;
    int layer;                  /* -1: none */
    uint64_t begun_ns, done_ns; /* done_ns 0: not yet */
} tr_flight_record;

typedef struct tr_flight_state {
    uint64_t n_beats, step, beat_ns; /* the newest heartbeat and when it came */
    uint64_t
        moved_ns; /* the newest sign of progress: a heartbeat, a stretch or a communication begun or ended */
    bool rests;         /* nothing is to be done */
    double expected_s;  /* of the running step; 0: not known */
    const char *what;   /* innermost; NULL: nothing said */
    int layer;          /* innermost that names one; -1: none */
    uint64_t n_records; /* ever */
    bool waits;         /* in a communicator, for `waited` */
    tr_flight_record waited;
} tr_flight_state;

tr_flight *tr_flight_create(void); /* NULL: out of memory */
void tr_flight_free(tr_flight *f);

void tr_flight_beat(tr_flight *f, uint64_t step);
void tr_flight_rest(tr_flight *f);
void tr_flight_expect(tr_flight *f, double seconds);
void tr_flight_enter(tr_flight *f, const char *what, int layer);
void tr_flight_leave(tr_flight *f);

/* One communication: an id to name it by, 0 without a recorder. */
uint64_t tr_flight_begin(tr_flight *f, const char *group, int first, int members, const char *op,
                         uint64_t number, uint64_t bytes);
void tr_flight_wait(tr_flight *f, uint64_t id); /* the main thread waits for it; 0: for none */
void tr_flight_done(tr_flight *f, uint64_t id);

tr_flight_state tr_flight_look(tr_flight *f);
/* The newest records, oldest first; how many. out: room for TR_FLIGHT_MAX. */
int tr_flight_records(tr_flight *f, tr_flight_record *out);

#endif
