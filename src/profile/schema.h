/* The schema trireme-profile 1.0 (parallel.md 10.5) as tables: every record, dataset, unit and name, so that the writer
 * and the readers share one definition. Pure tables and the HDF5 types made from them; no file is touched here.
 *
 * A rank's own file has the same paths as the joined file and the same number of axes: where a dataset has a rank axis,
 * a rank's file has length 1 there, so a rank's file reads as the profile of a run of one rank. Times are int64 ns on
 * rank 0's monotonic clock, zero at the start of the run (root attribute t0_unix_ns says when that was). */
#ifndef TR_PROFILE_SCHEMA_H
#define TR_PROFILE_SCHEMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <hdf5.h>

#include "base/region.h"

#define TR_PROFILE_SCHEMA  "trireme-profile"
#define TR_PROFILE_VERSION "1.0"

/* ---- elements ------------------------------------------------------------------------------------------------------ */

typedef enum tr_field_kind {
    TR_FIELD_U1, /* unsigned, bytes: 1, 2, 4, 8 */
    TR_FIELD_U2,
    TR_FIELD_U4,
    TR_FIELD_U8,
    TR_FIELD_I2, /* signed */
    TR_FIELD_I4,
    TR_FIELD_I8,
    TR_FIELD_F4,
    TR_FIELD_F8,
    TR_FIELD_ENUM,  /* u1 with names */
    TR_FIELD_CHARS, /* UTF-8, NUL-padded, `bytes` long */
    TR_FIELD_TEXT,  /* variable-length UTF-8; char * in memory. Scalar datasets only */
    TR_FIELD_LIST,  /* variable-length i4; hvl_t in memory. Scalar datasets only */
} tr_field_kind;

typedef struct tr_names { /* of an ENUM: value i is name[i] */
    const char *const *name;
    int n;
} tr_names;

typedef struct tr_field {
    const char *name;
    tr_field_kind kind;
    size_t offset, bytes; /* in the C struct */
    const char *units;    /* "ns", "bytes", "tokens", "pages", "requests", "1" */
    const char *long_name;
    const tr_names *names; /* of an ENUM, else NULL */
    bool is_time; /* a moment on the clock: moved when the clocks of the ranks are aligned */
} tr_field;

typedef struct tr_record_type {
    const char *name;
    size_t bytes; /* of the C struct */
    const tr_field *field;
    int n_fields;
} tr_record_type;

extern const tr_names tr_kind_names;  /* "HOST", "KERNEL", ... */
extern const tr_names tr_phase_names; /* "prefill", "decode", ... */
extern const tr_names tr_comm_op_names;
extern const tr_names tr_finish_names; /* "stop", "length", "failed" */
extern const tr_names tr_dtype_names;  /* of /comm/ops: "bytes", "f32", "u64" */

/* ---- records ------------------------------------------------------------------------------------------------------- */

typedef struct tr_prof_rank { /* /grid/ranks */
    int32_t rank;
    int16_t pp, dp, cp, tp, mdp, ep, xt;
    int32_t node;
    int16_t local, numa; /* numa -1: not known */
    char host[64], gpu_uuid[41], pci[16];
    int64_t clock_offset_ns; /* added to the rank's clock to get rank 0's, at the start */
    double clock_drift_ppb;  /* and how fast that changes */
} tr_prof_rank;

typedef struct tr_prof_group { /* /grid/groups; its members: the same row of /grid/members */
    int16_t id;                /* kind of group: the same for all of one name */
    char name[16];
    int32_t size;
} tr_prof_group;

typedef struct tr_prof_region { /* /regions */
    uint32_t id;                /* its row */
    int32_t parent;             /* row, always smaller than id; -1: root of a stream */
    char name[64];              /* of a root: the stream's */
    uint8_t kind, depth;        /* depth 0: root */
    int16_t layer, group;       /* -1: none */
} tr_prof_region;

typedef struct tr_prof_step { /* /steps */
    uint64_t step;
    int64_t t0, t1;
    uint64_t gpu_ns; /* 0: not measured */
    uint8_t mode;    /* tr_phase */
    uint8_t graph;   /* 1: replayed from a graph */
    uint32_t nreq, tok_prefill, tok_decode, tok_padded, accepted, drafted;
    uint8_t tier;
    uint32_t pages_used, pages_free, queue;
    uint64_t sync_wait_ns, plan_ns;
} tr_prof_step;

typedef struct tr_prof_request { /* /requests: the leader's */
    uint64_t id, line;
    int16_t dp;
    int64_t t_arrive, t_first, t_done;
    uint32_t n_prompt, n_cached, n_out, n_drafted, n_accepted;
    uint16_t chunks;
    uint32_t itl_p50_ns, itl_p99_ns; /* 0: fewer than two tokens */
    uint8_t finish;
} tr_prof_request;

typedef struct tr_prof_comm { /* /comm/ops */
    uint32_t region;          /* a region of this name and group; 0xffffffff: none */
    int16_t group;
    uint8_t op, dtype;
    uint64_t calls, bytes, time_ns, exposed_ns, min_ns, max_ns;
} tr_prof_comm;

typedef struct tr_prof_overlap { /* /overlap/cp: K index keys, L latents */
    uint64_t gatherK_ns, gatherL_ns, exposedK_ns, exposedL_ns, bytes, calls;
} tr_prof_overlap;

