/* gemm_fp8_wide.cuh's orientation for experts of some 50 to some 200 rows: up to 192 tokens are one tile, 64 to each of three
 * math warpgroups, by 128 weight rows, so that an expert's weights pass once; warpgroups past the last row rest. Two blocks of
 * a cluster share the tokens. Same blocks, same order along k, same bits. */
#ifndef TR_CUDA_GEMM_FP8_TALL_CUH
#define TR_CUDA_GEMM_FP8_TALL_CUH

#include "kernels/cuda/gemm_fp8_wide.cuh"

namespace tr
{

template <class S> struct math_group_tall;

template <bool GATE_UP_> struct tall_shape {
    using math = math_group_tall<tall_shape>;
    static constexpr int WGS = 3, W_ROWS = 128, NB = 64 * WGS, CW = 2, CT = 1;
    static constexpr bool GROUPED = true, GATE_UP = GATE_UP_, ADAPTIVE = true, EVEN = true;
    static constexpr bool SWAPS = GATE_UP; /* two blocks make the 128 numbers of a scale */
    static constexpr int CLUSTER = CW, THREADS = 128 * (WGS + 1), BLOCKS_PER_SM = 1;
    static constexpr int X_BOX = 64, X_TAIL = 16;
    static constexpr int W_BYTES = W_ROWS * 128, X_BYTES = NB * 128, S_BYTES = NB * 4, S_PITCH = NB;
    static constexpr int W_BLOCKS = GATE_UP ? 2 : 1;
    static constexpr int STAGE_BYTES = W_BYTES + X_BYTES + S_BYTES + W_BLOCKS * 16 + 16;
    /* A warp's 16 tokens leave in rows of 64 bytes, and 16 against bank conflicts. */
    static constexpr int ROW_PITCH = 80, WARP_BYTES = 16 * ROW_PITCH, BUFFERS = 1;
    static constexpr int OUT_BYTES = WGS * 4 * WARP_BYTES;
    static constexpr int STAGING_BYTES = OUT_BYTES + (GATE_UP ? 2 * NB * 4 + 128 : 0);
    static constexpr int STAGES = (SMEM_BLOCK_MAX - STAGING_BYTES) / STAGE_BYTES;
    static constexpr int SMEM_BYTES = STAGES * STAGE_BYTES + STAGING_BYTES;
    static constexpr int PARTS = 1, PN = W_ROWS, BATCH = 1;
    static constexpr int MATH_REGISTERS = 160, LOAD_REGISTERS = 32;
    static_assert(SMEM_BYTES <= SMEM_BLOCK_MAX && STAGING_BYTES % 128 == 0, "shared memory");

    /* Tokens that are loaded; and from one tile of an expert to the next. */
    static __device__ __forceinline__ int width(int n)
    {
        return (max(n, 1) + 15) / 16 * 16;
    }
    static __device__ __forceinline__ int step(int n)
    {
        return (n + 63) / 64 * 64;
    }
};

/* 4 bytes into another block of the cluster, counted there on *done. */
__device__ __forceinline__ void store_to_partner(float *smem, float v, uint64_t *done,
                                                 uint32_t rank)
{
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
            cluster_address(smem_address(smem), rank)),
        "r"(__float_as_uint(v)), "r"(cluster_address(smem_address(done), rank))
        : "memory");
}

