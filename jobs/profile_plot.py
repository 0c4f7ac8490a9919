#!/usr/bin/env python3
"""Pictures of a profile, from the tables of `trireme profile export --csv`.

usage: profile_plot.py TABLES PREFIX [GFLOPS,GBS]

Writes PREFIXtimeline.png, PREFIXroofline.png and PREFIXoverlap.png and prints their names. `trireme profile plot` calls it;
to change a picture, copy this file, edit it, and name it with --script. Needs matplotlib; ends with 77 without it.
"""
import collections
import csv
import os
import sys

try:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit(77)

PHASE_COLOR = {"prefill": "#d1783b", "decode": "#3b76af", "verify": "#7a5195", "draft": "#59a14f", "idle": "#c9c9c9"}
KIND_COLOR = {"KERNEL": "#3b76af", "HOST": "#8fb8de", "COMM": "#c44e52", "WAIT": "#e8a09a", "IO": "#937860",
              "LAYER": "#dddddd", "STEP": "#eeeeee", "PHASE": "#f6f6f6"}
RANKS_MAX = 16


def rows_of(folder, name):
    """Rows of a table as dictionaries, one at a time; none where it is not there."""
    path = os.path.join(folder, name + ".csv")
    if os.path.exists(path):
        with open(path, newline="", encoding="utf-8") as f:
            yield from csv.DictReader(f)


def read(folder, name):
    return list(rows_of(folder, name))


def number(text):
    return float(text) if text else 0.0