typedef struct tr_prof_kv { /* /kv */
    int64_t t;
    uint64_t hits, misses, evicted, host_in,
        host_out; /* tokens, tokens, pages, bytes, bytes; so far */
} tr_prof_kv;

typedef struct tr_prof_memory { /* /memory */
    int64_t t;
    uint64_t weights, kv, nccl, workspace, free;
} tr_prof_memory;

typedef struct tr_prof_trace { /* /trace/<stream> */
    uint32_t region, step;     /* step 0xffffffff: outside steps */
    int64_t t0;
    uint32_t dur, bytes; /* both end at 0xffffffff */
} tr_prof_trace;

typedef struct tr_prof_load { /* /io/load */
    char file[128];
    uint64_t bytes, ns;
} tr_prof_load;

/* ---- datasets ------------------------------------------------------------------------------------------------------ */

typedef enum tr_axis {
    TR_AXIS_NONE,
    TR_AXIS_RANK,    /* W, 1 in a rank's file: what the joined file stacks along */
    TR_AXIS_REGION,  /* R: rows of /regions */
    TR_AXIS_STEP,    /* S */
    TR_AXIS_REQUEST, /* Q */
    TR_AXIS_GROUP,   /* rows of /grid/groups */
    TR_AXIS_COMM,    /* C: group x operation */
    TR_AXIS_PEER,    /* n: world ranks */
    TR_AXIS_LAYER,   /* L: all layers of the model */
    TR_AXIS_EXPERT,  /* E */
    TR_AXIS_WINDOW,  /* stretches of equally many steps */
    TR_AXIS_SAMPLE,  /* grows with time */
    TR_AXIS_EVENT,   /* grows with what happens */
    TR_AXIS_FILE,    /* shards */
    TR_AXIS_LINE,    /* messages, variables */
    TR_AXIS_PAIR,    /* 2: name, value */
    TR_N_AXES
} tr_axis;

enum { TR_DATASET_AXES = 3 };

typedef enum tr_dataset_flags {
    TR_DATASET_GROWS =
        1, /* appended to along its last axis; else written whole, and again with every flush */
    TR_DATASET_LEADER = 2, /* rank 0's file and the joined file only */
    TR_DATASET_PHASES = 4, /* also under /phase/<phase>/, with the last part of its path */
    TR_DATASET_NAMED =
        8, /* a folder of datasets: what follows the path is a name found in the file */
    TR_DATASET_SUM =
        16, /* no rank axis: a rank's file has its part, the joined file the sum of all */
    TR_DATASET_TIME = 32, /* numbers are moments, as is_time of a field */
} tr_dataset_flags;

typedef struct tr_dataset {
    const char *path;
    const tr_record_type *record; /* NULL: numbers or text, of kind */
    tr_field_kind kind;
    tr_axis axis[TR_DATASET_AXES]; /* slowest first; NONE: no more axes */
    unsigned flags;
    const char *units,
        *long_name; /* units "": a record has them field by field (attribute field_units) */
} tr_dataset;

typedef enum tr_dataset_id {
    TR_D_ENV,
    TR_D_RANKS,
    TR_D_GROUPS,
    TR_D_MEMBERS,
    TR_D_REGIONS,
    TR_D_COUNT,
    TR_D_TIME_INCL,
    TR_D_TIME_EXCL,
    TR_D_TIME_MIN,
    TR_D_TIME_MAX,
    TR_D_TIME_SUMSQ,
    TR_D_BYTES,
    TR_D_FLOPS,
    TR_D_EXPOSED,
    TR_D_GPU_NS, /* these two where there was a GPU */
    TR_D_GPU_COUNT,
    TR_D_STEPS,
    TR_D_REQUESTS,
    TR_D_COMM_OPS,
    TR_D_COMM_MATRIX,
    TR_D_OVERLAP_CP,
    TR_D_EXPERT_TOKENS,
    TR_D_RANK_TOKENS,
    TR_D_WINDOW_TOKENS,
    TR_D_BALANCE,
    TR_D_KV,
    TR_D_MEMORY,
    TR_D_COUNTER,
    TR_D_COUNTER_TIME,
    TR_D_PHASE_COUNTER,
    TR_D_TRACE,
    TR_D_LOAD,
    TR_D_LOG,
    TR_N_DATASETS
} tr_dataset_id;

extern const tr_dataset tr_datasets[TR_N_DATASETS];

/* Number of axes. */
int tr_dataset_axes(const tr_dataset *d);
/* "rank", "region", ...; the dimension scale of an axis is /scales/<name> where the file has one. */
const char *tr_axis_name(tr_axis axis);
/* The row whose path is `path`, or whose folder holds it (NAMED); *phase: the phase of a /phase/ path, -1 else; may be
 * NULL. NULL: not of this schema, to be ignored. */
const tr_dataset *tr_dataset_find(const char *path, int *phase);
/* The path of a PHASES dataset in one phase: "/phase/decode/count". Returns text. */
const char *tr_dataset_phase_path(char *text, size_t n, const tr_dataset *d, tr_phase phase);

/* Types; H5Tclose by the caller, negative on failure. The type in memory is the C struct's, the type in files the same
 * fields little-endian and without gaps. names is of an ENUM, else NULL. */
hid_t tr_schema_memory_type(const tr_dataset *d);
hid_t tr_schema_file_type(const tr_dataset *d);
hid_t tr_schema_field_type(const tr_field *f, bool in_file);

#endif
