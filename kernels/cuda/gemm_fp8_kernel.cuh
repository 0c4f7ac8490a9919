/* The kernel behind gemm_fp8.h. A block: WGS math warpgroups, each with SUBS groups of 64 weight rows and all NB tokens of
 * the tile, and four warps that load. Persistent: blocks walk the tiles in steps of the grid.
 *
 * Per stage (128 along k) shared memory gets W [64 WGS SUBS, 128] and X [NB, 128], both in 128-byte swizzle, and the NB
 * token scales. In a cluster of CW x CT blocks, those of equal index along CT share the tokens, those of equal index
 * along CW the weights: each loads its part and multicasts it. A stage is free when every warp of the cluster said so.
 * With each stage come the weight scales of its two 128-row blocks (gate's and up's), four stages' worth at a time since
 * 16 bytes are the least a copy can bring. */
#ifndef TR_CUDA_GEMM_FP8_KERNEL_CUH
#define TR_CUDA_GEMM_FP8_KERNEL_CUH

#include "kernels/cuda/gemm_fp8.h"
#include "kernels/cuda/gemm_fp8_mma.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/quantise.cuh"

namespace tr
{

struct gemm_args {
    CUtensorMap w, x, x_tail, x_scale,
        out_map; /* out_map: 16 x 64 bf16 in 128-byte swizzle, where has_out_map */
    const float *w_scale;
    int w_scale_pitch, w_scale_rows, w_scale_matrix; /* rows: of one matrix; from one to the next */
    int n_out, n_k;                                  /* n_k: stages */
    const int32_t *n;                                /* dense */
    int n_max;
    const int32_t *start; /* grouped: [n_groups + 1] */
    int n_groups;
    const int32_t *scatter; /* output row of sorted row i, or NULL */
    void *out;
    size_t ld_out;
    int out_f32, has_out_map;
    int copy_rows; /* rows of `out` can be copied to: 16-byte aligned, in pieces of 16 bytes */
    uint8_t *q;    /* gate_up: e4m3 [n_max, n_out / 2] and scales */
    float *q_scale;
    int ld_q_scale, ue8m0;
    int stream_w; /* weights are read once: leave L2 to the others */
    int known;    /* which tiles there are does not depend on what the kernel in front writes */
};

/* What a block may have on sm_90, and each of two on an SM; 1 KiB of every block is the system's. */
enum { SMEM_BLOCK_MAX = 232448, SMEM_HALF_SM = 233472 / 2 - 1024 };

template <class S> struct math_group;

template <int WGS_, int SUBS_, int NB_, bool GROUPED_, bool GATE_UP_> struct gemm_shape {
    using math = math_group<gemm_shape>;
    static constexpr int WGS = WGS_, SUBS = SUBS_, NB = NB_, CW = 1, CT = 1;
    static constexpr bool GROUPED = GROUPED_, GATE_UP = GATE_UP_;
    static constexpr int CLUSTER = 1, THREADS = 128 * (WGS + 1);
    static constexpr int W_ROWS = 64 * WGS * SUBS;
    static constexpr bool ADAPTIVE = GROUPED; /* the width follows the rows of the expert */
    static constexpr bool EVEN = false, SWAPS = false; /* gemm_fp8_tall.cuh */
    static constexpr int X_BOX = ADAPTIVE ? 16 : NB, X_TAIL = 0;
    static constexpr int W_BYTES = W_ROWS * 128, X_BYTES = NB * 128, S_BYTES = NB * 4;
    static constexpr int S_PITCH = NB < 32 ? 32 : NB; /* copies land on multiples of 128 bytes */
    static constexpr int W_BLOCKS = W_ROWS > 128 ? 2 : 1;
    static constexpr int STAGE_BYTES = W_BYTES + X_BYTES + S_PITCH * 4 + W_BLOCKS * 16 + 16;
    static constexpr int STAGING_BYTES = WGS * NB * 128;
    /* Blocks of few tokens leave half an SM to those of the next kernel, which fetch their weights meanwhile. */
    static constexpr int BLOCKS_PER_SM = WGS == 1 && !GROUPED ? 2 : 1;
    static constexpr int ROOM = BLOCKS_PER_SM == 2 ? SMEM_HALF_SM : SMEM_BLOCK_MAX;
    static constexpr int FIT = (ROOM - STAGING_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FIT < 24 ? FIT : 24;
    static constexpr int SMEM_BYTES = STAGES * STAGE_BYTES + STAGING_BYTES;
    /* 65536 are shared out in eights to two math warpgroups and the one that loads. */
    static constexpr int MATH_REGISTERS = 232, LOAD_REGISTERS = 40;
    static_assert(SMEM_BYTES <= SMEM_BLOCK_MAX, "shared memory");
    static_assert(!GATE_UP || W_ROWS == 256, "a scale block of 128 is 256 rows of gate and up");
};

/* ---- the tiles of a block, in order ------------------------------------------------------------------------------- */

/* Past the caches that may hold what was there before this kernel began, and never earlier than it is written here. */
__device__ __forceinline__ int32_t read_now(const int32_t *p)
{
    int32_t x;
    asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

struct gemm_tile {
    int matrix, w0;   /* first weight row of the block's part */
    int row0, n_rows; /* first token row; how many live ones: 0 or less in a partner without work */
    int skip; /* rows before these are another expert's: scales are copied from multiples of 4 */
};

/* Dense: tokens in groups of 16 cluster tiles; inside, tokens run fastest, so that what runs at a time shares weights and
 * fits in L2. Grouped: expert by expert, tokens fastest; an expert without rows has no tile. */
template <class S> struct gemm_walk {
    const gemm_args &a;
    int index;
    int group = -1, begin = 0, end = 0; /* an expert and its rows */
    int total = 0;                      /* tiles up to and with it */
    int live = 0, step = 0;             /* EVEN: rows from one tile to the next */

    /* before: the kernel in front may not have ended. */
    __device__ gemm_walk(const gemm_args &args, bool before = false) : a(args)
    {
        index = (int)blockIdx.x / S::CLUSTER;
        if (!S::GROUPED) {
            /* Where one tile holds all tokens the weights need not wait for the count. */
            if (!before) live = max(0, min(read_now(a.n), a.n_max));
            end = one_tile(args) ? a.n_max : live;
            total = w_tiles() * token_tiles();
        }
    }
    static __device__ __forceinline__ bool one_tile(const gemm_args &a)
    {
        return a.n_max <= S::NB * S::CT;
    }
    /* Place in the cluster. */
    __device__ int part_w() const
    {
        return S::CW > 1 ? (int)cluster_rank() % S::CW : 0;
    }
    __device__ int part_t() const
    {
        return S::CT > 1 ? (int)cluster_rank() / S::CW : 0;
    }
    __device__ int w_tiles() const
    {
        return (a.n_out + S::W_ROWS * S::CW - 1) / (S::W_ROWS * S::CW);
    }
    __device__ int token_tiles() const
    {
        return tiles_of(begin, end);
    }
    /* Again after the products, so that they need not lie in registers meanwhile. */
    __device__ void limits(gemm_tile &t) const
    {
        t.n_rows = (S::GROUPED ? end : live) - t.row0;
        if (S::EVEN) t.n_rows = min(t.n_rows, step);
        t.skip = S::GROUPED ? begin - t.row0 : 0;
    }
    /* Tiles of tokens of rows [first, last) of an expert. */
    static __device__ int tiles_of(int first, int last)
    {
        const int from = S::GROUPED ? first & ~3 : 0;
        return first == last ? 0 : (last - from + S::NB * S::CT - 1) / (S::NB * S::CT);
    }
    /* The expert that the tile `index` belongs to, or of as many as are looked at together the last: by all lanes of the warp,
     * from memory once. False: there are no more experts. */
    __device__ bool next_expert()
    {
        enum { WORDS = 8 };
        const int lane = (int)threadIdx.x % 32;
        int32_t first[WORDS + 1];
        if (group + 1 >= a.n_groups) return false;
#pragma unroll
        for (int i = 0; i <= WORDS; i++)
            first[i] = read_now(a.start + min(group + 1 + 32 * i + lane, a.n_groups));
        int sum = 0, last = 0, word = WORDS;
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            const int near = __shfl_down_sync(0xffffffffu, first[i], 1),
                      far = __shfl_sync(0xffffffffu, first[i + 1], 0), to = lane == 31 ? far : near,
                      here = w_tiles() * tiles_of(first[i], to),
                      all = __reduce_add_sync(0xffffffffu, here);
            if (word == WORDS && total + all > index) {
                word = i;
                begin = first[i];
                last = to;
                sum = here;
            }
            if (word == WORDS) total += all;
        }
        if (word == WORDS) {
            group += 32 * WORDS;
            return true;
        }
        group += 1 + 32 * word;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int low = __shfl_up_sync(0xffffffffu, sum, d);
            if (lane >= d) sum += low;
        }
        const int it = __ffs((int)__ballot_sync(0xffffffffu, total + sum > index)) - 1;
        begin = __shfl_sync(0xffffffffu, begin, it);
        end = __shfl_sync(0xffffffffu, last, it);
        total += __shfl_sync(0xffffffffu, sum, it);
        group += it;
        return true;
    }
    __device__ bool next(gemm_tile &t)
    {
        int w, m;
        if (S::GROUPED) {
            while (index >= total)
                if (!next_expert()) return false;
            const int tiles = token_tiles(), i = index - (total - w_tiles() * tiles);
            w = i / tiles;
            m = i % tiles;
            t.matrix = group;
            if constexpr (S::EVEN) { /* tiles of equal height instead of full ones and a rest */
                const int from = begin & ~3;
                step = S::step((end - from + tiles - 1) / tiles);
                t.row0 = from + m * step;
            } else {
                t.row0 = (begin & ~3) + (m * S::CT + part_t()) * S::NB;
            }
        } else {
            if (index >= total) return false;
            const int tiles = token_tiles(), wide = 16 * w_tiles();
            const int first = index / wide * 16, width = min(16, tiles - first);
            w = index % wide / width;
            m = first + index % wide % width;
            t.matrix = 0;
            t.row0 = (m * S::CT + part_t()) * S::NB;
        }
        limits(t);
        t.w0 = (w * S::CW + part_w()) * S::W_ROWS;
        index += (int)gridDim.x / S::CLUSTER;
        return true;
    }
};

__device__ __forceinline__ int adaptive_width(int n_rows, int most)
{
    int nb = 16;
    while (nb < n_rows && nb < most)
        nb *= 2;
    return nb;
}
/* Tokens of a tile that are loaded and multiplied. */
template <class S> __device__ __forceinline__ int tile_width(const gemm_tile &t)
{
    if constexpr (S::EVEN)
        return S::width(t.n_rows);
    else if constexpr (S::ADAPTIVE)
        return adaptive_width(t.n_rows, S::NB);
    else
        return S::NB;
}

/* ---- shared memory -------------------------------------------------------------------------------------------------- */

template <class S> struct gemm_smem {
    uint8_t *w, *x, *staging;
    float *scale, *w_scale; /* [STAGES][S_PITCH], [STAGES][W_BLOCKS][4] */
    uint64_t *full, *empty;
    __device__ explicit gemm_smem(uint8_t *p)
    {
        w = p;
        x = w + S::STAGES * S::W_BYTES;
        staging = x + S::STAGES * S::X_BYTES;
        scale = reinterpret_cast<float *>(staging + S::STAGING_BYTES);
        w_scale = scale + S::STAGES * S::S_PITCH;
        full = reinterpret_cast<uint64_t *>(w_scale + S::STAGES * S::W_BLOCKS * 4);
        empty = full + S::STAGES;
    }
};

/* ---- the loading warp ------------------------------------------------------------------------------------------------ */

/* Row of the scale table for block i of the tile; tiles past the last row read the last. */
template <class S>
__device__ __forceinline__ int scale_row(const gemm_args &a, const gemm_tile &t, int i)
{
    const int row = S::GATE_UP ? t.w0 / 256 + i * (a.w_scale_rows / 2)
                               : min(t.w0 / 128 + i, a.w_scale_rows - 1);
    return t.matrix * a.w_scale_matrix + row;
}

template <class S>
__device__ __forceinline__ void load_weights(const gemm_args &a, const gemm_smem<S> &m,
                                             const gemm_tile &t, int kb, int stage, int pw, int pt,
                                             uint64_t policy)
{
    constexpr int PART = S::W_ROWS / S::CT;
    uint8_t *w = m.w + stage * S::W_BYTES;
    const int row = t.matrix * a.n_out + t.w0;
    if (S::CT == 1) {
        if (a.stream_w)
            tensor_load(w, &a.w, kb * 128, row, m.full + stage, policy);
        else
            tensor_load(w, &a.w, kb * 128, row, m.full + stage);
    } else {
        uint16_t mask = 0;
        for (int i = 0; i < S::CT; i++)
            mask |= (uint16_t)(1 << (i * S::CW + pw));
        tensor_load_multicast(w + pt * PART * 128, &a.w, kb * 128, row + pt * PART, m.full + stage,
                              mask);
    }
}

template <class S>
__device__ __forceinline__ void load_tokens(const gemm_args &a, const gemm_smem<S> &m,
                                            const gemm_tile &t, int kb, int stage, int nb, int pw,
                                            int pt)
{
    constexpr int PART = S::NB / S::CW;
    uint8_t *x = m.x + stage * S::X_BYTES;
    if constexpr (S::EVEN) {
        /* The width in boxes, the wide ones first; which block loads which turns with every stage. */
        const int wide = nb / S::X_BOX, boxes = wide + nb % S::X_BOX / S::X_TAIL;
        for (int i = (pw + kb) % S::CW; i < boxes; i += S::CW) {
            const bool tail = i >= wide;
            const int r = tail ? wide * S::X_BOX + (i - wide) * S::X_TAIL : i * S::X_BOX;
            tensor_load_multicast(x + r * 128, tail ? &a.x_tail : &a.x, kb * 128, t.row0 + r,
                                  m.full + stage, (uint16_t)((1 << S::CW) - 1));
        }
    } else if (S::ADAPTIVE) {
        for (int r = 0; r < nb; r += S::X_BOX)
            tensor_load(x + r * 128, &a.x, kb * 128, t.row0 + r, m.full + stage);
    } else if (S::CW == 1) {
        tensor_load(x, &a.x, kb * 128, t.row0, m.full + stage);
    } else {
        const uint16_t mask = (uint16_t)(((1 << S::CW) - 1) << (pt * S::CW));
        tensor_load_multicast(x + pw * PART * 128, &a.x, kb * 128, t.row0 + pw * PART,
                              m.full + stage, mask);
    }
}

/* A copy costs its thread about 50 ns, so each kind has a warp: 0 weights, 1 tokens, 2 and 3 their scales. */
enum { LOAD_WARPS = 4 };

template <class S, int KIND> __device__ void load_tiles(const gemm_args &a, const gemm_smem<S> &m)
{
    /* Weights and their scales nobody writes: they may be on their way while the kernel in front ends. */
    const bool ahead = KIND % 3 == 0 && (S::GROUPED ? a.known : gemm_walk<S>::one_tile(a));
    if (!ahead) early::wait();
    gemm_walk<S> walk(a, ahead);
    gemm_tile t;
    ring_position<S::STAGES> at;
    const uint64_t policy = policy_evict_first();
    while (walk.next(t)) {
        const int nb = tile_width<S>(t);
        for (int kb = 0; kb < a.n_k; kb++) {
            barrier_wait(m.empty + at.stage, at.parity ^ 1);
            if (elect_one()) {
                uint64_t *full = m.full + at.stage;
                if (KIND == 0) {
                    barrier_expect(full, S::W_BYTES);
                    load_weights<S>(a, m, t, kb, at.stage, walk.part_w(), walk.part_t(), policy);
                } else if (KIND == 1) {
                    barrier_expect(full, nb * 128);
                    load_tokens<S>(a, m, t, kb, at.stage, nb, walk.part_w(), walk.part_t());
                } else if (KIND == 2) {
                    barrier_expect(full, S::S_BYTES);
                    tensor_load(m.scale + at.stage * S::S_PITCH, &a.x_scale, t.row0, kb, full);
                } else {
                    barrier_expect(full, S::W_BLOCKS * 16);
#pragma unroll
                    for (int i = 0; i < S::W_BLOCKS; i++)
                        bulk_load(m.w_scale + (at.stage * S::W_BLOCKS + i) * 4,
                                  a.w_scale + (size_t)scale_row<S>(a, t, i) * a.w_scale_pitch +
                                      kb / 4 * 4,
                                  16, full);
                }
            }
            __syncwarp();
            at.next();
        }
    }
}

/* ---- the math warpgroups ---------------------------------------------------------------------------------------------- */

/* Descriptors of operands in 128-byte swizzle differ in the low word alone. */
__device__ __forceinline__ uint32_t descriptor_low(uint32_t smem)
{
    return (uint32_t)matrix_descriptor(smem, 16, 1024, LAYOUT_SWIZZLE_128);
}
__device__ __forceinline__ uint64_t descriptor(uint32_t low)
{
    return low | (matrix_descriptor(0, 16, 1024, LAYOUT_SWIZZLE_128) >> 32 << 32);
}

/* silu(gate) up. */
__device__ __forceinline__ float gate_times_up(float gate, float up)
{
    return __fmul_rn(__fdividef(gate, 1.0f + expf(-gate)), up);
}

/* 128 along k of the operands whose descriptors have these low words: p = m n^T. */
template <int NB>
__device__ __forceinline__ void issue_block(float (&p)[NB / 2], uint32_t m, uint32_t n)
{
#pragma unroll
    for (int i = 0; i < NB / 2; i++)
        wgmma_touch(p[i]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++)
        mma_e4m3<NB>(p, descriptor(m + 2 * i), descriptor(n + 2 * i), i > 0);
    wgmma_commit();
}

/* x_scale: the stage's token scales, from the lane's first column. */
template <int NB>
__device__ __forceinline__ void promote(float (&acc)[NB / 2], float (&p)[NB / 2],
                                        const float *x_scale, float2 s)
{
#pragma unroll
    for (int i = 0; i < NB / 2; i++)
        wgmma_touch(p[i]);
#pragma unroll
    for (int j = 0; j < NB / 8; j++) {
        const float2 t = *reinterpret_cast<const float2 *>(x_scale + 8 * j);
        acc[4 * j + 0] = __fmaf_rn(p[4 * j + 0], __fmul_rn(t.x, s.x), acc[4 * j + 0]);
        acc[4 * j + 1] = __fmaf_rn(p[4 * j + 1], __fmul_rn(t.y, s.x), acc[4 * j + 1]);
        acc[4 * j + 2] = __fmaf_rn(p[4 * j + 2], __fmul_rn(t.x, s.y), acc[4 * j + 2]);
        acc[4 * j + 3] = __fmaf_rn(p[4 * j + 3], __fmul_rn(t.y, s.y), acc[4 * j + 3]);
    }
}

/* A value the compiler knows nothing about: what is computed from it stays behind the products, instead of being hoisted
 * out of the loop over tiles into registers that the products need. */
__device__ __forceinline__ int opaque(int x)
{
    asm volatile("" : "+r"(x));
    return x;
}

/* Eight outputs of a row from shared memory; at the right edge one by one. */
__device__ __forceinline__ void store_piece(const gemm_args &a, const uint8_t *smem, int row,
                                            int column)
{
    const uint4 piece = *reinterpret_cast<const uint4 *>(smem);
    __nv_bfloat16 *dst = (__nv_bfloat16 *)a.out + (size_t)row * a.ld_out + column;
    if (a.ld_out % 8 == 0 && column + 8 <= a.n_out) {
        *reinterpret_cast<uint4 *>(dst) = piece;
    } else {
        const __nv_bfloat16 *e = reinterpret_cast<const __nv_bfloat16 *>(&piece);
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (column + i < a.n_out) dst[i] = e[i];
    }
}

template <class S> struct math_group {
    const gemm_args &a;
    const gemm_smem<S> &m;
    ring_position<S::STAGES> at;
    const int group, warp, lane;
    int block;               /* the warpgroup's 128-row block of the tile */
    uint32_t w_desc, x_desc; /* of stage 0, the low words */

    /* i_warp: the same in all lanes, and known to be. */
    __device__ math_group(const gemm_args &args, const gemm_smem<S> &smem, int i_warp)
        : a(args), m(smem), group(i_warp / 4), warp(i_warp % 4), lane((int)threadIdx.x % 32)
    {
        w_desc = descriptor_low(smem_address(m.w) + group * S::SUBS * 8192);
        x_desc = descriptor_low(smem_address(m.x));
    }
    __device__ __forceinline__ uint32_t w_at(int stage, int sub) const
    {
        return w_desc + ((stage * S::W_BYTES + sub * 8192) >> 4);
    }
    __device__ __forceinline__ uint32_t x_at(int stage) const
    {
        return x_desc + ((stage * S::X_BYTES) >> 4);
    }
    __device__ __forceinline__ const float *scale_at(int stage) const
    {
        return m.scale + stage * S::S_PITCH + lane % 4 * 2;
    }
    /* Weight scales of rows lane/4 and lane/4 + 8: equal but for gate and up. */
    __device__ __forceinline__ float2 weights_at(int stage, int k) const
    {
        const float *s = m.w_scale + stage * S::W_BLOCKS * 4 + k % 4;
        if (S::GATE_UP) return make_float2(s[0], s[4]);
        const float one = s[S::W_BLOCKS == 1 ? 0 : block * 4];
        return make_float2(one, one);
    }
    __device__ __forceinline__ void release(int stage)
    {
        barrier_arrive_warp(m.empty + stage, lane);
    }

    /* One set of partial sums: issue, wait, promote; the other warpgroups keep the tensor cores busy meanwhile. */
    template <int NB>
    __device__ __forceinline__ void product_single(float (&acc)[S::SUBS][NB / 2], int k)
    {
        float p[NB / 2] = {};
#pragma unroll 1
        for (; k < a.n_k; k++) {
            barrier_wait(m.full + at.stage, at.parity);
            const float2 s = weights_at(at.stage, k);
#pragma unroll
            for (int i = 0; i < S::SUBS; i++) {
                issue_block<NB>(p, w_at(at.stage, i), x_at(at.stage));
                wgmma_wait<0>();
                promote<NB>(acc[i], p, scale_at(at.stage), s);
            }
            release(at.stage);
            at.next();
        }
    }
    /* Promote unit U of N in flight (BATCH stages of SUBS row groups), then the rest. */
    template <int NB, int N, int U>
    __device__ __forceinline__ void
    promote_all(float (&acc)[S::SUBS][NB / 2], float (&p)[N][NB / 2],
                const float *const (&x_scale)[N / S::SUBS], const float2 (&s)[N / S::SUBS])
    {
        wgmma_wait<N - 1 - U>();
        promote<NB>(acc[U % S::SUBS], p[U], x_scale[U / S::SUBS], s[U / S::SUBS]);
        if constexpr (U + 1 < N) promote_all<NB, N, U + 1>(acc, p, x_scale, s);
    }
    /* Few tokens: BATCH stages at a time, so that the latency of a product is paid once for all of them and promotions
     * run behind the products still in flight. No branch lies between a product's issue and its wait: ptxas would
     * serialise them. */
    template <int NB, int BATCH>
    __device__ __forceinline__ void product_batched(float (&acc)[S::SUBS][NB / 2])
    {
        constexpr int N = BATCH * S::SUBS;
        int k = 0;
#pragma unroll 1
        for (; k + BATCH <= a.n_k; k += BATCH) {
            float p[N][NB / 2] = {};
            float2 s[BATCH];
            int stage[BATCH];
            const float *x_scale[BATCH];
#pragma unroll
            for (int b = 0; b < BATCH; b++) {
                stage[b] = at.stage;
                x_scale[b] = scale_at(at.stage);
                barrier_wait(m.full + at.stage, at.parity);
                s[b] = weights_at(at.stage, k + b);
                at.next();
            }
#pragma unroll
            for (int u = 0; u < N; u++)
                issue_block<NB>(p[u], w_at(stage[u / S::SUBS], u % S::SUBS),
                                x_at(stage[u / S::SUBS]));
            promote_all<NB, N, 0>(acc, p, x_scale, s);
#pragma unroll
            for (int b = 0; b < BATCH; b++)
                release(stage[b]);
        }
        product_single<NB>(acc, k);
    }

    template <int NB> __device__ __forceinline__ void tile(const gemm_tile &t)
    {
        /* SUBS 2 is one block of 128 rows, and with SUBS 1 a row group lies inside one. */
        block = (t.w0 + group * 64 * S::SUBS) / 128 - t.w0 / 128;
        float acc[S::SUBS][NB / 2];
#pragma unroll
        for (int i = 0; i < S::SUBS; i++) {
#pragma unroll
            for (int j = 0; j < NB / 2; j++)
                acc[i][j] = 0;
        }
        /* Registers: sums and partial sums of 128 tokens fill 192 of a thread's; a second set fits only beside one
         * row group, and with at most two warpgroups. */
        constexpr int SETS = 128 / NB * (S::SUBS == 2 ? 1 : 2);
        if constexpr (NB == 128 && S::SUBS == 2)
            product_single<NB>(acc, 0);
        else
            product_batched<NB, (SETS > 4 ? 4 : SETS) / S::SUBS>(acc);
        if constexpr (S::GATE_UP)
            store_gate_up<NB>(acc, t);
        else
            store_rows<NB>(acc, t);
    }

    template <int NB>
    __device__ __forceinline__ void store_rows(float (&acc)[S::SUBS][NB / 2], const gemm_tile &t)
    {
        /* Output rows of the tokens this thread stores, all asked for at once; the sums of products are done with
         * their registers. */
        constexpr int MINE = (NB + 15) / 16;
        const int thread = opaque((int)threadIdx.x % 128);
        int to[MINE];
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int token = thread / 8 + 16 * i;
            to[i] = -1;
            if (token >= t.skip && token < min(NB, t.n_rows))
                to[i] =
                    S::GROUPED && a.scatter ? read_now(a.scatter + t.row0 + token) : t.row0 + token;
        }
#pragma unroll
        for (int i = 0; i < S::SUBS; i++) {
            const int column = t.w0 + (group * S::SUBS + i) * 64;
            if (!S::GROUPED && a.out_f32)
                store_f32<NB>(acc[i], t, column);
            else
                store_bf16<NB>(acc[i], to, thread, column);
        }
    }
    /* Eight lanes write 32 bytes of one token. */
    template <int NB>
    __device__ __forceinline__ void store_f32(float (&v)[NB / 2], const gemm_tile &t, int column)
    {
        float *out = (float *)a.out;
        const int c = column + warp * 16 + lane / 4;
#pragma unroll
        for (int e = 0; e < NB / 2; e++) {
            const int token = e / 4 * 8 + lane % 4 * 2 + e % 2, o = c + e % 4 / 2 * 8;
            if (token < t.n_rows && o < a.n_out)
                out[(size_t)(t.row0 + token) * a.ld_out + o] = v[e];
        }
    }
    /* Through shared memory: [token][64 outputs] rows of 128 bytes, 16-byte pieces swizzled by the token. */
    template <int NB>
    __device__ __forceinline__ void store_bf16(float (&v)[NB / 2], const int (&to)[(NB + 15) / 16],
                                               int thread, int column)
    {
        uint8_t *staging = m.staging + group * S::NB * 128;
        const int l = thread % 32, piece = warp * 2 + l / 8 % 2;
        named_barrier(1 + group, 128); /* the last stores out of the staging area are done */
        if constexpr (NB == 8) {
            const int token = l % 8;
            store_matrix_x2_transposed(
                smem_address(staging + token * 128 + ((piece ^ (token & 7)) * 16)),
                pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]));
        } else {
#pragma unroll
            for (int j = 0; j < NB / 8; j += 2) {
                const int token = 8 * (j + l / 16) + l % 8;
                store_matrix_x4_transposed(
                    smem_address(staging + token * 128 + ((piece ^ (token & 7)) * 16)),
                    pack_bf16(v[4 * j], v[4 * j + 1]), pack_bf16(v[4 * j + 2], v[4 * j + 3]),
                    pack_bf16(v[4 * j + 4], v[4 * j + 5]), pack_bf16(v[4 * j + 6], v[4 * j + 7]));
            }
        }
        named_barrier(1 + group, 128);
        const int p = thread % 8;
