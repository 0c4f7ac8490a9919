#include <config.h>

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include "kernels/number.h"
#include "model/tensors.h"
#include "model/weights.h"
#include "model/weights_priv.h"
#include "tests/fake_ops.h"
#include "tests/made_checkpoint.h"
#include "tests/scratch.h"
#include "tests/shard_file.h"
#include "tests/vectors.h"

/* ---- a loaded model, and the reference: tensors dequantised whole, by global index ---------------------------------- */

typedef struct loaded {
    tr_config config;
    tr_checkpoint *checkpoint; /* NULL: dummy weights of seed 7 */
    tr_slice slice;
    tr_device device;
    tr_weights *weights;
    tr_regions regions;
} loaded;

static tr_slice slice_of(const tr_config *c, tr_grid_sizes n, int rank)
{
    tr_grid g = {.size = n, .rank = rank};
    int stage = n.dp * n.cp * n.tp, s = rank % stage;
    tr_slice slice;
    tr_err err;
    g.world = n.pp * stage;
    g.at = (tr_coord){.pp = rank / stage,
                      .dp = s / n.tp / n.cp,
                      .cp = s / n.tp % n.cp,
                      .tp = s % n.tp,
                      .mdp = s / n.xt / n.ep,
                      .ep = s / n.xt % n.ep,
                      .xt = s % n.xt};
    if (tr_slice_make(&slice, c, &g, &err) != TR_OK) fail_msg("%s", err.text);
    return slice;
}

static const tr_grid_sizes single = {1, 1, 1, 1, 1, 1, 1};

