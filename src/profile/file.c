#include <config.h>

#include "profile/file.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <hdf5_hl.h>

#include "base/size.h"
#include "profile/h5_priv.h"

enum {
    CHUNK_BYTES = 64 << 10, /* before compression */
    TABLE_ROWS = 256,
    CHANGE_BYTES = 1 << 20, /* read and written back at a time */
};

typedef struct open_dataset {
    char *path;
    const tr_dataset *d;
    hid_t id, memory_type;
    hsize_t dims[TR_DATASET_AXES];
} open_dataset;

struct tr_prof_file {
    hid_t id;
    char *path;
    int n, room;
    open_dataset *set; /* [n], open until close */
};

/* ---- opening and closing ------------------------------------------------------------------------------------------- */

tr_status tr_prof_file_create(tr_prof_file **out, const char *path, tr_err *err)
{
    tr_status st = TR_OK;
    hid_t access = -1;
    tr_prof_file *f = NULL;

    *out = NULL;
    tr_h5_quiet();
    f = calloc(1, sizeof *f);
    if (!f || !(f->path = strdup(path))) {
        free(f);
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    f->id = -1;
    TR_H5(access = H5Pcreate(H5P_FILE_ACCESS));
    TR_H5(H5Pset_libver_bounds(access, H5F_LIBVER_LATEST, H5F_LIBVER_LATEST));
    TR_H5(H5Pset_fclose_degree(access, H5F_CLOSE_STRONG));
    TR_H5(f->id = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, access));
    *out = f;
    f = NULL;

done:
    if (access >= 0) H5Pclose(access);
    if (f) {
        tr_prof_file_close(f, NULL);
        tr_within(err, "%s", path);
    }
    return st;
}

hid_t tr_prof_file_id(const tr_prof_file *f)
{
    return f->id;
}

/* In thread-safe builds of HDF5 every thread has its own mind about printing errors. */
static void be_quiet(void)
{
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
}

tr_status tr_prof_file_flush(tr_prof_file *f, tr_err *err)
{
    tr_status st = TR_OK;

    be_quiet();
    TR_H5(H5Fflush(f->id, H5F_SCOPE_LOCAL));

done:
    return st == TR_OK ? TR_OK : tr_within(err, "%s", f->path);
}

tr_status tr_prof_file_close(tr_prof_file *f, tr_err *err)
{
    tr_status st = TR_OK;

    if (!f) return TR_OK;
    be_quiet();
    for (int i = 0; i < f->n; i++) {
        if (f->set[i].memory_type >= 0) H5Tclose(f->set[i].memory_type);
        if (f->set[i].id >= 0 && H5Dclose(f->set[i].id) < 0 && st == TR_OK)
            st = tr_h5_failed("H5Dclose", err);
        free(f->set[i].path);
    }
    if (f->id >= 0 && H5Fclose(f->id) < 0 && st == TR_OK) st = tr_h5_failed("H5Fclose", err);
    if (st != TR_OK) tr_within(err, "%s", f->path);
    free(f->set);
    free(f->path);
    free(f);
    return st;
}

tr_status tr_prof_file_clear(const char *path, tr_err *err)
{
    const hbool_t yes = 1;
    tr_status st = TR_OK;
    hid_t access = -1, id = -1;

    be_quiet();
    TR_H5(access = H5Pcreate(H5P_FILE_ACCESS));
    TR_H5(H5Pset(access, "clear_status_flags", &yes)); /* the property that h5clear sets */
    TR_H5(id = H5Fopen(path, H5F_ACC_RDWR, access));

done:
    if (id >= 0 && H5Fclose(id) < 0 && st == TR_OK) st = tr_h5_failed("H5Fclose", err);
    if (access >= 0) H5Pclose(access);
    return st == TR_OK ? TR_OK : tr_within(err, "%s", path);
}

/* ---- datasets ------------------------------------------------------------------------------------------------------ */

