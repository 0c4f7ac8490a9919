/* Which grids are legal, what is taken where nothing was said, and what to try instead (parallel.md 1.1, 1.3). */
#include <config.h>

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "mpi/grid.h"

/* ---- the rules ---------------------------------------------------------------------------------------------------- */

typedef struct complaints {
    char *text; /* NULL: only counted */
    size_t room, used;
    int n;
} complaints;

__attribute__((format(printf, 2, 3))) static void complain(complaints *c, const char *fmt, ...)
{
    va_list args;
    c->n++;
    if (!c->text) return;
    if (c->used && c->used + 3 < c->room) {
        memcpy(c->text + c->used, "; ", 3);
        c->used += 2;
    }
    va_start(args, fmt);
    int n = vsnprintf(c->text + c->used, c->room - c->used, fmt, args);
    va_end(args);
    if (n > 0) c->used += (size_t)n < c->room - c->used ? (size_t)n : c->room - c->used - 1;
}

static bool check_positive(const tr_grid_sizes *s, complaints *c)
{
    const struct {
        const char *option;
        int value;
    } size[] = {{"--pp", s->pp}, {"--dp", s->dp}, {"--cp", s->cp},
                {"--tp", s->tp}, {"--ep", s->ep}, {"--moe-tp", s->xt}};
    int before = c->n;

    for (size_t i = 0; i < sizeof size / sizeof *size; i++)
        if (size[i].value < 1) complain(c, "%s %d is not positive", size[i].option, size[i].value);
    return c->n == before;
}

/* a * b * c of positive numbers, or -1 when it does not fit: then it is no grid either. */
static int product(int a, int b, int c)
{
    int r;
    return __builtin_mul_overflow(a, b, &r) || __builtin_mul_overflow(r, c, &r) ? -1 : r;
}

/* Rule 1. */
static void check_products(const tr_grid_sizes *s, int world, complaints *c)
{
    int attention = product(s->dp, s->cp, s->tp), moe = product(s->mdp, s->ep, s->xt);

    if (attention < 0 || product(attention, s->pp, 1) != world)
        complain(c, "pp %d * dp %d * cp %d * tp %d is not the number of ranks, %d", s->pp, s->dp,
                 s->cp, s->tp, world);
    if (s->mdp == 0)
        complain(c, "ep %d * moe-tp %d does not divide the stage's width, dp %d * cp %d * tp %d",
                 s->ep, s->xt, s->dp, s->cp, s->tp);
    else if (attention < 0 || attention != moe)
        complain(c, "MoE-DP %d * ep %d * moe-tp %d is not the stage's width, dp %d * cp %d * tp %d",
                 s->mdp, s->ep, s->xt, s->dp, s->cp, s->tp);
}

static bool fits(int limit, int parts)
{
    return limit <= 0 || limit % parts == 0;
}

/* Rules 2 and 3; 4 to 6 leave nothing for a user to break (the loader chooses the widths of 4, 5 speaks of what decode
 * does, DCP is not built). */
static void check_widths(const tr_grid_sizes *s, const tr_grid_limits *l, complaints *c)
{
    if (!fits(l->heads, s->tp))
        complain(c, "%d attention heads do not divide by tp %d", l->heads, s->tp);
    if (l->vocab > 0 && l->vocab < s->tp)
        complain(c, "a vocabulary of %d is less than tp %d", l->vocab, s->tp);
    if (!fits(l->experts, s->ep))
        complain(c, "%d experts do not divide by ep %d", l->experts, s->ep);
    if (!fits(l->expert_inner, s->xt))
        complain(c, "expert width %d does not divide by moe-tp %d", l->expert_inner, s->xt);
}

/* Rule 7. */
static void check_stages(const tr_grid_sizes *s, const tr_grid_limits *l, complaints *c)
{
    int64_t sum = 0;

    if (l->layers > 0 && s->pp > l->layers)
        complain(c, "%d layers are fewer than the %d pipeline stages", l->layers, s->pp);
    if (!l->stage_layers) return;
    if (l->n_stage_layers != s->pp)
        complain(c, "--pp-layers has %d stages, pp is %d", l->n_stage_layers, s->pp);
    for (int i = 0; i < l->n_stage_layers; i++) {
        sum += l->stage_layers[i];
        if (l->stage_layers[i] < 1)
            complain(c, "--pp-layers: stage %d owns %d layers, it needs at least one", i,
                     l->stage_layers[i]);
    }
    if (l->layers > 0 && sum != l->layers)
        complain(c, "--pp-layers adds up to %jd layers, the model has %d", (intmax_t)sum,
                 l->layers);
}

int tr_grid_broken(const tr_grid_sizes *sizes, int world, const tr_grid_limits *limits, char *text,
                   size_t n)
{
    complaints c = {.text = text, .room = n};
    if (text) text[0] = '\0';
    if (!check_positive(sizes, &c)) return c.n;
    if (sizes->mdp < 0) complain(&c, "MoE-DP %d is not positive", sizes->mdp);
    check_products(sizes, world, &c);
    if (limits) {
        check_widths(sizes, limits, &c);
        check_stages(sizes, limits, &c);
    }
    return c.n;
}

