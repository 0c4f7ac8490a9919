#!/bin/bash
# Two campaigns with jobs/requeue.sbatch on a Slurm of this machine's own.
#
# Time limits of a minute, the shortest that Slurm has: jobs of two ranks run side by side until so many starts were stopped.
# Every other job gets Slurm's signal (which may come up to a minute early), the rest have their time budget alone. Each stop
# must come before the limit, with exit code 75, and each job end complete.
# Lost nodes: jobs over two nodes; one of these is cut off the network at a random moment, restored when Slurm has requeued
# the job, and so on. Needs root.
# The records must be those of an uninterrupted run, each once: none lost, none doubled, none altered.
#
# usage: run_slurm_campaign.sh TRIREME MODEL [STOPS [DROPS [AT_ONCE [SEED]]]]     default: 100 20 8 1; about an hour
#   AT_ONCE   jobs side by side while limits are met; half as many pairs of nodes, at most 4, while nodes are lost
#   needs COMPARE (tests/compare_records)
# shellcheck disable=SC1091,SC2034,SC2154 # slurm_jobs.sh reads and sets variables
set -u

if [ $# -lt 2 ]; then
    sed -n 's/^# usage: /usage: /p' "$0" >&2
    exit 2
fi
trireme=$1 model=$2 stops=${3:-100} drops=${4:-20} at_once=${5:-8}
RANDOM=${6:-1}
: "${COMPARE:=${TR_BUILDDIR-.}/tests/compare_records}"
. "$(dirname "$0")/slurm_jobs.sh"
n_requests=100
# Answers longer than the grace: some are always under way when a job stops.
requests "$n_requests" 200 >"$dir/in"
uninterrupted in
grids=('--pp 2' '--cp 2 --ep 1')

# done_with NAME JOB: it is over; complete, and its records those of an uninterrupted run.
compared=0
done_with() {
    expect "$1" "$2" COMPLETED 0
    same "$1" in "$dir/$1"
    compared=$((compared + n_requests))
}

# ---- time limits

# limited NUMBER: submit a job that will meet its limit some times.
limited() {
    local name=limit$1 signal=USR1@20
    [ $(($1 % 2)) -eq 0 ] || signal=CONT@1 # one that does nothing: the time budget alone
    edit requeue.sbatch "$name" 1 '--nodes=1 --ntasks-per-node=2' "input=in output=$name" \
        "options=($exact ${grids[$1 / 2 % 2]} --grace 2)"
    submit "$name" --signal="$signal" || exit 1
    of[$id]=$name
    echo "$id $dir/$name $n_requests 150" >>"$dir/paced"
}

if [ "$stops" -gt 0 ]; then
    up --slots $((2 * at_once))
    declare -A of=()
    touch "$dir/paced" "$dir/left.0" "$dir/left.1"
    pacer &
    pacer=$!
    begun=$SECONDS submitted=0 ended=0
    while :; do
        met=$(cat "$dir/left.0" "$dir/left.1" "$dir"/limit*.out 2>/dev/null | grep -c 'code 75: requeued')
        while [ ${#of[@]} -lt "$at_once" ] && [ "$met" -lt "$stops" ]; do
            limited "$submitted"
            submitted=$((submitted + 1))
        done
        [ ${#of[@]} -gt 0 ] || break
        sleep 2
        running=$(squeue -h -o %A 2>/dev/null) || continue
        running=" ${running//$'\n'/ } "
        for id in "${!of[@]}"; do
            [[ $running != *" $id "* ]] || continue
            name=${of[$id]}
            unset "of[$id]"
            done_with "$name" "$id"
            ended=$((ended + 1))
            seconds_left "$name" "$id" 60 >>"$dir/left.$((${name#limit} % 2))"
            ! grep -q 'DUE TO TIME LIMIT' "$dir/$name.$id.out" || complain "$name" 'Slurm had to end it'
            ! grep -E 'exit code [0-9]+: requeued' "$dir/$name.$id.out" | grep -v 'code 75' || complain "$name" 'other exit codes'
        done
    done
    rm "$dir/paced"
    wait "$pacer"
    read -r n0 least0 mean0 <<<"$(spread <"$dir/left.0")"
    read -r n1 least1 mean1 <<<"$(spread <"$dir/left.1")"
    [ $((n0 + n1)) -ge "$stops" ] || complain limit "$((n0 + n1)) stops instead of $stops"
    if [ "$least0" -le 0 ] || [ "$least1" -le 0 ]; then complain limit 'a stop after the limit'; fi
    say "time limits: $((n0 + n1)) stops in $ended jobs, all with exit code 75 before the limit of 60 s, $((SECONDS - begun)) s"
    say "    by Slurm's signal: $n0, least $least0 s left, mean $mean0 s; by the time budget: $n1, least $least1 s left, mean $mean1 s"
    "$cluster" down 2>/dev/null
fi

# ---- lost nodes

# losing PAIR DROPS: on one pair of nodes, jobs that lose a node three times each until DROPS nodes were lost.
losing() {
    local a=tr$((2 * $1 + 1)) b=tr$((2 * $1 + 2)) left=$2 i=0 name victims k
    local timeouts=('--step-timeout 10' '--step-timeout 30' '')
    while [ "$left" -gt 0 ]; do
        name=lost$1x$i
        # shorter than Slurm's own timeout, longer, and the default of a minute: then ranks hold the output for a while
        edit requeue.sbatch "$name" 60 "--nodes=2 --ntasks-per-node=1 --nodelist=$a,$b" "input=in output=$name" \
            "options=($exact --pp 2 ${timeouts[(i + $1) % 3]})"
        submit "$name" || return 1
        victims=()
        for ((k = 0; k < 3 && k < left; k++)); do
            if [ $((RANDOM % 2)) -eq 0 ]; then victims+=("$a"); else victims+=("$b"); fi
        done
        lose_node "$id" "$dir/$name" $((1 + RANDOM % 20)) "${victims[@]}" >"$dir/$name.lost"
        await_end 600 "$id"
        done_with "$name" "$id"
        k=$(grep -o ' lost after ' "$dir/$name.lost" | wc -l)
        say "$name: $(cat "$dir/$name.lost"): $verdict"
        echo "$k" >>"$dir/dropped"
        [ "$i" -lt 50 ] || return 1 # jobs that end before they lose a node
        left=$((left - k)) i=$((i + 1))
    done
    return "$failed"
}

if [ "$drops" -gt 0 ]; then
    pairs=$((at_once / 2 < 1 ? 1 : at_once / 2 > 4 ? 4 : at_once / 2))
    if up_if_can --nodes $((2 * pairs)) --slots 2; then
        begun=$SECONDS
        losers=()
        : >"$dir/dropped"
        for ((p = 0; p < pairs; p++)); do
            RANDOM=$((RANDOM + p))
            losing "$p" $(((drops + pairs - 1 - p) / pairs)) &
            losers+=($!)
        done
        for p in "${losers[@]}"; do wait "$p" || failed=1; done
        lost=$(awk '{ n += $1 } END { print n + 0 }' "$dir/dropped")
        [ "$lost" -ge "$drops" ] || complain lost "$lost nodes lost instead of $drops"
        compared=$((compared + $(wc -l <"$dir/dropped") * n_requests))
        say "lost nodes: $lost in $(wc -l <"$dir/dropped") jobs, each complete, $((SECONDS - begun)) s"
    else
        say "no node is cut off: $why"
    fi
fi
say "$compared records compared: $([ "$failed" -eq 0 ] && echo '0 lost, 0 doubled, 0 altered' || echo 'FINDINGS, see above')"
exit "$failed"
