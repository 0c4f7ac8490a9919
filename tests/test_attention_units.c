/* The attention files against the unit vectors of model/unit.json, and their inner loops of every instruction set
 * against plain C and the scalar formats of number.h. */
#include <config.h>

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>
#include <jansson.h>

#include "kernels/cpu/attention_priv.h"
#include "kernels/cpu/rope_priv.h"
#include "kernels/number.h"
#include "tests/attention_topk.h"
#include "tests/vectors.h"

enum { N_ISAS = 4 };
static const char *const isa_names[N_ISAS] = {"plain", "avx2", "avx512", "amx"};

typedef struct fixture {
    json_t *unit;
    tr_device *device[N_ISAS]; /* NULL: this machine or build lacks it */
    const tr_ops *ops;
} fixture;

static int setup(void **state)
{
    fixture *f = calloc(1, sizeof *f);
    char path[4096];

    if (!f) return -1;
    f->unit = json_load_file(tr_vector_path(path, sizeof path, "model/unit.json"), 0, NULL);
    for (int i = 0; i < N_ISAS; i++) {
        tr_device_options options = {.name = "cpu", .n_threads = 2, .isa = isa_names[i]};
        tr_err err = {0};
        const tr_ops *ops;
        if (tr_device_open(&f->device[i], &ops, &options, &err) == TR_OK) f->ops = ops;
    }
    *state = f;
    return f->unit && f->device[0] ? 0 : -1;
}

static int teardown(void **state)
{
    fixture *f = *state;

    for (int i = 0; i < N_ISAS; i++)
        if (f->device[i]) f->ops->close(f->device[i]);
    json_decref(f->unit);
    free(f);
    return 0;
}

static json_t *must_get(json_t *object, const char *key)
{
    json_t *v = json_object_get(object, key);
    if (!v) fail_msg("unit.json: no %s", key);
    return v;
}

static int get_floats(json_t *array, float *out, int max)
{
    int n = (int)json_array_size(array);
    assert_true(n <= max);
    for (int i = 0; i < n; i++)
        out[i] = (float)json_number_value(json_array_get(array, (size_t)i));
    return n;
}

static int get_hex(json_t *string, uint8_t *out, int max)
{
    const char *s = json_string_value(string);
    int n = (int)strlen(s) / 2;
    assert_true(n <= max);
    for (int i = 0; i < n; i++) {
        char byte[3] = {s[2 * i], s[2 * i + 1], 0};
        out[i] = (uint8_t)strtoul(byte, NULL, 16);
    }
    return n;
}

static void close_to(const char *what, const float *got, const float *want, int n, float tolerance)
{
    for (int i = 0; i < n; i++)
        if (!(fabsf(got[i] - want[i]) <= tolerance * (1.0f + fabsf(want[i]))))
            fail_msg("%s[%d]: %.9g, expected %.9g", what, i, (double)got[i], (double)want[i]);
}

static void rope(void **state)
{
    fixture *f = *state;
    json_t *cases = must_get(f->unit, "rope"), *c;
    float inv_freq[64], table[128], x[128], y[128], want[128];
    size_t i;
    /* The cases were made with the first of the YaRN tables, which has their width. */
    int half = get_floats(must_get(json_array_get(must_get(f->unit, "yarn"), 0), "inv_freq"),
                          inv_freq, 64);

    assert_true(json_array_size(cases) > 0);
    json_array_foreach(cases, i, c)
    {
        float position = (float)json_number_value(must_get(c, "pos"));
        int n = get_floats(must_get(c, "x"), x, 128);
        assert_int_equal(n, 2 * half);
        for (int j = 0; j < half; j++) {
            float angle = position * inv_freq[j];
            table[2 * j] = (float)cos((double)angle);
            table[2 * j + 1] = (float)sin((double)angle);
        }
        memcpy(y, x, sizeof y);
        tr_rope_interleaved(y, table, n);
        get_floats(must_get(c, "interleaved"), want, 128);
        close_to("interleaved", y, want, n, 1e-6f);
        memcpy(y, x, sizeof y);
        tr_rope_half_split(y, table, n);
        get_floats(must_get(c, "half_split"), want, 128);
        close_to("half_split", y, want, n, 1e-6f);
    }
}

