#include <config.h>

#include "tests/fault/cuda_shim_check.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum {
    N_KERNELS = 1024,
    N_STREAMS = 16,
    N_EVENTS = 8192,
    N_FRONT = 16,
    SHARED_DEFAULT = 48 << 10, /* bytes a block may have unasked; and at most */
    SHARED_MOST = 227 << 10,
    GRID_YZ_MOST = 65535,
    BOX_MOST = 256,
};

/* Where a stream stands in a capture: what its next node comes behind, and of every stream the nodes that are before it. A node is
 * its number and type, in place of an address. */
typedef struct place {
    uintptr_t front[N_FRONT];
    int n_front;
    int behind[N_STREAMS];
} place;

static struct {
    struct {
        const void *function;
        int threads_most, shared_most;
        bool any_cluster;
    } kernel[N_KERNELS];
    int n_kernels;
    struct {
        const void *handle;
        bool captured;
        place at;
    } stream[N_STREAMS];
    struct {
        const void *handle;
        enum { PLAIN, CAPTURED, STALE } is; /* STALE: of a capture that has ended */
        place at;
    } event[N_EVENTS];
    const void *origin; /* of the capture; NULL: there is none */
    uintptr_t n_nodes;
} check;

/* ---- launches ------------------------------------------------------------------------------------------------------ */

void shim_check_kernel(const void *function, int threads_most)
{
    if (check.n_kernels == N_KERNELS) abort(); /* a larger table is wanted */
    check.kernel[check.n_kernels].function = function;
    check.kernel[check.n_kernels].threads_most = threads_most;
    check.kernel[check.n_kernels++].shared_most = SHARED_DEFAULT;
}

static int kernel_of(const void *function)
{
    for (int i = 0; i < check.n_kernels; i++)
        if (check.kernel[i].function == function) return i;
    abort(); /* it was never registered */
}

cudaError_t shim_check_attribute(const void *function, enum cudaFuncAttribute which, int value)
{
    const int i = kernel_of(function);

    if (which == cudaFuncAttributeNonPortableClusterSizeAllowed)
        check.kernel[i].any_cluster = value;
    if (which != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value < 0 || value > SHARED_MOST) return cudaErrorInvalidValue;
    check.kernel[i].shared_most = value;
    return cudaSuccess;
}

static bool within(unsigned n, unsigned most)
{
    return n >= 1 && n <= most;
}

static void add_node(cudaStream_t stream, enum cudaGraphNodeType type);

cudaError_t shim_check_launch(const void *function, const cudaLaunchConfig_t *config)
{
    const int i = kernel_of(function);
    const dim3 grid = config->gridDim, threads = config->blockDim;
    const cudaGraphNode_t *node;

    if (!within(grid.x, INT32_MAX) || !within(grid.y, GRID_YZ_MOST) ||
        !within(grid.z, GRID_YZ_MOST) || !within(threads.x, 1024) || !within(threads.y, 1024) ||
        !within(threads.z, 64) || threads.x * threads.y * threads.z > 1024)
        return cudaErrorInvalidConfiguration;
    if (check.kernel[i].threads_most > 0 &&
        threads.x * threads.y * threads.z > (unsigned)check.kernel[i].threads_most)
        return cudaErrorLaunchOutOfResources;
    if (config->dynamicSmemBytes > (size_t)check.kernel[i].shared_most)
        return cudaErrorInvalidValue;
    for (unsigned k = 0; k < config->numAttrs; k++) {
        const cudaLaunchAttribute *a = &config->attrs[k];
        if (a->id == cudaLaunchAttributeClusterDimension) {
            const unsigned x = a->val.clusterDim.x;
            if (!within(x, check.kernel[i].any_cluster ? 16 : 8) || a->val.clusterDim.y != 1 ||
                a->val.clusterDim.z != 1 || grid.x % x)
                return cudaErrorInvalidClusterSize;
        }
        if (a->id == cudaLaunchAttributeProgrammaticStreamSerialization &&
            a->val.programmaticStreamSerializationAllowed &&
            shim_check_status(config->stream) == cudaStreamCaptureStatusActive &&
            (shim_check_front(config->stream, &node) != 1 ||
             shim_check_type(node[0]) != cudaGraphNodeTypeKernel))
            return cudaErrorInvalidValue;
    }
    add_node(config->stream, cudaGraphNodeTypeKernel);
    return cudaSuccess;
}

static size_t bytes_of(CUtensorMapDataType type)
{
    return type == CU_TENSOR_MAP_DATA_TYPE_UINT8      ? 1
           : type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2
           : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32  ? 4
                                                      : 0;
}

CUresult shim_check_map(CUtensorMapDataType type, cuuint32_t rank, const void *address,
                        const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                        CUtensorMapSwizzle swizzle)
{
    const size_t bytes = bytes_of(type), wide = box[0] * bytes;

    if (!bytes || rank < 1 || rank > 5 || !address || (uintptr_t)address % 16 || wide % 16 ||
        (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && wide > 128))
        return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i < rank; i++)
        if (!dims[i] || dims[i] > UINT64_C(1) << 32 || !within(box[i], BOX_MOST))
            return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t i = 0; i + 1 < rank; i++)
        if (strides[i] % 16 || strides[i] >= UINT64_C(1) << 40) return CUDA_ERROR_INVALID_VALUE;
    return strides[0] < dims[0] * bytes ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

