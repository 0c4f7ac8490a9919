#include <config.h>

#include "profile/pack.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/file.h"
#include "profile/h5_priv.h"
#include "profile/rank_list.h"

enum { CHUNK_BYTES = 1 << 18 };

typedef struct packer {
    tr_reader *r;
    tr_prof_file *out;
    int *rank; /* [n_rows] of each row */
    int n_rows;
    bool all; /* rows are all ranks of the run */
} packer;

/* ---- the tree and what was counted --------------------------------------------------------------------------------- */

static tr_status put_regions(packer *p, tr_err *err)
{
    const int n = tr_reader_about_of(p->r)->n_regions;
    const tr_reader_region *g = tr_reader_regions(p->r);
    tr_prof_region *rows = tr_calloc((size_t)n, sizeof *rows);
    if (!rows) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < n; i++) {
        rows[i] = (tr_prof_region){.id = (uint32_t)i,
                                   .parent = g[i].parent,
                                   .kind = (uint8_t)g[i].kind,
                                   .depth = (uint8_t)g[i].depth,
                                   .layer = (int16_t)g[i].layer,
                                   .group = (int16_t)g[i].group};
        memcpy(rows[i].name, g[i].name, sizeof rows[i].name);
    }
    tr_status st = n ? tr_prof_file_put(p->out, &tr_datasets[TR_D_REGIONS], NULL,
                                        &(uint64_t){(uint64_t)n}, rows, err)
                     : TR_OK;
    free(rows);
    return st;
}

/* One number of every cell, [n_ranks, n_regions]. */
static void pick(void *column, const tr_reader_cell *c, size_t n, tr_dataset_id id)
{
    uint64_t *whole = column;
    double *real = column;
    for (size_t i = 0; i < n; i++) {
        switch (id) {
        case TR_D_COUNT:
            whole[i] = c[i].count;
            break;
        case TR_D_TIME_INCL:
            whole[i] = c[i].incl_ns;
            break;
        case TR_D_TIME_EXCL:
            whole[i] = c[i].excl_ns;
            break;
        case TR_D_TIME_MIN:
            whole[i] = c[i].min_ns;
            break;
        case TR_D_TIME_MAX:
            whole[i] = c[i].max_ns;
            break;
        case TR_D_BYTES:
            whole[i] = c[i].bytes;
            break;
        case TR_D_GPU_NS:
            whole[i] = c[i].gpu_ns;
            break;
        case TR_D_GPU_COUNT:
            whole[i] = c[i].gpu_count;
            break;
        case TR_D_EXPOSED:
            whole[i] = c[i].exposed_ns;
            break;
        case TR_D_TIME_SUMSQ:
            real[i] = c[i].sumsq;
            break;
        default:
            real[i] = c[i].flops;
        }
    }
}

static bool timed_on_gpu(const tr_reader *r)
{
    const tr_reader_about *a = tr_reader_about_of(r);
    const tr_reader_cell *c = tr_reader_all_cells(r);
    for (size_t i = 0; i < (size_t)a->n_ranks * (size_t)a->n_regions; i++)
        if (c[i].gpu_count) return true;
    return false;
}

static tr_status put_cells(packer *p, const tr_reader_cell *cells, int phase, tr_err *err)
{
    const size_t n_regions = (size_t)tr_reader_about_of(p->r)->n_regions;
    const size_t n = (size_t)p->n_rows * n_regions; /* the reader has checked it */
    const uint64_t dims[2] = {(uint64_t)p->n_rows, n_regions};
    uint64_t *column = tr_calloc(n, sizeof *column);
    tr_status st = column ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
    const int last = timed_on_gpu(p->r) ? TR_D_GPU_COUNT : TR_D_EXPOSED;
    for (int id = TR_D_COUNT; id <= last && st == TR_OK && n > 0; id++) {
        char path[128];
        for (int i = 0; i < p->n_rows; i++)
            pick(column + (size_t)i * n_regions, cells + (size_t)p->rank[i] * n_regions, n_regions,
                 (tr_dataset_id)id);
        if (phase >= 0) tr_dataset_phase_path(path, sizeof path, &tr_datasets[id], (tr_phase)phase);
        st =
            tr_prof_file_put(p->out, &tr_datasets[id], phase >= 0 ? path : NULL, dims, column, err);
    }
    free(column);
    return st;
}

