#include <config.h>

#include "profile/show.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "base/order.h"
#include "profile/figures.h"

enum { WIDTH = 100, BAR = 40, RANKS_SHOWN = 8, LAYERS_SHOWN = 10, COMMS_SHOWN = 6, PLOT_ROWS = 4 };

static double share(double part, double whole)
{
    return whole > 0 ? 100 * part / whole : 0;
}

/* A sentence below a block, wrapped. */
static void __attribute__((format(printf, 2, 3))) advise(FILE *out, const char *fmt, ...)
{
    char text[1024];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    int column = fprintf(out, "  >");
    for (char *p = text; *p;) {
        const int n = (int)strcspn(p, " ");
        if (column + 1 + n > WIDTH) {
            fputs("\n   ", out);
            column = 3;
        }
        column += fprintf(out, " %.*s", n, p);
        p += n + (p[n] == ' ');
    }
    fputc('\n', out);
}

/* ---- the run ------------------------------------------------------------------------------------------------------- */

static const char *attribute(const tr_reader *r, const char *object, const char *name)
{
    const char *text = tr_reader_attribute(r, object, name);
    return text && *text ? text : NULL;
}

static void show_run(FILE *out, const tr_reader *r, const tr_summary *s)
{
    const tr_reader_about *a = tr_reader_about_of(r);
    const char *model = attribute(r, "/run", "model"), *id = attribute(r, "/", "run_id");
    const char *job = attribute(r, "/", "job_id"), *made = attribute(r, "/", "created");
    const char *command = attribute(r, "/run", "command_line");

    fprintf(out, "%s: run %s%s%s, %s, %s\n", a->path, id ? id : "?", job ? ", job " : "",
            job ? job : "", made ? made : "date not recorded",
            a->complete                 ? "complete"
            : a->n_present < a->n_ranks ? "not complete: ranks are missing"
                                        : "not complete: what was written before it ended");
    fprintf(out, "model %s; %d rank%s on %d node%s; %s, %s steps", model ? model : "?", a->n_ranks,
            a->n_ranks == 1 ? "" : "s", s->n_nodes, s->n_nodes == 1 ? "" : "s",
            tr_figure_time(s->run_s).s, tr_figure_count((double)s->steps).s);
    if (s->requests)
        fprintf(out, ", %s requests (%s failed)", tr_figure_count((double)s->requests).s,
                tr_figure_count((double)s->failed).s);
    fputc('\n', out);
    if (command) fprintf(out, "%.*s\n", WIDTH, command);
    for (size_t i = 0; tr_reader_note(r, i); i++)
        fprintf(out, "note: %s\n", tr_reader_note(r, i));
}

/* ---- phases -------------------------------------------------------------------------------------------------------- */

static void bar(FILE *out, double part, double whole, int width, char mark)
{
    int n = whole > 0 ? (int)lround(part / whole * width) : 0;
    n = n < 0 ? 0 : n > width ? width : n;
    for (int i = 0; i < n; i++)
        fputc(mark, out);
}

/* Regions outside steps with most time, of the main stream; its root stands for what has no region. */
static void outside_steps(FILE *out, const tr_summary *s)
{
    int n = 0;
    for (int i = 0; i < s->n_ops && n < 3; i++) {
        const tr_summary_op *op = &s->op[i];
        const bool is_outside = !strncmp(op->name, "engine/", 7) || !strncmp(op->name, "load", 4) ||
                                op->kind == TR_KIND_IO || op->kind == TR_KIND_PHASE;
        if (!is_outside || op->mean_s < 0.005 * s->run_s) continue;
        fprintf(out, "%s%s %s", n ? ", " : " (", op->name, tr_figure_time(op->mean_s).s);
        n++;
    }
    fputs(n ? ")\n" : "\n", out);
}

