#include <config.h>

#include <errno.h>
#include <string.h>

#include "base/json.h"
#include "command/forecast.h"

static const double GB = 1e9;

/* ---- the table ------------------------------------------------------------------------------------------------------ */

/* "0-7", or how many where others lie between. */
static const char *ranks_text(char *text, size_t n, const tr_forecast_class *k)
{
    if (k->n == 1)
        snprintf(text, n, "%d", k->first);
    else if (k->n == k->last - k->first + 1)
        snprintf(text, n, "%d-%d", k->first, k->last);
    else
        snprintf(text, n, "%d of %d-%d", k->n, k->first, k->last);
    return text;
}

static void print_grid(FILE *out, const tr_forecast *f)
{
    const tr_grid_sizes *n = &f->ranks->sizes;
    char text[128];

    fprintf(out, "%s on %d ranks: %s\n\n", f->options.model, f->options.world,
            tr_grid_text(text, sizeof text, n));
    fprintf(out, "Grid     pp %d x dp %d x cp %d x tp %d; experts: MoE-DP %d x ep %d x moe-tp %d\n",
            n->pp, n->dp, n->cp, n->tp, n->mdp, n->ep, n->xt);
    if (f->ranks->why[0]) fprintf(out, "Default  %s\n", f->ranks->why);
    if (n->pp > 1) {
        fputs("Stages   layers", out);
        for (int i = 0; i < n->pp; i++)
            fprintf(out, "%s%d", i ? "," : " ", f->stage_layers[i]);
        fputc('\n', out);
    }
    if (n->cp > 1)
        fprintf(out, "CP       %s; decode rows are computed by all %d ranks of a replica's cp\n",
                f->ranks->cp_mode == TR_CP_ZIGZAG ? "in-seq-split" : "round-robin-split", n->cp);
}

static void print_groups(FILE *out, const tr_forecast *f)
{
    tr_grid grid;
    const int per_node = f->options.rates ? f->options.rates->ranks_per_node : 8;

    fprintf(out, "\n%-9s %6s  ranks of the first one (nodes of %d)\n", "Group", "size", per_node);
    if (tr_ranks_place(&grid, f->ranks, 0, f->options.world, NULL) != TR_OK) return;
    for (int g = 0; g < TR_N_GROUPS; g++) {
        int n = tr_grid_group_size(&grid, (tr_grid_group)g);
        int first = tr_grid_member(&grid, (tr_grid_group)g, 0), next = 0,
            last = tr_grid_member(&grid, (tr_grid_group)g, n - 1);
        if (n < 2) continue;
        next = tr_grid_member(&grid, (tr_grid_group)g, 1);
        fprintf(out, "%-9s %6d  %d, %d%s", tr_grid_group_name((tr_grid_group)g), n, first, next,
                n > 3    ? " ... "
                : n == 3 ? ", "
                         : "");
        if (n > 2) fprintf(out, "%d", last);
        fprintf(out, "%s\n",
                tr_crosses_nodes(&grid, (tr_grid_group)g, per_node) ? "  (over nodes)" : "");
    }
}

static void print_memory(FILE *out, const tr_forecast *f)
{
    const tr_forecast_options *o = &f->options;
    char text[48];

    fprintf(out, "\nMemory of a rank, GB (10^9 bytes)\n");
    fprintf(out, "%-16s %6s %9s %7s %6s %6s %5s %6s %7s %5s %9s\n", "ranks", "layers", "attention",
            "experts", "dense", "vocab", "MTP", "2nd", "weights", "work", "tokens");
    for (int i = 0; i < f->n_classes; i++) {
        const tr_forecast_class *k = &f->class[i];
        const tr_weight_bytes *w = &k->weights;
        fprintf(out, "%-16s %6d %9.2f %7.2f %6.2f %6.2f %5.2f %6.2f %7.2f %5.2f ",
                ranks_text(text, sizeof text, k), k->n_layers, (double)w->attention / GB,
                (double)w->routed / GB, (double)(w->dense + w->shared + w->router) / GB,
                (double)(w->embed + w->head) / GB, (double)w->mtp / GB, (double)w->second_form / GB,
                (double)k->weight_bytes / GB, (double)k->workspace / GB);
        if (k->tokens < 0)
            fprintf(out, "%9s\n", "-");
        else
            fprintf(out, "%9jd\n", (intmax_t)k->tokens);
    }
    fprintf(
        out,
        "dense: dense MLPs, shared experts, routers. 2nd: W_UK transposed. work: buffers of a step "
        "of\n%d + %d rows. tokens: that fit into %s caches of %ju bytes a token on the first of "
        "these ranks",
        o->max_batch_tokens, o->max_sequences, o->kv_name, (uintmax_t)f->class[0].cache_token);
    if (o->rates)
        fprintf(out, ",\nof %.1f GB with %.0f GB left to the driver and NCCL",
                o->rates->memory / GB, tr_forecast_reserve / GB);
    fputs(".\n", out);
    if (f->tokens >= 0)
        fprintf(out,
                "A replica holds %jd tokens (its tightest rank decides), %.1f sequences of %d; of "
                "replicas\nthere are %d.\n",
                (intmax_t)f->tokens, (double)f->tokens / o->max_model_len, o->max_model_len,
                f->ranks->sizes.dp);
}

