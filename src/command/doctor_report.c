#include <config.h>

#include "command/doctor_report.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "command/launch.h"
#include "command/limit.h"

enum { FINDINGS_MAX = 40, TEXT = 400, HOSTS_SHOWN = 16 };

#define GIB (1024.0 * 1024 * 1024)

typedef struct page {
    FILE *out;
    char change[FINDINGS_MAX][TEXT], note[FINDINGS_MAX][TEXT];
    int n_changes, n_notes;
} page;

__attribute__((format(printf, 2, 3))) static void change(page *p, const char *fmt, ...)
{
    va_list args;

    if (p->n_changes == FINDINGS_MAX) return;
    va_start(args, fmt);
    vsnprintf(p->change[p->n_changes++], TEXT, fmt, args);
    va_end(args);
}

__attribute__((format(printf, 2, 3))) static void note(page *p, const char *fmt, ...)
{
    va_list args;

    if (p->n_notes == FINDINGS_MAX) return;
    va_start(args, fmt);
    vsnprintf(p->note[p->n_notes++], TEXT, fmt, args);
    va_end(args);
}

__attribute__((format(printf, 3, 4))) static void line(page *p, const char *what, const char *fmt,
                                                       ...)
{
    va_list args;

    va_start(args, fmt);
    fprintf(p->out, "  %-10s ", what);
    vfprintf(p->out, fmt, args);
    fputc('\n', p->out);
    va_end(args);
}

/* The first rank of i's host: what belongs to a host is said once. */
static bool leads_host(const tr_doctor *d, int i)
{
    for (int j = 0; j < i; j++)
        if (!strcmp(d->rank[j].host, d->rank[i].host)) return false;
    return true;
}

static int count_on(const tr_doctor *d, const char *host)
{
    int n = 0;

    for (int i = 0; i < d->n; i++)
        n += !strcmp(d->rank[i].host, host);
    return n;
}

/* ---- the launch ---------------------------------------------------------------------------------------------------- */

static void launcher(page *p, const tr_doctor *d)
{
    const tr_facts *f = &d->rank[0];
    const char *by = f->launcher[0] ? f->launcher : "nobody (started bare)";
    char text[TEXT];

    line(p, "launcher", "%s%s%s, %d rank%s", by, f->protocol[0] ? " through " : "", f->protocol,
         d->n, d->n == 1 ? "" : "s");
    if (tr_launch_tell(text, sizeof text, by, f->launched, d->n)) change(p, "%s", text);
    if (f->launcher[0] && strcmp(f->launcher, "srun") == 0 && !strcmp(f->protocol, "PMI"))
        note(p, "srun speaks PMI, not PMIx: srun --mpi=pmix starts large jobs faster");
    if (!f->launcher[0] && d->n == 1)
        note(p, "one rank without a launcher: a bigger job wants mpirun -n N or srun --mpi=pmix");
}

static void hosts(page *p, const tr_doctor *d)
{
    int n_hosts = 0, least = d->n, most = 0;

    for (int i = 0; i < d->n; i++) {
        if (!leads_host(d, i)) continue;
        const int n = count_on(d, d->rank[i].host);
        if (n_hosts++ < HOSTS_SHOWN)
            line(p, n_hosts == 1 ? "hosts" : "", "%s: %d rank%s, %d CPUs, %.1f GiB of memory left",
                 d->rank[i].host, n, n == 1 ? "" : "s", d->rank[i].n_online,
                 (double)d->rank[i].memory_bytes / GIB);
        least = n < least ? n : least;
        most = n > most ? n : most;
    }
    if (n_hosts > HOSTS_SHOWN) line(p, "", "and %d more", n_hosts - HOSTS_SHOWN);
    if (least != most)
        note(p,
             "hosts have from %d to %d ranks: the fuller ones decide the memory and the speed of "
             "all",
             least, most);
}

/* The first rank that differs from rank 0 in a text; -1: none. */
static int differs(const tr_doctor *d, size_t at)
{
    for (int i = 1; i < d->n; i++)
        if (strcmp((const char *)&d->rank[i] + at, (const char *)&d->rank[0] + at)) return i;
    return -1;
}

