#include <config.h>

#include "model/problems.h"

#include <stdarg.h>
#include <stdio.h>

void tr_problem(tr_problems *p, const char *fmt, ...)
{
    va_list args;
    size_t room = sizeof p->text - p->used;
    size_t lead = p->n_shown ? 2 : 0;

    p->n++;
    /* The first is shown even when it has to be cut; of the others only what fits whole. */
    if (p->n > p->n_shown + 1 || room <= lead) return;
    va_start(args, fmt);
    int n = vsnprintf(p->text + p->used + lead, room - lead, fmt, args);
    va_end(args);
    if (n < 0 || ((size_t)n >= room - lead && p->n_shown)) {
        p->text[p->used] = '\0';
        return;
    }
    if (lead) {
        p->text[p->used] = ';';
        p->text[p->used + 1] = ' ';
    }
    p->n_shown++;
    p->used = (size_t)n >= room - lead ? sizeof p->text - 1 : p->used + lead + (size_t)n;
}

tr_status tr_problems_end(const tr_problems *p, tr_status status, const char *what, tr_err *err)
{
    if (p->n == 0) return TR_OK;
    if (p->n == p->n_shown) return tr_fail(err, status, "%s: %s", what, p->text);
    return tr_fail(err, status, "%s: %s (and %d more)", what, p->text, p->n - p->n_shown);
}
