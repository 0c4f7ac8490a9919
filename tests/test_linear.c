#include <config.h>

#include <string.h>

#include "cpu_test.h"
#include "kernels/cpu/cpu_priv.h"
#include "kernels/number.h"

/* A piece of a stored tensor in each format, and its numbers in double. */
typedef struct stored {
    tr_format format;
    int rows, columns; /* as cut: the piece begins at (row0, col0) of its scale grid */
    int row0, col0, scale_ld;
    void *data;
    float *scale;
    double *value; /* [rows, columns] */
} stored;

static stored make_stored(uint64_t *seed, tr_format format, int rows, int columns, int row0,
                          int col0)
{
    stored s = {format, rows, columns, row0, col0, (col0 + columns + 127) / 128, NULL, NULL, NULL};
    size_t n = (size_t)rows * (size_t)columns;
    size_t n_scales = (size_t)((row0 + rows + 127) / 128) * (size_t)s.scale_ld;
    s.data = test_alloc(n, 4);
    s.value = test_alloc(n, sizeof *s.value);
    s.scale = test_alloc(n_scales, sizeof *s.scale);
    for (size_t i = 0; i < n_scales; i++)
        s.scale[i] = ldexpf(1.5f + 0.25f * test_float(seed), (int)(test_bits(seed) % 7) - 9);
    for (size_t i = 0; i < n; i++) {
        size_t block = (size_t)(row0 + (int)(i / (size_t)columns)) / 128 * (size_t)s.scale_ld +
                       (size_t)(col0 + (int)(i % (size_t)columns)) / 128;
        if (format == TR_W_F32) {
            float x = test_float(seed);
            ((float *)s.data)[i] = x;
            s.value[i] = (double)x;
        } else if (format == TR_W_BF16) {
            uint16_t x = tr_f32_to_bf16(test_float(seed));
            ((uint16_t *)s.data)[i] = x;
            s.value[i] = (double)tr_bf16_to_f32(x);
        } else { /* all codes, but no NaN; subnormals and zeros in every third run of 32 columns */
            uint8_t x = (uint8_t)test_bits(seed);
            if (i % (size_t)columns / 32 % 3 && (x & 0x78) == 0) x |= 0x08;
            if ((x & 0x7f) == 0x7f) x = 0x01;
            ((uint8_t *)s.data)[i] = x;
            s.value[i] = (double)tr_e4m3_to_f32(x) * (double)s.scale[block];
        }
    }
    return s;
}

static void free_stored(stored *s)
{
    free(s->data);
    free(s->value);
    free(s->scale);
}

static void pack(const test_cpu *cpu, tr_linear *w, const stored *s, int transposed, int i_mat,
                 int o_begin, int n_out)
{
    tr_linear_src src = {
        .src = s->data,
        .ld = (size_t)s->columns,
        .transposed = transposed,
        .scale = s->scale,
        .scale_ld = (size_t)s->scale_ld,
        .row0 = s->row0,
        .col0 = s->col0,
        .i_mat = i_mat,
        .o_begin = o_begin,
        .n_out = n_out,
    };
    assert_int_equal(cpu->ops->linear_pack(cpu->d, w, &src), TR_OK);
}

static tr_linear make_linear(const test_cpu *cpu, tr_format format, int n_mats, int n_out, int n_in)
{
    tr_linear w = {.format = format, .n_mats = n_mats, .n_out = n_out, .n_in = n_in};
    size_t bytes = cpu->ops->linear_bytes(format, n_mats, n_out, n_in);
    assert_int_equal(cpu->ops->alloc(cpu->d, bytes, 0, &w.data), TR_OK);
    return w;
}

