#include <config.h>

#include "profile/join.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/size.h"
#include "profile/file.h"
#include "profile/h5_priv.h"
#include "profile/rank_list.h"

enum { PATH_BYTES = 256, SETS_MAX = 1 << 20, NAME_BYTES = 24 };

typedef struct dims {
    hsize_t n[TR_DATASET_AXES]; /* all 0: this file has no such dataset */
    bool here;
} dims;

typedef struct set { /* one dataset of the joined file */
    char path[PATH_BYTES];
    const tr_dataset *d;
    dims *of; /* [n_sources] */
} set;

typedef struct source { /* a rank's file, or a node's: its rows are ranks */
    char name[NAME_BYTES];
    int n;
    int *rank;     /* [n] */
    bool complete; /* it says that the run came to its end */
} source;

typedef struct joiner {
    tr_prof_file *out;
    char *base;         /* folder that FILE is in, with '/' */
    const char *folder; /* relative to it */
    int world;
    source
        *source; /* [n_sources], the first has the lowest rank: what belongs to the run is in it */
    int n_sources;
    int *source_of, *row_of; /* [world] -1: the rank is missing */
    set *set;
    int n, room;
    int at;      /* source that is being looked at */
    bool failed; /* out of memory in a visit */
} joiner;

/* ---- what there is ---------------------------------------------------------------------------------------------------- */

static void source_name(char *text, size_t n, const joiner *j, const char *name, bool whole)
{
    snprintf(text, n, "%s%s/%s", whole ? j->base : "", j->folder, name);
}

static hid_t open_named(const joiner *j, const char *name)
{
    char path[4096];
    source_name(path, sizeof path, j, name, true);
    if (access(path, F_OK) != 0) return -1;
    const hid_t id = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    H5Eclear2(H5E_DEFAULT);
    return id;
}

static hid_t open_source(const joiner *j, int i)
{
    return open_named(j, j->source[i].name);
}

static bool says_complete(hid_t file)
{
    int64_t value = 0;
    const hid_t a = H5Aopen(file, "complete", H5P_DEFAULT);
    if (a < 0 || H5Aread(a, H5T_NATIVE_INT64, &value) < 0) value = 0;
    if (a >= 0) H5Aclose(a);
    H5Eclear2(H5E_DEFAULT);
    return value == 1;
}

/* Ranks of a node's file: rows of /grid/ranks. False: it has none that can be. */
static bool read_ranks(hid_t file, int world, int **rank, int *n)
{
    const tr_dataset *d = &tr_datasets[TR_D_RANKS];
    const hid_t id = H5Dopen2(file, d->path, H5P_DEFAULT), type = tr_schema_memory_type(d),
                space = id >= 0 ? H5Dget_space(id) : -1;
    hsize_t rows = 0;
    tr_prof_rank *place = NULL;
    bool ok = space >= 0 && type >= 0 && H5Sget_simple_extent_ndims(space) == 1 &&
              H5Sget_simple_extent_dims(space, &rows, NULL) == 1 && rows > 0 &&
              rows <= (hsize_t)world;

    *rank = ok ? tr_calloc((size_t)rows, sizeof **rank) : NULL;
    place = ok ? tr_calloc((size_t)rows, sizeof *place) : NULL;
    ok = *rank && place && H5Dread(id, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, place) >= 0;
    for (hsize_t i = 0; ok && i < rows; i++) {
        ok = place[i].rank >= 0 && place[i].rank < world;
        (*rank)[i] = place[i].rank;
    }
    *n = (int)rows;
    if (!ok) {
        free(*rank);
        *rank = NULL;
    }
    free(place);
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    if (id >= 0) H5Dclose(id);
    H5Eclear2(H5E_DEFAULT);
    return ok;
}

