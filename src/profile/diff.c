#include <config.h>

#include "profile/diff.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/figures.h"
#include "profile/summary.h"

enum { NAME = 512 };

/* A region's name or path in both profiles. */
typedef struct row {
    char *name;
    double count[2], ns[2], bytes[2]; /* of a rank, the mean */
    bool has[2];
} row;

static double change(const row *r)
{
    return r->ns[1] - r->ns[0];
}

static int by_key(const void *a, const void *b)
{
    return strcmp(((const row *)a)->name, ((const row *)b)->name);
}

/* What changed most first; of what did not change, what takes longest. */
static int most_changed(const void *a, const void *b)
{
    const row *x = a, *y = b;
    const double cx = fabs(change(x)), cy = fabs(change(y));
    if (cx != cy) return cx < cy ? 1 : -1;
    if (x->ns[0] != y->ns[0]) return x->ns[0] < y->ns[0] ? 1 : -1;
    return strcmp(x->name, y->name);
}

/* A thread's sleep: own time of the streams beside the main one outside their work. */
static bool is_sleep(const tr_reader_region *g, int root, int main_root)
{
    return root != main_root && (g->parent < 0 || g->kind == TR_KIND_WAIT);
}

/* Rows of one profile, not yet joined: one per region that is no sleep. */
static tr_status add_rows(row *rows, size_t *n, const tr_reader *r, int side, bool by_path,
                          double per, tr_err *err)
{
    const tr_reader_about *about = tr_reader_about_of(r);
    const int main_root = tr_summary_main_root(r);
    const double ranks = about->n_present;
    int *root = tr_summary_roots(r);
    bool failed = !root;
    char text[NAME];
    for (int i = 0; !failed && i < about->n_regions; i++) {
        row *to = &rows[*n];
        if (is_sleep(&tr_reader_regions(r)[i], root[i], main_root)) continue;
        if (by_path)
            tr_reader_region_path(r, i, text, sizeof text);
        else
            snprintf(text, sizeof text, "%s", tr_reader_regions(r)[i].name);
        *to = (row){.name = strdup(text)};
        failed = !to->name;
        if (failed) break;
        (*n)++;
        to->has[side] = true;
        for (int k = 0; k < about->n_ranks; k++) {
            const tr_reader_cell *c = &tr_reader_cells(r, k)[i];
            to->count[side] += (double)c->count;
            to->ns[side] += (double)c->excl_ns;
            to->bytes[side] += (double)c->bytes;
        }
        /* One division, so that equal runs on different numbers of ranks are equal. */
        to->count[side] /= ranks * per;
        to->ns[side] /= ranks * per;
        to->bytes[side] /= ranks * per;
    }
    free(root);
    return !failed ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
}

/* Sorted rows of the same name into the first of them. */
static size_t join_rows(row *rows, size_t n)
{
    size_t kept = 0;
    for (size_t i = 0; i < n; i++) {
        row *last = kept ? &rows[kept - 1] : NULL;
        if (!last || strcmp(last->name, rows[i].name) != 0) {
            rows[kept++] = rows[i];
            continue;
        }
        for (int side = 0; side < 2; side++) {
            last->count[side] += rows[i].count[side];
            last->ns[side] += rows[i].ns[side];
            last->bytes[side] += rows[i].bytes[side];
            last->has[side] |= rows[i].has[side];
        }
        free(rows[i].name);
    }
    return kept;
}

/* "1.25", "-" where there is nothing to divide by, "new", "gone". */
static void ratio(char *text, size_t n, const row *r)
{
    if (!r->has[0] || (r->ns[0] <= 0 && r->ns[1] > 0))
        snprintf(text, n, "new");
    else if (!r->has[1])
        snprintf(text, n, "gone");
    else if (r->ns[0] <= 0)
        snprintf(text, n, "1.000");
    else
        snprintf(text, n, "%.3f", r->ns[1] / r->ns[0]);
}

static void print_csv(FILE *out, const row *rows, size_t n)
{
    fputs("region,count_a,count_b,time_a_ns,time_b_ns,change_ns,ratio,bytes_a,bytes_b\n", out);
    for (size_t i = 0; i < n; i++) {
        const row *r = &rows[i];
        char text[32];
        ratio(text, sizeof text, r);
        fputc('"', out);
        for (const char *p = r->name; *p; p++) {
            if (*p == '"') fputc('"', out);
            fputc(*p, out);
        }
        fprintf(out, "\",%.17g,%.17g,%.17g,%.17g,%.17g,%s,%.17g,%.17g\n", r->count[0], r->count[1],
                r->ns[0], r->ns[1], change(r), text, r->bytes[0], r->bytes[1]);
    }
}

