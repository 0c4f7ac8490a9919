# shellcheck shell=bash disable=SC2034,SC2154
# What run_slurm.sh and run_slurm_campaign.sh share: a cluster of their own, the scripts of jobs/ edited as a user would,
# their ends. To be sourced, with $trireme, $model and $COMPARE set; makes $dir and takes the cluster down at the end.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Not below TMPDIR: Slurm's sockets need a short name.
dir=$(mktemp -d "/tmp/trireme-slurm.XXXXXX") || exit 1
chmod 755 "$dir"
export TR_SLURM_DIR=$dir/s TR_SLURM_PORT
cluster=$top/tests/slurm_local.sh
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive OMPI_MCA_mpi_yield_when_idle=1
if [ "$(id -u)" -eq 0 ]; then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
# Names of a job that this may run in; sbatch takes SBATCH_... for options, trireme SLURM_... for facts.
for name in $(compgen -e | grep -E '^(SLURM|SBATCH|SRUN)_'); do unset "$name"; done
failed=0

reserved=
leave() {
    local p
    for p in $(jobs -p); do kill "$p" 2>/dev/null; done
    "$cluster" down >/dev/null 2>&1
    rm -rf "$dir" "$reserved"
}
trap leave EXIT
trap 'exit 1' HUP INT TERM

# free_ports FIRST: nobody listens on any of the 20 from there, nor is there a cluster's bridge of that number.
free_ports() {
    awk -v first="$1" 'BEGIN { digits = "0123456789ABCDEF" }
        $4 == "0A" {
            split($2, at, ":")
            port = 0
            for (i = 1; i <= 4; i++) port = port * 16 + index(digits, substr(at[2], i, 1)) - 1
            if (port >= first && port < first + 20) exit 1
        }' /proc/net/tcp && [ ! -e "/sys/class/net/trb$1" ]
}

# Ports that no other test of this machine uses: whoever makes the folder has them, until it ends.
for ((k = 0; k < 400; k++)); do
    TR_SLURM_PORT=$((20000 + ($$ + k) % 400 * 20))
    reserved=/tmp/trireme-slurm-ports.$TR_SLURM_PORT
    if ! mkdir "$reserved" 2>/dev/null; then
        # left behind by a test that was killed?
        read -r owner 2>/dev/null <"$reserved/pid" && [ -O "$reserved" ] && ! kill -0 "$owner" 2>/dev/null && rm -rf "$reserved"
        reserved=
        continue
    fi
    echo $$ >"$reserved/pid"
    ! free_ports "$TR_SLURM_PORT" || break
    rm -rf "$reserved"
    reserved=
done
[ -n "$reserved" ] || { echo 'no ports are free'; exit 1; }

# up OPTION...: the cluster; skipped where there can be none.
up() {
    "$cluster" up "$@" >"$dir/cluster.log" 2>&1
    local status=$?
    if [ "$status" -ne 0 ]; then
        [ "$status" -eq 77 ] || cat "$dir/cluster.log"
        tail -n 1 "$dir/cluster.log"
        exit "$status"
    fi
    eval "$("$cluster" env)"
}

# up_if_can OPTION...: false, with the reason in $why, where up would be skipped.
up_if_can() {
    why=$("$cluster" up "$@" 2>&1)
    local status=$?
    why=$(tail -n 1 <<<"$why")
    [ "$status" -eq 0 ] || [ "$status" -eq 77 ] || { say "$why"; exit "$status"; }
    [ "$status" -ne 0 ] || eval "$("$cluster" env)"
    return "$status"
}

say() { printf '%s\n' "$*"; }

# complain JOB-NAME TEXT...: a failure, with the log of the job.
complain() {
    local log
    say "$*"
    for log in "$dir/$1".*.out; do
        [ ! -e "$log" ] || tail -n 40 "$log" | sed 's/^/    /'
    done
    failed=1
}

# requests N LONGEST: so many, as prompts of token ids, with answers of up to LONGEST tokens.
requests() {
    awk -v n="$1" -v longest="$2" 'function next_id() { seed = (seed * 1103515245 + 12345) % 2147483648; return int(seed / 65536) }
    BEGIN {
        seed = 17
        for (i = 0; i < n; i++) {
            prompt = 40 + next_id() % 1800
            for (k = next_id() % 160; k > 0; k--) prompt = prompt ", " 40 + next_id() % 1800
            more = i % 3 ? "\"temperature\": 0.9, \"top_p\": 0.97, \"n\": 2" : "\"temperature\": 0, \"logprobs\": 2"
            printf "{\"custom_id\": \"request-%04d\", \"method\": \"POST\", \"url\": \"/v1/completions\", \"body\": " \
                "{\"prompt\": [%s], \"max_tokens\": %d, \"return_token_ids\": true, %s}}\n", i, prompt,
                8 + next_id() % (longest - 7), more
        }
    }'
}

