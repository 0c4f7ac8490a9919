/* MPI's error codes, translated where they appear (style.md 3); included by the files that call MPI only. */
#ifndef TR_MPI_MPI_PRIV_H
#define TR_MPI_MPI_PRIV_H

#include <stdio.h>

#include <mpi.h>

#include "base/err.h"

/* The text holds the call and the library's own message. */
static inline tr_status tr_mpi_failed(tr_err *err, const char *call, int code)
{
    char text[MPI_MAX_ERROR_STRING];
    int n = 0;

    if (MPI_Error_string(code, text, &n) != MPI_SUCCESS)
        snprintf(text, sizeof text, "error %d", code);
    return tr_fail(err, TR_E_COMM, "%s: %s", call, text);
}

/* Sets st and leaves. */
#define TR_MPI(call)                                                                               \
    do {                                                                                           \
        int tr_code = (call);                                                                      \
        if (tr_code != MPI_SUCCESS) {                                                              \
            st = tr_mpi_failed(err, #call, tr_code);                                               \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

#endif
