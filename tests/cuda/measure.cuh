/* For the programs that check and time CUDA kernels: checked calls, cold L2, medians of event times, random data. */
#ifndef TR_TESTS_CUDA_MEASURE_CUH
#define TR_TESTS_CUDA_MEASURE_CUH

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>
#include <vector>

#define CHECK_CUDA(call)                                                                           \
    do {                                                                                           \
        cudaError_t e_ = (call);                                                                   \
        if (e_ != cudaSuccess) {                                                                   \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(e_)); \
            exit(1);                                                                               \
        }                                                                                          \
    } while (0)

namespace measure
{

/* A counter-based generator (splitmix64): the same numbers on host and device for the same index. */
__host__ __device__ inline unsigned long long mix(unsigned long long x)
{
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}
__host__ __device__ inline float uniform(unsigned long long seed, unsigned long long i) /* [-1, 1) */
{
    return (float)(int)(unsigned)(mix(seed * 0x100000001b3ull + i) >> 32) * (1.0f / 2147483648.0f);
}

/* Fills a buffer larger than the L2 before every timed launch; the median, in microseconds. */
class cold_timer
{
  public:
    explicit cold_timer(size_t flush_bytes = 256u << 20) : bytes(flush_bytes)
    {
        CHECK_CUDA(cudaMalloc(&flush, bytes));
        CHECK_CUDA(cudaEventCreate(&a));
        CHECK_CUDA(cudaEventCreate(&b));
    }
    ~cold_timer()
    {
        cudaFree(flush);
        cudaEventDestroy(a);
        cudaEventDestroy(b);
    }
    template <class F> double median_us(F launch, int n = 25)
    {
        std::vector<double> us;
        for (int i = 0; i < n + 3; i++) {
            CHECK_CUDA(cudaMemsetAsync(flush, i, bytes));
            CHECK_CUDA(cudaEventRecord(a));
            launch();
            CHECK_CUDA(cudaEventRecord(b));
            CHECK_CUDA(cudaEventSynchronize(b));
            float ms = 0;
            CHECK_CUDA(cudaEventElapsedTime(&ms, a, b));
            if (i >= 3) us.push_back(ms * 1e3);
        }
        CHECK_CUDA(cudaGetLastError());
        std::sort(us.begin(), us.end());
        return us[us.size() / 2];
    }

  private:
    size_t bytes;
    void *flush = nullptr;
    cudaEvent_t a, b;
};

} // namespace measure

#endif
