#!/bin/bash
# tests/measure_gpus.py without GPUs: what its figures and verdicts are made of, with a program that says known times; every row
# once on ranks that play GPUs and on CPU ranks; what hangs is ended and nothing of it is left, and the rows behind it run.
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
[ -n "${PYTHON-}" ] || skip 'no Python was found'
scratch measure
fake=${TR_BUILDDIR:?}/tests/trireme_on_fake
measure=("$PYTHON" "${TR_SRCDIR:?}/tests/measure_gpus.py" --build "$TR_BUILDDIR")

# ---- known times: a MoE layer takes 250, 150 and 100 us on 1, 2 and 4 ranks, and of sizes as of real GPUs

printf '#!/bin/sh\nexec "%s" "%s/says.py" "$@"\n' "$PYTHON" "$dir" >"$dir/says"
cat >"$dir/says.py" <<PY
import json, os, sys
a, n = sys.argv[1:], int(os.environ.get("N", "1"))
if a[0] == "plan":
    os.execv("${TRIREME:?}", ["trireme"] + a)
def of(option, default=""):
    return a[a.index(option) + 1] if option in a else default
def numbers(option):
    return [int(x) for x in of(option, "0").split(",") if x != "0"]
def say(**x):
    print(json.dumps(x))
layers = int([v for v in a if v.startswith("num_hidden_layers=")][0][18:]) if a[1] == "step" else 0
if a[1] == "step":
    assert of("--load-format") == "dummy" and of("--device") == "cuda" and os.path.exists(of("-m") + "/config.json")
    for s in numbers("--sequences"):
        for c in numbers("--context"):
            say(bench="step", kind="decode", sequences=s, context=c, median_s=5e-4 + layers * {1: 250e-6, 2: 150e-6, 4: 100e-6}[n])
    for p in numbers("--prefill"):
        assert p <= int(of("--chunk")) * 8
        t = (0.6 if n == 1 else 0.15) if p == 32768 else 1e-3 * layers
        t += layers * (0 if "--own-rows" in a else 20e-6 if "--no-overlap" in a else 2e-6 if of("--peer-kernels") == "on" else 9e-6)
        say(bench="step", kind="prefill", sequences=1, context=int(of("--prefill-at", "0")) + p, median_s=t)
else:
    say(bench="comm", op="all_reduce", ranks=n, bytes=8, median_s=1e-5, plain_median_s=2e-5)
    for r in (1, 2, 4, 8, 16, 32, 64, 128, 256) if of("--width") == "7168" else ():
        say(bench="comm", op="sum_norm", ranks=n, rows=r, median_s=8e-6, plain_median_s=20e-6)
    for r in numbers("--rows"):
        say(bench="comm", op="exchange", ranks=n, rows=r, pushes=True, push_s=2e-5, push_exposed_s=4e-6, nccl_s=6e-5, nccl_exposed_s=2e-5,
            window_s=3e-5, window_exposed_s=7e-6)
    for r in numbers("--experts"):
        say(bench="comm", op="experts", ranks=n, rows=r, dispatch_s=10e-6, combine_s=20e-6, plain_dispatch_s=9e-6, plain_combine_s=9e-6)
PY
chmod +x "$dir/says"
"${measure[@]}" -n 4 --trireme "$dir/says" --launcher 'env N={n}' -o "$dir/known" \
    -r tp1,tp2,tp4,prompt,sums,exposed,experts,exposed-layers,cp4,dp4,tp2ep2pp2,operations >"$dir/log" 2>&1
is 'known times' 0 $?
holds 'figures and verdicts' "$PYTHON" - "$dir/known/rows.jsonl" <<'PY'
import json, sys
rows = {(r["row"], r["what"]): r for r in map(json.loads, open(sys.argv[1]))}
def check(row, what, value, verdict=""):
    r = rows[row, what]
    assert abs(r["value"] - value) < 1e-6 * abs(value) and r["verdict"] == verdict, r
    return r
