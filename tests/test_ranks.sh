#!/bin/sh
# Test programs that mean something on several ranks: on 2 and on 4, more than there are cores or not.
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
status=0
for ranks in 2 4; do
    echo "$ranks ranks"
    timeout "$patience_s" "$mpiexec" -n "$ranks" "${TR_BUILDDIR:?}/tests/test_agree" || status=1
done
exit "$status"