static void show_phases(FILE *out, const tr_reader *r, const tr_summary *s)
{
    (void)r;
    fprintf(out, "\nPHASES                time  share   steps  time/step\n");
    if (!s->has_phases) fputs("  (not recorded)\n", out);
    for (int p = 0; p < TR_N_PHASES; p++) {
        const tr_summary_phase *f = &s->phase[p];
        if (f->mean_s <= 0 && f->steps == 0) continue;
        const double steps = f->steps ? (double)f->steps : 1;
        fprintf(out, "  %-12s %11s %5.1f%% %7s %10s  ", tr_phase_names.name[p],
                tr_figure_time(f->mean_s).s, share(f->mean_s, s->run_s),
                tr_figure_count((double)f->steps).s, tr_figure_time(f->mean_s / steps).s);
        bar(out, f->mean_s, s->run_s, BAR, '#');
        fputc('\n', out);
    }
    const double outside = s->run_s - s->steps_s;
    fprintf(out, "  %-12s %11s %5.1f%%", "outside them", tr_figure_time(outside).s,
            share(outside, s->run_s));
    outside_steps(out, s);
    if (s->run_s <= 0)
        advise(out, "No time was recorded.");
    else if (s->has_phases && outside > 0.3 * s->run_s)
        advise(out,
               "%.0f%% of the time no step was running. Loading counts once and fades in a longer "
               "run; "
               "planning or waiting for requests does not: give it more requests at a time.",
               share(outside, s->run_s));
    else if (s->phase[TR_PHASE_IDLE].mean_s > 0.1 * s->run_s)
        advise(out,
               "Replicas ran empty steps for %.0f%% of the time: fewer replicas (--dp), or more "
               "requests.",
               share(s->phase[TR_PHASE_IDLE].mean_s, s->run_s));
    else if (s->phase[TR_PHASE_PREFILL].mean_s > s->phase[TR_PHASE_DECODE].mean_s)
        advise(out,
               "Prompts take most of the time: what they share is computed once (prefix cache); "
               "--max-batch-tokens sets the rows of a step.");
    else if (s->has_phases)
        advise(
            out,
            "Decoding takes most of the time: its cost per step hardly grows with the answers in "
            "it; --max-sequences raises their number.");
}

/* ---- operations ---------------------------------------------------------------------------------------------------- */

static void show_ops(FILE *out, const tr_summary *s, int n_ops)
{
    double rest = 0;
    int n_rest = 0;
    if (n_ops <= 0) n_ops = s->n_ops;
    fprintf(out, "\n%-24s %6s %9s %6s %10s %10s %8s %8s\n", "OPERATIONS (own time)", "kind", "time",
            "share", "calls", "each", "GB/s", "Gflop/s");
    for (int i = 0; i < s->n_ops; i++) {
        const tr_summary_op *op = &s->op[i];
        const double all = op->mean_s * s->n_present;
        char name[80];
        if (op->mean_s <= 0) continue;
        if (i >= n_ops) {
            rest += op->mean_s;
            n_rest++;
            continue;
        }
        snprintf(name, sizeof name, "%s%s%s", op->name, *op->group ? " " : "", op->group);
        fprintf(out, "  %-22.22s %6s %9s %5.1f%% %10s %10s", name, tr_kind_names.name[op->kind],
                tr_figure_time(op->mean_s).s, share(op->mean_s, s->run_s),
                tr_figure_count(op->count).s,
                op->count > 0 ? tr_figure_time(all / op->count).s : "-");
        const bool here = all > 0 && op->gpu_count <= 0; /* else the host only began it */
        fprintf(out, " %8s",
                op->bytes > 0 && here ? tr_figure_rate(op->bytes / all * 1e-9).s : "-");
        fprintf(out, " %8s\n",
                op->flops > 0 && here ? tr_figure_rate(op->flops / all * 1e-9).s : "-");
    }
    if (n_rest > 0)
        fprintf(out, "  %-22s %6s %9s %5.1f%%  (--top 0 shows them)\n", "all others", "",
                tr_figure_time(rest).s, share(rest, s->run_s));
    if (s->gpu_steps_s > 0) return;
    for (int i = 0; i < s->n_ops; i++)
        if (s->op[i].kind == TR_KIND_KERNEL && s->op[i].mean_s > 0) {
            advise(
                out,
                "%s is the most expensive kernel: twice as fast, it would save %.0f%% of the run. "
                "trireme bench kernels has the rates that this machine can reach.",
                s->op[i].name, share(s->op[i].mean_s / 2, s->run_s));
            return;
        }
    if (s->n_ops == 0) fputs("  (not recorded)\n", out);
}

