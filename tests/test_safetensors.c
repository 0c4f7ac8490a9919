#include <config.h>

#include <dirent.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

#include "model/checkpoint.h"
#include "model/safetensors.h"
#include "tests/scratch.h"
#include "tests/shard_file.h"
#include "tests/vectors.h"

static char dir[128];

static char *path_of(const char *name)
{
    char *path = test_malloc(256); /* CMocka's: freed by the caller with test_free */
    snprintf(path, 256, "%s/%s", dir, name);
    return path;
}

/* ---- sizes -------------------------------------------------------------------------------------------------------- */

static void shapes_become_bytes(void **state)
{
    (void)state;
    /* clang-format off */
    static const struct { size_t element; int rank; int64_t shape[9]; int ok; uint64_t bytes; } cases[] = {
        {4, 0, {0}, 1, 4},
        {2, 1, {0}, 1, 0},
        {2, 2, {3, 5}, 1, 30},
        {1, 8, {1, 1, 1, 1, 1, 1, 1, 7}, 1, 7},
        {1, 9, {1, 1, 1, 1, 1, 1, 1, 1, 1}, 0, 0},
        {1, -1, {1}, 0, 0},
        {1, 1, {-1}, 0, 0},
        {1, 2, {0, -5}, 0, 0},
        {1, 1, {INT64_MAX}, 1, INT64_MAX},
        {2, 1, {INT64_MAX}, 1, 2 * (uint64_t)INT64_MAX},
        {4, 1, {INT64_MAX}, 0, 0},
        {1, 2, {INT64_C(1) << 32, INT64_C(1) << 32}, 0, 0},
        {1, 2, {INT64_C(1) << 32, (INT64_C(1) << 32) - 1}, 1, ((UINT64_C(1) << 32) - 1) << 32},
        {2, 2, {INT64_C(1) << 32, INT64_C(1) << 31}, 0, 0},
        {1, 3, {4194305, 4194305, 211106198978564}, 0, 0}, /* 4 modulo 2^64 */
        {1, 3, {INT64_C(1) << 62, 4, 0}, 0, 0},
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        uint64_t bytes = 77;
        bool ok = tr_tensor_bytes(cases[i].element, cases[i].rank, cases[i].shape, &bytes);
        assert_int_equal(ok, cases[i].ok);
        assert_true(bytes == (ok ? cases[i].bytes : 77));
    }
}

/* ---- one file ----------------------------------------------------------------------------------------------------- */

static tr_status open_bytes(const void *b, size_t n, tr_shard **s, tr_err *err)
{
    char *path = path_of("a.safetensors");
    assert_int_equal(tr_scratch_write(dir, "a.safetensors", b, n), 0);
    tr_status st = tr_shard_open(s, path, err);
    test_free(path);
    return st;
}

static tr_status open_header(const char *header, size_t n_data, tr_shard **s, tr_err *err)
{
    static const char zeros[64] = {0};
    size_t n;
    assert_true(n_data <= sizeof zeros);
    unsigned char *b = tr_shard_bytes_of(header, strlen(header), zeros, n_data, &n);
    tr_status st = open_bytes(b, n, s, err);
    free(b);
    return st;
}

static void good_headers_open(void **state)
{
    (void)state;
    /* clang-format off */
    static const struct { const char *header; size_t n_data, n_tensors; } good[] = {
        {"{}", 0, 0},
        {"{}      ", 0, 0},
        {"{\"__metadata__\":{\"format\":\"pt\"}}", 0, 0},
        {"{\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}", 4, 1},
        {"{\"a\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16],\"more\":1}}", 16, 1},
        /* Order in the header is free; empty tensors may share an offset. */
        {"{\"b\":{\"dtype\":\"BF16\",\"shape\":[2],\"data_offsets\":[4,8]},"
          "\"z\":{\"dtype\":\"F32\",\"shape\":[0,9],\"data_offsets\":[4,4]},"
          "\"y\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[4,4]},"
          "\"x\":{\"dtype\":\"F32\",\"shape\":[0],\"data_offsets\":[8,8]},"
          "\"a\":{\"dtype\":\"F8_E4M3\",\"shape\":[2,2],\"data_offsets\":[0,4]}}", 8, 5},
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        tr_shard *s = NULL;
        tr_err err = {0};
        if (open_header(good[i].header, good[i].n_data, &s, &err) != TR_OK)
            fail_msg("%s: %s", good[i].header, err.text);
        assert_int_equal(tr_shard_count(s), good[i].n_tensors);
        tr_shard_close(s);
    }
}

