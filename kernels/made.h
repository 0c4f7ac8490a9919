/* Numbers that are a function of their place alone: what dummy weights are made of (model/dummy.h), on the host or where they are
 * to be. Header only; the same text for C and CUDA. */
#ifndef TR_KERNELS_MADE_H
#define TR_KERNELS_MADE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define TR_MADE_INLINE static inline __host__ __device__
#else
#define TR_MADE_INLINE static inline
#endif

enum { TR_MADE_LEVELS = 256 };

/* A part of a tensor whose rows are `width` elements long, from row row0 and column col0 on. Element e of the tensor, counted through
 * all of its rows, is level[byte e % 8 of tr_made_word(key, e / 8)]; levels have the size of the tensor's numbers. */
typedef struct tr_made {
    uint64_t key, width, row0, col0;
    union {
        uint8_t of1[TR_MADE_LEVELS];
        uint16_t of2[TR_MADE_LEVELS];
        uint32_t of4[TR_MADE_LEVELS];
    } level;
} tr_made;

/* Counter-based: 64 well mixed bits of (key, i). Multiply and xor-shift twice, as finalisers of hash functions do. */
TR_MADE_INLINE uint64_t tr_made_word(uint64_t key, uint64_t i)
{
    uint64_t x = key + i * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    x = (x ^ (x >> 32)) * UINT64_C(0xd6e8feb86659fd93);
    return x ^ (x >> 32);
}

#endif
