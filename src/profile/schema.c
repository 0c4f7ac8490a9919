#include <config.h>

#include "profile/schema.h"

#include <stdio.h>
#include <string.h>

#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))
/* clang-format off */
#define NAMES(list) {list, COUNT(list)}
/* clang-format on */

/* ---- names of numbers ------------------------------------------------------------------------------------------- */

static const char *const kinds[] = {"HOST",  "KERNEL", "COMM", "WAIT",
                                    "PHASE", "LAYER",  "STEP", "IO"};
static const char *const phases[] = {"prefill", "decode", "verify", "draft", "idle"};
/* In the order of tr_comm_op (mpi/comm.h); tests/test_profile_schema.c compares. */
static const char *const comm_ops[] = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all",
                                       "send",       "recv",       "broadcast",      "all_max"};
static const char *const finishes[] = {"stop", "length", "failed"};
static const char *const dtypes[] = {"bytes", "f32", "u64"};

const tr_names tr_kind_names = NAMES(kinds);
const tr_names tr_phase_names = NAMES(phases);
const tr_names tr_comm_op_names = NAMES(comm_ops);
const tr_names tr_finish_names = NAMES(finishes);
const tr_names tr_dtype_names = NAMES(dtypes);

/* ---- records ------------------------------------------------------------------------------------------------------ */

