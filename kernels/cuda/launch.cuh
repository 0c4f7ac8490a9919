/* Launches that need not wait for the kernel in front of them: its blocks say when the next one may come in beside them, which
 * hides what a launch costs and lets weights, which nobody writes, be fetched ahead (kernels.md 2, 6).
 *
 * The order of a kernel that is launched so, and of every one: wait(), which returns when the kernel in front has ended and what
 * it wrote can be seen; then next(); then the rest. Each block, or one thread of it, calls both. So whoever comes in early finds
 * everything done but the one kernel in front, and nobody ends before those that he follows.
 *
 * What the kernel in front writes must not be read through __ldg or __restrict__ pointers: the compiler may move such reads up.
 */
#ifndef TR_CUDA_LAUNCH_CUH
#define TR_CUDA_LAUNCH_CUH

#include <cuda_runtime.h>

#include "kernels/cuda/older.cuh"

namespace tr
{

namespace early
{

__device__ __forceinline__ void wait()
{
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void next()
{
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ void follow()
{
    wait();
    next();
}

/* Whether the next launch may be early. In a record it may behind one kernel; what comes behind a join of lanes, or a stamp, has
 * its edges as they are. Outside of records the driver knows. */
inline bool allowed(cudaStream_t stream)
{
    enum cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaGraphNode_t *node = nullptr;
    const cudaGraphEdgeData *edge = nullptr;
    enum cudaGraphNodeType type;
    size_t n = 0;

    if (cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &node, &edge, &n) !=
        cudaSuccess) {
        (void)cudaGetLastError();
        return false;
    }
    if (status == cudaStreamCaptureStatusNone) return true;
    return n == 1 && cudaGraphNodeGetType(node[0], &type) == cudaSuccess &&
           type == cudaGraphNodeTypeKernel;
}

/* cluster: blocks of a cluster; 1: none. */
template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int cluster, dim3 grid, unsigned threads, size_t smem,
                   cudaStream_t stream, A &&...args)
{
    cudaLaunchAttribute attribute[2] = {};
    cudaLaunchConfig_t config = {};

    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem;
    config.stream = stream;
    config.attrs = attribute;
    if (cluster > 1) {
        attribute[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attribute[config.numAttrs].val.clusterDim.x = (unsigned)cluster;
        attribute[config.numAttrs].val.clusterDim.y = 1;
        attribute[config.numAttrs++].val.clusterDim.z = 1;
    }
    if (allowed(stream)) {
        attribute[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

} // namespace early
} // namespace tr

#endif