static void load_by(const tr_ops *ops, loaded *m, const tr_config *config,
                    const tr_checkpoint *checkpoint, tr_grid_sizes n, int rank)
{
    tr_err err = {0};
    *m = (loaded){.config = *config};
    m->slice = slice_of(config, n, rank);
    tr_status st = tr_weights_load(&m->weights, config, &m->slice, checkpoint,
                                   checkpoint ? TR_LOAD_SAFETENSORS : TR_LOAD_DUMMY, 7, &m->device,
                                   ops, NULL, &m->regions, &err);
    if (st != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(m->weights->bytes, m->device.bytes);
}

static void load(loaded *m, const tr_config *config, const tr_checkpoint *checkpoint,
                 tr_grid_sizes n, int rank)
{
    load_by(&fake_ops, m, config, checkpoint, n, rank);
}

static void unload(loaded *m)
{
    tr_weights_free(m->weights, &m->device, &fake_ops);
    assert_int_equal(m->device.n_live, 0);
}

static void *read_all(const tr_checkpoint *c, const char *name, const tr_tensor **t)
{
    tr_err err = {0};
    *t = tr_checkpoint_find(c, name);
    if (!*t) fail_msg("%s is missing", name);
    void *data = malloc((*t)->bytes);
    assert_non_null(data);
    if (tr_checkpoint_read(c, *t, 0, (*t)->bytes, data, &err) != TR_OK) fail_msg("%s", err.text);
    return data;
}

/* Stored rows in fp32, [rows.n, *columns]; rows.n < 0: all. Owned by the caller. */
static float *dequantised(const tr_checkpoint *c, const char *name, tr_range rows, int *columns)
{
    char scale_name[160];
    const tr_tensor *t, *ts = NULL;
    void *data = read_all(c, name, &t);
    size_t n_cols = (size_t)(t->rank == 2 ? t->shape[1] : 1);
    size_t n_rows = (size_t)(rows.n < 0 ? t->shape[0] : rows.n);
    float *x = malloc(n_rows * n_cols * sizeof *x), *scale = NULL;
    assert_non_null(x);
    if (t->stored == TR_STORED_F8_E4M3) {
        snprintf(scale_name, sizeof scale_name, "%s_scale_inv", name);
        scale = read_all(c, scale_name, &ts);
    }
    for (size_t r = 0; r < n_rows; r++) {
        size_t row = r + (size_t)rows.begin, at = row * n_cols;
        for (size_t k = 0; k < n_cols; k++, at++)
            if (scale)
                x[r * n_cols + k] = tr_e4m3_to_f32(((uint8_t *)data)[at]) *
                                    scale[row / 128 * (size_t)ts->shape[1] + k / 128];
            else
                x[r * n_cols + k] = t->stored == TR_STORED_BF16
                                        ? tr_bf16_to_f32(((uint16_t *)data)[at])
                                        : ((float *)data)[at];
    }
    *columns = (int)n_cols;
    free(scale);
    free(data);
    return x;
}

/* Rows [o_begin, o_begin + rows.n) of matrix i_mat are the stored rows and columns, bit for bit. */
static void same_matrix(const loaded *m, const tr_linear *w, int i_mat, int o_begin,
                        const char *name, tr_range rows, tr_range columns, bool transposed)
{
    int ld;
    float *x = dequantised(m->checkpoint, name, rows, &ld);
    const float *got = (const float *)w->data + (size_t)i_mat * w->n_out * w->n_in;
    assert_int_equal(w->n_in, transposed ? rows.n : columns.n);
    for (int r = 0; r < rows.n; r++)
        for (int c = 0; c < columns.n; c++) {
            float want = x[(size_t)r * ld + columns.begin + c];
            float is = transposed ? got[(size_t)c * w->n_in + r]
                                  : got[(size_t)(o_begin + r) * w->n_in + c];
            if (tr_f32_bits(is) != tr_f32_bits(want))
                fail_msg("%s [%d, %d]: %g, not %g", name, rows.begin + r, columns.begin + c,
                         (double)is, (double)want);
        }
    free(x);
}

static void same_vector(const loaded *m, const float *v, const char *name)
{
    int ld;
    float *x = dequantised(m->checkpoint, name, (tr_range){.begin = 0, .n = -1}, &ld);
    assert_int_equal(ld, 1);
    assert_memory_equal(v, x,
                        (size_t)tr_checkpoint_find(m->checkpoint, name)->shape[0] * sizeof *x);
    free(x);
}

static tr_range whole(int n)
{
    return (tr_range){.begin = 0, .n = n};
}

static tr_range times(tr_range r, int d)
{
    return (tr_range){.begin = r.begin * d, .n = r.n * d};
}

/* "model.layers.N." + what, in text. */
static const char *in_layer(char text[160], int layer, const char *what)
{
    snprintf(text, 160, "model.layers.%d.%s", layer, what);
    return text;
}

static void check_attention(const loaded *m, const tr_attention_weights *a, int l)
{
    const tr_config *c = &m->config;
    int d_nope = c->qk_nope_head_dim, d_v = c->v_head_dim, d_head = d_nope + d_v;
    tr_range hidden = whole(c->hidden_size), latent = whole(c->kv_lora_rank);
    tr_range q_lora = whole(c->q_lora_rank), heads = m->slice.heads;
    char t[160];

    same_vector(m, a->input_norm, in_layer(t, l, "input_layernorm.weight"));
    same_vector(m, a->q_a_norm, in_layer(t, l, "self_attn.q_a_layernorm.weight"));
    same_vector(m, a->kv_a_norm, in_layer(t, l, "self_attn.kv_a_layernorm.weight"));
    same_vector(m, a->index_k_norm, in_layer(t, l, "self_attn.indexer.k_norm.weight"));
    same_vector(m, a->index_k_bias, in_layer(t, l, "self_attn.indexer.k_norm.bias"));
    same_matrix(m, &a->q_a, 0, 0, in_layer(t, l, "self_attn.q_a_proj.weight"), q_lora, hidden, 0);
    same_matrix(m, &a->kv_a, 0, 0, in_layer(t, l, "self_attn.kv_a_proj_with_mqa.weight"),
                whole(c->kv_lora_rank + c->qk_rope_head_dim), hidden, 0);
    same_matrix(m, &a->q_b, 0, 0, in_layer(t, l, "self_attn.q_b_proj.weight"),
                times(heads, d_nope + c->qk_rope_head_dim), q_lora, 0);
    same_matrix(m, &a->o, 0, 0, in_layer(t, l, "self_attn.o_proj.weight"), hidden,
                times(heads, d_v), 0);
    same_matrix(m, &a->index_q, 0, 0, in_layer(t, l, "self_attn.indexer.wq_b.weight"),
                whole(c->index_n_heads * c->index_head_dim), q_lora, 0);
    same_matrix(m, &a->index_k, 0, 0, in_layer(t, l, "self_attn.indexer.wk.weight"),
                whole(c->index_head_dim), hidden, 0);
    same_matrix(m, &a->index_w, 0, 0, in_layer(t, l, "self_attn.indexer.weights_proj.weight"),
                whole(c->index_n_heads), hidden, 0);
    assert_int_equal(a->w_uk.n_mats, heads.n);
    assert_int_equal(a->w_uk_t.n_out, c->kv_lora_rank);
    for (int h = 0; h < heads.n; h++) {
        tr_range uk = {.begin = (heads.begin + h) * d_head, .n = d_nope};
        tr_range uv = {.begin = uk.begin + d_nope, .n = d_v};
        in_layer(t, l, "self_attn.kv_b_proj.weight");
        same_matrix(m, &a->w_uk, h, 0, t, uk, latent, 0);
        same_matrix(m, &a->w_uk_t, h, 0, t, uk, latent, 1);
        same_matrix(m, &a->w_uv, h, 0, t, uv, latent, 0);
    }
}

/* prefix: "mlp." or "mlp.experts.3." */
static void check_mlp(const loaded *m, const tr_linear *gate_up, const tr_linear *down, int i_mat,
                      int l, const char *prefix, tr_range inner)
{
    tr_range hidden = whole(m->config.hidden_size);
    char what[80], t[160];

    assert_int_equal(gate_up->n_out, 2 * inner.n);
    snprintf(what, sizeof what, "%sgate_proj.weight", prefix);
    same_matrix(m, gate_up, i_mat, 0, in_layer(t, l, what), inner, hidden, 0);
    snprintf(what, sizeof what, "%sup_proj.weight", prefix);
    same_matrix(m, gate_up, i_mat, inner.n, in_layer(t, l, what), inner, hidden, 0);
    snprintf(what, sizeof what, "%sdown_proj.weight", prefix);
    same_matrix(m, down, i_mat, 0, in_layer(t, l, what), hidden, inner, 0);
}

static void check_layer(const loaded *m, const tr_layer_weights *w, int l)
{
    const tr_slice *s = &m->slice;
    const tr_moe_weights *moe = &w->moe;
    char t[160];

    check_attention(m, &w->attention, l);
    same_vector(m, w->post_norm, in_layer(t, l, "post_attention_layernorm.weight"));
    assert_int_equal(w->is_moe, l >= m->config.first_k_dense_replace);
    if (!w->is_moe) {
        assert_int_equal(w->mlp.inner, s->dense_inner.n);
        check_mlp(m, &w->mlp.gate_up, &w->mlp.down, 0, l, "mlp.", s->dense_inner);
        return;
    }
    assert_int_equal(moe->e_first, s->experts.begin);
    assert_int_equal(moe->n_local, s->experts.n);
    assert_int_equal(moe->inner, s->expert_inner.n);
    same_matrix(m, &moe->gate, 0, 0, in_layer(t, l, "mlp.gate.weight"),
                whole(m->config.n_routed_experts), whole(m->config.hidden_size), 0);
    same_vector(m, moe->gate_bias, in_layer(t, l, "mlp.gate.e_score_correction_bias"));
    for (int e = 0; e < moe->n_local; e++) {
        char prefix[40];
        snprintf(prefix, sizeof prefix, "mlp.experts.%d.", s->experts.begin + e);
        check_mlp(m, &moe->gate_up, &moe->down, e, l, prefix, s->expert_inner);
    }
    assert_int_equal(moe->shared.inner, s->shared_inner.n);
    check_mlp(m, &moe->shared.gate_up, &moe->shared.down, 0, l, "mlp.shared_experts.",
              s->shared_inner);
}

static void check_all(const loaded *m)
{
    const tr_weights *w = m->weights;
    const tr_config *c = &m->config;
    int n = c->num_hidden_layers;
    bool mtp = m->slice.head && c->num_nextn_predict_layers;
    const tr_tensor *t;
    char text[160];

    assert_int_equal(w->embed != NULL, m->slice.embed || mtp);
    if (w->embed) {
        void *embed = read_all(m->checkpoint, "model.embed_tokens.weight", &t);
        assert_int_equal(w->embed_dtype, t->stored == TR_STORED_BF16 ? TR_BF16 : TR_F32);
        assert_memory_equal(w->embed, embed, t->bytes);
        free(embed);
    }
    for (int i = 0; i < m->slice.layers.n; i++)
        check_layer(m, &w->layer[i], m->slice.layers.begin + i);
    assert_int_equal(w->norm != NULL, m->slice.head);
    if (m->slice.head) {
        same_vector(m, w->norm, "model.norm.weight");
        same_matrix(m, &w->head, 0, 0, "lm_head.weight", m->slice.vocab, whole(c->hidden_size), 0);
    }
    assert_int_equal(w->mtp != NULL, mtp);
    if (!mtp) return;
    same_vector(m, w->mtp->enorm, in_layer(text, n, "enorm.weight"));
    same_vector(m, w->mtp->hnorm, in_layer(text, n, "hnorm.weight"));
    same_vector(m, w->mtp->head_norm, in_layer(text, n, "shared_head.norm.weight"));
    same_matrix(m, &w->mtp->eh, 0, 0, in_layer(text, n, "eh_proj.weight"), whole(c->hidden_size),
                whole(2 * c->hidden_size), 0);
    check_layer(m, &w->mtp->layer, n);
}

static void open_model(const char *path, tr_config *c, tr_checkpoint **checkpoint)
{
    tr_err err = {0};
    if (tr_config_load(c, path, NULL, 0, &err) != TR_OK) fail_msg("%s", err.text);
    if (tr_checkpoint_open(checkpoint, path, &err) != TR_OK) fail_msg("%s", err.text);
}

/* Bytes of all tensors but the MTP layer's copies. */
static uint64_t bytes_of(const tr_checkpoint *c, bool (*counts)(const char *name))
{
    uint64_t sum = 0;
    for (size_t i = 0; i < tr_checkpoint_count(c); i++) {
        const tr_tensor *t = tr_checkpoint_tensor(c, i);
        bool copy = strncmp(t->name, "model.layers.", 13) == 0 &&
                    (strstr(t->name, "embed_tokens") || strstr(t->name, "shared_head.head"));
        if (!copy && (!counts || counts(t->name))) sum += t->bytes;
    }
    return sum;
}

/* ---- tests -------------------------------------------------------------------------------------------------------- */

static void whole_models_are_what_is_stored(void **state)
{
    (void)state;
    char path[3][512];
    tr_source_path(path[0], sizeof path[0], "models/tiny");
    tr_vector_path(path[1], sizeof path[1], "model/tiny"); /* heads end inside scale blocks */
    tr_vector_path(path[2], sizeof path[2], "model/realgeom");
    for (int i = 0; i < 3; i++) {
        tr_config c;
        tr_checkpoint *checkpoint;
        loaded m;
        open_model(path[i], &c, &checkpoint);
        load(&m, &c, checkpoint, single, 0);
        assert_int_equal(m.weights->bytes_read, tr_checkpoint_bytes_read(checkpoint));
        /* Every byte once. (Where a head ends inside a scale block, kv_b's scales are read again.) */
        if (i != 1)
            assert_int_equal(m.weights->bytes_read, bytes_of(checkpoint, NULL));
        else
            assert_true(m.weights->bytes_read < bytes_of(checkpoint, NULL) + 200);
        m.checkpoint = checkpoint;
        check_all(&m);
        int read = tr_region_id(&m.regions, "load/read"),
            pack = tr_region_id(&m.regions, "load/pack");
        assert_int_equal(m.regions.n, 2);
        assert_true(m.regions.total[read].bytes == (double)m.weights->bytes_read);
        assert_true(m.regions.total[pack].calls > 0);
        unload(&m);
        tr_checkpoint_close(checkpoint);
    }
}

/* Where the device's threads read: the same weights, every byte once. */
static void filled_weights_are_the_same(void **state)
{
    static const tr_grid_sizes halves = {
        .pp = 1, .dp = 1, .cp = 1, .tp = 2, .mdp = 1, .ep = 1, .xt = 2};
    char path[512];
    (void)state;
    for (int i = 0; i < 4; i++) {
        const tr_grid_sizes *sizes = i < 2 ? &single : &halves;
        tr_config c;
        tr_checkpoint *checkpoint;
        loaded m, packed;
        open_model(tr_vector_path(path, sizeof path, "model/tiny"), &c, &checkpoint);
        load_by(&filling_ops, &m, &c, i ? checkpoint : NULL, *sizes, i / 3);
        load(&packed, &c, i ? checkpoint : NULL, *sizes, i / 3);
        assert_int_equal(m.regions.n, 3);
        assert_int_equal(m.weights->bytes_read, packed.weights->bytes_read);
        const tr_linear *a = &m.weights->layer[1].attention.o;
        assert_memory_equal(a->data, packed.weights->layer[1].attention.o.data,
                            fake_linear_bytes(a->format, 1, a->n_out, a->n_in));
        m.checkpoint = checkpoint;
        if (i) check_all(&m);
        unload(&packed);
        unload(&m);
        tr_checkpoint_close(checkpoint);
    }
}

static void slices_are_their_part_of_the_whole(void **state)
{
    (void)state;
    static const tr_grid_sizes grids[] = {
        {1, 1, 1, 2, 1, 2, 1}, {1, 1, 1, 4, 1, 2, 2}, {2, 1, 1, 2, 1, 1, 2}, {1, 2, 1, 1, 2, 1, 1}};
    char path[512];
    tr_config c;
    tr_checkpoint *checkpoint;
    open_model(tr_vector_path(path, sizeof path, "model/tiny"), &c, &checkpoint);
    for (size_t k = 0; k < sizeof grids / sizeof *grids; k++)
        for (int rank = 0; rank < grids[k].pp * grids[k].dp * grids[k].tp; rank++) {
            loaded m;
            load(&m, &c, checkpoint, grids[k], rank);
            m.checkpoint = checkpoint;
            check_all(&m);
            unload(&m);
        }
    tr_checkpoint_close(checkpoint);
}

static void assert_same_floats(const float *a, const float *b, size_t n)
{
    assert_memory_equal(a, b, n * sizeof *a);
}

static const float *matrix(const tr_linear *w, int i_mat)
{
    return (const float *)w->data + (size_t)i_mat * w->n_out * w->n_in;
}

/* tp = 2, ep = 2: heads, experts and the dense width of both ranks, side by side, are the whole. */
static void assert_halves_make_whole(const loaded *all, const loaded half[2])
{
    for (int l = 0; l < all->slice.layers.n; l++) {
        const tr_layer_weights *w = &all->weights->layer[l];
        for (int r = 0; r < 2; r++) {
            const tr_layer_weights *p = &half[r].weights->layer[l];
            const tr_linear *q = &p->attention.q_b, *o = &p->attention.o;
            assert_int_equal(2 * q->n_out, w->attention.q_b.n_out);
            assert_same_floats(matrix(q, 0),
                               matrix(&w->attention.q_b, 0) + (size_t)r * q->n_out * q->n_in,
                               (size_t)q->n_out * q->n_in);
            assert_int_equal(2 * o->n_in, w->attention.o.n_in);
            for (int row = 0; row < o->n_out; row++)
                assert_same_floats(matrix(o, 0) + (size_t)row * o->n_in,
                                   matrix(&w->attention.o, 0) + (size_t)row * 2 * o->n_in +
                                       (size_t)r * o->n_in,
                                   (size_t)o->n_in);
            const tr_linear *uk = &p->attention.w_uk_t;
            for (int h = 0; h < uk->n_mats; h++)
                assert_same_floats(matrix(uk, h), matrix(&w->attention.w_uk_t, r * uk->n_mats + h),
                                   (size_t)uk->n_out * uk->n_in);
            if (!w->is_moe) continue;
            const tr_linear *gate_up = &p->moe.gate_up;
            assert_int_equal(2 * p->moe.n_local, w->moe.n_local);
            assert_same_floats(matrix(gate_up, 0), matrix(&w->moe.gate_up, r * gate_up->n_mats),
                               (size_t)gate_up->n_mats * gate_up->n_out * gate_up->n_in);
        }
    }
}

static bool is_replicated(const char *name)
{
    static const char *const cut[] = {"q_b_proj",      "kv_b_proj",     "o_proj",
                                      "mlp.experts.",  "mlp.gate_proj", "mlp.up_proj",
                                      "mlp.down_proj", "lm_head"};
    for (size_t i = 0; i < sizeof cut / sizeof *cut; i++)
        if (strstr(name, cut[i])) return false;
    return true;
}

static void two_ranks_hold_and_read_it_all(void **state)
{
    (void)state;
    char path[512];
    tr_config c;
    tr_checkpoint *checkpoint;
    loaded all, half[2];
    open_model(tr_source_path(path, sizeof path, "models/tiny"), &c, &checkpoint);
    load(&all, &c, checkpoint, single, 0);
    for (int r = 0; r < 2; r++)
        load(&half[r], &c, checkpoint, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1}, r);
    assert_halves_make_whole(&all, half);
    /* What is cut is read once by one of the two, what is not by both; nothing else is read. */
    uint64_t both = bytes_of(checkpoint, is_replicated), total = bytes_of(checkpoint, NULL);
    for (int r = 0; r < 2; r++)
        assert_int_equal(half[r].weights->bytes_read, both + (total - both) / 2);
    for (int r = 0; r < 2; r++)
        unload(&half[r]);
    unload(&all);
    tr_checkpoint_close(checkpoint);
}

