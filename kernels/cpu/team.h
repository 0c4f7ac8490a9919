/* A team of threads that works for one device: the CPU backend's only parallel construct in its hot paths. Owned by
 * tr_device (device->team, always there; of one member where the device has one thread).
 *
 *     static void rows(void *ctx, int i, int n)         member i of n, 0 <= i < n; the caller of run is member 0
 *     {
 *         struct work *w = ctx;
 *         for (int r = tr_team_part(w->n_rows, i, n); r < tr_team_part(w->n_rows, i + 1, n); r++)
 *             ...                                       a static share; first touch and every later use agree on it
 *         tr_team_barrier(w->device->team);             only if there are phases: every member, equally often
 *         for (int t; (t = tr_team_next(w->device->team)) < n_tasks;)
 *             ...                                       dynamic shares: each task number comes once
 *                                                       (pieces.h: a static share first, then what others have left)
 *     }
 *     tr_device_run(device, multiply_adds, rows, &work);     cpu_priv.h: all members, or the caller alone for small work
 *
 * Waiting is spinning for a bounded time, then sleeping on a futex: spinning longer costs ten times on cores that
 * others use too, sleeping at once costs some microseconds per operation on cores of one's own. The time adapts itself:
 * it halves when spinning was in vain, doubles (up to the bound) when it was not.
 *
 * One thread at a time may call run, and never from inside a run. Results may not depend on the number of members: cut
 * work where outputs are independent, never a sum. */
#ifndef TR_KERNELS_CPU_TEAM_H
#define TR_KERNELS_CPU_TEAM_H

#include <stdint.h>

#include "base/err.h"

typedef struct tr_team tr_team;
typedef void tr_team_fn(void *ctx, int i, int n);

/* n members: the caller of run and n - 1 threads. cpu: [n] numbers of the CPUs they belong on, or NULL: where the
 * system puts them. Threads are pinned; the caller is moved to its CPU whenever a run finds it elsewhere but keeps its
 * mask, because threads that it creates later (reader, writer) would inherit a mask of one CPU. */
tr_status tr_team_create(tr_team **out, int n, const int *cpu, tr_err *err);
void tr_team_free(tr_team *team);

int tr_team_size(const tr_team *team);

/* fn(ctx, i, n) on every member; returns when all have returned. What they wrote is visible to the caller. */
void tr_team_run(tr_team *team, tr_team_fn *fn, void *ctx);

/* fn(ctx, 0, 1) by the caller, the others not being told; barrier and next work as in a team of one. */
void tr_team_run_alone(tr_team *team, tr_team_fn *fn, void *ctx);

/* Inside a run: wait until every member is here. What any wrote before is visible to all behind it. */
void tr_team_barrier(tr_team *team);

/* Inside a run: 0, 1, 2, ... to whoever asks; begins again at 0 behind a barrier. */
int tr_team_next(tr_team *team);

/* Inside a run: the same of TR_TEAM_COUNTERS more counters, which begin again at 0 with each run alone; from `most` on it is
 * `most` to everybody, which takes no more than a look. */
enum { TR_TEAM_COUNTERS = 2048 };
int tr_team_count(tr_team *team, int i, int most);

/* Where part i of n of [0, total) begins; i == n: total. Parts differ by at most one, the larger ones first. */
static inline int tr_team_part(int total, int i, int n)
{
    int small = total / n, more = total % n;
    return i * small + (i < more ? i : more);
}

#endif
