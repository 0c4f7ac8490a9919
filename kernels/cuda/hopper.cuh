/* Hopper's building blocks, as thin inline functions around PTX (PTX ISA 8.x, sm_90a): mbarriers, bulk and tensor copies,
 * warpgroup matrix instructions' fences and descriptors, clusters, programmatic dependent launch. One name per instruction,
 * no policy. The wgmma instructions themselves are written where they are used, since each kernel has its own shape.
 * Included by .cu files of kernels/cuda only. */
#ifndef TR_CUDA_HOPPER_CUH
#define TR_CUDA_HOPPER_CUH

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace tr
{

/* ---- addresses ---------------------------------------------------------------------------------------------------- */

__device__ __forceinline__ uint32_t smem_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}

/* The same shared address in another CTA of the cluster. */
__device__ __forceinline__ uint32_t cluster_address(uint32_t smem, uint32_t cta_rank)
{
    uint32_t a;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(smem), "r"(cta_rank));
    return a;
}

__device__ __forceinline__ uint32_t cluster_rank()
{
    uint32_t r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

/* ---- mbarriers: a barrier flips its phase when its count of arrivals and its expected bytes have both come ---------- */

/* A warp that hands on shared memory lets one lane arrive for all, after __syncwarp(): that orders the lanes' stores before
 * the arrival, the arrival releases, the wait acquires, and the chain holds (PTX memory model, causality order).
 * compute-sanitizer's racecheck does not follow it, and reports such hand-overs; tests/cuda/race_pattern.cu shows that it
 * reports none where every lane arrives for itself. So they do in a build for it (NVCC_FLAGS=-DTR_CUDA_EVERY_LANE), and
 * what it reports there is something else. */
#ifdef TR_CUDA_EVERY_LANE
enum { WARP_ARRIVALS = 32 };
#else
enum { WARP_ARRIVALS = 1 };
#endif

__device__ __forceinline__ void barrier_init(uint64_t *b, uint32_t arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(smem_address(b)), "r"(arrivals)
                 : "memory");
}
/* After the inits, before anyone (the copy engine too) uses the barriers. */
__device__ __forceinline__ void barrier_init_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t *b,
                                               uint32_t bytes) /* counts as one arrival */
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(b)),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *b)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(smem_address(b)) : "memory");
}
/* As many arrivals as `count` threads would make. */
__device__ __forceinline__ void barrier_arrive(uint64_t *b, uint32_t count)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(b)), "r"(count)
                 : "memory");
}
/* All lanes of a converged warp have done their part: WARP_ARRIVALS arrivals, or `count` times as many. */
__device__ __forceinline__ void barrier_arrive_warp(uint64_t *b, int lane, uint32_t count = 1)
{
    __syncwarp();
    if (WARP_ARRIVALS > 1 || lane == 0) barrier_arrive(b, count);
}
__device__ __forceinline__ void barrier_arrive_cluster(uint64_t *b, uint32_t cta_rank)
{
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(
                     cluster_address(smem_address(b), cta_rank))
                 : "memory");
}
__device__ __forceinline__ bool barrier_try(uint64_t *b, uint32_t parity)
{
    uint32_t ok;
    asm volatile("{\n.reg .pred p;\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(ok)
                 : "r"(smem_address(b)), "r"(parity)
                 : "memory");
    return ok != 0;
}
__device__ __forceinline__ void barrier_wait(uint64_t *b, uint32_t parity)
{
    while (!barrier_try(b, parity)) {
    }
}
/* Barrier among `threads` threads of the block (a multiple of 32); id 1..15, 0 is __syncthreads. */
__device__ __forceinline__ void named_barrier(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* Counts towards a named barrier without waiting for it. */
__device__ __forceinline__ void named_barrier_arrive(int id, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* Position in a ring of N stages: the stage and the parity to wait for. */
template <int N> struct ring_position {
    int stage = 0;
    uint32_t parity = 0;
    __device__ __forceinline__ void next()
    {
        if (++stage == N) {
            stage = 0;
            parity ^= 1;
        }
    }
};

/* ---- copies ------------------------------------------------------------------------------------------------------- */

/* L2 policies as the 64-bit words that createpolicy makes for fraction 1.0. */
__device__ __forceinline__ uint64_t policy_evict_first()
{
    uint64_t p;
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(p));
    return p;
}
__device__ __forceinline__ uint64_t policy_evict_normal()
{
    uint64_t p;
    asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(p));
    return p;
}
__device__ __forceinline__ uint64_t policy_evict_last()
{
    uint64_t p;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(p));
    return p;
}