#define T(name, dtype, shape, offsets)                                                             \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

/* Every check of the list (reliability.md 2), broken one by one; `names` must be in the message. */
static void bad_headers_are_refused(void **state)
{
    (void)state;
    /* clang-format off */
    static const struct { const char *header; size_t n_data; const char *names; } bad[] = {
        {"", 0, "does not begin"},
        {" {}", 0, "does not begin"},
        {"[]", 0, "does not begin"},
        {"{", 0, "header"},
        {"{} x", 0, "header"},
        {"{\"a\":1e999}", 0, "header"},
        {"{\"\xff\":{}}", 0, "header"},
        {"{\"a\\u0000b\":{}}", 0, "header"},
        {"{" T("a", "F32", "[1]", "[0,4]") "," T("a", "F32", "[1]", "[0,4]") "}", 4, "duplicate"},
        {"{\"__metadata__\":[]}", 0, "__metadata__"},
        {"{\"__metadata__\":{\"n\":1}}", 0, "__metadata__"},
        {"{\"tensor.a\":1}", 0, "tensor.a"},
        {"{\"tensor.a\":{}}", 0, "tensor.a"},
        {"{\"tensor.a\":{\"dtype\":1,\"shape\":[],\"data_offsets\":[0,4]}}", 4, "tensor.a"},
        {"{" T("tensor.a", "F33", "[1]", "[0,4]") "}", 4, "F33"},
        {"{" T("tensor.a", "f32", "[1]", "[0,4]") "}", 4, "f32"},
        {"{" T("tensor.a", "F32", "1", "[0,4]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[-1]", "[0,4]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[1.0]", "[0,4]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[\"1\"]", "[0,4]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[9223372036854775808]", "[0,4]") "}", 4, "header"},
        {"{" T("tensor.a", "F32", "[9223372036854775807]", "[0,4]") "}", 4, "64 bits"},
        {"{" T("tensor.a", "F8_E4M3", "[4194305,4194305,211106198978564]", "[0,4]") "}", 4, "64 bits"},
        {"{" T("tensor.a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "9 dimensions"},
        {"{" T("tensor.a", "F32", "[1]", "[0,8]") "}", 8, "tensor.a"},
        {"{" T("tensor.a", "F32", "[3]", "[0,8]") "}", 8, "tensor.a"},
        {"{" T("tensor.a", "F32", "[1]", "[4,0]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[1]", "[0,4,8]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[1]", "[0]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[1]", "[0,4.0]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[1]", "[-4,0]") "}", 4, "tensor.a"},
        {"{" T("tensor.a", "F32", "[2]", "[0,8]") "}", 4, "cut off"},           /* past the end */
        {"{" T("tensor.a", "F32", "[0]", "[5,5]") "}", 4, "tensor.a"},          /* empty, past the end */
        {"{" T("b", "U8", "[2]", "[0,2]") "," T("tensor.a", "F32", "[1]", "[2,6]") "}", 6, "multiple"},
        {"{" T("b", "F32", "[1]", "[0,4]") "," T("tensor.a", "F32", "[1]", "[0,4]") "}", 4, "overlaps"},
        {"{" T("b", "U8", "[4]", "[0,4]") "," T("tensor.a", "U8", "[2]", "[2,4]") "}", 4, "overlaps"},
        {"{" T("b", "U8", "[4]", "[0,4]") "," T("tensor.a", "U8", "[0]", "[2,2]") "}", 4, "overlaps"},
        {"{" T("b", "U8", "[2]", "[0,2]") "," T("tensor.a", "U8", "[2]", "[4,6]") "}", 6, "no tensor"},
        {"{" T("tensor.a", "U8", "[2]", "[1,3]") "}", 3, "no tensor"},          /* hole in front */
        {"{" T("tensor.a", "U8", "[2]", "[0,2]") "}", 3, "no tensor"},          /* rest behind */
        {"{}", 1, "no tensor"},
    };
    /* clang-format on */
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        tr_shard *s = NULL;
        tr_err err = {0};
        tr_status st = open_header(bad[i].header, bad[i].n_data, &s, &err);
        if (st != TR_E_INPUT || s || !strstr(err.text, bad[i].names) ||
            !strstr(err.text, "a.safetensors"))
            fail_msg("%s: status %d, \"%s\"", bad[i].header, (int)st, err.text);
    }
}

static void header_lengths_are_checked(void **state)
{
    (void)state;
    static const uint64_t lengths[] = {
        3, 9, UINT64_MAX, UINT64_MAX - 7, (100 << 20) + 1, INT64_MAX, UINT64_C(1) << 63};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        unsigned char b[10];
        for (int k = 0; k < 8; k++)
            b[k] = (unsigned char)(lengths[i] >> (8 * k));
        b[8] = '{';
        b[9] = '}';
        tr_shard *s = NULL;
        tr_err err = {0};
        assert_int_equal(open_bytes(b, sizeof b, &s, &err), TR_E_INPUT);
        assert_non_null(strstr(err.text, "header of"));
    }
}

