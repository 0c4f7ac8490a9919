#!/bin/bash
# Jobs of 4 ranks that go wrong: a rank that is stopped, one that computes for ever, one that is killed, one that fails while the
# others wait for it, a job that is suspended as a whole; and one that is well though its first step and its idle time take longer
# than a step may. The job must end with the right code and say who it was. (How soon: run_rank_kill.sh.)
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
scratch watchdog

complain() { # TEXT...
    echo "$how: $*"
    sed 's/^/    /' "$dir/$how.err"
    failed=1
}

start() { # HOW
    how=$1 out=$dir/$1.out
    timeout "$patience_s" "$mpiexec" -n 4 "${TR_BUILDDIR:?}/tests/test_watchdog" "$how" "$out" \
        >"$dir/$how.stdout" 2>"$dir/$how.err" &
    job=$!
}

finish() { # CODE
    ended
    [ "$status" -eq "$1" ] || complain "exit code $status where $1 is wanted"
}

says() { # TEXT
    grep -qF -- "$1" "$dir/$how.err" || complain "nobody says: $1"
}

reports() { # RANK...: these left a report and no others did
    local r
    for r in 0 1 2 3; do
        case " $* " in
        *" $r "*) [ -s "$out.hang.rank0000$r.json" ] || complain "no report of rank $r" ;;
        *) [ ! -e "$out.hang.rank0000$r.json" ] || complain "a report of rank $r" ;;
        esac
    done
}

host=$(hostname)
host=${host%%.*}

how=well
echo stale >"$dir/well.out.hang.rank00001.json"
start well
finish 0
grep -qx finished "$dir/well.stdout" || complain "did not finish"
reports

# A rank that is slow, not hung: its layers take long, its step three times what it may without progress. The others wait for it.
start slow
finish 0
grep -qx finished "$dir/slow.stdout" || complain "did not finish"
reports

# A rank that the machine has no time for, twice as long as a step may take: not stopped, so not to be named.
start starve
finish 0
grep -qx finished "$dir/starve.stdout" || complain "did not finish"
reports

start stop
finish 86
reports 0 1 3
says "rank 2 on $host does not respond"
grep -q "rank 0 on $host: no progress for [1-9][0-9.]* s" "$dir/stop.err" || complain 'nobody says for how long'
says "step 6, layer 4, layer, waiting for all_reduce number 7 of stage"
if [ -n "${PYTHON-}" ]; then
    "$PYTHON" - "$out.hang.rank00000.json" <<'PY' || complain "the report is not what it should be"
import json, sys
r = json.load(open(sys.argv[1]))
assert (r["trireme_hang"], r["rank"], r["world"], r["step"], r["layer"], r["what"]) == (1, 0, 4, 6, 4, "layer"), r
assert r["silence_s"] >= 1
assert {x["rank"]: x["responds"] for x in r["ranks"]} == {0: True, 1: True, 2: False, 3: True}, r["ranks"]
last = r["collectives"][-1]
assert last["id"] == r["waits_for"] and not last["done"], last
assert (last["group"], last["op"], last["number"], last["bytes"]) == ("stage", "all_reduce", 7, 120000), last
assert all(c["done"] and c["begun_s_ago"] >= c["done_s_ago"] > 0 for c in r["collectives"][:-1])
PY
fi

start busy
finish 86
reports 0 1 2 3
says "rank 1 on $host is not waiting (step 5, layer 11, experts)"

# Communicators of a device that fail by themselves: told at once, and what waits on the device is aborted first.
start device
finish 86 60
says "rank 1 on $host: step 7: a link of the device is gone"
says "the device's work was aborted"

start kill
finish 137
reports

start fail
finish 71
says "rank 3 on $host: no room; the other ranks did not answer within 0.5 s"

# Stopped as a whole, by a batch system say, and continued: nobody is to blame.
start suspend
# shellcheck disable=SC2317 # by await
all_began() {
    for r in 0 1 2 3; do [ -s "$out.pid.$r" ] || return 1; done
}
await_in_job all_began
sleep 0.6
pids=$(cat "$out".pid.*)
# shellcheck disable=SC2086 # a list
kill -STOP $pids
sleep 2.5
# shellcheck disable=SC2086
kill -CONT $pids
finish 0
grep -qx finished "$dir/suspend.stdout" || complain "did not finish"
reports

exit "$failed"