/* out [n, n_out] through the operation; the rest of a poisoned row must stay. */
static void linear(const test_cpu *cpu, const tr_linear *w, const float *x, int n, float *out)
{
    const size_t ld = (size_t)w->n_out + 3;
    float *padded = test_alloc((size_t)(n + 1) * ld, sizeof *padded);
    int32_t live = n;
    for (size_t i = 0; i < (size_t)(n + 1) * ld; i++)
        padded[i] = 12345.0f;
    struct tr_linear_args a = {
        .n = &live,
        .n_max = n + 1,
        .w = w,
        .in = {.x = (void *)(uintptr_t)x, .ld = (size_t)w->n_in, .n_max = n + 1, .d = w->n_in},
        .out = padded,
        .ld_out = ld,
        .out_f32 = 1,
    };
    assert_int_equal(cpu->ops->linear(cpu->d, TR_LANE_MAIN, &a), TR_OK);
    for (int r = 0; r <= n; r++)
        for (size_t o = 0; o < ld; o++) {
            float y = padded[(size_t)r * ld + o];
            if (r < n && o < (size_t)w->n_out)
                out[(size_t)r * (size_t)w->n_out + o] = y;
            else if (y != 12345.0f)
                fail_msg("row %d, column %zu was written", r, o);
        }
    free(padded);
}

/* want[r, o] = sum_i x[r, i] w[o, i], and what rounding may do to it: a few units of the sum of
 * magnitudes. */
static void reference(const stored *s, int transposed, const float *x, int n, int n_out, int n_in,
                      double *want, double *bound)
{
    for (int r = 0; r < n; r++)
        for (int o = 0; o < n_out; o++) {
            double sum = 0, magnitude = 0;
            for (int i = 0; i < n_in; i++) {
                size_t at = transposed ? (size_t)i * (size_t)s->columns + (size_t)o
                                       : (size_t)o * (size_t)s->columns + (size_t)i;
                double p = (double)x[(size_t)r * (size_t)n_in + (size_t)i] * s->value[at];
                sum += p;
                magnitude += fabs(p);
            }
            want[(size_t)r * (size_t)n_out + (size_t)o] = sum;
            bound[(size_t)r * (size_t)n_out + (size_t)o] = 0x1p-21 * magnitude;
        }
}

/* One shape in one format, on every instruction set, with few rows and with more. */
static void check_shape(uint64_t *seed, tr_format format, int n_out, int n_in, int row0, int col0,
                        int transposed)
{
    enum { N = 9 };
    static const int counts[] = {1, 4, N};
    stored s = transposed ? make_stored(seed, format, n_in, n_out, row0, col0)
                          : make_stored(seed, format, n_out, n_in, row0, col0);
    float *x = test_floats(seed, (size_t)N * (size_t)n_in);
    size_t n_y = (size_t)N * (size_t)n_out;
    double *want = test_alloc(n_y, sizeof *want), *bound = test_alloc(n_y, sizeof *bound);
    float *y = test_alloc(n_y, sizeof *y);

    reference(&s, transposed, x, N, n_out, n_in, want, bound);
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, 1)) continue;
        tr_linear w = make_linear(&cpu, format, 1, n_out, n_in);
        pack(&cpu, &w, &s, transposed, 0, 0, n_out);
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
            char what[128];
            snprintf(what, sizeof what, "%s, format %d, [%d, %d] at (%d, %d)%s, %d rows",
                     test_isas[i], (int)format, n_out, n_in, row0, col0,
                     transposed ? " transposed" : "", counts[c]);
            linear(&cpu, &w, x, counts[c], y);
            test_close(what, y, want, bound, 0x1p-22, (size_t)counts[c] * (size_t)n_out);
        }
        cpu.ops->close(cpu.d);
    }
    free_stored(&s);
    free(x);
    free(want);
    free(bound);
    free(y);
}

static void shapes(void **state)
{
    static const int outs[] = {1, 15, 16, 17, 100, 576};
    static const int ins[] = {1, 16, 64, 127, 128, 129, 256, 1536};
    static const tr_format formats[] = {TR_W_F32, TR_W_BF16, TR_W_E4M3_B128};
    uint64_t seed = 1;
    (void)state;
    for (size_t o = 0; o < sizeof outs / sizeof *outs; o++)
        for (size_t i = 0; i < sizeof ins / sizeof *ins; i++) {
            if (outs[o] == 576 && ins[i] == 1536) { /* one format is enough of the largest */
                check_shape(&seed, TR_W_E4M3_B128, outs[o], ins[i], 0, 0, 0);
                continue;
            }
            for (size_t f = 0; f < 3; f++)
                check_shape(&seed, formats[f], outs[o], ins[i], 0, 0, 0);
        }
}

