#include <config.h>

#include "profile/join.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/file.h"
#include "profile/h5_priv.h"

enum { PATH_BYTES = 256, SETS_MAX = 4096 };

typedef struct dims {
    hsize_t n[TR_DATASET_AXES]; /* all 0: this rank has no such dataset */
    bool here;
} dims;

typedef struct set { /* one dataset of the joined file */
    char path[PATH_BYTES];
    const tr_dataset *d;
    dims *of; /* [world] */
} set;

typedef struct joiner {
    tr_prof_file *out;
    char *base;                  /* folder that FILE is in, with '/' */
    const char *folder;          /* relative to it */
    int world, n_missing, first; /* first: lowest rank that has a file, -1: none */
    set *set;
    int n, room;
    hid_t source; /* file that is being looked at */
    int rank;
    bool failed; /* out of memory in a visit */
} joiner;

/* ---- what there is ---------------------------------------------------------------------------------------------------- */

static void source_name(char *text, size_t n, const joiner *j, int rank, bool whole)
{
    snprintf(text, n, "%s%s/rank%05d.h5", whole ? j->base : "", j->folder, rank);
}

static hid_t open_source(const joiner *j, int rank)
{
    char path[4096];
    source_name(path, sizeof path, j, rank, true);
    const hid_t id = H5Fopen(path, H5F_ACC_RDONLY, H5P_DEFAULT);
    H5Eclear2(H5E_DEFAULT);
    return id;
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
    s->of = tr_calloc((size_t)j->world, sizeof *s->of);
    if (!s->of) return NULL;
    j->n++;
    return s;
}

/* A dataset of one rank's file: noted with its lengths, if it is of the schema. */
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
            s->of[j->rank].n[i] = n[i];
        if (s) s->of[j->rank].here = true;
    }
    if (space >= 0) H5Sclose(space);
    if (id >= 0) H5Dclose(id);
    return j->failed ? -1 : 0;
}

