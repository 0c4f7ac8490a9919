/* Rotary embedding of one vector in place, the two layouts of model.md 3.3. cos_sin: the table's row of the vector's
 * position, [d/2, 2]. fp32 throughout; the caller rounds. One thread. */
#ifndef TR_KERNELS_CPU_ROPE_PRIV_H
#define TR_KERNELS_CPU_ROPE_PRIV_H

void tr_rope_interleaved(float *x, const float *cos_sin, int d); /* pairs (2i, 2i + 1): MLA */
void tr_rope_half_split(float *x, const float *cos_sin, int d);  /* pairs (i, i + d/2): indexer */

#endif
