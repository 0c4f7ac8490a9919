#include <config.h>

#include "mpi/start.h"

#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <mpi.h>

#include "base/clock.h"
#include "mpi/flight.h"
#include "mpi/mpi_priv.h"

enum {
    ABORT_PATIENCE_S = 5,
    PATIENCE_S = 5
}; /* parallel.md 10.2; for the others after a failure */

/* "node07" of "node07.cluster.example". */
static void host_name(char *host, size_t n)
{
    if (gethostname(host, n) != 0) snprintf(host, n, "unknown");
    host[n - 1] = '\0';
    char *dot = strchr(host, '.');
    if (dot && dot != host) *dot = '\0';
}

tr_status tr_world_start(tr_world *world, tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Comm local = MPI_COMM_NULL;
    int provided = MPI_THREAD_SINGLE;

    *world = (tr_world){.size = 1, .local_size = 1};
    host_name(world->host, sizeof world->host);
    TR_MPI(MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided));
    /* From here on calls return their errors instead of ending the job without a word of ours. */
    TR_MPI(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    if (provided < MPI_THREAD_FUNNELED) {
        st = tr_fail(err, TR_E_COMM, "this MPI was built without thread support");
        goto done;
    }
    TR_MPI(MPI_Comm_rank(MPI_COMM_WORLD, &world->rank));
    TR_MPI(MPI_Comm_size(MPI_COMM_WORLD, &world->size));
    TR_MPI(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, world->rank, MPI_INFO_NULL,
                               &local));
    TR_MPI(MPI_Comm_rank(local, &world->local_rank));
    TR_MPI(MPI_Comm_size(local, &world->local_size));
    TR_MPI(MPI_Allreduce(&world->rank, &world->node_first, 1, MPI_INT, MPI_MIN, local));

done:
    if (local != MPI_COMM_NULL) MPI_Comm_free(&local);
    return st;
}

int tr_names_rank(const char *text)
{
    int rank, end = 0;

    return sscanf(text, "rank %d on %*s%n", &rank, &end) == 1 && end > 0 && text[end - 1] == ':';
}

/* "rank 3 on node07: TEXT (and 5 more ranks)"; a text that is too long loses its middle, not its ends. What was agreed inside of a
 * phase says so already. */
static void speak_for(char *out, size_t n, const tr_world *world, const char *text, int n_failed)
{
    char front[128], behind[64] = "";

    if (tr_names_rank(text)) {
        snprintf(out, n, "%s", text);
        return;
    }
    snprintf(front, sizeof front, "rank %d on %s: ", world->rank, world->host);
    if (n_failed > 1)
        snprintf(behind, sizeof behind, " (and %d more rank%s)", n_failed - 1,
                 n_failed > 2 ? "s" : "");
    size_t room = n - 1 - strlen(front) - strlen(behind), len = strlen(text), head = len, tail = 0;
    if (len > room) {
        head = (room - 3) / 2;
        tail = room - 3 - head;
    }
    snprintf(out, n, "%s%.*s%s%s%s", front, (int)head, text, len > room ? "..." : "",
             text + len - tail, behind);
}

/* MPI advances only when called. Others may want the core: after some tests in a row it is offered to them. until_ns 0:
 * as long as it takes; the watchdog has its own opinion of that. */
static tr_status finish(MPI_Request *request, uint64_t until_ns, tr_err *err)
{
    tr_status st = TR_OK;
    int finished = 0;

    for (int i = 0; !finished; i++) {
        TR_MPI(MPI_Test(request, &finished, MPI_STATUS_IGNORE));
        if (finished || i < 100) continue;
        if (until_ns && tr_now_ns() > until_ns) {
            st = tr_fail(err, TR_E_COMM, "the other ranks do not come to the agreement");
            goto done;
        }
        sched_yield();
    }

done:
    return st;
}

/* What the calls of an agreement read and write. */
typedef struct agreement {
    int failed, first, lowest, n_failed;
    tr_err said;
} agreement;

static tr_status agree(const tr_world *world, agreement *a, tr_status mine, uint64_t until_ns,
                       tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Request request;

    *a = (agreement){.failed = mine != TR_OK, .said.status = mine};
    a->first = a->failed ? world->rank : INT_MAX;
    /* The way of every healthy step: one reduction, nothing else. */
    TR_MPI(MPI_Iallreduce(&a->first, &a->lowest, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD, &request));
    st = finish(&request, until_ns, err);
    if (st != TR_OK || a->lowest == INT_MAX) goto done;
    TR_MPI(MPI_Iallreduce(&a->failed, &a->n_failed, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD, &request));
    st = finish(&request, until_ns, err);
    if (st != TR_OK) goto done;
    if (world->rank == a->lowest)
        speak_for(a->said.text, sizeof a->said.text, world, err ? err->text : "", a->n_failed);
    TR_MPI(
        MPI_Ibcast(&a->said, (int)sizeof a->said, MPI_BYTE, a->lowest, MPI_COMM_WORLD, &request));
    st = finish(&request, until_ns, err);
    if (st == TR_OK) st = tr_fail(err, a->said.status, "%s", a->said.text);

done:
    return st;
}

tr_status tr_agree(const tr_world *world, tr_status mine, tr_err *err)
{
    agreement a;

    if (world->size == 1) return mine;
    const uint64_t id =
        tr_flight_begin(world->flight, "world", 0, world->size, "agree", 0, sizeof(int));
    tr_flight_wait(world->flight, id);
    tr_status st = agree(world, &a, mine, 0, err);
    tr_flight_done(world->flight, id);
    return st;
}

