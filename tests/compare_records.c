/* compare_records [-t TOLERANCE] WANTED GOT: do two output files of batch hold the same answers? Records are matched by
 * custom_id (lines that were no request: by their number); every request exactly once in each. What differs from run to run is
 * left out: created, cached_tokens and request ids made of times. Everything else must be equal, and numbers with a fraction
 * (log-probabilities) to the last digit that was written, or, with -t, within TOLERANCE.
 *
 * With a tolerance the alternatives of one position ("top_logprobs") are matched by token: two that lie closer together than
 * the tolerance may change places, and the last may give way to one that was left out.
 *
 * One line to stdout: how many records, how many differ, the worst difference. Exit status 0, 1 (they differ), 2 (usage or
 * unreadable). */
#include <config.h>

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

typedef struct comparison {
    double tolerance, worst;
    char where[512]; /* the path of what is compared now */
    char said[512];  /* the first difference of the record */
} comparison;

static bool differs(comparison *c, const char *how)
{
    if (!c->said[0]) snprintf(c->said, sizeof c->said, "%.400s: %s", c->where, how);
    return false;
}

static bool alike(comparison *c, json_t *a, json_t *b);

/* One step down the path and back. */
static bool alike_at(comparison *c, const char *name, json_t *a, json_t *b)
{
    const size_t n = strlen(c->where);
    snprintf(c->where + n, sizeof c->where - n, "/%s", name);
    const bool ok = alike(c, a, b);
    if (ok) c->where[n] = '\0';
    return ok;
}

static bool numbers_alike(comparison *c, double a, double b)
{
    const double d = fabs(a - b);
    char text[80];

    if (a == b) return true;
    if (d > c->worst || isnan(d)) c->worst = d;
    if (d <= c->tolerance) return true;
    snprintf(text, sizeof text, "%.9g instead of %.9g", b, a);
    return differs(c, text);
}

static bool is_left_out(const char *key)
{
    return strcmp(key, "created") == 0 || strcmp(key, "cached_tokens") == 0;
}

static bool objects_alike(comparison *c, json_t *a, json_t *b)
{
    const char *key;
    json_t *x;

    json_object_foreach(a, key, x)
    {
        if (is_left_out(key)) continue;
        if (!alike_at(c, key, x, json_object_get(b, key))) return false;
    }
    return json_object_size(a) == json_object_size(b) || differs(c, "other members");
}

/* ---- alternatives of one position: as an object {text: logprob}, or as an array of {token, bytes, logprob} ------------------ */

static double smallest(json_t *list)
{
    double low = INFINITY;
    const char *key;
    json_t *x;
    size_t i;

    if (json_is_array(list)) {
        json_array_foreach(list, i, x) low =
            fmin(low, json_number_value(json_object_get(x, "logprob")));
    } else {
        json_object_foreach(list, key, x) low = fmin(low, json_number_value(x));
    }
    return low;
}

/* The alternative of the same token in the other list. */
static json_t *find_token(json_t *list, const json_t *wanted)
{
    json_t *x;
    size_t i;

    json_array_foreach(
        list, i,
        x) if (json_equal(json_object_get(x, "token"), json_object_get(wanted, "token")) &&
               json_equal(json_object_get(x, "bytes"), json_object_get(wanted, "bytes"))) return x;
    return NULL;
}

static bool alternative_alike(comparison *c, const char *token, json_t *a, json_t *b, double last)
{
    const double x = json_number_value(a);

    if (b) return alike_at(c, token, a, b);
    if (x - last <= c->tolerance)
        return true; /* it and the one that took its place: both next to the last */
    return differs(c, "an alternative is missing");
}

static bool alternatives_alike(comparison *c, json_t *a, json_t *b)
{
    const double last = fmax(smallest(a), smallest(b));
    const char *key;
    json_t *x;
    size_t i;

    if (json_is_array(a)) {
        if (json_array_size(a) != json_array_size(b)) return differs(c, "more or fewer of them");
        json_array_foreach(a, i, x)
        {
            json_t *other = find_token(b, x);
            if (!alternative_alike(c, json_string_value(json_object_get(x, "token")),
                                   json_object_get(x, "logprob"), json_object_get(other, "logprob"),
                                   last))
                return false;
        }
        return true;
    }
    if (json_object_size(a) != json_object_size(b)) return differs(c, "more or fewer of them");
    json_object_foreach(a, key, x)
    {
        if (!alternative_alike(c, key, x, json_object_get(b, key), last)) return false;
    }
    return true;
}

