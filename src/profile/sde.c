#include <config.h>

#include "profile/sde.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef HAVE_SDE
#include <sde_lib.h>
#endif

enum { NAME_BYTES = 64, COUNTERS_MAX = 8 + TR_SDE_GROUPS };

struct tr_sde {
    void *library, *handle;
    int n, n_groups;
    char name[COUNTERS_MAX][NAME_BYTES];
    /* PAPI reads them where they are, from the thread that counts or any other. */
    volatile long long steps, tokens_prefill, tokens_decode, tokens_accepted, pages_used;
    volatile long long bytes[TR_SDE_GROUPS];
};

#ifdef HAVE_SDE

typedef void *(*init_fn)(const char *);
typedef int (*register_fn)(void *, const char *, int, int, void *);
typedef int (*describe_fn)(void *, const char *, const char *);
typedef int (*unregister_fn)(void *, const char *);

/* dlsym gives an object pointer; POSIX says that a function's address survives this way. */
static void find(void *library, const char *name, void *out)
{
    void *p = dlsym(library, name);
    memcpy(out, &p, sizeof p);
}

static void offer(tr_sde *s, const char *name, const char *what, int mode, volatile long long *at)
{
    register_fn add;
    describe_fn describe;

    find(s->library, "papi_sde_register_counter", &add);
    find(s->library, "papi_sde_describe_counter", &describe);
    if (!add || s->n == COUNTERS_MAX) return;
    snprintf(s->name[s->n], NAME_BYTES, "%s", name);
    if (add(s->handle, s->name[s->n], PAPI_SDE_RO | mode, PAPI_SDE_long_long, (void *)at) != SDE_OK)
        return;
    if (describe) describe(s->handle, s->name[s->n], what);
    s->n++;
}

tr_sde *tr_sde_open(const char *const *groups, int n)
{
    tr_sde *s = calloc(1, sizeof *s);
    init_fn init = NULL;
    char name[NAME_BYTES];

    if (!s) return NULL;
    /* Global: PAPI looks for libsde's other half among the symbols of the process. */
    s->library = dlopen("libsde.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (s->library) find(s->library, "papi_sde_init", &init);
    s->handle = init ? init("trireme") : NULL;
    if (!s->handle) {
        if (s->library) dlclose(s->library);
        free(s);
        return NULL;
    }
    offer(s, "steps", "steps of the engine", PAPI_SDE_DELTA, &s->steps);
    offer(s, "tokens_prefill", "rows of prompts computed", PAPI_SDE_DELTA, &s->tokens_prefill);
    offer(s, "tokens_decode", "rows of generated tokens computed", PAPI_SDE_DELTA,
          &s->tokens_decode);
    offer(s, "tokens_accepted", "drafts accepted", PAPI_SDE_DELTA, &s->tokens_accepted);
    offer(s, "pages_used", "pages of the cache in use (leader)", PAPI_SDE_INSTANT, &s->pages_used);
    s->n_groups = n < TR_SDE_GROUPS ? n : TR_SDE_GROUPS;
    for (int i = 0; i < s->n_groups; i++) {
        snprintf(name, sizeof name, "bytes_%s", groups[i]);
        offer(s, name, "bytes sent to members of this kind of group", PAPI_SDE_DELTA, &s->bytes[i]);
    }
    return s;
}

/* The library stays: PAPI may still hold addresses of it. */
void tr_sde_close(tr_sde *s)
{
    unregister_fn forget;

    if (!s) return;
    find(s->library, "papi_sde_unregister_counter", &forget);
    for (int i = 0; forget && i < s->n; i++)
        forget(s->handle, s->name[i]);
    free(s);
}

#else

tr_sde *tr_sde_open(const char *const *groups, int n)
{
    (void)groups, (void)n;
    return NULL;
}

void tr_sde_close(tr_sde *s)
{
    free(s);
}

#endif

void tr_sde_step(tr_sde *s, const tr_prof_step *step, const uint64_t *bytes)
{
    if (!s) return;
    s->steps++;
    s->tokens_prefill += step->tok_prefill;
    s->tokens_decode += step->tok_decode;
    s->tokens_accepted += step->accepted;
    s->pages_used = step->pages_used;
    for (int i = 0; i < s->n_groups; i++)
        s->bytes[i] = (long long)bytes[i];
}