static void versions(page *p, const tr_doctor *d)
{
    const tr_facts *f = &d->rank[0];
    int i = differs(d, offsetof(tr_facts, version));

    line(p, "trireme", "%s, build %.12s", f->version, f->binary[0] ? f->binary : "unknown");
    line(p, "MPI", "%.100s; threads: %s", f->mpi, f->threads);
    if (i > 0)
        change(p, "rank %d on %s runs trireme %s, rank 0 %s: put the same one on every host", i,
               d->rank[i].host, d->rank[i].version, f->version);
    else if ((i = differs(d, offsetof(tr_facts, binary))) > 0)
        change(p, "rank %d on %s runs another build of trireme (%.12s) than rank 0 (%.12s)", i,
               d->rank[i].host, d->rank[i].binary, f->binary);
    if ((i = differs(d, offsetof(tr_facts, mpi))) > 0)
        change(p, "rank %d on %s has another MPI library: %.120s", i, d->rank[i].host,
               d->rank[i].mpi);
    for (i = 0; i < d->n; i++) {
        if (strcmp(d->rank[i].threads, "single")) continue;
        change(p, "rank %d on %s: MPI gives no threads; trireme needs MPI_THREAD_FUNNELED", i,
               d->rank[i].host);
        break;
    }
}

/* ---- processors ------------------------------------------------------------------------------------------------------ */

typedef struct host_cpus {
    int usable, threads, ranks; /* CPUs some rank may use; threads all ranks start; ranks */
    bool bound;                 /* some rank may not use all of them */
} host_cpus;

static host_cpus cpus_of(const tr_doctor *d, const char *host)
{
    host_cpus h = {0};
    tr_facts all = {0};

    for (int i = 0; i < d->n; i++) {
        const tr_facts *f = &d->rank[i];
        if (strcmp(f->host, host)) continue;
        for (int k = 0; k < TR_FACTS_CPUS / 64; k++)
            all.cpus[k] |= f->cpus[k];
        h.threads += f->n_threads;
        h.ranks++;
    }
    h.usable = tr_facts_n_cpus(&all);
    for (int i = 0; i < d->n; i++)
        if (!strcmp(d->rank[i].host, host)) h.bound |= tr_facts_n_cpus(&d->rank[i]) < h.usable;
    return h;
}

static void processors(page *p, const tr_doctor *d)
{
    int shown = 0;

    for (int i = 0; i < d->n; i++) {
        const tr_facts *f = &d->rank[i];
        if (!leads_host(d, i)) continue;
        const host_cpus h = cpus_of(d, f->host);
        if (shown++ < HOSTS_SHOWN)
            line(p, shown == 1 ? "CPUs" : "", "%s: %d threads of %d rank%s on %d of %d CPUs%s",
                 f->host, h.threads, h.ranks, h.ranks == 1 ? "" : "s", h.usable, f->n_online,
                 h.bound ? ", bound by the launcher" : "");
        if (h.usable && h.ranks > h.usable)
            change(p, "%s is oversubscribed: %d ranks on %d CPUs. Start fewer ranks there", f->host,
                   h.ranks, h.usable);
        else if (h.usable && h.threads > h.usable)
            change(
                p,
                "%s is oversubscribed: %d threads of %d ranks on %d CPUs. Set OMP_NUM_THREADS=%d",
                f->host, h.threads, h.ranks, h.usable, h.usable / h.ranks);
        else if (h.usable && h.usable < f->n_online / 2)
            note(p,
                 "the ranks on %s may use %d of its %d CPUs: mpirun --bind-to none, srun "
                 "--cpus-per-task, or OMP_NUM_THREADS; trireme binds its own threads",
                 f->host, h.usable, f->n_online);
    }
}

