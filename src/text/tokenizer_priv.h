/* Fields of a tokenizer, for its loader, its decoder and its encoder. */
#ifndef TR_TEXT_TOKENIZER_PRIV_H
#define TR_TEXT_TOKENIZER_PRIV_H

#include "text/added.h"
#include "text/bpe.h"
#include "text/pretoken.h"
#include "text/tokenizer.h"

/* Ids are indices of a table; published vocabularies stay below 2^18. */
enum { TR_TOKEN_ID_MAX = (1 << 22) - 1 };

enum {                     /* tr_token.flags */
       TR_TOKEN_VOCAB = 1, /* in model.vocab */
       TR_TOKEN_ADDED = 2, /* in added_tokens */
       TR_TOKEN_SPECIAL = 4,
       TR_TOKEN_BYTES =
           8, /* every character stood in the byte table: merges and ignore_merges may give it */
};

typedef struct tr_token { /* flags 0: no token has this id */
    size_t at;            /* its bytes: arena[at, at + n) */
    uint32_t n, flags;
} tr_token;

struct tr_tokenizer {
    tr_token *tokens; /* [n_tokens], by id */
    int32_t n_tokens;
    char *arena;
    size_t arena_n, arena_cap;
    int32_t byte_id[256];
    tr_merges merges;
    bool ignore_merges;
    int32_t *
        piece_id; /* ignore_merges: open addressing over the tokens with TR_TOKEN_BYTES, -1 empty */
    size_t n_piece_slots;
    tr_added *added;
    tr_pretoken *pretoken;
    char identity[33];
};

/* With ignore_merges: the id of the token with exactly these bytes, or -1. */
int32_t tr_tokenizer_piece(const tr_tokenizer *t, const char *piece, size_t n);
/* Fill piece_id; false: out of memory. */
bool tr_tokenizer_index_pieces(tr_tokenizer *t);

#endif
