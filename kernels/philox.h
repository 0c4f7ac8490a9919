/* Philox4x32-10, the counter-based random numbers of Salmon, Moraes, Dror and Shaw, "Parallel
 * random numbers: as easy as 1, 2, 3" (2011). A number is a function of key and counter alone, so
 * draws do not depend on batch neighbours, the grid or a restart (architecture.md 4). Header only;
 * no state; the same text for C and CUDA. */
#ifndef TR_KERNELS_PHILOX_H
#define TR_KERNELS_PHILOX_H

#include <stdint.h>

#ifdef __CUDACC__
#define TR_PHILOX_INLINE static inline __host__ __device__
#else
#define TR_PHILOX_INLINE static inline
#endif

/* out may be counter. */
TR_PHILOX_INLINE void tr_philox(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];

    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xd2511f53u * c0, p1 = (uint64_t)0xcd9e8d57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        k0 += 0x9e3779b9u; /* the golden ratio */
        k1 += 0xbb67ae85u; /* sqrt(3) - 1 */
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* What a request's counters are used for: the second word of the counter. */
enum { TR_PHILOX_SAMPLE = 0 };

/* Uniform in [0, 1), 53 bits, for the draw of the token at a position (the first token of a text is
 * position 0). */
TR_PHILOX_INLINE double tr_philox_uniform(uint64_t key, uint32_t position, uint32_t purpose)
{
    uint32_t k[2] = {(uint32_t)key, (uint32_t)(key >> 32)};
    uint32_t c[4] = {position, purpose, 0, 0};

    tr_philox(c, k, c);
    return ((double)(c[0] >> 5) * 0x1p26 + (double)(c[1] >> 6)) * 0x1p-53;
}

#endif
