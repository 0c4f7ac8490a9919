#include <config.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/export.h"

typedef struct tables {
    const char *folder;
    tr_reader *r;
    int n_ranks;
} tables;

/* ---- values -------------------------------------------------------------------------------------------------------- */

/* In quotes where the text needs them (RFC 4180). */
static void put_text(FILE *out, const char *text)
{
    if (!strpbrk(text, "\",\n\r")) {
        fputs(text, out);
        return;
    }
    fputc('"', out);
    for (const char *p = text; *p; p++) {
        if (*p == '"') fputc('"', out);
        fputc(*p, out);
    }
    fputc('"', out);
}

/* Nothing where there is no number. */
static void put_real(FILE *out, double v)
{
    if (isfinite(v)) fprintf(out, "%.17g", v);
}

static void put_field(FILE *out, const tr_field *f, const char *record)
{
    union {
        uint8_t u1;
        uint16_t u2;
        uint32_t u4;
        uint64_t u8;
        int16_t i2;
        int32_t i4;
        int64_t i8;
        float f4;
        double f8;
    } v = {0};
    const char *at = record + f->offset;
    if (f->kind == TR_FIELD_CHARS) {
        put_text(out, at);
        return;
    }
    memcpy(&v, at, f->bytes < sizeof v ? f->bytes : sizeof v);
    switch (f->kind) {
    case TR_FIELD_ENUM:
        fputs(v.u1 < f->names->n ? f->names->name[v.u1] : "?", out);
        break;
    case TR_FIELD_U1:
        fprintf(out, "%u", v.u1);
        break;
    case TR_FIELD_U2:
        fprintf(out, "%u", v.u2);
        break;
    case TR_FIELD_U4:
        fprintf(out, "%u", v.u4);
        break;
    case TR_FIELD_U8:
        fprintf(out, "%ju", (uintmax_t)v.u8);
        break;
    case TR_FIELD_I2:
        fprintf(out, "%d", v.i2);
        break;
    case TR_FIELD_I4:
        fprintf(out, "%d", v.i4);
        break;
    case TR_FIELD_I8:
        fprintf(out, "%jd", (intmax_t)v.i8);
        break;
    case TR_FIELD_F4:
        put_real(out, (double)v.f4);
        break;
    default:
        put_real(out, v.f8);
    }
}

/* ---- tables of records --------------------------------------------------------------------------------------------- */

static bool is_zero(const char *record, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (record[i]) return false;
    return true;
}

static void put_head(FILE *out, const char *first, const tr_record_type *record)
{
    fputs(first, out);
    for (int i = 0; i < record->n_fields; i++) {
        const tr_field *f = &record->field[i];
        const bool says_so = strstr(f->name, "_ns") || !strcmp(f->name, "ns");
        fprintf(out, "%s%s%s", *first || i ? "," : "", f->name,
                !strcmp(f->units, "ns") && !says_so ? "_ns" : "");
    }
    fputc('\n', out);
}

static void put_records(FILE *out, const tr_record_type *record, const tr_h5_data *data, int rank,
                        const char *first)
{
    for (size_t i = 0; i < data->n; i++) {
        const char *at = (const char *)data->at + i * record->bytes;
        if (is_zero(at, record->bytes)) continue; /* fills a joined table up */
        if (*first) fputs(first, out);
        if (rank >= 0) fprintf(out, "%s%d", *first ? "," : "", rank);
        for (int k = 0; k < record->n_fields; k++) {
            if (*first || rank >= 0 || k > 0) fputc(',', out);
            put_field(out, &record->field[k], at);
        }
        fputc('\n', out);
    }
}

/* A dataset of records as it is: a column `rank` in front where it has a rank axis. */
static tr_status put_dataset(FILE *out, tables *t, tr_dataset_id id, tr_err *err)
{
    const tr_dataset *d = &tr_datasets[id];
    const bool ranked = d->axis[0] == TR_AXIS_RANK;
    tr_status st = TR_OK;
    put_head(out, ranked && id != TR_D_RANKS ? "rank" : "", d->record);
    for (int i = ranked ? 0 : -1; i < (ranked ? t->n_ranks : 0) && st == TR_OK; i++) {
        tr_h5_data data;
        st = tr_reader_read(t->r, id, NULL, i, &data, err);
        if (st != TR_OK) break;
        put_records(out, d->record, &data, i, "");
        free(data.at);
    }
    return st;
}