/* The operation behind `op` in time on GPUs; of all the first one for NULL. NULL: no more. */
static const tr_summary_op *next_on_gpu(const tr_summary *s, const tr_summary_op *op)
{
    const tr_summary_op *best = NULL;
    for (int i = 0; i < s->n_ops; i++) {
        const tr_summary_op *o = &s->op[i];
        const bool behind = !op || o->gpu_s < op->gpu_s || (o->gpu_s <= op->gpu_s && o > op);
        if (o->kind != TR_KIND_KERNEL || o->gpu_count <= 0 || o == op || !behind) continue;
        if (!best || o->gpu_s > best->gpu_s) best = o;
    }
    return best;
}

/* By the GPU's own clock. Steps are all timed, operations where each is launched, layers of recorded steps now and then. */
static void show_gpu(FILE *out, const tr_summary *s, int n_ops)
{
    enum { MOST = 4 };
    const tr_summary_op *first = next_on_gpu(s, NULL);
    if (s->gpu_steps_s <= 0) return;
    fprintf(out, "\n%-24s %6s %9s %6s %10s %10s %8s %8s\n", "ON THE GPU (timed there)", "of all",
            "time", "share", "timed", "each", "GB/s", "Gflop/s");
    const tr_summary_op *op = first;
    for (int i = 0; op && (n_ops <= 0 || i < MOST); i++, op = next_on_gpu(s, op)) {
        fprintf(out, "  %-22.22s %5.0f%% %9s %5.1f%% %10s %10s", op->name,
                share(op->gpu_count, op->count), tr_figure_time(op->gpu_s).s,
                share(op->gpu_s, s->gpu_steps_s), tr_figure_count(op->gpu_count).s,
                tr_figure_time(op->gpu_s / op->gpu_count).s);
        fprintf(out, " %8s",
                op->gpu_bytes > 0 ? tr_figure_rate(op->gpu_bytes / op->gpu_s * 1e-9).s : "-");
        fprintf(out, " %8s\n",
                op->gpu_flops > 0 ? tr_figure_rate(op->gpu_flops / op->gpu_s * 1e-9).s : "-");
    }
    advise(out, "Steps took %s there. Recorded ones (decode) time layers alone, every 64th step.",
           tr_figure_time(s->gpu_steps_s).s);
}

/* ---- ranks --------------------------------------------------------------------------------------------------------- */

static void show_rank(FILE *out, const tr_reader *r, const tr_summary_rank *k, double longest)
{
    const tr_prof_rank *about = tr_reader_rank(r, k->rank);
    const double host = k->busy_s - k->kind_s[TR_KIND_KERNEL];
    const double other = k->kind_s[TR_KIND_IO] + k->kind_s[TR_KIND_PHASE];
    fprintf(out, "  %5d %-12.12s %9s %5.1f%% %5.1f%% %5.1f%% %5.1f%%  ", k->rank, about->host,
            tr_figure_time(k->busy_s).s, share(k->kind_s[TR_KIND_KERNEL], k->run_s),
            share(host, k->run_s), share(k->kind_s[TR_KIND_COMM], k->run_s),
            share(k->kind_s[TR_KIND_WAIT], k->run_s));
    const double part[] = {k->kind_s[TR_KIND_KERNEL], host, k->kind_s[TR_KIND_COMM],
                           k->kind_s[TR_KIND_WAIT], other};
    double sum = 0;
    int at = 0; /* rounded at the ends of the parts, so that the whole has the right length */
    for (int i = 0; i < 5 && longest > 0; i++) {
        sum += part[i];
        for (; at < (int)lround(sum / longest * BAR); at++)
            fputc("#+=.o"[i], out);
    }
    fputc('\n', out);
}