/* ---- the nearest legal grids ---------------------------------------------------------------------------------------- */

enum {
    DIVISORS_MAX = 256,
    WORLD_MAX = 1 << 20,
    N_NEAREST = 3
}; /* no number below 2^20 has more than 240 */

static int divisors(int n, int out[DIVISORS_MAX])
{
    int count = 0;
    for (int i = 1; (int64_t)i * i <= n; i++)
        if (n % i == 0) out[count++] = i;
    for (int i = count - 1; i >= 0; i--)
        if (n / out[i] > out[count - 1]) out[count++] = n / out[i];
    return count;
}

typedef struct search {
    const tr_grid_sizes *wanted; /* 0: free */
    const tr_grid_limits *limits;
    int divisor[DIVISORS_MAX], n_divisors;
    tr_grid_sizes best[N_NEAREST];
    double cost[N_NEAREST];
    int n_best;
} search;

/* A size that was asked for and is changed counts most, then by how much; of the sizes nobody asked for, those that are 1
 * by default are better left at 1. */
static double cost_of(int wanted, int is, bool one_by_default)
{
    if (wanted > 0) return wanted == is ? 0.0 : 1000.0 + 10.0 * fabs(log2((double)is / wanted));
    return one_by_default ? 10.0 * log2((double)is) : 0.0;
}

static double cost_of_grid(const tr_grid_sizes *w, const tr_grid_sizes *g)
{
    return cost_of(w->pp, g->pp, true) + cost_of(w->dp, g->dp, true) + cost_of(w->cp, g->cp, true) +
           cost_of(w->tp, g->tp, false) + cost_of(w->ep, g->ep, false) +
           cost_of(w->xt, g->xt, true) + 0.5 * log2((double)g->mdp);
}

static void consider(search *s, const tr_grid_sizes *g, double cost)
{
    int at = s->n_best;

    while (at > 0 && s->cost[at - 1] > cost)
        at--;
    if (at == N_NEAREST) return;
    if (s->n_best < N_NEAREST) s->n_best++;
    for (int i = s->n_best - 1; i > at; i--) {
        s->best[i] = s->best[i - 1];
        s->cost[i] = s->cost[i - 1];
    }
    s->best[at] = *g;
    s->cost[at] = cost;
}

/* Of all ways to cut the stage for the experts the nearest: proposals are to differ in more than that. */
static void search_experts(search *s, tr_grid_sizes g)
{
    int stage = g.dp * g.cp * g.tp;
    tr_grid_sizes best = g;
    double least = HUGE_VAL;
    for (int i = 0; i < s->n_divisors; i++) {
        g.ep = s->divisor[i];
        if (stage % g.ep != 0 || !fits(s->limits->experts, g.ep)) continue;
        for (int k = 0; k < s->n_divisors; k++) {
            g.xt = s->divisor[k];
            if (stage / g.ep % g.xt != 0 || !fits(s->limits->expert_inner, g.xt)) continue;
            g.mdp = stage / g.ep / g.xt;
            double cost = cost_of_grid(s->wanted, &g);
            if (cost >= least) continue;
            least = cost;
            best = g;
        }
    }
    if (least < HUGE_VAL) consider(s, &best, least);
}

/* The legal grids of `world` nearest to what was wanted, best first. */
static void search_grids(search *s, int world)
{
    const tr_grid_limits *l = s->limits;
    const int *d = s->divisor;

    s->n_divisors = divisors(world, s->divisor);
    for (int i = 0; i < s->n_divisors; i++) {
        tr_grid_sizes g = {.pp = d[i]};
        if (l->stage_layers ? l->n_stage_layers != g.pp : l->layers > 0 && g.pp > l->layers)
            continue;
        for (int k = 0; k < s->n_divisors; k++) {
            g.dp = d[k];
            if (world / g.pp % g.dp != 0) continue;
            for (int m = 0; m < s->n_divisors; m++) {
                g.cp = d[m];
                if (world / g.pp / g.dp % g.cp != 0) continue;
                g.tp = world / g.pp / g.dp / g.cp;
                if (fits(l->heads, g.tp) && (l->vocab <= 0 || g.tp <= l->vocab))
                    search_experts(s, g);
            }
        }
    }
}

const char *tr_grid_text(char *text, size_t n, const tr_grid_sizes *sizes)
{
    const struct {
        const char *option;
        int value;
    } size[] = {{"--pp", sizes->pp}, {"--dp", sizes->dp}, {"--cp", sizes->cp},
                {"--tp", sizes->tp}, {"--ep", sizes->ep}, {"--moe-tp", sizes->xt}};
    size_t used = 0;

    snprintf(text, n, "one rank");
    for (size_t i = 0; i < sizeof size / sizeof *size && used < n; i++)
        if (size[i].value != 1)
            used += (size_t)snprintf(text + used, n - used, "%s%s %d", used ? " " : "",
                                     size[i].option, size[i].value);
    return text;
}