/* The overlap has the layer in its row's number. */
static tr_status put_overlap(FILE *out, tables *t, tr_err *err)
{
    const tr_record_type *record = tr_datasets[TR_D_OVERLAP_CP].record;
    put_head(out, "rank,layer", record);
    for (int i = 0; i < t->n_ranks; i++) {
        tr_h5_data data;
        tr_status st = tr_reader_read(t->r, TR_D_OVERLAP_CP, NULL, i, &data, err);
        if (st != TR_OK) return st;
        for (size_t n = 0; n < data.n; n++) {
            fprintf(out, "%d,%zu", i, n);
            for (int k = 0; k < record->n_fields; k++) {
                fputc(',', out);
                put_field(out, &record->field[k], (const char *)data.at + n * record->bytes);
            }
            fputc('\n', out);
        }
        free(data.at);
    }
    return TR_OK;
}

static tr_status put_steps(FILE *out, tables *t, tr_err *err)
{
    const tr_record_type *record = tr_datasets[TR_D_STEPS].record;
    put_head(out, "rank", record);
    for (int i = 0; i < t->n_ranks; i++) {
        tr_h5_data data = {0};
        tr_prof_step *steps = NULL;
        tr_status st = tr_reader_steps(t->r, i, &steps, &data.n, err);
        if (st != TR_OK) return st;
        data.at = steps;
        put_records(out, record, &data, i, "");
        free(steps);
    }
    return TR_OK;
}

static tr_status put_ranks(FILE *out, tables *t, tr_err *err)
{
    const tr_record_type *record = tr_datasets[TR_D_RANKS].record;
    (void)err;
    put_head(out, "present", record);
    for (int i = 0; i < t->n_ranks; i++) {
        fputs(tr_reader_has(t->r, i) ? "1" : "0", out);
        for (int k = 0; k < record->n_fields; k++) {
            fputc(',', out);
            put_field(out, &record->field[k], (const char *)tr_reader_rank(t->r, i));
        }
        fputc('\n', out);
    }
    return TR_OK;
}

static tr_status put_trace(FILE *out, tables *t, tr_err *err)
{
    char **paths = NULL;
    size_t n = 0;
    tr_status st = tr_reader_names(t->r, TR_D_TRACE, &paths, &n, err);
    put_head(out, "stream,rank", tr_datasets[TR_D_TRACE].record);
    for (size_t k = 0; k < n && st == TR_OK; k++)
        for (int i = 0; i < t->n_ranks && st == TR_OK; i++) {
            tr_h5_data data;
            st = tr_reader_read(t->r, TR_D_TRACE, paths[k], i, &data, err);
            if (st != TR_OK) break;
            put_records(out, tr_datasets[TR_D_TRACE].record, &data, i, strrchr(paths[k], '/') + 1);
            free(data.at);
        }
    tr_h5_texts_free(paths, n);
    return st;
}

/* ---- regions ------------------------------------------------------------------------------------------------------- */

static void put_region(FILE *out, const tr_reader *r, int region, const tr_reader_cell *c)
{
    const tr_reader_region *g = &tr_reader_regions(r)[region];
    char path[512];
    fprintf(out, "%d,%d,", region, g->parent);
    put_text(out, tr_reader_region_path(r, region, path, sizeof path));
    fputc(',', out);
    put_text(out, g->name);
    fprintf(out, ",%s,%d,%d,", tr_kind_names.name[g->kind], g->depth, g->layer);
    put_text(out, tr_reader_group_name(r, g->group));
    fprintf(out, ",%ju,%ju,%ju,%ju,%ju,%.17g,%ju,%.17g,%ju,%ju,%ju\n", (uintmax_t)c->count,
            (uintmax_t)c->incl_ns, (uintmax_t)c->excl_ns, (uintmax_t)c->min_ns,
            (uintmax_t)c->max_ns, c->sumsq, (uintmax_t)c->bytes, c->flops, (uintmax_t)c->exposed_ns,
            (uintmax_t)c->gpu_ns, (uintmax_t)c->gpu_count);
}

