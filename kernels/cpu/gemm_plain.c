#include <config.h>

#include <math.h>
#include <string.h>

#include "kernels/cpu/packed.h"
#include "kernels/number.h"

/* The plain versions: the reference of the others, short enough to check by eye. Multiply and add
 * are rounded one by one here and together there (FMA), so the instruction sets agree to rounding,
 * not in bits. */

enum { ROWS = 32 };

/* clang-format off */
#define LANE(l) (l), (l) + 16, (l) + 32, (l) + 48
static const uint8_t order[64] = {
    LANE(0), LANE(1), LANE(2), LANE(3), LANE(4), LANE(5), LANE(6), LANE(7),
    LANE(8), LANE(9), LANE(10), LANE(11), LANE(12), LANE(13), LANE(14), LANE(15),
};
/* clang-format on */

/* Row k of 16 lanes of a group; NaN codes need no care, their block's scale is NaN (packed.h). */
static void expand_lanes(float *out, tr_format format, const uint8_t *group, int j)
{
    if (format == TR_W_F32) {
        memcpy(out, group + j * TR_PANEL * (int)sizeof(float), TR_PANEL * sizeof(float));
    } else if (format == TR_W_BF16) {
        uint16_t pair[2 * TR_PANEL];
        memcpy(pair, group + j / 2 * TR_PACK_ALIGN, sizeof pair);
        for (int lane = 0; lane < TR_PANEL; lane++)
            out[lane] = tr_bf16_to_f32(pair[2 * lane + j % 2]);
    } else {
        const uint8_t *code = group + j * TR_PANEL;
        for (int lane = 0; lane < TR_PANEL; lane++) {
            /* as tr_e4m3_to_f32, without products of fp32 subnormals, which are slow */
            uint32_t sign = (code[lane] & 0x80u) << 24, magnitude = code[lane] & 0x7fu;
            uint32_t normal = (magnitude << 20) + (120u << 23);
            uint32_t subnormal = tr_f32_bits((float)(int32_t)magnitude * 0x1p-9f);
            out[lane] = tr_bits_f32(sign | (magnitude < 8 ? subnormal : normal));
        }
    }
}

/* total += sum over the block of x w, times scale. w [n_k, 16] */
static void block_row(float *total, const float *x, const float *w, int n_k, const float *scale)
{
    float acc[TR_PANEL] = {0};
    for (int k = 0; k < n_k; k++, w += TR_PANEL)
        for (int lane = 0; lane < TR_PANEL; lane++)
            acc[lane] += x[k] * w[lane];
    for (int lane = 0; lane < TR_PANEL; lane++)
        total[lane] += acc[lane] * scale[lane];
}

static void gemm_panel(const tr_gemm *g, const tr_packed *m, int panel, int i_row, int n_rows)
{
    static const float one[TR_PANEL] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const uint8_t *at = m->panels + (size_t)panel * m->panel_bytes;
    float total[ROWS][TR_PANEL] = {{0}}, w[TR_K_BLOCK * TR_PANEL];
    int o = panel * TR_PANEL;
    int n = g->w->n_out - o < TR_PANEL ? g->w->n_out - o : TR_PANEL;

    for (int k = 0; k < m->n_in;) {
        int n_k = tr_block_columns(m, k);
        const float *scale = m->scale_bytes ? (const float *)(const void *)at : one;
        for (int j = 0; j < n_k; j++)
            expand_lanes(w + j * TR_PANEL, g->w->format,
                         at + m->scale_bytes + j / TR_K_GROUP * m->group_bytes, j % TR_K_GROUP);
        for (int r = 0; r < n_rows; r++) {
            int from = g->row_index ? g->row_index[i_row + r] : i_row + r;
            block_row(total[r], g->x + (size_t)from * g->ldx + k, w, n_k, scale);
        }
        k += n_k;
        at += tr_block_bytes(m, n_k);
    }
    for (int r = 0; r < n_rows; r++) {
        int to = g->out_index ? g->out_index[i_row + r] : i_row + r;
        memcpy(g->y + (size_t)to * g->ldy + o, total[r], (size_t)n * sizeof(float));
    }
}

