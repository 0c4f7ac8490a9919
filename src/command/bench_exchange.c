#include <config.h>

#include "command/bench_exchange.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/order.h"
#include "base/size.h"
#include "command/bench_device.h"
#include "mpi/comm_nccl_window.h"

enum {
    LAYERS = 8, /* of a graph */
    WARM_UP = 3,
    D_IN = 1536, /* q_lora_rank */
    D_KEY = 128,
    D_LATENT = 512,
    D_ROPE = 64,
};
static const int widths[] = {24576, 8192}; /* q_b, index wq_b */
enum { PRODUCTS = sizeof widths / sizeof *widths };

/* What a graph holds. */
typedef enum part { OWN = 1, PRODUCT = 2, EXCHANGE = 4 } part;
/* How rows go. A window has as many bytes as the others, which NCCL gathers as they are: nothing is packed and unpacked. */
typedef enum how { PUSH, NCCL, WINDOW, N_HOWS } how;
enum { KEY_BYTES = D_KEY + 4, LATENT_BYTES = D_LATENT + 16 + 2 * D_ROPE }; /* of a row */

typedef struct place { /* one member's */
    const tr_exchange_bench *b;
    tr_comm *comm;
    tr_bench_device on;
    tr_graph *graph;
    int rows, n_members, rank;
    int most;   /* rows of a member, of all sizes */
    int layers; /* that are timed at once: of a graph, or without graphs one */
    tr_kv_layer kv;
    tr_rows r;
    tr_linear w[PRODUCTS];
    void *x, *y, *kv_a, *index_k;
    float *norm, *k_norm, *k_bias, *rope;
    tr_share *key, *latent;
    tr_nccl_window
        *window;    /* [2][most * (1 + n_members)] rows: keys, then latents; own ones first */
    size_t *bytes;  /* [n_members] */
    int *n_rows;    /* [n_members] */
    int64_t *write; /* [n_members * most], member after member */
    double *seconds;
} place;

/* ---- memory ------------------------------------------------------------------------------------------------------------ */

/* bf16 numbers of about 1, or with `f32` single ones: what multipliers do with zeros takes less power. Freed by the caller;
 * NULL: no memory. */
static char *make_noise(size_t bytes, bool f32)
{
    char *noise = malloc(bytes + 4);
    uint32_t h = 12345;

    for (size_t i = 0; noise && i < bytes; i += 4) {
        h = h * 1664525u + 1013904223u;
        const uint32_t word = f32 ? 0x3f800000u | h >> 12 : 0x3f803f80u ^ (h & 0x807f807fu);
        memcpy(noise + i, &word, 4);
    }
    return noise;
}

static tr_status fill(place *p, void *to, size_t bytes, bool f32, tr_err *err)
{
    enum { PIECE = 1 << 20 };
    const size_t piece = bytes < PIECE ? bytes : PIECE;
    char *noise = make_noise(piece, f32);
    tr_status st = TR_OK;

    if (!noise) return tr_fail(err, TR_E_MEMORY, "out of memory");
    for (size_t at = 0; at < bytes && st == TR_OK; at += piece)
        st = p->on.ops->upload(p->on.device, TR_LANE_MAIN, (char *)to + at, noise,
                               bytes - at < piece ? bytes - at : piece);
    free(noise);
    return tr_bench_device_status(&p->on, "upload", st, err);
}

static tr_status numbers(place *p, size_t n, bool f32, void *out, tr_err *err)
{
    void *d = NULL;
    tr_status st = tr_bench_device_take(&p->on, n * (f32 ? 4 : 2), TR_MEMORY_DEVICE, &d, err);

    memcpy(out, &d, sizeof d);
    return st == TR_OK ? fill(p, d, n * (f32 ? 4 : 2), f32, err) : st;
}

/* Activations, as this device has them. */
static tr_status acts(place *p, size_t n, void *out, tr_err *err)
{
    return numbers(p, n, tr_act_bytes(p->on.ops) == 4, out, err);
}

