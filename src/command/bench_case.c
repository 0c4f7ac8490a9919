#include <config.h>

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/size.h"
#include "command/bench_kernels.h"
#include "kernels/number.h"

enum {
    MIN_REPS = 5,
    LINE_NS = 250000000 /* no more runs after so long, reading between them included */
};

/* ---- operands --------------------------------------------------------------------------------------------------- */

static uint64_t next_random(tr_kbench *b)
{
    b->random = b->random * 6364136223846793005u + 1442695040888963407u;
    return b->random >> 33;
}

int tr_bench_pick(tr_kbench *b, int n)
{
    return (int)(next_random(b) % (uint64_t)n);
}

double tr_bench_uniform(tr_kbench *b)
{
    return (double)next_random(b) * 0x1p-30 - 1.0;
}

static void *host(tr_kbench *b, size_t bytes)
{
    void *p = b->n_host < TR_BENCH_OWNED ? tr_calloc(bytes, 1) : NULL;
    if (p) b->on_host[b->n_host++] = p;
    return p;
}

static tr_status device(tr_kbench *b, size_t bytes, void **out, tr_err *err)
{
    tr_status st =
        b->n_device < TR_BENCH_OWNED ? b->ops->alloc(b->device, bytes, 0, out) : TR_E_MEMORY;
    if (st != TR_OK) return tr_fail(err, st, "bench: %zu bytes of device memory", bytes);
    b->on_device[b->n_device++] = *out;
    return TR_OK;
}

tr_status tr_bench_zeros(tr_kbench *b, size_t bytes, tr_operand *out, tr_err *err)
{
    *out = (tr_operand){.bytes = bytes, .h = host(b, bytes)};
    if (!out->h) return tr_fail(err, TR_E_MEMORY, "bench: %zu bytes", bytes);
    tr_status st = device(b, bytes, &out->d, err);
    return st == TR_OK ? tr_bench_send(b, out, err) : st;
}

tr_status tr_bench_send(tr_kbench *b, tr_operand *x, tr_err *err)
{
    tr_status st = b->ops->upload(b->device, TR_LANE_MAIN, x->d, x->h, x->bytes);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "upload: %s", b->ops->error(b->device));
}

tr_status tr_bench_fetch(tr_kbench *b, tr_operand *x, tr_err *err)
{
    tr_status st = b->ops->download(b->device, TR_LANE_MAIN, x->h, x->d, x->bytes);
    return st == TR_OK ? TR_OK : tr_fail(err, st, "download: %s", b->ops->error(b->device));
}

tr_status tr_bench_floats(tr_kbench *b, size_t n, float size, tr_operand *out, tr_err *err)
{
    tr_status st = tr_bench_zeros(b, n * sizeof(float), out, err);
    if (st != TR_OK) return st;
    for (size_t i = 0; i < n; i++)
        ((float *)out->h)[i] = size * (float)tr_bench_uniform(b);
    return tr_bench_send(b, out, err);
}

tr_status tr_bench_word(tr_kbench *b, int32_t value, int32_t **out, tr_err *err)
{
    tr_operand x;
    tr_status st = tr_bench_zeros(b, sizeof value, &x, err);
    if (st != TR_OK) return st;
    *(int32_t *)x.h = value;
    *out = x.d;
    return tr_bench_send(b, &x, err);
}

tr_format tr_bench_format(const tr_kbench *b)
{
    return b->config.fp8 ? TR_W_E4M3_B128 : TR_W_BF16;
}

/* Random numbers of a format, and scales of about 1/16 a block. */
static tr_status make_numbers(tr_kbench *b, tr_matrix *m, tr_err *err)
{
    const size_t n = (size_t)m->n_out * (size_t)m->n_in;
    const size_t blocks = tr_ceil_div((size_t)m->n_out, 128) * (size_t)m->scale_ld;
    void *numbers = host(b, n * (m->format == TR_W_E4M3_B128 ? 1 : 2));
    float *scale = host(b, blocks * sizeof *scale);
    if (!numbers || !scale) return tr_fail(err, TR_E_MEMORY, "bench: a weight of %zu numbers", n);
    for (size_t i = 0; i < n; i++) {
        const uint32_t r = (uint32_t)next_random(b);
        if (m->format ==
            TR_W_E4M3_B128) /* up to 15.5: exponents above would be NaN or all too large */
            ((uint8_t *)numbers)[i] = (uint8_t)(r & 0x80u) | (uint8_t)(r % 0x5f);
        else
            ((uint16_t *)numbers)[i] = tr_f32_to_bf16((float)r * 0x1p-30f - 1.0f);
    }
    for (size_t i = 0; i < blocks; i++)
        scale[i] = 0.0625f + 0.03f * (float)tr_bench_uniform(b);
    m->numbers = numbers;
    m->scale = scale;
    return TR_OK;
}

