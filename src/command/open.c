#include <config.h>

#include "command/open.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/size.h"
#include "command/gpus.h"
#include "kernels/limits.h"
#include "model/patience.h"
#include "mpi/comm_mpi.h"
#include "mpi/grid.h"
#ifdef HAVE_NCCL
#include "mpi/binding.h"
#include "mpi/comm_nccl.h"
#endif

static tr_status choose_grid(tr_opened *o, const tr_open_options *options, tr_err *err)
{
    const int rank = options->world ? options->world->rank : 0,
              size = options->world ? options->world->size : 1;
    tr_status st = tr_ranks_choose(&o->ranks, &options->ranks, &o->config, size, err);
    return st == TR_OK ? tr_ranks_place(&o->grid, &o->ranks, rank, size, err) : st;
}

tr_status tr_open_checkpoint(tr_opened *o, const tr_open_options *options, tr_err *err)
{
    tr_status st = tr_config_load(&o->config, options->model_dir, options->overrides,
                                  options->n_overrides, err);
    if (st == TR_OK) st = choose_grid(o, options, err);
    if (st == TR_OK) st = tr_slice_make(&o->slice, &o->config, &o->grid, err);
    if (st == TR_OK && options->load_format == TR_LOAD_SAFETENSORS)
        st = tr_checkpoint_open(&o->checkpoint, options->model_dir, err);
    return st;
}

/* Communicators of the groups that have more than one member; collective over the world, in one order on every rank. */
static tr_status open_groups(tr_opened *o, tr_world *world, tr_err *err)
{
    static const tr_grid_group group[] = {TR_GROUP_ATTN_TP, TR_GROUP_ATTN_CP, TR_GROUP_MOE,
                                          TR_GROUP_PP};
    static const char *const name[] = {"attn_tp", "attn_cp", "moe", "pp"};
    tr_comm **to[] = {&o->groups.attn_tp, &o->groups.attn_cp, &o->groups.moe, &o->groups.pp};
    tr_status st = TR_OK;

    o->self = tr_comm_self();
    if (!o->self) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < 4 && st == TR_OK; i++) {
        *to[i] = o->self;
        if (!world || tr_grid_group_size(&o->grid, group[i]) == 1) continue;
        st = tr_comm_split(&o->group[i], world, tr_grid_color(&o->grid, group[i]),
                           tr_grid_key(&o->grid, group[i]), name[i], err);
        *to[i] = o->group[i];
        if (st == TR_OK) st = tr_comm_measure(o->group[i], &o->regions, group[i], err);
    }
    o->groups.n_xt = o->grid.size.xt;
    o->control = o->self;
    if (world && world->size > 1 && st == TR_OK)
        st = tr_comm_split(&o->control, world, 0, world->rank, "control", err);
    if (o->control != o->self && st == TR_OK)
        st = tr_comm_measure(o->control, &o->regions, TR_GROUP_WORLD, err);
    return st;
}

/* Which of the ranks that have this one's CPUs it is, and how many: those of the same host and affinity mask. A launcher
 * that binds gives each rank a mask of its own. Collective over the world; nothing that one rank alone could lack. */
static tr_status find_share(const tr_opened *o, const tr_world *world, int *i_share, int *n_share,
                            tr_err *err)
{
    enum { RANKS_MAX = 4096 };
    uint64_t all[RANKS_MAX], mine;
    size_t bytes[RANKS_MAX];
    tr_ticket ticket = {0};
    cpu_set_t mask;

    *i_share = world ? world->local_rank : 0;
    *n_share = world ? world->local_size : 1;
    if (!world || world->size == 1 || world->size > RANKS_MAX) return TR_OK;
    /* Where it cannot be read all ranks of a host are alike. */
    if (sched_getaffinity(0, sizeof mask, &mask) != 0) CPU_ZERO(&mask);
    mine = tr_hash64(&mask, sizeof mask, tr_hash64(world->host, strlen(world->host), 0));
    for (int i = 0; i < world->size; i++)
        bytes[i] = sizeof mine;
    tr_status st = tr_comm_all_gather(o->control, &mine, all, bytes, &ticket, err);
    if (st == TR_OK) st = tr_comm_wait(o->control, TR_LANE_MAIN, ticket, err);
    if (st != TR_OK) return st;
    *i_share = *n_share = 0;
    for (int i = 0; i < world->size; i++) {
        if (all[i] != mine) continue;
        if (i == world->rank) *i_share = *n_share;
        ++*n_share;
    }
    return TR_OK;
}

