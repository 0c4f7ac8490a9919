#include <config.h>

#include "command/budget.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The first number of a file, or `none` where there is none ("max"). */
static uint64_t number_in(const char *path, uint64_t none)
{
    char text[64];
    uint64_t v = none;
    FILE *f = fopen(path, "re");
    if (!f) return none;
    if (fgets(text, sizeof text, f) && text[0] >= '0' && text[0] <= '9')
        v = strtoull(text, NULL, 10);
    fclose(f);
    return v;
}

/* The number behind `name` in a file of such lines, 0 where there is none. */
static uint64_t number_of(const char *path, const char *name)
{
    char line[256];
    const size_t n = strlen(name);
    uint64_t v = 0;
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    while (fgets(line, sizeof line, f))
        if (!strncmp(line, name, n) && line[n] == ' ') v = strtoull(line + n, NULL, 10);
    fclose(f);
    return v;
}

static uint64_t host_available(const char *root)
{
    char path[PATH_MAX];

    if (snprintf(path, sizeof path, "%s/proc/meminfo", root) >= (int)sizeof path) return UINT64_MAX;
    const uint64_t kib = number_of(path, "MemAvailable:");
    return kib ? kib * 1024 : UINT64_MAX;
}

/* What versions 1 and 2 of control groups call their files and the lines of memory.stat, sums over the groups below. */
typedef struct version {
    const char *at, *limit, *used, *file[2];
} version;
static const version versions[2] = {
    {"/sys/fs/cgroup/memory",
     "memory.limit_in_bytes",
     "memory.usage_in_bytes",
     {"total_active_file", "total_inactive_file"}},
    {"/sys/fs/cgroup", "memory.max", "memory.current", {"active_file", "inactive_file"}},
};

/* The path of a file of a group; NULL: longer than paths are. */
static const char *group_file(char path[PATH_MAX], const char *root, const version *v,
                              const char *group, const char *name)
{
    const int n = snprintf(path, PATH_MAX, "%s%s%s/%s", root, v->at, group, name);
    return n < PATH_MAX ? path : NULL;
}

/* What the groups from `group` up to the root leave. */
static uint64_t group_room(const char *root, const version *v, char *group)
{
    char path[PATH_MAX];
    uint64_t room = UINT64_MAX;

    for (;;) {
        if (!group_file(path, root, v, group, v->limit)) return room;
        const uint64_t limit = number_in(path, UINT64_MAX);
        if (!group_file(path, root, v, group, v->used)) return room;
        uint64_t used = number_in(path, 0);
        if (!group_file(path, root, v, group, "memory.stat")) return room;
        const uint64_t files = number_of(path, v->file[0]) + number_of(path, v->file[1]);
        used -= files < used ? files : used;
        if (limit != UINT64_MAX) {
            const uint64_t left = used < limit ? limit - used : 0;
            if (left < room) room = left;
        }
        char *slash = strrchr(group, '/');
        if (!slash) return room;
        *slash = 0;
    }
}

static uint64_t groups_available(const char *root)
{
    char line[PATH_MAX];
    uint64_t room = UINT64_MAX;

    if (snprintf(line, sizeof line, "%s/proc/self/cgroup", root) >= (int)sizeof line) return room;
    FILE *f = fopen(line, "re");
    if (!f) return room;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *names = strchr(line, ':');
        char *group = names ? strchr(names + 1, ':') : NULL;
        uint64_t left = UINT64_MAX;
        if (!group) continue;
        *group++ = 0;
        if (!names[1])
            left = group_room(root, &versions[1], group);
        else if (!strcmp(names + 1, "memory"))
            left = group_room(root, &versions[0], group);
        if (left < room) room = left;
    }
    fclose(f);
    return room;
}

uint64_t tr_memory_available_under(const char *root)
{
    const uint64_t host = host_available(root), group = groups_available(root);
    return group < host ? group : host;
}

uint64_t tr_memory_available(void)
{
    return tr_memory_available_under("");
}

void tr_budget_print(const tr_budget *b, tr_log *log)
{
    const double least = (double)b->weights + (double)b->workspace + (double)b->cache_least;

    tr_log_info(log, "memory of rank %d on %s (%s), GB (10^9 bytes):", b->rank, b->host, b->device);
    tr_log_info(log, "  weights             %9.3f  fewer with more ranks",
                (double)b->weights / 1e9);
    tr_log_info(log, "  buffers of a step   %9.3f  --max-batch-tokens %d, --max-sequences %d",
                (double)b->workspace / 1e9, b->max_batch_tokens, b->max_sequences);
    tr_log_info(log, "  caches, at least    %9.3f  --max-model-len %d, --kv-dtype %s",
                (double)b->cache_least / 1e9, b->max_model_len, b->kv_dtype);
    tr_log_info(log, "  caches, at most     %9.3f  for --max-sequences %d of that length",
                (double)b->cache_whole / 1e9, b->max_sequences);
    tr_log_info(log, "  needed, at least    %9.3f", least / 1e9);
    if (b->left != UINT64_MAX)
        tr_log_info(log, "  left at the moment  %9.3f  beside what has been taken",
                    (double)b->left / 1e9);
    else
        tr_log_info(log, "  left at the moment    unknown");
}
