/* A CUDA runtime that plays one Hopper GPU, for the program linked with it (tests/trireme_on_shim): memory is the host's, copies
 * are copies, kernels do nothing, everything is finished when it is asked for. So a job starts, runs its steps, answers
 * nonsense and ends; what can be seen is what the program asks for and what it does when that fails. What a runtime refuses it
 * refuses, too (cuda_shim_check.h).
 *
 *   CUDA_SHIM_ALLOC=N     the N-th allocation of device or pinned memory (from 1) fails, once
 *   CUDA_SHIM_GIB=N       of device memory, 8 where it is not said; what is not touched costs nothing
 *   CUDA_SHIM_ERROR=E     a kernel fails with cudaError_t E: the first wait behind a step says so, and every call after it
 *   CUDA_SHIM_START=1     ... not a step's: the first wait there is
 *   CUDA_SHIM_COUNT=FILE  at the end: "ALLOCATIONS LATE LAUNCHES STEPS", late: behind the first step's first kernel
 */
#include <config.h>

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "tests/fault/cuda_shim_check.h"

enum { N_SMS = 132, N_KERNELS = 1024, N_BLOCKS = 4096 };

typedef struct shim_block {
    void *memory;
    size_t bytes;
} shim_block;

/* A library in front of another has nowhere else to keep its state. The program calls it from one thread at a time. */
static struct {
    struct shim_kernel {
        const void *function;
        bool begins_step;
    } kernel[N_KERNELS];
    int n_kernels;
    shim_block block[N_BLOCKS];
    size_t used;
    long allocations, late, launches, steps;
    cudaError_t sticky, last;
    dim3 grid, threads; /* of the launch that is being prepared */
    size_t shared;
    cudaStream_t stream;
} shim;

static long number(const char *name)
{
    const char *text = getenv(name);
    return text ? strtol(text, NULL, 10) : 0;
}

static size_t memory_bytes(void)
{
    const long gib = number("CUDA_SHIM_GIB");
    return (size_t)(gib > 0 ? gib : 8) << 30;
}

/* Every call that can tell of an earlier kernel's failure goes through here. */
static cudaError_t said(cudaError_t e)
{
    if (shim.sticky != cudaSuccess) e = shim.sticky;
    if (e != cudaSuccess) shim.last = e;
    return e;
}

/* Something has been waited for: now a kernel's failure shows. */
static cudaError_t waited(void)
{
    const long error = number("CUDA_SHIM_ERROR");
    if (error && (shim.steps > 0 || number("CUDA_SHIM_START"))) shim.sticky = (cudaError_t)error;
    return said(cudaSuccess);
}

__attribute__((destructor)) static void write_counts(void)
{
    const char *path = getenv("CUDA_SHIM_COUNT");
    FILE *f = path ? fopen(path, "we") : NULL;
    if (!f) return;
    fprintf(f, "%ld %ld %ld %ld\n", shim.allocations, shim.late, shim.launches, shim.steps);
    fclose(f);
}

/* ---- what the compiler puts around kernels ------------------------------------------------------------------------- */

void **__cudaRegisterFatBinary(void *image);
void __cudaRegisterFatBinaryEnd(void **handle);
void __cudaUnregisterFatBinary(void **handle);
void __cudaRegisterFunction(void **handle, const char *function, char *device_function,
                            const char *name, int thread_limit, uint3 *tid, uint3 *bid, dim3 *block,
                            dim3 *grid, int *warp);
cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function);
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 threads, void **args,
                               size_t shared, cudaStream_t stream);
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 threads, size_t shared,
                                     struct CUstream_st *stream);
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *threads, size_t *shared, void *stream);

void **__cudaRegisterFatBinary(void *image)
{
    return image;
}

void __cudaRegisterFatBinaryEnd(void **handle)
{
    (void)handle;
}

void __cudaUnregisterFatBinary(void **handle)
{
    (void)handle;
}

