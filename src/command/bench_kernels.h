/* Inside of `trireme bench kernels`: operands of the case that runs, timing with cold caches, and the lines of the table.
 * bench_case.c has these helpers, bench_kernels_*.c the cases, one function per operation of TR_OPS. */
#ifndef TR_COMMAND_BENCH_KERNELS_H
#define TR_COMMAND_BENCH_KERNELS_H

#include <math.h>

#include "command/bench.h"
#include "command/bench_blas.h"
#include "kernels/work.h"

typedef enum tr_bench_op {
#define TR_BENCH_OP(name) TR_BENCH_##name,
    TR_OPS(TR_BENCH_OP)
#undef TR_BENCH_OP
        TR_N_BENCH_OPS
} tr_bench_op;

enum { TR_BENCH_OWNED = 96, TR_BENCH_WARM = 3, TR_BENCH_REPS = 20 };

typedef struct tr_kbench {
    const tr_bench_options *options;
    tr_config config;
    tr_device *device;
    const tr_ops *ops;
    tr_ceilings ceilings;
    tr_blas *blas; /* NULL: none */
    int n_threads;
    uint64_t
        *flush; /* read between runs, so that no cache keeps what a step would find in memory */
    size_t flush_words;
    uint64_t seen, random;
    void *on_device[TR_BENCH_OWNED], *on_host[TR_BENCH_OWNED]; /* of the case that runs */
    int n_device, n_host;
} tr_kbench;

/* A device operand and the same on the host. */
typedef struct tr_operand {
    void *d, *h;
    size_t bytes;
} tr_operand;

/* One matrix of numbers on the host: what every matrix of a packed weight was made of. */
typedef struct tr_matrix {
    tr_format format;
    int n_out, n_in, scale_ld;
    const void *numbers;
    const float *scale;
} tr_matrix;

typedef struct tr_line {
    tr_bench_op op;
    char shape[48];
    tr_work work;
    tr_operand warm[TR_BENCH_WARM]; /* what the operation before has just written */
    double error;                   /* largest, over the largest value; NaN: not looked at */
    double sgemm_flops_per_s;       /* of the library at the same sizes; 0: none */
    double median, low;
    int reps;
} tr_line;

#define TR_LINE(op_name, op_work, ...)                                                             \
    {                                                                                              \
        .op = TR_BENCH_##op_name, .work = op_work, .error = NAN, __VA_ARGS__                       \
    }

/* Operands. They live until the case ends. */
tr_status tr_bench_zeros(tr_kbench *b, size_t bytes, tr_operand *out, tr_err *err);
/* Bytes as they are; on the host for the case to fill before tr_bench_send. */
tr_status tr_bench_send(tr_kbench *b, tr_operand *x, tr_err *err);
tr_status tr_bench_fetch(tr_kbench *b, tr_operand *x, tr_err *err);
tr_status tr_bench_floats(tr_kbench *b, size_t n, float size, tr_operand *out, tr_err *err);
tr_status tr_bench_word(tr_kbench *b, int32_t value, int32_t **out, tr_err *err);
/* fp8 where the model's weights are, bf16 elsewhere; n_mats times the same numbers. transposed: stored as [n_in, n_out]. */
tr_status tr_bench_weight(tr_kbench *b, tr_format format, int n_mats, int n_out, int n_in,
                          int transposed, tr_linear *w, tr_matrix *numbers, tr_err *err);
tr_format tr_bench_format(const tr_kbench *b);
double tr_matrix_at(const tr_matrix *m, int o, int i);
/* sum_i x[i] m[o, i] */
double tr_matrix_dot(const tr_matrix *m, int o, const float *x);
/* In [0, n). */
int tr_bench_pick(tr_kbench *b, int n);
double tr_bench_uniform(tr_kbench *b); /* [-1, 1) */

enum { TR_BENCH_SLOTS = 64 };
/* A decode step of TR_BENCH_SLOTS slots (copies: as many page copies instead), and its slots and rows. */
tr_status tr_bench_plan(tr_kbench *b, int copies, tr_operand *plan, tr_err *err);
tr_status tr_bench_frame(tr_kbench *b, tr_slots *slots, tr_rows *rows, tr_err *err);

/* Time the operation with these arguments: median of up to TR_BENCH_REPS runs, at least five. */
tr_status tr_bench_time(tr_kbench *b, tr_line *line, const void *args, tr_err *err);
/* The library's product of x [m, k] and w [n, k] on random numbers, cold; adds its seconds. Nothing without a library or
 * when w would take more than 256 MiB: then *seconds becomes NaN. */
tr_status tr_bench_product(tr_kbench *b, int m, int n, int k, double *seconds, tr_err *err);
void tr_bench_print_line(const tr_kbench *b, const tr_line *line);
void tr_bench_case_end(tr_kbench *b);

/* Running error of sampled outputs. */
typedef struct tr_errors {
    double worst, largest;
} tr_errors;
static inline void tr_errors_add(tr_errors *e, double got, double want)
{
    const double off = fabs(got - want);
    e->worst = off <= e->worst ? e->worst : off; /* NaN too */
    e->largest = fmax(e->largest, fabs(want));
}
static inline double tr_errors_relative(const tr_errors *e)
{
    return e->largest > 0 ? e->worst / e->largest : e->worst;
}

/* The cases. */
#define TR_BENCH_CASE(name) tr_status tr_bench_##name(tr_kbench *b, tr_err *err);
TR_OPS(TR_BENCH_CASE)
#undef TR_BENCH_CASE

#endif