static void hadamard(void **state)
{
    fixture *f = *state;
    json_t *c = must_get(f->unit, "hadamard128");
    float x[128], back[128], want[128];
    int n = get_floats(must_get(c, "x"), x, 128);

    assert_int_equal(get_floats(must_get(c, "y"), want, 128), n);
    memcpy(back, x, sizeof back);
    tr_hadamard(x, n);
    close_to("hadamard", x, want, n, 1e-6f);
    tr_hadamard(x, n); /* its own inverse */
    close_to("hadamard twice", x, back, n, 1e-6f);
    float one = 3.0f;
    tr_hadamard(&one, 1);
    assert_true(one == 3.0f);
}

/* One row at cache row `write`, position 0 of a rope table that turns nothing. */
typedef struct one_row {
    tr_rows rows;
    int32_t n, slot, position, page;
    int64_t write;
    uint8_t dense;
} one_row;

static void one_row_init(one_row *r, int64_t write)
{
    memset(r, 0, sizeof *r);
    r->n = 1;
    r->write = write;
    r->rows = (tr_rows){.n_max = 1,
                        .n = &r->n,
                        .slot = &r->slot,
                        .position = &r->position,
                        .write = &r->write,
                        .dense = &r->dense,
                        .page_table = &r->page,
                        .max_pages = 1};
}

/* kv_write normalises: with an input of ones, eps 0 and the latents as weights it stores the latents themselves. */
static void kv656(void **state)
{
    fixture *f = *state;
    json_t *c = must_get(f->unit, "kv656");
    enum { D = 512, ROPE = 64, ROW = 5 };
    float weight[D], kv_a[D + ROPE], table[ROPE];
    uint8_t want[656];
    _Alignas(64) uint8_t cache[TR_PAGE_TOKENS * 656];
    one_row r;

    assert_int_equal(get_floats(must_get(c, "latent"), weight, D), D);
    assert_int_equal(get_floats(must_get(c, "k_rope"), kv_a + D, ROPE), ROPE);
    assert_int_equal(get_hex(must_get(c, "hex"), want, 656), 656);
    assert_int_equal(tr_kv_row_bytes(TR_E4M3, D, ROPE), 656);
    for (int i = 0; i < D; i++)
        kv_a[i] = 1.0f;
    for (int i = 0; i < ROPE; i++)
        table[i] = i % 2 ? 0.0f : 1.0f;
    one_row_init(&r, ROW);
    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!f->device[isa]) continue;
        struct tr_kv_write_args a = {
            .rows = &r.rows,
            .kv_a = kv_a,
            .ld_kv_a = D + ROPE,
            .norm = weight,
            .rope = table,
            .kv = {.latent = cache, .dtype = TR_E4M3, .n_pages = 1, .d_latent = D, .d_rope = ROPE}};
        memset(cache, 0xa5, sizeof cache);
        assert_int_equal(f->ops->kv_write(f->device[isa], TR_LANE_MAIN, &a), TR_OK);
        assert_memory_equal(cache + ROW * 656, want, 656);
        for (size_t i = 0; i < sizeof cache; i++) /* and nothing else */
            if (i / 656 != ROW) assert_int_equal(cache[i], 0xa5);
    }
}

static void index_page(void **state)
{
    fixture *f = *state;
    json_t *c = must_get(f->unit, "index_page"), *slots = must_get(c, "slots"), *slot;
    enum { D = 128 };
    _Alignas(64) uint8_t page[3 * 8448];
    uint8_t want[D];
    float x[D];
    size_t i;

    assert_int_equal(tr_index_page_bytes(TR_E4M3, D), json_integer_value(must_get(c, "bytes")));
    assert_true(json_array_size(slots) > 0);
    for (int isa = 0; isa < N_ISAS; isa++) {
        tr_kv_layer kv = {.index = page, .dtype = TR_E4M3, .n_pages = 3, .d_index = D};
        if (!f->device[isa]) continue;
        json_array_foreach(slots, i, slot)
        {
            int j = (int)json_integer_value(slot);
            tr_index_slot at = tr_index_at(&kv, 2 * TR_PAGE_TOKENS + j);
            assert_ptr_equal(at.code, page + 2 * 8448 + D * j);
            assert_ptr_equal(at.scale, page + 2 * 8448 + 8192 + 4 * j);
            assert_int_equal(get_floats(json_array_get(must_get(c, "keys"), i), x, D), D);
            *at.scale = tr_quantise(tr_attention_of(f->device[isa]), at.code, x, D);
            get_hex(json_array_get(must_get(c, "key_hex"), i), want, D);
            assert_memory_equal(at.code, want, D);
            get_hex(json_array_get(must_get(c, "scale_hex"), i), want, D);
            assert_memory_equal(at.scale, want, 4);
        }
    }
}

