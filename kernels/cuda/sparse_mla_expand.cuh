/* Records of the fp8 cache as bf16 rows, made once for a step (sparse_mla_expand.cu): where a prompt's rows walk over the same
 * keys again and again, expanding e4m3 for every row and group of heads would cost more than the products do. */
#ifndef TR_CUDA_SPARSE_MLA_EXPAND_CUH
#define TR_CUDA_SPARSE_MLA_EXPAND_CUH

#include <stddef.h>
#include <stdint.h>

#include <cuda_runtime_api.h>

#include "kernels/cuda/sparse_mla_tile.cuh"
#include "kernels/kernels.h"

namespace tr
{
namespace mla
{

/* A run, neighbouring rows of one slot, is expanded when it has at least EXPAND_ROWS and at most EXPAND_KEYS keys for each of
 * them: a key costs 0.7 ns, a row of 128 heads gains 290 ns (4,096 rows over 32K and 128K keys on an H200). Steps of fewer than
 * EXPAND_STEP_ROWS rows are left as they are: they may be decoding. The workspace is sized for EXPAND_KEYS_SIZED keys a row of
 * a launch; what does not fit walks over records. */
enum { EXPAND_ROWS = 128, EXPAND_STEP_ROWS = 512, EXPAND_KEYS = 128, EXPAND_KEYS_SIZED = 32 };

struct expand_run { /* keys [0, 64 n_pages) of a slot, at page `first` of the rows */
    int32_t slot, first, n_pages;
};
enum { EXPAND_RUNS = 1024 };

/* In the workspace. */
struct expansion {
    int32_t *n;                 /* [4]: rows in `expanded`, in `others`; runs; pages */
    int32_t *expanded, *others; /* [n_max] each: the absorbed rows of the step, ascending */
    int32_t *base;    /* [n_max]: of a row in `expanded`, its slot's position 0 in `rows` */
    expand_run *runs; /* [EXPAND_RUNS] */
    uint8_t *rows;    /* bf16 [64 pages_max, 576], as a bf16 cache has them */
    int pages_max;
};

/* For a launch of n_max rows; bytes of workspace that it should have, 0: no launch of so few has any. */
size_t expansion_bytes(int n_max);
/* False: the workspace has no room for a page. */
bool expansion_place(expansion *e, void *workspace, size_t bytes, int n_max);
/* Fill all of *e. */
cudaError_t expansion_make(const expansion &e, const tr_rows &rows, const tr_kv_layer &kv, int n_sm,
                           cudaStream_t stream);

/* Walks over bf16 rows (sparse_mla_prompt.cu), j as for one over records. The rows in e.expanded, with the lists' positions: */
cudaError_t launch_expanded(const job &j, const expansion &e, const int32_t *position, int n_sm,
                            cudaStream_t stream);
/* all rows, over a bf16 cache. */
cudaError_t launch_rows(const job &j, int n_sm, cudaStream_t stream);

} // namespace mla
} // namespace tr

#endif
