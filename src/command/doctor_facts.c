#include <config.h>

#include "command/doctor_facts.h"

#include <dirent.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <time.h>
#include <unistd.h>

#include "base/hash.h"
#include "command/budget.h"
#include "kernels/kernels.h"

/* Environment and files belong to others: no control characters. */
static void take(char *out, size_t room, const char *s)
{
    snprintf(out, room, "%s", s ? s : "");
    for (char *p = out; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f) *p = '?';
}

static int64_t number_of(const char *text, int64_t none)
{
    char *end = NULL;

    if (!text || *text < '0' || *text > '9') return none;
    const long long v = strtoll(text, &end, 10);
    return *end && *end != '\n' ? none : (int64_t)v;
}

static int64_t env_number(const char *name)
{
    return number_of(getenv(name), -1);
}

/* Who started this, and how many of it. */
static void find_launcher(tr_facts *f)
{
    static const struct {
        const char *mark, *name, *count;
    } list[] = {
        {"OMPI_COMM_WORLD_SIZE", "mpirun", "OMPI_COMM_WORLD_SIZE"},
        {"SLURM_STEP_NUM_TASKS", "srun", "SLURM_STEP_NUM_TASKS"},
        {"PALS_RANKID", "PALS", "PALS_SIZE"},
        {"HYDI_CONTROL_FD", "mpiexec", "PMI_SIZE"},
        {"PMI_RANK", "a PMI launcher", "PMI_SIZE"},
    };

    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        if (!getenv(list[i].mark)) continue;
        const int64_t n = env_number(list[i].count);
        take(f->launcher, sizeof f->launcher, list[i].name);
        f->launched = n > 0 && n <= INT32_MAX ? (int32_t)n : 0;
        break;
    }
    if (!f->launcher[0]) return; /* MPI's own start has set what it found missing */
    take(f->protocol, sizeof f->protocol,
         getenv("PMIX_NAMESPACE") || getenv("PMIX_RANK") ? "PMIx"
         : getenv("PMI_RANK")                            ? "PMI"
                                                         : "");
}

static void find_job(tr_facts *f)
{
    const int64_t end = env_number("SLURM_JOB_END_TIME");
    const int64_t left = end > 0 ? end - (int64_t)time(NULL) : -1;

    take(f->job, sizeof f->job, getenv("SLURM_JOB_ID"));
    f->seconds_left = end > 0 ? left > 0 ? left : 0 : -1;
}

static void find_cpus(tr_facts *f)
{
    cpu_set_t mask;
    const long online = sysconf(_SC_NPROCESSORS_ONLN);

    f->n_online = online > 0 && online <= INT32_MAX ? (int32_t)online : 0;
    f->n_threads = tr_device_threads();
    CPU_ZERO(&mask);
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) return;
    for (int i = 0; i < TR_FACTS_CPUS && i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &mask)) f->cpus[i / 64] |= UINT64_C(1) << (i % 64);
}

int tr_facts_n_cpus(const tr_facts *f)
{
    int n = 0;

    for (int i = 0; i < TR_FACTS_CPUS / 64; i++)
        n += __builtin_popcountll(f->cpus[i]);
    return n;
}

/* The n-th number of "0,2,5"; -1: none. */
static int64_t list_entry(const char *list, int n)
{
    char entry[16];

    for (; n > 0 && list; n--) {
        list = strchr(list, ',');
        if (list) list++;
    }
    if (!list) return -1;
    snprintf(entry, sizeof entry, "%.*s", (int)strcspn(list, ","), list);
    return number_of(entry, -1);
}

static int list_length(const char *list)
{
    int n = *list != '\0';

    for (; *list; list++)
        n += *list == ',';
    return n;
}

/* "GPU UUID: \t GPU-..." of one of the driver's files. */
static bool read_uuid(const char *path, char *uuid, size_t room)
{
    char line[256];
    bool found = false;
    FILE *f = fopen(path, "re");

    if (!f) return false;
    while (!found && fgets(line, sizeof line, f)) {
        if (strncmp(line, "GPU UUID:", 9)) continue;
        char *begin = line + 9 + strspn(line + 9, " \t");
        begin[strcspn(begin, " \t\r\n")] = '\0';
        take(uuid, room, begin);
        found = true;
    }
    fclose(f);
    return found;
}