/* Pieces that begin inside a scale block, straight and transposed. */
static void offsets(void **state)
{
    static const int at[][2] = {{0, 1}, {1, 0}, {64, 64}, {127, 127}, {37, 93}, {130, 259}};
    static const int shape[][2] = {{1, 1}, {16, 2}, {17, 128}, {100, 130}, {200, 300}};
    uint64_t seed = 2;
    (void)state;
    for (size_t a = 0; a < sizeof at / sizeof *at; a++)
        for (size_t s = 0; s < sizeof shape / sizeof *shape; s++)
            for (int transposed = 0; transposed < 2; transposed++)
                check_shape(&seed, TR_W_E4M3_B128, shape[s][0], shape[s][1], at[a][0], at[a][1],
                            transposed);
    check_shape(&seed, TR_W_BF16, 33, 70, 5, 9, 1);
    check_shape(&seed, TR_W_F32, 33, 70, 5, 9, 1);
}

/* gate and up of several experts: two pieces with their own scale grids in each of three matrices,
 * the second one beginning inside a panel. */
static void pieces(void **state)
{
    enum { MATS = 3, GATE = 21, UP = 30, OUT = GATE + UP, IN = 200, N = 7 };
    uint64_t seed = 3;
    float *x = test_floats(&seed, N * IN);
    float y[N * OUT], part[N * OUT];
    (void)state;
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, 2)) continue;
        tr_linear w = make_linear(&cpu, TR_W_E4M3_B128, MATS, OUT, IN);
        stored gate[MATS], up[MATS];
        for (int m = 0; m < MATS; m++) {
            gate[m] = make_stored(&seed, TR_W_E4M3_B128, GATE, IN, 120, 16 * m);
            up[m] = make_stored(&seed, TR_W_E4M3_B128, UP, IN, 3, 16 * m);
            pack(&cpu, &w, &gate[m], 0, m, 0, GATE);
            pack(&cpu, &w, &up[m], 0, m, GATE, UP);
        }
        for (int m = 0; m < MATS; m++) {
            tr_gemm g = {.w = &w, .i_mat = m, .x = x, .ldx = IN, .y = y, .ldy = OUT, .n_rows = N};
            double want[N * OUT], bound[N * OUT];
            tr_cpu_gemm_all(cpu.d, &g);
            for (int p = 0; p < 2; p++) {
                int n_out = p ? UP : GATE;
                reference(p ? &up[m] : &gate[m], 0, x, N, n_out, IN, want, bound);
                for (int r = 0; r < N; r++)
                    memcpy(part + r * n_out, y + r * OUT + (p ? GATE : 0),
                           (size_t)n_out * sizeof *y);
                test_close("piece", part, want, bound, 0x1p-22, (size_t)(N * n_out));
            }
            free_stored(&gate[m]);
            free_stored(&up[m]);
        }
        cpu.ops->close(cpu.d);
    }
    free(x);
}

static void assert_rows_equal(const char *what, const float *a, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (tr_f32_bits(a[i]) != tr_f32_bits(b[i])) {
            print_error("%s: element %zu: %.9g is not %.9g\n", what, i, (double)a[i], (double)b[i]);
            fail();
        }
}

/* y of `all` rows is the reference; rows [r, r + n) alone, in every grouping of panels and threads,
 * have its bits. */
static void check_identity(const test_cpu *cpu, const tr_linear *w, const float *x, int all,
                           const char *what)
{
    const int n_panels = tr_n_panels(w->n_out);
    const size_t n_in = (size_t)w->n_in, n_out = (size_t)w->n_out;
    float *y = test_alloc((size_t)all * n_out, sizeof *y);
    float *z = test_alloc((size_t)all * n_out, sizeof *z);
    tr_gemm g = {.w = w, .x = x, .ldx = n_in, .y = y, .ldy = n_out, .n_rows = all};

    tr_cpu_gemm_panels(cpu->d, &g, 0, n_panels);
    for (int n = 1; n <= all; n += n < 40 ? 1 : 31) {
        int r = all - n;
        g = (tr_gemm){.w = w, .x = x + (size_t)r * n_in, .ldx = n_in, .ldy = n_out, .n_rows = n};
        g.y = z;
        memset(z, 0xff, (size_t)all * n_out * sizeof *z);
        int step = n % 5 + 1; /* groupings of 1 to 5 panels */
        for (int p = 0; p < n_panels; p += step)
            tr_cpu_gemm_panels(cpu->d, &g, p, p + step < n_panels ? p + step : n_panels);
        assert_rows_equal(what, z, y + (size_t)r * n_out, (size_t)n * n_out);
        memset(z, 0xff, (size_t)all * n_out * sizeof *z);
        tr_cpu_gemm_all(cpu->d, &g);
        assert_rows_equal(what, z, y + (size_t)r * n_out, (size_t)n * n_out);
    }
    free(y);
    free(z);
}