static tr_status put_counts(packer *p, tr_err *err)
{
    tr_status st = put_regions(p, err);
    if (st == TR_OK) st = put_cells(p, tr_reader_all_cells(p->r), -1, err);
    for (int i = 0; i < TR_N_PHASES && st == TR_OK; i++) {
        tr_reader_cell *cells = NULL;
        st = tr_reader_phase(p->r, (tr_phase)i, &cells, err);
        if (st == TR_OK && cells) st = put_cells(p, cells, i, err);
        free(cells);
    }
    return st;
}

/* ---- the grid and texts -------------------------------------------------------------------------------------------- */

/* A rank that is absent says so by its number, -1. */
static tr_status put_ranks(packer *p, tr_err *err)
{
    tr_prof_rank *rows = tr_calloc((size_t)p->n_rows, sizeof *rows);
    if (!rows) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < p->n_rows; i++) {
        rows[i] = *tr_reader_rank(p->r, p->rank[i]);
        if (!tr_reader_has(p->r, p->rank[i])) rows[i].rank = -1;
    }
    tr_status st = tr_prof_file_put(p->out, &tr_datasets[TR_D_RANKS], NULL,
                                    &(uint64_t){(uint64_t)p->n_rows}, rows, err);
    free(rows);
    return st;
}

static tr_status put_groups(packer *p, tr_err *err)
{
    const size_t n = (size_t)tr_reader_about_of(p->r)->n_groups;
    const tr_reader_group *g = tr_reader_groups(p->r);
    tr_prof_group *rows = tr_calloc(n, sizeof *rows);
    hvl_t *members = tr_calloc(n, sizeof *members);
    tr_status st = rows && members ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
    for (size_t i = 0; i < n && st == TR_OK; i++) {
        rows[i].id = (int16_t)g[i].id;
        rows[i].size = g[i].size;
        memcpy(rows[i].name, g[i].name, sizeof rows[i].name);
        members[i] = (hvl_t){g[i].n_members, (void *)g[i].member};
    }
    if (st == TR_OK && n > 0)
        st = tr_prof_file_put(p->out, &tr_datasets[TR_D_GROUPS], NULL, &(uint64_t){n}, rows, err);
    if (st == TR_OK && n > 0)
        st = tr_prof_file_put(p->out, &tr_datasets[TR_D_MEMBERS], NULL, &(uint64_t){n}, members,
                              err);
    free(rows);
    free(members);
    return st;
}

static tr_status put_texts(packer *p, tr_dataset_id id, tr_err *err)
{
    char **texts = NULL;
    size_t n = 0;
    tr_status st = tr_reader_texts(p->r, id, &texts, &n, err);
    const uint64_t dims[2] = {id == TR_D_ENV ? n / 2 : n, 2};
    if (st == TR_OK && n > 0)
        st = tr_prof_file_put(p->out, &tr_datasets[id], NULL, dims, texts, err);
    tr_h5_texts_free(texts, n);
    return st;
}

/* ---- tables -------------------------------------------------------------------------------------------------------- */

/* Lengths that all ranks fit in; false: no rank has anything. */
static tr_status longest(packer *p, tr_dataset_id id, const char *path, hsize_t *dims, bool *any,
                         tr_err *err)
{
    const int axes = tr_dataset_axes(&tr_datasets[id]);
    dims[0] = (hsize_t)p->n_rows;
    *any = false;
    for (int i = 0; i < p->n_rows; i++) {
        tr_h5_data data;
        tr_status st = tr_reader_read(p->r, id, path, p->rank[i], &data, err);
        if (st != TR_OK) return st;
        *any = *any || data.n_axes == axes - 1;
        for (int k = 1; k < axes; k++)
            if (data.dim[k - 1] > dims[k]) dims[k] = data.dim[k - 1];
        free(data.at);
    }
    return TR_OK;
}

