"""What must hold in the profile of a batch run: python3 check_profile.py FILE.h5 RANKS [part]

Sums and counts that the file itself and the model's config can be held against. "part": the rescued file of a rank that was
killed; only what was flushed is in it."""
import json
import sys

import h5py
import numpy as np

file, ranks, part = sys.argv[1], int(sys.argv[2]), "part" in sys.argv[3:]
f = h5py.File(file, "r")
assert f.attrs["schema"] == "trireme-profile" and f.attrs["version"] == "1.0"
assert f.attrs["complete"] == (0 if part else 1), dict(f.attrs)
for name in ("model weights_dtype kv_dtype config_json command_line git_commit build_flags cuda driver nccl mpi hdf5 "
             "hostname_first").split():
    assert name in f["run"].attrs, name
assert "." in f["run"].attrs["hdf5"]
config = json.loads(f["run"].attrs["config_json"])
region, steps = f["regions"][:], f["steps"][:]
names = [n.decode() for n in region["name"]]
count, excl, incl = (f["profile/" + n][:] for n in ("count", "time_excl", "time_incl"))
assert count.shape == (ranks, len(region)) and len(steps) == ranks, (count.shape, steps.shape)
assert (region["parent"] < np.arange(len(region))).all() and (region["id"] == np.arange(len(region))).all()

# Exclusive times add up to each stream's time, and a stream's time is the run's.
root = np.arange(len(region))
for i, parent in enumerate(region["parent"]):
    if parent >= 0:
        root[i] = root[parent]
for r in range(ranks):
    for i in np.flatnonzero(region["parent"] < 0):
        if count[r, i]:
            assert excl[r, root == i].sum() == incl[r, i], names[i]
main = names.index("main")
if not part:
    seconds = incl[:, main] * 1e-9
    assert seconds.max() - seconds.min() < 0.5 + 0.01 * seconds.max(), seconds

# Phases partition what happens in steps.
n_steps = steps["step"].max(axis=1)
if not part:
    assert (n_steps == n_steps[0]).all() and (steps["step"] == np.arange(1, steps.shape[1] + 1)).all()
step = names.index("step")
in_phase = sum(f["phase"][p]["count"][:, step] for p in f["phase"])
assert (in_phase == count[:, step]).all()
if not part:
    assert (count[:, step] == n_steps).all(), (count[:, step], n_steps)

# Every layer ran once a step with rows, on the ranks of its stage, and on no other.
layers = {int(region["layer"][i]): i for i in range(len(region)) if names[i] == "layer"}
if not part:
    assert sorted(layers) == list(range(config["num_hidden_layers"])), layers
    place = f["grid/ranks"][:]
    assert (place["rank"] == np.arange(ranks)).all()
    n_stages = place["pp"].max() + 1
    for r in range(ranks):
        mine = [l for l in layers if count[r, layers[l]]]
        assert len(mine) >= config["num_hidden_layers"] // n_stages, mine
        ran = {count[r, layers[l]] for l in mine}
        assert len(ran) == 1 and 0 < ran.pop() <= n_steps[r]
        if place["dp"].max() == 0:
            assert all(count[r, layers[l]] == (n_steps[r]) for l in mine), (mine, n_steps)

# What a trace says belongs to a step happened in it. The clocks of regions and of steps agree within a microsecond.
if "trace/main" in f and not part:
    trace = f["trace/main"][:]
    for r in range(ranks):
        for e in trace[r][(region["kind"][trace[r]["region"]] == region["kind"][step]) & (trace[r]["dur"] > 0)]:
            row = steps[r][e["step"] - 1]
            assert row["step"] == e["step"] and e["t0"] > row["t0"] - 10000, (r, e, row)
            assert int(e["t0"]) + int(e["dur"]) < row["t1"] + 10000, (r, e, row)