/* Threads that share CPUs with nobody's stay there; one thread alone is kept well by the system. */
static tr_status bind_threads(const tr_opened *o, const tr_open_options *options, int i_share,
                              int n_share, tr_log *log, tr_err *err)
{
    const int n_threads = options->n_threads > 0 ? options->n_threads : tr_device_threads();
    int bound = 0;

    if (strcmp(o->ops->name, "cpu") != 0 || (n_share == 1 && n_threads == 1)) return TR_OK;
    tr_status st = tr_device_bind(o->device, i_share, n_share, &bound, err);
    if (st != TR_OK || !log) return st;
    if (bound)
        tr_log_debug(log, "threads bound to CPUs %s", tr_device_places(o->device));
    else
        tr_log_debug(log, "threads not bound: fewer CPUs than threads of %d rank%s", n_share,
                     n_share == 1 ? "" : "s");
    return TR_OK;
}

#ifdef HAVE_NCCL
static const bool has_nccl = true;
#else
static const bool has_nccl = false;
#endif

/* One rank leaves it to tr_device_open, which takes a GPU of no use for none. */
static void look_alone(const tr_open_options *options, char why[TR_GPUS_WHY])
{
    tr_gpu_seen seen;

    if (options->isa) return;
    tr_device_look(&seen, 0, 1);
    snprintf(why, TR_GPUS_WHY, "%s", seen.unfit);
}

/* Several ranks ask each other. */
static tr_status choose_auto(tr_opened *o, const tr_open_options *options, char why[TR_GPUS_WHY],
                             tr_err *err)
{
    bool suffice = false;

    tr_status st = options->isa ? TR_OK /* an instruction set is a CPU's */
                                : tr_gpus_ask(&suffice, why, options->world, has_nccl, err);
    o->device_name = suffice ? "cuda" : "cpu";
    return st;
}

tr_status tr_open_choose(tr_opened *o, const tr_open_options *options, tr_log *log, tr_err *err)
{
    const bool alone = !options->world || options->world->size == 1;
    char why[TR_GPUS_WHY] = "";
    tr_status st = TR_OK;

    o->device_name = options->device ? options->device : "auto";
    if (strcmp(o->device_name, "auto") == 0) {
        if (alone)
            look_alone(options, why);
        else
            st = choose_auto(o, options, why, err);
    }
    if (st != TR_OK) return st;
    const bool cuda = !alone && strcmp(o->device_name, "cuda") == 0;
    if (!cuda && options->peer_kernels && strcmp(options->peer_kernels, "on") == 0)
        return tr_fail(err, TR_E_USAGE,
                       "--peer-kernels on: several ranks with --device cuda are wanted%s%s",
                       why[0] ? "; GPUs are not used: " : "", why);
    if (cuda && !has_nccl)
        return tr_fail(err, TR_E_USAGE, "--device cuda: one rank only in this version, not %d",
                       options->world->size);
    if (why[0])
        tr_log_warn(log, "GPUs are not used: %s%s", why,
                    alone || has_nccl ? "; --device cuda insists" : "");
    return TR_OK;
}

