/* A chat request read, checked and normalised for both prompt formats (chat.md 2.2). Everything here came from a client:
 * all work is linear in the request, or n log n where ids and names are compared. */
#include <config.h>

#include "text/chat_priv.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"

typedef struct reader {
    tr_conversation *c;
    const tr_jtext *t;
    const tr_chat_options *options;
    bool tools_off; /* tool_choice "none" */
    bool thinking;
    tr_chat_refusal *refusal;
    tr_err *err;
} reader;

typedef char tr_param[sizeof((tr_chat_refusal *)0)->param];

tr_status tr_chat_refuse(tr_chat_refusal *refusal, tr_err *err, const char *code, const char *param,
                         const char *fmt, ...)
{
    tr_chat_refusal r = {.code = code};
    va_list args;

    va_start(args, fmt);
    vsnprintf(r.message, sizeof r.message, fmt, args);
    va_end(args);
    snprintf(r.param, sizeof r.param, "%s", param);
    if (refusal) *refusal = r;
    return tr_fail(err, TR_E_INPUT, "%s%s%s (%s)", r.param, r.param[0] ? ": " : "", r.message,
                   code);
}

static tr_status refuse(reader *r, const char *code, const char *param, const char *message)
{
    return tr_chat_refuse(r->refusal, r->err, code, param, "%s", message);
}

/* About one message: "messages[2].content". */
static tr_status refuse_at(reader *r, const char *code, size_t index, const char *field,
                           const char *message)
{
    tr_param param;

    snprintf(param, sizeof param, "messages[%zu]%s", index, field);
    return refuse(r, code, param, message);
}

static tr_status no_memory(reader *r)
{
    return tr_fail(r->err, TR_E_MEMORY, "out of memory");
}

static tr_text keep_string(reader *r, const tr_jnode *n)
{
    tr_text text = {.at = r->c->arena.n};
    if (n) tr_jtext_string(r->t, n, &r->c->arena);
    text.n = r->c->arena.n - text.at;
    return text;
}

const char *tr_conversation_text(const tr_conversation *c, tr_text text)
{
    return c->arena.s ? c->arena.s + text.at : "";
}

/* ---- sorted texts: unique ids and names --------------------------------------------------------------------------- */

typedef struct sortable {
    tr_text text;
    size_t i;
} sortable;

static int compare_texts(const tr_conversation *c, tr_text a, tr_text b)
{
    size_t n = a.n < b.n ? a.n : b.n;
    int d = n ? memcmp(tr_conversation_text(c, a), tr_conversation_text(c, b), n) : 0;

    return d ? d : a.n < b.n ? -1 : a.n > b.n;
}

static int compare_sortable(const void *a, const void *b, void *c)
{
    return compare_texts(c, ((const sortable *)a)->text, ((const sortable *)b)->text);
}

/* Sorts; true when no two texts are equal. */
static bool sort_unique(tr_conversation *c, sortable *s, size_t n)
{
    if (n > 1) qsort_r(s, n, sizeof *s, compare_sortable, c);
    for (size_t i = 1; i < n; i++)
        if (compare_texts(c, s[i - 1].text, s[i].text) == 0) return false;
    return true;
}

/* ---- tools -------------------------------------------------------------------------------------------------------- */

const tr_jnode *tr_tool_function(const tr_jtext *t, const tr_jnode *tool)
{
    return tr_jtext_member(t, tool, "function");
}

/* chat.md 4.2: [A-Za-z0-9_.-]{1,64} */
static bool good_name(const char *s, size_t n)
{
    if (n < 1 || n > 64) return false;
    for (size_t i = 0; i < n; i++)
        if (!((s[i] >= 'a' && s[i] <= 'z') || (s[i] >= 'A' && s[i] <= 'Z') ||
              (s[i] >= '0' && s[i] <= '9') || s[i] == '_' || s[i] == '.' || s[i] == '-'))
            return false;
    return true;
}

