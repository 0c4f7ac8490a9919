/* What the two prompt formats share: a request checked and normalised (messages.c), and the writer of prompts with its
 * literal and template stretches (chat.c). Included by src/text/ only (reasoning.c
 * takes the marks). */
#ifndef TR_TEXT_CHAT_PRIV_H
#define TR_TEXT_CHAT_PRIV_H

#include "text/chat.h"

#define TR_BOS_TEXT       "<｜begin▁of▁sentence｜>"
#define TR_EOS_TEXT       "<｜end▁of▁sentence｜>"
#define TR_USER_TEXT      "<｜User｜>"
#define TR_ASSISTANT_TEXT "<｜Assistant｜>"
#define TR_THINK_TEXT     "<think>"
#define TR_UNTHINK_TEXT   "</think>"

typedef enum tr_role {
    TR_ROLE_SYSTEM,
    TR_ROLE_DEVELOPER,
    TR_ROLE_USER,
    TR_ROLE_ASSISTANT,
    TR_ROLE_TOOL
} tr_role;

typedef struct tr_text { /* bytes [at, at + n) of the conversation's arena */
    size_t at, n;
} tr_text;

typedef struct tr_call {
    tr_text id, name;
    tr_text given;        /* arguments as the client's own string; n = 0: as an object, or none */
    tr_jtext *own;        /* tree over `given` */
    const tr_jtext *tree; /* own or the body */
    const tr_jnode *arguments; /* an object; NULL: none were given, which counts as {} */
} tr_call;

typedef struct tr_message {
    tr_role role;
    size_t index; /* in the request, for messages to the client */
    tr_text content, reasoning;
    tr_text id; /* of the call that a tool message answers; n = 0: none */
    const tr_jnode *tools, *response_format; /* in the body, NULL: none */
    size_t first_call, n_calls;
} tr_message;

typedef struct tr_conversation { /* tr_conversation_free */
    const tr_jtext *body;        /* borrowed */
    tr_buf arena;                /* all decoded texts */
    tr_message *message;
    size_t n_messages;
    tr_call *call;
    size_t n_calls;
    const tr_jnode *tools; /* of the request, to be rendered; NULL: none */
    const tr_jnode
        *schema;    /* of the request, for the prompt (--response-format-in-prompt); NULL: none */
    bool any_tools; /* some tools are rendered */
    bool continue_final;
    size_t last; /* index of the last user or developer message */
} tr_conversation;

/* Read, check (chat.md 2.2) and normalise. Tool results are in the order of their calls afterwards. */
tr_status tr_conversation_read(tr_conversation *out, const tr_jtext *body, const tr_jnode *request,
                               bool thinking, const tr_chat_options *options,
                               tr_chat_refusal *refusal, tr_err *err);
void tr_conversation_free(tr_conversation *c);
const char *tr_conversation_text(const tr_conversation *c, tr_text text);

/* Fill *refusal (may be NULL) and err; returns TR_E_INPUT. code is static; param "" when there is none. */
tr_status tr_chat_refuse(tr_chat_refusal *refusal, tr_err *err, const char *code, const char *param,
                         const char *fmt, ...) __attribute__((format(printf, 5, 6)));

/* The function object of a tool, in a checked list. */
const tr_jnode *tr_tool_function(const tr_jtext *t, const tr_jnode *tool);

typedef struct tr_prompt_writer {
    tr_chat_prompt *out;
    size_t cap_segments;
    bool literal_content;
    tr_chat_refusal *refusal;
} tr_prompt_writer;

/* Template text (added tokens are found in it) and text that came from the client (with --literal-content they are not).
 * Running out of memory is remembered in out->text.failed. */
void tr_put(tr_prompt_writer *w, const char *text);
void tr_put_client(tr_prompt_writer *w, const char *text, size_t n);
void tr_put_text(tr_prompt_writer *w, const tr_conversation *c, tr_text text);
/* A value as JSON text (chat.md 2.3), the client's. Refused with code and param for a number beyond the double range. */
tr_status tr_put_json(tr_prompt_writer *w, const tr_jtext *t, const tr_jnode *n, const char *code,
                      const char *param, tr_err *err);

tr_status tr_dsv32_render(tr_prompt_writer *w, const tr_conversation *c, bool thinking,
                          tr_err *err);
tr_status tr_dsv31_render(tr_prompt_writer *w, const tr_conversation *c, bool thinking,
                          bool assistant_after_tool, tr_err *err);

#endif
