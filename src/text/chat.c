#include <config.h>

#include "text/chat.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "base/json.h"
#include "base/size.h"
#include "text/chat_priv.h"

enum { CONFIG_MAX_BYTES = 16 << 20 };

/* ---- format and tokenizer ----------------------------------------------------------------------------------------- */

/* Path of a file of the model folder, the caller's; NULL: out of memory. *exists: it is a regular file. */
static char *model_file(const char *dir, const char *name, bool *exists)
{
    tr_buf b = {0};
    struct stat sb;

    tr_buf_printf(&b, "%s/%s", dir, name);
    *exists = !b.failed && stat(b.s, &sb) == 0 && S_ISREG(sb.st_mode);
    if (!b.failed) return b.s;
    free(b.s);
    return NULL;
}

/* A chat_template in tokenizer_config.json (a string, or a list of named ones), or a file of its own. */
static tr_status has_template(bool *out, const char *model_dir, tr_err *err)
{
    tr_status st = TR_OK;
    json_t *config = NULL;
    bool has_config, has_jinja;
    char *jinja = model_file(model_dir, "chat_template.jinja", &has_jinja);
    char *path = model_file(model_dir, "tokenizer_config.json", &has_config);

    *out = has_jinja;
    if (!jinja || !path) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    if (!has_config) goto done;
    st = tr_json_load(&config, path, CONFIG_MAX_BYTES, err);
    if (st != TR_OK) goto done;
    const json_t *template = json_object_get(config, "chat_template");
    if (json_string_length(template) > 0 || json_array_size(template) > 0) *out = true;

done:
    json_decref(config);
    free(path);
    free(jinja);
    return st;
}

tr_status tr_chat_format_detect(tr_chat_format *out, const char *model_dir,
                                const tr_tokenizer *tokenizer, tr_log *log, tr_err *err)
{
    bool marker, template;
    char *path = model_file(model_dir, "encoding/encoding_dsv32.py", &marker);

    *out = TR_CHAT_NONE;
    if (!path) return tr_fail(err, TR_E_MEMORY, "out of memory");
    free(path);
    tr_status st = has_template(&template, model_dir, err);
    if (st != TR_OK) return st;
    if (marker) {
        *out = TR_CHAT_DSV32; /* the file is only a marker; it is never executed */
    } else if (template) {
        *out = TR_CHAT_DSV31;
    } else if (tokenizer && tr_tokenizer_added(tokenizer, "｜DSML｜") >= 0) {
        *out = TR_CHAT_DSV32;
    } else {
        return tr_fail(err, TR_E_USAGE, "%s: cannot tell the chat format: give --chat-format",
                       model_dir);
    }
    /* No template is known by its hash so far, so every one gets the warning of chat.md 2.1. */
    if (template)
        tr_log_warn(
            log,
            "%s: the chat template in it is not interpreted: prompts follow the built-in format %s",
            model_dir, *out == TR_CHAT_DSV32 ? "dsv32" : "dsv31");
    return TR_OK;
}

tr_status tr_chat_check_tokenizer(const tr_tokenizer *tokenizer, tr_err *err)
{
    static const char *const needed[] = {TR_BOS_TEXT,     TR_EOS_TEXT,  TR_THINK_TEXT,
                                         TR_UNTHINK_TEXT, TR_USER_TEXT, TR_ASSISTANT_TEXT};

    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if (tr_tokenizer_added(tokenizer, needed[i]) < 0)
            return tr_fail(
                err, TR_E_INPUT,
                "tokenizer.json: added_tokens: %s is missing: chat needs it as one token",
                needed[i]);
    return TR_OK;
}

/* ---- thinking ----------------------------------------------------------------------------------------------------- */

typedef enum choice { CHOICE_NONE, CHOICE_ON, CHOICE_OFF, CHOICE_BAD } choice;

static choice bool_choice(const tr_jnode *n)
{
    if (!n) return CHOICE_NONE;
    if (n->type == TR_J_TRUE) return CHOICE_ON;
    return n->type == TR_J_FALSE ? CHOICE_OFF : CHOICE_BAD;
}

static choice object_choice(const tr_jtext *t, const tr_jnode *n)
{
    if (!n) return CHOICE_NONE;
    const tr_jnode *type = tr_jtext_given(t, n, "type"); /* NULL also where n is no object */
    if (type && tr_jtext_is(t, type, "enabled")) return CHOICE_ON;
    return type && tr_jtext_is(t, type, "disabled") ? CHOICE_OFF : CHOICE_BAD;
}

static choice effort_choice(const tr_jtext *t, const tr_jnode *n)
{
    if (!n) return CHOICE_NONE;
    if (n->type != TR_J_STRING) return CHOICE_BAD;
    return tr_jtext_is(t, n, "none") ? CHOICE_OFF : CHOICE_ON;
}

