/* Format dsv31: V3.2-Exp, the template of V3.1 (chat.md 2.5). */
#include <config.h>

#include "text/chat_priv.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CALLS_BEGIN  "<｜tool▁calls▁begin｜>"
#define CALLS_END    "<｜tool▁calls▁end｜>"
#define CALL_BEGIN   "<｜tool▁call▁begin｜>"
#define CALL_END     "<｜tool▁call▁end｜>"
#define TOOL_SEP     "<｜tool▁sep｜>"
#define OUTPUT_BEGIN "<｜tool▁output▁begin｜>"
#define OUTPUT_END   "<｜tool▁output▁end｜>"

static const char tools_after[] =
    "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n" CALLS_BEGIN CALL_BEGIN
    "tool_call_name" TOOL_SEP "tool_call_arguments" CALL_END "{{additional_tool_calls}}" CALLS_END
    "\n\nWhere:\n\n"
    "- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters "
    "Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces\n";

/* Developer messages count as system ones; both are hoisted and invisible to what follows what. */
static bool is_system(const tr_message *m)
{
    return m->role == TR_ROLE_SYSTEM || m->role == TR_ROLE_DEVELOPER;
}

static void put_string(tr_prompt_writer *w, const tr_jtext *t, const tr_jnode *n)
{
    tr_buf b = {0};

    if (n) tr_jtext_string(t, n, &b);
    tr_put_client(w, b.s, b.n);
    if (b.failed) w->out->text.failed = true;
    free(b.s);
}

static tr_status put_tools(tr_prompt_writer *w, const tr_conversation *c, tr_err *err)
{
    const tr_jtext *t = c->body;

    tr_put(w, "\n\n## Tools\nYou have access to the following tools:\n");
    for (const tr_jnode *n = tr_jtext_child(t, c->tools); n; n = tr_jtext_next(t, n)) {
        const tr_jnode *function = tr_tool_function(t, n);
        const tr_jnode *parameters = tr_jtext_given(t, function, "parameters");
        tr_put(w, "\n### ");
        put_string(w, t, tr_jtext_given(t, function, "name"));
        tr_put(w, "\nDescription: ");
        put_string(w, t, tr_jtext_given(t, function, "description"));
        tr_put(w, "\n\nParameters: ");
        if (parameters) {
            tr_status st = tr_put_json(w, t, parameters, "invalid_tools", "tools", err);
            if (st != TR_OK) return st;
        } else {
            tr_put(w, "{\"type\": \"object\", \"properties\": {}}");
        }
        tr_put(w, "\n");
    }
    tr_put(w, tools_after);
    return TR_OK;
}

static tr_status put_system(tr_prompt_writer *w, const tr_conversation *c, tr_err *err)
{
    bool first = true;

    for (size_t i = 0; i < c->n_messages; i++) {
        if (!is_system(&c->message[i])) continue;
        if (!first) tr_put(w, "\n\n");
        tr_put_text(w, c, c->message[i].content);
        first = false;
    }
    return c->tools ? put_tools(w, c, err) : TR_OK;
}

static tr_status put_calls(tr_prompt_writer *w, const tr_conversation *c, const tr_message *m,
                           tr_err *err)
{
    char param[96];

    tr_put(w, CALLS_BEGIN);
    for (size_t i = 0; i < m->n_calls; i++) {
        const tr_call *call = &c->call[m->first_call + i];
        tr_put(w, CALL_BEGIN);
        tr_put_text(w, c, call->name);
        tr_put(w, TOOL_SEP);
        if (call->given.n) {
            tr_put_text(w, c, call->given); /* the client's string unchanged */
        } else if (call->arguments) {
            snprintf(param, sizeof param, "messages[%zu].tool_calls[%zu].function.arguments",
                     m->index, i);
            tr_status st =
                tr_put_json(w, call->tree, call->arguments, "invalid_tool_arguments", param, err);
            if (st != TR_OK) return st;
        } else {
            tr_put(w, "{}");
        }
        tr_put(w, CALL_END);
    }
    tr_put(w, CALLS_END);
    return TR_OK;
}

/* Past reasoning that stands in the content goes, up to and including the first </think>. */
static tr_text without_reasoning(const tr_conversation *c, tr_text content)
{
    const char *s = tr_conversation_text(c, content);
    const char *mark =
        content.n ? memmem(s, content.n, TR_UNTHINK_TEXT, strlen(TR_UNTHINK_TEXT)) : NULL;

    if (mark) {
        size_t gone = (size_t)(mark - s) + strlen(TR_UNTHINK_TEXT);
        content.at += gone;
        content.n -= gone;
    }
    return content;
}

/* before: the message in front, system ones not counted; NULL: none. */
static tr_status put_assistant(tr_prompt_writer *w, const tr_conversation *c, const tr_message *m,
                               const tr_message *before, tr_err *err)
{
    bool after_tool = before && before->role == TR_ROLE_TOOL;

    if (before && before->role == TR_ROLE_USER) tr_put(w, TR_ASSISTANT_TEXT TR_UNTHINK_TEXT);
    tr_put_text(w, c, after_tool ? m->content : without_reasoning(c, m->content));
    if (m->n_calls) {
        tr_status st = put_calls(w, c, m, err);
        if (st != TR_OK) return st;
    }
    tr_put(w, TR_EOS_TEXT);
    return TR_OK;
}

/* GEN, and what of a continued message stands behind it. Stored reasoning is written only where GEN opened a think block:
 * behind a tool result there is none (chat.md 2.5). */
static void put_generation(tr_prompt_writer *w, const tr_conversation *c, const tr_message *before,
                           bool thinking, bool assistant_after_tool)
{
    const tr_message *final = c->continue_final ? &c->message[c->n_messages - 1] : NULL;
    bool open = false;

    if (!before || before->role != TR_ROLE_TOOL) {
        tr_put(w, TR_ASSISTANT_TEXT);
        tr_put(w, thinking ? TR_THINK_TEXT : TR_UNTHINK_TEXT);
        open = thinking;
    } else if (assistant_after_tool) {
        tr_put(w, TR_ASSISTANT_TEXT TR_UNTHINK_TEXT);
    }
    if (final && open) {
        tr_put_text(w, c, final->reasoning);
        if (final->content.n) {
            tr_put(w, TR_UNTHINK_TEXT);
            open = false;
        }
    }
    if (final) tr_put_text(w, c, final->content);
    w->out->start = open ? TR_START_REASONING : TR_START_CONTENT;
}

tr_status tr_dsv31_render(tr_prompt_writer *w, const tr_conversation *c, bool thinking,
                          bool assistant_after_tool, tr_err *err)
{
    const tr_message *before = NULL;
    size_t n = c->n_messages - (c->continue_final ? 1 : 0);

    tr_put(w, TR_BOS_TEXT);
    tr_status st = put_system(w, c, err);
    for (size_t i = 0; st == TR_OK && i < n; i++) {
        const tr_message *m = &c->message[i];
        if (is_system(m)) continue;
        if (m->role == TR_ROLE_USER) {
            tr_put(w, TR_USER_TEXT);
            tr_put_text(w, c, m->content);
        } else if (m->role == TR_ROLE_TOOL) {
            tr_put(w, OUTPUT_BEGIN);
            tr_put_text(w, c, m->content);
            tr_put(w, OUTPUT_END);
        } else {
            st = put_assistant(w, c, m, before, err);
        }
        before = m;
    }
    if (st == TR_OK) put_generation(w, c, before, thinking, assistant_after_tool);
    return st;
}