static void print_traffic(FILE *out, const tr_forecast *f)
{
    const tr_wire *w = &f->wire;

    if (f->n_traffic == 0) {
        fputs("\nNothing is sent between ranks.\n", out);
        return;
    }
    fprintf(out, "\nSent by a rank, kB (decode: %d rows, prefill: %d tokens, of each replica)\n",
            f->options.max_sequences, f->options.max_batch_tokens);
    fprintf(out, "%-24s %-28s %-8s %5s %-14s %12s\n", "where", "what", "group", "ranks",
            "operation", "kB");
    for (int i = 0; i < f->n_traffic; i++) {
        const tr_forecast_traffic *t = &f->traffic[i];
        for (int k = 0; k < t->n; k++) {
            char where[48] = "";
            if (k == 0 && t->n_layers > 0)
                snprintf(where, sizeof where, "%s x%d", t->name, t->n_layers);
            else if (k == 0)
                snprintf(where, sizeof where, "%s", t->name);
            fprintf(out, "%-24s %-28s %-8s %5d %-14s %12.1f\n", where, t->list[k].what,
                    tr_grid_group_name(t->list[k].group), t->list[k].n,
                    tr_wire_op_name(t->list[k].op), t->list[k].sent * 1e-3);
        }
    }
    fprintf(out,
            "Bytes: %d an activation, %d + %d a row to the experts, %d back, %d an index key, %d a "
            "latent.\nBeside this, each step: 64 B from every replica to all, and the plan, about "
            "100 B + 16 B a request.\n",
            w->act, w->row_out, w->row_ids, w->row_back, w->key, w->latent);
}

static void print_steps(FILE *out, const tr_forecast *f)
{
    const tr_rates *r = f->options.rates;

    if (!r) return;
    fprintf(out,
            "\nTime of a step, ms (an estimate from rates and latencies that were measured)\n"
            "%-8s %8s %9s %14s %9s %9s %14s\n",
            "step", "rows", "context", "slowest stage", "latency", "roofline", "tokens/s, all");
    for (int i = 0; i < f->n_steps; i++) {
        const tr_forecast_step *s = &f->step[i];
        fprintf(out, "%-8s %8d %9jd %14.2f %9.2f %9.2f %14.0f\n",
                s->shape.prefill ? "prefill" : "decode", s->shape.rows, (intmax_t)s->shape.context,
                s->slowest * 1e3, s->latency * 1e3, s->roofline * 1e3, s->rate);
    }
    fprintf(
        out,
        "Rates of %s: read %.2f TB/s, weights %.2f, scattered rows %.2f; TFLOP/s: FP8 %.0f, per "
        "head %.0f,\nindex scores %.0f, sparse attention %.0f and %.0f (decode); %.1f us a kernel; "
        "links %.0f GB/s,\n%.0f us a collective of two and %.0f more for each doubling, sums of up "
        "to "
        "%d rows by stores\n%.1f us and %.0f GB/s; network %.0f GB/s and %.0f us.\n",
        r->name, r->read * 1e-12, r->stream * 1e-12, r->gather * 1e-12, r->fp8 * 1e-12,
        r->heads * 1e-12, r->index * 1e-12, r->mla_prefill * 1e-12, r->mla * 1e-12,
        r->kernel_latency * 1e6, r->link * 1e-9, (r->link_latency + r->link_hop) * 1e6,
        r->link_hop * 1e6, r->peer_rows, r->peer_latency * 1e6, r->peer * 1e-9, r->net * 1e-9,
        r->net_latency * 1e6);
}

void tr_forecast_print(FILE *out, const tr_forecast *f)
{
    print_grid(out, f);
    print_groups(out, f);
    print_memory(out, f);
    print_traffic(out, f);
    print_steps(out, f);
    for (int i = 0; i < f->n_warnings; i++)
        fprintf(out, "%sWarning: %s\n", i ? "" : "\n", f->warning[i]);
}

/* ---- JSON ----------------------------------------------------------------------------------------------------------- */

static json_t *json_of_class(const tr_forecast_class *k)
{
    const tr_weight_bytes *w = &k->weights;
    return json_pack(
        "{s:i,s:i,s:i,s:i,s:{s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I,s:I},s:I,s:I,s:I,s:I}", "first",
        k->first, "last", k->last, "ranks", k->n, "layers", k->n_layers, "weights", "attention",
        (json_int_t)w->attention, "dense", (json_int_t)w->dense, "shared", (json_int_t)w->shared,
        "routed", (json_int_t)w->routed, "router", (json_int_t)w->router, "embed",
        (json_int_t)w->embed, "head", (json_int_t)w->head, "mtp", (json_int_t)w->mtp, "second_form",
        (json_int_t)w->second_form, "weight_bytes", (json_int_t)k->weight_bytes, "workspace_bytes",
        (json_int_t)k->workspace, "cache_bytes_per_token", (json_int_t)k->cache_token, "tokens",
        (json_int_t)k->tokens);
}

