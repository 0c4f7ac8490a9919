#include <config.h>

#include "text/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/size.h"
#include "text/tokenizer_priv.h"
#include "text/utf8.h"

/* The piece cache: direct-mapped, so it is bounded and needs no eviction rule. Words of natural
 * text fit its records; longer pieces are merged anew each time. 1.6 MB per encoder. */
enum {
    CACHE_RECORDS = 1 << 14,
    CACHE_BYTES = 30,
    CACHE_IDS = 16,
    TEXT_KEPT = 1 << 20, /* larger buffers are given back after each text */
};

typedef struct record {
    uint8_t n, n_ids; /* n 0: empty */
    char piece[CACHE_BYTES];
    int32_t id[CACHE_IDS];
} record;

struct tr_encoder {
    const tr_tokenizer *t;
    tr_pretoken_scratch *pretoken;
    tr_bpe *bpe;
    record *cache; /* [CACHE_RECORDS] */
    char *text;    /* the repaired text */
    size_t text_cap;
    tr_stretch *stretches;
    size_t stretch_cap;
    tr_cuts pass, cuts;
    tr_ids ids; /* what the text under way has given so far */
};

tr_encoder *tr_encoder_create(const tr_tokenizer *t)
{
    tr_encoder *e = calloc(1, sizeof *e);

    if (!e) return NULL;
    e->t = t;
    e->pretoken = tr_pretoken_scratch_create();
    e->bpe = tr_bpe_create();
    e->cache = calloc(CACHE_RECORDS, sizeof *e->cache);
    if (!e->pretoken || !e->bpe || !e->cache) {
        tr_encoder_free(e);
        return NULL;
    }
    return e;
}

static void free_buffers(tr_encoder *e)
{
    free(e->text);
    free(e->stretches);
    free(e->pass.cut);
    free(e->cuts.cut);
    e->text = NULL;
    e->stretches = NULL;
    e->pass = e->cuts = (tr_cuts){0};
    e->text_cap = e->stretch_cap = 0;
}

void tr_encoder_free(tr_encoder *e)
{
    if (!e) return;
    free_buffers(e);
    tr_pretoken_scratch_free(e->pretoken);
    tr_bpe_free(e->bpe);
    free(e->cache);
    free(e->ids.id);
    free(e);
}

/* ---- pieces to ids --------------------------------------------------------------------------- */

static bool encode_piece(tr_encoder *e, const char *piece, size_t n)
{
    const tr_tokenizer *t = e->t;
    int32_t whole = tr_tokenizer_piece(t, piece, n);

    if (whole >= 0) return tr_ids_append(&e->ids, &whole, 1);
    return tr_bpe_piece(e->bpe, &t->merges, t->byte_id, piece, n, &e->ids);
}

/* A tr_piece_sink. */
static bool piece_to_ids(void *ctx, const char *piece, size_t n)
{
    tr_encoder *e = ctx;

    if (n > CACHE_BYTES) return encode_piece(e, piece, n);
    record *r = &e->cache[tr_hash64(piece, n, 0) & (CACHE_RECORDS - 1)];
    if (r->n == n && memcmp(r->piece, piece, n) == 0)
        return tr_ids_append(&e->ids, r->id, r->n_ids);

    size_t before = e->ids.n;
    if (!encode_piece(e, piece, n)) return false;
    size_t n_ids = e->ids.n - before;
    if (n_ids > CACHE_IDS) return true;
    r->n = (uint8_t)n;
    r->n_ids = (uint8_t)n_ids;
    memcpy(r->piece, piece, n);
    memcpy(r->id, e->ids.id + before, n_ids * sizeof *r->id);
    return true;
}

/* ---- segments to text ------------------------------------------------------------------------ */

/* Room for the repaired text and the stretches. 2^31 bytes are the limit of the merge tables'
 * positions. */
static tr_status reserve(tr_encoder *e, const tr_segment *segments, size_t n_segments, tr_err *err)
{
    size_t n = 0, room, bytes;

    for (size_t i = 0; i < n_segments; i++)
        if (!tr_add(&n, n, segments[i].n)) n = SIZE_MAX;
    if (n > INT32_MAX / 3)
        return tr_fail(err, TR_E_INPUT, "a text of %zu bytes, at most %d are encoded", n,
                       INT32_MAX / 3);
    room = 4 * n + 1; /* the text as it came, and three bytes of U+FFFD for each of its bytes */
    if (room > e->text_cap) {
        free(e->text);
        e->text_cap = 0;
        e->text = malloc(room);
        if (!e->text) return tr_fail(err, TR_E_MEMORY, "out of memory");
        e->text_cap = room;
    }
    if (n_segments > e->stretch_cap) {
        free(e->stretches);
        e->stretches = NULL;
        e->stretch_cap = 0;
        if (!tr_mul(&bytes, n_segments, sizeof *e->stretches) || !(e->stretches = malloc(bytes)))
            return tr_fail(err, TR_E_MEMORY, "out of memory");
        e->stretch_cap = n_segments;
    }
    return TR_OK;
}

