#include <config.h>

#include "model/config.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "base/json.h"
#include "model/problems.h"

enum { CONFIG_BYTES_MAX = 16 << 20 };

#define AT(field) offsetof(tr_config, field)

/* The bounds keep every product of two sizes that the model forms (heads x head dim, 2 x width, ...) inside int. */
typedef struct int_key {
    const char *key;
    size_t at;
    int min, max;
    int fallback; /* -1: the key must be there */
} int_key;

/* clang-format off */
static const int_key int_keys[] = {
    {"vocab_size", AT(vocab_size), 1, 1 << 24, -1},
    {"hidden_size", AT(hidden_size), 1, 1 << 17, -1},
    {"num_hidden_layers", AT(num_hidden_layers), 1, TR_LAYERS_MAX, -1},
    {"num_nextn_predict_layers", AT(num_nextn_predict_layers), 0, 1, 0},
    {"first_k_dense_replace", AT(first_k_dense_replace), 0, 4096, -1},
    {"moe_layer_freq", AT(moe_layer_freq), 1, 4096, 1},
    {"intermediate_size", AT(intermediate_size), 1, 1 << 20, -1},
    {"moe_intermediate_size", AT(moe_intermediate_size), 1, 1 << 20, -1},
    {"n_routed_experts", AT(n_routed_experts), 1, 1 << 14, -1},
    {"n_shared_experts", AT(n_shared_experts), 1, 64, 1},
    {"num_experts_per_tok", AT(num_experts_per_tok), 1, 1 << 14, -1},
    {"n_group", AT(n_group), 1, 1 << 14, -1},
    {"topk_group", AT(topk_group), 1, 1 << 14, -1},
    {"num_attention_heads", AT(num_attention_heads), 1, 4096, -1},
    {"q_lora_rank", AT(q_lora_rank), 1, 1 << 16, -1},
    {"kv_lora_rank", AT(kv_lora_rank), 1, 1 << 16, -1},
    {"qk_nope_head_dim", AT(qk_nope_head_dim), 1, 4096, -1},
    {"qk_rope_head_dim", AT(qk_rope_head_dim), 2, TR_ROPE_DIM_MAX, -1},
    {"v_head_dim", AT(v_head_dim), 1, 4096, -1},
    {"index_n_heads", AT(index_n_heads), 1, 4096, -1},
    /* One scale per index key: its row is one block of at most 128 (model.md 4 step 4). */
    {"index_head_dim", AT(index_head_dim), 2, 128, -1},
    {"index_topk", AT(index_topk), 1, 1 << 20, -1},
    {"max_position_embeddings", AT(max_position_embeddings), 1, 1 << 26, -1},
    {"bos_token_id", AT(bos_token_id), 0, 1 << 24, -1},
    {"eos_token_id", AT(eos_token_id), 0, 1 << 24, -1},
};

typedef struct double_key {
    const char *key;
    size_t at;
    double min, max;
    double fallback; /* NAN: the key must be there */
} double_key;

static const double_key double_keys[] = {
    {"routed_scaling_factor", AT(routed_scaling_factor), 1e-6, 1e6, NAN},
    {"rms_norm_eps", AT(rms_norm_eps), 0.0, 1.0, NAN},
};

/* Members of rope_scaling, or of rope_parameters as newer files call it. */
static const double_key yarn_keys[] = {
    {"factor", AT(yarn.factor), 1.0, 1e6, NAN},
    {"beta_fast", AT(yarn.beta_fast), 1e-3, 1e6, 32.0},
    {"beta_slow", AT(yarn.beta_slow), 1e-3, 1e6, 1.0},
    {"mscale", AT(yarn.mscale), 0.0, 1e3, NAN},
    {"mscale_all_dim", AT(yarn.mscale_all_dim), 0.0, 1e3, NAN},
};

/* Fields with one value we compute with; leaving the field out means that value too. */
typedef struct fixed_key {
    const char *key, *value; /* NULL: a boolean that must be false */
} fixed_key;

