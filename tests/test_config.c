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

#include "kernels/number.h"
#include "model/config.h"
#include "tests/scratch.h"
#include "tests/vectors.h"

static const char *const sizes[] = {
    "vocab_size",       "hidden_size",           "num_hidden_layers",   "num_nextn_predict_layers",
    "n_routed_experts", "moe_intermediate_size", "num_attention_heads", "qk_nope_head_dim",
    "index_topk",       "eos_token_id",
};

static int size_of(const tr_config *c, size_t i)
{
    const int v[] = {c->vocab_size,          c->hidden_size,
                     c->num_hidden_layers,   c->num_nextn_predict_layers,
                     c->n_routed_experts,    c->moe_intermediate_size,
                     c->num_attention_heads, c->qk_nope_head_dim,
                     c->index_topk,          c->eos_token_id};
    return v[i];
}

static char scratch[128];

static json_t *load_json(const char *path)
{
    json_error_t e;
    json_t *j = json_load_file(path, 0, &e);
    assert_non_null(j);
    return j;
}

static json_t *unit(void)
{
    char path[512];
    return load_json(tr_vector_path(path, sizeof path, "model/unit.json"));
}

/* The folder of the config all refusals start from. */
static const char *base_dir(char *path, size_t n)
{
    return tr_vector_path(path, n, "model/tiny");
}

static json_t *base_json(void)
{
    char dir[400], path[512];
    snprintf(path, sizeof path, "%s/config.json", base_dir(dir, sizeof dir));
    return load_json(path);
}

/* The base with `patch` (an object; nested objects are merged) put over it, loaded from the scratch folder. */
static tr_status load_patched(tr_config *c, const char *patch, tr_err *err)
{
    json_error_t e;
    json_t *base = base_json(), *p = json_loads(patch, 0, &e);
    assert_non_null(p);
    assert_int_equal(json_object_update_recursive(base, p), 0);
    char *text = json_dumps(base, 0);
    assert_non_null(text);
    assert_int_equal(tr_scratch_write(scratch, "config.json", text, strlen(text)), 0);
    free(text);
    json_decref(p);
    json_decref(base);
    return tr_config_load(c, scratch, NULL, 0, err);
}

static void published_files_load(void **state)
{
    (void)state;
    char dir[3][400], path[1280];
    tr_vector_path(dir[0], sizeof dir[0], "model/tiny");
    tr_vector_path(dir[1], sizeof dir[1], "model/realgeom");
    tr_source_path(dir[2], sizeof dir[2], "models/tiny");
    for (int i = 0; i < 3; i++) {
        tr_config c;
        tr_err err = {0};
        if (tr_config_load(&c, dir[i], NULL, 0, &err) != TR_OK) fail_msg("%s", err.text);
        snprintf(path, sizeof path, "%s/config.json", dir[i]);
        json_t *j = load_json(path);
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++)
            assert_int_equal(size_of(&c, k), json_integer_value(json_object_get(j, sizes[k])));
        const json_t *rope = json_object_get(j, "rope_scaling");
        assert_true(c.yarn.present && c.fp8 && c.norm_topk_prob);
        assert_true(c.yarn.factor == json_number_value(json_object_get(rope, "factor")));
        assert_true(c.rope_theta == json_number_value(json_object_get(j, "rope_theta")));
        const json_t *q = json_object_get(j, "quantization_config");
        assert_int_equal(c.scale_ue8m0, json_object_get(q, "scale_fmt") != NULL);
        json_decref(j);
    }
}

