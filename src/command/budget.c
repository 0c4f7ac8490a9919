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

static uint64_t host_available(void)
{
    char line[256];
    uint64_t kib = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    if (!f) return 0;
    while (fgets(line, sizeof line, f))
        if (!strncmp(line, "MemAvailable:", 13)) kib = strtoull(line + 13, NULL, 10);
    fclose(f);
    return kib * 1024;
}

/* What the groups from `group` up to the root leave. The names of the two files differ between
 * versions 1 and 2. */
static uint64_t group_room(const char *root, char *group, const char *limit_name,
                           const char *used_name)
{
    char path[PATH_MAX];
    uint64_t room = UINT64_MAX;

    for (;;) {
        if (snprintf(path, sizeof path, "%s%s/%s", root, group, limit_name) >= (int)sizeof path)
            return room;
        uint64_t limit = number_in(path, UINT64_MAX);
        if (snprintf(path, sizeof path, "%s%s/%s", root, group, used_name) >= (int)sizeof path)
            return room;
        uint64_t used = number_in(path, 0);
        if (limit != UINT64_MAX) {
            uint64_t left = used < limit ? limit - used : 0;
            if (left < room) room = left;
        }
        char *slash = strrchr(group, '/');
        if (!slash) return room;
        *slash = 0;
    }
}

static uint64_t groups_available(void)
{
    char line[PATH_MAX];
    uint64_t room = UINT64_MAX;
    FILE *f = fopen("/proc/self/cgroup", "re");
    if (!f) return room;
    while (fgets(line, sizeof line, f)) {
        line[strcspn(line, "\n")] = 0;
        char *names = strchr(line, ':');
        char *group = names ? strchr(names + 1, ':') : NULL;
        uint64_t left = UINT64_MAX;
        if (!group) continue;
        *group++ = 0;
        if (!names[1])
            left = group_room("/sys/fs/cgroup", group, "memory.max", "memory.current");
        else if (!strcmp(names + 1, "memory"))
            left = group_room("/sys/fs/cgroup/memory", group, "memory.limit_in_bytes",
                              "memory.usage_in_bytes");
        if (left < room) room = left;
    }
    fclose(f);
    return room;
}

uint64_t tr_memory_available(void)
{
    uint64_t host = host_available(), group = groups_available();
    return group < host || !host ? (group == UINT64_MAX ? 0 : group) : host;
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
    if (b->left)
        tr_log_info(log, "  left at the moment  %9.3f  beside what has been taken",
                    (double)b->left / 1e9);
    else
        tr_log_info(log, "  left at the moment    unknown");
}
