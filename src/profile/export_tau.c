#include <config.h>

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/export.h"
#include "profile/summary.h"

enum { NAME = 128, PATH = 64 * NAME };

/* What stands in quotes in a profile: no quote, no line break, and no "=>", which separates a call path. */
static void tau_name(char *text, size_t n, const tr_reader_region *g)
{
    if (g->kind == TR_KIND_LAYER && g->layer >= 0)
        snprintf(text, n, "%s %d", g->name, g->layer);
    else
        snprintf(text, n, "%s", g->name);
    for (char *p = text; *p; p++)
        if (*p == '"' || (*p == '=' && p[1] == '>')) *p = '\'';
}

static const char *tau_group(tr_region_kind kind)
{
    static const char *const group[] = {
        [TR_KIND_HOST] = "TAU_USER",         [TR_KIND_KERNEL] = "TAU_USER|KERNEL",
        [TR_KIND_COMM] = "TAU_MESSAGE|COMM", [TR_KIND_WAIT] = "TAU_MESSAGE|WAIT",
        [TR_KIND_PHASE] = "TAU_DEFAULT",     [TR_KIND_LAYER] = "TAU_USER|LAYER",
        [TR_KIND_STEP] = "TAU_USER|STEP",    [TR_KIND_IO] = "TAU_IO"};
    return group[kind];
}

typedef struct stream {
    tr_reader *r;
    const tr_reader_cell *cell;
    const int *root;
    int rank, thread, first; /* first: the stream's root */
    uint64_t *subrs;         /* [n_regions] calls made from it */
    bool *ran;               /* [n_regions] has a line of its own */
} stream;

static bool same_name(const tr_reader_region *a, const tr_reader_region *b)
{
    char x[NAME], y[NAME];
    tau_name(x, sizeof x, a);
    tau_name(y, sizeof y, b);
    return !strcmp(x, y);
}

/* Does the name stand above region i too? Then its inclusive time is in that one's already. */
static bool is_nested(const tr_reader_region *g, int i)
{
    for (int up = g[i].parent; up >= 0; up = g[up].parent)
        if (same_name(&g[up], &g[i])) return true;
    return false;
}

typedef struct flat {
    char name[NAME];
    tr_region_kind kind;
    uint64_t calls, subrs, excl_ns, incl_ns, bytes;
} flat;

/* All places of one name together; *n rows, the root first. NULL: out of memory. */
static flat *make_flat(const stream *s, int *n)
{
    const tr_reader_region *g = tr_reader_regions(s->r);
    const int n_regions = tr_reader_about_of(s->r)->n_regions;
    flat *rows = tr_calloc((size_t)n_regions, sizeof *rows);
    *n = 0;
    for (int i = 0; rows && i < n_regions; i++) {
        char name[NAME];
        int k = 0;
        if (!s->ran[i] || s->root[i] != s->first) continue;
        tau_name(name, sizeof name, &g[i]);
        while (k < *n && strcmp(rows[k].name, name) != 0)
            k++;
        flat *to = &rows[k];
        if (k == *n) {
            (*n)++;
            memcpy(to->name, name, sizeof name);
            to->kind = g[i].kind;
        }
        to->calls += s->cell[i].count;
        to->subrs += s->subrs[i];
        to->excl_ns += s->cell[i].excl_ns;
        to->bytes += s->cell[i].bytes;
        if (!is_nested(g, i)) to->incl_ns += s->cell[i].incl_ns;
    }
    return rows;
}

static void tau_path(const stream *s, int region, char *text, size_t n)
{
    const tr_reader_region *g = tr_reader_regions(s->r);
    int way[66], deep = 0;
    size_t used = 0;
    for (int i = region; i >= 0 && deep < 66; i = g[i].parent)
        way[deep++] = i;
    text[0] = 0;
    while (deep-- > 0 && used < n) {
        char name[NAME];
        tau_name(name, sizeof name, &g[way[deep]]);
        int more = snprintf(text + used, n - used, "%s%s", used ? "  => " : "", name);
        used += more > 0 ? (size_t)more : 0;
    }
}

