/* Kernels over peer memory (kernels.md 5): memory of other GPUs that this one stores to as if it were its own. A peer is a
 * pointer; who they are and how their memory came here is mpi/comm_nccl_peer.h's business. */
#ifndef TR_CUDA_PEER_H
#define TR_CUDA_PEER_H

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#ifdef __cplusplus
extern "C" {
#endif

#include "kernels/kernels.h"

/* How the members' terms of a row come together. ONE: everybody sends each row to everybody and adds up for itself: fewest
 * hops, n - 1 times the bytes. TWO: row r goes to member r mod n, who adds up and sends the sum to everybody: two hops, 2/n of
 * these bytes. */
typedef enum tr_cuda_peer_form {
    TR_CUDA_PEER_ONE,
    TR_CUDA_PEER_TWO,
    TR_CUDA_PEER_FORMS
} tr_cuda_peer_form;

/* What a group has for its sums: slots in every member's memory, and this member's counters. Only one kernel of a group runs at
 * a time: all go to one lane. */
typedef struct tr_cuda_peer_group {
    int rank, n_members; /* 2 .. TR_MAX_PEERS */
    int d, rows;         /* the widest row, and most rows of a launch, that there is room for */
    char *slots[TR_MAX_PEERS]; /* by member: tr_cuda_peer_slots() bytes, at first all ones */
    uint32_t *words; /* [4] own memory, at first 0: epoch, blocks that have read it, left */
    const volatile uint32_t *abort;  /* host-mapped: not 0: who waits leaves */
    int at_once[TR_CUDA_PEER_FORMS]; /* rows that the device works on at once: tr_cuda_peer_load */
} tr_cuda_peer_group;

enum { TR_CUDA_PEER_WORDS = 4 };

/* Bytes of slots for rows of d numbers; the same on all members. 0: rows of this width cannot be done (whole blocks of 128 up
 * to 8192), or not by so many members. Pure. */
size_t tr_cuda_peer_slots(int n_members, int d, int rows);
/* Most rows that a launch of this form takes; 0: two members have no form TWO. Pure. */
int tr_cuda_peer_rows(const tr_cuda_peer_group *g, tr_cuda_peer_form form);

/* The kernels onto the current device, before the first one waits; sets at_once. */
cudaError_t tr_cuda_peer_load(tr_cuda_peer_group *g);

/* residual += the members' sum of a->add; then as norm (kernels.h), to the bit what it makes of the sum that tr_cuda_sum_terms
 * makes: ((x0 + x1) + x2) + .. over members in rank order in fp32, rounded to bf16 once. a->add is read only. All members
 * launch the same with the same live rows; a->n_max may differ. cudaErrorInvalidValue: not what the slots were made for. */
cudaError_t tr_cuda_peer_norm(const tr_cuda_peer_group *g, tr_cuda_peer_form form,
                              const struct tr_norm_args *a, cudaStream_t stream);

#ifdef __cplusplus
}
#endif

#endif