static tr_status check_tool(reader *r, const tr_jnode *tool, const char *param, tr_text *name)
{
    const tr_jnode *type = tr_jtext_given(r->t, tool, "type"),
                   *function = tr_jtext_given(r->t, tool, "function");
    tr_param where;

    if (tool->type != TR_J_OBJECT || !function || function->type != TR_J_OBJECT ||
        (type && !tr_jtext_is(r->t, type, "function")))
        return refuse(r, "invalid_tools", param,
                      "a tool is {\"type\": \"function\", \"function\": {...}}");
    const tr_jnode *n = tr_jtext_given(r->t, function, "name"),
                   *d = tr_jtext_given(r->t, function, "description");
    *name = keep_string(r, n);
    if (r->c->arena.failed) return no_memory(r);
    snprintf(where, sizeof where, "%.70s.function.name", param);
    if (!n || n->type != TR_J_STRING || !good_name(tr_conversation_text(r->c, *name), name->n))
        return refuse(r, "invalid_tools", where,
                      "a function's name has 1 to 64 of the characters A-Z a-z 0-9 _ . -");
    snprintf(where, sizeof where, "%.70s.function.description", param);
    if (d && d->type != TR_J_STRING)
        return refuse(r, "invalid_tools", where, "a function's description is a string");
    return TR_OK;
}

/* *out: the list, or NULL where there is none or an empty one. */
static tr_status read_tools(reader *r, const tr_jnode *tools, const char *param,
                            const tr_jnode **out)
{
    tr_status st = TR_OK;
    tr_param where;
    size_t n = 0;

    *out = NULL;
    if (!tools) return TR_OK;
    if (tools->type != TR_J_ARRAY) return refuse(r, "invalid_tools", param, "tools is a list");
    if (!tools->n_children) return TR_OK;
    sortable *name = tr_calloc((size_t)tools->n_children, sizeof *name);
    if (!name) return no_memory(r);
    for (const tr_jnode *tool = tr_jtext_child(r->t, tools); tool;
         tool = tr_jtext_next(r->t, tool)) {
        snprintf(where, sizeof where, "%.50s[%zu]", param, n);
        st = check_tool(r, tool, where, &name[n].text);
        if (st != TR_OK) goto done;
        n++;
    }
    if (!sort_unique(r->c, name, n)) {
        st = refuse(r, "invalid_tools", param, "two functions have the same name");
        goto done;
    }
    if (r->options->thinking_only && !r->options->allow_tools) {
        st = refuse(r, "tools_not_supported", param, "this model was not made for tools");
        goto done;
    }
    if (!r->tools_off) {
        *out = tools;
        r->c->any_tools = true;
    }

done:
    free(name);
    return st;
}

/* ---- one message -------------------------------------------------------------------------------------------------- */

static tr_status read_role(reader *r, const tr_jnode *m, tr_message *out)
{
    static const char *const name[] = {"system", "developer", "user", "assistant", "tool"};
    const tr_jnode *role = tr_jtext_given(r->t, m, "role");

    for (int i = 0; role && i < 5; i++)
        if (tr_jtext_is(r->t, role, name[i])) {
            out->role = (tr_role)i;
            return TR_OK;
        }
    return refuse_at(r, "unknown_role", out->index, ".role",
                     "the role is one of system, developer, user, assistant, tool");
}

/* Text parts, joined with one line feed, onto the arena. */
static tr_status read_parts(reader *r, const tr_jnode *list, size_t index)
{
    size_t i = 0;
    char field[48];

    for (const tr_jnode *p = tr_jtext_child(r->t, list); p; p = tr_jtext_next(r->t, p), i++) {
        const tr_jnode *type = tr_jtext_given(r->t, p, "type"),
                       *text = tr_jtext_given(r->t, p, "text");
        snprintf(field, sizeof field, ".content[%zu]", i);
        if (p->type != TR_J_OBJECT)
            return refuse_at(r, "invalid_content", index, field, "a content part is an object");
        if (!type || !tr_jtext_is(r->t, type, "text"))
            return refuse_at(r, "unsupported_content_part", index, field,
                             "only content parts of type text are supported");
        if (!text || text->type != TR_J_STRING)
            return refuse_at(r, "invalid_content", index, field, "a text part has a string, text");
        if (i) tr_buf_add(&r->c->arena, "\n", 1);
        tr_jtext_string(r->t, text, &r->c->arena);
    }
    return TR_OK;
}