static tr_status pack(place *p, tr_linear *w, tr_err *err)
{
    char *noise = make_noise((size_t)w->n_out * (size_t)w->n_in * 2, false);
    const tr_linear_src src = {.src = noise, .ld = (size_t)w->n_in, .n_out = w->n_out};

    if (!noise) return tr_fail(err, TR_E_MEMORY, "out of memory");
    const tr_status st = p->on.ops->linear_pack(p->on.device, w, &src);
    free(noise);
    return tr_bench_device_status(&p->on, "linear_pack", st, err);
}

static tr_status take_products(place *p, tr_err *err)
{
    tr_status st = acts(p, (size_t)p->most * D_IN, &p->x, err);

    for (int i = 0; i < PRODUCTS && st == TR_OK; i++) {
        tr_linear *w = &p->w[i];
        *w = (tr_linear){.format = TR_W_BF16, .n_mats = 1, .n_out = widths[i], .n_in = D_IN};
        const size_t bytes = p->on.ops->linear_bytes(w->format, 1, w->n_out, w->n_in);
        st = tr_bench_device_take(&p->on, bytes, TR_MEMORY_DEVICE, &w->data, err);
        if (st == TR_OK) st = pack(p, w, err);
    }
    return st == TR_OK ? acts(p, (size_t)p->most * (size_t)widths[0], &p->y, err) : st;
}

static tr_status take_cache(place *p, tr_err *err)
{
    const int all = p->most * p->n_members;
    tr_kv_layer *kv = &p->kv;

    *kv = (tr_kv_layer){.dtype = TR_E4M3,
                        .n_pages = (all + TR_PAGE_TOKENS - 1) / TR_PAGE_TOKENS,
                        .d_latent = D_LATENT,
                        .d_rope = D_ROPE,
                        .d_index = D_KEY};
    const size_t pages = (size_t)kv->n_pages,
                 latent =
                     pages * TR_PAGE_TOKENS * tr_kv_row_bytes(kv->dtype, kv->d_latent, kv->d_rope),
                 index = pages * tr_index_page_bytes(kv->dtype, kv->d_index);
    tr_status st = tr_bench_device_take(&p->on, latent, TR_MEMORY_SYMMETRIC, &kv->latent, err);
    if (st == TR_OK) st = tr_bench_device_take(&p->on, index, TR_MEMORY_SYMMETRIC, &kv->index, err);
    return st;
}

/* What writing rows takes, and which rows they are: row j of member m is token j * n_members + m (parallel.md 3.2). */
static tr_status take_rows(place *p, tr_err *err)
{
    const size_t most = (size_t)p->most;
    tr_status st = acts(p, most * (D_LATENT + D_ROPE), &p->kv_a, err);

    if (st == TR_OK) st = acts(p, most * D_KEY, &p->index_k, err);
    if (st == TR_OK) st = numbers(p, D_LATENT, true, &p->norm, err);
    if (st == TR_OK) st = numbers(p, D_KEY, true, &p->k_norm, err);
    if (st == TR_OK) st = numbers(p, D_KEY, true, &p->k_bias, err);
    if (st == TR_OK) st = numbers(p, most * (size_t)p->n_members * D_ROPE, true, &p->rope, err);
    if (st == TR_OK) st = tr_bench_device_take(&p->on, 4, TR_MEMORY_DEVICE, &p->r.n, err);
    if (st == TR_OK)
        st = tr_bench_device_take(&p->on, most * 4, TR_MEMORY_DEVICE, &p->r.position, err);
    if (st == TR_OK)
        st = tr_bench_device_take(&p->on, most * 8, TR_MEMORY_DEVICE, &p->r.write, err);
    p->n_rows = tr_calloc((size_t)p->n_members, sizeof *p->n_rows);
    p->write = tr_calloc(most * (size_t)p->n_members, sizeof *p->write);
    p->seconds = tr_calloc((size_t)p->b->times, sizeof *p->seconds);
    p->bytes = tr_calloc((size_t)p->n_members, sizeof *p->bytes);
    if (st == TR_OK && (!p->n_rows || !p->write || !p->seconds || !p->bytes))
        st = tr_fail(err, TR_E_MEMORY, "out of memory");
    return st;
}

