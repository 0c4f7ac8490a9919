/* The scale of a block of 128 activations and its e4m3 numbers (model.md 5.1): shared by the kernel that quantises rows
 * and by epilogues that do it in passing. */
#ifndef TR_CUDA_QUANTISE_CUH
#define TR_CUDA_QUANTISE_CUH

#include <cuda_fp8.h>
#include <stdint.h>

namespace tr
{

/* ue8m0: the power of two at or above amax/448. */
__device__ __forceinline__ float block_scale(float amax, int ue8m0)
{
    amax = fmaxf(amax, 1e-4f);
    if (!ue8m0) return __fdiv_rn(amax, 448.0f);
    return __uint_as_float((__float_as_uint(__fmul_rn(amax, 1.0f / 448.0f)) + 0x7fffffu) &
                           0xff800000u);
}

/* inverse is exact for powers of two; other scales divide, as the definition does. */
__device__ __forceinline__ float block_divide(float x, float scale, float inverse, int ue8m0)
{
    return ue8m0 ? x * inverse : __fdiv_rn(x, scale);
}

__device__ __forceinline__ uint8_t to_e4m3(float x)
{
    return (uint8_t)__nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint32_t to_e4m3x2(float low, float high)
{
    return (uint32_t)__nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

} // namespace tr

#endif
