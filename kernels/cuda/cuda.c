/* The device: choosing and opening it, memory, lanes (a stream each), tickets (an event each). */
#include <config.h>

#include "kernels/cuda/cuda_priv.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "kernels/cuda/comm.h"
#include "kernels/cuda/gemm_bf16.h"
#include "kernels/cuda/gemm_heads.h"
#include "kernels/suspect.h"

/* ---- failures ------------------------------------------------------------------------------------------------------ */

static const char *const fault_text[TR_N_FAULTS] = {
    [TR_FAULT_SLOT] = "a slot that is none",
    [TR_FAULT_ROWS] = "too many rows",
    [TR_FAULT_HEADS] = "too many head rows",
    [TR_FAULT_TOKENS] = "more rows than tokens",
    [TR_FAULT_PART] = "a part that is none",
    [TR_FAULT_BEFORE] = "rows before the slot's first",
    [TR_FAULT_BEHIND] = "positions past the slot's page table",
    [TR_FAULT_PAGE] = "a position without a page",
    [TR_FAULT_TARGETS] = "more head rows than targets",
    [TR_FAULT_COPY] = "a copy of pages that are none",
};

static int has_fault(const tr_device *d)
{
    return d->fault_h && *(volatile uint32_t *)d->fault_h != 0;
}

static tr_status fault_status(tr_device *d)
{
    const uint32_t fault = *(volatile uint32_t *)d->fault_h;
    d->failed = TR_E_DEVICE;
    return tr_device_fail(d, TR_E_DEVICE, "plan_apply: %s (%s)",
                          fault < TR_N_FAULTS && fault_text[fault] ? fault_text[fault]
                                                                   : "a plan that is none",
                          d->where);
}

/* What an error says about the device. Those that CUDA calls inconsistent or sticky end the context: nothing can be done with
 * the device after them. */
static tr_verdict verdict_of(cudaError_t e)
{
    /* cudaErrorContained, which older versions of CUDA do not know: memory, or a wrong access over NVLink */
    const int contained = 226;

    if ((int)e == contained) return TR_VERDICT_PERHAPS;
    switch (e) {
    case cudaErrorECCUncorrectable:
    case cudaErrorNvlinkUncorrectable:
        return TR_VERDICT_HARDWARE;
    case cudaErrorIllegalAddress:
    case cudaErrorLaunchTimeout:
    case cudaErrorHardwareStackError:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorLaunchFailure:
    case cudaErrorUnknown:
        return TR_VERDICT_PERHAPS;
    default:
        return TR_VERDICT_NONE;
    }
}

/* The device is of no use any more: which one, and whether it is to blame (reliability.md 4, row 18). */
static tr_status lose_device(tr_device *d, const char *op, cudaError_t e)
{
    enum { XID_WAIT_MS = 1000 }; /* the driver's report and CUDA's error come by different ways */
    char host[128], text[400];
    tr_suspect_facts facts = {.uuid = d->head.uuid, .host = host, .verdict = verdict_of(e)};

    d->failed = TR_E_DEVICE;
    tr_suspect_host(host, sizeof host, &facts.in_slurm);
    if (facts.verdict != TR_VERDICT_NONE) facts.heard = tr_suspect_hear(d->suspect, XID_WAIT_MS);
    tr_suspect_text(text, sizeof text, &facts);
    return tr_device_fail(d, TR_E_DEVICE, "%s: %s (%s, %s)", op, cudaGetErrorString(e), d->where,
                          text);
}

tr_status tr_cuda_status(tr_device *d, const char *op, cudaError_t e)
{
    if (e == cudaSuccess) return TR_OK;
    tr_status st = e == cudaErrorMemoryAllocation                             ? TR_E_MEMORY
                   : e == cudaErrorInvalidValue || e == cudaErrorNotSupported ? TR_E_USAGE
                                                                              : TR_E_DEVICE;
    (void)cudaGetLastError();        /* those that are not sticky are forgotten */
    if (d->failed) return d->failed; /* what came first has been told */
    if (st == TR_E_DEVICE) return lose_device(d, op, e);
    return tr_device_fail(d, st, "%s: %s (%s)", op,
                          st == TR_E_USAGE ? "arguments or sizes that this backend cannot do"
                                           : cudaGetErrorString(e),
                          d->where);
}

tr_status tr_cuda_begin(tr_device *d)
{
    if (d->failed) return d->failed; /* the text is still there */
    if (has_fault(d)) return fault_status(d);
    return tr_cuda_status(d, "cudaSetDevice", cudaSetDevice(d->ordinal));
}

/* ---- memory -------------------------------------------------------------------------------------------------------- */

