#!/bin/sh
# What no rank may begin with, or one rank alone has: every rank ends with the same exit code, soon, and one line says why.
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
: "${TRIREME:?}" "${TR_SRCDIR:?}"
scratch refusals
host=$(hostname)
host=${host%%.*}
echo '{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": [41, 42], "max_tokens": 2}}' >"$dir/in"
for rank in 0 1; do # a model folder of each rank's own
    mkdir "$dir/model.$rank"
    cp "$TR_SRCDIR"/models/tiny/* "$dir/model.$rank"
done
# What a rank has of its own is decided by these, in its shell.
cat >"$dir/rank" <<'RANK'
rank=${OMPI_COMM_WORLD_RANK-${PMI_RANK-${PMIX_RANK-}}}
[ "$rank" != 0 ] || { shift && exec "$@"; }
other=$1
shift
# shellcheck disable=SC2086 # options
exec "$@" $other
RANK

# refused CODE TEXT RANKS OTHER OPTION...: OTHER are further options of all ranks but 0.
refused()
{
    code=$1 text=$2 ranks=$3 other=$4
    shift 4
    rm -f "$dir"/out*
    timeout "$patience_s" "$mpiexec" -n "$ranks" sh "$dir/rank" "$other" "$TRIREME" batch -i "$dir/in" -o "$dir/out" \
        --max-model-len 512 "$@" >"$dir/log" 2>&1
    status=$?
    lines=$(grep -c '^trireme: ' "$dir/log")
    if [ "$status" -ne "$code" ] || [ "$lines" -ne 1 ] || ! grep '^trireme: ' "$dir/log" | grep -qF -- "$text"; then
        echo "$ranks ranks $*, others $other: exit status $status (wanted: $code), $lines lines (wanted: one with '$text')"
        sed 's/^/    /' "$dir/log"
        failed=1
    fi
}

tiny="-m $dir/model.0"
# shellcheck disable=SC2086 # options
{
    refused 2 "rank 0 on $host: impossible process grid: 4 attention heads do not divide by tp 3" 3 '' $tiny --tp 3
    refused 2 'pp 3 * dp 1 * cp 1 * tp 2 is not the number of ranks, 4' 4 '' $tiny --tp 2 --pp 3
    refused 2 '16 experts do not divide by ep 3' 2 '' $tiny --ep 3
    refused 2 "rank 1 on $host: started with another --kv-dtype than rank 0: bf16, not f32" 2 '--kv-dtype bf16' \
        $tiny --kv-dtype f32
    refused 2 'another process grid than rank 0: pp 1 dp 2 cp 1 tp 1' 2 '--tp 1 --dp 2' $tiny --tp 2
    refused 2 'another layers of the stages than rank 0: 3,1, not 1,3' 2 '--pp-layers 3,1' $tiny --pp 2 --pp-layers 1,3

    refused 2 "rank 1 on $host: started with another --profile-files than rank 0: node, not auto" 2 '--profile-files node' \
        $tiny --profile "$dir/profile.h5"
    # Meant to be jobs of their own: only rank 0's would be done.
    refused 2 "rank 1 on $host: started with another --shard than rank 0: 1/2, not 0/2" 2 '--shard 1/2' $tiny --shard 0/2
    refused 2 "started with another -o than rank 0: $dir/out.1, not $dir/out" 2 "-o $dir/out.1" $tiny
    long=$dir/$(printf '%0120d' 0)
    refused 2 "started with another -i than rank 0: ..$(printf '%s' "$long" | tail -c 91).1, not $dir/in" 2 "-i $long.1" $tiny
    # What would leave ranks in different collectives.
    refused 2 "rank 1 on $host: started with another --no-bind than rank 0: on, not off" 2 --no-bind $tiny
    refused 2 "rank 1 on $host: started with another --step-timeout than rank 0: on, not 0" 2 '--step-timeout 60' \
        $tiny --step-timeout 0
    refused 2 "rank 1 on $host: started with another --device than rank 0: cpu, not auto" 2 '--device cpu' $tiny

    sed -i 's/"routed_scaling_factor": [0-9.]*/"routed_scaling_factor": 2.25/' "$dir/model.1/config.json"
    refused 2 'another model than rank 0' 2 "-m $dir/model.1" $tiny
    cp "$dir/model.0/config.json" "$dir/model.1"

    shard=$dir/model.1/model-00002-of-00002.safetensors
    mv "$shard" "$dir/shard"
    refused 65 "rank 1 on $host: $shard: No such file" 2 "-m $dir/model.1" $tiny
    head -c 200000 "$dir/shard" >"$shard"
    refused 65 "$shard: " 4 "-m $dir/model.1" $tiny
}
# Sizes that the backend cannot compute, found before a weight is read: these shards have other shapes and are never missed. What is
# in config.json is the model's fault, what --override puts there the command line's.
sized() # TEXT SETTING: config.json's "name": number
{
    name=${2%=*}
    sed "s/\"$name\": [0-9]*/\"$name\": ${2#*=}/" "$TR_SRCDIR/models/tiny/config.json" >"$dir/model.1/config.json"
    refused 65 "rank 0 on $host: config.json: $1 (and 1 more rank)" 2 '' -m "$dir/model.1" --device cpu
}
cp "$dir/shard" "$dir/model.1/model-00002-of-00002.safetensors"
sized 'n_routed_experts 1028: the CPU backend takes at most 1024' n_routed_experts=1028
sized 'kv_lora_rank + qk_rope_head_dim 1028: the CPU backend takes at most 1024' kv_lora_rank=964
sized 'kv_lora_rank 514: the CPU backend takes multiples of 4' kv_lora_rank=514
sized 'qk_nope_head_dim + qk_rope_head_dim 513: the CPU backend takes at most 512' qk_nope_head_dim=449
sized 'v_head_dim 513: the CPU backend takes at most 512' v_head_dim=513
refused 2 "rank 0 on $host: --override: config.json: v_head_dim 513: the CPU backend takes at most 512 (and 1 more rank)" 2 '' \
    -m "$dir/model.0" --device cpu --override v_head_dim=513