#ifdef HAVE_NCCL
/* Who is where, on rank 0; of a large job the first ranks, unless all are asked for. */
static void tell_binding(const tr_bound *all, int n, tr_log *log)
{
    enum { ROWS = 64 };
    char line[256];

    for (int i = -1; i < n && i < ROWS; i++)
        tr_log_info(log, "%s", tr_binding_line(line, sizeof line, all, i));
    for (int i = ROWS; i < n; i++)
        tr_log_debug(log, "%s", tr_binding_line(line, sizeof line, all, i));
    if (n > ROWS) tr_log_info(log, "... %d ranks (all of them with --verbose)", n);
    for (int i = 0; i < n; i++)
        tr_log_debug(log, "rank %d on %s: %s, %s", i, all[i].host, all[i].device, all[i].uuid);
}

/* Every rank with a GPU of its own. Collective over the world. */
static tr_status check_binding(const tr_opened *o, const tr_world *world, tr_log *log, tr_err *err)
{
    tr_bound mine = tr_binding_of(world, o->device), *all = NULL;
    tr_status st = tr_binding_gather(&all, o->control, &mine, err);

    if (st == TR_OK) st = tr_binding_check(all, world->size, err);
    if (st != TR_OK) goto done; /* all ranks alike: the check is of what all have */
    tr_nccl_ways(o->nccl, all, world->size, world->rank);
    mine = all[world->rank];
    free(all);
    all = NULL;
    st = tr_binding_gather(&all, o->control, &mine, err);
    if (st == TR_OK && log && world->rank == 0) tell_binding(all, world->size, log);

done:
    free(all);
    return st;
}

static void tell_peers(const tr_peer_report *r, const char *name, tr_log *log)
{
    if (!log) return;
    if (r->why[0]) tr_log_debug(log, "%s: no sums over peer memory: %s", name, r->why);
    for (int i = 0; i < r->n; i++)
        tr_log_debug(
            log, "%s: sum and norm of %3d rows, us: nccl %.2f, one-shot %.2f, two-shot %.2f: %s",
            name, r->size[i].rows, r->size[i].nccl_s * 1e6, r->size[i].one_s * 1e6,
            r->size[i].two_s * 1e6, r->size[i].chosen);
}

static tr_peer_use peer_use(const tr_open_options *options)
{
    const char *when = options->peer_kernels ? options->peer_kernels : "auto";

    return strcmp(when, "off") == 0  ? TR_PEER_OFF
           : strcmp(when, "on") == 0 ? TR_PEER_ON
                                     : TR_PEER_AUTO;
}

/* The attention group adds up rows in front of every norm. */
static tr_status open_peers(tr_comm *group, const tr_open_options *options, int d, tr_log *log,
                            tr_err *err)
{
    const tr_peer_options how = {.use = peer_use(options), .d = d};
    tr_peer_report report;
    const tr_status st = tr_nccl_peers(group, &how, &report, err);

    if (st == TR_OK) tell_peers(&report, tr_comm_name(group), log);
    return st;
}

/* Rows of a group over peer memory, or NCCL. */
static tr_status open_push(tr_comm *group, tr_peer_use use, tr_log *log, tr_err *err)
{
    char why[256];
    const tr_status st = tr_nccl_push(group, use, why, sizeof why, err);

    if (st == TR_OK && log)
        tr_log_debug(log, "%s: rows over %s%s%s", tr_comm_name(group),
                     why[0] ? "NCCL" : "peer memory", why[0] ? ": " : "", why);
    return st;
}

/* The context-parallel group exchanges rows of its caches in every layer, the MoE group rows and what the experts make of them:
 * over peer memory where that works. The MoE group may span hosts where the other does not, so it is never refused. */
static tr_status open_ways(tr_comm *comm, tr_grid_group group, const tr_open_options *options,
                           int d, tr_log *log, tr_err *err)
{
    const tr_peer_use use = peer_use(options);

    switch (group) {
    case TR_GROUP_ATTN_TP:
        return open_peers(comm, options, d, log, err);
    case TR_GROUP_ATTN_CP:
        return open_push(comm, use, log, err);
    case TR_GROUP_MOE:
        return open_push(comm, use == TR_PEER_OFF ? use : TR_PEER_AUTO, log, err);
    default:
        return TR_OK;
    }
}

