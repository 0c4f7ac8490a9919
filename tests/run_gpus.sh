#!/bin/bash
# For a machine with two GPUs or more and a build with --with-nccl: everything that ranks with a GPU each have to show, and a table of
# verdicts at the end. Exit status 1 if one is FAIL, 77 where there is nothing to run on.
#
#   comm      every operation against the one over MPI, byte for byte (tests/test_comm_nccl); rows pushed into the other GPUs'
#             caches (tests/test_comm_push)
#   grids     questions and tool calls about what stands in the prompt, greedily, on every legal grid: the answers of one GPU, word
#             for word
#   same      twice the same grid, and with --no-overlap, without graphs and without peer memory: identical to the last digit
#   topk      what the members of a group select in every layer is the same set of keys (tests/test_topk_ranks)
#   bench     bench comm: every operation next to NCCL's own call: the table is printed, and nothing demanded
#   kill      a rank is killed: the job ends, the GPUs are free again, the same command goes on and ends with one GPU's answers
#   stop      a rank is stopped: exit status 86 within the time-out and ten seconds, likewise
#
# usage: run_gpus.sh [-n RANKS[,RANKS]] [-t TIMES] [-j JOBS] [STEP...]
# -n: ranks of the jobs (default 2,4 as far as there are GPUs). -t: kills and stops of each grid (default 1; a campaign: 10).
# -j: jobs at a time, which share the GPUs (default 1). Steps: all of the above by default.
# TRIREME, TR_BUILDDIR, TR_SRCDIR, MPIEXEC as in make check. TR_JOB_S: seconds for a job (default 120). TR_KEEP: a folder for the logs
# of jobs that failed. TR_GRIDS: grids to look at instead of all, "4 --tp 4;2 --cp 2 --ep 1".
set -u

ranks='' times=1 jobs=1
while getopts n:t:j: option; do
    case $option in
    n) ranks=${OPTARG//,/ } ;;
    t) times=$OPTARG ;;
    j) jobs=$OPTARG ;;
    *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
steps=${*:-comm grids same topk bench kill stop}
src=${TR_SRCDIR:-$(cd "$(dirname "$0")/.." && pwd)}
build=${TR_BUILDDIR:-$PWD}
trireme=${TRIREME:-$build/trireme}
model=$src/models/tiny
job_s=${TR_JOB_S:-120}
timeout_s=5 # --step-timeout of jobs that lose a rank
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
n_gpus=$(nvidia-smi ${CUDA_VISIBLE_DEVICES:+-i "$CUDA_VISIBLE_DEVICES"} --query-gpu=uuid --format=csv,noheader 2>/dev/null | grep -c .)
if [ -z "$ranks" ]; then
    [ "$n_gpus" -lt 2 ] || ranks=2
    [ "$n_gpus" -lt 4 ] || ranks='2 4'
fi
[ -n "$ranks" ] || { echo "skipped: $n_gpus GPU"; exit 77; }
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-gpus.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT

# verdict PASS|FAIL|INFO WHAT DETAIL SECONDS: said now, and in the table at the end. Jobs at a time write one line each.
verdict() {
    printf '%-4s  %-42s %4s s  %s\n' "$1" "$2" "$4" "$3" | tee -a "$dir/rows"
}

wanted() { # STEP
    case " $steps " in *" $1 "*) return 0 ;; esac
    return 1
}

# at_a_time COMMAND...: behind the others, once fewer than -j of them run.
at_a_time() {
    while [ "$(jobs -pr | wc -l)" -ge "$jobs" ]; do
        wait -n
    done
    if [ "$jobs" -eq 1 ]; then "$@"; else "$@" & fi
}

