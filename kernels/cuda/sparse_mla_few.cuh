/* Sparse MLA of up to 32 heads: what sparse_mla.cu calls; and how the split ways cut rows into slices. */
#ifndef TR_CUDA_SPARSE_MLA_FEW_CUH
#define TR_CUDA_SPARSE_MLA_FEW_CUH

#include "kernels/cuda/sparse_mla_tile.cuh"

namespace tr
{
namespace mla
{

/* Cut the pairs of each of n tasks into as many equal slices as still find an SM each, or into none. */
inline void slices_cut(job &j, int n, int n_sm)
{
    const int n_pairs = (j.k + 2 * KEYS - 1) / (2 * KEYS);

    j.pairs = 1;
    while (j.pairs < n_pairs && n * ((n_pairs + j.pairs - 1) / j.pairs) > n_sm)
        j.pairs++;
    j.n_slices = (n_pairs + j.pairs - 1) / j.pairs;
}

/* Rows up to which chunks side by side are faster (bench_sparse_mla on an H200, 16 heads: 32 rows take 40 us split and 94 us
 * walking, 64 take 69 and 94); chunks of 128 keys of a row that is split. */
enum { FEW_SPLIT_MAX = 64, FEW_CHUNKS = 16 };

size_t few_workspace(int n_max, int n_heads);
cudaError_t launch_few(const job &j, bool fp8, int way, int n_sm, cudaStream_t stream);

} // namespace mla
} // namespace tr

#endif