/* The whole path of an index key: LayerNorm with the input constant leaves the bias, then Hadamard and e4m3. */
static void index_key_path(void **state)
{
    fixture *f = *state;
    enum { D = 128 };
    _Alignas(64) uint8_t page[8448];
    float in[D], weight[D], bias[D], table[64], want[D];
    one_row r;

    for (int i = 0; i < D; i++) {
        in[i] = 2.0f;
        weight[i] = 5.0f;
        bias[i] = tr_round_bf16(uniform());
        want[i] = bias[i];
    }
    for (int i = 0; i < 64; i++)
        table[i] = i % 2 ? 0.0f : 1.0f;
    tr_hadamard(want, D);
    one_row_init(&r, 63);
    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!f->device[isa]) continue;
        struct tr_kv_write_args a = {
            .rows = &r.rows,
            .index_k = in,
            .ld_index_k = D,
            .k_norm = weight,
            .k_bias = bias,
            .rope = table,
            .kv = {.index = page, .dtype = TR_BF16, .n_pages = 1, .d_rope = 64, .d_index = D}};
        assert_int_equal(f->ops->kv_write(f->device[isa], TR_LANE_MAIN, &a), TR_OK);
        float scale, amax = 0;
        memcpy(&scale, page + 8192 + 4 * 63, 4);
        for (int i = 0; i < D; i++) {
            float rounded = tr_round_bf16(want[i]);
            amax = fmaxf(amax, fabsf(rounded));
            assert_int_equal(page[63 * D + i], tr_f32_to_e4m3(rounded / scale));
        }
        assert_true(scale == tr_ue8m0_scale(amax));
    }
}

static void topk_vectors(void **state)
{
    fixture *f = *state;
    json_t *cases = must_get(f->unit, "topk"), *c;
    size_t i;

    assert_true(json_array_size(cases) > 0);
    json_array_foreach(cases, i, c)
    {
        float score[256];
        int32_t position[256], cache_row[256], n_selected;
        int k = (int)json_integer_value(must_get(c, "k"));
        int n = get_floats(must_get(c, "logits"), score, 256);
        json_t *want = must_get(c, "sorted_positions");
        int32_t pages[4] = {3, 0, 2, 1};
        one_row r;
        one_row_init(&r, 0);
        r.position = n - 1;
        r.rows.page_table = pages;
        r.rows.max_pages = 4;
        struct tr_topk_args a = {.rows = &r.rows,
                                 .score = score,
                                 .ld = 256,
                                 .k = k,
                                 .n_row = 1,
                                 .position = position,
                                 .cache_row = cache_row,
                                 .n_selected = &n_selected};
        assert_true(k <= 256);
        assert_int_equal(f->ops->topk(f->device[0], TR_LANE_MAIN, &a), TR_OK);
        assert_int_equal(n_selected, json_array_size(want));
        for (int j = 0; j < n_selected; j++) {
            int p = (int)json_integer_value(json_array_get(want, (size_t)j));
            assert_int_equal(position[j], p);
            assert_int_equal(cache_row[j], pages[p / 64] * 64 + p % 64);
        }
        for (int j = n_selected; j < k; j++)
            assert_true(position[j] == -1 && cache_row[j] == -1);
    }
}

static void quant_rows(void **state)
{
    fixture *f = *state;
    json_t *cases = must_get(f->unit, "quant_row"), *c, *codes;
    size_t i;

    assert_true(json_array_size(cases) > 0);
    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!f->device[isa]) continue;
        json_array_foreach(cases, i, c)
        {
            float x[128];
            uint8_t got[128];
            int n = get_floats(must_get(c, "x"), x, 128);
            float scale = tr_quantise(tr_attention_of(f->device[isa]), got, x, n);
            assert_true(scale == (float)json_number_value(must_get(c, "ue8m0_scale")));
            codes = must_get(c, "ue8m0_codes");
            for (int j = 0; j < n; j++)
                assert_int_equal(got[j], json_integer_value(json_array_get(codes, (size_t)j)));
        }
    }
}

