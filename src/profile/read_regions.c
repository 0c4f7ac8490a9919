#include <config.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/read_priv.h"

enum { DEPTH_MAX = 64 };

/* ---- one tree out of many ------------------------------------------------------------------------------------------ */

/* The merged tree while it grows: children of a region are a chain. roots: of -1. */
typedef struct tree {
    tr_reader_region *at;
    int *first, *next;
    int n, room, roots;
} tree;

static bool make_room(tree *t)
{
    if (t->n < t->room) return true;
    const int room = t->room ? t->room * 2 : 256;
    tr_reader_region *at = realloc(t->at, (size_t)room * sizeof *at);
    if (at) t->at = at;
    int *first = realloc(t->first, (size_t)room * sizeof *first);
    if (first) t->first = first;
    int *next = realloc(t->next, (size_t)room * sizeof *next);
    if (next) t->next = next;
    if (!at || !first || !next) return false;
    t->room = room;
    return true;
}

static bool same(const tr_reader_region *a, const tr_reader_region *b)
{
    return a->layer == b->layer && a->group == b->group && !strcmp(a->name, b->name);
}

/* The row of a region in the merged tree, made where it is new; -1: no memory, -2: too many. */
static int find_or_add(tree *t, const tr_reader_region *region)
{
    const int parent = region->parent;
    int last = -1;
    for (int i = parent < 0 ? t->roots : t->first[parent]; i >= 0; i = t->next[i]) {
        if (same(&t->at[i], region)) return i;
        last = i;
    }
    if (t->n == TR_READER_REGIONS_MAX) return -2;
    if (!make_room(t)) return -1;
    const int i = t->n++;
    t->at[i] = *region;
    t->first[i] = t->next[i] = -1;
    if (last >= 0)
        t->next[last] = i;
    else if (parent < 0)
        t->roots = i;
    else
        t->first[parent] = i;
    return i;
}

/* What a file says about a region, checked; parent still in the file's rows. */
static tr_status take(tr_reader_region *to, const tr_prof_region *from, size_t row,
                      const char *name, tr_err *err)
{
    if (from->parent < -1 || (from->parent >= 0 && (size_t)from->parent >= row))
        return tr_fail(err, TR_E_INPUT,
                       "%s: /regions: row %zu lies in row %d, which does not come before it", name,
                       row, from->parent);
    *to = (tr_reader_region){
        .parent = from->parent,
        .layer = from->layer < 0 ? -1 : from->layer,
        .group = from->group < 0 ? -1 : from->group,
        .kind = from->kind < TR_N_KINDS ? (tr_region_kind)from->kind : TR_KIND_HOST,
    };
    memcpy(to->name, from->name, sizeof from->name);
    tr_h5_clean(to->name);
    if (!to->name[0]) snprintf(to->name, sizeof to->name, "region %zu", row);
    return TR_OK;
}

static tr_status merge(tree *t, tr_reader_file *f, const tr_prof_region *rows, size_t n,
                       tr_err *err)
{
    f->n_regions = (int)n;
    f->region = tr_calloc(n, sizeof *f->region);
    if (!f->region) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", f->name);
    for (size_t i = 0; i < n; i++) {
        tr_reader_region region;
        tr_status st = take(&region, &rows[i], i, f->name, err);
        if (st != TR_OK) return st;
        if (region.parent >= 0) {
            region.parent = f->region[region.parent];
            region.depth = t->at[region.parent].depth + 1;
        }
        if (region.depth > DEPTH_MAX)
            return tr_fail(err, TR_E_INPUT, "%s: /regions: row %zu is more than %d deep", f->name,
                           i, DEPTH_MAX);
        const int at = find_or_add(t, &region);
        if (at == -1) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", f->name);
        if (at < 0)
            return tr_fail(err, TR_E_INPUT, "%s: /regions: more than %d regions", f->name,
                           TR_READER_REGIONS_MAX);
        f->region[i] = at;
    }
    return TR_OK;
}

tr_status tr_reader_load_regions(tr_reader *r, tr_err *err)
{
    hid_t type = tr_schema_memory_type(&tr_datasets[TR_D_REGIONS]);
    tree t = {.roots = -1};
    tr_status st = type < 0 ? tr_fail(err, TR_E_MEMORY, "HDF5: a type cannot be made") : TR_OK;

    for (int i = 0; i < r->n_files && st == TR_OK; i++) {
        tr_reader_file *f = &r->file[i];
        tr_h5_data rows = {0};
        if (!tr_h5_has(f->h5, "/regions")) continue;
        st = tr_h5_read(&rows, f->h5, f->name, "/regions", type, 1, (tr_h5_part){0}, err);
        if (st == TR_OK && rows.n > TR_READER_REGIONS_MAX)
            st = tr_fail(err, TR_E_INPUT,
                         "%s: /regions: %zu regions are more than this program "
                         "reads",
                         f->name, rows.n);
        if (st == TR_OK) st = merge(&t, f, rows.at, rows.n, err);
        free(rows.at);
    }
    r->region = t.at;
    r->about.n_regions = t.n;
    free(t.first);
    free(t.next);
    if (type >= 0) H5Tclose(type);
    return st;
}