static void print_row(FILE *out, const row *r, double whole)
{
    char text[32];
    const size_t length = strlen(r->name);
    ratio(text, sizeof text, r);
    /* The end of a long path says more than its beginning. */
    fprintf(out, "  %s%-*s %10s %10s %11s %7s %6.1f%%\n", length > 38 ? ".." : "",
            length > 38 ? 36 : 38, length > 38 ? r->name + length - 36 : r->name,
            tr_figure_time(r->ns[0] * 1e-9).s, tr_figure_time(r->ns[1] * 1e-9).s,
            tr_figure_time(change(r) * 1e-9).s, text, whole > 0 ? 100 * change(r) / whole : 0);
}

static void print_table(FILE *out, tr_reader *const both[2], const row *rows, size_t n,
                        const tr_diff_options *o)
{
    static const char *const per[] = {"run", "step", "token"};
    double sum[2] = {0};
    size_t n_rows = o->n_rows > 0 && (size_t)o->n_rows < n ? (size_t)o->n_rows : n;
    for (int side = 0; side < 2; side++) {
        const tr_reader_about *a = tr_reader_about_of(both[side]);
        fprintf(out, "%c: %s, %d of %d ranks\n", 'A' + side, a->path, a->n_present, a->n_ranks);
        for (size_t i = 0; tr_reader_note(both[side], i); i++)
            fprintf(out, "   note: %s\n", tr_reader_note(both[side], i));
        for (size_t i = 0; i < n; i++)
            sum[side] += rows[i].ns[side];
    }
    fprintf(out, "\n  %-38s %10s %10s %11s %7s %7s\n", "REGION (own time of a rank)", "A", "B",
            "B - A", "B / A", "of A");
    for (size_t i = 0; i < n_rows; i++)
        print_row(out, &rows[i], sum[0]);
    if (n_rows < n) fprintf(out, "  ... %zu more (--top 0)\n", n - n_rows);
    const row all = {.name = "all", .ns = {sum[0], sum[1]}, .has = {true, true}};
    print_row(out, &all, sum[0]);
    fprintf(out, "  > Per %s", per[o->per]);
    if (n > 0 && change(&rows[0]) != 0)
        fprintf(out, ": B takes %s %s; most of the change is %s.\n",
                tr_figure_time(fabs(sum[1] - sum[0]) * 1e-9).s, sum[1] > sum[0] ? "more" : "less",
                rows[0].name);
    else
        fputs(": no region took another time.\n", out);
}

/* What times are divided by. */
static tr_status divisor(double *per, tr_reader *r, const tr_diff_options *o, tr_err *err)
{
    tr_summary s;
    *per = 1;
    if (o->per == TR_DIFF_RUN) return TR_OK;
    tr_status st = tr_summary_make(&s, r, err);
    if (st != TR_OK) return st;
    *per = o->per == TR_DIFF_STEP ? (double)s.steps : s.tokens_in + s.tokens_out;
    tr_summary_free(&s);
    if (*per > 0) return TR_OK;
    return tr_fail(err, TR_E_INPUT, "%s: no %s in it to divide by", tr_reader_about_of(r)->path,
                   o->per == TR_DIFF_STEP ? "steps" : "tokens");
}

tr_status tr_profile_diff(FILE *out, tr_reader *a, tr_reader *b, const tr_diff_options *o,
                          tr_err *err)
{
    tr_reader *const both[2] = {a, b};
    const size_t room =
        (size_t)tr_reader_about_of(a)->n_regions + (size_t)tr_reader_about_of(b)->n_regions;
    row *rows = tr_calloc(room, sizeof *rows);
    tr_status st = rows ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");
    size_t n = 0;
    for (int side = 0; side < 2 && st == TR_OK; side++) {
        double per;
        st = divisor(&per, both[side], o, err);
        if (st == TR_OK) st = add_rows(rows, &n, both[side], side, o->by_path, per, err);
    }
    if (st == TR_OK) {
        qsort(rows, n, sizeof *rows, by_key);
        n = join_rows(rows, n);
        qsort(rows, n, sizeof *rows, most_changed);
        if (o->csv)
            print_csv(out, rows, n);
        else
            print_table(out, both, rows, n, o);
    }
    for (size_t i = 0; rows && i < n; i++)
        free(rows[i].name);
    free(rows);
    return st;
}
