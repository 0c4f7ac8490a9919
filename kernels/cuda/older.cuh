/* What CUDA 12.4 to 12.9 call otherwise than 13, or do not have. */
#ifndef TR_CUDA_OLDER_CUH
#define TR_CUDA_OLDER_CUH

#include <cuda_runtime.h>

#if CUDART_VERSION < 13000
/* 13 has taken its form over: with the edges of a graph's nodes. */
#undef cudaStreamGetCaptureInfo
#define cudaStreamGetCaptureInfo cudaStreamGetCaptureInfo_v3
#endif

#if CUDART_VERSION < 12050
/* An entry of the driver that this runtime was made for, which is no older than the version asked for. */
static inline cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **entry,
                                                           unsigned version,
                                                           unsigned long long flags,
                                                           cudaDriverEntryPointQueryResult *found)
{
    (void)version;
    return cudaGetDriverEntryPoint(symbol, entry, flags, found);
}
#endif

#endif
