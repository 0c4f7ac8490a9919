/* Inside of the CPU backend: the device, the choice of instruction set, and the one GEMM micro-kernel all linear layers
 * share. Included by kernels/cpu/ only (and its unit tests).
 *
 * Operations run on the device's team (team.h) through tr_device_run; the functions marked "one thread" are called by
 * one of its members. */
#ifndef TR_KERNELS_CPU_PRIV_H
#define TR_KERNELS_CPU_PRIV_H

#include "kernels/cpu/pieces.h"
#include "kernels/cpu/team.h"
#include "kernels/device.h"
#include "kernels/kernels.h"

/* A large array on the stack that is written before it is read: the zeroing of automatic variables of a hardened build
 * would cost as much as the work (a decode step of 16 rows of models/tiny: a fifth of its time). */
#ifdef __has_attribute
#if __has_attribute(uninitialized)
#define TR_SCRATCH __attribute__((uninitialized))
#endif
#endif
#ifndef TR_SCRATCH
#define TR_SCRATCH
#endif

enum { TR_PANEL = 16 }; /* output rows of one weight panel */

typedef enum tr_isa { TR_ISA_PLAIN, TR_ISA_AVX2, TR_ISA_AVX512, TR_ISA_AMX, TR_N_ISAS } tr_isa;

/* One matrix product on packed weights, whole panels: y[r, o] = sum_i x[row(r), i] w[i_mat][o, i] for outputs of the pieces'
 * panels, row(r) = row_index ? row_index[r] : r. Each output has one accumulator per 128-block of k and
 * sums blocks in order, whatever n_rows is: no row's bits depend on the others. Outputs past n_out are not written. */
typedef struct tr_gemm {
    const tr_linear *w;
    int i_mat;
    const float *x;
    size_t ldx;
    const int32_t *row_index;
    float *y; /* row r at y + out(r) * ldy, out(r) = out_index ? out_index[r] : r */
    size_t ldy;
    const int32_t *out_index;
    int n_rows;
} tr_gemm;

struct tr_index_page; /* attention_priv.h */
struct tr_index_scratch;

/* Functions that exist once per instruction set; NULL fields fall back to plain (filled in by tr_device_open). */
typedef struct tr_cpu_kernels {
    /* One thread. */
    void (*gemm)(const tr_gemm *g, tr_pieces *pieces);
    /* Where gemm wants code (lane, k) of an e4m3 group: byte order[lane * 4 + k % 4] of 64 (packed.h); and whether the
     * bits of a code (seeeemmm) are stored as eeeesmmm. */
    const uint8_t *e4m3_order;
    int e4m3_sign_low;
    /* The same for whole groups, in place: byte lane * 4 + k % 4 goes where it belongs. Returns a bit for every lane
     * that holds a NaN code. */
    unsigned (*e4m3_arrange)(uint8_t *groups, int n_groups);
    /* out [n_words][16] words of 4 bytes: word w of row[lane] at [w][lane]. Rows need no alignment. */
    void (*transpose)(uint8_t *out, const uint8_t *const row[TR_PANEL], int n_words);
    /* sum_i a[i] b[i] in a fixed order (of its own per instruction set). */
    float (*dot)(const float *a, const float *b, int n);
    /* y += a x */
    void (*axpy)(float *y, float a, const float *x, int n);
    /* n e4m3 codes to fp32, times scale; n bf16 to fp32. */
    void (*expand_e4m3)(float *out, const uint8_t *in, float scale, int n);
    void (*expand_bf16)(float *out, const uint16_t *in, int n);
    /* x[i] = exp(x[i] - max), returns nothing; elementwise the same for every position and n. */
    void (*exp_sub)(float *x, float max, int n);
    /* Ceilings, for bench. read_sum: the bits of n bytes (a multiple of 512) folded together; fma_loop: n rounds of
     * fma_width multiply-adds on registers. Both return something the compiler cannot foresee. */
    uint64_t (*read_sum)(const void *p, size_t n);
    float (*fma_loop)(long n);
    int fma_width;
    /* Attention and indexer inner loops: see kernels/cpu/attention_priv.h (owned by the attention files). */
    const struct tr_attention_kernels *attention;
    /* One thread: absorbed attention of heads [h_begin, h_end) of row i, at most TR_HEADS_MAX, over a cache that is not
     * TR_F32. NULL, also when tables have been merged: mla.c's loops do it. */
    void (*latent_attention)(const struct tr_device *d, const struct tr_sparse_mla_args *a, int i,
                             int h_begin, int h_end);
    /* One thread: index scores of rows [i, i_end), all of one slot, in the keys of a page. For caches that are not TR_F32,
     * d_index a multiple of 32, at most TR_HEADS_MAX heads. NULL: indexer.c's loops do it. */
    void (*index_page)(const struct tr_device *d, const struct tr_index_logits_args *a, int i,
                       int i_end, const struct tr_index_page *page,
                       struct tr_index_scratch *scratch);
} tr_cpu_kernels;

