#include <config.h>

#include "model/patience.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

enum { DEFAULT_S = 30 };

struct tr_patience {
    tr_patience_options o;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t over;
    bool stopping;
};

static struct timespec in_seconds(double s)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    const double ns = (double)t.tv_nsec + s * 1e9, whole = (double)(int64_t)(ns / 1e9);
    t.tv_sec += (time_t)whole;
    t.tv_nsec = (long)(ns - whole * 1e9);
    return t;
}

static void look(const tr_patience *p)
{
    uint64_t ns;
    const char *path = tr_checkpoint_waits(p->o.checkpoint, &ns);

    if (path && (double)ns >= p->o.every_s * 1e9)
        fprintf(p->o.out,
                "trireme: rank %d on %s: waiting for %s: no read of it has ended for %.0f s\n",
                p->o.rank, p->o.host, path, (double)ns / 1e9);
}

static void *watch(void *arg)
{
    tr_patience *p = arg;

    pthread_mutex_lock(&p->lock);
    while (!p->stopping) {
        const struct timespec until = in_seconds(p->o.every_s);
        while (!p->stopping && pthread_cond_timedwait(&p->over, &p->lock, &until) != ETIMEDOUT) {
        }
        if (!p->stopping) look(p);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

tr_status tr_patience_start(tr_patience **out, const tr_patience_options *options, tr_err *err)
{
    pthread_condattr_t attributes;
    tr_patience *p = calloc(1, sizeof *p);

    *out = NULL;
    if (!p) return tr_fail(err, TR_E_MEMORY, "out of memory");
    p->o = *options;
    if (p->o.every_s <= 0) p->o.every_s = DEFAULT_S;
    pthread_mutex_init(&p->lock, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&p->over, &attributes);
    pthread_condattr_destroy(&attributes);
    if (pthread_create(&p->thread, NULL, watch, p) != 0) {
        pthread_cond_destroy(&p->over);
        pthread_mutex_destroy(&p->lock);
        free(p);
        return tr_fail(err, TR_E_MEMORY, "cannot start a thread");
    }
    *out = p;
    return TR_OK;
}

void tr_patience_stop(tr_patience *p)
{
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    p->stopping = true;
    pthread_cond_signal(&p->over);
    pthread_mutex_unlock(&p->lock);
    pthread_join(p->thread, NULL);
    pthread_cond_destroy(&p->over);
    pthread_mutex_destroy(&p->lock);
    free(p);
}