static const fixed_key fixed_keys[] = {
    {"model_type", "deepseek_v32"},
    {"hidden_act", "silu"},
    {"scoring_func", "sigmoid"},
    {"topk_method", "noaux_tc"},
    {"attention_bias", NULL},
    {"tie_word_embeddings", NULL},
    {"indexer_rope_interleave", NULL}, /* other models of the family: absent means half-split (model.md 9, 3) */
};

static const fixed_key quant_keys[] = {
    {"quant_method", "fp8"},
    {"fmt", "e4m3"},
    {"activation_scheme", "dynamic"},
};

/* Other keys that an override may name. */
static const char *const other_keys[] = {
    "norm_topk_prob", "rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "index_topk_freq",
    "index_topk_pattern", "index_skip_topk_offset", "rope_scaling.type", "rope_scaling.rope_type",
    "rope_scaling.original_max_position_embeddings", "rope_scaling.rope_theta", "quantization_config.weight_block_size",
    "quantization_config.scale_fmt",
};
/* clang-format on */

#define N_OF(table) (sizeof(table) / sizeof *(table))

typedef struct reader { /* one pass over one parsed file */
    const json_t *root;
    tr_config *config;
    tr_problems problems;
} reader;

static void put_int(tr_config *c, size_t at, int v)
{
    memcpy((char *)c + at, &v, sizeof v);
}

static void put_double(tr_config *c, size_t at, double v)
{
    memcpy((char *)c + at, &v, sizeof v);
}

/* A member that is there and not null. */
static const json_t *given(const json_t *object, const char *key)
{
    const json_t *v = json_object_get(object, key);
    return json_is_null(v) ? NULL : v;
}

/* `in`: "" or "rope_scaling." and so on, for the message. */
static void read_int(reader *r, const json_t *object, const char *in, const int_key *k)
{
    tr_err e;
    int64_t v = k->fallback;
    if (!given(object, k->key) && k->fallback < 0)
        tr_problem(&r->problems, "%s%s is missing", in, k->key);
    else if (tr_json_int(object, k->key, k->min, k->max, &v, &e) != TR_OK)
        tr_problem(&r->problems, "%s%s", in, e.text);
    else
        put_int(r->config, k->at, (int)v);
}

static void read_double(reader *r, const json_t *object, const char *in, const double_key *k)
{
    tr_err e;
    double v = k->fallback;
    if (!given(object, k->key) && isnan(k->fallback))
        tr_problem(&r->problems, "%s%s is missing", in, k->key);
    else if (tr_json_double(object, k->key, k->min, k->max, &v, &e) != TR_OK)
        tr_problem(&r->problems, "%s%s", in, e.text);
    else
        put_double(r->config, k->at, v);
}

/* Absent is the supported value. */
static void read_fixed(reader *r, const json_t *object, const char *in, const fixed_key *k)
{
    tr_err e;
    const char *s = k->value;
    bool b = false;
    tr_status st = k->value ? tr_json_string(object, k->key, &s, NULL, &e)
                            : tr_json_bool(object, k->key, &b, &e);
    if (st != TR_OK)
        tr_problem(&r->problems, "%s%s", in, e.text);
    else if (k->value && strcmp(s, k->value) != 0)
        tr_problem(&r->problems, "%s%s \"%s\" is not supported, only \"%s\"", in, k->key, s,
                   k->value);
    else if (b)
        tr_problem(&r->problems, "%s%s true is not supported", in, k->key);
}

/* `type` and `rope_type` are the same thing under two names. NULL: not YaRN, or already complained about. */
static bool is_yarn(reader *r, const json_t *object, const char *in)
{
    tr_err e;
    const char *type = NULL, *rope_type = NULL;
    if (tr_json_string(object, "type", &type, NULL, &e) != TR_OK ||
        tr_json_string(object, "rope_type", &rope_type, NULL, &e) != TR_OK) {
        tr_problem(&r->problems, "%s%s", in, e.text);
        return false;
    }
    if (type && rope_type && strcmp(type, rope_type) != 0) {
        tr_problem(&r->problems, "%stype \"%s\" contradicts rope_type \"%s\"", in, type, rope_type);
        return false;
    }
    if (!type) type = rope_type;
    if (!type) {
        tr_problem(&r->problems, "%stype is missing", in);
        return false;
    }
    if (strcmp(type, "default") == 0) return false; /* plain rope, as newer files say it */
    if (strcmp(type, "yarn") != 0) {
        tr_problem(&r->problems, "%stype \"%s\" is not supported, only \"yarn\"", in, type);
        return false;
    }
    return true;
}