/* rank%05d.h5 is that rank's; node%05d.h5 is of a node, named after its lowest rank. */
static tr_status find_source(joiner *j, int rank, tr_err *err)
{
    source *s = &j->source[j->n_sources];

    *s = (source){.n = 1};
    snprintf(s->name, sizeof s->name, "rank%05d.h5", rank);
    hid_t file = open_named(j, s->name);
    if (file >= 0) {
        s->rank = tr_calloc(1, sizeof *s->rank);
        if (s->rank) *s->rank = rank;
    } else {
        snprintf(s->name, sizeof s->name, "node%05d.h5", rank);
        file = open_named(j, s->name);
        if (file < 0) return TR_OK;
        if (!read_ranks(file, j->world, &s->rank, &s->n)) {
            H5Fclose(file);
            return TR_OK; /* its ranks are missing */
        }
    }
    s->complete = says_complete(file);
    H5Fclose(file);
    if (!s->rank) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < s->n; i++) {
        if (j->source_of[s->rank[i]] >= 0) continue; /* two files have it: the first counts */
        j->source_of[s->rank[i]] = j->n_sources;
        j->row_of[s->rank[i]] = i;
    }
    j->n_sources++;
    return TR_OK;
}

static tr_status find_sources(joiner *j, tr_err *err)
{
    tr_status st = TR_OK;
    const size_t world = (size_t)j->world;

    j->source = tr_calloc(world, sizeof *j->source);
    j->source_of = tr_calloc(world, sizeof *j->source_of);
    j->row_of = tr_calloc(world, sizeof *j->row_of);
    if (!j->source || !j->source_of || !j->row_of)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int r = 0; r < j->world; r++)
        j->source_of[r] = j->row_of[r] = -1;
    for (int r = 0; r < j->world && st == TR_OK; r++)
        if (j->source_of[r] < 0) st = find_source(j, r, err);
    if (st == TR_OK && j->n_sources == 0)
        st = tr_fail(err, TR_E_IO, "%s%s: no rank's file can be read", j->base, j->folder);
    return st;
}

static set *find_or_add(joiner *j, const char *path, const tr_dataset *d)
{
    for (int i = 0; i < j->n; i++)
        if (strcmp(j->set[i].path, path) == 0) return &j->set[i];
    if (j->n == SETS_MAX) return NULL;
    if (j->n == j->room) {
        const int room = j->room ? 2 * j->room : 128;
        set *more = realloc(j->set, (size_t)room * sizeof *more);
        if (!more) return NULL;
        j->set = more;
        j->room = room;
    }
    set *s = &j->set[j->n];
    *s = (set){.d = d};
    snprintf(s->path, sizeof s->path, "%s", path);
    s->of = tr_calloc((size_t)j->n_sources, sizeof *s->of);
    if (!s->of) return NULL;
    j->n++;
    return s;
}

/* A dataset of one file: noted with its lengths, if it is of the schema. */
static herr_t note(hid_t object, const char *name, const H5O_info_t *info, void *ctx)
{
    joiner *j = ctx;
    char path[PATH_BYTES];
    hsize_t n[H5S_MAX_RANK];

    if (info->type != H5O_TYPE_DATASET || strlen(name) > sizeof path - 2) return 0;
    snprintf(path, sizeof path, "/%s", name);
    const tr_dataset *d = tr_dataset_find(path, NULL);
    if (!d) return 0;
    const hid_t id = H5Dopen2(object, name, H5P_DEFAULT);
    const hid_t space = id >= 0 ? H5Dget_space(id) : -1;
    if (space >= 0 && H5Sget_simple_extent_ndims(space) == tr_dataset_axes(d)) {
        set *s = find_or_add(j, path, d);
        j->failed = j->failed || !s;
        H5Sget_simple_extent_dims(space, n, NULL);
        for (int i = 0; s && i < tr_dataset_axes(d); i++)
            s->of[j->at].n[i] = n[i];
        if (s) s->of[j->at].here = true;
    }
    if (space >= 0) H5Sclose(space);
    if (id >= 0) H5Dclose(id);
    return j->failed ? -1 : 0;
}

static tr_status look(joiner *j, tr_err *err)
{
    tr_status st = find_sources(j, err);

    for (j->at = 0; j->at < j->n_sources && st == TR_OK; j->at++) {
        const hid_t id = open_source(j, j->at);
        if (id < 0 || H5Ovisit(id, H5_INDEX_NAME, H5_ITER_INC, note, j) < 0)
            st = j->failed ? tr_fail(err, TR_E_MEMORY, "out of memory")
                           : tr_h5_failed(j->source[j->at].name, err);
        if (id >= 0) H5Fclose(id);
    }
    return st;
}

