/* The joined file: what all ranks' files hold, rank after rank, without copying it. Rank 0, when all files are closed. */
#ifndef TR_PROFILE_JOIN_H
#define TR_PROFILE_JOIN_H

#include "base/err.h"

/* FILE from FOLDER/rank00000.h5 .. of `world` ranks, or from the files of nodes, node%05d.h5, named after each node's lowest
 * rank (node.h). FOLDER is a path relative to the folder that FILE is in: both may be moved together. Written as FILE.part and
 * renamed, so that an earlier FILE is replaced at once or not at all. Numbers of the ranks are virtual datasets; what belongs to
 * the run is copied from the lowest rank's file; expert tokens are summed, balance is computed. Ranks whose file is missing or
 * still a .part are left empty; the attribute ranks_missing counts them, missing lists them, and complete is 1 only where there
 * are none and every file says so. TR_E_IO: no file could be read, or FILE not written. */
tr_status tr_profile_join(const char *file, const char *folder, int world, tr_err *err);

#endif