def some_ranks(rows):
    """At most RANKS_MAX of the ranks, spread evenly."""
    ranks = sorted({int(r["rank"]) for r in rows})
    if len(ranks) <= RANKS_MAX:
        return ranks
    return [ranks[i * (len(ranks) - 1) // (RANKS_MAX - 1)] for i in range(RANKS_MAX)]


def say_nothing(ax, text):
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="#777777")
    ax.set_xticks([])
    ax.set_yticks([])


def finish(fig, prefix, name):
    path = f"{prefix}{name}.png"
    fig.tight_layout()
    fig.savefig(path, dpi=90, metadata={"Software": "trireme profile plot"})
    plt.close(fig)
    print(path)


def plot_rate(ax, steps):
    """Tokens per second: what every step brought, over its time and the gap before it."""
    first = min(int(s["rank"]) for s in steps)
    mine = sorted((s for s in steps if int(s["rank"]) == first), key=lambda s: float(s["t0_ns"]))
    n = max(1, min(120, len(mine) // 4))
    begin, end = float(mine[0]["t0_ns"]), max(float(s["t1_ns"]) for s in mine)
    width = (end - begin) / n
    rate = {"prompts": [0.0] * n, "answers": [0.0] * n}
    for s in mine:
        i = min(n - 1, int((float(s["t1_ns"]) - begin) / width)) if width > 0 else 0
        rate["prompts"][i] += number(s["tok_prefill"])
        rate["answers"][i] += number(s["tok_decode"]) + number(s["accepted"])
    at = [(begin + (i + 0.5) * width) * 1e-9 for i in range(n)]
    for name, color in (("prompts", PHASE_COLOR["prefill"]), ("answers", PHASE_COLOR["decode"])):
        ax.plot(at, [v / (width * 1e-9) if width > 0 else 0 for v in rate[name]], color=color, label=name, lw=1.2)
    ax.set_ylabel("tokens/s")
    ax.set_title(f"tokens (rank {first}'s replica)", fontsize=9, loc="left")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, loc="upper right")


def plot_steps(ax, steps):
    ranks = some_ranks(steps)
    bars = {rank: collections.defaultdict(list) for rank in ranks}
    for s in steps:
        if int(s["rank"]) in bars:
            t0, t1 = float(s["t0_ns"]), float(s["t1_ns"])
            bars[int(s["rank"])][s["mode"]].append((t0 * 1e-9, (t1 - t0) * 1e-9))
    for row, rank in enumerate(ranks):
        for mode, list_ in bars[rank].items():
            ax.broken_barh(list_, (row - 0.4, 0.8), facecolors=PHASE_COLOR.get(mode, "#000000"))
    ax.set_yticks(range(len(ranks)), [f"rank {r}" for r in ranks], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("s")
    modes = {s["mode"] for s in steps}
    ax.legend([plt.Rectangle((0, 0), 1, 1, color=PHASE_COLOR.get(m, "#000000")) for m in sorted(modes)], sorted(modes),
              fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncol=len(modes), borderaxespad=0)
    ax.set_title("steps; white: no step was running", fontsize=9, loc="left")


def middle_step(traced, steps):
    """Of the steps that were traced a decode step in the middle; any where there is none."""
    mine = sorted((s for s in steps if s["step"] in traced), key=lambda s: float(s["t0_ns"]))
    mine = [s for s in mine if s["mode"] == "decode"] or mine
    return mine[len(mine) // 2]["step"] if mine else None


def plot_one_step(ax, folder, traced, steps):
    """One step close up: a row for each rank, its regions of every depth on top of each other."""
    step = middle_step(traced, steps)
    rows = [r for r in rows_of(folder, "trace") if r["step"] == step]
    regions = rows_of(folder, "regions")
    if not rows:
        say_nothing(ax, "no step was traced from begin to end")
        return
    ranks = some_ranks(rows)
    about = {(r["rank"], r["region"]): r for r in regions}
    begin = min(float(r["t0_ns"]) for r in rows)
    depth_of = [int(about[(r["rank"], r["region"])]["depth"]) for r in rows if (r["rank"], r["region"]) in about]
    low, high = (min(depth_of), max(depth_of)) if depth_of else (0, 0)
    shown = set()
    for row, rank in enumerate(ranks):
        bars = collections.defaultdict(list)
        for r in rows:
            region = about.get((r["rank"], r["region"]))
            if int(r["rank"]) != rank or region is None:
                continue
            bars[(int(region["depth"]), region["kind"])].append(
                ((float(r["t0_ns"]) - begin) * 1e-6, float(r["dur_ns"]) * 1e-6))
        each = 0.84 / (high - low + 1)
        for (depth, kind), list_ in bars.items():
            shown.add(kind)
            ax.broken_barh(list_, (row - 0.42 + each * (depth - low), each), facecolors=KIND_COLOR.get(kind, "#000000"),
                           edgecolor="white", linewidth=0.2)
    ax.set_yticks(range(len(ranks)), [f"rank {r}" for r in ranks], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("ms")
    ax.legend([plt.Rectangle((0, 0), 1, 1, color=KIND_COLOR.get(k, "#000000")) for k in sorted(shown)], sorted(shown),
              fontsize=7, loc="lower right", bbox_to_anchor=(1, 1), ncol=len(shown), borderaxespad=0)
    ax.set_title(f"step {step} close up: step, layer, part, operation from top to bottom", fontsize=9, loc="left")


def timeline(folder, prefix):
    steps = read(folder, "steps")
    traced = {r["step"] for r in rows_of(folder, "trace")}
    fig, ax = plt.subplots(3 if traced else 2, 1, figsize=(11, 9 if traced else 6))
    if steps:
        plot_rate(ax[0], steps)
        plot_steps(ax[1], steps)
        ax[0].sharex(ax[1])
    else:
        say_nothing(ax[0], "no steps were recorded")
        say_nothing(ax[1], "no steps were recorded")
    if traced:
        plot_one_step(ax[2], folder, traced, steps)
    finish(fig, prefix, "timeline")


def by_operation(regions):
    """name: [seconds, bytes, flops], of all ranks; of kernels alone."""
    sums = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for r in regions:
        if r["kind"] == "KERNEL":
            s = sums[r["name"]]
            s[0] += number(r["time_excl_ns"]) * 1e-9
            s[1] += number(r["bytes"])
            s[2] += number(r["flops"])
    return {name: s for name, s in sums.items() if s[0] > 0}


def plot_roof(ax, ops, peak):
    points = {n: s for n, s in ops.items() if s[1] > 0 and s[2] > 0}
    if not points:
        say_nothing(ax, "no operation has both bytes and floating-point operations")
        return
    given = bool(peak)
    gflops, gbs = [float(v) for v in peak.split(",")] if given else (
        max(s[2] / s[0] for s in points.values()) * 1e-9, max(s[1] / s[0] for s in ops.values()) * 1e-9)
    whole = sum(s[0] for s in ops.values())
    xs = [s[2] / s[1] for s in points.values()] + [gflops / gbs]
    low, high = min(xs) / 3, max(xs) * 3
    line = [low * (high / low) ** (i / 200) for i in range(201)]
    ax.plot(line, [min(gflops, gbs * x) for x in line], color="#555555", ls="-" if given else "--",
            label=f"{'peak' if given else 'best of this run'}: {gflops:.3g} Gflop/s, {gbs:.3g} GB/s")
    for name, s in sorted(points.items(), key=lambda p: -p[1][0]):
        x, y = s[2] / s[1], s[2] / s[0] * 1e-9
        ax.scatter([x], [y], s=30 + 800 * s[0] / whole, color="#3b76af", alpha=0.55)
        ax.annotate(name, (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("flop/byte")
    ax.set_ylabel("Gflop/s of a rank")
    ax.legend(fontsize=8, loc="lower right")
    ax.set_title("operations of the kernel table; area: share of their time", fontsize=9, loc="left")


def plot_times(ax, ops):
    rows = sorted(ops.items(), key=lambda p: -p[1][0])[:16]
    if not rows:
        say_nothing(ax, "no operations were recorded")
        return
    whole = sum(s[0] for s in ops.values())
    ax.barh(range(len(rows)), [100 * s[0] / whole for _, s in rows], color="#3b76af")
    for i, (_, s) in enumerate(rows):
        text = f" {s[1] / s[0] * 1e-9:.3g} GB/s" if s[1] > 0 else ""
        text += f" {s[2] / s[0] * 1e-9:.3g} Gflop/s" if s[2] > 0 else ""
        ax.text(100 * s[0] / whole, i, text, va="center", fontsize=7)
    ax.set_yticks(range(len(rows)), [n for n, _ in rows], fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, 100 * rows[0][1][0] / whole * 1.6)
    ax.set_xlabel("% of the operations' time")
    ax.set_title("where their time goes", fontsize=9, loc="left")


def roofline(folder, prefix, peak):
    ops = by_operation(read(folder, "regions"))
    fig, ax = plt.subplots(1, 2, figsize=(12, 5.5))
    plot_roof(ax[0], ops, peak)
    plot_times(ax[1], ops)
    finish(fig, prefix, "roofline")


def plot_layers(ax, rows):
    """Mean over ranks: what gathers of a layer took, and what of it was waited for."""
    ranks = len({r["rank"] for r in rows}) or 1
    under, exposed = collections.Counter(), collections.Counter()
    for r in rows:
        layer = int(r["layer"])
        under[layer] += (number(r["gatherK_ns"]) + number(r["gatherL_ns"])) * 1e-6 / ranks
        exposed[layer] += (number(r["exposedK_ns"]) + number(r["exposedL_ns"])) * 1e-6 / ranks
    layers = sorted(under)
    ax.bar(layers, [exposed[n] for n in layers], color="#c44e52", label="waited for")
    ax.bar(layers, [max(0, under[n] - exposed[n]) for n in layers], bottom=[exposed[n] for n in layers], color="#8fb8de",
           label="hidden")
    ax.set_xlabel("layer")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.set_ylabel("ms of a rank")
    ax.legend(fontsize=8)
    ax.set_title("gathers of keys and latents, by layer", fontsize=9, loc="left")


def plot_comms(ax, rows, groups):
    ranks = len({r["rank"] for r in rows}) or 1
    time, exposed = collections.Counter(), collections.Counter()
    for r in rows:
        key = f"{r['op']} {groups.get(r['group'], '')}".strip()
        time[key] += number(r["time_ns"]) * 1e-6 / ranks
        exposed[key] += number(r["exposed_ns"]) * 1e-6 / ranks
    keys = [k for k, v in sorted(time.items(), key=lambda p: -p[1]) if v > 0 or exposed[k] > 0][:16]
    if not keys:
        say_nothing(ax, "no communication was recorded")
        return
    ax.barh(keys, [exposed[k] for k in keys], color="#c44e52", label="waited for")
    ax.barh(keys, [max(0, time[k] - exposed[k]) for k in keys], left=[exposed[k] for k in keys], color="#8fb8de",
            label="hidden")
    ax.invert_yaxis()
    ax.set_xlabel("ms of a rank")
    ax.legend(fontsize=8)
    ax.set_title("communication, by operation and group", fontsize=9, loc="left")


def overlap(folder, prefix):
    layers = [r for r in read(folder, "overlap") if number(r["gatherK_ns"]) or number(r["gatherL_ns"])]
    groups = {r["id"]: r["name"] for r in read(folder, "groups")}
    fig, ax = plt.subplots(2 if layers else 1, 1, figsize=(11, 7 if layers else 4), squeeze=False)
    plot_comms(ax[0][0], read(folder, "comm"), groups)
    if layers:
        plot_layers(ax[1][0], layers)
    finish(fig, prefix, "overlap")


def main():
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    folder, prefix, peak = sys.argv[1], sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else ""
    if not os.path.exists(os.path.join(folder, "steps.csv")):
        sys.exit(f"profile_plot.py: {folder}: no steps.csv; it takes the tables of trireme profile export --csv")
    try:
        timeline(folder, prefix)
        roofline(folder, prefix, peak)
        overlap(folder, prefix)
    except OSError as e:
        sys.exit(f"profile_plot.py: {e.filename or folder}: {e.strerror}")
    except (KeyError, ValueError) as e:
        sys.exit(f"profile_plot.py: {folder}: these are not its tables, or older ones: {type(e).__name__} {e}")


if __name__ == "__main__":
    main()
