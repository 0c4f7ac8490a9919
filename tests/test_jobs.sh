#!/bin/bash
# What jobs/ has, without a Slurm: the scripts' rules with stand-ins for srun, squeue, scontrol and mpirun; the recipes as far
# as their tools are there. (On a Slurm of this machine's own: run_slurm.sh.)
set -u
jobs=${TR_SRCDIR:?}/jobs
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
scratch jobs
cd "$dir" || exit 1

complain() {
    echo "$*"
    failed=1
}

# ---- the five lines

for script in "$jobs"/*.sbatch; do
    name=${script##*/}
    bash -n "$script" || complain "$name: not a script"
    n=$(awk '/^# ---- edit these five lines/ { inside = 1; next } /^# -----/ { exit } inside' "$script" | wc -l)
    [ "$n" -eq 5 ] || complain "$name: $n lines to edit instead of 5"
    # Slurm stops reading at the first command.
    awk '!/^#/ && NF { seen = 1 } seen && /^#SBATCH/ { exit 1 }' "$script" || complain "$name: #SBATCH behind a command"
    awk 'length > 132 { exit 1 }' "$script" || complain "$name: a line of more than 132 columns"
done

# ---- the rules, with stand-ins

mkdir bin
stand_in() {
    { echo '#!/bin/bash'; cat; } >"bin/$1"
    chmod +x "bin/$1"
}
stand_in srun <<'END'
echo "srun $*" >>said
read -r code <codes
sed -i 1d codes
# A job with a time limit answers something, or, STUCK, does not.
if [ -z "$STUCK" ]; then
    for out in out out.2; do echo '{}' >>"$out"; done
fi
exit "$code"
END
stand_in squeue <<'END'
echo "squeue $*" >>said
echo "$LEFT"
END
stand_in scontrol <<'END'
case $1 in
show)
    # DEAF: so many times it does not answer.
    n=$(cat deaf 2>/dev/null)
    echo $((n + 1)) >deaf
    [ "${n:-0}" -ge "${DEAF:-0}" ] || exit 1
    echo "JobId=7 JobName=x Requeue=1 Restarts=$RESTARTS BatchFlag=1"
    ;;
requeue)
    echo "requeue $2" >>said
    exit "${REFUSES:-0}"
    ;;
esac
END
stand_in sleep <<'END'
echo "sleep $*" >>said
END
stand_in sbatch <<'END'
echo "sbatch $*" >>said
echo "$((100 + $(grep -c ^sbatch said)));cluster"
END
stand_in trireme <<'END'
echo "trireme $*" >>said
END
# Rank and launcher in one: USR1 is what ends it, with 75.
stand_in mpirun <<'END'
echo "mpirun $*" >>said
trap 'echo USR1 >>said; exit 75' USR1
echo >ready
for i in {1..6000}; do /bin/sleep 0.1; done
exit 1
END

# edited SCRIPT: with its five lines as a user has them here.
edited() {
    sed -e "s|^setup() .*|setup() { PATH=$dir/bin:\$PATH; }|" -e 's|^\(#SBATCH --account\).*|\1=x --time=10|' \
        -e 's|^model=.*|model=tiny input=in output=out requests=1|' -e 's|^shards=.*|shards=3 options=(--tp 2)|' \
        -e 's|^options=.*|options=(--tp 2)|' "$jobs/$1" >"$1"
    rm -f said
}

# run SCRIPT CODES VARIABLE=VALUE...: start it as Slurm would; its exit code into $code, what it called is in said.
run() {
    local script=$1
    tr ' ' '\n' <<<"$2" >codes
    shift 2
    : >said
    rm -f deaf
    env SLURM_JOB_ID=7 SLURM_NTASKS=2 SLURM_NNODES=1 SLURM_JOB_NODELIST=n1 LEFT=9:59 RESTARTS=0 "$@" bash "$script" >log 2>&1
    code=$?
}