static void put_line(FILE *out, const char *name, uint64_t calls, uint64_t subrs, uint64_t excl_ns,
                     uint64_t incl_ns, const char *group)
{
    fprintf(out, "\"%s\" %ju %ju %ju %ju 0 GROUP=\"%s\"\n", name, (uintmax_t)calls,
            (uintmax_t)subrs, (uintmax_t)(excl_ns / 1000), (uintmax_t)(incl_ns / 1000), group);
}

static void put_xml(FILE *out, const char *name, const char *value)
{
    fprintf(out, "<attribute><name>%s</name><value>", name);
    for (const char *p = value; *p; p++) {
        if (*p == '<')
            fputs("&lt;", out);
        else if (*p == '&')
            fputs("&amp;", out);
        else if (*p != '#') /* the line's own separator */
            fputc(*p, out);
    }
    fputs("</value></attribute>", out);
}

static void put_head(FILE *out, const stream *s, int n)
{
    const char *model = tr_reader_attribute(s->r, "/run", "model");
    const char *command = tr_reader_attribute(s->r, "/run", "command_line");
    fprintf(out,
            "%d templated_functions_MULTI_TIME\n"
            "# Name Calls Subrs Excl Incl ProfileCalls # <metadata>",
            n);
    put_xml(out, "Metric Name", "TIME"); /* the first: readers take the metric from it */
    put_xml(out, "Hostname", tr_reader_rank(s->r, s->rank)->host);
    if (model) put_xml(out, "Model", model);
    if (command) put_xml(out, "Command Line", command);
    fputs("</metadata>\n", out);
}

/* Bytes of every name as a user event: numevents max min mean sumsqr; of single calls only the mean is known. */
static void put_events(FILE *out, const flat *rows, int n)
{
    int events = 0;
    for (int i = 0; i < n; i++)
        events += rows[i].bytes > 0 && rows[i].calls > 0;
    fprintf(out, "0 aggregates\n%d userevents\n# eventname numevents max min mean sumsqr\n",
            events);
    for (int i = 0; i < n; i++) {
        if (rows[i].bytes == 0 || rows[i].calls == 0) continue;
        const double mean = (double)rows[i].bytes / (double)rows[i].calls;
        fprintf(out, "\"Bytes of %s\" %ju %.16G %.16G %.16G %.16G\n", rows[i].name,
                (uintmax_t)rows[i].calls, mean, mean, mean, mean * mean * (double)rows[i].calls);
    }
}

