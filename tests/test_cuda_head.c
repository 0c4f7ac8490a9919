/* The CUDA backend's frame of a step (plans, page copies) and its head (sampling,
 * log-probabilities, parts of a vocabulary) against the CPU: rows, tokens, ranks and lists equal,
 * log-probabilities to the last bits of a sum. */
#include <config.h>

#include "model/plan.h"
#include "tests/cuda_test.h"

enum { SLOTS = 40, MAX_PAGES = 20, N_PAGES = 700, ROWS = 900, HEADS = 300 };

static const tr_plan_limits limits = {.n_slots = SLOTS,
                                      .n_pages = N_PAGES,
                                      .max_pages = MAX_PAGES,
                                      .n_rows_max = ROWS,
                                      .n_head_max = HEADS,
                                      .n_vocab = 1000,
                                      .index_topk = 2000};

typedef struct frame {
    tr_slots slots, dev_slots;
    tr_rows rows, dev_rows;
    char *plan;
} frame;

static void make_frame(pair *p, frame *f)
{
    memset(f, 0, sizeof *f);
    f->slots = (tr_slots){.n_slots = SLOTS, .max_pages = MAX_PAGES};
    f->slots.length = array(p, SLOTS * 4);
    f->slots.last_token = array(p, SLOTS * 4);
    f->slots.page_table = array(p, SLOTS * MAX_PAGES * 4);
    f->slots.sampling = array(p, SLOTS * sizeof(tr_slot_open));
    for (int i = 0; i < SLOTS; i++) {
        f->slots.length[i] = 3 * i;
        f->slots.last_token[i] = 500 + i;
    }
    for (int i = 0; i < SLOTS * MAX_PAGES; i++)
        f->slots.page_table[i] = i < N_PAGES ? i : -1;
    tr_rows r = {.n_max = ROWS,
                 .n_head_max = HEADS,
                 .max_pages = MAX_PAGES,
                 .page_table = f->slots.page_table};
    r.n = word(p, -1);
    r.n_head = word(p, -1);
    r.token = array(p, ROWS * 4);
    r.slot = array(p, ROWS * 4);
    r.position = array(p, ROWS * 4);
    r.begin = array(p, ROWS * 4);
    r.write = array(p, ROWS * 8);
    r.dense = array(p, ROWS);
    r.head_row = array(p, HEADS * 4);
    r.target = array(p, HEADS * 4);
    f->rows = r;
    f->plan = array(p, tr_plan_bytes_max(&limits));
    f->dev_rows = twin_rows(p, &r);
    f->dev_slots = twin_slots(p, &f->slots);
}

static void same_frame(pair *p, const frame *f)
{
    same_bytes(p, "n", f->rows.n, 4);
    same_bytes(p, "n_head", f->rows.n_head, 4);
    same_bytes(p, "token", f->rows.token, ROWS * 4);
    same_bytes(p, "slot", f->rows.slot, ROWS * 4);
    same_bytes(p, "position", f->rows.position, ROWS * 4);
    same_bytes(p, "begin", f->rows.begin, ROWS * 4);
    same_bytes(p, "write", f->rows.write, ROWS * 8);
    same_bytes(p, "dense", f->rows.dense, ROWS);
    same_bytes(p, "head_row", f->rows.head_row, HEADS * 4);
    same_bytes(p, "target", f->rows.target, HEADS * 4);
    same_bytes(p, "length", f->slots.length, SLOTS * 4);
    same_bytes(p, "page_table", f->slots.page_table, SLOTS * MAX_PAGES * 4);
    same_bytes(p, "sampling", f->slots.sampling, SLOTS * sizeof(tr_slot_open));
}

