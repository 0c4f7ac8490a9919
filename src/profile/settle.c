#include <config.h>

#include "profile/settle.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "profile/profile_priv.h"

enum { REGIONS_MAX = 1 << 20 };

/* ---- one tree for all ------------------------------------------------------------------------------------------------ */

typedef struct forest {
    tr_prof_region *region; /* [n] of all ranks heard so far */
    int n, room;
    uint32_t *row;     /* [p->n_regions] where this rank's own are, UINT32_MAX: not there yet */
    int *first, *next; /* [room] children; first of roots: [room] */
} forest;

static tr_status broadcast(tr_comm *control, int root, void *data, size_t bytes, tr_err *err)
{
    tr_ticket ticket = {0};
    tr_status st = tr_comm_broadcast(control, root, data, bytes, &ticket, err);
    return st == TR_OK ? tr_comm_wait(control, TR_LANE_MAIN, ticket, err) : st;
}

static bool same(const tr_prof_region *a, const tr_prof_region *b)
{
    return a->layer == b->layer && a->group == b->group && a->kind == b->kind &&
           memcmp(a->name, b->name, sizeof a->name) == 0;
}

static bool make_room(forest *f, int n)
{
    if (n <= f->room) return true;
    const size_t room = (size_t)(n > 2 * f->room ? n : 2 * f->room);
    void *region = realloc(f->region, room * sizeof *f->region);
    if (region) f->region = region;
    void *first = realloc(f->first, (room + 1) * sizeof *f->first);
    if (first) f->first = first;
    void *next = realloc(f->next, room * sizeof *f->next);
    if (next) f->next = next;
    if (!region || !first || !next) return false;
    if (!f->room) f->first[0] = -1;
    f->room = (int)room;
    return true;
}

/* The row of a region below `parent` (a row, -1: a root), added where there is none: first[] is one up, for the roots. */
static int find_or_add(forest *f, const tr_prof_region *r, int parent)
{
    int *link = &f->first[parent + 1];

    for (; *link >= 0; link = &f->next[*link])
        if (same(&f->region[*link], r)) return *link;
    const int row = f->n++;
    *link = row;
    f->next[row] = -1;
    f->first[row + 1] = -1;
    f->region[row] = *r;
    f->region[row].id = (uint32_t)row;
    f->region[row].parent = parent;
    return row;
}

/* A rank's table into the forest; row[]: where its regions are. */
static tr_status merge(forest *f, const tr_prof_region *region, int n, uint32_t *row, tr_err *err)
{
    if (!make_room(f, f->n + n)) return tr_fail(err, TR_E_MEMORY, "out of memory for regions");
    for (int i = 0; i < n; i++) {
        const int parent = region[i].parent;
        if (parent >= i || parent < -1)
            return tr_fail(err, TR_E_COMM, "region %d of another rank lies in region %d", i,
                           parent);
        row[i] = (uint32_t)find_or_add(f, &region[i], parent < 0 ? -1 : (int)row[parent]);
    }
    return TR_OK;
}

/* Whether all of this rank's regions are in the forest. */
static bool contained(const forest *f, const tr_profile *p)
{
    for (int i = 0; i < p->n_regions; i++) {
        const int parent = p->region[i].parent < 0 ? -1 : (int)f->row[p->region[i].parent];
        int at = f->n ? f->first[parent + 1] : -1;
        while (at >= 0 && !same(&f->region[at], &p->region[i]))
            at = f->next[at];
        if (at < 0) return false;
        f->row[i] = (uint32_t)at;
    }
    return true;
}

/* Whether any rank says so: a rank that cannot go on must not leave the others in a broadcast. */
static tr_status anybody(tr_comm *control, bool here, bool *there, tr_err *err)
{
    uint64_t word = here;
    tr_status st = tr_comm_max_word(control, &word, err);

    *there = word != 0;
    return st;
}

