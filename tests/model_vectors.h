/* The vectors of tests/vectors/model (its README): a folder's expected values, and a probe that compares a run with them, on any
 * device. Whatever cannot be read, or differs where it must not, fails the test. */
#ifndef TR_TESTS_MODEL_VECTORS_H
#define TR_TESTS_MODEL_VECTORS_H

#include "fixture.h"

typedef struct tr_vectors {     /* one folder */
    char dir[512], arrays[600]; /* the checkpoint's, and the file of the expected arrays */
    json_t *expected;           /* expected.json */
    int32_t *trace, *longer;    /* trace_tokens, long_tokens */
    int n_trace, n_long;
    int n_layers, n_hidden, topk; /* of the model: tr_vectors_fixture */
} tr_vectors;

void tr_vectors_open(tr_vectors *v, const char *set); /* "tiny", "realgeom" */
void tr_vectors_close(tr_vectors *v);

/* An array of expected.safetensors; the caller frees it. */
float *tr_vectors_array(const tr_vectors *v, const char *name, int *rows, int *columns);

/* The checkpoint on a device: options.dir NULL is the vectors' own. */
void tr_vectors_fixture(tr_vectors *v, tr_fixture *f, const tr_fixture_options *options);

/* The same checkpoint with bf16 weights in a scratch folder's files (dir: an empty folder): codes times their scales, which are
 * powers of two, so no number is rounded. */
void tr_vectors_as_bf16(const tr_vectors *v, const char *dir);

/* Tokens of a slot in steps of `chunk` rows: final hidden states [n, hidden] and the argmax of every position. */
void tr_vectors_split(tr_fixture *f, int slot, const int32_t *tokens, int n, int chunk, int form,
                      float *final, int32_t *argmax);

/* What a probe compares: of one pass, whose rows are the tokens of the trace from position 0 on. */
typedef struct tr_watch {
    const tr_vectors *v;
    tr_fixture *f;
    const char *prefix; /* of index_topk and index_margin: "", "idxfp8.", "sim." */
    int only;           /* the one layer to look at, -1: all */
    bool sets_only;     /* scores and selections alone */
    bool exact;         /* exact zeros stay exact */
    bool feed;          /* put the reference's hidden.{l} in place of ours */
    bool
        routes; /* beside keep_final: rows that chose other experts than the exact reference are not clear */
    /* Selections must agree where the reference's margin is wider, in standard deviations of the row's scores; experts where
     * router_margin is. */
    double set_margin, route_margin;
    float *
        keep_final; /* [n_trace, hidden]: final hidden states go here; of the rest only choices are looked at */
    bool *clear; /* [n_trace] this row chose the reference's keys and experts so far */
    /* A NaN is worse than any number: what compares must ask whether it is within a bound, not whether it is beyond. */
    double worst_hidden, worst_weight,
        worst_logit;                         /* of clear rows; scores in standard deviations */
    double sum_logit;                        /* of their squares */
    int n_hidden, n_sets, n_routes, n_logit; /* compared: rows, selections, routings, scores */
} tr_watch;

/* One pass over the trace with the probe set; the caller frees clear and keep_final. Rows of w->clear are true before. */
void tr_watch_run(tr_watch *w);

typedef struct tr_distance { /* of rows: relative L2 */
    int n;
    double worst, rms;
} tr_distance;

/* Of `final` [n_trace, hidden] from the array `name` (the last rows of the trace), over its rows that expected.json lists under
 * `list` and that are clear (NULL: all are). At least half of them must be. */
tr_distance tr_vectors_distance(const tr_vectors *v, const char *name, const char *list,
                                const float *final, const bool *clear);

/* The same of the emulation's final states from the exact ones, rows being clear where it selected alike. */
tr_distance tr_vectors_emulated(const tr_vectors *v, const char *list);

#endif
