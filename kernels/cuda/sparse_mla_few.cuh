/* Sparse MLA of up to 32 heads: what sparse_mla.cu calls. */
#ifndef TR_CUDA_SPARSE_MLA_FEW_CUH
#define TR_CUDA_SPARSE_MLA_FEW_CUH

#include "kernels/cuda/sparse_mla_tile.cuh"

namespace tr
{
namespace mla
{

enum { FEW_SPLIT_MAX = 48, FEW_CHUNKS = 16 }; /* rows; chunks of 128 keys of a row that is split */

size_t few_workspace(int n_max, int n_heads);
cudaError_t launch_few(const job &j, bool fp8, int way, int n_sm, cudaStream_t stream);

} // namespace mla
} // namespace tr

#endif
