/* HDF5 calls of the profile's files: a negative result becomes an error and goes to `done`. Included by file.c, dress.c
 * and join.c only. */
#ifndef TR_PROFILE_H5_PRIV_H
#define TR_PROFILE_H5_PRIV_H

#include <hdf5.h>

#include "base/err.h"
#include "profile/file.h"
#include "profile/schema.h"

/* TR_E_IO: the call and the innermost message of HDF5's error stack, which is cleared. */
tr_status tr_h5_failed(const char *call, tr_err *err);

#define TR_H5(call)                                                                                \
    do {                                                                                           \
        if ((call) < 0) {                                                                          \
            st = tr_h5_failed(#call, err);                                                         \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

/* Before anything else: HDF5 prints no errors of its own, and does not try at exit to close what a full disk has kept
 * from being written. */
void tr_h5_quiet(void);

hid_t tr_prof_file_id(const tr_prof_file *f);

/* Units, long name, labels, of a dataset that was just made; scales that /scales has. */
tr_status tr_h5_dress(hid_t file, hid_t dataset, const tr_dataset *d, tr_err *err);
tr_status tr_h5_text(hid_t object, const char *name, const char *value, tr_err *err);
tr_status tr_h5_number(hid_t object, const char *name, int64_t value, tr_err *err);
/* Links on the way are made. */
hid_t tr_h5_link_list(void);

#endif
