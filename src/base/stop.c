#include <config.h>

#include "base/stop.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <unistd.h>

/* The one mutable global: a signal handler has no argument of ours. */
static volatile sig_atomic_t stop_signal;

static void on_signal(int number)
{
    if (stop_signal != 0)
        _exit(
            75); /* a second signal: a write under way is one write(2), whole or torn, and resume copes */
    stop_signal = number;
}

tr_status tr_stop_install(tr_err *err)
{
    static const int ask[] = {SIGUSR1, SIGTERM, SIGINT};
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

bool tr_stop_requested(void)
{
    return stop_signal != 0;
}

const char *tr_stop_reason(void)
{
    switch (stop_signal) {
    case 0:
        return NULL;
    case SIGUSR1:
        return "USR1";
    case SIGTERM:
        return "TERM";
    case SIGINT:
        return "INT";
    default:
        return "signal";
    }
}
