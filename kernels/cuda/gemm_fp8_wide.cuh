/* The other orientation of gemm_fp8_kernel.cuh, for tiles of 64 and more tokens: tokens are the M operand (64 to a math
 * warpgroup), weights the N operand. Then a thread has two token scales and few weight scales per 128 along k, and a
 * promotion is one multiply-add per output and nothing else. Same blocks, same order along k, same bits. */
#ifndef TR_CUDA_GEMM_FP8_WIDE_CUH
#define TR_CUDA_GEMM_FP8_WIDE_CUH

#include "kernels/cuda/gemm_fp8_kernel.cuh"

namespace tr
{

template <class S> struct math_group_wide;

/* 64 WGS tokens x W_ROWS weight rows. */
template <int WGS_, int W_ROWS_, int CW_, int CT_, bool GROUPED_, bool GATE_UP_> struct wide_shape {
    using math = math_group_wide<wide_shape>;
    static constexpr int WGS = WGS_, W_ROWS = W_ROWS_, NB = 64 * WGS, CW = CW_, CT = CT_;
    static constexpr bool GROUPED = GROUPED_, GATE_UP = GATE_UP_, ADAPTIVE = false;
    static constexpr bool EVEN = false, SWAPS = false;
    static constexpr int CLUSTER = CW * CT, THREADS = 128 * (WGS + 1);
    static constexpr int X_BOX = NB / CW, X_TAIL = 0;
    static constexpr int BLOCKS_PER_SM = 1;
    static constexpr int W_BYTES = W_ROWS * 128, X_BYTES = NB * 128, S_BYTES = NB * 4, S_PITCH = NB;
    static constexpr int W_BLOCKS = W_ROWS > 128 ? 2 : 1;
    static constexpr int STAGE_BYTES = W_BYTES + X_BYTES + S_PITCH * 4 + W_BLOCKS * 16 + 16;
    /* [64][64] bf16 per warpgroup for results on their way out; a tile uses each equally often. */
    static constexpr int BUFFERS = W_ROWS == 192 ? 3 : W_ROWS > 64 ? 2 : 1;
    /* Or, where rows may go anywhere, all of a tile: a row's columns leave in one copy. 16 bytes more: bank conflicts. */
    static constexpr int ROW_PITCH = GROUPED && !GATE_UP && W_ROWS == 256 ? W_ROWS * 2 + 16 : 0;
    static constexpr int STAGING_BYTES = WGS * (ROW_PITCH ? 64 * ROW_PITCH : BUFFERS * 8192);
    static constexpr int FIT = (SMEM_BLOCK_MAX - STAGING_BYTES) / STAGE_BYTES;
    static constexpr int STAGES = FIT < 24 ? FIT : 24;
    static constexpr int SMEM_BYTES = STAGES * STAGE_BYTES + STAGING_BYTES;
    /* One product of the warpgroup: PN weight rows, PARTS of them. BATCH stages in flight where registers allow. */
    static constexpr int PARTS = W_ROWS == 256 ? 2 : 1, PN = W_ROWS / PARTS;
    static constexpr int BATCH = PN == 64 ? (WGS == 1 ? 4 : 2) : PN == 128 && PARTS == 1 ? 2 : 1;
    static constexpr int MATH_REGISTERS = 232, LOAD_REGISTERS = 40;
    static_assert(SMEM_BYTES <= SMEM_BLOCK_MAX, "shared memory");
    static_assert(!GATE_UP || W_ROWS == 256, "a scale block of 128 is 256 rows of gate and up");
};

template <class S> struct math_group_wide {
    const gemm_args &a;
    const gemm_smem<S> &m;
    ring_position<S::STAGES> at;
    const int group, warp, lane;
    bool odd; /* the tile begins in the middle of a 128-row block (192-row tiles) */
    uint32_t w_desc, x_desc;

    __device__ math_group_wide(const gemm_args &args, const gemm_smem<S> &smem, int i_warp)
        : a(args), m(smem), group(i_warp / 4), warp(i_warp % 4), lane((int)threadIdx.x % 32)
    {
        w_desc = descriptor_low(smem_address(m.w));
        x_desc = descriptor_low(smem_address(m.x) + group * 8192);
    }
    __device__ __forceinline__ uint32_t w_at(int stage, int part) const
    {
        return w_desc + ((stage * S::W_BYTES + part * S::PN * 128) >> 4);
    }
    __device__ __forceinline__ uint32_t x_at(int stage) const
    {
        return x_desc + ((stage * S::X_BYTES) >> 4);
    }
    __device__ __forceinline__ void release(int stage)
    {
        if (S::CLUSTER == 1) {
            barrier_arrive_warp(m.empty + stage, lane);
            return;
        }
        __syncwarp();
        for (int i = 0; i < (WARP_ARRIVALS > 1 ? S::CLUSTER : 1); i++)
            if (WARP_ARRIVALS > 1 || lane < S::CLUSTER)
                barrier_arrive_partner(m.empty + stage, (uint32_t)(WARP_ARRIVALS > 1 ? i : lane));
    }

    /* Products of scales: of rows lane/4 and lane/4 + 8 with the weights' blocks 0 and 1 (gate and up). */
    struct scales {
        float top[2], bottom[2];
    };
    __device__ __forceinline__ scales scales_at(int stage, int k) const
    {
        const float *x = m.scale + stage * S::S_PITCH + group * 64 + warp * 16 + lane / 4;
        const float *w = m.w_scale + stage * S::W_BLOCKS * 4 + k % 4;
        scales s;
#pragma unroll
        for (int i = 0; i < S::W_BLOCKS; i++) {
            s.top[i] = __fmul_rn(x[0], w[4 * i]);
            s.bottom[i] = __fmul_rn(x[8], w[4 * i]);
        }
        return s;
    }
    /* Which block the columns 8j .. 8j+7 of a part belong to. */
    __device__ __forceinline__ float pick(const float (&s)[2], int part, int j) const
    {
        if (S::GATE_UP) return s[j % 2];
        if (S::W_ROWS == 256) return s[part];
        if (S::W_ROWS == 192) return j < 8 ? s[0] : j >= 16 ? s[1] : odd ? s[1] : s[0];
        return s[0];
    }
    __device__ __forceinline__ void promote(float (&acc)[S::PN / 2], float (&p)[S::PN / 2],
                                            const scales &s, int part) const
    {
#pragma unroll
        for (int i = 0; i < S::PN / 2; i++)
            wgmma_touch(p[i]);
#pragma unroll
        for (int j = 0; j < S::PN / 8; j++) {
            const float top = pick(s.top, part, j), bottom = pick(s.bottom, part, j);
            acc[4 * j + 0] = __fmaf_rn(p[4 * j + 0], top, acc[4 * j + 0]);
            acc[4 * j + 1] = __fmaf_rn(p[4 * j + 1], top, acc[4 * j + 1]);
            acc[4 * j + 2] = __fmaf_rn(p[4 * j + 2], bottom, acc[4 * j + 2]);
            acc[4 * j + 3] = __fmaf_rn(p[4 * j + 3], bottom, acc[4 * j + 3]);
        }
    }

    __device__ __forceinline__ void product_single(float (&acc)[S::PARTS][S::PN / 2], int k)
    {
        float p[S::PN / 2] = {};
#pragma unroll 1
        for (; k < a.n_k; k++) {
            barrier_wait(m.full + at.stage, at.parity);
            const scales s = scales_at(at.stage, k);
#pragma unroll
            for (int i = 0; i < S::PARTS; i++) {
                issue_block<S::PN>(p, x_at(at.stage), w_at(at.stage, i));
                wgmma_wait<0>();
                if (i + 1 == S::PARTS) release(at.stage);
                promote(acc[i], p, s, i);
            }
            at.next();
        }
    }
    template <int U>
    __device__ __forceinline__ void
    promote_all(float (&acc)[S::PN / 2], float (&p)[S::BATCH][S::PN / 2],
                const scales (&s)[S::BATCH], const int (&stage)[S::BATCH])
    {
        wgmma_wait<S::BATCH - 1 - U>();
        release(stage[U]);
        promote(acc, p[U], s[U], 0);
        if constexpr (U + 1 < S::BATCH) promote_all<U + 1>(acc, p, s, stage);
    }
    __device__ __forceinline__ void product_batched(float (&acc)[S::PARTS][S::PN / 2])
    {
        int k = 0;
#pragma unroll 1
        for (; k + S::BATCH <= a.n_k; k += S::BATCH) {
            float p[S::BATCH][S::PN / 2] = {};
            scales s[S::BATCH];
            int stage[S::BATCH];
#pragma unroll
            for (int b = 0; b < S::BATCH; b++) {
                stage[b] = at.stage;
                barrier_wait(m.full + at.stage, at.parity);
                s[b] = scales_at(at.stage, k + b);
                at.next();
            }
#pragma unroll
            for (int b = 0; b < S::BATCH; b++)
                issue_block<S::PN>(p[b], x_at(stage[b]), w_at(stage[b], 0));
            promote_all<0>(acc[0], p, s, stage);
        }
        product_single(acc, k);
    }

    /* A warp's 16 tokens pass through its own part of shared memory: 64 columns are 128 bytes of a row, in 16-byte
     * pieces swizzled by the row. */
    __device__ __forceinline__ uint8_t *staging(int buffer) const
    {
        return m.staging + (group * S::BUFFERS + buffer) * 8192 + warp * 2048;
    }

    /* Output row of the token lane % 16 of this warp, -1: none. Read before the products, which hide the wait. */
    __device__ __forceinline__ int output_row(const gemm_tile &t) const
    {
        const int token = group * 64 + warp * 16 + lane % 16, row = t.row0 + token;
        if (token < t.skip || token >= t.n_rows) return -1;
        return S::GROUPED && a.scatter ? read_now(a.scatter + row) : row;
    }

    /* 64 columns from `column` on; v: 8 groups of 8 columns; l: the lane. Sixteen live rows in a row leave through the
     * copy engine, behind the next tile's products; others row by row to where `to` says. */
    __device__ __forceinline__ void store_bf16(const float *v, const gemm_tile &t, int to, int l,
                                               int column, int buffer) const
    {
        uint8_t *rows = staging(buffer);
        const int row = l % 8 + l / 8 % 2 * 8, first = group * 64 + warp * 16;
        if (l == 0) bulk_wait_read<S::BUFFERS - 1>(); /* the buffer is free again */
        __syncwarp();
#pragma unroll
        for (int j = 0; j < 8; j += 2)
            store_matrix_x4(
                smem_address(rows + row * 128 + (((j + l / 16) ^ (row & 7)) * 16)),
                pack_bf16(v[4 * j], v[4 * j + 1]), pack_bf16(v[4 * j + 2], v[4 * j + 3]),
                pack_bf16(v[4 * j + 4], v[4 * j + 5]), pack_bf16(v[4 * j + 6], v[4 * j + 7]));
        if (a.has_out_map && first + 16 <= t.n_rows) {
            fence_async_shared();
            __syncwarp();
            if (l == 0) {
                if (column < a.n_out) tensor_store(&a.out_map, rows, column, t.row0 + first);
                bulk_commit();
            }
            return;
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = i * 4 + l / 8, dst = __shfl_sync(0xffffffffu, to, r);
            if (dst < 0) continue;
            store_piece(a, rows + r * 128 + ((l % 8 ^ (r & 7)) * 16), dst, column + l % 8 * 8);
        }
        __syncwarp();
        if (l == 0) bulk_commit(); /* an empty group keeps the count of buffers */
    }
    /* All of a warp's rows to anywhere, each in one copy: these run behind the next tile's products, where stores would hold
     * them up, and cost an instruction a row. */
    __device__ __forceinline__ void copy_rows(float (&acc)[S::PARTS][S::PN / 2], const gemm_tile &t,
                                              int to, int l) const
    {
        uint8_t *rows = m.staging + (group * 4 + warp) * (16 * S::ROW_PITCH);
        const uint32_t at = smem_address(rows + (l % 16) * S::ROW_PITCH + l / 16 * 16);
        const int bytes = min(S::W_ROWS, a.n_out - t.w0) * 2;

        bulk_wait_read<0>(); /* of the tile before */
        __syncwarp();
#pragma unroll
        for (int i = 0; i < S::PARTS; i++) {
#pragma unroll
            for (int j = 0; j < S::PN / 8; j += 2) {
                const float *v = acc[i] + 4 * j;
                store_matrix_x4(at + (uint32_t)(i * S::PN + j * 8) * 2, pack_bf16(v[0], v[1]),
                                pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                                pack_bf16(v[6], v[7]));
            }
        }
        fence_async_shared();
        __syncwarp();
        if (l < 16 && to >= 0 && bytes > 0)
            bulk_store((__nv_bfloat16 *)a.out + (size_t)to * a.ld_out + t.w0,
                       rows + l * S::ROW_PITCH, (uint32_t)bytes);
        bulk_commit();
    }
    __device__ __forceinline__ void store_f32(const float *v, const gemm_tile &t, int column) const
    {
        float *out = (float *)a.out;
#pragma unroll
        for (int e = 0; e < 32; e++) {
            const int token = group * 64 + warp * 16 + lane / 4 + e % 4 / 2 * 8;
            const int o = column + e / 4 * 8 + lane % 4 * 2 + e % 2;
            if (token < t.n_rows && o < a.n_out)
                out[(size_t)(t.row0 + token) * a.ld_out + o] = v[e];
        }
    }
    __device__ __forceinline__ void store_rows(float (&acc)[S::PARTS][S::PN / 2],
                                               const gemm_tile &t, int to) const
    {
        const int l = opaque(lane);
        if constexpr (S::ROW_PITCH > 0) {
            if (a.copy_rows) {
                copy_rows(acc, t, to, l);
                return;
            }
        }
#pragma unroll
        for (int i = 0; i < S::PARTS; i++) {
#pragma unroll
            for (int c = 0; c < S::PN; c += 64) {
                const int column = t.w0 + i * S::PN + c;
                if (!S::GROUPED && a.out_f32)
                    store_f32(acc[i] + c / 2, t, column);
                else
                    store_bf16(acc[i] + c / 2, t, to, l, column, (i * S::PN + c) / 64 % S::BUFFERS);
            }
        }
    }

    /* The 256 rows of gate and up are 128 numbers of each token, all in the four lanes that share the token's row. */
    __device__ __forceinline__ void store_gate_up(float (&acc)[S::PARTS][S::PN / 2],
                                                  const gemm_tile &t) const
    {
        if (t.w0 >= a.n_out) return; /* a partner past the last rows */
        const int l = opaque(lane);
        float top[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < S::PARTS; i++) {
#pragma unroll
            for (int e = 0; e < S::PN / 2; e++) {
                if (e / 4 % 2) continue; /* up */
                const float h = gate_times_up(acc[i][e], acc[i][e + 4]);
                acc[i][e] = h;
                top[e % 4 / 2] = fmaxf(top[e % 4 / 2], fabsf(h));
            }
        }
        const int block = t.w0 / 256, d = a.n_out / 2;
        const int token = group * 64 + warp * 16 + l / 4;
        uint8_t *rows = staging(0);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
            const float s = block_scale(top[r], a.ue8m0), inverse = __frcp_rn(s);
            const int row = l / 4 + 8 * r;
            if (l % 4 == 0 && token + 8 * r >= t.skip && token + 8 * r < t.n_rows)
                a.q_scale[(size_t)block * a.ld_q_scale + t.row0 + token + 8 * r] = s;
#pragma unroll
            for (int i = 0; i < S::PARTS; i++) {
#pragma unroll
                for (int j = 0; j < S::PN / 8; j += 2) {
                    const int o = i * 64 + j / 2 * 8 + l % 4 * 2;
                    *reinterpret_cast<uint16_t *>(rows + row * 128 + ((o / 16 ^ (row & 7)) * 16) +
                                                  o % 16) =
                        (uint16_t)to_e4m3x2(acc[i][4 * j + 2 * r] * inverse,
                                            acc[i][4 * j + 2 * r + 1] * inverse);
                }
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int r = i * 4 + l / 8, tk = group * 64 + warp * 16 + r;
            if (tk < t.skip || tk >= t.n_rows) continue;
            *reinterpret_cast<uint4 *>(a.q + (size_t)(t.row0 + tk) * d + block * 128 + l % 8 * 16) =
                *reinterpret_cast<const uint4 *>(rows + r * 128 + ((l % 8 ^ (r & 7)) * 16));
        }
        __syncwarp();
    }

    __device__ __forceinline__ void all_tiles()
    {
        gemm_walk<S> walk(a);
        gemm_tile t;
        while (walk.next(t)) {
            odd = S::W_ROWS == 192 && t.w0 / 64 % 2;
            const int to = S::GATE_UP ? 0 : output_row(t);
            float acc[S::PARTS][S::PN / 2];
#pragma unroll
            for (int i = 0; i < S::PARTS; i++) {
#pragma unroll
                for (int j = 0; j < S::PN / 2; j++)
                    acc[i][j] = 0;
            }
            if constexpr (S::BATCH > 1)
                product_batched(acc);
            else
                product_single(acc, 0);
            walk.limits(t);
            if constexpr (S::GATE_UP)
                store_gate_up(acc, t);
            else
                store_rows(acc, t, to);
        }
        bulk_wait<0>();
    }
};

} // namespace tr

#endif
