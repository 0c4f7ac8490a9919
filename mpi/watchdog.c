#include <config.h>

#include "mpi/watchdog.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/size.h"
#include "mpi/flight.h"
#include "mpi/mpi_priv.h"

enum { TEXT_WORDS = 16, HOST_BYTES = 64, LINE_BYTES = 4096 };
enum {
    STARVED_LIMITS = 4
}; /* as many timeouts has the job while a silent rank only lacks a core or a page */

#define PERIOD_NS   250000000u  /* between two looks, parallel.md 10.2 */
#define SILENT_NS   1000000000u /* a thread that has not looked for so long does not run */
#define PATIENCE_NS 2000000000u /* for the reports of the others before the job is ended */
#define DEFAULT_S   60.0        /* reliability.md 4, row 15 */

/* What a rank shows the others of its host: written by its thread alone. Words, not text, so that a reader in another
 * process needs no lock; a text that changes meanwhile is mixed, which only a reader of the message could mind. */
typedef struct seat {
    _Atomic uint64_t rank, pid, tick_ns, moved_ns, stage, waits;
    _Atomic uint64_t text[TEXT_WORDS]; /* "step 12, layer 4, attention" */
} seat;

enum {
    WATCHING,
    REPORTED,
    SAID,
    GONE
}; /* seat.stage; GONE: its watchdog was stopped in an orderly way */

struct tr_watchdog {
    tr_world *world; /* kept */
    tr_flight *flight;
    double timeout_s;
    char *out_path;           /* NULL: no files */
    char (*host)[HOST_BYTES]; /* [world->size] */
    seat *seats; /* [n_seats], shared by the ranks of this host, or this rank's own alone */
    int n_seats, mine;
    size_t seats_bytes;
    bool mapped;
    pthread_t thread;
    bool started;
    pthread_mutex_t lock;
    pthread_cond_t stop_changed;
    bool stop;
};

/* ---- what the main thread says ----------------------------------------------------------------------------------- */

void tr_watchdog_beat(tr_watchdog *wd, uint64_t step)
{
    if (wd) tr_flight_beat(wd->flight, step);
}

void tr_watchdog_rest(tr_watchdog *wd)
{
    if (wd) tr_flight_rest(wd->flight);
}

void tr_watchdog_expect(tr_watchdog *wd, double seconds)
{
    if (wd) tr_flight_expect(wd->flight, seconds);
}

void tr_watchdog_enter(tr_watchdog *wd, const char *what, int layer)
{
    if (wd) tr_flight_enter(wd->flight, what, layer);
}

void tr_watchdog_leave(tr_watchdog *wd)
{
    if (wd) tr_flight_leave(wd->flight);
}

/* ---- texts ------------------------------------------------------------------------------------------------------- */

__attribute__((format(printf, 3, 4))) static void add(char *text, size_t room, const char *fmt, ...)
{
    const size_t n = strlen(text);
    va_list args;

    va_start(args, fmt);
    vsnprintf(text + n, room - n, fmt, args);
    va_end(args);
}

static void describe(const tr_flight_state *s, char *text, size_t room)
{
    text[0] = '\0';
    if (s->n_beats)
        add(text, room, "step %llu", (unsigned long long)s->step);
    else
        add(text, room, "no step yet");
    if (s->layer >= 0) add(text, room, ", layer %d", s->layer);
    if (s->what) add(text, room, ", %s", s->what);
    if (s->waits)
        add(text, room, ", waiting for %s number %llu of %s", s->waited.op,
            (unsigned long long)s->waited.number, s->waited.group);
}

/* awake_ns: since when this process has not been stopped; whoever comes back has as long as anybody. */
static void show(tr_watchdog *wd, const tr_flight_state *s, uint64_t awake_ns)
{
    seat *me = &wd->seats[wd->mine];
    char text[TEXT_WORDS * sizeof(uint64_t)] = "";
    uint64_t word[TEXT_WORDS];

    describe(s, text, sizeof text);
    memcpy(word, text, sizeof word);
    for (int i = 0; i < TEXT_WORDS; i++)
        atomic_store(&me->text[i], word[i]);
    atomic_store(&me->waits, s->waits);
    atomic_store(&me->moved_ns, s->moved_ns > awake_ns ? s->moved_ns : awake_ns);
    atomic_store(&me->tick_ns, tr_now_ns());
}

