#!/usr/bin/env python3
"""A profile in h5py and pandas, without trireme: profile_example.py FILE.h5 (what --profile or profile pack wrote)."""
import sys

try:
    import h5py
    import pandas
except ImportError as e:
    sys.exit(f"profile_example.py: {e}: this reads with h5py and pandas (python3-h5py, python3-pandas)")

with h5py.File(sys.argv[1], "r") as f:
    regions = pandas.DataFrame.from_records(f["regions"][:])
    regions["name"] = regions["name"].str.decode("utf-8")
    time_excl, bytes_ = f["profile/time_excl"][:], f["profile/bytes"][:]  # [ranks, regions]: ns, bytes
    steps = f["steps"][:]  # [ranks, steps]
    print(f.attrs["run_id"], "model", f["run"].attrs["model"], "ranks", time_excl.shape[0])

frame = pandas.DataFrame({
    "name": regions["name"],
    "mean_s": time_excl.mean(axis=0) * 1e-9,
    "max_s": time_excl.max(axis=0) * 1e-9,
    "GB": bytes_.sum(axis=0) * 1e-9,
})
print(frame.groupby("name").sum().sort_values("mean_s", ascending=False).head(15).to_string())

mine = steps[0][steps[0]["t1"] > steps[0]["t0"]]  # rows behind a rank's last step are zero
if mine.size:
    seconds = (mine["t1"].max() - mine["t0"].min()) * 1e-9
    print(f"{mine.size} steps, {(mine['tok_prefill'] + mine['tok_decode']).sum() / seconds:.1f} tokens/s on rank 0")