#pragma unroll
        for (int i = 0; i < (NB + 15) / 16; i++) {
            const int token = thread / 8 + 16 * i;
            if (to[i] < 0) continue;
            store_piece(a, staging + token * 128 + ((p ^ (token & 7)) * 16), to[i], column + p * 8);
        }
    }

    /* 256 rows of gate and up are one block of 128 numbers per token: silu(gate) * up in registers, the largest over the
     * tile through shared memory, then e4m3 and its scale. */
    template <int NB>
    __device__ __forceinline__ void store_gate_up(float (&acc)[S::SUBS][NB / 2], const gemm_tile &t)
    {
        if (t.w0 >= a.n_out) return; /* a partner past the last rows */
        float *most = reinterpret_cast<float *>(m.staging + S::NB * 128); /* [8][NB] */
        float *scale = most + 8 * S::NB;                                  /* [NB] */
        const int l = opaque(lane), g = l / 4, c = l % 4 * 2;
#pragma unroll
        for (int j = 0; j < NB / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                float top = 0;
#pragma unroll
                for (int i = 0; i < S::SUBS; i++) {
                    const float gate = acc[i][4 * j + e], up = acc[i][4 * j + 2 + e];
                    const float h = gate_times_up(gate, up);
                    acc[i][4 * j + e] = h;
                    top = fmaxf(top, fabsf(h));
                }
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 4));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 8));
                top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 16));
                if (g == 0) most[(group * 4 + warp) * NB + 8 * j + c + e] = top;
            }
        }
        named_barrier(1, 256);
        const int block = t.w0 / 256, d = a.n_out / 2;
        for (int token = (int)threadIdx.x; token < NB; token += 256) {
            float top = 0;
#pragma unroll
            for (int i = 0; i < 8; i++)
                top = fmaxf(top, most[i * NB + token]);
            const float s = block_scale(top, a.ue8m0);
            scale[token] = __frcp_rn(s); /* exact where s is a power of two */
            if (token >= t.skip && token < t.n_rows)
                a.q_scale[(size_t)block * a.ld_q_scale + t.row0 + token] = s;
        }
        named_barrier(1, 256);