void __cudaRegisterFunction(void **handle, const char *function, char *device_function,
                            const char *name, int thread_limit, uint3 *tid, uint3 *bid, dim3 *block,
                            dim3 *grid, int *warp)
{
    (void)handle, (void)device_function;
    (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
    if (shim.n_kernels == N_KERNELS) abort(); /* a larger table is wanted */
    shim_check_kernel(function, thread_limit);
    shim.kernel[shim.n_kernels].function = function;
    shim.kernel[shim.n_kernels++].begins_step = strstr(name, "plan_apply") != NULL;
}

static cudaError_t launch(const void *function, const cudaLaunchConfig_t *config)
{
    const cudaError_t e = shim_check_launch(function, config);
    if (e != cudaSuccess) return said(e);
    shim.launches++;
    for (int i = 0; i < shim.n_kernels; i++)
        if (shim.kernel[i].function == function && shim.kernel[i].begins_step) shim.steps++;
    return said(cudaSuccess);
}

cudaError_t __cudaGetKernel(cudaKernel_t *out, const void *function)
{
    *out = (cudaKernel_t)(uintptr_t)function;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 threads, void **args,
                               size_t shared, cudaStream_t stream)
{
    return cudaLaunchKernel((const void *)kernel, grid, threads, args, shared, stream);
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 threads, size_t shared,
                                     struct CUstream_st *stream)
{
    shim.grid = grid;
    shim.threads = threads;
    shim.shared = shared;
    shim.stream = stream;
    return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *threads, size_t *shared, void *stream)
{
    *grid = shim.grid;
    *threads = shim.threads;
    *shared = shim.shared;
    memcpy(stream, &shim.stream, sizeof shim.stream);
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 threads, void **args,
                             size_t shared, cudaStream_t stream)
{
    const cudaLaunchConfig_t config = {
        .gridDim = grid, .blockDim = threads, .dynamicSmemBytes = shared, .stream = stream};
    (void)args;
    return launch(function, &config);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **args)
{
    (void)args;
    return launch(function, config);
}

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *out, const void *function)
{
    (void)function;
    memset(out, 0, sizeof *out);
    out->maxThreadsPerBlock = 1024;
    out->numRegs = 32;
    return said(cudaSuccess);
}

cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute which, int value)
{
    return said(shim_check_attribute(function, which, value));
}

static CUresult encode(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                       const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                       const cuuint32_t *steps, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                       CUtensorMapFloatOOBfill fill)
{
    (void)steps, (void)interleave, (void)promotion, (void)fill;
    memset(map, 0, sizeof *map);
    return shim_check_map(type, rank, address, dims, strides, box, swizzle);
}

/* The program asks for one entry only. */
cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **out, unsigned version,
                                             unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *found)
{
    CUresult (*entry)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
                      const cuuint64_t *, const cuuint32_t *, const cuuint32_t *,
                      CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill) = encode;
    (void)version, (void)flags;
    *out = NULL;
    *found = cudaDriverEntryPointSymbolNotFound;
    if (strcmp(symbol, "cuTensorMapEncodeTiled") != 0) return said(cudaSuccess);
    memcpy(out, &entry, sizeof entry);
    *found = cudaDriverEntryPointSuccess;
    return said(cudaSuccess);
}

/* ---- the device ---------------------------------------------------------------------------------------------------- */

cudaError_t cudaGetDeviceCount(int *out)
{
    *out = 1;
    return said(cudaSuccess);
}

cudaError_t cudaDriverGetVersion(int *out)
{
    *out = CUDART_VERSION;
    return said(cudaSuccess);
}

cudaError_t cudaGetDevice(int *out)
{
    *out = 0;
    return said(cudaSuccess);
}

