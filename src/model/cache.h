/* Cache storage of this rank's layers: pages of 64 tokens of latent KV and index keys per layer (model.md 5.3-5.6). Pages of
 * all layers share ids; who holds which page is engine/pages' business. */
#ifndef TR_MODEL_CACHE_H
#define TR_MODEL_CACHE_H

#include "kernels/kernels.h"
#include "model/config.h"

typedef struct tr_cache tr_cache;

/* Device memory for n_layers x n_pages. TR_E_MEMORY when it cannot be had. */
tr_status tr_cache_create(tr_cache **out, const tr_ops *ops, tr_device *device,
                          const tr_config *config, int n_layers, tr_dtype dtype, int n_pages,
                          tr_err *err);
void tr_cache_free(tr_cache *cache);
tr_kv_layer tr_cache_layer(const tr_cache *cache, int layer);
int tr_cache_pages(const tr_cache *cache);
/* The memory that all layers lie in, of kind SYMMETRIC. */
typedef struct tr_cache_memory {
    void *latent, *index;
    size_t latent_bytes, index_bytes;
} tr_cache_memory;
tr_cache_memory tr_cache_memory_of(const tr_cache *cache);
/* Bytes of one page over n_layers layers. Pure. */
size_t tr_cache_page_bytes(const tr_config *config, int n_layers, tr_dtype dtype);

#endif
