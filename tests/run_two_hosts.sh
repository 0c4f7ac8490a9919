#!/bin/bash
# Ranks on two hosts: two network namespaces of this machine with a link between them, each with its own host name and /dev/shm,
# so that MPI takes its way between nodes. Every grid must give the answers of one rank, a rank that is stopped on the other host
# must be found, and a link that breaks must not leave a rank behind.
#
# usage: run_two_hosts.sh TRIREME MODEL      needs COMPARE (tests/compare_records), root and namespaces; else skipped (77)
set -u

if [ $# -ne 2 ]; then
    echo "usage: $0 TRIREME MODEL" >&2
    exit 2
fi
trireme=$1 model=$2
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
: "${COMPARE:=${TR_BUILDDIR-.}/tests/compare_records}"
mpi_environment
for p in "${mpiexec:-none}" ip nsenter unshare; do
    command -v "$p" >/dev/null || skip "$p was not found"
done
mpiexec=$(command -v "$mpiexec")
"$mpiexec" --version 2>&1 | grep -q 'Open MPI' || skip 'the launcher is not that of Open MPI: it does not take a start agent'
[ "$(id -u)" -eq 0 ] || skip 'namespaces with a link between them need root'
PATH=$PATH:/usr/sbin:/sbin

scratch hosts
a=trh-$$-1 b=trh-$$-2
# shellcheck disable=SC2317 # by trap
leave() {
    local ns p
    for ns in "$a" "$b"; do
        for p in $(ip netns pids "$ns" 2>/dev/null); do kill -9 "$p" 2>/dev/null; done
        ip netns delete "$ns" 2>/dev/null
    done
    clean
}
trap leave EXIT
{ ip netns add "$a" && ip netns add "$b"; } 2>"$dir/why" || skip "no network namespaces here: $(head -n 1 "$dir/why")"
ip -n "$a" link add eth0 type veth peer name eth0 netns "$b" 2>"$dir/why" || skip "no links here: $(head -n 1 "$dir/why")"
for n in 1 2; do
    ns=trh-$$-$n
    ip -n "$ns" link set lo up && ip -n "$ns" addr add "10.213.99.$n/24" dev eth0 && ip -n "$ns" link set eth0 up || exit 1
done
printf '127.0.0.1 localhost\n10.213.99.1 trh1\n10.213.99.2 trh2\n' >"$dir/hosts"

# agent HOST COMMAND...: what ssh would do.
cat >"$dir/agent" <<AGENT
#!/bin/sh
host=\$1
shift
exec nsenter --net=/run/netns/trh-$$-\${host#trh} unshare --mount --uts --ipc sh -c '
    hostname "\$0"
    mount --bind "$dir/hosts" /etc/hosts
    mount -t tmpfs -o mode=1777 tmpfs /dev/shm
    exec sh -c "\$*"' "\$host" "\$@"
AGENT
chmod +x "$dir/agent"
# shellcheck disable=SC2016 # expanded over there
"$dir/agent" trh2 'test "$(hostname)" = trh2 && test -z "$(ls /dev/shm)"' 2>"$dir/why" ||
    skip "no mount or UTS namespaces here: $(head -n 1 "$dir/why")"

awk 'function next_id() { seed = (seed * 1103515245 + 12345) % 2147483648; return 40 + int(seed / 65536) % 1800 }
BEGIN {
    seed = 3
    n = split("1 5 64 65 150 300", length_of, " ")
    for (i = 1; i <= n; i++) {
        prompt = next_id()
        for (k = 1; k < length_of[i]; k++) prompt = prompt ", " next_id()
        printf "{\"custom_id\": \"length-%d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": {\"prompt\": [%s], " \
            "\"max_tokens\": 8, \"temperature\": %s, \"logprobs\": 2, \"return_token_ids\": true}}\n", length_of[i], prompt, \
            i % 3 ? "0" : "0.9"
    }
}' >"$dir/in"
# For the ranks that go wrong: long enough.
n_copies=100
for i in $(seq "$n_copies"); do sed "s/length-/again-$i-/" "$dir/in"; done >"$dir/many"

# The launcher must run on one of the hosts. job RANKS INPUT OUT OPTION...
job() {
    local ranks=$1 input=$2 out=$3
    shift 3
    "$dir/agent" trh1 "exec timeout $patience_s '$mpiexec' --mca plm rsh --mca plm_rsh_agent '$dir/agent' \
        --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 -H trh1:$((ranks / 2)),trh2:$((ranks / 2)) \
        -n $ranks '$trireme' batch -m '$model' -i '$dir/$input' -o '$dir/$out' --kv-dtype f32 --max-model-len 512 $*" \
        >"$dir/log" 2>&1
}

complain() {
    echo "$*"
    sed 's/^/    /' "$dir/log"
    failed=1
}

# Without the namespaces: one rank.
"$trireme" batch -m "$model" -i "$dir/in" -o "$dir/wanted" --kv-dtype f32 --max-model-len 512 >"$dir/log" 2>&1 ||
    { cat "$dir/log"; exit 1; }

check() { # HOW RANKS OPTION...
    local how=$1 ranks=$2 tolerance='' begun=$SECONDS
    shift 2
    [ "$how" = exact ] || tolerance='-t 1e-4'
    rm -f "$dir/out" "$dir"/out.*
    job "$ranks" in out "$@" || { complain "$*: exit status $?"; return; }
    # shellcheck disable=SC2086 # two words or none
    "$COMPARE" $tolerance "$dir/wanted" "$dir/out" >"$dir/said" || complain "$*: $(cat "$dir/said")"
    echo "$how $ranks ranks on two hosts, $*: $(tail -n 1 "$dir/said"), $((SECONDS - begun)) s"
}

check near 4 --tp 4
check near 4 --tp 2 --pp 2
check exact 4 --pp 4
check near 4 --dp 4
check exact 4 --cp 4 --ep 1
check exact 4 --cp 4 --ep 1 --cp-mode in-seq-split
check near 4 --cp 2 --tp 2
check exact 4 --pp 2 --cp 2 --ep 1
check exact 16 --cp 16 --ep 1

# pids HOST: its ranks.
pids() {
    ip netns pids "trh-$$-$1" | while read -r p; do
        [ "$(cat "/proc/$p/comm" 2>/dev/null)" != trireme ] || echo "$p"
    done
}

# A job that the test ends, until records come.
begin_many() {
    rm -f "$dir/out" "$dir"/out.*
    job 4 many out --tp 2 --pp 2 --step-timeout 5 2>/dev/null & # no word of the shell when it is killed
    job=$!
    await_in_job test -s "$dir/out"
}

# The step timeout, and what a job of four ranks that does little takes here, ten times: from the stop or the cut to the end.
rm -f "$dir/out" "$dir"/out.*
from_ms=$(now_ms)
job 4 in out --pp 4 || complain "exit status $?"
limit_ms=$((5000 + 5000 + 10 * ($(now_ms) - from_ms)))

begin_many
kill -STOP "$(pids 2 | tail -n 1)"
from_ms=$(now_ms)
ended
took_ms=$(($(now_ms) - from_ms))
[ "$status" -eq 86 ] || complain "a rank stopped on the other host: exit status $status"
[ "$took_ms" -le "$limit_ms" ] || complain "a rank stopped on the other host: the job took $took_ms ms to end"
grep -q 'rank [23] on trh2.* does not respond' "$dir/log" || complain 'nobody names the rank that was stopped on the other host'
echo "a rank stopped on the other host: the job ended $took_ms ms later, exit status $status"

# shellcheck disable=SC2317 # by await
no_ranks() {
    [ -z "$(pids 1)$(pids 2)" ]
}
begin_many
ip -n "$a" link set eth0 down
from_ms=$(now_ms)
await no_ranks || complain 'a broken link: ranks are left'
took_ms=$(($(now_ms) - from_ms))
[ "$took_ms" -le "$limit_ms" ] || complain "a broken link: the last rank ended after $took_ms ms"
grep -q 'no progress for' "$dir/log" || complain 'a broken link: nobody says so'
# The launcher waits for a host it cannot reach. Two signals that it could handle, its own and the one that timeout hands on, may
# meet in Open MPI's handler, which then waits for itself.
for p in $(pgrep -f "plm_rsh_agent $dir/agent"); do kill -KILL "$p" 2>/dev/null; done
ended
echo "a broken link: no rank was left after $took_ms ms"
ip -n "$a" link set eth0 up
rm -f "$dir"/out.hang.*
job 4 many out --tp 2 --pp 2 || complain "after the link was mended: exit status $?"
[ "$(lines "$dir/out")" -eq $((6 * n_copies)) ] || complain "after the link was mended: $(lines "$dir/out") records of $((6 * n_copies))"

exit "$failed"
