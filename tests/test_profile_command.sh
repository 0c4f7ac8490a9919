#!/bin/sh
# trireme profile: the command line, and every export checked by its consumer or its format. test_profile_read has the numbers
# one by one; here is what a user runs. Consumers that are not installed are skipped, each with its reason.
# shellcheck disable=SC2015 # fail does not come back
set -u
: "${TRIREME:?}" "${TR_BUILDDIR:?}" "${TR_SRCDIR:?}"
make=$TR_BUILDDIR/tests/profile_make
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
scratch profile
cd "$dir" || exit 1

fail()
{
    echo "$*"
    exit 1
}

# refused CODE WORD ARGUMENTS...: it ends with this code, one line on stderr that has the word, nothing on stdout.
refused()
{
    code=$1 word=$2
    shift 2
    "$TRIREME" profile "$@" >out 2>err
    got=$?
    [ "$got" -eq "$code" ] || fail "profile $*: exit $got, not $code: $(cat err)"
    [ ! -s out ] || fail "profile $*: it was refused and printed something"
    [ "$(wc -l <err)" -eq 1 ] || fail "profile $*: not one line: $(cat err)"
    grep -qF -e "$word" err || fail "profile $*: '$(cat err)' does not say '$word'"
}

"$make" packed p.h5 4 3 8 6 trace && "$make" joined j.h5 4 3 8 6 trace && "$make" packed one.h5 1 2 4 3 &&
    "$make" packed z.h5 2 2 4 0 || fail 'the synthetic profiles could not be made'

# ---- the command line
refused 2 'show, diff, export, pack or plot is wanted'
refused 2 'show, diff, export, pack or plot is wanted' list p.h5
refused 2 'FILE is missing' show
refused 2 'two profiles are wanted' diff p.h5
refused 2 'belongs to no option' show p.h5 j.h5
refused 2 'one of --chrome' export p.h5
refused 2 'one of --chrome' export p.h5 --chrome --tau
refused 2 'does not take --csv' show p.h5 --csv
refused 2 'does not take --top' pack p.h5 -o o.h5 --top 3
refused 2 '-o OUT.h5 is missing' pack p.h5
refused 2 '--rank goes with --hatchet' export p.h5 --csv --rank 1
refused 2 '--rank 9: not in' export p.h5 --hatchet --rank 9 -o h.json
refused 2 'two positive numbers' plot p.h5 --peak 12
refused 2 '--by layer' diff p.h5 p.h5 --by layer
refused 65 'No such file' show none.h5
echo 'no profile' >text
refused 65 'not an HDF5 file' show text
refused 74 'none/o.h5' pack p.h5 -o none/o.h5
refused 74 'none/o.json' export p.h5 --chrome -o none/o.json
refused 65 'no steps in it to divide by' diff z.h5 p.h5 --per step
refused 65 'no script here' plot p.h5 --script 'no script here'
[ ! -e o.h5 ] && [ ! -e h.json ] && [ ! -e h.json.part ] || fail 'a refused command left a file behind'
"$TRIREME" profile --help >out || fail 'no help'
awk 'length > 80 { print; bad = 1 } END { exit bad }' out || fail 'help is wider than 80 columns'

# ---- show, diff, pack
for f in p.h5 j.h5 j.h5.d one.h5 z.h5; do
    "$TRIREME" profile show "$f" >out || fail "show $f"
    [ "$(wc -l <out)" -le 66 ] || fail "show $f: $(wc -l <out) lines are no screen"
    awk 'NR > 1 && length > 100 { print; bad = 1 } END { exit bad }' out || fail "show $f: wider than 100 columns"
    grep -q '^PHASES' out && grep -q '^OPERATIONS' out && grep -q '^RANKS' out && grep -q '^WORST LAYERS' out &&
        grep -q '^TOKENS' out || fail "show $f: a block is missing"
done
"$TRIREME" profile diff p.h5 j.h5 --csv --by path >out || fail 'diff'
awk -F, 'NR > 1 && $(NF - 2) != "1.000" { print; bad = 1 } END { exit bad || NR < 20 }' out ||
    fail 'the same profile in two forms differs'
"$TRIREME" profile diff one.h5 p.h5 --per token >out || fail 'diff of two grids'
"$TRIREME" profile pack j.h5 -o packed.h5 || fail 'pack'
# A joined file without its folder.
mkdir moved && cp j.h5 moved
refused 65 'is not beside it: copy their folder too' show moved/j.h5
# Nothing is written over what is read, nor over what is not trireme's.
cp p.h5 q.h5 && ln -s q.h5 link.h5
refused 2 'a file of the profile that is read' export q.h5 --chrome -o q.h5
refused 2 'a file of the profile that is read' export q.h5 --hatchet -o link.h5
refused 2 'a file of the profile that is read' pack q.h5 -o link.h5
refused 2 'a file of the profile that is read' pack j.h5 -o j.h5.d/run/rank00002.h5
refused 2 'and it is no profile' pack j.h5 -o text
refused 2 'a file is wanted' pack j.h5 -o -
refused 2 'a folder is wanted' export j.h5 --csv -o -
cmp p.h5 q.h5 || fail 'a profile was written over'
mkfifo pipe && cat pipe >piped &
until [ -p pipe ]; do sleep 0.1; done
refused 2 'and it is no profile' pack j.h5 -o pipe
"$TRIREME" profile export p.h5 --hatchet -o pipe && wait && [ -p pipe ] && [ -s piped ] || fail 'a pipe is not written to'
rm -r j.h5.d
"$TRIREME" profile show packed.h5 >out && grep -q '^model synthetic; 4 ranks' out || fail 'the packed file needs others'
"$TRIREME" profile diff p.h5 packed.h5 --csv --by path >out || fail 'diff'
awk -F, 'NR > 1 && $(NF - 2) != "1.000" { print; bad = 1 } END { exit bad || NR < 20 }' out || fail 'packing changed a time'