static tr_status set_rows(place *p, int rows, tr_err *err)
{
    const int64_t *own = p->write + (size_t)p->rank * (size_t)rows;
    const tr_ops *ops = p->on.ops;
    int32_t *position = tr_calloc((size_t)rows, sizeof *position);

    if (!position) return tr_fail(err, TR_E_MEMORY, "out of memory");
    p->rows = p->r.n_max = rows;
    for (int m = 0; m < p->n_members; m++) {
        p->n_rows[m] = rows;
        for (int j = 0; j < rows; j++)
            p->write[(size_t)m * (size_t)rows + (size_t)j] = (int64_t)j * p->n_members + m;
    }
    for (int j = 0; j < rows; j++)
        position[j] = j * p->n_members + p->rank;
    const int32_t n = rows;
    tr_status st = ops->upload(p->on.device, TR_LANE_MAIN, p->r.n, &n, sizeof n);
    if (st == TR_OK)
        st = ops->upload(p->on.device, TR_LANE_MAIN, p->r.position, position, (size_t)rows * 4);
    if (st == TR_OK)
        st = ops->upload(p->on.device, TR_LANE_MAIN, p->r.write, own, (size_t)rows * 8);
    free(position);
    return tr_bench_device_status(&p->on, "upload", st, err);
}

/* ---- one layer --------------------------------------------------------------------------------------------------------- */

static tr_status write_keys(place *p, tr_err *err)
{
    const struct tr_kv_write_args a = {.rows = &p->r,
                                       .index_k = p->index_k,
                                       .ld_index_k = D_KEY,
                                       .k_norm = p->k_norm,
                                       .k_bias = p->k_bias,
                                       .rope = p->rope,
                                       .eps = 1e-6f,
                                       .kv = p->kv};
    return tr_bench_device_status(&p->on, "kv_write",
                                  p->on.ops->kv_write(p->on.device, TR_LANE_MAIN, &a), err);
}

static tr_status write_latents(place *p, tr_err *err)
{
    const struct tr_kv_write_args a = {.rows = &p->r,
                                       .kv_a = p->kv_a,
                                       .ld_kv_a = D_LATENT + D_ROPE,
                                       .norm = p->norm,
                                       .rope = p->rope,
                                       .eps = 1e-6f,
                                       .kv = p->kv};
    return tr_bench_device_status(&p->on, "kv_write",
                                  p->on.ops->kv_write(p->on.device, TR_LANE_MAIN, &a), err);
}

static tr_status products(place *p, tr_err *err)
{
    tr_status st = TR_OK;

    for (int i = 0; i < PRODUCTS && st == TR_OK; i++) {
        const struct tr_linear_args a = {.n = p->r.n,
                                         .n_max = p->rows,
                                         .w = &p->w[i],
                                         .in = {.x = p->x, .ld = D_IN, .n_max = p->rows, .d = D_IN},
                                         .out = p->y,
                                         .ld_out = (size_t)widths[i]};
        st = tr_bench_device_status(&p->on, "linear",
                                    p->on.ops->linear(p->on.device, TR_LANE_MAIN, &a), err);
    }
    return st;
}

static tr_status begin(place *p, tr_share *share, void *storage, tr_err *err)
{
    tr_push push;
    tr_status st = tr_share_begin(share, &p->r, storage, &push, err);

    return st == TR_OK ? tr_share_sent(share, TR_LANE_MAIN, err) : st;
}

/* Keys or latents from window to window. */
static tr_status gather(place *p, bool latents, tr_ticket *t, tr_err *err)
{
    const size_t all = (size_t)p->most * (size_t)(1 + p->n_members),
                 row = latents ? LATENT_BYTES : KEY_BYTES;
    char *own = (char *)tr_nccl_window_memory(p->window) + (latents ? all * KEY_BYTES : 0);

    for (int m = 0; m < p->n_members; m++)
        p->bytes[m] = (size_t)p->rows * row;
    return tr_comm_all_gather(tr_nccl_window_comm(p->window), own, own + (size_t)p->most * row,
                              p->bytes, t, err);
}