/* The table of one rank to all. */
static tr_status spread(forest *f, const tr_profile *p, tr_comm *control, int root, tr_err *err)
{
    tr_status st = TR_OK;
    tr_prof_region *region = NULL;
    uint32_t *row = NULL;
    bool short_of = false;
    uint64_t n = tr_comm_rank(control) == root ? (uint64_t)p->n_regions : 0;

    st = broadcast(control, root, &n, sizeof n, err);
    if (st != TR_OK) goto done;
    if (n > REGIONS_MAX) {
        st = tr_fail(err, TR_E_COMM, "rank %d has %ju regions", root, (uintmax_t)n);
        goto done;
    }
    region = tr_calloc((size_t)n, sizeof *region);
    row = tr_calloc((size_t)n, sizeof *row);
    st = anybody(control, !region || !row, &short_of, err);
    if (st == TR_OK && short_of) st = tr_fail(err, TR_E_MEMORY, "out of memory for regions");
    if (st != TR_OK) goto done;
    if (tr_comm_rank(control) == root) memcpy(region, p->region, (size_t)n * sizeof *region);
    st = broadcast(control, root, region, (size_t)n * sizeof *region, err);
    if (st == TR_OK) st = merge(f, region, (int)n, row, err);

done:
    free(region);
    free(row);
    return st;
}

/* Whoever has a region that nobody has told of yet tells all it has, the lowest rank first: as many rounds as there are
 * different tables, which is about one for each pipeline stage. mine: whether this rank can take part; one that cannot ends it
 * for all. */
static tr_status agree(forest *f, const tr_profile *p, tr_comm *control, tr_status mine,
                       tr_err *err)
{
    const uint64_t size = (uint64_t)tr_comm_size(control), rank = (uint64_t)tr_comm_rank(control);
    tr_err later;

    for (;;) {
        const bool speaks = mine == TR_OK && tr_profile_well(p) && !contained(f, p);
        uint64_t speaker = mine != TR_OK ? UINT64_MAX : speaks ? size - rank : 0;
        tr_status st = tr_comm_max_word(control, &speaker, mine == TR_OK ? err : &later);
        if (mine != TR_OK) return mine;
        if (st != TR_OK || !speaker) return st;
        if (speaker > size)
            return tr_fail(err, TR_E_MEMORY, "another rank cannot bring its regions in");
        mine = spread(f, p, control, (int)(size - speaker), err);
    }
}

/* ---- what was written before ------------------------------------------------------------------------------------------ */

typedef struct correction {
    const tr_dataset *d;
    const uint32_t *row; /* NULL: regions stay */
    double drift;        /* 0: times stay */
    int64_t begun;
} correction;

static int64_t moved(const correction *c, int64_t t)
{
    return t + (int64_t)llround(c->drift * (double)(t - c->begun));
}

static void correct(void *ctx, void *rows, size_t n)
{
    const correction *c = ctx;
    const tr_record_type *r = c->d->record;

    for (size_t i = 0; i < n; i++) {
        if (!r) {
            ((int64_t *)rows)[i] = moved(c, ((int64_t *)rows)[i]);
            continue;
        }
        char *record = (char *)rows + i * r->bytes;
        for (int k = 0; k < r->n_fields && c->drift != 0; k++) {
            int64_t t;
            if (!r->field[k].is_time) continue;
            memcpy(&t, record + r->field[k].offset, sizeof t);
            t = moved(c, t);
            memcpy(record + r->field[k].offset, &t, sizeof t);
        }
        if (c->row && c->d == &tr_datasets[TR_D_TRACE]) {
            tr_prof_trace *e = (tr_prof_trace *)(void *)record;
            e->region = c->row[e->region];
        }
    }
}

static bool has_times(const tr_dataset *d)
{
    bool times = (d->flags & TR_DATASET_TIME) != 0;
    for (int k = 0; d->record && k < d->record->n_fields; k++)
        times = times || d->record->field[k].is_time;
    return times;
}

