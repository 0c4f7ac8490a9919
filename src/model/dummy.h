/* Dummy weights (--load-format dummy): random numbers that keep activations at their usual size, so that a step costs what
 * it costs with real ones. An element's value depends on the seed, the tensor's name and the element's place in the
 * whole tensor: every slicing of every grid sees the same model. Thread-safe. */
#ifndef TR_MODEL_DUMMY_H
#define TR_MODEL_DUMMY_H

#include "kernels/made.h"
#include "model/tensors.h"

typedef struct tr_dummy tr_dummy;

tr_dummy *tr_dummy_create(uint64_t seed); /* NULL: out of memory */
void tr_dummy_free(tr_dummy *d);

/* How dummy tensors are stored: as a checkpoint of this config would. */
tr_stored tr_dummy_stored(const tr_config *config, const tr_wanted *w);

/* As tr_checkpoint_read_block; a rank 1 tensor is one row. */
void tr_dummy_block(const tr_dummy *d, const tr_wanted *w, tr_stored stored, int64_t row0,
                    int64_t n_rows, int64_t col0, int64_t n_cols, void *dst);

/* What tr_dummy_block makes from (row0, col0) on, for a device that makes it itself. */
void tr_dummy_made(const tr_dummy *d, const tr_wanted *w, tr_stored stored, int64_t row0,
                   int64_t col0, tr_made *out);

/* The same of its scales; rows and columns are blocks. */
void tr_dummy_scale(const tr_dummy *d, const tr_wanted *w, int64_t row0, int64_t n_rows,
                    int64_t col0, int64_t n_cols, float *dst);

#endif