static void apply(pair *p, frame *f, const tr_plan *plan, int rows_only)
{
    memcpy(f->plan, plan, plan->bytes);
    struct tr_plan_apply_args c = {.plan = (const tr_plan *)(const void *)f->plan,
                                   .slots = f->slots,
                                   .rows = f->rows,
                                   .n_dense = limits.index_topk,
                                   .rows_only = rows_only},
                              g = {.plan = twin(p, f->plan),
                                   .slots = f->dev_slots,
                                   .rows = f->dev_rows,
                                   .n_dense = limits.index_topk,
                                   .rows_only = rows_only};
    push(p);
    assert_int_equal(p->c->plan_apply(p->cpu, TR_LANE_MAIN, &c), TR_OK);
    pair_ok(p, "plan_apply", p->g->plan_apply(p->gpu, TR_LANE_MAIN, &g));
    same_frame(p, f);
}

static void test_plans(void **state)
{
    pair *p = *state;
    int32_t tokens[ROWS];
    frame f;
    make_frame(p, &f);
    tr_plan_builder *b = tr_plan_builder_create(&limits);
    assert_non_null(b);
    for (int i = 0; i < ROWS; i++)
        tokens[i] = i % 1000;

    tr_plan_begin(b, 1, 0); /* opens, pages, a prompt, decode rows, a second span of one slot */
    tr_plan_add_open(
        b, (tr_slot_open){.key = 7, .slot = 3, .top_k = 5, .temperature = 0.5f, .top_p = 1});
    tr_plan_add_page(b, (tr_page_set){.slot = 3, .i_page = 0, .page = 650});
    tr_plan_add_page(b, (tr_page_set){.slot = 3, .i_page = 1, .page = 651});
    const int at = tr_plan_add_tokens(b, tokens, 110);
    tr_plan_add_span(b, (tr_span){.slot = 3,
                                  .n_rows = 100,
                                  .position = 0,
                                  .i_token = at,
                                  .owner = -1,
                                  .n_logits = 40,
                                  .flags = TR_SPAN_DENSE});
    for (int s = 5; s < 30; s++)
        tr_plan_add_span(b, (tr_span){.slot = s,
                                      .n_rows = 1,
                                      .position = -1,
                                      .i_token = -1,
                                      .kind = TR_SPAN_DECODE,
                                      .owner = -1,
                                      .n_logits = 1});
    tr_plan_add_span(
        b, (tr_span){.slot = 3, .n_rows = 10, .position = 100, .i_token = at + 100, .owner = -1});
    for (int i = 0; i < 65; i++)
        tr_plan_add_targets(b, &(int32_t){i % 2 ? 17 : -1}, 1);
    const tr_plan *plan = tr_plan_seal(b, 200);
    assert_non_null(plan);
    apply(p, &f, plan, 0);
    apply(p, &f, plan, 1);

    tr_plan_begin(b, 2, 0); /* nothing */
    apply(p, &f, tr_plan_seal(b, 1), 0);

    tr_plan_begin(b, 3, 0); /* all at once */
    tr_plan_add_tokens(b, tokens, ROWS);
    tr_plan_add_span(
        b, (tr_span){
               .slot = 0, .n_rows = ROWS, .position = 0, .i_token = 0, .owner = -1, .n_logits = 1});
    tr_plan_add_targets(b, &(int32_t){-1}, 1);
    apply(p, &f, tr_plan_seal(b, ROWS), 0);
    tr_plan_builder_free(b);
    pair_clear(p);
}

/* A slot's length takes the position out of its page table: the device says so, and goes no
 * further. */
static void test_plan_fault(void **state)
{
    pair *p = *state;
    frame f;
    make_frame(p, &f);
    tr_plan_builder *b = tr_plan_builder_create(&limits);
    f.slots.length[2] = MAX_PAGES * 64;
    tr_plan_begin(b, 1, 0);
    tr_plan_add_span(b,
                     (tr_span){.slot = 2, .n_rows = 1, .position = -1, .i_token = -1, .owner = -1});
    const tr_plan *plan = tr_plan_seal(b, 1);
    memcpy(f.plan, plan, plan->bytes);
    push(p);
    const struct tr_plan_apply_args g = {
        .plan = twin(p, f.plan), .slots = f.dev_slots, .rows = f.dev_rows};
    assert_int_equal(p->g->plan_apply(p->gpu, TR_LANE_MAIN, &g), TR_OK); /* enqueued */
    const uint64_t ticket = p->g->ticket(p->gpu, TR_LANE_MAIN);
    int done;
    while ((done = p->g->done(p->gpu, TR_LANE_MAIN, ticket)) == 0)
        continue;
    assert_int_equal(done, -1);
    assert_non_null(
        strstr(p->g->error(p->gpu), "plan_apply: positions past the slot's page table"));
    assert_int_equal(p->g->plan_apply(p->gpu, TR_LANE_MAIN, &g), TR_E_DEVICE);
    tr_plan_builder_free(b);
    pair_clear(p);
}