template <class S> struct math_group_tall : math_group_wide<S> {
    using base = math_group_wide<S>;
    using base::a;
    using base::at;
    using base::group;
    using base::lane;
    using base::m;
    using base::warp;
    uint32_t swaps = 0; /* tiles so far, of which two share largest numbers */

    __device__ math_group_tall(const gemm_args &args, const gemm_smem<S> &smem, int i_warp)
        : base(args, smem, i_warp)
    {
    }
    static __device__ __forceinline__ float *theirs_at(const gemm_smem<S> &m)
    {
        return reinterpret_cast<float *>(m.staging + S::OUT_BYTES);
    }
    static __device__ __forceinline__ uint64_t *swap_barriers(const gemm_smem<S> &m)
    {
        return reinterpret_cast<uint64_t *>(theirs_at(m) + 2 * S::NB);
    }
    static __device__ __forceinline__ void prepare(const gemm_smem<S> &m)
    {
        barrier_init(swap_barriers(m), 1);
        barrier_init(swap_barriers(m) + 1, 1);
    }

    __device__ __forceinline__ void store_rows(float (&acc)[1][S::PN / 2], const gemm_tile &t,
                                               int to)
    {
        const int l = opaque(lane), row = l % 16;
        uint8_t *rows = m.staging + (group * 4 + warp) * S::WARP_BYTES;
#pragma unroll
        for (int c = 0; c < S::PN; c += 32) {
            __syncwarp(); /* what was here has been read */
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const float *v = acc[0] + c / 2 + 4 * j;
                store_matrix_x4(smem_address(rows + row * S::ROW_PITCH + (j + l / 16) * 16),
                                pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]),
                                pack_bf16(v[6], v[7]));
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int r = i * 8 + l / 4, dst = __shfl_sync(0xffffffffu, to, r);
                if (dst >= 0)
                    store_piece(a, rows + r * S::ROW_PITCH + l % 4 * 16, dst, t.w0 + c + l % 4 * 8);
            }
        }
    }

    /* The block's 128 rows of gate and up are 64 numbers of each token; the largest of the other 64 comes from the partner.
     * What came is double: nobody sends for the next tile but one before he has what was sent for the next, which is sent
     * after this tile's was read. */
    __device__ __forceinline__ void store_gate_up(float (&acc)[1][S::PN / 2], const gemm_tile &t,
                                                  int blocks)
    {
        const int l = opaque(lane), buffer = (int)(swaps % 2);
        const int half = t.w0 / 128 % 2, block = t.w0 / 256, d = a.n_out / 2;
        const int token = group * 64 + warp * 16 + l / 4;
        uint8_t *rows = m.staging + (group * 4 + warp) * S::WARP_BYTES;
        float *theirs = theirs_at(m) + buffer * S::NB;
        uint64_t *done = swap_barriers(m) + buffer;
        float top[2] = {0, 0};
        if (threadIdx.x == 0) barrier_expect(done, (uint32_t)(blocks * 64 * 4));
#pragma unroll
        for (int e = 0; e < S::PN / 2; e++) {
            if (e / 4 % 2) continue; /* up */
            const float h = gate_times_up(acc[0][e], acc[0][e + 4]);
            acc[0][e] = h;
            top[e % 4 / 2] = fmaxf(top[e % 4 / 2], fabsf(h));
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(0xffffffffu, top[r], 2));
            if (l % 4 == 0)
                store_to_partner(theirs + token + 8 * r, top[r], done, cluster_rank() ^ 1);
        }
        barrier_wait(done, swaps / 2 % 2);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            float other = l % 4 == 0 ? theirs[token + 8 * r] : 0.0f;
            other = __shfl_sync(0xffffffffu, other, l & ~3);
            const float s = block_scale(fmaxf(top[r], other), a.ue8m0), inverse = __frcp_rn(s);
            if (half == 0 && l % 4 == 0 && token + 8 * r >= t.skip && token + 8 * r < t.n_rows)
                a.q_scale[(size_t)block * a.ld_q_scale + t.row0 + token + 8 * r] = s;
#pragma unroll
            for (int j = 0; j < S::PN / 8; j += 2)
                *reinterpret_cast<uint16_t *>(rows + (l / 4 + 8 * r) * S::ROW_PITCH + j / 2 * 8 +
                                              l % 4 * 2) =
                    (uint16_t)to_e4m3x2(acc[0][4 * j + 2 * r] * inverse,
                                        acc[0][4 * j + 2 * r + 1] * inverse);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int r = i * 8 + l / 4, tk = group * 64 + warp * 16 + r;
            if (tk < t.skip || tk >= t.n_rows) continue;
            *reinterpret_cast<uint4 *>(a.q + (size_t)(t.row0 + tk) * d + block * 128 + half * 64 +
                                       l % 4 * 16) =
                *reinterpret_cast<const uint4 *>(rows + r * S::ROW_PITCH + l % 4 * 16);
        }
        __syncwarp();
    }

    /* Nothing to multiply: stages go by. */
    __device__ __forceinline__ void rest()
    {
#pragma unroll 1
        for (int k = 0; k < a.n_k; k++) {
            barrier_wait(m.full + at.stage, at.parity);
            this->release(at.stage);
            at.next();
        }
    }

    __device__ __forceinline__ void all_tiles()
    {
        gemm_walk<S> walk(a);
        gemm_tile t;
        while (walk.next(t)) {
            const int blocks = (t.n_rows + 63) / 64;
            if (group < blocks) {
                const int to = S::GATE_UP ? 0 : this->output_row(t);
                float acc[1][S::PN / 2];
#pragma unroll
                for (int j = 0; j < S::PN / 2; j++)
                    acc[0][j] = 0;
                this->product_single(acc, 0);
                /* Who rests does not run ahead: the stages in front of the others' are theirs. */
                if (blocks < S::WGS) named_barrier(1, 128 * S::WGS);
                walk.limits(t);
                if constexpr (S::GATE_UP)
                    store_gate_up(acc, t, blocks);
                else
                    store_rows(acc, t, to);
            } else {
                rest();
                named_barrier(1, 128 * S::WGS);
                if (S::GATE_UP) barrier_wait(swap_barriers(m) + swaps % 2, swaps / 2 % 2);
            }
            swaps++;
        }
    }
};

} // namespace tr

#endif