# rule SCRIPT JOB CODES RESTARTS WANTED-CODE REQUEUED VARIABLE=VALUE...
rule() {
    local script=$1 job=$2 codes=$3 restarts=$4 wanted=$5 again=$6 got=no
    shift 6
    run "$script" "$codes" SLURM_RESTART_COUNT="$restarts" RESTARTS="$restarts" "$@"
    ! grep -qx "requeue $job" said || got=yes
    [ "$(grep -c ^requeue said)" -le 1 ] || got=twice
    if [ "$code:$got" != "$wanted:$again" ]; then
        complain "$script, srun ends with $codes after $restarts restarts: exit code $code instead of $wanted, requeued $got"
    fi
}

# both SCRIPT JOB VARIABLE=VALUE...: what requeue.sbatch and each part of array.sbatch promise.
both() {
    local script=$1 job=$2 c
    shift 2
    edited "$script"
    rule "$script" "$job" 0 0 0 no "$@"
    for c in 1 2 65 70 71 74 143; do rule "$script" "$job" "$c" 0 "$c" no "$@"; done
    rule "$script" "$job" 75 0 75 yes "$@"
    rule "$script" "$job" 75 99 75 yes "$@"
    grep -q -e 'trireme batch -m tiny -i in -o out.* --time-budget 9:59 --tp 2$' said || complain "$script: srun was given: $(cat said)"
    # Five faults, whatever was before and between; the sixth is one too many.
    for c in 86 '137 137' 75 86 '137 137' 86; do rule "$script" "$job" "$c" 40 "${c#* }" yes "$@"; done
    rule "$script" "$job" '137 137' 46 137 no "$@"
    rule "$script" "$job" 86 47 86 no "$@"
    rule "$script" "$job" 75 48 75 yes "$@"
    # Ranks on a lost node hold the output: not at a first start; then until it is free, or five times.
    rule "$script" "$job" '2 0' 0 2 no "$@"
    rule "$script" "$job" '2 2 0' 1 0 no "$@"
    [ "$(grep -c '^sleep 30$' said)" -eq 2 ] || complain "$script: it did not wait for the output: $(cat said)"
    rule "$script" "$job" '2 2 2 2 2 0' 1 2 no "$@"
    # Or what is left there ends the new ranks, once.
    rule "$script" "$job" '137 0' 1 0 no "$@"
    rule "$script" "$job" '1 75' 1 75 yes "$@"
    rule "$script" "$job" '1 1 0' 1 1 no "$@"
    for c in 65 70 71 74; do rule "$script" "$job" "$c 0" 1 "$c" no "$@"; done
    # A controller that is slow to answer, that does not, that does not want to.
    rule "$script" "$job" 75 1 75 yes DEAF=4 "$@"
    [ "$(grep -c '^sleep 20$' said)" -eq 4 ] || complain "$script: it did not wait for Slurm: $(cat said)"
    rule "$script" "$job" 75 1 75 no DEAF=5 "$@"
    run "$script" 75 REFUSES=1 "$@"
    if [ "$code" -ne 75 ] || ! grep -q 'Slurm refuses: sbatch' log; then complain "$script: it does not say that Slurm refuses"; fi
    # Five starts without anything new are enough; more of an answer, or one more, and it counts from the start again.
    for c in 1 2 3 4; do rule "$script" "$job" 75 "$c" 75 yes STUCK=1 "$@"; done
    rule "$script" "$job" 75 5 75 no STUCK=1 "$@"
    grep -q 'five starts answered nothing new' log || complain "$script: it does not say why it gives up: $(cat log)"
    for c in out.saved out.2.saved; do echo some >>"$c"; done
    rule "$script" "$job" 75 6 75 yes STUCK=1 "$@"
    rule "$script" "$job" 75 7 75 yes "$@"
    rule "$script" "$job" 86 8 86 no "$@"
    # A copy on a node that came back: the job has been restarted meanwhile.
    run "$script" 75 SLURM_RESTART_COUNT=1 RESTARTS=2 "$@"
    if [ "$code" -ne 75 ] || grep -q ^requeue said; then complain "$script: an old copy requeues the job"; fi
}