static tr_status send(place *p, bool latents, unsigned parts, tr_err *err)
{
    tr_status st = TR_OK;

    if (parts & OWN) st = latents ? write_latents(p, err) : write_keys(p, err);
    if (st != TR_OK || !(parts & EXCHANGE)) return st;
    return latents ? begin(p, p->latent, p->kv.latent, err) : begin(p, p->key, p->kv.index, err);
}

/* The same layer with NCCL's gathers alone, begun in front of the products. */
static tr_status one_layer_by_window(place *p, unsigned parts, tr_err *err)
{
    tr_comm *comm = tr_nccl_window_comm(p->window);
    tr_ticket key = {0}, latent = {0};
    tr_status st = parts & OWN ? write_keys(p, err) : TR_OK;

    if (st == TR_OK && parts & EXCHANGE) st = gather(p, false, &key, err);
    if (st == TR_OK && parts & OWN) st = write_latents(p, err);
    if (st == TR_OK && parts & EXCHANGE) st = gather(p, true, &latent, err);
    if (st == TR_OK && parts & PRODUCT) st = products(p, err);
    if (st == TR_OK && parts & EXCHANGE) st = tr_comm_wait(comm, TR_LANE_MAIN, key, err);
    if (st == TR_OK && parts & EXCHANGE) st = tr_comm_wait(comm, TR_LANE_MAIN, latent, err);
    return st;
}

/* As a layer's attention has it (model/attention.c). */
static tr_status one_layer(place *p, unsigned parts, tr_err *err)
{
    if (p->window) return one_layer_by_window(p, parts, err);
    const bool latents_first = tr_share_pushes(p->latent);
    tr_await await;
    tr_status st = send(p, latents_first, parts, err);

    if (st == TR_OK) st = send(p, !latents_first, parts, err);
    if (st == TR_OK && parts & PRODUCT) st = products(p, err);
    if (st == TR_OK && parts & EXCHANGE) st = tr_share_ready(p->key, TR_LANE_MAIN, &await, err);
    if (st == TR_OK && parts & EXCHANGE) st = tr_share_ready(p->latent, TR_LANE_MAIN, &await, err);
    return st;
}

static tr_status layers(place *p, unsigned parts, tr_err *err)
{
    tr_status st = TR_OK;

    for (int i = 0; i < p->layers && st == TR_OK; i++)
        st = one_layer(p, parts, err);
    return st;
}

/* ---- measuring ----------------------------------------------------------------------------------------------------------- */

static tr_status record(place *p, unsigned parts, tr_err *err)
{
    tr_comm *comm = p->window ? tr_nccl_window_comm(p->window) : p->comm;
    tr_status st = p->on.ops->graph_begin(p->on.device, TR_LANE_MAIN);

    if (st != TR_OK) return tr_bench_device_status(&p->on, "graph", st, err);
    tr_comm_set_mode(comm, TR_COMM_RECORD);
    st = layers(p, parts, err);
    tr_comm_set_mode(comm, TR_COMM_RUN);
    if (st != TR_OK) {
        p->on.ops->graph_end(p->on.device, TR_LANE_MAIN, NULL);
        return st;
    }
    return tr_bench_device_status(&p->on, "graph",
                                  p->on.ops->graph_end(p->on.device, TR_LANE_MAIN, &p->graph), err);
}

/* Seconds of a layer. The first run makes NCCL's connections. What the host needs to begin a graph and to see its end is the
 * same for every graph, and falls away in differences; of an exchange alone an eighth of it is in each layer's time. */
static tr_status measure(place *p, unsigned parts, double *out, tr_err *err)
{
    double none = 0;
    tr_status st = layers(p, parts, err);

    if (st == TR_OK) st = tr_bench_device_settle(&p->on, err);
    if (st == TR_OK && p->on.ops->caps & TR_CAP_GRAPH) st = record(p, parts, err);
    for (int i = -WARM_UP; i < p->b->times && st == TR_OK; i++) {
        st = tr_comm_max_number(tr_comm_host(p->comm), &none, err);
        const uint64_t from_ns = tr_now_ns();
        if (st == TR_OK)
            st = p->graph ? tr_bench_device_status(
                                &p->on, "graph",
                                p->on.ops->graph_run(p->on.device, TR_LANE_MAIN, p->graph), err)
                          : layers(p, parts, err);
        if (st == TR_OK) st = tr_bench_device_settle(&p->on, err);
        p->seconds[i < 0 ? 0 : i] = (double)(tr_now_ns() - from_ns) * 1e-9 / p->layers;
    }
    if (p->graph) p->on.ops->graph_free(p->on.device, p->graph);
    p->graph = NULL;
    if (st != TR_OK) return st;
    *out = tr_median(p->seconds, p->b->times);
    return tr_comm_max_number(tr_comm_host(p->comm), out, err);
}

