/* Synthetic profiles for tests/test_profile_command.sh: profile_make FORM PATH RANKS LAYERS EXPERTS STEPS [trace] [nan] [later]
 * [without DATASET]...; FORM: packed, folder, killed (a folder of .part files that were not closed), or joined (PATH.d/run and
 * PATH). A dataset is a path of the schema. */
#include <config.h>

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tests/profile_fixture.h"

static int take(tr_synthetic *s, int argc, char **argv)
{
    for (int i = 0; i < argc; i++) {
        if (!strcmp(argv[i], "trace")) s->trace = true;
        if (!strcmp(argv[i], "nan")) s->nan = true;
        if (!strcmp(argv[i], "later")) s->later = true;
        if (strcmp(argv[i], "without") != 0) continue;
        const tr_dataset *d = i + 1 < argc ? tr_dataset_find(argv[i + 1], NULL) : NULL;
        for (int k = 0; k < TR_N_DATASETS && !d && i + 1 < argc; k++)
            if (!strcmp(tr_datasets[k].path, argv[i + 1])) d = &tr_datasets[k];
        if (!d) return -1;
        s->absent |= (uint64_t)1 << (d - tr_datasets);
    }
    return 0;
}

int main(int argc, char **argv)
{
    char folder[512];
    if (argc < 7) return 2;
    tr_synthetic s = {.n_ranks = (int)strtol(argv[3], NULL, 10),
                      .n_layers = (int)strtol(argv[4], NULL, 10),
                      .n_experts = (int)strtol(argv[5], NULL, 10),
                      .n_steps = (int)strtol(argv[6], NULL, 10)};
    if (take(&s, argc - 7, argv + 7)) return 2;
    if (!strcmp(argv[1], "packed")) return tr_synthetic_write(argv[2], &s, 0, s.n_ranks) ? 1 : 0;
    if (!strcmp(argv[1], "folder"))
        return mkdir(argv[2], 0777) || tr_synthetic_folder(argv[2], &s) ? 1 : 0;
    if (!strcmp(argv[1], "killed")) {
        s.killed = true;
        _exit(mkdir(argv[2], 0777) || tr_synthetic_folder(argv[2], &s) ? 1 : 0);
    }
    const char *name = strrchr(argv[2], '/');
    name = name ? name + 1 : argv[2];
    snprintf(folder, sizeof folder, "%s.d", argv[2]);
    if (mkdir(folder, 0777)) return 1;
    snprintf(folder, sizeof folder, "%s.d/run", argv[2]);
    if (mkdir(folder, 0777) || tr_synthetic_folder(folder, &s)) return 1;
    snprintf(folder, sizeof folder, "%s.d/run", name);
    return tr_synthetic_join(argv[2], folder, &s) ? 1 : 0;
}