static void lfs_pointers_are_called_so(void **state)
{
    (void)state;
    static const char text[] =
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
    for (size_t n = 8; n < sizeof text; n++) {
        tr_shard *s = NULL;
        tr_err err = {0};
        assert_int_equal(open_bytes((const unsigned char *)text, n, &s, &err), TR_E_INPUT);
        assert_non_null(
            strstr(err.text, n < 23 ? "header of" : "a.safetensors: a git-lfs pointer"));
    }
}

/* A file with all that occurs: metadata, three types, an empty tensor, padding. */
static unsigned char *sample(size_t *n)
{
    tr_shard_file f = {0};
    unsigned char data[40];
    for (size_t i = 0; i < sizeof data; i++)
        data[i] = (unsigned char)(3 * i + 1);
    tr_shard_file_text(&f, "{\"__metadata__\":{\"format\":\"pt\"}");
    tr_shard_file_add(&f, "w", "F8_E4M3", "[3,4]", data, 12);
    tr_shard_file_add(&f, "w_scale_inv", "F32", "[1,1]", data + 12, 4);
    tr_shard_file_add(&f, "nothing", "F32", "[0]", NULL, 0);
    tr_shard_file_add(&f, "norm", "BF16", "[2,6]", data + 16, 24);
    return tr_shard_file_finish(&f, n);
}

static void files_cut_anywhere_are_refused(void **state)
{
    (void)state;
    size_t n;
    unsigned char *b = sample(&n);
    tr_shard *s = NULL;
    tr_err err = {0};
    for (size_t cut = 0; cut < n; cut++) {
        assert_int_equal(open_bytes(b, cut, &s, &err), TR_E_INPUT);
        assert_non_null(strstr(err.text, "a.safetensors"));
        assert_null(s);
    }
    if (open_bytes(b, n, &s, &err) != TR_OK) fail_msg("%s", err.text);
    tr_shard_close(s);
    b[n] = 0; /* room for one byte more is there */
    assert_int_equal(open_bytes(b, n + 1, &s, &err), TR_E_INPUT);
    free(b);
}

/* Each bit of length and header: refused, or every tensor lies in the data and together they are the data. */
static void flipped_header_bits_do_no_harm(void **state)
{
    (void)state;
    size_t n, n_refused = 0;
    unsigned char *b = sample(&n);
    size_t n_header = n - 40;
    for (size_t bit = 0; bit < 8 * n_header; bit++) {
        tr_shard *s = NULL;
        tr_err err = {0};
        b[bit / 8] ^= (unsigned char)(1u << bit % 8);
        tr_status st = open_bytes(b, n, &s, &err);
        b[bit / 8] ^= (unsigned char)(1u << bit % 8);
        if (st != TR_OK) {
            assert_int_equal(st, TR_E_INPUT);
            n_refused++;
            continue;
        }
        uint64_t sum = 0;
        for (size_t i = 0; i < tr_shard_count(s); i++) {
            const tr_tensor *t = &tr_shard_tensors(s)[i];
            assert_true(t->offset >= 8 && t->offset <= n && t->bytes <= n - t->offset);
            sum += t->bytes;
        }
        assert_true(sum <= n - 8);
        tr_shard_close(s);
    }
    assert_true(n_refused > 4 * n_header); /* what survives is a changed name or metadata */
    free(b);
}