struct tr_cpu_block; /* one allocation, cpu.c */

struct tr_device {
    tr_device_head head;
    int n_threads; /* tr_team_size(team) */
    tr_team *team;
    tr_isa isa;
    tr_cpu_kernels k;
    uint64_t ticket;
    struct tr_cpu_block *blocks; /* everything alloc gave and release has not taken back */
    char places[64];             /* the CPUs its threads are bound to; a long list is cut */
};

/* A code as it is packed. */
static inline uint8_t tr_e4m3_packed(const tr_cpu_kernels *k, uint8_t code)
{
    if (!k->e4m3_sign_low) return code;
    return (uint8_t)((code & 0x78) << 1 | (code >> 4 & 8) | (code & 7));
}

static inline int tr_n_panels(int n_out)
{
    return n_out / TR_PANEL + (n_out % TR_PANEL != 0);
}

/* Keeps the text for tr_ops.error; returns `status`. */
tr_status tr_cpu_fail(tr_device *d, tr_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Rows of a step: *n, never more than the capacity. */
static inline int tr_live_rows(const int32_t *n, int n_max)
{
    return *n < 0 ? 0 : *n < n_max ? *n : n_max;
}

/* Threads for `work` multiply-adds (or the like): waking the team costs some microseconds, so small work stays on the
 * calling thread. */
static inline int tr_threads_for(const tr_device *d, double work)
{
    return work < 20000.0 ? 1 : d->n_threads;
}

/* fn(ctx, i, n) on as many members of the team as the work is worth: all, or the caller alone. */
static inline void tr_device_run(const tr_device *d, double work, tr_team_fn *fn, void *ctx)
{
    if (tr_threads_for(d, work) == 1)
        tr_team_run_alone(d->team, fn, ctx);
    else
        tr_team_run(d->team, fn, ctx);
}

/* One thread: the product's panels [begin, end). */
static inline void tr_cpu_gemm_panels(const tr_device *d, const tr_gemm *g, int begin, int end)
{
    TR_SCRATCH tr_pieces own;
    tr_pieces_own(&own, begin, end);
    d->k.gemm(g, &own);
}

/* Whole product over all threads of the device, panels in pieces. */
void tr_cpu_gemm_all(tr_device *d, const tr_gemm *g);

/* One thread: out = silu(gate) * up, n numbers; out may be gate. */
void tr_swiglu_row(const tr_device *d, float *out, const float *gate, const float *up, int n);

/* The tables of the instruction sets; the SIMD ones exist only where TR_HAVE_X86_SIMD is defined, amx where TR_HAVE_AMX
 * is. */
extern const tr_cpu_kernels tr_cpu_plain, tr_cpu_avx2, tr_cpu_avx512, tr_cpu_amx;
extern const struct tr_attention_kernels tr_attention_plain, tr_attention_avx2, tr_attention_avx512;
void tr_latent_attention_amx(const tr_device *d, const struct tr_sparse_mla_args *a, int i,
                             int h_begin, int h_end);
void tr_index_page_amx(const tr_device *d, const struct tr_index_logits_args *a, int i, int i_end,
                       const struct tr_index_page *page, struct tr_index_scratch *scratch);

/* The operations, defined across kernels/cpu, collected in cpu.c. */
#define TR_CPU_OP(name)                                                                            \
    tr_status tr_cpu_##name(tr_device *, tr_lane, const struct tr_##name##_args *);
TR_OPS(TR_CPU_OP)

size_t tr_cpu_linear_bytes(tr_format format, int n_mats, int n_out, int n_in);
tr_status tr_cpu_linear_pack(tr_device *d, tr_linear *dst, const tr_linear_src *src);
tr_status tr_cpu_linear_fill(tr_device *d, tr_linear *dst, const tr_linear_src *src, int n_src,
                             tr_rows_fn *rows, void *const *ctx);
tr_status tr_cpu_table_fill(tr_device *d, void *dst, size_t row_bytes, int n_rows, tr_rows_fn *rows,
                            void *ctx);
tr_status tr_cpu_ceilings(tr_device *d, tr_ceilings *out);
size_t tr_cpu_moe_workspace(int n_max, int k, int d, int d_inner);
size_t tr_cpu_sparse_mla_workspace(int n_max, int n_heads, int d_latent);
size_t tr_cpu_sample_workspace(int n_rows, int n_vocab);

#endif
