#include <config.h>

#include "profile/h5read.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/size.h"

enum { NAMES_MAX = 4096, NAMES_DEPTH = 8, NAME_BYTES = 512, TEXT_MAX = 1 << 20 };

/* ---- messages ------------------------------------------------------------------------------------------------------ */

static herr_t innermost(unsigned n, const H5E_error2_t *e, void *ctx)
{
    (void)n;
    if (e->desc && *e->desc) snprintf(ctx, 256, "%s", e->desc);
    return 0;
}

void tr_h5_why(char *text, size_t n)
{
    char why[256] = "HDF5 does not say why";
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_DOWNWARD, innermost, why);
    snprintf(text, n, "%s", why);
}

static tr_status damaged(tr_err *err, const char *name, const char *path)
{
    char why[256];
    tr_h5_why(why, sizeof why);
    return tr_fail(err, TR_E_INPUT, "%s: %s: cannot be read: %s", name, path, why);
}

/* The length of the character that begins at p, 0: none does. Overlong forms and surrogates are let through: JSON readers take
 * them or say so, and no name of ours has any. */
static size_t utf8_length(const unsigned char *p)
{
    size_t n = *p < 0x80 ? 1 : (*p >> 5) == 6 ? 2 : (*p >> 4) == 14 ? 3 : (*p >> 3) == 30 ? 4 : 0;
    for (size_t i = 1; i < n; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    return n;
}

void tr_h5_clean(char *text)
{
    bool is_utf8 = true;
    for (const unsigned char *p = (const unsigned char *)text; *p && is_utf8;) {
        size_t n = utf8_length(p);
        is_utf8 = n > 0;
        p += n;
    }
    for (unsigned char *p = (unsigned char *)text; *p; p++)
        if (*p == '\n' || *p == '\t' || *p == '\r')
            *p = ' ';
        else if (*p < 0x20 || *p == 0x7f || (*p >= 0x80 && !is_utf8))
            *p = '?';
}

/* ---- files and objects --------------------------------------------------------------------------------------------- */

tr_status tr_h5_open(hid_t *file, const char *path, tr_err *err)
{
    struct stat sb;
    char why[256];

    *file = -1;
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL);
    if (stat(path, &sb) != 0 || access(path, R_OK) != 0)
        return tr_fail(err, errno == ENOENT || errno == ENOTDIR ? TR_E_INPUT : TR_E_IO, "%s: %s",
                       path, strerror(errno));
    if (!S_ISREG(sb.st_mode)) return tr_fail(err, TR_E_INPUT, "%s: not a file", path);
    if (H5Fis_hdf5(path) <= 0) return tr_fail(err, TR_E_INPUT, "%s: not an HDF5 file", path);
    H5Eclear2(H5E_DEFAULT);
    *file = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    if (*file >= 0) return TR_OK;
    tr_h5_why(why, sizeof why);
    if (strstr(why, "h5clear") || strstr(why, "already open"))
        return tr_fail(err, TR_E_INPUT,
                       "%s: the run that wrote it has not closed it; when that run has ended: "
                       "h5clear -s %s",
                       path, path);
    return tr_fail(err, TR_E_INPUT, "%s: damaged: %s", path, why);
}

bool tr_h5_has(hid_t file, const char *path)
{
    char part[NAME_BYTES];
    if (snprintf(part, sizeof part, "%s", path) >= (int)sizeof part) return false;
    for (char *p = part + 1; (p = strchr(p, '/')) != NULL; p++) {
        *p = 0;
        if (H5Lexists(file, part, H5P_DEFAULT) <= 0) return false;
        *p = '/';
    }
    return H5Lexists(file, part, H5P_DEFAULT) > 0 && H5Oexists_by_name(file, part, H5P_DEFAULT) > 0;
}

bool tr_h5_is_dataset(hid_t file, const char *path)
{
    H5O_info_t info;
    return tr_h5_has(file, path) &&
           H5Oget_info_by_name2(file, path, &info, H5O_INFO_BASIC, H5P_DEFAULT) >= 0 &&
           info.type == H5O_TYPE_DATASET;
}

/* ---- numbers and records ------------------------------------------------------------------------------------------- */

/* What is stored may be this much smaller than what it stands for: deflate's limit is 1:1032. */
enum { DEFLATE_MAX = 1100 };

typedef struct opened {
    hid_t dataset, space;
    hsize_t dim[TR_H5_AXES];
    bool is_virtual;
} opened;