both requeue.sbatch 7
both array.sbatch 90_2 SLURM_ARRAY_JOB_ID=90 SLURM_ARRAY_TASK_ID=2
grep -q -e ' -o out.2 --shard 2/3 ' said || complain "array.sbatch: srun was given: $(cat said)"
[ "$(grep -Ec '^90_2 exit (86|137)' out.2.faults)" -eq 8 ] || complain 'array.sbatch: it does not count the faults of its part'

# The time that is left: asked for where Slurm does not say, and only where there is a limit.
for script in batch requeue profile; do
    edited "$script.sbatch"
    : >in
    run "$script.sbatch" 0 LEFT=1-02:03:04
    grep -q -e '--time-budget 1-02:03:04' said || complain "$script: the time left is not given"
    for left in UNLIMITED NOT_SET INVALID ''; do
        run "$script.sbatch" 0 LEFT="$left"
        ! grep -q -e --time-budget said || complain "$script: time left '$left' is given"
    done
    run "$script.sbatch" 0 SLURM_JOB_END_TIME=1700000000
    ! grep -q -e '--time-budget\|squeue' said || complain "$script: Slurm said when the job ends, and was asked again"
    run "$script.sbatch" 65
    [ "$code" -eq 65 ] || complain "$script: exit code $code instead of 65"
    sed -i 's/^setup() .*/setup() { return 3; }/' "$script.sbatch"
    PATH=$dir/bin:$PATH run "$script.sbatch" 0
    if [ "$code" -ne 3 ] || grep -q ^srun said; then complain "$script: it goes on without its modules"; fi
done

# The array from the login node: the shards, and the join behind them.
edited array.sbatch
: >said
PATH=$dir/bin:$PATH bash array.sbatch %4 >log 2>&1 || complain "array.sbatch does not submit itself: $(cat log)"
printf '%s\n' 'sbatch --parsable --array=0-2%4 array.sbatch' 'sbatch --parsable --dependency=afterok:101'\
' --kill-on-invalid-dep=yes --array=0 --job-name=trireme-join --nodes=1 --ntasks=1 --ntasks-per-node=1 array.sbatch join' >wanted
diff wanted said || complain 'array.sbatch submits something else (>)'
: >said
SLURM_ARRAY_JOB_ID=101 SLURM_ARRAY_TASK_ID=0 bash array.sbatch join >log 2>&1
grep -qx 'trireme batch --merge -i in -o out out.0 out.1 out.2' said || complain "array.sbatch joins with: $(cat said)"

# mpirun: Slurm's signal reaches this shell alone.
edited batch-mpirun.sbatch
: >said
SLURM_JOB_ID=7 SLURM_NTASKS=16 SLURM_NNODES=2 SLURM_JOB_NODELIST=n1 LEFT=9:59 bash batch-mpirun.sbatch >log 2>&1 &
shell=$!
await test -e ready
kill -USR1 "$shell"
wait "$shell"
code=$?
if [ "$code" -ne 75 ] || ! grep -qx USR1 said; then
    complain "batch-mpirun.sbatch: exit code $code after USR1: $(cat log said)"
fi
grep -q -e '^mpirun -np 16 --map-by ppr:8:node --bind-to none trireme .* --time-budget 9:59 --tp 2$' said ||
    complain "batch-mpirun.sbatch calls: $(cat said)"

# ---- recipes

: "${PYTHON:=python3}"
if command -v "$PYTHON" >/dev/null; then
    PYTHONDONTWRITEBYTECODE=1 "$PYTHON" "$TR_SRCDIR/tests/spack_recipe.py" "$jobs/spack/packages/trireme/package.py" >spack ||
        complain 'the Spack recipe does not run'
    [ "$(wc -l <spack)" -eq 16 ] || complain "the Spack recipe: $(wc -l <spack) combinations instead of 16"
    # What configure links, and what several GPUs need.
    ! grep -q hdf5_hl "$TR_SRCDIR/configure" || grep -q '"hdf5@.*+hl"' "$jobs/spack/packages/trireme/package.py" ||
        complain "the Spack recipe: no hdf5+hl"
    ! grep -e --with-cuda= spack | grep -v -e --with-nccl=/opt/nccl || complain 'the Spack recipe: CUDA without NCCL'
    ! grep -e --without-cuda spack | grep -v -e --without-nccl || complain 'the Spack recipe: NCCL without CUDA'
    "$TR_SRCDIR/configure" --help >help || complain 'no configure'
    for option in $(tr ' ' '\n' <spack | sed 's/=.*//; s/^--without-/--with-/' | sort -u); do
        grep -q -e "^  $option\(=\| \)" help || complain "the Spack recipe: configure does not know $option"
    done
