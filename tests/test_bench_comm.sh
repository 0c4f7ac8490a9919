#!/bin/sh
# trireme bench comm on 2 and 3 ranks: a table and JSON lines that parse, one line per operation, group size and length, with
# times of both sides; and what it refuses. No speed is demanded here.
set -u
: "${TRIREME:?}"
python=${PYTHON:-python3}
command -v "$python" >/dev/null || { echo "skipped: no $python to read JSON with"; exit 77; }
# shellcheck source=tests/lib.sh
. "$(dirname "$0")/lib.sh"
need_mpi
scratch bench

timeout "$patience_s" "$mpiexec" -n 3 "$TRIREME" bench comm --bytes 1,50000 --calls 20 >"$dir/out" || exit 1

timeout "$patience_s" "$mpiexec" -n 2 "$TRIREME" bench comm --bytes 8 --calls 5 --width 512 --experts 3,300 >"$dir/experts" || exit 1

refused() { # TEXT ARGUMENT...
    text=$1
    shift
    timeout "$patience_s" "$@" >"$dir/stdout" 2>"$dir/stderr" && { echo "accepted: $*"; exit 1; }
    grep -q -- "$text" "$dir/stderr" || { echo "no word of '$text': $*"; cat "$dir/stderr"; exit 1; }
}
refused 'one rank has nobody' "$TRIREME" bench comm
refused 'bytes 0' "$mpiexec" -n 2 "$TRIREME" bench comm --bytes 0
refused 'ranks 3' "$mpiexec" -n 2 "$TRIREME" bench comm --ranks 3
refused '0 stands alone' "$mpiexec" -n 2 "$TRIREME" bench comm --experts 128,0
refused '256 experts do not divide by 3 ranks' "$mpiexec" -n 3 "$TRIREME" bench comm --ranks 3 --bytes 8 --calls 1 --experts 3
refused 'unknown option' "$mpiexec" -n 2 "$TRIREME" bench comm --speed
"$TRIREME" bench comm --help | grep -q 'mpirun' || { echo "no help"; exit 1; }

"$python" - "$dir/out" "$dir/experts" <<'PY'
import json, sys

lines = [json.loads(l) for l in open(sys.argv[1]) if l.startswith("{")]
ops = "all_reduce all_gather reduce_scatter all_to_all send_recv broadcast all_max".split()
assert [(l["ranks"], l["op"]) for l in lines] == [(n, op) for n in (2, 3) for op in ops for _ in (1, 2)], lines
for l in lines:
    assert l["bench"] == "comm" and l["calls"] == 20
    assert l["median_s"] > 0 and l["plain_median_s"] > 0, l
    assert abs(l["bytes_per_s"] * l["median_s"] / l["bytes"] - 1) < 1e-4, l
    least = {"all_reduce": 4, "all_max": 8, "reduce_scatter": 4 * l["ranks"], "all_to_all": 4 * l["ranks"]}.get(l["op"], 1)
    assert l["bytes"] % least == 0 and (l["bytes"] == least or 50000 <= l["bytes"] < 50000 + least), l

# Rows to their experts and back: f32 rows of 512 with 8 choices of 8 bytes; three are told to all, of 300 most go to both ranks.
few, many = [l for l in map(json.loads, (l for l in open(sys.argv[2]) if l.startswith("{"))) if l["op"] == "experts"]
assert few["told"] and not many["told"] and (few["rows"], many["rows"]) == (3, 300), (few, many)
assert few["dispatch_bytes"] == 2 * 3 * (2048 + 64) and few["combine_bytes"] == 2 * 3 * 2048, few
records = many["dispatch_bytes"] / (2048 + 64)
assert records == int(records) and 1.8 * 300 < records < 2 * 300, many
for l in few, many:
    assert l["ranks"] == 2 and l["calls"] == 5 and l["device"] == "cpu", l
    assert all(l[k] > 0 for k in ("dispatch_s", "combine_s", "plain_dispatch_s", "plain_combine_s")), l
PY
