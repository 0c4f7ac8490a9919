#include <config.h>

#include "command/hang.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/size.h"

enum { FILE_MAX = 4 << 20, WORLD_MAX = 1 << 20, RECORDS_MAX = 4096, TEXT = 160 };

typedef struct record { /* a collective or a message one rank has begun */
    char group[16], op[24];
    int64_t first, members, number, bytes, step, layer, id;
    double begun_s_ago;
    bool done;
} record;

typedef struct report {
    int64_t rank, step, layer;
    char host[64], what[64];
    int64_t waits_for; /* a record's id; 0: for none */
    double silence_s;
    record *record;
    int n_records;
    json_t *others; /* [ranks] what it saw of the ranks of its host */
} report;

struct tr_hang {
    int64_t world;
    report *report; /* in order of rank */
    int n;
};

/* ---- reading ----------------------------------------------------------------------------------------------------- */

/* Of another program's making for all that is known: what is printed holds no control characters. */
static void take_text(char *out, size_t room, const char *s)
{
    snprintf(out, room, "%s", s ? s : "");
    for (char *p = out; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f) *p = '?';
}

static tr_status text_of(const json_t *o, const char *key, char *out, size_t room, tr_err *err)
{
    const char *s = NULL;
    tr_status st = tr_json_string(o, key, &s, NULL, err);

    if (st == TR_OK && !s) return tr_fail(err, TR_E_INPUT, "\"%s\" is missing", key);
    if (st == TR_OK) take_text(out, room, s);
    return st;
}

static tr_status int_of(const json_t *o, const char *key, int64_t min, int64_t max, int64_t *out,
                        tr_err *err)
{
    if (!json_object_get(o, key)) return tr_fail(err, TR_E_INPUT, "\"%s\" is missing", key);
    return tr_json_int(o, key, min, max, out, err);
}

static tr_status read_record(record *r, const json_t *o, tr_err *err)
{
    if (!json_is_object(o)) return tr_fail(err, TR_E_INPUT, "it is no object");
    tr_status st = text_of(o, "group", r->group, sizeof r->group, err);
    if (st == TR_OK) st = text_of(o, "op", r->op, sizeof r->op, err);
    if (st == TR_OK) st = int_of(o, "id", 1, INT64_MAX, &r->id, err);
    if (st == TR_OK) st = int_of(o, "first", 0, WORLD_MAX, &r->first, err);
    if (st == TR_OK) st = int_of(o, "members", 1, WORLD_MAX, &r->members, err);
    if (st == TR_OK) st = int_of(o, "number", 0, INT64_MAX, &r->number, err);
    if (st == TR_OK) st = int_of(o, "bytes", 0, INT64_MAX, &r->bytes, err);
    if (st == TR_OK) st = int_of(o, "step", 0, INT64_MAX, &r->step, err);
    if (st == TR_OK) st = int_of(o, "layer", -1, INT32_MAX, &r->layer, err);
    if (st == TR_OK) st = tr_json_double(o, "begun_s_ago", 0, 1e9, &r->begun_s_ago, err);
    return st == TR_OK ? tr_json_bool(o, "done", &r->done, err) : st;
}

static tr_status read_records(report *r, const json_t *root, tr_err *err)
{
    const json_t *list = json_object_get(root, "collectives");
    const size_t n = json_array_size(list);

    if (!json_is_array(list) || n > RECORDS_MAX)
        return tr_fail(err, TR_E_INPUT, "\"collectives\" is no list of at most %d", RECORDS_MAX);
    r->record = tr_calloc(n ? n : 1, sizeof *r->record);
    if (!r->record) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (size_t i = 0; i < n; i++) {
        tr_status st = read_record(&r->record[i], json_array_get(list, i), err);
        if (st != TR_OK) return tr_within(err, "collective %zu of the list", i), st;
        r->n_records++;
    }
    return TR_OK;
}

