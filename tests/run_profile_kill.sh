#!/bin/bash
# Kill a batch run with a profile with -9 and let it resume; the last run finishes. Every killed run's rank file must be readable
# after h5clear -s, with what was flushed; every request must have its record. Kills come at random moments behind the first
# flush, every other one behind the second, so that steps are in the file.
#
# usage: run_profile_kill.sh TRIREME MODEL N_KILLS
set -u
if [ $# -ne 3 ]; then
    echo "usage: $0 TRIREME MODEL N_KILLS" >&2
    exit 2
fi
trireme=$1 model=$2 wanted=$3
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
one_rank
export OMP_NUM_THREADS=1
for tool in h5clear h5dump; do
    command -v $tool >/dev/null || skip "skipped: no $tool (Debian: hdf5-tools)"
done
scratch profile-kill

# requests N: write n = N of them
requests() {
    n=$1
    for ((i = 0; i < n; i++)); do
        printf '{"custom_id": "r%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "The code of stone ferry %d is", "max_tokens": 48, "ignore_eos": true, "seed": %d}}\n' \
            "$i" "$i" "$i"
    done >"$dir/in.jsonl"
}

start() {
    rm -rf "$dir"/p.h5*
    "$trireme" batch -m "$model" -i "$dir/in.jsonl" -o "$dir/out.jsonl" --max-sequences 4 --profile "$dir/p.h5" \
        --profile-flush 1 >"$dir/log" 2>&1 &
    job=$!
}

# The rank's file, as far as it is there: a copy is made behind every flush, the first at the start, then once a second. Each
# takes the other's place, so that its inode tells them apart. (A p.h5.part beside the folder is the joined file on its way.)
part() {
    find "$dir" -path '*.h5.d/*' -name '*.part'
}

flushed() { # once
    [ -n "$(part)" ] && [ -s "$dir/out.jsonl" ]
}

flushed_again() {
    [ "$(stat -c %i "$(part)" 2>/dev/null)" != "$first" ]
}

# The run has come to its end: it leaves one record for every request, and a joined profile.
finished() {
    ended
    [ "$status" -eq 0 ] || { echo "it failed by itself: $(cat "$dir/log")"; return 1; }
    records=$(grep -c . "$dir/out.jsonl")
    ids=$(sed 's/.*"custom_id": *"\([^"]*\)".*/\1/' "$dir/out.jsonl" | sort -u | grep -c .)
    rounds=$((rounds + 1))
    [ "$records" -eq "$n" ] && [ "$ids" -eq "$n" ] && [ -f "$dir/p.h5" ] && return 0
    echo "$records records of $n requests, $ids different; $(ls "$dir"/p.h5 2>&1)"
    return 1
}

# readable: the killed run's file, with $rows steps in it.
readable() {
    local file
    file=$(part)
    if [ -n "$file" ]; then
        h5clear -s "$file" >"$dir/clear" 2>&1
    else
        file=$(find "$dir" -name 'rank*.h5') # it was closed already, and killed at the very end
    fi
    rows=$(h5dump -H -d /steps "$file" 2>"$dir/complaints" | sed -n 's/.*SIMPLE { ( 1, \([0-9]*\) ).*/\1/p')
    [ -n "$rows" ] && h5dump -d /profile/time_excl "$file" >/dev/null 2>>"$dir/complaints" && return 0
    echo "kill $kills: $file: $(cat "$dir/clear" "$dir/complaints")"
    return 1
}

# A round that ends before it has been killed is too short for this machine: then twice as many requests are begun anew.
kills=0 good=0 most=0 rounds=0
requests 300
while [ "$kills" -lt "$wanted" ]; do
    start
    await_in_job flushed
    first=$(stat -c %i "$(part)" 2>/dev/null)
    if [ $((kills % 2)) -eq 1 ]; then
        await_in_job flushed_again
    else
        sleep "$(awk -v s=$RANDOM 'BEGIN { printf "%.2f", 2 * s / 32768 }')"
    fi
    if ! kill -9 "$job" 2>/dev/null; then
        finished || exit 1
        [ "$n" -lt 100000 ] || { echo "killed $kills times only: $n requests are too few"; exit 1; }
        rm -f "$dir"/out.jsonl*
        requests $((2 * n))
        continue
    fi
    ended
    kills=$((kills + 1))
    readable || continue
    good=$((good + 1))
    [ "$rows" -gt "$most" ] && most=$rows
done
start
finished || exit 1
echo "$kills kills: $good profiles readable, up to $most steps in one; $rounds rounds finished, the last of $n requests, each with one record"
# A single kill may come before the second flush.
[ "$good" -eq "$wanted" ] && { [ "$wanted" -lt 2 ] || [ "$most" -gt 0 ]; }