/* Every 2^12th float, both neighbours of every rounding boundary, and the specials. */
static void e4m3_codes(void **state)
{
    fixture *f = *state;

    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!f->device[isa]) continue;
        const struct tr_attention_kernels *k = tr_attention_of(f->device[isa]);
        for (uint64_t u = 0; u < UINT64_C(1) << 32; u += 1 << 16) {
            float x[45];
            uint8_t got[46];
            for (int j = 0; j < 45; j++) /* around the sixteenth: ties of normals and subnormals */
                x[j] =
                    tr_bits_f32((uint32_t)u + (uint32_t)(j % 3) - 1u + ((uint32_t)(j / 3) << 12));
            got[45] = 0x5a;
            k->to_e4m3(got, x, 1.0f, 45);
            for (int j = 0; j < 45; j++)
                if (got[j] != tr_f32_to_e4m3(x[j]))
                    fail_msg("%s: e4m3 of %a (%08x): %02x, expected %02x", isa_names[isa],
                             (double)x[j], tr_f32_bits(x[j]), got[j], tr_f32_to_e4m3(x[j]));
            assert_int_equal(got[45], 0x5a);
            float half[46];
            memcpy(half, x, sizeof x);
            half[45] = 1.0f / 3.0f;
            k->round_bf16(half, 45);
            for (int j = 0; j < 45; j++)
                if (tr_f32_bits(half[j]) != tr_f32_bits(tr_round_bf16(x[j])))
                    fail_msg("%s: bf16 of %08x: %08x, expected %08x", isa_names[isa],
                             tr_f32_bits(x[j]), tr_f32_bits(half[j]),
                             tr_f32_bits(tr_round_bf16(x[j])));
            assert_true(half[45] == 1.0f / 3.0f);
        }
    }
}

/* All 256 codes back to fp32, at every alignment of the vectors' ends. */
static void e4m3_values(void **state)
{
    fixture *f = *state;

    for (int isa = 0; isa < N_ISAS; isa++)
        for (int n = 1; n <= 256 && f->device[isa]; n++) {
            uint8_t code[256];
            float got[257];
            for (int i = 0; i < n; i++)
                code[i] = (uint8_t)(n % 3 ? 255 - i : i);
            got[n] = 7.0f;
            tr_attention_of(f->device[isa])->expand_e4m3(got, code, 0.25f, n);
            for (int i = 0; i < n; i++) {
                float want = tr_e4m3_to_f32(code[i]) * 0.25f;
                if (isnan(want) ? !isnan(got[i]) : tr_f32_bits(got[i]) != tr_f32_bits(want))
                    fail_msg("%s: code %02x, number %d of %d: %a, expected %a", isa_names[isa],
                             code[i], i, n, (double)got[i], (double)want);
            }
            assert_true(got[n] == 7.0f);
        }
}

/* dots and accumulate at every small shape: right, silent past their ends, and an element's bits do not depend on
 * the rows, keys and columns beside it. */
static void tile_loops(const struct tr_attention_kernels *k, const char *isa)
{
    enum { LD = 83, ROWS = 7 };
    static const int widths[] = {1, 3, 8, 15, 16, 17, 31, 40, 64, 65, 80, 83};
    static const int key_counts[] = {1, 2, 5, 16, 33, 63, 64};
    float *q = malloc(ROWS * LD * sizeof *q), *v = malloc(TR_KEY_BLOCK * LD * sizeof *v);
    float *y = malloc(ROWS * LD * sizeof *y), *z = malloc(ROWS * LD * sizeof *z);
    float all[ROWS * TR_KEY_BLOCK], few[ROWS * TR_KEY_BLOCK], keep[ROWS];
    int n_keys[ROWS];

    assert_true(q && v && y && z);
    for (int i = 0; i < TR_KEY_BLOCK * LD; i++)
        v[i] = uniform();
    for (int i = 0; i < ROWS * LD; i++)
        q[i] = uniform();
    for (size_t iw = 0; iw < sizeof widths / sizeof *widths; iw++)
        for (size_t ik = 0; ik < sizeof key_counts / sizeof *key_counts; ik++) {
            int d = widths[iw], n = key_counts[ik];
            k->dots(all, (tr_tile){q, LD, ROWS}, (tr_tile){v, LD, n}, d);
            for (int r = 0; r < ROWS; r++)
                for (int s = 0; s < n; s++) {
                    double want = 0;
                    for (int i = 0; i < d; i++)
                        want += (double)q[r * LD + i] * (double)v[s * LD + i];
                    float got = all[r * TR_KEY_BLOCK + s];
                    if (!(fabs((double)got - want) <= 1e-6 * d))
                        fail_msg("%s: dots %d,%d of %d: %g, expected %g", isa, r, s, d, (double)got,
                                 want);
                    k->dots(few, (tr_tile){q + r * LD, LD, 1 + (s + r) % (ROWS - r) % 4},
                            (tr_tile){v + s * LD, LD, 1}, d);
                    assert_memory_equal(few, &got, sizeof got);
                    s += n > 16 ? 6 : 0;
                }
            for (int r = 0; r < ROWS; r++) {
                keep[r] = r % 3 ? uniform() : 0.0f;
                n_keys[r] = n > r ? n - r : 1;
                for (int i = 0; i < LD; i++) /* NaN where it must not be read */
                    y[r * LD + i] = z[r * LD + i] = r % 3 && i < d ? uniform() : NAN;
            }
            k->accumulate(z, LD, all, keep, n_keys, ROWS, v, LD, d);
            for (int r = 0; r < ROWS; r++)
                for (int i = 0; i < LD; i++) {
                    double want = r % 3 ? (double)y[r * LD + i] * (double)keep[r] : 0.0;
                    for (int s = 0; i < d && s < n_keys[r]; s++)
                        want += (double)all[r * TR_KEY_BLOCK + s] * (double)v[s * LD + i];
                    float got = z[r * LD + i];
                    if (i < d ? !(fabs((double)got - want) <= 1e-5 * n) : !isnan(got))
                        fail_msg("%s: accumulate %d,%d of %d keys: %g, expected %g", isa, r, i, n,
                                 (double)got, want);
                }
            for (int r = 0; r < ROWS; r++) /* alone, in place */
                k->accumulate(y + r * LD, LD, all + r * TR_KEY_BLOCK, keep + r, n_keys + r, 1, v,
                              LD, d);
            for (int i = 0; i < ROWS * LD; i++)
                assert_true(y[i] == z[i] || (isnan(y[i]) && isnan(z[i])));
        }
    free(q);
    free(v);
    free(y);
    free(z);
}