static tr_status read_head(report *r, int64_t *world, const json_t *root, tr_err *err)
{
    int64_t version = 0;
    tr_status st = tr_json_int(root, "trireme_hang", 0, INT32_MAX, &version, err);

    if (st != TR_OK || version != 1)
        return tr_fail(err, TR_E_INPUT, "not a hang report of this version of trireme");
    st = int_of(root, "world", 1, WORLD_MAX, world, err);
    if (st == TR_OK) st = int_of(root, "rank", 0, *world - 1, &r->rank, err);
    if (st == TR_OK) st = int_of(root, "step", 0, INT64_MAX, &r->step, err);
    if (st == TR_OK) st = int_of(root, "layer", -1, INT32_MAX, &r->layer, err);
    if (st == TR_OK) st = text_of(root, "host", r->host, sizeof r->host, err);
    if (st == TR_OK) st = text_of(root, "what", r->what, sizeof r->what, err);
    if (st == TR_OK) st = tr_json_int(root, "waits_for", 1, INT64_MAX, &r->waits_for, err);
    return st == TR_OK ? tr_json_double(root, "silence_s", 0, 1e9, &r->silence_s, err) : st;
}

static tr_status read_report(report *r, int64_t *world, const char *path, tr_err *err)
{
    json_t *root = NULL;
    tr_status st = tr_json_load(&root, path, FILE_MAX, err);

    if (st != TR_OK) return st;
    st = read_head(r, world, root, err);
    if (st == TR_OK) st = read_records(r, root, err);
    r->others = json_incref(json_object_get(root, "ranks"));
    json_decref(root);
    if (st != TR_OK) tr_within(err, "%s", path);
    return st;
}

static int by_rank(const void *a, const void *b)
{
    const report *x = a, *y = b;
    return (x->rank > y->rank) - (x->rank < y->rank);
}

tr_status tr_hang_read(tr_hang **out, char *const *path, int n_paths, tr_err *err)
{
    tr_status st = TR_OK;
    tr_hang *h = calloc(1, sizeof *h);

    *out = NULL;
    if (h) h->report = tr_calloc((size_t)(n_paths > 0 ? n_paths : 1), sizeof *h->report);
    if (!h || !h->report) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < n_paths && st == TR_OK; i++) {
        int64_t world = 0;
        h->n++;
        st = read_report(&h->report[i], &world, path[i], err);
        if (st == TR_OK && i && world != h->world)
            st = tr_fail(err, TR_E_INPUT, "%s: of a job of %lld ranks, not %lld as the others",
                         path[i], (long long)world, (long long)h->world);
        for (int j = 0; j < i && st == TR_OK; j++)
            if (h->report[j].rank == h->report[i].rank)
                st = tr_fail(err, TR_E_INPUT, "%s and %s are both of rank %lld", path[j], path[i],
                             (long long)h->report[i].rank);
        h->world = world;
    }
    if (st == TR_OK) {
        qsort(h->report, (size_t)h->n, sizeof *h->report, by_rank);
        *out = h;
        h = NULL;
    }
    tr_hang_free(h);
    return st;
}

void tr_hang_free(tr_hang *h)
{
    if (!h) return;
    for (int i = 0; i < h->n; i++) {
        free(h->report[i].record);
        json_decref(h->report[i].others);
    }
    free(h->report);
    free(h);
}

/* ---- explaining -------------------------------------------------------------------------------------------------- */

static bool is_letter(const record *r)
{
    return !strcmp(r->op, "send") || !strcmp(r->op, "recv");
}

static bool same_group(const record *a, const record *b)
{
    return !strcmp(a->group, b->group) && a->first == b->first && a->members == b->members;
}

/* This rank's record of the same collective, whatever it is there; NULL: none. */
static const record *match(const report *r, const record *c)
{
    for (int i = 0; i < r->n_records; i++)
        if (!is_letter(&r->record[i]) && same_group(&r->record[i], c) &&
            r->record[i].number == c->number)
            return &r->record[i];
    return NULL;
}

