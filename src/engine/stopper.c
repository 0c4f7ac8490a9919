#include <config.h>

#include "engine/stopper.h"

#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "text/detok.h"

/* Knuth, Morris and Pratt: border[k] is the length of the longest proper prefix of the string that ends its first k + 1
 * bytes. One automaton per string; its state is the longest prefix of the string that ends the text so far, which is
 * also what must be held back. */
typedef struct automaton {
    const char *s;
    size_t n;
    uint32_t *border; /* [n] */
} automaton;

struct tr_stops {
    int n;
    automaton a[];
};

struct tr_stopper {
    tr_stopper_options options;
    tr_detok detok;
    char *text;
    size_t n_text, cap;
    size_t n_held; /* trailing bytes of text that may still become a stop string */
    int32_t stop_token;
    int stop;
    uint32_t state[]; /* [stops->n] */
};

static bool automaton_prepare(automaton *a, const tr_string *stop)
{
    a->s = stop->s;
    a->n = stop->n;
    if (stop->n > UINT32_MAX || !(a->border = tr_calloc(stop->n, sizeof *a->border))) return false;
    for (size_t i = 1, k = 0; i < stop->n; i++) {
        while (k && stop->s[i] != stop->s[k])
            k = a->border[k - 1];
        if (stop->s[i] == stop->s[k]) k++;
        a->border[i] = (uint32_t)k;
    }
    return true;
}

tr_stops *tr_stops_create(const tr_string *stop, int n_stop)
{
    size_t n = n_stop > 0 ? (size_t)n_stop : 0;
    tr_stops *s = calloc(1, sizeof *s + n * sizeof s->a[0]);

    if (!s) return NULL;
    for (; s->n < n_stop; s->n++)
        if (!automaton_prepare(&s->a[s->n], &stop[s->n])) {
            tr_stops_free(s);
            return NULL;
        }
    return s;
}

void tr_stops_free(tr_stops *s)
{
    if (!s) return;
    for (int i = 0; i < s->n; i++)
        free(s->a[i].border);
    free(s);
}

tr_stopper *tr_stopper_create(const tr_stopper_options *options)
{
    size_t n = (size_t)options->stops->n;
    tr_stopper *s = calloc(1, sizeof *s + n * sizeof s->state[0]);

    if (!s) return NULL;
    s->options = *options;
    s->stop_token = -1;
    s->stop = -1;
    if (options->has_text) {
        s->cap = 256;
        if (!(s->text = malloc(s->cap))) {
            free(s);
            return NULL;
        }
    }
    return s;
}

void tr_stopper_free(tr_stopper *s)
{
    if (!s) return;
    free(s->text);
    free(s);
}

bool tr_stopper_ends(const tr_stopper *s, int32_t token)
{
    const tr_params *params = s->options.params;

    if (token == s->options.eos && !params->ignore_eos) return true;
    for (int i = 0; i < params->n_stop_tokens; i++)
        if (params->stop_token[i] == token) return true;
    return false;
}

/* Room for n more bytes and the final NUL. */
static bool reserve(tr_stopper *s, size_t n)
{
    size_t need;

    if (!tr_add(&need, s->n_text, n) || !tr_add(&need, need, 1)) return false;
    if (need <= s->cap) return true;
    size_t cap = s->cap > SIZE_MAX / 2 || 2 * s->cap < need ? need : 2 * s->cap;
    char *text = realloc(s->text, cap);
    if (!text) return false;
    s->text = text;
    s->cap = cap;
    return true;
}

/* One more byte for automaton i; true: the string is complete. */
static bool advance(tr_stopper *s, int i, char byte)
{
    const automaton *a = &s->options.stops->a[i];
    size_t k = s->state[i];

    if (!a->n) return false;
    while (k && a->s[k] != byte)
        k = a->border[k - 1];
    if (a->s[k] == byte) k++;
    s->state[i] = (uint32_t)k;
    return k == a->n;
}

/* n bytes were appended to the text: look for stop strings. 1: one is complete, and the text is cut there. */
static int match(tr_stopper *s, size_t n)
{
    const tr_stops *stops = s->options.stops;

    for (size_t at = s->n_text - n; at < s->n_text; at++) {
        for (int i = 0; i < stops->n; i++)
            if (advance(s, i, s->text[at]) && (s->stop < 0 || stops->a[i].n > stops->a[s->stop].n))
                s->stop = i;
        if (s->stop < 0) continue;
        s->n_text = at + 1 - (s->options.params->include_stop ? 0 : stops->a[s->stop].n);
        s->n_held = 0;
        return 1;
    }
    s->n_held = 0;
    for (int i = 0; i < stops->n; i++)
        if (s->state[i] > s->n_held) s->n_held = s->state[i];
    return 0;
}

/* Nothing comes any more. */
static int flush(tr_stopper *s)
{
    if (!s->options.has_text) return 0;
    if (!reserve(s, tr_detok_max(0))) return -1;
    size_t n = tr_detok_flush(&s->detok, s->text + s->n_text);
    s->n_text += n;
    int found = match(s, n);
    s->n_held = 0;
    return found;
}

int tr_stopper_token(tr_stopper *s, int32_t token, const char *bytes, size_t n)
{
    const tr_stopper_options *o = &s->options;

    if (tr_stopper_ends(s, token)) {
        /* A stop string that the flush completes lies before the token. */
        int found = flush(s);
        if (!found) s->stop_token = token;
        return found < 0 ? -1 : 1;
    }
    if (!o->has_text || !n || token == o->eos || token == o->bos || token == o->pad) return 0;
    if (n > SIZE_MAX / 8 || !reserve(s, tr_detok_max(n))) return -1;
    size_t n_new = tr_detok_feed(&s->detok, bytes, n, s->text + s->n_text);
    s->n_text += n_new;
    return match(s, n_new);
}

int tr_stopper_finish(tr_stopper *s)
{
    return flush(s);
}

const char *tr_stopper_text(const tr_stopper *s, size_t *n)
{
    *n = s->n_text - s->n_held;
    return s->text;
}

char *tr_stopper_take_text(tr_stopper *s, size_t *n)
{
    char *text = s->text;

    *n = s->n_text;
    if (text) text[s->n_text] = 0; /* reserve left room */
    s->text = NULL;
    s->n_text = s->cap = 0;
    return text;
}

int32_t tr_stopper_stop_token(const tr_stopper *s)
{
    return s->stop_token;
}

int tr_stopper_stop(const tr_stopper *s)
{
    return s->stop;
}
