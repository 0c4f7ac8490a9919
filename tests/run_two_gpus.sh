#!/bin/bash
# For a machine with two GPUs or more and a build with --with-nccl: everything that ranks with a GPU each have to show, about ten
# minutes in all, and a table of verdicts at the end. Exit status 1 if one is FAIL, 77 where there is nothing to run on.
#
#   communicators  every operation against the one over MPI, byte for byte (tests/test_comm_nccl)
#   grids          questions about what stands in the prompt, greedily: the answers of one GPU, word for word
#   the same again twice the same grid, and with --no-overlap: identical to the last digit
#   bench comm     every operation next to NCCL's own call: the table is printed, and nothing demanded
#   a rank killed  the job ends, the GPUs are free again, the same command goes on and ends with one GPU's answers
#   a rank stopped exit status 86 within the time-out, likewise
#
# usage: run_two_gpus.sh [STEP...]      (comm grids same bench kill stop; default: all)
# TRIREME, TR_BUILDDIR, TR_SRCDIR, MPIEXEC as in make check; TEST_COMM: another program than tests/test_comm_nccl.
set -u

steps=${*:-comm grids same bench kill stop}
src=${TR_SRCDIR:-$(cd "$(dirname "$0")/.." && pwd)}
build=${TR_BUILDDIR:-$PWD}
trireme=${TRIREME:-$build/trireme}
test_comm=${TEST_COMM:-$build/tests/test_comm_nccl}
compare=$build/tests/compare_records
model=$src/models/tiny
mpiexec=${MPIEXEC-mpirun}
command -v "${mpiexec:-none}" >/dev/null || { echo 'skipped: no MPI launcher was found'; exit 77; }
export OMPI_MCA_hwloc_base_binding_policy=none OMP_WAIT_POLICY=passive OMP_NUM_THREADS=${OMP_NUM_THREADS-2}
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
if ! "$trireme" batch -m "$model" --prompt hello --device cuda >/dev/null 2>&1; then
    echo "skipped: $trireme finds no GPU, or was built without CUDA"
    exit 77
fi
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-gpus.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
rows=() failed=0

verdict() { # PASS|FAIL|INFO WHAT DETAIL SECONDS
    rows+=("$(printf '%-4s  %-34s %4s s  %s' "$1" "$2" "$4" "$3")")
    printf '%s\n' "${rows[-1]}"
    [ "$1" != FAIL ] || failed=1
}

wanted() { # STEP
    case " $steps " in *" $1 "*) return 0 ;; esac
    return 1
}

# Two facts and a question about one of them, N times; and long answers to prompts of token ids, in which decode steps are many.
questions() { # N
    awk -v n="$1" 'BEGIN {
        split("amber blue coral dusty early fast green high", adjective, " ")
        split("falcon hawk otter heron badger lynx raven stork", animal, " ")
        for (i = 0; i < n; i++) {
            a = adjective[i % 8 + 1] " " animal[(3 * i) % 8 + 1]
            b = adjective[(i + 3) % 8 + 1] " " animal[(3 * i + 5) % 8 + 1]
            printf "{\"custom_id\": \"recall-%d\", \"method\": \"POST\", \"url\": \"/v1/chat/completions\", \"body\": {\"messages\": " \
                "[{\"role\": \"user\", \"content\": \"The code of %s is %d.\\nThe code of %s is %d.\\nWhat is the code of %s?\"}], " \
                "\"temperature\": 0, \"max_tokens\": 24}}\n", i, a, 1000 + 137 * i % 9000, b, 9999 - 211 * i % 9000, i % 2 ? a : b
        }
    }'
}

# job RANKS NAME INPUT OPTION...: NAME.jsonl; the status of the job.
job() {
    local ranks=$1 name=$2 input=$3
    shift 3
    rm -f "$dir/$name.jsonl"*
    timeout 120 "$mpiexec" -n "$ranks" "$trireme" batch -m "$model" -i "$dir/$input" -o "$dir/$name.jsonl" --device cuda \
        --max-model-len 1024 --max-batch-tokens 256 --max-sequences 12 "$@" >"$dir/$name.log" 2>&1
}

