#include <config.h>

#include "command/limit.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { DIGITS_MAX = 18, SHARDS_MAX = 1 << 24 };
static const double time_max_s = 10 * 366 * 86400.0;

/* Digits alone. False: it is no number. *end: behind it. */
static bool number(const char *text, int64_t *out, const char **end)
{
    int64_t n = 0;
    int i = 0;

    for (; text[i] >= '0' && text[i] <= '9'; i++) {
        if (i == DIGITS_MAX) return false;
        n = 10 * n + (text[i] - '0');
    }
    *out = n;
    *end = text + i;
    return i > 0;
}

static bool whole_number(const char *text, int64_t *out)
{
    const char *end;
    return text && number(text, out, &end) && !*end;
}

/* "a:b:c" into at most three numbers; how many, 0: something else. */
static int numbers(const char *text, int64_t part[3])
{
    for (int n = 0; n < 3;) {
        if (!number(text, &part[n++], &text)) return 0;
        if (!*text) return n;
        if (*text++ != ':') return 0;
    }
    return 0;
}

tr_status tr_limit_time(double *seconds, const char *text, tr_err *err)
{
    static const double unit[] = {3600, 60, 1};
    int64_t part[3], days = 0;
    const char *rest = text, *dash = strchr(text, '-'), *end;
    double sum = 0;

    *seconds = -1;
    if (!strcmp(text, "UNLIMITED")) return TR_OK;
    bool good = !dash || (number(text, &days, &end) && end == dash);
    if (dash) rest = dash + 1;
    const int n = good ? numbers(rest, part) : 0;
    /* With days the first number is hours; without them the last one is seconds. */
    for (int i = 0; i < n; i++)
        sum += (double)part[i] * unit[dash ? i : 3 - n + i];
    sum += 86400.0 * (double)days;
    if (!n || sum > time_max_s)
        return tr_fail(err, TR_E_USAGE,
                       "--time-budget %s: neither seconds nor a time such as 59:30, 12:00:00, "
                       "1-12 or 1-12:00:00",
                       text);
    *seconds = sum;
    return TR_OK;
}

double tr_limit_slurm(const char *text, int64_t now_s, bool *odd)
{
    int64_t end_s = 0;

    *odd = false;
    if (!text || !*text) return -1;
    /* A time that has passed is another job's: this one is still running. */
    *odd = !whole_number(text, &end_s) || end_s <= now_s || (double)(end_s - now_s) > time_max_s;
    return *odd ? -1 : (double)(end_s - now_s);
}

double tr_limit_margin(double seconds)
{
    const double margin = seconds / 20;
    return margin < 2 ? 2 : margin > 30 ? 30 : margin;
}

static tr_status shard_auto(tr_input_shard *out, char *(*get)(const char *name), tr_err *err)
{
    static const char *const name[] = {"SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN",
                                       "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT",
                                       "SLURM_ARRAY_TASK_STEP"};
    enum { ID, MIN, MAX, COUNT, STEP, N };
    int64_t v[N];

    for (int i = 0; i < N; i++) {
        const char *text = get(name[i]);
        v[i] = 1;
        if (!text && i == STEP) continue;
        if (!text)
            return tr_fail(err, TR_E_USAGE, "--shard auto: %s is not set: not in a job array",
                           name[i]);
        if (!whole_number(text, &v[i]))
            return tr_fail(err, TR_E_USAGE, "--shard auto: %s is %s", name[i], text);
    }
    if (v[STEP] < 1 || v[MIN] > v[ID] || v[ID] > v[MAX] || (v[ID] - v[MIN]) % v[STEP] ||
        (v[MAX] - v[MIN]) / v[STEP] + 1 != v[COUNT] || v[COUNT] > SHARDS_MAX)
        return tr_fail(
            err, TR_E_USAGE,
            "--shard auto: task %jd of %jd tasks from %jd to %jd: the array's numbers must "
            "have no gaps (or give --shard i/n)",
            (intmax_t)v[ID], (intmax_t)v[COUNT], (intmax_t)v[MIN], (intmax_t)v[MAX]);
    *out = (tr_input_shard){.i = (uint64_t)((v[ID] - v[MIN]) / v[STEP]), .n = (uint64_t)v[COUNT]};
    return TR_OK;
}

tr_status tr_limit_shard(tr_input_shard *out, const char *text, char *(*get)(const char *name),
                         tr_err *err)
{
    int64_t i = 0, n = 0;
    const char *end = NULL;

    if (!strcmp(text, "auto")) return shard_auto(out, get, err);
    if (!number(text, &i, &end) || *end != '/' || !whole_number(end + 1, &n) || n < 1 ||
        n > SHARDS_MAX || i >= n)
        return tr_fail(err, TR_E_USAGE, "--shard %s: neither I/N, I from 0 to N - 1, nor auto",
                       text);
    *out = (tr_input_shard){.i = (uint64_t)i, .n = (uint64_t)n};
    return TR_OK;
}