static bool axis_grows(tr_axis axis)
{
    switch (axis) {
    case TR_AXIS_REGION:
    case TR_AXIS_STEP:
    case TR_AXIS_REQUEST:
    case TR_AXIS_WINDOW:
    case TR_AXIS_SAMPLE:
    case TR_AXIS_EVENT:
    case TR_AXIS_FILE:
    case TR_AXIS_LINE:
        return true;
    default:
        return false;
    }
}

static bool is_reference(const tr_dataset *d)
{
    return !d->record && (d->kind == TR_FIELD_TEXT || d->kind == TR_FIELD_LIST);
}

/* Chunks of about CHUNK_BYTES where rows are appended; where a table is written whole they begin small, since it is
 * compressed again with every flush. */
static tr_status set_layout(hid_t list, const tr_dataset *d, const hsize_t *dims, size_t bytes,
                            tr_err *err)
{
    hsize_t chunk[TR_DATASET_AXES], room = CHUNK_BYTES / bytes + 1;
    const hsize_t least = d->flags & TR_DATASET_GROWS ? room : TABLE_ROWS;
    const int n = tr_dataset_axes(d);
    tr_status st = TR_OK;

    for (int i = n - 1; i >= 0; i--) {
        hsize_t want = dims[i] ? dims[i] : 1;
        if (axis_grows(d->axis[i]) && want < least) want = least;
        chunk[i] = want < room ? want : room;
        room = room / chunk[i] + 1;
    }
    TR_H5(H5Pset_chunk(list, n, chunk));
    if (!is_reference(d) && H5Zfilter_avail(H5Z_FILTER_DEFLATE) > 0) {
        TR_H5(H5Pset_shuffle(list));
        TR_H5(H5Pset_deflate(list, 1));
    }
    if (!d->record && d->kind == TR_FIELD_F8) {
        const double absent = __builtin_nan("");
        TR_H5(H5Pset_fill_value(list, H5T_NATIVE_DOUBLE, &absent));
    }

done:
    return st;
}

static tr_status make_dataset(tr_prof_file *f, open_dataset *s, const hsize_t *dims, tr_err *err)
{
    const tr_dataset *d = s->d;
    const int n = tr_dataset_axes(d);
    hsize_t most[TR_DATASET_AXES];
    tr_status st = TR_OK;
    hid_t type = -1, space = -1, list = -1, links = -1;

    for (int i = 0; i < n; i++) {
        most[i] = axis_grows(d->axis[i]) ? H5S_UNLIMITED : dims[i];
        s->dims[i] = dims[i];
    }
    TR_H5(s->memory_type = tr_schema_memory_type(d));
    TR_H5(type = tr_schema_file_type(d));
    TR_H5(space = H5Screate_simple(n, dims, most));
    TR_H5(list = H5Pcreate(H5P_DATASET_CREATE));
    TR_H5(links = tr_h5_link_list());
    st = set_layout(list, d, dims, H5Tget_size(type), err);
    if (st != TR_OK) goto done;
    TR_H5(s->id = H5Dcreate2(f->id, s->path, type, space, links, list, H5P_DEFAULT));
    st = tr_h5_dress(f->id, s->id, d, err);

done:
    if (links >= 0) H5Pclose(links);
    if (list >= 0) H5Pclose(list);
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    return st;
}

static open_dataset *find(const tr_prof_file *f, const char *path)
{
    for (int i = 0; i < f->n; i++)
        if (strcmp(f->set[i].path, path) == 0) return &f->set[i];
    return NULL;
}

/* The dataset, made with these lengths where there is none. */
static tr_status get(tr_prof_file *f, const tr_dataset *d, const char *path, const hsize_t *dims,
                     open_dataset **out, tr_err *err)
{
    if (!path) path = d->path;
    be_quiet();
    *out = find(f, path);
    if (*out) return TR_OK;
    if (f->n == f->room) {
        const int room = f->room ? 2 * f->room : 64;
        open_dataset *set = realloc(f->set, (size_t)room * sizeof *set);
        if (!set) return tr_fail(err, TR_E_MEMORY, "out of memory");
        f->set = set;
        f->room = room;
    }
    open_dataset *s = &f->set[f->n];
    *s = (open_dataset){.path = strdup(path), .d = d, .id = -1, .memory_type = -1};
    if (!s->path) return tr_fail(err, TR_E_MEMORY, "out of memory");
    f->n++; /* closed with the file, whole or not */
    *out = s;
    return make_dataset(f, s, dims, err);
}

