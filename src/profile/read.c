#include <config.h>

#include "profile/read.h"

#include <dirent.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/size.h"
#include "profile/rank_list.h"
#include "profile/read_priv.h"

enum { FILES_MAX = 65536, TEXTS_MAX = 4096, NOTES_MAX = 64 };

/* ---- notes and texts ----------------------------------------------------------------------------------------------- */

void tr_reader_say(tr_reader *r, const char *fmt, ...)
{
    char text[512];
    va_list ap;
    if (r->n_notes == NOTES_MAX) return;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    tr_h5_clean(text);
    r->note[r->n_notes] = strdup(text);
    if (r->note[r->n_notes]) r->n_notes++;
}

const char *tr_reader_note(const tr_reader *r, size_t i)
{
    return i < r->n_notes ? r->note[i] : NULL;
}

typedef struct text_walk {
    tr_reader *r;
    const char *object;
    bool no_memory;
} text_walk;

static bool see_attribute(void *ctx, const char *name, const char *value, bool is_number)
{
    text_walk *w = ctx;
    tr_reader *r = w->r;
    if (r->n_texts == TEXTS_MAX) return false;
    tr_reader_text *t = &r->text[r->n_texts];
    char *n = strdup(name), *v = strdup(value);
    if (!n || !v) {
        free(n);
        free(v);
        w->no_memory = true;
        return false;
    }
    *t = (tr_reader_text){w->object, n, v, is_number};
    r->n_texts++;
    return true;
}

const tr_reader_text *tr_reader_text_at(const tr_reader *r, size_t i)
{
    return i < r->n_texts ? &r->text[i] : NULL;
}

const char *tr_reader_attribute(const tr_reader *r, const char *object, const char *name)
{
    for (size_t i = 0; i < r->n_texts; i++)
        if (!strcmp(r->text[i].object, object) && !strcmp(r->text[i].name, name))
            return r->text[i].value;
    return NULL;
}

/* Of the first file that has a /run: the leader's where it is there. */
static tr_status load_texts(tr_reader *r, tr_err *err)
{
    static const char *const objects[] = {"/", "/run"};
    text_walk w = {.r = r};
    for (int k = 0; k < 2; k++) {
        w.object = objects[k];
        const size_t before = r->n_texts;
        for (int f = 0; f < r->n_files && r->n_texts == before; f++)
            tr_h5_attributes(r->file[f].h5, objects[k], see_attribute, &w);
    }
    return w.no_memory ? tr_fail(err, TR_E_MEMORY, "%s: out of memory", r->path) : TR_OK;
}

/* ---- one file ------------------------------------------------------------------------------------------------------ */

static tr_status check_schema(const tr_reader_file *f, tr_err *err)
{
    tr_status st = TR_OK;
    char *schema = tr_h5_attribute(f->h5, "/", "schema");
    char *version = tr_h5_attribute(f->h5, "/", "version");
    if (!schema || strcmp(schema, TR_PROFILE_SCHEMA) != 0)
        st = tr_fail(err, TR_E_INPUT, "%s: not a profile: schema %s, %s is wanted", f->name,
                     schema ? schema : "is not given", TR_PROFILE_SCHEMA);
    else if (!version || strncmp(version, "1.", 2) != 0)
        st = tr_fail(err, TR_E_INPUT, "%s: version %s of the schema; this program reads 1", f->name,
                     version ? version : "?");
    free(schema);
    free(version);
    return st;
}

static tr_status add_file(tr_reader *r, const char *path, tr_err *err)
{
    tr_reader_file *f = &r->file[r->n_files];
    *f = (tr_reader_file){.h5 = -1};
    tr_status st = tr_h5_open(&f->h5, path, err);
    if (st != TR_OK) return st;
    f->name = strdup(path);
    if (!f->name)
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    else
        st = check_schema(f, err);
    if (st == TR_OK) {
        r->n_files++;
        return TR_OK;
    }
    H5Fclose(f->h5);
    free(f->name);
    return st;
}

/* ---- ranks --------------------------------------------------------------------------------------------------------- */

