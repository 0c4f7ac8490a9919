#!/bin/bash
# The scripts of jobs/ on a Slurm of this machine's own, each with the edits of its five lines that a user would make, all
# at the same time: a whole job with srun; one with mpirun that is stopped, and submitted again; one that meets its time
# limit, requeues itself and goes on; one whose rank is killed, likewise; an array of shards, one of them stopped, and
# the job that joins them; one that is measured; one over two nodes, of which one is cut off the network. The records must be
# those of an uninterrupted run, each once. Several nodes need root: without, there is one and none is cut off.
#
# usage: run_slurm.sh TRIREME MODEL      needs COMPARE (tests/compare_records); about 100 s
# shellcheck disable=SC1091,SC2034,SC2154 # slurm_jobs.sh reads and sets variables
set -u

if [ $# -ne 2 ]; then
    echo "usage: $0 TRIREME MODEL" >&2
    exit 2
fi
trireme=$1 model=$2
: "${COMPARE:=${TR_BUILDDIR-.}/tests/compare_records}"
. "$(dirname "$0")/slurm_jobs.sh"

at=
if up_if_can --nodes 3 --slots 16 --gpus 8; then
    at=--nodelist=tr1
else
    say "no node is cut off: $why"
    up --slots 24 --gpus 8
fi
srun --immediate=30 --mpi=list 2>&1 | grep -q pmix || { echo 'this Slurm has no pmix'; exit 77; }
requests 24 47 >"$dir/small"
uninterrupted small
long_enough many 3000 47 # n of them
two="--nodes=1 --ntasks-per-node=2 $at"
one="--nodes=1 --ntasks-per-node=1 $at"

# ---- all of them begin. Where the limit is not the point it is far from the 300 s of --signal.

# A minute is the shortest limit; Slurm sends the signal up to a minute early, so the time budget may be what stops it.
edit requeue.sbatch limit 1 "$two" 'input=many output=limit' "options=($exact --pp 2 --grace 5)"
submit limit --signal=USR1@5
limit=$id
echo "$limit $dir/limit $n 65" >"$dir/paced"
pacer &
pacer=$!

if [ -n "$at" ]; then
    edit requeue.sbatch nodes 10 '--nodes=2 --ntasks-per-node=1 --nodelist=tr2,tr3' 'input=many output=nodes' \
        "options=($exact --pp 2 --step-timeout 20)"
    submit nodes
    nodes=$id
    lose_node "$nodes" "$dir/nodes" 3 tr3 >"$dir/lost" &
    loser=$!
fi

edit batch.sbatch batch 10 "$two --gpus-per-node=2" 'input=small output=batch' "options=($exact --tp 1 --pp 2)"
submit batch
batch=$id

edit array.sbatch array 10 "$one" 'input=many output=array' "shards=3 options=($exact --grace 0)"
(cd "$dir" && bash array.sbatch %3) >"$dir/array.said" 2>&1 || complain array "not submitted: $(cat "$dir/array.said")"
array=$(sed -n 's/^\([0-9]*\): 3 shards; \([0-9]*\): .*/\1 \2/p' "$dir/array.said")
[ -n "$array" ] || { complain array "no job numbers: $(cat "$dir/array.said")"; exit 1; }
# The last part has the number of the whole array, which must not be requeued with it.
until [ -s "$dir/array.2" ] || over "${array% *}_2"; do sleep 0.05; done
scancel --signal=USR1 "${array% *}_2"

edit requeue.sbatch fault 10 "$two" 'input=many output=fault' "options=($exact --pp 2)"
submit fault
fault=$id
until [ "$(records "$dir/fault")" -gt 3 ] || over "$fault"; do sleep 0.05; done
victim=$(ranks "$fault" | tail -n 1)
kill -9 "${victim:-no rank}" || complain fault 'no rank to kill'

edit batch-mpirun.sbatch mpirun 10 "$two" 'input=many output=mpirun' "options=($exact --pp 2 --grace 0)"
submit mpirun
mpirun=$id
until [ -s "$dir/mpirun" ] || over "$mpirun"; do sleep 0.05; done
scancel --batch --signal=USR1 "$mpirun" # as before the time limit
await_end 900 "$mpirun"
expect mpirun "$mpirun" FAILED 75
stopped=$(records "$dir/mpirun")
[ "$stopped" -lt "$n" ] || complain mpirun 'it was not stopped'
submit mpirun # by hand, as it says
mpirun=$id

# ---- and end

# shellcheck disable=SC2086 # two numbers
await_end 900 "$batch" $array "$mpirun" "$fault"

expect batch "$batch" COMPLETED 0
same batch small "$dir/batch"
say "batch, srun: $verdict"

expect mpirun "$mpirun" COMPLETED 0
same mpirun many "$dir/mpirun"
say "batch, mpirun, stopped after $stopped records: $verdict"

for job in "${array% *}_0" "${array% *}_1" "${array% *}_2" "${array#* }"; do expect array "$job" COMPLETED 0; done
restarts="$(field "${array% *}_0" Restarts) $(field "${array% *}_1" Restarts) $(field "${array% *}_2" Restarts)"
[ "$restarts" = '0 0 1' ] || complain array "restarts of the parts: $restarts instead of 0 0 1"
counts="$(records "$dir/array.0") $(records "$dir/array.1") $(records "$dir/array.2")"
shares="$(((n + 2) / 3)) $(((n + 1) / 3)) $((n / 3))"
[ "$counts" = "$shares" ] || complain array "records of the shards: $counts instead of $shares"
same array many "$dir/array"
say "array of 3 shards, one of them requeued, joined: $verdict"

expect fault "$fault" COMPLETED 0
[ "$(field "$fault" Restarts)" -eq 1 ] || complain fault "$(field "$fault" Restarts) restarts instead of 1"
grep -qsx "$fault exit 137, start 1 on tr1" "$dir/fault.faults" || complain fault 'no note of it beside the output'
same fault many "$dir/fault"
say "a rank killed, requeued: $verdict"

edit profile.sbatch profile 10 "$two" 'input=many requests=20' "options=($exact --pp 2)"
submit profile
await_end 900 "$id"
expect profile "$id" COMPLETED 0
[ -s "$dir/profile-$id/profile.h5" ] || complain profile 'there is no profile'
[ "$(records "$dir/profile-$id/answers.jsonl")" -eq 20 ] || complain profile 'there are not 20 answers'
grep -q '2 ranks on 1 node; .* 20 requests (0 failed)' "$dir/profile.$id.out" || complain profile 'no page of where the time went'
say "profile of 20 requests: $(du -h "$dir/profile-$id/profile.h5" | cut -f 1)"

await_end 900 "$limit"
rm "$dir/paced"
wait "$pacer"
expect limit "$limit" COMPLETED 0
read -r stops least mean <<<"$(seconds_left limit "$limit" 60 | spread)"
[ "$stops" -ge 1 ] || complain limit 'it never met its limit'
[ "$least" -gt 0 ] || complain limit "it ended $least s before its limit"
! grep -q 'DUE TO TIME LIMIT' "$dir/limit.$limit.out" || complain limit 'Slurm had to end it'
same limit many "$dir/limit"
say "limit of a minute, $stops stops, $least s left (mean $mean): $verdict"

if [ -n "$at" ]; then
    wait "$loser"
    await_end 900 "$nodes"
    expect nodes "$nodes" COMPLETED 0
    [ "$(field "$nodes" Restarts)" -ge 1 ] || complain nodes 'nothing was lost'
    same nodes many "$dir/nodes"
    say "$(cat "$dir/lost"): $verdict"
fi
exit "$failed"
