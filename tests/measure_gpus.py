#!/usr/bin/env python3
"""What ranks with a GPU each have to show, measured row by row: one table at the end, each figure with its goal.

usage: tests/measure_gpus.py [options]        -l lists the rows and what they take

Every row runs alone (-r), has a time of its own after which its processes are ended, and is not begun when less of the budget is left
than it takes. DIR gets each command's output and rows.jsonl; rows of earlier runs in the same DIR stand in for what a row is compared
with. With --small the same rows run on the CPUs or on a device that plays GPUs (tests/trireme_on_fake), small: to see that all of them
work before a machine with GPUs is there; its times mean nothing.
Exit status: 0; 1 a row did not run; 2 usage. A goal that is missed is said, and no error.
"""
import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.path.dirname(HERE)


def below(pid):
    """All processes that came of it."""
    try:
        with open("/proc/%d/task/%d/children" % (pid, pid)) as f:
            children = [int(x) for x in f.read().split()]
    except OSError:
        try:
            out = subprocess.run(["pgrep", "-P", str(pid)], stdout=subprocess.PIPE).stdout.decode()
        except OSError:
            return []
        children = [int(x) for x in out.split()]
    return [p for c in children for p in below(c) + [c]]


def send(pids, number):
    for p in pids:
        try:
            os.kill(p, number)
        except ProcessLookupError:
            pass


class Failed(Exception):
    pass


