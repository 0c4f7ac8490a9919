/* For tests of the CUDA backend: the same arguments for the CPU's plain operations and the GPU's.
 * Arrays live in host memory and have a twin on the device; a struct of arguments is made with host
 * pointers, and `twin` replaces them. */
#ifndef TR_TESTS_CUDA_TEST_H
#define TR_TESTS_CUDA_TEST_H

#include <stdbool.h>
#include <string.h>

#include "kernels/number.h"
#include "tests/cpu_test.h"

enum { PAIRS_MAX = 128 };

/* The test suite hides GPUs, so that what it compares runs on one kind of device; these tests want
 * them. */
static inline void show_gpus(void)
{
    const char *gpus = getenv("TR_GPUS");
    if (gpus && strcmp(gpus, "all") == 0)
        unsetenv("CUDA_VISIBLE_DEVICES");
    else if (gpus)
        setenv("CUDA_VISIBLE_DEVICES", gpus, 1);
}

typedef struct pair {
    const void *given; /* the test's initial state */
    tr_device *cpu, *gpu;
    const tr_ops *c, *g;
    uint64_t random;
    int n;
    struct {
        char *host, *back; /* what the CPU works on; what came back from the GPU */
        void *device;
        size_t bytes; /* on the host */
        bool act;     /* numbers of the backend's activations: fp32 on the host */
    } a[PAIRS_MAX];
} pair;

static inline int pair_open(void **state)
{
    pair *p = calloc(1, sizeof *p);
    tr_err err;
    if (!p) return -1;
    p->given = *state;
    p->random = 88172645463325252u;
    if (tr_device_open(&p->cpu, &p->c,
                       &(tr_device_options){.name = "cpu", .n_threads = 1, .isa = "plain"},
                       &err) != TR_OK ||
        tr_device_open(&p->gpu, &p->g, &(tr_device_options){.name = "cuda"}, &err) != TR_OK) {
        print_error("%s\n", err.text);
        return -1;
    }
    *state = p;
    return 0;
}

static inline void pair_clear(pair *p)
{
    for (int i = 0; i < p->n; i++) {
        free(p->a[i].host);
        free(p->a[i].back);
        p->g->release(p->gpu, p->a[i].device);
    }
    p->n = 0;
}

static inline int pair_close(void **state)
{
    pair *p = *state;
    pair_clear(p);
    p->c->close(p->cpu);
    p->g->close(p->gpu);
    free(p);
    return 0;
}

/* Of main: 77 where there is no GPU; an argument names the tests to run, -l lists them. */
static inline int run_on_gpu(int argc, char **argv, const struct CMUnitTest *tests, size_t n)
{
    tr_device *device;
    const tr_ops *ops;
    tr_err err;

    if (argc > 1 && strcmp(argv[1], "-l") == 0) {
        for (size_t i = 0; i < n; i++)
            puts(tests[i].name);
        return 0;
    }
    show_gpus();
    if (tr_device_open(&device, &ops, &(tr_device_options){.name = "cuda"}, &err) != TR_OK) {
        printf("skipped: %s\n", err.text);
        return 77;
    }
    printf("%s\n", tr_device_describe(device));
    ops->close(device);
    if (argc > 1) cmocka_set_test_filter(argv[1]);
    return _cmocka_run_group_tests("tests", tests, n, NULL, NULL);
}

/* An operation of the GPU went well. */
static inline void pair_ok(pair *p, const char *what, tr_status st)
{
    if (st != TR_OK) fail_msg("%s: status %d: %s", what, (int)st, p->g->error(p->gpu));
}

static inline void *array(pair *p, size_t bytes)
{
    assert_true(p->n < PAIRS_MAX);
    const int i = p->n++;
    p->a[i].bytes = bytes ? bytes : 1;
    p->a[i].act = false;
    p->a[i].host = test_alloc(p->a[i].bytes, 1);
    p->a[i].back = test_alloc(p->a[i].bytes, 1);
    pair_ok(p, "alloc", p->g->alloc(p->gpu, p->a[i].bytes, TR_MEMORY_DEVICE, &p->a[i].device));
    return p->a[i].host;
}

