#include <config.h>

#include "command/profile_run.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/size.h"
#include "kernels/toolkit.h"
#ifdef HAVE_NCCL
#include "mpi/comm_nccl.h"
#endif
#include "mpi/grid.h"

enum { FILE_MAX = 1 << 20, GROUPS_MAX = 65536 };

extern char **environ;

/* ---- the run --------------------------------------------------------------------------------------------------------- */

/* A small file's text, or "" */
static char *file_text(const char *path)
{
    FILE *in = fopen(path, "r");
    char *text = calloc(1, FILE_MAX);

    if (in && text) text[fread(text, 1, FILE_MAX - 1, in)] = '\0';
    if (in) fclose(in);
    return text;
}

/* As it was typed, a blank between the words. */
static void describe_command(tr_profile *p)
{
    FILE *in = fopen("/proc/self/cmdline", "r");
    char text[16384] = "";

    if (!in) return;
    const size_t n = fread(text, 1, sizeof text - 1, in);
    fclose(in);
    for (size_t i = 0; i + 1 < n; i++)
        if (!text[i]) text[i] = ' ';
    tr_profile_text(p, "/run", "command_line", text);
}

/* Variables that change what a run does or how fast; nothing else of the user's environment leaves the machine. What mpirun
 * tells its own processes (OMPI_MCA_orte_...: addresses, a transport key) is no choice of anybody's. */
static bool matters(const char *variable)
{
    static const char *const front[] = {"SLURM_", "OMPI_MCA_", "UCX_",  "OMP_",  "GOMP_",
                                        "CUDA_",  "NCCL_",     "HDF5_", "PAPI_", "TRIREME_"};
    static const char *const launcher[] = {"OMPI_MCA_orte_", "OMPI_MCA_ess", "OMPI_MCA_pmix",
                                           "OMPI_MCA_initial_wdir"};
    static const char *const secret[] = {"TOKEN",      "SECRET", "PASSW", "KEY",
                                         "CREDENTIAL", "COOKIE", "JWT",   "AUTH"};
    const size_t n = strcspn(variable, "=");

    for (size_t i = 0; i < sizeof secret / sizeof *secret; i++) {
        const char *at = strstr(variable, secret[i]);
        if (at && (size_t)(at - variable) < n) return false;
    }
    for (size_t i = 0; i < sizeof launcher / sizeof *launcher; i++)
        if (strncmp(variable, launcher[i], strlen(launcher[i])) == 0) return false;
    for (size_t i = 0; i < sizeof front / sizeof *front; i++)
        if (strncmp(variable, front[i], strlen(front[i])) == 0) return true;
    return false;
}

static void describe_slurm(tr_profile *p)
{
    for (char **v = environ; *v; v++) {
        char name[64];
        const size_t n = strcspn(*v, "=");
        if (strncmp(*v, "SLURM_", 6) != 0 || !matters(*v) || n >= sizeof name || (*v)[n] != '=')
            continue;
        for (size_t i = 0; i < n; i++)
            name[i] = (char)((*v)[i] >= 'A' && (*v)[i] <= 'Z' ? (*v)[i] - 'A' + 'a' : (*v)[i]);
        name[n] = '\0';
        tr_profile_text(p, "/run", name, *v + n + 1);
    }
}

/* What the build has none of, and a driver that no GPU is used by, is "". */
static void describe_build(tr_profile *p, const tr_profile_gpu *gpu)
{
    char mpi[256], hdf5[32], toolkit[32], nccl[32] = "";
    unsigned major = 0, minor = 0, release = 0;

    tr_mpi_version(mpi, sizeof mpi);
    H5get_libversion(&major, &minor, &release);
    snprintf(hdf5, sizeof hdf5, "%u.%u.%u", major, minor, release);
    tr_profile_text(p, "/run", "trireme", PACKAGE_VERSION);
    tr_device_toolkit(toolkit, sizeof toolkit);
#ifdef HAVE_NCCL
    tr_nccl_version(nccl, sizeof nccl);
#endif
    tr_profile_text(p, "/run", "cuda", toolkit);
    tr_profile_text(p, "/run", "driver", gpu->driver);
    tr_profile_text(p, "/run", "nccl", nccl);
    tr_profile_text(p, "/run", "mpi", mpi);
    tr_profile_text(p, "/run", "hdf5", hdf5);
    tr_profile_text(p, "/run", "build_flags", TR_BUILD_FLAGS);
    tr_profile_text(p, "/run", "git_commit", TR_GIT_COMMIT);
    tr_profile_text(p, "/run", "compiler", __VERSION__);
}