static void other_things_than_files_are_refused(void **state)
{
    (void)state;
    char *path = path_of("fifo.safetensors");
    tr_shard *s = NULL;
    tr_err err = {0};
    assert_int_equal(tr_shard_open(&s, path, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "fifo.safetensors"));
    assert_int_equal(mkfifo(path, 0600), 0);
    assert_int_equal(tr_shard_open(&s, path, &err),
                     TR_E_INPUT); /* and does not wait for a writer */
    assert_int_equal(tr_shard_open(&s, dir, &err), TR_E_INPUT);
    unlink(path);
    test_free(path);
}

/* ---- a folder ----------------------------------------------------------------------------------------------------- */

static void write_sample(const char *name)
{
    size_t n;
    unsigned char *b = sample(&n);
    assert_int_equal(tr_scratch_write(dir, name, b, n), 0);
    free(b);
}

static void write_text(const char *name, const char *text)
{
    assert_int_equal(tr_scratch_write(dir, name, text, strlen(text)), 0);
}

static void tensors_are_read_by_range(void **state)
{
    (void)state;
    tr_checkpoint *c = NULL;
    tr_err err = {0};
    unsigned char got[16];
    uint16_t block[4];

    tr_scratch_clear(dir, 0);
    write_sample("model.safetensors");
    if (tr_checkpoint_open(&c, dir, &err) != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(tr_checkpoint_count(c), 4);
    assert_null(tr_checkpoint_find(c, "absent"));
    assert_null(tr_checkpoint_find(c, ""));
    const tr_tensor *w = tr_checkpoint_find(c, "w"), *norm = tr_checkpoint_find(c, "norm");
    assert_non_null(w);
    assert_non_null(norm);
    assert_int_equal(w->stored, TR_STORED_F8_E4M3);
    assert_int_equal(norm->stored, TR_STORED_BF16);
    assert_int_equal(tr_checkpoint_find(c, "w_scale_inv")->stored, TR_STORED_F32);
    assert_non_null(strstr(tr_checkpoint_path(c, w), "model.safetensors"));

    assert_int_equal(tr_checkpoint_read(c, w, 2, 9, got, &err), TR_OK);
    for (int i = 0; i < 9; i++)
        assert_int_equal(got[i], (unsigned char)(3 * (i + 2) + 1));
    assert_int_equal(tr_checkpoint_read_block(c, w, 1, 2, 1, 2, got, &err), TR_OK);
    assert_int_equal(got[0], (unsigned char)(3 * 5 + 1));
    assert_int_equal(got[1], (unsigned char)(3 * 6 + 1));
    assert_int_equal(got[2], (unsigned char)(3 * 9 + 1));
    assert_int_equal(got[3], (unsigned char)(3 * 10 + 1));
    assert_int_equal(tr_checkpoint_read_block(c, norm, 0, 2, 4, 2, block, &err), TR_OK);
    for (int i = 0; i < 4; i++) {
        int at = 16 + 2 * (i / 2 * 6 + 4 + i % 2);
        assert_int_equal(block[i], (uint8_t)(3 * at + 1) | (uint8_t)(3 * at + 4) << 8);
    }
    assert_int_equal(tr_checkpoint_bytes_read(c), 9 + 4 + 8);

    /* Outside the tensor: refused, by name, and nothing is written. */
    got[0] = 99;
    assert_int_equal(tr_checkpoint_read(c, w, 0, 13, got, &err), TR_E_INPUT);
    assert_int_equal(tr_checkpoint_read(c, w, 13, 1, got, &err), TR_E_INPUT);
    assert_int_equal(tr_checkpoint_read(c, w, UINT64_MAX, 2, got, &err), TR_E_INPUT);
    assert_non_null(strstr(err.text, ": w: "));
    assert_int_equal(tr_checkpoint_read_block(c, w, 2, 2, 0, 1, got, &err), TR_E_INPUT);
    assert_int_equal(tr_checkpoint_read_block(c, w, 0, 1, 3, 2, got, &err), TR_E_INPUT);
    assert_int_equal(tr_checkpoint_read_block(c, w, -1, 1, 0, 1, got, &err), TR_E_INPUT);
    assert_int_equal(tr_checkpoint_read_block(c, w, 0, INT64_MAX, 0, 1, got, &err), TR_E_INPUT);
    assert_int_equal(got[0], 99);
    tr_checkpoint_close(c);
}

static void files_that_change_after_open_are_noticed(void **state)
{
    (void)state;
    char *path = path_of("model.safetensors");
    unsigned char got[16];
    tr_err err = {0};
    size_t n;
    free(sample(&n));
    for (int k = 0; k < 3; k++) {
        tr_checkpoint *c = NULL;
        tr_scratch_clear(dir, 0);
        write_sample("model.safetensors");
        assert_int_equal(tr_checkpoint_open(&c, dir, &err), TR_OK);
        assert_int_equal(truncate(path, (off_t)(k == 0 ? n - 1 : k == 1 ? 0 : n + 5)), 0);
        assert_int_equal(tr_checkpoint_read(c, tr_checkpoint_find(c, "w"), 0, 12, got, &err),
                         TR_E_INPUT);
        assert_non_null(strstr(err.text, "model.safetensors: w: "));
        tr_checkpoint_close(c);
    }
    test_free(path);
}

static tr_status open_dir(tr_err *err)
{
    tr_checkpoint *c = NULL;
    tr_status st = tr_checkpoint_open(&c, dir, err);
    assert_true((st == TR_OK) == (c != NULL));
    tr_checkpoint_close(c);
    return st;
}

static void indexes_are_checked(void **state)
{
    (void)state;
    /* clang-format off */
    static const struct { const char *index, *names; } bad[] = {
        {"", "model.safetensors.index.json"},
        {"[]", "model.safetensors.index.json"},
        {"{}", "weight_map"},
        {"{\"weight_map\":{}}", "weight_map"},
        {"{\"weight_map\":[\"w\"]}", "weight_map"},
        {"{\"weight_map\":{\"w\":1}}", "w"},
        {"{\"weight_map\":{\"w\":\"\"}}", "not the name"},
        {"{\"weight_map\":{\"w\":\".\"}}", "not the name"},
        {"{\"weight_map\":{\"w\":\"..\"}}", "not the name"},
        {"{\"weight_map\":{\"w\":\"../one.safetensors\"}}", "not the name"},
        {"{\"weight_map\":{\"w\":\"/etc/passwd\"}}", "not the name"},
        {"{\"weight_map\":{\"w\":\"sub/one.safetensors\"}}", "not the name"},
        {"{\"weight_map\":{\"w\":\"two.safetensors\"}}", "two.safetensors"}, /* missing shard */
        {"{\"weight_map\":{\"w\":\"one.safetensors\"}}", "norm"},            /* not listed */
        {"{\"weight_map\":{\"w\":\"one.safetensors\",\"w_scale_inv\":\"one.safetensors\","
         "\"norm\":\"one.safetensors\",\"nothing\":\"one.safetensors\",\"v\":\"one.safetensors\"}}", "v is not in"},
        {"{\"weight_map\":{\"w\":\"one.safetensors\",\"w\":\"one.safetensors\"}}", "duplicate"},
    };
    static const char good[] =
        "{\"metadata\":{\"total_size\":1},\"weight_map\":{\"w\":\"one.safetensors\","
        "\"w_scale_inv\":\"one.safetensors\",\"norm\":\"one.safetensors\",\"nothing\":\"one.safetensors\"}}";
    /* clang-format on */
    tr_err err = {0};
    tr_scratch_clear(dir, 0);
    assert_int_equal(open_dir(&err), TR_E_INPUT); /* nothing there */
    assert_non_null(strstr(err.text, dir));
    write_sample("one.safetensors");
    write_text("model.safetensors.index.json", good);
    if (open_dir(&err) != TR_OK) fail_msg("%s", err.text);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        write_text("model.safetensors.index.json", bad[i].index);
        tr_status st = open_dir(&err);
        if (st != TR_E_INPUT || !strstr(err.text, bad[i].names))
            fail_msg("%s: status %d, \"%s\"", bad[i].index, (int)st, err.text);
    }
    for (size_t cut = 0; cut + 1 < sizeof good; cut++) {
        assert_int_equal(tr_scratch_write(dir, "model.safetensors.index.json", good, cut), 0);
        assert_int_equal(open_dir(&err), TR_E_INPUT);
    }
    /* The same tensor in two shards. */
    write_sample("two.safetensors");
    write_text("model.safetensors.index.json",
               "{\"weight_map\":{\"w\":\"one.safetensors\",\"w_scale_inv\":\"two.safetensors\"}}");
    assert_int_equal(open_dir(&err), TR_E_INPUT);
    assert_non_null(strstr(err.text, "two.safetensors"));
    assert_non_null(strstr(err.text, "one.safetensors"));
}