static void read_text(seat *s, char *text)
{
    uint64_t word[TEXT_WORDS];

    for (int i = 0; i < TEXT_WORDS; i++)
        word[i] = atomic_load(&s->text[i]);
    memcpy(text, word, sizeof word);
    text[sizeof word - 1] = '\0';
}

static uint64_t stage_of(seat *s)
{
    return atomic_load(&s->stage);
}

/* A rank whose thread does not run: stopped, dead, or its host's memory is gone. */
static bool is_silent(seat *s)
{
    const uint64_t now = tr_now_ns(), tick = atomic_load(&s->tick_ns);
    return stage_of(s) == WATCHING && now > tick && now - tick > SILENT_NS;
}

/* ---- the report -------------------------------------------------------------------------------------------------- */

static void report_path(const tr_watchdog *wd, int rank, const char *behind, char *path,
                        size_t room)
{
    snprintf(path, room, "%s.hang.rank%05d.json%s", wd->out_path, rank, behind);
}

/* The reports of ranks that this job does not have: an earlier one had more. What cannot be removed stays. */
static void remove_others(const tr_watchdog *wd)
{
    char *base = strdup(wd->out_path), *folder = strdup(wd->out_path);
    const char *name = base ? basename(base) : "";
    const size_t n = strlen(name);
    DIR *dir = folder ? opendir(dirname(folder)) : NULL;
    const struct dirent *e;

    while (dir && (e = readdir(dir))) {
        int rank, end = 0;
        if (strncmp(e->d_name, name, n) != 0) continue;
        if (sscanf(e->d_name + n, ".hang.rank%5d.json%n", &rank, &end) == 1 && end > 0 &&
            !e->d_name[n + (size_t)end] && rank >= wd->world->size)
            unlinkat(dirfd(dir), e->d_name, 0);
    }
    if (dir) closedir(dir);
    free(base);
    free(folder);
}

/* Names come from this program and from gethostname: what JSON would have to escape has no place in them. */
static void put_string(FILE *f, const char *s)
{
    fputc('"', f);
    for (; *s; s++)
        fputc((unsigned char)*s < 0x20 || *s == '"' || *s == '\\' ? '?' : *s, f);
    fputc('"', f);
}

static double ago(uint64_t now_ns, uint64_t then_ns)
{
    return now_ns > then_ns ? (double)(now_ns - then_ns) * 1e-9 : 0.0;
}

static void put_ranks(const tr_watchdog *wd, FILE *f)
{
    char text[TEXT_WORDS * sizeof(uint64_t)];

    fputs(",\n\"ranks\": [", f);
    for (int i = 0; i < wd->n_seats; i++) {
        seat *s = &wd->seats[i];
        read_text(s, text);
        fprintf(f, "%s{\"rank\": %llu, \"responds\": %s, \"waits\": %s, \"state\": ",
                i ? ",\n  " : "\n  ", (unsigned long long)atomic_load(&s->rank),
                is_silent(s) ? "false" : "true", atomic_load(&s->waits) ? "true" : "false");
        put_string(f, text);
        fputc('}', f);
    }
    fputs("]", f);
}

static void put_records(const tr_watchdog *wd, FILE *f, tr_flight_record *r, uint64_t now_ns)
{
    const int n = tr_flight_records(wd->flight, r);

    fputs(",\n\"collectives\": [", f);
    for (int i = 0; i < n; i++) {
        fprintf(f, "%s{\"id\": %llu, \"group\": ", i ? ",\n  " : "\n  ",
                (unsigned long long)r[i].id);
        put_string(f, r[i].group);
        fprintf(f,
                ", \"first\": %d, \"members\": %d, \"number\": %llu, \"op\": \"%s\", \"bytes\": "
                "%llu, \"step\": %llu, "
                "\"layer\": %d, \"begun_s_ago\": %.6f, \"done\": %s",
                r[i].first, r[i].members, (unsigned long long)r[i].number, r[i].op,
                (unsigned long long)r[i].bytes, (unsigned long long)r[i].step, r[i].layer,
                ago(now_ns, r[i].begun_ns), r[i].done_ns ? "true" : "false");
        if (r[i].done_ns) fprintf(f, ", \"done_s_ago\": %.6f", ago(now_ns, r[i].done_ns));
        fputc('}', f);
    }
    fputs("]", f);
}