/* Under "top_logprobs" and "prompt_logprobs" an object of numbers, or an array of tokens. */
static bool is_alternatives(const comparison *c, const json_t *a)
{
    if (c->tolerance == 0 || !strstr(c->where, "top_logprobs")) return false;
    if (json_is_object(a)) return json_object_size(a) > 0 && !json_object_get(a, "token");
    const json_t *first = json_array_get(a, 0);
    return json_is_object(first) && json_object_get(first, "token");
}

static bool alike(comparison *c, json_t *a, json_t *b)
{
    char at[32];
    size_t i;
    json_t *x;

    if (!a || !b || json_typeof(a) != json_typeof(b))
        return differs(c, "of another kind, or missing");
    if (json_is_real(a)) return numbers_alike(c, json_real_value(a), json_real_value(b));
    if (is_alternatives(c, a)) return alternatives_alike(c, a, b);
    if (json_is_object(a)) return objects_alike(c, a, b);
    if (!json_is_array(a)) return json_equal(a, b) || differs(c, "another value");
    if (json_array_size(a) != json_array_size(b)) return differs(c, "another length");
    json_array_foreach(a, i, x)
    {
        snprintf(at, sizeof at, "%zu", i);
        if (!alike_at(c, at, x, json_array_get(b, i))) return false;
    }
    return true;
}

/* ---- files ------------------------------------------------------------------------------------------------------------- */

static void die(const char *path, const char *what, size_t line)
{
    fprintf(stderr, "compare_records: %s, line %zu: %s\n", path, line, what);
    exit(2);
}

/* Records of a file by what they answer. */
static json_t *load(const char *path)
{
    FILE *file = fopen(path, "r");
    json_t *records = json_object();
    char *text = NULL, key[64];
    size_t room = 0, line = 0;
    ssize_t n;

    if (!file || !records) die(path, file ? "out of memory" : strerror(errno), 0);
    while ((n = getline(&text, &room, file)) > 0) {
        json_error_t e;
        line++;
        if (text[n - 1] != '\n') die(path, "a torn end", line);
        json_t *r = json_loadb(text, (size_t)n, JSON_ALLOW_NUL, &e);
        if (!r) die(path, e.text, line);
        const char *id = json_string_value(json_object_get(r, "custom_id"));
        if (!id) {
            const json_t *at = json_object_get(json_object_get(r, "error"), "line");
            snprintf(key, sizeof key, "line %d", (int)json_integer_value(at));
            id = key;
        }
        if (json_object_get(records, id)) die(path, "a second record of one request", line);
        json_object_set_new(records, id, r);
    }
    free(text);
    fclose(file);
    return records;
}

int main(int argc, char **argv)
{
    comparison c = {0};
    int n_differ = 0;
    const char *id;
    json_t *r;

    if (argc == 5 && strcmp(argv[1], "-t") == 0) {
        c.tolerance = strtod(argv[2], NULL);
        argv += 2;
        argc -= 2;
    }
    if (argc != 3) {
        fprintf(stderr, "usage: compare_records [-t TOLERANCE] WANTED GOT\n");
        return 2;
    }
    json_t *wanted = load(argv[1]), *got = load(argv[2]);
    json_object_foreach(wanted, id, r)
    {
        c.where[0] = c.said[0] = '\0';
        if (!json_object_get(got, id)) {
            printf("%s: no record\n", id);
            n_differ++;
        } else if (!alike(&c, r, json_object_get(got, id))) {
            printf("%s: %s\n", id, c.said);
            n_differ++;
        }
    }
    json_object_foreach(got, id, r)
    {
        if (json_object_get(wanted, id)) continue;
        printf("%s: a record of nothing that was asked\n", id);
        n_differ++;
    }
    printf("%zu records, %d differ, worst difference %.2g%s\n", json_object_size(wanted), n_differ,
           c.worst, n_differ || c.worst > 0 ? "" : ": identical");
    const bool empty = json_object_size(wanted) == 0;
    if (empty) printf("nothing to compare\n");
    json_decref(wanted);
    json_decref(got);
    return n_differ || empty;
}