static const char region_columns[] =
    "region,parent,path,name,kind,depth,layer,group,count,time_incl_ns,time_excl_ns,time_min_ns,"
    "time_max_ns,time_sumsq_ns2,bytes,flops,exposed_ns,gpu_ns,gpu_count\n";

static tr_status put_regions(FILE *out, tables *t, tr_err *err)
{
    (void)err;
    fprintf(out, "rank,%s", region_columns);
    for (int i = 0; i < t->n_ranks; i++)
        for (int k = 0; tr_reader_has(t->r, i) && k < tr_reader_about_of(t->r)->n_regions; k++) {
            fprintf(out, "%d,", i);
            put_region(out, t->r, k, &tr_reader_cells(t->r, i)[k]);
        }
    return TR_OK;
}

/* Regions that ran in a phase. */
static tr_status put_phases(FILE *out, tables *t, tr_err *err)
{
    const size_t n = (size_t)tr_reader_about_of(t->r)->n_regions;
    fprintf(out, "phase,rank,%s", region_columns);
    for (int p = 0; p < TR_N_PHASES; p++) {
        tr_reader_cell *cells = NULL;
        tr_status st = tr_reader_phase(t->r, (tr_phase)p, &cells, err);
        if (st != TR_OK) return st;
        for (size_t i = 0; cells && i < (size_t)t->n_ranks * n; i++) {
            if (cells[i].count == 0 && cells[i].incl_ns == 0) continue;
            fprintf(out, "%s,%zu,", tr_phase_names.name[p], i / n);
            put_region(out, t->r, (int)(i % n), &cells[i]);
        }
        free(cells);
    }
    return TR_OK;
}

/* ---- numbers ------------------------------------------------------------------------------------------------------- */

static tr_status put_experts(FILE *out, tables *t, tr_err *err)
{
    tr_h5_data data;
    tr_status st = tr_reader_read(t->r, TR_D_EXPERT_TOKENS, NULL, -1, &data, err);
    if (st != TR_OK) return st;
    fputs("layer,expert,tokens\n", out);
    for (size_t i = 0; i < data.n; i++)
        fprintf(out, "%zu,%zu,%ju\n", i / (size_t)data.dim[1], i % (size_t)data.dim[1],
                (uintmax_t)((const uint64_t *)data.at)[i]);
    free(data.at);
    return TR_OK;
}

static tr_status put_rank_tokens(FILE *out, tables *t, tr_err *err)
{
    fputs("rank,layer,tokens\n", out);
    for (int i = 0; i < t->n_ranks; i++) {
        tr_h5_data data;
        tr_status st = tr_reader_read(t->r, TR_D_RANK_TOKENS, NULL, i, &data, err);
        if (st != TR_OK) return st;
        for (size_t k = 0; k < data.n; k++)
            fprintf(out, "%d,%zu,%ju\n", i, k, (uintmax_t)((const uint64_t *)data.at)[k]);
        free(data.at);
    }
    return TR_OK;
}

static tr_status put_balance(FILE *out, tables *t, tr_err *err)
{
    tr_h5_data data;
    tr_status st = tr_reader_read(t->r, TR_D_BALANCE, NULL, -1, &data, err);
    if (st != TR_OK) return st;
    fputs("window,layer,balance\n", out);
    for (size_t i = 0; i < data.n; i++) {
        fprintf(out, "%zu,%zu,", i / (size_t)data.dim[1], i % (size_t)data.dim[1]);
        put_real(out, (double)((const float *)data.at)[i]);
        fputc('\n', out);
    }
    free(data.at);
    return TR_OK;
}

static tr_status put_matrix(FILE *out, tables *t, tr_err *err)
{
    char **paths = NULL;
    size_t n = 0;
    tr_status st = tr_reader_names(t->r, TR_D_COMM_MATRIX, &paths, &n, err);
    fputs("group,from,to,bytes\n", out);
    for (size_t k = 0; k < n && st == TR_OK; k++)
        for (int i = 0; i < t->n_ranks && st == TR_OK; i++) {
            tr_h5_data data;
            st = tr_reader_read(t->r, TR_D_COMM_MATRIX, paths[k], i, &data, err);
            if (st != TR_OK) break;
            for (size_t to = 0; to < data.n; to++) {
                const uint64_t bytes = ((const uint64_t *)data.at)[to];
                if (!bytes) continue;
                put_text(out, strrchr(paths[k], '/') + 1);
                fprintf(out, ",%d,%zu,%ju\n", i, to, (uintmax_t)bytes);
            }
            free(data.at);
        }
    tr_h5_texts_free(paths, n);
    return st;
}