static tr_status named(tr_status st, const tr_prof_file *f, const char *path, tr_err *err)
{
    return st == TR_OK ? TR_OK : tr_within(err, "%s: %s", f->path, path);
}

tr_status tr_prof_file_put(tr_prof_file *f, const tr_dataset *d, const char *path,
                           const uint64_t *dims, const void *data, tr_err *err)
{
    const int n = tr_dataset_axes(d);
    hsize_t want[TR_DATASET_AXES];
    open_dataset *s = NULL;
    bool differs = false, empty = false;

    for (int i = 0; i < n; i++)
        want[i] = dims[i];
    tr_status st = get(f, d, path, want, &s, err);
    if (st != TR_OK) goto done;
    for (int i = 0; i < n; i++) {
        differs = differs || s->dims[i] != want[i];
        empty = empty || !want[i];
        s->dims[i] = want[i];
    }
    if (differs) TR_H5(H5Dset_extent(s->id, want));
    if (!empty) TR_H5(H5Dwrite(s->id, s->memory_type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data));

done:
    return named(st, f, path ? path : d->path, err);
}

/* Rows [begin, begin + n) along the last axis, between memory and file. */
static tr_status move_rows(const open_dataset *s, uint64_t begin, uint64_t n, const void *from,
                           void *to, tr_err *err)
{
    const int axes = tr_dataset_axes(s->d);
    hsize_t start[TR_DATASET_AXES] = {0}, count[TR_DATASET_AXES] = {1, 1, 1};
    tr_status st = TR_OK;
    hid_t file = -1, memory = -1;

    start[axes - 1] = begin;
    count[axes - 1] = n;
    TR_H5(file = H5Dget_space(s->id));
    TR_H5(H5Sselect_hyperslab(file, H5S_SELECT_SET, start, NULL, count, NULL));
    TR_H5(memory = H5Screate_simple(axes, count, NULL));
    if (from)
        TR_H5(H5Dwrite(s->id, s->memory_type, memory, file, H5P_DEFAULT, from));
    else
        TR_H5(H5Dread(s->id, s->memory_type, memory, file, H5P_DEFAULT, to));

done:
    if (memory >= 0) H5Sclose(memory);
    if (file >= 0) H5Sclose(file);
    return st;
}

tr_status tr_prof_file_append(tr_prof_file *f, const tr_dataset *d, const char *path, uint64_t n,
                              const void *data, tr_err *err)
{
    const int axes = tr_dataset_axes(d);
    hsize_t none[TR_DATASET_AXES] = {1, 1, 1};
    open_dataset *s = NULL;

    none[axes - 1] = 0;
    tr_status st = get(f, d, path, none, &s, err);
    if (st != TR_OK || !n) goto done;
    const hsize_t begin = s->dims[axes - 1];
    s->dims[axes - 1] += n;
    TR_H5(H5Dset_extent(s->id, s->dims));
    st = move_rows(s, begin, n, data, NULL, err);

done:
    return named(st, f, path ? path : d->path, err);
}

tr_status tr_prof_file_change(tr_prof_file *f, const tr_dataset *d, const char *path,
                              void (*change)(void *ctx, void *rows, size_t n), void *ctx,
                              tr_err *err)
{
    open_dataset *s = find(f, path ? path : d->path);
    tr_status st = TR_OK;

    if (!s) return TR_OK;
    const size_t bytes = d->record ? d->record->bytes : 8, most = CHANGE_BYTES / bytes;
    const uint64_t all = s->dims[tr_dataset_axes(d) - 1];
    void *rows = malloc(most * bytes);
    if (!rows) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (uint64_t i = 0; i < all && st == TR_OK; i += most) {
        const size_t n = all - i < most ? (size_t)(all - i) : most;
        st = move_rows(s, i, n, NULL, rows, err);
        if (st == TR_OK) change(ctx, rows, n);
        if (st == TR_OK) st = move_rows(s, i, n, rows, NULL, err);
    }
    free(rows);
    return named(st, f, path ? path : d->path, err);
}

