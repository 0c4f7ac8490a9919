#include <config.h>

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "profile/summary_priv.h"

/* NVML is read (watts, hertz, bytes in use); the others count from the start. */
static bool is_reading(const char *name)
{
    return strncmp(name, "nvml/", 5) == 0;
}

/* One rank's: false where there is no number. */
static bool value_of(const double *v, size_t n, bool reading, double *out)
{
    double sum = 0, last = 0;
    size_t known = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(v[i])) continue;
        known++;
        sum += v[i];
        if (v[i] > last) last = v[i]; /* zeros fill a joined table up */
    }
    *out = reading && known > 0 ? sum / (double)known : last;
    return known > 0;
}

static tr_status one_counter(tr_summary_counter *c, tr_reader *r, const char *path, tr_err *err)
{
    double sum = 0;
    int known = 0;
    c->name = strdup(path + strlen("/counters/"));
    c->units = tr_reader_attribute_of(r, path, "units");
    if (!c->units) c->units = strdup("");
    c->absent = tr_reader_attribute_of(r, path, "absent");
    if (!c->name || !c->units) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (int i = 0; i < tr_reader_about_of(r)->n_ranks; i++) {
        tr_h5_data data;
        double value;
        tr_status st = tr_reader_read(r, TR_D_COUNTER, path, i, &data, err);
        if (st != TR_OK) return st;
        if (value_of(data.at, data.n, is_reading(c->name), &value)) {
            sum += value;
            known++;
        }
        free(data.at);
    }
    c->value = known > 0 ? sum / known : 0;
    if (known > 0) { /* absent on some ranks only */
        free(c->absent);
        c->absent = NULL;
    } else if (!c->absent) {
        c->absent = strdup("no sample");
    }
    return TR_OK;
}

tr_status tr_summary_counters(tr_summary *s, tr_reader *r, tr_err *err)
{
    char **paths = NULL;
    size_t n = 0;
    tr_status st = tr_reader_names(r, TR_D_COUNTER, &paths, &n, err);
    if (st != TR_OK) return st;
    s->counter = tr_calloc(n, sizeof *s->counter);
    if (!s->counter) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    for (size_t i = 0; i < n && st == TR_OK; i++)
        st = one_counter(&s->counter[s->n_counters++], r, paths[i], err);
    tr_h5_texts_free(paths, n);
    return st;
}