static void gpus(page *p, const tr_doctor *d)
{
    int most = 0;

    for (int i = 0; i < d->n; i++)
        most = d->rank[i].n_gpus > most ? d->rank[i].n_gpus : most;
    if (!most) {
        line(p, "GPUs", "none found: the CPU computes");
        return;
    }
    for (int i = 0; i < d->n && i < HOSTS_SHOWN; i++)
        line(p, i ? "" : "GPUs", "rank %d on %s: %s of %d", i, d->rank[i].host,
             d->rank[i].uuid[0] ? d->rank[i].uuid : "none", d->rank[i].n_gpus);
    if (d->nccl)
        line(p, "NCCL", "%s", d->nccl);
    else if (d->n > 1)
        note(p, "this build has no NCCL: several ranks compute on CPUs, whatever GPUs there are "
                "(configure --with-nccl)");
    for (int i = 0; i < d->n; i++) {
        const tr_facts *f = &d->rank[i];
        if (f->n_gpus > 1 && f->n_gpus < f->local_size && f->local_rank == 0)
            change(p, "%s: %d GPUs for %d ranks (CUDA_VISIBLE_DEVICES?): one for each is wanted",
                   f->host, f->n_gpus, f->local_size);
        for (int j = 0; j < i && f->uuid[0]; j++) {
            if (strcmp(f->uuid, d->rank[j].uuid) || strcmp(f->host, d->rank[j].host)) continue;
            change(p,
                   "ranks %d and %d on %s would share the GPU %s: see --gpus-per-node, "
                   "--gpu-bind=none",
                   j, i, f->host, f->uuid);
            break;
        }
    }
}

/* ---- between ranks ------------------------------------------------------------------------------------------------- */

static void transports(page *p, const tr_doctor *d)
{
    const tr_facts *f = &d->rank[0];
    const int other = differs(d, offsetof(tr_facts, network));

    line(p, "network", "%s",
         f->network[0] ? f->network : "no HCA, no settings: shared memory and TCP");
    for (int i = 0; i < d->n_links; i++)
        line(p, "", "ranks %d and %d, %s: %.1f us, %.2f GB/s", d->link[i].from, d->link[i].to,
             strcmp(d->rank[d->link[i].from].host, d->rank[d->link[i].to].host) ? "two hosts"
                                                                                : "one host",
             d->link[i].latency_s * 1e6, d->link[i].bytes_per_s * 1e-9);
    if (other > 0)
        note(p, "rank %d on %s has other HCAs or settings than rank 0: %.100s", other,
             d->rank[other].host, d->rank[other].network[0] ? d->rank[other].network : "none");
    for (int i = 0; i < d->n; i++) {
        const tr_facts *r = &d->rank[i];
        if (!leads_host(d, i) || r->local_size < 2) continue;
        if (!r->single_copy)
            note(p,
                 "%s: ranks may not read each other's memory (kernel.yama.ptrace_scope): large "
                 "messages are copied twice",
                 r->host);
        if (r->shm_bytes < (UINT64_C(64) << 20))
            change(
                p,
                "%s: %.0f MiB free in /dev/shm; ranks of a host talk through it, 64 MiB are wanted",
                r->host, (double)r->shm_bytes / 1048576);
    }
}

/* ---- time, memory, files --------------------------------------------------------------------------------------------- */

static void limits(page *p, const tr_doctor *d)
{
    const tr_facts *f = &d->rank[0];
    double least = 0, most = 0;

    if (f->seconds_left >= 0)
        line(p, "time", "%" PRId64 " min left of job %s", f->seconds_left / 60, f->job);
    else
        line(p, "time", "%s",
             d->time_given ? "by --time-budget"
             : f->job[0]   ? "limit not known (this Slurm does not say when the job ends)"
                           : "no batch job, no limit");
    if (f->job[0] && f->seconds_left < 0 && !d->time_given)
        change(p,
               "job %s ends without a word to trireme: pass --time-budget \"$(squeue -h -j "
               "$SLURM_JOB_ID -o %%L)\", or "
               "ask for a signal with #SBATCH --signal=USR1@300",
               f->job);
    if (f->seconds_left >= 0 && f->seconds_left < 300)
        note(p, "%" PRId64 " s are left: a job that starts now stops after %.0f s", f->seconds_left,
             (double)f->seconds_left - tr_limit_margin((double)f->seconds_left));
    for (int i = 0; i < d->n; i++) {
        const double each = (double)d->rank[i].memory_bytes /
                            (d->rank[i].local_size > 0 ? d->rank[i].local_size : 1);
        least = i == 0 || each < least ? each : least;
        most = each > most ? each : most;
    }
    line(p, "memory", "%.1f GiB for each rank%s", least / GIB, least > 0 ? "" : " (not known)");
    if (least > 0 && most > 1.5 * least)
        note(p, "memory for a rank differs from %.1f to %.1f GiB: the smallest decides for all",
             least / GIB, most / GIB);
    if (least > 0 && least < GIB / 4)
        change(p, "%.0f MiB of memory for a rank: too little for any model", least / 1048576);
}