/* "/counters/papi/perf::TASK-CLOCK" of a rank, with the moments of its source. */
static tr_status put_counter(FILE *out, tables *t, const char *path, const char *units, int rank,
                             tr_err *err)
{
    char when[768];
    const char *name = path + strlen("/counters/"), *slash = strchr(name, '/');
    tr_h5_data value, time = {0};
    if (!slash) return TR_OK;
    snprintf(when, sizeof when, "%.*s/time", (int)(slash - path), path);
    tr_status st = tr_reader_read(t->r, TR_D_COUNTER, path, rank, &value, err);
    if (st != TR_OK) return st;
    st = tr_reader_read(t->r, TR_D_COUNTER_TIME, when, rank, &time, err);
    for (size_t i = 0; st == TR_OK && i < value.n && i < time.n; i++) {
        const int64_t at = ((const int64_t *)time.at)[i];
        const double v = ((const double *)value.at)[i];
        if (i > 0 && at == 0 && v == 0) continue; /* fills a joined table up */
        fprintf(out, "%.*s,", (int)(slash - name), name);
        put_text(out, slash + 1);
        fprintf(out, ",%d,%jd,", rank, (intmax_t)at);
        put_real(out, v);
        fputc(',', out);
        put_text(out, units);
        fputc('\n', out);
    }
    free(value.at);
    free(time.at);
    return st;
}

static tr_status put_counters(FILE *out, tables *t, tr_err *err)
{
    char **paths = NULL;
    size_t n = 0;
    tr_status st = tr_reader_names(t->r, TR_D_COUNTER, &paths, &n, err);
    fputs("source,name,rank,t_ns,value,units\n", out);
    for (size_t k = 0; k < n && st == TR_OK; k++) {
        char *units = tr_reader_attribute_of(t->r, paths[k], "units");
        for (int i = 0; i < t->n_ranks && st == TR_OK; i++)
            st = put_counter(out, t, paths[k], units ? units : "", i, err);
        free(units);
    }
    tr_h5_texts_free(paths, n);
    return st;
}

/* Counters that could not be counted, with the reason. */
static tr_status put_absent(FILE *out, tables *t, tr_err *err)
{
    char **paths = NULL;
    size_t n = 0;
    tr_status st = tr_reader_names(t->r, TR_D_COUNTER, &paths, &n, err);
    fputs("name,reason\n", out);
    for (size_t k = 0; k < n && st == TR_OK; k++) {
        char *why = tr_reader_attribute_of(t->r, paths[k], "absent");
        if (why) {
            put_text(out, paths[k] + strlen("/counters/"));
            fputc(',', out);
            put_text(out, why);
            fputc('\n', out);
        }
        free(why);
    }
    tr_h5_texts_free(paths, n);
    return st;
}

/* "/phase/decode/counters/papi/perf::TASK-CLOCK" */
static tr_status put_phase_counters(FILE *out, tables *t, tr_err *err)
{
    char **paths = NULL;
    size_t n = 0;
    tr_status st = tr_reader_names(t->r, TR_D_PHASE_COUNTER, &paths, &n, err);
    fputs("phase,name,rank,value\n", out);
    for (size_t k = 0; k < n && st == TR_OK; k++)
        for (int i = 0; i < t->n_ranks && st == TR_OK; i++) {
            const char *phase = paths[k] + strlen("/phase/");
            const char *name = strstr(phase, "/counters/");
            tr_h5_data data;
            if (!name) continue;
            st = tr_reader_read(t->r, TR_D_PHASE_COUNTER, paths[k], i, &data, err);
            if (st != TR_OK) break;
            for (size_t v = 0; v < data.n; v++) {
                fprintf(out, "%.*s,", (int)(name - phase), phase);
                put_text(out, name + strlen("/counters/"));
                fprintf(out, ",%d,", i);
                put_real(out, ((const double *)data.at)[v]);
                fputc('\n', out);
            }
            free(data.at);
        }
    tr_h5_texts_free(paths, n);
    return st;
}

