/* What a profile says about its run: attributes of / and /run, the environment, the grid. */
#ifndef TR_COMMAND_PROFILE_RUN_H
#define TR_COMMAND_PROFILE_RUN_H

#include "command/open.h"
#include "command/options.h"
#include "mpi/clock_offset.h"
#include "mpi/start.h"
#include "profile/profile.h"

typedef struct tr_profile_gpu { /* empty: the rank computes on the CPU */
    char uuid[41], pci[16], driver[80];
} tr_profile_gpu;

typedef struct tr_profile_about { /* all borrowed */
    const char *run_id;
    int64_t unix_ns; /* of time 0 */
    tr_clock_offset clock;
    const tr_profile_gpu *gpu;
    const tr_batch_options *options;
    const tr_world *world;
    const tr_opened *opened;
    const char *model_name, *kv_dtype;
} tr_profile_about;

/* Between create and start. */
void tr_profile_describe(tr_profile *p, const tr_profile_about *about);
/* /grid/ranks again, with the drift; after stop. */
void tr_profile_describe_rank(tr_profile *p, const tr_world *world, const tr_opened *opened,
                              const tr_profile_gpu *gpu, const tr_clock_offset *clock,
                              double drift_ppb);
/* What the model has counted, into the profile's tables: overlap and rows of experts; rows of this rank's experts, by layer.
 * Main thread, between steps; nothing where there is no model yet. */
void tr_profile_show_model(const tr_opened *opened, tr_profile_tables *out);
void tr_profile_rank_tokens(const tr_opened *opened, uint64_t *per_layer);

#endif
