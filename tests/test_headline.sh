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
                 "one prompt of 150", "one prompt of 150", "batch of 6, 6 answered"], names
for r in rows[:-1]:
    assert 0 < r["roofline_s"] and 0 < r["seconds"] and r["layers"] == 4, r
    assert abs(r["tokens_per_s"] / r["tokens_per_s_gpu"] - 2) < 1e-9, r
assert abs(rows[5]["tokens_per_s"] * rows[5]["seconds"] - 4) < 1e-6 and abs(rows[6]["tokens_per_s"] * rows[6]["seconds"] - 300) < 1e-6
assert rows[7]["grid"].endswith("round-robin-split") and rows[8]["grid"].endswith("in-seq-split")
PY
has 'where the time went' '^PHASES'

"${headline[@]}" --launcher false stream >"$dir/log" 2>&1
is 'a launcher that fails' 1 $?
has 'a launcher that fails' 'exit status 1: nothing was said'
"${headline[@]}" --limit 0 stream >"$dir/log" 2>&1
is 'no time' 1 $?
has 'no time' 'not begun: 0 s are over'
"${headline[@]}" streams >"$dir/log" 2>&1
is 'no such part' 2 $?
# With the whole model and the memory of real GPUs; nothing is started.
"$PYTHON" "$TR_SRCDIR/jobs/headline" -n 8 --trireme "$TRIREME" --launcher false --out "$dir/out" decode >"$dir/log" 2>&1
has 'layers that fit' '8 x cuda, 61 of 61 layers'
has 'caches that do not' 'decode at 32768, 64 a GPU: its caches do not fit beside 61 layers'
done_checking