/* ---- captures ------------------------------------------------------------------------------------------------------ */

static int stream_of(const void *handle)
{
    int i = 0;

    while (i < N_STREAMS && check.stream[i].handle && check.stream[i].handle != handle)
        i++;
    if (i == N_STREAMS) abort(); /* a larger table is wanted */
    check.stream[i].handle = handle;
    return i;
}

static int event_of(const void *handle)
{
    int i = (int)(((uintptr_t)handle >> 4) % N_EVENTS), n = 0;

    for (; check.event[i].handle && check.event[i].handle != handle; i = (i + 1) % N_EVENTS)
        if (n++ == N_EVENTS) abort();
    check.event[i].handle = handle;
    return i;
}

static void add_node(cudaStream_t stream, enum cudaGraphNodeType type)
{
    const int i = stream_of(stream);
    place *p = &check.stream[i].at;

    if (!check.stream[i].captured) return;
    p->front[0] = ++check.n_nodes << 8 | (uintptr_t)type;
    p->n_front = 1;
    p->behind[i]++;
}

void shim_check_copy(cudaStream_t stream)
{
    add_node(stream, cudaGraphNodeTypeMemcpy);
}

cudaError_t shim_check_outside(void)
{
    return check.origin ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

void shim_check_record(cudaEvent_t event, cudaStream_t stream, int outside)
{
    const int e = event_of(event), i = stream_of(stream);

    if (outside) add_node(stream, cudaGraphNodeTypeEventRecord);
    check.event[e].is = check.stream[i].captured && !outside ? CAPTURED : PLAIN;
    check.event[e].at = check.stream[i].at;
}

cudaError_t shim_check_asked(cudaEvent_t event)
{
    return check.event[event_of(event)].is == PLAIN ? cudaSuccess : cudaErrorCapturedEvent;
}

/* A stream that waits for what is captured is captured, too. */
cudaError_t shim_check_wait(cudaStream_t stream, cudaEvent_t event)
{
    const int e = event_of(event), i = stream_of(stream);
    const place *from = &check.event[e].at;
    place *to = &check.stream[i].at;

    if (check.event[e].is == STALE) return cudaErrorCapturedEvent;
    if (check.event[e].is == PLAIN)
        return check.stream[i].captured ? cudaErrorStreamCaptureIsolation : cudaSuccess;
    if (!check.stream[i].captured) *to = (place){.n_front = 0};
    check.stream[i].captured = true;
    for (int k = 0; k < from->n_front; k++) {
        int at = 0;
        while (at < to->n_front && to->front[at] != from->front[k])
            at++;
        if (at == N_FRONT) abort(); /* a larger table is wanted */
        to->front[at] = from->front[k];
        if (at == to->n_front) to->n_front++;
    }
    for (int k = 0; k < N_STREAMS; k++)
        if (from->behind[k] > to->behind[k]) to->behind[k] = from->behind[k];
    return cudaSuccess;
}

/* The address may come back as another one's. */
void shim_check_gone(const void *handle)
{
    for (int i = 0; i < N_EVENTS && handle; i++)
        if (check.event[i].handle == handle) check.event[i].is = PLAIN;
    for (int i = 0; i < N_STREAMS && handle; i++)
        if (check.stream[i].handle == handle) check.stream[i].captured = false;
}

cudaError_t shim_check_begin(cudaStream_t stream)
{
    const int i = stream_of(stream);

    if (check.origin) return cudaErrorIllegalState;
    check.origin = stream;
    check.stream[i].captured = true;
    check.stream[i].at = (place){.n_front = 0};
    return cudaSuccess;
}

cudaError_t shim_check_end(cudaStream_t stream)
{
    const int origin = stream_of(stream);
    cudaError_t e = check.origin == (const void *)stream ? cudaSuccess : cudaErrorIllegalState;

    if (e != cudaSuccess) return e;
    for (int i = 0; i < N_STREAMS; i++) {
        if (!check.stream[i].captured) continue;
        if (check.stream[i].at.behind[i] > check.stream[origin].at.behind[i])
            e = cudaErrorStreamCaptureUnjoined;
        check.stream[i].captured = false;
    }
    for (int i = 0; i < N_EVENTS; i++)
        if (check.event[i].is == CAPTURED) check.event[i].is = STALE;
    check.origin = NULL;
    return e;
}

enum cudaStreamCaptureStatus shim_check_status(cudaStream_t stream)
{
    return stream && check.stream[stream_of(stream)].captured ? cudaStreamCaptureStatusActive
                                                              : cudaStreamCaptureStatusNone;
}

size_t shim_check_front(cudaStream_t stream, const cudaGraphNode_t **node)
{
    const place *p = &check.stream[stream_of(stream)].at;

    *node = (const cudaGraphNode_t *)(const void *)p->front;
    return (size_t)p->n_front;
}

enum cudaGraphNodeType shim_check_type(cudaGraphNode_t node)
{
    return (enum cudaGraphNodeType)((uintptr_t)node & 0xff);
}