/* Length of the first axis of a dataset, 0: none. */
static uint64_t first_axis(hid_t h5, const char *path)
{
    hsize_t dim[H5S_MAX_RANK] = {0};
    if (!tr_h5_is_dataset(h5, path)) return 0;
    hid_t d = H5Dopen2(h5, path, H5P_DEFAULT), s = d < 0 ? -1 : H5Dget_space(d);
    if (s >= 0 && H5Sget_simple_extent_ndims(s) > 0) H5Sget_simple_extent_dims(s, dim, NULL);
    if (s >= 0) H5Sclose(s);
    if (d >= 0) H5Dclose(d);
    return dim[0];
}

/* The number in "rank00012.h5", 0 without one. */
static int number_in_name(const char *path)
{
    const char *name = strrchr(path, '/');
    name = name ? name + 1 : path;
    long n = strncmp(name, "rank", 4) ? 0 : strtol(name + 4, NULL, 10);
    return n >= 0 && n < TR_READER_RANKS_MAX ? (int)n : 0;
}

/* The rows of /grid/ranks; without it, rows numbered as the file is named. */
static tr_status read_rows(tr_reader_file *f, tr_h5_data *rows, tr_err *err)
{
    *rows = (tr_h5_data){0};
    if (tr_h5_has(f->h5, "/grid/ranks")) {
        hid_t type = tr_schema_memory_type(&tr_datasets[TR_D_RANKS]);
        tr_status st = type < 0 ? tr_fail(err, TR_E_MEMORY, "HDF5: a type cannot be made")
                                : tr_h5_read(rows, f->h5, f->name, "/grid/ranks", type, 1,
                                             (tr_h5_part){0}, err);
        if (type >= 0) H5Tclose(type);
        if (st != TR_OK) return st;
    } else {
        uint64_t n = first_axis(f->h5, "/profile/count");
        if (n == 0) n = first_axis(f->h5, "/steps");
        rows->n = n < TR_READER_RANKS_MAX ? (size_t)n : TR_READER_RANKS_MAX;
        tr_prof_rank *k = tr_calloc(rows->n, sizeof *k);
        if (!k) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", f->name);
        for (size_t i = 0; i < rows->n; i++)
            k[i] = (tr_prof_rank){.rank = (int)i + number_in_name(f->name), .numa = -1};
        rows->at = k;
    }
    if (rows->n == 0 || rows->n > TR_READER_RANKS_MAX)
        return tr_fail(err, TR_E_INPUT, "%s: %s", f->name,
                       rows->n ? "more ranks than this program reads" : "no ranks in it");
    return TR_OK;
}

typedef struct source_walk {
    const tr_reader_file *f;
    unsigned char *here; /* [n_rows] */
    char name[256];      /* of the first that is missing */
    char last[256];      /* looked at: rows of one file follow each other */
    bool last_is_here;
    size_t n, n_missing;
} source_walk;

enum { PATH_BYTES = 4096 };

/* Where HDF5 looks for it: beside the file. */
static const char *source_path(char path[PATH_BYTES], const tr_reader_file *f, const char *source)
{
    const char *slash = strrchr(f->name, '/');

    if (*source == '/' || !slash)
        snprintf(path, PATH_BYTES, "%s", source);
    else
        snprintf(path, PATH_BYTES, "%.*s/%s", (int)(slash - f->name), f->name, source);
    return path;
}

/* Can HDF5 find and open it? "." is the file itself. */
static bool is_here(const tr_reader_file *f, const char *source)
{
    char path[PATH_BYTES];
    tr_err ignored;
    hid_t h5 = -1;

    if (!strcmp(source, ".")) return true;
    source_path(path, f, source);
    if (tr_h5_open(&h5, path, &ignored) != TR_OK) return false;
    H5Fclose(h5);
    return true;
}

static bool see_rank_source(void *ctx, const char *source, uint64_t first, uint64_t n)
{
    source_walk *w = ctx;

    if (w->n++ == 0 || strcmp(source, w->last) != 0) {
        snprintf(w->last, sizeof w->last, "%s", source);
        w->last_is_here = is_here(w->f, source);
        if (!w->last_is_here && w->n_missing++ == 0)
            snprintf(w->name, sizeof w->name, "%s", source);
    }
    if (!w->last_is_here) return true;
    for (uint64_t i = first; i - first < n && i < (uint64_t)w->f->n_rows; i++)
        w->here[i] = 1;
    return true;
}

