#include <config.h>

#include "command/doctor_facts.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
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
#include "command/launch.h"
#include "command/limit.h"
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

static void find_launcher(tr_facts *f)
{
    const tr_launch launch = tr_launch_find();

    take(f->launcher, sizeof f->launcher, launch.by);
    f->launched = launch.n;
    if (!f->launcher[0]) return; /* MPI's own start has set what it found missing */
    take(f->protocol, sizeof f->protocol,
         getenv("PMIX_NAMESPACE") || getenv("PMIX_RANK") ? "PMIx"
         : getenv("PMI_RANK")                            ? "PMI"
                                                         : "");
}

static void find_job(tr_facts *f)
{
    bool odd;

    take(f->job, sizeof f->job, getenv("SLURM_JOB_ID"));
    f->seconds_left =
        (int64_t)tr_limit_slurm(getenv("SLURM_JOB_END_TIME"), (int64_t)time(NULL), &odd);
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

/* ---- GPUs ---------------------------------------------------------------------------------------------------------- */

enum { GPUS_MAX = 64 };

typedef struct gpu {
    char uuid[48];
    int64_t minor; /* of its device file; -1: not known */
} gpu;

/* What stands behind `key` in a line of one of the driver's files; NULL: the line is another one. */
static char *behind(char *line, const char *key)
{
    if (strncmp(line, key, strlen(key)) != 0) return NULL;
    line += strlen(key);
    line += strspn(line, " \t");
    line[strcspn(line, " \t\r\n")] = '\0';
    return line;
}

/* "GPU UUID: \t GPU-...", "Device Minor: \t 3" */
static void read_gpu(const char *path, gpu *g)
{
    char line[256];
    const char *value;
    FILE *f = fopen(path, "re");

    *g = (gpu){.minor = -1};
    while (f && fgets(line, sizeof line, f)) {
        if ((value = behind(line, "GPU UUID:")) != NULL) take(g->uuid, sizeof g->uuid, value);
        if ((value = behind(line, "Device Minor:")) != NULL) g->minor = number_of(value, -1);
    }
    if (f) fclose(f);
}

/* The driver lists all GPUs of the host; a batch system lets a job or a task open some of them. */
static bool may_open(const char *dev, const gpu *g)
{
    char path[512];

    if (g->minor < 0) return true;
    snprintf(path, sizeof path, "%s/nvidia%lld", dev, (long long)g->minor);
    const int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd >= 0) close(fd);
    return fd >= 0 || errno == ENOENT; /* not there: the files have other names here */
}

static int no_dot(const struct dirent *d)
{
    return d->d_name[0] != '.';
}

/* Those of the driver's folder that may be opened, in the order of the PCI bus. */
static int list_gpus(gpu *g, const char *root, const char *dev)
{
    char path[512];
    struct dirent **list = NULL;
    const int n = scandir(root, &list, no_dot, alphasort);
    int n_gpus = 0;

    for (int i = 0; i < n; i++) {
        snprintf(path, sizeof path, "%s/%s/information", root, list[i]->d_name);
        if (n_gpus < GPUS_MAX) read_gpu(path, &g[n_gpus]);
        if (n_gpus < GPUS_MAX && may_open(dev, &g[n_gpus])) n_gpus++;
        free(list[i]);
    }
    free(list);
    return n_gpus;
}

static int list_length(const char *list)
{
    int n = *list != '\0';

    for (; *list; list++)
        n += *list == ',';
    return n;
}

/* The UUID of entry i of CUDA_VISIBLE_DEVICES: a number, a UUID or its beginning, or something this does not know. */
static void find_visible(char *uuid, size_t room, const char *visible, int64_t i, const gpu *g,
                         int n)
{
    char entry[48];

    for (; i > 0 && visible; i--) {
        visible = strchr(visible, ',');
        if (visible) visible++;
    }
    if (!visible) return;
    snprintf(entry, sizeof entry, "%.*s", (int)strcspn(visible, ","), visible);
    const int64_t number = number_of(entry, -1);
    if (number >= 0 && number < n) take(uuid, room, g[number].uuid);
    if (number >= 0 || !*entry) return;
    take(uuid, room, entry);
    for (int k = 0; k < n; k++)
        if (!strncmp(g[k].uuid, entry, strlen(entry))) take(uuid, room, g[k].uuid);
}

void tr_facts_gpus(tr_facts *f, const char *root, const char *dev, const char *visible)
{
    gpu g[GPUS_MAX];
    const int n = list_gpus(g, root, dev);

    f->n_gpus = n;
    if (n && visible) f->n_gpus = strcmp(visible, "-1") ? list_length(visible) : 0;
    const int64_t mine = f->n_gpus == 1 ? 0 : f->local_rank;
    if (mine >= f->n_gpus) return;
    if (visible)
        find_visible(f->uuid, sizeof f->uuid, visible, mine, g, n);
    else
        take(f->uuid, sizeof f->uuid, g[mine].uuid);
}

/* ---- the network ----------------------------------------------------------------------------------------------------- */

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
    const int n = scandir("/sys/class/infiniband", &list, no_dot, alphasort);
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
    const uint64_t memory = tr_memory_available();
    struct statvfs shm;

    *f = (tr_facts){.rank = world->rank,
                    .world = world->size,
                    .local_rank = world->local_rank,
                    .local_size = world->local_size,
                    .memory_bytes = memory == UINT64_MAX ? 0 : memory,
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
    tr_facts_gpus(f, "/proc/driver/nvidia/gpus", "/dev", getenv("CUDA_VISIBLE_DEVICES"));
    find_network(f);
    if (statvfs("/dev/shm", &shm) == 0) f->shm_bytes = (uint64_t)shm.f_bavail * shm.f_frsize;
}