/* OUT.hang.rank%05d.json, complete or not at all. What cannot be written is lost: the message follows in any case. */
static void write_report(const tr_watchdog *wd, const tr_flight_state *s, uint64_t since_ns)
{
    const uint64_t now_ns = tr_now_ns();
    char path[4096], part[4096];
    tr_flight_record *records = malloc(TR_FLIGHT_MAX * sizeof *records);
    FILE *f = NULL;

    if (!wd->out_path || !records) goto done;
    report_path(wd, wd->world->rank, "", path, sizeof path);
    report_path(wd, wd->world->rank, ".part", part, sizeof part);
    if (!(f = fopen(part, "we"))) goto done;
    fprintf(f, "{\"trireme_hang\": 1, \"rank\": %d, \"world\": %d, \"host\": ", wd->world->rank,
            wd->world->size);
    put_string(f, wd->world->host);
    fprintf(f, ", \"pid\": %ld, \"silence_s\": %.3f,\n\"step\": %llu, \"layer\": %d, \"what\": ",
            (long)getpid(), ago(now_ns, since_ns), (unsigned long long)s->step, s->layer);
    put_string(f, s->what ? s->what : "");
    fputs(", \"waits_for\": ", f);
    if (s->waits)
        fprintf(f, "%llu", (unsigned long long)s->waited.id);
    else
        fputs("null", f);
    put_ranks(wd, f);
    put_records(wd, f, records, now_ns);
    fputs("}\n", f);
    const bool good = !ferror(f);
    const bool closed = fclose(f) == 0;
    if (good && closed) rename(part, path);

done:
    free(records);
}

/* Ranks of this host that do not respond; where all do, those that are not waiting for anybody. */
static void name_local(const tr_watchdog *wd, char *line, size_t room)
{
    char text[TEXT_WORDS * sizeof(uint64_t)];
    bool silent = false;

    for (int i = 0; i < wd->n_seats; i++)
        silent |= is_silent(&wd->seats[i]);
    for (int i = 0; i < wd->n_seats; i++) {
        seat *s = &wd->seats[i];
        if (silent ? !is_silent(s) : i == wd->mine || stage_of(s) == GONE || atomic_load(&s->waits))
            continue;
        read_text(s, text);
        add(line, room, "; rank %llu on %s %s (%s%s)", (unsigned long long)atomic_load(&s->rank),
            wd->world->host, silent ? "does not respond" : "is not waiting",
            silent ? "last seen: " : "", text);
    }
}

/* Ranks of other hosts that have written nothing beside OUT. */
static void name_remote(const tr_watchdog *wd, char *line, size_t room)
{
    char path[4096];

    if (!wd->out_path || wd->world->size == wd->world->local_size) return;
    for (int r = 0; r < wd->world->size; r++) {
        if (strcmp(wd->host[r], wd->world->host) == 0) continue;
        report_path(wd, r, "", path, sizeof path);
        if (access(path, F_OK) != 0)
            add(line, room, "; rank %d on %s has left no report", r, wd->host[r]);
    }
}

/* One call: one line. */
static void write_line(const char *line)
{
    const ssize_t n = write(STDERR_FILENO, line, strlen(line));
    (void)n;
}

static void say(const tr_watchdog *wd, const tr_flight_state *s, uint64_t since_ns)
{
    char line[LINE_BYTES] = "", state[256];

    describe(s, state, sizeof state);
    add(line, sizeof line, "trireme: rank %d on %s: no progress for %.1f s: %s", wd->world->rank,
        wd->world->host, ago(tr_now_ns(), since_ns), state);
    name_local(wd, line, sizeof line - 1);
    name_remote(wd, line, sizeof line - 1);
    add(line, sizeof line, "\n");
    write_line(line);
}

