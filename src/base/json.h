/* Reading JSON through jansson: strict (duplicate keys refused, UTF-8 checked), with the place of the fault in
 * the message, and every number taken with a declared range. See build.md 5 for what jansson does and does not. */
#ifndef TR_BASE_JSON_H
#define TR_BASE_JSON_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "base/err.h"

/* Read a whole file of at most max_bytes; *text is NUL-terminated, owned by the caller (free).
 * TR_E_INPUT: missing, too large; TR_E_IO: the system failed to read. */
tr_status tr_file_read(const char *path, size_t max_bytes, char **text, size_t *n, tr_err *err);

/* Parse a JSON file whose root is an object. *out is a new reference (json_decref).
 * TR_E_INPUT with "path: line L, column C: what" when it is not JSON. */
tr_status tr_json_load(json_t **out, const char *path, size_t max_bytes, tr_err *err);

/* Parse text; flags as json_loadb's besides JSON_REJECT_DUPLICATES, which is always set. On failure line and column
 * (1-based, column in bytes) are given in *line, *column (may be NULL) and the text says them too. */
tr_status tr_json_parse(json_t **out, const char *text, size_t n, size_t flags, int *line,
                        int *column, tr_err *err);

/* json_loadb, safe where memory ends: NULL and *no_memory then (e says nothing). jansson 2.14 alone may lose a character of a
 * string, or write beyond one. */
json_t *tr_json_loadb(const char *text, size_t n, size_t flags, json_error_t *e, bool *no_memory);

/* Typed members of an object. Absent or null: *out keeps its value and TR_OK is returned; a wrong type or a value out
 * of range is TR_E_INPUT with the key named. An integer must be a JSON integer (1e3 and 2.0 are refused). */
tr_status tr_json_int(const json_t *object, const char *key, int64_t min, int64_t max, int64_t *out,
                      tr_err *err);
tr_status tr_json_double(const json_t *object, const char *key, double min, double max, double *out,
                         tr_err *err);
tr_status tr_json_bool(const json_t *object, const char *key, bool *out, tr_err *err);
/* *out borrows from the object. Strings may hold NUL when JSON_ALLOW_NUL was given: *n counts (n may be NULL). */
tr_status tr_json_string(const json_t *object, const char *key, const char **out, size_t *n,
                         tr_err *err);

#endif