/* Rows of a joined file whose rank file has gone, or was not there when it was joined. */
static tr_status find_missing(tr_reader *r, tr_reader_file *f, tr_err *err)
{
    source_walk w = {.f = f, .here = tr_calloc((size_t)f->n_rows, 1)};
    if (!w.here) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", f->name);
    tr_h5_sources(f->h5, "/profile/count", see_rank_source, &w);
    for (int i = 0; w.n > 0 && i < f->n_rows; i++)
        if (!w.here[i]) f->rank[i] = -1;
    if (w.n_missing > 0) {
        snprintf(r->missing, sizeof r->missing, "%s", w.name);
        tr_reader_say(r, "%zu of the files it stands for cannot be read: %s%s", w.n_missing, w.name,
                      w.n_missing > 1 ? ", ..." : "");
    }
    free(w.here);
    return TR_OK;
}

typedef struct search { /* for a file among those that are read */
    const tr_reader_file *f;
    struct stat wanted;
    bool found;
} search;

static bool is_wanted(search *s, const char *path)
{
    struct stat sb;

    s->found = s->found || (stat(path, &sb) == 0 && sb.st_dev == s->wanted.st_dev &&
                            sb.st_ino == s->wanted.st_ino);
    return s->found;
}

static bool look_at_source(void *ctx, const char *source, uint64_t first, uint64_t n)
{
    char path[PATH_BYTES];
    search *s = ctx;

    (void)first, (void)n;
    return !is_wanted(s, source_path(path, s->f, source));
}

bool tr_reader_reads(const tr_reader *r, const char *path)
{
    search s = {.found = false};

    if (stat(path, &s.wanted) != 0) return false;
    for (int i = 0; i < r->n_files && !is_wanted(&s, r->file[i].name); i++) {
        s.f = &r->file[i];
        tr_h5_sources(s.f->h5, "/profile/count", look_at_source, &s);
    }
    return s.found;
}

/* Ranks of one file's rows into f->rank and the table (which grows). */
static tr_status take_rows(tr_reader *r, tr_reader_file *f, const tr_h5_data *rows, tr_err *err)
{
    const tr_prof_rank *k = rows->at;
    f->n_rows = (int)rows->n;
    f->rank = tr_calloc(rows->n, sizeof *f->rank);
    if (!f->rank) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", f->name);
    for (int i = 0; i < f->n_rows; i++) {
        /* A row that nobody wrote: -1, or zeros in another row than the first. A node's file has its ranks, in order. */
        f->rank[i] = k[i].rank >= 0 && (i == 0 || k[i].rank > 0) ? k[i].rank : -1;
        if (f->rank[i] >= TR_READER_RANKS_MAX)
            return tr_fail(err, TR_E_INPUT, "%s: rank %d is more than this program reads", f->name,
                           f->rank[i]);
        if (f->rank[i] >= r->about.n_ranks) r->about.n_ranks = f->rank[i] + 1;
    }
    if (r->about.form == TR_READER_FILE) {
        if (f->rank[0] > 0) r->about.form = TR_READER_RANK;
        if (f->n_rows > r->about.n_ranks) r->about.n_ranks = f->n_rows;
        return find_missing(r, f, err);
    }
    return TR_OK;
}

static tr_status place_rows(tr_reader *r, int i_file, const tr_prof_rank *k, tr_err *err)
{
    const tr_reader_file *f = &r->file[i_file];
    for (int i = 0; i < f->n_rows; i++) {
        const int rank = f->rank[i];
        if (rank < 0) continue;
        if (r->file_of[rank] >= 0)
            return tr_fail(err, TR_E_INPUT, "%s: rank %d is in %s too", f->name, rank,
                           r->file[r->file_of[rank]].name);
        r->file_of[rank] = i_file;
        r->row_of[rank] = i;
        r->rank[rank] = k[i];
        tr_prof_rank *to = &r->rank[rank];
        to->host[sizeof to->host - 1] = to->gpu_uuid[sizeof to->gpu_uuid - 1] =
            to->pci[sizeof to->pci - 1] = 0;
        tr_h5_clean(to->host);
        tr_h5_clean(to->gpu_uuid);
        tr_h5_clean(to->pci);
        r->about.n_present++;
    }
    return TR_OK;
}