static void gemm(const tr_gemm *g, tr_pieces *pieces)
{
    tr_packed m = tr_packed_view(g->w, g->i_mat);

    for (int r = 0; r < g->n_rows; r += ROWS)
        for (int i = 0, panel, end; tr_piece(pieces, i, &panel, &end); i++)
            for (; panel < end; panel++)
                gemm_panel(g, &m, panel, r, g->n_rows - r < ROWS ? g->n_rows - r : ROWS);
}

/* Sixteen chains; chain c takes the elements c, c + 16, ... */
static float dot(const float *a, const float *b, int n)
{
    float s[16] = {0}, sum = 0;
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int c = 0; c < 16; c++)
            s[c] += a[i + c] * b[i + c];
    for (; i < n; i++)
        s[i % 16] += a[i] * b[i];
    for (int c = 0; c < 16; c++)
        sum += s[c];
    return sum;
}

static void axpy(float *y, float a, const float *x, int n)
{
    for (int i = 0; i < n; i++)
        y[i] += a * x[i];
}

static void expand_e4m3(float *out, const uint8_t *in, float scale, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = tr_e4m3_to_f32(in[i]) * scale;
}

static void expand_bf16(float *out, const uint16_t *in, int n)
{
    for (int i = 0; i < n; i++)
        out[i] = tr_bf16_to_f32(in[i]);
}

static void exp_sub(float *x, float max, int n)
{
    for (int i = 0; i < n; i++)
        x[i] = expf(x[i] - max);
}

static uint64_t read_sum(const void *p, size_t n)
{
    const uint64_t *at = p;
    uint64_t s[4] = {0};
    for (size_t i = 0; i + 4 <= n / sizeof *at; i += 4)
        for (int k = 0; k < 4; k++)
            s[k] ^= at[i + (size_t)k];
    return s[0] ^ s[1] ^ s[2] ^ s[3];
}

static float fma_loop(long n)
{
    float acc[16], sum = 0;
    for (int k = 0; k < 16; k++)
        acc[k] = (float)k;
    for (long i = 0; i < n; i++)
        for (int k = 0; k < 16; k++)
            acc[k] = acc[k] * 0.999f + (float)n;
    for (int k = 0; k < 16; k++)
        sum += acc[k];
    return sum;
}

static unsigned e4m3_arrange(uint8_t *groups, int n_groups)
{
    unsigned nan = 0;
    for (uint8_t *group = groups; n_groups-- > 0; group += TR_PACK_ALIGN) {
        uint8_t old[TR_PACK_ALIGN];
        memcpy(old, group, sizeof old);
        for (int i = 0; i < TR_PACK_ALIGN; i++) {
            group[order[i]] = old[i];
            nan |= (unsigned)((old[i] & 0x7f) == 0x7f) << i / TR_K_GROUP;
        }
    }
    return nan;
}

static void transpose(uint8_t *out, const uint8_t *const row[TR_PANEL], int n_words)
{
    for (int w = 0; w < n_words; w++)
        for (int lane = 0; lane < TR_PANEL; lane++, out += 4)
            memcpy(out, row[lane] + 4 * w, 4);
}

const tr_cpu_kernels tr_cpu_plain = {
    .gemm = gemm,
    .e4m3_order = order,
    .e4m3_arrange = e4m3_arrange,
    .transpose = transpose,
    .dot = dot,
    .axpy = axpy,
    .expand_e4m3 = expand_e4m3,
    .expand_bf16 = expand_bf16,
    .exp_sub = exp_sub,
    .read_sum = read_sum,
    .fma_loop = fma_loop,
    .fma_width = 16,
    .attention = &tr_attention_plain,
};