class Measure:
    """Sizes, where things are, and what was measured so far."""

    def __init__(self, o):
        self.o, self.begun = o, time.monotonic()
        self.n = o.gpus
        os.makedirs(o.out, exist_ok=True)
        self.path = os.path.join(o.out, "rows.jsonl")
        self.earlier = {}
        if os.path.exists(self.path):
            with open(self.path) as f:
                for line in f:
                    row = json.loads(line)
                    self.earlier[row["row"], row["what"]] = row
        self.file = open(self.path, "a")
        self.rows, self.unfit = [], []
        self.row, self.until = "", 0.0
        if o.small:
            self.model, self.layers, self.context = os.path.join(SOURCE, "models", "tiny"), (2, 4), 96
            self.sequences, self.chunk, self.before, self.prompt = (1, 2), 32, 128, 192
            self.rows_cp, self.rows_ep, self.steps, self.runs, self.width = (16, 32), (4, 96), 2, 3, 256
        else:
            self.model, self.layers, self.context = os.path.join(o.out, "model"), (3, 5), 8192
            self.sequences, self.chunk, self.before, self.prompt = (1, 16, 64), 4096, 32768, 32768
            self.rows_cp, self.rows_ep, self.steps, self.runs, self.width = (256, 512, 2048, 4096), (128, 4096), 24, 200, 7168
            os.makedirs(self.model, exist_ok=True)
            with open(os.path.join(SOURCE, "jobs", "deepseek-v3.2.config.json")) as a, open(os.path.join(self.model, "config.json"), "w") as b:
                b.write(a.read())

    # ---- commands

    def left(self):
        return self.o.budget - (time.monotonic() - self.begun)

    def run(self, name, command):
        """Its stdout. Ended with all that came of it when the row's time is over."""
        path = os.path.join(self.o.out, name)
        env = dict(os.environ)
        env.setdefault("OMP_NUM_THREADS", "1" if self.o.small else "4")
        env.setdefault("OMP_WAIT_POLICY", "passive")
        env.update(OMPI_MCA_rmaps_base_oversubscribe="1", OMPI_MCA_mpi_yield_when_idle="1", OMPI_MCA_hwloc_base_binding_policy="none")
        if os.getuid() == 0:  # Open MPI refuses to start as root unless told twice
            env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        seconds = self.until - time.monotonic()
        if seconds <= 0:
            raise Failed("its time was over before %s" % name)
        begun = time.monotonic()
        with open(path + ".out", "w") as out, open(path + ".err", "w") as err:
            err.write("# %s\n" % " ".join(map(shlex.quote, command)))
            err.flush()
            try:
                p = subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)
            except OSError as e:
                raise Failed("%s: %s" % (name, e))
            try:
                status = p.wait(seconds)
            except subprocess.TimeoutExpired:
                status = "ended after %.0f s" % (time.monotonic() - begun)
                family = below(p.pid)
                send([p.pid], signal.SIGTERM)  # the launcher ends its ranks
                try:
                    p.wait(5)
                except subprocess.TimeoutExpired:
                    pass
                send(family + [p.pid], signal.SIGKILL)
                p.wait()
        with open(path + ".out", errors="replace") as f:
            text = f.read()
        if status:
            with open(path + ".err", errors="replace") as f:
                said = [line.strip() for line in f if "trireme:" in line or line.startswith("skipped")] or ["nothing was said"]
            raise Failed("%s: %s: %s" % (name, status if isinstance(status, str) else "exit status %d" % status, said[-1][:160]))
        return text

    def ranks(self, name, n, arguments):
        command = shlex.split(self.o.launcher.format(n=n)) if n > 1 else []
        text = self.run("%s.%s" % (self.row, name), command + [self.o.trireme] + arguments)
        return [json.loads(line) for line in text.split("\n") if line.startswith("{")]

    def overrides(self, layers):
        values = ["num_hidden_layers=%d" % layers, "first_k_dense_replace=1", "num_nextn_predict_layers=0"]
        return [x for v in values for x in ("--override", v)]

    def step(self, name, n, grid, layers, arguments):
        lines = self.ranks(name, n, ["bench", "step", "-m", self.model, "--load-format", "dummy", "--device", self.o.device] +
                           grid + arguments + self.overrides(layers))
        return [x for x in lines if x.get("bench") == "step"]

    def plan(self, n, grid, layers, kind, rows, context):
        """Seconds of such a step by `trireme plan`; None without times (--small)."""
        if self.o.small:
            return None
        command = [self.o.trireme, "plan", "-m", self.model, "--ranks", str(n), "--json", "--max-model-len",
                   str(context + (rows if kind == "prefill" else 0)), "--max-batch-tokens", str(rows if kind == "prefill" else 1024),
                   "--max-sequences", str(1 if kind == "prefill" else rows)] + grid + self.overrides(layers)
        p = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        if p.returncode:
            raise Failed("plan: %s" % p.stderr.decode(errors="replace").strip()[-160:])
        steps = [s for s in json.loads(p.stdout.decode())["steps"] if s["step"] == kind and s["context"] == context]
        return steps[-1]["latency_s"] if steps else None

    # ---- figures

    def figure(self, what, value, unit, goal=None, least=False, plan=None):
        """One line of the table. goal: the most it may be, or with `least` the least."""
        verdict = "" if goal is None else "reached" if (value >= goal if least else value <= goal) else "MISSED"
        row = {"row": self.row, "what": what, "value": value, "unit": unit, "goal": goal, "least": least, "verdict": verdict, "plan": plan}
        self.rows.append(row)
        self.earlier[self.row, what] = row
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        print(self.line(row), flush=True)
        return value

    @staticmethod
    def line(r):
        goal = "" if r["goal"] is None else "%s %.4g" % (">=" if r["least"] else "<=", r["goal"])
        plan = "" if not r["plan"] else "plan %.4g (%.2f)" % (r["plan"], r["value"] / r["plan"])
        return "%-15s %-58s %10.4g %-5s %-11s %-8s %s" % (r["row"], r["what"], r["value"], r["unit"], goal, r["verdict"], plan)

    def known(self, row, what):
        """A figure of this run or an earlier one in DIR; None."""
        r = self.earlier.get((row, what))
        return r["value"] if r else None

    # ---- rows: steps

    def grid_steps(self, n, grid, replicas=1, shares=1):
        """Decode and prefill of two depths, and a MoE layer as what lies between them."""
        of = {}
        for layers in self.layers:
            chunk = self.chunk * shares
            for x in self.step("%d" % layers, n, grid, layers, [
                    "--context", str(self.context), "--sequences", ",".join(str(s * replicas) for s in self.sequences), "--prefill", str(chunk),
                    "--prefill-at", str(self.before), "--chunk", str(chunk), "--steps", str(self.steps)]):
                of.setdefault((x["kind"], x["sequences"]), {})[layers] = x["median_s"]
        a, b = self.layers
        for (kind, sequences), s in sorted(of.items()):
            if kind == "decode":
                what, rows, at = "decode, %d a replica" % (sequences // replicas), sequences // replicas, self.context
            else:
                what, rows, at = "prefill, %d a rank" % self.chunk, self.chunk * shares, self.before
            plan = {layers: self.plan(n, grid, layers, kind, rows, at) for layers in self.layers}
            for layers in self.layers:
                self.figure("%s: %d layers" % (what, layers), 1e3 * s[layers], "ms", plan=plan[layers] and 1e3 * plan[layers])
            goal = 105 if self.row == "tp4" and what == "decode, 1 a replica" and not self.o.small else None
            self.figure("%s: a MoE layer" % what, 1e6 * (s[b] - s[a]) / (b - a), "us", goal,
                        plan=plan[a] and 1e6 * (plan[b] - plan[a]) / (b - a))
        one = self.known("tp1", "decode, 1 a replica: a MoE layer")
        if self.row == "tp4" and one:
            self.figure("decode, 1 a replica: a MoE layer, times tp1", one / self.known("tp4", "decode, 1 a replica: a MoE layer"), "x", 1.9, True)

    def prompt_32k(self):
        """A whole prompt, the same tokens of a chunk on every rank, against one GPU."""
        n, layers, seconds = self.n, self.layers[0], {}
        for name, ranks, grid, chunk in (("one", 1, [], self.chunk), ("cp", n, ["--cp", str(n), "--ep", str(n)], self.chunk * n)):
            x = self.step(name, ranks, grid, layers, ["--context", "1", "--sequences", "1", "--prefill", str(self.prompt), "--chunk", str(chunk),
                                                      "--steps", "2" if self.o.small else "4"])
            seconds[name] = [y for y in x if y["kind"] == "prefill"][0]["median_s"]
            self.figure("prompt of %d, %d rank%s, %d layers" % (self.prompt, ranks, "s"[:ranks > 1], layers), 1e3 * seconds[name], "ms")
        self.figure("prompt of %d, %d ranks, times one" % (self.prompt, n), seconds["one"] / seconds["cp"], "x", 3.4 if n == 4 else None, True)

    # ---- rows: exchanges

    def comm(self, name, arguments, calls):
        return self.ranks(name, self.n, ["bench", "comm", "--device", self.o.device, "--ranks", str(self.n), "--calls", str(calls)] + arguments)

    def exposed(self):
        """Keys and latents beside products alone (parallel.md 3.5)."""
        lines = [x for x in self.comm("comm", ["--bytes", "8", "--width", "0", "--rows", ",".join(map(str, self.rows_cp))], min(self.runs, 100))
                 if x["op"] == "exchange"]
        for x in lines:
            goal = max(3.0, 1e5 * x["nccl_s"])
            if x["pushes"]:
                self.figure("%d rows a rank, stored to peers, exposed" % x["rows"], 1e6 * x["push_exposed_s"], "us", goal)
                self.figure("%d rows a rank, stored to peers, alone" % x["rows"], 1e6 * x["push_s"], "us")
            self.figure("%d rows a rank, NCCL, exposed" % x["rows"], 1e6 * x["nccl_exposed_s"], "us", goal)
            self.figure("%d rows a rank, NCCL, alone" % x["rows"], 1e6 * x["nccl_s"], "us")
            if x.get("window_s"):
                self.figure("%d rows a rank, NCCL's symmetric windows, exposed" % x["rows"], 1e6 * x["window_exposed_s"], "us")
                self.figure("%d rows a rank, NCCL's symmetric windows, alone" % x["rows"], 1e6 * x["window_s"], "us")
        if not lines:
            raise Failed("bench comm --rows said nothing")

    def exposed_layers(self):
        """The same inside whole layers: a chunk less the same chunk whose rows stay where they are made."""
        n, layers, seconds = self.n, self.layers[0], {}
        grid = ["--cp", str(n), "--ep", str(n)]
        sizes = [r * n for r in self.rows_cp]
        hows = [("NCCL", ["--peer-kernels", "off"]), ("own", ["--peer-kernels", "off", "--own-rows"]), ("not hidden", ["--peer-kernels", "off", "--no-overlap"])]
        if self.o.device == "cuda" and not self.o.small:
            hows[1:1] = [("stored to peers", ["--peer-kernels", "on"])]
        for how, options in hows:
            name = how.replace(" ", "-")
            for x in self.step(name, n, grid, layers, options + ["--context", "1", "--sequences", "1", "--prefill", ",".join(map(str, sizes)), "--chunk",
                                                                 str(max(sizes)), "--prefill-at", str(self.before), "--steps", str(self.steps)]):
                if x["kind"] == "prefill":
                    seconds[how, x["context"] - self.before] = x["median_s"]
        for size in sizes:
            for how, _ in hows:
                if how != "own":
                    alone = self.known("exposed", "%d rows a rank, NCCL, alone" % (size // n))
                    goal = max(3.0, 0.1 * alone) if alone and how != "not hidden" else None
                    self.figure("%d rows a rank, %s, exposed in a layer" % (size // n, how),
                                1e6 * (seconds[how, size] - seconds["own", size]) / layers, "us", goal)

    def sums(self):
        """All-reduce, residual, norm: rows of the model's width, over peer memory and by NCCL."""
        lines = [x for x in self.comm("comm", ["--bytes", "8", "--width", str(self.width)], self.runs) if x["op"] == "sum_norm"]
        for x in lines:
            if x["rows"] in (32, 128):
                continue
            goal = 0.5 if x["rows"] <= 16 else None
            if x["rows"] == 1:
                self.figure("1 row", 1e6 * x["median_s"], "us", 7)
            elif x["rows"] > 16:
                self.figure("%d rows" % x["rows"], 1e6 * x["median_s"], "us")
            self.figure("%d row%s, of NCCL and the norm" % (x["rows"], "s"[:x["rows"] > 1]), x["median_s"] / x["plain_median_s"], "x", goal)
        if not lines:
            raise Failed("bench comm said nothing of sums")

    def experts(self):
        """Rows to experts of other ranks and back."""
        for x in self.comm("comm", ["--bytes", "8", "--width", "0" if not self.o.small else str(self.width), "--experts",
                                    ",".join(map(str, self.rows_ep))], min(self.runs, 100)):
            if x["op"] != "experts":
                continue
            for part, most in (("dispatch", 12), ("combine", 18)):
                us = 1e6 * x["%s_s" % part]
                if x["rows"] == 128:
                    self.figure("128 tokens a rank, %s" % part, us, "us", most)
                else:
                    self.figure("%d tokens a rank, %s" % (x["rows"], part), us, "us")
                    self.figure("%d tokens a rank, %s, rate of a plain all-to-all" % (x["rows"], part), x["plain_%s_s" % part] / x["%s_s" % part],
                                "x", 0.75 if x["rows"] == 4096 else None, True)

    def operations(self):
        """Every operation at the sizes of decode and prefill against the library's own loop."""
        sizes = [8, 4096] if self.o.small else [14336 * r for r in (1, 16, 128, 1024, 16384)]
        for x in self.comm("comm", ["--width", "0", "--bytes", ",".join(map(str, sizes))], self.runs):
            if "plain_median_s" in x and "bytes" in x:
                self.figure("%s of %d bytes, times plain" % (x["op"], x["bytes"]), x["median_s"] / x["plain_median_s"], "x")

    # ---- rows: whole jobs

    def script(self, steps, times):
        """tests/run_gpus.sh; its verdicts are counted."""
        env = ["env", "TRIREME=" + self.o.trireme, "TR_BUILDDIR=" + self.o.build, "TR_SRCDIR=" + SOURCE, "MPIEXEC=" + shlex.split(self.o.launcher)[0],
               "TR_KEEP=" + self.o.out]
        if self.o.small:
            env += ["TR_GRIDS=%d --tp %d" % (self.n, self.n)]
        text = ""
        try:
            text = self.run(self.row, env + ["bash", os.path.join(HERE, "run_gpus.sh"), "-n", "%d" % self.n, "-t", str(times)] + steps)
        except Failed:
            with open(os.path.join(self.o.out, self.row + ".out"), errors="replace") as f:
                text = f.read()
            if "FAIL" not in text:
                raise
        table = text.split("what was looked at")[-1]
        passed = sum(1 for line in table.split("\n") if line.startswith("PASS"))
        failed = [line for line in table.split("\n") if line.startswith("FAIL")]
        self.figure("passed", passed, "")
        self.figure("failed%s" % (": " + failed[0][6:60].strip() if failed else ""), len(failed), "", 0)


def rows_of(m):
    """name, GPUs it wants, seconds (seen, or thought, on H200s), what to do, one line."""
    n = str(m.n)
    t = m.o.times
    both = lambda k: "of 1, 16 and 64 sequences, and a chunk, of %d and %d layers%s" % (m.layers + (k,))
    return [
        ("tp1", 1, 50, lambda: m.grid_steps(1, []), "steps %s: one GPU" % both("")),
        ("tp2", 2, 55, lambda: m.grid_steps(2, ["--tp", "2", "--ep", "1", "--moe-tp", "2"]), "the same: heads and experts cut in two"),
        ("tp4", 4, 60, lambda: m.grid_steps(4, ["--tp", "4", "--ep", "1", "--moe-tp", "4"]), "the same: cut in four"),
        ("prompt", 2, 60, m.prompt_32k, "a prompt of %d under cp %s ep %s against one GPU" % (m.prompt, n, n)),
        ("sums", 2, 20, m.sums, "all-reduce, residual and norm of 1 to 256 rows"),
        ("exposed", 2, 35, m.exposed, "keys and latents beside products"),
        ("experts", 2, 25, m.experts, "rows to their experts and back"),
        ("exposed-layers", 2, 90, m.exposed_layers, "keys and latents inside whole layers"),
        ("cp" + n, 2, 60, lambda: m.grid_steps(m.n, ["--cp", n, "--ep", n], 1, m.n), "steps %s: rows of prompts dealt out" % both("")),
        ("dp" + n, 2, 60, lambda: m.grid_steps(m.n, ["--dp", n, "--ep", n], m.n), "the same: replicas, experts spread"),
        ("tp2ep2pp2", 4, 60, lambda: m.grid_steps(4, ["--tp", "2", "--ep", "2", "--pp", "2"]), "the same: two stages of two"),
        ("cp2", 4, 55, lambda: m.grid_steps(2, ["--cp", "2", "--ep", "2"], 1, 2), "the same: rows of prompts dealt out to two"),
        ("stop", 2, 30 + 48 * t, lambda: m.script(["stop"], t), "a rank is stopped, %d times: named, ended, gone on with" % t),
        ("kill", 2, 30 + 28 * t, lambda: m.script(["kill"], t), "a rank is killed, %d times" % t),
        ("grids", 2, 60 * m.n, lambda: m.script(["grids"] if m.o.small else ["comm", "grids", "same", "topk"], 1), "every legal grid: the answers of one GPU, the same keys selected"),
        ("operations", 2, 40, m.operations, "every operation against the library's own loop"),
    ]


def options():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS)
    p.add_argument("-n", "--gpus", type=int, default=0, help="ranks, a GPU each (default: the GPUs of this machine, at most 4)")
    p.add_argument("-r", "--rows", default="", metavar="ROW[,ROW...]", help="these alone, in this order")
    p.add_argument("-b", "--budget", type=float, default=1800, metavar="S", help="all of it in so many seconds (default 1800)")
    p.add_argument("-t", "--times", type=int, default=10, help="kills and stops (default 10)")
    p.add_argument("-o", "--out", default="measured", metavar="DIR", help="(default: measured)")
    p.add_argument("-l", "--list", action="store_true", help="the rows and what they take")
    p.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    p.add_argument("--small", action="store_true", help="models/tiny and small sizes: does every row run?")
    p.add_argument("--trireme", default=os.environ.get("TRIREME", "trireme"), help="the program (default: $TRIREME)")
    p.add_argument("--build", default=os.environ.get("TR_BUILDDIR", "."), help="where the tests were built (default: $TR_BUILDDIR)")
    p.add_argument("--launcher", default="mpirun -n {n}", help="{n}: ranks (default: mpirun -n {n})")
    o = p.parse_args()
    if not o.gpus and not o.list:
        try:
            text = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
        except OSError:
            text = ""
        o.gpus = min(4, sum(1 for line in text.split("\n") if line.startswith("GPU ")))
    o.gpus = o.gpus or (4 if o.list else 0)
    if o.gpus not in (2, 4):
        p.error("two or four GPUs are wanted (-n)")
    o.out, o.build = os.path.abspath(o.out), os.path.abspath(o.build)
    return o, p


def run_row(m, row, seconds, what):
    """True: it ran. Its own time is three times what it takes, within the budget."""
    m.row = row
    m.until = time.monotonic() + min(3 * seconds + 30, m.left())
    begun = time.monotonic()
    try:
        what()
    except (Failed, KeyError, ValueError, IndexError) as e:
        m.unfit.append("%-15s %s" % (row, e if isinstance(e, Failed) else "output that was not expected: %r" % e))
        print(m.unfit[-1], flush=True)
        return False
    print("%-15s took %.0f s" % (row, time.monotonic() - begun), flush=True)
    return True


def outline(o):
    """The rows, for their names and seconds: nothing is made for them."""
    o = argparse.Namespace(**{**vars(o), "out": os.devnull})
    return rows_of(argparse.Namespace(n=o.gpus, o=o, layers=(3, 5), prompt=32768, **{k: None for k in (
        "prompt_32k", "sums", "exposed", "experts", "exposed_layers", "operations")}))


def main():
    o, parser = options()
    rows = outline(o)
    if o.list:
        for name, wants, seconds, _, text in rows:
            print("%-15s %d GPUs %4d s  %s" % (name, wants, seconds, text))
        print("%d s in all with %d GPUs" % (sum(r[2] for r in rows if r[1] <= o.gpus), o.gpus))
        return 0
    names = [r[0] for r in rows]
    wanted = o.rows.split(",") if o.rows else list(dict.fromkeys(names))
    for name in wanted:
        if name not in names:
            parser.error("%s: no such row (%s)" % (name, ", ".join(names)))
    m = Measure(o)
    rows = rows_of(m)
    for name in wanted:
        _, wants, seconds, what, _ = rows[names.index(name)]
        if wants > o.gpus:
            m.unfit.append("%-15s not run: it wants %d GPUs" % (name, wants))
        elif m.left() < seconds and not o.small:
            m.unfit.append("%-15s not run: it takes about %d s, %.0f are left" % (name, seconds, max(0, m.left())))
        else:
            run_row(m, name, seconds, what)
    print("\n%-15s %-58s %10s %-5s %-11s" % ("row", "what", "measured", "", "goal"))
    for r in m.rows:
        print(m.line(r))
    print("\n".join(m.unfit))
    missed = sum(1 for r in m.rows if r["verdict"] == "MISSED")
    print("%d goals reached, %d missed, %d rows not run; %.0f s; %s" % (
        sum(1 for r in m.rows if r["verdict"] == "reached"), missed, len(m.unfit), time.monotonic() - m.begun, m.path))
    m.file.close()
    return 1 if m.unfit else 0


sys.exit(main())