static void close_dataset(opened *o)
{
    if (o->space >= 0) H5Sclose(o->space);
    if (o->dataset >= 0) H5Dclose(o->dataset);
}

static tr_status open_dataset(opened *o, hid_t file, const char *name, const char *path, int n_axes,
                              tr_err *err)
{
    *o = (opened){.dataset = -1, .space = -1};
    if (!tr_h5_is_dataset(file, path))
        return tr_fail(err, TR_E_INPUT, "%s: %s: not a dataset", name, path);
    o->dataset = H5Dopen2(file, path, H5P_DEFAULT);
    o->space = o->dataset < 0 ? -1 : H5Dget_space(o->dataset);
    if (o->space < 0) return damaged(err, name, path);
    int axes = H5Sget_simple_extent_ndims(o->space);
    if (axes != n_axes || axes > TR_H5_AXES)
        return tr_fail(err, TR_E_INPUT, "%s: %s: %d axes, %d are wanted", name, path, axes, n_axes);
    if (H5Sget_simple_extent_dims(o->space, o->dim, NULL) < 0) return damaged(err, name, path);
    hid_t create = H5Dget_create_plist(o->dataset);
    o->is_virtual = create >= 0 && H5Pget_layout(create) == H5D_VIRTUAL;
    if (create >= 0) H5Pclose(create);
    return TR_OK;
}

/* Elements in all; refuses what cannot be true or would not fit. */
static tr_status count_elements(size_t *n, const opened *o, int from, int n_axes, size_t bytes,
                                const char *name, const char *path, tr_err *err)
{
    uint64_t all = 1;
    bool fits = true;
    for (int i = from; i < n_axes; i++)
        fits = fits && !__builtin_mul_overflow(all, (uint64_t)o->dim[i], &all);
    uint64_t size = 0;
    if (!fits || __builtin_mul_overflow(all, (uint64_t)bytes, &size) || size > TR_H5_BYTES_MAX)
        return tr_fail(err, TR_E_INPUT, "%s: %s: larger than this program reads (%ju MiB)", name,
                       path, (uintmax_t)(TR_H5_BYTES_MAX >> 20));
    uint64_t stored = H5Dget_storage_size(o->dataset);
    if (!o->is_virtual && size > (1u << 20) && size / DEFLATE_MAX > stored)
        return tr_fail(err, TR_E_INPUT,
                       "%s: %s: says it has %ju elements, and %ju bytes are stored", name, path,
                       (uintmax_t)all, (uintmax_t)stored);
    *n = (size_t)all;
    return TR_OK;
}

static hid_t select_one(const opened *o, int n_axes, uint64_t index)
{
    hsize_t start[TR_H5_AXES] = {index}, count[TR_H5_AXES] = {1};
    for (int i = 1; i < n_axes; i++)
        count[i] = o->dim[i];
    if (H5Sselect_hyperslab(o->space, H5S_SELECT_SET, start, NULL, count, NULL) < 0) return -1;
    return n_axes > 1 ? H5Screate_simple(n_axes - 1, o->dim + 1, NULL) : H5Screate(H5S_SCALAR);
}

tr_status tr_h5_read(tr_h5_data *out, hid_t file, const char *name, const char *path, hid_t type,
                     int n_axes, tr_h5_part part, tr_err *err)
{
    const size_t bytes = H5Tget_size(type);
    const int from = part.one ? 1 : 0;
    hid_t memory = H5S_ALL;
    opened o;

    *out = (tr_h5_data){.n_axes = n_axes - from};
    tr_status st = open_dataset(&o, file, name, path, n_axes, err);
    if (st == TR_OK) st = count_elements(&out->n, &o, from, n_axes, bytes, name, path, err);
    if (st != TR_OK) goto done;
    if (part.one && part.index >= o.dim[0]) {
        st = tr_fail(err, TR_E_INPUT, "%s: %s: row %ju of %ju", name, path, (uintmax_t)part.index,
                     (uintmax_t)o.dim[0]);
        goto done;
    }
    for (int i = from; i < n_axes; i++)
        out->dim[i - from] = o.dim[i];
    out->at = tr_calloc(out->n, bytes);
    if (!out->at) {
        st = tr_fail(err, TR_E_MEMORY, "%s: %s: out of memory", name, path);
        goto done;
    }
    if (out->n == 0) goto done;
    H5Eclear2(H5E_DEFAULT);
    if (part.one) memory = select_one(&o, n_axes, part.index);
    if (memory < 0 ||
        H5Dread(o.dataset, type, memory, part.one ? o.space : H5S_ALL, H5P_DEFAULT, out->at) < 0)
        st = damaged(err, name, path);
done:
    if (memory > 0 && memory != H5S_ALL) H5Sclose(memory);
    close_dataset(&o);
    if (st != TR_OK) {
        free(out->at);
        *out = (tr_h5_data){0};
    }
    return st;
}

