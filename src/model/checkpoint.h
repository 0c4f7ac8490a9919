/* A checkpoint folder: safetensors shards, read by range (pread, never mapped); names to bytes (model.md 2). Everything
 * reliability.md 2 lists is checked in open. Thread-safe after open: reads use pread on descriptors of their own. */
#ifndef TR_MODEL_CHECKPOINT_H
#define TR_MODEL_CHECKPOINT_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef enum tr_stored {
    TR_STORED_F8_E4M3,
    TR_STORED_BF16,
    TR_STORED_F32,
    TR_STORED_OTHER
} tr_stored;

typedef struct tr_tensor { /* one stored tensor; borrowed from the checkpoint */
    const char *name;
    tr_stored stored;
    int rank;
    int64_t shape[8];
    uint64_t bytes;
    uint64_t offset; /* of its first byte in the file */
    int shard;
} tr_tensor;

typedef struct tr_checkpoint tr_checkpoint;

/* dir holds model.safetensors.index.json and its shards, or model.safetensors alone. Opens and checks every shard's
 * header. TR_E_INPUT: missing or damaged, naming file and tensor. */
tr_status tr_checkpoint_open(tr_checkpoint **out, const char *dir, tr_err *err);
void tr_checkpoint_close(tr_checkpoint *c);

/* NULL: there is none of this name. */
const tr_tensor *tr_checkpoint_find(const tr_checkpoint *c, const char *name);
/* All tensors are one array, by shard name and then by offset: tr_checkpoint_tensor(c, i) is tr_checkpoint_tensor(c, 0) + i. */
size_t tr_checkpoint_count(const tr_checkpoint *c);
const tr_tensor *tr_checkpoint_tensor(const tr_checkpoint *c, size_t i);
/* Path of the file a tensor lies in, for messages. */
const char *tr_checkpoint_path(const tr_checkpoint *c, const tr_tensor *t);

/* Bytes [begin, begin + n) of a tensor into dst. The file's size is checked again: a shard that shrank is TR_E_INPUT
 * naming file and tensor, a failing read TR_E_IO. */
tr_status tr_checkpoint_read(const tr_checkpoint *c, const tr_tensor *t, uint64_t begin, size_t n,
                             void *dst, tr_err *err);

/* Rows [row0, row0 + n_rows) x columns [col0, col0 + n_cols) of a rank-2 tensor, packed without gaps into dst. */
tr_status tr_checkpoint_read_block(const tr_checkpoint *c, const tr_tensor *t, int64_t row0,
                                   int64_t n_rows, int64_t col0, int64_t n_cols, void *dst,
                                   tr_err *err);

/* Identity for OUT.run: hash of the shard names, sizes and headers, 32 hex digits. */
void tr_checkpoint_identity(const tr_checkpoint *c, char hex[33]);
uint64_t tr_checkpoint_bytes_read(const tr_checkpoint *c);
/* Shards, and of each its name in the folder, what was read from it and the time its readers spent. */
size_t tr_checkpoint_shards(const tr_checkpoint *c);
const char *tr_checkpoint_shard_use(const tr_checkpoint *c, size_t i, uint64_t *bytes,
                                    uint64_t *ns);
/* Path of the shard that has kept its readers waiting longest: some read of it is under way, and none has begun or ended for
 * *ns. NULL: nobody reads. Any thread. */
const char *tr_checkpoint_waits(const tr_checkpoint *c, uint64_t *ns);

#endif