/* ---- datasets without a copy -------------------------------------------------------------------------------------------- */

/* HDF5 takes %b in the names of sources for a block's number and %% for %. */
static const char *plain(char *text, size_t n, const char *name)
{
    size_t at = 0;

    for (; *name && at + 2 < n; name++) {
        if (*name == '%') text[at++] = '%';
        text[at++] = *name;
    }
    text[at] = '\0';
    return text;
}

/* One rank's part: its row of a file's rows becomes row `rank` of the whole. rank -1: a file's whole, where there is no rank
 * axis. */
static tr_status map_part(const joiner *j, const set *s, hid_t list, hid_t whole, int i_source,
                          int rank, tr_err *err)
{
    char file[4096], file_plain[2 * sizeof file], path_plain[2 * PATH_BYTES];
    const int axes = tr_dataset_axes(s->d);
    const dims *of = &s->of[i_source];
    hsize_t from[TR_DATASET_AXES] = {0}, to[TR_DATASET_AXES] = {0}, count[TR_DATASET_AXES];
    tr_status st = TR_OK;
    hid_t part = -1;

    for (int i = 0; i < axes; i++) {
        if (!of->n[i]) return TR_OK;
        count[i] = of->n[i];
    }
    if (rank >= 0) {
        from[0] = (hsize_t)j->row_of[rank];
        to[0] = (hsize_t)rank;
        count[0] = 1;
        if (from[0] >= of->n[0]) return TR_OK;
    }
    source_name(file, sizeof file, j, j->source[i_source].name, false);
    TR_H5(part = H5Screate_simple(axes, of->n, NULL));
    TR_H5(H5Sselect_hyperslab(part, H5S_SELECT_SET, from, NULL, count, NULL));
    TR_H5(H5Sselect_hyperslab(whole, H5S_SELECT_SET, to, NULL, count, NULL));
    TR_H5(H5Pset_virtual(list, whole, plain(file_plain, sizeof file_plain, file),
                         plain(path_plain, sizeof path_plain, s->path), part));

done:
    if (part >= 0) H5Sclose(part);
    return st;
}

static tr_status map_all(const joiner *j, const set *s, hid_t list, hid_t whole, tr_err *err)
{
    tr_status st = TR_OK;

    if (s->d->axis[0] != TR_AXIS_RANK) return map_part(j, s, list, whole, 0, -1, err);
    for (int r = 0; r < j->world && st == TR_OK; r++)
        if (j->source_of[r] >= 0) st = map_part(j, s, list, whole, j->source_of[r], r, err);
    return st;
}

static tr_status make_virtual(const joiner *j, const set *s, tr_err *err)
{
    const int axes = tr_dataset_axes(s->d);
    const double absent = __builtin_nan("");
    hsize_t all[TR_DATASET_AXES] = {0};
    tr_status st = TR_OK;
    hid_t list = -1, links = -1, whole = -1, type = -1, id = -1;

    for (int k = 0; k < j->n_sources; k++)
        for (int i = 0; i < axes; i++)
            if (s->of[k].n[i] > all[i]) all[i] = s->of[k].n[i];
    if (s->d->axis[0] == TR_AXIS_RANK) all[0] = (hsize_t)j->world;
    TR_H5(type = tr_schema_file_type(s->d));
    TR_H5(whole = H5Screate_simple(axes, all, NULL));
    TR_H5(list = H5Pcreate(H5P_DATASET_CREATE));
    TR_H5(links = tr_h5_link_list());
    st = map_all(j, s, list, whole, err);
    if (st != TR_OK) goto done;
    if (!s->d->record && s->d->kind == TR_FIELD_F8)
        TR_H5(H5Pset_fill_value(list, H5T_NATIVE_DOUBLE, &absent));
    TR_H5(H5Sselect_all(whole));
    TR_H5(id = H5Dcreate2(tr_prof_file_id(j->out), s->path, type, whole, links, list, H5P_DEFAULT));
    st = tr_h5_dress(tr_prof_file_id(j->out), id, s->d, err);

done:
    if (id >= 0) H5Dclose(id);
    if (links >= 0) H5Pclose(links);
    if (list >= 0) H5Pclose(list);
    if (whole >= 0) H5Sclose(whole);
    if (type >= 0) H5Tclose(type);
    return st == TR_OK ? TR_OK : tr_within(err, "%s", s->path);
}

