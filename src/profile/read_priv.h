/* Shared by read.c (files and ranks), read_regions.c (the tree and what was counted) and read_tables.c. */
#ifndef TR_PROFILE_READ_PRIV_H
#define TR_PROFILE_READ_PRIV_H

#include "profile/read.h"

enum { TR_READER_RANKS_MAX = 65536, TR_READER_REGIONS_MAX = 1 << 20 };
#define TR_READER_CELLS_MAX ((uint64_t)1 << 25) /* ranks x regions: 2.7 GB */

/* One HDF5 file. */
typedef struct tr_reader_file {
    hid_t h5;
    char *name;
    int n_rows; /* along the rank axis */
    int *rank;  /* [n_rows] of each row; -1: absent */
    int n_regions;
    int *region; /* [n_regions] its row to the merged tree's */
} tr_reader_file;

struct tr_reader {
    tr_reader_about about;
    char *path;
    char missing[256]; /* the first of a joined file's files that cannot be read; "": all can */
    tr_reader_file *file;
    int n_files;
    tr_prof_rank *rank;          /* [n_ranks] */
    int *file_of, *row_of;       /* [n_ranks] -1: absent */
    tr_reader_region *region;    /* [n_regions] */
    tr_reader_cell *cell, *none; /* [n_ranks, n_regions], [n_regions] zeros */
    tr_reader_group *group;
    tr_h5_list *member;
    size_t n_members;
    char **note;
    size_t n_notes;
    tr_reader_text *text; /* texts owned */
    size_t n_texts;
};

/* A note is lost rather than an error when memory is. */
void tr_reader_say(tr_reader *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* Trees of all files into one; then the cells of all ranks. */
tr_status tr_reader_load_regions(tr_reader *r, tr_err *err);
tr_status tr_reader_load_cells(tr_reader *r, int phase, tr_reader_cell *cells, bool *any,
                               tr_err *err);

#endif
