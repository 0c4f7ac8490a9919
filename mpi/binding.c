#include <config.h>

#include "mpi/binding.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"

tr_bound tr_binding_of(const tr_world *world, const tr_device *device)
{
    tr_bound b = {.host = ""};
    const char *cpus = "";

    snprintf(b.host, sizeof b.host, "%s", world->host);
    snprintf(b.uuid, sizeof b.uuid, "%s", tr_device_uuid(device));
    snprintf(b.device, sizeof b.device, "%.95s", tr_device_describe(device));
    snprintf(b.pci, sizeof b.pci, "%.15s", tr_device_pci(device));
    b.numa = tr_device_numa(device, &cpus);
    snprintf(b.cpus, sizeof b.cpus, "%.47s", cpus);
    return b;
}

tr_status tr_binding_gather(tr_bound **out, tr_comm *control, const tr_bound *mine, tr_err *err)
{
    const size_t n = (size_t)tr_comm_size(control);
    uint64_t failed;
    tr_ticket t = {0};

    *out = NULL;
    tr_bound *all = tr_calloc(n, sizeof *all);
    size_t *bytes = tr_calloc(n, sizeof *bytes);
    /* Nobody may be left alone in the gather. */
    failed = !all || !bytes;
    tr_status st = tr_comm_all_max_u64(control, &failed, 1, &t, err);
    if (st == TR_OK) st = tr_comm_wait(control, TR_LANE_MAIN, t, err);
    if (st == TR_OK && failed) st = tr_fail(err, TR_E_MEMORY, "out of memory");
    for (size_t i = 0; i < n && st == TR_OK; i++)
        bytes[i] = sizeof *all;
    if (st == TR_OK) st = tr_comm_all_gather(control, mine, all, bytes, &t, err);
    if (st == TR_OK) st = tr_comm_wait(control, TR_LANE_MAIN, t, err);
    free(bytes);
    if (st == TR_OK)
        *out = all;
    else
        free(all);
    return st;
}

/* From another process: a text ends inside its field. */
static int same(const char *a, const char *b, size_t room)
{
    return a[0] && strncmp(a, b, room) == 0;
}

tr_status tr_binding_check(const tr_bound *all, int n, tr_err *err)
{
    for (int i = 1; i < n; i++)
        for (int j = 0; j < i; j++)
            if (same(all[i].uuid, all[j].uuid, sizeof all[i].uuid))
                return tr_fail(
                    err, TR_E_USAGE,
                    "ranks %d and %d on %.*s have the same GPU, %.*s: each rank wants one "
                    "of its own; see CUDA_VISIBLE_DEVICES, --gpus-per-node and "
                    "--gpu-bind=none",
                    j, i, (int)sizeof all[i].host, all[i].host, (int)sizeof all[i].uuid,
                    all[i].uuid);
    return TR_OK;
}

/* "P2P 3, NET 4". */
static void write_ways(char *out, size_t room, const int32_t *peers)
{
    static const char *const name[TR_N_WAYS] = {[TR_WAY_P2P] = "P2P",
                                                [TR_WAY_SHM] = "SHM",
                                                [TR_WAY_SAME_HOST] = "local",
                                                [TR_WAY_NET] = "NET"};
    size_t at = 0;

    snprintf(out, room, "-");
    for (int i = 0; i < TR_N_WAYS; i++) {
        if (peers[i] <= 0 || at >= room) continue;
        const int n = snprintf(out + at, room - at, "%s%s %d", at ? ", " : "", name[i], peers[i]);
        at += n > 0 ? (size_t)n : 0;
    }
}

const char *tr_binding_line(char *line, size_t room, const tr_bound *all, int i)
{
    char ways[64], node[16] = "-";

    if (i < 0) {
        snprintf(line, room, "%5s  %-20s %-12s %4s  %-20s %s", "rank", "host", "GPU", "NUMA",
                 "CPUs", "to others");
        return line;
    }
    const tr_bound *b = &all[i];
    if (b->numa >= 0) snprintf(node, sizeof node, "%d", b->numa);
    write_ways(ways, sizeof ways, b->peers);
    snprintf(line, room, "%5d  %-20.*s %-12.*s %4s  %-20.*s %s", i, (int)sizeof b->host, b->host,
             (int)sizeof b->pci, b->pci[0] ? b->pci : "-", node, (int)sizeof b->cpus,
             b->cpus[0] ? b->cpus : "not bound", ways);
    return line;
}