static void test_pages_copy(void **state)
{
    static const tr_dtype dtypes[] = {TR_E4M3, TR_BF16};
    pair *p = *state;
    tr_plan_builder *b = tr_plan_builder_create(&limits);
    for (int d = 0; d < 2; d++)
        for (int wide = 0; wide < 2; wide++) {
            tr_kv_layer kv = {.dtype = dtypes[d],
                              .n_pages = 9,
                              .d_latent = wide ? 512 : 132,
                              .d_rope = wide ? 64 : 6,
                              .d_index = wide ? 128 : 8};
            const size_t latent = 9 * 64 * tr_kv_row_bytes(kv.dtype, kv.d_latent, kv.d_rope),
                         index = 9 * tr_index_page_bytes(kv.dtype, kv.d_index);
            kv.latent = array(p, latent);
            kv.index = array(p, index);
            for (size_t i = 0; i < latent; i++)
                ((uint8_t *)kv.latent)[i] = (uint8_t)test_bits(&p->random);
            for (size_t i = 0; i < index; i++)
                ((uint8_t *)kv.index)[i] = (uint8_t)test_bits(&p->random);
            tr_plan_begin(b, 1, 0);
            tr_plan_add_copy(b, (tr_page_copy){.from = 2, .to = 7, .n_rows = 33});
            tr_plan_add_copy(b, (tr_page_copy){.from = 3, .to = 8, .n_rows = 64});
            tr_plan_add_copy(b, (tr_page_copy){.from = 4, .to = 1, .n_rows = 1});
            const tr_plan *plan = tr_plan_seal(b, 1);
            char *block = array(p, plan->bytes);
            memcpy(block, plan, plan->bytes);
            tr_kv_layer dev = kv;
            TWIN(p, dev.latent);
            TWIN(p, dev.index);
            push(p);
            assert_int_equal(p->c->pages_copy(p->cpu, TR_LANE_MAIN,
                                              &(struct tr_pages_copy_args){
                                                  (const tr_plan *)(const void *)block, kv}),
                             TR_OK);
            pair_ok(p, "pages_copy",
                    p->g->pages_copy(p->gpu, TR_LANE_MAIN,
                                     &(struct tr_pages_copy_args){twin(p, block), dev}));
            same_bytes(p, "latents", kv.latent, latent);
            same_bytes(p, "index keys", kv.index, index);
            pair_clear(p);
        }
    tr_plan_builder_free(b);
}

/* ---- head ---------------------------------------------------------------------------------------------------------- */

enum { VOCAB = 1000, LD = 1003, N_HEAD = 160, MEMBERS = 4 };

typedef struct head {
    frame f;
    float *logits;
    uint32_t *has_token;
    int32_t *token, *rank, *top;
    float *logprob, *top_logprob;
    void *workspace;
    size_t workspace_bytes;
} head;

