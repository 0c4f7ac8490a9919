/* The bytes of a tokenizer.json. A refusal has a code; whatever is accepted encodes every text to existing ids that decode
 * to the text again, never more ids than bytes. */
#include <config.h>

#include "tests/fuzz/fuzz.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

static void check_text(const tr_tokenizer *t, tr_encoder *e, const char *text, size_t n)
{
    const tr_segment literal = {text, n, true}, plain = {text, n, false};
    tr_err err = {0};
    int32_t *ids;
    size_t n_ids, n_back;
    char *back;

    FUZZ_CHECK(tr_encode(e, &plain, 1, &ids, &n_ids, &err) == TR_OK, "%s", err.text);
    FUZZ_CHECK(n_ids <= n, "%zu ids of %zu bytes", n_ids, n);
    for (size_t i = 0; i < n_ids; i++)
        FUZZ_CHECK(tr_tokenizer_has(t, ids[i]), "id %d is no token", ids[i]);
    free(ids);
    FUZZ_CHECK(tr_encode(e, &literal, 1, &ids, &n_ids, &err) == TR_OK, "%s", err.text);
    FUZZ_CHECK(tr_decode(t, ids, n_ids, false, &back, &n_back, &err) == TR_OK, "%s", err.text);
    FUZZ_CHECK(n_back == n && memcmp(back, text, n) == 0, "\"%.*s\" came back as \"%s\"", (int)n,
               text, back);
    free(back);
    free(ids);
}

static void check_tables(const tr_tokenizer *t)
{
    size_t n, sum = 0;

    for (int32_t id = 0; id < tr_tokenizer_size(t); id++) {
        const char *bytes = tr_tokenizer_bytes(t, id, &n);
        for (size_t i = 0; i < n; i++)
            sum += (unsigned char)bytes[i]; /* the sanitizer looks at every byte */
        FUZZ_CHECK(tr_tokenizer_has(t, id) || n == 0, "id %d has bytes and no token", id);
    }
    FUZZ_CHECK(sum > 0 && tr_tokenizer_size(t) >= 256, "no bytes in it");
    FUZZ_CHECK(!tr_tokenizer_has(t, -1) && !tr_tokenizer_has(t, tr_tokenizer_size(t)), "no table");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char sample[] =
        "\0\x01\t\n\x7f  aaa bbb 12345 The code of Z\xc3\xbcrich \xe4\xb8\x80\xe9\xbe\xa5 "
        "\xf0\x9f\x98\x80\xef\xbf\xbd<a></a>  \r\n\n x'll \xd8\xa7\xd9\x84  ";
    tr_tokenizer *t = NULL;
    const char *code = NULL;
    tr_err err = {0};
    char *json = fuzz_copy(data, n);

    tr_status st = tr_tokenizer_parse(&t, json, n, "fuzz", &code, NULL, &err);
    if (st != TR_OK) {
        FUZZ_CHECK(st == TR_E_INPUT && !t && code && strstr(err.text, code), "status %d, %s", st,
                   err.text);
        free(json);
        return 0;
    }
    FUZZ_CHECK(!memchr(json, 0, n), "a NUL in the file");
    tr_encoder *e = tr_encoder_create(t);
    if (!e) abort();
    check_tables(t);
    check_text(t, e, sample, sizeof sample - 1);
    /* The tokens of the file itself, as they stand in it: so its own merges and added tokens are met. */
    size_t tail = n > 600 ? n - 600 : 0;
    while (tail < n && (data[tail] & 0xc0) == 0x80)
        tail++;
    if (tr_utf8_valid(json + tail, n - tail, NULL)) check_text(t, e, json + tail, n - tail);
    tr_encoder_free(e);
    tr_tokenizer_free(t);
    free(json);
    return 0;
}