static void show_ranks(FILE *out, const tr_reader *r, const tr_summary *s)
{
    double longest = 0;
    const int head = s->n_ranks > RANKS_SHOWN ? RANKS_SHOWN / 2 : s->n_ranks;
    for (int i = 0; i < s->n_ranks; i++)
        if (s->rank[i].run_s > longest) longest = s->rank[i].run_s;
    fprintf(out,
            "\nRANKS  busiest first      busy kernel   host   comm   wait   # kernel + host = comm "
            ". wait o other\n");
    for (int i = 0; i < head; i++)
        show_rank(out, r, &s->rank[i], longest);
    if (head < s->n_ranks) {
        fprintf(out, "    ... %d more\n", s->n_ranks - 2 * head);
        for (int i = s->n_ranks - head; i < s->n_ranks; i++)
            show_rank(out, r, &s->rank[i], longest);
    }
    if (s->n_ranks == 1)
        advise(out, "One rank: nothing to wait for but requests and files.");
    else if (s->even.ranks > 1.1)
        advise(out,
               "Rank %d computes %.2f times as long as the mean, and the others wait for it: "
               "uneven experts "
               "(below), another machine speed or binding on %s, or other work there.",
               s->even.rank, s->even.ranks, tr_reader_rank(r, s->even.rank)->host);
    else if (s->even.ranks > 0)
        advise(out, "The busiest rank computes %.2f times as long as the mean: even.",
               s->even.ranks);
}

/* ---- communication ------------------------------------------------------------------------------------------------- */

static void show_comm(FILE *out, const tr_summary *s)
{
    fprintf(out, "\n%-26s %10s %10s %9s %9s %6s\n", "COMMUNICATION", "calls", "bytes", "time",
            "exposed", "share");
    for (int i = 0; i < s->n_comm && i < COMMS_SHOWN; i++) {
        const tr_summary_comm *c = &s->comm[i];
        char name[64];
        snprintf(name, sizeof name, "%s%s%s", c->op, *c->group ? " " : "", c->group);
        fprintf(out, "  %-24.24s %10s %10s %9s %9s %5.1f%%\n", name, tr_figure_count(c->calls).s,
                tr_figure_bytes(c->bytes).s, tr_figure_time(c->time_s).s,
                tr_figure_time(c->exposed_s).s, share(c->exposed_s, s->run_s));
    }
    if (s->n_comm == 0) fputs("  (none)\n", out);
    if (s->cp_gather_s > 0)
        fprintf(out, "  gathers of keys and latents: %s under way, %s waited for: %.0f%% hidden\n",
                tr_figure_time(s->cp_gather_s).s, tr_figure_time(s->cp_exposed_s).s,
                100 - share(s->cp_exposed_s, s->cp_gather_s));
    const double exposed = share(s->comm_exposed_s, s->run_s);
    if (s->n_comm == 0 || s->n_present == 1) return;
    if (exposed > 20 && s->even.ranks > 1.1)
        advise(out,
               "Ranks wait %.0f%% of the time for communication, but they do not compute equally "
               "long: most "
               "of it is waiting for the slowest rank, not for the network.",
               exposed);
    else if (exposed > 20)
        advise(out,
               "Ranks wait %.0f%% of the time for communication: a smaller --tp (more --dp or "
               "--pp) sends "
               "less; trireme plan has the bytes of other grids, trireme bench comm the network's "
               "speed.",
               exposed);
    else
        advise(out, "Communication holds computation up %.1f%% of the time.", exposed);
}

/* ---- balance and layers -------------------------------------------------------------------------------------------- */

static void show_balance(FILE *out, const tr_summary *s)
{
    const tr_summary_even *e = &s->even;
    fprintf(out, "\nBALANCE (largest / mean)\n");
    if (e->ranks > 0)
        fprintf(out, "  busy time of ranks       %6.2f   rank %d\n", e->ranks, e->rank);
    if (e->rank_tokens > 0)
        fprintf(out, "  rows of a rank's experts %6.2f   rank %d\n", e->rank_tokens,
                e->rank_tokens_most);
    if (e->experts > 0)
        fprintf(out, "  rows of single experts   %6.2f   worst layer %d: %.2f\n", e->experts,
                e->experts_layer, e->experts_worst);
    if (!(e->ranks > 0 || e->rank_tokens > 0 || e->experts > 0)) fputs("  (not recorded)\n", out);
    if (e->rank_tokens > 1.25)
        advise(
            out,
            "The experts of rank %d get %.2f times the mean: with few tokens that is chance (more "
            "--max-sequences evens it out); if it stays, spread experts over fewer ranks (--ep, "
            "--moe-tp).",
            e->rank_tokens_most, e->rank_tokens);
    else if (e->experts > 0)
        advise(out,
               "The ranks' experts are loaded evenly; while that holds, single experts that stand "
               "out cost nothing.");
}