/* Shares of the whole cache; `use` says how their rows go. */
static tr_status open_shares(place *p, tr_peer_use use, char *why, size_t n_why, tr_err *err)
{
    const tr_record key = tr_record_index(&p->kv), latent = tr_record_latent(&p->kv);
    const int all = p->most * p->n_members;
    const size_t index_bytes = (size_t)p->kv.n_pages * key.page_bytes,
                 latent_bytes = (size_t)p->kv.n_pages * latent.page_bytes;
    tr_status st = tr_nccl_push(p->comm, use, why, n_why, err);

    if (st == TR_OK) st = tr_share_open_record(&p->key, p->comm, &key, all, err);
    if (st == TR_OK) st = tr_share_open_record(&p->latent, p->comm, &latent, all, err);
    if (st == TR_OK) st = tr_share_reach(p->key, p->kv.index, index_bytes, err);
    if (st == TR_OK) st = tr_share_reach(p->latent, p->kv.latent, latent_bytes, err);
    return st;
}

static void close_shares(place *p)
{
    tr_share_close(p->key);
    tr_share_close(p->latent);
    p->key = p->latent = NULL;
}

typedef struct result {
    double products, own, whole[N_HOWS], alone[N_HOWS]; /* seconds */
} result;

static tr_status measure_how(place *p, how h, result *r, tr_err *err)
{
    tr_status st = TR_OK;

    for (int i = 0; i < p->b->n_rows && st == TR_OK; i++) {
        st = set_rows(p, p->b->rows[i], err);
        if (st == TR_OK && h != WINDOW) st = tr_share_plan(p->key, p->n_rows, p->write, err);
        if (st == TR_OK && h != WINDOW) st = tr_share_plan(p->latent, p->n_rows, p->write, err);
        if (st == TR_OK && h == PUSH) st = measure(p, PRODUCT, &r[i].products, err);
        if (st == TR_OK && h == PUSH) st = measure(p, OWN | PRODUCT, &r[i].own, err);
        if (st == TR_OK) st = measure(p, OWN | PRODUCT | EXCHANGE, &r[i].whole[h], err);
        if (st == TR_OK) st = measure(p, EXCHANGE, &r[i].alone[h], err);
    }
    return st;
}

/* The yardstick: what NCCL's kernels over peer memory take for the same bytes. Where no member can have a window `why` says so. */
static tr_status measure_window(place *p, result *r, char *why, size_t n_why, tr_err *err)
{
    const size_t all = (size_t)p->most * (size_t)(1 + p->n_members);
    tr_err none;
    tr_status st =
        tr_nccl_window_open(&p->window, p->comm, all * (KEY_BYTES + LATENT_BYTES), &none);

    if (st != TR_OK) {
        snprintf(why, n_why, "%.200s", none.text);
        return TR_OK;
    }
    st = measure_how(p, WINDOW, r, err);
    if (st == TR_OK) st = tr_bench_device_settle(&p->on, err);
    tr_nccl_window_close(p->window);
    p->window = NULL;
    return st;
}

