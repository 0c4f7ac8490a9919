#include <config.h>

#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/read_priv.h"

static const tr_h5_data nothing = {0};

/* Region numbers of a file to those of the merged tree; one that the file does not have becomes "none". */
static void renumber(const tr_reader_file *f, tr_dataset_id id, tr_h5_data *data)
{
    for (size_t i = 0; i < data->n; i++) {
        uint32_t *region = id == TR_D_TRACE ? &((tr_prof_trace *)data->at)[i].region
                                            : &((tr_prof_comm *)data->at)[i].region;
        *region = *region < (uint32_t)f->n_regions ? (uint32_t)f->region[*region] : UINT32_MAX;
    }
}

/* Texts of fixed length may fill their field; the last byte is given up. */
static void end_texts(const tr_record_type *record, tr_h5_data *data)
{
    for (int k = 0; k < record->n_fields; k++) {
        const tr_field *field = &record->field[k];
        if (field->kind != TR_FIELD_CHARS) continue;
        for (size_t i = 0; i < data->n; i++) {
            char *text = (char *)data->at + i * record->bytes + field->offset;
            text[field->bytes - 1] = 0;
            tr_h5_clean(text);
        }
    }
}

/* What was empty before stays a valid empty array. */
static tr_status give_nothing(tr_h5_data *data, tr_err *err)
{
    *data = nothing;
    data->at = tr_calloc(1, 1);
    return data->at ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
}

static tr_status read_from(tr_reader_file *f, tr_dataset_id id, const char *path, tr_h5_part part,
                           tr_h5_data *data, tr_err *err)
{
    const tr_dataset *d = &tr_datasets[id];
    hid_t type = tr_schema_memory_type(d);
    if (type < 0) return tr_fail(err, TR_E_MEMORY, "HDF5: a type cannot be made");
    tr_status st = tr_h5_read(data, f->h5, f->name, path, type, tr_dataset_axes(d), part, err);
    H5Tclose(type);
    if (st != TR_OK) return st;
    if (id == TR_D_TRACE || id == TR_D_COMM_OPS) renumber(f, id, data);
    if (d->record) end_texts(d->record, data);
    return TR_OK;
}

/* A dataset that ranks have parts of: u8 numbers, added up. */
static tr_status add_up(tr_reader *r, tr_dataset_id id, const char *path, tr_h5_data *sum,
                        tr_err *err)
{
    tr_status st = TR_OK;
    bool first = true;
    *sum = nothing;
    for (int i = 0; i < r->n_files && st == TR_OK; i++) {
        tr_h5_data one;
        if (!tr_h5_has(r->file[i].h5, path)) continue;
        st = read_from(&r->file[i], id, path, (tr_h5_part){0}, &one, err);
        if (st != TR_OK) break;
        if (first) {
            *sum = one;
            first = false;
            continue;
        }
        if (one.n != sum->n)
            st = tr_fail(err, TR_E_INPUT, "%s: %s: %zu numbers, other ranks have %zu",
                         r->file[i].name, path, one.n, sum->n);
        for (size_t k = 0; k < one.n && st == TR_OK; k++)
            ((uint64_t *)sum->at)[k] += ((const uint64_t *)one.at)[k];
        free(one.at);
    }
    if (st != TR_OK) {
        free(sum->at);
        *sum = nothing;
        return st;
    }
    return first ? give_nothing(sum, err) : TR_OK;
}

tr_status tr_reader_read(tr_reader *r, tr_dataset_id id, const char *path, int rank,
                         tr_h5_data *data, tr_err *err)
{
    const tr_dataset *d = &tr_datasets[id];
    *data = nothing;
    if (!path) path = d->path;
    if (rank >= 0) {
        if (!tr_reader_has(r, rank)) return give_nothing(data, err);
        tr_reader_file *f = &r->file[r->file_of[rank]];
        if (!tr_h5_has(f->h5, path)) return give_nothing(data, err);
        return read_from(f, id, path, (tr_h5_part){true, (uint64_t)r->row_of[rank]}, data, err);
    }
    if (d->flags & TR_DATASET_SUM) return add_up(r, id, path, data, err);
    for (int i = 0; i < r->n_files; i++)
        if (tr_h5_has(r->file[i].h5, path))
            return read_from(&r->file[i], id, path, (tr_h5_part){0}, data, err);
    return give_nothing(data, err);
}

static int by_start(const void *a, const void *b)
{
    const tr_prof_step *x = a, *y = b;
    return (x->t0 > y->t0) - (x->t0 < y->t0);
}