static void say_failed(const tr_watchdog *wd, const tr_flight_state *s, const char *why)
{
    char line[LINE_BYTES] = "", state[256];

    describe(s, state, sizeof state);
    add(line, sizeof line - 1, "trireme: rank %d on %s: %s: %s", wd->world->rank, wd->world->host,
        state, why);
    add(line, sizeof line, "\n");
    write_line(line);
}

/* Until every rank of this host that responds has come to `stage`; with ranks elsewhere always the full time. */
static void await_stage(tr_watchdog *wd, uint64_t stage)
{
    const uint64_t until_ns = tr_now_ns() + PATIENCE_NS;
    const struct timespec nap = {.tv_nsec = 10000000};

    for (bool all = false; !all && tr_now_ns() < until_ns; nanosleep(&nap, NULL)) {
        atomic_store(&wd->seats[wd->mine].tick_ns, tr_now_ns());
        all = wd->world->size == wd->n_seats || stage == SAID;
        for (int i = 0; i < wd->n_seats; i++)
            if (stage_of(&wd->seats[i]) < stage && !is_silent(&wd->seats[i])) all = false;
    }
}

/* why NULL: there is no progress. */
static _Noreturn void end_job(tr_watchdog *wd, const tr_flight_state *s, uint64_t since_ns,
                              const char *why)
{
    seat *me = &wd->seats[wd->mine];

    write_report(wd, s, since_ns);
    atomic_store(&me->stage, REPORTED);
    await_stage(wd, REPORTED);
    write_report(wd, s, since_ns); /* now it is known who responds */
    if (why)
        say_failed(wd, s, why);
    else
        say(wd, s, since_ns);
    atomic_store(&me->stage, SAID);
    await_stage(wd, SAID);
    tr_world_give_up(wd->world, TR_E_COMM);
}

/* ---- the thread -------------------------------------------------------------------------------------------------- */

static bool somebody_reports(tr_watchdog *wd)
{
    for (int i = 0; i < wd->n_seats; i++)
        if (stage_of(&wd->seats[i]) == REPORTED || stage_of(&wd->seats[i]) == SAID) return true;
    return false;
}

static uint64_t limit_ns(const tr_watchdog *wd, const tr_flight_state *s)
{
    double limit = wd->timeout_s;

    if (limit <= 0) limit = 10 * s->expected_s > DEFAULT_S ? 10 * s->expected_s : DEFAULT_S;
    return (uint64_t)(limit * 1e9);
}

/* False: stop was asked for. */
static bool sleep_until(tr_watchdog *wd, uint64_t ns)
{
    const struct timespec t = {.tv_sec = (time_t)(ns / 1000000000u),
                               .tv_nsec = (long)(ns % 1000000000u)};
    int code = 0;

    pthread_mutex_lock(&wd->lock);
    while (!wd->stop && code != ETIMEDOUT)
        code = pthread_cond_timedwait(&wd->stop_changed, &wd->lock, &t);
    const bool go_on = !wd->stop;
    pthread_mutex_unlock(&wd->lock);
    return go_on;
}

/* The newest sign of progress of any rank of this host that has not gone. A rank that waits for one that is slow, because its core
 * is taken say, shows none itself; as long as that one gets on, so does the job. */
static uint64_t last_move_ns(const tr_watchdog *wd)
{
    uint64_t last = 0;

    for (int i = 0; i < wd->n_seats; i++) {
        const uint64_t moved = atomic_load(&wd->seats[i].moved_ns);
        if (stage_of(&wd->seats[i]) != GONE && moved > last) last = moved;
    }
    return last;
}

/* A process that is there and that nobody has stopped: it wants to run, or waits for a page or a disk. */
static bool may_run(uint64_t pid)
{
    char path[64], text[512];
    size_t n = 0;

    snprintf(path, sizeof path, "/proc/%llu/stat", (unsigned long long)pid);
    FILE *f = fopen(path, "re");
    if (f) n = fread(text, 1, sizeof text - 1, f);
    if (f) fclose(f);
    text[n] = '\0';
    const char *end = strrchr(text, ')'); /* the name before it may hold anything */
    return end && end[1] == ' ' && end[2] && !strchr("TtZX", end[2]);
}