/* ---- variable lengths ---------------------------------------------------------------------------------------------- */

static char *copy_text(const char *text)
{
    char *copy = strndup(text ? text : "", TEXT_MAX);
    if (copy) tr_h5_clean(copy);
    return copy;
}

tr_status tr_h5_read_texts(char ***texts, size_t *n, hid_t file, const char *name, const char *path,
                           int n_axes, tr_err *err)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    char **raw = NULL;
    opened o;

    *texts = NULL;
    *n = 0;
    tr_status st = open_dataset(&o, file, name, path, n_axes, err);
    if (st == TR_OK) st = count_elements(n, &o, 0, n_axes, sizeof *raw, name, path, err);
    if (st != TR_OK) goto done;
    if (type < 0 || H5Tset_size(type, H5T_VARIABLE) < 0 || H5Tset_cset(type, H5T_CSET_UTF8) < 0) {
        st = damaged(err, name, path);
        goto done;
    }
    raw = tr_calloc(*n, sizeof *raw);
    *texts = tr_calloc(*n, sizeof **texts);
    if (!raw || !*texts) {
        st = tr_fail(err, TR_E_MEMORY, "%s: %s: out of memory", name, path);
        goto done;
    }
    H5Eclear2(H5E_DEFAULT);
    if (*n > 0 && H5Dread(o.dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, raw) < 0) {
        st = damaged(err, name, path);
        goto done;
    }
    for (size_t i = 0; i < *n && st == TR_OK; i++)
        if (!((*texts)[i] = copy_text(raw[i])))
            st = tr_fail(err, TR_E_MEMORY, "%s: %s: out of memory", name, path);
    if (*n > 0) H5Dvlen_reclaim(type, o.space, H5P_DEFAULT, raw);
done:
    free(raw);
    if (type >= 0) H5Tclose(type);
    close_dataset(&o);
    if (st != TR_OK) {
        tr_h5_texts_free(*texts, *n);
        *texts = NULL;
        *n = 0;
    }
    return st;
}

void tr_h5_texts_free(char **texts, size_t n)
{
    for (size_t i = 0; texts && i < n; i++)
        free(texts[i]);
    free(texts);
}

tr_status tr_h5_read_lists(tr_h5_list **list, size_t *n, hid_t file, const char *name,
                           const char *path, tr_err *err)
{
    hid_t type = H5Tvlen_create(H5T_NATIVE_INT32);
    hvl_t *raw = NULL;
    opened o;

    *list = NULL;
    *n = 0;
    tr_status st = open_dataset(&o, file, name, path, 1, err);
    if (st == TR_OK) st = count_elements(n, &o, 0, 1, sizeof *raw, name, path, err);
    if (st != TR_OK) goto done;
    raw = tr_calloc(*n, sizeof *raw);
    *list = tr_calloc(*n, sizeof **list);
    if (type < 0 || !raw || !*list) {
        st = tr_fail(err, TR_E_MEMORY, "%s: %s: out of memory", name, path);
        goto done;
    }
    H5Eclear2(H5E_DEFAULT);
    if (*n > 0 && H5Dread(o.dataset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, raw) < 0) {
        st = damaged(err, name, path);
        goto done;
    }
    for (size_t i = 0; i < *n && st == TR_OK; i++) {
        (*list)[i].n = raw[i].len;
        (*list)[i].at = tr_calloc(raw[i].len, sizeof *(*list)[i].at);
        if (!(*list)[i].at)
            st = tr_fail(err, TR_E_MEMORY, "%s: %s: out of memory", name, path);
        else if (raw[i].len > 0)
            memcpy((*list)[i].at, raw[i].p, raw[i].len * sizeof *(*list)[i].at);
    }
    if (*n > 0) H5Dvlen_reclaim(type, o.space, H5P_DEFAULT, raw);
done:
    free(raw);
    if (type >= 0) H5Tclose(type);
    close_dataset(&o);
    if (st != TR_OK) {
        tr_h5_lists_free(*list, *n);
        *list = NULL;
        *n = 0;
    }
    return st;
}