cudaError_t cudaSetDevice(int device)
{
    return said(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *out, int device)
{
    memset(out, 0, sizeof *out);
    snprintf(out->name, sizeof out->name, "Shim H200");
    for (int i = 0; i < 16; i++)
        out->uuid.bytes[i] = (char)(0x10 + i);
    out->major = 9;
    out->multiProcessorCount = N_SMS;
    out->totalGlobalMem = memory_bytes();
    return said(device == 0 ? cudaSuccess : cudaErrorInvalidDevice);
}

cudaError_t cudaDeviceGetAttribute(int *out, enum cudaDeviceAttr which, int device)
{
    (void)device;
    *out = which == cudaDevAttrMultiProcessorCount            ? N_SMS
           : which == cudaDevAttrComputeCapabilityMajor       ? 9
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 227 << 10
                                                              : 0;
    return said(cudaSuccess);
}

cudaError_t cudaDeviceGetPCIBusId(char *out, int size, int device)
{
    (void)device;
    snprintf(out, (size_t)size, "0000:1B:00.0");
    return said(cudaSuccess);
}

cudaError_t cudaGetLastError(void)
{
    const cudaError_t e = shim.last;
    shim.last = cudaSuccess;
    return e;
}

const char *cudaGetErrorString(cudaError_t e)
{
    return e == cudaErrorECCUncorrectable   ? "uncorrectable ECC error encountered"
           : e == cudaErrorIllegalAddress   ? "an illegal memory access was encountered"
           : e == cudaErrorMemoryAllocation ? "out of memory"
                                            : "an error of the shim";
}

/* ---- memory -------------------------------------------------------------------------------------------------------- */

/* Pages of zeros that cost nothing before they are touched. */
static cudaError_t take(void **out, size_t bytes)
{
    int i = 0;

    *out = NULL;
    if (shim_check_outside() != cudaSuccess) return said(shim_check_outside());
    shim.allocations++;
    if (shim.steps > 0) shim.late++;
    if (said(cudaSuccess) != cudaSuccess) return shim.sticky;
    if (shim.allocations == number("CUDA_SHIM_ALLOC") || bytes > memory_bytes() - shim.used)
        return said(cudaErrorMemoryAllocation);
    while (i < N_BLOCKS && shim.block[i].memory)
        i++;
    if (i == N_BLOCKS) abort(); /* a larger table is wanted */
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                   -1, 0);
    if (p == MAP_FAILED) return said(cudaErrorMemoryAllocation);
    shim.block[i] = (shim_block){p, bytes};
    shim.used += bytes;
    *out = p;
    return cudaSuccess;
}

static cudaError_t give(void *memory)
{
    for (int i = 0; memory && i < N_BLOCKS; i++) {
        if (shim.block[i].memory != memory) continue;
        munmap(memory, shim.block[i].bytes);
        shim.used -= shim.block[i].bytes;
        shim.block[i] = (shim_block){NULL, 0};
        return said(cudaSuccess);
    }
    return said(memory ? cudaErrorInvalidValue : cudaSuccess);
}

cudaError_t cudaMalloc(void **out, size_t bytes)
{
    return take(out, bytes);
}

cudaError_t cudaHostAlloc(void **out, size_t bytes, unsigned flags)
{
    (void)flags;
    return take(out, bytes);
}

cudaError_t cudaFree(void *memory)
{
    return give(memory);
}

cudaError_t cudaFreeHost(void *memory)
{
    return give(memory);
}

cudaError_t cudaHostGetDevicePointer(void **out, void *memory, unsigned flags)
{
    (void)flags;
    *out = memory;
    return said(cudaSuccess);
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *all)
{
    *all = memory_bytes();
    *left = memory_bytes() - shim.used;
    return said(cudaSuccess);
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                            cudaStream_t stream)
{
    (void)kind;
    shim_check_copy(stream);
    memmove(to, from, bytes);
    return said(cudaSuccess);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                              size_t width, size_t height, enum cudaMemcpyKind kind,
                              cudaStream_t stream)
{
    (void)kind;
    shim_check_copy(stream);
    for (size_t i = 0; i < height; i++)
        memmove((char *)to + i * to_pitch, (const char *)from + i * from_pitch, width);
    return said(cudaSuccess);
}

/* The blocks of take() are zeros already, and the largest are never touched. */
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t stream)
{
    bool whole = false;
    shim_check_copy(stream);
    for (int i = 0; i < N_BLOCKS && !whole; i++)
        whole = shim.block[i].memory == to && shim.block[i].bytes == bytes;
    if (value != 0 || !whole || shim.steps > 0) memset(to, value, bytes);
    return said(cudaSuccess);
}

/* ---- streams, events, graphs: there is nothing to wait for --------------------------------------------------------- */