static int block_room(tr_device *d)
{
    size_t bytes;
    if (d->n_blocks < d->blocks_room) return 1;
    const size_t room = d->blocks_room ? 2 * d->blocks_room : 256;
    void *grown = tr_mul(&bytes, room, sizeof *d->block) ? realloc(d->block, bytes) : NULL;
    if (!grown) return 0;
    d->block = grown;
    d->blocks_room = room;
    return 1;
}

enum { SHARED_BLOCK = 2 << 20 }; /* bytes */

tr_status tr_cuda_alloc(tr_device *d, size_t bytes, int kind, void **out)
{
    const int host = kind == TR_MEMORY_HOST;
    void *p = NULL;

    *out = NULL;
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK) return st;
    if (!block_room(d)) return tr_device_fail(d, TR_E_MEMORY, "out of memory");
    size_t size = bytes ? bytes : 1;
    /* What a driver gives other processes is whole blocks: this memory begins one, and nobody else's lies in its last. */
    if (kind == TR_MEMORY_SYMMETRIC && size < SIZE_MAX - SHARED_BLOCK)
        size = (size + SHARED_BLOCK - 1) / SHARED_BLOCK * SHARED_BLOCK;
    cudaError_t e = host ? cudaHostAlloc(&p, size, cudaHostAllocDefault) : cudaMalloc(&p, size);
    if (e == cudaErrorMemoryAllocation) {
        size_t left = 0, all = 0;
        (void)cudaGetLastError();
        if (host)
            return tr_device_fail(d, TR_E_MEMORY, "out of pinned host memory: %zu bytes (%s)",
                                  bytes, d->where);
        if (cudaMemGetInfo(&left, &all) != cudaSuccess) (void)cudaGetLastError();
        return tr_device_fail(d, TR_E_MEMORY,
                              "out of device memory: %zu bytes, %zu of %zu are free (%s)", bytes,
                              left, all, d->where);
    }
    if (e != cudaSuccess) return tr_cuda_status(d, "cudaMalloc", e);
    d->block[d->n_blocks++] = (tr_cuda_block){.memory = p, .host = host};
    if (host)
        memset(p, 0, size);
    else
        e = cudaMemsetAsync(p, 0, size, d->stream[TR_LANE_COPY]);
    if (!host && e == cudaSuccess) e = cudaStreamSynchronize(d->stream[TR_LANE_COPY]);
    st = tr_cuda_status(d, "alloc", e);
    if (st == TR_OK) *out = p;
    return st;
}

static void free_block(const tr_cuda_block *b)
{
    if (b->host)
        cudaFreeHost(b->memory);
    else
        cudaFree(b->memory);
}

void tr_cuda_release(tr_device *d, void *p)
{
    if (!p) return;
    cudaSetDevice(d->ordinal);
    tr_cuda_note_drop(d, p);
    for (size_t i = d->n_blocks; i-- > 0;) {
        if (d->block[i].memory != p) continue;
        free_block(&d->block[i]);
        d->block[i] = d->block[--d->n_blocks];
        return;
    }
}

uint64_t tr_cuda_memory_left(tr_device *d)
{
    size_t left = 0, all = 0;
    if (tr_cuda_begin(d) != TR_OK || cudaMemGetInfo(&left, &all) != cudaSuccess) return 0;
    return left;
}

/* ---- to the device, through pinned memory: what the caller gives may be gone when the call returns ----------------- */

tr_status tr_cuda_stage(tr_device *d, tr_stage **out)
{
    tr_stage *s = &d->stage[d->i_stage];
    d->i_stage = (d->i_stage + 1) % TR_STAGES;
    *out = s;
    if (!s->busy) return TR_OK;
    s->busy = 0;
    return tr_cuda_status(d, "upload", cudaEventSynchronize(s->sent));
}

tr_status tr_cuda_send(tr_device *d, tr_lane lane, tr_stage *s, void *dst, size_t bytes)
{
    cudaError_t e = cudaMemcpyAsync(dst, s->memory, bytes, cudaMemcpyHostToDevice, d->stream[lane]);
    if (e == cudaSuccess) e = cudaEventRecord(s->sent, d->stream[lane]);
    s->busy = e == cudaSuccess;
    return tr_cuda_status(d, "upload", e);
}