# What makes records that do not depend on the neighbours of a request, in steps short enough to be stopped between.
exact='--kv-dtype f32 --max-model-len 512 --max-batch-tokens 128 --max-sequences 4'

# uninterrupted INPUT: what its records must be, in INPUT.whole; how long one rank takes for them into $took_ms.
uninterrupted() {
    local from_ms
    rm -f "$dir/$1.whole"*
    from_ms=$(date +%s%3N)
    # shellcheck disable=SC2086 # a list of options
    "$trireme" batch -m "$model" -i "$dir/$1" -o "$dir/$1.whole" $exact >"$dir/log" 2>&1 || { cat "$dir/log"; exit 1; }
    took_ms=$(($(date +%s%3N) - from_ms))
}

# long_enough INPUT MILLISECONDS LONGEST: an INPUT of at least 200 requests, that takes this machine so long: what is done to a
# job while it runs must find it running. How many into $n; a multiple of three and two more.
long_enough() {
    n=200
    requests "$n" "$3" >"$dir/$1"
    uninterrupted "$1"
    [ "$took_ms" -lt "$2" ] || return 0
    n=$((n * $2 / (took_ms + 1) / 3 * 3 + 2))
    requests "$n" "$3" >"$dir/$1"
    uninterrupted "$1"
}

# edit SCRIPT NAME LIMIT RESOURCES FILES OPTIONS: jobs/SCRIPT as $dir/NAME.sbatch, its five lines as given; the folder of
# trireme stands in for a module.
edit() {
    awk -v limit="#SBATCH --partition=debug --time=$3" -v resources="#SBATCH $4" \
        -v setup="setup() { PATH=$(dirname "$trireme"):\$PATH; }" -v files="model=$model $5" -v options="$6" '
        /^# ---- edit these five lines/ {
            print
            print limit "\n" resources "\n" setup "\n" files "\n" options
            for (n = 0; n < 5; n++) getline
            next
        }
        { print }' "$top/jobs/$1" >"$dir/$2.sbatch"
}

# submit NAME OPTION...: its job number into $id.
submit() {
    local name=$1
    shift
    id=$(cd "$dir" && sbatch --parsable --job-name="$name" --output="%x.%j.out" "$@" "$name.sbatch") ||
        { complain "$name" 'sbatch refuses it'; return 1; }
}

# field JOB NAME: of "scontrol show job", "-" where the job is not known any more.
field() {
    local text
    text=$(scontrol -o show job "$1" 2>/dev/null | tr ' ' '\n' | sed -n "s/^$2=//p" | head -n 1)
    say "${text:--}"
}

# over JOB: it neither waits nor runs. A controller that does not answer proves nothing.
over() {
    local text
    text=$(squeue -h -j "$1" 2>&1) || { [[ $text == *'Invalid job id'* ]] && return; return 1; }
    [ -z "$text" ]
}

# await_end SECONDS JOB...: until none of them waits or runs.
await_end() {
    local until=$((SECONDS + $1)) job
    shift
    for job; do
        until over "$job"; do
            [ "$SECONDS" -lt "$until" ] || { complain job "job $job does not end: $(squeue -h -j "$job")"; return 1; }
            sleep 0.3
        done
    done
}

# expect NAME JOB STATE CODE: how the job ended.
expect() {
    local got
    got="$(field "$2" JobState) $(field "$2" ExitCode)"
    [ "$got" = "$3 $4:0" ] || complain "$1" "job $2 ended as $got instead of $3 $4:0"
}

# same NAME INPUT OUT: every request has its record, once, as without interruption; $verdict says so in a line.
same() {
    local said
    said=$("$COMPARE" "$dir/$2.whole" "$3" 2>&1) || complain "$1" "$(tail -n 3 <<<"$said")"
    verdict=$(tail -n 1 <<<"$said")
}