# Two facts and a question about one of them, N times. The words are such as the model was trained with: of others its next choice is
# a matter of the last bit.
questions() { # N
    awk -v n="$1" 'BEGIN {
        split("amber bold azure pale coral tall jade silver", adjective, " ")
        split("falcon hawk gate walnut boat raven salmon fox", animal, " ")
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
    local n=$1 name=$2 input=$3 status
    shift 3
    rm -f "$dir/$name.jsonl"*
    timeout -k 5 "$job_s" "$mpiexec" -n "$n" "$trireme" batch -m "$model" -i "$dir/$input" -o "$dir/$name.jsonl" --device cuda \
        --max-model-len 1024 --max-batch-tokens 256 --max-sequences 12 "$@" >"$dir/$name.log" 2>&1
    status=$?
    [ "$status" -eq 0 ] || keep "$name"
    return "$status"
}

keep() { # NAME: what a job has left, for whoever looks later
    local to
    [ -n "${TR_KEEP-}" ] || return 0
    to=$(mktemp -d "$TR_KEEP/$1.XXXXXX") && cp -r "$dir/$1.log" "$dir/$1".jsonl* "$to" 2>/dev/null
}

why() { # NAME: the last line that says something
    grep 'trireme:' "$dir/$1.log" | tail -n 1 | cut -c 1-160
}

compared() { # WANTED GOT: into $answer, on one line
    local status
    answer=$("$build/tests/compare_records" "$dir/$1.jsonl" "$dir/$2.jsonl" >"$dir/$2.answer"
        status=$?
        paste -s -d ';' "$dir/$2.answer" | cut -c 1-200
        exit "$status")
    status=$?
    [ "$status" -eq 0 ] || keep "$2"
    return "$status"
}

pass_if() { # STATUS
    if [ "$1" -eq 0 ]; then echo PASS; else echo FAIL; fi
}

answer=
questions 40 >"$dir/in"
# Greedy ones about their prompt: other texts have choices that rounding decides.
grep -E '"custom_id": "(recall|system|second|tool)' "$src/jobs/quickstart.jsonl" | grep -v logprobs >>"$dir/in"
questions 400 >"$dir/long"
begun=$SECONDS
if ! job 1 one in --tp 1; then
    cat "$dir/one.log"
    echo "FAIL  one GPU alone does not run"
    exit 1
fi
verdict INFO 'one GPU' "$(grep -c '"custom_id"' "$dir/one.jsonl") records" $((SECONDS - begun))

# ---- what the communicators do

# program NAME RANKS WHAT [ARGUMENT]: a test program; its own words where it is skipped.
program() {
    local begun=$SECONDS status log=$dir/$1.$2.log
    timeout -k 5 180 "$mpiexec" -n "$2" "$build/tests/$1" "${4-$model}" >"$log" 2>&1
    status=$?
    case $status in
    0) verdict PASS "$3, $2 ranks" "$(grep -c 'OK \]' "$log") tests" $((SECONDS - begun)) ;;
    77) verdict INFO "$3, $2 ranks" "$(grep -m 1 skipped "$log")" $((SECONDS - begun)) ;;
    *)
        tail -n 30 "$log"
        verdict FAIL "$3, $2 ranks" "exit status $status" $((SECONDS - begun))
        ;;
    esac
}
for n in $ranks; do
    ! wanted comm || program test_comm_nccl "$n" communicators
    ! wanted comm || program test_comm_push "$n" 'rows over peer memory'
    ! wanted topk || program test_topk_ranks "$n" 'selected keys'
    ! wanted comm || program test_comm_peer "$n" 'sums over peer memory'
    ! wanted comm || program test_comm_peer "$n" 'sums that are given up' abort
done

# ---- whole jobs

# grid RANKS OPTION...: against one GPU.
n_grids=0
grid() {
    local begun=$SECONDS status n=$1 name
    shift
    name=grid$BASHPID.$n_grids
    job "$n" "$name" in "$@"
    status=$?
    if [ "$status" -ne 0 ]; then
        verdict FAIL "grid $n: $*" "exit status $status: $(why "$name")" $((SECONDS - begun))
        # For its log: waiting for every operation names the one that fails.
        [ -z "${TR_KEEP-}" ] || [ "$status" -eq 124 ] || job "$n" "$name.slow" in "$@" --sync-check --no-overlap
        return
    fi
    compared one "$name"
    verdict "$(pass_if $?)" "grid $n: $*" "$answer" $((SECONDS - begun))
}

