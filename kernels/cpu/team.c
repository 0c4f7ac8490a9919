#include <config.h>

#include "kernels/cpu/team.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/clock.h"

enum {
    LINE = 64, /* words that different members write are so far apart */
    SPIN_NS_MAX = 100000,
    SPIN_NS_MIN = 1000,
    PAUSES = 16, /* between two looks at the clock */
};

/* Of a member's stack, at least: the kernels' scratch takes up to 2 MB of it, and where `ulimit -s` is unlimited glibc
 * gives a thread no more than that. */
enum { STACK_BYTES = 4 << 20 };

/* A word that some wait on until another changes it, and how many of them sleep: while nobody does, a change is a
 * store. The sleeper counts itself, then the kernel looks at the word; the waker changes the word, then looks at the
 * count: one of them sees the other. */
typedef struct signal_word {
    _Alignas(LINE) atomic_uint value;
    atomic_int n_asleep;
} signal_word;

/* Of the run whose number stands above what it counts: nobody needs to put all of them back. */
typedef struct counter {
    _Alignas(LINE) _Atomic uint64_t value;
} counter;

typedef struct member {
    tr_team *team;
    pthread_t thread;
    int i, started;
} member;

struct tr_team {
    signal_word go;      /* runs begun */
    signal_word arrived; /* barriers passed, the ends of runs among them */
    _Alignas(LINE) atomic_int n_here;
    _Alignas(LINE) atomic_int next;
    _Alignas(LINE) atomic_uint spin_ns;
    tr_team_fn *fn;   /* of this run; NULL: leave */
    uint32_t round;   /* the run's number; it may begin again at 0 after 2^32 */
    counter *counter; /* [TR_TEAM_COUNTERS] */
    void *ctx;
    int n, n_running; /* members; of them in this run: all or 1 */
    int caller_cpu;   /* -1: anywhere */
    member member[];
};

static void pause_cpu(void)
{
#if defined __x86_64__ || defined __i386__
    __builtin_ia32_pause();
#endif
}