why() { # NAME: the last line that says something
    grep -v '^[-[:space:]]*$' "$dir/$1.log" | grep 'trireme:' | tail -n 1 | cut -c 1-160
}

compared() { # WANTED GOT: into $answer, on one line
    answer=$("$compare" "$dir/$1.jsonl" "$dir/$2.jsonl" >"$dir/answer"; status=$?; paste -s -d ';' "$dir/answer" | cut -c 1-200; exit "$status")
}

answer=
questions 40 >"$dir/in"
grep -v logprobs "$src/jobs/quickstart.jsonl" >>"$dir/in" # sums in another order have other last digits
questions 400 >"$dir/long"
begun=$SECONDS
if ! job 1 one in --tp 1; then
    cat "$dir/one.log"
    echo "FAIL  one GPU alone does not run"
    exit 1
fi
right=$(grep -c '"custom_id"' "$dir/one.jsonl")
verdict INFO 'one GPU' "$right records" $((SECONDS - begun))

if wanted comm; then
    for n in 2 4; do
        [ "$n" -le 2 ] || [ "$(nvidia-smi -L 2>/dev/null | wc -l)" -ge "$n" ] || continue
        begun=$SECONDS
        timeout 180 "$mpiexec" -n "$n" "$test_comm" >"$dir/comm.log" 2>&1
        status=$?
        [ "$status" -eq 0 ] || tail -n 30 "$dir/comm.log"
        case $status in
        0) verdict PASS "communicators, $n ranks" "$(grep -c 'OK \]' "$dir/comm.log") tests" $((SECONDS - begun)) ;;
        77) verdict INFO "communicators, $n ranks" "$(grep -m 1 skipped "$dir/comm.log")" $((SECONDS - begun)) ;;
        *) verdict FAIL "communicators, $n ranks" "exit status $status" $((SECONDS - begun)) ;;
        esac
    done
fi

# grid OPTION...: against one GPU.
grid() {
    local begun=$SECONDS status
    job 2 grid in "$@"
    status=$?
    if [ "$status" -ne 0 ]; then
        verdict FAIL "grid $*" "exit status $status: $(why grid)" $((SECONDS - begun))
        return
    fi
    compared one grid
    status=$?
    verdict "$([ "$status" -eq 0 ] && echo PASS || echo FAIL)" "grid $*" "$answer" $((SECONDS - begun))
}
if wanted grids; then
    grid --tp 2
    grid --tp 2 --ep 2
    grid --tp 2 --ep 1 --moe-tp 2
    grid --dp 2 --ep 2
    grid --dp 2 --ep 1
    grid --pp 2
    grid --cp 2
    grid --cp 2 --ep 1
    grid --cp 2 --cp-mode in-seq-split
fi