static void read_rope(reader *r)
{
    static const int_key original = {"original_max_position_embeddings",
                                     AT(yarn.original_max_position_embeddings), 1, 1 << 26, -1};
    /* log(theta) divides: 1 is excluded */
    static const double_key theta = {"rope_theta", AT(rope_theta), 2.0, 1e12, NAN};
    const char *in = "rope_scaling.";
    const json_t *scaling = given(r->root, "rope_scaling");
    const json_t *parameters = given(r->root, "rope_parameters");

    if (scaling && parameters) {
        tr_problem(&r->problems, "rope_scaling and rope_parameters are both given");
        return;
    }
    if (parameters) {
        scaling = parameters;
        in = "rope_parameters.";
    }
    if (scaling && !json_is_object(scaling)) {
        tr_problem(&r->problems, "%.*s must be an object", (int)strlen(in) - 1, in);
        return;
    }
    bool nested = scaling && given(scaling, "rope_theta") && !given(r->root, "rope_theta");
    read_double(r, nested ? scaling : r->root, nested ? in : "", &theta);
    if (!scaling || !is_yarn(r, scaling, in)) return;
    r->config->yarn.present = true;
    read_int(r, scaling, in, &original);
    for (size_t i = 0; i < N_OF(yarn_keys); i++)
        read_double(r, scaling, in, &yarn_keys[i]);
    if (r->config->yarn.beta_fast < r->config->yarn.beta_slow)
        tr_problem(&r->problems, "%sbeta_fast is smaller than beta_slow", in);
}

static void read_quantization(reader *r)
{
    const char *in = "quantization_config.";
    const json_t *q = given(r->root, "quantization_config");
    const char *scale_fmt = NULL;
    tr_err e;

    if (!q) return; /* class Q tensors are stored like the others */
    r->config->fp8 = true;
    if (!json_is_object(q)) {
        tr_problem(&r->problems, "quantization_config must be an object");
        return;
    }
    if (!given(q, "quant_method")) tr_problem(&r->problems, "%squant_method is missing", in);
    for (size_t i = 0; i < N_OF(quant_keys); i++)
        read_fixed(r, q, in, &quant_keys[i]);
    const json_t *block = given(q, "weight_block_size");
    if (!json_is_array(block) || json_array_size(block) != 2 ||
        json_integer_value(json_array_get(block, 0)) != 128 ||
        json_integer_value(json_array_get(block, 1)) != 128)
        tr_problem(&r->problems, "%sweight_block_size must be [128, 128]", in);
    if (tr_json_string(q, "scale_fmt", &scale_fmt, NULL, &e) != TR_OK)
        tr_problem(&r->problems, "%s%s", in, e.text);
    else if (scale_fmt && strcmp(scale_fmt, "ue8m0") != 0)
        tr_problem(&r->problems, "%sscale_fmt \"%s\" is not supported, only \"ue8m0\"", in,
                   scale_fmt);
    else
        r->config->scale_ue8m0 = scale_fmt != NULL;
}

/* IndexCache (model.md 1.1) is not built yet: refused as soon as it makes a layer reuse another's selection. */
static void check_index_cache(reader *r)
{
    int64_t freq = 1, offset = 0;
    const char *pattern = NULL;
    tr_err e;

    if (tr_json_int(r->root, "index_topk_freq", 1, 1 << 20, &freq, &e) != TR_OK ||
        tr_json_int(r->root, "index_skip_topk_offset", 1, 1 << 20, &offset, &e) != TR_OK ||
        tr_json_string(r->root, "index_topk_pattern", &pattern, NULL, &e) != TR_OK) {
        tr_problem(&r->problems, "%s", e.text);
        return;
    }
    size_t n = pattern ? strlen(pattern) : 0;
    for (int64_t l = 0; l < r->config->num_hidden_layers; l++) {
        int64_t turn = offset ? l - offset + 1 : l - 1;
        bool skips = pattern ? (size_t)l < n && pattern[l] == 'S' : turn > 0 && turn % freq != 0;
        if (!skips) continue;
        tr_problem(&r->problems, "%s makes layer %d reuse a selection, which is not supported",
                   pattern ? "index_topk_pattern" : "index_topk_freq", (int)l);
        return;
    }
}

