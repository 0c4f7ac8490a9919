/* What every fuzz target shares. A target is one function over one input; the engine is libFuzzer (run.sh) or driver.c,
 * which replays the committed corpus under `make check`. */
#ifndef TR_TESTS_FUZZ_H
#define TR_TESTS_FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

/* An oracle: what must hold for every input. In force in every build, unlike assert. */
#define FUZZ_CHECK(condition, ...)                                                                 \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #condition);                \
            fprintf(stderr, __VA_ARGS__);                                                          \
            fputc('\n', stderr);                                                                   \
            abort();                                                                               \
        }                                                                                          \
    } while (0)

/* A block of exactly n bytes, so that the address sanitizer sees a read beyond it. The caller's. */
static inline char *fuzz_copy(const void *data, size_t n)
{
    char *p = calloc(n ? n : 1, 1);
    if (!p) abort();
    if (n) memcpy(p, data, n);
    return p;
}

/* The first byte of the input chooses options, the rest is the text. */
static inline uint8_t fuzz_take_byte(const uint8_t **data, size_t *n)
{
    if (!*n) return 0;
    --*n;
    return *(*data)++;
}

#endif