/* ---- datasets of the run ----------------------------------------------------------------------------------------------- */

static size_t element_bytes(const tr_dataset *d, hid_t type)
{
    return d->record ? d->record->bytes : H5Tget_size(type);
}

/* A whole dataset of one file as in memory; the caller frees, after reclaim() where it has texts or lists. */
static tr_status read_whole(const joiner *j, const set *s, int i_source, void **out, size_t *n,
                            tr_err *err)
{
    tr_status st = TR_OK;
    hid_t file = open_source(j, i_source), id = -1, type = -1;
    size_t bytes;

    *out = NULL;
    *n = 1;
    for (int i = 0; i < tr_dataset_axes(s->d); i++)
        if (!tr_mul(n, *n, s->of[i_source].n[i])) *n = SIZE_MAX;
    TR_H5(file);
    TR_H5(id = H5Dopen2(file, s->path, H5P_DEFAULT));
    TR_H5(type = tr_schema_memory_type(s->d));
    if (!tr_mul(&bytes, *n, element_bytes(s->d, type)) ||
        !(*out = tr_calloc(bytes ? bytes : 1, 1))) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    if (*n) TR_H5(H5Dread(id, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, *out));

done:
    if (type >= 0) H5Tclose(type);
    if (id >= 0) H5Dclose(id);
    if (file >= 0) H5Fclose(file);
    return st == TR_OK ? TR_OK : tr_within(err, "%s", j->source[i_source].name);
}

static void reclaim(const tr_dataset *d, void *data, size_t n)
{
    const hsize_t all = n;

    if (!data || !n || d->record || (d->kind != TR_FIELD_TEXT && d->kind != TR_FIELD_LIST)) return;
    const hid_t type = tr_schema_memory_type(d), space = H5Screate_simple(1, &all, NULL);
    if (type >= 0 && space >= 0) H5Dvlen_reclaim(type, space, H5P_DEFAULT, data);
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
}

static tr_status copy_first(const joiner *j, const set *s, tr_err *err)
{
    void *data = NULL;
    size_t n = 0;
    uint64_t lengths[TR_DATASET_AXES];

    for (int i = 0; i < TR_DATASET_AXES; i++)
        lengths[i] = s->of[0].n[i];
    if (!s->of[0].here) return TR_OK;
    tr_status st = read_whole(j, s, 0, &data, &n, err);
    if (st == TR_OK) st = tr_prof_file_put(j->out, s->d, s->path, lengths, data, err);
    reclaim(s->d, data, n);
    free(data);
    return st;
}

static tr_status append_all(const joiner *j, const set *s, tr_err *err)
{
    tr_status st = TR_OK;

    for (int k = 0; k < j->n_sources && st == TR_OK; k++) {
        void *data = NULL;
        size_t n = 0;
        if (!s->of[k].here) continue;
        st = read_whole(j, s, k, &data, &n, err);
        if (st == TR_OK) st = tr_prof_file_append(j->out, s->d, s->path, n, data, err);
        reclaim(s->d, data, n);
        free(data);
    }
    return st;
}