static void dummy_weights_do_not_depend_on_the_grid(void **state)
{
    (void)state;
    char path[512];
    tr_config c;
    tr_err err = {0};
    loaded all, again, half[2];
    tr_source_path(path, sizeof path, "models/tiny");
    if (tr_config_load(&c, path, NULL, 0, &err) != TR_OK) fail_msg("%s", err.text);
    load(&all, &c, NULL, single, 0);
    load(&again, &c, NULL, single, 0);
    for (int r = 0; r < 2; r++)
        load(&half[r], &c, NULL, (tr_grid_sizes){1, 1, 1, 2, 1, 2, 1}, r);
    assert_halves_make_whole(&all, half);
    assert_int_equal(all.weights->bytes_read, 0);
    const tr_linear *a = &all.weights->layer[1].moe.down, *b = &again.weights->layer[1].moe.down;
    size_t n = (size_t)a->n_mats * a->n_out * a->n_in;
    assert_same_floats(matrix(a, 0), matrix(b, 0), n);
    assert_memory_not_equal(matrix(a, 0), matrix(a, 1), (size_t)a->n_out * a->n_in * sizeof(float));
    /* Activations keep their size: a row of random inputs of size 1 gives outputs of about size 1. */
    double square = 0.0, mean = 0.0;
    for (size_t i = 0; i < n; i++) {
        mean += (double)matrix(a, 0)[i] / (double)n;
        square += (double)matrix(a, 0)[i] * (double)matrix(a, 0)[i] / (double)n;
    }
    double size = sqrt(square * a->n_in);
    if (!(size > 0.5 && size < 2.0)) fail_msg("size %g", size);
    assert_true(fabs(mean) < 0.05 * sqrt(square));
    for (int i = 0; i < c.n_routed_experts; i++)
        assert_true(all.weights->layer[1].moe.gate_bias[i] == 0.0f);
    for (int i = 0; i < c.hidden_size; i++)
        assert_true(fabs(all.weights->norm[i] - 1.0) < 0.1);
    unload(&all);
    unload(&again);
    for (int r = 0; r < 2; r++)
        unload(&half[r]);
}