check("tp1", "decode, 1 a replica: a MoE layer", 250)
check("tp4", "decode, 1 a replica: a MoE layer", 100, "reached")
check("tp4", "decode, 1 a replica: a MoE layer, times tp1", 2.5, "reached")
check("dp4", "decode, 64 a replica: 5 layers", 1.0)
check("prompt", "prompt of 32768, 4 ranks, times one", 0.600027 / 0.150027, "reached")
check("sums", "1 row", 8, "MISSED")
check("sums", "16 rows, of NCCL and the norm", 0.4, "reached")
check("sums", "256 rows", 8)
check("exposed", "512 rows a rank, stored to peers, exposed", 4, "reached")  # 10 % of 60
check("exposed", "512 rows a rank, NCCL, exposed", 20, "MISSED")
check("exposed", "4096 rows a rank, NCCL's symmetric windows, exposed", 7)
check("experts", "128 tokens a rank, dispatch", 10, "reached")
check("experts", "128 tokens a rank, combine", 20, "MISSED")
check("experts", "4096 tokens a rank, dispatch, rate of a plain all-to-all", 0.9, "reached")
check("experts", "4096 tokens a rank, combine, rate of a plain all-to-all", 0.45, "MISSED")
check("exposed-layers", "2048 rows a rank, stored to peers, exposed in a layer", 2, "reached")
check("exposed-layers", "2048 rows a rank, NCCL, exposed in a layer", 9, "MISSED")
check("exposed-layers", "2048 rows a rank, not hidden, exposed in a layer", 20)
check("operations", "all_reduce of 8 bytes, times plain", 0.5)
# Beside steps stands what plan says: of real sizes, so of the right magnitude.
for grid in ("tp1", "tp2", "tp4", "cp4", "dp4", "tp2ep2pp2"):
    assert 0.3 < rows[grid, "decode, 1 a replica: 3 layers"]["plan"] < 3
    assert 10 < rows[grid, "prefill, 4096 a rank: 3 layers"]["plan"] < 100
assert rows["tp1", "decode, 1 a replica: a MoE layer"]["plan"] > rows["tp4", "decode, 1 a replica: a MoE layer"]["plan"] > 50
PY
# A row alone is compared with what DIR has; too little time and too few GPUs are said.
"${measure[@]}" -n 4 --trireme "$dir/says" --launcher 'env N={n}' -o "$dir/known" -r tp4 >"$dir/log" 2>&1
is 'one row' 0 $?
has 'one row' 'times tp1 .* 2.5 x .* reached'
"${measure[@]}" -n 2 --trireme "$dir/says" --launcher 'env N={n}' -o "$dir/two" -r tp4,tp1 -b 20 >"$dir/log" 2>&1
is 'rows that do not run' 1 $?
has 'rows that do not run' 'tp4 *not run: it wants 4 GPUs'
has 'rows that do not run' 'tp1 *not run: it takes about 50 s, '
"${measure[@]}" -n 2 -r tp16 -o "$dir/none" >"$dir/log" 2>&1
is 'no such row' 2 $?
holds 'nothing is made for a row that is none' [ ! -e "$dir/none" ]
"${measure[@]}" -l >"$dir/log" 2>&1
is 'the list' 0 $?
has 'the list' 's in all with 4 GPUs'

# ---- what hangs

printf '#!/bin/sh\necho $$ >>"%s/pids"\nsleep 600 &\necho $! >>"%s/pids"\ntrap "" TERM\nwait\nsleep 600\n' "$dir" "$dir" >"$dir/hangs"
chmod +x "$dir/hangs"
begun_ms=$(now_ms)
"${measure[@]}" -n 2 --small --trireme "$dir/hangs" -o "$dir/hung" -r tp1 -b 2 >"$dir/log" 2>&1
is 'a program that hangs' 1 $?
has 'a program that hangs' 'tp1 *tp1.2: ended after 2 s'
holds 'a program that hangs is ended' [ $(($(now_ms) - begun_ms)) -lt 60000 ]
while read -r pid; do
    holds "process $pid has gone" sh -c "! kill -0 $pid 2>/dev/null || grep -q '^State:.Z' /proc/$pid/status"
done <"$dir/pids"
printf '#!/bin/sh\ncase "$*" in *--experts*) exec "%s" "$@" ;; esac\necho "trireme: no such luck" >&2\nexit 70\n' "$TRIREME" >"$dir/fails"
chmod +x "$dir/fails"
"${measure[@]}" -n 2 --small --device cpu --trireme "$dir/fails" -o "$dir/failed" -r tp2,experts >"$dir/log" 2>&1
is 'a row that fails' 1 $?
has 'a row that fails' 'tp2 *tp2.2: exit status 70: trireme: no such luck'
has 'the row behind it' '^experts *96 tokens a rank, combine, rate'

# ---- every row

small=("${measure[@]}" --small -b "$patience_s" -t 1)
if [ -x "$fake" ]; then
    # Under a sanitizer the handles that the fake device leaves behind are not looked at (tests/test_fake_nccl.sh).
    ! grep -q __asan_init "$fake" || export ASAN_OPTIONS="${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0"
    "${small[@]}" -n 2 --trireme "$fake" -o "$dir/fake" -r tp1,prompt,sums,exposed,experts,exposed-layers,dp2,grids,operations >"$dir/log" 2>&1
    is 'rows on devices that play GPUs' 0 $?
fi
"${small[@]}" -n 4 --device cpu --trireme "$TRIREME" -o "$dir/cpu" -r tp4,tp2ep2pp2 >"$dir/log" 2>&1
is 'rows on four CPU ranks' 0 $?
done_checking
