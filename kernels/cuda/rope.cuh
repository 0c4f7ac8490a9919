/* Rope of queries (model.md 3.4), eight numbers at a time. */
#ifndef TR_CUDA_ROPE_CUH
#define TR_CUDA_ROPE_CUH

#include "kernels/cuda/common.cuh"

namespace tr
{

/* A pair of bf16 by an angle. No contraction: as on the CPU. */
__device__ __forceinline__ uint32_t turned(uint32_t pair, float cosine, float sine)
{
    const float2 v = __bfloat1622float2(*(const __nv_bfloat162 *)&pair);
    const __nv_bfloat162 y =
        __floats2bfloat162_rn(__fsub_rn(__fmul_rn(v.x, cosine), __fmul_rn(v.y, sine)),
                              __fadd_rn(__fmul_rn(v.x, sine), __fmul_rn(v.y, cosine)));
    return *(const uint32_t *)&y;
}

/* Numbers [j, j + 8) of the rope part of head `at` of all rows' heads, which is row i's; absorbed rows get them into q_absorbed
 * too. begin() reads, end() turns and writes: several of a thread's may be on their way together. */
struct rope_eight {
    uint4 *x;
    uint4 y;
    float4 first, second;
    bool pad, dense;
    __device__ __forceinline__ void begin(const tr_mla_query_args &a, const tr_rows &rows,
                                          unsigned at, unsigned i, unsigned j)
    {
        x = (uint4 *)(act(a.q) + (size_t)at * (size_t)(a.d_nope + a.d_rope) + (size_t)a.d_nope + j);
        y = *x;
        pad = is_pad(rows, (int)i);
        dense = rows.dense[i];
        const float4 *cs =
            (const float4 *)(a.rope + (size_t)(pad ? 0 : rows.position[i]) * (size_t)a.d_rope + j);
        first = cs[0];
        second = cs[1];
    }
    __device__ __forceinline__ void end(const tr_mla_query_args &a, unsigned at, unsigned j)
    {
        if (!pad) {
            y = make_uint4(turned(y.x, first.x, first.y), turned(y.y, first.z, first.w),
                           turned(y.z, second.x, second.y), turned(y.w, second.z, second.w));
            *x = y;
        }
        if (dense) return;
        *(uint4 *)(act(a.q_absorbed) + (size_t)at * (size_t)(a.d_latent + a.d_rope) +
                   (size_t)a.d_latent + j) = y;
    }
};

/* Whether its widths and addresses are such. */
inline bool rope_in_eights(const tr_mla_query_args &a)
{
    return a.d_rope % 8 == 0 && a.d_nope % 8 == 0 && a.d_latent % 8 == 0 &&
           (uintptr_t)a.q % 16 == 0 && (uintptr_t)a.q_absorbed % 16 == 0 &&
           (uintptr_t)a.rope % 16 == 0;
}

} // namespace tr

#endif
