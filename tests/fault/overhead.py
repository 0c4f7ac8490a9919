"""What the promises cost: the journal and the check of the logits, in percent of a job's time.

The journal: the same job with its records in a file (journal, group syncs, lock, OUT.run) and down a pipe's end that nobody reads
(-o - to /dev/null: no journal), in turn, as often as asked; and, within the runs with a file, the time spent in the journal's
writes and syncs, all of it counted although they happen in a thread of their own.
The check: its time for one row of logits beside a whole step of as many rows, for MODEL with a vocabulary of 129,280 ids
(the worst case: a small model with a large head) and, with --wide, for a width of 7,168 and two layers.

usage: overhead.py TRIREME MODEL SHIM.so NAN_CHECK [PAIRS [THREADS]] [--wide]     TMPDIR: the disk that is meant
"""
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

wide = "--wide" in sys.argv
given = [a for a in sys.argv[1:] if a != "--wide"]
trireme, model, shim, nan_check = given[:4]
pairs = int(given[4]) if len(given) > 4 else 5
threads = given[5] if len(given) > 5 else "1"
LIMIT = 1.0  # percent (reliability.md 6)
bad = False

with tempfile.TemporaryDirectory(prefix="trireme-overhead.") as folder:
    source, out, spent = (os.path.join(folder, n) for n in ("in.jsonl", "out.jsonl", "spent"))
    with open(source, "w") as f:
        for i in range(240):
            f.write(json.dumps({"custom_id": "r%d" % i, "method": "POST", "url": "/v1/completions", "body": {
                "prompt": "The code of amber falcon is %d." % (1000 + i), "max_tokens": 64, "min_tokens": 64, "temperature": 0}}) + "\n")

    def job(to_file):
        """Seconds of the whole process, calls and seconds in the journal's system calls."""
        env = dict(os.environ, OMP_NUM_THREADS=threads, OMPI_MCA_ess_singleton_isolated="1", OMPI_MCA_pml="ob1", OMPI_MCA_btl="self",
                   OMPI_MCA_mtl="^ofi")
        if to_file:
            for name in (out, out + ".run"):
                if os.path.exists(name):
                    os.unlink(name)
            env.update(LD_PRELOAD=shim, TRFAULT_TIME=spent, TRFAULT_LOG_PATH=out)
        begun = time.monotonic()
        p = subprocess.run([trireme, "batch", "-m", model, "-i", source, "-o", out if to_file else "-", "--max-sequences", "16",
                            "--max-model-len", "256"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        took = time.monotonic() - begun
        if p.returncode != 0:
            sys.exit("exit status %d: %s" % (p.returncode, p.stderr.decode(errors="replace")))
        calls, seconds = open(spent).read().split() if to_file else (0, 0)
        return took, int(calls), float(seconds)

    job(True)
    on, off, inside, calls = [], [], [], 0
    for i in range(pairs):
        for to_file in ((True, False) if i % 2 else (False, True)):
            took, calls_now, seconds = job(to_file)
            (on if to_file else off).append(took)
            if to_file:
                inside.append(100 * seconds / took)
                calls = calls_now
    tokens = 240 * 64
    print("journal, %s thread(s), %d pairs: %.0f tokens/s with, %.0f without (medians of whole processes): %+.2f %%" % (
        threads, pairs, tokens / statistics.median(on), tokens / statistics.median(off),
        100 * (statistics.median(on) / statistics.median(off) - 1)))
    print("journal, in its %d writes and syncs: %.3f %% of the time (median; worst run %.3f %%)" % (
        calls, statistics.median(inside), max(inside)))
    bad |= statistics.median(inside) > LIMIT

ROWS = 16


def check(label, *overrides):
    check_ns, sample_ns = map(float, subprocess.run([nan_check, str(ROWS), "129280"], check=True, stdout=subprocess.PIPE).stdout.split())
    text = subprocess.run([trireme, "bench", "step", "-m", model, "--load-format", "dummy", "--threads", "1", "--sequences", str(ROWS),
                           "--prefill", "0", "--steps", "10", "--override", "vocab_size=129280", *overrides],
                          check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
    step = next(json.loads(l) for l in text.split("\n") if l.startswith("{") and "median_s" in l)
    percent = 100 * ROWS * check_ns / 1e9 / step["median_s"]
    print("check of the logits [%d, 129280], %s: %.1f us a row (sampling with it %.1f us), a step %.1f ms: %.3f %%" % (
        ROWS, label, check_ns / 1e3, sample_ns / 1e3, step["median_s"] * 1e3, percent))
    return percent


small = check("MODEL with that vocabulary")
if wide:
    bad |= check("width 7,168, two layers", "--override", "hidden_size=7168", "--override", "num_hidden_layers=2") > LIMIT
sys.exit(1 if bad else 0)
