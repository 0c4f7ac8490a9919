/* The journal alone, for tests/fault/replay.py. Record i of a run of N is the refusal of request "r<i>", longer than one
 * 512-byte block for some i.
 *
 *   resume_state write OUT N SYNC       open OUT, append the records that it lacks, a sync every SYNC lines, close
 *   resume_state check N                for each OUT named on stdin: open, say which records were found ("0 1 5", or "refused
 *                                       WHY"), append the rest, close, open again; all N must be found then
 *   resume_state print N                the records, for the checker to compare with
 */
#include <config.h>

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "batch/journal.h"
#include "batch/record.h"

#define HASH "0123456789abcdef0123456789abcdef"

static const tr_run_field fields[] = {{"input", HASH}, {"model", "m-1"}, {"seed", "0"}};

static tr_key key_of(int i)
{
    char id[16];
    snprintf(id, sizeof id, "r%d", i);
    return tr_key_id(id, strlen(id));
}

/* The caller's; with its line feed. */
static tr_buf record(int i)
{
    const tr_record_options o = {.input_hash = HASH, .model = "m"};
    tr_buf line = {0};
    tr_refusal refusal = {.status = 400, .type = "invalid_request_error", .code = "x"};
    char id[16];

    snprintf(id, sizeof id, "r%d", i);
    memset(refusal.message, 'a' + i % 26, (size_t)(i * 97 % 380)); /* 200 to 580 bytes each */
    const tr_record_name name = {id, strlen(id), 0};
    if (tr_record_refusal(&line, &o, &name, &refusal, NULL) != TR_OK) abort();
    return line;
}

static tr_journal *open_out(const char *path, int sync_lines, tr_err *err)
{
    const tr_journal_options o = {
        .run = {.out_path = path, .field = fields, .n_fields = sizeof fields / sizeof *fields},
        .input_hash = HASH,
        .sync_lines = sync_lines,
        .retry_ms = 1,
    };
    tr_journal *j = NULL;
    return tr_journal_open(&j, &o, err) == TR_OK ? j : NULL;
}

/* Appends what is missing of n records and closes. */
static bool complete(tr_journal *j, int n, tr_err *err)
{
    tr_status st = TR_OK;
    for (int i = 0; i < n && st == TR_OK; i++) {
        if (tr_journal_has(j, key_of(i))) continue;
        tr_buf line = record(i);
        st = tr_journal_append(j, line.s, line.n, err);
        free(line.s);
    }
    tr_status closed = tr_journal_close(j, st == TR_OK ? err : NULL);
    return st == TR_OK && closed == TR_OK;
}

static int check(const char *path, int n)
{
    tr_err err = {0};
    tr_journal *j = open_out(path, 64, &err);
    int n_has = 0;

    if (!j) {
        printf("refused %s\n", err.text);
        return 1;
    }
    for (int i = 0; i < n; i++)
        if (tr_journal_has(j, key_of(i))) printf(n_has++ ? " %d" : "%d", i);
    bool good = (size_t)n_has == tr_journal_found(j) && complete(j, n, &err);
    j = good ? open_out(path, 64, &err) : NULL;
    good = j && tr_journal_found(j) == (size_t)n;
    tr_journal_close(j, NULL);
    puts(good ? "" : " and cannot be completed");
    return !good;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    tr_err err = {0};
    int bad = 0;

    if (!strcmp(what, "write") && argc == 5) {
        tr_journal *j = open_out(argv[2], atoi(argv[4]), &err);
        if (!j || !complete(j, atoi(argv[3]), &err)) {
            fprintf(stderr, "resume_state: %s\n", err.text);
            return 1;
        }
    } else if (!strcmp(what, "check") && argc == 3) {
        char path[4096];
        while (fgets(path, sizeof path, stdin)) {
            path[strcspn(path, "\n")] = 0;
            bad |= check(path, atoi(argv[2]));
            fflush(stdout);
        }
    } else if (!strcmp(what, "print") && argc == 3) {
        for (int i = 0; i < atoi(argv[2]); i++) {
            tr_buf line = record(i);
            fwrite(line.s, 1, line.n, stdout);
            free(line.s);
        }
    } else {
        fprintf(stderr, "usage: resume_state write OUT N SYNC | check N | print N\n");
        return 2;
    }
    return bad;
}