/* Tensors larger than the host buffer come in chunks of 128 rows; a slice that begins inside a scale block first goes to
 * its end, so that nothing is read twice. */
static void large_tensors_come_in_chunks(void **state)
{
    (void)state;
    char path[512];
    tr_config c;
    tr_checkpoint *checkpoint;
    tr_err err = {0};
    tr_wanted w;
    struct tr_weights_memory memory = {0};
    tr_weights weights = {.memory = &memory};
    tr_linear q_b;
    open_model(tr_source_path(path, sizeof path, "models/tiny"), &c, &checkpoint);
    loaded m = {.checkpoint = checkpoint};
    tr_loader l = {.config = &c,
                   .checkpoint = checkpoint,
                   .device = &m.device,
                   .ops = &fake_ops,
                   .weights = &weights,
                   .chunk_bytes = 1};
    l.read_region = l.pack_region = l.fill_region = -1;
    tr_range rows = {.begin = 100, .n = 400}, columns = {.begin = 100, .n = 99};
    tr_wanted_get(&w, &c, TR_ROLE_Q_B, 1, 0);
    tr_piece piece[] = {{.w = w, .rows = rows, .columns = columns, .o_begin = 3},
                        {.w = w, .rows = {200, 100}, .columns = columns, .i_mat = 1}};
    for (int i = 0; i < 2; i++) { /* the second time by a device that reads by itself */
        l.ops = i ? &filling_ops : &fake_ops;
        assert_int_equal(tr_loader_linear(&l, &q_b, &w, 2, rows.n + 3, columns.n, &err), TR_OK);
        assert_int_equal(tr_loader_pack(&l, &q_b, piece, 2, &err), TR_OK);
        same_matrix(&m, &q_b, 0, 3, w.name, rows, columns, false);
        same_matrix(&m, &q_b, 1, 0, w.name, piece[1].rows, columns, false);
        assert_int_equal(weights.bytes_read, (i + 1) * (500 * 99 + 12 * sizeof(float)));
    }
    l.ops = &fake_ops;
    void *embed, *want;
    tr_dtype dtype;
    const tr_tensor *t;
    tr_wanted_get(&w, &c, TR_ROLE_EMBED, 0, 0);
    assert_int_equal(tr_loader_table(&l, &embed, &dtype, &w, &err), TR_OK);
    want = read_all(checkpoint, w.name, &t);
    assert_memory_equal(embed, want, t->bytes);
    assert_true(l.raw_bytes <= 128 * 256 * sizeof(uint16_t)); /* the chunks were chunks */
    free(want);
    tr_loader_done(&l);
    for (size_t i = 0; i < memory.n; i++)
        fake_release(&m.device, memory.block[i]);
    free(memory.block);
    tr_checkpoint_close(checkpoint);
}