/* An empty dataset in chunks that lie within one rank's row. */
static tr_status create(packer *p, const tr_dataset *d, const char *path, const hsize_t *dims,
                        hid_t *set, tr_err *err)
{
    const int axes = tr_dataset_axes(d);
    const double absent = NAN;
    hsize_t chunk[TR_DATASET_AXES] = {1, 1, 1};
    tr_status st = TR_OK;
    hid_t type = -1, space = -1, list = -1, links = -1;

    TR_H5(type = tr_schema_file_type(d));
    hsize_t room = CHUNK_BYTES / H5Tget_size(type) + 1;
    for (int i = axes - 1; i > 0; i--) {
        chunk[i] = dims[i] < 1 ? 1 : dims[i] < room ? dims[i] : room;
        room = room / chunk[i] + 1;
    }
    TR_H5(space = H5Screate_simple(axes, dims, NULL));
    TR_H5(list = H5Pcreate(H5P_DATASET_CREATE));
    TR_H5(links = tr_h5_link_list());
    TR_H5(H5Pset_chunk(list, axes, chunk));
    if (H5Zfilter_avail(H5Z_FILTER_DEFLATE) > 0) {
        TR_H5(H5Pset_shuffle(list));
        TR_H5(H5Pset_deflate(list, 1));
    }
    if (!d->record && d->kind == TR_FIELD_F8)
        TR_H5(H5Pset_fill_value(list, H5T_NATIVE_DOUBLE, &absent));
    TR_H5(*set = H5Dcreate2(tr_prof_file_id(p->out), path, type, space, links, list, H5P_DEFAULT));
    st = tr_h5_dress(tr_prof_file_id(p->out), *set, d, err);

done:
    if (links >= 0) H5Pclose(links);
    if (list >= 0) H5Pclose(list);
    if (space >= 0) H5Sclose(space);
    if (type >= 0) H5Tclose(type);
    return st == TR_OK ? TR_OK : tr_within(err, "%s", path);
}

/* What a row's rank has. */
static tr_status put_row(packer *p, tr_dataset_id id, const char *path, hid_t set, int i_row,
                         tr_err *err)
{
    const tr_dataset *d = &tr_datasets[id];
    const int axes = tr_dataset_axes(d);
    hsize_t start[TR_DATASET_AXES] = {(hsize_t)i_row}, count[TR_DATASET_AXES] = {1, 1, 1};
    hid_t type = -1, row = -1, memory = -1;
    tr_h5_data data;
    tr_status st = tr_reader_read(p->r, id, path, p->rank[i_row], &data, err);
    if (st != TR_OK || data.n == 0) goto done;
    for (int i = 1; i < axes; i++)
        count[i] = data.dim[i - 1];
    TR_H5(type = tr_schema_memory_type(d));
    TR_H5(row = H5Dget_space(set));
    TR_H5(H5Sselect_hyperslab(row, H5S_SELECT_SET, start, NULL, count, NULL));
    TR_H5(memory = H5Screate_simple(axes, count, NULL));
    TR_H5(H5Dwrite(set, type, memory, row, H5P_DEFAULT, data.at));

done:
    if (memory >= 0) H5Sclose(memory);
    if (row >= 0) H5Sclose(row);
    if (type >= 0) H5Tclose(type);
    free(data.at);
    return st == TR_OK ? TR_OK : tr_within(err, "%s: rank %d", path, p->rank[i_row]);
}

typedef struct attribute_copy {
    packer *p;
    const char *path;
    tr_status st;
    tr_err *err;
} attribute_copy;

/* What the schema's tables say is there already; HDF5's own are no texts. A unit is the counter's. */
static bool keep_attribute(void *ctx, const char *name, const char *value, bool is_number)
{
    attribute_copy *c = ctx;
    if (!strcmp(name, "long_name") || !strcmp(name, "CLASS") || !strcmp(name, "NAME")) return true;
    c->st = is_number
                ? tr_prof_file_number(c->p->out, c->path, name, strtoll(value, NULL, 10), c->err)
                : tr_prof_file_text(c->p->out, c->path, name, value, c->err);
    return c->st == TR_OK;
}

