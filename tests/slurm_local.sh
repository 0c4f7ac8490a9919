#!/usr/bin/env bash
# slurm_local.sh - a throw-away Slurm cluster on this machine, for tests.
#
# Starts munged, slurmctld and one slurmd per node under a private state directory, on private ports, with a
# private munge key. It needs no systemd, no cgroups and no accounting database, and it leaves a system-wide
# Slurm installation alone. Nothing is ever installed: where a program is missing or namespaces are refused, the
# script says so and exits with status 77 ("skipped" to automake's test driver).
#
#   slurm_local.sh up [--nodes N] [--slots N] [--gpus N]
#   slurm_local.sh status
#   slurm_local.sh env            # eval "$(slurm_local.sh env)"
#   slurm_local.sh down [--keep]  # --keep leaves logs and the state directory
#   slurm_local.sh drop NODE      # cut a node off the network (--nodes >= 2)
#   slurm_local.sh restore NODE   # and put it back
#
# One node (the default) is a slurmd in the current namespaces and also works for an ordinary user. With --nodes 2
# or more, every node gets its own network, mount, UTS and IPC namespace (own host name, own address, own /dev/shm),
# so MPI takes its inter-node path; this needs root. Clusters with ports and directories of their own do not
# disturb each other.
#
# --slots are CPUs per node and may exceed the machine's (default 2). --gpus declares that many generic "gpu"
# resources per node, so that job scripts that ask for GPUs are accepted on a machine without any; no device is
# attached. A requeued job waits for 5 s, not for the 2 minutes of a Slurm as it comes.
#
# Environment: TR_SLURM_DIR (state directory, absolute, short: it holds sockets), TR_SLURM_PORT (first of 2 + N
# ports, default 26817), TR_SLURM_NET (first three bytes of the node network, default 10.x.y, both by the port).

set -euo pipefail

prog=${0##*/}
dir=${TR_SLURM_DIR:-/tmp/trireme-slurm-$(id -u)}
port=${TR_SLURM_PORT:-26817}
net=${TR_SLURM_NET:-10.$((160 + port / 250 % 90)).$((port % 250 + 1))}
bridge=trb$port

say()  { printf '%s: %s\n' "$prog" "$*" >&2; }
die()  { say "$*"; exit 1; }
usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "$0"; }

PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
conf=$dir/slurm.conf
sock=$dir/munge-run/socket

