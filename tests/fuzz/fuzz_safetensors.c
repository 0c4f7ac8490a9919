/* The bytes of a safetensors file. Whatever is accepted lies inside the file, covers its data exactly, and reads back as the
 * very bytes of the input; a read outside a tensor is refused. */
#include <config.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "model/safetensors.h"
#include "tests/fuzz/fuzz.h"

static int memory = -1; /* the file, in memory; made once */

static void check_tensor(const tr_shard *s, const tr_tensor *t, const uint8_t *data, size_t n)
{
    tr_err err = {0};
    size_t bytes = (size_t)t->bytes, column = bytes / 2;
    char *got = fuzz_copy("", 0), *grown = realloc(got, bytes ? bytes : 1);

    if (!grown) abort();
    FUZZ_CHECK(t->offset <= n && t->bytes <= n - t->offset, "%s lies outside the file", t->name);
    FUZZ_CHECK(t->rank >= 0 && t->rank <= TR_TENSOR_RANK_MAX, "%s: rank %d", t->name, t->rank);
    FUZZ_CHECK(tr_shard_read(s, t, 0, bytes, bytes, 1, grown, &err) == TR_OK, "%s", err.text);
    FUZZ_CHECK(memcmp(grown, data + t->offset, bytes) == 0, "%s: other bytes", t->name);
    /* Two pieces of half a tensor, the second from the end: a strided read stays inside too. */
    if (column) {
        uint64_t stride = t->bytes - column;
        FUZZ_CHECK(tr_shard_read(s, t, 0, column, stride, 2, grown, &err) == TR_OK, "%s", err.text);
        FUZZ_CHECK(memcmp(grown + column, data + t->offset + stride, column) == 0, "%s", t->name);
    }
    FUZZ_CHECK(tr_shard_read(s, t, 1, bytes ? bytes : 1, 1, 1, grown, &err) == TR_E_INPUT,
               "%s: read past its end", t->name);
    FUZZ_CHECK(tr_shard_read(s, t, 0, 1, UINT64_MAX, 3, grown, &err) == TR_E_INPUT,
               "%s: a stride that wraps", t->name);
    free(grown);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    tr_shard *s = NULL;
    tr_err err = {0};
    char path[64];

    if (memory < 0) memory = memfd_create("shard", MFD_CLOEXEC);
    if (memory < 0 || ftruncate(memory, 0) != 0 || pwrite(memory, data, n, 0) != (ssize_t)n)
        abort();
    snprintf(path, sizeof path, "/proc/self/fd/%d", memory);
    tr_status st = tr_shard_open(&s, path, &err);
    if (st != TR_OK) {
        FUZZ_CHECK(st == TR_E_INPUT && !s && err.text[0], "status %d: %s", st, err.text);
        return 0;
    }
    const tr_tensor *t = tr_shard_tensors(s);
    uint64_t sum = 0, header = 0;
    memcpy(&header, data, sizeof header);
    FUZZ_CHECK(header <= n - 8 && !memchr(data + 8, 0, (size_t)header), "a NUL in the header");
    for (size_t i = 0; i < tr_shard_count(s); i++) {
        check_tensor(s, &t[i], data, n);
        FUZZ_CHECK(!i || t[i].offset == t[i - 1].offset + t[i - 1].bytes, "%s: overlap or hole",
                   t[i].name);
        sum += t[i].bytes;
    }
    FUZZ_CHECK(tr_shard_bytes(s) == n && sum <= n - 8, "%zu bytes, tensors have %ju", n,
               (uintmax_t)sum);
    if (tr_shard_count(s) && t[0].bytes) { /* a file that shrinks while it is open */
        char byte;
        if (ftruncate(memory, (off_t)n - 1) != 0) abort();
        FUZZ_CHECK(tr_shard_read(s, t, 0, 1, 1, 1, &byte, &err) == TR_E_INPUT, "it shrank");
    }
    tr_shard_close(s);
    return 0;
}