/* wanted: what was asked for, 0 where nothing was. A list of layers that cannot be right leaves nothing to propose. */
static tr_status refuse(const tr_grid_sizes *sizes, const tr_grid_sizes *wanted, int world,
                        const tr_grid_limits *limits, tr_err *err)
{
    char text[TR_GRID_BROKEN], option[96], nearest[N_NEAREST * sizeof option];
    search s = {.wanted = wanted, .limits = limits};
    complaints all = {.text = nearest, .room = sizeof nearest};

    if (tr_grid_broken(sizes, world, limits, text, sizeof text) == 0) return TR_OK;
    if (world >= 1 && world <= WORLD_MAX) search_grids(&s, world);
    nearest[0] = '\0';
    for (int i = 0; i < s.n_best; i++)
        complain(&all, "%s", tr_grid_text(option, sizeof option, &s.best[i]));
    return tr_fail(err, TR_E_USAGE, "impossible process grid: %s%s%s", text,
                   s.n_best ? ". Legal for this number of ranks: " : "", nearest);
}

tr_status tr_grid_check(const tr_grid_sizes *sizes, int world, const tr_grid_limits *limits,
                        tr_err *err)
{
    return refuse(sizes, sizes, world, limits, err);
}

bool tr_grid_gathers_all(const tr_grid_sizes *sizes)
{
    return sizes->dp * sizes->cp > 1 && sizes->ep == 1 &&
           sizes->xt == sizes->dp * sizes->cp * sizes->tp;
}

/* ---- defaults ------------------------------------------------------------------------------------------------------- */

/* The largest divisor of n that divides `limit` too, and is at most `most` (0: any). n > 0. */
static int largest_part(int n, int limit, int most)
{
    int best = 1;
    for (int i = 1; (int64_t)i * i <= n; i++) {
        if (n % i != 0) continue;
        const int pair[2] = {i, n / i};
        for (int k = 0; k < 2; k++)
            if (pair[k] > best && fits(limit, pair[k]) && (most <= 0 || pair[k] <= most))
                best = pair[k];
    }
    return best;
}

static void choose_attention(tr_grid_sizes *s, const tr_grid_sizes *given, int world,
                             const tr_grid_limits *l, complaints *why)
{
    int others = product(s->pp, s->dp, s->cp);
    if (given->tp) return;
    s->tp = 1;
    if (others < 1 || world < others || world % others != 0) return; /* refused by rule 1 */
    int rest = world / others;
    s->tp = largest_part(rest, l->heads, l->vocab);
    if (s->tp < rest && given->dp) {
        s->tp = rest; /* nothing left to vary: the rule that it breaks is named */
        return;
    }
    if (s->tp > 1)
        complain(why, "tp %d: %s", s->tp,
                 s->tp == rest ? "all ranks that pp, dp and cp leave"
                               : "the largest part of the ranks that divides the heads");
    if (s->tp < rest) {
        s->dp = rest / s->tp;
        complain(why, "dp %d: what tp leaves", s->dp);
    }
}

static void choose_experts(tr_grid_sizes *s, const tr_grid_sizes *given, const tr_grid_limits *l,
                           complaints *why)
{
    int stage = product(s->dp, s->cp, s->tp), block;

    s->mdp = 0;
    if (stage < 1 || s->xt < 1) return;
    if (!given->ep) {
        s->ep = stage % s->xt == 0 ? largest_part(stage / s->xt, l->experts, 0) : 1;
        if (s->ep > 1)
            complain(why,
                     "ep %d: the largest part of the stage's %d ranks that divides the experts",
                     s->ep, stage);
    }
    block = product(s->ep, s->xt, 1);
    if (block < 1 || stage % block != 0) return;
    s->mdp = stage / block;
    if (s->mdp > 1)
        complain(why, "MoE-DP %d: what ep and moe-tp leave; each %d ranks hold all experts", s->mdp,
                 block);
}

tr_status tr_grid_choose(tr_grid_sizes *out, const tr_grid_sizes *given, int world,
                         const tr_grid_limits *limits, char *why, tr_err *err)
{
    complaints reasons = {.text = why, .room = TR_GRID_WHY};
    tr_grid_sizes s = *given, wanted = *given;

    if (why) why[0] = '\0';
    if (!s.pp) s.pp = limits->stage_layers ? limits->n_stage_layers : 1;
    if (!s.dp) s.dp = 1;
    if (!s.cp) s.cp = 1;
    if (!s.ep) s.ep = 1;
    if (!s.xt) s.xt = 1;
    choose_attention(&s, given, world, limits, &reasons);
    choose_experts(&s, given, limits, &reasons);
    *out = s;
    wanted.mdp = 0;
    return refuse(&s, &wanted, world, limits, err);
}