tr_status tr_cuda_upload(tr_device *d, tr_lane lane, void *dst, const void *src, size_t bytes)
{
    tr_status st = tr_cuda_begin(d);
    for (size_t at = 0, n; at < bytes && st == TR_OK; at += n) {
        tr_stage *s;
        n = bytes - at < TR_STAGE_BYTES ? bytes - at : TR_STAGE_BYTES;
        st = tr_cuda_stage(d, &s);
        if (st != TR_OK) break;
        memcpy(s->memory, (const char *)src + at, n);
        st = tr_cuda_send(d, lane, s, (char *)dst + at, n);
    }
    return st;
}

tr_status tr_cuda_download(tr_device *d, tr_lane lane, void *dst, const void *src, size_t bytes)
{
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK || bytes == 0) return st;
    return tr_cuda_status(
        d, "download", cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, d->stream[lane]));
}

/* ---- order --------------------------------------------------------------------------------------------------------- */

tr_status tr_cuda_order(tr_device *d, tr_lane before, tr_lane after)
{
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK || before == after) return st;
    cudaError_t e = cudaEventRecord(d->join[before], d->stream[before]);
    if (e == cudaSuccess) e = cudaStreamWaitEvent(d->stream[after], d->join[before], 0);
    return tr_cuda_status(d, "order", e);
}

uint64_t tr_cuda_ticket(tr_device *d, tr_lane lane)
{
    const uint64_t t = ++d->issued[lane];
    if (tr_cuda_begin(d) == TR_OK) /* a failure shows when the ticket is asked for */
        tr_cuda_status(d, "ticket",
                       cudaEventRecord(d->ticket[lane][t % TR_TICKETS], d->stream[lane]));
    return t;
}

int tr_cuda_done(tr_device *d, tr_lane lane, uint64_t ticket)
{
    if (tr_cuda_begin(d) != TR_OK) return -1;
    if (ticket <= d->finished[lane]) return 1;
    const cudaError_t e = cudaEventQuery(d->ticket[lane][ticket % TR_TICKETS]);
    if (e == cudaErrorNotReady) {
        (void)cudaGetLastError();
        return 0;
    }
    if (tr_cuda_status(d, "a kernel", e) != TR_OK) return -1;
    if (has_fault(d)) {
        fault_status(d);
        return -1;
    }
    d->finished[lane] = ticket;
    return 1;
}

/* ---- graphs -------------------------------------------------------------------------------------------------------- */

/* A tr_graph is a cudaGraphExec_t. */
tr_status tr_cuda_graph_begin(tr_device *d, tr_lane lane)
{
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK) return st;
    return tr_cuda_status(
        d, "graph", cudaStreamBeginCapture(d->stream[lane], cudaStreamCaptureModeThreadLocal));
}

tr_status tr_cuda_graph_end(tr_device *d, tr_lane lane, tr_graph **out)
{
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;

    if (out) *out = NULL;
    cudaError_t e = cudaStreamEndCapture(d->stream[lane], &graph);
    if (e == cudaSuccess && out) e = cudaGraphInstantiate(&exec, graph, 0);
    if (e == cudaSuccess && out) e = cudaGraphUpload(exec, d->stream[lane]);
    if (graph) cudaGraphDestroy(graph);
    if (e != cudaSuccess && exec) {
        cudaGraphExecDestroy(exec);
        exec = NULL;
    }
    if (out) *out = (tr_graph *)exec;
    if (e != cudaSuccess && !out) { /* thrown away in any case: what broke it has been told */
        (void)cudaGetLastError();
        return TR_OK;
    }
    return tr_cuda_status(d, "graph", e);
}

tr_status tr_cuda_graph_run(tr_device *d, tr_lane lane, tr_graph *graph)
{
    tr_status st = tr_cuda_begin(d);
    if (st != TR_OK) return st;
    return tr_cuda_status(d, "graph", cudaGraphLaunch((cudaGraphExec_t)graph, d->stream[lane]));
}

void tr_cuda_graph_free(tr_device *d, tr_graph *graph)
{
    if (!graph) return;
    cudaSetDevice(d->ordinal);
    cudaGraphExecDestroy((cudaGraphExec_t)graph);
}

/* ---- opening and closing ------------------------------------------------------------------------------------------- */

void tr_cuda_close(tr_device *d)
{
    if (!d) return;
    cudaSetDevice(d->ordinal);
    for (int i = 0; i < TR_N_LANES; i++) {
        if (d->stream[i]) cudaStreamSynchronize(d->stream[i]);
        if (d->join[i]) cudaEventDestroy(d->join[i]);
        for (int j = 0; j < TR_TICKETS; j++)
            if (d->ticket[i][j]) cudaEventDestroy(d->ticket[i][j]);
    }
    for (int i = 0; i < TR_STAGES; i++) {
        if (d->stage[i].sent) cudaEventDestroy(d->stage[i].sent);
        if (d->stage[i].memory) cudaFreeHost(d->stage[i].memory);
    }
    for (size_t i = 0; i < d->n_blocks; i++)
        free_block(&d->block[i]);
    for (int i = 0; i < TR_N_LANES; i++)
        if (d->stream[i]) cudaStreamDestroy(d->stream[i]);
    if (d->fault_h) cudaFreeHost(d->fault_h);
    for (size_t i = 0; i < d->n_notes; i++)
        free(d->note[i].head);
    tr_suspect_close(d->suspect);
    free(d->note);
    free(d->block);
    free(d);
}

