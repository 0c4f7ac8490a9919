#include <config.h>

#include "text/tokenizer.h"

#include <stdlib.h>
#include <string.h>

#include "base/hash.h"
#include "base/size.h"
#include "text/tokenizer_priv.h"
#include "text/utf8.h"

void tr_tokenizer_free(tr_tokenizer *t)
{
    if (!t) return;
    free(t->tokens);
    free(t->arena);
    free(t->piece_id);
    tr_merges_free(&t->merges);
    tr_added_free(t->added);
    tr_pretoken_free(t->pretoken);
    free(t);
}

int32_t tr_tokenizer_size(const tr_tokenizer *t)
{
    return t->n_tokens;
}

int32_t tr_tokenizer_added(const tr_tokenizer *t, const char *content)
{
    const tr_added_token *token = tr_added_get(t->added, content, strlen(content));
    return token ? token->id : -1;
}

static uint32_t flags_of(const tr_tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->n_tokens ? t->tokens[id].flags : 0;
}

const char *tr_tokenizer_bytes(const tr_tokenizer *t, int32_t id, size_t *n)
{
    *n = 0;
    if (!flags_of(t, id)) return "";
    *n = t->tokens[id].n;
    return t->arena + t->tokens[id].at;
}

bool tr_tokenizer_has(const tr_tokenizer *t, int32_t id)
{
    return flags_of(t, id) != 0;
}

bool tr_tokenizer_special(const tr_tokenizer *t, int32_t id)
{
    return (flags_of(t, id) & TR_TOKEN_SPECIAL) != 0;
}

void tr_tokenizer_mask(const tr_tokenizer *t, int n_vocab, uint32_t *words)
{
    for (int i = 0; i < n_vocab; i++) {
        if (i % 32 == 0) words[i / 32] = 0;
        if (tr_tokenizer_has(t, i)) words[i / 32] |= UINT32_C(1) << (i % 32);
    }
}

const char *tr_tokenizer_identity(const tr_tokenizer *t)
{
    return t->identity;
}

tr_status tr_decode(const tr_tokenizer *t, const int32_t *ids, size_t n, bool skip_special,
                    char **text, size_t *n_text, tr_err *err)
{
    size_t n_bytes = 0, room, piece, at = 0;
    char *bytes = NULL, *out = NULL;
    tr_status st = TR_E_MEMORY;

    *text = NULL;
    *n_text = 0;
    for (size_t i = 0; i < n; i++) {
        tr_tokenizer_bytes(t, ids[i], &piece);
        if (!tr_add(&n_bytes, n_bytes, piece)) goto done;
    }
    /* Every byte may be ill-formed, and U+FFFD takes three. */
    if (!tr_mul(&room, n_bytes, 3) || !tr_add(&room, room, 1)) goto done;
    bytes = tr_calloc(n_bytes, 1);
    out = malloc(room);
    if (!bytes || !out) goto done;

    for (size_t i = 0; i < n; i++) {
        if (skip_special && tr_tokenizer_special(t, ids[i])) continue;
        const char *from = tr_tokenizer_bytes(t, ids[i], &piece);
        memcpy(bytes + at, from, piece);
        at += piece;
    }
    *n_text = tr_utf8_repair(bytes, at, out);
    out[*n_text] = 0;
    *text = out;
    out = NULL;
    st = TR_OK;

done:
    if (st != TR_OK) tr_fail(err, st, "out of memory");
    free(bytes);
    free(out);
    return st;
}

/* ---- whole pieces (ignore_merges) ------------------------------------------------------------ */

static int32_t *piece_slot(const tr_tokenizer *t, const char *piece, size_t n)
{
    size_t mask = t->n_piece_slots - 1, i = (size_t)tr_hash64(piece, n, 0) & mask;

    for (;; i = (i + 1) & mask) {
        int32_t id = t->piece_id[i];
        if (id < 0) return &t->piece_id[i];
        const tr_token *token = &t->tokens[id];
        if (token->n == n && memcmp(t->arena + token->at, piece, n) == 0) return &t->piece_id[i];
    }
}

int32_t tr_tokenizer_piece(const tr_tokenizer *t, const char *piece, size_t n)
{
    return t->piece_id ? *piece_slot(t, piece, n) : -1;
}

bool tr_tokenizer_index_pieces(tr_tokenizer *t)
{
    t->n_piece_slots = 512;
    while (t->n_piece_slots < 2 * (size_t)t->n_tokens)
        t->n_piece_slots *= 2;
    t->piece_id = tr_calloc(t->n_piece_slots, sizeof *t->piece_id);
    if (!t->piece_id) return false;
    for (size_t i = 0; i < t->n_piece_slots; i++)
        t->piece_id[i] = -1;
    for (int32_t id = 0; id < t->n_tokens; id++) {
        const tr_token *token = &t->tokens[id];
        uint32_t both = TR_TOKEN_VOCAB | TR_TOKEN_BYTES;
        if ((token->flags & both) == both) *piece_slot(t, t->arena + token->at, token->n) = id;
    }
    return true;
}
