/* Format dsv32: V3.2 and V3.2-Speciale (chat.md 2.4). */
#include <config.h>

#include "text/chat_priv.h"

#include <stdio.h>
#include <stdlib.h>

#define DSML "｜DSML｜"

/* TOOLS around its list of schemas, one per line. */
static const char tools_before[] =
    "## Tools\n"
    "\n"
    "You have access to a set of tools you can use to answer the user's question.\n"
    "You can invoke functions by writing a \"<" DSML
    "function_calls>\" block like the following as "
    "part of your reply to the user:\n"
    "<" DSML "function_calls>\n"
    "<" DSML "invoke name=\"$FUNCTION_NAME\">\n"
    "<" DSML "parameter name=\"$PARAMETER_NAME\" string=\"true|false\">$PARAMETER_VALUE</" DSML
    "parameter>\n"
    "...\n"
    "</" DSML "invoke>\n"
    "<" DSML "invoke name=\"$FUNCTION_NAME2\">\n"
    "...\n"
    "</" DSML "invoke>\n"
    "</" DSML "function_calls>\n"
    "\n"
    "String and scalar parameters should be specified as is without any escaping or quotes, while "
    "lists and objects should use JSON format. The \"string\" attribute should be set to \"true\" "
    "for "
    "string type parameters and \"false\" for other types (numbers, booleans, arrays, objects).\n"
    "\n"
    "If the thinking_mode is enabled, then after function results you should strongly consider "
    "outputting a thinking block. Here is an example:\n"
    "\n"
    "<" DSML "function_calls>\n"
    "...\n"
    "</" DSML "function_calls>\n"
    "\n"
    "<function_results>\n"
    "...\n"
    "</function_results>\n"
    "\n"
    "<think>...thinking about results</think>\n"
    "\n"
    "Here are the functions available in JSONSchema format:\n"
    "<functions>\n";
static const char tools_after[] = "\n</functions>\n";

static const char format_before[] =
    "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n";

typedef struct renderer {
    tr_prompt_writer *w;
    const tr_conversation *c;
    bool thinking;
    tr_err *err;
} renderer;

static void put_mark(renderer *r, bool think)
{
    tr_put(r->w, r->thinking && think ? TR_THINK_TEXT : TR_UNTHINK_TEXT);
}

static tr_status put_tools(renderer *r, const tr_jnode *tools)
{
    const tr_jtext *t = r->c->body;
    bool first = true;

    tr_put(r->w, "\n\n");
    tr_put(r->w, tools_before);
    for (const tr_jnode *n = tr_jtext_child(t, tools); n; n = tr_jtext_next(t, n)) {
        if (!first) tr_put(r->w, "\n");
        tr_status st =
            tr_put_json(r->w, t, tr_tool_function(t, n), "invalid_tools", "tools", r->err);
        if (st != TR_OK) return st;
        first = false;
    }
    tr_put(r->w, tools_after);
    return TR_OK;
}

/* [ "\n\n" TOOLS ] [ "\n\n" RFMT ] */
static tr_status put_extras(renderer *r, const tr_jnode *tools, const tr_jnode *format)
{
    if (tools) {
        tr_status st = put_tools(r, tools);
        if (st != TR_OK) return st;
    }
    if (!format) return TR_OK;
    tr_put(r->w, "\n\n");
    tr_put(r->w, format_before);
    return tr_put_json(r->w, r->c->body, format, "invalid_response_format", "response_format",
                       r->err);
}

/* A string goes in as it is, everything else as JSON text. */
static tr_status put_parameter(renderer *r, const tr_call *call, const tr_jnode *value,
                               const char *param)
{
    tr_status st = TR_OK;
    bool string = value->type == TR_J_STRING;
    tr_buf b = {0};

    tr_put(r->w, "<" DSML "parameter name=\"");
    tr_jtext_key(call->tree, value, &b);
    tr_put_client(r->w, b.s, b.n);
    tr_put(r->w, string ? "\" string=\"true\">" : "\" string=\"false\">");
    if (string) {
        b.n = 0;
        tr_jtext_string(call->tree, value, &b);
        tr_put_client(r->w, b.s, b.n);
    } else {
        st = tr_put_json(r->w, call->tree, value, "invalid_tool_arguments", param, r->err);
    }
    tr_put(r->w, "</" DSML "parameter>");
    if (b.failed) r->w->out->text.failed = true;
    free(b.s);
    return st;
}

