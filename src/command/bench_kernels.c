/* trireme bench kernels: every operation of the table alone. The list is TR_OPS: an operation without a case does not link. */
#include <config.h>

#include "command/bench_kernels.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/size.h"

enum { FLUSH_MIN = 64 << 20, FLUSH_MAX = 256 << 20 };

/* clang-format off */
static const struct {
    const char *name;
    tr_status (*run)(tr_kbench *, tr_err *);
} cases[TR_N_BENCH_OPS] = {
#define CASE(name) {#name, tr_bench_##name},
    TR_OPS(CASE)
#undef CASE
};
/* clang-format on */

void tr_bench_print_ceilings(const tr_ceilings *c, double sgemm_flops_per_s, const char *library)
{
    printf("# ceilings: reading %.1f GB/s, fp32 multiply-adds %.1f Gflop/s\n",
           c->read_bytes_per_s * 1e-9, c->fma_flops_per_s * 1e-9);
    if (c->fp8_flops_per_s > 0)
        printf("# ceilings: fp8 products %.1f Tflop/s, bf16 taken as half of that\n",
               c->fp8_flops_per_s * 1e-12);
    if (sgemm_flops_per_s > 0)
        printf("# library sgemm: %.1f Gflop/s (%s)\n", sgemm_flops_per_s * 1e-9, library);
    else
        printf("# library sgemm: absent (%s)\n", library);
    printf("{\"bench\": \"ceilings\", \"read_bytes_per_s\": %.0f, \"fma_flops_per_s\": %.0f",
           c->read_bytes_per_s, c->fma_flops_per_s);
    if (c->fp8_flops_per_s > 0) printf(", \"fp8_flops_per_s\": %.0f", c->fp8_flops_per_s);
    if (sgemm_flops_per_s > 0) printf(", \"sgemm_flops_per_s\": %.0f", sgemm_flops_per_s);
    printf("}\n");
}

/* The 671B model (model.md 1). */
static tr_config published(void)
{
    return (tr_config){
        .vocab_size = 129280,
        .hidden_size = 7168,
        .num_hidden_layers = 61,
        .first_k_dense_replace = 3,
        .moe_layer_freq = 1,
        .intermediate_size = 18432,
        .moe_intermediate_size = 2048,
        .n_routed_experts = 256,
        .n_shared_experts = 1,
        .num_experts_per_tok = 8,
        .n_group = 8,
        .topk_group = 4,
        .routed_scaling_factor = 2.5,
        .norm_topk_prob = true,
        .num_attention_heads = 128,
        .q_lora_rank = 1536,
        .kv_lora_rank = 512,
        .qk_nope_head_dim = 128,
        .qk_rope_head_dim = 64,
        .v_head_dim = 128,
        .index_n_heads = 64,
        .index_head_dim = 128,
        .index_topk = 2048,
        .rms_norm_eps = 1e-6,
        .rope_theta = 10000,
        .max_position_embeddings = 163840,
        .fp8 = true,
    };
}

/* Whether `name` is among the comma-separated words of list. */
static bool listed(const char *list, const char *name)
{
    const size_t n = strlen(name);
    for (const char *at = list; at; at = strchr(at, ','), at += at != NULL)
        if (strncmp(at, name, n) == 0 && (at[n] == ',' || at[n] == 0)) return true;
    return false;
}

static tr_status check_only(const char *list, tr_err *err)
{
    char copy[1024], *save = NULL;
    int n = 0;
    if (strlen(list) >= sizeof copy) return tr_fail(err, TR_E_USAGE, "--only: too long");
    memcpy(copy, list, strlen(list) + 1);
    for (char *word = strtok_r(copy, ",", &save); word; word = strtok_r(NULL, ",", &save), n++) {
        bool known = false;
        for (int i = 0; i < TR_N_BENCH_OPS; i++)
            known = known || strcmp(cases[i].name, word) == 0;
        if (!known) return tr_fail(err, TR_E_USAGE, "--only %s: no such operation", word);
    }
    return n ? TR_OK : tr_fail(err, TR_E_USAGE, "--only: no operation is named");
}