/* For a GPU's memory every group gets a communicator beside the host's. Collective over the world, in one order on every rank;
 * after each step all ranks agree, as one that is missing would be waited for. */
static tr_status open_device_groups(tr_opened *o, const tr_open_options *options, tr_log *log,
                                    tr_err *err)
{
    tr_world *world = options->world;
    tr_comm **to[] = {&o->groups.attn_tp, &o->groups.attn_cp, &o->groups.moe, &o->groups.pp};
    static const tr_grid_group group[] = {TR_GROUP_ATTN_TP, TR_GROUP_ATTN_CP, TR_GROUP_MOE,
                                          TR_GROUP_PP};
    const char *queues = getenv("CUDA_DEVICE_MAX_CONNECTIONS");
    char version[32];

    tr_status st = tr_nccl_log_beside(options->beside, err);
    if (st == TR_OK) st = tr_nccl_open(&o->nccl, world, o->device, o->ops, err);
    st = tr_agree(world, st, err);
    if (st == TR_OK) st = tr_agree(world, check_binding(o, world, log, err), err);
    for (int i = 0; i < 4 && st == TR_OK; i++) {
        if (o->group[i]) st = tr_nccl_comm(&o->device_group[i], o->nccl, o->group[i], 0, err);
        if (st == TR_OK && o->group[i])
            st = open_ways(o->device_group[i], group[i], options, o->config.hidden_size, log, err);
        if (st == TR_OK && o->group[i]) {
            *to[i] = o->device_group[i];
            st = tr_comm_measure(o->device_group[i], &o->regions, group[i], err);
        }
        st = tr_agree(world, st, err);
    }
    if (st != TR_OK || !log) return st;
    tr_nccl_version(version, sizeof version);
    tr_log_info(log, "NCCL %s", version);
    if (queues && strcmp(queues, "1") == 0)
        tr_log_warn(log, "CUDA_DEVICE_MAX_CONNECTIONS=1: communication will wait for computation");
    return TR_OK;
}
#endif

static tr_status takes(const tr_opened *o, const tr_open_options *options, const tr_config *config,
                       tr_err *err)
{
    tr_dims dims = tr_slice_dims(config, &o->slice, &o->grid.size);

    dims.max_context = options->max_model_len;
    return tr_device_takes(o->ops->name, &dims, err);
}

/* What the device cannot compute is found before anything is loaded. Wrong only with the overrides: the command line's fault, as
 * tr_config_load has it. */
static tr_status check_sizes(const tr_opened *o, const tr_open_options *options, tr_err *err)
{
    tr_config plain;

    if (options->f32_caches && !(o->ops->caps & TR_CAP_F32_KV))
        return tr_fail(err, TR_E_USAGE, "--kv-dtype f32: %s has caches of fp8 and bf16 only",
                       tr_device_describe(o->device));
    tr_status st = takes(o, options, &o->config, err);

    if (st != TR_E_INPUT || options->n_overrides == 0 ||
        tr_config_load(&plain, options->model_dir, NULL, 0, NULL) != TR_OK ||
        takes(o, options, &plain, NULL) != TR_OK)
        return st;
    err->status = TR_E_USAGE;
    return tr_within(err, "--override");
}

tr_status tr_open_device(tr_opened *o, const tr_open_options *options, tr_log *log, tr_err *err)
{
    tr_status st = o->device_name ? TR_OK : tr_open_choose(o, options, log, err);
    tr_device_options device = {.name = o->device_name,
                                .n_threads = options->n_threads,
                                .isa = options->isa,
                                .i_device = options->world ? options->world->local_rank : 0,
                                .n_device_ranks = options->world ? options->world->local_size : 1,
                                .bind = !options->no_bind};
    int i_share = 0, n_share = 1;
    if (st == TR_OK) st = open_groups(o, options->world, err);
    /* Before anything that may fail on one rank alone. */
    if (st == TR_OK && !options->no_bind)
        st = find_share(o, options->world, &i_share, &n_share, err);
    if (st == TR_OK) st = tr_device_open(&o->device, &o->ops, &device, err);
    if (st == TR_OK) st = check_sizes(o, options, err);
#ifdef HAVE_NCCL
    if (options->world && options->world->size > 1 && strcmp(device.name, "cuda") == 0) {
        st = tr_agree(options->world, st, err);
        if (st == TR_OK) st = open_device_groups(o, options, log, err);
    }
#endif
    if (st == TR_OK && !options->no_bind) st = bind_threads(o, options, i_share, n_share, log, err);
    return st;
}

