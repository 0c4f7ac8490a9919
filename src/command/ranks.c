#include <config.h>

#include "command/ranks.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "base/size.h"
#include "model/estimate.h"
#include "model/slice.h"

/* "16,16,16,13" into out[room]; *n numbers. */
static tr_status parse_layers(const char *text, int *out, int room, int *n, tr_err *err)
{
    *n = 0;
    for (const char *p = text;; p++) {
        char *end = NULL;
        errno = 0;
        long v = *p >= '0' && *p <= '9' ? strtol(p, &end, 10) : -1;
        if (v < 0 || errno || v > INT32_MAX || (*end && *end != ','))
            return tr_fail(err, TR_E_USAGE,
                           "--pp-layers %s: layers of each stage are wanted, as in 16,16,16,13",
                           text);
        if (*n == room)
            return tr_fail(err, TR_E_USAGE, "--pp-layers %s: there are only %d layers", text, room);
        out[(*n)++] = (int)v;
        if (!*end) return TR_OK;
        p = end;
    }
}

tr_status tr_ranks_choose(tr_ranks *out, const tr_rank_options *options, const tr_config *config,
                          int world, tr_err *err)
{
    const tr_grid_sizes given = {.pp = (int)options->pp,
                                 .dp = (int)options->dp,
                                 .cp = (int)options->cp,
                                 .tp = (int)options->tp,
                                 .ep = (int)options->ep,
                                 .xt = (int)options->moe_tp};
    tr_grid_limits limits = tr_slice_limits(config);
    tr_status st = TR_OK;

    *out = (tr_ranks){.cp_mode = TR_CP_INTERLEAVE};
    if (options->cp_mode && strcmp(options->cp_mode, "in-seq-split") == 0)
        out->cp_mode = TR_CP_ZIGZAG;
    out->stage_layers = tr_calloc((size_t)config->num_hidden_layers, sizeof *out->stage_layers);
    if (!out->stage_layers) return tr_fail(err, TR_E_MEMORY, "out of memory");
    if (options->pp_layers) {
        limits.stage_layers = out->stage_layers;
        st = parse_layers(options->pp_layers, out->stage_layers, config->num_hidden_layers,
                          &limits.n_stage_layers, err);
    }
    if (st == TR_OK) st = tr_grid_choose(&out->sizes, &given, world, &limits, out->why, err);
    if (st == TR_OK && !options->pp_layers)
        tr_estimate_stages(config, &out->sizes, out->stage_layers);
    return st;
}

void tr_ranks_free(tr_ranks *ranks)
{
    free(ranks->stage_layers);
    ranks->stage_layers = NULL;
}

tr_status tr_ranks_place(tr_grid *out, const tr_ranks *ranks, int rank, int world, tr_err *err)
{
    tr_status st = tr_grid_make(out, ranks->sizes, rank, world, err);
    out->stage_layers = ranks->stage_layers;
    return st;
}
