#!/bin/sh
# A few grids of two ranks against one rank; all of them: run_grids.sh.
exec "${TR_SRCDIR:?}/tests/run_grids.sh" "${TRIREME:?}" "$TR_SRCDIR/models/tiny" "${TR_BUILDDIR:?}/tests/compare_records" --quick