static tr_status put_stream(FILE *out, stream *s, tr_err *err)
{
    const tr_reader_region *g = tr_reader_regions(s->r);
    const int n_regions = tr_reader_about_of(s->r)->n_regions;
    char *path = tr_calloc(PATH, 1);
    int n = 0, n_paths = 0;
    flat *rows = make_flat(s, &n);
    if (!rows || !path) {
        free(rows);
        free(path);
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    for (int i = 0; i < n_regions; i++)
        n_paths += s->ran[i] && s->root[i] == s->first && g[i].parent >= 0;
    put_head(out, s, n + n_paths);
    for (int i = 0; i < n; i++)
        put_line(out, rows[i].name, rows[i].calls, rows[i].subrs, rows[i].excl_ns, rows[i].incl_ns,
                 tau_group(rows[i].kind));
    for (int i = 0; i < n_regions; i++) {
        char group[64];
        if (!s->ran[i] || s->root[i] != s->first || g[i].parent < 0) continue;
        tau_path(s, i, path, PATH);
        snprintf(group, sizeof group, "%s|TAU_CALLPATH", tau_group(g[i].kind));
        put_line(out, path, s->cell[i].count, s->subrs[i], s->cell[i].excl_ns, s->cell[i].incl_ns,
                 group);
    }
    put_events(out, rows, n);
    free(rows);
    free(path);
    return TR_OK;
}

/* All streams of a rank. A root that never counted an end has a line too: readers begin with it. */
static tr_status put_rank(const char *folder, tr_reader *r, const int *root, int rank, stream *s,
                          tr_err *err)
{
    const tr_reader_region *g = tr_reader_regions(r);
    const int n = tr_reader_about_of(r)->n_regions;
    tr_status st = TR_OK;
    int thread = 0;

    s->cell = tr_reader_cells(r, rank);
    s->rank = rank;
    memset(s->subrs, 0, (size_t)n * sizeof *s->subrs);
    for (int i = 0; i < n; i++)
        s->ran[i] = s->cell[i].count > 0 || s->cell[i].incl_ns > 0 || g[i].parent < 0;
    for (int i = n - 1; i >= 0; i--)
        if (g[i].parent >= 0) {
            s->subrs[g[i].parent] += s->cell[i].count;
            s->ran[g[i].parent] |= s->ran[i];
        }
    for (int i = 0; i < n && st == TR_OK; i++) {
        char name[64];
        FILE *out = NULL;
        if (root[i] != i) continue;
        s->first = i;
        snprintf(name, sizeof name, "profile.%d.0.%d", rank, thread++);
        st = tr_export_open(&out, folder, name, err);
        if (st != TR_OK) break;
        st = put_stream(out, s, err);
        if (st == TR_OK)
            st = tr_export_close(out, folder, name, err);
        else
            fclose(out);
    }
    return st;
}

/* Readers take every profile.N.0.T of a folder: those that this export does not replace, of a run with more ranks, would be
 * taken for its own. They are somebody's results, so they are not removed. */
static tr_status refuse_others(const char *folder, tr_reader *r, const int *root, tr_err *err)
{
    const tr_reader_about *about = tr_reader_about_of(r);
    tr_status st = TR_OK;
    int n_streams = 0;

    for (int i = 0; i < about->n_regions; i++)
        n_streams += root[i] == i;
    DIR *dir = opendir(folder);
    if (!dir) return TR_OK; /* what is wrong with it is said when a file is opened */
    for (const struct dirent *e; st == TR_OK && (e = readdir(dir));) {
        int rank, node, thread, end = 0;
        if (sscanf(e->d_name, "profile.%d.%d.%d%n", &rank, &node, &thread, &end) != 3 ||
            e->d_name[end])
            continue;
        if (rank < 0 || rank >= about->n_ranks || !tr_reader_has(r, rank) || node != 0 ||
            thread < 0 || thread >= n_streams)
            st = tr_fail(err, TR_E_INPUT,
                         "%s: %s in it is of another profile: remove it or name another folder",
                         folder, e->d_name);
    }
    closedir(dir);
    return st;
}

tr_status tr_export_tau(const char *folder, tr_reader *r, tr_err *err)
{
    const size_t n = (size_t)tr_reader_about_of(r)->n_regions;
    int *root = tr_summary_roots(r);
    stream s = {.r = r, .root = root};
    s.subrs = tr_calloc(n, sizeof *s.subrs);
    s.ran = tr_calloc(n, sizeof *s.ran);
    tr_status st = root && s.subrs && s.ran ? tr_export_folder(folder, err)
                                            : tr_fail(err, TR_E_MEMORY, "out of memory");
    if (st == TR_OK && n == 0)
        st = tr_fail(err, TR_E_INPUT, "%s: no regions in it", tr_reader_about_of(r)->path);
    if (st == TR_OK) st = refuse_others(folder, r, root, err);
    for (int i = 0; i < tr_reader_about_of(r)->n_ranks && st == TR_OK; i++)
        if (tr_reader_has(r, i)) st = put_rank(folder, r, root, i, &s, err);
    free(root);
    free(s.subrs);
    free(s.ran);
    return st;
}
