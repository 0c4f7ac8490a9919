/* What racecheck makes of the way the kernels hand shared memory from warp to warp. One warp stores, then arrives at an mbarrier;
 * another waits for its phase and reads.
 *
 *   race_pattern every   all 32 lanes of the writer arrive
 *   race_pattern one     __syncwarp(), then lane 0 arrives for the warp: what the kernels do
 *   race_pattern none    nobody waits: a race
 *
 * Both of the first two are ordered (PTX memory model: __syncwarp orders the lanes' stores before lane 0's arrive, which
 * releases; the wait acquires; causality order is transitive). Exit status 1: a value read was not the one stored. Under
 * compute-sanitizer --tool racecheck the reports of `one` tell whether the tool follows that chain. */
#include <cstdio>
#include <cstring>

#include "kernels/cuda/hopper.cuh"
#include "tests/cuda/measure.cuh"

__global__ void hand_over(int form, int rounds, int *n_wrong)
{
    __shared__ uint64_t full, empty;
    __shared__ int value[32];
    int lane = (int)threadIdx.x % 32;

    if (threadIdx.x == 0) {
        tr::barrier_init(&full, form == 0 ? 32 : 1);
        tr::barrier_init(&empty, form == 0 ? 32 : 1);
        tr::barrier_init_fence();
    }
    __syncthreads();
    auto arrive = [&](uint64_t *b) {
        if (form == 1) __syncwarp();
        if (form == 0 || lane == 0) tr::barrier_arrive(b);
    };
    for (int i = 0; i < rounds; i++) {
        if (threadIdx.x < 32) {
            if (form < 2) tr::barrier_wait(&empty, (i & 1) ^ 1);
            value[lane] = i * 32 + lane;
            arrive(&full);
        } else {
            if (form < 2) tr::barrier_wait(&full, i & 1);
            int x = value[31 - lane];
            if (form < 2 && x != i * 32 + 31 - lane) atomicAdd(n_wrong, 1);
            arrive(&empty);
        }
    }
}

int main(int argc, char **argv)
{
    const char *name = argc > 1 ? argv[1] : "one";
    int form = !strcmp(name, "every") ? 0 : !strcmp(name, "one") ? 1 : 2, *n_wrong_d, n_wrong = 0;

    CHECK_CUDA(cudaMalloc(&n_wrong_d, 4));
    CHECK_CUDA(cudaMemset(n_wrong_d, 0, 4));
    hand_over<<<1, 64>>>(form, 64, n_wrong_d);
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpy(&n_wrong, n_wrong_d, 4, cudaMemcpyDeviceToHost));
    printf("%s: %d wrong\n", name, n_wrong);
    cudaFree(n_wrong_d);
    return n_wrong != 0;
}