# ranks JOB [NODE]: process ids of its ranks, of all nodes or of one of the cluster's.
ranks() {
    local pid
    for pid in $(pgrep -x trireme); do
        tr '\0' '\n' 2>/dev/null <"/proc/$pid/environ" | awk -v pid="$pid" -v job="SLURM_JOB_ID=$1" \
            -v conf="SLURM_CONF=$SLURM_CONF" -v node="${2:+SLURMD_NODENAME=$2}" '
            $0 == job { j = 1 } $0 == conf { c = 1 } $0 == node { n = 1 }
            END { if (j && c && (n || node == "")) print pid }'
    done
}

records() { wc -l 2>/dev/null <"$1" || echo 0; }

# is JOB STATE RESTARTS: that state, of that start.
is() { [ "$(field "$1" JobState) $(field "$1" Restarts)" = "$2 $3" ]; }

# pacer: hold the ranks of the jobs that $dir/paced names, as "JOB OUT REQUESTS SECONDS", whenever they are ahead of a pace
# at which all REQUESTS take SECONDS of running. So a job outlasts its time limit on a machine of any speed, without the work
# of a minute. Runs until $dir/paced is removed, in the background.
pacer() {
    local -A job_of=() of_job=() active=()
    local job out n seconds pid last=$SECONDS passed
    while [ -e "$dir/paced" ]; do
        sleep 0.4
        of_job=() passed=$((SECONDS - last)) last=$SECONDS
        for pid in $(pgrep -x trireme); do
            [ -n "${job_of[$pid]-}" ] || job_of[$pid]=$(job_of_rank "$pid")
            of_job[${job_of[$pid]}]+=" $pid"
        done
        while read -r job out n seconds; do
            [ -n "${of_job[$job]-}" ] || continue
            active[$job]=$((${active[$job]-0} + passed))
            # shellcheck disable=SC2086 # a list of numbers
            if [ $(($(records "$out") * seconds)) -gt $((${active[$job]} * n)) ]; then
                kill -STOP ${of_job[$job]}
            else
                kill -CONT ${of_job[$job]}
            fi 2>/dev/null
        done <"$dir/paced"
    done 2>/dev/null
    for pid in "${!job_of[@]}"; do [ "${job_of[$pid]}" = other ] || kill -CONT "$pid" 2>/dev/null; done
}

# job_of_rank PID: the number of its job, or "other" where it is no rank on this cluster.
job_of_rank() {
    tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | awk -F = -v conf="SLURM_CONF=$SLURM_CONF" '
        $1 == "SLURM_JOB_ID" { job = $2 } $0 == conf { here = 1 } END { print here && job ? job : "other" }'
}

# seconds_left NAME JOB LIMIT: for each start that ended in a stop, the seconds that were left of the limit, by the times in
# the job's log; one line each.
seconds_left() {
    local begun='' line at
    while read -r line; do
        at=$(date -d "${line%% *}" +%s)
        case $line in
        *', start '*) begun=$at ;;
        *'exit code 75: requeued') say $(($3 - at + begun)) ;;
        esac
    done < <(grep -E '^[0-9-]+T[0-9:]+ ' "$dir/$1.$2.out")
}

# spread: of the numbers on stdin: how many, the least, the mean.
spread() {
    awk '{ sum += $1; if (NR == 1 || $1 < least) least = $1 } END { print NR, least + 0, NR ? int(sum / NR + 0.5) : 0 }'
}

# lose_node JOB OUT N NODE...: one after the other, each when N more records are there: cut it off; when Slurm has requeued
# the job, restore it. One line of what happened.
lose_node() {
    local job=$1 out=$2 more=$3 node before text='' begun restarts=0
    shift 3
    for node; do
        before=$(records "$out")
        until [ "$(records "$out")" -ge $((before + more)) ] && is "$job" RUNNING "$restarts"; do
            ! over "$job" || break 2
            sleep 0.1
        done
        "$cluster" drop "$node"
        begun=$SECONDS
        while [ "$(field "$job" Restarts)" = "$restarts" ] && [ $((SECONDS - begun)) -lt 600 ]; do sleep 0.2; done
        restarts=$((restarts + 1))
        text="$text${text:+, }$node lost after $(records "$out") records, requeued $((SECONDS - begun)) s later"
        "$cluster" restore "$node"
        until is "$job" RUNNING "$restarts" || [ $((SECONDS - begun)) -gt 900 ]; do sleep 0.2; done
    done
    say "$text"
}
