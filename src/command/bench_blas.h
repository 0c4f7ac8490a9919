/* The yardstick of `trireme bench`: a BLAS library's sgemm. It is opened when a bench asks for it, so that no other command
 * loads it or has its threads. Nothing a user gets is computed with it. */
#ifndef TR_COMMAND_BENCH_BLAS_H
#define TR_COMMAND_BENCH_BLAS_H

typedef struct tr_blas tr_blas;

/* NULL, and a line in *why: configure has not found one, or it cannot be opened here. */
tr_blas *tr_blas_open(int n_threads, const char **why);
void tr_blas_close(tr_blas *b);
const char *tr_blas_describe(const tr_blas *b);

/* y [m, n] = x [m, k] w [n, k]^T, all dense. */
void tr_blas_product(const tr_blas *b, int m, int n, int k, const float *x, const float *w,
                     float *y);

/* Flops per second of a large product that fits the caches, best of some; 0: out of memory. */
double tr_blas_flops_per_s(const tr_blas *b);

/* Threads of the library, and OpenMP's, spin for a while after their work: lets them fall asleep, so that neither is
 * measured with the other on its cores. */
void tr_blas_settle(void);

#endif