else
    echo 'Spack recipe not checked: no python3'
fi

# %post is a shell script, and what it calls exists.
sed -n '/^%post/,/^%environment/{ /^%/d; s/{{[^}]*}}//; p; }' "$jobs/apptainer.def" >post
if [ ! -s post ] || ! sh -n post; then complain 'apptainer.def: %post is no script'; fi
if command -v shellcheck >/dev/null; then shellcheck -s sh post || complain 'apptainer.def: %post'; fi
for section in arguments files post environment test runscript help; do
    grep -q "^%$section\$" "$jobs/apptainer.def" || complain "apptainer.def: no %$section"
done

for kind in lua tcl; do
    sed -e 's|@bindir@|/opt/t/bin|; s|@mandir@|/opt/t/share/man|; s|@pkgdatadir@|/opt/t/share/trireme|; s|@version@|1.2|' \
        "$jobs/modulefiles/trireme.$kind.in" >"module.$kind"
    ! grep -n '@' "module.$kind" || complain "trireme.$kind.in: a name that nothing is put in for"
done
cat >modules.tcl <<'END'
proc module-whatis {text} { puts "whatis $text" }
proc conflict {name} { puts "conflict $name" }
proc prepend-path {name value} { puts "prepend $name $value" }
proc append-path {name value} { puts "append $name $value" }
source module.tcl
ModulesHelp
END
cat >modules.lua <<'END'
function help(text) end
function whatis(text) print("whatis " .. text) end
function conflict(name) print("conflict " .. name) end
function prepend_path(name, value) print("prepend " .. name .. " " .. value) end
function append_path(name, value) print("append " .. name .. " " .. value) end
dofile("module.lua")
END
command -v apptainer >/dev/null || echo 'apptainer.def not built: no apptainer'
for tool in tclsh:tcl lua:lua; do
    command -v "${tool%:*}" >/dev/null || { echo "trireme.${tool#*:}.in not loaded: no ${tool%:*}"; continue; }
    "${tool%:*}" "modules.${tool#*:}" >loaded 2>log || complain "trireme.${tool#*:}.in: $(cat log)"
    printf '%s\n' 'whatis Name: trireme' 'whatis Version: 1.2' 'whatis Description: MPI batch inference of DeepSeek-V3.2 models' \
        'conflict trireme' 'prepend PATH /opt/t/bin' 'prepend MANPATH /opt/t/share/man' 'append MANPATH ' >wanted
    diff wanted loaded || complain "trireme.${tool#*:}.in does something else (>)"
done

# ---- completion

# shellcheck disable=SC1091
. "$TR_SRCDIR/src/trireme.bash-completion"
complete_words() {
    COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)) COMPREPLY=()
    _trireme
    echo "${COMPREPLY[*]}"
}
[ "$(complete_words trireme ba)" = batch ] || complain "completion of 'trireme ba': $(complete_words trireme ba)"
[[ " $(complete_words trireme batch --mo) " == *' --model '* ]] || complain 'completion of --mo'
[ "$(complete_words trireme batch --kv-dtype b)" = bf16 ] || complain 'completion of --kv-dtype b'
[ "$(complete_words trireme batch --profile-files n)" = node ] || complain 'completion of --profile-files n'
[ "$(complete_words trireme bench w)" = watchdog ] || complain "completion of 'bench w'"
[ "$(complete_words trireme bench comm --ex)" = --experts ] || complain "completion of 'bench comm --ex'"
[ -z "$(complete_words trireme bench comm --steps)" ] || complain "completion of 'bench comm --steps'"
touch in.jsonl
[ "$(complete_words trireme batch -i in.j)" = in.jsonl ] || complain 'completion of a file'

exit "$failed"
