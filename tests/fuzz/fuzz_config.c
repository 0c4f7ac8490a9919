/* config.json, model.safetensors.index.json and an --override, with a NUL between them. An accepted config has every size in
 * its range, names and shapes that fit, and finite tables; an accepted index leads to nothing outside the model folder. */
#include <config.h>

#include <math.h>
#include <sys/stat.h>
#include <unistd.h>

#include <jansson.h>

#include "model/checkpoint.h"
#include "model/config.h"
#include "model/tensors.h"
#include "tests/fuzz/fuzz.h"
#include "tests/scratch.h"

enum { WANTED_SEEN = 3000, POSITIONS = 3 };

/* Made once: model lies in folder; folder/x.safetensors and model/s/x.safetensors are the baits. */
static char folder[256], model[300], inner[320];

/* One F32 tensor x. */
static void put_shard(const char *dir, const char *name)
{
    static const char header[] =
        "{\"x\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]}}    ";
    char file[8 + sizeof header + 4] = {0};
    file[0] = (char)(sizeof header - 1);
    memcpy(file + 8, header, sizeof header - 1);
    if (tr_scratch_write(dir, name, file, 8 + sizeof header - 1 + 4) != 0) abort();
}

static void clean(void)
{
    tr_scratch_clear(inner, 1);
    tr_scratch_clear(model, 1);
    tr_scratch_clear(folder, 1);
}

static void make_folders(void)
{
    if (access("/dev/shm", W_OK) == 0) setenv("TMPDIR", "/dev/shm", 0);
    if (!tr_scratch_make(folder, sizeof folder)) abort();
    snprintf(model, sizeof model, "%s/m", folder);
    snprintf(inner, sizeof inner, "%s/s", model);
    if (mkdir(model, 0700) != 0 || mkdir(inner, 0700) != 0) abort();
    put_shard(folder, "x.safetensors");
    put_shard(inner, "x.safetensors");
    put_shard(model, "a.safetensors");
    put_shard(model, "b..safetensors"); /* two dots: refused, whatever lies there */
    atexit(clean);
}

static bool see_wanted(void *ctx, const tr_wanted *w)
{
    int *n = ctx;
    FUZZ_CHECK(w->rank == 1 || w->rank == 2, "%s: rank %d", w->name, w->rank);
    FUZZ_CHECK(w->shape[0] > 0 && w->shape[1] > 0, "%s: shape", w->name);
    FUZZ_CHECK(w->shape[0] < INT32_MAX && w->shape[1] < INT32_MAX, "%s: shape beyond int", w->name);
    FUZZ_CHECK(strlen(w->name) < sizeof w->name - 1, "%s: cut", w->name);
    return ++*n < WANTED_SEEN;
}

static void check_config(const tr_config *c)
{
    int n = 0;
    float *table = malloc(sizeof *table * POSITIONS * (size_t)c->qk_rope_head_dim);
    if (!table) abort();
    FUZZ_CHECK(c->num_hidden_layers > 0 && c->moe_layer_freq > 0 && c->n_group > 0, "no layers");
    FUZZ_CHECK(c->bos_token_id < c->vocab_size && c->eos_token_id < c->vocab_size, "end ids");
    FUZZ_CHECK(c->num_experts_per_tok <= c->n_routed_experts &&
                   c->n_routed_experts % c->n_group == 0 && c->topk_group <= c->n_group,
               "experts");
    FUZZ_CHECK(c->qk_rope_head_dim % 2 == 0 && c->qk_rope_head_dim <= c->index_head_dim, "rope");
    FUZZ_CHECK(isfinite(tr_config_attention_scale(c)) && tr_config_attention_scale(c) > 0,
               "scale %g", tr_config_attention_scale(c));
    tr_config_rope_table(c, POSITIONS, table);
    for (int i = 0; i < POSITIONS * c->qk_rope_head_dim; i++)
        FUZZ_CHECK(isfinite(table[i]), "rope table [%d] is %g", i, (double)table[i]);
    tr_wanted_each(c, see_wanted, &n);
    free(table);
}

/* Does the index name a file that is none of the folder's? As strict as reliability.md 2, by another road. */
static bool names_escape(const char *text, size_t n)
{
    json_error_t e;
    json_t *root = json_loadb(text, n, JSON_REJECT_DUPLICATES, &e),
           *map = json_object_get(root, "weight_map"), *v;
    const char *key;
    bool escape = false;
    json_object_foreach(map, key, v)
    {
        const char *s = json_string_value(v);
        escape = escape || !s || !*s || strchr(s, '/') || strstr(s, "..") || !strcmp(s, ".");
    }
    json_decref(root);
    return escape;
}

static void check_index(const char *text, size_t n)
{
    tr_checkpoint *c = NULL;
    tr_err err = {0};
    if (tr_scratch_write(model, "model.safetensors.index.json", text, n) != 0) abort();
    tr_status st = tr_checkpoint_open(&c, model, &err);
    FUZZ_CHECK(st == TR_OK || (!c && (st == TR_E_INPUT || st == TR_E_IO) && err.text[0]), "%d", st);
    FUZZ_CHECK(!names_escape(text, n) || st == TR_E_INPUT, "not refused: %s", err.text);
    for (size_t i = 0; st == TR_OK && i < tr_checkpoint_count(c); i++) {
        const char *path = tr_checkpoint_path(c, tr_checkpoint_tensor(c, i));
        float x;
        FUZZ_CHECK(!strncmp(path, model, strlen(model)) && path[strlen(model)] == '/' &&
                       !strchr(path + strlen(model) + 1, '/'),
                   "%s is outside", path);
        FUZZ_CHECK(tr_checkpoint_read(c, tr_checkpoint_tensor(c, i), 0, 4, &x, &err) == TR_OK, "%s",
                   err.text);
    }
    tr_checkpoint_close(c);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    tr_config config;
    tr_err err = {0};

    if (!folder[0]) make_folders();
    char *text = malloc(n + 1);
    if (!text) abort();
    if (n) memcpy(text, data, n);
    text[n] = 0;
    size_t first = strlen(text), at = first < n ? first + 1 : n;
    const char *index = text + at;
    size_t n_index = strlen(index);
    const char *override = at + n_index < n ? index + n_index + 1 : NULL;
    if (tr_scratch_write(model, "config.json", text, first) != 0) abort();
    tr_status st = tr_config_load(&config, model, &override, override != NULL, &err);
    FUZZ_CHECK(st == TR_OK || ((st == TR_E_INPUT || (override && st == TR_E_USAGE)) && err.text[0]),
               "status %d: %s", st, err.text);
    if (st == TR_OK) check_config(&config);
    if (at < n) check_index(index, n_index);
    free(text);
    return 0;
}