static void failing_allocations_leak_nothing(void **state)
{
    (void)state;
    char path[512];
    tr_config c;
    tr_checkpoint *checkpoint;
    open_model(tr_vector_path(path, sizeof path, "model/realgeom"), &c, &checkpoint);
    tr_slice s = slice_of(&c, single, 0);
    for (int n = 1;; n++) {
        tr_device d = {.fail_at = n};
        tr_weights *w = NULL;
        tr_err err = {0};
        tr_status st = tr_weights_load(&w, &c, &s, checkpoint, TR_LOAD_SAFETENSORS, 0, &d,
                                       &fake_ops, NULL, NULL, &err);
        if (st == TR_OK) {
            assert_true(n > 20);
            tr_weights_free(w, &d, &fake_ops);
            break;
        }
        assert_int_equal(st, TR_E_MEMORY);
        assert_null(w);
        assert_int_equal(d.n_live, 0);
        assert_true(strncmp(err.text, "model.", 6) == 0 || strncmp(err.text, "lm_head.", 8) == 0);
        assert_non_null(strstr(err.text, "fake device"));
    }
    tr_checkpoint_close(checkpoint);
}

/* ---- checkpoints made here ---------------------------------------------------------------------------------------- */

static char dir[128];

/* Scales are F32 and must stay aligned: sizes here are multiples of four. */
static tr_config small_config(void)
{
    return (tr_config){.vocab_size = 12,
                       .hidden_size = 40,
                       .num_hidden_layers = 2,
                       .num_nextn_predict_layers = 1,
                       .first_k_dense_replace = 1,
                       .moe_layer_freq = 1,
                       .intermediate_size = 136,
                       .moe_intermediate_size = 264,
                       .n_routed_experts = 4,
                       .n_shared_experts = 1,
                       .num_experts_per_tok = 2,
                       .n_group = 2,
                       .topk_group = 1,
                       .num_attention_heads = 4,
                       .q_lora_rank = 132,
                       .kv_lora_rank = 36,
                       .qk_nope_head_dim = 20,
                       .qk_rope_head_dim = 4,
                       .v_head_dim = 44,
                       .index_n_heads = 4,
                       .index_head_dim = 8,
                       .index_topk = 4,
                       .fp8 = true};
}