/* A handle is the address of a byte. */
static cudaError_t handle(void *out)
{
    void *p = malloc(1);
    memcpy(out, &p, sizeof p);
    return said(p ? cudaSuccess : cudaErrorMemoryAllocation);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned flags)
{
    (void)flags;
    return handle(out);
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned flags, int priority)
{
    (void)flags, (void)priority;
    return handle(out);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest)
{
    *least = *greatest = 0;
    return said(cudaSuccess);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    shim_check_gone(stream);
    free(stream);
    return said(cudaSuccess);
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    (void)stream;
    return waited();
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    (void)stream;
    return waited();
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags)
{
    (void)flags;
    return said(shim_check_wait(stream, event));
}

cudaError_t cudaEventCreate(cudaEvent_t *out)
{
    return handle(out);
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    (void)flags;
    return handle(out);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    shim_check_gone(event);
    free(event);
    return said(cudaSuccess);
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    shim_check_record(event, stream, 0);
    return said(cudaSuccess);
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags)
{
    shim_check_record(event, stream, (flags & cudaEventRecordExternal) != 0);
    return said(cudaSuccess);
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    const cudaError_t e = shim_check_asked(event);
    return e == cudaSuccess ? waited() : said(e);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    const cudaError_t e = shim_check_asked(event);
    return e == cudaSuccess ? waited() : said(e);
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    (void)from, (void)to;
    *ms = 1;
    return said(cudaSuccess);
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode)
{
    (void)mode;
    return said(shim_check_begin(stream));
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *out)
{
    *out = shim_check_status(stream);
    return said(cudaSuccess);
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *out)
{
    const cudaError_t e = shim_check_end(stream);
    *out = NULL;
    return e == cudaSuccess ? handle(out) : said(e);
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long flags)
{
    (void)graph, (void)flags;
    return handle(out);
}

cudaError_t cudaGraphUpload(cudaGraphExec_t graph, cudaStream_t stream)
{
    (void)graph, (void)stream;
    return said(cudaSuccess);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream)
{
    (void)graph, (void)stream;
    shim.launches++;
    return said(cudaSuccess);
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    free(graph);
    return said(cudaSuccess);
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph)
{
    free(graph);
    return said(cudaSuccess);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **node, const cudaGraphEdgeData **edge,
                                     size_t *n)
{
    if (id) *id = 1;
    if (graph) *graph = NULL;
    if (edge) *edge = NULL;
    if (n) *n = shim_check_front(stream, node);
    return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, enum cudaGraphNodeType *out)
{
    *out = shim_check_type(node);
    return said(cudaSuccess);
}

/* ---- other GPUs, which there are none of ----------------------------------------------------------------------------------- */

cudaError_t cudaDeviceSynchronize(void)
{
    return waited();
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind)
{
    (void)kind;
    memmove(to, from, n);
    return waited();
}

cudaError_t cudaMemset(void *to, int byte, size_t n)
{
    memset(to, byte, n);
    return said(cudaSuccess);
}

cudaError_t cudaDeviceGetByPCIBusId(int *out, const char *id)
{
    (void)id;
    *out = 0;
    return said(cudaSuccess);
}

cudaError_t cudaDeviceCanAccessPeer(int *out, int device, int peer)
{
    (void)device, (void)peer;
    *out = 0;
    return said(cudaSuccess);
}

cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t *out, void *memory)
{
    (void)out, (void)memory;
    return said(cudaErrorNotSupported);
}

cudaError_t cudaIpcOpenMemHandle(void **out, cudaIpcMemHandle_t handle, unsigned flags)
{
    (void)handle, (void)flags;
    *out = NULL;
    return said(cudaErrorNotSupported);
}

cudaError_t cudaIpcCloseMemHandle(void *memory)
{
    (void)memory;
    return said(cudaErrorInvalidValue);
}

cudaError_t cudaOccupancyMaxActiveClusters(int *out, const void *function,
                                           const cudaLaunchConfig_t *config)
{
    (void)function, (void)config;
    *out = N_SMS / 4;
    return said(cudaSuccess);
}