static void loops(void **state)
{
    fixture *f = *state;

    for (int isa = 0; isa < N_ISAS; isa++)
        if (f->device[isa]) tile_loops(tr_attention_of(f->device[isa]), isa_names[isa]);
}

/* The loops over the keys of a block, at every length; scores with NaN, infinities and negative zeros. */
static void key_loops(void **state)
{
    fixture *f = *state;

    for (int isa = 0; isa < N_ISAS; isa++) {
        if (!f->device[isa]) continue;
        const struct tr_attention_kernels *k = tr_attention_of(f->device[isa]);
        for (int n = 1; n <= TR_KEY_BLOCK; n++) {
            float x[TR_KEY_BLOCK + 1], y[TR_KEY_BLOCK + 1], scale[TR_KEY_BLOCK];
            float max = -INFINITY, amax = 0;
            double sum = 0;
            for (int i = 0; i <= TR_KEY_BLOCK; i++) {
                x[i] = i < n ? uniform() - 2.0f : 7.0f;
                if (i < TR_KEY_BLOCK) scale[i] = 0.5f;
                if (i < n) sum += (double)x[i];
                if (i < n) max = fmaxf(max, x[i] * 0.25f);
                if (i < n) amax = fmaxf(amax, fabsf(x[i]));
            }
            assert_true(fabs((double)k->sum(x, n) - sum) <= 1e-6 * n); /* of |x| < 3 */
            assert_true(k->max_abs(x, n) == amax);
            assert_true(k->scale_max(x, 0.25f, n) == max);
            assert_true(n == TR_KEY_BLOCK || x[n] == 7.0f);

            x[0] = -0.0f;
            if (n > 1) x[1] = NAN;
            if (n > 2) x[2] = INFINITY;
            y[n] = 7.0f;
            k->index_score(y, x, n % 2 ? scale : NULL, n);
            assert_true(y[0] == 0.0f && !signbit(y[0]));
            for (int i = 1; i < n; i++)
                assert_true(y[i] == (isnan(x[i]) ? -INFINITY : n % 2 ? x[i] * 0.5f : x[i]));
            assert_true(y[n] == 7.0f);
        }
    }
}

/* All lengths of a Hadamard transform have the bits of the plain one. */
static void hadamards(void **state)
{
    fixture *f = *state;

    for (int isa = 0; isa < N_ISAS; isa++)
        for (int d = 1; d <= TR_D_INDEX_MAX && f->device[isa]; d *= 2) {
            float x[TR_D_INDEX_MAX + 1], want[TR_D_INDEX_MAX + 1];
            for (int i = 0; i <= TR_D_INDEX_MAX; i++)
                x[i] = want[i] = uniform();
            tr_hadamard(want, d);
            tr_attention_of(f->device[isa])->hadamard(x, d);
            assert_memory_equal(x, want, sizeof x);
        }
}

