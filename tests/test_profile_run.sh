#!/bin/bash
# Profiles of whole runs: on one rank and on four, with stages that have different layers; answers are the same as without;
# a run that is killed leaves a file that h5clear makes readable.
set -u
trireme=${TRIREME:?} model=${TR_SRCDIR:?}/models/tiny compare=${TR_BUILDDIR:?}/tests/compare_records
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
mpi_environment
scratch profile

# What reads a profile without us.
python=
for candidate in "${PYTHON:-python3}" /usr/bin/python3; do
    if "$candidate" -c 'import h5py, numpy' 2>/dev/null; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || echo 'no python3 with h5py: contents are not checked'
command -v h5dump >/dev/null || echo 'no h5dump (hdf5-tools): files are not dumped'

complain()
{
    echo "$*"
    failed=1
}

# check FILE RANKS [part]
check()
{
    if [ -n "$python" ]; then
        HDF5_USE_FILE_LOCKING=FALSE "$python" "$TR_SRCDIR/tests/check_profile.py" "$@" || complain "$1: its contents"
    fi
    if command -v h5dump >/dev/null; then
        h5dump "$1" >"$dir/dump" 2>"$dir/complaints" || complain "h5dump $1: $(head -n 3 "$dir/complaints")"
        grep -q '"trireme-profile"' "$dir/dump" || complain "h5dump $1: no schema"
    fi
}

in=$dir/in.jsonl
head -n 6 "$TR_SRCDIR/jobs/quickstart.jsonl" >"$in"
"$trireme" batch -m "$model" -i "$in" -o "$dir/plain.jsonl" 2>"$dir/log" || complain "$(cat "$dir/log")"

SLURM_JWT=not-for-the-file SLURM_JOB_NAME=kept-in-the-file "$trireme" batch -m "$model" -i "$in" \
    -o "$dir/one.jsonl" --profile "$dir/one.h5" --profile-trace 2>"$dir/log" ||
    complain "one rank: $(cat "$dir/log")"
grep -q 'the profile ends here' "$dir/log" && complain "$(cat "$dir/log")"
"$compare" "$dir/plain.jsonl" "$dir/one.jsonl" || complain 'one rank: other answers than without a profile'
check "$dir/one.h5" 1
grep -qa kept-in-the-file "$dir/one.h5" || complain 'one rank: the Slurm job has no name in the file'
grep -qa not-for-the-file "$dir"/one.h5 "$dir"/one.h5.d/*/* && complain 'one rank: a secret is in the file'

# An event that there is not: said at the start, with the reason.
"$trireme" batch -m "$model" --prompt hello --profile "$dir/absent.h5" --papi NO_SUCH_EVENT >/dev/null 2>"$dir/log" ||
    complain "no such event: $(cat "$dir/log")"
grep -q -- '--papi: NO_SUCH_EVENT is not counted: .' "$dir/log" || complain "no such event is not told of: $(cat "$dir/log")"

if [ -n "$mpiexec" ]; then
    for grid in '--pp 2 --tp 2' '--dp 2 --cp 2'; do
        name=four${grid//[!a-z0-9]/}
        # shellcheck disable=SC2086 # options
        timeout "$patience_s" "$mpiexec" -n 4 "$trireme" batch -m "$model" -i "$in" -o "$dir/$name.jsonl" $grid \
            --profile "$dir/$name.h5" 2>"$dir/log" || complain "$grid: $(cat "$dir/log")"
        check "$dir/$name.h5" 4
        [ -z "$(find "$dir/$name.h5.d" -name "*.part" -o -name "*.new")" ] || complain "$grid: a file was not closed"
    done

    # A relative FILE is rank 0's, wherever the others run; and one file of the node in place of its ranks'.
    mkdir "$dir/here" "$dir/there"
    wd=-wdir
    "$mpiexec" --version 2>/dev/null | grep -qi 'open mpi' || wd=-wd
    (cd "$dir/here" && timeout "$patience_s" "$mpiexec" -n 1 $wd "$dir/here" "$trireme" batch -m "$model" -i "$in" \
        -o "$dir/wdir.jsonl" --tp 2 --profile run.h5 : -n 1 $wd "$dir/there" "$trireme" batch -m "$model" -i "$in" \
        -o "$dir/wdir.jsonl" --tp 2 --profile run.h5) 2>"$dir/log" || complain "other folders: $(cat "$dir/log")"
    check "$dir/here/run.h5" 2
    [ -z "$(ls -A "$dir/there")" ] || complain "other folders: $(ls "$dir/there") in the other rank's"

    mkdir "$dir/tmp"
    TMPDIR=$dir/tmp timeout "$patience_s" "$mpiexec" -n 4 "$trireme" batch -m "$model" -i "$in" -o "$dir/node.jsonl" --dp 2 --cp 2 \
        --profile "$dir/node.h5" --profile-files node 2>"$dir/log" || complain "--profile-files node: $(cat "$dir/log")"
    grep -q 'profile' "$dir/log" && complain "--profile-files node: $(cat "$dir/log")"
    check "$dir/node.h5" 4
    [ "$(cd "$dir/node.h5.d" && ls ./*)" = node00000.h5 ] || complain "--profile-files node: $(ls "$dir"/node.h5.d/*)"
    find "$dir/tmp" -name 'trireme-profile-*' | grep -q . && complain '--profile-files node: its folder is still there'
    "$trireme" profile show "$dir/node.h5" | grep -q '4 ranks' || complain '--profile-files node: show'
else
    echo 'no MPI launcher: one rank only'
fi

"$TR_SRCDIR/tests/run_profile_kill.sh" "$trireme" "$model" 1 || complain 'a killed run'

# In the way of nothing: a folder that cannot be made is a line on standard error.
echo >"$dir/file"
"$trireme" batch -m "$model" -i "$in" -o "$dir/none.jsonl" --profile "$dir/file/x.h5" 2>"$dir/log" ||
    complain "no folder: $(cat "$dir/log")"
grep -q 'no profile:' "$dir/log" || complain "no folder: $(cat "$dir/log")"
grep -q "no joined profile" "$dir/log" && complain "no folder, told twice: $(cat "$dir/log")"
"$compare" "$dir/plain.jsonl" "$dir/none.jsonl" || complain 'no folder: other answers'
exit "$failed"