/* Streams, events, staging; TR_E_DEVICE with a text in the device. */
static tr_status make_lanes(tr_device *d)
{
    cudaError_t e = cudaSuccess;

    for (int i = 0; i < TR_N_LANES && e == cudaSuccess; i++) {
        e = cudaStreamCreateWithFlags(&d->stream[i], cudaStreamNonBlocking);
        if (e == cudaSuccess) e = cudaEventCreateWithFlags(&d->join[i], cudaEventDisableTiming);
        for (int j = 0; j < TR_TICKETS && e == cudaSuccess; j++)
            e = cudaEventCreateWithFlags(&d->ticket[i][j], cudaEventDisableTiming);
    }
    for (int i = 0; i < TR_STAGES && e == cudaSuccess; i++) {
        e = cudaHostAlloc(&d->stage[i].memory, TR_STAGE_BYTES, cudaHostAllocDefault);
        if (e == cudaSuccess)
            e = cudaEventCreateWithFlags(&d->stage[i].sent, cudaEventDisableTiming);
    }
    if (e == cudaSuccess)
        e = cudaHostAlloc((void **)&d->fault_h, sizeof *d->fault_h, cudaHostAllocMapped);
    if (e == cudaSuccess) {
        *d->fault_h = 0;
        e = cudaHostGetDevicePointer((void **)&d->fault_d, d->fault_h, 0);
    }
    return tr_cuda_status(d, "opening", e);
}

static tr_status load_kernels(tr_device *d)
{
    cudaError_t e = tr_cuda_products_open(); /* whether this GPU can run what was built */
    if (e == cudaErrorNoKernelImageForDevice || e == cudaErrorInvalidDeviceFunction)
        return tr_device_fail(d, TR_E_DEVICE, "this build is for %s, not for this GPU (%s)",
                              TR_CUDA_ARCH, d->where);
    if (e == cudaSuccess) e = tr_cuda_attention_open();
    if (e == cudaSuccess) e = tr_gemm_bf16_open();
    if (e == cudaSuccess) e = tr_cuda_gemm_heads_open();
    if (e == cudaSuccess) e = tr_gemm_fp8_open(&d->gemm);
    return tr_cuda_status(d, "opening", e);
}

/* "GPU-" and the uuid's bytes in groups of 4, 2, 2, 2 and 6, as the driver's tools write it. */
static void write_uuid(char *out, size_t room, const cudaUUID_t *uuid)
{
    size_t n = (size_t)snprintf(out, room, "GPU");
    for (int i = 0; i < 16; i++) {
        const int begins = i == 0 || i == 4 || i == 6 || i == 8 || i == 10;
        n += (size_t)snprintf(out + n, room - n, "%s%02x", begins ? "-" : "",
                              (unsigned)(unsigned char)uuid->bytes[i]);
    }
}

static const char *environment(const char *name)
{
    const char *value = getenv(name);
    return value ? value : "not set";
}

/* Which GPU; TR_E_USAGE where several ranks of a host have fewer. */
static tr_status choose_ordinal(int *ordinal, int n, const tr_device_options *options, tr_err *err)
{
    *ordinal = (options->i_device % n + n) % n;
    if (options->n_device_ranks <= 1) return TR_OK;
    *ordinal = tr_device_choose(n, options->i_device, options->n_device_ranks);
    if (*ordinal >= 0) return TR_OK;
    return tr_fail(err, TR_E_USAGE,
                   "%d ranks of this host see %d GPUs: each rank wants one of its own "
                   "(CUDA_VISIBLE_DEVICES %.100s, SLURM_GPUS_ON_NODE %.100s, "
                   "SLURM_STEP_GPUS %.100s)",
                   options->n_device_ranks, n, environment("CUDA_VISIBLE_DEVICES"),
                   environment("SLURM_GPUS_ON_NODE"), environment("SLURM_STEP_GPUS"));
}

int tr_cuda_ordinal(const tr_device *d)
{
    return d->ordinal;
}

