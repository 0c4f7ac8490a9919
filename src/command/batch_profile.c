#include <config.h>

#include "command/batch_profile.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/size.h"
#include "command/budget.h"
#include "command/profile_run.h"
#include "mpi/clock_offset.h"
#include "profile/join.h"
#include "profile/node.h"
#include "profile/nvml.h"
#include "profile/papi.h"
#include "profile/profile.h"
#include "profile/sde.h"
#include "profile/settle.h"

enum {
    NODES_MAX = 4096,
    NODES_THREAD = 64,
    GROUPS = 5,
    SAMPLE_S = 1,
    EVENTS_MAX = 1 << 17, /* of a stream and second */
    RUN_BYTES = 96,
    FILE_BYTES = 4096 - RUN_BYTES - 64, /* what is made of it fits in 4096 */
};

/* What rank 0 decides for all. */
typedef struct beginning {
    char run[RUN_BYTES]; /* name of the folder */
    char file
        [FILE_BYTES]; /* --profile, from the root: other ranks may be in other folders. "": it has none */
    uint64_t origin_ns; /* rank 0's clock at time 0 */
    int64_t unix_ns;    /* and the world's */
} beginning;

struct tr_run_profile {
    const tr_batch_options *o;
    tr_world *world;
    tr_opened *opened;
    tr_log *log;
    tr_profile *profile;
    tr_papi *papi;
    tr_nvml *nvml; /* of this rank's GPU; NULL: it computes on the CPU, or there is none */
    tr_profile_gpu gpu;
    tr_sde *sde;                            /* own counters for PAPI; NULL: no libsde */
    tr_regions read_regions, write_regions; /* rank 0's threads */
    char *folder;                           /* of this run's files, below the one that FILE is in */
    bool by_node;                           /* files of nodes (profile/node.h) */
    char scratch[FILE_BYTES]; /* where this node's ranks write then; "": there is none */
    bool node_failed;         /* has been told; the profile's thread's, then the main thread's */
    beginning began;
    uint64_t begun_ns; /* this rank's clock */
    tr_clock_offset clock;
    uint64_t waited_ns; /* in communicators, until the last step */
    _Atomic(tr_engine *) engine;
    uint64_t weights, kv, workspace; /* bytes; written before engine */
};

/* ---- what the profile asks for ---------------------------------------------------------------------------------------- */

static const tr_grid_group group_kind[GROUPS] = {TR_GROUP_ATTN_TP, TR_GROUP_ATTN_CP, TR_GROUP_MOE,
                                                 TR_GROUP_PP, TR_GROUP_WORLD};

/* The communicators of this rank, and the kind of group each serves; NULL where a group has one member. */
static tr_comm *comm_of(const tr_run_profile *r, int i, tr_grid_group *group)
{
    const tr_opened *o = r->opened;

    *group = group_kind[i];
    if (i < GROUPS - 1) return o->device_group[i] ? o->device_group[i] : o->group[i];
    return o->control != o->self ? o->control : NULL;
}

static uint8_t dtype_of(int op)
{
    if (op == TR_COMM_ALL_REDUCE || op == TR_COMM_REDUCE_SCATTER) return 1; /* f32 */
    return op == TR_COMM_ALL_MAX ? 2 : 0;                                   /* u64, bytes */
}