# The largest that it takes, all at once.
timeout "$patience_s" "$TRIREME" batch -m "$dir/model.0" --device cpu --load-format dummy -i "$dir/in" -o "$dir/most" --max-model-len 512 \
    --override num_hidden_layers=2 --override n_routed_experts=1024 --override kv_lora_rank=960 --override qk_nope_head_dim=448 \
    --override v_head_dim=512 >"$dir/log" 2>&1
status=$?
if [ "$status" -ne 0 ] || ! grep -q '"choices"' "$dir/most"; then
    echo "sizes at the limits: exit status $status (wanted: 0), or no answer"
    sed 's/^/    /' "$dir/log"
    failed=1
fi

# A question that is refused on rank 0, when the others already wait for its first step.
timeout "$patience_s" "$mpiexec" -n 2 "$TRIREME" batch -m "$dir/model.0" --max-model-len 4 --prompt 'Of what may this city be the capital?' \
    </dev/null >"$dir/log" 2>&1
status=$?
if [ "$status" -ne 2 ] || ! grep '^trireme: rank 0 on ' "$dir/log" | grep -qF 'no room for an answer'; then
    echo "a question that is too long: exit status $status (wanted: 2)"
    sed 's/^/    /' "$dir/log"
    failed=1
fi

# bare CODE COMMAND... [VARIABLE=VALUE]...: a job of one rank whose launcher's variables say this.
bare()
{
    code=$1 command=$2
    shift 2
    case $command in
    batch) set -- "$@" "$TRIREME" batch -m "$dir/model.0" -i "$dir/in" -o "$dir/out" --max-model-len 512 ;;
    comm) set -- "$@" "$TRIREME" bench comm --bytes 8 --calls 1 ;;
    esac
    rm -f "$dir"/out*
    timeout "$patience_s" env "$@" >"$dir/log" 2>&1
    status=$?
    said="$(grep -c '^trireme: .* processes, but each is a job of 1 rank' "$dir/log")"
    if [ "$status" -ne "$code" ] || [ "$said" -ne $((code == 2)) ] || { [ "$code" -eq 2 ] && [ -e "$dir/out" ]; }; then
        echo "$command with $1 $2: exit status $status (wanted: $code), said $said times that ranks do not find each other"
        sed 's/^/    /' "$dir/log"
        failed=1
    fi
}
bare 2 batch SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=8 && grep -qF 'trireme: srun started 8 processes, but' "$dir/log" || failed=1
bare 2 batch OMPI_COMM_WORLD_SIZE=8 && grep -qF 'trireme: mpirun started 8 processes, but' "$dir/log" || failed=1
bare 2 batch OMPI_COMM_WORLD_SIZE=8 SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 # mpirun of a terminal's step
bare 2 batch PMI_RANK=1 PMI_SIZE=2
bare 2 comm SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=2
# A batch script's own shell, also in an array; a step of one; the shell of srun --pty; mpiexec -n 1, whose daemon srun has started.
bare 0 batch SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_JOB_ID=7 SLURM_ARRAY_TASK_ID=3 SLURM_ARRAY_TASK_COUNT=8
bare 0 batch SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1 SLURM_NTASKS=8
bare 0 batch SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=8 SLURM_PTY_PORT=40001
bare 0 batch SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=8 PMI_RANK=0 PMI_SIZE=1
exit "$failed"