/* Some rank of this host that shows no sign of life is not stopped: the machine is too busy for it. */
static bool is_starved(const tr_watchdog *wd)
{
    for (int i = 0; i < wd->n_seats; i++)
        if (is_silent(&wd->seats[i]) && may_run(atomic_load(&wd->seats[i].pid))) return true;
    return false;
}

static bool is_late(const tr_watchdog *wd, const tr_flight_state *s, uint64_t since_ns,
                    uint64_t now_ns)
{
    const uint64_t limit = limit_ns(wd, s);

    if (s->n_beats <= 1 || s->rests || now_ns <= since_ns || now_ns - since_ns <= limit)
        return false;
    return now_ns - since_ns > STARVED_LIMITS * limit || !is_starved(wd);
}

/* A communicator of the device that has failed by itself. */
static bool has_failed(const tr_watchdog *wd, char *why, size_t room)
{
    const tr_world_guard *g = wd->world->guard;
    return g && g->failed(g->ctx, why, room);
}

static void *watch(void *arg)
{
    tr_watchdog *wd = arg;
    uint64_t awake_ns = tr_now_ns(), looked_ns = awake_ns;
    char why[512];

    pthread_setname_np(pthread_self(), "watchdog"); /* for top and debuggers */
    do {
        const uint64_t now_ns = tr_now_ns();
        const tr_flight_state s = tr_flight_look(wd->flight);
        if (now_ns - looked_ns > SILENT_NS) {
            /* This process itself was stopped. Alone, and the others end the job because of it: nothing to add. With
             * all the others (a suspended job): the clock of the step begins anew. */
            if (somebody_reports(wd)) return NULL;
            awake_ns = now_ns;
        }
        looked_ns = now_ns;
        show(wd, &s, awake_ns);
        const uint64_t moved_ns = last_move_ns(wd);
        const uint64_t since_ns = moved_ns > awake_ns ? moved_ns : awake_ns;
        if (has_failed(wd, why, sizeof why)) end_job(wd, &s, since_ns, why);
        if (is_late(wd, &s, since_ns, now_ns) || somebody_reports(wd))
            end_job(wd, &s, since_ns, NULL);
    } while (sleep_until(wd, looked_ns + PERIOD_NS));
    return NULL;
}

/* ---- start and stop ---------------------------------------------------------------------------------------------- */

static void *map_seats(const char *name, int flags, size_t bytes)
{
    const int fd = shm_open(name, flags, 0600);
    void *p = MAP_FAILED;

    if (fd < 0) return NULL;
    if (!(flags & O_CREAT) || ftruncate(fd, (off_t)bytes) == 0)
        p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    return p == MAP_FAILED ? NULL : p;
}

/* One seat for every rank of this host, in memory without a name once all have it. Where that is not to be had on every
 * rank of the host each has its own seat alone, and silent ranks are not named. */
static tr_status open_seats(tr_watchdog *wd, tr_err *err)
{
    tr_status st = TR_OK;
    MPI_Comm local = MPI_COMM_NULL;
    char name[64] = "";
    int good, n = wd->world->local_size;
    const bool leader = wd->world->local_rank == 0;

    wd->seats_bytes = (size_t)n * sizeof(seat);
    TR_MPI(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, wd->world->rank, MPI_INFO_NULL,
                               &local));
    if (leader) {
        snprintf(name, sizeof name, "/trireme-%ld-%llx", (long)getpid(),
                 (unsigned long long)tr_now_ns());
        wd->seats = map_seats(name, O_RDWR | O_CREAT | O_EXCL, wd->seats_bytes);
    }
    TR_MPI(MPI_Bcast(name, (int)sizeof name, MPI_CHAR, 0, local));
    if (!leader) wd->seats = map_seats(name, O_RDWR, wd->seats_bytes);
    wd->mapped = wd->seats;
    good = wd->mapped;
    TR_MPI(MPI_Allreduce(MPI_IN_PLACE, &good, 1, MPI_INT, MPI_MIN, local));
    if (leader) shm_unlink(name);
    wd->n_seats = n;
    wd->mine = wd->world->local_rank;
    if (!good) {
        if (wd->mapped) munmap(wd->seats, wd->seats_bytes);
        wd->mapped = false;
        wd->n_seats = 1;
        wd->mine = 0;
        wd->seats = tr_calloc(1, sizeof *wd->seats);
        if (!wd->seats) {
            st = tr_fail(err, TR_E_MEMORY, "out of memory");
            goto done;
        }
    }
    atomic_store(&wd->seats[wd->mine].rank, (uint64_t)wd->world->rank);
    atomic_store(&wd->seats[wd->mine].pid, (uint64_t)getpid());
    atomic_store(&wd->seats[wd->mine].tick_ns, tr_now_ns());
    TR_MPI(MPI_Barrier(local)); /* no thread looks at a seat that is not taken yet */