static void show_comm(tr_run_profile *r, int i, tr_profile_tables *out)
{
    char name[TR_REGION_NAME];
    tr_grid_group group;
    tr_comm *comm = comm_of(r, i, &group);

    for (int op = 0; op < TR_COMM_N_OPS; op++) {
        tr_prof_comm *row = &out->comm[i * TR_COMM_N_OPS + op];
        *row = (tr_prof_comm){.region = TR_PROFILE_NO_REGION,
                              .group = (int16_t)group,
                              .op = (uint8_t)op,
                              .dtype = dtype_of(op)};
        if (!comm) continue;
        tr_comm_counts(comm, (tr_comm_op)op, &row->calls, &row->bytes);
        row->time_ns = tr_comm_flown_ns(comm, (tr_comm_op)op);
        row->exposed_ns = tr_comm_waited_ns(comm, (tr_comm_op)op);
        row->min_ns = tr_comm_shortest_ns(comm, (tr_comm_op)op);
        row->max_ns = tr_comm_max_number_ns(comm, (tr_comm_op)op);
        snprintf(name, sizeof name, "%s/%s", tr_comm_name(comm), tr_comm_op_name((tr_comm_op)op));
        const int id = tr_region_id_of(&r->opened->regions, name, TR_KIND_COMM, group);
        row->region = id < 0 ? TR_PROFILE_NO_REGION : (uint32_t)id;
    }
    for (int m = 0; comm && m < tr_comm_size(comm); m++)
        out->sent[i][tr_grid_member(&r->opened->grid, group, m)] = tr_comm_sent_to(comm, m);
}

static void give_rank_tokens(void *ctx, uint64_t *per_layer)
{
    const tr_run_profile *r = ctx;
    tr_profile_rank_tokens(r->opened, per_layer);
}

static void give_tables(void *ctx, tr_profile_tables *out)
{
    tr_run_profile *r = ctx;

    for (int i = 0; i < GROUPS; i++)
        show_comm(r, i, out);
    tr_profile_show_model(r->opened, out);
    tr_profile_rank_tokens(r->opened, out->rank_tokens);
}

/* Bytes; 0: unknown. */
static uint64_t free_memory(void)
{
    const uint64_t left = tr_memory_available();
    return left == UINT64_MAX ? 0 : left;
}

/* The profile's thread. */
static void give_sample(void *ctx, tr_prof_kv *kv, tr_prof_memory *memory)
{
    tr_run_profile *r = ctx;
    tr_engine *engine = atomic_load(&r->engine);

    if (!engine) {
        memory->free = free_memory();
        return;
    }
    const tr_engine_stats s = tr_engine_stats_get(engine);
    *kv = (tr_prof_kv){.hits = s.cached_tokens,
                       .misses = s.prompt_tokens - s.cached_tokens,
                       .evicted = s.pages_evicted};
    const uint64_t left = r->opened->ops->memory_left(r->opened->device);
    *memory = (tr_prof_memory){.weights = r->weights,
                               .kv = r->kv,
                               .workspace = r->workspace,
                               .free = left ? left : free_memory()};
}

/* ---- steps and requests ------------------------------------------------------------------------------------------------ */

static uint64_t waited(const tr_run_profile *r)
{
    uint64_t sum = 0;

    for (int i = 0; i < GROUPS; i++) {
        tr_grid_group group;
        const tr_comm *comm = comm_of(r, i, &group);
        for (int op = 0; comm && op < TR_COMM_N_OPS; op++)
            sum += tr_comm_waited_ns(comm, (tr_comm_op)op);
    }
    return sum;
}

static void count_bytes(const tr_run_profile *r, uint64_t *bytes)
{
    for (int i = 0; i < GROUPS; i++) {
        tr_grid_group group;
        const tr_comm *comm = comm_of(r, i, &group);
        bytes[i] = 0;
        for (int m = 0; comm && r->sde && m < tr_comm_size(comm); m++)
            bytes[i] += tr_comm_sent_to(comm, m);
    }
}

static void see_begin(void *ctx, uint64_t step, const tr_plan *plan, uint64_t t0_ns)
{
    const tr_run_profile *r = ctx;
    tr_profile_begin_step(r->profile, step);
    tr_papi_begin(r->papi, tr_plan_phase(plan), t0_ns);
}

