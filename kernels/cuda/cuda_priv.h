/* Inside of the CUDA backend: the device, its notes on weights, and how a launch becomes a status.
 * Host code, C. */
#ifndef TR_CUDA_PRIV_H
#define TR_CUDA_PRIV_H

#include "kernels/cuda/gemm_fp8.h"
#include "kernels/cuda/ops.h"
#include "kernels/device.h"

enum {
    TR_TICKETS =
        256, /* that can be told apart on a lane; older ones are done when their successor in the ring is */
    TR_STAGES = 16,
    TR_STAGE_BYTES = 4 << 20,
};

typedef struct tr_stage { /* pinned host memory on its way to the device */
    void *memory;
    cudaEvent_t sent;
    int busy;
} tr_stage;

typedef struct tr_cuda_block { /* one allocation */
    void *memory;
    int host;
} tr_cuda_block;

/* What the host knows of a packed weight. */
typedef struct tr_weight_note {
    void *data;
    int n_mats, k_shift;  /* e4m3: where column 0 of its first piece lies in a scale block */
    int k_mixed;          /* that of another matrix lies elsewhere: tr_weight_head has each one's */
    int packed;           /* some piece has been */
    int on_grid;          /* e4m3: all pieces begin with a scale block: gemm_fp8.h can have it */
    int interleaved;      /* rows lie as tr_fp8_gate_up_row says */
    tr_weight_head *head; /* [n_mats] */
} tr_weight_note;

struct tr_device {
    tr_device_head head;
    int ordinal;
    char where[128];            /* "NVIDIA H200, PCI 0000:1b:00.0", for errors */
    tr_status failed;           /* sticky */
    struct tr_suspect *suspect; /* listens for the driver's errors; NULL: nobody does */
    cudaStream_t stream[TR_N_LANES];
    cudaEvent_t ticket[TR_N_LANES][TR_TICKETS], join[TR_N_LANES];
    uint64_t issued[TR_N_LANES], finished[TR_N_LANES];
    tr_stage stage[TR_STAGES];
    int i_stage;
    tr_gemm_fp8 gemm;            /* what launches of FP8 products need */
    uint32_t *fault_h, *fault_d; /* one word, host-mapped: ops.h, TR_FAULT_SLOT .. */
    tr_cuda_block *block;
    size_t n_blocks, blocks_room;
    tr_weight_note *note; /* by address, ascending */
    size_t n_notes, notes_room;
};

/* Before a call of the runtime: this thread's device; TR_OK unless the device has failed. */
tr_status tr_cuda_begin(tr_device *d);
/* What `call` of `op` said, as a status with a text; success is TR_OK. */
tr_status tr_cuda_status(tr_device *d, const char *op, cudaError_t e);

/* A piece of pinned memory, and its way to the device. One at a time. */
tr_status tr_cuda_stage(tr_device *d, tr_stage **out);
tr_status tr_cuda_send(tr_device *d, tr_lane lane, tr_stage *stage, void *dst, size_t bytes);
tr_status tr_cuda_upload(tr_device *d, tr_lane lane, void *dst, const void *src, size_t bytes);

/* weights.c */
size_t tr_cuda_linear_bytes(tr_format format, int n_mats, int n_out, int n_in);
tr_status tr_cuda_linear_pack(tr_device *d, tr_linear *dst, const tr_linear_src *src);
tr_status tr_cuda_linear_made(tr_device *d, tr_linear *dst, const tr_linear_src *src,
                              const tr_made *made);
tr_status tr_cuda_table_made(tr_device *d, void *dst, int number_bytes, int n_rows, int n_in,
                             const tr_made *made);
/* The weight for gemm_fp8.h. */
tr_fp8_weight tr_cuda_fp8_weight(const tr_linear *w);
const tr_weight_note *tr_cuda_note_find(const tr_device *d, const void *data);
void tr_cuda_note_drop(tr_device *d, const void *data);

/* table.c */
extern const tr_ops tr_cuda_ops;
tr_status tr_cuda_alloc(tr_device *d, size_t bytes, int kind, void **out);
void tr_cuda_release(tr_device *d, void *p);
uint64_t tr_cuda_memory_left(tr_device *d);
tr_status tr_cuda_download(tr_device *d, tr_lane lane, void *dst, const void *src, size_t bytes);
tr_status tr_cuda_order(tr_device *d, tr_lane before, tr_lane after);
uint64_t tr_cuda_ticket(tr_device *d, tr_lane lane);
int tr_cuda_done(tr_device *d, tr_lane lane, uint64_t ticket);
tr_status tr_cuda_graph_begin(tr_device *d, tr_lane lane);
tr_status tr_cuda_graph_end(tr_device *d, tr_lane lane, tr_graph **out);
tr_status tr_cuda_graph_run(tr_device *d, tr_lane lane, tr_graph *graph);
void tr_cuda_graph_free(tr_device *d, tr_graph *graph);
void tr_cuda_close(tr_device *d);

/* stamps.c */
tr_status tr_cuda_stamps_create(tr_device *d, int n, tr_stamps **out);
void tr_cuda_stamps_free(tr_device *d, tr_stamps *s);
tr_status tr_cuda_stamp(tr_device *d, tr_lane lane, tr_stamps *s, int i);
tr_status tr_cuda_stamps_between(tr_device *d, const tr_stamps *s, int from, int to, uint64_t *ns);

#endif
