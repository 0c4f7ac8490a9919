/* trireme --version: everything a ticket asks for first. */
#include <config.h>

#include <errno.h>
#include <stdio.h>
#include <string.h>

#include <hdf5.h>
#include <hwloc.h>
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <xxhash.h>

#include "base/json.h"
#include "command/command.h"
#include "kernels/kernels.h"
#include "kernels/toolkit.h"
#ifdef HAVE_NCCL
#include "mpi/comm_nccl.h"
#endif
#include "mpi/start.h"

static void print_device(FILE *out)
{
    const tr_device_options options = {.name = "auto"};
    tr_device *device = NULL;
    const tr_ops *ops = NULL;
    tr_err why;

    if (tr_device_open(&device, &ops, &options, &why) != TR_OK) {
        fprintf(out, "device    none: %s\n", why.text);
        return;
    }
    fprintf(out, "device    %s\n", tr_device_describe(device));
    ops->close(device);
}

tr_status tr_command_version(int argc, char **argv, tr_err *err)
{
    FILE *out = stdout;
    char mpi[256] = "", pcre2[64] = "", toolkit[32], nccl[32] = "none";
    unsigned major = 0, minor = 0, release = 0, hwloc = hwloc_get_api_version();

    (void)argv;
    if (argc > 1) return tr_fail(err, TR_E_USAGE, "--version takes no arguments");
    tr_mpi_version(mpi, sizeof mpi);
    mpi[strcspn(mpi, "\n")] = 0;
    H5get_libversion(&major, &minor, &release);
    pcre2_config(PCRE2_CONFIG_VERSION, pcre2);
    tr_device_toolkit(toolkit, sizeof toolkit);
#ifdef HAVE_NCCL
    tr_nccl_version(nccl, sizeof nccl);
#endif
    fprintf(out, "trireme   %s\n", PACKAGE_VERSION);
    fprintf(out, "MPI       %s\n", mpi);
    fprintf(out, "CUDA      %s\n", toolkit[0] ? toolkit : "none");
    fprintf(out, "NCCL      %s\n", nccl);
    fprintf(out, "HDF5      %u.%u.%u\n", major, minor, release);
    fprintf(out, "jansson   %s\n", jansson_version_str());
    fprintf(out, "PCRE2     %s\n", pcre2);
    fprintf(out, "hwloc     %u.%u.%u\n", hwloc >> 16, hwloc >> 8 & 255, hwloc & 255);
    fprintf(out, "xxhash    %u.%u.%u\n", XXH_versionNumber() / 10000,
            XXH_versionNumber() / 100 % 100, XXH_versionNumber() % 100);
    fprintf(out, "compiler  %s\n", __VERSION__);
    print_device(out);
    if (fflush(out) != 0) return tr_fail(err, TR_E_IO, "standard output: %s", strerror(errno));
    return TR_OK;
}