void tr_h5_lists_free(tr_h5_list *list, size_t n)
{
    for (size_t i = 0; list && i < n; i++)
        free(list[i].at);
    free(list);
}

/* ---- attributes ---------------------------------------------------------------------------------------------------- */

static char *attribute_string(hid_t a, hid_t type)
{
    char *text = NULL;
    if (H5Tis_variable_str(type) > 0) {
        hid_t memory = H5Tcopy(H5T_C_S1), space = H5Aget_space(a);
        char *raw = NULL;
        if (memory >= 0 && space >= 0 && H5Tset_size(memory, H5T_VARIABLE) >= 0 &&
            H5Tset_cset(memory, H5Tget_cset(type)) >= 0 && H5Aread(a, memory, &raw) >= 0) {
            text = copy_text(raw);
            H5Dvlen_reclaim(memory, space, H5P_DEFAULT, &raw);
        }
        if (space >= 0) H5Sclose(space);
        if (memory >= 0) H5Tclose(memory);
        return text;
    }
    const size_t n = H5Tget_size(type);
    if (n == 0 || n > TEXT_MAX || H5Aget_storage_size(a) != n || !(text = tr_calloc(n + 1, 1)))
        return NULL;
    if (H5Aread(a, type, text) < 0) {
        free(text);
        return NULL;
    }
    tr_h5_clean(text);
    return text;
}

static char *attribute_number(hid_t a, H5T_class_t class)
{
    char text[64] = "";
    if (class == H5T_FLOAT) {
        double v = NAN;
        if (H5Aread(a, H5T_NATIVE_DOUBLE, &v) >= 0) snprintf(text, sizeof text, "%.17g", v);
    } else {
        int64_t v = 0;
        if (H5Aread(a, H5T_NATIVE_INT64, &v) >= 0) snprintf(text, sizeof text, "%jd", (intmax_t)v);
    }
    return *text ? strdup(text) : NULL;
}

static char *attribute_text(hid_t a, bool *is_number)
{
    hid_t type = H5Aget_type(a), space = H5Aget_space(a);
    char *text = NULL;
    if (type >= 0 && space >= 0 && H5Sget_simple_extent_npoints(space) == 1) {
        H5T_class_t class = H5Tget_class(type);
        *is_number = class == H5T_INTEGER;
        if (class == H5T_STRING)
            text = attribute_string(a, type);
        else if (class == H5T_INTEGER || class == H5T_FLOAT)
            text = attribute_number(a, class);
    }
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    return text;
}

static bool has_object(hid_t file, const char *object)
{
    return strcmp(object, "/") == 0 || tr_h5_has(file, object);
}

char *tr_h5_attribute(hid_t file, const char *object, const char *attribute)
{
    if (!has_object(file, object) || H5Aexists_by_name(file, object, attribute, H5P_DEFAULT) <= 0)
        return NULL;
    hid_t a = H5Aopen_by_name(file, object, attribute, H5P_DEFAULT, H5P_DEFAULT);
    bool is_number;
    char *text = a < 0 ? NULL : attribute_text(a, &is_number);
    if (a >= 0) H5Aclose(a);
    return text;
}

typedef struct attribute_walk {
    bool (*see)(void *ctx, const char *name, const char *value, bool is_number);
    void *ctx;
} attribute_walk;

static herr_t next_attribute(hid_t object, const char *name, const H5A_info_t *info, void *ctx)
{
    attribute_walk *w = ctx;
    bool go_on = true, is_number = false;
    (void)info;
    hid_t a = H5Aopen(object, name, H5P_DEFAULT);
    char *text = a < 0 ? NULL : attribute_text(a, &is_number), *clean = copy_text(name);
    if (text && clean) go_on = w->see(w->ctx, clean, text, is_number);
    free(clean);
    free(text);
    if (a >= 0) H5Aclose(a);
    return go_on ? 0 : 1;
}

void tr_h5_attributes(hid_t file, const char *object,
                      bool (*see)(void *ctx, const char *name, const char *value, bool is_number),
                      void *ctx)
{
    attribute_walk w = {see, ctx};
    hsize_t at = 0;
    if (!has_object(file, object)) return;
    hid_t o = H5Oopen(file, object, H5P_DEFAULT);
    if (o < 0) return;
    H5Aiterate2(o, H5_INDEX_NAME, H5_ITER_INC, &at, next_attribute, &w);
    H5Oclose(o);
}

/* ---- names --------------------------------------------------------------------------------------------------------- */