static int is_gpu(const struct dirent *d)
{
    return d->d_name[0] != '.';
}

/* By the driver's own files, in the order of the PCI bus, so that no context is opened on any GPU. */
static void find_gpus(tr_facts *f)
{
    static const char root[] = "/proc/driver/nvidia/gpus";
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    struct dirent **list = NULL;
    const int n = scandir(root, &list, is_gpu, alphasort);

    f->n_gpus = n > 0 ? n : 0;
    if (n > 0 && visible) f->n_gpus = strcmp(visible, "-1") ? list_length(visible) : 0;
    int64_t mine = f->n_gpus == 1 ? 0 : f->local_rank;
    if (visible && mine < f->n_gpus && strncmp(visible, "GPU-", 4) != 0)
        mine = list_entry(visible, (int)mine);
    if (f->n_gpus > 0 && mine >= 0 && mine < n) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s/information", root, list[mine]->d_name);
        read_uuid(path, f->uuid, sizeof f->uuid);
    }
    for (int i = 0; i < n; i++)
        free(list[i]);
    free(list);
}

static void add(char *text, size_t room, const char *what, const char *value)
{
    const size_t n = strlen(text);
    char clean[64];

    if (!value || !*value) return;
    take(clean, sizeof clean, value);
    snprintf(text + n, room - n, "%s%s%s", n ? ", " : "", what, clean);
}

static void find_network(tr_facts *f)
{
    static const char *const names[] = {"OMPI_MCA_pml",    "OMPI_MCA_btl",       "OMPI_MCA_mtl",
                                        "UCX_TLS",         "UCX_NET_DEVICES",    "FI_PROVIDER",
                                        "NCCL_IB_HCA",     "NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE",
                                        "NCCL_P2P_DISABLE"};
    struct dirent **list = NULL;
    const int n = scandir("/sys/class/infiniband", &list, is_gpu, alphasort);
    char scope[16] = "0";
    FILE *yama = fopen("/proc/sys/kernel/yama/ptrace_scope", "re");

    for (int i = 0; i < n; i++) {
        add(f->network, sizeof f->network, "", list[i]->d_name);
        free(list[i]);
    }
    free(list);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char what[40];
        snprintf(what, sizeof what, "%s=", names[i]);
        add(f->network, sizeof f->network, what, getenv(names[i]));
    }
    if (yama && !fgets(scope, sizeof scope, yama)) scope[0] = '0';
    if (yama) fclose(yama);
    f->single_copy = scope[0] == '0' || geteuid() == 0;
}

static void hash_binary(char hex[33])
{
    char block[65536];
    tr_hasher *h = tr_hasher_create();
    FILE *f = fopen("/proc/self/exe", "re");
    size_t n;

    hex[0] = '\0';
    while (h && f && (n = fread(block, 1, sizeof block, f)) > 0)
        tr_hasher_add(h, block, n);
    if (h && f) tr_hasher_hex(h, hex);
    if (f) fclose(f);
    tr_hasher_free(h);
}

void tr_facts_find(tr_facts *f, const tr_world *world)
{
    struct statvfs shm;

    *f = (tr_facts){.rank = world->rank,
                    .world = world->size,
                    .local_rank = world->local_rank,
                    .local_size = world->local_size,
                    .memory_bytes = tr_memory_available(),
                    .shm_bytes = UINT64_MAX,
                    .sees_out = -1};
    take(f->host, sizeof f->host, world->host);
    take(f->version, sizeof f->version, PACKAGE_VERSION);
    tr_mpi_version(f->mpi, sizeof f->mpi);
    take(f->threads, sizeof f->threads, tr_mpi_threads());
    hash_binary(f->binary);
    find_launcher(f);
    find_job(f);
    find_cpus(f);
    find_gpus(f);
    find_network(f);
    if (statvfs("/dev/shm", &shm) == 0) f->shm_bytes = (uint64_t)shm.f_bavail * shm.f_frsize;
}