static void see_step(void *ctx, const tr_engine_seen *seen)
{
    tr_run_profile *r = ctx;
    const tr_phase phase = tr_plan_phase(seen->plan);
    const uint64_t waited_ns = waited(r);
    uint64_t bytes[GROUPS];
    tr_prof_step s = {.step = seen->step,
                      .t0 = tr_profile_time(r->profile, seen->t0_ns),
                      .t1 = tr_profile_time(r->profile, seen->t1_ns),
                      .mode = (uint8_t)phase,
                      .nreq = (uint32_t)seen->plan->n_spans,
                      .sync_wait_ns = waited_ns - r->waited_ns,
                      .plan_ns = seen->plan_ns};

    for (int i = 0; i < seen->plan->n_spans; i++) {
        const tr_span *span = &tr_plan_spans(seen->plan)[i];
        *(span->kind == TR_SPAN_PREFILL ? &s.tok_prefill : &s.tok_decode) += (uint32_t)span->n_rows;
    }
    if (r->world->rank == 0) {
        const tr_engine_stats e = tr_engine_stats_get(atomic_load(&r->engine));
        s.pages_used = (uint32_t)(e.pages_held + e.pages_cached);
        s.pages_free = (uint32_t)(e.pages_total - e.pages_held - e.pages_cached);
        s.queue = (uint32_t)e.waiting;
    }
    tr_device_step device;
    if (tr_model_step_time(r->opened->model, seen->plan->step, &device)) {
        s.gpu_ns = device.ns;
        s.graph = device.recorded;
    }
    r->waited_ns = waited_ns;
    count_bytes(r, bytes);
    tr_sde_step(r->sde, &s, bytes);
    tr_papi_step(r->papi, phase, tr_now_ns());
    tr_profile_step(r->profile, &s);
}

/* The writer's thread. */
static void see_event(void *ctx, const tr_event *e)
{
    tr_run_profile *r = ctx;
    const bool failed = e->kind == TR_EVENT_FAILED;
    tr_prof_request q = {
        .line = e->request->id,
        .dp = (int16_t)e->replica,
        .t_arrive = tr_profile_time(r->profile, e->submitted_ns),
        .t_done = tr_profile_time(r->profile, e->done_ns),
        .n_prompt = (uint32_t)e->request->n_prompt,
        .n_cached = (uint32_t)e->cached_tokens,
        .chunks = (uint16_t)(e->n_chunks < UINT16_MAX ? e->n_chunks : UINT16_MAX),
        .itl_p50_ns = e->itl_p50_ns,
        .itl_p99_ns = e->itl_p99_ns,
        .finish = failed ? 2 : 0,
    };

    q.t_first = e->first_token_ns ? tr_profile_time(r->profile, e->first_token_ns) : q.t_done;
    for (int i = 0; !failed && i < e->n_choices; i++) {
        q.n_out += (uint32_t)e->choice[i].n_token;
        if (i == 0) q.finish = e->choice[i].finish == TR_FINISH_STOP ? 0 : 1;
    }
    if (failed)
        tr_profile_warn(r->profile, "line %ju: %s: %s", (uintmax_t)e->request->id, e->code,
                        e->message);
    tr_profile_request(r->profile, &q);
}

/* ---- beginning ----------------------------------------------------------------------------------------------------------- */

/* Events that were asked for by name and cannot be counted are told of before the work; the profile has the reason too. */
static void tell_absent(const tr_run_profile *r)
{
    if (!r->papi || !r->o->papi || r->world->rank != 0) return;
    const tr_profile_counters c = tr_papi_counters(r->papi);
    for (int i = 0; i < c.n; i++)
        if (c.absent[i])
            tr_log_warn(r->log, "--papi: %s is not counted: %s", c.name[i], c.absent[i]);
}

tr_run_profile *tr_run_profile_create(const tr_batch_options *options, tr_world *world,
                                      tr_opened *opened, tr_log *log)
{
    const char *groups[GROUPS];

    if (!options->profile) return NULL;
    tr_run_profile *r = calloc(1, sizeof *r);
    if (!r) return NULL;
    r->o = options;
    r->world = world;
    r->opened = opened;
    r->log = log;
    tr_regions_grow(&opened->regions, "main", NODES_MAX);
    if (world->rank == 0 && options->input) {
        tr_regions_grow(&r->read_regions, "reader", NODES_THREAD);
        tr_regions_grow(&r->write_regions, "writer", NODES_THREAD);
    }
    for (int i = 0; i < GROUPS; i++)
        groups[i] = tr_grid_group_name(group_kind[i]);
    r->sde = tr_sde_open(groups, GROUPS);
    r->papi = tr_papi_open(options->papi);
    tell_absent(r);
    return r;
}