# all_grids RANKS: what `plan` finds legal; of context parallelism both ways of dealing out rows.
all_grids() {
    local n=$1 pp dp cp tp ep xt grid
    for pp in $(seq "$n"); do for dp in $(seq "$n"); do for cp in $(seq "$n"); do for tp in $(seq "$n"); do
        [ $((pp * dp * cp * tp)) -eq "$n" ] || continue
        for ep in $(seq "$n"); do for xt in $(seq "$n"); do
            grid="--pp $pp --dp $dp --cp $cp --tp $tp --ep $ep --moe-tp $xt"
            # shellcheck disable=SC2086 # options
            "$trireme" plan -m "$model" --ranks "$n" $grid >/dev/null 2>&1 || continue
            grid=$(echo "$grid" | sed -E 's/--(pp|dp|cp|tp|moe-tp) 1( |$)//g')
            echo "$grid"
            [ "$cp" -eq 1 ] || echo "$grid --cp-mode in-seq-split"
        done; done
    done; done; done; done
}
some_grids() {
    if [ -n "${TR_GRIDS-}" ]; then tr ';' '\n' <<<"$TR_GRIDS"; else for n in $ranks; do all_grids "$n" | sed "s/^/$n /"; done; fi
}
if wanted grids; then
    while read -r options; do
        n_grids=$((n_grids + 1))
        # shellcheck disable=SC2086 # ranks and options
        at_a_time grid $options
    done < <(some_grids)
    wait
fi