static json_t *json_of_classes(const tr_forecast *f)
{
    json_t *list = json_array();
    for (int i = 0; i < f->n_classes; i++)
        json_array_append_new(list, json_of_class(&f->class[i]));
    return list;
}

static json_t *json_of_traffic(const tr_forecast *f)
{
    json_t *list = json_array();
    for (int i = 0; i < f->n_traffic; i++)
        for (int k = 0; k < f->traffic[i].n; k++) {
            const tr_forecast_traffic *t = &f->traffic[i];
            const tr_traffic *c = &t->list[k];
            json_array_append_new(list,
                                  json_pack("{s:s,s:i,s:i,s:s,s:s,s:i,s:s,s:f,s:f}", "where",
                                            t->name, "layers", t->n_layers, "rows", t->shape.rows,
                                            "what", c->what, "group", tr_grid_group_name(c->group),
                                            "size", c->n, "operation", tr_wire_op_name(c->op),
                                            "given_bytes", c->given, "sent_bytes", c->sent));
        }
    return list;
}

static json_t *json_of_steps(const tr_forecast *f)
{
    json_t *list = json_array();
    for (int i = 0; i < f->n_steps; i++) {
        const tr_forecast_step *s = &f->step[i];
        json_array_append_new(list,
                              json_pack("{s:s,s:i,s:I,s:f,s:f,s:f,s:f}", "step",
                                        s->shape.prefill ? "prefill" : "decode", "rows",
                                        s->shape.rows, "context", (json_int_t)s->shape.context,
                                        "slowest_stage_s", s->slowest, "latency_s", s->latency,
                                        "roofline_s", s->roofline, "tokens_per_s", s->rate));
    }
    return list;
}

static json_t *json_of_rates(const tr_rates *r)
{
    if (!r) return json_null();
    return json_pack(
        "{s:s,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:f,s:i,s:i}", "gpu",
        r->name, "memory_bytes", r->memory, "reserve_bytes", tr_forecast_reserve,
        "read_bytes_per_s", r->read, "weights_bytes_per_s", r->stream, "gather_bytes_per_s",
        r->gather, "fp8_flops", r->fp8, "heads_flops", r->heads, "index_flops", r->index,
        "mla_prefill_flops", r->mla_prefill, "mla_decode_flops", r->mla, "link_bytes_per_s",
        r->link, "net_bytes_per_s", r->net, "link_latency_s", r->link_latency + r->link_hop,
        "net_latency_s", r->net_latency, "peer_latency_s", r->peer_latency, "kernel_latency_s",
        r->kernel_latency, "peer_rows", r->peer_rows, "ranks_per_node", r->ranks_per_node);
}

tr_status tr_forecast_json(FILE *out, const tr_forecast *f, tr_err *err)
{
    tr_status st = TR_OK;
    const tr_grid_sizes *n = &f->ranks->sizes;
    json_t *stages = json_array(), *warnings = json_array(), *root = NULL;

    for (int i = 0; i < n->pp; i++)
        json_array_append_new(stages, json_integer(f->stage_layers[i]));
    for (int i = 0; i < f->n_warnings; i++)
        json_array_append_new(warnings, json_string(f->warning[i]));
    root = json_pack("{s:s,s:i,s:{s:i,s:i,s:i,s:i,s:i,s:i,s:i},s:s,s:s,s:s,s:o,s:i,s:i,s:i,s:I,s:o,"
                     "s:o,s:o,s:o,s:o}",
                     "model", f->options.model, "ranks", f->options.world, "grid", "pp", n->pp,
                     "dp", n->dp, "cp", n->cp, "tp", n->tp, "moe_dp", n->mdp, "ep", n->ep, "moe_tp",
                     n->xt, "defaults", f->ranks->why, "cp_mode",
                     f->ranks->cp_mode == TR_CP_ZIGZAG ? "in-seq-split" : "round-robin-split",
                     "kv_dtype", f->options.kv_name, "stage_layers", stages, "max_batch_tokens",
                     f->options.max_batch_tokens, "max_sequences", f->options.max_sequences,
                     "max_model_len", f->options.max_model_len, "tokens_per_replica",
                     (json_int_t)f->tokens, "classes", json_of_classes(f), "traffic",
                     json_of_traffic(f), "steps", json_of_steps(f), "rates",
                     json_of_rates(f->options.rates), "warnings", warnings);
    if (!root)
        st = tr_fail(err, TR_E_INPUT, "%s: this name is not UTF-8, or memory is out",
                     f->options.model);
    else if (json_dumpf(root, out, JSON_COMPACT) != 0 || fputc('\n', out) == EOF)
        st = tr_fail(err, TR_E_IO, "standard output: %s", strerror(errno));
    json_decref(root);
    return st;
}