#pragma unroll
        for (int j = 0; j < NB / 8; j++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int token = 8 * j + c + e;
                const float inverse = scale[token];
#pragma unroll
                for (int i = 0; i < S::SUBS; i++) {
                    const int o = group * 64 + i * 32 + warp * 8 + g;
                    m.staging[token * 128 + ((o / 16 ^ (token & 7)) * 16) + o % 16] =
                        to_e4m3(acc[i][4 * j + e] * inverse);
                }
            }
        }
        named_barrier(1, 256);
        const int p = (int)threadIdx.x % 8;
        for (int token = (int)threadIdx.x / 8; token < min(NB, t.n_rows); token += 32)
            if (token >= t.skip)
                *reinterpret_cast<uint4 *>(a.q + (size_t)(t.row0 + token) * d + block * 128 +
                                           p * 16) =
                    *reinterpret_cast<const uint4 *>(m.staging + token * 128 +
                                                     ((p ^ (token & 7)) * 16));
    }

    __device__ __forceinline__ void all_tiles()
    {
        gemm_walk<S> walk(a);
        gemm_tile t;
        while (walk.next(t)) {
            if constexpr (S::ADAPTIVE) {
                const int nb = tile_width<S>(t);
                if (nb == 16)
                    tile<16>(t);
                else if (nb == 32)
                    tile<32>(t);
                else if (nb == 64)
                    tile<64>(t);
                else
                    tile<128>(t);
            } else {
                tile<S::NB>(t);
            }
        }
    }
};