/* Writes m's checkpoint and opens it. */
static tr_checkpoint *make_checkpoint(making *m)
{
    tr_checkpoint *c = NULL;
    tr_err err = {0};
    size_t n;
    assert_true(tr_wanted_each(m->config, make_tensor, m));
    unsigned char *bytes = tr_shard_file_finish(&m->file, &n);
    assert_int_equal(tr_scratch_write(dir, "model.safetensors", bytes, n), 0);
    free(bytes);
    if (tr_checkpoint_open(&c, dir, &err) != TR_OK) fail_msg("%s", err.text);
    return c;
}

static void odd_sizes_and_other_formats_load(void **state)
{
    (void)state;
    static const tr_grid_sizes grids[] = {{1, 1, 1, 1, 1, 1, 1}, {1, 1, 1, 4, 1, 2, 2}};
    for (int k = 0; k < 4; k++) {
        tr_config c = small_config();
        c.fp8 = k < 2;
        making make = {.config = &c, .copies = k % 2 == 0};
        if (k == 1 || k == 2) make.as_f32 = "e"; /* all */
        tr_checkpoint *checkpoint = make_checkpoint(&make);
        for (size_t g = 0; g < sizeof grids / sizeof *grids; g++)
            for (int rank = 0; rank < grids[g].tp; rank++) {
                loaded m;
                load(&m, &c, checkpoint, grids[g], rank);
                assert_int_equal(m.weights->layer[0].attention.q_a.format, c.fp8    ? TR_W_E4M3_B128
                                                                           : k == 2 ? TR_W_F32
                                                                                    : TR_W_BF16);
                m.checkpoint = checkpoint;
                check_all(&m);
                unload(&m);
            }
        tr_checkpoint_close(checkpoint);
    }
}