static void rows_do_not_depend_on_each_other(void **state)
{
    static const tr_format formats[] = {TR_W_F32, TR_W_BF16, TR_W_E4M3_B128};
    enum { OUT = 100, IN = 210, N = 40 };
    uint64_t seed = 4;
    float *x = test_floats(&seed, N * IN);
    (void)state;
    for (int i = 0; i < TEST_N_ISAS; i++)
        for (int f = 0; f < 3; f++)
            for (int threads = 1; threads <= 3; threads += 2) {
                test_cpu cpu;
                char what[64];
                if (!test_cpu_open(&cpu, i, threads)) continue;
                stored s = make_stored(&seed, formats[f], OUT, IN, 9, 50);
                tr_linear w = make_linear(&cpu, formats[f], 1, OUT, IN);
                snprintf(what, sizeof what, "%s, format %d, %d threads", test_isas[i], f, threads);
                pack(&cpu, &w, &s, 0, 0, 0, OUT);
                check_identity(&cpu, &w, x, N, what);
                free_stored(&s);
                cpu.ops->close(cpu.d);
            }
    free(x);
}

/* One size of fp8 weights on every instruction set. */
static void check_size(int n_out, int n_in, int n, int n_threads, uint64_t seed, int col0)
{
    float *x = test_floats(&seed, (size_t)n * (size_t)n_in);
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, n_threads)) continue;
        stored s = make_stored(&seed, TR_W_E4M3_B128, n_out, n_in, 0, col0);
        tr_linear w = make_linear(&cpu, TR_W_E4M3_B128, 1, n_out, n_in);
        pack(&cpu, &w, &s, 0, 0, 0, n_out);
        check_identity(&cpu, &w, x, n, test_isas[i]);
        free_stored(&s);
        cpu.ops->close(cpu.d);
    }
    free(x);
}

/* More rows than one expansion of the weights serves. */
static void many_rows(void **state)
{
    (void)state;
    check_size(37, 140, 200, 3, 5, 0);
}

/* More columns than are turned, or cut into parts, at a time; the last panel is not full, the last group neither. */
static void many_columns(void **state)
{
    (void)state;
    check_size(20, 16384 + 131, 18, 1, 12, 50);
    check_size(230, 8192 + 131, 18, 3, 13,
               0); /* threads take panels from each other, and keep them in every pass */
}

/* row_index and out_index, with threads that share rows (more threads than panels). */
static void indexed_rows(void **state)
{
    enum { OUT = 20, IN = 131, N = 41 };
    uint64_t seed = 6;
    float *x = test_floats(&seed, N * IN);
    float y[N * OUT], z[N * OUT];
    int32_t from[N], to[N];
    (void)state;
    for (int r = 0; r < N; r++) {
        from[r] = (r * 7 + 3) % N;
        to[r] = (r * 11 + 5) % N;
    }
    for (int i = 0; i < TEST_N_ISAS; i++)
        for (int threads = 1; threads <= 7; threads += 2) {
            test_cpu cpu;
            if (!test_cpu_open(&cpu, i, threads)) continue;
            stored s = make_stored(&seed, TR_W_BF16, OUT, IN, 0, 0);
            tr_linear w = make_linear(&cpu, TR_W_BF16, 1, OUT, IN);
            pack(&cpu, &w, &s, 0, 0, 0, OUT);
            tr_gemm g = {.w = &w, .x = x, .ldx = IN, .y = y, .ldy = OUT, .n_rows = N};
            tr_cpu_gemm_all(cpu.d, &g);
            g.row_index = from;
            g.out_index = to;
            g.y = z;
            tr_cpu_gemm_all(cpu.d, &g);
            for (int r = 0; r < N; r++)
                assert_rows_equal(test_isas[i], z + to[r] * OUT, y + from[r] * OUT, OUT);
            free_stored(&s);
            cpu.ops->close(cpu.d);
        }
    free(x);
}