const char *tr_reader_region_path(const tr_reader *r, int region, char *text, size_t n)
{
    int way[DEPTH_MAX + 1], deep = 0;
    size_t used = 0;
    for (int i = region; i >= 0 && deep <= DEPTH_MAX; i = r->region[i].parent)
        way[deep++] = i;
    text[0] = 0;
    while (deep-- > 0 && used + 1 < n) {
        const tr_reader_region *g = &r->region[way[deep]];
        const bool plain = g->kind == TR_KIND_LAYER && g->layer >= 0 && !strcmp(g->name, "layer");
        int add = plain ? snprintf(text + used, n - used, "%slayer %d", used ? "/" : "", g->layer)
                        : snprintf(text + used, n - used, "%s%s", used ? "/" : "", g->name);
        used += add > 0 ? (size_t)add : 0;
    }
    return text;
}

/* ---- what was counted ---------------------------------------------------------------------------------------------- */

typedef struct column {
    tr_dataset_id id;
    size_t at;
    bool is_real;
} column;

#define AT(member) offsetof(tr_reader_cell, member)

static const column columns[] = {
    {TR_D_COUNT, AT(count), false},         {TR_D_TIME_INCL, AT(incl_ns), false},
    {TR_D_TIME_EXCL, AT(excl_ns), false},   {TR_D_TIME_MIN, AT(min_ns), false},
    {TR_D_TIME_MAX, AT(max_ns), false},     {TR_D_TIME_SUMSQ, AT(sumsq), true},
    {TR_D_BYTES, AT(bytes), false},         {TR_D_FLOPS, AT(flops), true},
    {TR_D_EXPOSED, AT(exposed_ns), false},  {TR_D_GPU_NS, AT(gpu_ns), false},
    {TR_D_GPU_COUNT, AT(gpu_count), false},
};

enum { N_COLUMNS = sizeof columns / sizeof *columns };

/* One file's [n_rows, n_regions] numbers into the cells of its ranks. */
static void scatter(const tr_reader *r, const tr_reader_file *f, const column *c,
                    const tr_h5_data *data, tr_reader_cell *cells)
{
    const uint64_t *whole = data->at;
    const double *real = data->at;
    for (int row = 0; row < f->n_rows; row++) {
        if (f->rank[row] < 0) continue;
        tr_reader_cell *to = cells + (size_t)f->rank[row] * (size_t)r->about.n_regions;
        for (int i = 0; i < f->n_regions; i++) {
            const size_t from = (size_t)row * (size_t)f->n_regions + (size_t)i;
            char *at = (char *)&to[f->region[i]] + c->at;
            if (c->is_real)
                *(double *)at = isfinite(real[from]) && real[from] > 0 ? real[from] : 0;
            else
                *(uint64_t *)at = whole[from];
        }
    }
}

static tr_status load_column(tr_reader *r, const tr_reader_file *f, const column *c, int phase,
                             hid_t type, tr_reader_cell *cells, bool *any, tr_err *err)
{
    const tr_dataset *d = &tr_datasets[c->id];
    char path[128];
    tr_h5_data data = {0};

    if (phase < 0)
        snprintf(path, sizeof path, "%s", d->path);
    else
        tr_dataset_phase_path(path, sizeof path, d, (tr_phase)phase);
    if (!tr_h5_has(f->h5, path)) return TR_OK;
    tr_status st = tr_h5_read(&data, f->h5, f->name, path, type, 2, (tr_h5_part){0}, err);
    /* A rank that was killed may have flushed its tree after its numbers: regions too many are zero; too few cannot be. */
    if (st == TR_OK && ((int)data.dim[0] != f->n_rows || (int)data.dim[1] != f->n_regions))
        st = tr_fail(err, TR_E_INPUT, "%s: %s: %ju x %ju numbers for %d ranks with %d regions",
                     f->name, path, (uintmax_t)data.dim[0], (uintmax_t)data.dim[1], f->n_rows,
                     f->n_regions);
    if (st == TR_OK) {
        scatter(r, f, c, &data, cells);
        *any = true;
    }
    free(data.at);
    return st;
}

tr_status tr_reader_load_cells(tr_reader *r, int phase, tr_reader_cell *cells, bool *any,
                               tr_err *err)
{
    tr_status st = TR_OK;
    *any = false;
    for (int k = 0; k < N_COLUMNS && st == TR_OK; k++) {
        hid_t type = tr_schema_memory_type(&tr_datasets[columns[k].id]);
        if (type < 0) return tr_fail(err, TR_E_MEMORY, "HDF5: a type cannot be made");
        for (int i = 0; i < r->n_files && st == TR_OK; i++)
            st = load_column(r, &r->file[i], &columns[k], phase, type, cells, any, err);
        H5Tclose(type);
    }
    return st;
}

tr_status tr_reader_phase(tr_reader *r, tr_phase phase, tr_reader_cell **cells, tr_err *err)
{
    const size_t n = (size_t)r->about.n_ranks * (size_t)r->about.n_regions;
    bool any = false;
    *cells = NULL;
    tr_reader_cell *all = tr_calloc(n, sizeof *all);
    if (!all) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", r->path);
    tr_status st = tr_reader_load_cells(r, (int)phase, all, &any, err);
    if (st == TR_OK && any)
        *cells = all;
    else
        free(all);
    return st;
}