/* Latent records of every width, with and without NaN among their codes. */
static void latents(void **state)
{
    static const int widths[] = {4, 64, 128, 132, 256, 260, 512, 640};
    fixture *f = *state;
    _Alignas(64) uint8_t record[2048];
    float got[TR_D_KEY_MAX];

    for (size_t iw = 0; iw < 2 * sizeof widths / sizeof *widths; iw++) {
        int n = widths[iw / 2], n_rope = (int)iw % 2 ? 64 : 6 * ((int)iw % 5);
        float *scale = (float *)(void *)(record + n);
        uint16_t *rope = (uint16_t *)(void *)(scale + (n + 127) / 128);
        for (int i = 0; i < n; i++)
            record[i] = (uint8_t)(i % 127 + (i % 3 ? 128 : 0)); /* the largest is 0x7e */
        if (iw % 4 == 3) record[n > 0 ? n - 1 : 0] = 0xff;
        for (int i = 0; i < (n + 127) / 128; i++)
            scale[i] = ldexpf(1.0f, i - 20);
        for (int i = 0; i < n_rope; i++)
            rope[i] = tr_f32_to_bf16(uniform());
        for (int isa = 0; isa < N_ISAS; isa++) {
            if (!f->device[isa]) continue;
            got[n + n_rope] = 7.0f;
            tr_attention_of(f->device[isa])->expand_latent(got, record, n, n_rope);
            for (int i = 0; i < n + n_rope; i++) {
                float want = i < n ? tr_e4m3_to_f32(record[i]) * scale[i / 128]
                                   : tr_bf16_to_f32(rope[i - n]);
                if (isnan(want) ? !isnan(got[i]) : tr_f32_bits(got[i]) != tr_f32_bits(want))
                    fail_msg("%s: number %d of %d + %d: %a, expected %a", isa_names[isa], i, n,
                             n_rope, (double)got[i], (double)want);
            }
            assert_true(got[n + n_rope] == 7.0f);
        }
    }
}

enum { TILE_HEADS = 7 };

typedef struct tile_case { /* a page of keys, and queries with their weights */
    uint8_t code[TR_KEY_BLOCK * TR_D_INDEX_MAX];
    float tile[TR_INDEX_TILE], q[TILE_HEADS * TR_D_INDEX_MAX], w[TILE_HEADS];
    int d, d_tile, n;
} tile_case;

static void check_tile(const struct tr_attention_kernels *k, const tile_case *c, const char *isa)
{
    for (int s = 0; s < c->n; s++)
        for (int i = 0; i < c->d_tile; i++) {
            float got = c->tile[tr_index_tile_at(k->tile_lanes, c->d_tile, s, i)];
            float want = i < c->d ? tr_e4m3_to_f32(c->code[s * c->d + i]) * tr_tile_unit : 0.0f;
            if (isnan(want) ? !isnan(got) : tr_f32_bits(got) != tr_f32_bits(want))
                fail_msg("%s: tile of %d x %d: number %d of key %d: %a, expected %a", isa, c->n,
                         c->d, i, s, (double)got, (double)want);
        }
}

/* Right, and the same bits for fewer keys and head by head. */
static void check_index_add(const struct tr_attention_kernels *k, const tile_case *c,
                            const char *isa)
{
    float all[TR_KEY_BLOCK], few[TR_KEY_BLOCK];

    for (int s = 0; s < TR_KEY_BLOCK; s++)
        all[s] = few[s] = 0.25f;
    k->index_add(all, c->q, c->w, TILE_HEADS, c->tile, c->d_tile, 0, c->n);
    for (int s = 0; s < c->n; s++) {
        double want = 0.25, size = 0.25;
        for (int h = 0; h < TILE_HEADS; h++) {
            double dot = 0;
            for (int i = 0; i < c->d; i++) {
                double x = (double)c->q[h * c->d_tile + i] *
                           (double)(tr_e4m3_to_f32(c->code[s * c->d + i]) * tr_tile_unit);
                dot += x;
                size += fabs(x * (double)c->w[h]);
            }
            want += (double)c->w[h] * (isnan(dot) ? dot : fmax(0.0, dot));
        }
        if (isnan(want) ? !isnan(all[s]) : !(fabs((double)all[s] - want) <= 1e-6 * size))
            fail_msg("%s: key %d of %d x %d: %g, expected %g", isa, s, c->n, c->d, (double)all[s],
                     want);
    }
    for (int h = 0; h < TILE_HEADS; h++)
        k->index_add(few, c->q + h * c->d_tile, c->w + h, 1, c->tile, c->d_tile, c->n / 2, c->n);
    assert_memory_equal(few + c->n / 2, all + c->n / 2, (size_t)(c->n - c->n / 2) * sizeof *few);
}