static void make_head(pair *p, head *h)
{
    memset(h, 0, sizeof *h);
    make_frame(p, &h->f);
    tr_rows *r = &h->f.rows;
    *r->n = ROWS;
    *r->n_head = N_HEAD - 3;
    tr_plan_builder *b = tr_plan_builder_create(&limits);
    tr_plan_begin(b, 1, 0);
    for (int i = 0; i < N_HEAD; i++) {
        r->head_row[i] = 2 * i + 1;
        r->target[i] = i % 5 == 4 ? i * 3 : -1;
    }
    for (int i = 0; i < ROWS; i++) {
        r->slot[i] = i / 2 % SLOTS;
        r->position[i] = 10 + i;
    }
    for (int i = 0; i < SLOTS; i++)
        h->f.slots.sampling[i] =
            (tr_slot_open){.key = 99 + (uint64_t)i,
                           .slot = i,
                           .temperature = i % 4 == 0 ? 0.0f : 0.3f * (float)(i % 7) + 0.2f,
                           .top_p = i % 3 == 0 ? 0.9f : 1.0f,
                           .top_k = i % 5 == 1 ? 7 : 0,
                           .min_p = i % 6 == 5 ? 0.05f : 0.0f,
                           .n_logprobs = i % 3 - 1 ? 5 * (i % 4) : -1,
                           .n_prompt_logprobs = i % 2 ? 20 : -1};
    h->logits = floats(p, N_HEAD * LD, 6);
    h->logits[3 * LD + 5] = NAN;
    h->logits[6 * LD + 5] = INFINITY;
    for (int i = 0; i < VOCAB; i++) {
        h->logits[8 * LD + i] = -0.0f; /* all equal, sampled */
        h->logits[40 * LD + i] = 1;    /* all equal, greedy */
        h->logits[7 * LD + i] = i == 500 ? 80 : -80;
    }
    for (int row = 10; row < 14; row++)
        for (int i = 0; i < 30; i++)
            tr_plan_add_change(b,
                               (tr_logit_change){.head_row = row,
                                                 .token = i * 7,
                                                 .repetition = i % 3 ? 1.3f : 1,
                                                 .bias = i % 5 == 4 ? -INFINITY : (float)(i - 10),
                                                 .penalty = 0.5f});
    for (int i = 0; i < VOCAB; i++) /* no id is left */
        tr_plan_add_change(
            b, (tr_logit_change){.head_row = 20, .token = i, .repetition = 1, .bias = -INFINITY});
    const tr_plan *plan = tr_plan_seal(b, 1);
    assert_non_null(plan);
    memcpy(h->f.plan, plan, plan->bytes);
    tr_plan_builder_free(b);
    h->has_token = array(p, (VOCAB + 31) / 32 * 4);
    for (int i = 0; i < (VOCAB + 31) / 32; i++)
        h->has_token[i] = i == 9 ? 0x5555aaaau : 0xffffffffu;
    h->token = array(p, HEADS * 4);
    h->rank = array(p, HEADS * 4);
    h->logprob = array(p, HEADS * 4);
    h->top = array(p, HEADS * TR_MAX_LOGPROBS * 4);
    h->top_logprob = array(p, HEADS * TR_MAX_LOGPROBS * 4);
    const size_t cpu = p->c->sample_workspace(N_HEAD, VOCAB),
                 gpu = p->g->sample_workspace(N_HEAD, VOCAB);
    h->workspace_bytes = cpu > gpu ? cpu : gpu;
    h->workspace = array(p, h->workspace_bytes);
}

static void same_scores(pair *p, const head *h)
{
    same_bytes(p, "rank", h->rank, HEADS * 4);
    same_bytes(p, "top tokens", h->top, HEADS * TR_MAX_LOGPROBS * 4);
    near(p, "logprob", h->logprob, HEADS, 1e-6, 1e-6);
    near(p, "top logprobs", h->top_logprob, HEADS * TR_MAX_LOGPROBS, 1e-6, 1e-6);
}

static void sample(pair *p, const head *h, int i, int n)
{
    struct tr_sample_args c = {.rows = &h->f.rows,
                               .i_head = i,
                               .n_rows = n,
                               .n_vocab = VOCAB,
                               .logits = h->logits + (size_t)i * LD,
                               .ld = LD,
                               .has_token = h->has_token,
                               .slots = h->f.slots,
                               .plan = (const tr_plan *)(const void *)h->f.plan,
                               .token_out = h->token,
                               .workspace = h->workspace,
                               .workspace_bytes = h->workspace_bytes},
                          g = c;
    push(p);
    g.rows = &h->f.dev_rows;
    g.slots = h->f.dev_slots;
    TWIN(p, g.logits);
    TWIN(p, g.has_token);
    TWIN(p, g.plan);
    TWIN(p, g.token_out);
    TWIN(p, g.workspace);
    assert_int_equal(p->c->sample(p->cpu, TR_LANE_MAIN, &c), TR_OK);
    pair_ok(p, "sample", p->g->sample(p->gpu, TR_LANE_MAIN, &g));
}

