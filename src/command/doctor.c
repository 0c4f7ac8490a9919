/* trireme doctor: before a big job, under the launcher that will start it, a page of what the ranks find and what to change; after a
 * hang, what its reports say. */
#include <config.h>

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "command/command.h"
#include "command/doctor_report.h"
#include "command/hang.h"
#include "command/limit.h"
#include "command/options.h"
#ifdef HAVE_NCCL
#include "mpi/comm_nccl.h"
#endif
#include "mpi/comm_mpi.h"

typedef struct doctor_options {
    bool help;
    const char *output, *time_budget;
} doctor_options;

#define AT(member) offsetof(doctor_options, member)

static const tr_option table[] = {
    /* clang-format off */
    {"output",      'o', TR_OPTION_TEXT, AT(output), 0, 0, "OUT", NULL,
     "the output of the job to come: its folder is tried out"},
    {"time-budget", 0,   TR_OPTION_TEXT, AT(time_budget), 0, 0, "T", NULL,
     "the job will be given this: its end is known"},
    {"help",        'h', TR_OPTION_FLAG, AT(help), 0, 0, NULL, NULL, "this text"},
    /* clang-format on */
};
enum { N_TABLE = sizeof table / sizeof *table, RANKS_MAX = 65536, BLOCK = 1 << 20, TURNS = 20 };

static void help(FILE *out)
{
    fputs("Usage: mpirun -n N trireme doctor [-o OUT]\n"
          "       srun --mpi=pmix trireme doctor [-o OUT]\n"
          "       trireme doctor OUT.hang.rank*.json\n"
          "\n"
          "Before a big job, started as the job will be: one page of what the ranks find and\n"
          "what to change; exit status 0 if nothing must be, else 2. After a hang: the first\n"
          "collective on which the ranks disagree, and who is missing.\n",
          out);
    tr_options_help(out, table, N_TABLE);
}

static tr_status explain(char *const *path, int n, tr_err *err)
{
    tr_hang *hang = NULL;
    tr_status st = tr_hang_read(&hang, path, n, err);

    if (st == TR_OK) tr_hang_explain(hang, stdout);
    tr_hang_free(hang);
    return st;
}

/* ---- between two ranks ------------------------------------------------------------------------------------------------ */

static tr_status pass(tr_comm *c, bool sends, int peer, void *data, size_t bytes, tr_err *err)
{
    tr_ticket t;
    tr_status st = sends ? tr_comm_send(c, peer, data, bytes, &t, err)
                         : tr_comm_recv(c, peer, data, bytes, &t, err);
    return st == TR_OK ? tr_comm_wait(c, TR_LANE_MAIN, t, err) : st;
}

/* The fastest of some messages there and back, halved: seconds. */
static tr_status ping(tr_comm *c, int peer, void *data, size_t bytes, double *seconds, tr_err *err)
{
    const bool begins = tr_comm_rank(c) == 0;
    tr_status st = TR_OK;

    for (int i = 0; i < TURNS && st == TR_OK; i++) {
        const uint64_t begun_ns = tr_now_ns();
        st = pass(c, begins, peer, data, bytes, err);
        if (st == TR_OK) st = pass(c, !begins, peer, data, bytes, err);
        const double s = (double)(tr_now_ns() - begun_ns) * 0.5e-9;
        if (i == 0 || s < *seconds) *seconds = s;
    }
    return st;
}

/* Rank 0 and `peer`; the others pass by. */
static tr_status measure(tr_link *link, tr_comm *c, int peer, void *data, tr_err *err)
{
    const int me = tr_comm_rank(c), other = me == 0 ? peer : 0;
    double whole = 0;

    *link = (tr_link){.from = 0, .to = peer};
    if (me != 0 && me != peer) return TR_OK;
    tr_status st = ping(c, other, data, 8, &link->latency_s, err);
    if (st == TR_OK) st = ping(c, other, data, BLOCK, &whole, err);
    link->bytes_per_s = whole > 0 ? BLOCK / whole : 0;
    return st;
}

/* A neighbour on rank 0's host, and the last rank elsewhere, where there are any. */
static int choose_links(const tr_facts *all, int n, int peer[2])
{
    int n_links = 0, here = 0, away = 0;

    for (int i = 1; i < n; i++)
        *(strcmp(all[i].host, all[0].host) ? &away : &here) = i;
    if (here) peer[n_links++] = here;
    if (away) peer[n_links++] = away;
    return n_links;
}

/* ---- before a job ----------------------------------------------------------------------------------------------------- */