/* Ranks that are known from the groups or from the size of the world alone. */
static void count_members(tr_reader *r)
{
    const char *size = tr_reader_attribute(r, "/", "world_size");
    const long long world = size ? strtoll(size, NULL, 10) : 0;
    if (world > r->about.n_ranks && world <= TR_READER_RANKS_MAX) r->about.n_ranks = (int)world;
    for (size_t i = 0; i < r->n_members; i++)
        for (size_t k = 0; k < r->member[i].n; k++) {
            const int rank = r->member[i].at[k];
            if (rank >= r->about.n_ranks && rank < TR_READER_RANKS_MAX) r->about.n_ranks = rank + 1;
        }
}

static tr_status load_ranks(tr_reader *r, tr_err *err)
{
    tr_h5_data *rows = tr_calloc((size_t)r->n_files, sizeof *rows);
    tr_status st = rows ? TR_OK : tr_fail(err, TR_E_MEMORY, "%s: out of memory", r->path);

    for (int i = 0; i < r->n_files && st == TR_OK; i++) {
        st = read_rows(&r->file[i], &rows[i], err);
        if (st == TR_OK) st = take_rows(r, &r->file[i], &rows[i], err);
    }
    if (st != TR_OK) goto done;
    count_members(r);
    const size_t n = (size_t)r->about.n_ranks;
    r->rank = tr_calloc(n, sizeof *r->rank);
    r->file_of = tr_calloc(n, sizeof *r->file_of);
    r->row_of = tr_calloc(n, sizeof *r->row_of);
    if (!r->rank || !r->file_of || !r->row_of) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", r->path);
        goto done;
    }
    for (int i = 0; i < r->about.n_ranks; i++) {
        r->rank[i] = (tr_prof_rank){.rank = i, .numa = -1};
        r->file_of[i] = r->row_of[i] = -1;
    }
    for (int i = 0; i < r->n_files && st == TR_OK; i++)
        st = place_rows(r, i, rows[i].at, err);
done:
    for (int i = 0; rows && i < r->n_files; i++)
        free(rows[i].at);
    free(rows);
    return st;
}

/* "ranks 2, 5-9 of 16 are missing" */
static void say_missing(tr_reader *r)
{
    char list[TR_RANK_LIST];
    const int absent = r->about.n_ranks - r->about.n_present;
    if (absent <= 0 || r->about.form == TR_READER_RANK) return;
    tr_rank_list(list, sizeof list, r->file_of, r->about.n_ranks);
    tr_reader_say(r, "%s %s of %d %s missing: their time and bytes are in no sum below",
                  absent > 1 ? "ranks" : "rank", list, r->about.n_ranks, absent > 1 ? "are" : "is");
}

/* What the run itself could not keep: sums below lack it. */
static void say_lost(tr_reader *r)
{
    static const char *const what[][2] = {{"steps_lost", "steps"},
                                          {"requests_lost", "requests"},
                                          {"lines_lost", "lines of /log"},
                                          {"gpu_times_lost", "times of the GPU"}};

    for (size_t i = 0; i < sizeof what / sizeof *what; i++) {
        const char *text = tr_reader_attribute(r, "/", what[i][0]);
        const long long n = text ? strtoll(text, NULL, 10) : 0;
        if (n > 0)
            tr_reader_say(r, "%lld %s came faster than they could be recorded, and are missing", n,
                          what[i][1]);
    }
}

/* A joined file says it of all ranks that it found, and is itself what was found. */
static bool has_ended(const tr_reader *r)
{
    bool ended = true;
    for (int i = 0; i < r->n_files && ended; i++) {
        char *says = tr_h5_attribute(r->file[i].h5, "/", "complete");
        ended = says && !strcmp(says, "1");
        free(says);
    }
    return ended;
}

/* ---- groups -------------------------------------------------------------------------------------------------------- */