static tr_status read_content(reader *r, const tr_jnode *m, tr_message *out)
{
    const tr_jnode *content = tr_jtext_given(r->t, m, "content");

    out->content.at = r->c->arena.n;
    if (content && content->type == TR_J_STRING) {
        tr_jtext_string(r->t, content, &r->c->arena);
    } else if (content && content->type == TR_J_ARRAY) {
        tr_status st = read_parts(r, content, out->index);
        if (st != TR_OK) return st;
    } else if (content) {
        return refuse_at(r, "invalid_content", out->index, ".content",
                         "content is a string, null or a list of parts");
    }
    if (r->c->arena.failed) return no_memory(r);
    out->content.n = r->c->arena.n - out->content.at;
    if (out->role == TR_ROLE_USER && !content)
        return refuse_at(r, "missing_content", out->index, ".content",
                         "a user message has content");
    if (out->role == TR_ROLE_DEVELOPER && !out->content.n)
        return refuse_at(r, "missing_content", out->index, ".content",
                         "a developer message has content");
    return TR_OK;
}

/* reasoning_content, or its alias where that is absent or empty. */
static tr_status read_reasoning(reader *r, const tr_jnode *m, tr_message *out)
{
    static const char *const key[] = {"reasoning_content", "reasoning"};

    for (int i = 0; i < 2; i++) {
        const tr_jnode *n = tr_jtext_given(r->t, m, key[i]);
        if (n && n->type != TR_J_STRING)
            return refuse_at(r, "invalid_content", out->index,
                             i ? ".reasoning" : ".reasoning_content",
                             "reasoning is a string or null");
        if (!out->reasoning.n) out->reasoning = keep_string(r, n);
    }
    return TR_OK;
}

static bool is_blank(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!strchr(" \t\r\n", s[i]) || !s[i]) return false;
    return true;
}

static tr_status read_call(reader *r, const tr_jnode *n, size_t index, size_t i, tr_call *call)
{
    const tr_jnode *type = tr_jtext_given(r->t, n, "type"),
                   *function = tr_jtext_given(r->t, n, "function");
    const tr_jnode *name = function ? tr_jtext_given(r->t, function, "name") : NULL;
    const tr_jnode *args = function ? tr_jtext_given(r->t, function, "arguments") : NULL;
    char field[48];

    snprintf(field, sizeof field, ".tool_calls[%zu]", i);
    call->id = keep_string(r, tr_jtext_given(r->t, n, "id"));
    call->name = keep_string(r, name);
    if (!call->name.n || (type && !tr_jtext_is(r->t, type, "function")))
        return refuse_at(r, "invalid_tool_calls", index, field,
                         "a tool call is {\"id\", \"type\": \"function\", \"function\": {\"name\", "
                         "\"arguments\"}}");
    if (args && args->type == TR_J_STRING) {
        tr_text text = keep_string(r, args);
        if (r->c->arena.failed) return no_memory(r);
        if (!is_blank(tr_conversation_text(r->c, text), text.n)) call->given = text;
    } else if (args && args->type == TR_J_OBJECT) {
        call->tree = r->t;
        call->arguments = args;
    } else if (args) {
        snprintf(field, sizeof field, ".tool_calls[%zu].function.arguments", i);
        return refuse_at(r, "invalid_tool_arguments", index, field,
                         "arguments are a JSON object, or a string that holds one");
    }
    return TR_OK;
}

