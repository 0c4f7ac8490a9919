#include <config.h>

#include "mpi/clock_offset.h"

#include <sched.h>

#include <mpi.h>

#include "base/clock.h"
#include "mpi/mpi_priv.h"

enum { PING_PONGS = 64, TAG = 7301, TESTS = 1000 };

/* As MPI_Wait, but the core is offered to others now and then. */
static tr_status finish(MPI_Request *request, tr_err *err)
{
    tr_status st = TR_OK;
    int finished = 0;

    for (int i = 1; !finished; i++) {
        TR_MPI(MPI_Test(request, &finished, MPI_STATUS_IGNORE));
        if (!finished && i % TESTS == 0) sched_yield();
    }

done:
    return st;
}

static tr_status give(int to, uint64_t *word, tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Request request;

    TR_MPI(MPI_Isend(word, 1, MPI_UINT64_T, to, TAG, MPI_COMM_WORLD, &request));
    st = finish(&request, err);

done:
    return st;
}

static tr_status take(int from, uint64_t *word, tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Request request;

    TR_MPI(MPI_Irecv(word, 1, MPI_UINT64_T, from, TAG, MPI_COMM_WORLD, &request));
    st = finish(&request, err);

done:
    return st;
}

/* Rank 0: says what time it is, to one rank after the other. */
static tr_status answer(const tr_world *world, tr_err *err)
{
    tr_status st = TR_OK;

    for (int r = 1; r < world->size && st == TR_OK; r++)
        for (int i = 0; i < PING_PONGS && st == TR_OK; i++) {
            uint64_t word = 0;
            st = take(r, &word, err);
            word = tr_now_ns();
            if (st == TR_OK) st = give(r, &word, err);
        }
    return st;
}

static tr_status ask(tr_clock_offset *out, tr_err *err)
{
    tr_status st = TR_OK;

    out->rtt_ns = UINT64_MAX;
    for (int i = 0; i < PING_PONGS && st == TR_OK; i++) {
        uint64_t word = 0;
        const uint64_t from = tr_now_ns();
        st = give(0, &word, err);
        if (st == TR_OK) st = take(0, &word, err);
        const uint64_t until = tr_now_ns(), rtt = until - from;
        if (st != TR_OK || rtt >= out->rtt_ns) continue;
        out->rtt_ns = rtt;
        out->at_ns = from + rtt / 2;
        out->offset_ns = (int64_t)(word - out->at_ns);
    }
    return st;
}

tr_status tr_clock_measure(tr_clock_offset *out, const tr_world *world, tr_err *err)
{
    *out = (tr_clock_offset){.at_ns = tr_now_ns()};
    if (world->size == 1) return TR_OK;
    return world->rank == 0 ? answer(world, err) : ask(out, err);
}