static tr_status load_groups(tr_reader *r, tr_err *err)
{
    hid_t type = tr_schema_memory_type(&tr_datasets[TR_D_GROUPS]);
    tr_h5_data rows = {0};
    tr_status st = type < 0 ? tr_fail(err, TR_E_MEMORY, "HDF5: a type cannot be made") : TR_OK;
    for (int i = 0; i < r->n_files && st == TR_OK && rows.n == 0; i++) {
        const tr_reader_file *f = &r->file[i];
        if (!tr_h5_has(f->h5, "/grid/groups")) continue;
        free(rows.at);
        st = tr_h5_read(&rows, f->h5, f->name, "/grid/groups", type, 1, (tr_h5_part){0}, err);
        if (st == TR_OK && !r->member && tr_h5_has(f->h5, "/grid/members"))
            st = tr_h5_read_lists(&r->member, &r->n_members, f->h5, f->name, "/grid/members", err);
    }
    if (st != TR_OK || rows.n == 0) goto done;
    if (rows.n > TR_READER_RANKS_MAX * 16u) {
        st = tr_fail(err, TR_E_INPUT, "%s: /grid/groups: %zu groups", r->path, rows.n);
        goto done;
    }
    r->group = tr_calloc(rows.n, sizeof *r->group);
    if (!r->group) {
        st = tr_fail(err, TR_E_MEMORY, "%s: out of memory", r->path);
        goto done;
    }
    const tr_prof_group *from = rows.at;
    for (size_t i = 0; i < rows.n; i++) {
        tr_reader_group *g = &r->group[i];
        g->id = from[i].id;
        g->size = from[i].size;
        memcpy(g->name, from[i].name, sizeof from[i].name);
        tr_h5_clean(g->name);
        if (i < r->n_members) {
            g->member = r->member[i].at;
            g->n_members = r->member[i].n;
        }
    }
    r->about.n_groups = (int)rows.n;
done:
    free(rows.at);
    if (type >= 0) H5Tclose(type);
    return st;
}

const char *tr_reader_group_name(const tr_reader *r, int id)
{
    for (int i = 0; id >= 0 && i < r->about.n_groups; i++)
        if (r->group[i].id == id) return r->group[i].name;
    return "";
}

/* ---- folders ------------------------------------------------------------------------------------------------------- */

/* rank00001.h5, node00001.h5, the same with .part */
static bool is_rank_file(const char *name)
{
    if (strncmp(name, "rank", 4) != 0 && strncmp(name, "node", 4) != 0) return false;
    size_t digits = strspn(name + 4, "0123456789");
    return digits > 0 &&
           (!strcmp(name + 4 + digits, ".h5") || !strcmp(name + 4 + digits, ".h5.part"));
}

static int by_name(const void *a, const void *b)
{
    return strcmp(*(char *const *)a, *(char *const *)b);
}

/* Names in a folder that want() likes, sorted; the caller frees each and the array. */
static tr_status list_folder(const char *path, bool (*want)(const char *name), char ***names,
                             size_t *n, tr_err *err)
{
    DIR *d = opendir(path);
    struct dirent *e;
    *n = 0;
    *names = tr_calloc(FILES_MAX, sizeof **names);
    tr_status st = !d        ? tr_fail(err, TR_E_IO, "%s: %s", path, strerror(errno))
                   : !*names ? tr_fail(err, TR_E_MEMORY, "out of memory")
                             : TR_OK;
    while (st == TR_OK && (e = readdir(d)) != NULL) {
        if (!want(e->d_name)) continue;
        if (*n == FILES_MAX)
            st = tr_fail(err, TR_E_INPUT, "%s: more files than this program reads", path);
        else if (!((*names)[*n] = strdup(e->d_name)))
            st = tr_fail(err, TR_E_MEMORY, "out of memory");
        else
            (*n)++;
    }
    if (d) closedir(d);
    if (st == TR_OK) qsort(*names, *n, sizeof **names, by_name);
    return st;
}

static bool is_no_dot(const char *name)
{
    return *name != '.';
}