static inline float *floats(pair *p, size_t n, float scale)
{
    float *x = array(p, n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = scale * test_float(&p->random);
    return x;
}

/* Activations: what the GPU can hold of them. */
static inline float *acts(pair *p, size_t n, float scale)
{
    float *x = floats(p, n, scale);
    p->a[p->n - 1].act = p->g->act == TR_BF16;
    for (size_t i = 0; i < n && p->g->act == TR_BF16; i++)
        x[i] = tr_round_bf16(x[i]);
    return x;
}

/* Rounded to bf16: what a product on the GPU makes of its input anyway. */
static inline float *round_floats(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        x[i] = tr_round_bf16(x[i]);
    return x;
}

static inline int32_t *word(pair *p, int32_t value)
{
    int32_t *x = array(p, sizeof *x);
    *x = value;
    return x;
}

static inline int find_array(const pair *p, const void *host)
{
    for (int i = 0; i < p->n; i++)
        if ((const char *)host >= p->a[i].host && (const char *)host < p->a[i].host + p->a[i].bytes)
            return i;
    fail_msg("an array that is none");
    return -1;
}

/* The device's address of a host array; NULL stays. */
static inline void *twin(const pair *p, const void *host)
{
    if (!host) return NULL;
    const int i = find_array(p, host);
    return (char *)p->a[i].device + ((const char *)host - p->a[i].host) / (p->a[i].act ? 2 : 1);
}
#define TWIN(p, field) ((field) = twin((p), (const void *)(field)))

static inline tr_rows twin_rows(const pair *p, const tr_rows *rows)
{
    tr_rows r = *rows;
    TWIN(p, r.n);
    TWIN(p, r.n_head);
    TWIN(p, r.token);
    TWIN(p, r.slot);
    TWIN(p, r.position);
    TWIN(p, r.begin);
    TWIN(p, r.write);
    TWIN(p, r.dense);
    TWIN(p, r.head_row);
    TWIN(p, r.target);
    TWIN(p, r.page_table);
    return r;
}

static inline tr_slots twin_slots(const pair *p, const tr_slots *slots)
{
    tr_slots s = *slots;
    TWIN(p, s.length);
    TWIN(p, s.last_token);
    TWIN(p, s.page_table);
    TWIN(p, s.sampling);
    return s;
}

/* All arrays as they are now on the host. */
static inline void push(pair *p)
{
    for (int i = 0; i < p->n; i++) {
        const void *from = p->a[i].host;
        size_t bytes = p->a[i].bytes;
        if (p->a[i].act) {
            const float *x = from;
            uint16_t *half = (uint16_t *)(void *)p->a[i].back;
            for (size_t j = 0; j < bytes / 4; j++)
                half[j] = tr_f32_to_bf16(x[j]);
            from = half;
            bytes /= 2;
        }
        pair_ok(p, "upload", p->g->upload(p->gpu, TR_LANE_MAIN, p->a[i].device, from, bytes));
    }
}

/* Waits; the device's array, fp32 where it holds activations. */
static inline void *pull(pair *p, const void *host)
{
    const int i = find_array(p, host);
    const size_t bytes = p->a[i].act ? p->a[i].bytes / 2 : p->a[i].bytes;
    pair_ok(p, "download",
            p->g->download(p->gpu, TR_LANE_MAIN, p->a[i].back, p->a[i].device, bytes));
    const uint64_t ticket = p->g->ticket(p->gpu, TR_LANE_MAIN);
    int done;
    while ((done = p->g->done(p->gpu, TR_LANE_MAIN, ticket)) == 0)
        continue;
    if (done < 0) fail_msg("the device failed: %s", p->g->error(p->gpu));
    for (size_t j = p->a[i].act ? p->a[i].bytes / 4 : 0; j-- > 0;) { /* from the end, in place */
        uint16_t half;
        memcpy(&half, p->a[i].back + 2 * j, 2);
        ((float *)(void *)p->a[i].back)[j] = tr_bf16_to_f32(half);
    }
    return p->a[i].back + ((const char *)host - p->a[i].host);
}

static inline void same_bytes(pair *p, const char *what, const void *host, size_t bytes)
{
    const unsigned char *want = host, *got = pull(p, host);
    size_t n_wrong = 0, at = 0;
    for (size_t i = bytes; i-- > 0;)
        if (want[i] != got[i]) {
            n_wrong++;
            at = i;
        }
    if (n_wrong)
        fail_msg("%s: %zu of %zu bytes differ, the first at %zu: %02x, not %02x", what, n_wrong,
                 bytes, at, got[at], want[at]);
}

/* |gpu - cpu| <= absolute + relative |cpu|. */
static inline void near(pair *p, const char *what, const float *host, size_t n, double absolute,
                        double relative)
{
    const float *got = pull(p, host);
    double *want = test_alloc(n, sizeof *want), *bound = test_alloc(n, sizeof *bound);
    for (size_t i = 0; i < n; i++) {
        want[i] = (double)host[i];
        bound[i] = absolute;
    }
    test_close(what, got, want, bound, relative, n);
    free(bound);
    free(want);
}

/* The device's q [n_max, d] and scale [ceil(d/128)][n_max rounded up to 4] are what linear would make of n rows of numbers; the
 * others are as they were uploaded. */
static inline void same_codes(pair *p, const char *what, const float *numbers, const uint8_t *q,
                              const float *scale, int n, int n_max, int d, int pow2)
{
    const uint8_t *got = pull(p, q);
    const float *got_scale = pull(p, scale);
    const int ld = (n_max + 3) / 4 * 4;
    for (int r = 0; r < n; r++)
        for (int k = 0; k < d; k += 128) {
            const int end = k + 128 < d ? k + 128 : d;
            const float *x = numbers + (size_t)r * (size_t)d;
            float amax = 0;
            for (int i = k; i < end; i++)
                amax = fmaxf(amax, fabsf(x[i]));
            const float by = pow2 ? tr_ue8m0_scale(amax) : fmaxf(amax, 1e-4f) / 448.0f,
                        s = got_scale[(size_t)(k / 128) * (size_t)ld + (size_t)r];
            if (s != by)
                fail_msg("%s: scale %d of row %d: %g, not %g", what, k / 128, r, (double)s,
                         (double)by);
            for (int i = k; i < end; i++) {
                const size_t at = (size_t)r * (size_t)d + (size_t)i;
                if (got[at] != tr_f32_to_e4m3(x[i] / by))
                    fail_msg("%s: row %d, %d: code %02x of %g by %g", what, r, i, got[at],
                             (double)x[i], (double)by);
            }
        }
    assert_memory_equal(got + (size_t)n * (size_t)d, q + (size_t)n * (size_t)d,
                        (size_t)(n_max - n) * (size_t)d);
}

/* What an activation adds to an error when it is stored. */
static const double act_error = 1.0 / 256;

/* A weight on both: `codes` and scales, or numbers, of n_mats matrices one after the other. piece:
 * cut into two at this row. */
typedef struct weight {
    tr_linear c, g;
    void *src; /* [n_mats][n_out + row0][n_in + col0] as stored */
    float *scale;
    size_t ld, scale_ld;
    int row0, col0, stored_rows;
} weight;

static inline size_t format_bytes(tr_format f)
{
    return f == TR_W_F32 ? 4 : f == TR_W_BF16 ? 2 : 1;
}

/* Element (o, i) of matrix m as it is stored, exact. */
static inline double weight_at(const weight *w, int m, int o, int i)
{
    const size_t row = (size_t)m * (size_t)w->stored_rows + (size_t)(w->row0 + o),
                 at = row * w->ld + (size_t)(w->col0 + i);
    if (w->c.format == TR_W_F32) return (double)((const float *)w->src)[at];
    if (w->c.format == TR_W_BF16) return (double)tr_bf16_to_f32(((const uint16_t *)w->src)[at]);
    const size_t down =
        (size_t)m * (((size_t)w->stored_rows + 127) / 128) + (size_t)(w->row0 + o) / 128;
    return (double)tr_e4m3_to_f32(((const uint8_t *)w->src)[at]) *
           (double)w->scale[down * w->scale_ld + (size_t)(w->col0 + i) / 128];
}

static inline void weight_make(pair *p, weight *w, tr_format format, int n_mats, int n_out,
                               int n_in, int row0, int col0)
{
    memset(w, 0, sizeof *w);
    w->row0 = row0;
    w->col0 = col0;
    w->ld = (size_t)(n_in + col0);
    w->stored_rows = n_out + row0;
    w->scale_ld = (w->ld + 127) / 128;
    const size_t n = (size_t)n_mats * (size_t)w->stored_rows * w->ld,
                 n_scales = (size_t)n_mats * (((size_t)w->stored_rows + 127) / 128) * w->scale_ld;
    w->src = test_alloc(n, format_bytes(format));
    w->scale = test_alloc(n_scales, sizeof *w->scale);
    for (size_t i = 0; i < n; i++) {
        const float x = test_float(&p->random);
        if (format == TR_W_F32) ((float *)w->src)[i] = x;
        if (format == TR_W_BF16) ((uint16_t *)w->src)[i] = tr_f32_to_bf16(x);
        if (format == TR_W_E4M3_B128) ((uint8_t *)w->src)[i] = tr_f32_to_e4m3(200 * x);
    }
    for (size_t i = 0; i < n_scales; i++)
        w->scale[i] = ldexpf(1, -8 + (int)(test_bits(&p->random) % 4));
    w->c = w->g = (tr_linear){.format = format, .n_mats = n_mats, .n_out = n_out, .n_in = n_in};
    assert_int_equal(
        p->c->alloc(p->cpu, p->c->linear_bytes(format, n_mats, n_out, n_in), 0, &w->c.data), TR_OK);
    pair_ok(p, "alloc",
            p->g->alloc(p->gpu, p->g->linear_bytes(format, n_mats, n_out, n_in), 0, &w->g.data));
}

/* Rows [o, o + n) of matrix m of both. */
static inline void weight_pack(pair *p, weight *w, int m, int o, int n)
{
    const size_t down =
        (size_t)m * (((size_t)w->stored_rows + 127) / 128) + (size_t)(w->row0 + o) / 128;
    const size_t at =
        ((size_t)m * (size_t)w->stored_rows + (size_t)(w->row0 + o)) * w->ld + (size_t)w->col0;
    const tr_linear_src s = {.src = (const char *)w->src + at * format_bytes(w->c.format),
                             .ld = w->ld,
                             .scale = w->scale + down * w->scale_ld + (size_t)w->col0 / 128,
                             .scale_ld = w->scale_ld,
                             .row0 = (w->row0 + o) % 128,
                             .col0 = w->col0 % 128,
                             .i_mat = m,
                             .o_begin = o,
                             .n_out = n};
    assert_int_equal(p->c->linear_pack(p->cpu, &w->c, &s), TR_OK);
    pair_ok(p, "linear_pack", p->g->linear_pack(p->gpu, &w->g, &s));
}

static inline void weight_new(pair *p, weight *w, tr_format format, int n_mats, int n_out, int n_in,
                              int row0, int col0)
{
    weight_make(p, w, format, n_mats, n_out, n_in, row0, col0);
    for (int m = 0; m < n_mats; m++)
        weight_pack(p, w, m, 0, n_out);
}

static inline void weight_free(pair *p, weight *w)
{
    p->c->release(p->cpu, w->c.data);
    p->g->release(p->gpu, w->g.data);
    free(w->src);
    free(w->scale);
}

#endif
