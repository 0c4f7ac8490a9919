#include <config.h>

#include "base/hash.h"

#include <stdlib.h>

#include <xxhash.h>

struct tr_hasher {
    XXH3_state_t *state;
};

static void hex_of(XXH128_hash_t h, char hex[33])
{
    const uint64_t half[2] = {h.high64, h.low64};

    for (int i = 0; i < 32; i++)
        hex[i] = "0123456789abcdef"[half[i / 16] >> (60 - 4 * (i % 16)) & 15];
    hex[32] = '\0';
}

uint64_t tr_hash64(const void *data, size_t n, uint64_t seed)
{
    return XXH3_64bits_withSeed(data, n, seed);
}

void tr_hash128_hex(const void *data, size_t n, uint64_t seed, char hex[33])
{
    hex_of(XXH3_128bits_withSeed(data, n, seed), hex);
}

tr_hasher *tr_hasher_create(void)
{
    tr_hasher *h = calloc(1, sizeof *h);
    if (!h) return NULL;
    h->state = XXH3_createState();
    if (!h->state) {
        free(h);
        return NULL;
    }
    XXH3_128bits_reset(h->state);
    return h;
}

void tr_hasher_add(tr_hasher *h, const void *data, size_t n)
{
    XXH3_128bits_update(h->state, data, n);
}

void tr_hasher_hex(const tr_hasher *h, char hex[33])
{
    hex_of(XXH3_128bits_digest(h->state), hex);
}

void tr_hasher_free(tr_hasher *h)
{
    if (!h) return;
    XXH3_freeState(h->state);
    free(h);
}