/* More than the last cache that this machine says it has, so far as that is bearable. */
static tr_status make_flush(tr_kbench *b, tr_err *err)
{
    long cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    size_t bytes = cache > 0 ? (size_t)cache + (size_t)cache / 4 : 0;
    /* small models have small operands: 224 MiB for 7168 numbers a row */
    const size_t most = (size_t)b->config.hidden_size << 15;
    bytes = bytes > most ? most : bytes;
    bytes = bytes < FLUSH_MIN ? FLUSH_MIN : bytes > FLUSH_MAX ? FLUSH_MAX : bytes;
    b->flush_words = bytes / sizeof *b->flush;
    b->flush = malloc(bytes);
    if (!b->flush) return tr_fail(err, TR_E_MEMORY, "bench: %zu bytes", bytes);
    for (size_t i = 0; i < b->flush_words; i++)
        b->flush[i] = i;
    return TR_OK;
}

static tr_status prepare(tr_kbench *b, tr_err *err)
{
    const tr_open_options *o = &b->options->open;
    const tr_device_options device = {
        .name = o->device ? o->device : "auto", .n_threads = o->n_threads, .isa = o->isa};
    tr_status st = TR_OK;

    b->random = o->seed * 0x9e3779b97f4a7c15u + 1;
    b->n_threads = o->n_threads > 0 ? o->n_threads : tr_device_threads();
    if (b->options->only) st = check_only(b->options->only, err);
    if (st != TR_OK) return st;
    b->config = published();
    if (o->model_dir)
        st = tr_config_load(&b->config, o->model_dir, o->overrides, o->n_overrides, err);
    else if (o->n_overrides > 0)
        st = tr_fail(err, TR_E_USAGE, "bench kernels: --override wants -m MODEL");
    if (st == TR_OK) st = tr_device_open(&b->device, &b->ops, &device, err);
    if (st == TR_OK) st = make_flush(b, err);
    if (st != TR_OK) return st;
    st = b->ops->ceilings(b->device, &b->ceilings);
    return st == TR_OK ? TR_OK : tr_fail_of(err, st, "ceilings", b->ops->error(b->device));
}

static void print_head(tr_kbench *b)
{
    const char *why = NULL;
    b->blas = tr_blas_open(b->n_threads, &why);
    const double sgemm = b->blas ? tr_blas_flops_per_s(b->blas) : 0;
    printf("# trireme %s, %s, %s; caches cold, %zu MiB read between runs\n", PACKAGE_VERSION,
           b->options->open.model_dir ? b->options->open.model_dir : "671B sizes",
           tr_device_describe(b->device), b->flush_words * sizeof *b->flush >> 20);
    tr_bench_print_ceilings(&b->ceilings, sgemm, b->blas ? tr_blas_describe(b->blas) : why);
    printf("# %-12s %-28s %4s %12s %12s %8s %6s %8s %6s %8s %9s\n", "operation", "shape", "reps",
           "median us", "min us", "GB/s", "read", "Gflop/s", "FMA", "sgemm", "error");
}

tr_status tr_bench_kernels(const tr_bench_options *o, tr_err *err)
{
    tr_kbench b = {.options = o};
    tr_status st = prepare(&b, err);
    if (st == TR_OK) print_head(&b);
    for (int i = 0; i < TR_N_BENCH_OPS && st == TR_OK; i++) {
        if (o->only && !listed(o->only, cases[i].name)) continue;
        st = cases[i].run(&b, err);
        tr_bench_case_end(&b);
        if (st != TR_OK) tr_within(err, "%s", cases[i].name);
    }
    tr_blas_close(b.blas);
    if (b.device) b.ops->close(b.device);
    free(b.flush);
    return st;
}