static tr_status copy_attributes(packer *p, const char *path, tr_err *err)
{
    attribute_copy c = {p, path, TR_OK, err};
    tr_reader_attributes_of(p->r, path, keep_attribute, &c);
    return c.st;
}

static tr_status put_ranked(packer *p, tr_dataset_id id, const char *path, tr_err *err)
{
    hsize_t dims[TR_DATASET_AXES] = {0};
    bool any = false;
    hid_t set = -1;
    tr_status st = longest(p, id, path, dims, &any, err);
    if (st != TR_OK || !any) return st;
    st = create(p, &tr_datasets[id], path, dims, &set, err);
    for (int i = 0; i < p->n_rows && st == TR_OK; i++)
        st = put_row(p, id, path, set, i, err);
    if (set >= 0 && H5Dclose(set) < 0 && st == TR_OK) st = tr_h5_failed("H5Dclose", err);
    return st == TR_OK ? copy_attributes(p, path, err) : st;
}

static tr_status put_whole(packer *p, tr_dataset_id id, tr_err *err)
{
    tr_h5_data data;
    tr_status st = tr_reader_read(p->r, id, NULL, -1, &data, err);
    if (st == TR_OK && data.n_axes > 0)
        st = tr_prof_file_put(p->out, &tr_datasets[id], NULL, data.dim, data.at, err);
    if (st == TR_OK && data.n_axes > 0) st = copy_attributes(p, tr_datasets[id].path, err);
    free(data.at);
    return st;
}

/* Folders of datasets: each by its name. */
static tr_status put_named(packer *p, tr_dataset_id id, tr_err *err)
{
    char **paths = NULL;
    size_t n = 0;
    tr_status st = tr_reader_names(p->r, id, &paths, &n, err);
    for (size_t i = 0; i < n && st == TR_OK; i++)
        st = put_ranked(p, id, paths[i], err);
    tr_h5_texts_free(paths, n);
    return st;
}

static tr_status put_tables(packer *p, tr_err *err)
{
    tr_status st = TR_OK;
    for (int id = 0; id < TR_N_DATASETS && st == TR_OK; id++) {
        const tr_dataset *d = &tr_datasets[id];
        const bool is_text = !d->record && (d->kind == TR_FIELD_TEXT || d->kind == TR_FIELD_LIST);
        if (is_text || id == TR_D_RANKS || id == TR_D_GROUPS || id == TR_D_REGIONS ||
            (d->flags & TR_DATASET_PHASES))
            continue;
        if ((d->flags & TR_DATASET_NAMED) || id == TR_D_COUNTER_TIME)
            st = put_named(p, (tr_dataset_id)id, err);
        else if (d->axis[0] == TR_AXIS_RANK)
            st = put_ranked(p, (tr_dataset_id)id, d->path, err);
        else
            st = put_whole(p, (tr_dataset_id)id, err);
    }
    return st;
}

/* ---- all ----------------------------------------------------------------------------------------------------------- */

/* What the texts of the first file have said of it, or of all ranks at that time. */
static tr_status say_missing(packer *p, tr_err *err)
{
    const tr_reader_about *a = tr_reader_about_of(p->r);
    if (!p->all) return tr_prof_file_number(p->out, "/", "complete", a->ended, err);
    int *here = tr_calloc((size_t)a->n_ranks, sizeof *here);
    char list[TR_RANK_LIST];
    if (!here) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < a->n_ranks; i++)
        here[i] = tr_reader_has(p->r, i) ? 0 : -1;
    tr_rank_list(list, sizeof list, here, a->n_ranks);
    free(here);
    tr_status st =
        tr_prof_file_number(p->out, "/", "ranks_missing", a->n_ranks - a->n_present, err);
    if (st == TR_OK) st = tr_prof_file_text(p->out, "/", "missing", list, err);
    return st == TR_OK ? tr_prof_file_number(p->out, "/", "complete", a->complete, err) : st;
}