static void defaults_fill_what_may_be_absent(void **state)
{
    (void)state;
    tr_config c;
    tr_err err = {0};
    tr_status st = load_patched(
        &c,
        "{\"moe_layer_freq\": null, \"n_shared_experts\": null, \"norm_topk_prob\": null,"
        " \"num_nextn_predict_layers\": null, \"rope_scaling\": null, \"quantization_config\": "
        "null,"
        " \"hidden_act\": null, \"scoring_func\": null, \"something_new\": {\"a\": [1]}}",
        &err);
    if (st != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(c.moe_layer_freq, 1);
    assert_int_equal(c.n_shared_experts, 1);
    assert_int_equal(c.num_nextn_predict_layers, 0);
    assert_true(c.norm_topk_prob);
    assert_false(c.yarn.present || c.fp8 || c.scale_ue8m0);
    assert_true(tr_config_attention_scale(&c) ==
                1.0 / sqrt(c.qk_nope_head_dim + c.qk_rope_head_dim));
    float f[TR_ROPE_DIM_MAX / 2];
    tr_config_inv_freq(&c, f);
    for (int i = 0; i < c.qk_rope_head_dim / 2; i++)
        assert_true(f[i] == (float)pow(c.rope_theta, -2.0 * i / c.qk_rope_head_dim));
    /* The other spellings of the same thing. */
    assert_int_equal(
        load_patched(&c, "{\"rope_scaling\": {\"type\": null, \"rope_type\": \"yarn\"}}", &err),
        TR_OK);
    assert_true(c.yarn.present && c.yarn.factor == 40.0);
    st = load_patched(&c,
                      "{\"rope_scaling\": null, \"rope_theta\": null, \"rope_parameters\": {"
                      "\"rope_type\": \"yarn\", \"factor\": 8, \"mscale\": 1, \"rope_theta\": 5e4,"
                      "\"mscale_all_dim\": 0.5, \"original_max_position_embeddings\": 512}}",
                      &err);
    if (st != TR_OK) fail_msg("%s", err.text);
    assert_true(c.yarn.present && c.yarn.factor == 8.0 && c.yarn.beta_fast == 32.0 &&
                c.yarn.beta_slow == 1.0 && c.rope_theta == 5e4);
    assert_int_equal(load_patched(&c, "{\"rope_scaling\": {\"type\": \"default\"}}", &err), TR_OK);
    assert_false(c.yarn.present);
}

/* clang-format off */
static const struct { const char *patch, *names; } refusals[] = {
    {"{\"hidden_size\": null}", "hidden_size is missing"},
    {"{\"vocab_size\": 0}", "vocab_size"},
    {"{\"vocab_size\": 4294967297}", "vocab_size"},
    {"{\"num_hidden_layers\": -1}", "num_hidden_layers"},
    {"{\"num_hidden_layers\": \"4\"}", "num_hidden_layers"},
    {"{\"num_hidden_layers\": 4.0}", "num_hidden_layers"},
    {"{\"num_nextn_predict_layers\": 2}", "num_nextn_predict_layers"},
    {"{\"num_attention_heads\": 1000000}", "num_attention_heads"},
    {"{\"kv_lora_rank\": 0}", "kv_lora_rank"},
    {"{\"qk_rope_head_dim\": 15}", "qk_rope_head_dim"},
    {"{\"qk_rope_head_dim\": 64}", "qk_rope_head_dim"},
    {"{\"index_head_dim\": 48}", "index_head_dim"},
    {"{\"index_head_dim\": 256}", "index_head_dim"},
    {"{\"index_topk\": 0}", "index_topk"},
    {"{\"moe_layer_freq\": 0}", "moe_layer_freq"},
    {"{\"n_group\": 3}", "n_group"},
    {"{\"n_group\": 8}", "n_group"},
    {"{\"topk_group\": 5}", "topk_group"},
    {"{\"num_experts_per_tok\": 5}", "num_experts_per_tok"},
    {"{\"eos_token_id\": 256}", "eos_token_id"},
    {"{\"eos_token_id\": [1, 2]}", "eos_token_id"},
    {"{\"rms_norm_eps\": -1}", "rms_norm_eps"},
    {"{\"rms_norm_eps\": null}", "rms_norm_eps is missing"},
    {"{\"norm_topk_prob\": 1}", "norm_topk_prob"},
    {"{\"scoring_func\": \"softmax\"}", "scoring_func"},
    {"{\"topk_method\": \"greedy\"}", "topk_method"},
    {"{\"hidden_act\": \"gelu\"}", "hidden_act"},
    {"{\"attention_bias\": true}", "attention_bias"},
    {"{\"attention_bias\": \"no\"}", "attention_bias"},
    {"{\"tie_word_embeddings\": true}", "tie_word_embeddings"},
    {"{\"model_type\": \"deepseek_v3\"}", "model_type"},
    {"{\"indexer_rope_interleave\": true}", "indexer_rope_interleave"},
    {"{\"quantization_config\": {\"quant_method\": \"gptq\"}}", "quantization_config.quant_method"},
    {"{\"quantization_config\": {\"quant_method\": null}}", "quantization_config.quant_method"},
    {"{\"quantization_config\": {\"fmt\": \"e5m2\"}}", "quantization_config.fmt"},
    {"{\"quantization_config\": {\"activation_scheme\": \"static\"}}", "quantization_config.activation_scheme"},
    {"{\"quantization_config\": {\"weight_block_size\": [64, 128]}}", "quantization_config.weight_block_size"},
    {"{\"quantization_config\": {\"weight_block_size\": null}}", "quantization_config.weight_block_size"},
    {"{\"quantization_config\": {\"scale_fmt\": \"e5m3\"}}", "quantization_config.scale_fmt"},
    {"{\"quantization_config\": 8}", "quantization_config"},
    {"{\"rope_scaling\": {\"type\": \"linear\"}}", "rope_scaling.type"},
    {"{\"rope_scaling\": {\"type\": null}}", "rope_scaling.type is missing"},
    {"{\"rope_scaling\": {\"rope_type\": \"default\"}}", "rope_type"},
    {"{\"rope_scaling\": {\"factor\": null}}", "rope_scaling.factor is missing"},
    {"{\"rope_scaling\": {\"factor\": 0.5}}", "rope_scaling.factor"},
    {"{\"rope_scaling\": {\"beta_fast\": 0.5}}", "beta_fast"},
    {"{\"rope_scaling\": {\"original_max_position_embeddings\": 0}}", "rope_scaling.original_max_position_embeddings"},
    {"{\"rope_scaling\": true}", "rope_scaling"},
    {"{\"rope_parameters\": {\"rope_type\": \"yarn\"}}", "rope_parameters"},
    {"{\"rope_theta\": 1}", "rope_theta"},
    {"{\"rope_theta\": null}", "rope_theta is missing"},
    {"{\"index_topk_freq\": 2}", "index_topk_freq"},
    {"{\"index_topk_freq\": 0}", "index_topk_freq"},
    {"{\"index_topk_pattern\": \"FFSF\"}", "index_topk_pattern"},
    {"{\"index_topk_pattern\": 3}", "index_topk_pattern"},
    {"{\"index_skip_topk_offset\": 0}", "index_skip_topk_offset"},
};
/* clang-format on */

static void what_we_cannot_compute_is_refused_by_name(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof refusals / sizeof *refusals; i++) {
        tr_config c;
        tr_err err = {0};
        tr_status st = load_patched(&c, refusals[i].patch, &err);
        if (st != TR_E_INPUT || !strstr(err.text, refusals[i].names) ||
            !strstr(err.text, "config.json"))
            fail_msg("%s: status %d, \"%s\"", refusals[i].patch, (int)st, err.text);
    }
}