static void describe_times(tr_profile *p, const tr_profile_about *a)
{
    char created[40];
    const time_t seconds = (time_t)(a->unix_ns / 1000000000);
    struct tm tm;
    const char *job = getenv("SLURM_JOB_ID");

    gmtime_r(&seconds, &tm);
    strftime(created, sizeof created, "%Y-%m-%dT%H:%M:%SZ", &tm);
    tr_profile_text(p, "/", "created", created);
    tr_profile_text(p, "/", "run_id", a->run_id);
    tr_profile_text(p, "/", "job_id", job ? job : "");
    tr_profile_number(p, "/", "t0_unix_ns", a->unix_ns);
    tr_profile_number(p, "/", "world_size", a->world->size);
    tr_profile_number(p, "/", "rank", a->world->rank);
}

static void describe_environment(tr_profile *p)
{
    size_t n = 0, all = 0;

    while (environ[all])
        all++;
    char **pair = tr_calloc(2 * all, sizeof *pair);
    for (size_t i = 0; pair && i < all; i++) {
        const size_t name = strcspn(environ[i], "=");
        if (!matters(environ[i]) || !environ[i][name]) continue;
        pair[2 * n] = strndup(environ[i], name);
        if (!pair[2 * n]) break;
        pair[2 * n++ + 1] = environ[i] + name + 1;
    }
    if (pair) tr_profile_put(p, TR_D_ENV, (const uint64_t[]){n, 2}, pair);
    for (size_t i = 0; pair && i < n; i++)
        free(pair[2 * i]);
    free(pair);
}

/* ---- the model --------------------------------------------------------------------------------------------------------- */

void tr_profile_rank_tokens(const tr_opened *opened, uint64_t *per_layer)
{
    if (!opened->model) return;
    const tr_model_seen seen = tr_model_look(opened->model);

    for (int l = 0; l < seen.n_layers; l++) {
        uint64_t sum = 0;
        for (int e = 0; e < seen.n_local; e++)
            sum += seen.expert_rows[(size_t)l * (size_t)seen.n_local + (size_t)e];
        per_layer[seen.layer_first + l] = sum;
    }
}

void tr_profile_show_model(const tr_opened *opened, tr_profile_tables *out)
{
    if (!opened->model) return;
    const tr_model_seen seen = tr_model_look(opened->model);
    const size_t n_experts = (size_t)opened->config.n_routed_experts;

    for (int l = 0; l < seen.n_layers; l++) {
        const int layer = seen.layer_first + l;
        if (seen.overlap) {
            const tr_share_cost *key = &seen.overlap[l].key, *latent = &seen.overlap[l].latent;
            out->overlap[layer] = (tr_prof_overlap){.gatherK_ns = key->flown_ns,
                                                    .gatherL_ns = latent->flown_ns,
                                                    .exposedK_ns = key->waited_ns,
                                                    .exposedL_ns = latent->waited_ns,
                                                    .bytes = key->bytes + latent->bytes,
                                                    .calls = latent->calls};
        }
        /* Ranks that share an expert's width compute the same rows: counted once. */
        if (opened->grid.at.xt != 0) continue;
        memcpy(out->expert_tokens + (size_t)layer * n_experts + (size_t)seen.expert_first,
               seen.expert_rows + (size_t)l * (size_t)seen.n_local,
               (size_t)seen.n_local * sizeof(uint64_t));
    }
}

/* ---- the grid ----------------------------------------------------------------------------------------------------------- */

