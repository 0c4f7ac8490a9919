#include <config.h>

#include "mpi/grid.h"

#include <stdbool.h>
#include <stdio.h>
#include <string.h>

/* Broken rules, one behind the other: the user sees all of them at once (parallel.md 1.3). */
typedef struct complaints {
    char text[768];
    size_t n;
} complaints;

static void complain(complaints *c, const char *text)
{
    int n = snprintf(c->text + c->n, sizeof c->text - c->n, "%s%s", c->n ? "; " : "", text);
    if (n > 0) c->n += (size_t)n < sizeof c->text - c->n ? (size_t)n : sizeof c->text - c->n - 1;
}

/* a * b * c, or -1 when it does not fit: then it is no grid either. */
static int product(int a, int b, int c)
{
    int r;
    return __builtin_mul_overflow(a, b, &r) || __builtin_mul_overflow(r, c, &r) ? -1 : r;
}

static bool check_positive(const tr_grid_sizes *s, complaints *c)
{
    const struct {
        const char *option;
        int value;
    } size[] = {{"--pp", s->pp}, {"--dp", s->dp},     {"--cp", s->cp},   {"--tp", s->tp},
                {"--ep", s->ep}, {"--moe-tp", s->xt}, {"MoE-DP", s->mdp}};
    char text[64];
    bool good = true;

    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        if (size[i].value < 1) {
            snprintf(text, sizeof text, "%s %d is not positive", size[i].option, size[i].value);
            complain(c, text);
            good = false;
        }
    return good;
}

static void check_products(const tr_grid_sizes *s, int world, complaints *c)
{
    char text[160];
    int attention = product(s->dp, s->cp, s->tp), moe = product(s->mdp, s->ep, s->xt);

    if (attention < 0 || product(attention, s->pp, 1) != world) {
        snprintf(text, sizeof text, "pp %d * dp %d * cp %d * tp %d is not the number of ranks, %d",
                 s->pp, s->dp, s->cp, s->tp, world);
        complain(c, text);
    }
    if (attention < 0 || attention != moe) {
        snprintf(text, sizeof text,
                 "MoE-DP %d * ep %d * moe-tp %d is not the stage's width, dp %d * cp %d * tp %d",
                 s->mdp, s->ep, s->xt, s->dp, s->cp, s->tp);
        complain(c, text);
    }
}

tr_status tr_grid_make(tr_grid *out, tr_grid_sizes sizes, int rank, int world, tr_err *err)
{
    complaints c = {.n = 0};
    char text[64];

    *out = (tr_grid){.size = sizes, .rank = rank, .world = world};
    if (check_positive(&sizes, &c)) check_products(&sizes, world, &c);
    if (rank < 0 || rank >= world) {
        snprintf(text, sizeof text, "rank %d of %d does not exist", rank, world);
        complain(&c, text);
    }
    if (c.n) return tr_fail(err, TR_E_USAGE, "impossible process grid: %s", c.text);

    /* parallel.md 1.1: pp outermost; inside a stage tp, and xt, innermost. */
    int width = world / sizes.pp, s = rank % width;
    out->at = (tr_coord){
        .pp = rank / width,
        .dp = s / sizes.tp / sizes.cp,
        .cp = s / sizes.tp % sizes.cp,
        .tp = s % sizes.tp,
        .mdp = s / sizes.xt / sizes.ep,
        .ep = s / sizes.xt % sizes.ep,
        .xt = s % sizes.xt,
    };
    return TR_OK;
}

void tr_grid_layers(const tr_grid *grid, int n_layers, int *first, int *last)
{
    int each = n_layers / grid->size.pp, more = n_layers % grid->size.pp, pp = grid->at.pp;

    *first = pp * each + (pp < more ? pp : more);
    *last = *first + each + (pp < more);
}