typedef struct name_walk {
    char **name, prefix[NAME_BYTES];
    size_t n;
    int depth;
    bool no_memory;
} name_walk;

static herr_t next_link(hid_t group, const char *link, const H5L_info_t *info, void *ctx)
{
    name_walk *w = ctx;
    H5O_info_t object;
    const size_t old = strlen(w->prefix);
    hsize_t at = 0;

    (void)info;
    if (w->n == NAMES_MAX || old + strlen(link) + 2 > sizeof w->prefix) return 0;
    if (H5Oexists_by_name(group, link, H5P_DEFAULT) <= 0 ||
        H5Oget_info_by_name2(group, link, &object, H5O_INFO_BASIC, H5P_DEFAULT) < 0)
        return 0;
    snprintf(w->prefix + old, sizeof w->prefix - old, "%s%s", old ? "/" : "", link);
    if (object.type == H5O_TYPE_DATASET) {
        w->name[w->n] = strdup(w->prefix);
        w->no_memory = !w->name[w->n];
        if (!w->no_memory) w->n++;
    } else if (object.type == H5O_TYPE_GROUP && w->depth < NAMES_DEPTH) {
        w->depth++; /* a folder within itself ends here */
        hid_t below = H5Gopen2(group, link, H5P_DEFAULT);
        if (below >= 0) {
            H5Literate(below, H5_INDEX_NAME, H5_ITER_INC, &at, next_link, w);
            H5Gclose(below);
        }
        w->depth--;
    }
    w->prefix[old] = 0;
    return w->no_memory ? -1 : 0;
}

tr_status tr_h5_names(char ***names, size_t *n, hid_t file, const char *group, tr_err *err)
{
    name_walk w = {.name = tr_calloc(NAMES_MAX, sizeof *w.name)};
    hsize_t at = 0;

    *names = NULL;
    *n = 0;
    if (!w.name) return tr_fail(err, TR_E_MEMORY, "out of memory");
    hid_t g = has_object(file, group) ? H5Gopen2(file, group, H5P_DEFAULT) : -1;
    if (g >= 0) {
        H5Literate(g, H5_INDEX_NAME, H5_ITER_INC, &at, next_link, &w);
        H5Gclose(g);
    }
    if (w.no_memory) {
        tr_h5_texts_free(w.name, w.n);
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    *names = w.name;
    *n = w.n;
    return TR_OK;
}

/* ---- virtual datasets ---------------------------------------------------------------------------------------------- */

/* HDF5 has %% for a % in names of sources (join.c, plain). */
static void undouble(char *name)
{
    char *to = name;

    for (const char *from = name; *from; *to++ = *from++)
        if (from[0] == '%' && from[1] == '%') from++;
    *to = '\0';
}

/* One row of the mapping; false: see wants no more. */
static bool see_source(hid_t create, size_t i,
                       bool (*see)(void *ctx, const char *source, uint64_t first, uint64_t n),
                       void *ctx)
{
    hsize_t low[H5S_MAX_RANK], high[H5S_MAX_RANK];
    const ssize_t length = H5Pget_virtual_filename(create, i, NULL, 0);
    bool go_on = true;
    if (length <= 0 || length > 1 << 16) return true;
    char *source = tr_calloc((size_t)length + 1, 1);
    hid_t space = H5Pget_virtual_vspace(create, i);
    if (source && space >= 0 &&
        H5Pget_virtual_filename(create, i, source, (size_t)length + 1) > 0 &&
        H5Sget_select_bounds(space, low, high) >= 0) {
        undouble(source);
        go_on = see(ctx, source, low[0], high[0] - low[0] + 1);
    }
    if (space >= 0) H5Sclose(space);
    free(source);
    return go_on;
}

void tr_h5_sources(hid_t file, const char *path,
                   bool (*see)(void *ctx, const char *source, uint64_t first, uint64_t n),
                   void *ctx)
{
    size_t n = 0;
    hid_t dataset = tr_h5_is_dataset(file, path) ? H5Dopen2(file, path, H5P_DEFAULT) : -1;
    hid_t create = dataset >= 0 ? H5Dget_create_plist(dataset) : -1;
    if (create >= 0 && H5Pget_layout(create) == H5D_VIRTUAL &&
        H5Pget_virtual_count(create, &n) >= 0)
        for (size_t i = 0; i < n && see_source(create, i, see, ctx); i++)
            ;
    if (create >= 0) H5Pclose(create);
    if (dataset >= 0) H5Dclose(dataset);
}
