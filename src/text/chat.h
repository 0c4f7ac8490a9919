/* Chat messages to a prompt (chat.md 2): formats dsv32 (V3.2) and dsv31 (V3.2-Exp). */
#ifndef TR_TEXT_CHAT_H
#define TR_TEXT_CHAT_H

#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"
#include "base/log.h"
#include "text/jtext.h"
#include "text/tokenizer.h"

typedef enum tr_chat_format { TR_CHAT_NONE, TR_CHAT_DSV32, TR_CHAT_DSV31 } tr_chat_format;
typedef enum tr_parse_start { TR_START_CONTENT, TR_START_REASONING } tr_parse_start;

typedef struct tr_chat_options { /* of the run */
    tr_chat_format format;
    bool default_thinking;           /* --default-thinking */
    bool thinking_only;              /* --thinking-only */
    bool allow_tools;                /* --allow-tools, with thinking_only */
    bool literal_content;            /* --literal-content */
    bool response_format_in_prompt;  /* --response-format-in-prompt */
    bool dsv31_assistant_after_tool; /* --dsv31-assistant-after-tool */
} tr_chat_options;

/* --chat-format auto (chat.md 2.1): decide from the model folder and the tokenizer (may be NULL). TR_E_USAGE: cannot tell. */
tr_status tr_chat_format_detect(tr_chat_format *out, const char *model_dir,
                                const tr_tokenizer *tokenizer, tr_log *log, tr_err *err);
/* TR_E_INPUT when BOS, EOS is missing or <think>, </think>, <｜User｜>, <｜Assistant｜> are not single tokens. */
tr_status tr_chat_check_tokenizer(const tr_tokenizer *tokenizer, tr_err *err);

typedef struct tr_chat_refusal { /* a 400 (chat.md 2.2) */
    const char *code;            /* static, e.g. "unknown_role" */
    char param[96];              /* "messages[2].content" */
    char message[256];
} tr_chat_refusal;

typedef struct tr_chat_prompt { /* owned by the caller; tr_chat_prompt_free */
    tr_buf text;                /* all segments joined */
    tr_segment *segments;       /* into text.s; literal only with --literal-content */
    size_t n_segments;
    tr_parse_start start;
    bool tools; /* the parser's tool side is on */
} tr_chat_prompt;

/* The thinking mode of a request body (chat.md 2.1 order). Refusal as below. */
tr_status tr_chat_thinking(bool *thinking, const tr_jtext *body, const tr_jnode *request,
                           const tr_chat_options *options, tr_chat_refusal *refusal, tr_err *err);

/* Encode a request: an object with messages and optionally tools, tool_choice, continue_final_message, as in the body of
 * /v1/chat/completions. TR_E_INPUT: refused, see *refusal (err's text says the same); TR_E_MEMORY. */
tr_status tr_chat_encode(tr_chat_prompt *out, const tr_jtext *body, const tr_jnode *request,
                         bool thinking, const tr_chat_options *options, tr_chat_refusal *refusal,
                         tr_err *err);
void tr_chat_prompt_free(tr_chat_prompt *p);

/* Generated text into reasoning and content (chat.md 3.2, without tools: 3.3-3.6 come later). A state machine: feed text in
 * any pieces, then finish. reasoning is meaningful when has_reasoning. A literal <｜end▁of▁sentence｜> ends the text. What is in
 * the two buffers stays there: it may be sent on at any time. Zeroed by begin; buffers freed by free. When memory ran
 * out one of the three buffers has failed. */
typedef struct tr_reasoning {
    int state; /* private */
    bool has_reasoning;
    tr_buf reasoning, content, held;
    size_t blank;           /* private: white space at the front of held */
    size_t reasoning_bytes; /* of the input up to and including </think>; 0: none closed */
    size_t seen;
} tr_reasoning;
void tr_reasoning_begin(tr_reasoning *r, tr_parse_start start);
void tr_reasoning_feed(tr_reasoning *r, const char *s, size_t n);
void tr_reasoning_finish(tr_reasoning *r);
void tr_reasoning_free(tr_reasoning *r);

#endif
