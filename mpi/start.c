#include <config.h>

#include "mpi/start.h"

#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include <mpi.h>

/* The text holds the call and the library's own message. */
static tr_status mpi_failed(tr_err *err, const char *call, int code)
{
    char text[MPI_MAX_ERROR_STRING];
    int n = 0;

    if (MPI_Error_string(code, text, &n) != MPI_SUCCESS)
        snprintf(text, sizeof text, "error %d", code);
    return tr_fail(err, TR_E_COMM, "%s: %s", call, text);
}

/* Translated where it appears: sets st and leaves (style.md 3). */
#define TR_MPI(call)                                                                               \
    do {                                                                                           \
        int tr_code = (call);                                                                      \
        if (tr_code != MPI_SUCCESS) {                                                              \
            st = mpi_failed(err, #call, tr_code);                                                  \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

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

done:
    if (local != MPI_COMM_NULL) MPI_Comm_free(&local);
    return st;
}

void tr_world_finish(void)
{
    int begun = 0, ended = 0;

    MPI_Initialized(&begun);
    MPI_Finalized(&ended);
    if (begun && !ended) MPI_Finalize();
}

/* "rank 3 on node07: TEXT (and 5 more ranks)"; a text that is too long loses its middle, not its ends. */
static void speak_for(char *out, size_t n, const tr_world *world, const char *text, int n_failed)
{
    char front[128], behind[64] = "";

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

tr_status tr_agree(const tr_world *world, tr_status mine, tr_err *err)
{
    tr_status st = TR_OK;
    tr_err said = {.status = mine};
    int failed = mine != TR_OK, lowest = failed ? world->rank : INT_MAX, n_failed = 0;

    if (world->size == 1) return mine;
    /* The way of every healthy step: one reduction, nothing else. */
    TR_MPI(MPI_Allreduce(MPI_IN_PLACE, &lowest, 1, MPI_INT, MPI_MIN, MPI_COMM_WORLD));
    if (lowest == INT_MAX) return TR_OK;
    TR_MPI(MPI_Allreduce(&failed, &n_failed, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD));
    if (world->rank == lowest)
        speak_for(said.text, sizeof said.text, world, err ? err->text : "", n_failed);
    TR_MPI(MPI_Bcast(&said, (int)sizeof said, MPI_BYTE, lowest, MPI_COMM_WORLD));
    st = tr_fail(err, said.status, "%s", said.text);

done:
    return st;
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