typedef struct source { /* for linear_fill and table_fill */
    const char *data;
    size_t row_bytes;
    int bad; /* this row cannot be read */
} source;

static tr_status read_source(void *ctx, int row, int n, void *dst)
{
    const source *s = ctx;
    if (row <= s->bad && s->bad < row + n) return TR_E_IO;
    memcpy(dst, s->data + (size_t)row * s->row_bytes, (size_t)n * s->row_bytes);
    return TR_OK;
}

/* Rows that the threads read themselves: the bits that linear_pack writes, pieces that begin inside panels and scale blocks
 * included, and panels larger than what is read at once. */
static void filled_matrices(void **state)
{
    static const struct {
        int rows, columns, row0, col0, o_begin, n_out;
    } pieces[] = {{100, 150, 0, 0, 0, 100}, {331, 200, 57, 70, 5, 340}, {70, 9000, 3, 1, 16, 90}};
    static const tr_format formats[] = {TR_W_E4M3_B128, TR_W_BF16, TR_W_F32};
    uint64_t seed = 11;
    (void)state;
    for (int k = 0; k < 27; k++) {
        const int threads = k % 3 + 1, p = k / 3 % 3;
        const tr_format format = formats[k / 9];
        test_cpu cpu;
        if (!test_cpu_open(&cpu, TEST_N_ISAS - 1, threads) && !test_cpu_open(&cpu, 0, threads))
            continue;
        stored s = make_stored(&seed, format, pieces[p].rows, pieces[p].columns, pieces[p].row0,
                               pieces[p].col0);
        tr_linear packed = make_linear(&cpu, format, 2, pieces[p].n_out, pieces[p].columns);
        tr_linear filled = make_linear(&cpu, format, 2, pieces[p].n_out, pieces[p].columns);
        const size_t bytes = cpu.ops->linear_bytes(format, 2, pieces[p].n_out, pieces[p].columns);
        pack(&cpu, &packed, &s, 0, 1, pieces[p].o_begin, pieces[p].rows);
        tr_linear_src src = {.ld = (size_t)s.columns,
                             .scale = s.scale,
                             .scale_ld = (size_t)s.scale_ld,
                             .row0 = s.row0,
                             .col0 = s.col0,
                             .i_mat = 1,
                             .o_begin = pieces[p].o_begin,
                             .n_out = pieces[p].rows};
        const size_t element = format == TR_W_E4M3_B128 ? 1 : format == TR_W_BF16 ? 2 : 4;
        source from = {(const char *)s.data, (size_t)s.columns * element, -1};
        void *ctx = &from;
        assert_int_equal(cpu.ops->linear_fill(cpu.d, &filled, &src, 1, read_source, &ctx), TR_OK);
        assert_memory_equal(filled.data, packed.data, bytes);
        char *table = test_alloc((size_t)s.rows, from.row_bytes);
        assert_int_equal(
            cpu.ops->table_fill(cpu.d, table, from.row_bytes, s.rows, read_source, &from), TR_OK);
        assert_memory_equal(table, s.data, (size_t)s.rows * from.row_bytes);
        from.bad = s.rows / 2;
        assert_int_equal(cpu.ops->linear_fill(cpu.d, &filled, &src, 1, read_source, &ctx), TR_E_IO);
        assert_int_equal(
            cpu.ops->table_fill(cpu.d, table, from.row_bytes, s.rows, read_source, &from), TR_E_IO);
        src.transposed = 1;
        assert_int_equal(cpu.ops->linear_fill(cpu.d, &filled, &src, 1, read_source, &ctx),
                         TR_E_USAGE);
        free(table);
        free_stored(&s);
        cpu.ops->close(cpu.d);
    }
}

