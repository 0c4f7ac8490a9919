/* Reading HDF5 files that are not trusted: every size is compared with what the file can hold before memory is asked for, and
 * every failure is one line that names the file and the dataset. A module of the reader (profile/read.h) and of nothing else;
 * one thread. HDF5's own printing of errors is switched off by tr_h5_open for the whole process. */
#ifndef TR_PROFILE_H5READ_H
#define TR_PROFILE_H5READ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <hdf5.h>

#include "base/err.h"

enum { TR_H5_AXES = 4 };

/* What one dataset may fill in memory; a profile of 4,096 ranks stays far below. */
#define TR_H5_BYTES_MAX ((uint64_t)1 << 30)

typedef struct tr_h5_data {
    void *at; /* the caller frees; never NULL after TR_OK */
    int n_axes;
    uint64_t dim[TR_H5_AXES];
    size_t n; /* elements: product of dim */
} tr_h5_data;

/* Which part of a dataset: all, or one index of its first axis (that axis is then left out of dim). */
typedef struct tr_h5_part {
    bool one;
    uint64_t index;
} tr_h5_part;

/* Opens for reading. TR_E_INPUT: missing, no HDF5 file, damaged, or not closed by the run that wrote it (the text says how
 * to make it readable); TR_E_IO: the system refused. */
tr_status tr_h5_open(hid_t *file, const char *path, tr_err *err);

/* Is there an object at this absolute path? A link that leads nowhere does not count. */
bool tr_h5_has(hid_t file, const char *path);
/* Is it a dataset? */
bool tr_h5_is_dataset(hid_t file, const char *path);

/* Reads elements of the type in memory; n_axes is what the dataset must have, before `part` takes one away. name: the file's,
 * for messages. TR_E_INPUT also: another type, another number of axes, more elements than the file can hold or than
 * TR_H5_BYTES_MAX. No variable-length types. */
tr_status tr_h5_read(tr_h5_data *out, hid_t file, const char *name, const char *path, hid_t type,
                     int n_axes, tr_h5_part part, tr_err *err);

/* All texts of a dataset of variable-length strings with n_axes axes: *texts [*n], each and the array the caller's
 * (tr_h5_texts_free), cleaned. */
tr_status tr_h5_read_texts(char ***texts, size_t *n, hid_t file, const char *name, const char *path,
                           int n_axes, tr_err *err);
void tr_h5_texts_free(char **texts, size_t n);

/* A row of lists of i4: *list [*n], the caller's. */
typedef struct tr_h5_list {
    int32_t *at;
    size_t n;
} tr_h5_list;
tr_status tr_h5_read_lists(tr_h5_list **list, size_t *n, hid_t file, const char *name,
                           const char *path, tr_err *err);
void tr_h5_lists_free(tr_h5_list *list, size_t n);

/* The attribute as text, numbers in decimal; NULL: absent or of another kind. The caller frees. */
char *tr_h5_attribute(hid_t file, const char *object, const char *attribute);

/* Calls see for each attribute of an object (is_number: a whole number), in the order of their names, until it returns false. */
void tr_h5_attributes(hid_t file, const char *object,
                      bool (*see)(void *ctx, const char *name, const char *value, bool is_number),
                      void *ctx);

/* Names of all datasets at or below a group, as paths relative to it, in the order of the alphabet; *names [*n] as
 * tr_h5_read_texts gives. At most 4096, deeper than 8 folders is not looked at. */
tr_status tr_h5_names(char ***names, size_t *n, hid_t file, const char *group, tr_err *err);

/* The files that a dataset is put together from, and the index along its first axis at which each begins. see returns false
 * to stop. Nothing is called for a dataset that is not virtual. */
void tr_h5_sources(hid_t file, const char *path,
                   bool (*see)(void *ctx, const char *source, uint64_t first, uint64_t n),
                   void *ctx);

/* One line: breaks and tabs become spaces, other control characters, and all bytes above 127 where the text is no UTF-8,
 * become '?'. */
void tr_h5_clean(char *text);

/* The innermost message of the library's last failure. */
void tr_h5_why(char *text, size_t n);

#endif