need() {
    local missing=() p
    for p in "$@"; do command -v "$p" >/dev/null || missing+=("$p"); done
    ((${#missing[@]} == 0)) && return
    say "not found: ${missing[*]}"
    say "Debian packages: munge slurmctld slurmd slurm-client iproute2"
    exit 77
}

# alive PIDFILE COMM: the daemon that wrote PIDFILE still runs (a zombie does not).
alive() {
    local pid stat
    pid=$(cat "$1" 2>/dev/null) && stat=$(cat "/proc/$pid/stat" 2>/dev/null) &&
        [[ $stat == "$pid ($2) "[!ZX]* ]]
}

# stop PIDFILE COMM: ask, wait up to 5 s, then insist.
stop() {
    local pid i
    if ! alive "$1" "$2"; then rm -f "$1"; return 0; fi
    pid=$(cat "$1")
    kill "$pid" 2>/dev/null || true
    for ((i = 0; i < 50; i++)); do alive "$1" "$2" || break; sleep 0.1; done
    if alive "$1" "$2"; then kill -9 "$pid" 2>/dev/null || true; fi
    rm -f "$1"
}

# await SECONDS COMMAND...: retry until it succeeds.
await() {
    local n=$(($1 * 10)) i; shift
    for ((i = 0; i < n; i++)); do "$@" >/dev/null 2>&1 && return; sleep 0.1; done
    return 1
}

# ours: never act on files that another user put where ours would be.
ours() {
    [[ ! -e $dir && ! -L $dir ]] || [[ -O $dir && ! -L $dir ]] ||
        die "$dir belongs to someone else; set TR_SLURM_DIR"
}

nodes() { sed -n 's/^NodeName=\([^ ]*\).*/\1/p' "$conf"; }
ns_of() { printf 'trs%s-%s' "$port" "$1"; }
link_of() { printf 'trv%sn%s' "$port" "${1#tr}"; }
is_multi() { [[ -e $dir/hosts ]]; }
# ready: every node of the configuration has registered and takes jobs.
ready() {
    (($(sinfo -h -N -o %T | grep -cxE 'idle|mixed|allocated') == $(nodes | wc -l)))
}
no_jobs() { [[ -z $(squeue -h 2>/dev/null) ]]; }

write_conf() { # nodes slots gpus
    local n=$1 slots=$2 gpus=$3 ctl=127.0.0.1 i mem gres=
    mem=$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    ((n > 1)) && ctl=$net.254
    cat >"$conf" <<CONF
ClusterName=trlocal
SlurmctldHost=$(hostname -s)($ctl)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
TmpFS=$dir/tmp.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/jobcomp.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
MpiDefault=pmix
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=600
SlurmdParameters=config_overrides
CONF
    : >"$dir/gres.conf"
    if ((gpus > 0)); then
        gres=" Gres=gpu:$gpus"
        echo "GresTypes=gpu" >>"$conf"
        # slurmd counts the device files, so give it plain files to count.
        mkdir -p "$dir/dev"
        for ((i = 0; i < gpus; i++)); do : >"$dir/dev/gpu$i"; done
        printf 'AutoDetect=off\nName=gpu File=%s/dev/gpu[0-%d]\n' "$dir" $((gpus - 1)) >"$dir/gres.conf"
    fi
    for ((i = 1; i <= n; i++)); do
        local addr=127.0.0.1 host
        host=$(hostname -s)
        ((n > 1)) && addr=$net.$i host=tr$i
        echo "NodeName=tr$i NodeHostname=$host NodeAddr=$addr" \
            "Port=$((port + i)) CPUs=$slots RealMemory=$mem$gres State=UNKNOWN" >>"$conf"
    done
    echo "PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP" >>"$conf"
}

net_up() { # nodes
    local n=$1 i ns
    if ip netns list | grep -q "^trs$port-"; then
        die "node namespaces of port $port exist already: another cluster is up there"
    fi
    if ! ip link add "$bridge" type bridge 2>"$dir/why" || ! unshare --mount --uts --ipc true 2>>"$dir/why"; then
        say "no namespaces or no links here: $(head -n 1 "$dir/why")"
        net_down
        exit 77
    fi
    ip addr replace "$net.254/24" dev "$bridge"
    ip link set "$bridge" up
    { echo "127.0.0.1 localhost"; echo "$net.254 $(hostname -s)"; } >"$dir/hosts"
    for ((i = 1; i <= n; i++)); do
        ns=$(ns_of "tr$i")
        echo "$net.$i tr$i" >>"$dir/hosts"
        ip netns add "$ns"
        ip link add "$(link_of "tr$i")" type veth peer name eth0 netns "$ns"
        ip link set "$(link_of "tr$i")" master "$bridge" up
        ip -n "$ns" link set lo up
        ip -n "$ns" link set eth0 up
        ip -n "$ns" addr add "$net.$i/24" dev eth0
    done
}

net_down() {
    local ns link p
    # A namespace dies only with its last process; its links need not wait.
    for link in $(ip -br link show type veth 2>/dev/null | sed -n "s/^\\(trv${port}n[0-9]*\\)@.*/\\1/p"); do
        ip link delete "$link"
    done
    for ns in $(ip netns list 2>/dev/null | awk -v mine="^trs$port-" '$1 ~ mine {print $1}'); do
        for p in $(ip netns pids "$ns"); do kill -9 "$p" 2>/dev/null || true; done
        ip netns delete "$ns"
    done
    if ip link show "$bridge" >/dev/null 2>&1; then ip link delete "$bridge"; fi
}

start_slurmd() { # node
    if is_multi; then
        # The daemon forks itself, so its namespaces outlive this shell.
        # nsenter, not "ip netns exec": that one remounts /sys and hides the
        # cgroup mount, without which slurmd 22.05 refuses to start.
        # shellcheck disable=SC2016
        nsenter --net="/run/netns/$(ns_of "$1")" unshare --mount --uts --ipc bash -ec '
            hostname "$1"
            mount --bind "$2/hosts" /etc/hosts
            mount -t tmpfs -o mode=1777 tmpfs /dev/shm
            exec slurmd -N "$1"' slurmd "$1" "$dir"
    else
        slurmd -N "$1"
    fi
}

up() {
    local n=1 slots=2 gpus=0 node
    while (($#)); do
        case $1 in
        --nodes) n=$2; shift ;;
        --slots) slots=$2; shift ;;
        --gpus)  gpus=$2; shift ;;
        *) die "unknown option $1" ;;
        esac
        shift
    done
    [[ $n =~ ^[1-9][0-9]?$ && $slots =~ ^[1-9][0-9]*$ && $gpus =~ ^[0-9]+$ ]] || die "bad count"
    need munged munge slurmctld slurmd sinfo squeue scontrol scancel awk hostname
    ((n > 1)) && need ip unshare nsenter
    ((n > 1 && EUID != 0)) && { say "--nodes $n needs root (namespaces)"; exit 77; }
    [[ $dir == /* && ${#dir} -le 60 ]] || die "TR_SLURM_DIR must be absolute and short"
    ours

    local want="nodes=$n slots=$slots gpus=$gpus"
    if alive "$dir/slurmctld.pid" slurmctld; then
        [[ $(cat "$dir/shape" 2>/dev/null) == "$want" ]] ||
            die "already up as $(cat "$dir/shape"); run '$prog down' first"
    else
        down_quiet
        mkdir -p "$dir"
        chmod 755 "$dir"  # munge clients refuse a socket below a closed directory
        mkdir -p "$dir/munge-key" "$dir/state" "$dir/munge-run"
        chmod 700 "$dir/munge-key" "$dir/state"
        chmod 755 "$dir/munge-run"
        write_conf "$n" "$slots" "$gpus"
        echo "$want" >"$dir/shape"
        for node in $(nodes); do mkdir -p "$dir/spool.$node" "$dir/tmp.$node"; done
        if ((n > 1)); then net_up "$n"; fi
    fi

    if [[ ! -s $dir/munge-key/key ]]; then
        (umask 077; head -c 128 /dev/urandom >"$dir/munge-key/key")
    fi
    alive "$dir/munge-run/pid" munged || munged --socket="$sock" \
        --key-file="$dir/munge-key/key" --seed-file="$dir/munge-key/seed" \
        --pid-file="$dir/munge-run/pid" --log-file="$dir/munge-key/log"
    export SLURM_CONF=$conf
    alive "$dir/slurmctld.pid" slurmctld || slurmctld
    for node in $(nodes); do
        alive "$dir/slurmd.$node.pid" slurmd || start_slurmd "$node"
    done
    await 200 ready || { status; die "nodes did not come up; see $dir/*.log"; }
    status
}

status() {
    if ! alive "$dir/slurmctld.pid" slurmctld; then say "down"; return 3; fi
    export SLURM_CONF=$conf
    echo "up: $(cat "$dir/shape"), SLURM_CONF=$conf"
    sinfo -N -o '%10N %8T %5c %10m %G'
    squeue
}

# strays: Slurm processes of this cluster without a pid file (job steps that
# outlived their slurmd, its helpers), told by the configuration file in their
# environment.
strays() {
    local p
    for p in /proc/[0-9]*; do
        [[ $(cat "$p/comm" 2>/dev/null) =~ ^slurm(d|stepd)$ ]] || continue
        if tr '\0' '\n' 2>/dev/null <"$p/environ" | grep -qxF "SLURM_CONF=$conf"; then
            echo "${p#/proc/}"
        fi
    done
}

down_quiet() {
    [[ -d $dir ]] || return 0
    local node p
    export SLURM_CONF=$conf
    if alive "$dir/slurmctld.pid" slurmctld; then
        # Never with a filter that could be empty: ask for the job numbers.
        for p in $(squeue -h -o %A 2>/dev/null); do scancel -f "$p" 2>/dev/null || true; done
        await 60 no_jobs || say "jobs still running; stopping anyway"
    fi
    if [[ -e $conf ]]; then
        for node in $(nodes); do stop "$dir/slurmd.$node.pid" slurmd; done
    fi
    stop "$dir/slurmctld.pid" slurmctld
    for p in $(strays); do kill -9 "$p" 2>/dev/null || true; done
    stop "$dir/munge-run/pid" munged
    if is_multi; then net_down; fi
    rm -rf "$dir/state" "$dir"/spool.* "$dir"/tmp.* "$dir/munge-run" "$dir/hosts"
}

down() {
    ours
    down_quiet
    if [[ ${1-} != --keep && -e $conf ]]; then rm -rf "$dir"; fi
    say "down"
}

link() { # up|down node
    is_multi || die "drop and restore need --nodes 2 or more"
    [[ ${2-} =~ ^tr[0-9]+$ ]] || die "name a node: $(nodes | tr '\n' ' ')"
    ip link set "$(link_of "$2")" "$1"
}

cmd=${1-}; shift || true
case $cmd in
up)      up "$@" ;;
down)    down "$@" ;;
status)  status ;;
drop)    link down "$@" ;;
restore) link up "$@" ;;
env)
    echo "export SLURM_CONF=$conf"
    ((EUID == 0)) && echo "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    true ;;
-h|--help|help) usage ;;
*) usage >&2; exit 2 ;;
esac