static void index_tiles(void **state)
{
    static const int key_counts[] = {1, 5, 16, 17, 63, 64};
    fixture *f = *state;
    tile_case *c = malloc(sizeof *c);

    assert_non_null(c);
    for (int d = 1; d <= TR_D_INDEX_MAX; d *= 2)
        for (size_t in = 0; in < sizeof key_counts / sizeof *key_counts; in++) {
            c->d = d;
            c->d_tile = (d + 3) / 4 * 4;
            c->n = key_counts[in];
            for (int i = 0; i < TR_KEY_BLOCK * d; i++) /* NaN in what is not asked for */
                c->code[i] = i < c->n * d ? tr_f32_to_e4m3(8.0f * uniform()) : 0xff;
            if (in % 2) c->code[0] = 0x7f; /* and in the first key */
            for (int h = 0; h < TILE_HEADS; h++) {
                c->w[h] = uniform();
                for (int i = 0; i < c->d_tile; i++)
                    c->q[h * c->d_tile + i] = i < d ? 256.0f * uniform() : 0.0f;
            }
            for (int isa = 0; isa < N_ISAS; isa++) {
                if (!f->device[isa]) continue;
                const struct tr_attention_kernels *k = tr_attention_of(f->device[isa]);
                memset(c->tile, 0xff, sizeof c->tile);
                k->index_tile(c->tile, c->code, d, c->n);
                check_tile(k, c, isa_names[isa]);
                check_index_add(k, c, isa_names[isa]);
            }
        }
    free(c);
}

enum { LONG = 20000, N_KINDS = 8 };

static float hostile_score(int kind, int s)
{
    switch (kind) {
    case 0:
        return uniform();
    case 1:
        return 0.0f;
    case 2:
        return s % 2 ? -0.0f : 0.0f;
    case 3:
        return s % 997 ? 0.0f : uniform(); /* mostly closed ReLUs */
    case 4:
        return s % 3 ? NAN : -INFINITY;
    case 5:
        return s % 5 == 0 ? NAN : s % 11 == 0 ? INFINITY : -128.0f - uniform();
    case 6:
        return 1.0f + (float)(s % 4) * 0x1p-23f; /* neighbours in the last bit */
    default:
        return (float)s * 0x1p-149f * (s % 2 ? -1.0f : 1.0f); /* denormals */
    }
}

static void topk_hostile(void **state)
{
    static const int ks[] = {1, 2, 63, 2048, LONG - 1, LONG, LONG + 5};
    static const int lengths[] = {1, 2, 64, 2049, LONG};
    fixture *f = *state;
    enum { N = 5 };
    int32_t slot[N] = {0}, position[N], n = N, n_selected[N], *pages = get((LONG / 64 + 1) * 4);
    int64_t write[N] = {0};
    uint8_t dense[N] = {0};
    float *score = get((size_t)N * LONG * 4);
    tr_rows rows = {.n_max = N,
                    .n = &n,
                    .slot = slot,
                    .position = position,
                    .write = write,
                    .dense = dense,
                    .page_table = pages,
                    .max_pages = LONG / 64 + 1};

    for (int i = 0; i <= LONG / 64; i++)
        pages[i] = LONG / 64 - i;
    for (int i = 0; i < N; i++)
        position[i] = lengths[i] - 1;
    for (int kind = 0; kind < N_KINDS; kind++)
        for (size_t ik = 0; ik < sizeof ks / sizeof *ks; ik++) {
            int k = ks[ik];
            int32_t *got = get((size_t)(N * k) * 4), *cache_row = get((size_t)(N * k) * 4),
                    *want = get((size_t)LONG * 4);
            for (int i = 0; i < N; i++)
                for (int s = 0; s < lengths[i]; s++)
                    score[i * LONG + s] = hostile_score(kind, s);
            for (int isa = 0; isa < N_ISAS && f->device[isa]; isa++) {
                /* two windows of rows, each with its own score rows */
                for (int i_row = 0; i_row < N; i_row += 3) {
                    struct tr_topk_args a = {.rows = &rows,
                                             .score = score + i_row * LONG,
                                             .ld = LONG,
                                             .k = k,
                                             .i_row = i_row,
                                             .n_row = 3,
                                             .position = got,
                                             .cache_row = cache_row,
                                             .n_selected = n_selected};
                    assert_int_equal(f->ops->topk(f->device[isa], TR_LANE_MAIN, &a), TR_OK);
                }
                for (int i = 0; i < N; i++) {
                    int n_want = topk_ref(score + i * LONG, lengths[i], k, want);
                    assert_int_equal(n_selected[i], n_want);
                    assert_memory_equal(got + i * k, want, (size_t)n_want * 4);
                    for (int j = 0; j < k; j++) {
                        int32_t p = got[i * k + j];
                        assert_int_equal(cache_row[i * k + j],
                                         j < n_want ? pages[p / 64] * 64 + p % 64 : -1);
                        assert_true(j < n_want || p == -1);
                    }
                }
            }
            free(got);
            free(cache_row);
            free(want);
        }
    free(pages);
    free(score);
}