static tr_status correct_all(tr_profile *p, correction *c, tr_err *err)
{
    char path[128];
    tr_status st = TR_OK;

    for (int i = 0; i < TR_N_DATASETS && st == TR_OK && c->drift != 0; i++) {
        c->d = &tr_datasets[i];
        if (!has_times(c->d) || (c->d->flags & TR_DATASET_NAMED) || i == TR_D_COUNTER_TIME)
            continue;
        st = tr_prof_file_change(p->file, c->d, NULL, correct, c, err);
    }
    c->d = &tr_datasets[TR_D_COUNTER_TIME];
    for (int i = 0; i < p->n_sources && st == TR_OK && c->drift != 0; i++) {
        snprintf(path, sizeof path, "/counters/%s/time", p->source[i].source);
        st = tr_prof_file_change(p->file, c->d, path, correct, c, err);
    }
    c->d = &tr_datasets[TR_D_TRACE];
    for (int i = 0; i < p->n_streams && st == TR_OK && (c->row || c->drift != 0); i++) {
        snprintf(path, sizeof path, "/trace/%s", p->stream[i].name);
        st = tr_prof_file_change(p->file, c->d, path, correct, c, err);
    }
    return st;
}

/* This rank's rows become the forest's. */
static tr_status adopt(tr_profile *p, const forest *f, tr_err *err)
{
    tr_prof_region *region = tr_calloc((size_t)f->n, sizeof *region);
    void *column = tr_calloc((size_t)f->n, sizeof(uint64_t));

    if (!region || !column) {
        free(region);
        free(column);
        return tr_fail(err, TR_E_MEMORY, "out of memory for regions");
    }
    memcpy(region, f->region, (size_t)f->n * sizeof *region);
    for (int k = 0; k < p->n_streams; k++)
        for (int i = 0; i < p->stream[k].n_nodes; i++)
            p->stream[k].row[i] = f->row[p->stream[k].row[i]];
    free(p->region);
    free(p->column);
    p->region = region;
    p->column = column;
    p->n_regions = p->region_room = f->n;
    /* The tables stay as they were at the stop: what settling itself moves between ranks is no part of the run. */
    return tr_profile_write_tables(p, err);
}

static tr_status apply(tr_profile *p, const forest *f, double drift_ppb, uint64_t begun_ns,
                       tr_err *err)
{
    correction c = {.begun = tr_profile_time(p, begun_ns)};
    bool moves = f->n != p->n_regions;
    const double gained = drift_ppb * 1e-9 * (double)(tr_now_ns() - begun_ns);

    for (int i = 0; i < p->n_regions; i++)
        moves = moves || f->row[i] != (uint32_t)i;
    if (moves) c.row = f->row;
    if (fabs(gained) > 1000) c.drift = drift_ppb * 1e-9;
    tr_status st = correct_all(p, &c, err);
    if (st == TR_OK && moves) st = adopt(p, f, err);
    if (st == TR_OK) st = tr_prof_file_number(p->file, "/", "clock_corrected", c.drift != 0, err);
    return st;
}

tr_status tr_profile_settle(tr_profile *p, tr_comm *control, double drift_ppb, uint64_t begun_ns,
                            tr_err *err)
{
    forest f = {0};
    tr_err why = {0};
    tr_status st = TR_OK;

    f.row = tr_calloc(p ? (size_t)p->n_regions : 0, sizeof *f.row);
    if (!f.row || !make_room(&f, 64)) st = tr_fail(err, TR_E_MEMORY, "out of memory for regions");
    st = agree(&f, p, control, st, err);
    if (st == TR_OK && tr_profile_well(p)) {
        contained(&f, p);
        tr_profile_survives(p, apply(p, &f, drift_ppb, begun_ns, &why), &why);
    }
    free(f.region);
    free(f.row);
    free(f.first);
    free(f.next);
    return st;
}
