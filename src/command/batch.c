/* trireme batch: start, the phases with an agreement behind each, end. */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/clock.h"
#include "base/stop.h"
#include "batch/merge.h"
#include "command/apart.h"
#include "command/batch_run.h"
#include "command/command.h"
#include "command/launch.h"
#include "command/limit.h"
#include "command/options.h"
#include "mpi/start.h"

/* The ranks cannot be brought together any more: this one says why and ends the job. */
static void give_up(const tr_world *world, const tr_err *err)
{
    tr_world_say_alone(world, err);
    tr_world_give_up(world, err->status);
}

/* *apart: the others have not come. */
static tr_status agree_within(const tr_world *world, tr_status st, double seconds, bool *apart,
                              tr_err *err)
{
    const uint64_t until_ns = tr_now_ns() + (uint64_t)(seconds * 1e9);

    st = tr_agree_within(world, st, seconds, err);
    *apart = world->size > 1 && tr_now_ns() > until_ns;
    return st;
}

/* After each phase every rank knows how all of them fared. A stop asked for meanwhile ends the
 * run between phases. Phases have collectives of their own: where one rank has failed alone others may wait for it in one of
 * them, and no watchdog runs yet. They have a minute. */
static tr_status agree(const tr_world *world, tr_status st, tr_err *err)
{
    bool apart;

    if (st == TR_OK && tr_stop_requested())
        st = tr_fail(err, TR_E_STOP, "stopped by %s", tr_stop_reason());
    if (st == TR_OK || st == TR_E_STOP) return tr_agree(world, st, err);
    const tr_err mine = *err;
    st = agree_within(world, st, 60, &apart, err);
    if (apart) give_up(world, &mine);
    return st;
}

/* *apart: a step has failed here, and the others have not come. */
static tr_status phases(tr_run *run, const tr_world *world, bool *apart, tr_err *err)
{
    static tr_status (*const phase[])(tr_run *, tr_err *) = {
        tr_run_input,        tr_run_files,   tr_run_alike, tr_run_journal, tr_run_device,
        tr_run_open_profile, tr_run_weights, tr_run_model, tr_run_engine,  tr_run_watch};
    enum { PATIENCE_S = 5 };

    tr_status st = TR_OK;
    for (size_t i = 0; st == TR_OK && i < sizeof phase / sizeof *phase; i++) {
        st = phase[i](run, err);
        if (st == TR_OK) st = tr_stop_install(err); /* a library of the phase may have taken them */
        st = agree(world, st, err);
    }
    if (st == TR_E_MEMORY) tr_run_budget(run);
    if (st != TR_OK) return st;
    st = tr_run_job(run, err);
    st = tr_run_broken(run) ? agree_within(world, st, PATIENCE_S, apart, err)
                            : tr_agree(world, st, err);
    tr_run_close_profile(run, st);
    return st;
}

/* The end of the job's time into the options, and an alarm until the engine looks after it. False: Slurm's is not to be
 * believed. */
static bool find_end(tr_batch_options *o)
{
    double seconds = o->budget_s;
    bool odd = false;

    if (!o->budget_text)
        seconds = tr_limit_slurm(getenv("SLURM_JOB_END_TIME"), (int64_t)time(NULL), &odd);
    if (seconds < 0) return !odd;
    o->end_ns = tr_now_ns() + (uint64_t)(seconds * 1e9);
    o->margin_s = tr_limit_margin(seconds);
    tr_stop_alarm(seconds > o->margin_s ? seconds - o->margin_s : 1e-6);
    return true;
}

static tr_status with_ranks(tr_batch_options *options, tr_err *err)
{
    tr_world world;
    tr_run *run = NULL;
    tr_log *log = NULL;
    const bool believed = find_end(options);
    bool apart = false;
    tr_status st = tr_world_start(&world, err);

    if (st == TR_OK) st = tr_launch_check(&world, err);
    if (st == TR_OK) st = tr_stop_install(err); /* what MPI has loaded may have taken the signals */
    if (st != TR_OK) goto done;
    bool leads = world.rank == 0;
    log = tr_log_create(stderr, !leads, options->verbose);
    if (!believed)
        tr_log_warn(log, "SLURM_JOB_END_TIME is %s: no time to come, there is no time budget",
                    getenv("SLURM_JOB_END_TIME"));
    run = tr_run_create(options, &world, log);
    st = tr_agree(&world, run && log ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory"), err);
    if (st == TR_OK) st = phases(run, &world, &apart, err);
    if (apart) give_up(&world, err);
    tr_world_say(&world, st, err);
    if (st != TR_OK && world.size > 1 && run && tr_run_broken(run)) tr_world_give_up(&world, st);
done:
    tr_run_free(run); /* every file before MPI ends: the launcher may end ranks that still run */
    tr_log_free(log);
    tr_world_finish(st);
    return st;
}

static tr_status merge(const tr_batch_options *o, tr_err *err)
{
    tr_log *log = tr_log_create(stderr, false, o->verbose);
    tr_status st = log ? tr_apart_check(o, err) : tr_fail(err, TR_E_MEMORY, "out of memory");
    if (st == TR_OK) st = tr_merge(o->input, o->output, o->part, o->n_parts, log, err);
    tr_log_free(log);
    return st;
}

tr_status tr_command_batch(int argc, char **argv, tr_err *err)
{
    tr_batch_options options;
    tr_status st = tr_batch_options_parse(&options, argc, argv, err);

    if (st != TR_OK) return st;
    if (options.help) {
        tr_batch_options_help(stdout);
        return fflush(stdout) ? tr_fail(err, TR_E_IO, "standard output: %s", strerror(errno))
                              : TR_OK;
    }
    st = tr_stop_install(err);
    if (st != TR_OK) return st;
    return options.merge ? merge(&options, err) : with_ranks(&options, err);
}