# same WHAT OPTION... [-- OPTION...]: the run of the first options, and the run of all.
same() {
    local what=$1 begun=$SECONDS status
    local -a first=()
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        first+=("$1")
        shift
    done
    [ $# -eq 0 ] || shift
    if ! job 2 first in "${first[@]}" || ! job 2 second in "${first[@]}" "$@"; then
        verdict FAIL "$what" "$(why first) $(why second)" $((SECONDS - begun))
        return
    fi
    compared first second
    status=$?
    verdict "$([ "$status" -eq 0 ] && echo PASS || echo FAIL)" "$what" "$answer" $((SECONDS - begun))
}
if wanted same; then
    same '--tp 2 twice' --tp 2
    same '--tp 2 and --no-overlap' --tp 2 -- --no-overlap
    same '--tp 2 and --sync-check' --tp 2 -- --sync-check # without graphs
    same '--cp 2 and --no-overlap' --cp 2 --max-sequences 1 -- --no-overlap
    same '--dp 2 and --no-overlap' --dp 2 -- --no-overlap
fi

if wanted bench; then
    begun=$SECONDS
    if timeout 120 "$mpiexec" -n 2 "$trireme" bench comm --device cuda --calls 300 \
        --bytes 14336,229376,1835008,14680064 >"$dir/bench.log" 2>&1; then
        grep -v '^{' "$dir/bench.log"
        verdict PASS 'bench comm' "$(grep -c '^{' "$dir/bench.log") lines" $((SECONDS - begun))
    else
        cat "$dir/bench.log"
        verdict FAIL 'bench comm' "$(tail -n 1 "$dir/bench.log" | cut -c 1-120)" $((SECONDS - begun))
    fi
fi

# Ranks that leave their process ids behind.
cat >"$dir/rank" <<'RANK'
echo $$ >"$1.${OMPI_COMM_WORLD_RANK-${PMI_RANK-0}}"
shift
exec "$@"
RANK

# waits_for CONDITION...: at most two minutes.
waits_for() {
    for _ in $(seq 1200); do
        "$@" && return 0
        sleep 0.1
    done
    return 1
}
# shellcheck disable=SC2317 # called by waits_for
has_begun() { [ -s "$dir/$1.jsonl" ] || ! kill -0 "$2" 2>/dev/null; }
# shellcheck disable=SC2317
has_gone() { ! kill -0 "$1" 2>/dev/null; }
gpus_used() { nvidia-smi --query-compute-apps=pid --format=csv,noheader 2>/dev/null | grep -c .; }

# lose SIGNAL CODES OPTION...: rank 1 gets the signal when the first records are there.
lose() {
    local signal=$1 codes=$2 begun=$SECONDS status job used
    shift 2
    rm -f "$dir"/lost.jsonl* "$dir"/pid.*
    used=$(gpus_used)
    timeout 240 "$mpiexec" -n 2 sh "$dir/rank" "$dir/pid" "$trireme" batch -m "$model" -i "$dir/long" -o "$dir/lost.jsonl" \
        --device cuda --max-model-len 1024 --max-batch-tokens 256 --max-sequences 4 --step-timeout 5 "$@" >"$dir/lost.log" 2>&1 &
    job=$!
    waits_for has_begun lost "$job"
    kill "-$signal" "$(cat "$dir/pid.1")" 2>/dev/null
    wait "$job"
    status=$?
    for r in 0 1; do # a stopped one hears of the end when it goes on
        kill -CONT "$(cat "$dir/pid.$r")" 2>/dev/null
        waits_for has_gone "$(cat "$dir/pid.$r")" || kill -KILL "$(cat "$dir/pid.$r")" 2>/dev/null
    done
    case " $codes " in
    *" $status "*) ;;
    *)
        verdict FAIL "SIG$signal of a rank, $*" "exit status $status: $(why lost)" $((SECONDS - begun))
        return
        ;;
    esac
    if [ "$(gpus_used)" -gt "$used" ]; then
        verdict FAIL "SIG$signal of a rank, $*" 'a GPU is still held' $((SECONDS - begun))
        return
    fi
    timeout 240 "$mpiexec" -n 2 "$trireme" batch -m "$model" -i "$dir/long" -o "$dir/lost.jsonl" --device cuda \
        --max-model-len 1024 --max-batch-tokens 256 --max-sequences 4 "$@" >"$dir/lost.log" 2>&1
    status=$?
    if compared whole lost && [ "$status" -eq 0 ]; then
        verdict PASS "SIG$signal of a rank, $*" "resumed: $answer" $((SECONDS - begun))
    else
        verdict FAIL "SIG$signal of a rank, $*" "resumed: $answer, exit status $status" $((SECONDS - begun))
    fi
}
if wanted kill || wanted stop; then
    job 1 whole long --max-sequences 4
fi
if wanted kill; then
    lose KILL '137 86 75 1' --tp 2
    lose KILL '137 86 75 1' --dp 2
fi
if wanted stop; then
    lose STOP 86 --tp 2
    lose STOP 86 --pp 2
fi

echo
echo "what was looked at, on $(hostname), $(date -u +%Y-%m-%dT%H:%M:%SZ):"
printf '%s\n' "${rows[@]}"
exit "$failed"