static void test_sample(void **state)
{
    pair *p = *state;
    head h;
    make_head(p, &h);
    for (int i = 0; i < N_HEAD; i += 100) {
        sample(p, &h, i, N_HEAD - i < 100 ? N_HEAD - i : 100);
        same_bytes(p, "tokens", h.token, HEADS * 4);
        same_bytes(p, "last tokens", h.f.slots.last_token, SLOTS * 4);
        struct tr_logprobs_args c = {.rows = &h.f.rows,
                                     .i_head = i,
                                     .n_rows = N_HEAD - i < 100 ? N_HEAD - i : 100,
                                     .n_vocab = VOCAB,
                                     .logits = h.logits + (size_t)i * LD,
                                     .ld = LD,
                                     .slots = h.f.slots,
                                     .token_out = h.token,
                                     .logprob = h.logprob,
                                     .rank = h.rank,
                                     .top_token = h.top,
                                     .top_logprob = h.top_logprob},
                                g = c;
        push(p);
        g.rows = &h.f.dev_rows;
        g.slots = h.f.dev_slots;
        TWIN(p, g.logits);
        TWIN(p, g.token_out);
        TWIN(p, g.logprob);
        TWIN(p, g.rank);
        TWIN(p, g.top_token);
        TWIN(p, g.top_logprob);
        assert_int_equal(p->c->logprobs(p->cpu, TR_LANE_MAIN, &c), TR_OK);
        pair_ok(p, "logprobs", p->g->logprobs(p->gpu, TR_LANE_MAIN, &g));
        same_scores(p, &h);
    }
    int n_sampled = 0;
    for (int i = 0; i < N_HEAD - 3; i++)
        n_sampled += h.token[i] >= 0;
    assert_true(n_sampled > 100);
    assert_int_equal(h.token[3], -2);
    assert_int_equal(h.token[20], -2);
    pair_clear(p);
}

/* Members' parts made by the GPU from quarters of the ids, merged; what the CPU makes of its
 * own. */