/* ---- the kernel ---------------------------------------------------------------------------------------------------------- */

template <class S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS_PER_SM)
    gemm_fp8_kernel(const __grid_constant__ gemm_args a)
{
    extern __shared__ __align__(1024) uint8_t smem_bytes[];
    const gemm_smem<S> m(smem_bytes);
    if (threadIdx.x == 0) {
        tensor_prefetch(&a.w);
        tensor_prefetch(&a.x);
        tensor_prefetch(&a.x_scale);
        for (int i = 0; i < S::STAGES; i++) {
            barrier_init(m.full + i, LOAD_WARPS);
            barrier_init(m.empty + i, S::WGS * 4 * S::CLUSTER * WARP_ARRIVALS);
        }
        if constexpr (S::SWAPS) S::math::prepare(m);
        barrier_init_fence();
    }
    __syncthreads();
    if (S::CLUSTER > 1) {
        cluster_arrive_relaxed();
        cluster_wait();
    }
    const int warp = __shfl_sync(0xffffffffu, (int)threadIdx.x / 32, 0);
    if (warp >= S::WGS * 4) {
        if constexpr (S::WGS > 1) registers_lower<S::LOAD_REGISTERS>();
        if (warp == S::WGS * 4)
            load_tiles<S, 0>(a, m);
        else if (warp == S::WGS * 4 + 1)
            load_tiles<S, 1>(a, m);
        else if (warp == S::WGS * 4 + 2)
            load_tiles<S, 2>(a, m);
        else
            load_tiles<S, 3>(a, m);
    } else {
        if constexpr (S::WGS > 1) registers_raise<S::MATH_REGISTERS>();
        early::wait();
        if (threadIdx.x == 0) early::next();
        typename S::math group(a, m, warp);
        group.all_tiles();
    }
    if (S::CLUSTER > 1) { /* a partner may still multicast here, or arrive at a barrier here */
        __syncwarp();
        cluster_arrive_relaxed();
        cluster_wait();
    }
}

/* ---- launching ------------------------------------------------------------------------------------------------------------ */

/* A shape as the host sees it. */
struct gemm_kernel {
    const char *name;
    void (*kernel)(gemm_args);
    int w_rows, nb, cw, ct, w_box, x_box, x_tail, threads, smem_bytes;
};
template <class S> constexpr gemm_kernel describe(const char *name)
{
    return {name,     gemm_fp8_kernel<S>, S::W_ROWS,  S::NB,        S::CW, S::CT, S::W_ROWS / S::CT,
            S::X_BOX, S::X_TAIL,          S::THREADS, S::SMEM_BYTES};
}

/* gemm_fp8.cu: maps and weights into a; launch with as many blocks as fit or as there may be tiles. */
cudaError_t gemm_launch(const ::tr_gemm_fp8 *g, const gemm_kernel &k, gemm_args &a,
                        const ::tr_fp8_weight *w, const ::tr_fp8_rows *x, long tiles_max,
                        cudaStream_t stream);
/* gemm_fp8_moe.cu: raise the shared memory limits of the grouped kernels. */
cudaError_t gemm_prepare_moe();

} // namespace tr

#endif