static void refusals(void **state)
{
    fixture *f = *state;
    const tr_ops *ops = f->ops;
    tr_device *d = f->device[0];
    int32_t none = 0;
    tr_rows rows = {.n = &none};
    tr_kv_layer good = {.latent = &none,
                        .index = &none,
                        .dtype = TR_E4M3,
                        .n_pages = 1,
                        .d_latent = 64,
                        .d_rope = 16,
                        .d_index = 32};
    tr_kv_layer bad[] = {good, good, good, good, good};
    struct tr_kv_write_args write = {.rows = &rows, .kv = good};

    assert_int_equal(ops->kv_write(d, TR_LANE_MAIN, &write), TR_OK); /* no rows at all */
    bad[0].dtype = TR_I32;
    bad[1].d_latent = 62;
    bad[2].d_index = 48;
    bad[3].d_latent = TR_CPU_D_KEY_MAX - 16 + TR_LATENT_STEP;
    bad[4].d_rope = 7;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write.kv = bad[i];
        assert_int_equal(ops->kv_write(d, TR_LANE_MAIN, &write), TR_E_USAGE);
        assert_non_null(strstr(ops->error(d), "kv_write: "));
    }
    write.kv = good;
    write.kv.d_latent = TR_CPU_D_KEY_MAX - 16;
    write.kv.d_index = TR_CPU_D_INDEX_MAX;
    assert_int_equal(ops->kv_write(d, TR_LANE_MAIN, &write), TR_OK);
    write.kv.d_index *= 2;
    assert_int_equal(ops->kv_write(d, TR_LANE_MAIN, &write), TR_E_USAGE);
    write.kv = good;
    write.push.n_peers = 1;
    assert_int_equal(ops->kv_write(d, TR_LANE_MAIN, &write), TR_E_USAGE);
    struct tr_topk_args topk = {.rows = &rows};
    assert_int_equal(ops->topk(d, TR_LANE_MAIN, &topk), TR_E_USAGE);
    struct tr_sparse_mla_args sparse = {.rows = &rows, .kv = good, .latents = {.n = 1}};
    assert_int_equal(ops->sparse_mla(d, TR_LANE_MAIN, &sparse), TR_E_USAGE);
    struct tr_index_logits_args logits = {.rows = &rows, .kv = good, .keys = {.n = 1}};
    assert_int_equal(ops->index_logits(d, TR_LANE_MAIN, &logits), TR_E_USAGE);
    struct tr_dense_mha_args dense = {
        .rows = &rows, .kv = good, .d_rope = 16, .d_nope = TR_CPU_D_HEAD_MAX - 16 + 1, .d_v = 32};
    assert_int_equal(ops->dense_mha(d, TR_LANE_MAIN, &dense), TR_E_USAGE);
    dense.d_nope = 32, dense.d_v = TR_CPU_D_HEAD_MAX + 1;
    assert_int_equal(ops->dense_mha(d, TR_LANE_MAIN, &dense), TR_E_USAGE);
    struct tr_index_query_args query = {
        .rows = &rows, .d_index = 24, .cache_dtype = TR_E4M3, .out = &none};
    assert_int_equal(ops->index_query(d, TR_LANE_MAIN, &query), TR_E_USAGE);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(rope),           cmocka_unit_test(hadamard),
        cmocka_unit_test(kv656),          cmocka_unit_test(index_page),
        cmocka_unit_test(index_key_path), cmocka_unit_test(quant_rows),
        cmocka_unit_test(topk_vectors),   cmocka_unit_test(e4m3_codes),
        cmocka_unit_test(e4m3_values),    cmocka_unit_test(loops),
        cmocka_unit_test(key_loops),      cmocka_unit_test(hadamards),
        cmocka_unit_test(latents),        cmocka_unit_test(index_tiles),
        cmocka_unit_test(topk_hostile),   cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