tr_status tr_prof_file_scale(tr_prof_file *f, tr_axis axis, uint64_t first, uint64_t n, tr_err *err)
{
    char path[64];
    tr_status st = TR_OK;
    hid_t id = -1, space = -1, list = -1, links = -1;
    const hsize_t dims = n, most = H5S_UNLIMITED, chunk = 1024;
    int32_t *number = tr_calloc(n, sizeof *number);

    if (!number) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (uint64_t i = 0; i < n; i++)
        number[i] = (int32_t)(first + i);
    snprintf(path, sizeof path, "/scales/%s", tr_axis_name(axis));
    if (H5Lexists(f->id, "/scales", H5P_DEFAULT) > 0 && H5Lexists(f->id, path, H5P_DEFAULT) > 0) {
        TR_H5(id = H5Dopen2(f->id, path, H5P_DEFAULT));
        TR_H5(H5Dset_extent(id, &dims));
    } else {
        TR_H5(space = H5Screate_simple(1, &dims, &most));
        TR_H5(list = H5Pcreate(H5P_DATASET_CREATE));
        TR_H5(H5Pset_chunk(list, 1, &chunk));
        TR_H5(links = tr_h5_link_list());
        TR_H5(id = H5Dcreate2(f->id, path, H5T_STD_I32LE, space, links, list, H5P_DEFAULT));
        TR_H5(H5DSset_scale(id, tr_axis_name(axis)));
        st = tr_h5_text(id, "long_name", "number along an axis", err);
        if (st == TR_OK) st = tr_h5_text(id, "units", "1", err);
        if (st != TR_OK) goto done;
    }
    if (n) TR_H5(H5Dwrite(id, H5T_NATIVE_INT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, number));

done:
    if (links >= 0) H5Pclose(links);
    if (list >= 0) H5Pclose(list);
    if (space >= 0) H5Sclose(space);
    if (id >= 0) H5Dclose(id);
    free(number);
    return named(st, f, path, err);
}

/* ---- attributes ---------------------------------------------------------------------------------------------------- */

/* The object, a group where there is nothing of that name. */
static tr_status open_object(tr_prof_file *f, const char *object, hid_t *out, tr_err *err)
{
    tr_status st = TR_OK;
    hid_t links = -1;

    *out = -1;
    if (strcmp(object, "/") != 0 && H5Oexists_by_name(f->id, object, H5P_DEFAULT) <= 0) {
        H5Eclear2(H5E_DEFAULT);
        TR_H5(links = tr_h5_link_list());
        TR_H5(*out = H5Gcreate2(f->id, object, links, H5P_DEFAULT, H5P_DEFAULT));
    } else {
        TR_H5(*out = H5Oopen(f->id, object, H5P_DEFAULT));
    }

done:
    if (links >= 0) H5Pclose(links);
    return st;
}

tr_status tr_prof_file_text(tr_prof_file *f, const char *object, const char *name,
                            const char *value, tr_err *err)
{
    hid_t id;
    tr_status st = open_object(f, object, &id, err);

    if (st == TR_OK) st = tr_h5_text(id, name, value, err);
    if (id >= 0) H5Oclose(id);
    return named(st, f, name, err);
}

tr_status tr_prof_file_number(tr_prof_file *f, const char *object, const char *name, int64_t value,
                              tr_err *err)
{
    hid_t id;
    tr_status st = open_object(f, object, &id, err);

    if (st == TR_OK) st = tr_h5_number(id, name, value, err);
    if (id >= 0) H5Oclose(id);
    return named(st, f, name, err);
}
