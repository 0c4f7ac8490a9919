/* An HDF5 file by the schema: datasets are made when they are first written, with units, long name, labels and scales.
 * Serial HDF5 knows no threads: all calls on all files of the process come from one thread at a time. A failure leaves
 * the file as it is; nothing but close may follow. Errors are TR_E_IO with the call and HDF5's own message. */
#ifndef TR_PROFILE_FILE_H
#define TR_PROFILE_FILE_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "profile/schema.h"

typedef struct tr_prof_file tr_prof_file;

/* Made anew, in HDF5's newest format, which a killed process leaves readable after h5clear -s up to the last flush. */
tr_status tr_prof_file_create(tr_prof_file **out, const char *path, tr_err *err);
tr_status tr_prof_file_flush(tr_prof_file *f, tr_err *err);
/* In any case the file is given up; f may be NULL. */
tr_status tr_prof_file_close(tr_prof_file *f, tr_err *err);

/* A copy of a file that was open says so, and HDF5 opens it no more: it is told that nobody has it open, as by h5clear -s. */
tr_status tr_prof_file_clear(const char *path, tr_err *err);

/* path NULL: d's own, for those that are not NAMED. dims[]: as many as d has axes. Written whole; what was there before is
 * replaced, and may have had other lengths along REGION, WINDOW, FILE, LINE and whatever else grows. */
tr_status tr_prof_file_put(tr_prof_file *f, const tr_dataset *d, const char *path,
                           const uint64_t *dims, const void *data, tr_err *err);
/* n more along the last axis; the axis before it is a rank's, of length 1. n 0: the dataset is made. */
tr_status tr_prof_file_append(tr_prof_file *f, const tr_dataset *d, const char *path, uint64_t n,
                              const void *data, tr_err *err);
/* Read, change and write back what was appended, some rows at a time. Nothing where nothing was. */
tr_status tr_prof_file_change(tr_prof_file *f, const tr_dataset *d, const char *path,
                              void (*change)(void *ctx, void *rows, size_t n), void *ctx,
                              tr_err *err);
/* /scales/<axis>: first .. first + n - 1, as the scale of the axes of that name in datasets made later; may grow. */
tr_status tr_prof_file_scale(tr_prof_file *f, tr_axis axis, uint64_t first, uint64_t n,
                             tr_err *err);

/* Attributes of "/", of a group, which is made where there is none, or of a dataset. Set again: replaced. */
tr_status tr_prof_file_text(tr_prof_file *f, const char *object, const char *name,
                            const char *value, tr_err *err);
tr_status tr_prof_file_number(tr_prof_file *f, const char *object, const char *name, int64_t value,
                              tr_err *err);

#endif