done:
    if (local != MPI_COMM_NULL) MPI_Comm_free(&local);
    return st;
}

static tr_status gather_hosts(tr_watchdog *wd, tr_err *err)
{
    tr_status st = TR_OK;
    char mine[HOST_BYTES];

    memcpy(mine, wd->world->host, sizeof mine);
    TR_MPI(
        MPI_Allgather(mine, HOST_BYTES, MPI_CHAR, wd->host, HOST_BYTES, MPI_CHAR, MPI_COMM_WORLD));

done:
    return st;
}

static tr_status start_thread(tr_watchdog *wd, tr_err *err)
{
    pthread_condattr_t attr;

    pthread_mutex_init(&wd->lock, NULL);
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(&wd->stop_changed, &attr);
    pthread_condattr_destroy(&attr);
    const int code = pthread_create(&wd->thread, NULL, watch, wd);
    wd->started = code == 0;
    return wd->started
               ? TR_OK
               : tr_fail(err, TR_E_MEMORY, "watchdog: cannot start a thread: %s", strerror(code));
}

tr_status tr_watchdog_start(tr_watchdog **out, tr_world *world, double timeout_s,
                            const char *out_path, tr_err *err)
{
    tr_status st = TR_OK;
    char path[4096];
    tr_watchdog *wd = calloc(1, sizeof *wd);

    *out = NULL;
    if (wd) {
        wd->world = world;
        wd->timeout_s = timeout_s;
        wd->flight = tr_flight_create();
        wd->host = tr_calloc((size_t)world->size, sizeof *wd->host);
        wd->out_path = out_path ? strdup(out_path) : NULL;
    }
    if (!wd || !wd->flight || !wd->host || (out_path && !wd->out_path))
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    st = tr_agree(world, st, err);
    if (st == TR_OK) st = open_seats(wd, err);
    if (st == TR_OK) st = gather_hosts(wd, err);
    if (st != TR_OK) goto done;
    if (wd->out_path) {
        report_path(wd, world->rank, "", path, sizeof path);
        unlink(path);
        if (world->rank == 0) remove_others(wd);
    }
    st = start_thread(wd, err);
    if (st != TR_OK) goto done;
    world->flight = wd->flight;
    *out = wd;
    wd = NULL;

done:
    tr_watchdog_stop(wd);
    return st;
}

void tr_watchdog_stop(tr_watchdog *wd)
{
    if (!wd) return;
    if (wd->started) {
        pthread_mutex_lock(&wd->lock);
        wd->stop = true;
        pthread_cond_signal(&wd->stop_changed);
        pthread_mutex_unlock(&wd->lock);
        pthread_join(wd->thread, NULL);
        pthread_cond_destroy(&wd->stop_changed);
        pthread_mutex_destroy(&wd->lock);
        wd->world->flight = NULL;
    }
    /* Nobody waits for a rank that has gone. */
    if (wd->mapped) {
        atomic_store(&wd->seats[wd->mine].stage, GONE);
        munmap(wd->seats, wd->seats_bytes);
    } else {
        free(wd->seats);
    }
    tr_flight_free(wd->flight);
    free(wd->host);
    free(wd->out_path);
    free(wd);
}
