/* The CPU's order of weights, written by linear.c and read by the gemm_*.c files.
 *
 * matrix  [header 64 B][panel 0][panel 1]...         n_mats of them in a row
 * panel   16 outputs (lanes), all k: blocks of at most 128 k
 * block   [16 f32 scales, TR_W_E4M3_B128 only][groups]
 * group   4 consecutive k of the 16 lanes, 64 bytes times the size of a number; the last of a block padded with zeros
 *
 * Blocks break where the stored tensor's scale blocks break, also when a slice begins inside one: the first block of a
 * matrix has 128 - k_shift columns. The lanes of a panel may belong to different scale rows, hence a scale per lane.
 * A block in which a lane holds a NaN code has NaN as that lane's scale, which is the same result at no cost.
 *
 * In a group, f32: number (lane, j) at [j][lane]. bf16: [j / 2][lane][j % 2], so that one 32-bit word holds two k of a
 * lane. e4m3: byte order[lane * 4 + j], as the instruction set's expansion likes it (and its bits: e4m3_sign_low). So
 * but for e4m3's last step packing is the transposition of 16 rows of 32-bit words. */
#ifndef TR_KERNELS_CPU_PACKED_H
#define TR_KERNELS_CPU_PACKED_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/cpu/cpu_priv.h"

enum {
    TR_K_BLOCK = 128,
    TR_K_GROUP = 4,
    TR_PACK_ALIGN = 64,
    TR_PACK_MAGIC = 0x6b635054, /* "TPck": some piece has been packed */
};

typedef struct tr_pack_header {
    uint32_t magic;
    int32_t k_shift; /* column 0's place in its 128-block of the stored tensor */
} tr_pack_header;

typedef struct tr_packed { /* one matrix */
    uint8_t *panels;
    size_t panel_bytes;
    int k_shift, n_in;
    int group_bytes, scale_bytes;
} tr_packed;

static inline int tr_format_bytes(tr_format format)
{
    return format == TR_W_F32 ? 4 : format == TR_W_BF16 ? 2 : 1;
}

/* Room for any k_shift: up to one more block than without, and two groups that are not full. */
static inline size_t tr_panel_bytes(tr_format format, int n_in)
{
    size_t group = (size_t)TR_PACK_ALIGN * (size_t)tr_format_bytes(format);
    if (format != TR_W_E4M3_B128) return ((size_t)n_in + TR_K_GROUP - 1) / TR_K_GROUP * group;
    size_t n_blocks = ((size_t)n_in + 2 * (TR_K_BLOCK - 1)) / TR_K_BLOCK;
    return n_blocks * TR_PACK_ALIGN + ((size_t)n_in / TR_K_GROUP + 2) * group;
}

static inline size_t tr_matrix_bytes(tr_format format, int n_out, int n_in)
{
    return TR_PACK_ALIGN + (size_t)tr_n_panels(n_out) * tr_panel_bytes(format, n_in);
}

static inline tr_pack_header *tr_packed_header(const tr_linear *w, int i_mat)
{
    size_t at = (size_t)i_mat * tr_matrix_bytes(w->format, w->n_out, w->n_in);
    return (tr_pack_header *)(void *)((char *)w->data + at);
}

static inline tr_packed tr_packed_view(const tr_linear *w, int i_mat)
{
    tr_pack_header *header = tr_packed_header(w, i_mat);
    return (tr_packed){
        .panels = (uint8_t *)header + TR_PACK_ALIGN,
        .panel_bytes = tr_panel_bytes(w->format, w->n_in),
        .k_shift = header->k_shift,
        .n_in = w->n_in,
        .group_bytes = TR_PACK_ALIGN * tr_format_bytes(w->format),
        .scale_bytes = w->format == TR_W_E4M3_B128 ? TR_PACK_ALIGN : 0,
    };
}

/* Columns of the block that begins at column k. */
static inline int tr_block_columns(const tr_packed *m, int k)
{
    int n = TR_K_BLOCK - (m->k_shift + k) % TR_K_BLOCK;
    return n < m->n_in - k ? n : m->n_in - k;
}

/* Bytes of a block of n columns. */
static inline size_t tr_block_bytes(const tr_packed *m, int n)
{
    int n_groups = (n + TR_K_GROUP - 1) / TR_K_GROUP;
    return (size_t)m->scale_bytes + (size_t)n_groups * (size_t)m->group_bytes;
}

#endif