/* The first n of three tensors with 24 bytes of data, in a file of its own. */
static void write_second(const char *name, int n)
{
    tr_shard_file f = {0};
    static const unsigned char data[24] = {1, 2, 3};
    size_t bytes;
    tr_shard_file_text(&f, "{\"__metadata__\":{\"format\":\"pt\"}");
    tr_shard_file_add(&f, "u", "F32", "[2]", data, 8);
    if (n > 1) tr_shard_file_add(&f, "v", "BF16", "[4]", data + 8, 8);
    if (n > 2) tr_shard_file_add(&f, "z", "U8", "[8]", data + 16, 8);
    unsigned char *b = tr_shard_file_finish(&f, &bytes);
    assert_int_equal(tr_scratch_write(dir, name, b, bytes), 0);
    free(b);
}

static void expect_refused(const char *one, const char *other)
{
    tr_err err = {0};
    assert_int_equal(open_dir(&err), TR_E_INPUT);
    if (!strstr(err.text, one) || !strstr(err.text, other))
        fail_msg("'%s' without '%s' and '%s'", err.text, one, other);
}

/* Two shards under each other's names, one of them twice, and each cut behind each of its tensors: as a download that broke off, and
 * as a whole file with fewer of them. */
static void shards_that_are_swapped_or_lack_tensors_are_refused(void **state)
{
    (void)state;
    char *one = path_of("one.safetensors"), *two = path_of("two.safetensors"),
         *aside = path_of("aside");
    struct stat sb;
    tr_err err = {0};

    tr_scratch_clear(dir, 0);
    write_sample("one.safetensors");
    write_second("two.safetensors", 3);
    write_text("model.safetensors.index.json",
               "{\"weight_map\":{\"w\":\"one.safetensors\",\"w_scale_inv\":\"one.safetensors\","
               "\"nothing\":\"one.safetensors\",\"norm\":\"one.safetensors\","
               "\"u\":\"two.safetensors\",\"v\":\"two.safetensors\",\"z\":\"two.safetensors\"}}");
    if (open_dir(&err) != TR_OK) fail_msg("%s", err.text);
    assert_int_equal(rename(one, aside) | rename(two, one) | rename(aside, two), 0);
    expect_refused("is not in", "one.safetensors");
    write_sample("one.safetensors"); /* now twice */
    expect_refused("one.safetensors", "two.safetensors");
    for (int n = 1; n < 3; n++) {
        write_second("two.safetensors", n);
        expect_refused("z is not in", "two.safetensors");
        write_second("two.safetensors", 3);
        assert_int_equal(stat(two, &sb), 0);
        assert_int_equal(truncate(two, sb.st_size - 8 * n), 0);
        expect_refused("data_offsets", n == 1 ? "two.safetensors: z" : "two.safetensors: v");
    }
    write_second("two.safetensors", 3);
    if (open_dir(&err) != TR_OK) fail_msg("%s", err.text);
    test_free(one);
    test_free(two);
    test_free(aside);
}

