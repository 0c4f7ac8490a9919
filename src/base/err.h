/* Errors: one status, one line of text that grows towards the user.
 *
 * A function that can fail returns tr_status and takes a tr_err last. Whoever knows what was being attempted
 * puts it in front on the way up (tr_within); only main prints, once. Thread-safe: a tr_err belongs to its caller. */
#ifndef TR_BASE_ERR_H
#define TR_BASE_ERR_H

typedef enum tr_status {
    TR_OK = 0,
    TR_E_USAGE,  /* the user asked for something impossible   exit 2  */
    TR_E_INPUT,  /* input or checkpoint missing or damaged    exit 65 */
    TR_E_DEVICE, /* CUDA                                      exit 70 */
    TR_E_MEMORY, /* host or device memory                     exit 71 */
    TR_E_IO,     /* the operating system said no              exit 74 */
    TR_E_COMM,   /* NCCL or MPI failed or hung                exit 86 */
    TR_E_STOP,   /* stopped early; the run can be resumed     exit 75 */
} tr_status;

typedef struct tr_err {
    tr_status status;
    char text[1024]; /* one line, no newline; innermost cause last */
} tr_err;

/* Start an error; returns `status`, so callers write `return tr_fail(...)`. err may be NULL (the text is lost).
 * Control characters in the text become '?', so that a hostile file name or tensor name stays one line. */
tr_status tr_fail(tr_err *err, tr_status status, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* Put "what we were doing: " in front of an error that came from below; returns err->status. */
tr_status tr_within(tr_err *err, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* tr_fail with "what: text", where the text does not begin with that itself. */
tr_status tr_fail_of(tr_err *err, tr_status status, const char *what, const char *text);

/* The process exit code of a status (architecture.md 5). */
int tr_exit_code(tr_status status);

#endif