/* FILE.d with one run in it is that run; path grows by it. */
static tr_status enter_run(char *path, size_t size, tr_err *err)
{
    char **names = NULL;
    size_t n = 0, n_files = 0;
    tr_status st = list_folder(path, is_rank_file, &names, &n_files, err);
    tr_h5_texts_free(names, n_files);
    if (st != TR_OK || n_files > 0) return st;
    st = list_folder(path, is_no_dot, &names, &n, err);
    const size_t length = strlen(path);
    if (st == TR_OK && n == 1 && length + strlen(names[0]) + 2 <= size)
        snprintf(path + length, size - length, "/%s", names[0]);
    else if (st == TR_OK && n == 0)
        st = tr_fail(err, TR_E_INPUT, "%s: no rank files in this folder", path);
    else if (st == TR_OK)
        st = tr_fail(err, TR_E_INPUT, "%s: several runs in this folder, name one: %s, ... %s", path,
                     names[0], names[n - 1]);
    tr_h5_texts_free(names, n);
    return st;
}

/* A .part beside the closed file of the same name is a leftover. */
static bool is_leftover(char **names, size_t i)
{
    const size_t n = strlen(names[i]);
    return i > 0 && n > 5 && !strcmp(names[i] + n - 5, ".part") && strlen(names[i - 1]) == n - 5 &&
           !strncmp(names[i], names[i - 1], n - 5);
}

static tr_status open_folder(tr_reader *r, const char *folder, tr_err *err)
{
    char path[4096], **names = NULL;
    size_t n = 0, n_open = 0;
    tr_err why;
    tr_status st = list_folder(folder, is_rank_file, &names, &n, err);
    if (st == TR_OK && n == 0)
        st = tr_fail(err, TR_E_INPUT, "%s: no rank files in this folder", folder);
    if (st == TR_OK) r->file = tr_calloc(n, sizeof *r->file);
    if (st == TR_OK && !r->file) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    for (size_t i = 0; i < n && st == TR_OK; i++) {
        if (is_leftover(names, i)) continue;
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        tr_status one = add_file(r, path, &why);
        if (one == TR_OK) continue;
        if (err) *err = why;
        if (one == TR_E_MEMORY)
            st = one;
        else if (strstr(why.text, "h5clear -s")) /* the user can mend that: it is not left out */
            n_open++;
        else
            tr_reader_say(r, "left out: %s", why.text);
    }
    if (st == TR_OK && n_open > 0)
        st = tr_fail(err, TR_E_INPUT,
                     "%s: %zu of %zu files were not closed by the run that wrote them; when it has "
                     "ended: for f in %s/*.part; do h5clear -s \"$f\"; done",
                     folder, n_open, n, folder);
    if (st == TR_OK && r->n_files == 0)
        st = tr_within(err, "%s: none of its %zu files can be read", folder, n);
    tr_h5_texts_free(names, n);
    return st;
}

/* ---- open and close ------------------------------------------------------------------------------------------------ */

/* FILE that is not there, of a run that was killed: its folder has what it wrote. */
static tr_status not_there(const char *path, tr_err *err)
{
    char folder[4096];
    struct stat sb;
    snprintf(folder, sizeof folder, "%s.d", path);
    if (stat(folder, &sb) == 0 && S_ISDIR(sb.st_mode))
        return tr_fail(
            err, TR_E_INPUT,
            "%s: no such file, but %s is there: a run that did not end; name that folder", path,
            folder);
    return tr_fail(err, TR_E_INPUT, "%s: %s", path, strerror(ENOENT));
}

static tr_status open_path(tr_reader *r, const char *path, tr_err *err)
{
    struct stat sb;
    char folder[4096];
    if (stat(path, &sb) != 0)
        return errno == ENOENT ? not_there(path, err)
                               : tr_fail(err, TR_E_IO, "%s: %s", path, strerror(errno));
    if (!S_ISDIR(sb.st_mode)) {
        r->file = tr_calloc(1, sizeof *r->file);
        if (!r->file) return tr_fail(err, TR_E_MEMORY, "out of memory");
        return add_file(r, path, err);
    }
    r->about.form = TR_READER_FOLDER;
    if (snprintf(folder, sizeof folder, "%s", path) >= (int)sizeof folder)
        return tr_fail(err, TR_E_INPUT, "%s: too long a name", path);
    tr_status st = enter_run(folder, sizeof folder, err);
    if (st != TR_OK) return st;
    free(r->path);
    r->path = strdup(folder);
    r->about.path = r->path;
    if (!r->path) return tr_fail(err, TR_E_MEMORY, "out of memory");
    return open_folder(r, folder, err);
}