static double median_layer(const tr_summary *s)
{
    double *v = malloc(((size_t)s->n_layers + 1) * sizeof *v), median = 0;
    for (int i = 0; v && i < s->n_layers; i++)
        v[i] = s->layer[i].max_s;
    if (v && s->n_layers > 0) {
        median = tr_median(v, s->n_layers);
    }
    free(v);
    return median;
}

static void show_layer(FILE *out, const tr_summary_layer *l, double median)
{
    const double calls = l->count > 0 ? l->count : 1;
    char even[16] = "-";
    if (l->imbalance > 0) snprintf(even, sizeof even, "%.2f", l->imbalance);
    fprintf(out, "  %5d %9s %6d %6.2f %5.1f%% %6s", l->layer, tr_figure_time(l->max_s / calls).s,
            l->max_rank, median > 0 ? l->max_s / median : 0, share(l->stall_s, l->mean_s), even);
}

static void show_layers(FILE *out, const tr_summary *s)
{
    const int n = s->n_layers < LAYERS_SHOWN ? s->n_layers : LAYERS_SHOWN, rows = (n + 1) / 2;
    const double median = median_layer(s);
    if (n == 0) {
        fprintf(out, "\nWORST LAYERS\n  (not recorded)\n");
        return;
    }
    static const char head[] = "layer each/worst rank  / median stall experts";
    fprintf(out, "\nWORST LAYERS, of %d\n  %s   %s\n", s->n_layers, head, n > 1 ? head : "");
    for (int i = 0; i < rows; i++) {
        show_layer(out, &s->layer[i], median);
        if (i + rows < n) {
            fputs("   ", out);
            show_layer(out, &s->layer[i + rows], median);
        }
        fputc('\n', out);
    }
    const tr_summary_layer *l = &s->layer[0];
    if (median > 0 && l->max_s > 1.5 * median)
        advise(out,
               "Layer %d takes %.1f times the median layer on rank %d%s. With pipeline stages it "
               "decides "
               "about --pp-layers.",
               l->layer, l->max_s / median, l->max_rank,
               share(l->stall_s, l->mean_s) > 40 ? ", much of it waiting for others" : "");
    else
        advise(out, "No layer stands out.");
}

/* ---- counters ------------------------------------------------------------------------------------------------------ */

/* As many as fit into a few lines; nothing where no counter was asked for. */
static void show_counters(FILE *out, const tr_summary *s)
{
    enum { COUNTERS_SHOWN = 8 };
    int n = 0, absent = 0;
    if (s->n_counters == 0) return;
    fprintf(out, "\nCOUNTERS (of a rank)\n");
    for (int i = 0; i < s->n_counters; i++) {
        const tr_summary_counter *c = &s->counter[i];
        absent += c->absent != NULL;
        if (c->absent || n == COUNTERS_SHOWN) continue;
        const bool is_time = !strcmp(c->units, "ns");
        fprintf(out, "  %-32.32s %9s %-3.3s", c->name,
                is_time ? tr_figure_time(c->value * 1e-9).s : tr_figure_rate(c->value).s,
                is_time || !strcmp(c->units, "1") ? "" : c->units);
        fputs(n++ % 2 ? "\n" : "", out);
    }
    if (n % 2) fputc('\n', out);
    for (int i = 0; i < s->n_counters && absent > 0; i++) {
        const tr_summary_counter *c = &s->counter[i];
        if (!c->absent) continue;
        fprintf(out, "  not counted: %.30s (%.50s)", c->name, c->absent);
        if (absent > 1) fprintf(out, ", %d more", absent - 1);
        fputc('\n', out);
        break;
    }
}

/* ---- tokens over time ---------------------------------------------------------------------------------------------- */

static double largest(const double *v, int n)
{
    double max = 0;
    for (int i = 0; i < n; i++)
        if (v[i] > max) max = v[i];
    return max;
}