tr_status tr_open_weights(tr_opened *o, const tr_open_options *options, tr_log *log, tr_err *err)
{
    tr_status st = o->device ? TR_OK : tr_open_device(o, options, log, err);
    if (st != TR_OK) return st;
    const tr_patience_options patient = {.checkpoint = o->checkpoint,
                                         .out = stderr,
                                         .rank = options->world ? options->world->rank : 0,
                                         .host =
                                             options->world ? options->world->host : "this host"};
    tr_patience *patience = NULL;
    if (o->checkpoint) st = tr_patience_start(&patience, &patient, err);
    if (st == TR_OK)
        st =
            tr_weights_load(&o->weights, &o->config, &o->slice, o->checkpoint, options->load_format,
                            options->seed, o->device, o->ops, log, &o->regions, err);
    tr_patience_stop(patience);
    return st == TR_OK ? TR_OK : tr_within(err, "cannot load model");
}

/* The members of group i to each other's memory, where all of them have a model. One that has none says why itself. */
static tr_status join(tr_opened *o, int i, tr_status (*reach)(tr_model *, tr_err *), tr_status st,
                      tr_err *err)
{
    uint64_t failed = st != TR_OK;
    tr_err other;

    if (!o->device_group[i]) return st;
    const tr_status agreed = tr_comm_max_word(o->group[i], &failed, &other);
    if (st == TR_OK && agreed != TR_OK) return tr_fail(err, agreed, "%s", other.text);
    return failed ? st : reach(o->model, err);
}

static tr_status join_all(tr_opened *o, tr_status st, tr_err *err)
{
    enum { ATTN_CP = 1, MOE = 2 };
    st = join(o, ATTN_CP, tr_model_reach, st, err);
    return join(o, MOE, tr_model_reach_rows, st, err);
}

tr_status tr_open_model(tr_opened *o, const tr_model_options *options, const uint32_t *has_token,
                        tr_err *err)
{
    const tr_status st = tr_model_create(&o->model, &o->config, o->weights, o->device, o->ops,
                                         &o->groups, options, has_token, &o->regions, err);
    return join_all(o, st, err);
}

void tr_opened_close(tr_opened *o)
{
    tr_model_free(o->model);
    if (o->weights) tr_weights_free(o->weights, o->device, o->ops);
#ifdef HAVE_NCCL
    for (int i = 0; i < 4; i++)
        tr_comm_free(o->device_group[i]);
    tr_nccl_close(o->nccl);
#endif
    if (o->device) o->ops->close(o->device);
    tr_checkpoint_close(o->checkpoint);
    if (o->control != o->self) tr_comm_free(o->control);
    for (int i = 0; i < 4; i++)
        tr_comm_free(o->group[i]);
    tr_comm_free(o->self);
    tr_ranks_free(&o->ranks);
    memset(o, 0, sizeof *o);
}

tr_status tr_open_kv_dtype(tr_dtype *out, const char *name, tr_err *err)
{
    if (strcmp(name, "fp8") == 0)
        *out = TR_E4M3;
    else if (strcmp(name, "bf16") == 0)
        *out = TR_BF16;
    else if (strcmp(name, "f32") == 0)
        *out = TR_F32;
    else
        return tr_fail(err, TR_E_USAGE, "--kv-dtype %s: fp8, bf16 or f32 is wanted", name);
    return TR_OK;
}