static tr_status sum_all(const joiner *j, const set *s, tr_err *err)
{
    tr_status st = TR_OK;
    uint64_t *sum = NULL, lengths[TR_DATASET_AXES];
    size_t n_sum = 0;

    for (int i = 0; i < TR_DATASET_AXES; i++)
        lengths[i] = 0;
    for (int k = 0; k < j->n_sources && st == TR_OK; k++) {
        void *data = NULL;
        size_t n = 0;
        if (!s->of[k].here) continue;
        for (int i = 0; !sum && i < TR_DATASET_AXES; i++)
            lengths[i] = s->of[k].n[i];
        st = read_whole(j, s, k, &data, &n, err);
        if (st == TR_OK && sum && n != n_sum)
            st = tr_fail(err, TR_E_IO, "%s: other lengths in %s", s->path, j->source[k].name);
        const uint64_t *add = data;
        for (size_t i = 0; sum && st == TR_OK && i < n; i++)
            sum[i] += add[i];
        if (sum) {
            free(data);
            continue;
        }
        sum = data;
        n_sum = n;
    }
    if (st == TR_OK && sum) st = tr_prof_file_put(j->out, s->d, s->path, lengths, sum, err);
    free(sum);
    return st;
}

/* ---- balance ------------------------------------------------------------------------------------------------------------- */

/* [windows, layers] mean over the largest of the ranks of a layer's stage: who has rows of a layer says which stage that is. */
static void balance(float *out, const uint64_t *const *tokens, const tr_prof_rank *place, int world,
                    size_t windows, size_t layers)
{
    for (size_t i = 0; i < windows * layers; i++) {
        uint64_t most = 0, sum = 0;
        int pp = -1, n = 0;
        for (int r = 0; r < world && pp < 0; r++)
            for (size_t w = 0; tokens[r] && w < windows; w++)
                if (tokens[r][w * layers + i % layers]) pp = place[r].pp;
        for (int r = 0; r < world; r++) {
            if (!tokens[r] || place[r].pp != pp) continue;
            sum += tokens[r][i];
            if (tokens[r][i] > most) most = tokens[r][i];
            n++;
        }
        out[i] = most ? (float)((double)sum / n / (double)most) : __builtin_nanf("");
    }
}

static const set *find(const joiner *j, tr_dataset_id id)
{
    for (int i = 0; i < j->n; i++)
        if (j->set[i].d == &tr_datasets[id]) return &j->set[i];
    return NULL;
}

/* Windows and places of the ranks of one file; tokens: into *all, which keeps it. Nothing where there are other windows than
 * the first file has: every rank of a run has run the same steps; one that has not, was killed. */
static tr_status take_windows(const joiner *j, const set *s, const set *ranks, int k,
                              const uint64_t **tokens, tr_prof_rank *place, void **all, tr_err *err)
{
    const size_t windows = (size_t)s->of[0].n[1], layers = (size_t)s->of[0].n[2];
    void *at = NULL;
    size_t n;

    if (!s->of[k].here || !ranks->of[k].here || s->of[k].n[1] != windows || s->of[k].n[2] != layers)
        return TR_OK;
    tr_status st = read_whole(j, s, k, all, &n, err);
    if (st == TR_OK) st = read_whole(j, ranks, k, &at, &n, err);
    for (int i = 0; i < j->source[k].n && st == TR_OK; i++) {
        const int r = j->source[k].rank[i];
        if (j->source_of[r] != k || (size_t)i >= n || (hsize_t)i >= s->of[k].n[0]) continue;
        place[r] = ((const tr_prof_rank *)at)[i];
        tokens[r] = (const uint64_t *)*all + (size_t)i * windows * layers;
    }
    free(at);
    return st;
}

static tr_status write_balance(const joiner *j, tr_err *err)
{
    const set *s = find(j, TR_D_WINDOW_TOKENS), *ranks = find(j, TR_D_RANKS);
    tr_status st = TR_OK;

    if (!s || !ranks || !s->of[0].here) return TR_OK;
    const size_t windows = (size_t)s->of[0].n[1], layers = (size_t)s->of[0].n[2];
    const uint64_t **tokens = tr_calloc((size_t)j->world, sizeof *tokens);
    tr_prof_rank *place = tr_calloc((size_t)j->world, sizeof *place);
    void **all = tr_calloc((size_t)j->n_sources, sizeof *all);
    float *out = tr_calloc(windows * layers + 1, sizeof *out); /* a dataset of the file has more */
    if (!tokens || !place || !all || !out) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    for (int k = 0; k < j->n_sources && st == TR_OK; k++)
        st = take_windows(j, s, ranks, k, tokens, place, &all[k], err);
    if (st != TR_OK) goto done;
    balance(out, tokens, place, j->world, windows, layers);
    st = tr_prof_file_put(j->out, &tr_datasets[TR_D_BALANCE], NULL,
                          (const uint64_t[]){windows, layers}, out, err);

done:
    for (int k = 0; all && k < j->n_sources; k++)
        free(all[k]);
    free(all);
    free(tokens);
    free(place);
    free(out);
    return st;
}