static tr_status put_about(packer *p, tr_err *err)
{
    const tr_reader_text *t;
    tr_status st =
        tr_prof_file_text(p->out, "/run", "packed_from", tr_reader_about_of(p->r)->path, err);
    for (size_t i = 0; st == TR_OK && (t = tr_reader_text_at(p->r, i)) != NULL; i++)
        st = t->is_number
                 ? tr_prof_file_number(p->out, t->object, t->name, strtoll(t->value, NULL, 10), err)
                 : tr_prof_file_text(p->out, t->object, t->name, t->value, err);
    return st == TR_OK ? say_missing(p, err) : st;
}

/* Numbers along the axes, before the datasets that have them. */
static tr_status put_scales(packer *p, tr_err *err)
{
    const uint64_t world = (uint64_t)tr_reader_about_of(p->r)->n_ranks;
    tr_h5_data experts;
    tr_status st = tr_reader_read(p->r, TR_D_EXPERT_TOKENS, NULL, -1, &experts, err);
    if (st != TR_OK) return st;
    if (p->all) st = tr_prof_file_scale(p->out, TR_AXIS_RANK, 0, world, err);
    if (st == TR_OK) st = tr_prof_file_scale(p->out, TR_AXIS_PEER, 0, world, err);
    if (st == TR_OK && tr_reader_about_of(p->r)->n_regions > 0)
        st = tr_prof_file_scale(p->out, TR_AXIS_REGION, 0,
                                (uint64_t)tr_reader_about_of(p->r)->n_regions, err);
    if (st == TR_OK && experts.n > 0)
        st = tr_prof_file_scale(p->out, TR_AXIS_LAYER, 0, experts.dim[0], err);
    if (st == TR_OK && experts.n > 0)
        st = tr_prof_file_scale(p->out, TR_AXIS_EXPERT, 0, experts.dim[1], err);
    free(experts.at);
    return st;
}

static tr_status put_all(packer *p, tr_err *err)
{
    tr_status st = put_scales(p, err);
    if (st == TR_OK) st = put_about(p, err);
    if (st == TR_OK) st = put_ranks(p, err);
    if (st == TR_OK) st = put_groups(p, err);
    if (st == TR_OK) st = put_counts(p, err);
    if (st == TR_OK) st = put_texts(p, TR_D_ENV, err);
    if (st == TR_OK) st = put_texts(p, TR_D_LOG, err);
    return st == TR_OK ? put_tables(p, err) : st;
}

static tr_status pack(tr_reader *r, const char *path, bool all, tr_err *err)
{
    const int n_ranks = tr_reader_about_of(r)->n_ranks;
    packer p = {.r = r, .all = all, .rank = tr_calloc((size_t)n_ranks, sizeof *p.rank)};
    char part[4096];
    tr_err later;
    tr_status st = TR_OK;

    for (int i = 0; p.rank && i < n_ranks; i++)
        if (all || tr_reader_has(r, i)) p.rank[p.n_rows++] = i;
    if (!p.rank)
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    else if (snprintf(part, sizeof part, "%s.part", path) >= (int)sizeof part)
        st = tr_fail(err, TR_E_USAGE, "-o %s: too long a name", path);
    else
        st = tr_prof_file_create(&p.out, part, err);
    if (st != TR_OK) goto done;
    st = put_all(&p, err);
    const tr_status closed = tr_prof_file_close(p.out, st == TR_OK ? err : &later);
    if (st == TR_OK) st = closed;
    if (st == TR_OK && rename(part, path) != 0)
        st = tr_fail(err, TR_E_IO, "%s: %s", path, strerror(errno));
    if (st != TR_OK) remove(part);

done:
    free(p.rank);
    return st;
}

tr_status tr_profile_pack(tr_reader *r, const char *path, tr_err *err)
{
    return pack(r, path, true, err);
}

tr_status tr_profile_pack_present(tr_reader *r, const char *path, tr_err *err)
{
    return pack(r, path, false, err);
}