tr_status tr_reader_steps(tr_reader *r, int rank, tr_prof_step **steps, size_t *n, tr_err *err)
{
    tr_h5_data data;
    *steps = NULL;
    *n = 0;
    tr_status st = tr_reader_read(r, TR_D_STEPS, NULL, rank, &data, err);
    if (st != TR_OK) return st;
    tr_prof_step *s = data.at;
    /* Rows that fill a joined table up are zero. A step takes time: one that ends before it begins is damage, and no step. */
    for (size_t i = 0; i < data.n; i++)
        if (s[i].t1 > s[i].t0) s[(*n)++] = s[i];
    qsort(s, *n, sizeof *s, by_start);
    *steps = s;
    return TR_OK;
}

/* ---- names and texts ----------------------------------------------------------------------------------------------- */

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

static bool have(char **names, size_t n, const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(names[i], name)) return true;
    return false;
}

/* One file's names of a folder, those that are new. */
static tr_status add_names(const tr_reader_file *f, tr_dataset_id id, const char *folder,
                           char ***paths, size_t *n, tr_err *err)
{
    char **found = NULL, path[640];
    size_t n_found = 0;
    tr_status st = tr_h5_names(&found, &n_found, f->h5, folder, err);
    for (size_t i = 0; i < n_found && st == TR_OK; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, found[i]);
        const tr_dataset *d = tr_dataset_find(path, NULL);
        if (d != &tr_datasets[id] || have(*paths, *n, path)) continue;
        char **more = realloc(*paths, (*n + 1) * sizeof *more);
        if (more) *paths = more;
        if (!more || !(more[*n] = strdup(path)))
            st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", f->name);
        else
            (*n)++;
    }
    tr_h5_texts_free(found, n_found);
    return st;
}

tr_status tr_reader_names(tr_reader *r, tr_dataset_id id, char ***paths, size_t *n, tr_err *err)
{
    tr_status st = TR_OK;
    char folder[128];
    *paths = NULL;
    *n = 0;
    for (int i = 0; i < r->n_files && st == TR_OK; i++) {
        if (id == TR_D_PHASE_COUNTER)
            for (int p = 0; p < TR_N_PHASES && st == TR_OK; p++) {
                snprintf(folder, sizeof folder, "/phase/%s/counters", tr_phase_names.name[p]);
                st = add_names(&r->file[i], id, folder, paths, n, err);
            }
        else
            st = add_names(&r->file[i], id,
                           id == TR_D_COUNTER_TIME ? "/counters" : tr_datasets[id].path, paths, n,
                           err);
    }
    if (st == TR_OK && *n > 1) qsort(*paths, *n, sizeof **paths, by_name);
    if (st != TR_OK) {
        tr_h5_texts_free(*paths, *n);
        *paths = NULL;
        *n = 0;
    }
    return st;
}

char *tr_reader_attribute_of(tr_reader *r, const char *path, const char *name)
{
    char *text = NULL;
    for (int i = 0; i < r->n_files && !text; i++)
        text = tr_h5_attribute(r->file[i].h5, path, name);
    return text;
}

void tr_reader_attributes_of(tr_reader *r, const char *path,
                             bool (*see)(void *ctx, const char *name, const char *value,
                                         bool is_number),
                             void *ctx)
{
    for (int i = 0; i < r->n_files; i++)
        if (tr_h5_has(r->file[i].h5, path)) {
            tr_h5_attributes(r->file[i].h5, path, see, ctx);
            return;
        }
}

tr_status tr_reader_texts(tr_reader *r, tr_dataset_id id, char ***texts, size_t *n, tr_err *err)
{
    const tr_dataset *d = &tr_datasets[id];
    *texts = NULL;
    *n = 0;
    for (int i = 0; i < r->n_files; i++) {
        char **some = NULL;
        size_t n_some = 0;
        if (!tr_h5_has(r->file[i].h5, d->path)) continue;
        tr_status st = tr_h5_read_texts(&some, &n_some, r->file[i].h5, r->file[i].name, d->path,
                                        tr_dataset_axes(d), err);
        char **all = st == TR_OK ? realloc(*texts, (*n + n_some + 1) * sizeof *all) : NULL;
        if (!all) {
            tr_h5_texts_free(some, n_some);
            tr_h5_texts_free(*texts, *n);
            *texts = NULL;
            *n = 0;
            return st != TR_OK ? st : tr_fail(err, TR_E_MEMORY, "%s: out of memory", r->path);
        }
        memcpy(all + *n, some, n_some * sizeof *all);
        *texts = all;
        *n += n_some;
        free(some);
        if (d->flags & TR_DATASET_LEADER) break;
    }
    return TR_OK;
}
