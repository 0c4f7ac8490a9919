/* The device that plays a GPU refuses what a GPU's runtime refuses (tests/fault/cuda_shim_check.h). */
#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tests/fault/cuda_shim_check.h"

/* Addresses to tell kernels, streams and events by. */
static _Alignas(16) char some[16][16];

static cudaStream_t stream(int i)
{
    return (cudaStream_t)(void *)some[i];
}

static cudaEvent_t event(int i)
{
    return (cudaEvent_t)(void *)some[8 + i];
}

static const void *kernel(void)
{
    static const char function;
    return &function;
}

static int register_kernel(void **state)
{
    (void)state;
    shim_check_kernel(kernel(), 256);
    return 0;
}

static cudaLaunchConfig_t config_of(unsigned blocks, unsigned threads, int i_stream)
{
    return (cudaLaunchConfig_t){
        .gridDim = {blocks, 1, 1}, .blockDim = {threads, 1, 1}, .stream = stream(i_stream)};
}

static cudaError_t launch(cudaLaunchConfig_t c)
{
    return shim_check_launch(kernel(), &c);
}

/* Beside the kernel in front. */
static cudaError_t launch_early(int i_stream)
{
    cudaLaunchAttribute early = {.id = cudaLaunchAttributeProgrammaticStreamSerialization};
    cudaLaunchConfig_t c = config_of(1, 32, i_stream);

    early.val.programmaticStreamSerializationAllowed = 1;
    c.attrs = &early;
    c.numAttrs = 1;
    return shim_check_launch(kernel(), &c);
}

static void blocks_and_threads(void **state)
{
    cudaLaunchConfig_t c = config_of(1, 256, 0);

    (void)state;
    assert_int_equal(launch(c), cudaSuccess);
    c.gridDim.y = 65535;
    assert_int_equal(launch(c), cudaSuccess);
    c.gridDim.y = 65536;
    assert_int_equal(launch(c), cudaErrorInvalidConfiguration);
    assert_int_equal(launch(config_of(0, 256, 0)), cudaErrorInvalidConfiguration);
    assert_int_equal(launch(config_of(1, 0, 0)), cudaErrorInvalidConfiguration);
    assert_int_equal(launch(config_of(1, 257, 0)), cudaErrorLaunchOutOfResources);
}

static void shared_memory(void **state)
{
    const enum cudaFuncAttribute most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    cudaLaunchConfig_t c = config_of(1, 32, 0);

    (void)state;
    c.dynamicSmemBytes = 48 << 10;
    assert_int_equal(launch(c), cudaSuccess);
    c.dynamicSmemBytes++;
    assert_int_equal(launch(c), cudaErrorInvalidValue);
    assert_int_equal(shim_check_attribute(kernel(), most, 227 << 10), cudaSuccess);
    assert_int_equal(launch(c), cudaSuccess);
    assert_int_equal(shim_check_attribute(kernel(), most, (227 << 10) + 1), cudaErrorInvalidValue);
}

static void clusters(void **state)
{
    cudaLaunchAttribute cluster = {.id = cudaLaunchAttributeClusterDimension};
    cudaLaunchConfig_t c = config_of(16, 32, 0);

    (void)state;
    c.attrs = &cluster;
    c.numAttrs = 1;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cluster.val.clusterDim.x = 8;
    assert_int_equal(launch(c), cudaSuccess);
    c.gridDim.x = 12;
    assert_int_equal(launch(c), cudaErrorInvalidClusterSize);
    c.gridDim.x = cluster.val.clusterDim.x = 16;
    assert_int_equal(launch(c), cudaErrorInvalidClusterSize);
    assert_int_equal(
        shim_check_attribute(kernel(), cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        cudaSuccess);
    assert_int_equal(launch(c), cudaSuccess);
}

static CUresult map(const char *address, cuuint64_t stride, cuuint32_t columns, cuuint32_t rows)
{
    const cuuint64_t dims[2] = {1024, 7};
    const cuuint32_t box[2] = {columns, rows};
    return shim_check_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, address, dims, &stride, box,
                          CU_TENSOR_MAP_SWIZZLE_128B);
}

