#!/bin/sh
# A GPU that fails (reliability.md 4, rows 14 and 18), without one: the program linked with a CUDA runtime that plays a Hopper GPU and
# fails when told to (tests/fault/cuda_shim.c), the driver's errors from an NVML of the test's own (nvml_shim.c). The n-th allocation,
# none of them behind the first step; and what is said of a device that is lost.
#
# usage: test_cuda_faults.sh [--all]     --all: every n
set -u
: "${TR_BUILDDIR:?}" "${TR_SRCDIR:?}"
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
program=$TR_BUILDDIR/tests/trireme_on_shim
[ -x "$program" ] || skip 'the CUDA backend was not built'
one_rank
scratch cuda-faults
${CC:-cc} -std=gnu17 -O1 -fPIC -shared -Wl,-soname,libnvidia-ml.so.1 -I"$TR_BUILDDIR" \
    "$TR_SRCDIR/tests/fault/nvml_shim.c" -o "$dir/libnvidia-ml.so.1" 2>"$dir/log" || skip "no C compiler that makes a library: $(head -n 1 "$dir/log")"
unset SLURM_JOB_ID SLURMD_NODENAME
# hwloc may have a module that knows NVML, which this one is only a part of.
export OMP_NUM_THREADS=1 HWLOC_COMPONENTS=-nvml,-cuda LD_LIBRARY_PATH="$dir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

request() { # ID TOKENS
    printf '{"custom_id":"%s","method":"POST","url":"/v1/completions","body":{"prompt":[%s],"max_tokens":%d,"ignore_eos":true}}\n' \
        "$1" 5,6,7,8 "$2"
}
request a 6 >"$dir/short"
for id in a b c d e f; do request "$id" 40; done >"$dir/long"

# run INPUT VARIABLE...: a job; its exit status in $status, its words in the log, the shim's counts in $counts.
run() {
    input=$1
    shift
    rm -f "$dir"/out*
    env "$@" CUDA_SHIM_COUNT="$dir/counts" "$program" batch -m "$TR_SRCDIR/models/tiny" --device cuda -i "$dir/$input" \
        -o "$dir/out" --max-sequences 2 --max-batch-tokens 64 --max-model-len 256 >"$dir/log" 2>&1
    status=$?
    read -r allocations late launches steps <"$dir/counts"
}

# ---- memory
run short
is 'a job on the shim' 0 "$status"
is 'its records' 1 "$(lines "$dir/out")"
holds 'it ran steps' [ "$steps" -gt 3 ]
holds 'its kernels were started' [ "$launches" -gt "$steps" ]
is 'no allocation behind the first step' 0 "$late"
all=$allocations few=$steps
run long
is 'a longer job' 0 "$status"
holds 'of more steps' [ "$steps" -gt "$few" ]
is 'none behind its first step' 0 "$late"
is 'and no more of them than the short one' "$all" "$allocations"

# Opening, and what a model takes behind its weights: every one. The weights come from one place: some of them, or --all.
n=1 wrong=0 tried=0
while [ "$n" -le "$all" ]; do
    tried=$((tried + 1))
    run short CUDA_SHIM_ALLOC="$n"
    if [ "$status" -ne 71 ] || [ -s "$dir/out" ] || [ "$steps" -ne 0 ] || ! logged 'out of .*memory' ||
        ! logged '  needed, at least ' || ! logged '  weights  *[0-9]' || ! logged '  left at the moment  '; then
        echo "allocation $n of $all: exit status $status, $steps steps:"
        cat "$dir/log"
        wrong=$((wrong + 1))
    fi
    if [ "${1-}" = --all ] || [ "$n" -lt 20 ] || [ "$n" -gt $((all - 40)) ]; then n=$((n + 1)); else n=$((n + 11)); fi
done
is "each of $tried of $all allocations fails: exit 71 with the table" 0 "$wrong"
holds 'there were some' [ "$all" -gt 20 ]
run short CUDA_SHIM_ALLOC="$all"
has 'the table names the options' '  caches, at least .*--max-model-len 256, --kv-dtype fp8'
has '... and the GPU' 'memory of rank 0 on .*Shim H200'

# ---- a lost device
ecc=214 illegal=700
uuid=GPU-10111213-1415-1617-1819-1a1b1c1d1e1f

run long CUDA_SHIM_ERROR=$ecc NVML_SHIM_XID=63,48 SLURM_JOB_ID=7 SLURMD_NODENAME=tr2
is 'uncorrectable memory: exit 70' 70 "$status"
is '... in the first step' 1 "$steps"
has '... the error' 'uncorrectable ECC error'
has '... PCI id' 'PCI 0000:1B:00.0'
has '... uuid and host' "$uuid, on tr2"
has '... Xid' 'Xid 63: '
has '... advice' 'this GPU is suspect: submit again with --exclude=tr2)'
is '... in one line' 1 "$(grep -c 'uncorrectable ECC' "$dir/log")"

run long CUDA_SHIM_ERROR=$ecc NVML_SHIM_XID=48
has 'not under Slurm: other advice' 'Xid 48: double-bit ECC error; this GPU is suspect: run elsewhere'
is '... and no option of Slurm' 0 "$(grep -c exclude "$dir/log")"

run long CUDA_SHIM_ERROR=$ecc CUDA_SHIM_START=1 SLURM_JOB_ID=7 SLURMD_NODENAME=tr2
is 'at the first wait of the start: exit 70' 70 "$status"
is '... before any step' 0 "$steps"
has '... the same words' "$uuid, on tr2; the driver reported no Xid; this GPU is suspect.*--exclude=tr2"

run long CUDA_SHIM_ERROR=$illegal NVML_SHIM_XID=31
is 'a wrong address: exit 70' 70 "$status"
has '... may be the program' 'Xid 31: memory page fault; if this comes on one host alone'
run long CUDA_SHIM_ERROR=$illegal NVML_SHIM_XID=31,94,45
has '... or the memory' 'Xid 94: contained ECC error; this GPU is suspect'
run long CUDA_SHIM_ERROR=$illegal NVML_SHIM_RESULT=15
has '... or a GPU that is gone' 'the driver has lost the GPU; this GPU is suspect'
run long CUDA_SHIM_ERROR=$illegal NVML_SHIM_REFUSE=1
is '... where NVML does not tell: exit 70' 70 "$status"
has '... that is said' 'Xid unknown, no NVML'
done_checking