static void print(const place *p, bool pushes, const char *why, const result *r)
{
    if (!pushes) printf("# %d ranks: no rows over peer memory: %s\n", p->n_members, why);
    printf("# exchange of keys and latents, us a layer, %d at a time; exposed: less \"own\"\n"
           "# %-12s %5s %6s %10s %10s %12s %12s %12s %12s %12s %12s\n",
           p->layers, "", "ranks", "rows", "products", "own", "push alone", "exposed", "nccl alone",
           "exposed", "window alone", "exposed");
    for (int i = 0; i < p->b->n_rows; i++) {
        double exposed[N_HOWS];
        for (int h = 0; h < N_HOWS; h++)
            exposed[h] =
                (h == PUSH && !pushes) || r[i].whole[h] <= 0 ? 0 : r[i].whole[h] - r[i].own;
        printf("  %-12s %5d %6d %10.2f %10.2f %12.2f %12.2f %12.2f %12.2f %12.2f %12.2f\n",
               "exchange", p->n_members, p->b->rows[i], r[i].products * 1e6, r[i].own * 1e6,
               r[i].alone[PUSH] * 1e6, exposed[PUSH] * 1e6, r[i].alone[NCCL] * 1e6,
               exposed[NCCL] * 1e6, r[i].alone[WINDOW] * 1e6, exposed[WINDOW] * 1e6);
        printf("{\"bench\": \"comm\", \"device\": \"cuda\", \"op\": \"exchange\", \"ranks\": %d, "
               "\"rows\": %d, \"calls\": %d, \"products_s\": %.9g, \"own_s\": %.9g, "
               "\"pushes\": %s, \"push_s\": %.9g, \"push_exposed_s\": %.9g, "
               "\"nccl_s\": %.9g, \"nccl_exposed_s\": %.9g, \"window_s\": %.9g, "
               "\"window_exposed_s\": %.9g}\n",
               p->n_members, p->b->rows[i], p->b->times, r[i].products, r[i].own,
               pushes ? "true" : "false", r[i].alone[PUSH], exposed[PUSH], r[i].alone[NCCL],
               exposed[NCCL], r[i].alone[WINDOW], exposed[WINDOW]);
    }
    fflush(stdout);
}

static tr_status run(place *p, tr_err *err)
{
    static const tr_peer_use uses[] = {TR_PEER_AUTO, TR_PEER_OFF};
    result *r = tr_calloc((size_t)p->b->n_rows, sizeof *r);
    char why[256] = "", off[256];
    bool pushes = false;
    tr_status st = r ? TR_OK : tr_fail(err, TR_E_MEMORY, "out of memory");

    for (int h = PUSH; h <= NCCL && st == TR_OK; h++) {
        st = open_shares(p, uses[h], h ? off : why, sizeof why, err);
        if (h == PUSH) pushes = tr_nccl_reaches(p->comm, p->kv.latent);
        if (st == TR_OK) st = measure_how(p, (how)h, r, err);
        if (st == TR_OK) st = tr_bench_device_settle(&p->on, err);
        close_shares(p);
    }
    off[0] = '\0';
    if (st == TR_OK) st = measure_window(p, r, off, sizeof off, err);
    if (off[0] && p->b->prints) printf("# %d ranks: no window of NCCL's: %s\n", p->n_members, off);
    if (st == TR_OK && p->b->prints) print(p, pushes, why, r);
    free(r);
    return st;
}

tr_status tr_bench_exchange(const tr_exchange_bench *b, tr_err *err)
{
    const tr_comm *c = b->comm;
    place p = {.b = b,
               .comm = b->comm,
               .on = {.ops = b->ops, .device = b->device},
               .n_members = tr_comm_size(c),
               .rank = tr_comm_rank(c),
               .layers = b->ops->caps & TR_CAP_GRAPH ? LAYERS : 1};
    double none = 0;

    if (!b->n_rows) return TR_OK;
    for (int i = 0; i < b->n_rows; i++)
        if (b->rows[i] > p.most) p.most = b->rows[i];
    tr_status st = take_products(&p, err);
    if (st == TR_OK) st = take_cache(&p, err);
    if (st == TR_OK) st = take_rows(&p, err);
    st = tr_comm_agree(tr_comm_host(p.comm), st, err);
    if (st == TR_OK) st = run(&p, err);
    if (st == TR_OK)
        st = tr_comm_max_number(tr_comm_host(p.comm), &none,
                                err); /* nobody has the others' memory open any more */
    tr_bench_device_release(&p.on);
    free(p.n_rows);
    free(p.write);
    free(p.seconds);
    free(p.bytes);
    return st == TR_OK ? TR_OK : tr_within(err, "exchange of rows");
}