static tr_status gather(tr_facts **out, const tr_facts *mine, const tr_world *world, tr_comm *c,
                        tr_err *err)
{
    const size_t n = (size_t)tr_comm_size(c);
    tr_facts *all = tr_calloc(n, sizeof *all);
    size_t *bytes = tr_calloc(n, sizeof *bytes);
    tr_status st = all && bytes ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_ticket t = {0};

    st = tr_agree(world, st, err);
    for (size_t i = 0; i < n && st == TR_OK; i++)
        bytes[i] = sizeof *all;
    if (st == TR_OK) st = tr_comm_all_gather(c, mine, all, bytes, &t, err);
    if (st == TR_OK) st = tr_comm_wait(c, TR_LANE_MAIN, t, err);
    free(bytes);
    *out = all;
    return st;
}

static tr_status look(const tr_world *world, tr_comm *c, const doctor_options *o, int *n_changes,
                      tr_err *err)
{
    tr_out_facts out;
    tr_facts mine, *all = NULL;
    tr_link link[2];
    int peer[2], n_links = 0;
    char nccl[32] = "";
    void *data = calloc(1, BLOCK);
    tr_status st = tr_agree(world, data ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory"), err);

    tr_facts_find(&mine, world);
    if (st == TR_OK) st = tr_out_probe(&out, &mine.sees_out, world, o->output, err);
    if (st == TR_OK) st = gather(&all, &mine, world, c, err);
    if (st == TR_OK) n_links = choose_links(all, world->size, peer);
    for (int i = 0; i < n_links && st == TR_OK; i++)
        st = measure(&link[i], c, peer[i], data, err);
    st = tr_agree(world, st, err);
    *n_changes = 0;
#ifdef HAVE_NCCL
    tr_nccl_version(nccl, sizeof nccl);
#endif
    if (st == TR_OK && world->rank == 0) {
        const tr_doctor d = {.rank = all,
                             .n = world->size,
                             .out = &out,
                             .link = link,
                             .n_links = n_links,
                             .nccl = nccl[0] ? nccl : NULL,
                             .time_given = o->time_budget != NULL};
        *n_changes = tr_doctor_report(&d, stdout);
        fflush(stdout);
    }
    free(all);
    free(data);
    return st;
}

static tr_status examine(const doctor_options *o, tr_world *world, tr_err *err)
{
    tr_comm *c = NULL;
    int n_changes = 0;
    tr_status st = TR_OK;

    if (world->size > RANKS_MAX)
        return tr_fail(err, TR_E_USAGE, "doctor: %d ranks, of %d at most", world->size, RANKS_MAX);
    st = tr_comm_split(&c, world, 0, world->rank, "doctor", err);
    if (st == TR_OK) st = look(world, c, o, &n_changes, err);
    if (st == TR_OK) st = tr_world_tell(world, &n_changes, (int)sizeof n_changes, err);
    if (st == TR_OK && n_changes)
        st = tr_fail(err, TR_E_USAGE, "doctor: %d thing%s to be changed before a big job",
                     n_changes, n_changes == 1 ? " is" : "s are");
    tr_comm_free(c);
    return st;
}

tr_status tr_command_doctor(int argc, char **argv, tr_err *err)
{
    doctor_options o = {.help = false};
    tr_world world;
    int rest = argc;
    tr_status st = tr_options_parse(table, N_TABLE, &o, argc, argv, &rest, err);

    if (st == TR_OK && o.output && (!*o.output || !strcmp(o.output, "-")))
        st = tr_fail(err, TR_E_USAGE, "-o %s: a file is wanted", o.output);
    if (st == TR_OK && o.output && rest < argc)
        st = tr_fail(err, TR_E_USAGE, "doctor: -o OUT is for before a job, %s for after one",
                     argv[rest]);
    double seconds;
    if (st == TR_OK && o.time_budget) st = tr_limit_time(&seconds, o.time_budget, err);
    if (st != TR_OK) return st;
    if (o.help) {
        help(stdout);
    } else if (rest < argc) {
        st = explain(argv + rest, argc - rest, err);
    } else {
        st = tr_world_start(&world, err);
        if (st == TR_OK) {
            st = examine(&o, &world, err);
            tr_world_say(&world, st, err);
        }
        tr_world_finish(st);
        return st;
    }
    if (st == TR_OK && (fflush(stdout) != 0 || ferror(stdout)))
        st = tr_fail(err, TR_E_IO, "standard output: %s", strerror(errno));
    return st;
}