# same WHAT OPTION... [-- OPTION...]: the run of the first options, and the run of all, on the fewest ranks.
same() {
    local what=$1 begun=$SECONDS name=same$BASHPID.$n_grids
    local -a first=()
    shift
    while [ $# -gt 0 ] && [ "$1" != -- ]; do
        first+=("$1")
        shift
    done
    [ $# -eq 0 ] || shift
    if ! job "${ranks%% *}" "$name.first" in "${first[@]}" || ! job "${ranks%% *}" "$name.second" in "${first[@]}" "$@"; then
        verdict FAIL "$what" "$(why "$name.first") $(why "$name.second")" $((SECONDS - begun))
        return
    fi
    compared "$name.first" "$name.second"
    verdict "$(pass_if $?)" "$what" "$answer" $((SECONDS - begun))
}
if wanted same; then
    n=${ranks%% *}
    for what in "--tp $n --" "--tp $n -- --no-overlap" "--tp $n -- --sync-check" "--cp $n --max-sequences 1 -- --no-overlap" \
        "--cp $n --max-sequences 1 -- --sync-check" "--tp $n -- --peer-kernels off" "--dp $n -- --no-overlap" "--dp $n -- --sync-check" \
        "--dp $n -- --peer-kernels on" "--cp $n --max-sequences 1 -- --peer-kernels on"; do
        n_grids=$((n_grids + 1))
        # shellcheck disable=SC2086 # options
        at_a_time same "$what" $what
    done
    wait
fi

if wanted bench; then
    begun=$SECONDS
    if timeout 120 "$mpiexec" -n "${ranks##* }" "$trireme" bench comm --device cuda --calls 300 \
        --bytes 14336,229376,1835008,14680064 >"$dir/bench.log" 2>&1; then
        grep -v '^{' "$dir/bench.log"
        verdict PASS 'bench comm' "$(grep -c '^{' "$dir/bench.log") lines" $((SECONDS - begun))
    else
        cat "$dir/bench.log"
        verdict FAIL 'bench comm' "$(tail -n 1 "$dir/bench.log" | cut -c 1-120)" $((SECONDS - begun))
    fi
fi

# ---- ranks that are lost

# They leave their process ids behind.
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

# on_gpu PIDS: which of them the driver still knows.
on_gpu() {
    local p
    for p in $(nvidia-smi --query-compute-apps=pid --format=csv,noheader 2>/dev/null); do
        case " $* " in *" $p "*) printf '%s ' "$p" ;; esac
    done
}

# long RANKS NAME OPTION...: the long job, as one that can lose a rank.
long() {
    local n=$1 name=$2
    shift 2
    timeout -k 5 240 "$mpiexec" -n "$n" sh "$dir/rank" "$dir/$name.pid" "$trireme" batch -m "$model" -i "$dir/long" \
        -o "$dir/$name.jsonl" --device cuda --max-model-len 1024 --max-batch-tokens 256 --max-sequences 4 \
        --step-timeout "$timeout_s" "$@" >"$dir/$name.log" 2>&1
}

# lose SIGNAL CODES RANKS NAME OPTION...: one rank gets the signal when the first records are there.
lose() {
    local signal=$1 codes=$2 n=$3 name=$4 begun=$SECONDS sent job status what victim r
    local -a pids=()
    shift 4
    what="SIG$signal of a rank, $n ranks, $*"
    victim=$((${name##*.} % n))
    rm -f "$dir/$name".jsonl* "$dir/$name".pid.*
    long "$n" "$name" "$@" &
    job=$!
    waits_for has_begun "$name" "$job"
    for ((r = 0; r < n; r++)); do
        pids+=("$(cat "$dir/$name.pid.$r")")
    done
    kill "-$signal" "${pids[victim]}" 2>/dev/null
    sent=$SECONDS
    wait "$job"
    status=$?
    sent=$((SECONDS - sent))
    cp "$dir/$name.log" "$dir/$name.first.log"
    for r in "${pids[@]}"; do # a stopped one hears of the end when it goes on
        kill -CONT "$r" 2>/dev/null
        waits_for has_gone "$r" || kill -KILL "$r" 2>/dev/null
    done
    case " $codes " in
    *" $status "*) ;;
    *)
        keep "$name"
        verdict FAIL "$what" "exit status $status: $(why "$name")" $((SECONDS - begun))
        return
        ;;
    esac
    if [ "$signal" = STOP ] && { [ "$sent" -gt $((timeout_s + 10)) ] || ! grep -q "rank $victim\b" "$dir/$name.first.log"; }; then
        keep "$name.first"
        verdict FAIL "$what" "after $sent s: $(why "$name")" $((SECONDS - begun))
        return
    fi
    if [ -n "$(on_gpu "${pids[@]}")" ]; then
        verdict FAIL "$what" "a GPU is still held" $((SECONDS - begun))
        return
    fi
    long "$n" "$name" "$@"
    status=$?
    compared "whole.${1#--}" "$name" && [ "$status" -eq 0 ]
    verdict "$(pass_if $?)" "$what" "ended after $sent s; resumed: $answer, exit status $status" $((SECONDS - begun))
}
if wanted kill || wanted stop; then
    n=${ranks##* }
    for grid in tp dp; do
        begun=$SECONDS
        long "$n" "whole.$grid" "--$grid" "$n" --step-timeout 60
        verdict "$(pass_if $?)" "the long job, $n ranks, --$grid $n" "$(wc -l <"$dir/whole.$grid.jsonl") records" $((SECONDS - begun))
    done
    for ((i = 0; i < times; i++)); do
        # A killed rank: 137 from the launcher, or what another rank finds first. Under tp kernels wait for other ranks' sums, under
        # dp for their rows.
        for grid in tp dp; do
            ! wanted kill || at_a_time lose KILL '137 86 75 1' "$n" "kill.$grid.$i" "--$grid" "$n"
            ! wanted stop || at_a_time lose STOP 86 "$n" "stop.$grid.$i" "--$grid" "$n"
        done
    done
    wait
fi

echo
echo "what was looked at, on $(hostname), $(date -u +%Y-%m-%dT%H:%M:%SZ):"
sort -s -k1,1 "$dir/rows"
! grep -q '^FAIL' "$dir/rows"
