/* trireme batch --prompt: one chat message through the same parser and engine. */
#include <config.h>

#include "batch/job.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "base/stop.h"
#include "text/utf8.h"

typedef struct asker {
    tr_engine *engine;
    tr_event *event; /* the answer */
} asker;

/* Takes the answer while the main thread steps; a signal stops the engine. */
static void *ask(void *arg)
{
    asker *a = arg;
    tr_event *event;
    int got;

    while ((got = tr_engine_take(a->engine, &event, 50)) >= 0) {
        if (got > 0) {
            tr_event_free(a->event);
            a->event = event;
        } else if (tr_stop_requested()) {
            tr_engine_stop(a->engine);
        }
    }
    return NULL;
}

/* The line of a batch that would ask the same. */
static tr_status make_line(const char *text, size_t n, tr_buf *line, tr_err *err)
{
    size_t room;
    char *repaired = tr_mul(&room, n, 3) && tr_add(&room, room, 1) ? malloc(room) : NULL;

    if (!repaired) return tr_fail(err, TR_E_MEMORY, "out of memory");
    tr_buf_puts(line,
                "{\"custom_id\":\"prompt\",\"method\":\"POST\",\"url\":\"/v1/chat/completions\","
                "\"body\":{\"messages\":[{\"role\":\"user\",\"content\":");
    tr_json_quote(line, repaired, tr_utf8_repair(text, n, repaired));
    tr_buf_puts(line, "}]}}");
    free(repaired);
    return line->failed ? tr_fail(err, TR_E_MEMORY, "out of memory") : TR_OK;
}

static tr_status parse(const tr_job_options *o, const char *text, size_t n, tr_request **out,
                       tr_err *err)
{
    tr_parser *parser = NULL;
    tr_envelope e = {0};
    tr_buf line = {0};
    tr_parsed parsed = {0};

    tr_status st = make_line(text, n, &line, err);
    if (st == TR_OK)
        st = tr_envelope_read(
            &e, &(tr_line){.number = 1, .text = line.s, .n = line.n, .whole = true}, err);
    if (st == TR_OK) st = tr_parser_create(&parser, &o->request, err);
    if (st == TR_OK) st = tr_parser_line(parser, &e, &parsed, err);
    if (st == TR_OK && parsed.kind != TR_PARSED_REQUEST)
        st = tr_fail(err, TR_E_USAGE, "--prompt: %s", parsed.refusal.message);
    *out = parsed.request;
    tr_parser_free(parser);
    tr_envelope_free(&e);
    free(line.s);
    return st;
}

static tr_status print_answer(const tr_event *event, FILE *out, tr_err *err)
{
    tr_reasoning r;

    if (!event)
        return tr_fail(err, TR_E_STOP, "stopped by %s",
                       tr_stop_reason() ? tr_stop_reason() : "request");
    if (event->kind == TR_EVENT_FAILED) {
        tr_refusal refusal;
        tr_record_failure(event, &refusal);
        return tr_fail(err, refusal.status == 400 ? TR_E_USAGE : TR_E_DEVICE, "--prompt: %s: %s",
                       refusal.code, refusal.message);
    }
    tr_reasoning_begin(&r, ((const tr_asked *)event->request->user)->start);
    tr_reasoning_feed(&r, event->choice[0].text, event->choice[0].n_text);
    tr_reasoning_finish(&r);
    bool failed = r.content.failed || r.held.failed;
    if (!failed && r.content.n) fwrite(r.content.s, 1, r.content.n, out);
    tr_reasoning_free(&r);
    if (failed) return tr_fail(err, TR_E_MEMORY, "out of memory");
    fputc('\n', out);
    if (fflush(out) != 0) return tr_fail(err, TR_E_IO, "standard output: %s", strerror(errno));
    return TR_OK;
}

tr_status tr_job_prompt(const tr_job_options *o, const char *text, size_t n, FILE *out, tr_err *err)
{
    asker a = {.engine = o->engine};
    tr_request *request = NULL;
    pthread_t thread;

    tr_status st = parse(o, text, n, &request, err);
    if (st != TR_OK) return st;
    st = tr_engine_submit(o->engine, request, err);
    if (st != TR_OK) return st;
    tr_engine_close(o->engine);
    if (pthread_create(&thread, NULL, ask, &a) != 0)
        return tr_fail(err, TR_E_MEMORY, "cannot start a thread");
    st = tr_engine_run(o->engine, err);
    pthread_join(thread, NULL);
    if (st == TR_OK || (st == TR_E_STOP && a.event)) st = print_answer(a.event, out, err);
    tr_event_free(a.event);
    return st;
}