static void test_parts(void **state)
{
    enum { EACH = VOCAB / MEMBERS };
    pair *p = *state;
    head h;
    make_head(p, &h);
    tr_sample_part *part = array(p, MEMBERS * N_HEAD * sizeof *part);
    tr_logprob_part *score = array(p, MEMBERS * N_HEAD * sizeof *score);
    int32_t *better = array(p, MEMBERS * N_HEAD * 4);
    uint64_t *key = array(p, MEMBERS * N_HEAD * 8);
    float *own = array(p, N_HEAD * EACH * 4);
    const tr_plan *plan = (const tr_plan *)(const void *)h.f.plan;
    for (int m = 0; m < MEMBERS; m++) {
        for (int r = 0; r < N_HEAD; r++)
            memcpy(own + r * EACH, h.logits + r * LD + m * EACH, EACH * 4);
        struct tr_sample_part_args c = {.rows = &h.f.rows,
                                        .n_rows = N_HEAD,
                                        .first = m * EACH,
                                        .n_vocab = EACH,
                                        .logits = own,
                                        .ld = EACH,
                                        .has_token = h.has_token,
                                        .slots = h.f.slots,
                                        .plan = plan,
                                        .part = part + m * N_HEAD,
                                        .workspace = h.workspace,
                                        .workspace_bytes = h.workspace_bytes},
                                   g = c;
        struct tr_argmax_part_args kc = {.rows = &h.f.rows,
                                         .n_rows = N_HEAD,
                                         .first = m * EACH,
                                         .n_vocab = EACH,
                                         .logits = own,
                                         .ld = EACH,
                                         .has_token = h.has_token,
                                         .plan = plan,
                                         .key = key + m * N_HEAD,
                                         .workspace = h.workspace,
                                         .workspace_bytes = h.workspace_bytes},
                                   kg = kc;
        push(p);
        g.rows = kg.rows = &h.f.dev_rows;
        g.slots = h.f.dev_slots;
        TWIN(p, g.logits);
        TWIN(p, g.has_token);
        TWIN(p, g.plan);
        TWIN(p, g.part);
        TWIN(p, g.workspace);
        TWIN(p, kg.logits);
        TWIN(p, kg.has_token);
        TWIN(p, kg.plan);
        TWIN(p, kg.key);
        TWIN(p, kg.workspace);
        assert_int_equal(p->c->sample_part(p->cpu, TR_LANE_MAIN, &c), TR_OK);
        pair_ok(p, "sample_part", p->g->sample_part(p->gpu, TR_LANE_MAIN, &g));
        assert_int_equal(p->c->argmax_part(p->cpu, TR_LANE_MAIN, &kc), TR_OK);
        pair_ok(p, "argmax_part", p->g->argmax_part(p->gpu, TR_LANE_MAIN, &kg));
        same_bytes(p, "argmax keys", key + m * N_HEAD, (size_t)(N_HEAD - 3) * 8);
        const tr_sample_part *got = pull(p, part);
        for (int r = 0; r < N_HEAD - 3; r++) {
            const tr_sample_part *x = &got[m * N_HEAD + r], *want = &part[m * N_HEAD + r];
            if (x->n != want->n || x->finite != want->finite ||
                memcmp(x->best, want->best, sizeof x->best) != 0 ||
                !(fabs(x->sum - want->sum) <= 1e-12 * want->sum))
                fail_msg("sample_part: member %d, row %d: %d ids, sum %g; not %d, %g", m, r, x->n,
                         x->sum, want->n, want->sum);
        }
    }
    struct tr_sample_merge_args mc = {.rows = &h.f.rows,
                                      .n_rows = N_HEAD,
                                      .n_members = MEMBERS,
                                      .part = part,
                                      .slots = h.f.slots,
                                      .token_out = h.token},
                                mg = mc;
    push(p);
    mg.rows = &h.f.dev_rows;
    mg.slots = h.f.dev_slots;
    TWIN(p, mg.part);
    TWIN(p, mg.token_out);
    assert_int_equal(p->c->sample_merge(p->cpu, TR_LANE_MAIN, &mc), TR_OK);
    pair_ok(p, "sample_merge", p->g->sample_merge(p->gpu, TR_LANE_MAIN, &mg));
    same_bytes(p, "merged tokens", h.token, HEADS * 4);
    same_bytes(p, "merged last tokens", h.f.slots.last_token, SLOTS * 4);

    for (int m = 0; m < MEMBERS; m++) {
        for (int r = 0; r < N_HEAD; r++)
            memcpy(own + r * EACH, h.logits + r * LD + m * EACH, EACH * 4);
        struct tr_logprob_part_args c = {.rows = &h.f.rows,
                                         .n_rows = N_HEAD,
                                         .first = m * EACH,
                                         .n_vocab = EACH,
                                         .logits = own,
                                         .ld = EACH,
                                         .slots = h.f.slots,
                                         .token_out = h.token,
                                         .part = score + m * N_HEAD},
                                    g = c;
        push(p);
        g.rows = &h.f.dev_rows;
        g.slots = h.f.dev_slots;
        TWIN(p, g.logits);
        TWIN(p, g.token_out);
        TWIN(p, g.part);
        assert_int_equal(p->c->logprob_part(p->cpu, TR_LANE_MAIN, &c), TR_OK);
        pair_ok(p, "logprob_part", p->g->logprob_part(p->gpu, TR_LANE_MAIN, &g));
        const tr_logprob_part *got = pull(p, score);
        for (int r = 0; r < N_HEAD - 3; r++) {
            tr_logprob_part x = got[m * N_HEAD + r];
            const tr_logprob_part *want = &score[m * N_HEAD + r];
            assert_true(fabs(x.sum - want->sum) <= 1e-12 * want->sum || isnan(want->sum));
            x.sum = want->sum;
            if (isfinite(want->sum) && memcmp(&x, want, sizeof x) != 0)
                fail_msg("logprob_part: member %d, row %d", m, r);
        }
    }
    for (int m = 0; m < MEMBERS; m++) {
        for (int r = 0; r < N_HEAD; r++)
            memcpy(own + r * EACH, h.logits + r * LD + m * EACH, EACH * 4);
        struct tr_logprob_rank_args c = {.rows = &h.f.rows,
                                         .n_rows = N_HEAD,
                                         .first = m * EACH,
                                         .n_vocab = EACH,
                                         .n_members = MEMBERS,
                                         .logits = own,
                                         .ld = EACH,
                                         .slots = h.f.slots,
                                         .token_out = h.token,
                                         .part = score,
                                         .better = better + m * N_HEAD},
                                    g = c;
        push(p);
        g.rows = &h.f.dev_rows;
        g.slots = h.f.dev_slots;
        TWIN(p, g.logits);
        TWIN(p, g.token_out);
        TWIN(p, g.part);
        TWIN(p, g.better);
        assert_int_equal(p->c->logprob_rank(p->cpu, TR_LANE_MAIN, &c), TR_OK);
        pair_ok(p, "logprob_rank", p->g->logprob_rank(p->gpu, TR_LANE_MAIN, &g));
        same_bytes(p, "better", better + m * N_HEAD, (size_t)(N_HEAD - 3) * 4);
    }
    struct tr_logprob_merge_args lc = {.rows = &h.f.rows,
                                       .n_rows = N_HEAD,
                                       .n_members = MEMBERS,
                                       .slots = h.f.slots,
                                       .token_out = h.token,
                                       .part = score,
                                       .better = better,
                                       .logprob = h.logprob,
                                       .rank = h.rank,
                                       .top_token = h.top,
                                       .top_logprob = h.top_logprob},
                                 lg = lc;
    push(p);
    lg.rows = &h.f.dev_rows;
    lg.slots = h.f.dev_slots;
    TWIN(p, lg.token_out);
    TWIN(p, lg.part);
    TWIN(p, lg.better);
    TWIN(p, lg.logprob);
    TWIN(p, lg.rank);
    TWIN(p, lg.top_token);
    TWIN(p, lg.top_logprob);
    assert_int_equal(p->c->logprob_merge(p->cpu, TR_LANE_MAIN, &lc), TR_OK);
    pair_ok(p, "logprob_merge", p->g->logprob_merge(p->gpu, TR_LANE_MAIN, &lg));
    same_scores(p, &h);

    for (int r = 0; r < N_HEAD; r++) /* the largest of the members' keys */
        for (int m = 1; m < MEMBERS; m++)
            if (key[m * N_HEAD + r] > key[r]) key[r] = key[m * N_HEAD + r];
    struct tr_argmax_take_args tc = {.rows = &h.f.rows,
                                     .n_rows = N_HEAD,
                                     .key = key,
                                     .slots = h.f.slots,
                                     .token_out = h.token},
                               tg = tc;
    push(p);
    tg.rows = &h.f.dev_rows;
    tg.slots = h.f.dev_slots;
    TWIN(p, tg.key);
    TWIN(p, tg.token_out);
    assert_int_equal(p->c->argmax_take(p->cpu, TR_LANE_MAIN, &tc), TR_OK);
    pair_ok(p, "argmax_take", p->g->argmax_take(p->gpu, TR_LANE_MAIN, &tg));
    same_bytes(p, "greedy tokens", h.token, HEADS * 4);
    same_bytes(p, "greedy last tokens", h.f.slots.last_token, SLOTS * 4);
    pair_clear(p);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_plans, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_plan_fault, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_pages_copy, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_sample, pair_open, pair_close),
        cmocka_unit_test_setup_teardown(test_parts, pair_open, pair_close),
    };
    return run_on_gpu(argc, argv, tests, sizeof tests / sizeof *tests);
}