static void same_folder(page *p, const tr_doctor *d)
{
    int blind = 0, first = -1;

    for (int i = 0; i < d->n; i++) {
        if (d->rank[i].sees_out != 0) continue;
        if (!blind++) first = i;
    }
    if (blind)
        note(p,
             "%d rank%s, the first of them rank %d on %s, see%s another folder or cannot write "
             "there: their OUT.hang files, "
             "which a hang is explained from, will lie elsewhere",
             blind, blind == 1 ? "" : "s", first, d->rank[first].host, blind == 1 ? "s" : "");
}

static void files(page *p, const tr_doctor *d)
{
    const tr_out_facts *o = d->out;

    if (!o || !o->path[0]) {
        line(p, "output", "not looked at (-o OUT)");
        return;
    }
    line(p, "output", "%.200s: %s, %.1f GiB free, a record synced in %.1f ms", o->path, o->kind,
         (double)o->free_bytes / GIB, o->sync_ms);
    if (o->fault[0]) {
        change(p, "%s", o->fault);
        return;
    }
    if (o->taken)
        change(p, "another job is writing %.200s: it holds the lock of its .run file", o->path);
    if (!o->renames)
        change(p, "%.200s: a file there does not take the place of another in one piece", o->path);
    if (!o->locks)
        note(p,
             "%.200s: no file locks there; OUT.lock keeps a second job away, and stays when a job "
             "is killed",
             o->path);
    if (o->memory)
        note(p, "%.200s lies in memory (%s): it does not outlive the host", o->path, o->kind);
    if (o->whole_lines < o->lines)
        note(p,
             "lines that ranks append at the same time get lost there (%d of %d whole): leave OUT "
             "to one job",
             o->whole_lines, o->lines);
    if (o->free_bytes < (UINT64_C(64) << 20) || o->free_files < 100)
        change(p, "%.200s: %.0f MiB and %" PRIu64 " files free", o->path,
               (double)o->free_bytes / 1048576, o->free_files);
    else if (o->free_bytes < (UINT64_C(1) << 30))
        note(p, "less than 1 GiB is free for %.200s", o->path);
    if (o->sync_ms > 200)
        note(p, "a sync takes %.0f ms there: short answers wait for it", o->sync_ms);
    same_folder(p, d);
}

int tr_doctor_report(const tr_doctor *d, FILE *out)
{
    page *p = calloc(1, sizeof *p);

    if (!p) {
        fputs("out of memory\n", out);
        return 1;
    }
    p->out = out;
    fprintf(out, "trireme doctor: %d rank%s, seen from rank 0 on %s\n", d->n, d->n == 1 ? "" : "s",
            d->rank[0].host);
    launcher(p, d);
    hosts(p, d);
    versions(p, d);
    processors(p, d);
    gpus(p, d);
    transports(p, d);
    limits(p, d);
    files(p, d);
    if (p->n_notes) fputs("\nWorth knowing:\n", out);
    for (int i = 0; i < p->n_notes; i++)
        fprintf(out, "  - %s\n", p->note[i]);
    fputs(p->n_changes ? "\nTo be changed:\n" : "\nNothing must be changed.\n", out);
    for (int i = 0; i < p->n_changes; i++)
        fprintf(out, "  %d. %s\n", i + 1, p->change[i]);
    const int n = p->n_changes;
    free(p);
    return n;
}
