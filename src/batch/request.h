/* One line of the input into a request of the engine, or into the reason why not: a 4xx answer,
 * or a line that is no request (chat.md 4.1, 4.2). Every number is checked against its declared
 * range here and nowhere else. A parser belongs to one thread (the reader). */
#ifndef TR_BATCH_REQUEST_H
#define TR_BATCH_REQUEST_H

#include "base/log.h"
#include "batch/envelope.h"
#include "engine/request.h"
#include "text/chat.h"
#include "text/tokenizer.h"

enum { TR_EXTRA_EOS_MAX = 8, TR_ASKED_LOGPROBS_MAX = 20 };

typedef struct tr_sampling_defaults { /* generation_config.json, or chat.md 4.2 */
    double temperature, top_p, min_p, repetition;
    int top_k;
} tr_sampling_defaults;

typedef struct tr_request_options { /* of the run */
    const tr_tokenizer *tokenizer;  /* kept; NULL: prompts must be token ids */
    tr_chat_options chat;
    int vocab_size, max_model_len;
    int32_t bos;                         /* -1: none */
    bool add_bos;                        /* tokenizer_config.json: add_bos_token */
    int32_t extra_eos[TR_EXTRA_EOS_MAX]; /* of generation_config.json, besides the engine's EOS */
    int n_extra_eos;
    uint64_t seed; /* --seed */
    tr_sampling_defaults defaults;
    bool strict_params; /* --strict-params */
    tr_log *log;        /* kept; warnings about unknown fields, once per name */
} tr_request_options;

typedef struct tr_asked { /* tr_request.user: what the record of an answer needs to know */
    uint64_t line;
    char *custom_id;
    size_t n_custom_id;
    bool chat;             /* else a completion */
    int n_logprobs;        /* alternatives asked for, -1: none */
    int n_prompt_logprobs; /* prompt_logprobs, -1: none */
    bool echo, return_token_ids, skip_special, bos_added;
    tr_parse_start start; /* chat: what the prompt ends with */
    char *prompt_text;    /* echo of a string prompt, else NULL */
    size_t n_prompt_text;
} tr_asked;

typedef struct tr_refusal {
    int status;       /* 400, 404, 405, 500 */
    const char *type; /* static: "invalid_request_error" */
    const char *code; /* static: "out_of_range" */
    char param[96];   /* "" where there is none */
    char message[400];
} tr_refusal;

typedef enum tr_parsed_kind {
    TR_PARSED_REQUEST,
    TR_PARSED_REFUSED,
    TR_PARSED_INVALID
} tr_parsed_kind;

typedef struct tr_parsed {
    tr_parsed_kind kind;
    tr_request *request; /* the caller's; NULL unless REQUEST */
    tr_refusal refusal;  /* REFUSED */
    size_t column;       /* INVALID: from 1, in bytes; the reason is the envelope's fault */
} tr_parsed;

typedef struct tr_parser tr_parser;

tr_status tr_parser_create(tr_parser **out, const tr_request_options *options,
                           tr_err *err); /* copies options */
void tr_parser_free(tr_parser *p);

/* TR_E_MEMORY only. */
tr_status tr_parser_line(tr_parser *p, const tr_envelope *line, tr_parsed *out, tr_err *err);

#endif
