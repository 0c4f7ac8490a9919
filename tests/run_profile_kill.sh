#!/bin/bash
# Kill a batch run with a profile with -9, at random moments, and let it resume; the last run finishes. Every killed run's
# rank file must be readable after h5clear -s, with what was flushed; every request must have its record.
#
# usage: run_profile_kill.sh TRIREME MODEL N_KILLS
set -u
if [ $# -ne 3 ]; then
    echo "usage: $0 TRIREME MODEL N_KILLS" >&2
    exit 2
fi
trireme=$1 model=$2 wanted=$3
export OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1
export OMPI_MCA_ess_singleton_isolated=1 OMPI_MCA_pml=ob1 OMPI_MCA_btl=self OMPI_MCA_mtl=^ofi
for tool in h5clear h5dump; do
    command -v $tool >/dev/null || { echo "skipped: no $tool (Debian: hdf5-tools)"; exit 77; }
done
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-profile-kill.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
export TMPDIR=$dir

# requests N: write N of them
requests()
{
    n=$1
    for ((i = 0; i < n; i++)); do
        printf '{"custom_id": "r%d", "method": "POST", "url": "/v1/completions", "body": {"prompt": "The code of stone ferry %d is", "max_tokens": 48, "ignore_eos": true, "seed": %d}}\n' \
            "$i" "$i" "$i"
    done >"$dir/in.jsonl"
}

run()
{
    "$trireme" batch -m "$model" -i "$dir/in.jsonl" -o "$dir/out.jsonl" --max-sequences 4 --profile "$dir/p.h5" \
        --profile-flush 1 >"$dir/log" 2>&1 &
    pid=$!
}

# The run has come to its end: it leaves one record for every request, and a joined profile.
finished()
{
    wait $pid || { echo "it failed by itself: $(cat "$dir/log")"; return 1; }
    records=$(grep -c . "$dir/out.jsonl")
    ids=$(sed 's/.*"custom_id": *"\([^"]*\)".*/\1/' "$dir/out.jsonl" | sort -u | grep -c .)
    rounds=$((rounds + 1))
    [ "$records" -eq "$n" ] && [ "$ids" -eq "$n" ] && [ -f "$dir/p.h5" ] && rm "$dir/p.h5" && return 0
    echo "$records records of $n requests, $ids different; $(ls "$dir"/p.h5 2>&1)"
    return 1
}

# As many as take this machine about five seconds, so that a kill meets flushes. A round may be finished all the same before it
# has been killed often enough: then the requests are begun anew.
requests 60
start=$(date +%s%N)
run
wait $pid || { cat "$dir/log"; exit 1; }
took=$((($(date +%s%N) - start) / 1000000))
rm -f "$dir"/out.jsonl* "$dir"/p.h5*
requests $((took < 5000 ? 60 * 5000 / (took + 1) : 60))

kills=0 readable=0 most=0 bad=0 rounds=0
for ((try = 0; kills < wanted && try < 20 * wanted; try++)); do
    before=$(find "$dir" -name '*.part' | sort)
    run
    # A copy is made behind every flush: the first at the start, then once a second.
    part=
    for ((i = 0; i < 600; i++)); do
        kill -0 $pid 2>/dev/null || break
        part=$(comm -13 <(echo "$before") <(find "$dir" -name '*.part' | sort) | head -n 1)
        if [ -n "$part" ] && [ -s "$dir/out.jsonl" ]; then break; fi
        sleep 0.05
    done
    sleep "$(awk -v s=$RANDOM 'BEGIN { printf "%.2f", 3 * s / 32768 }')"
    if ! kill -9 $pid 2>/dev/null; then
        finished || exit 1
        rm -f "$dir"/out.jsonl*
        continue
    fi
    wait $pid 2>/dev/null
    kills=$((kills + 1))
    if [ -e "$part" ]; then
        h5clear -s "$part" >"$dir/clear" 2>&1
    else
        part=${part%.part} # it was closed already, and killed at the very end
    fi
    rows=$(h5dump -H -d /steps "$part" 2>"$dir/complaints" | sed -n 's/.*SIMPLE { ( 1, \([0-9]*\) ).*/\1/p')
    if [ -z "$rows" ] || ! h5dump -d /profile/time_excl "$part" >/dev/null 2>>"$dir/complaints"; then
        echo "kill $kills: $part: $(cat "$dir/clear" "$dir/complaints")"
        bad=$((bad + 1))
        continue
    fi
    readable=$((readable + 1))
    [ "$rows" -gt "$most" ] && most=$rows
done
run
finished || bad=$((bad + 1))
echo "$kills kills: $readable profiles readable, up to $most steps in one; $rounds rounds of $n requests finished, every request with one record"
# One kill may come before the second flush, of several some come later.
[ "$bad" -eq 0 ] && [ "$kills" -eq "$wanted" ] && { [ "$wanted" -lt 5 ] || [ "$most" -gt 0 ]; }
