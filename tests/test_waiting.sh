#!/bin/bash
# A job that waits for somebody outside (for what comes on standard input or through a FIFO, for who reads its output) ends when it
# is stopped, with exit status 75, and leaves nothing half-written. No signal is sent before the job is where it is meant to be.
# shellcheck disable=SC2317 # functions are called by name
set -u
: "${TRIREME:?}" "${TR_SRCDIR:?}"
model=$TR_SRCDIR/models/tiny
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMPI_MCA_hwloc_base_binding_policy=none
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
unset SLURM_JOB_END_TIME
[ -d /proc/self/fd ] || { echo 'skipped: no /proc to see where a job waits'; exit 77; }
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-waiting.XXXXXX") || exit 1
job=
trap '[ -z "$job" ] || kill -9 "$job" 2>/dev/null; rm -rf "$dir"' EXIT
cd "$dir" || exit 1
export TMPDIR=$dir
failed=0

is() { # WHAT WANTED GOT
    [ "$2" = "$3" ] && return
    echo "$1: $3 instead of $2"
    sed 's/^/    /' log
    failed=1
}

says() { # WHAT WORDS
    grep -q -- "$2" log || is "$1: \"$2\"" said 'not said'
}

until_true() { # WHAT COMMAND...
    local what=$1
    shift
    for ((i = 0; i < 2400; i++)); do
        "$@" && return
        kill -0 "$job" 2>/dev/null || break
        sleep 0.05
    done
    is "$what" 'got there' 'did not'
}

# The copy without a name that a pipe's requests go to is made just before the waiting begins.
copies() {
    local pid
    for pid in "$job" $(pgrep -P "$job" -x trireme); do
        find "/proc/$pid/fd" -lname "$dir/trireme.?????? (deleted)" 2>/dev/null | grep -q . && return
    done
    return 1
}

loaded() {
    grep -q 'GB of weights' log
}

ended() { # WHAT SIGNAL: the job is stopped by it
    [ -z "$2" ] || kill "-$2" "$job"
    wait "$job" 2>/dev/null
    is "$1" 75 $?
    job=
}

batch=("$TRIREME" batch -m "$model" --max-model-len 512)
mkfifo held stuck nobody
exec 3<>held 4<>stuck

# ---- requests that do not come
"${batch[@]}" -i - -o a.out <held >log 2>&1 &
job=$!
until_true 'standard input' copies
ended 'standard input' USR1
says 'standard input' 'standard input: stopped by USR1'
is 'standard input: nothing begun' no "$([ -e a.out.run ] && echo yes || echo no)"
printf '{"custom_id":"a"' >&3 # a line that breaks off
"${batch[@]}" -i - -o a.out <held >log 2>&1 &
job=$!
until_true 'half a line' copies
ended 'half a line' TERM
says 'half a line' 'standard input: stopped by TERM'
"${batch[@]}" -i nobody -o a.out >log 2>&1 &
job=$!
until_true 'a FIFO' copies
ended 'a FIFO' INT
says 'a FIFO' 'nobody: stopped by INT'
"${batch[@]}" -i - -o a.out --time-budget 2 <held >log 2>&1 &
job=$!
ended 'a time budget' ''
says 'a time budget' 'stopped by the time budget'
"${batch[@]}" --prompt - <held >log 2>&1 &
job=$!
until_true 'a prompt' loaded
ended 'a prompt' USR1
says 'a prompt' 'stopped by USR1'
if [ -n "${MPIEXEC-}" ]; then
    "$MPIEXEC" -n 2 "${batch[@]}" -i - -o a.out <held >log 2>&1 &
    job=$!
    until_true 'two ranks' copies
    ended 'two ranks' USR1
    says 'two ranks' 'standard input: stopped by USR1'
fi

# ---- records that nobody reads
yes 'no request' | head -n 3000 >in
"${batch[@]}" -i in -o whole >log 2>&1
is 'records to join' '0 3000' "$? $(wc -l <whole)"
head -n 1000 whole >part.0
tail -n 2000 whole >part.1
"$TRIREME" batch --merge -i in -o - part.1 part.0 >stuck 2>log &
job=$!
read -r -N 1 -t 120 -u 4 first || is 'joining to a pipe' written 'not written'
is 'joining to a pipe: begun' '{' "${first-}"
# The pipe is full when the job sleeps and has used no processor time for a while.
calm=0 before=
for ((i = 0; calm < 20 && i < 6000; i++)); do
    now=$(awk '{ print $3, $14, $15 }' "/proc/$job/stat")
    case $now in
    "$before") calm=$((calm + 1)) ;;
    *) calm=0 ;;
    esac
    [ "${now%% *}" = S ] || calm=0
    before=$now
    sleep 0.02
done
ended 'joining to a pipe' USR1
says 'joining to a pipe' 'standard output: stopped by USR1'

# ---- a file is there as a whole or not at all, whenever the signal comes
"$TRIREME" batch --merge -i in -o all part.1 part.0 >log 2>&1 &
job=$!
while [ ! -e all.tmp ] && [ ! -e all ] && kill -0 "$job" 2>/dev/null; do :; done
kill -USR1 "$job" 2>/dev/null
wait "$job"
status=$?
job=
case $status in
0) is 'joining to a file' 3000 "$(wc -l <all)" ;;
75) is 'joining to a file, stopped' no "$([ -e all ] && echo yes || echo no)" ;;
*) is 'joining to a file' '0 or 75' "$status" ;;
esac
is 'joining to a file: all.tmp' gone "$([ -e all.tmp ] && echo there || echo gone)"
rm -f all
"$TRIREME" batch --merge -i in -o all part.1 part.0 >log 2>&1
is 'joining again' "0 3000" "$? $(wc -l <all)"
exit "$failed"
