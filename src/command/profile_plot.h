/* trireme profile plot: pictures. The tables of `export --csv` are written to a scratch folder and jobs/profile_plot.py
 * (Python with matplotlib) draws them. So everything that a file may hide is checked here, by one reader, also for folders
 * of .part files; the script needs no HDF5, and a site without matplotlib has the tables for tools of its own. */
#ifndef TR_COMMAND_PROFILE_PLOT_H
#define TR_COMMAND_PROFILE_PLOT_H

#include "profile/read.h"

typedef struct tr_plot_options {
    const char *prefix; /* of the pictures' names; NULL: "profile-" */
    const char *peak;   /* "GFLOPS,GBS" or NULL */
    const char *script; /* NULL: looked for beside the program, then where it is installed */
} tr_plot_options;

/* TR_E_INPUT: no script or no Python with matplotlib (the text says what is missing); TR_E_IO. */
tr_status tr_profile_plot(tr_reader *r, const tr_plot_options *o, tr_err *err);

#endif
