/* `trireme profile pack`: one file that needs no other, of whatever a profile lies in. */
#ifndef TR_PROFILE_PACK_H
#define TR_PROFILE_PACK_H

#include "profile/read.h"

/* Writes OUT.part beside it, then renames: path has the whole profile or is not touched. */
tr_status tr_profile_pack(tr_reader *r, const char *path, tr_err *err);
/* The same with rows for the ranks that are there only: the file of a node (node.h). */
tr_status tr_profile_pack_present(tr_reader *r, const char *path, tr_err *err);

#endif