static void identity_knows_names_sizes_and_headers(void **state)
{
    (void)state;
    char path[512], a[33], b[33];
    tr_checkpoint *c = NULL;
    tr_err err = {0};
    size_t n;

    tr_vector_path(path, sizeof path, "model/tiny");
    if (tr_checkpoint_open(&c, path, &err) != TR_OK) fail_msg("%s", err.text);
    tr_checkpoint_identity(c, a);
    assert_int_equal(strspn(a, "0123456789abcdef"), 32);
    /* Sorted by shard, then offset; every tensor is found as itself. */
    for (size_t i = 0; i < tr_checkpoint_count(c); i++) {
        const tr_tensor *t = tr_checkpoint_tensor(c, i);
        assert_ptr_equal(tr_checkpoint_find(c, t->name), t);
        assert_ptr_equal(t, tr_checkpoint_tensor(c, 0) + i);
        if (i) assert_true(t[-1].shard < t->shard || t[-1].offset <= t->offset);
    }
    tr_checkpoint_close(c);
    assert_int_equal(tr_checkpoint_open(&c, path, &err), TR_OK);
    tr_checkpoint_identity(c, b);
    assert_string_equal(a, b);
    tr_checkpoint_close(c);

    tr_scratch_clear(dir, 0);
    unsigned char *bytes = sample(&n);
    assert_int_equal(tr_scratch_write(dir, "model.safetensors", bytes, n), 0);
    assert_int_equal(tr_checkpoint_open(&c, dir, &err), TR_OK);
    tr_checkpoint_identity(c, a);
    tr_checkpoint_close(c);
    char *pt = strstr((char *)bytes + 8, "\"pt\"");
    assert_non_null(pt);
    pt[1] = 'q';
    assert_int_equal(tr_scratch_write(dir, "model.safetensors", bytes, n), 0);
    assert_int_equal(tr_checkpoint_open(&c, dir, &err), TR_OK);
    tr_checkpoint_identity(c, b);
    assert_string_not_equal(a, b);
    tr_checkpoint_close(c);
    free(bytes);
}

