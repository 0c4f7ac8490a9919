/* What the check for NaN and Inf in logits costs, for tests/fault/overhead.py: head rows with a target are checked and nothing
 * else (kernels.h, tr_sample_args), rows without one are sampled too. One thread, best of ROUNDS, prints
 * "CHECK SAMPLE" in nanoseconds a row.
 *
 * usage: nan_check ROWS VOCAB */
#include <config.h>

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "kernels/kernels.h"

enum { ROUNDS = 20 };

typedef struct head {
    tr_device *device;
    const tr_ops *ops;
    int n, n_vocab;
    float *logits; /* [n, n_vocab] */
    uint32_t *has_token;
    int32_t *index, *target, *token_out; /* [n]; index: i -> i */
    tr_slot_open *sampling;              /* [n] */
    int32_t *per_slot;                   /* [n] */
    tr_plan plan;                        /* without changes */
    void *workspace;
    size_t workspace_bytes;
} head;

static void *must(void *p)
{
    if (p) return p;
    fputs("nan_check: out of memory\n", stderr);
    exit(71);
}

static void make(head *h, int n, int n_vocab)
{
    tr_err err = {0};
    uint64_t x = 1;

    if (tr_device_open(&h->device, &h->ops, &(tr_device_options){.name = "cpu", .n_threads = 1},
                       &err) != TR_OK) {
        fprintf(stderr, "nan_check: %s\n", err.text);
        exit(70);
    }
    h->n = n;
    h->n_vocab = n_vocab;
    h->logits = must(malloc((size_t)n * (size_t)n_vocab * sizeof *h->logits));
    for (size_t i = 0; i < (size_t)n * (size_t)n_vocab; i++) {
        x = x * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        h->logits[i] = (float)((double)(x >> 40) * 0x1p-24 * 8 - 4);
    }
    h->has_token = must(malloc(((size_t)n_vocab + 31) / 32 * 4));
    memset(h->has_token, 0xff, ((size_t)n_vocab + 31) / 32 * 4);
    h->index = must(calloc((size_t)n, sizeof *h->index));
    h->target = must(calloc((size_t)n, sizeof *h->target));
    h->token_out = must(calloc((size_t)n, sizeof *h->token_out));
    h->per_slot = must(calloc((size_t)n, sizeof *h->per_slot));
    h->sampling = must(calloc((size_t)n, sizeof *h->sampling));
    for (int i = 0; i < n; i++) {
        h->index[i] = i;
        h->sampling[i] = (tr_slot_open){
            .slot = i, .n_logprobs = -1, .n_prompt_logprobs = -1, .temperature = 0, .top_p = 1};
    }
    h->workspace_bytes = h->ops->sample_workspace(n, n_vocab);
    h->workspace = must(malloc(h->workspace_bytes));
}

/* Best time of one call, divided by the rows; target -1: sampled. */
static double time_rows(head *h, int32_t target)
{
    int32_t n = h->n;
    const tr_rows rows = {.n_max = n,
                          .n_head_max = n,
                          .n = &n,
                          .n_head = &n,
                          .token = h->index,
                          .slot = h->index,
                          .position = h->index,
                          .head_row = h->index,
                          .target = h->target};
    const struct tr_sample_args args = {.rows = &rows,
                                        .n_rows = n,
                                        .n_vocab = h->n_vocab,
                                        .logits = h->logits,
                                        .ld = (size_t)h->n_vocab,
                                        .has_token = h->has_token,
                                        .slots = {.n_slots = n,
                                                  .length = h->per_slot,
                                                  .last_token = h->per_slot,
                                                  .sampling = h->sampling},
                                        .plan = &h->plan,
                                        .token_out = h->token_out,
                                        .workspace = h->workspace,
                                        .workspace_bytes = h->workspace_bytes};
    uint64_t best = UINT64_MAX;

    for (int i = 0; i < n; i++)
        h->target[i] = target;
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t begun = tr_now_ns();
        if (h->ops->sample(h->device, TR_LANE_MAIN, &args) != TR_OK) exit(70);
        uint64_t took = tr_now_ns() - begun;
        best = took < best ? took : best;
    }
    for (int i = 0; i < n; i++) /* otherwise something else was timed */
        if ((target >= 0) != (h->token_out[i] == -1)) exit(70);
    return (double)best / n;
}

int main(int argc, char **argv)
{
    head h = {0};
    int n = argc == 3 ? atoi(argv[1]) : 0, n_vocab = argc == 3 ? atoi(argv[2]) : 0;

    if (n < 1 || n > 4096 || n_vocab < 1 || n_vocab > 1 << 24) {
        fputs("usage: nan_check ROWS VOCAB\n", stderr);
        return 2;
    }
    make(&h, n, n_vocab);
    double check = time_rows(&h, 0), sample = time_rows(&h, -1);
    printf("%.0f %.0f\n", check, sample);
    h.ops->close(h.device);
    free(h.logits);
    free(h.has_token);
    free(h.index);
    free(h.target);
    free(h.token_out);
    free(h.per_slot);
    free(h.sampling);
    free(h.workspace);
    return 0;
}