tr_status tr_bench_weight(tr_kbench *b, tr_format format, int n_mats, int n_out, int n_in,
                          int transposed, tr_linear *w, tr_matrix *numbers, tr_err *err)
{
    *w = (tr_linear){.format = format, .n_mats = n_mats, .n_out = n_out, .n_in = n_in};
    *numbers = (tr_matrix){
        .format = format, .n_out = transposed ? n_in : n_out, .n_in = transposed ? n_out : n_in};
    numbers->scale_ld = (int)tr_ceil_div((size_t)numbers->n_in, 128);
    tr_status st = make_numbers(b, numbers, err);
    if (st == TR_OK)
        st = device(b, b->ops->linear_bytes(format, n_mats, n_out, n_in), &w->data, err);
    for (int i = 0; i < n_mats && st == TR_OK; i++) {
        const tr_linear_src src = {.src = numbers->numbers,
                                   .ld = (size_t)numbers->n_in,
                                   .transposed = transposed,
                                   .scale = format == TR_W_E4M3_B128 ? numbers->scale : NULL,
                                   .scale_ld = (size_t)numbers->scale_ld,
                                   .i_mat = i,
                                   .n_out = n_out};
        st = b->ops->linear_pack(b->device, w, &src);
        if (st != TR_OK) st = tr_fail_of(err, st, "linear_pack", b->ops->error(b->device));
    }
    return st;
}

double tr_matrix_at(const tr_matrix *m, int o, int i)
{
    const size_t at = (size_t)o * (size_t)m->n_in + (size_t)i;
    if (m->format != TR_W_E4M3_B128)
        return (double)tr_bf16_to_f32(((const uint16_t *)m->numbers)[at]);
    return (double)tr_e4m3_to_f32(((const uint8_t *)m->numbers)[at]) *
           (double)m->scale[o / 128 * m->scale_ld + i / 128];
}

double tr_matrix_dot(const tr_matrix *m, int o, const float *x)
{
    double sum = 0;
    for (int i = 0; i < m->n_in; i++)
        sum += (double)x[i] * tr_matrix_at(m, o, i);
    return sum;
}

void tr_bench_case_end(tr_kbench *b)
{
    for (int i = 0; i < b->n_device; i++)
        b->ops->release(b->device, b->on_device[i]);
    for (int i = 0; i < b->n_host; i++)
        free(b->on_host[i]);
    b->n_device = b->n_host = 0;
}

/* ---- timing ------------------------------------------------------------------------------------------------------- */

typedef struct reader {
    const uint64_t *from;
    size_t n;
    uint64_t seen;
    pthread_t thread;
    bool started;
} reader;

static void *read_main(void *arg)
{
    reader *r = arg;
    for (size_t i = 0; i < r->n; i += 8) /* a line */
        r->seen ^= r->from[i];
    return NULL;
}

/* As many threads as the device has read their parts of a block larger than the caches. What none could be started for
 * the caller reads. */
static void flush(tr_kbench *b)
{
    enum { READERS_MAX = 256 };
    const int n = b->n_threads < READERS_MAX ? b->n_threads : READERS_MAX;
    reader part[READERS_MAX];

    for (int i = 0; i < n; i++) {
        const size_t begin = b->flush_words / (size_t)n * (size_t)i;
        part[i] = (reader){.from = b->flush + begin, .n = b->flush_words / (size_t)n};
        part[i].started = i > 0 && pthread_create(&part[i].thread, NULL, read_main, &part[i]) == 0;
    }
    for (int i = 0; i < n; i++) {
        if (part[i].started)
            pthread_join(part[i].thread, NULL);
        else
            read_main(&part[i]);
        b->seen ^= part[i].seen;
    }
}

static void touch(tr_kbench *b, const tr_operand *x)
{
    for (size_t i = 0; i < x->bytes; i += 64)
        b->seen ^= (uint64_t)((const volatile char *)x->d)[i];
}