static tr_status read_calls(reader *r, const tr_jnode *m, tr_message *out)
{
    const tr_jnode *list = tr_jtext_given(r->t, m, "tool_calls");
    size_t i = 0;

    out->first_call = r->c->n_calls;
    if (!list) return TR_OK;
    if (list->type != TR_J_ARRAY)
        return refuse_at(r, "invalid_tool_calls", out->index, ".tool_calls",
                         "tool_calls is a list");
    for (const tr_jnode *n = tr_jtext_child(r->t, list); n; n = tr_jtext_next(r->t, n), i++) {
        tr_status st = read_call(r, n, out->index, i, &r->c->call[r->c->n_calls++]);
        if (st != TR_OK) return st;
    }
    out->n_calls = i;
    return TR_OK;
}

static tr_status read_message(reader *r, const tr_jnode *m, tr_message *out)
{
    tr_status st;
    tr_param param;

    if (m->type != TR_J_OBJECT)
        return refuse_at(r, "invalid_type", out->index, "", "a message is an object");
    if ((st = read_role(r, m, out)) != TR_OK) return st;
    if ((st = read_content(r, m, out)) != TR_OK) return st;
    if (out->role == TR_ROLE_TOOL)
        out->id = keep_string(r, tr_jtext_given(r->t, m, "tool_call_id"));
    if (out->role == TR_ROLE_ASSISTANT) {
        if ((st = read_reasoning(r, m, out)) != TR_OK) return st;
        if ((st = read_calls(r, m, out)) != TR_OK) return st;
    }
    /* Tools and schemas on messages are the public V3.2 encoder's; V3.1's template has no place for them. */
    if (r->options->format == TR_CHAT_DSV32 &&
        (out->role == TR_ROLE_SYSTEM || out->role == TR_ROLE_DEVELOPER)) {
        snprintf(param, sizeof param, "messages[%zu].tools", out->index);
        if ((st = read_tools(r, tr_jtext_given(r->t, m, "tools"), param, &out->tools)) != TR_OK)
            return st;
        out->response_format = tr_jtext_given(r->t, m, "response_format");
    }
    return r->c->arena.failed ? no_memory(r) : TR_OK;
}

/* Arguments given as strings become trees, once the arena moves no more. */
static tr_status parse_arguments(reader *r, const tr_message *m)
{
    char field[64];

    for (size_t i = 0; i < m->n_calls; i++) {
        tr_call *call = &r->c->call[m->first_call + i];
        if (!call->given.n) continue;
        tr_err why = {0};
        tr_status st = tr_jtext_parse(&call->own, tr_conversation_text(r->c, call->given),
                                      call->given.n, NULL, &why);
        if (st == TR_E_MEMORY) return no_memory(r);
        snprintf(field, sizeof field, ".tool_calls[%zu].function.arguments", i);
        if (st != TR_OK) return refuse_at(r, "invalid_tool_arguments", m->index, field, why.text);
        call->tree = call->own;
        call->arguments = tr_jtext_root(call->own);
        if (call->arguments->type != TR_J_OBJECT)
            return refuse_at(r, "invalid_tool_arguments", m->index, field,
                             "arguments are not a JSON object");
    }
    return TR_OK;
}

/* ---- the whole ---------------------------------------------------------------------------------------------------- */

static tr_status read_tool_choice(reader *r, const tr_jnode *request)
{
    const tr_jnode *n = tr_jtext_given(r->t, request, "tool_choice");

    if (!n) return TR_OK;
    r->tools_off = tr_jtext_is(r->t, n, "none");
    /* A named or required choice renders all tools and acts through constrained decoding (chat.md 2.4). */
    if (r->tools_off || n->type == TR_J_OBJECT || tr_jtext_is(r->t, n, "auto") ||
        tr_jtext_is(r->t, n, "required"))
        return TR_OK;
    return refuse(r, "invalid_tool_choice", "tool_choice",
                  "tool_choice is none, auto, required or a function");
}