/* ---- attributes ------------------------------------------------------------------------------------------------------------ */

static bool is_scale_s_own(const char *name)
{
    static const char *const own[] = {
        "CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS", "field_units"};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (strcmp(name, own[i]) == 0) return true;
    return false;
}

/* One attribute to another object: a text or a number, as we write them. */
static herr_t copy_attribute(hid_t from, const char *name, const H5A_info_t *info, void *ctx)
{
    const hid_t to = *(const hid_t *)ctx;
    tr_status st = TR_OK;
    tr_err *err = NULL;
    hid_t attribute = -1, type = -1;

    (void)info;
    if (is_scale_s_own(name)) return 0;
    TR_H5(attribute = H5Aopen(from, name, H5P_DEFAULT));
    TR_H5(type = H5Aget_type(attribute));
    if (H5Tget_class(type) == H5T_STRING && H5Tis_variable_str(type) > 0) {
        char *text = NULL;
        TR_H5(H5Aread(attribute, type, &text));
        st = tr_h5_text(to, name, text ? text : "", err);
        H5free_memory(text);
    } else if (H5Tget_class(type) == H5T_INTEGER) {
        int64_t number = 0;
        TR_H5(H5Aread(attribute, H5T_NATIVE_INT64, &number));
        st = tr_h5_number(to, name, number, err);
    }

done:
    if (type >= 0) H5Tclose(type);
    if (attribute >= 0) H5Aclose(attribute);
    return st == TR_OK ? 0 : -1;
}

static tr_status copy_attributes(const joiner *j, hid_t file, const char *path, tr_err *err)
{
    tr_status st = TR_OK;
    hid_t from = -1, to = -1;

    if (strcmp(path, "/") != 0 &&
        (H5Oexists_by_name(file, path, H5P_DEFAULT) <= 0 ||
         H5Oexists_by_name(tr_prof_file_id(j->out), path, H5P_DEFAULT) <= 0)) {
        H5Eclear2(H5E_DEFAULT);
        return TR_OK;
    }
    TR_H5(from = H5Oopen(file, path, H5P_DEFAULT));
    TR_H5(to = H5Oopen(tr_prof_file_id(j->out), path, H5P_DEFAULT));
    TR_H5(H5Aiterate2(from, H5_INDEX_NAME, H5_ITER_INC, NULL, copy_attribute, &to));
    /* A counter that is absent on one rank may be there on another. */
    if (H5Aexists(to, "absent") > 0) {
        for (int i = 0; i < j->n; i++)
            for (int k = 0; strcmp(j->set[i].path, path) == 0 && k < j->n_sources; k++)
                if (j->set[i].of[k].n[1] && H5Aexists(to, "absent") > 0)
                    TR_H5(H5Adelete(to, "absent"));
    }

done:
    if (to >= 0) H5Oclose(to);
    if (from >= 0) H5Oclose(from);
    return st == TR_OK ? TR_OK : tr_within(err, "%s", path);
}

static tr_status copy_all_attributes(const joiner *j, tr_err *err)
{
    tr_status st = TR_OK;
    hid_t file = open_source(j, 0);

    TR_H5(file);
    st = tr_prof_file_text(j->out, "/run", "schema", TR_PROFILE_SCHEMA, err); /* makes the group */
    if (st == TR_OK) st = copy_attributes(j, file, "/", err);
    if (st == TR_OK) st = copy_attributes(j, file, "/run", err);
    for (int i = 0; i < j->n && st == TR_OK; i++)
        st = copy_attributes(j, file, j->set[i].path, err);

done:
    if (file >= 0) H5Fclose(file);
    return st;
}