/* All pieces of two matrices in one call: what one call for each makes, whoever reads what. */
static void many_pieces_filled_at_once(void **state)
{
    enum { ROWS = 150, COLUMNS = 300, N = 4 };
    static const int at[N][3] = {{0, 0, 0}, {0, ROWS, 0}, {1, ROWS, 1}, {1, 0, 1}};
    uint64_t seed = 12;
    (void)state;
    for (int threads = 1; threads <= 5; threads++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, TEST_N_ISAS - 1, threads) && !test_cpu_open(&cpu, 0, threads))
            continue;
        stored s[2] = {make_stored(&seed, TR_W_E4M3_B128, ROWS, COLUMNS, 0, 5),
                       make_stored(&seed, TR_W_E4M3_B128, ROWS, COLUMNS, 40, 5)};
        tr_linear one = make_linear(&cpu, TR_W_E4M3_B128, 2, 2 * ROWS, COLUMNS);
        tr_linear all = make_linear(&cpu, TR_W_E4M3_B128, 2, 2 * ROWS, COLUMNS);
        tr_linear_src src[N];
        source from[2] = {{(const char *)s[0].data, COLUMNS, -1},
                          {(const char *)s[1].data, COLUMNS, -1}};
        void *ctx[N];
        for (int i = 0; i < N; i++) {
            const stored *x = &s[at[i][2]];
            src[i] = (tr_linear_src){.ld = COLUMNS,
                                     .scale = x->scale,
                                     .scale_ld = (size_t)x->scale_ld,
                                     .row0 = x->row0,
                                     .col0 = x->col0,
                                     .i_mat = at[i][0],
                                     .o_begin = at[i][1],
                                     .n_out = ROWS};
            ctx[i] = &from[at[i][2]];
            assert_int_equal(cpu.ops->linear_fill(cpu.d, &one, &src[i], 1, read_source, &ctx[i]),
                             TR_OK);
        }
        assert_int_equal(cpu.ops->linear_fill(cpu.d, &all, src, N, read_source, ctx), TR_OK);
        assert_memory_equal(all.data, one.data,
                            cpu.ops->linear_bytes(TR_W_E4M3_B128, 2, 2 * ROWS, COLUMNS));
        from[1].bad = 3;
        assert_int_equal(cpu.ops->linear_fill(cpu.d, &all, src, N, read_source, ctx), TR_E_IO);
        src[N - 1].n_out = 2 * ROWS + 1; /* refused before anything is read */
        assert_int_equal(cpu.ops->linear_fill(cpu.d, &all, src, N, read_source, ctx), TR_E_USAGE);
        free_stored(&s[0]);
        free_stored(&s[1]);
        cpu.ops->close(cpu.d);
    }
}

/* Small inputs meet the smallest weights: no product may fall to zero or lose bits on the way. */
static void small_products(void **state)
{
    enum { OUT = 16, IN = 8 };
    uint8_t code[OUT * IN];
    float x[5 * IN], scale = 0x1p40f, y[5 * OUT];
    double want[5 * OUT];
    (void)state;
    for (int i = 0; i < OUT * IN; i++)
        code[i] = (uint8_t)(1 + i % 7);
    for (int r = 0; r < 5; r++)
        for (int i = 0; i < IN; i++)
            x[r * IN + i] = i == r ? 1.2345678e-30f : 0.0f;
    for (int r = 0; r < 5; r++)
        for (int o = 0; o < OUT; o++)
            want[r * OUT + o] =
                (double)x[r * IN + r] * (double)tr_e4m3_to_f32(code[o * IN + r]) * 0x1p40;
    for (int i = 0; i < TEST_N_ISAS; i++) {
        test_cpu cpu;
        if (!test_cpu_open(&cpu, i, 1)) continue;
        tr_linear w = make_linear(&cpu, TR_W_E4M3_B128, 1, OUT, IN);
        tr_linear_src s = {.src = code, .ld = IN, .scale = &scale, .scale_ld = 1, .n_out = OUT};
        assert_int_equal(cpu.ops->linear_pack(cpu.d, &w, &s), TR_OK);
        for (int n = 1; n <= 5; n += 4) {
            linear(&cpu, &w, x, n, y);
            test_close(test_isas[i], y, want, NULL, 0x1p-23, (size_t)(n * OUT));
        }
        cpu.ops->close(cpu.d);
    }
}

