/* A request as the engine sees it: token ids in, token ids and text out. Everything in it was range-checked by whoever
 * made it (batch/request); nothing here knows JSON. */
#ifndef TR_ENGINE_REQUEST_H
#define TR_ENGINE_REQUEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct tr_bias {
    int32_t token;
    float bias;
} tr_bias;

typedef struct tr_string {
    char *s;
    size_t n;
} tr_string;

typedef struct tr_params { /* chat.md 4.2 */
    int n;                 /* choices */
    uint64_t key;          /* the request's Philox key; choice i uses tr_choice_key(key, i) */
    float temperature, top_p, min_p;
    int top_k;      /* <= 0: off */
    int max_tokens; /* >= 0, already at most what the context leaves; 0: scoring only */
    int min_tokens;
    bool ignore_eos, include_stop;
    float presence, frequency, repetition; /* 0, 0, 1: off */
    tr_bias *bias;                         /* sorted by token, one entry each */
    int n_bias;
    int32_t *stop_token;
    int n_stop_tokens;
    tr_string *stop; /* stop strings */
    int n_stop;
    int n_logprobs;        /* -1: none; 0..20 alternatives of generated tokens */
    int n_prompt_logprobs; /* -1: none; 0..20: score the prompt's tokens */
} tr_params;

typedef struct tr_progress tr_progress; /* engine/progress.h */

typedef struct tr_request { /* owned; tr_request_free */
    uint64_t id;            /* the caller's: line number */
    int32_t *prompt;
    size_t n_prompt; /* >= 1 */
    tr_params params;
    tr_progress *progress; /* owned: goes on from there; NULL: from the beginning */
    bool stream;           /* TR_EVENT_TOKENS wanted (serve) */
    void *user; /* the caller's, untouched; free_user (may be NULL) is called by tr_request_free */
    void (*free_user)(void *user);
} tr_request;

typedef enum tr_finish { TR_FINISH_STOP, TR_FINISH_LENGTH } tr_finish;

typedef struct
    tr_scores { /* log-probabilities of a run of tokens; arrays of n (x n_top), NULL where n is 0 */
    int n, n_top;
    float *logprob;
    int32_t *rank;
    int32_t *top_token; /* [n, n_top], -1 padded */
    float *top_logprob;
} tr_scores;

typedef struct tr_choice {
    int32_t *token; /* as sampled, EOS included */
    int n_token;
    tr_scores scores; /* of token, when n_logprobs >= 0 */
    char *
        text; /* decoded output (chat.md 1.6), stop string removed unless include_stop; EOS, stop tokens, BOS, pad
                          * not in it; NULL without a tokenizer */
    size_t n_text;
    tr_finish finish;
    int32_t stop_token; /* the token that ended it, -1: none */
    int stop;           /* index of the stop string that ended it, -1: none */
} tr_choice;

typedef enum tr_event_kind { TR_EVENT_TOKENS, TR_EVENT_DONE, TR_EVENT_FAILED } tr_event_kind;

typedef struct tr_event { /* owned by whoever took it; tr_event_free frees the request too */
    tr_event_kind kind;
    tr_request *request;
    int n_choices;
    tr_choice *choice; /* DONE */
    tr_scores
        prompt_scores; /* DONE, n_prompt_logprobs >= 0: n = n_prompt - 1, entry i is of prompt[i + 1] */
    int cached_tokens; /* of the prompt, found in the cache: depends on what ran before */
    const char *code;  /* FAILED: "numerical_error", "context_length_exceeded", ... (static) */
    char message[256];
    uint64_t submitted_ns, begun_ns, first_token_ns, done_ns; /* begun: admitted to a slot */
    int replica;                                              /* that ran it, -1: none did */
    int n_chunks; /* steps in which its prompt was computed, of all choices */
    uint32_t itl_p50_ns,
        itl_p99_ns; /* between tokens of a choice in this run, within an eighth; 0: fewer than two */
} tr_event;

void tr_request_free(tr_request *r);
void tr_event_free(tr_event *e);
void tr_event_clear(tr_event *e); /* the choices and scores alone */
/* SplitMix64 of key and i; i = 0 gives a key of its own too. */
uint64_t tr_choice_key(uint64_t key, int i);

#endif