/* *met: all ranks have come. */
static tr_status agree_within(const tr_world *world, tr_status mine, double seconds, bool *met,
                              tr_err *err)
{
    const tr_err why = err ? *err : (tr_err){.status = mine};
    agreement *a = malloc(sizeof *a);
    if (!a) return tr_fail(err, TR_E_MEMORY, "out of memory");
    const uint64_t until_ns = tr_now_ns() + (uint64_t)(seconds * 1e9);
    tr_status st = agree(world, a, mine, until_ns, err);
    *met = tr_now_ns() <= until_ns;
    if (*met) {
        free(a);
    } else if (st != TR_OK) { /* given up: MPI may still write into *a, so it stays */
        char text[sizeof why.text];
        speak_for(text, sizeof text, world, mine != TR_OK ? why.text : "all is well here", 1);
        st = tr_fail(err, TR_E_COMM, "%s; the other ranks did not answer within %g s", text,
                     seconds);
    }
    return st;
}

tr_status tr_agree_within(const tr_world *world, tr_status mine, double seconds, tr_err *err)
{
    bool met;

    return world->size == 1 ? mine : agree_within(world, mine, seconds, &met, err);
}

void tr_world_say(const tr_world *world, tr_status st, tr_err *err)
{
    bool met;

    if (st == TR_OK || world->size == 1 || !err) return;
    if (world->rank == 0) fprintf(stderr, "trireme: %s\n", err->text);
    err->text[0] = '\0';
    agree_within(world, TR_OK, PATIENCE_S, &met, NULL); /* it stands there */
}

void tr_world_say_alone(const tr_world *world, const tr_err *err)
{
    if (tr_names_rank(err->text))
        fprintf(stderr, "trireme: %s\n", err->text);
    else
        fprintf(stderr, "trireme: rank %d on %s: %s\n", world->rank, world->host, err->text);
}

_Noreturn void tr_world_fail(const tr_world *world, tr_status st, tr_err *err)
{
    bool met = false;

    st = agree_within(world, st, PATIENCE_S, &met, err);
    if (met)
        tr_world_say(world, st, err);
    else
        tr_world_say_alone(world, err);
    tr_world_give_up(world, st);
}

tr_status tr_world_tell(const tr_world *world, void *data, int bytes, tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Request request;

    if (world->size == 1) return TR_OK;
    TR_MPI(MPI_Ibcast(data, bytes, MPI_BYTE, 0, MPI_COMM_WORLD, &request));
    st = finish(&request, 0, err);

done:
    return st;
}

tr_status tr_world_tell_host(const tr_world *world, void *data, int bytes, tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Comm local = MPI_COMM_NULL;
    MPI_Request request;

    if (world->size == 1) return TR_OK;
    TR_MPI(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, world->rank, MPI_INFO_NULL,
                               &local));
    TR_MPI(MPI_Ibcast(data, bytes, MPI_BYTE, 0, local, &request));
    st = finish(&request, 0, err);

done:
    if (local != MPI_COMM_NULL) MPI_Comm_free(&local);
    return st;
}

/* The code travels in the pointer: nothing has to outlive the caller. */
static void *exit_later(void *arg)
{
    sleep(ABORT_PATIENCE_S);
    _exit((int)(intptr_t)arg);
}

static void exit_in_time(int code)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, exit_later, (void *)(intptr_t)code) == 0)
        pthread_detach(thread);
}

void tr_world_finish(tr_status how)
{
    int begun = 0, ended = 0;

    MPI_Initialized(&begun);
    MPI_Finalized(&ended);
    if (!begun || ended) return;
    /* After a failure MPI_Finalize may wait for who will not come (once seen: for a thread of its own). */
    if (how != TR_OK && how != TR_E_STOP) exit_in_time(tr_exit_code(how));
    MPI_Finalize();
}

_Noreturn void tr_world_abort(tr_status why)
{
    const int code = tr_exit_code(why);
    int begun = 0, ended = 0;

    exit_in_time(code); /* MPI_Abort is known to hang where the network does */
    MPI_Initialized(&begun);
    MPI_Finalized(&ended);
    if (begun && !ended) MPI_Abort(MPI_COMM_WORLD, code);
    _exit(code);
}

_Noreturn void tr_world_give_up(const tr_world *world, tr_status why)
{
    exit_in_time(tr_exit_code(why)); /* should the device not answer */
    if (world->guard) world->guard->abort(world->guard->ctx);
    tr_world_abort(why);
}

const char *tr_mpi_threads(void)
{
    int level = MPI_THREAD_SINGLE;

    if (MPI_Query_thread(&level) != MPI_SUCCESS) level = MPI_THREAD_SINGLE;
    return level == MPI_THREAD_MULTIPLE     ? "multiple"
           : level == MPI_THREAD_SERIALIZED ? "serialized"
           : level == MPI_THREAD_FUNNELED   ? "funneled"
                                            : "single";
}

void tr_mpi_version(char *text, size_t n)
{
    char library[MPI_MAX_LIBRARY_VERSION_STRING];
    int len = 0;

    if (MPI_Get_library_version(library, &len) != MPI_SUCCESS)
        snprintf(library, sizeof library, "MPI");
    library[strcspn(library, "\r\n")] = '\0'; /* MPICH's goes on for many lines */
    for (char *p = library; *p; p++)
        if (*p == '\t') *p = ' ';
    snprintf(text, n, "%s", library);
}