/* A NaN code makes its own output NaN, whatever the input, and no other. */
static void nan_codes(void **state)
{
    enum { OUT = 33, IN = 150, N = 6 };
    uint64_t seed = 7;
    float *x = test_floats(&seed, N * IN), y[N * OUT];
    (void)state;
    for (int i = 0; i < TEST_N_ISAS; i++)
        for (int n = 1; n <= N; n += N - 1) {
            test_cpu cpu;
            if (!test_cpu_open(&cpu, i, 1)) continue;
            stored s = make_stored(&seed, TR_W_E4M3_B128, OUT, IN, 0, 0);
            ((uint8_t *)s.data)[5 * IN + 140] = 0x7f;
            ((uint8_t *)s.data)[32 * IN + 0] = 0xff;
            tr_linear w = make_linear(&cpu, TR_W_E4M3_B128, 1, OUT, IN);
            pack(&cpu, &w, &s, 0, 0, 0, OUT);
            x[140] = 0.0f;
            linear(&cpu, &w, x, n, y);
            for (int j = 0; j < n * OUT; j++)
                assert_int_equal(isnan(y[j]) != 0, j % OUT == 5 || j % OUT == 32);
            free_stored(&s);
            cpu.ops->close(cpu.d);
        }
    free(x);
}

static void refusals(void **state)
{
    test_cpu cpu;
    float x[256] = {0}, y[16], scale[4] = {1, 1, 1, 1};
    uint8_t code[16 * 64] = {0};
    int32_t n = 1;
    (void)state;
    assert_int_equal(test_cpu_open(&cpu, 0, 1), 1);
    tr_linear w = make_linear(&cpu, TR_W_E4M3_B128, 2, 16, 64);
    const tr_linear_src good = {.src = code, .ld = 64, .scale = scale, .scale_ld = 2, .n_out = 8};
    tr_linear_src s = good;
    s.i_mat = 2;
    assert_int_equal(cpu.ops->linear_pack(cpu.d, &w, &s), TR_E_USAGE);
    assert_non_null(strstr(cpu.ops->error(cpu.d), "matrix 2"));
    s = good, s.o_begin = 9;
    assert_int_equal(cpu.ops->linear_pack(cpu.d, &w, &s), TR_E_USAGE);
    s = good, s.col0 = -1;
    assert_int_equal(cpu.ops->linear_pack(cpu.d, &w, &s), TR_E_USAGE);
    s = good, s.scale = NULL;
    assert_int_equal(cpu.ops->linear_pack(cpu.d, &w, &s), TR_E_USAGE);
    s = good, s.col0 = 100;
    assert_int_equal(cpu.ops->linear_pack(cpu.d, &w, &s), TR_OK);
    s.col0 = 101, s.o_begin = 8; /* pieces of one matrix must be cut alike */
    assert_int_equal(cpu.ops->linear_pack(cpu.d, &w, &s), TR_E_USAGE);
    s.i_mat = 1; /* another matrix may be cut elsewhere */
    assert_int_equal(cpu.ops->linear_pack(cpu.d, &w, &s), TR_OK);

    struct tr_linear_args a = {.n = &n, .n_max = 1, .w = &w, .out = y, .ld_out = 16};
    a.in = (tr_acts){.x = x, .ld = 128, .n_max = 1, .d = 65};
    assert_int_equal(cpu.ops->linear(cpu.d, TR_LANE_MAIN, &a), TR_E_USAGE);
    assert_int_equal(cpu.ops->linear_bytes(TR_W_F32, 0, 4, 4), 0);
    assert_true(cpu.ops->linear_bytes(TR_W_F32, INT32_MAX, INT32_MAX, INT32_MAX) == SIZE_MAX);
    cpu.ops->close(cpu.d);
}

