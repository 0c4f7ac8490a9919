#include <config.h>

#include "base/stop.h"

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>
#include <unistd.h>

/* The one mutable global: a signal handler has no argument of ours. */
static volatile sig_atomic_t stop_signal;

static void on_signal(int number)
{
    /* The alarm is nobody's signal: it neither is a second one nor makes the next one that. */
    if (number == SIGALRM && stop_signal != 0) return;
    /* A second signal: a write under way is one write(2), whole or torn, and resume copes. */
    if (stop_signal != 0 && stop_signal != SIGALRM) _exit(75);
    stop_signal = number;
}

tr_status tr_stop_install(tr_err *err)
{
    static const int ask[] = {SIGUSR1, SIGTERM, SIGINT, SIGALRM};
    static const int ignore[] = {SIGPIPE, SIGHUP, SIGXFSZ};
    struct sigaction action;

    memset(&action, 0, sizeof action);
    sigemptyset(&action.sa_mask);
    action.sa_flags = SA_RESTART;
    action.sa_handler = on_signal;
    for (size_t i = 0; i < sizeof ask / sizeof *ask; i++)
        if (sigaction(ask[i], &action, NULL) != 0)
            return tr_fail(err, TR_E_IO, "cannot install a signal handler: %s", strerror(errno));
    action.sa_handler = SIG_IGN;
    for (size_t i = 0; i < sizeof ignore / sizeof *ignore; i++)
        if (sigaction(ignore[i], &action, NULL) != 0)
            return tr_fail(err, TR_E_IO, "cannot ignore a signal: %s", strerror(errno));
    return TR_OK;
}

void tr_stop_alarm(double seconds)
{
    const int64_t us = seconds > 0 ? (int64_t)(seconds * 1e6) + 1 : 0;
    const struct itimerval t = {
        .it_value = {.tv_sec = (time_t)(us / 1000000), .tv_usec = (suseconds_t)(us % 1000000)}};
    setitimer(ITIMER_REAL, &t, NULL); /* of good values it cannot fail */
}

bool tr_stop_requested(void)
{
    return stop_signal != 0;
}

/* Until there is something to read, or room to write. False: a stop was asked for. */
static bool wait_for(int fd, short events)
{
    enum {
        LOOK_MS = 100
    }; /* another thread may have got the signal, or this one just before poll */
    struct pollfd p = {.fd = fd, .events = events};

    while (!tr_stop_requested()) {
        const int n = poll(&p, 1, LOOK_MS);
        /* Whatever else is the matter with fd, the call itself will say so. */
        if (n > 0 || (n < 0 && errno != EINTR)) return true;
    }
    errno = ECANCELED;
    return false;
}

ssize_t tr_stop_read(int fd, void *buf, size_t n)
{
    while (wait_for(fd, POLLIN)) {
        const ssize_t got = read(fd, buf, n);
        if (got >= 0 || (errno != EINTR && errno != EAGAIN)) return got;
    }
    return -1;
}

ssize_t tr_stop_write(int fd, const void *buf, size_t n)
{
    while (wait_for(fd, POLLOUT)) {
        const ssize_t put = write(fd, buf, n < PIPE_BUF ? n : PIPE_BUF);
        if (put >= 0 || (errno != EINTR && errno != EAGAIN)) return put;
    }
    return -1;
}

tr_status tr_stop_fail(const char *what, tr_err *err)
{
    return tr_fail(err, TR_E_STOP, "%s: stopped by %s", what, tr_stop_reason());
}

/* URGENT beside the signal's number. */
enum { URGENT = 1 << 16 };

uint64_t tr_stop_word(void)
{
    const int number = stop_signal;
    return (uint64_t)number | (number == SIGTERM ? URGENT : 0);
}

bool tr_stop_word_urgent(uint64_t word)
{
    return word >= URGENT;
}

const char *tr_stop_word_name(uint64_t word)
{
    switch (word & (URGENT - 1)) {
    case 0:
        return word ? "signal" : NULL;
    case SIGUSR1:
        return "USR1";
    case SIGTERM:
        return "TERM";
    case SIGINT:
        return "INT";
    case SIGALRM:
        return "the time budget";
    default:
        return "signal";
    }
}

const char *tr_stop_reason(void)
{
    return tr_stop_word_name(tr_stop_word());
}