/* Where a rank without a record of `c` stands. */
typedef enum place { NO_MEMBER, BEHIND, PAST } place;

static place place_of(const report *r, const record *c)
{
    place p = NO_MEMBER;

    for (int i = 0; i < r->n_records; i++) {
        if (is_letter(&r->record[i]) || !same_group(&r->record[i], c)) continue;
        if (r->record[i].number >= c->number) return PAST; /* so long ago that it is not kept */
        p = BEHIND;
    }
    return p;
}

static bool differs(const record *a, const record *b)
{
    static const char *const alike[] = {"all_reduce", "all_max", "broadcast"};

    if (strcmp(a->op, b->op)) return true;
    for (size_t i = 0; i < sizeof alike / sizeof *alike; i++)
        if (!strcmp(a->op, alike[i])) return a->bytes != b->bytes;
    return false; /* of the others each member gives as much as it likes */
}

/* Members that are in `c`, those that are there with something else, and those known to be behind. */
typedef struct verdict {
    const record *c;
    int n_in, n_other, n_behind;
} verdict;

static verdict judge(const tr_hang *h, const record *c)
{
    verdict v = {.c = c};

    for (int i = 0; i < h->n; i++) {
        const record *own = match(&h->report[i], c);
        const place p = place_of(&h->report[i], c);
        if (own && differs(own, c))
            v.n_other++;
        else if (own || p == PAST)
            v.n_in++;
        else
            v.n_behind += p == BEHIND;
    }
    return v;
}

/* Ranks disagree about it, or somebody waits for members that have not come. */
static bool is_wrong(const verdict *v)
{
    return v->n_other > 0 || v->n_behind > 0 || v->n_in < (int)v->c->members;
}

static bool is_earlier(const verdict *a, const verdict *b)
{
    if (!b->c) return true;
    if ((a->n_other > 0) != (b->n_other > 0))
        return a->n_other > 0; /* a mismatch is the cause of what follows */
    if (a->c->step != b->c->step) return a->c->step < b->c->step;
    return a->c->begun_s_ago > b->c->begun_s_ago;
}

/* The first collective that is not over on somebody and wrong; c NULL: none. */
static verdict find_first(const tr_hang *h)
{
    verdict first = {.c = NULL};

    for (int i = 0; i < h->n; i++)
        for (int j = 0; j < h->report[i].n_records; j++) {
            const record *c = &h->report[i].record[j];
            if (is_letter(c) || c->done) continue;
            const verdict v = judge(h, c);
            if (is_wrong(&v) && is_earlier(&v, &first)) first = v;
        }
    return first;
}

static const record *waited(const report *r)
{
    for (int i = 0; i < r->n_records; i++)
        if (r->record[i].id == r->waits_for) return &r->record[i];
    return NULL;
}

static void describe(const report *r, char *text, size_t room)
{
    char layer[32] = "", what[80] = "";
    const record *w = waited(r);

    if (r->layer >= 0) snprintf(layer, sizeof layer, ", layer %lld", (long long)r->layer);
    if (r->what[0]) snprintf(what, sizeof what, ", %s", r->what);
    int n = snprintf(text, room, "step %lld%s%s", (long long)r->step, layer, what);
    if (n < 0 || (size_t)n >= room) return;
    if (w)
        snprintf(text + n, room - (size_t)n, "; waits for %s number %lld of %s", w->op,
                 (long long)w->number, w->group);
    else
        snprintf(text + n, room - (size_t)n, "; waits for nobody");
}

static const report *report_of(const tr_hang *h, int64_t rank)
{
    for (int i = 0; i < h->n; i++)
        if (h->report[i].rank == rank) return &h->report[i];
    return NULL;
}