cudaStream_t tr_cuda_stream(const tr_device *d, tr_lane lane)
{
    return d->stream[lane];
}

/* The first call of all, which starts the driver: told before, it loads all kernels with the context (0.1 s, 8 MiB). A kernel's
 * first launch needs no memory then, and does not wait for kernels that wait for other ranks. Who has said something else in the
 * environment is obeyed. */
static cudaError_t count_devices(int *n)
{
    (void)setenv("CUDA_MODULE_LOADING", "EAGER", 0);
    return cudaGetDeviceCount(n);
}

tr_status tr_cuda_open(tr_device **out, const tr_ops **ops, const tr_device_options *options,
                       int *usable, tr_err *err)
{
    struct cudaDeviceProp prop;
    char pci[32] = "", host[128];
    bool in_slurm;
    int n = 0, ordinal = 0;

    *out = NULL;
    *usable = 0;
    cudaError_t e = count_devices(&n);
    if (e != cudaSuccess || n < 1) {
        (void)cudaGetLastError();
        tr_suspect_host(host, sizeof host, &in_slurm);
        return tr_fail(err, TR_E_DEVICE, "no usable GPU on %s: %s", host,
                       e == cudaSuccess ? "there is none" : cudaGetErrorString(e));
    }
    tr_status st = tr_ops_check(&tr_cuda_ops, err);
    if (st == TR_OK) st = choose_ordinal(&ordinal, n, options, err);
    if (st != TR_OK) return st;
    tr_device *d = calloc(1, sizeof *d);
    if (!d) return tr_fail(err, TR_E_MEMORY, "out of memory");
    d->ordinal = ordinal;
    snprintf(d->where, sizeof d->where, "GPU %d of %d", d->ordinal, n);
    /* The driver starts threads with the context: bound before. */
    e = cudaDeviceGetPCIBusId(pci, sizeof pci, d->ordinal);
    snprintf(d->head.pci, sizeof d->head.pci, "%.15s", pci);
    if (e == cudaSuccess) d->head.near = tr_near_find(pci, options->bind);
    if (e == cudaSuccess) e = cudaSetDevice(d->ordinal);
    if (e == cudaSuccess) e = cudaGetDeviceProperties(&prop, d->ordinal);
    st = tr_cuda_status(d, "opening", e);
    if (st != TR_OK) goto done;
    snprintf(d->where, sizeof d->where, "%.64s, PCI %s", prop.name, pci);
    write_uuid(d->head.uuid, sizeof d->head.uuid, &prop.uuid);
    d->suspect = tr_suspect_open(pci); /* NULL: errors are told without the driver's number */
    snprintf(d->head.describe, sizeof d->head.describe, "cuda, %.64s, %d SMs, %zu GiB", prop.name,
             prop.multiProcessorCount, prop.totalGlobalMem >> 30);
    st = load_kernels(d);
    if (st != TR_OK) goto done;
    *usable = 1;
    st = make_lanes(d);
    if (st != TR_OK) goto done;
    *out = d;
    *ops = &tr_cuda_ops;
    d = NULL;

done:
    if (d) tr_fail(err, st, "%s", tr_device_error(d));
    tr_cuda_close(d);
    return st;
}

void tr_cuda_look(tr_gpu_seen *seen, int i, int n_ranks)
{
    const long arch = strtol(TR_CUDA_ARCH + strlen("sm_"), NULL, 10);
    struct cudaDeviceProp prop;
    int n = 0;

    const cudaError_t counted = count_devices(&n);
    if (counted != cudaSuccess || n < 1) {
        int driver = 0;
        (void)cudaGetLastError();
        if (counted != cudaSuccess && counted != cudaErrorNoDevice &&
            cudaDriverGetVersion(&driver) == cudaSuccess && driver > 0) /* 0: there is none */
            snprintf(seen->unfit, sizeof seen->unfit, "none: %.80s", cudaGetErrorString(counted));
        return;
    }
    seen->n = n;
    const int ordinal = tr_device_choose(n, i, n_ranks);
    if (ordinal < 0) return;
    const cudaError_t e = cudaGetDeviceProperties(&prop, ordinal);
    if (e != cudaSuccess) {
        (void)cudaGetLastError();
        snprintf(seen->unfit, sizeof seen->unfit, "%.90s", cudaGetErrorString(e));
        return;
    }
    write_uuid(seen->uuid, sizeof seen->uuid, &prop.uuid);
    if (prop.major * 10 + prop.minor != arch) /* what load_kernels would find out */
        snprintf(seen->unfit, sizeof seen->unfit, "%.48s, and this build is for %s", prop.name,
                 TR_CUDA_ARCH);
}