static tr_status put_call(renderer *r, const tr_call *call, const char *param)
{
    tr_status st = TR_OK;
    const tr_jnode **value = NULL;
    size_t n = 0;

    tr_put(r->w, "<" DSML "invoke name=\"");
    tr_put_text(r->w, r->c, call->name);
    tr_put(r->w, "\">\n");
    if (call->arguments) {
        st = tr_jtext_members(call->tree, call->arguments, &value, &n, r->err);
        if (st != TR_OK) return st;
    }
    for (size_t i = 0; i < n; i++) {
        if (i) tr_put(r->w, "\n");
        st = put_parameter(r, call, value[i], param);
        if (st != TR_OK) goto done;
    }
    tr_put(r->w, "\n</" DSML "invoke>");

done:
    free(value);
    return st;
}

static tr_status put_calls(renderer *r, const tr_message *m)
{
    char param[96];

    tr_put(r->w, "\n\n<" DSML "function_calls>\n");
    for (size_t i = 0; i < m->n_calls; i++) {
        if (i) tr_put(r->w, "\n");
        snprintf(param, sizeof param, "messages[%zu].tool_calls[%zu].function.arguments", m->index,
                 i);
        tr_status st = put_call(r, &r->c->call[m->first_call + i], param);
        if (st != TR_OK) return st;
    }
    tr_put(r->w, "\n</" DSML "function_calls>");
    return TR_OK;
}

/* Reasoning shows only behind the last user message: when the user speaks again it goes. A continued message has no end,
 * and while it has no content its reasoning has none either. */
static tr_status put_assistant(renderer *r, const tr_message *m, size_t i)
{
    const tr_conversation *c = r->c;
    bool continued = c->continue_final && i == c->n_messages - 1;

    if (r->thinking && i > c->last) {
        tr_put_text(r->w, c, m->reasoning);
        if (!continued || m->content.n) tr_put(r->w, TR_UNTHINK_TEXT);
    }
    tr_put_text(r->w, c, m->content);
    if (m->n_calls) {
        tr_status st = put_calls(r, m);
        if (st != TR_OK) return st;
    }
    if (!continued) tr_put(r->w, TR_EOS_TEXT);
    return TR_OK;
}

/* Message i is a tool's: one of a group, which messages.c found complete. */
static void put_result(renderer *r, size_t i)
{
    const tr_conversation *c = r->c;
    bool last = i + 1 == c->n_messages || c->message[i + 1].role != TR_ROLE_TOOL;

    if (c->message[i - 1].role != TR_ROLE_TOOL) tr_put(r->w, "\n\n<function_results>");
    tr_put(r->w, "\n<result>");
    tr_put_text(r->w, c, c->message[i].content);
    tr_put(r->w, "</result>");
    if (!last) return;
    tr_put(r->w, "\n</function_results>\n\n");
    put_mark(r, i > c->last);
}

static tr_status put_message(renderer *r, size_t i)
{
    const tr_conversation *c = r->c;
    const tr_message *m = &c->message[i];
    tr_status st;

    switch (m->role) {
    case TR_ROLE_SYSTEM:
        tr_put_text(r->w, c, m->content);
        /* The request's own replace those of a first system message. */
        return put_extras(r, i == 0 && c->tools ? c->tools : m->tools,
                          i == 0 && c->schema ? c->schema : m->response_format);
    case TR_ROLE_DEVELOPER:
        tr_put(r->w, TR_USER_TEXT);
        st = put_extras(r, m->tools, m->response_format);
        if (st != TR_OK) return st;
        tr_put(r->w, "\n\n# The user's message is: ");
        break;
    case TR_ROLE_USER:
        tr_put(r->w, TR_USER_TEXT);
        break;
    case TR_ROLE_ASSISTANT:
        return put_assistant(r, m, i);
    case TR_ROLE_TOOL:
        put_result(r, i);
        return TR_OK;
    }
    tr_put_text(r->w, c, m->content);
    tr_put(r->w, TR_ASSISTANT_TEXT);
    put_mark(r, i == c->last);
    return TR_OK;
}

tr_status tr_dsv32_render(tr_prompt_writer *w, const tr_conversation *c, bool thinking, tr_err *err)
{
    renderer r = {.w = w, .c = c, .thinking = thinking, .err = err};
    tr_status st = TR_OK;

    tr_put(w, TR_BOS_TEXT);
    if (c->message[0].role != TR_ROLE_SYSTEM) st = put_extras(&r, c->tools, c->schema);
    for (size_t i = 0; st == TR_OK && i < c->n_messages; i++)
        st = put_message(&r, i);
    /* What the prompt really ends with: a user message or results end in the mark, a continued message with content
     * stands behind its reasoning. */
    const tr_message *final = &c->message[c->n_messages - 1];
    w->out->start = thinking && !(c->continue_final && final->content.n) ? TR_START_REASONING
                                                                         : TR_START_CONTENT;
    return st;
}
