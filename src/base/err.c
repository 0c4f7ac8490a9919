#include <config.h>

#include "base/err.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* One line, whatever a file name or a tensor name held. Bytes of UTF-8 stay. */
static void keep_one_line(char *text)
{
    for (unsigned char *p = (unsigned char *)text; *p; p++)
        if (*p < 0x20 || *p == 0x7f) *p = '?';
}

tr_status tr_fail(tr_err *err, tr_status status, const char *fmt, ...)
{
    if (!err) return status;
    va_list args;
    va_start(args, fmt);
    vsnprintf(err->text, sizeof err->text, fmt, args);
    va_end(args);
    keep_one_line(err->text);
    err->status = status;
    return status;
}

tr_status tr_fail_of(tr_err *err, tr_status status, const char *what, const char *text)
{
    const size_t n = strlen(what);

    if (strncmp(text, what, n) == 0 && text[n] == ':') return tr_fail(err, status, "%s", text);
    return tr_fail(err, status, "%s: %s", what, text);
}

tr_status tr_within(tr_err *err, const char *fmt, ...)
{
    char front[sizeof err->text], cause[sizeof err->text];
    va_list args;

    memcpy(cause, err->text, sizeof cause);
    va_start(args, fmt);
    vsnprintf(front, sizeof front, fmt, args);
    va_end(args);
    keep_one_line(front);
    /* The cause matters most: a long front is cut rather than the cause lost. */
    size_t n_cause = strlen(cause);
    size_t room = sizeof err->text - 3;
    if (n_cause > room) n_cause = room;
    snprintf(err->text, sizeof err->text, "%.*s: %.*s", (int)(room - n_cause), front, (int)n_cause,
             cause);
    return err->status;
}

int tr_exit_code(tr_status status)
{
    switch (status) {
    case TR_OK:
        return 0;
    case TR_E_USAGE:
        return 2;
    case TR_E_INPUT:
        return 65;
    case TR_E_DEVICE:
        return 70;
    case TR_E_MEMORY:
        return 71;
    case TR_E_IO:
        return 74;
    case TR_E_STOP:
        return 75;
    case TR_E_COMM:
        return 86;
    }
    return 70;
}