/* What ranks of its host saw of one that has left no report. False: nobody saw anything. */
static bool seen(const tr_hang *h, int64_t rank, char *text, size_t room)
{
    for (int i = 0; i < h->n; i++) {
        const json_t *o;
        size_t k;
        json_array_foreach(h->report[i].others, k, o)
        {
            const char *state = json_string_value(json_object_get(o, "state"));
            char last[TEXT];
            if (json_integer_value(json_object_get(o, "rank")) != rank ||
                !json_is_integer(json_object_get(o, "rank")))
                continue;
            take_text(last, sizeof last, state);
            snprintf(text, room, "%s; last seen by rank %lld: %s",
                     json_is_false(json_object_get(o, "responds")) ? "does not respond"
                                                                   : "left no report",
                     (long long)h->report[i].rank, last);
            return true;
        }
    }
    return false;
}

static void print_silent(const tr_hang *h, FILE *out)
{
    enum { MOST = 32 };
    char text[2 * TEXT];
    int n = 0;

    for (int64_t rank = 0; rank < h->world; rank++) {
        if (report_of(h, rank)) continue;
        if (n++ >= MOST) continue;
        if (!seen(h, rank, text, sizeof text))
            snprintf(text, sizeof text, "no report, and nobody saw it");
        fprintf(out, "  rank %lld: %s\n", (long long)rank, text);
    }
    if (n > MOST) fprintf(out, "  and %d more ranks without a report\n", n - MOST);
}

static void print_verdict(const tr_hang *h, const verdict *v, FILE *out)
{
    const record *c = v->c;
    const int absent = (int)c->members - v->n_in - v->n_other - v->n_behind;
    char text[2 * TEXT];

    fprintf(out, "\nThe first collective on which ranks disagree: %s number %lld of %s", c->op,
            (long long)c->number, c->group);
    fprintf(out, " (%lld members from rank %lld on, %lld bytes, step %lld", (long long)c->members,
            (long long)c->first, (long long)c->bytes, (long long)c->step);
    if (c->layer >= 0) fprintf(out, ", layer %lld", (long long)c->layer);
    fputs(")\n", out);
    for (int i = 0; i < h->n; i++) {
        const report *r = &h->report[i];
        const record *own = match(r, c);
        if (own && differs(own, c))
            fprintf(out, "  rank %lld on %s is in another one: %s of %lld bytes\n",
                    (long long)r->rank, r->host, own->op, (long long)own->bytes);
        else if (own)
            fprintf(out, "  rank %lld on %s %s, begun %.1f s before its report\n",
                    (long long)r->rank, r->host, own->done ? "is through" : "is in it",
                    own->begun_s_ago);
    }
    for (int i = 0; i < h->n; i++) {
        if (match(&h->report[i], c) || place_of(&h->report[i], c) != BEHIND) continue;
        describe(&h->report[i], text, sizeof text);
        fprintf(out, "  missing: rank %lld on %s: %s\n", (long long)h->report[i].rank,
                h->report[i].host, text);
    }
    if (absent > 0)
        fprintf(out, "  missing: %d member%s of which no report says anything%s\n", absent,
                absent == 1 ? "" : "s",
                h->n < h->world ? ": look at the ranks without one above" : "");
}

void tr_hang_explain(const tr_hang *h, FILE *out)
{
    char text[2 * TEXT];

    fprintf(out, "A hang of a job of %lld rank%s; reports of %d\n", (long long)h->world,
            h->world == 1 ? "" : "s", h->n);
    for (int i = 0; i < h->n; i++) {
        describe(&h->report[i], text, sizeof text);
        fprintf(out, "  rank %lld on %s: %s\n", (long long)h->report[i].rank, h->report[i].host,
                text);
    }
    print_silent(h, out);
    const verdict v = find_first(h);
    if (v.c)
        print_verdict(h, &v, out);
    else if (h->n < h->world)
        fputs("\nThe reports disagree on no collective: look at the ranks without one above.\n",
              out);
    else
        fputs("\nThe reports disagree on no collective: see who waits for nobody.\n", out);
}
