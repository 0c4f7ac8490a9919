#include <config.h>

#include "model/cache.h"

#include <stdlib.h>

#include "base/size.h"

struct tr_cache {
    const tr_ops *ops;
    tr_device *device;
    tr_kv_layer shape; /* without pointers */
    int n_layers;
    char *latent, *index;             /* device memory of all layers, layer-major */
    size_t latent_bytes, index_bytes; /* of one layer */
};

size_t tr_cache_page_bytes(const tr_config *config, int n_layers, tr_dtype dtype)
{
    size_t latent =
        TR_PAGE_TOKENS * tr_kv_row_bytes(dtype, config->kv_lora_rank, config->qk_rope_head_dim);
    return (size_t)n_layers * (latent + tr_index_page_bytes(dtype, config->index_head_dim));
}

tr_status tr_cache_create(tr_cache **out, const tr_ops *ops, tr_device *device,
                          const tr_config *config, int n_layers, tr_dtype dtype, int n_pages,
                          tr_err *err)
{
    tr_status st = TR_OK;
    size_t latent_all, index_all;

    *out = NULL;
    tr_cache *c = calloc(1, sizeof *c);
    if (!c) return tr_fail(err, TR_E_MEMORY, "out of memory");
    c->ops = ops;
    c->device = device;
    c->n_layers = n_layers;
    c->shape = (tr_kv_layer){.dtype = dtype,
                             .n_pages = n_pages,
                             .d_latent = config->kv_lora_rank,
                             .d_rope = config->qk_rope_head_dim,
                             .d_index = config->index_head_dim};
    size_t page = TR_PAGE_TOKENS * tr_kv_row_bytes(dtype, c->shape.d_latent, c->shape.d_rope);
    if (!tr_mul(&c->latent_bytes, page, (size_t)n_pages) ||
        !tr_mul(&c->index_bytes, tr_index_page_bytes(dtype, c->shape.d_index), (size_t)n_pages) ||
        !tr_mul(&latent_all, c->latent_bytes, (size_t)n_layers) ||
        !tr_mul(&index_all, c->index_bytes, (size_t)n_layers)) {
        st = tr_fail(err, TR_E_MEMORY,
                     "a cache of %d pages x %d layers does not fit an address space", n_pages,
                     n_layers);
        goto done;
    }
    st = ops->alloc(device, latent_all, TR_MEMORY_SYMMETRIC, (void **)&c->latent);
    if (st == TR_OK) st = ops->alloc(device, index_all, TR_MEMORY_SYMMETRIC, (void **)&c->index);
    if (st != TR_OK) {
        tr_fail(err, st, "cache of %d pages x %d layers (%.1f MB): %s", n_pages, n_layers,
                (double)(latent_all + index_all) * 1e-6, ops->error(device));
        goto done;
    }
    *out = c;
    c = NULL;

done:
    tr_cache_free(c);
    return st;
}

void tr_cache_free(tr_cache *cache)
{
    if (!cache) return;
    cache->ops->release(cache->device, cache->latent);
    cache->ops->release(cache->device, cache->index);
    free(cache);
}

tr_kv_layer tr_cache_layer(const tr_cache *cache, int layer)
{
    tr_kv_layer kv = cache->shape;
    kv.latent = cache->latent + (size_t)layer * cache->latent_bytes;
    kv.index = cache->index + (size_t)layer * cache->index_bytes;
    return kv;
}

int tr_cache_pages(const tr_cache *cache)
{
    return cache->shape.n_pages;
}

tr_cache_memory tr_cache_memory_of(const tr_cache *cache)
{
    return (tr_cache_memory){.latent = cache->latent,
                             .index = cache->index,
                             .latent_bytes = cache->latent_bytes * (size_t)cache->n_layers,
                             .index_bytes = cache->index_bytes * (size_t)cache->n_layers};
}