# ---- a run that was killed
if command -v h5clear >/dev/null; then
    "$make" killed k 3 2 4 3 || fail 'no killed run'
    refused 65 '3 of 3 files were not closed' show k
    refused 65 'for f in k/*.part; do h5clear -s' pack k -o k.h5
    refused 65 'h5clear -s k/rank00002.h5.part' show k/rank00002.h5.part
    for f in k/*.part; do h5clear -s "$f" || fail h5clear; done
    "$TRIREME" profile show k >out && grep -q '3 ranks' out || fail 'a killed run cannot be read after h5clear'
    "$TRIREME" profile pack k -o k.h5 && "$TRIREME" profile show k.h5 >out || fail 'a killed run cannot be packed'
    rm k/rank00001.h5.part
    "$TRIREME" profile show k | grep -q 'note: rank 1 of 3 is missing' || fail 'a missing rank is not said'
else
    echo 'skipped: .part files: no h5clear here (Debian: hdf5-tools)'
fi

# ---- a real run, of two ranks
mpi_environment
if [ -n "$mpiexec" ]; then
    for i in 1 2 3; do
        echo '{"custom_id": "'$i'", "method": "POST", "url": "/v1/completions", "body": {"prompt": [41, 42, 43], "max_tokens": 4}}'
    done >in.jsonl
    run='run-%j%%.h5' # as where nobody has filled in Slurm's pattern
    "$mpiexec" -n 2 "$TRIREME" batch -m "$TR_SRCDIR/models/tiny" -i in.jsonl -o out.jsonl --max-model-len 256 --tp 2 \
        --profile "$run" --profile-trace >out 2>&1 || fail "batch --profile: $(cat out)"
    "$TRIREME" profile show "$run" >out || fail 'show of a real run'
    grep -q '^model tiny; 2 ranks on 1 node' out && grep -q '3 requests (0 failed)' out && ! grep -q '^note' out ||
        fail "a real run is shown as $(head -5 out)"
    "$TRIREME" profile pack "$run.d" -o real.h5 && "$TRIREME" profile export "$run" --chrome -o r.json &&
        "$TRIREME" profile diff "$run" real.h5 --csv --by path >out || fail 'pack, export or diff of a real run'
    awk -F, 'NR > 1 && $(NF - 2) != "1.000" { print; bad = 1 } END { exit bad || NR < 40 }' out ||
        fail 'packing a real run changed a time'
else
    echo 'skipped: a real run: no MPI launcher was found'
fi

# ---- exports
"$TRIREME" profile export p.h5 --chrome -o c.json && "$TRIREME" profile export one.h5 --chrome >c1.json &&
    "$TRIREME" profile export z.h5 --chrome -o cz.json && "$TRIREME" profile export p.h5 --hatchet -o h.json &&
    "$TRIREME" profile export p.h5 --hatchet --rank 3 -o h3.json && "$TRIREME" profile export p.h5 --tau -o tau &&
    "$TRIREME" profile export p.h5 --csv -o csv || fail 'an export failed'
# Again over the same ranks; not beside those of a run that had more.
"$TRIREME" profile export p.h5 --tau -o tau || fail 'an export could not be made again'
"$TRIREME" profile export p.h5 --tau -o tau4 || fail 'an export failed'
refused 65 ' in it is of another profile' export one.h5 --tau -o tau4
python=${PYTHON:-python3}
[ ! -x /usr/bin/python3 ] || python=/usr/bin/python3 # the one that has the distribution's packages
command -v "$python" >/dev/null || { echo "skipped: exports: no python3 to read them with"; exit 0; }
"$python" "$TR_SRCDIR/tests/profile_check.py" . || fail 'an export is not what its consumers expect'
"$python" -c 'import h5py, pandas' 2>/dev/null &&
    { "$python" "$TR_SRCDIR/jobs/profile_example.py" p.h5 >out && grep -q '^mla_decode' out || fail 'the h5py example'; }
if "$python" -c 'import matplotlib' 2>/dev/null; then
    for f in p.h5 z.h5; do
        PATH=$(dirname "$python"):$PATH "$TRIREME" profile plot "$f" -o "plot-$f-" --script "$TR_SRCDIR/jobs/profile_plot.py" \
            --peak 100,20 >out 2>err || fail "plot $f: $(cat err)"
        [ "$(wc -l <out)" -eq 3 ] || fail "plot $f: not three pictures"
        while read -r png; do
            [ "$(head -c 8 "$png" | tail -c 7 | head -c 3)" = PNG ] || fail "$png is no PNG"
            [ "$(wc -c <"$png")" -lt 150000 ] || fail "$png is large"
        done <out
    done
    mkdir no-tables && printf 'rank,t0_ns\n0,1\n' >no-tables/steps.csv
    for folder in . no-tables; do
        ! "$python" "$TR_SRCDIR/jobs/profile_plot.py" "$folder" plot- >out 2>err || fail "plot of $folder is no error"
        [ "$(wc -l <err)" -eq 1 ] && grep -q "^profile_plot.py: $folder: " err || fail "plot of $folder: $(cat err)"
    done
else
    echo 'skipped: plot: no matplotlib for python3'
fi
exit 0