/* What sizes must be to each other; only asked when each is right by itself. */
static void check_relations(reader *r)
{
    const tr_config *c = r->config;
    tr_problems *p = &r->problems;
    if (p->n) return;
    if (c->n_routed_experts % c->n_group != 0)
        tr_problem(p, "n_routed_experts %d is not a multiple of n_group %d", c->n_routed_experts,
                   c->n_group);
    else if (c->n_group > 1 && c->n_routed_experts / c->n_group < 2)
        tr_problem(p, "n_group %d leaves fewer than two experts to a group", c->n_group);
    if (c->topk_group > c->n_group)
        tr_problem(p, "topk_group %d is larger than n_group %d", c->topk_group, c->n_group);
    else if (c->num_experts_per_tok > c->n_routed_experts / c->n_group * c->topk_group)
        tr_problem(p, "num_experts_per_tok %d is more than the chosen groups hold",
                   c->num_experts_per_tok);
    if (c->qk_rope_head_dim % 2 != 0)
        tr_problem(p, "qk_rope_head_dim %d is odd", c->qk_rope_head_dim);
    if ((c->index_head_dim & (c->index_head_dim - 1)) != 0)
        tr_problem(p, "index_head_dim %d is not a power of two", c->index_head_dim);
    if (c->index_head_dim < c->qk_rope_head_dim)
        tr_problem(p, "index_head_dim %d is smaller than qk_rope_head_dim %d", c->index_head_dim,
                   c->qk_rope_head_dim);
    if (c->bos_token_id >= c->vocab_size)
        tr_problem(p, "bos_token_id %d is not below vocab_size %d", c->bos_token_id, c->vocab_size);
    if (c->eos_token_id >= c->vocab_size)
        tr_problem(p, "eos_token_id %d is not below vocab_size %d", c->eos_token_id, c->vocab_size);
}

/* path: for the message. */
static tr_status read_all(tr_config *out, const json_t *root, const char *path, tr_err *err)
{
    reader r = {.root = root, .config = out};
    tr_err e;

    memset(out, 0, sizeof *out);
    for (size_t i = 0; i < N_OF(int_keys); i++)
        read_int(&r, root, "", &int_keys[i]);
    for (size_t i = 0; i < N_OF(double_keys); i++)
        read_double(&r, root, "", &double_keys[i]);
    for (size_t i = 0; i < N_OF(fixed_keys); i++)
        read_fixed(&r, root, "", &fixed_keys[i]);
    out->norm_topk_prob = true;
    if (tr_json_bool(root, "norm_topk_prob", &out->norm_topk_prob, &e) != TR_OK)
        tr_problem(&r.problems, "%s", e.text);
    read_rope(&r);
    read_quantization(&r);
    check_index_cache(&r);
    check_relations(&r);
    return tr_problems_end(&r.problems, TR_E_INPUT, path, err);
}

/* ---- overrides ---------------------------------------------------------------------------------------------------- */

/* The part of `key` behind `object` and its dot, or NULL. */
static const char *inside(const char *key, const char *object)
{
    size_t n = strlen(object);
    return strncmp(key, object, n) == 0 && key[n] == '.' ? key + n + 1 : NULL;
}

static bool is_known(const char *key)
{
    const char *member;
    for (size_t i = 0; i < N_OF(int_keys); i++)
        if (strcmp(key, int_keys[i].key) == 0) return true;
    for (size_t i = 0; i < N_OF(double_keys); i++)
        if (strcmp(key, double_keys[i].key) == 0) return true;
    for (size_t i = 0; i < N_OF(fixed_keys); i++)
        if (strcmp(key, fixed_keys[i].key) == 0) return true;
    for (size_t i = 0; i < N_OF(other_keys); i++)
        if (strcmp(key, other_keys[i]) == 0) return true;
    if ((member = inside(key, "quantization_config")) != NULL)
        for (size_t i = 0; i < N_OF(quant_keys); i++)
            if (strcmp(member, quant_keys[i].key) == 0) return true;
    if ((member = inside(key, "rope_scaling")) != NULL)
        for (size_t i = 0; i < N_OF(yarn_keys); i++)
            if (strcmp(member, yarn_keys[i].key) == 0) return true;
    return false;
}

