/* Writing small safetensors files for tests. */
#ifndef TR_TESTS_SHARD_FILE_H
#define TR_TESTS_SHARD_FILE_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct tr_shard_file {
    char *header; /* JSON without its closing brace */
    size_t n_header;
    unsigned char *data;
    size_t n_data;
} tr_shard_file;

static inline void tr_shard_file_text(tr_shard_file *f, const char *text)
{
    size_t n = strlen(text);
    char *grown = realloc(f->header, f->n_header + n + 1);
    if (!grown) abort();
    memcpy(grown + f->n_header, text, n + 1);
    f->header = grown;
    f->n_header += n;
}

/* shape: "[2, 3]". data NULL: zeros. */
static inline void tr_shard_file_add(tr_shard_file *f, const char *name, const char *dtype,
                                     const char *shape, const void *data, size_t n)
{
    char text[512];
    snprintf(text, sizeof text,
             "%s\"%s\":{\"dtype\":\"%s\",\"shape\":%s,\"data_offsets\":[%zu,%zu]}",
             f->n_header ? "," : "{", name, dtype, shape, f->n_data, f->n_data + n);
    tr_shard_file_text(f, text);
    unsigned char *grown = realloc(f->data, f->n_data + n + 1);
    if (!grown) abort();
    f->data = grown;
    if (data)
        memcpy(f->data + f->n_data, data, n);
    else
        memset(f->data + f->n_data, 0, n);
    f->n_data += n;
}

/* The bytes of a file: length, header (as given), data. Owned by the caller. */
static inline unsigned char *tr_shard_bytes_of(const char *header, size_t n_header,
                                               const void *data, size_t n_data, size_t *n)
{
    unsigned char *b = malloc(8 + n_header + n_data + 1);
    if (!b) abort();
    for (int i = 0; i < 8; i++)
        b[i] = (unsigned char)(n_header >> (8 * i));
    memcpy(b + 8, header, n_header);
    if (n_data) memcpy(b + 8 + n_header, data, n_data);
    *n = 8 + n_header + n_data;
    return b;
}

/* Closes the header, pads it with spaces to a multiple of 8, gives the file's bytes; empties f. */
static inline unsigned char *tr_shard_file_finish(tr_shard_file *f, size_t *n)
{
    if (!f->n_header) tr_shard_file_text(f, "{");
    tr_shard_file_text(f, "}");
    while (f->n_header % 8)
        tr_shard_file_text(f, " ");
    unsigned char *b = tr_shard_bytes_of(f->header, f->n_header, f->data, f->n_data, n);
    free(f->header);
    free(f->data);
    *f = (tr_shard_file){0};
    return b;
}

#endif