/* ---- all of it --------------------------------------------------------------------------------------------------------------- */

static tr_status make_scales(const joiner *j, tr_err *err)
{
    const set *regions = find(j, TR_D_REGIONS), *experts = find(j, TR_D_EXPERT_TOKENS);
    const uint64_t world = (uint64_t)j->world;

    tr_status st = tr_prof_file_scale(j->out, TR_AXIS_RANK, 0, world, err);
    if (st == TR_OK) st = tr_prof_file_scale(j->out, TR_AXIS_PEER, 0, world, err);
    if (st == TR_OK && regions)
        st = tr_prof_file_scale(j->out, TR_AXIS_REGION, 0, regions->of[0].n[0], err);
    if (st == TR_OK && experts)
        st = tr_prof_file_scale(j->out, TR_AXIS_LAYER, 0, experts->of[0].n[0], err);
    if (st == TR_OK && experts)
        st = tr_prof_file_scale(j->out, TR_AXIS_EXPERT, 0, experts->of[0].n[1], err);
    return st;
}

static tr_status write_set(const joiner *j, const set *s, tr_err *err)
{
    const tr_dataset *d = s->d;

    if (d == &tr_datasets[TR_D_BALANCE]) return TR_OK;
    if (d->axis[0] == TR_AXIS_RANK || d == &tr_datasets[TR_D_REQUESTS])
        return make_virtual(j, s, err);
    if (d->flags & TR_DATASET_SUM) return sum_all(j, s, err);
    if (d == &tr_datasets[TR_D_LOG]) return append_all(j, s, err);
    return copy_first(j, s, err);
}

/* Complete is what every rank says it is, and no rank is missing. */
static tr_status say_missing(const joiner *j, tr_err *err)
{
    char list[TR_RANK_LIST];
    int n_missing = 0;
    bool complete = true;

    for (int r = 0; r < j->world; r++)
        n_missing += j->source_of[r] < 0;
    for (int k = 0; k < j->n_sources; k++)
        complete = complete && j->source[k].complete;
    tr_rank_list(list, sizeof list, j->source_of, j->world);
    tr_status st = tr_prof_file_number(j->out, "/", "ranks_missing", n_missing, err);
    if (st == TR_OK) st = tr_prof_file_text(j->out, "/", "missing", list, err);
    if (st == TR_OK) st = tr_prof_file_number(j->out, "/", "complete", complete && !n_missing, err);
    return st;
}

static tr_status join(joiner *j, tr_err *err)
{
    tr_status st = look(j, err);

    if (st == TR_OK) st = make_scales(j, err);
    for (int i = 0; i < j->n && st == TR_OK; i++)
        st = write_set(j, &j->set[i], err);
    if (st == TR_OK) st = write_balance(j, err);
    if (st == TR_OK) st = copy_all_attributes(j, err);
    if (st == TR_OK) st = say_missing(j, err);
    return st;
}

tr_status tr_profile_join(const char *file, const char *folder, int world, tr_err *err)
{
    const char *slash = strrchr(file, '/');
    joiner j = {.folder = folder, .world = world};
    char *part = NULL;
    tr_status st = TR_OK;

    j.base = strndup(file, slash ? (size_t)(slash + 1 - file) : 0);
    if (!j.base || asprintf(&part, "%s.part", file) < 0) {
        part = NULL;
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    st = tr_prof_file_create(&j.out, part, err);
    if (st == TR_OK) {
        tr_err later;
        st = join(&j, err);
        const tr_status closed = tr_prof_file_close(j.out, st == TR_OK ? err : &later);
        if (st == TR_OK) st = closed;
    }
    if (st == TR_OK && rename(part, file) != 0)
        st = tr_fail(err, TR_E_IO, "%s: %s", file, strerror(errno));
    if (st != TR_OK) remove(part);

done:
    for (int i = 0; i < j.n; i++)
        free(j.set[i].of);
    for (int i = 0; i < j.n_sources; i++)
        free(j.source[i].rank);
    free(j.set);
    free(j.source);
    free(j.source_of);
    free(j.row_of);
    free(j.base);
    free(part);
    return st;
}
