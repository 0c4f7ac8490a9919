#include <config.h>

#include "command/bench_blas.h"

#include <dlfcn.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#include "base/clock.h"
#include "base/size.h"

/* CBLAS's C interface with 32-bit integers, as every build of these libraries has it. */
typedef void sgemm_function(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                            const float *a, int ld_a, const float *b, int ld_b, float beta,
                            float *c, int ld_c);
enum { ROW_MAJOR = 101, NO_TRANS = 111, TRANS = 112 };

struct tr_blas {
    void *library;
    sgemm_function *sgemm;
    const char *describe;
};

#ifdef HAVE_OPENBLAS
tr_blas *tr_blas_open(int n_threads, const char **why)
{
    tr_blas *b = tr_calloc(1, sizeof *b);
    *why = "out of memory";
    if (!b) return NULL;
    b->library = dlopen(TR_OPENBLAS, RTLD_NOW | RTLD_LOCAL);
    if (!b->library) {
        *why = TR_OPENBLAS " cannot be opened here";
        free(b);
        return NULL;
    }
    sgemm_function *sgemm = (sgemm_function *)dlsym(b->library, "cblas_sgemm");
    void (*threads)(int) = (void (*)(int))dlsym(b->library, "openblas_set_num_threads");
    char *(*describe)(void) = (char *(*)(void))dlsym(b->library, "openblas_get_config");
    if (!sgemm || !threads) {
        *why = TR_OPENBLAS " has no cblas_sgemm";
        tr_blas_close(b);
        return NULL;
    }
    threads(n_threads);
    b->sgemm = sgemm;
    b->describe = describe ? describe() : "OpenBLAS";
    *why = NULL;
    return b;
}
#else
tr_blas *tr_blas_open(int n_threads, const char **why)
{
    (void)n_threads;
    *why = "built without OpenBLAS";
    return NULL;
}
#endif

void tr_blas_close(tr_blas *b)
{
    if (!b) return;
    dlclose(b->library);
    free(b);
}

const char *tr_blas_describe(const tr_blas *b)
{
    return b->describe;
}

void tr_blas_product(const tr_blas *b, int m, int n, int k, const float *x, const float *w,
                     float *y)
{
    b->sgemm(ROW_MAJOR, NO_TRANS, TRANS, m, n, k, 1.0f, x, k, w, k, 0.0f, y, n);
}

void tr_blas_settle(void)
{
    const struct timespec pause = {.tv_nsec = 60000000}; /* OpenBLAS: 2^26 cycles */
    nanosleep(&pause, NULL);
}

double tr_blas_flops_per_s(const tr_blas *b)
{
    enum { M = 512, N = 2048, K = 2048, ROUNDS = 5 };
    float *x = tr_calloc((size_t)M * K, sizeof *x), *w = tr_calloc((size_t)N * K, sizeof *w),
          *y = tr_calloc((size_t)M * N, sizeof *y);
    uint64_t best = UINT64_MAX;

    if (x && w && y) {
        for (int i = 0; i < M * K; i++)
            x[i] = (float)(i % 17) - 8.0f;
        for (int i = 0; i < N * K; i++)
            w[i] = (float)(i % 13) - 6.0f;
        tr_blas_settle();
        for (int i = 0; i < ROUNDS; i++) {
            const uint64_t begun = tr_now_ns();
            tr_blas_product(b, M, N, K, x, w, y);
            const uint64_t took = tr_now_ns() - begun;
            if (took < best) best = took;
        }
        tr_blas_settle();
    }
    free(x);
    free(w);
    free(y);
    return best == UINT64_MAX ? 0 : 2.0 * M * N * K / (double)best * 1e9;
}
