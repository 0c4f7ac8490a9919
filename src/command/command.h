/* The subcommands. argv[0] is the subcommand's name. Each starts and ends MPI by itself where it
 * needs it; the error text is printed by main, once (empty on ranks that stay silent). */
#ifndef TR_COMMAND_COMMAND_H
#define TR_COMMAND_COMMAND_H

#include "base/err.h"

tr_status tr_command_batch(int argc, char **argv, tr_err *err);
tr_status tr_command_bench(int argc, char **argv, tr_err *err);
tr_status tr_command_doctor(int argc, char **argv, tr_err *err);
tr_status tr_command_plan(int argc, char **argv, tr_err *err);
tr_status tr_command_profile(int argc, char **argv, tr_err *err);
tr_status tr_command_version(int argc, char **argv, tr_err *err);

#endif