/* The bare schema of a json_schema response format, for the prompt. */
static void read_schema(reader *r, const tr_jnode *request)
{
    const tr_jnode *format = tr_jtext_given(r->t, request, "response_format");

    if (!r->options->response_format_in_prompt || r->options->format != TR_CHAT_DSV32 || !format)
        return;
    const tr_jnode *type = tr_jtext_given(r->t, format, "type");
    const tr_jnode *json_schema = tr_jtext_given(r->t, format, "json_schema");
    if (type && json_schema && tr_jtext_is(r->t, type, "json_schema"))
        r->c->schema = tr_jtext_given(r->t, json_schema, "schema");
}

static tr_status read_top(reader *r, const tr_jnode *request)
{
    tr_status st;
    const tr_jnode *more = tr_jtext_given(r->t, request, "continue_final_message");

    if (more && more->type != TR_J_TRUE && more->type != TR_J_FALSE)
        return refuse(r, "invalid_type", "continue_final_message",
                      "continue_final_message is true or false");
    r->c->continue_final = more && more->type == TR_J_TRUE;
    if ((st = read_tool_choice(r, request)) != TR_OK) return st;
    read_schema(r, request);
    return read_tools(r, tr_jtext_given(r->t, request, "tools"), "tools", &r->c->tools);
}

static tr_status read_messages(reader *r, const tr_jnode *request)
{
    tr_conversation *c = r->c;
    const tr_jnode *list = tr_jtext_given(r->t, request, "messages");
    size_t n_calls = 0;

    if (list && list->type != TR_J_ARRAY)
        return refuse(r, "invalid_type", "messages", "messages is a list");
    if (!list || !list->n_children)
        return refuse(r, "empty_messages", "messages", "there are no messages");
    for (const tr_jnode *m = tr_jtext_child(r->t, list); m; m = tr_jtext_next(r->t, m)) {
        const tr_jnode *calls = tr_jtext_given(r->t, m, "tool_calls");
        if (calls) n_calls += (size_t)calls->n_children;
    }
    c->message = tr_calloc((size_t)list->n_children, sizeof *c->message);
    c->call = tr_calloc(n_calls, sizeof *c->call);
    if (!c->message || !c->call) return no_memory(r);
    for (const tr_jnode *m = tr_jtext_child(r->t, list); m; m = tr_jtext_next(r->t, m)) {
        tr_message *out = &c->message[c->n_messages];
        out->index = c->n_messages++;
        tr_status st = read_message(r, m, out);
        if (st != TR_OK) return st;
    }
    for (size_t i = 0; i < c->n_messages; i++) {
        tr_status st = parse_arguments(r, &c->message[i]);
        if (st != TR_OK) return st;
    }
    return TR_OK;
}

/* Results of one group, messages [first, first + n), into the order of their calls, if ids say so without doubt. */
static tr_status order_results(reader *r, const tr_message *caller, size_t first)
{
    tr_status st = TR_OK;
    tr_conversation *c = r->c;
    size_t n = caller->n_calls;
    sortable *call = tr_calloc(n, sizeof *call), *result = tr_calloc(n, sizeof *result);
    tr_message *sorted = tr_calloc(n, sizeof *sorted);

    if (!call || !result || !sorted) {
        st = no_memory(r);
        goto done;
    }
    for (size_t i = 0; i < n; i++) {
        call[i] = (sortable){c->call[caller->first_call + i].id, i};
        result[i] = (sortable){c->message[first + i].id, i};
        if (!call[i].text.n || !result[i].text.n) goto done;
    }
    if (!sort_unique(c, call, n) || !sort_unique(c, result, n)) goto done;
    for (size_t i = 0; i < n; i++) {
        if (compare_texts(c, call[i].text, result[i].text) != 0) goto done;
        sorted[call[i].i] = c->message[first + result[i].i];
    }
    memcpy(&c->message[first], sorted, n * sizeof *sorted);

done:
    free(call);
    free(result);
    free(sorted);
    return st;
}

