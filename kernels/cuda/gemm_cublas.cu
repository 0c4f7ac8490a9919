#include "kernels/cuda/gemm_cublas.h"

#include <stdlib.h>

#include <cublasLt.h>

struct tr_cublas_fp8 {
    cublasLtHandle_t handle;
    cublasLtMatmulDesc_t product;
    cublasLtMatrixLayout_t w, x, out;
    cublasLtMatmulAlgo_t algorithm;
    void *workspace;
    size_t workspace_bytes;
};

namespace
{

cublasStatus_t set(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t name, int32_t value)
{
    return cublasLtMatmulDescSetAttribute(d, name, &value, sizeof value);
}

/* Row-major out = x w^T is column-major out^T = w x^T: w [n_out, n_in] is the library's A, transposed. */
cublasStatus_t describe(tr_cublas_fp8 *p, int n_out, int n_in, int n_max)
{
    cublasStatus_t s = cublasLtCreate(&p->handle);
    if (!s) s = cublasLtMatmulDescCreate(&p->product, CUBLAS_COMPUTE_32F, CUDA_R_32F);
    if (!s) s = set(p->product, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
    if (!s) s = set(p->product, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
    if (!s)
        s = set(p->product, CUBLASLT_MATMUL_DESC_A_SCALE_MODE,
                CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F);
    if (!s)
        s = set(p->product, CUBLASLT_MATMUL_DESC_B_SCALE_MODE,
                CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F);
    if (!s)
        s = cublasLtMatrixLayoutCreate(&p->w, CUDA_R_8F_E4M3, (uint64_t)n_in, (uint64_t)n_out,
                                       n_in);
    if (!s)
        s = cublasLtMatrixLayoutCreate(&p->x, CUDA_R_8F_E4M3, (uint64_t)n_in, (uint64_t)n_max,
                                       n_in);
    if (!s)
        s = cublasLtMatrixLayoutCreate(&p->out, CUDA_R_16BF, (uint64_t)n_out, (uint64_t)n_max,
                                       n_out);
    return s;
}

cublasStatus_t set_scales(tr_cublas_fp8 *p, const void *w, const void *x)
{
    cublasStatus_t s = cublasLtMatmulDescSetAttribute(
        p->product, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &w, sizeof w);
    if (!s)
        s = cublasLtMatmulDescSetAttribute(p->product, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x,
                                           sizeof x);
    return s;
}

cublasStatus_t choose(tr_cublas_fp8 *p)
{
    cublasLtMatmulPreference_t preference = NULL;
    cublasLtMatmulHeuristicResult_t result;
    int n = 0;
    cublasStatus_t s = cublasLtMatmulPreferenceCreate(&preference);
    if (!s)
        s = cublasLtMatmulPreferenceSetAttribute(preference,
                                                 CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                 &p->workspace_bytes, sizeof p->workspace_bytes);
    if (!s)
        s = cublasLtMatmulAlgoGetHeuristic(p->handle, p->product, p->w, p->x, p->out, p->out,
                                           preference, 1, &result, &n);
    if (!s && n < 1) s = CUBLAS_STATUS_NOT_SUPPORTED;
    if (!s) p->algorithm = result.algo;
    if (preference) cublasLtMatmulPreferenceDestroy(preference);
    return s;
}

} // namespace

cudaError_t tr_cublas_fp8_create(tr_cublas_fp8 **out, int n_out, int n_in, int n_max,
                                 void *workspace_d, size_t workspace_bytes)
{
    *out = NULL;
    tr_cublas_fp8 *p = (tr_cublas_fp8 *)calloc(1, sizeof *p);
    if (!p) return cudaErrorMemoryAllocation;
    p->workspace = workspace_d;
    p->workspace_bytes = workspace_bytes;
    /* Any pointer: the heuristic wants to see that there are scales. */
    if (describe(p, n_out, n_in, n_max) || set_scales(p, workspace_d, workspace_d) || choose(p)) {
        tr_cublas_fp8_free(p);
        return cudaErrorNotSupported;
    }
    *out = p;
    return cudaSuccess;
}

cudaError_t tr_cublas_fp8_run(tr_cublas_fp8 *p, const tr_fp8_weight *w, const tr_fp8_rows *x,
                              void *out_d, cudaStream_t stream)
{
    const float one = 1, zero = 0;
    cublasStatus_t s = set_scales(p, w->scale_d, x->scale_d);
    if (!s)
        s = cublasLtMatmul(p->handle, p->product, &one, w->q_d, p->w, x->q_d, p->x, &zero, out_d,
                           p->out, out_d, p->out, &p->algorithm, p->workspace, p->workspace_bytes,
                           stream);
    return s ? cudaErrorUnknown : cudaSuccess;
}

void tr_cublas_fp8_free(tr_cublas_fp8 *p)
{
    if (!p) return;
    if (p->out) cublasLtMatrixLayoutDestroy(p->out);
    if (p->x) cublasLtMatrixLayoutDestroy(p->x);
    if (p->w) cublasLtMatrixLayoutDestroy(p->w);
    if (p->product) cublasLtMatmulDescDestroy(p->product);
    if (p->handle) cublasLtDestroy(p->handle);
    free(p);
}
