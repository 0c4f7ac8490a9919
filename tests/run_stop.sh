#!/bin/bash
# One answer of TOKENS generated tokens, and some shorter ones beside it, in a job that is stopped STOPS times on the way: USR1 to
# a random rank at a random moment, every third time kill -9 instead. The same command goes on each time. In the end OUT must
# hold the records of a job that nobody stopped, to the last token, byte and digit of every log-probability; a stopped job must
# have left OUT.saved and exit status 75, a finished one no OUT.saved. Once alone and once on each GRID.
#
# usage: run_stop.sh TRIREME MODEL TOKENS STOPS [SEED [GRID...]]      needs COMPARE (tests/compare_records)
#   GRID     alone, or options of two ranks such as "--tp 2" (default: alone "--tp 2" "--dp 2" "--pp 2")
set -u

if [ $# -lt 4 ]; then
    echo "usage: $0 TRIREME MODEL TOKENS STOPS [SEED [GRID...]]" >&2
    exit 2
fi
trireme=$1 model=$2 tokens=$3 wanted=$4
RANDOM=${5:-1}
grids=("${@:6}")
[ "${#grids[@]}" -gt 0 ] || grids=(alone '--tp 2' '--dp 2' '--pp 2')
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
: "${COMPARE:=${TR_BUILDDIR-.}/tests/compare_records}"
mpi_environment
scratch stop

request() { # NAME TOKENS BODY
    printf '{"custom_id":"%s","method":"POST","url":"/v1/completions","body":{"prompt":"%s, and so on","max_tokens":%d,"ignore_eos":true,"return_token_ids":true,%s}}\n' \
        "$1" "The code of the amber falcon is in $1" "$2" "$3"
}
{
    request long "$tokens" '"temperature":1,"seed":7'
    request scored $((tokens / 2)) '"temperature":0,"logprobs":3,"frequency_penalty":0.1'
    request choices $((tokens / 8)) '"temperature":0.9,"n":3,"seed":5,"stop":["zzzz"]'
    request echoed $((tokens / 8)) '"temperature":1.2,"seed":3,"echo":true,"logprobs":1,"repetition_penalty":1.1'
    for i in 1 2 3 4; do
        request "short-$i" $((20 + i)) '"temperature":1'
    done
} >"$dir/in"

start() { # OUT: the job in the background, its process id in $job
    local run=("$trireme" batch -m "$model" -i "$dir/in" -o "$1" --kv-dtype f32 --max-sequences 6
        --max-model-len $((tokens + 100)) --grace 0 --save-every 1)
    # shellcheck disable=SC2206 # a list of options
    [ "$grid" = alone ] || run=("$mpiexec" -n 2 "${run[@]}" $grid)
    : >"$dir/log"
    "${run[@]}" >"$dir/log" 2>&1 &
    job=$!
}

fail() {
    echo "$grid: $*"
    sed 's/^/    /' "$dir/log"
    exit 1
}

begun() { # wait until it generates; its last line but for the progress is the model's
    await_in_job logged 'GB of weights' && return 0
    ! kill -0 "$job" 2>/dev/null || fail "the job does not begin"
    return 1
}

target() { # the process to be hit
    local all
    mapfile -t all < <(ranks)
    [ "${#all[@]}" -eq 0 ] || echo "${all[RANDOM % ${#all[@]}]}"
}

for grid in "${grids[@]}"; do
    if [ "$grid" != alone ] && ! command -v "${mpiexec:-none}" >/dev/null; then
        echo "$grid: skipped: no MPI launcher was found"
        continue
    fi
    rm -f "$dir"/whole* "$dir"/out*
    start "$dir/whole"
    begun || fail "an uninterrupted job: exit status not 0"
    from=$(now_ms)
    wait "$job" || fail "an uninterrupted job: exit status $?"
    whole_ms=$(($(now_ms) - from))
    part_ms=$((whole_ms * 8 / 10 / wanted + 1))
    stops=0 usr1=0 kills=0 jobs=0 finished=0 went_on=0
    while :; do
        [ "$jobs" -lt $((30 * wanted)) ] || fail "too fast: stopped $stops times in $jobs jobs; give it more tokens"
        start "$dir/out"
        jobs=$((jobs + 1)) signal=''
        if [ "$stops" -lt "$wanted" ] && begun; then
            ms=$((part_ms / 2 + RANDOM * 32 % (part_ms + 1)))
            signal=USR1
            # kill -9, where the job takes long enough after what has been saved a moment ago
            [ $((stops % 3)) -ne 2 ] || signal=KILL
            [ "$signal" != KILL ] || [ "$whole_ms" -lt 3000 ] || ms=$((ms + 1100))
            sleep "$((ms / 1000)).$(printf %03d $((ms % 1000)))"
            pid=$(target)
            [ -z "$pid" ] || kill "-$signal" "$pid" 2>/dev/null
        fi
        wait "$job" 2>/dev/null
        status=$?
        grep -q 'went on from their saved tokens' "$dir/log" && went_on=$((went_on + 1))
        case $status,$signal in
        75,USR1)
            stops=$((stops + 1)) usr1=$((usr1 + 1))
            grep -q 'stopped by USR1: .* requests have no record yet' "$dir/log" || fail "no word of the stop"
            [ -s "$dir/out.saved" ] || fail "nothing was saved"
            ;;
        137,KILL) stops=$((stops + 1)) kills=$((kills + 1)) ;;
        0,*)
            finished=$((finished + 1))
            [ ! -e "$dir/out.saved" ] || fail "a finished job left OUT.saved"
            "$COMPARE" "$dir/whole" "$dir/out" >"$dir/said" || { cat "$dir/said"; fail "not the records of an uninterrupted job"; }
            [ "$stops" -lt "$wanted" ] || break
            rm -f "$dir"/out*
            ;;
        *) fail "exit status $status after ${signal:-nothing}" ;;
        esac
        [ ! -e "$dir/out.saved.tmp" ] || [ "$signal" = KILL ] || fail "OUT.saved.tmp was left behind"
    done
    echo "$grid: $tokens tokens stopped $stops times (USR1 $usr1, kill -9 $kills) in $jobs jobs, $finished finished," \
        "$went_on said to have gone on from saved tokens: $(cat "$dir/said")"
done
