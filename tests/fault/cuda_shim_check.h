/* What a CUDA runtime refuses, for the one that plays a GPU (cuda_shim.c): launches that no GPU takes, tensor maps that are none, a
 * stream's capture that others have not come back to, and a launch beside the kernel in front where that is not one kernel. */
#ifndef TR_TESTS_CUDA_SHIM_CHECK_H
#define TR_TESTS_CUDA_SHIM_CHECK_H

#include <cuda.h>
#include <cuda_runtime_api.h>

/* A kernel that was built for so many threads at most; 0 or less: it does not say. */
void shim_check_kernel(const void *function, int threads_most);
cudaError_t shim_check_attribute(const void *function, enum cudaFuncAttribute which, int value);
/* Before a launch on config->stream; a node of a capture. */
cudaError_t shim_check_launch(const void *function, const cudaLaunchConfig_t *config);
CUresult shim_check_map(CUtensorMapDataType type, cuuint32_t rank, const void *address,
                        const cuuint64_t *dims, const cuuint64_t *strides, const cuuint32_t *box,
                        CUtensorMapSwizzle swizzle);

/* Streams and events are addresses that nothing else has. */
void shim_check_copy(cudaStream_t stream); /* another node of a capture, no kernel */
cudaError_t shim_check_outside(void); /* what must not be asked for while a stream is captured */
/* outside: the event tells of every run of the graph, and of no capture. */
void shim_check_record(cudaEvent_t event, cudaStream_t stream, int outside);
/* The host asks for an event: not for one that was last recorded in a capture. */
cudaError_t shim_check_asked(cudaEvent_t event);
cudaError_t shim_check_wait(cudaStream_t stream, cudaEvent_t event);
void shim_check_gone(const void *handle);
cudaError_t shim_check_begin(cudaStream_t stream);
/* Every stream that has come into the capture has been waited for: else cudaErrorStreamCaptureUnjoined. */
cudaError_t shim_check_end(cudaStream_t stream);
enum cudaStreamCaptureStatus shim_check_status(cudaStream_t stream);
/* What the stream's next node would come behind: so many, the first of them in *node. */
size_t shim_check_front(cudaStream_t stream, const cudaGraphNode_t **node);
enum cudaGraphNodeType shim_check_type(cudaGraphNode_t node);

#endif