# Experts: every row of every step goes to k experts of every MoE layer; the members of a context-parallel group have a part of
# the prompts' rows each, but all of the generated ones. Where they share the experts and nobody has a prompt, generated rows are
# computed once (src/model/exchange.c).
moe = range(config["first_k_dense_replace"], config["num_hidden_layers"])
cp = 1 if part else int(f["grid/ranks"]["cp"].max()) + 1
prompts = steps["tok_prefill"].sum(axis=0) > 0
told = not part and (place["ep"].max() + 1) * (place["xt"].max() + 1) != place["tp"].max() + 1
times = np.where(prompts | (not told), cp, 1)
rows = sum(int(steps[r]["tok_prefill"].sum() + (times * steps[r]["tok_decode"].astype(int)).sum())
           for r in range(ranks)
           if part or (place[r]["pp"] == 0 and place[r]["cp"] == 0 and place[r]["tp"] == 0))
experts = f["moe/expert_tokens"][:]
if not part:
    for l in moe:
        assert experts[l].sum() == rows * config["num_experts_per_tok"], (l, experts[l].sum(), rows)
    assert (f["moe/rank_tokens"][:].sum(0)[list(moe)] >= experts[list(moe)].sum(1)).all()
    window = f["moe/window_tokens"][:]
    assert (window.sum(1) == f["moe/rank_tokens"][:]).all()

# Communicators: regions were entered as often as operations were begun, with the same bytes; what one member sent is in
# the matrix, and nobody sends to itself.
ops = f["comm/ops"][:]
bytes_in = f["profile/bytes"][:]
op_names = h5py.check_enum_dtype(ops.dtype["op"])
for r in range(ranks):
    for row in ops[r]:
        if not row["calls"] or part:
            continue
        name = next(k for k, v in op_names.items() if v == row["op"])
        here = [i for i in range(len(region)) if region["group"][i] == row["group"] and names[i].endswith("/" + name)]
        assert count[r, here].sum() == row["calls"], (r, name, count[r, here].sum(), row)
        assert bytes_in[r, here].sum() == row["bytes"], (r, name, row)
        assert row["min_ns"] <= row["max_ns"] and row["exposed_ns"] <= 1.01 * incl[r, main]
for name, m in f["comm/matrix"].items():
    m = m[:]
    assert m.shape == (ranks, m.shape[1]) and (part or np.trace(m) == 0), name
if not part and ranks > 1:
    assert sum(m[:].sum() for m in f["comm/matrix"].values()) > 0

# Requests.
if not part:
    q = f["requests"][:]
    assert len(q) > 0 and (q["t_arrive"] <= q["t_first"]).all() and (q["t_first"] <= q["t_done"]).all()
    assert (q["dp"] >= 0).all() and (q["chunks"] >= (q["n_prompt"] > q["n_cached"] + 1)).all(), q
    gaps = q["n_out"] > 1
    assert (q["itl_p50_ns"][gaps] > 0).all() and (q["itl_p50_ns"] <= q["itl_p99_ns"]).all()
    assert (np.sort(q["line"]) == np.unique(q["line"])).all()
    assert f["memory"]["weights"].max() > 0 and f["kv"]["misses"].max() > 0
    loaded = f["io/load"][:]["bytes"].sum(1)
    assert (loaded > 0).all()

# Units, names, scales.
def dressed(name, d):
    if not isinstance(d, h5py.Dataset) or name.startswith("scales/"):
        return
    assert "long_name" in d.attrs, name
    if d.dtype.names:
        assert len(d.attrs["field_units"]) == len(d.dtype.names), name
    else:
        assert "units" in d.attrs, name
    assert all(dim.label for dim in d.dims), name


f.visititems(dressed)
assert len(f["profile/count"].dims[1]) == 1
absent = [n for n, d in f["counters/papi"].items() if "absent" in d.attrs]
for n in absent:
    assert f["counters/papi"][n].shape[1] == 0 and f["counters/papi"][n].attrs["absent"]
print(f"{file}: {ranks} ranks, {int(n_steps.max())} steps, {len(region)} regions, {len(absent)} events absent")
