#include <config.h>

#include "command/bench_record.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/clock.h"
#include "command/options.h"
#include "command/profile_run.h"
#include "profile/nvml.h"

enum { NODES_MAX = 4096, SAMPLE_S = 1 };

struct tr_bench_record {
    tr_bench_record_options o;
    tr_opened *opened;
    tr_profile *profile;
    tr_nvml *nvml; /* NULL: the bench computes on the CPU, or there is none */
    tr_profile_gpu gpu;
    tr_world world; /* of one */
    uint64_t n_steps;
    uint64_t weights, kv, workspace; /* bytes */
};

/* ---- what the profile asks for ---------------------------------------------------------------------------------------- */

static void give_rank_tokens(void *ctx, uint64_t *per_layer)
{
    const tr_bench_record *r = ctx;
    tr_profile_rank_tokens(r->opened, per_layer);
}

static void give_tables(void *ctx, tr_profile_tables *out)
{
    const tr_bench_record *r = ctx;
    tr_profile_show_model(r->opened, out);
    tr_profile_rank_tokens(r->opened, out->rank_tokens);
}

/* The profile's thread. */
static void give_sample(void *ctx, tr_prof_kv *kv, tr_prof_memory *memory)
{
    const tr_bench_record *r = ctx;
    (void)kv; /* nothing is looked for in the cache */
    memory->weights = r->weights;
    memory->kv = r->kv;
    memory->workspace = r->workspace;
    memory->free = r->opened->ops->memory_left(r->opened->device);
}

/* ---- beginning and end --------------------------------------------------------------------------------------------------- */

static tr_status make_profile(tr_bench_record *r, tr_err *err)
{
    const tr_profile_options o = {
        .path = r->o.file,
        .flush_s = r->o.flush_s,
        .sample_s = SAMPLE_S,
        .origin_ns = (int64_t)tr_now_ns(),
        .world = 1,
        .n_layers = r->opened->config.num_hidden_layers,
        .n_experts = r->opened->config.n_routed_experts,
        .log = r->o.log,
        .ctx = r,
        .sample = give_sample,
        .tables = give_tables,
        .rank_tokens = give_rank_tokens,
    };
    return tr_profile_create(&r->profile, &o, err);
}

static void describe(tr_bench_record *r)
{
    struct timespec now;
    const tr_batch_options options = {.device = r->o.device ? r->o.device : "auto",
                                      .model = r->o.model};
    const char *slash = strrchr(r->o.model, '/');

    clock_gettime(CLOCK_REALTIME, &now);
    const tr_profile_about about = {.run_id = "bench",
                                    .unix_ns = (int64_t)now.tv_sec * 1000000000 + now.tv_nsec,
                                    .gpu = &r->gpu,
                                    .options = &options,
                                    .world = &r->world,
                                    .opened = r->opened,
                                    .model_name = slash && slash[1] ? slash + 1 : r->o.model,
                                    .kv_dtype = r->o.kv_dtype};
    tr_profile_describe(r->profile, &about);
}

static void count(tr_bench_record *r)
{
    if (r->o.papi) {
        const tr_profile_counters counters = tr_papi_counters(r->o.papi);
        tr_profile_counter(r->profile, &counters);
        tr_profile_text(r->profile, "/counters/papi", "threads",
                        tr_papi_inherits(r->o.papi) ? "all" : "main");
    }
    if (r->nvml) {
        const tr_profile_counters counters = tr_nvml_counters(r->nvml);
        tr_profile_counter(r->profile, &counters);
    }
}

tr_status tr_bench_record_begin(tr_bench_record **out, const tr_bench_record_options *options,
                                tr_opened *opened, tr_err *err)
{
    tr_status st = TR_OK;
    tr_bench_record *r = calloc(1, sizeof *r);

    *out = NULL;
    if (!r) return tr_fail(err, TR_E_MEMORY, "out of memory");
    r->o = *options;
    r->opened = opened;
    r->world = (tr_world){.size = 1, .local_size = 1};
    if (gethostname(r->world.host, sizeof r->world.host - 1) != 0) r->world.host[0] = '\0';
    r->weights = opened->weights->bytes;
    r->kv = tr_model_cache_bytes(opened->model);
    r->workspace = tr_model_workspace_bytes(opened->model);
    if (!tr_regions_grow(&opened->regions, "main", NODES_MAX)) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory for regions");
        goto done;
    }
    st = make_profile(r, err);
    if (st != TR_OK) goto done;
    tr_profile_stream(r->profile, &opened->regions);
    if (!(opened->ops->caps & TR_CAP_HOST)) r->nvml = tr_nvml_open(0);
    tr_nvml_identity(r->nvml, r->gpu.uuid, r->gpu.pci);
    tr_nvml_driver(r->nvml, r->gpu.driver);
    describe(r);
    count(r);
    st = tr_model_time(opened->model, TR_TIME_EVERY, err);
    if (st != TR_OK) goto done;
    tr_profile_start(r->profile);
    *out = r;
    r = NULL;

done:
    if (r) tr_bench_record_end(r, NULL, NULL);
    return st;
}

void tr_bench_record_plan(tr_bench_record *r, const tr_plan *plan, uint64_t t0_ns)
{
    if (!r) return;
    tr_profile_begin_step(r->profile, r->n_steps + 1);
    tr_papi_begin(r->o.papi, tr_plan_phase(plan), t0_ns);
}

void tr_bench_record_step(tr_bench_record *r, const tr_plan *plan, uint64_t t0_ns, uint64_t t1_ns)
{
    if (!r) return;
    const tr_phase phase = tr_plan_phase(plan);
    tr_prof_step s = {.step = ++r->n_steps,
                      .t0 = tr_profile_time(r->profile, t0_ns),
                      .t1 = tr_profile_time(r->profile, t1_ns),
                      .mode = (uint8_t)phase,
                      .nreq = (uint32_t)plan->n_spans};

    for (int i = 0; i < plan->n_spans; i++) {
        const tr_span *span = &tr_plan_spans(plan)[i];
        *(span->kind == TR_SPAN_PREFILL ? &s.tok_prefill : &s.tok_decode) += (uint32_t)span->n_rows;
    }
    tr_device_step device;
    if (tr_model_step_time(r->opened->model, plan->step, &device)) {
        s.gpu_ns = device.ns;
        s.graph = device.recorded;
    }
    tr_papi_step(r->o.papi, phase, t1_ns);
    tr_profile_step(r->profile, &s);
}

tr_status tr_bench_record_end(tr_bench_record *r, tr_profile_costs *costs, tr_err *err)
{
    tr_status st = TR_OK;

    if (costs) *costs = (tr_profile_costs){0};
    if (!r) return TR_OK;
    tr_model_time(r->opened->model, 0, NULL);
    tr_papi_begin(r->o.papi, TR_PHASE_NONE, tr_now_ns());
    tr_regions_cut(&r->opened->regions);
    tr_profile_stop(r->profile);
    const int64_t lost = tr_model_times_lost(r->opened->model);
    if (lost >= 0) tr_profile_number(r->profile, "/", "gpu_times_lost", lost);
    if (costs) *costs = tr_profile_costs_get(r->profile);
    if (!tr_profile_well(r->profile))
        st = tr_fail(err, TR_E_IO, "--profile %s: it was not written to its end", r->o.file);
    tr_profile_close(r->profile, true);
    tr_nvml_close(r->nvml);
    tr_regions_prune(&r->opened->regions);
    free(r);
    return st;
}