/* Start time, and the job or the process: another run of the same command has a folder of its own. */
static void name_run(beginning *b)
{
    char when[32];
    struct timespec now;
    struct tm tm;
    const char *job = getenv("SLURM_JOB_ID");

    clock_gettime(CLOCK_REALTIME, &now);
    localtime_r(&now.tv_sec, &tm);
    strftime(when, sizeof when, "%Y%m%dT%H%M%S", &tm);
    if (job && strspn(job, "0123456789") == strlen(job) && strlen(job) < 20)
        snprintf(b->run, sizeof b->run, "%s-job%s", when, job);
    else
        snprintf(b->run, sizeof b->run, "%s-pid%ld", when, (long)getpid());
    b->unix_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    b->origin_ns = tr_now_ns();
}

static tr_status make_folder(const char *path, tr_err *err)
{
    if (mkdir(path, 0777) == 0 || errno == EEXIST) return TR_OK;
    return tr_fail(err, TR_E_IO, "%s: %s", path, strerror(errno));
}

/* The name of this rank's, or of this node's, file in the run's folder. */
static void file_name(const tr_run_profile *r, const char *kind, int number, char *path, size_t n)
{
    snprintf(path, n, "%s.d/%s/%s%05d.h5", r->began.file, r->began.run, kind, number);
}