static void every_mismatch_is_in_one_message(void **state)
{
    (void)state;
    tr_config c;
    tr_err err = {0};
    assert_int_equal(
        load_patched(&c,
                     "{\"hidden_act\": \"gelu\", \"hidden_size\": null, \"n_group\": 0,"
                     " \"attention_bias\": true, \"index_topk_freq\": 3}",
                     &err),
        TR_E_INPUT);
    static const char *const names[] = {"hidden_act", "hidden_size", "n_group", "attention_bias",
                                        "index_topk_freq"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        assert_non_null(strstr(err.text, names[i]));
    /* More than a message holds: counted. */
    assert_int_equal(tr_scratch_write(scratch, "config.json", "{}", 2), 0);
    assert_int_equal(tr_config_load(&c, scratch, NULL, 0, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "vocab_size is missing"));
    char *more = strstr(err.text, "(and ");
    size_t shown = 1;
    for (const char *p = err.text; (p = strstr(p, "; ")) != NULL; p++)
        shown++;
    size_t hidden = more ? strtoul(more + 5, NULL, 10) : 0;
    assert_int_equal(shown + hidden,
                     22 + 2 + 1); /* integers, reals, rope_theta without a default */
}

/* The lists of layers in the vectors: a config is refused exactly where some layer would reuse a selection. */
static void index_cache_is_refused_where_it_skips(void **state)
{
    (void)state;
    json_t *u = unit(), *cases = json_object_get(u, "skip_topk"), *k;
    size_t i;
    json_array_foreach(cases, i, k)
    {
        json_t *patch = json_deep_copy(json_object_get(k, "over"));
        json_object_set(patch, "num_hidden_layers", json_object_get(k, "layers"));
        char *text = json_dumps(patch, 0);
        size_t n = (size_t)json_integer_value(json_object_get(k, "layers"));
        size_t n_full = json_array_size(json_object_get(k, "full"));
        size_t skipped = 0; /* the first that does not compute */
        while (skipped < n_full && (size_t)json_integer_value(json_array_get(
                                       json_object_get(k, "full"), skipped)) == skipped)
            skipped++;
        char says[32];
        snprintf(says, sizeof says, "makes layer %zu reuse", skipped);
        tr_config c;
        tr_err err = {0};
        tr_status st = load_patched(&c, text, &err);
        assert_int_equal(st, n_full == n ? TR_OK : TR_E_INPUT);
        if (n_full != n && !strstr(err.text, says)) fail_msg("%s: %s", text, err.text);
        free(text);
        json_decref(patch);
    }
    assert_true(i > 0);
    json_decref(u);
}

static void overrides_change_the_file(void **state)
{
    (void)state;
    char dir[400];
    tr_config c;
    tr_err err = {0};
    const char *const good[] = {"num_hidden_layers=2",
                                "rope_scaling.factor=4.5",
                                "rms_norm_eps=1e-5",
                                "hidden_act=silu",
                                "scoring_func=\"sigmoid\"",
                                "index_topk_pattern=FF",
                                "num_nextn_predict_layers=0",
                                "quantization_config=null",
                                "rope_parameters.beta_fast=16",
                                "rope_parameters=null"};
    int n = (int)(sizeof good / sizeof *good);
    base_dir(dir, sizeof dir);
    if (tr_config_load(&c, dir, good, n, &err) != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(c.num_hidden_layers, 2);
    assert_int_equal(c.num_nextn_predict_layers, 0);
    assert_true(c.yarn.factor == 4.5 && c.yarn.beta_fast == 16.0 && c.rms_norm_eps == 1e-5);
    assert_false(c.fp8);
    /* ... and the other name, where the file says rope_parameters. */
    static const char parameters[] =
        "rope_parameters={\"rope_type\": \"yarn\", \"factor\": 2, \"mscale\": 1, "
        "\"mscale_all_dim\": 1, \"original_max_position_embeddings\": 64}";
    const char *const newer[] = {"rope_scaling=null", parameters, "rope_scaling.factor=8"};
    if (tr_config_load(&c, dir, newer, 3, &err) != TR_OK) fail_msg("%s", err.text);
    assert_true(c.yarn.present && c.yarn.factor == 8.0);
}

static void bad_overrides_are_usage_errors(void **state)
{
    (void)state;
    /* clang-format off */
    static const struct { const char *text, *names; } bad[] = {
        {"num_hidden_layer=2", "num_hidden_layer"},
        {"rope_scaling.facto=2", "rope_scaling.facto"},
        {"vocab_size.x=2", "vocab_size.x"},
        {"num_hidden_layers", "key=value"},
        {"=3", "key=value"},
        {"num_hidden_layers=", "num_hidden_layers"},
        {"num_hidden_layers=two", "num_hidden_layers"},
        {"num_hidden_layers=0", "num_hidden_layers"},
        {"hidden_act=gelu", "hidden_act"},
        {"index_topk_freq=4", "index_topk_freq"},
        {"rms_norm_eps=\xff\xfe", "rms_norm_eps"},
        {"rope_scaling.type=linear", "rope_scaling.type"},
        {"rope_scaling={}", "rope_scaling"},
    };
    /* clang-format on */
    char dir[400];
    base_dir(dir, sizeof dir);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        tr_config c;
        tr_err err = {0};
        tr_status st = tr_config_load(&c, dir, &bad[i].text, 1, &err);
        if (st != TR_E_USAGE || err.status != st || !strstr(err.text, bad[i].names) ||
            !strstr(err.text, "--override"))
            fail_msg("%s: status %d, \"%s\"", bad[i].text, (int)st, err.text);
    }
    /* A file that is wrong by itself stays the file's fault. */
    tr_config c;
    tr_err err = {0};
    const char *fine = "num_hidden_layers=2";
    assert_int_equal(load_patched(&c, "{\"hidden_act\": \"gelu\"}", &err), TR_E_INPUT);
    assert_int_equal(tr_config_load(&c, scratch, &fine, 1, &err), TR_E_INPUT);
    /* ... and an override may mend it. */
    const char *mends = "hidden_act=silu";
    assert_int_equal(tr_config_load(&c, scratch, &mends, 1, &err), TR_OK);
}

static void damaged_files_are_refused(void **state)
{
    (void)state;
    tr_config c;
    tr_err err = {0};
    json_t *base = base_json();
    char *text = json_dumps(base, 0);
    size_t n = strlen(text);

    tr_scratch_clear(scratch, 0);
    assert_int_equal(tr_config_load(&c, scratch, NULL, 0, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "config.json"));
    for (size_t cut = 0; cut < n; cut++) {
        assert_int_equal(tr_scratch_write(scratch, "config.json", text, cut), 0);
        assert_int_equal(tr_config_load(&c, scratch, NULL, 0, &err), TR_E_INPUT);
    }
    /* One byte changed: refused, or a config whose numbers are still sane. */
    uint32_t r = 1;
    for (int i = 0; i < 1500; i++) {
        r = r * 1664525u + 1013904223u;
        size_t at = (r >> 8) % n;
        char old = text[at];
        r = r * 1664525u + 1013904223u;
        text[at] = (char)(r >> 16);
        assert_int_equal(tr_scratch_write(scratch, "config.json", text, n), 0);
        tr_status st = tr_config_load(&c, scratch, NULL, 0, &err);
        if (st == TR_OK)
            assert_true(c.hidden_size > 0 && c.vocab_size > c.eos_token_id &&
                        c.n_routed_experts % c.n_group == 0 && c.qk_rope_head_dim % 2 == 0);
        else
            assert_int_equal(st, TR_E_INPUT);
        text[at] = old;
    }
    free(text);
    json_decref(base);
}

/* ---- rope --------------------------------------------------------------------------------------------------------- */

static double number(const json_t *o, const char *key)
{
    return json_number_value(json_object_get(o, key));
}

static tr_config rope_config(int d, double theta, const json_t *scaling)
{
    tr_config c = {.qk_rope_head_dim = d, .rope_theta = theta};
    c.yarn.present = true;
    c.yarn.factor = number(scaling, "factor");
    c.yarn.beta_fast = number(scaling, "beta_fast");
    c.yarn.beta_slow = number(scaling, "beta_slow");
    c.yarn.mscale = number(scaling, "mscale");
    c.yarn.mscale_all_dim = number(scaling, "mscale_all_dim");
    c.yarn.original_max_position_embeddings =
        (int)number(scaling, "original_max_position_embeddings");
    return c;
}

static void assert_close(double got, double want, double relative)
{
    if (!(fabs(got - want) <= relative * fabs(want))) fail_msg("%.9g, not %.9g", got, want);
}

static void yarn_frequencies_match_the_vectors(void **state)
{
    (void)state;
    json_t *u = unit(), *cases = json_object_get(u, "yarn"), *k;
    size_t i;
    json_array_foreach(cases, i, k)
    {
        float f[TR_ROPE_DIM_MAX / 2];
        int d = (int)number(k, "d");
        tr_config c = rope_config(d, number(k, "rope_theta"), json_object_get(k, "rope_scaling"));
        const json_t *want = json_object_get(k, "inv_freq");
        assert_int_equal(json_array_size(want), d / 2);
        tr_config_inv_freq(&c, f);
        for (int j = 0; j < d / 2; j++)
            assert_true(f[j] == (float)json_number_value(json_array_get(want, (size_t)j)));
    }
    assert_true(i > 0);
    json_decref(u);
}

static void attention_scale_matches_the_vectors(void **state)
{
    (void)state;
    json_t *u = unit(), *k = json_object_get(u, "attention_scale");
    const json_t *yarn = json_array_get(json_object_get(u, "yarn"), 0); /* the real model's */
    tr_config c = rope_config(64, 10000.0, json_object_get(yarn, "rope_scaling"));
    c.qk_nope_head_dim = (int)number(k, "qk_head_dim") - 64;
    assert_close(tr_config_attention_scale(&c), number(k, "value"), 1e-6);
    c.yarn.factor = 1.0; /* no stretching, no mscale */
    assert_close(tr_config_attention_scale(&c), 1.0 / sqrt(number(k, "qk_head_dim")), 1e-15);
    json_decref(u);
}

/* The table, through the rotation it is made for (interleaved pairs), at the vectors' positions. */
static void rope_table_rotates_as_the_vectors(void **state)
{
    (void)state;
    json_t *u = unit(), *cases = json_object_get(u, "rope"), *k;
    const json_t *yarn = json_array_get(json_object_get(u, "yarn"), 0);
    int d = (int)number(yarn, "d"), n_positions = 0;
    size_t i;
    tr_config c = rope_config(d, number(yarn, "rope_theta"), json_object_get(yarn, "rope_scaling"));

    json_array_foreach(cases, i, k)
    {
        if (n_positions <= (int)number(k, "pos")) n_positions = (int)number(k, "pos") + 1;
    }
    assert_true(n_positions > 0);
    float *table = malloc((size_t)n_positions * (size_t)d * sizeof *table);
    assert_non_null(table);
    tr_config_rope_table(&c, n_positions, table);
    json_array_foreach(cases, i, k)
    {
        const float *row = table + (size_t)number(k, "pos") * (size_t)d;
        const json_t *x = json_object_get(k, "x"), *y = json_object_get(k, "interleaved");
        for (size_t j = 0; j < (size_t)d; j += 2) {
            float a = (float)json_number_value(json_array_get(x, j));
            float b = (float)json_number_value(json_array_get(x, j + 1));
            float cosine = row[j], sine = row[j + 1];
            double got[2] = {a * cosine - b * sine, a * sine + b * cosine};
            for (size_t h = 0; h < 2; h++)
                assert_true(fabs(got[h] - json_number_value(json_array_get(y, j + h))) <= 1e-6);
        }
    }
    free(table);
    /* Different mscales show as a factor on both. */
    c.yarn.mscale = 2.0;
    float rows[2 * 64];
    tr_config_rope_table(&c, 2, rows);
    double m = (0.2 * log(c.yarn.factor) + 1.0) / (0.1 * log(c.yarn.factor) + 1.0);
    assert_close(rows[0], m, 1e-6);
    assert_close(hypot(rows[d], rows[d + 1]), m, 1e-6);
    json_decref(u);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(published_files_load),
        cmocka_unit_test(defaults_fill_what_may_be_absent),
        cmocka_unit_test(what_we_cannot_compute_is_refused_by_name),
        cmocka_unit_test(every_mismatch_is_in_one_message),
        cmocka_unit_test(index_cache_is_refused_where_it_skips),
        cmocka_unit_test(overrides_change_the_file),
        cmocka_unit_test(bad_overrides_are_usage_errors),
        cmocka_unit_test(damaged_files_are_refused),
        cmocka_unit_test(yarn_frequencies_match_the_vectors),
        cmocka_unit_test(attention_scale_matches_the_vectors),
        cmocka_unit_test(rope_table_rotates_as_the_vectors),
    };
    if (!tr_scratch_make(scratch, sizeof scratch)) return 77;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tr_scratch_clear(scratch, 1);
    return failed;
}