static tr_status try_load(const tr_config *c, making *make, tr_err *err)
{
    tr_checkpoint *checkpoint = make_checkpoint(make);
    tr_slice s = slice_of(c, single, 0);
    tr_device d = {0};
    tr_weights *w = NULL;
    tr_status st = tr_weights_load(&w, c, &s, checkpoint, TR_LOAD_SAFETENSORS, 0, &d, &fake_ops,
                                   NULL, NULL, err);
    tr_weights_free(w, &d, &fake_ops);
    assert_int_equal(d.n_live, 0);
    tr_checkpoint_close(checkpoint);
    return st;
}

static void assert_names(const tr_err *err, const char *const *names)
{
    for (; *names; names++)
        if (!strstr(err->text, *names)) fail_msg("\"%s\" not in \"%s\"", *names, err->text);
}

static void mismatches_are_all_named(void **state)
{
    (void)state;
    tr_config c = small_config();
    tr_err err = {0};

    /* One thing wrong at a time: every kind of tensor may be the one that is missing. */
    static const char *const needed[] = {"lm_head.weight",
                                         "model.layers.0.mlp.up_proj.weight",
                                         "model.layers.1.self_attn.o_proj.weight_scale_inv",
                                         "model.layers.1.self_attn.indexer.k_norm.bias",
                                         "model.layers.1.mlp.gate.e_score_correction_bias",
                                         "model.layers.1.mlp.experts.3.down_proj.weight",
                                         "model.layers.2.eh_proj.weight"};
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        making make = {.config = &c, .without = needed[i]};
        assert_int_equal(try_load(&c, &make, &err), TR_E_INPUT);
        assert_names(&err, (const char *const[]){needed[i], "missing", NULL});
    }
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++) {
        making make = {.config = &c, .reshaped = needed[i]};
        assert_int_equal(try_load(&c, &make, &err), TR_E_INPUT);
        assert_names(&err,
                     (const char *const[]){needed[i], "shape [1, ", "model.safetensors", NULL});
    }
    /* Several at once. */
    making make = {.config = &c,
                   .without = "lm_head.weight",
                   .reshaped = "model.norm.weight",
                   .as_bf16 = "layers.1.self_attn.q_a_proj"};
    tr_shard_file_add(&make.file, "stranger", "F32", "[1]", NULL, 4);
    tr_shard_file_add(&make.file, "model.layers.3.enorm.weight", "BF16", "[2]", NULL, 4);
    assert_int_equal(try_load(&c, &make, &err), TR_E_INPUT);
    assert_names(&err,
                 (const char *const[]){"lm_head.weight is missing", "model.norm.weight has shape",
                                       "q_a_proj.weight is not stored as F8_E4M3",
                                       "q_a_proj.weight_scale_inv is missing", "stranger",
                                       "model.layers.3.enorm.weight", NULL});
    /* The copies may be there, but as what they are. */
    making copies = {
        .config = &c, .copies = true, .reshaped = "model.layers.2.embed_tokens.weight"};
    assert_int_equal(try_load(&c, &copies, &err), TR_E_INPUT);
    assert_names(&err, (const char *const[]){"model.layers.2.embed_tokens.weight", NULL});
    /* A config that has no MTP layer leaves the checkpoint's out, but no other layer, nor one behind it; a config of another
     * size counts its misses. */
    tr_config other = c;
    other.num_nextn_predict_layers = 0;
    making whole_model = {.config = &c};
    assert_int_equal(try_load(&other, &whole_model, &err), TR_OK);
    making no_mtp = {.config = &c, .without = "model.layers.2.eh_proj.weight"};
    assert_int_equal(try_load(&other, &no_mtp, &err), TR_E_INPUT);
    assert_names(&err,
                 (const char *const[]){"model.layers.2.", "not part of this model", "more)", NULL});
    making behind = {.config = &c};
    tr_shard_file_add(&behind.file, "model.layers.3.enorm.weight", "BF16", "[2]", NULL, 4);
    assert_int_equal(try_load(&other, &behind, &err), TR_E_INPUT);
    assert_names(&err, (const char *const[]){"model.layers.3.enorm.weight is not part", NULL});
    other = c;
    other.num_hidden_layers = 4096;
    other.n_routed_experts = 1 << 14;
    making few = {.config = &c};
    assert_int_equal(try_load(&other, &few, &err), TR_E_INPUT);
    assert_names(&err, (const char *const[]){"more)", NULL});
    /* Experts of one layer in two formats. */
    other = c;
    other.fp8 = false;
    making mixed = {.config = &other, .as_f32 = "experts.2.up_proj"};
    assert_int_equal(try_load(&other, &mixed, &err), TR_E_INPUT);
    assert_names(&err, (const char *const[]){"experts.2.up_proj.weight", "format", NULL});
}

