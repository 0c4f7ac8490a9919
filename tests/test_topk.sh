#!/bin/sh
# The ranks of a job select the same keys: tests/test_topk_ranks on CPUs, for grids of 2 and 4 ranks.
set -u
: "${TR_BUILDDIR:?}" "${TR_SRCDIR:?}"
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
scratch topk

for n in 2 4; do
    timeout "$patience_s" "$mpiexec" -n "$n" "$TR_BUILDDIR/tests/test_topk_ranks" "$TR_SRCDIR/models/tiny" cpu >"$dir/log" 2>&1
    is "$n ranks" 0 $?
    is "$n ranks: grids" $((n == 2 ? 2 : 5)) "$(grep -c 'OK \]' "$dir/log")"
done
[ "$failed" -eq 0 ]