/* Join the segments into e->text, repaired; neighbours of the same kind become one stretch first,
 * so that a character or a token cut in two is found. Returns the text's length. */
static size_t join(tr_encoder *e, const tr_segment *segments, size_t n_segments,
                   size_t *n_stretches)
{
    size_t n = 0, raw = 0;

    for (size_t i = 0; i < n_segments; i++)
        raw += segments[i].n;
    char *from = e->text + 3 * raw; /* the joined text stands at the end of the buffer */
    *n_stretches = 0;
    for (size_t i = 0, k = 0; i < n_segments; i = k) {
        size_t run = 0;
        for (k = i; k < n_segments && segments[k].literal == segments[i].literal; k++) {
            if (segments[k].n) memcpy(from + run, segments[k].text, segments[k].n);
            run += segments[k].n;
        }
        n += tr_utf8_repair(from, run, e->text + n);
        e->stretches[(*n_stretches)++] = (tr_stretch){n, segments[i].literal};
    }
    return n;
}

/* ---- encoding -------------------------------------------------------------------------------- */

static void trim(tr_encoder *e)
{
    size_t cut = sizeof *e->cuts.cut;

    if (e->text_cap > TEXT_KEPT || e->stretch_cap > TEXT_KEPT / sizeof *e->stretches ||
        e->pass.cap > TEXT_KEPT / cut || e->cuts.cap > TEXT_KEPT / cut)
        free_buffers(e);
    tr_bpe_trim(e->bpe);
}

tr_status tr_encode(tr_encoder *e, const tr_segment *segments, size_t n_segments, int32_t **ids,
                    size_t *n_ids, tr_err *err)
{
    const tr_tokenizer *t = e->t;
    size_t n_stretches;
    tr_status st;

    *ids = NULL;
    *n_ids = 0;
    e->ids.n = 0;
    st = reserve(e, segments, n_segments, err);
    if (st != TR_OK) goto done;
    size_t n = join(e, segments, n_segments, &n_stretches);
    st = tr_added_cut(t->added, t->pretoken, e->pretoken, e->text, n, e->stretches, n_stretches,
                      &e->pass, &e->cuts, err);
    for (size_t i = 0; st == TR_OK && i < e->cuts.n; i++) {
        tr_cut cut = e->cuts.cut[i];
        if (cut.id < 0)
            st = tr_pretoken_split(t->pretoken, e->pretoken, e->text + cut.begin,
                                   cut.end - cut.begin, piece_to_ids, e, err);
        else if (!tr_ids_append(&e->ids, &cut.id, 1))
            st = tr_fail(err, TR_E_MEMORY, "out of memory");
    }
    if (st == TR_OK && !tr_ids_reserve(&e->ids, 1)) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    if (st != TR_OK) goto done;
    *ids = e->ids.id;
    *n_ids = e->ids.n;
    e->ids = (tr_ids){0}; /* the caller's now */

done:
    trim(e);
    return st;
}

/* ---- pieces alone ---------------------------------------------------------------------------- */

typedef struct ends {
    size_t *end;
    size_t n, cap, at;
} ends;

/* A tr_piece_sink. */
static bool piece_to_end(void *ctx, const char *piece, size_t n)
{
    ends *list = ctx;

    (void)piece;
    if (list->n == list->cap) {
        size_t cap = list->cap ? list->cap : 32, bytes;
        if (!tr_mul(&cap, cap, 2) || !tr_mul(&bytes, cap, sizeof *list->end)) return false;
        size_t *p = realloc(list->end, bytes);
        if (!p) return false;
        list->end = p;
        list->cap = cap;
    }
    list->end[list->n++] = list->at += n;
    return true;
}

tr_status tr_encode_pieces(tr_encoder *e, const char *text, size_t n, size_t **out, size_t *n_ends,
                           tr_err *err)
{
    tr_segment whole = {text, n, true};
    ends list = {0};
    size_t n_stretches;

    *out = NULL;
    *n_ends = 0;
    tr_status st = reserve(e, &whole, 1, err);
    if (st != TR_OK) return st;
    n = join(e, &whole, 1, &n_stretches);
    st = tr_pretoken_split(e->t->pretoken, e->pretoken, e->text, n, piece_to_end, &list, err);
    if (st == TR_OK) {
        *out = list.end;
        *n_ends = list.n;
    } else {
        free(list.end);
    }
    trim(e);
    return st;
}
