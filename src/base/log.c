#include <config.h>

#include "base/log.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"

#define TERMINAL_GAP_NS 200000000u   /* progress redrawn at most 5 times a second */
#define LINE_GAP_NS     30000000000u /* progress lines at most every 30 s (style.md 8) */

struct tr_log {
    FILE *out;
    bool quiet, verbose, terminal, colour;
    bool drawn; /* a progress text stands on the current terminal line */
    uint64_t progress_ns;
    pthread_mutex_t lock;
};

tr_log *tr_log_create(FILE *out, bool quiet, bool verbose)
{
    tr_log *log = calloc(1, sizeof *log);
    if (!log) return NULL;
    const char *no_colour = getenv("NO_COLOR");
    log->out = out;
    log->quiet = quiet;
    log->verbose = verbose;
    log->terminal = isatty(fileno(out)) == 1;
    log->colour = log->terminal && !(no_colour && *no_colour);
    log->progress_ns = tr_now_ns();
    pthread_mutex_init(&log->lock, NULL);
    return log;
}

void tr_log_free(tr_log *log)
{
    if (!log) return;
    if (log->drawn) fputc('\n', log->out);
    pthread_mutex_destroy(&log->lock);
    free(log);
}

/* One line, written with one call so that lines of several ranks do not mix. */
__attribute__((format(printf, 3, 0))) static void say(tr_log *log, const char *kind,
                                                      const char *fmt, va_list args)
{
    char text[2048];
    vsnprintf(text, sizeof text, fmt, args);
    for (unsigned char *p = (unsigned char *)text; *p; p++)
        if (*p < 0x20 || *p == 0x7f) *p = '?';
    pthread_mutex_lock(&log->lock);
    const char *clear = log->drawn ? "\r\033[K" : "";
    const char *on = log->colour && *kind ? "\033[33m" : "", *off = *on ? "\033[0m" : "";
    fprintf(log->out, "%strireme: %s%s%s%s\n", clear, on, kind, off, text);
    fflush(log->out);
    log->drawn = false;
    pthread_mutex_unlock(&log->lock);
}

void tr_log_info(tr_log *log, const char *fmt, ...)
{
    if (!log || log->quiet) return;
    va_list args;
    va_start(args, fmt);
    say(log, "", fmt, args);
    va_end(args);
}

void tr_log_warn(tr_log *log, const char *fmt, ...)
{
    if (!log || log->quiet) return;
    va_list args;
    va_start(args, fmt);
    say(log, "warning: ", fmt, args);
    va_end(args);
}

void tr_log_debug(tr_log *log, const char *fmt, ...)
{
    if (!log || log->quiet || !log->verbose) return;
    va_list args;
    va_start(args, fmt);
    say(log, "", fmt, args);
    va_end(args);
}

void tr_log_progress(tr_log *log, const char *fmt, ...)
{
    if (!log || log->quiet) return;
    pthread_mutex_lock(&log->lock);
    uint64_t now = tr_now_ns();
    uint64_t gap = log->terminal ? TERMINAL_GAP_NS : LINE_GAP_NS;
    if (now - log->progress_ns >= gap) {
        char text[1024];
        va_list args;
        va_start(args, fmt);
        vsnprintf(text, sizeof text, fmt, args);
        va_end(args);
        fprintf(log->out, log->terminal ? "\r\033[Ktrireme: %s" : "trireme: %s\n", text);
        fflush(log->out);
        log->drawn = log->terminal;
        log->progress_ns = now;
    }
    pthread_mutex_unlock(&log->lock);
}
