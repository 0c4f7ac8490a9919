/* A profile as its readers see it, whatever it lies in: the joined file of a run (virtual datasets over the ranks' files), a
 * packed file, one rank's file, or the folder FILE.d/RUN of rank files, also those of a run that was killed (.part, after
 * h5clear -s). Used by show, diff, export and pack; one thread, nothing is written.
 *
 * Nothing read is trusted: sizes and indices are checked here, so callers may use them. A rank whose file is missing or
 * damaged beside others that are not is absent: it is said in a note and has no rows. What a version later than 1.0 adds is
 * ignored; what a profile does not have reads as empty. */
#ifndef TR_PROFILE_READ_H
#define TR_PROFILE_READ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "profile/h5read.h"
#include "profile/schema.h"

typedef struct tr_reader tr_reader;

typedef enum tr_reader_form {
    TR_READER_FILE, /* joined or packed */
    TR_READER_RANK, /* a rank's own file, or a node's with its ranks, but the one that rank 0 is in */
    TR_READER_FOLDER, /* rank or node files */
} tr_reader_form;

typedef struct tr_reader_about {
    const char *path; /* as opened: a folder may be the one run within FILE.d */
    tr_reader_form form;
    int n_ranks;   /* of the run, as far as the files know */
    int n_present; /* with rows */
    int n_regions;
    int n_groups;
    bool ended;    /* every file that is there says that the run came to its end */
    bool complete; /* the run ended and said so, on every rank, and none of them is missing */
} tr_reader_about;

/* A region, the same for all ranks: trees of single files are merged by name, parent and layer. */
typedef struct tr_reader_region {
    int parent; /* smaller than its own index; -1: root of a stream */
    int depth, layer, group;
    tr_region_kind kind;
    char name[65];
} tr_reader_region;

/* What one rank recorded in one region: /profile/... and /phase/... */
typedef struct tr_reader_cell {
    uint64_t count, incl_ns, excl_ns, min_ns, max_ns, bytes, exposed_ns;
    uint64_t gpu_ns, gpu_count; /* calls that were timed on the GPU; 0 of count: none */
    double sumsq, flops;        /* finite */
} tr_reader_cell;

typedef struct tr_reader_group {
    int id, size;
    char name[17];
    const int32_t *member; /* [n_members] */
    size_t n_members;
} tr_reader_group;

/* TR_E_INPUT: no profile, damaged, of another major version; TR_E_IO; TR_E_MEMORY. */
tr_status tr_reader_open(tr_reader **out, const char *path, tr_err *err);
void tr_reader_close(tr_reader *r);
/* Whether `path` is one of the files it reads, a joined file's ranks' files among them: by device and number. */
bool tr_reader_reads(const tr_reader *r, const char *path);

const tr_reader_about *tr_reader_about_of(const tr_reader *r);

/* What should be told with the profile, one line each: absent ranks, files left out. NULL behind the last. */
const char *tr_reader_note(const tr_reader *r, size_t i);

/* Attributes of "/", "/run" and so on as text, numbers in decimal; NULL: absent. Borrowed. */
const char *tr_reader_attribute(const tr_reader *r, const char *object, const char *name);
/* All of them, as "/run", "model", value; NULL behind the last. */
typedef struct tr_reader_text {
    const char *object, *name, *value;
    bool is_number; /* a whole one */
} tr_reader_text;
const tr_reader_text *tr_reader_text_at(const tr_reader *r, size_t i);

/* Of 0 .. n_ranks - 1. An absent rank has a record with its number alone. */
bool tr_reader_has(const tr_reader *r, int rank);
const tr_prof_rank *tr_reader_rank(const tr_reader *r, int rank);

/* [n_regions], [n_groups] */
const tr_reader_region *tr_reader_regions(const tr_reader *r);
const tr_reader_group *tr_reader_groups(const tr_reader *r);
/* The name of a kind of group, "" for -1 and what has none. */
const char *tr_reader_group_name(const tr_reader *r, int id);
/* "main/step/layer/attention", of layers with the number: "layer 3". Returns text. */
const char *tr_reader_region_path(const tr_reader *r, int region, char *text, size_t n);

/* [n_regions] of a rank; zeros where it is absent. */
const tr_reader_cell *tr_reader_cells(const tr_reader *r, int rank);
const tr_reader_cell *tr_reader_all_cells(const tr_reader *r); /* [n_ranks, n_regions] */
/* [n_ranks, n_regions] of a phase, the caller's to free; NULL with TR_OK: not recorded. */
tr_status tr_reader_phase(tr_reader *r, tr_phase phase, tr_reader_cell **cells, tr_err *err);

/* One dataset in memory, elements as schema.h says. rank >= 0: that rank's part of a dataset with a rank axis (the axis is
 * left out of dim; none where the rank is absent); -1: a dataset without one. path: NULL, or the dataset's whole path where
 * the schema's is a folder. Region numbers are those of tr_reader_regions, moments those of one clock. A dataset that is not
 * there has n = 0. The caller frees data->at. */
tr_status tr_reader_read(tr_reader *r, tr_dataset_id id, const char *path, int rank,
                         tr_h5_data *data, tr_err *err);

/* /steps of a rank without the empty rows behind the last, in the order of their beginnings. The caller frees. */
tr_status tr_reader_steps(tr_reader *r, int rank, tr_prof_step **steps, size_t *n, tr_err *err);

/* Whole paths of the datasets in a folder of the schema (TR_DATASET_NAMED), of all files, in the order of the alphabet;
 * tr_h5_texts_free. */
tr_status tr_reader_names(tr_reader *r, tr_dataset_id id, char ***paths, size_t *n, tr_err *err);
/* An attribute of a dataset: of the first file that has it; the caller frees, NULL: absent. */
char *tr_reader_attribute_of(tr_reader *r, const char *path, const char *name);
/* All of them, of the first file that has the dataset, until see returns false. */
void tr_reader_attributes_of(tr_reader *r, const char *path,
                             bool (*see)(void *ctx, const char *name, const char *value,
                                         bool is_number),
                             void *ctx);

/* /log and /run/env: texts; of env two for each variable. */
tr_status tr_reader_texts(tr_reader *r, tr_dataset_id id, char ***texts, size_t *n, tr_err *err);

#endif
