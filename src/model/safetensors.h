/* One safetensors file (model.md 2): opened, its header parsed and checked in full, its tensors read by range. Used by
 * model/checkpoint only; hostile files are expected (reliability.md 2). Thread-safe after open. */
#ifndef TR_MODEL_SAFETENSORS_H
#define TR_MODEL_SAFETENSORS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "model/checkpoint.h"

enum { TR_SHARD_HEADER_MAX = 100 << 20, TR_TENSOR_RANK_MAX = 8 };

typedef struct tr_shard tr_shard;

/* The bytes of a tensor: the one place where a shape becomes a size. false, and *bytes untouched: a negative dimension,
 * rank outside 0..8, or a product that does not fit 64 bits. */
bool tr_tensor_bytes(size_t element_bytes, int rank, const int64_t *shape, uint64_t *bytes);

/* Every check of reliability.md 2 is made here. TR_E_INPUT with the file, and the tensor where there is one. */
tr_status tr_shard_open(tr_shard **out, const char *path, tr_err *err);
void tr_shard_close(tr_shard *s);

const char *tr_shard_path(const tr_shard *s);
uint64_t tr_shard_bytes(const tr_shard *s); /* of the file */
/* The tensors, by offset; names are the shard's, `shard` is 0. */
size_t tr_shard_count(const tr_shard *s);
const tr_tensor *tr_shard_tensors(const tr_shard *s);
/* 32 hex digits: hash of the header's bytes. */
const char *tr_shard_header_hash(const tr_shard *s);

/* n_rows pieces of n bytes, `stride` bytes apart in the tensor from byte `begin` on, without gaps into dst. What lies
 * outside the tensor is refused. The file's size is looked at again: TR_E_INPUT when it changed or the data ends early,
 * TR_E_IO when the system fails to read. */
tr_status tr_shard_read(const tr_shard *s, const tr_tensor *t, uint64_t begin, size_t n,
                        uint64_t stride, int64_t n_rows, void *dst, tr_err *err);

#endif