static void tensor_maps(void **state)
{
    (void)state;
    assert_int_equal(map(some[0], 1024, 128, 256), CUDA_SUCCESS);
    assert_int_equal(map(some[0] + 8, 1024, 128, 256), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(map(some[0], 1032, 128, 256), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(map(some[0], 512, 128, 256), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(map(some[0], 1024, 144, 256), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(map(some[0], 1024, 100, 256), CUDA_ERROR_INVALID_VALUE);
    assert_int_equal(map(some[0], 1024, 128, 257), CUDA_ERROR_INVALID_VALUE);
}

/* Stream 1 goes on from stream 0. */
static void fork_off(void)
{
    shim_check_record(event(0), stream(0), 0);
    assert_int_equal(shim_check_wait(stream(1), event(0)), cudaSuccess);
}

static cudaError_t join(void)
{
    shim_check_record(event(1), stream(1), 0);
    return shim_check_wait(stream(0), event(1));
}

static void lanes_come_back(void **state)
{
    (void)state;
    for (int joined = 0; joined < 2; joined++) {
        assert_int_equal(shim_check_begin(stream(0)), cudaSuccess);
        assert_int_equal(launch(config_of(1, 32, 0)), cudaSuccess);
        fork_off();
        assert_int_equal(shim_check_status(stream(1)), cudaStreamCaptureStatusActive);
        assert_int_equal(launch(config_of(1, 32, 1)), cudaSuccess);
        if (joined) assert_int_equal(join(), cudaSuccess);
        assert_int_equal(shim_check_end(stream(0)),
                         joined ? cudaSuccess : cudaErrorStreamCaptureUnjoined);
        assert_int_equal(shim_check_status(stream(1)), cudaStreamCaptureStatusNone);
    }
    /* What was launched behind the join is not in it. */
    assert_int_equal(shim_check_begin(stream(0)), cudaSuccess);
    fork_off();
    assert_int_equal(join(), cudaSuccess);
    assert_int_equal(launch(config_of(1, 32, 1)), cudaSuccess);
    assert_int_equal(shim_check_end(stream(0)), cudaErrorStreamCaptureUnjoined);
}

static void early_behind_one_kernel(void **state)
{
    (void)state;
    assert_int_equal(launch_early(0), cudaSuccess); /* outside of captures the driver knows */
    assert_int_equal(shim_check_begin(stream(0)), cudaSuccess);
    assert_int_equal(launch_early(0), cudaErrorInvalidValue); /* nothing in front */
    assert_int_equal(launch(config_of(1, 32, 0)), cudaSuccess);
    assert_int_equal(launch_early(0), cudaSuccess);
    shim_check_copy(stream(0));
    assert_int_equal(launch_early(0), cudaErrorInvalidValue);
    assert_int_equal(launch(config_of(1, 32, 0)), cudaSuccess);
    fork_off();
    assert_int_equal(launch_early(1), cudaSuccess); /* of another stream, but one */
    assert_int_equal(launch_early(0), cudaSuccess);
    assert_int_equal(join(), cudaSuccess);
    assert_int_equal(launch_early(0), cudaErrorInvalidValue); /* two */
    assert_int_equal(launch(config_of(1, 32, 0)), cudaSuccess);
    shim_check_record(event(2), stream(0), 1); /* a stamp */
    assert_int_equal(launch_early(0), cudaErrorInvalidValue);
    assert_int_equal(shim_check_end(stream(0)), cudaSuccess);
    assert_int_equal(shim_check_asked(event(2)), cudaSuccess);
}

static void inside_and_outside(void **state)
{
    (void)state;
    shim_check_record(event(3), stream(2), 0);
    assert_int_equal(shim_check_outside(), cudaSuccess);
    assert_int_equal(shim_check_begin(stream(0)), cudaSuccess);
    assert_int_equal(shim_check_outside(), cudaErrorStreamCaptureUnsupported);
    assert_int_equal(shim_check_begin(stream(1)), cudaErrorIllegalState);
    assert_int_equal(shim_check_wait(stream(0), event(3)), cudaErrorStreamCaptureIsolation);
    shim_check_record(event(0), stream(0), 0);
    assert_int_equal(shim_check_asked(event(0)), cudaErrorCapturedEvent);
    assert_int_equal(shim_check_end(stream(1)), cudaErrorIllegalState);
    assert_int_equal(shim_check_end(stream(0)), cudaSuccess);
    assert_int_equal(shim_check_wait(stream(1), event(0)), cudaErrorCapturedEvent);
    shim_check_record(event(0), stream(0), 0);
    assert_int_equal(shim_check_asked(event(0)), cudaSuccess);
    assert_int_equal(shim_check_wait(stream(1), event(0)), cudaSuccess);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_and_threads), cmocka_unit_test(shared_memory),
        cmocka_unit_test(clusters),           cmocka_unit_test(tensor_maps),
        cmocka_unit_test(lanes_come_back),    cmocka_unit_test(early_behind_one_kernel),
        cmocka_unit_test(inside_and_outside),
    };
    return cmocka_run_group_tests(tests, register_kernel, NULL);
}
