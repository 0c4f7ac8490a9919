/* Moments of the device's clock: an event each. */
#include <config.h>

#include <stdlib.h>

#include "base/size.h"
#include "kernels/cuda/cuda_priv.h"

struct tr_stamps {
    int n;
    cudaEvent_t event[]; /* [n] */
};

/* Timing alone has failed: the device has not, and what is not sticky is forgotten. */
static tr_status failed(cudaError_t e)
{
    if (e == cudaSuccess) return TR_OK;
    (void)cudaGetLastError();
    return e == cudaErrorMemoryAllocation ? TR_E_MEMORY : TR_E_DEVICE;
}

void tr_cuda_stamps_free(tr_device *d, tr_stamps *s)
{
    if (!s) return;
    cudaSetDevice(d->ordinal);
    for (int i = 0; i < s->n; i++)
        cudaEventDestroy(s->event[i]);
    free(s);
}

tr_status tr_cuda_stamps_create(tr_device *d, int n, tr_stamps **out)
{
    size_t bytes;
    cudaError_t e = cudaSuccess;

    *out = NULL;
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK) return st;
    if (n < 1 || !tr_mul(&bytes, (size_t)n, sizeof(cudaEvent_t)) ||
        !tr_add(&bytes, bytes, sizeof(tr_stamps)))
        return TR_E_USAGE;
    tr_stamps *s = calloc(1, bytes);
    if (!s) return TR_E_MEMORY;
    for (; s->n < n && e == cudaSuccess; s->n += e == cudaSuccess)
        e = cudaEventCreateWithFlags(&s->event[s->n], cudaEventDefault);
    if (e != cudaSuccess) {
        tr_cuda_stamps_free(d, s);
        return failed(e);
    }
    *out = s;
    return TR_OK;
}

tr_status tr_cuda_stamp(tr_device *d, tr_lane lane, tr_stamps *s, int i)
{
    enum cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;

    if (i < 0 || i >= s->n) return TR_E_USAGE;
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK) return st;
    cudaError_t e = cudaStreamIsCapturing(d->stream[lane], &capture);
    /* Without the flag an event recorded in a capture orders its nodes and is never taken. */
    if (e == cudaSuccess)
        e = cudaEventRecordWithFlags(s->event[i], d->stream[lane],
                                     capture == cudaStreamCaptureStatusNone
                                         ? cudaEventRecordDefault
                                         : cudaEventRecordExternal);
    return failed(e);
}

tr_status tr_cuda_stamps_between(tr_device *d, const tr_stamps *s, int from, int to, uint64_t *ns)
{
    float ms = 0;

    if (from < 0 || to < 0 || from >= s->n || to >= s->n) return TR_E_USAGE;
    tr_status st = tr_cuda_begin(d);
    if (st == TR_OK) st = failed(cudaEventElapsedTime(&ms, s->event[from], s->event[to]));
    if (st == TR_OK) *ns = ms > 0 ? (uint64_t)((double)ms * 1e6) : 0;
    return st;
}