static void plot_row(FILE *out, const double *v, double max, int row, int columns)
{
    const int fold = TR_SUMMARY_BINS / columns;
    char label[24] = "";
    if (row == PLOT_ROWS - 1) snprintf(label, sizeof label, "%s", tr_figure_rate(max).s);
    if (row == 0) snprintf(label, sizeof label, "0");
    fprintf(out, "  %7s |", label);
    for (int i = 0; i < columns; i++) {
        double mean = 0;
        for (int k = 0; k < fold; k++)
            mean += v[i * fold + k] / fold;
        const double height = max > 0 ? mean / max * PLOT_ROWS - row : 0;
        fputc(height >= 0.75 ? '#' : height >= 0.35 ? ':' : height > 0.02 ? '.' : ' ', out);
    }
}

static void show_tokens(FILE *out, const tr_summary *s)
{
    const double time = s->t_end - s->t_begin;
    enum { COLUMNS = TR_SUMMARY_BINS / 2 * 2 };
    if (!s->has_steps || !(time > 0)) {
        fprintf(out, "\nTOKENS\n  (no steps)\n");
        return;
    }
    fprintf(out, "\nTOKENS  prompts %s (%s/s), answers %s (%s/s), over %s of steps\n",
            tr_figure_count(s->tokens_in).s, tr_figure_rate(s->tokens_in / time).s,
            tr_figure_count(s->tokens_out).s, tr_figure_rate(s->tokens_out / time).s,
            tr_figure_time(time).s);
    const double out_max = largest(s->rate_out, TR_SUMMARY_BINS);
    const bool answers = out_max > 0;
    const double *v = answers ? s->rate_out : s->rate_in;
    const double max = answers ? out_max : largest(s->rate_in, TR_SUMMARY_BINS);
    for (int row = PLOT_ROWS - 1; row >= 0; row--) {
        plot_row(out, v, max, row, COLUMNS);
        fputs(row == PLOT_ROWS - 1 ? (answers ? "  answer tokens/s\n" : "  prompt tokens/s\n")
                                   : "\n",
              out);
    }
    fprintf(out, "          +%.*s\n", COLUMNS,
            "------------------------------------------------------------");
    fprintf(out, "  %8s %-*s%s\n", "", COLUMNS - 6, tr_figure_time(s->t_begin).s,
            tr_figure_time(s->t_end).s);
    if (s->ttft_p50_s > 0)
        fprintf(out, "  first token after %s (median), %s (99%%); %s per token\n",
                tr_figure_time(s->ttft_p50_s).s, tr_figure_time(s->ttft_p99_s).s,
                s->tpot_p50_s > 0 ? tr_figure_time(s->tpot_p50_s).s : "-");
    if (s->cache_hits + s->cache_misses > 0 || s->kv_used >= 0)
        fprintf(out, "  prompt tokens from the cache %.0f%%; pages in use at most %.0f%%\n",
                share((double)s->cache_hits, (double)s->cache_hits + (double)s->cache_misses),
                s->kv_used > 0 ? 100 * s->kv_used : 0.0);
    double tail = 0;
    for (int i = TR_SUMMARY_BINS - TR_SUMMARY_BINS / 4; i < TR_SUMMARY_BINS; i++)
        tail += v[i] / (TR_SUMMARY_BINS / 4);
    if (max > 0 && tail < 0.4 * max)
        advise(
            out,
            "The last quarter of the run is slow: few long answers were left. Long requests first, "
            "or more work in one run, keep it busy.");
    else if (s->kv_used > 0.95)
        advise(out, "The cache was full: requests waited for pages. More memory per rank (fewer "
                    "replicas, --kv-dtype fp8) lets more answers run at a time.");
    else
        advise(out, "The rate holds to the end.");
}

void tr_profile_show(FILE *out, const tr_reader *r, const tr_summary *s, int n_ops)
{
    show_run(out, r, s);
    show_phases(out, r, s);
    show_ops(out, s, n_ops);
    show_gpu(out, s, n_ops);
    show_ranks(out, r, s);
    show_comm(out, s);
    show_balance(out, s);
    show_layers(out, s);
    show_counters(out, s);
    show_tokens(out, s);
}