/* A file has one of rope_scaling and rope_parameters, and either name means that one. */
static const char *object_of(const json_t *root, const char *name)
{
    static const char *const same[] = {"rope_scaling", "rope_parameters"};
    for (int i = 0; i < 2; i++)
        if (strcmp(name, same[i]) == 0 && !given(root, name) && given(root, same[1 - i]))
            return same[1 - i];
    return name;
}

/* `name` is a key without dots, or "object.member"; takes value. */
static tr_status put_value(json_t *root, char *name, json_t *value, tr_err *err)
{
    char *dot = strchr(name, '.');
    json_t *object = root;

    if (dot) {
        *dot = '\0';
        const char *in = object_of(root, name);
        object = json_object_get(root, in);
        if (!json_is_object(object)) {
            object = json_object();
            if (json_object_set_new(root, in, object) != 0) object = NULL;
        }
        name = dot + 1;
    }
    if (!object) json_decref(value);
    if (!object || json_object_set_new(object, name, value) != 0)
        return tr_fail(err, TR_E_MEMORY, "out of memory");
    return TR_OK;
}

static tr_status apply_override(json_t *root, const char *text, tr_err *err)
{
    tr_status st = TR_OK;
    tr_err why;
    json_t *value = NULL;
    char *name = NULL;
    const char *equals = strchr(text, '=');

    if (!equals || equals == text) {
        st = tr_fail(err, TR_E_USAGE, "--override %s: want key=value", text);
        goto done;
    }
    name = strndup(text, (size_t)(equals - text));
    if (!name) {
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    const char *member = inside(name, "rope_parameters");
    const char *canonical = name;
    char known[128];
    if (member) {
        snprintf(known, sizeof known, "rope_scaling.%s", member);
        canonical = known;
    }
    if (!is_known(canonical)) {
        st = tr_fail(err, TR_E_USAGE, "--override %s: config.json has no key \"%s\" that counts",
                     text, name);
        goto done;
    }
    if (tr_json_parse(&value, equals + 1, strlen(equals + 1), JSON_DECODE_ANY, NULL, NULL, &why) !=
        TR_OK)
        value = json_string(equals + 1); /* index_topk_pattern=FFFF needs no quotes */
    if (!value) {
        st = tr_fail(err, TR_E_USAGE, "--override %s: the value is neither JSON nor UTF-8", name);
        goto done;
    }
    st = put_value(root, name, value, err);

done:
    free(name);
    return st;
}

tr_status tr_config_load(tr_config *out, const char *model_dir, const char *const *overrides, int n,
                         tr_err *err)
{
    tr_status st = TR_OK;
    char *path = NULL;
    json_t *root = NULL, *original = NULL;

    memset(out, 0, sizeof *out);
    if (asprintf(&path, "%s/config.json", model_dir) < 0) {
        path = NULL;
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
        goto done;
    }
    st = tr_json_load(&root, path, CONFIG_BYTES_MAX, err);
    if (st != TR_OK) goto done;
    /* A second reading, not json_deep_copy: that one loses members where memory ends, and does not say so. */
    if (n > 0) st = tr_json_load(&original, path, CONFIG_BYTES_MAX, err);
    if (st != TR_OK) goto done;
    for (int i = 0; i < n; i++) {
        st = apply_override(root, overrides[i], err);
        if (st != TR_OK) goto done;
    }
    st = read_all(out, root, path, err);
    if (st == TR_E_INPUT && n > 0) {
        /* Whose fault: what is wrong only with the overrides is the command line's. */
        tr_config plain;
        tr_err ignored;
        if (read_all(&plain, original, path, &ignored) == TR_OK) {
            st = TR_E_USAGE;
            if (err) {
                err->status = st;
                tr_within(err, "--override");
            }
        }
    }

done:
    if (st != TR_OK) memset(out, 0, sizeof *out);
    json_decref(original);
    json_decref(root);
    free(path);
    return st;
}