/* clang-format off */
#define FIELD(type, member, kind, units, long_name) \
    {#member, TR_FIELD_##kind, offsetof(type, member), sizeof(((type *)0)->member), units, long_name, NULL, false}
#define MOMENT(type, member, long_name) \
    {#member, TR_FIELD_I8, offsetof(type, member), sizeof(int64_t), "ns", long_name, NULL, true}
#define CODE(type, member, names, long_name) \
    {#member, TR_FIELD_ENUM, offsetof(type, member), 1, "1", long_name, &names, false}

#define F(member, kind, units, long_name) FIELD(tr_prof_rank, member, kind, units, long_name)
static const tr_field rank_fields[] = {
    F(rank,            I4,    "1",   "rank in the world"),
    F(pp,              I2,    "1",   "pipeline stage"),
    F(dp,              I2,    "1",   "replica of the attention"),
    F(cp,              I2,    "1",   "place in the context-parallel group"),
    F(tp,              I2,    "1",   "place in the tensor-parallel group"),
    F(mdp,             I2,    "1",   "replica of the experts"),
    F(ep,              I2,    "1",   "place in the expert-parallel group"),
    F(xt,              I2,    "1",   "place among the ranks that share an expert"),
    F(node,            I4,    "1",   "lowest rank of its node"),
    F(local,           I2,    "1",   "rank within the node"),
    F(numa,            I2,    "1",   "NUMA node of its threads, -1: not known"),
    F(host,            CHARS, "1",   "host name"),
    F(gpu_uuid,        CHARS, "1",   "GPU, empty on the CPU"),
    F(pci,             CHARS, "1",   "PCI address of the GPU"),
    F(clock_offset_ns, I8,    "ns",  "added to the rank's own clock to get rank 0's, at the start"),
    F(clock_drift_ppb, F8,    "1e-9", "how fast the offset grows"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_group, member, kind, units, long_name)
static const tr_field group_fields[] = {
    F(id,   I2,    "1", "kind of group"),
    F(name, CHARS, "1", "name of that kind"),
    F(size, I4,    "1", "members"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_region, member, kind, units, long_name)
static const tr_field region_fields[] = {
    F(id,     U4,    "1", "row in this table"),
    F(parent, I4,    "1", "row of the region it lies in, -1: the root of a stream"),
    F(name,   CHARS, "1", "name; of a root, the stream's"),
    CODE(tr_prof_region, kind, tr_kind_names, "kind"),
    F(depth,  U1,    "1", "regions above it"),
    F(layer,  I2,    "1", "layer of the model, -1: none"),
    F(group,  I2,    "1", "kind of group that communicates, -1: none"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_step, member, kind, units, long_name)
static const tr_field step_fields[] = {
    F(step,         U8, "1",        "number of the step, the same on all ranks"),
    MOMENT(tr_prof_step, t0, "its plan was there"),
    MOMENT(tr_prof_step, t1, "its results were there"),
    F(gpu_ns,       U8, "ns",       "time on the GPU, 0: not measured"),
    CODE(tr_prof_step, mode, tr_phase_names, "what it does"),
    F(graph,        U1, "1",        "replayed from a graph"),
    F(nreq,         U4, "requests", "spans: choices that take part"),
    F(tok_prefill,  U4, "tokens",   "rows of prompts"),
    F(tok_decode,   U4, "tokens",   "rows of generated tokens"),
    F(tok_padded,   U4, "tokens",   "rows without a token"),
    F(accepted,     U4, "tokens",   "drafts accepted"),
    F(drafted,      U4, "tokens",   "drafts verified"),
    F(tier,         U1, "1",        "exchange used for the experts"),
    F(pages_used,   U4, "pages",    "cache pages held or remembered, all replicas (leader)"),
    F(pages_free,   U4, "pages",    "cache pages without content, all replicas (leader)"),
    F(queue,        U4, "requests", "waiting requests, all replicas (leader)"),
    F(sync_wait_ns, U8, "ns",       "waited for other ranks in communicators"),
    F(plan_ns,      U8, "ns",       "planned, or waited for the plan"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_request, member, kind, units, long_name)
static const tr_field request_fields[] = {
    F(id,         U8, "1",      "number in the order of completion"),
    F(line,       U8, "1",      "line of the input"),
    F(dp,         I2, "1",      "replica that ran it, -1: none did"),
    MOMENT(tr_prof_request, t_arrive, "submitted"),
    MOMENT(tr_prof_request, t_first,  "first token, t_done where there was none"),
    MOMENT(tr_prof_request, t_done,   "finished"),
    F(n_prompt,   U4, "tokens", "tokens of the prompt"),
    F(n_cached,   U4, "tokens", "of these, found in the cache"),
    F(n_out,      U4, "tokens", "tokens generated, all choices"),
    F(n_drafted,  U4, "tokens", "drafts verified"),
    F(n_accepted, U4, "tokens", "drafts accepted"),
    F(chunks,     U2, "1",      "steps in which its prompt was computed"),
    F(itl_p50_ns, U4, "ns",     "time between tokens, median, within an eighth"),
    F(itl_p99_ns, U4, "ns",     "the same, 99th percentile"),
    CODE(tr_prof_request, finish, tr_finish_names, "how it ended"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_comm, member, kind, units, long_name)
static const tr_field comm_fields[] = {
    F(region,     U4, "1",     "row of a region of this operation, 0xffffffff: none"),
    F(group,      I2, "1",     "kind of group"),
    CODE(tr_prof_comm, op,    tr_comm_op_names, "operation"),
    CODE(tr_prof_comm, dtype, tr_dtype_names,   "type of the numbers"),
    F(calls,      U8, "1",     "operations begun"),
    F(bytes,      U8, "bytes", "given by this rank"),
    F(time_ns,    U8, "ns",    "from begin to end, as far as the end was noticed"),
    F(exposed_ns, U8, "ns",    "waited for"),
    F(min_ns,     U8, "ns",    "shortest"),
    F(max_ns,     U8, "ns",    "longest"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_overlap, member, kind, units, long_name)
static const tr_field overlap_fields[] = {
    F(gatherK_ns,  U8, "ns",    "index keys under way"),
    F(gatherL_ns,  U8, "ns",    "latents under way"),
    F(exposedK_ns, U8, "ns",    "waited for index keys"),
    F(exposedL_ns, U8, "ns",    "waited for latents"),
    F(bytes,       U8, "bytes", "given by this rank"),
    F(calls,       U8, "1",     "steps with an exchange"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_kv, member, kind, units, long_name)
static const tr_field kv_fields[] = {
    MOMENT(tr_prof_kv, t, "when"),
    F(hits,     U8, "tokens", "of prompts, found in the cache so far"),
    F(misses,   U8, "tokens", "of prompts, not found so far"),
    F(evicted,  U8, "pages",  "forgotten so far"),
    F(host_in,  U8, "bytes",  "brought back from host memory so far"),
    F(host_out, U8, "bytes",  "moved to host memory so far"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_memory, member, kind, units, long_name)
static const tr_field memory_fields[] = {
    MOMENT(tr_prof_memory, t, "when"),
    F(weights,   U8, "bytes", "weights of this rank"),
    F(kv,        U8, "bytes", "cache of this rank"),
    F(nccl,      U8, "bytes", "buffers of the communicators, 0: not known"),
    F(workspace, U8, "bytes", "workspace of the steps"),
    F(free,      U8, "bytes", "left on the device, or available on the host"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_trace, member, kind, units, long_name)
static const tr_field trace_fields[] = {
    F(region, U4, "1",     "row of the region"),
    F(step,   U4, "1",     "step, 0xffffffff: outside steps"),
    MOMENT(tr_prof_trace, t0, "begin"),
    F(dur,    U4, "ns",    "duration"),
    F(bytes,  U4, "bytes", "bytes moved"),
};
#undef F
#define F(member, kind, units, long_name) FIELD(tr_prof_load, member, kind, units, long_name)
static const tr_field load_fields[] = {
    F(file,  CHARS, "1",     "shard"),
    F(bytes, U8,    "bytes", "read from it"),
    F(ns,    U8,    "ns",    "time in read"),
};
#undef F
#define RECORD(type, fields) {#type, sizeof(type), fields, COUNT(fields)}
/* clang-format on */

static const tr_record_type rank_record = RECORD(tr_prof_rank, rank_fields);
static const tr_record_type group_record = RECORD(tr_prof_group, group_fields);
static const tr_record_type region_record = RECORD(tr_prof_region, region_fields);
static const tr_record_type step_record = RECORD(tr_prof_step, step_fields);
static const tr_record_type request_record = RECORD(tr_prof_request, request_fields);
static const tr_record_type comm_record = RECORD(tr_prof_comm, comm_fields);
static const tr_record_type overlap_record = RECORD(tr_prof_overlap, overlap_fields);
static const tr_record_type kv_record = RECORD(tr_prof_kv, kv_fields);
static const tr_record_type memory_record = RECORD(tr_prof_memory, memory_fields);
static const tr_record_type trace_record = RECORD(tr_prof_trace, trace_fields);
static const tr_record_type load_record = RECORD(tr_prof_load, load_fields);

/* ---- datasets ----------------------------------------------------------------------------------------------------- */

#define RANK   TR_AXIS_RANK
#define REGION TR_AXIS_REGION
#define GROWS  TR_DATASET_GROWS
#define LEADER TR_DATASET_LEADER
#define PHASES TR_DATASET_PHASES
#define NAMED  TR_DATASET_NAMED
#define SUM    TR_DATASET_SUM

/* clang-format off */
const tr_dataset tr_datasets[TR_N_DATASETS] = {
    [TR_D_ENV]      = {"/run/env", NULL, TR_FIELD_TEXT, {TR_AXIS_LINE, TR_AXIS_PAIR}, LEADER,
                       "1", "environment variables that matter to the run"},
    [TR_D_RANKS]    = {"/grid/ranks", &rank_record, 0, {RANK}, 0,
                       "", "ranks: coordinates, place, clock"},
    [TR_D_GROUPS]   = {"/grid/groups", &group_record, 0, {TR_AXIS_GROUP}, LEADER,
                       "", "groups that communicate"},
    [TR_D_MEMBERS]  = {"/grid/members", NULL, TR_FIELD_LIST, {TR_AXIS_GROUP}, LEADER,
                       "1", "world ranks of each group"},
    [TR_D_REGIONS]  = {"/regions", &region_record, 0, {REGION}, 0,
                       "", "tree of regions, the same on all ranks of a joined file"},
    [TR_D_COUNT]    = {"/profile/count", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "1", "times a region was entered"},
    [TR_D_TIME_INCL]  = {"/profile/time_incl", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "ns", "time in a region and all within it"},
    [TR_D_TIME_EXCL]  = {"/profile/time_excl", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "ns", "time in a region itself; sums up to the stream's time"},
    [TR_D_TIME_MIN]   = {"/profile/time_min", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "ns", "shortest inclusive time"},
    [TR_D_TIME_MAX]   = {"/profile/time_max", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "ns", "longest inclusive time"},
    [TR_D_TIME_SUMSQ] = {"/profile/time_sumsq", NULL, TR_FIELD_F8, {RANK, REGION}, PHASES,
                       "ns^2", "sum of squared inclusive times"},
    [TR_D_BYTES]    = {"/profile/bytes", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "bytes", "bytes moved, where the operation knows"},
    [TR_D_FLOPS]    = {"/profile/flops", NULL, TR_FIELD_F8, {RANK, REGION}, PHASES,
                       "1", "floating-point operations, where the operation knows"},
    [TR_D_EXPOSED]  = {"/profile/exposed", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "ns", "time in which communication held computation up"},
    [TR_D_GPU_NS]   = {"/profile/gpu_ns", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "ns", "time on the GPU, of the calls that were timed there"},
    [TR_D_GPU_COUNT] = {"/profile/gpu_count", NULL, TR_FIELD_U8, {RANK, REGION}, PHASES,
                       "1", "calls that were timed on the GPU: less than count where they were sampled"},
    [TR_D_STEPS]    = {"/steps", &step_record, 0, {RANK, TR_AXIS_STEP}, GROWS,
                       "", "one row per step"},
    [TR_D_REQUESTS] = {"/requests", &request_record, 0, {TR_AXIS_REQUEST}, GROWS | LEADER,
                       "", "one row per finished request"},
    [TR_D_COMM_OPS] = {"/comm/ops", &comm_record, 0, {RANK, TR_AXIS_COMM}, 0,
                       "", "communicators, by group and operation"},
    [TR_D_COMM_MATRIX] = {"/comm/matrix", NULL, TR_FIELD_U8, {RANK, TR_AXIS_PEER}, NAMED,
                       "bytes", "bytes sent from rank (row) to rank (column), by kind of group"},
    [TR_D_OVERLAP_CP] = {"/overlap/cp", &overlap_record, 0, {RANK, TR_AXIS_LAYER}, 0,
                       "", "context parallelism: gathers of keys and latents, by layer"},
    [TR_D_EXPERT_TOKENS] = {"/moe/expert_tokens", NULL, TR_FIELD_U8, {TR_AXIS_LAYER, TR_AXIS_EXPERT}, SUM,
                       "tokens", "rows computed by each expert"},
    [TR_D_RANK_TOKENS] = {"/moe/rank_tokens", NULL, TR_FIELD_U8, {RANK, TR_AXIS_LAYER}, 0,
                       "tokens", "rows computed by the experts of a rank"},
    [TR_D_WINDOW_TOKENS] = {"/moe/window_tokens", NULL, TR_FIELD_U8, {RANK, TR_AXIS_WINDOW, TR_AXIS_LAYER}, 0,
                       "tokens", "rank_tokens, by windows of equally many steps (attribute window_steps)"},
    [TR_D_BALANCE]  = {"/moe/balance", NULL, TR_FIELD_F4, {TR_AXIS_WINDOW, TR_AXIS_LAYER}, LEADER,
                       "1", "mean over ranks of window_tokens, divided by the largest"},
    [TR_D_KV]       = {"/kv", &kv_record, 0, {RANK, TR_AXIS_SAMPLE}, GROWS,
                       "", "use of the cache (leader: of all replicas)"},
    [TR_D_MEMORY]   = {"/memory", &memory_record, 0, {RANK, TR_AXIS_SAMPLE}, GROWS,
                       "", "memory"},
    [TR_D_COUNTER]  = {"/counters", NULL, TR_FIELD_F8, {RANK, TR_AXIS_SAMPLE}, GROWS | NAMED,
                       "1", "counters as <source>/<name>; no sample and attribute absent: why it cannot be counted"},
    [TR_D_COUNTER_TIME] = {"/counters/*/time", NULL, TR_FIELD_I8, {RANK, TR_AXIS_SAMPLE},
                       GROWS | TR_DATASET_TIME, "ns", "when the counters of a source were sampled; PAPI's are then read at most 50 ms and a step before"},
    [TR_D_PHASE_COUNTER] = {"/phase/*/counters", NULL, TR_FIELD_F8, {RANK}, NAMED,
                       "1", "counters while a phase lasted, from the begin of a step to that of one of another phase, as <source>/<name>; NaN: absent"},
    [TR_D_TRACE]    = {"/trace", &trace_record, 0, {RANK, TR_AXIS_EVENT}, GROWS | NAMED,
                       "", "single regions of a stream, in the order of their ends (attribute dropped: not kept)"},
    [TR_D_LOAD]     = {"/io/load", &load_record, 0, {RANK, TR_AXIS_FILE}, 0,
                       "", "shards read"},
    [TR_D_LOG]      = {"/log", NULL, TR_FIELD_TEXT, {TR_AXIS_LINE}, GROWS,
                       "1", "warnings; joined: of all ranks"},
};

static const char *const axes[TR_N_AXES] = {
    "", "rank", "region", "step", "request", "group", "comm", "peer", "layer", "expert", "window", "sample", "event",
    "file", "line", "pair",
};
/* clang-format on */

int tr_dataset_axes(const tr_dataset *d)
{
    int n = 0;
    while (n < TR_DATASET_AXES && d->axis[n] != TR_AXIS_NONE)
        n++;
    return n;
}

const char *tr_axis_name(tr_axis axis)
{
    return axes[axis];
}

const char *tr_dataset_phase_path(char *text, size_t n, const tr_dataset *d, tr_phase phase)
{
    snprintf(text, n, "/phase/%s%s", phases[phase], strrchr(d->path, '/'));
    return text;
}

/* "/phase/decode/rest" gives 1 and "/rest"; -1: some other path. */
static int phase_of(const char *path, const char **rest)
{
    const char head[] = "/phase/";

    if (strncmp(path, head, sizeof head - 1) != 0) return -1;
    path += sizeof head - 1;
    for (int i = 0; i < COUNT(phases); i++) {
        size_t n = strlen(phases[i]);
        if (strncmp(path, phases[i], n) == 0 && path[n] == '/') {
            *rest = path + n;
            return i;
        }
    }
    return -1;
}

static bool lies_in(const char *path, const char *folder)
{
    size_t n = strlen(folder);
    return strncmp(path, folder, n) == 0 && path[n] == '/' && path[n + 1];
}

const tr_dataset *tr_dataset_find(const char *path, int *phase)
{
    const char *rest = NULL, *last = strrchr(path, '/');
    const int p = phase_of(path, &rest);

    if (phase) *phase = p;
    if (p >= 0 && lies_in(rest, "/counters")) return &tr_datasets[TR_D_PHASE_COUNTER];
    for (int i = 0; i < TR_N_DATASETS; i++) {
        const tr_dataset *d = &tr_datasets[i];
        if (p >= 0) {
            if ((d->flags & PHASES) && strcmp(rest, strrchr(d->path, '/')) == 0) return d;
        } else if (!(d->flags & NAMED)) {
            if (strcmp(path, d->path) == 0) return d;
        } else if (lies_in(path, d->path)) {
            if (i == TR_D_COUNTER && strcmp(last, "/time") == 0)
                return &tr_datasets[TR_D_COUNTER_TIME];
            return d;
        }
    }
    return NULL;
}

/* ---- types ---------------------------------------------------------------------------------------------------------- */

static hid_t text_type(size_t bytes, H5T_str_t pad)
{
    hid_t t = H5Tcopy(H5T_C_S1);
    if (t >= 0 && (H5Tset_size(t, bytes) < 0 || H5Tset_cset(t, H5T_CSET_UTF8) < 0 ||
                   H5Tset_strpad(t, pad) < 0)) {
        H5Tclose(t);
        t = -1;
    }
    return t;
}

static hid_t enum_type(const tr_names *names, bool in_file)
{
    hid_t t = H5Tenum_create(in_file ? H5T_STD_U8LE : H5T_NATIVE_UINT8);
    for (int i = 0; t >= 0 && i < names->n; i++) {
        const uint8_t value = (uint8_t)i;
        if (H5Tenum_insert(t, names->name[i], &value) < 0) {
            H5Tclose(t);
            t = -1;
        }
    }
    return t;
}

static hid_t kind_type(tr_field_kind kind, size_t bytes, const tr_names *names, bool in_file)
{
    switch (kind) {
    case TR_FIELD_U1:
        return H5Tcopy(in_file ? H5T_STD_U8LE : H5T_NATIVE_UINT8);
    case TR_FIELD_U2:
        return H5Tcopy(in_file ? H5T_STD_U16LE : H5T_NATIVE_UINT16);
    case TR_FIELD_U4:
        return H5Tcopy(in_file ? H5T_STD_U32LE : H5T_NATIVE_UINT32);
    case TR_FIELD_U8:
        return H5Tcopy(in_file ? H5T_STD_U64LE : H5T_NATIVE_UINT64);
    case TR_FIELD_I2:
        return H5Tcopy(in_file ? H5T_STD_I16LE : H5T_NATIVE_INT16);
    case TR_FIELD_I4:
        return H5Tcopy(in_file ? H5T_STD_I32LE : H5T_NATIVE_INT32);
    case TR_FIELD_I8:
        return H5Tcopy(in_file ? H5T_STD_I64LE : H5T_NATIVE_INT64);
    case TR_FIELD_F4:
        return H5Tcopy(in_file ? H5T_IEEE_F32LE : H5T_NATIVE_FLOAT);
    case TR_FIELD_F8:
        return H5Tcopy(in_file ? H5T_IEEE_F64LE : H5T_NATIVE_DOUBLE);
    case TR_FIELD_ENUM:
        return enum_type(names, in_file);
    case TR_FIELD_CHARS:
        return text_type(bytes, H5T_STR_NULLPAD);
    case TR_FIELD_TEXT:
        return text_type(H5T_VARIABLE, H5T_STR_NULLTERM);
    case TR_FIELD_LIST:
        return H5Tvlen_create(in_file ? H5T_STD_I32LE : H5T_NATIVE_INT32);
    }
    return -1;
}

hid_t tr_schema_field_type(const tr_field *f, bool in_file)
{
    return kind_type(f->kind, f->bytes, f->names, in_file);
}

static hid_t record_type(const tr_record_type *r, bool in_file)
{
    hid_t t = H5Tcreate(H5T_COMPOUND, r->bytes);

    for (int i = 0; t >= 0 && i < r->n_fields; i++) {
        const tr_field *f = &r->field[i];
        hid_t member = tr_schema_field_type(f, in_file);
        const bool ok = member >= 0 && H5Tinsert(t, f->name, f->offset, member) >= 0;
        if (member >= 0) H5Tclose(member);
        if (!ok) {
            H5Tclose(t);
            return -1;
        }
    }
    if (t >= 0 && in_file && H5Tpack(t) < 0) {
        H5Tclose(t);
        t = -1;
    }
    return t;
}

hid_t tr_schema_memory_type(const tr_dataset *d)
{
    return d->record ? record_type(d->record, false) : kind_type(d->kind, 0, NULL, false);
}

hid_t tr_schema_file_type(const tr_dataset *d)
{
    return d->record ? record_type(d->record, true) : kind_type(d->kind, 0, NULL, true);
}