static void numbers_that_are_not_finite_are_refused(void **state)
{
    (void)state;
    static const char *const name[] = {"model.norm.weight",
                                       "model.layers.0.input_layernorm.weight",
                                       "model.layers.1.self_attn.indexer.k_norm.bias",
                                       "model.layers.1.mlp.gate.e_score_correction_bias",
                                       "model.layers.1.mlp.gate.weight",
                                       "model.layers.0.self_attn.indexer.weights_proj.weight",
                                       "model.layers.1.self_attn.kv_b_proj.weight_scale_inv",
                                       "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"};
    const tr_config c = small_config();
    for (size_t i = 0; i < 4 * sizeof name / sizeof *name; i++) {
        making make = {.config = &c, .not_finite = name[i / 4], .nan = i % 2};
        if (i % 4 > 1) make.as_f32 = "e";
        for (int filled = 0; filled < 2; filled++) {
            tr_err err = {0};
            tr_device d = {0};
            tr_weights *w = NULL;
            const tr_ops *ops = filled ? &filling_ops : &fake_ops;
            tr_slice s = slice_of(&c, single, 0);
            make.file = (tr_shard_file){0};
            tr_checkpoint *checkpoint = make_checkpoint(&make);
            assert_int_equal(tr_weights_load(&w, &c, &s, checkpoint, TR_LOAD_SAFETENSORS, 0, &d,
                                             ops, NULL, NULL, &err),
                             TR_E_INPUT);
            assert_null(w);
            assert_names(&err, (const char *const[]){name[i / 4], "model.safetensors",
                                                     "NaN or infinite", NULL});
            tr_checkpoint_close(checkpoint);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whole_models_are_what_is_stored),
        cmocka_unit_test(numbers_that_are_not_finite_are_refused),
        cmocka_unit_test(filled_weights_are_the_same),
        cmocka_unit_test(slices_are_their_part_of_the_whole),
        cmocka_unit_test(two_ranks_hold_and_read_it_all),
        cmocka_unit_test(dummy_weights_do_not_depend_on_the_grid),
        cmocka_unit_test(large_tensors_come_in_chunks),
        cmocka_unit_test(failing_allocations_leak_nothing),
        cmocka_unit_test(odd_sizes_and_other_formats_load),
        cmocka_unit_test(mismatches_are_all_named),
    };
    if (!tr_scratch_make(dir, sizeof dir)) return 77;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tr_scratch_clear(dir, 1);
    return failed;
}