/* Tool messages stand behind the assistant message that called, as many as there were calls. */
static tr_status check_groups(reader *r)
{
    tr_conversation *c = r->c;
    size_t i = 0;

    while (i < c->n_messages) {
        const tr_message *m = &c->message[i++];
        if (m->role == TR_ROLE_TOOL)
            return refuse_at(r, "orphan_tool_message", m->index, "",
                             "a tool message follows no assistant message with tool calls");
        /* As the last message it is refused for being that. */
        if (!m->n_calls || i == c->n_messages) continue;
        size_t first = i;
        while (i < c->n_messages && c->message[i].role == TR_ROLE_TOOL)
            i++;
        if (i - first != m->n_calls)
            return refuse_at(
                r, "tool_result_count", m->index, ".tool_calls",
                "the number of tool messages behind it is not the number of its calls");
        tr_status st = order_results(r, m, first);
        if (st != TR_OK) return st;
    }
    return TR_OK;
}

static tr_status check_ends(reader *r)
{
    tr_conversation *c = r->c;
    const tr_message *final = &c->message[c->n_messages - 1];
    bool found = false;

    for (size_t i = 0; i < c->n_messages; i++)
        if (c->message[i].role == TR_ROLE_USER || c->message[i].role == TR_ROLE_DEVELOPER) {
            c->last = i;
            found = true;
        }
    if (!found)
        return refuse(r, "no_user_message", "messages", "there is no user or developer message");
    if (final->role == TR_ROLE_ASSISTANT && (!c->continue_final || final->n_calls))
        return refuse_at(r, "last_message_is_assistant", final->index, "",
                         final->n_calls ? "the last message has tool calls without results"
                                        : "the last message is the assistant's, and "
                                          "continue_final_message is not set");
    if (final->role != TR_ROLE_ASSISTANT && c->continue_final)
        return refuse(r, "nothing_to_continue", "continue_final_message",
                      "the last message is not the assistant's");
    return TR_OK;
}

static tr_status check_dsv32(reader *r)
{
    const tr_conversation *c = r->c;

    for (size_t i = 1; i < c->n_messages; i++) {
        const tr_message *m = &c->message[i];
        tr_role before = c->message[i - 1].role;
        /* At the very end it would leave the prompt without <｜Assistant｜> and its mark. */
        if (m->role == TR_ROLE_SYSTEM && (i == c->n_messages - 1 || before == TR_ROLE_USER ||
                                          before == TR_ROLE_DEVELOPER || before == TR_ROLE_TOOL))
            return refuse_at(r, "system_message_position", m->index, "",
                             "a system message would stand inside the model's turn");
    }
    for (size_t i = c->last + 1; r->thinking && i < c->n_messages; i++) {
        const tr_message *m = &c->message[i];
        bool continued = c->continue_final && i == c->n_messages - 1;
        if (m->role == TR_ROLE_ASSISTANT && !m->reasoning.n && !m->n_calls && !continued)
            return refuse_at(
                r, "assistant_without_reasoning", m->index, ".reasoning_content",
                "in thinking mode an answer after the last user message has reasoning");
    }
    return TR_OK;
}

tr_status tr_conversation_read(tr_conversation *out, const tr_jtext *body, const tr_jnode *request,
                               bool thinking, const tr_chat_options *options,
                               tr_chat_refusal *refusal, tr_err *err)
{
    reader r = {.c = out,
                .t = body,
                .options = options,
                .thinking = thinking,
                .refusal = refusal,
                .err = err};
    tr_status st;

    *out = (tr_conversation){.body = body};
    if (request->type != TR_J_OBJECT)
        st = refuse(&r, "invalid_type", "", "the request is not an object");
    else if ((st = read_top(&r, request)) == TR_OK && (st = read_messages(&r, request)) == TR_OK &&
             (st = check_groups(&r)) == TR_OK && (st = check_ends(&r)) == TR_OK &&
             options->format == TR_CHAT_DSV32)
        st = check_dsv32(&r);
    if (st != TR_OK) tr_conversation_free(out);
    return st;
}

void tr_conversation_free(tr_conversation *c)
{
    for (size_t i = 0; i < c->n_calls; i++)
        tr_jtext_free(c->call[i].own);
    free(c->call);
    free(c->message);
    free(c->arena.s);
    *c = (tr_conversation){0};
}