static void devices(void **state)
{
    tr_device *d;
    const tr_ops *ops;
    tr_err err;
    void *a, *b, *c;
    char text[4] = "abc", back[4];
    (void)state;
#define OPEN(to, n, which)                                                                         \
    tr_device_open(&d, &ops, &(tr_device_options){.name = (to), .n_threads = (n), .isa = (which)}, \
                   &err)
#ifdef HAVE_CUDA /* the suite hides GPUs; run by hand this may find one */
    const tr_status st = OPEN("cuda", 0, NULL);
    assert_true(st == TR_OK || st == TR_E_DEVICE);
    if (st == TR_OK) ops->close(d);
#else
    assert_int_equal(OPEN("cuda", 0, NULL), TR_E_USAGE);
    assert_string_equal(err.text, "this build has no CUDA backend");
    assert_null(d);
#endif
    assert_int_equal(OPEN("gpu", 0, NULL), TR_E_USAGE);
    assert_int_equal(OPEN("cpu", -1, NULL), TR_E_USAGE);
    assert_int_equal(OPEN("cpu", 1, "sse9"), TR_E_USAGE);
    assert_int_equal(OPEN("auto", 1, "plain"), TR_OK);
    assert_string_equal(tr_device_describe(d), "cpu, 1 thread, plain");
    assert_string_equal(ops->name, "cpu");

    assert_int_equal(ops->alloc(d, SIZE_MAX - 8, 0, &a), TR_E_MEMORY);
    assert_null(a);
#if !defined __SANITIZE_ADDRESS__ && !defined __SANITIZE_THREAD__ /* their calloc aborts */
    assert_int_equal(ops->alloc(d, SIZE_MAX / 4, 0, &a), TR_E_MEMORY);
#endif
    assert_non_null(strstr(ops->error(d), "memory"));
    assert_int_equal(ops->alloc(d, 1000, 0, &a), TR_OK);
    assert_int_equal(ops->alloc(d, 0, 1, &b), TR_OK);
    assert_int_equal(ops->alloc(d, 3 << 20, 0, &c), TR_OK);
    assert_true((uintptr_t)a % 64 == 0 && (uintptr_t)b % 64 == 0 && (uintptr_t)c % 64 == 0);
    for (int i = 0; i < 1000; i++)
        assert_int_equal(((char *)a)[i], 0);
    assert_int_equal(ops->upload(d, TR_LANE_COPY, a, text, 4), TR_OK);
    assert_int_equal(ops->order(d, TR_LANE_COPY, TR_LANE_MAIN), TR_OK);
    assert_int_equal(ops->download(d, TR_LANE_MAIN, back, a, 4), TR_OK);
    assert_string_equal(back, "abc");
    uint64_t t = ops->ticket(d, TR_LANE_MAIN);
    assert_int_equal(ops->done(d, TR_LANE_MAIN, t), 1);
    ops->release(d, b); /* the middle of the list; c and a are close's */
    ops->release(d, NULL);
    ops->close(d);

    assert_int_equal(OPEN("cpu", 0, NULL), TR_OK);
    ops->close(d);
#undef OPEN
    assert_int_equal(tr_kv_row_bytes(TR_E4M3, 512, 64), 656);
    assert_int_equal(tr_kv_row_bytes(TR_E4M3, 129, 6), 129 + 8 + 12);
    assert_int_equal(tr_kv_row_bytes(TR_BF16, 512, 64), 1152);
    assert_int_equal(tr_kv_row_bytes(TR_F32, 512, 64), 2304);
    assert_int_equal(tr_index_page_bytes(TR_E4M3, 128), 8448);
    assert_int_equal(tr_index_page_bytes(TR_BF16, 128), 8448);
    assert_int_equal(tr_index_page_bytes(TR_F32, 128), 32768);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes),
        cmocka_unit_test(offsets),
        cmocka_unit_test(pieces),
        cmocka_unit_test(rows_do_not_depend_on_each_other),
        cmocka_unit_test(many_rows),
        cmocka_unit_test(many_columns),
        cmocka_unit_test(indexed_rows),
        cmocka_unit_test(filled_matrices),
        cmocka_unit_test(many_pieces_filled_at_once),
        cmocka_unit_test(small_products),
        cmocka_unit_test(nan_codes),
        cmocka_unit_test(refusals),
        cmocka_unit_test(devices),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