static void change(signal_word *w, unsigned value)
{
    atomic_store(&w->value, value);
    if (atomic_load(&w->n_asleep) > 0)
        syscall(SYS_futex, &w->value, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static int changed(signal_word *w, unsigned old)
{
    for (int k = 0; k < PAUSES; k++) {
        if (atomic_load_explicit(&w->value, memory_order_acquire) != old) return 1;
        pause_cpu();
    }
    return 0;
}

/* Until the word is no longer `old`. A wait that was, or would have been, short enough for spinning lengthens the time
 * that the next one spins. */
static void await_change(tr_team *t, signal_word *w, unsigned old)
{
    if (changed(w, old)) return;

    const unsigned spin = atomic_load_explicit(&t->spin_ns, memory_order_relaxed);
    const uint64_t begun = tr_now_ns();
    int there = changed(w, old);
    while (!there && tr_now_ns() - begun < spin)
        there = changed(w, old);
    if (!there) {
        atomic_fetch_add(&w->n_asleep, 1);
        while (atomic_load(&w->value) == old)
            syscall(SYS_futex, &w->value, FUTEX_WAIT_PRIVATE, old, NULL, NULL, 0);
        atomic_fetch_sub(&w->n_asleep, 1);
    }
    unsigned next = tr_now_ns() - begun < SPIN_NS_MAX ? 2 * spin : spin / 8;
    next = next > SPIN_NS_MAX ? SPIN_NS_MAX : next < SPIN_NS_MIN ? SPIN_NS_MIN : next;
    if (next != spin) atomic_store_explicit(&t->spin_ns, next, memory_order_relaxed);
}

void tr_team_barrier(tr_team *t)
{
    /* Stays as it is until this member, too, has arrived. */
    const unsigned round = atomic_load_explicit(&t->arrived.value, memory_order_relaxed);
    const int n =
        t->n_running; /* read before arriving: behind the last arrival the caller may begin a run alone */

    if (atomic_fetch_add(&t->n_here, 1) + 1 < n) {
        await_change(t, &t->arrived, round);
        return;
    }
    atomic_store_explicit(&t->n_here, 0, memory_order_relaxed);
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    change(&t->arrived, round + 1);
}

int tr_team_next(tr_team *t)
{
    return atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed);
}

int tr_team_count(tr_team *t, int i, int most)
{
    _Atomic uint64_t *value = &t->counter[i].value;
    const uint64_t none = (uint64_t)t->round << 32;
    uint64_t old = atomic_load_explicit(value, memory_order_relaxed), now;

    do {
        now = old >> 32 == t->round ? old : none;
        if ((uint32_t)now >= (uint32_t)most) return most;
    } while (!atomic_compare_exchange_weak_explicit(value, &old, now + 1, memory_order_relaxed,
                                                    memory_order_relaxed));
    return (int)(uint32_t)now;
}

static void *member_main(void *arg)
{
    member *m = arg;
    tr_team *t = m->team;

    for (unsigned round = 0;; round++) {
        await_change(t, &t->go, round);
        if (!t->fn) return NULL;
        t->fn(t->ctx, m->i, t->n);
        tr_team_barrier(t);
    }
}

/* Moves the calling thread and leaves it its mask. A CPU that has meanwhile been taken from the process is no error:
 * the thread stays where it is. */
static void move_to(int cpu)
{
    cpu_set_t all, one;

    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    if (sched_getaffinity(0, sizeof all, &all) == 0 && sched_setaffinity(0, sizeof one, &one) == 0)
        sched_setaffinity(0, sizeof all, &all);
}

void tr_team_run_alone(tr_team *t, tr_team_fn *fn, void *ctx)
{
    t->n_running = 1;
    t->round++;
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    fn(ctx, 0, 1);
    t->n_running = t->n;
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
}

void tr_team_run(tr_team *t, tr_team_fn *fn, void *ctx)
{
    if (t->n == 1) {
        tr_team_run_alone(t, fn, ctx);
        return;
    }
    if (t->caller_cpu >= 0 && sched_getcpu() != t->caller_cpu) move_to(t->caller_cpu);
    t->fn = fn;
    t->ctx = ctx;
    t->round++;
    change(&t->go, atomic_load_explicit(&t->go.value, memory_order_relaxed) + 1);
    fn(ctx, 0, t->n);
    tr_team_barrier(t);
}

int tr_team_size(const tr_team *t)
{
    return t->n;
}

static tr_status start(member *m, const int *cpu, tr_err *err)
{
    pthread_attr_t attr;
    size_t stack = 0;
    int code = pthread_attr_init(&attr);

    if (code == 0) {
        if (pthread_attr_getstacksize(&attr, &stack) == 0 && stack < STACK_BYTES)
            code = pthread_attr_setstacksize(&attr, STACK_BYTES);
        if (cpu) {
            cpu_set_t one;
            CPU_ZERO(&one);
            CPU_SET(*cpu, &one);
            if (code == 0) code = pthread_attr_setaffinity_np(&attr, sizeof one, &one);
        }
        if (code == 0) code = pthread_create(&m->thread, &attr, member_main, m);
        pthread_attr_destroy(&attr);
    }
    m->started = code == 0;
    if (code == 0) return TR_OK;
    if (cpu)
        return tr_fail(err, TR_E_IO, "cannot start thread %d on CPU %d: %s", m->i, *cpu,
                       strerror(code));
    return tr_fail(err, TR_E_IO, "cannot start thread %d: %s", m->i, strerror(code));
}

tr_status tr_team_create(tr_team **out, int n, const int *cpu, tr_err *err)
{
    tr_team *t = NULL;
    tr_status st = TR_OK;

    *out = NULL;
    for (int i = 0; cpu && i < n; i++)
        if (cpu[i] < 0 || cpu[i] >= CPU_SETSIZE)
            return tr_fail(err, TR_E_USAGE, "cannot bind a thread to CPU %d", cpu[i]);
    size_t bytes = sizeof *t + (size_t)n * sizeof t->member[0];
    t = aligned_alloc(LINE, (bytes + LINE - 1) / LINE * LINE);
    if (!t) return tr_fail(err, TR_E_MEMORY, "out of memory");
    memset(t, 0, bytes);
    t->counter = aligned_alloc(LINE, TR_TEAM_COUNTERS * sizeof *t->counter);
    if (!t->counter) {
        free(t);
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    memset(t->counter, 0, TR_TEAM_COUNTERS * sizeof *t->counter);
    t->n = t->n_running = n;
    t->caller_cpu = cpu ? cpu[0] : -1;
    atomic_store(&t->spin_ns, SPIN_NS_MAX);
    for (int i = 1; i < n && st == TR_OK; i++) {
        t->member[i] = (member){.team = t, .i = i};
        st = start(&t->member[i], cpu ? &cpu[i] : NULL, err);
    }
    if (st == TR_OK)
        *out = t;
    else
        tr_team_free(t);
    return st;
}

void tr_team_free(tr_team *t)
{
    if (!t) return;
    t->fn = NULL;
    change(&t->go, atomic_load_explicit(&t->go.value, memory_order_relaxed) + 1);
    for (int i = 1; i < t->n; i++)
        if (t->member[i].started) pthread_join(t->member[i].thread, NULL);
    free(t->counter);
    free(t);
}