/* FILE.d/RUN, by those who write to it. */
static tr_status make_folders(tr_run_profile *r, tr_err *err)
{
    const char *file = r->began.file, *slash = strrchr(file, '/');
    char path[4096];

    if (!*file)
        return tr_fail(err, TR_E_IO, "--profile %s: %s", r->o->profile,
                       r->world->rank == 0 ? "its folder cannot be named, or its path is too long"
                                           : "rank 0 cannot name its folder");
    if (asprintf(&r->folder, "%s.d/%s", slash ? slash + 1 : file, r->began.run) < 0) {
        r->folder = NULL;
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    if (r->by_node && r->world->local_rank > 0) return TR_OK;
    snprintf(path, sizeof path, "%s.d", file);
    tr_status st = make_folder(path, err);
    snprintf(path, sizeof path, "%s.d/%s", file, r->began.run);
    return st == TR_OK ? make_folder(path, err) : st;
}

/* Where this rank writes. */
static tr_status place_file(tr_run_profile *r, char *path, size_t n, tr_err *err)
{
    tr_status st = make_folders(r, err);

    if (st != TR_OK) return st;
    if (!r->by_node)
        file_name(r, "rank", r->world->rank, path, n);
    else if (*r->scratch)
        snprintf(path, n, "%s/rank%05d.h5", r->scratch, r->world->rank);
    else
        st = tr_fail(err, TR_E_IO, "rank %d, the first of this node, has no folder for its ranks",
                     r->world->node_first);
    return st;
}

/* All there is of this node's ranks, by its leader: after a flush, and at the end. */
static tr_status write_node(tr_run_profile *r, bool whole)
{
    char path[4096];
    tr_err why;
    const size_t n = sizeof path - sizeof ".part";

    file_name(r, "node", r->world->node_first, path, n);
    if (!whole) strcat(path, ".part"); /* fits: room was kept */
    tr_status st = tr_profile_node_write(r->scratch, path, &why);
    if (st == TR_OK && whole) {
        strcat(path, ".part");
        remove(path);
    }
    if (st != TR_OK && !r->node_failed)
        tr_log_warn(r->log, "the profile of node %s: %s; its ranks' files are in %s",
                    r->world->host, why.text, r->scratch);
    r->node_failed = r->node_failed || st != TR_OK;
    return st;
}

/* The profile's thread. */
static void see_copy(void *ctx)
{
    write_node(ctx, false);
}

static tr_status make_profile(tr_run_profile *r, tr_err *err)
{
    const tr_config *c = &r->opened->config;
    char path[4096];
    tr_profile_options o = {
        .path = path,
        .flush_s = (double)r->o->profile_flush,
        .sample_s = SAMPLE_S,
        .clock_offset_ns = r->clock.offset_ns,
        .origin_ns = (int64_t)r->began.origin_ns,
        .world = r->world->size,
        .n_layers = c->num_hidden_layers,
        .n_experts = c->n_routed_experts,
        .n_comm = GROUPS * TR_COMM_N_OPS,
        .n_matrices = GROUPS,
        .trace = r->o->profile_trace,
        .events_max = EVENTS_MAX,
        .clear = r->by_node,
        .log = r->log,
        .ctx = r,
        .copied = r->by_node && r->world->local_rank == 0 ? see_copy : NULL,
        .sample = give_sample,
        .tables = give_tables,
        .rank_tokens = give_rank_tokens,
    };

    for (int i = 0; i < GROUPS; i++) {
        tr_grid_group group;
        comm_of(r, i, &group);
        o.matrix[i] = tr_grid_group_name(group);
    }
    tr_status st = place_file(r, path, sizeof path, err);
    return st == TR_OK ? tr_profile_create(&r->profile, &o, err) : st;
}

/* --profile from the root. As the shell names the folder where it does, for what lies behind an automounter's links; "" where
 * it is too long, or its folder has gone. */
static void name_file(beginning *b, const char *file)
{
    char *here = *file == '/' ? NULL : get_current_dir_name();
    const int n =
        snprintf(b->file, sizeof b->file, "%s%s%s", here ? here : "", here ? "/" : "", file);

    if (n < 0 || n >= (int)sizeof b->file || *b->file != '/') *b->file = '\0';
    free(here);
}

/* A folder of the node for its ranks' files; a failure leaves scratch "", and every rank says so. */
static tr_status tell_scratch(tr_run_profile *r, tr_err *err)
{
    tr_err why;

    if (!r->by_node) return TR_OK;
    if (r->world->local_rank == 0 &&
        tr_profile_scratch_make(r->scratch, sizeof r->scratch, &why) != TR_OK) {
        tr_log_warn(r->log, "the profile of node %s: %s", r->world->host, why.text);
        *r->scratch = '\0';
    }
    tr_status st = tr_world_tell_host(r->world, r->scratch, (int)sizeof r->scratch, err);
    r->scratch[sizeof r->scratch - 1] = '\0';
    return st;
}

static tr_status take_part(tr_run_profile *r, tr_err *err)
{
    const char *files = r->o->profile_files ? r->o->profile_files : "auto";

    if (r->world->rank == 0) {
        name_run(&r->began);
        name_file(&r->began, r->o->profile);
    }
    tr_status st = tr_world_tell(r->world, &r->began, (int)sizeof r->began, err);
    r->began.run[RUN_BYTES - 1] = '\0';
    r->began.file[FILE_BYTES - 1] = '\0';
    r->by_node = strcmp(files, "node") == 0 ||
                 (strcmp(files, "auto") == 0 && r->world->size > TR_PROFILE_RANK_FILES);
    if (st == TR_OK) st = tell_scratch(r, err);
    if (st == TR_OK) st = tr_clock_measure(&r->clock, r->world, err);
    r->begun_ns = tr_now_ns();
    return st;
}

/* The device has been chosen and is opened later; one rank alone finds out then what auto is. */
static bool may_use_gpu(const tr_run_profile *r)
{
#ifdef HAVE_CUDA
    return strcmp(r->opened->device_name, "cpu") != 0;
#else
    (void)r;
    return false;
#endif
}

tr_status tr_run_profile_begin(tr_run_profile *r, const char *model_name, const char *kv_dtype,
                               tr_err *err)
{
    tr_err why;

    if (!r) return TR_OK;
    tr_status st = take_part(r, err);
    if (st != TR_OK) return st;
    if (make_profile(r, &why) != TR_OK) {
        fprintf(stderr, "trireme: rank %d on %s: no profile: %s\n", r->world->rank, r->world->host,
                why.text);
        return TR_OK;
    }
    tr_profile_stream(r->profile, &r->opened->regions);
    tr_profile_stream(r->profile, &r->read_regions);
    tr_profile_stream(r->profile, &r->write_regions);
    if (may_use_gpu(r)) r->nvml = tr_nvml_open(r->world->local_rank);
    tr_nvml_identity(r->nvml, r->gpu.uuid, r->gpu.pci);
    tr_nvml_driver(r->nvml, r->gpu.driver);
    const tr_profile_about about = {.run_id = r->began.run,
                                    .unix_ns = r->began.unix_ns,
                                    .clock = r->clock,
                                    .gpu = &r->gpu,
                                    .options = r->o,
                                    .world = r->world,
                                    .opened = r->opened,
                                    .model_name = model_name,
                                    .kv_dtype = kv_dtype};
    tr_profile_describe(r->profile, &about);
    if (r->papi) {
        const tr_profile_counters counters = tr_papi_counters(r->papi);
        tr_profile_counter(r->profile, &counters);
        tr_profile_text(r->profile, "/counters/papi", "threads",
                        tr_papi_inherits(r->papi) ? "all" : "main");
    }
    if (r->nvml) {
        const tr_profile_counters counters = tr_nvml_counters(r->nvml);
        tr_profile_counter(r->profile, &counters);
    }
    tr_profile_start(r->profile);
    return TR_OK;
}

void tr_run_profile_engine(tr_run_profile *r, tr_engine *engine)
{
    tr_err why;

    if (!r || !r->profile) return;
    r->weights = r->opened->weights->bytes;
    r->kv = tr_model_cache_bytes(r->opened->model);
    r->workspace = tr_model_workspace_bytes(r->opened->model);
    atomic_store(&r->engine, engine);
    if (tr_model_time(r->opened->model, TR_TIME_EVERY, &why) != TR_OK)
        tr_log_warn(r->log, "the profile has no times of the GPU: %s", why.text);
    tr_engine_observe(engine, (tr_engine_observer){.ctx = r, .begin = see_begin, .step = see_step});
}

void tr_run_profile_job(tr_run_profile *r, tr_job_options *job)
{
    if (!r || !r->profile) return;
    job->read_regions = &r->read_regions;
    job->write_regions = &r->write_regions;
    job->seen = see_event;
    job->seen_ctx = r;
}

/* ---- end -------------------------------------------------------------------------------------------------------------------- */

/* /io/load: what each shard gave this rank. */
static void put_load(tr_run_profile *r)
{
    const tr_checkpoint *c = r->opened->checkpoint;
    const uint64_t n = c ? tr_checkpoint_shards(c) : 0, dims[] = {1, n};

    if (!n) return;
    tr_prof_load *load = tr_calloc(n, sizeof *load);
    if (!load) return;
    for (size_t i = 0; i < n; i++) {
        const char *name = tr_checkpoint_shard_use(c, i, &load[i].bytes, &load[i].ns);
        snprintf(load[i].file, sizeof load[i].file, "%s", name);
    }
    tr_profile_put(r->profile, TR_D_LOAD, dims, load);
    free(load);
}

static void stop(tr_run_profile *r)
{
    int64_t lost = -1;

    if (r->opened->model) {
        tr_model_time(r->opened->model, 0, NULL);
        lost = tr_model_times_lost(r->opened->model);
    }
    tr_papi_begin(r->papi, TR_PHASE_NONE, tr_now_ns());
    tr_regions_cut(&r->opened->regions);
    tr_regions_cut(&r->read_regions);
    tr_regions_cut(&r->write_regions);
    tr_profile_stop(r->profile);
    put_load(r);
    if (lost >= 0) tr_profile_number(r->profile, "/", "gpu_times_lost", lost);
    const tr_profile_costs c = tr_profile_costs_get(r->profile);
    if (r->profile)
        tr_log_debug(r->log,
                     "profile: %ju flushes of %.1f ms, the longest %.1f ms; %.3f s of CPU time; "
                     "%ju steps, %ju events not kept",
                     (uintmax_t)c.flushes,
                     c.flushes ? (double)c.flush_ns / (double)c.flushes * 1e-6 : 0.0,
                     (double)c.longest_ns * 1e-6, (double)c.cpu_ns * 1e-9, (uintmax_t)c.lost_steps,
                     (uintmax_t)c.lost_events);
}

/* Every rank's file is closed: all may read all. */
static tr_status barrier(tr_run_profile *r, tr_err *err)
{
    uint64_t word = 0;
    return tr_comm_max_word(r->opened->control, &word, err);
}

/* What two measurements cannot tell from no drift at all is none. */
static double drift_ppb(const tr_clock_offset *before, const tr_clock_offset *after)
{
    const double ns = (double)(after->at_ns - before->at_ns),
                 gained = (double)(after->offset_ns - before->offset_ns),
                 unsure = (double)(before->rtt_ns + after->rtt_ns) / 2;

    return ns > 0 && (gained > unsure || gained < -unsure) ? gained / ns * 1e9 : 0;
}

/* This rank's end of a run that the others may not reach. */
static void close_alone(tr_run_profile *r)
{
    tr_profile_close(r->profile, false);
    r->profile = NULL;
    if (!r->by_node || r->world->local_rank > 0 || !*r->scratch) return;
    if (write_node(r, false) == TR_OK)
        tr_log_warn(r->log, "profile: what this node's ranks have written last is in %s",
                    r->scratch);
}

static bool has_folder(const tr_run_profile *r)
{
    char *path;

    if (asprintf(&path, "%s.d/%s", r->began.file, r->began.run) < 0) return true;
    const bool is = access(path, F_OK) == 0;
    free(path);
    return is;
}

/* Every rank's file is closed: node's files of them, and one over all. */
static tr_status bring_together(tr_run_profile *r, tr_err *err)
{
    tr_err why;

    if (r->by_node) {
        if (r->world->local_rank == 0 && *r->scratch && write_node(r, true) == TR_OK)
            tr_profile_scratch_remove(r->scratch);
        tr_status st = barrier(r, err);
        if (st != TR_OK) return st;
    }
    if (r->world->rank != 0 || !r->folder) return TR_OK;
    if (!has_folder(r)) return TR_OK; /* no rank has made one, and each has said why */
    if (tr_profile_join(r->began.file, r->folder, r->world->size, &why) != TR_OK)
        tr_log_warn(r->log, "no joined profile: %s; the ranks' files are in %s.d", why.text,
                    r->began.file);
    return TR_OK;
}

tr_status tr_run_profile_end(tr_run_profile *r, bool whole, tr_err *err)
{
    tr_clock_offset clock;

    if (!r) return TR_OK;
    stop(r);
    if (!whole) {
        close_alone(r);
        return TR_OK;
    }
    tr_status st = tr_clock_measure(&clock, r->world, err);
    const double drift = st == TR_OK ? drift_ppb(&r->clock, &clock) : 0;
    if (st == TR_OK)
        st = tr_profile_settle(r->profile, r->opened->control, drift, r->clock.at_ns, err);
    if (st == TR_OK)
        tr_profile_describe_rank(r->profile, r->world, r->opened, &r->gpu, &r->clock, drift);
    tr_profile_close(r->profile, st == TR_OK);
    r->profile = NULL;
    if (st == TR_OK) st = barrier(r, err);
    return st == TR_OK ? bring_together(r, err) : st;
}

void tr_run_profile_free(tr_run_profile *r)
{
    if (!r) return;
    tr_profile_close(r->profile, false);
    tr_papi_close(r->papi);
    tr_sde_close(r->sde);
    tr_nvml_close(r->nvml);
    tr_regions_prune(&r->opened->regions);
    tr_regions_prune(&r->read_regions);
    tr_regions_prune(&r->write_regions);
    free(r->folder);
    free(r);
}