tr_status tr_chat_thinking(bool *thinking, const tr_jtext *body, const tr_jnode *request,
                           const tr_chat_options *options, tr_chat_refusal *refusal, tr_err *err)
{
    const tr_jnode *kwargs = tr_jtext_given(body, request, "chat_template_kwargs");
    static const char *const param[] = {"chat_template_kwargs.thinking",
                                        "chat_template_kwargs.enable_thinking", "thinking",
                                        "reasoning_effort"};
    choice said[4];
    int i = 0;

    *thinking = options->thinking_only || options->default_thinking;
    if (kwargs && kwargs->type != TR_J_OBJECT)
        return tr_chat_refuse(refusal, err, "invalid_type", "chat_template_kwargs",
                              "chat_template_kwargs is an object");
    said[0] = bool_choice(tr_jtext_given(body, kwargs, "thinking"));
    said[1] = bool_choice(tr_jtext_given(body, kwargs, "enable_thinking"));
    said[2] = object_choice(body, tr_jtext_given(body, request, "thinking"));
    said[3] = effort_choice(body, tr_jtext_given(body, request, "reasoning_effort"));
    for (int k = 0; k < 4; k++)
        if (said[k] == CHOICE_BAD)
            return tr_chat_refuse(
                refusal, err, "invalid_type", param[k],
                k < 2    ? "true or false is wanted"
                : k == 2 ? "{\"type\": \"enabled\"} or {\"type\": \"disabled\"} is wanted"
                         : "a string is wanted");
    while (i < 4 && said[i] == CHOICE_NONE)
        i++;
    if (i == 4) return TR_OK;
    if (said[i] == CHOICE_OFF && options->thinking_only)
        return tr_chat_refuse(refusal, err, "thinking_only", param[i],
                              "this model always thinks: it cannot be switched off");
    *thinking = said[i] == CHOICE_ON;
    return TR_OK;
}

/* ---- the prompt --------------------------------------------------------------------------------------------------- */

/* The bytes from `begin` on were just written; neighbours of one kind are one segment. Pointers are set at the end. */
static void mark_segment(tr_prompt_writer *w, size_t begin, bool literal)
{
    tr_chat_prompt *p = w->out;
    size_t n = p->text.n - begin;

    literal = literal && w->literal_content;
    if (!n) return;
    if (p->n_segments && p->segments[p->n_segments - 1].literal == literal) {
        p->segments[p->n_segments - 1].n += n;
        return;
    }
    if (p->n_segments == w->cap_segments) {
        size_t cap = w->cap_segments ? w->cap_segments : 8, bytes;
        if (!tr_mul(&cap, cap, 2) || !tr_mul(&bytes, cap, sizeof *p->segments)) {
            p->text.failed = true;
            return;
        }
        tr_segment *s = realloc(p->segments, bytes);
        if (!s) {
            p->text.failed = true;
            return;
        }
        p->segments = s;
        w->cap_segments = cap;
    }
    p->segments[p->n_segments++] = (tr_segment){.n = n, .literal = literal};
}

void tr_put(tr_prompt_writer *w, const char *text)
{
    size_t begin = w->out->text.n;
    tr_buf_puts(&w->out->text, text);
    mark_segment(w, begin, false);
}

void tr_put_client(tr_prompt_writer *w, const char *text, size_t n)
{
    size_t begin = w->out->text.n;
    tr_buf_add(&w->out->text, text, n);
    mark_segment(w, begin, true);
}

void tr_put_text(tr_prompt_writer *w, const tr_conversation *c, tr_text text)
{
    tr_put_client(w, tr_conversation_text(c, text), text.n);
}

tr_status tr_put_json(tr_prompt_writer *w, const tr_jtext *t, const tr_jnode *n, const char *code,
                      const char *param, tr_err *err)
{
    size_t begin = w->out->text.n;
    tr_err why = {0};
    tr_status st = tr_jtext_respell(t, n, &w->out->text, &why);

    if (st == TR_E_INPUT) return tr_chat_refuse(w->refusal, err, code, param, "%.200s", why.text);
    if (st != TR_OK) return tr_fail(err, st, "%s", why.text);
    mark_segment(w, begin, true);
    return TR_OK;
}

tr_status tr_chat_encode(tr_chat_prompt *out, const tr_jtext *body, const tr_jnode *request,
                         bool thinking, const tr_chat_options *options, tr_chat_refusal *refusal,
                         tr_err *err)
{
    tr_conversation c;
    tr_prompt_writer w = {
        .out = out, .literal_content = options->literal_content, .refusal = refusal};

    *out = (tr_chat_prompt){0};
    if (options->format == TR_CHAT_NONE)
        return tr_chat_refuse(refusal, err, "chat_not_supported", "",
                              "this run has no chat format: only prompts are taken");
    tr_status st = tr_conversation_read(&c, body, request, thinking, options, refusal, err);
    if (st != TR_OK) return st;
    if (options->format == TR_CHAT_DSV32)
        st = tr_dsv32_render(&w, &c, thinking, err);
    else
        st = tr_dsv31_render(&w, &c, thinking, options->dsv31_assistant_after_tool, err);
    out->tools = c.any_tools;
    tr_conversation_free(&c);
    if (st == TR_OK && out->text.failed) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    if (st != TR_OK) {
        tr_chat_prompt_free(out);
        return st;
    }
    size_t at = 0;
    for (size_t i = 0; i < out->n_segments; i++) {
        out->segments[i].text = out->text.s + at;
        at += out->segments[i].n;
    }
    return TR_OK;
}

void tr_chat_prompt_free(tr_chat_prompt *p)
{
    free(p->text.s);
    free(p->segments);
    *p = (tr_chat_prompt){0};
}