/* ---- texts --------------------------------------------------------------------------------------------------------- */

static tr_status put_run(FILE *out, tables *t, tr_err *err)
{
    const tr_reader_text *a;
    char **env = NULL;
    size_t n = 0;
    fputs("object,name,value\n", out);
    for (size_t i = 0; (a = tr_reader_text_at(t->r, i)) != NULL; i++) {
        fprintf(out, "%s,", a->object);
        put_text(out, a->name);
        fputc(',', out);
        put_text(out, a->value);
        fputc('\n', out);
    }
    tr_status st = tr_reader_texts(t->r, TR_D_ENV, &env, &n, err);
    for (size_t i = 0; st == TR_OK && i + 1 < n; i += 2) {
        fputs("/run/env,", out);
        put_text(out, env[i]);
        fputc(',', out);
        put_text(out, env[i + 1]);
        fputc('\n', out);
    }
    tr_h5_texts_free(env, n);
    return st;
}

static tr_status put_log(FILE *out, tables *t, tr_err *err)
{
    char **line = NULL;
    size_t n = 0;
    tr_status st = tr_reader_texts(t->r, TR_D_LOG, &line, &n, err);
    fputs("line,text\n", out);
    for (size_t i = 0; st == TR_OK && i < n; i++) {
        fprintf(out, "%zu,", i);
        put_text(out, line[i]);
        fputc('\n', out);
    }
    tr_h5_texts_free(line, n);
    return st;
}

static tr_status put_groups(FILE *out, tables *t, tr_err *err)
{
    (void)err;
    fputs("id,name,size,members\n", out);
    for (int i = 0; i < tr_reader_about_of(t->r)->n_groups; i++) {
        const tr_reader_group *g = &tr_reader_groups(t->r)[i];
        fprintf(out, "%d,", g->id);
        put_text(out, g->name);
        fprintf(out, ",%d,", g->size);
        for (size_t k = 0; k < g->n_members; k++)
            fprintf(out, "%s%d", k ? " " : "", g->member[k]);
        fputc('\n', out);
    }
    return TR_OK;
}

/* ---- all ----------------------------------------------------------------------------------------------------------- */

typedef struct table {
    const char *name;
    tr_status (*put)(FILE *out, tables *t, tr_err *err); /* NULL: the dataset as it is */
    tr_dataset_id id;
} table;

static const table all_tables[] = {
    {"run.csv", put_run, 0},
    {"ranks.csv", put_ranks, 0},
    {"groups.csv", put_groups, 0},
    {"regions.csv", put_regions, 0},
    {"phases.csv", put_phases, 0},
    {"steps.csv", put_steps, 0},
    {"requests.csv", NULL, TR_D_REQUESTS},
    {"comm.csv", NULL, TR_D_COMM_OPS},
    {"matrix.csv", put_matrix, 0},
    {"overlap.csv", put_overlap, 0},
    {"experts.csv", put_experts, 0},
    {"rank_tokens.csv", put_rank_tokens, 0},
    {"balance.csv", put_balance, 0},
    {"kv.csv", NULL, TR_D_KV},
    {"memory.csv", NULL, TR_D_MEMORY},
    {"counters.csv", put_counters, 0},
    {"counters_absent.csv", put_absent, 0},
    {"phase_counters.csv", put_phase_counters, 0},
    {"io.csv", NULL, TR_D_LOAD},
    {"log.csv", put_log, 0},
    {"trace.csv", put_trace, 0},
};

tr_status tr_export_csv(const char *folder, tr_reader *r, tr_err *err)
{
    tables t = {folder, r, tr_reader_about_of(r)->n_ranks};
    tr_status st = tr_export_folder(folder, err);
    for (size_t i = 0; i < sizeof all_tables / sizeof *all_tables && st == TR_OK; i++) {
        const table *one = &all_tables[i];
        FILE *out = NULL;
        st = tr_export_open(&out, folder, one->name, err);
        if (st != TR_OK) break;
        st = one->put ? one->put(out, &t, err) : put_dataset(out, &t, one->id, err);
        if (st == TR_OK)
            st = tr_export_close(out, folder, one->name, err);
        else
            fclose(out);
    }
    return st;
}