static int ascending(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static tr_status call(tr_kbench *b, tr_bench_op op, const void *args)
{
    switch (op) {
#define CALL(name)                                                                                 \
    case TR_BENCH_##name:                                                                          \
        return b->ops->name(b->device, TR_LANE_MAIN, args);
        /* clang-format off */
        TR_OPS(CALL)
        /* clang-format on */
#undef CALL
    case TR_N_BENCH_OPS:
        break;
    }
    return TR_E_USAGE;
}

tr_status tr_bench_time(tr_kbench *b, tr_line *line, const void *args, tr_err *err)
{
    const uint64_t start = tr_now_ns();
    uint64_t took[TR_BENCH_REPS];
    int n = 0;

    for (int i = -1; i < TR_BENCH_REPS && (i < MIN_REPS || tr_now_ns() - start < LINE_NS); i++) {
        flush(b);
        for (int j = 0; j < TR_BENCH_WARM; j++)
            touch(b, &line->warm[j]);
        const uint64_t begun = tr_now_ns();
        tr_status st = call(b, line->op, args);
        while (st == TR_OK &&
               !b->ops->done(b->device, TR_LANE_MAIN, b->ops->ticket(b->device, TR_LANE_MAIN)))
            continue;
        const uint64_t t = tr_now_ns() - begun;
        if (st != TR_OK) return tr_fail(err, st, "bench: %s", b->ops->error(b->device));
        if (i < 0) continue; /* first touch of outputs, threads, tables */
        took[n++] = t;
    }
    qsort(took, (size_t)n, sizeof *took, ascending);
    line->reps = n;
    line->median = (double)took[n / 2] * 1e-9;
    line->low = (double)took[0] * 1e-9;
    return TR_OK;
}

tr_status tr_bench_product(tr_kbench *b, int m, int n, int k, double *seconds, tr_err *err)
{
    const size_t w_bytes = (size_t)n * (size_t)k * sizeof(float);
    tr_status st = TR_OK;
    uint64_t best = UINT64_MAX;

    if (!b->blas || w_bytes > (size_t)256 << 20) {
        *seconds = NAN;
        return TR_OK;
    }
    float *x = tr_calloc((size_t)m * (size_t)k, sizeof *x), *w = malloc(w_bytes),
          *y = tr_calloc((size_t)m * (size_t)n, sizeof *y);
    if (!x || !w || !y) st = tr_fail(err, TR_E_MEMORY, "bench: out of memory");
    for (size_t i = 0; st == TR_OK && i < w_bytes / sizeof *w; i++)
        w[i] = (float)(i % 251) - 125.0f;
    for (size_t i = 0; st == TR_OK && i < (size_t)m * (size_t)k; i++)
        x[i] = (float)(i % 127) - 63.0f;
    if (st == TR_OK) tr_blas_settle();
    for (int i = 0; i < 3 && st == TR_OK; i++) {
        flush(b);
        const uint64_t begun = tr_now_ns();
        tr_blas_product(b->blas, m, n, k, x, w, y);
        const uint64_t t = tr_now_ns() - begun;
        if (t < best) best = t;
    }
    if (st == TR_OK) tr_blas_settle();
    *seconds += (double)best * 1e-9;
    free(x);
    free(w);
    free(y);
    return st;
}

/* ---- the table ------------------------------------------------------------------------------------------------------ */

static const char *const op_name[TR_N_BENCH_OPS] = {
#define NAME(name) #name,
    TR_OPS(NAME)
#undef NAME
};

/* A number of the table, or a dash. */
static void column(int width, int digits, double x, const char *unit)
{
    if (x > 0)
        printf(" %*.*f%s", width, digits, x, unit);
    else
        printf(" %*s%s", width, "-", *unit ? " " : "");
}

void tr_bench_print_line(const tr_kbench *b, const tr_line *l)
{
    const double bytes = l->work.bytes / l->median, flops = l->work.flops / l->median;
    const double sgemm = l->sgemm_flops_per_s > 0 ? l->sgemm_flops_per_s : 0; /* NaN too */
    printf("  %-12s %-28s %4d %12.1f %12.1f", op_name[l->op], l->shape, l->reps, l->median * 1e6,
           l->low * 1e6);
    column(8, 2, bytes * 1e-9, "");
    column(5, 1, 100 * bytes / b->ceilings.read_bytes_per_s, "%");
    column(8, 1, flops * 1e-9, "");
    column(5, 1, 100 * flops / b->ceilings.fma_flops_per_s, "%");
    column(8, 1, sgemm * 1e-9, "");
    if (isnan(l->error))
        printf(" %9s\n", "-");
    else
        printf(" %9.1e\n", l->error);
    printf("{\"bench\": \"kernel\", \"op\": \"%s\", \"shape\": \"%s\", \"reps\": %d, \"median_s\": "
           "%.9f, \"min_s\": %.9f, \"bytes\": %.0f, \"flops\": %.0f, \"read_fraction\": %.7f, "
           "\"fma_fraction\": %.7f",
           op_name[l->op], l->shape, l->reps, l->median, l->low, l->work.bytes, l->work.flops,
           bytes / b->ceilings.read_bytes_per_s, flops / b->ceilings.fma_flops_per_s);
    if (sgemm > 0)
        printf(", \"sgemm_flops_per_s\": %.0f, \"sgemm_fraction\": %.4f", sgemm, flops / sgemm);
    if (!isnan(l->error)) printf(", \"error\": %.3e", l->error);
    printf("}\n");
    fflush(stdout);
}
