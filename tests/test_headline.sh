#!/bin/bash
# jobs/headline, on two ranks without a GPU: every part gives its figures, each beside a roofline, and its batch is answered; what
# does not run is told, and what is no part is refused.
set -u
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
[ -n "${PYTHON-}" ] || skip 'no Python was found'
scratch headline
# shellcheck disable=SC2054 # lists of numbers
headline=("$PYTHON" "${TR_SRCDIR:?}/jobs/headline" -n 2 --device cpu --trireme "${TRIREME:?}" -m "$TR_SRCDIR/models/tiny" --layers 4
    --launcher "$mpiexec -n {n}" --out "$dir/out" --steps 2 --repeats 1 --stream 64,130 --decode 70 --sequences 1,2 --prompts 150
    --chunk 64 --requests 6 --request-tokens 20,90 --answer-tokens 5)

"${headline[@]}" >"$dir/log" 2>&1
is 'all parts' 0 $?
holds 'figures' "$PYTHON" - "$dir/out/headline.jsonl" <<'PY'
import json, sys
rows = [json.loads(line) for line in open(sys.argv[1])]
names = [r["what"] for r in rows]
assert names == ["stream at 64, experts spread", "stream at 130, experts spread", "stream at 64, experts sliced",
                 "stream at 130, experts sliced", "decode at 70, 1 a GPU", "decode at 70, 2 a GPU", "prompts of 150",
                 "prompt, dealt out, of 150", "exchange exposed, prompt, dealt out, of 150", "prompt, in parts, of 150",
                 "exchange exposed, prompt, in parts, of 150", "batch of 6, 6 answered"], names
hidden = [r for r in rows if r["what"].startswith("exchange")]
figures = [r for r in rows if r not in hidden]
for r in figures:
    assert 0 < r["seconds"] and r["layers"] == 4 and abs(r["tokens_per_s"] / r["tokens_per_s_gpu"] - 2) < 1e-9, r
    assert r["what"].startswith("batch") or 0 < r["roofline_s"], r
assert abs(rows[5]["tokens_per_s"] * rows[5]["seconds"] - 4) < 1e-6 and abs(rows[6]["tokens_per_s"] * rows[6]["seconds"] - 300) < 1e-6
assert rows[7]["grid"].endswith("round-robin-split") and rows[9]["grid"].endswith("in-seq-split")
assert [h["of"] for h in hidden] == [rows[7]["seconds"], rows[9]["seconds"]] and all(h["seconds"] < h["of"] for h in hidden)
PY
has 'where the time went' '^PHASES'

"${headline[@]}" --launcher false stream >"$dir/log" 2>&1
is 'a launcher that fails' 1 $?
has 'a launcher that fails' 'exit status 1: nothing was said'
"${headline[@]}" --budget 0 stream >"$dir/log" 2>&1
is 'no time' 1 $?
has 'no time' 'not begun: 0 s are over'
"${headline[@]}" streams >"$dir/log" 2>&1
is 'no such part' 2 $?
"${headline[@]}" --launcher 'sh -c "trap : TERM; sleep 600 & wait; wait"' --each 1 stream >"$dir/log" 2>&1
is 'a launcher that hangs' 1 $?
has 'a launcher that hangs' 'stream-sliced *exit status none: ended after 1 s'
# With the whole model and the memory of real GPUs, and a program that says times: what fits, and what plan says beside each figure.
# The batch is cut to what is left of the time.
printf '#!/bin/sh\nexec "%s" "%s/says.py" "$@"\n' "$PYTHON" "$dir" >"$dir/says"
cat >"$dir/says.py" <<PY
import json, os, sys
a = sys.argv[1:]
if a[0] != "bench":
    os.execv("$TRIREME", ["trireme"] + a) if a[0] == "plan" else sys.exit(70)
of = lambda o: [int(x) for x in a[a.index(o) + 1].split(",") if x != "0"]
for s in of("--sequences"):
    for c in of("--context"):
        print(json.dumps(dict(bench="step", kind="decode", sequences=s, context=c, median_s=0.01, roofline_s=0.005)))
for p in of("--prefill"):
    print(json.dumps(dict(bench="step", kind="prefill", sequences=1, context=p, median_s=0.98 if "--own-rows" in a else 1.0, roofline_s=0.5)))
PY
chmod +x "$dir/says"
for n in 4 8; do
    "$PYTHON" "$TR_SRCDIR/jobs/headline" -n "$n" --trireme "$dir/says" --launcher env --out "$dir/whole$n" --requests 2000 \
        --request-tokens 20000,30000 >"$dir/log" 2>&1
    is "the whole model, $n GPUs" 1 $? # its batch says 70
    has "the whole model, $n GPUs" 'exchange exposed, prompt, in parts, of 131072 .* 20.000 ms, 2.0 % of the prompt'
    has "the whole model, $n GPUs" 'batch of [0-9]* requests, not 2000: what fits into 5[0-9][0-9] s'
    holds "the whole model, $n GPUs: figures" "$PYTHON" - "$dir/whole$n/headline.jsonl" "$n" <<'PY'
import json, sys
rows, n = [json.loads(line) for line in open(sys.argv[1])], int(sys.argv[2])
figures = {r["what"]: r for r in rows}
assert set(r["layers"] for r in rows) == {61} if n == 8 else 20 < rows[0]["layers"] < 61, rows[0]
for r in rows:
    if not r["what"].startswith("exchange"):
        assert r["roofline_s"] == (0.5 if "prompt" in r["what"] else 0.005)
        assert 0.001 < r["predicted_s"] < 60, r
assert figures["stream at 131072, experts sliced"]["predicted_s"] > figures["stream at 1024, experts sliced"]["predicted_s"]
assert figures["prompts of 131072"]["predicted_s"] > 12 * figures["prompts of 8192"]["predicted_s"]
assert figures["prompt, dealt out, of 131072"]["predicted_s"] < 0.3 * figures["prompts of 131072"]["predicted_s"]
PY
done
has 'layers that fit' '8 x cuda, 61 of 61 layers'
has 'caches that do not' 'decode at 32768, 128 a GPU: its caches do not fit beside 61 layers'
done_checking