/* bytes: a multiple of 16; both addresses 16-byte aligned. Completes on *done in bytes. */
__device__ __forceinline__ void bulk_load(void *smem, const void *global, uint32_t bytes,
                                          uint64_t *done)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(smem_address(smem)),
                 "l"(global), "r"(bytes), "r"(smem_address(done))
                 : "memory");
}
__device__ __forceinline__ void bulk_load(void *smem, const void *global, uint32_t bytes,
                                          uint64_t *done, uint64_t policy)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
                 "[%0], [%1], %2, [%3], %4;" ::"r"(smem_address(smem)),
                 "l"(global), "r"(bytes), "r"(smem_address(done)), "l"(policy)
                 : "memory");
}
__device__ __forceinline__ void bulk_store(void *global, const void *smem, uint32_t bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(smem_address(smem)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_commit()
{
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void bulk_wait_read()
{
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
template <int PENDING> __device__ __forceinline__ void bulk_wait()
{
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ void tensor_prefetch(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void tensor_load(void *smem, const CUtensorMap *map, int x, int y,
                                            uint64_t *done)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4}], [%2];" ::"r"(smem_address(smem)),
                 "l"(map), "r"(smem_address(done)), "r"(x), "r"(y)
                 : "memory");
}
__device__ __forceinline__ void tensor_load(void *smem, const CUtensorMap *map, int x, int y,
                                            uint64_t *done, uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_address(smem)),
        "l"(map), "r"(smem_address(done)), "r"(x), "r"(y), "l"(policy)
        : "memory");
}
__device__ __forceinline__ void tensor_load(void *smem, const CUtensorMap *map, int x, int y, int z,
                                            uint64_t *done)
{
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(smem_address(smem)),
                 "l"(map), "r"(smem_address(done)), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
__device__ __forceinline__ void tensor_load(void *smem, const CUtensorMap *map, int x, int y, int z,
                                            uint64_t *done, uint64_t policy)
{
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
        " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(smem_address(smem)),
        "l"(map), "r"(smem_address(done)), "r"(x), "r"(y), "r"(z), "l"(policy)
        : "memory");
}
/* The same box into every CTA of `mask`, at the same shared offset, completing on each one's barrier. */
__device__ __forceinline__ void tensor_load_multicast(void *smem, const CUtensorMap *map, int x,
                                                      int y, uint64_t *done, uint16_t mask)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
                 ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(smem_address(smem)),
                 "l"(map), "r"(smem_address(done)), "r"(x), "r"(y), "h"(mask)
                 : "memory");
}
__device__ __forceinline__ void tensor_store(const CUtensorMap *map, const void *smem, int x, int y)
{
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
        "r"(smem_address(smem)), "r"(x), "r"(y)
        : "memory");
}
/* 16 bytes; src_bytes 0 fills zeros. */
__device__ __forceinline__ void async_copy16(uint32_t smem, const void *global, int src_bytes)
{
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(smem), "l"(global),
                 "r"(src_bytes)
                 : "memory");
}
/* The thread's async copies so far count as one arrival on *b when they are done. */
__device__ __forceinline__ void async_copy_arrive(uint64_t *b)
{
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(b))
                 : "memory");
}
/* Ordinary shared-memory stores become visible to the copy engine and the tensor cores. */
__device__ __forceinline__ void fence_async_shared()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/* ---- warpgroup matrix instructions --------------------------------------------------------------------------------- */

__device__ __forceinline__ void wgmma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING> __device__ __forceinline__ void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
/* Keeps the compiler from moving a use of an accumulator across a fence or wait. */
__device__ __forceinline__ void wgmma_touch(float &x)
{
    asm volatile("" : "+f"(x)::"memory");
}

enum smem_layout {
    LAYOUT_PLAIN = 0,
    LAYOUT_SWIZZLE_128 = 1,
    LAYOUT_SWIZZLE_64 = 2,
    LAYOUT_SWIZZLE_32 = 3
};

/* Matrix descriptor of an operand in shared memory: leading and stride byte offsets as PTX defines them for the layout
 * (128-byte swizzle, K-major: rows of 128 bytes, stride 1024 between groups of 8 rows, leading unused). */
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t smem, uint32_t leading_bytes,
                                                      uint32_t stride_bytes, smem_layout layout)
{
    return (uint64_t)((smem & 0x3ffff) >> 4) | (uint64_t)(leading_bytes >> 4) << 16 |
           (uint64_t)(stride_bytes >> 4) << 32 | (uint64_t)layout << 62;
}

template <int REGISTERS> __device__ __forceinline__ void registers_raise()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS> __device__ __forceinline__ void registers_lower()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

/* ---- clusters and dependent launches -------------------------------------------------------------------------------- */

__device__ __forceinline__ void cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_arrive_relaxed()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* Before the first read of what the kernel before in the stream wrote; nothing where the launch has no such attribute. */
__device__ __forceinline__ void dependent_wait()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void dependent_launch()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/* One lane of a converged warp. */
__device__ __forceinline__ bool elect_one()
{
    uint32_t p;
    asm volatile("{\n.reg .pred q;\nelect.sync _|q, 0xffffffff;\nselp.u32 %0, 1, 0, q;\n}"
                 : "=r"(p));
    return p != 0;
}

} // namespace tr

#endif