static void published_checkpoints_open(void **state)
{
    (void)state;
    char path[3][512];
    tr_vector_path(path[0], sizeof path[0], "model/tiny");
    tr_vector_path(path[1], sizeof path[1], "model/realgeom");
    tr_source_path(path[2], sizeof path[2], "models/tiny");
    for (int i = 0; i < 3; i++) {
        tr_checkpoint *c = NULL;
        tr_err err = {0};
        /* realgeom has expected.safetensors beside it: only what the index (or the one name) says is opened */
        if (tr_checkpoint_open(&c, path[i], &err) != TR_OK) fail_msg("%s", err.text);
        assert_non_null(tr_checkpoint_find(c, "model.embed_tokens.weight"));
        tr_checkpoint_close(c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shapes_become_bytes),
        cmocka_unit_test(good_headers_open),
        cmocka_unit_test(bad_headers_are_refused),
        cmocka_unit_test(header_lengths_are_checked),
        cmocka_unit_test(lfs_pointers_are_called_so),
        cmocka_unit_test(files_cut_anywhere_are_refused),
        cmocka_unit_test(flipped_header_bits_do_no_harm),
        cmocka_unit_test(other_things_than_files_are_refused),
        cmocka_unit_test(tensors_are_read_by_range),
        cmocka_unit_test(files_that_change_after_open_are_noticed),
        cmocka_unit_test(indexes_are_checked),
        cmocka_unit_test(shards_that_are_swapped_or_lack_tensors_are_refused),
        cmocka_unit_test(identity_knows_names_sizes_and_headers),
        cmocka_unit_test(published_checkpoints_open),
    };
    if (!tr_scratch_make(dir, sizeof dir)) return 77;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    tr_scratch_clear(dir, 1);
    return failed;
}