static tr_status look(joiner *j, tr_err *err)
{
    tr_status st = TR_OK;

    j->first = -1;
    for (j->rank = 0; j->rank < j->world && st == TR_OK; j->rank++) {
        const hid_t id = open_source(j, j->rank);
        if (id < 0) {
            j->n_missing++;
            continue;
        }
        if (j->first < 0) j->first = j->rank;
        if (H5Ovisit(id, H5_INDEX_NAME, H5_ITER_INC, note, j) < 0)
            st = j->failed ? tr_fail(err, TR_E_MEMORY, "out of memory")
                           : tr_h5_failed("H5Ovisit", err);
        H5Fclose(id);
    }
    if (st == TR_OK && j->first < 0)
        st = tr_fail(err, TR_E_IO, "%s%s: no rank's file can be read", j->base, j->folder);
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

/* One rank's part: row `rank` of the whole; or all of it where there is no rank axis. */
static tr_status map_rank(const joiner *j, const set *s, hid_t list, hid_t whole, int rank,
                          tr_err *err)
{
    char file[4096], file_plain[2 * sizeof file], path_plain[2 * PATH_BYTES];
    const int axes = tr_dataset_axes(s->d);
    const bool stacked = s->d->axis[0] == TR_AXIS_RANK;
    hsize_t start[TR_DATASET_AXES] = {0};
    tr_status st = TR_OK;
    hid_t part = -1;

    for (int i = 0; i < axes; i++)
        if (!s->of[rank].n[i]) return TR_OK;
    if (stacked) start[0] = (hsize_t)rank;
    source_name(file, sizeof file, j, rank, false);
    TR_H5(part = H5Screate_simple(axes, s->of[rank].n, NULL));
    TR_H5(H5Sselect_hyperslab(whole, H5S_SELECT_SET, start, NULL, s->of[rank].n, NULL));
    TR_H5(H5Pset_virtual(list, whole, plain(file_plain, sizeof file_plain, file),
                         plain(path_plain, sizeof path_plain, s->path), part));

done:
    if (part >= 0) H5Sclose(part);
    return st;
}

static tr_status make_virtual(const joiner *j, const set *s, tr_err *err)
{
    const int axes = tr_dataset_axes(s->d);
    const bool stacked = s->d->axis[0] == TR_AXIS_RANK;
    const double absent = __builtin_nan("");
    hsize_t all[TR_DATASET_AXES] = {0};
    tr_status st = TR_OK;
    hid_t list = -1, links = -1, whole = -1, type = -1, id = -1;

    for (int r = 0; r < j->world; r++)
        for (int i = 0; i < axes; i++)
            if (s->of[r].n[i] > all[i]) all[i] = s->of[r].n[i];
    if (stacked) all[0] = (hsize_t)j->world;
    TR_H5(type = tr_schema_file_type(s->d));
    TR_H5(whole = H5Screate_simple(axes, all, NULL));
    TR_H5(list = H5Pcreate(H5P_DATASET_CREATE));
    TR_H5(links = tr_h5_link_list());
    for (int r = stacked ? 0 : j->first; r < (stacked ? j->world : j->first + 1); r++) {
        st = map_rank(j, s, list, whole, r, err);
        if (st != TR_OK) goto done;
    }
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

/* A whole dataset of one rank as in memory; the caller frees, after reclaim() where it has texts or lists. */
static tr_status read_whole(const joiner *j, const set *s, int rank, void **out, size_t *n,
                            tr_err *err)
{
    tr_status st = TR_OK;
    hid_t file = open_source(j, rank), id = -1, type = -1;
    size_t bytes;

    *out = NULL;
    *n = 1;
    for (int i = 0; i < tr_dataset_axes(s->d); i++)
        if (!tr_mul(n, *n, s->of[rank].n[i])) *n = SIZE_MAX;
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
    return st == TR_OK ? TR_OK : tr_within(err, "rank %d", rank);
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
        lengths[i] = s->of[j->first].n[i];
    if (!s->of[j->first].here) return TR_OK;
    tr_status st = read_whole(j, s, j->first, &data, &n, err);
    if (st == TR_OK) st = tr_prof_file_put(j->out, s->d, s->path, lengths, data, err);
    reclaim(s->d, data, n);
    free(data);
    return st;
}

static tr_status append_all(const joiner *j, const set *s, tr_err *err)
{
    tr_status st = TR_OK;

    for (int r = 0; r < j->world && st == TR_OK; r++) {
        void *data = NULL;
        size_t n = 0;
        if (!s->of[r].here) continue;
        st = read_whole(j, s, r, &data, &n, err);
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
        lengths[i] = s->of[j->first].n[i];
    for (int r = j->first; r < j->world && st == TR_OK; r++) {
        void *data = NULL;
        size_t n = 0;
        if (!s->of[r].here) continue;
        st = read_whole(j, s, r, &data, &n, err);
        if (st == TR_OK && sum && n != n_sum)
            st = tr_fail(err, TR_E_IO, "%s: other lengths on rank %d", s->path, r);
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

static tr_status write_balance(const joiner *j, tr_err *err)
{
    const set *s = find(j, TR_D_WINDOW_TOKENS), *ranks = find(j, TR_D_RANKS);
    tr_status st = TR_OK;
    size_t n, windows, layers;

    if (!s || !ranks || !s->of[j->first].here) return TR_OK;
    void **tokens = tr_calloc((size_t)j->world, sizeof(void *));
    tr_prof_rank *place = tr_calloc((size_t)j->world, sizeof *place);
    float *out = NULL;
    if (!tokens || !place) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    windows = (size_t)s->of[j->first].n[1];
    layers = (size_t)s->of[j->first].n[2];
    for (int r = 0; r < j->world && st == TR_OK; r++) {
        void *one = NULL;
        /* every rank of a run has run the same steps; one that has not, was killed */
        if (!s->of[r].here || !ranks->of[r].here || s->of[r].n[1] != windows ||
            s->of[r].n[2] != layers)
            continue;
        st = read_whole(j, s, r, &tokens[r], &n, err);
        if (st == TR_OK) st = read_whole(j, ranks, r, &one, &n, err);
        if (st == TR_OK && n > 0) place[r] = *(tr_prof_rank *)one;
        free(one);
    }
    out = st == TR_OK ? tr_calloc(windows * layers + 1, sizeof *out) : NULL;
    if (st == TR_OK && !out) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    if (st != TR_OK) goto done;
    balance(out, (const uint64_t *const *)tokens, place, j->world, windows, layers);
    st = tr_prof_file_put(j->out, &tr_datasets[TR_D_BALANCE], NULL,
                          (const uint64_t[]){windows, layers}, out, err);

done:
    for (int r = 0; tokens && r < j->world; r++)
        free(tokens[r]);
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

static tr_status copy_attributes(const joiner *j, hid_t source, const char *path, tr_err *err)
{
    tr_status st = TR_OK;
    hid_t from = -1, to = -1;

    if (strcmp(path, "/") != 0 &&
        (H5Oexists_by_name(source, path, H5P_DEFAULT) <= 0 ||
         H5Oexists_by_name(tr_prof_file_id(j->out), path, H5P_DEFAULT) <= 0)) {
        H5Eclear2(H5E_DEFAULT);
        return TR_OK;
    }
    TR_H5(from = H5Oopen(source, path, H5P_DEFAULT));
    TR_H5(to = H5Oopen(tr_prof_file_id(j->out), path, H5P_DEFAULT));
    TR_H5(H5Aiterate2(from, H5_INDEX_NAME, H5_ITER_INC, NULL, copy_attribute, &to));
    /* A counter that is absent on one rank may be there on another. */
    if (H5Aexists(to, "absent") > 0) {
        for (int i = 0; i < j->n; i++)
            for (int r = 0; strcmp(j->set[i].path, path) == 0 && r < j->world; r++)
                if (j->set[i].of[r].n[1] && H5Aexists(to, "absent") > 0)
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
    hid_t source = open_source(j, j->first);

    TR_H5(source);
    st = tr_prof_file_text(j->out, "/run", "schema", TR_PROFILE_SCHEMA, err); /* makes the group */
    if (st == TR_OK) st = copy_attributes(j, source, "/", err);
    if (st == TR_OK) st = copy_attributes(j, source, "/run", err);
    for (int i = 0; i < j->n && st == TR_OK; i++)
        st = copy_attributes(j, source, j->set[i].path, err);

done:
    if (source >= 0) H5Fclose(source);
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
        st = tr_prof_file_scale(j->out, TR_AXIS_REGION, 0, regions->of[j->first].n[0], err);
    if (st == TR_OK && experts)
        st = tr_prof_file_scale(j->out, TR_AXIS_LAYER, 0, experts->of[j->first].n[0], err);
    if (st == TR_OK && experts)
        st = tr_prof_file_scale(j->out, TR_AXIS_EXPERT, 0, experts->of[j->first].n[1], err);
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

static tr_status join(joiner *j, tr_err *err)
{
    tr_status st = look(j, err);

    if (st == TR_OK) st = make_scales(j, err);
    for (int i = 0; i < j->n && st == TR_OK; i++)
        st = write_set(j, &j->set[i], err);
    if (st == TR_OK) st = write_balance(j, err);
    if (st == TR_OK) st = copy_all_attributes(j, err);
    if (st == TR_OK) st = tr_prof_file_number(j->out, "/", "ranks_missing", j->n_missing, err);
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
    free(j.set);
    free(j.base);
    free(part);
    return st;
}