void tr_profile_describe_rank(tr_profile *p, const tr_world *world, const tr_opened *opened,
                              const tr_profile_gpu *gpu, const tr_clock_offset *clock,
                              double drift_ppb)
{
    const tr_coord *at = &opened->grid.at;
    const uint64_t one = 1;
    tr_prof_rank r = {.rank = world->rank,
                      .pp = (int16_t)at->pp,
                      .dp = (int16_t)at->dp,
                      .cp = (int16_t)at->cp,
                      .tp = (int16_t)at->tp,
                      .mdp = (int16_t)at->mdp,
                      .ep = (int16_t)at->ep,
                      .xt = (int16_t)at->xt,
                      .node = world->node_first,
                      .local = (int16_t)world->local_rank,
                      .numa = -1,
                      .clock_offset_ns = clock->offset_ns,
                      .clock_drift_ppb = drift_ppb};

    snprintf(r.host, sizeof r.host, "%s", world->host);
    snprintf(r.gpu_uuid, sizeof r.gpu_uuid, "%s", gpu->uuid);
    snprintf(r.pci, sizeof r.pci, "%s", gpu->pci);
    tr_profile_put(p, TR_D_RANKS, &one, &r);
}

/* All groups of one kind: a group is named by its first member, and told when that rank's turn comes. */
static int groups_of_kind(const tr_profile_about *a, tr_grid_group kind, tr_prof_group *group,
                          hvl_t *member, int room)
{
    int n = 0;

    for (int r = 0; r < a->world->size && n < room; r++) {
        tr_grid g;
        if (tr_ranks_place(&g, &a->opened->ranks, r, a->world->size, NULL) != TR_OK) continue;
        const int size = tr_grid_group_size(&g, kind);
        if (size == 0 || tr_grid_group_index(&g, kind) != 0) continue;
        int32_t *list = tr_calloc((size_t)size, sizeof *list);
        if (!list) return n;
        for (int i = 0; i < size; i++)
            list[i] = tr_grid_member(&g, kind, i);
        group[n] = (tr_prof_group){.id = (int16_t)kind, .size = size};
        snprintf(group[n].name, sizeof group[n].name, "%s", tr_grid_group_name(kind));
        member[n++] = (hvl_t){.len = (size_t)size, .p = list};
    }
    return n;
}

static void describe_groups(tr_profile *p, const tr_profile_about *a)
{
    static const tr_grid_group kinds[] = {TR_GROUP_WORLD, TR_GROUP_ATTN_TP, TR_GROUP_ATTN_CP,
                                          TR_GROUP_MOE, TR_GROUP_PP};
    enum { KINDS = sizeof kinds / sizeof *kinds };
    const int room = a->world->size < GROUPS_MAX / KINDS ? KINDS * a->world->size : GROUPS_MAX;
    tr_prof_group *group = tr_calloc((size_t)room, sizeof *group);
    hvl_t *member = tr_calloc((size_t)room, sizeof *member);
    int n = 0;

    for (int k = 0; group && member && k < KINDS; k++)
        n += groups_of_kind(a, kinds[k], group + n, member + n, room - n);
    const uint64_t rows = (uint64_t)n;
    if (group && member) {
        tr_profile_put(p, TR_D_GROUPS, &rows, group);
        tr_profile_put(p, TR_D_MEMBERS, &rows, member);
    }
    for (int i = 0; i < n; i++)
        free(member[i].p);
    free(group);
    free(member);
}

void tr_profile_describe(tr_profile *p, const tr_profile_about *a)
{
    char path[4096];

    describe_times(p, a);
    tr_profile_text(p, "/run", "model", a->model_name);
    tr_profile_text(p, "/run", "kv_dtype", a->kv_dtype);
    tr_profile_text(p, "/run", "weights_dtype", a->opened->config.fp8 ? "fp8" : "bf16");
    tr_profile_text(p, "/run", "hostname_first", a->world->host);
    tr_profile_text(p, "/run", "device", a->options->device);
    snprintf(path, sizeof path, "%s/config.json", a->options->model);
    char *config = file_text(path);
    tr_profile_text(p, "/run", "config_json", config ? config : "");
    free(config);
    describe_command(p);
    describe_slurm(p);
    describe_build(p, a->gpu);
    tr_profile_describe_rank(p, a->world, a->opened, a->gpu, &a->clock, 0);
    if (a->world->rank != 0) return;
    describe_environment(p);
    describe_groups(p, a);
}