static tr_status load(tr_reader *r, tr_err *err)
{
    tr_status st = load_texts(r, err);
    if (st == TR_OK) st = load_groups(r, err);
    if (st == TR_OK) st = load_ranks(r, err);
    if (st == TR_OK) st = tr_reader_load_regions(r, err);
    if (st != TR_OK) return st;
    r->about.ended = has_ended(r);
    /* a rank's or a node's own file speaks for itself */
    r->about.complete = r->about.ended &&
                        (r->about.form == TR_READER_RANK || r->about.n_present == r->about.n_ranks);
    if (r->about.n_present == 0 && r->missing[0])
        return tr_fail(err, TR_E_INPUT,
                       "%s: it only points to the ranks' files, and %s is not beside it: copy "
                       "their folder too, or make one file "
                       "with trireme profile pack",
                       r->path, r->missing);
    if (r->about.n_present == 0)
        return tr_fail(err, TR_E_INPUT, "%s: no rank has anything in it", r->path);
    say_missing(r);
    say_lost(r);
    const size_t n = (size_t)r->about.n_regions;
    size_t cells;
    if (!tr_mul(&cells, (size_t)r->about.n_ranks, n) || cells > TR_READER_CELLS_MAX)
        return tr_fail(err, TR_E_INPUT,
                       "%s: %d ranks with %zu regions are more than this program "
                       "reads",
                       r->path, r->about.n_ranks, n);
    r->cell = tr_calloc(cells, sizeof *r->cell);
    r->none = tr_calloc(n, sizeof *r->none);
    if (!r->cell || !r->none) return tr_fail(err, TR_E_MEMORY, "%s: out of memory", r->path);
    bool any;
    return tr_reader_load_cells(r, -1, r->cell, &any, err);
}

tr_status tr_reader_open(tr_reader **out, const char *path, tr_err *err)
{
    tr_status st;
    tr_reader *r = calloc(1, sizeof *r);
    *out = NULL;
    if (!r) return tr_fail(err, TR_E_MEMORY, "out of memory");
    r->path = strdup(path);
    r->note = tr_calloc(NOTES_MAX, sizeof *r->note);
    r->text = tr_calloc(TEXTS_MAX, sizeof *r->text);
    r->about.path = r->path;
    if (!r->path || !r->note || !r->text)
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    else
        st = open_path(r, path, err);
    if (st == TR_OK) st = load(r, err);
    if (st == TR_OK)
        *out = r;
    else
        tr_reader_close(r);
    return st;
}

void tr_reader_close(tr_reader *r)
{
    if (!r) return;
    for (int i = 0; i < r->n_files; i++) {
        H5Fclose(r->file[i].h5);
        free(r->file[i].name);
        free(r->file[i].rank);
        free(r->file[i].region);
    }
    for (size_t i = 0; i < r->n_texts; i++) {
        free((char *)r->text[i].name);
        free((char *)r->text[i].value);
    }
    tr_h5_texts_free(r->note, r->n_notes);
    tr_h5_lists_free(r->member, r->n_members);
    free(r->file);
    free(r->text);
    free(r->path);
    free(r->rank);
    free(r->file_of);
    free(r->row_of);
    free(r->region);
    free(r->cell);
    free(r->none);
    free(r->group);
    free(r);
}

/* ---- what was loaded ----------------------------------------------------------------------------------------------- */

const tr_reader_about *tr_reader_about_of(const tr_reader *r)
{
    return &r->about;
}

bool tr_reader_has(const tr_reader *r, int rank)
{
    return rank >= 0 && rank < r->about.n_ranks && r->file_of[rank] >= 0;
}

const tr_prof_rank *tr_reader_rank(const tr_reader *r, int rank)
{
    return &r->rank[rank];
}

const tr_reader_region *tr_reader_regions(const tr_reader *r)
{
    return r->region;
}

const tr_reader_group *tr_reader_groups(const tr_reader *r)
{
    return r->group;
}

const tr_reader_cell *tr_reader_cells(const tr_reader *r, int rank)
{
    if (!tr_reader_has(r, rank)) return r->none;
    return r->cell + (size_t)rank * (size_t)r->about.n_regions;
}

const tr_reader_cell *tr_reader_all_cells(const tr_reader *r)
{
    return r->cell;
}
