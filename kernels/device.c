#include <config.h>

#include "kernels/device.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#ifdef HAVE_CUDA
#include <cuda_runtime_api.h>
#endif

#include "kernels/toolkit.h"

tr_status tr_device_fail(tr_device *d, tr_status status, const char *fmt, ...)
{
    tr_device_head *head = (tr_device_head *)(void *)d;
    va_list args;
    va_start(args, fmt);
    vsnprintf(head->error, sizeof head->error, fmt, args);
    va_end(args);
    return status;
}

const char *tr_device_error(const tr_device *d)
{
    return ((const tr_device_head *)(const void *)d)->error;
}

const char *tr_device_describe(const tr_device *d)
{
    return ((const tr_device_head *)(const void *)d)->describe;
}

const char *tr_device_uuid(const tr_device *d)
{
    return ((const tr_device_head *)(const void *)d)->uuid;
}

const char *tr_device_pci(const tr_device *d)
{
    return ((const tr_device_head *)(const void *)d)->pci;
}

int tr_device_numa(const tr_device *d, const char **cpus)
{
    const tr_device_head *head = (const tr_device_head *)(const void *)d;
    *cpus = head->near.bound ? head->near.cpus : "";
    return head->pci[0] ? head->near.numa_node : -1;
}

int tr_device_choose(int n_devices, int i, int n_ranks)
{
    if (n_devices < 1 || i < 0 || i >= n_ranks) return -1;
    if (n_devices == 1) return 0;
    return n_ranks <= n_devices ? i : -1;
}

void tr_device_look(tr_gpu_seen *seen, int i, int n_ranks)
{
    *seen = (tr_gpu_seen){.n = 0};
#ifdef HAVE_CUDA
    tr_cuda_look(seen, i, n_ranks);
#else
    (void)i;
    (void)n_ranks;
#endif
}

void tr_device_toolkit(char *text, size_t n)
{
#ifdef HAVE_CUDA
    snprintf(text, n, "%d.%d", CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
#else
    snprintf(text, n, "%s", "");
#endif
}

tr_status tr_ops_check(const tr_ops *ops, tr_err *err)
{
    const char *missing = NULL;
#define HAVE(entry)                                                                                \
    if (!ops->entry) missing = #entry;
    /* clang-format off */
    HAVE(alloc) HAVE(release) HAVE(memory_left) HAVE(upload) HAVE(download) HAVE(order) HAVE(ticket) HAVE(done)
    HAVE(error) HAVE(close) HAVE(linear_bytes) HAVE(linear_pack) HAVE(moe_workspace)
    HAVE(sparse_mla_workspace) HAVE(sample_workspace) HAVE(ceilings) TR_OPS(HAVE)
#undef HAVE
        /* clang-format on */
        if (!missing) return TR_OK;
    return tr_fail(err, TR_E_DEVICE, "backend %s has no operation %s", ops->name, missing);
}

tr_status tr_device_open(tr_device **out, const tr_ops **ops, const tr_device_options *options,
                         tr_err *err)
{
    const char *name = options->name ? options->name : "auto";

    *out = NULL;
    *ops = NULL;
    if (strcmp(name, "cpu") == 0) return tr_cpu_open(out, ops, options, err);
    if (strcmp(name, "auto") != 0 && strcmp(name, "cuda") != 0)
        return tr_fail(err, TR_E_USAGE, "device '%s' is none of auto, cpu, cuda", name);
    if (strcmp(name, "auto") == 0 && options->isa) return tr_cpu_open(out, ops, options, err);
#ifdef HAVE_CUDA
    int usable = 0;
    tr_status st = tr_cuda_open(out, ops, options, &usable, err);
    if (usable || strcmp(name, "cuda") == 0) return st;
#else
    if (strcmp(name, "cuda") == 0)
        return tr_fail(err, TR_E_USAGE, "this build has no CUDA backend");
#endif
    return tr_cpu_open(out, ops, options, err);
}
