#!/bin/sh
# What is above CUDA and NCCL, on a device and an NCCL that are the host and MPI (tests/fake_nccl/): the communicators' operations on 2
# and 3 ranks against those over MPI; whole jobs, every grid of which gives the answers of one rank; and what is refused.
set -u
if [ -z "${MPIEXEC-}" ]; then
    echo 'no MPI launcher was found'
    exit 77
fi
export OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1
if [ "$(id -u)" -eq 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
: "${TR_BUILDDIR:?}" "${TR_SRCDIR:?}"
dir=$(mktemp -d "${TMPDIR:-/tmp}/trireme-fake.XXXXXX") || exit 1
trap 'rm -rf "$dir"' EXIT
status=0
program=$TR_BUILDDIR/tests/trireme_on_fake

for ranks in 2 3; do
    if ! timeout 200 "$MPIEXEC" -n "$ranks" "$TR_BUILDDIR/tests/test_comm_on_fake" >"$dir/log" 2>&1; then
        echo "communicators, $ranks ranks:"
        cat "$dir/log"
        status=1
    fi
done

# Under a sanitizer two ranks have to do (three take minutes), and what programs that end with the device's work undone leave behind
# is not looked at: the fake device's handles and the test's own place.
most=4 leaks=
if grep -q -e '__tsan_init' -e '__asan_init' "$program"; then
    most=2 leaks="ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0"
fi

for how in '2' '3' '4' '2 abort'; do
    [ "${how% *}" -le "$most" ] || continue
    # shellcheck disable=SC2086 # the second word is an argument
    if ! timeout 200 env ${leaks:+"$leaks"} "$MPIEXEC" -n ${how% *} "$TR_BUILDDIR/tests/test_peer_on_fake" ${how#?} >"$dir/log" 2>&1; then
        echo "sums over peer memory, $how:"
        cat "$dir/log"
        status=1
    fi
done

# Rows pushed into caches, and gathered where the fake GPUs do not reach each other.
for peers in '' unreachable; do
    for ranks in 2 3 4; do
        [ "$ranks" -le "$most" ] || continue
        if ! timeout 200 env ${leaks:+"$leaks"} ${peers:+FAKE_PEERS=$peers} "$MPIEXEC" -n "$ranks" "$TR_BUILDDIR/tests/test_push_on_fake" >"$dir/log" 2>&1; then
            echo "rows over peer memory, $ranks ranks, FAKE_PEERS=$peers:"
            cat "$dir/log"
            status=1
        fi
    done
done

# Rows are pushed and swapped; where they are dealt out as runs they go through NCCL.
# shellcheck disable=SC2016 # the script's
printf '#!/bin/sh\ncase "$*" in *in-seq-split*) set -- "$@" --peer-kernels off ;; esac\nexec "%s" "$@" --device cuda\n' "$program" >"$dir/trireme"
chmod +x "$dir/trireme"
"$TR_SRCDIR/tests/run_grids.sh" "$dir/trireme" "$TR_SRCDIR/models/tiny" "$TR_BUILDDIR/tests/compare_records" --quick || status=1

# Rows go to the experts of other ranks as e4m3 codes where the backend's norms leave them: the same answers, to the last digit, as
# when the rows travel and the codes are made of them there; and less travels. Prompts are dispatched, decoded rows told to all. Codes go
# over peer memory, rows through NCCL.
gathered() { # HOW: kB that decoded rows have taken to all experts
    "$program" profile show "$dir/$1.h5" | awk '$1 " " $2 == "all_gather MOE" { print $4 * ($5 == "MB" ? 1000 : $5 == "kB" ? 1 : 0) }'
}
for grid in '--dp 2' '--tp 2 --dp 2'; do
    ranks=$(echo "$grid" | awk '{ n = 1; for (i = 2; i <= NF; i += 2) n *= $i; print n }')
    [ "$ranks" -le "$most" ] || continue
    for how in codes rows; do
        way=auto
        [ "$how" = codes ] || way=off
        # shellcheck disable=SC2086 # several words
        timeout 200 env FAKE_W8A8=$how "$MPIEXEC" -n "$ranks" "$program" batch -m "$TR_SRCDIR/models/tiny" --device cuda --kv-dtype f32 --peer-kernels "$way" $grid \
            -i "$TR_SRCDIR/jobs/quickstart.jsonl" -o "$dir/$how.jsonl" --profile "$dir/$how.h5" >"$dir/log" 2>&1 ||
            { cat "$dir/log"; status=1; }
    done
    "$TR_BUILDDIR/tests/compare_records" "$dir/rows.jsonl" "$dir/codes.jsonl" >"$dir/log" 2>&1 || { echo "codes under $grid:"; cat "$dir/log"; status=1; }
    # A row is 256 numbers: 1 KiB, or 264 bytes of codes and scales. Members of a larger replica gather what comes back, too.
    if [ "$ranks" -eq 2 ] && ! awk -v codes="$(gathered codes)" -v rows="$(gathered rows)" 'BEGIN { exit !(codes > 0 && codes < 0.4 * rows) }'; then
        echo "$grid: $(gathered codes) kB with codes, $(gathered rows) without"
        status=1
    fi
    rm -rf "$dir"/codes.* "$dir"/rows.*
done

# ends CODE TEXT ENVIRONMENT...     ARGUMENTS=.. among it: more of the command line
ends()
{
    code=$1 text=$2
    shift 2
    # shellcheck disable=SC2016 # the inner shell's
    timeout 200 env ARGUMENTS= "$@" sh -c '"$0" -n 2 "$@" $ARGUMENTS' "$MPIEXEC" "$program" batch -m "$TR_SRCDIR/models/tiny" \
        --prompt hello --device cuda --tp 2 >"$dir/log" 2>&1
    got=$?
    [ "$got" -eq "$code" ] && grep -q -- "$text" "$dir/log" && return
    echo "$*: exit status $got where $code is wanted, or no word of '$text'"
    cat "$dir/log"
    status=1
}
ends 0 '' FAKE_GPU=
# the table at start: a line for each rank
ends 0 ' rank  host .* NUMA .* to others' FAKE_PEERS=2
[ "$(grep -cE 'trireme: +[01]  .* fa4e:0[01]:00.0 +0  not bound .* (P2P|SHM) 1$' "$dir/log")" -eq 2 ] || { cat "$dir/log"; status=1; }
ends 2 'ranks 0 and 1 on .* have the same GPU, GPU-7' FAKE_GPU=GPU-7
ends 2 'NCCL_NVLS_ENABLE=2: multicast is not to be relied on' NCCL_NVLS_ENABLE=2
# Without a word about devices: every rank has a fake GPU, or all compute on CPUs and one line says why. FAKE_1: a variable of rank 1 alone.
# shellcheck disable=SC2016 # the script's
printf '#!/bin/sh\n[ "${OMPI_COMM_WORLD_RANK-${PMI_RANK-}}" != 1 ] || [ -z "${FAKE_1-}" ] || export "${FAKE_1?}"\nexec "%s" "$@"\n' "$program" >"$dir/rank"
chmod +x "$dir/rank"
auto() { # CODE DEVICE WHY ENVIRONMENT...     WHY '': no line says that GPUs are not used
    code=$1 device=$2 why=$3
    shift 3
    # shellcheck disable=SC2016 # the inner shell's
    timeout 200 env ARGUMENTS= "$@" sh -c '"$0" -n 2 "$@" $ARGUMENTS' "$MPIEXEC" "$dir/rank" batch -m "$TR_SRCDIR/models/tiny" \
        --prompt hello --verbose >"$dir/log" 2>&1
    got=$?
    used=cpu
    if grep -q 'trireme: NCCL ' "$dir/log"; then used=cuda; fi
    lines=$(grep -c 'GPUs are not used: ' "$dir/log")
    [ "$got" -eq "$code" ] && { [ "$code" -ne 0 ] || [ "$used" = "$device" ]; } && [ "$lines" -eq "$([ -z "$why" ] && echo 0 || echo 1)" ] &&
        grep -q -- "$why" "$dir/log" && return
    echo "auto, $*: exit status $got where $code is wanted, on $used, $lines lines, or not '$why'"
    cat "$dir/log"
    status=1
}
host=$(hostname)
host=${host%%.*}
auto 0 cuda '' FAKE_GPUS=
auto 0 cuda '' FAKE_GPUS=8 ARGUMENTS='--device auto --peer-kernels on'
auto 0 cuda '' FAKE_GPUS=1 FAKE_GPU=GPU-0 FAKE_1=FAKE_GPU=GPU-1
auto 0 cpu "rank 1 on $host sees none; --device cuda insists" FAKE_1=FAKE_GPUS=0
auto 0 cpu "ranks 0 and 1 on $host see the same one, GPU-7" FAKE_GPUS=1 FAKE_GPU=GPU-7
auto 0 cpu "rank 0 on $host sees an old one" FAKE_UNFIT='an old one'
auto 0 cpu "rank 0 on $host sees none: an old driver" FAKE_GPUS=0 FAKE_UNFIT='none: an old driver'
if ! FAKE_UNFIT='an old one' timeout 200 "$program" batch -m "$TR_SRCDIR/models/tiny" --prompt hello >"$dir/log" 2>&1 ||
    [ "$(grep -c 'GPUs are not used: an old one; --device cuda insists' "$dir/log")" -ne 1 ]; then
    echo 'one rank and a GPU of no use: no line, or more'
    cat "$dir/log"
    status=1
fi
auto 0 cpu '' FAKE_GPUS=0
auto 0 cpu '' FAKE_GPUS= ARGUMENTS='--device cpu'
auto 2 cpu "several ranks with --device cuda are wanted; GPUs are not used: rank 1 on $host sees none" FAKE_1=FAKE_GPUS=0 ARGUMENTS='--peer-kernels on'
auto 2 cpu '' FAKE_GPUS= ARGUMENTS='--device cpu --peer-kernels on'
ends 0 'attn_tp: sum and norm of   1 rows.*: one-shot' FAKE_GPU= ARGUMENTS='--verbose'
ends 0 'attn_tp: no sums over peer memory: switched off' FAKE_GPU= ARGUMENTS='--verbose --peer-kernels off'
# Where one member has no window none has one, and all know why.
ends 0 'attn_tp: no sums over peer memory: member 0: GPU .* does not reach' FAKE_PEERS=unreachable ARGUMENTS='--verbose'
ends 0 'attn_tp: no sums over peer memory: member 1: cudaIpcOpenMemHandle: ' FAKE_PEERS=closed ARGUMENTS='--verbose'
ends 0 'attn_tp: no sums over peer memory: member 0: cudaIpcGetMemHandle: ' FAKE_PEERS=none ARGUMENTS='--verbose'
ends 0 'attn_tp: no sums over peer memory: what one GPU stores .* does not arrive' FAKE_PEERS=damaged ARGUMENTS='--verbose'
ends 2 'attn_tp.*member 1: cudaIpcOpenMemHandle: ' FAKE_PEERS=closed ARGUMENTS='--peer-kernels on'
ends 0 'attn_cp: rows over peer memory' FAKE_GPU= ARGUMENTS='--tp 1 --cp 2 --peer-kernels on --verbose'
ends 0 'attn_cp: rows over peer memory' FAKE_GPU= ARGUMENTS='--tp 1 --cp 2 --verbose'
ends 0 'attn_cp: rows over NCCL: switched off' FAKE_GPU= ARGUMENTS='--tp 1 --cp 2 --verbose --peer-kernels off'
ends 0 'moe: rows over peer memory' FAKE_GPU= ARGUMENTS='--tp 1 --dp 2 --verbose'
ends 0 'moe: rows over NCCL: member 0: GPU .* does not reach' FAKE_PEERS=unreachable ARGUMENTS='--tp 1 --dp 2 --verbose'
ends 0 'moe: rows over NCCL: what one GPU stores .* does not arrive' FAKE_PEERS=damaged ARGUMENTS='--tp 1 --dp 2 --verbose'
ends 2 'rows over peer memory of attn_cp: member 0: GPU .* does not reach' FAKE_PEERS=unreachable ARGUMENTS='--tp 1 --cp 2 --peer-kernels on'
ends 2 'rows over peer memory of attn_cp: member 1: cudaIpcOpenMemHandle: ' FAKE_PEERS=closed ARGUMENTS='--tp 1 --cp 2 --peer-kernels on'
ends 86 'attn_tp.*an error of the fake NCCL' FAKE_GPU= FAKE_NCCL_CALLS=40 ARGUMENTS='--peer-kernels off'
ends 86 'peer memory of attn_tp.*an error of the fake NCCL' FAKE_GPU= ${leaks:+"$leaks"} FAKE_NCCL_CALLS=40
# A step that fails on every rank is told of once, with its operation's name once; where it fails on one alone, that one tells.
fails() { # CODE TEXT VARIABLE COMMAND...
    code=$1 text=$2 variable=$3
    shift 3
    timeout 200 env "$variable" "$MPIEXEC" -n 2 "$dir/rank" "$@" -m "$TR_SRCDIR/models/tiny" --device cuda --tp 2 >"$dir/log" 2>&1
    got=$?
    [ "$got" -eq "$code" ] && [ "$(grep -c 'layer [0-9]*: router' "$dir/log")" -eq 1 ] && grep -qE -- "^trireme: $text" "$dir/log" && return
    echo "$*, $variable: exit status $got where $code is wanted, or not one line '$text'"
    cat "$dir/log"
    status=1
}
routed='layer 1: router: 4 of 1025 experts in 4 groups \(at most 1024 experts\)'
fails 2 "rank 0 on $host: step 1: $routed \(and 1 more rank\)\$" FAKE_FAILS=1 batch --prompt hello
fails 86 "rank 1 on $host: step 1: $routed; the other ranks did not answer within 5 s\$" FAKE_1=FAKE_FAILS=1 batch --prompt hello
fails 2 "rank 0 on $host: $routed \(and 1 more rank\)\$" FAKE_FAILS=1 bench step --context 20 --sequences 1 --steps 1
exit "$status"
