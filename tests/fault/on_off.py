"""What guards a job costs: the same job with a thing on and off, in turn, in percent of its time.

  saving    running answers saved every second (--save-every 1) and only at a stop (--save-every 0)
  watchdog  two ranks with --tp 2, so that every collective is noted, and with --step-timeout 0, which starts no watchdog
  profile   with --profile and without

A pair is one run of each, the second of a pair the first of the next. What is told is the median over all pairs of wall time on
over wall time off, the start and the end of the program included, and the standard error of that median (1.2533 s / sqrt(n), the
deviation s from the quartiles, so that a run that something else disturbed does not count more than once). With --jobs the pairs
are spread over so many cores or pairs of cores, each of its own: only on a machine that has nothing else to do. No pair is begun
when a thing has been measured for --seconds.

usage: on_off.py TRIREME MODEL [--pairs N] [--seconds S] [--jobs N] [--tokens N] [--limit PERCENT] [WHAT...]       TMPDIR: the disk that is meant
Exit status: 0 each median plus its error is below the limit; 1 one is not; 2 usage, or a run that failed.
"""
import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

parser = argparse.ArgumentParser(usage=__doc__.split("usage: ")[1].split("   ")[0])
parser.add_argument("trireme")
parser.add_argument("model")
parser.add_argument("what", nargs="*", default=["saving", "watchdog", "profile"])
parser.add_argument("--pairs", type=int, default=20)
parser.add_argument("--seconds", type=float, default=math.inf)
parser.add_argument("--jobs", type=int, default=1)
parser.add_argument("--tokens", type=int, default=1200)
parser.add_argument("--limit", type=float, default=1.0)
o = parser.parse_intermixed_args()

WHAT = {  # ranks, options, on, off
    "saving": (1, [], ["--save-every", "1"], ["--save-every", "0"]),
    "watchdog": (2, ["--tp", "2"], [], ["--step-timeout", "0"]),
    "profile": (1, [], ["--profile", "{dir}/run.h5"], []),
}
SEQUENCES = 16
environment = dict(os.environ, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", OMPI_MCA_hwloc_base_binding_policy="none",
                   OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
alone = dict(environment, OMPI_MCA_ess_singleton_isolated="1", OMPI_MCA_pml="ob1", OMPI_MCA_btl="self", OMPI_MCA_mtl="^ofi")
cores = sorted(os.sched_getaffinity(0))
failures = []


def job(folder, ranks, what, mine):
    """Seconds of the whole process."""
    out = os.path.join(folder, "out")
    shutil.rmtree(out, ignore_errors=True)
    os.mkdir(out)
    command = [o.trireme, "batch", "-m", o.model, "-i", os.path.join(folder, "in.jsonl"), "-o", os.path.join(out, "jsonl"), "--no-bind",
               "--max-sequences", str(SEQUENCES)] + [x.format(dir=out) for x in what]
    if ranks > 1:
        command = [os.environ.get("MPIEXEC", "mpirun"), "-n", str(ranks)] + command
    begun = time.monotonic()
    p = subprocess.run(command, env=environment if ranks > 1 else alone, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                       preexec_fn=lambda: os.sched_setaffinity(0, mine))
    took = time.monotonic() - begun
    with open(os.path.join(out, "jsonl")) as f:
        records = sum(1 for _ in f)
    if p.returncode != 0 or records != SEQUENCES:
        raise RuntimeError("exit status %d, %d records: %s" % (p.returncode, records, p.stderr.decode(errors="replace")[-400:]))
    return took


def pairs(n, what, mine, end, ratios, seconds):
    ranks, options, on, off = WHAT[what]
    folder = tempfile.mkdtemp(prefix="trireme-on-off.")
    try:
        with open(os.path.join(folder, "in.jsonl"), "w") as f:
            for i in range(SEQUENCES):
                f.write(json.dumps({"custom_id": "r%d" % i, "method": "POST", "url": "/v1/completions", "body": {
                    "prompt": "The code of stone ferry %d is" % i, "max_tokens": o.tokens, "ignore_eos": True, "seed": i}}) + "\n")
        job(folder, ranks, options + on, mine)
        for i in range(n):
            if time.monotonic() > end:
                break
            took = {}
            for which in ((on, off) if i % 2 else (off, on)):
                took[which is on] = job(folder, ranks, options + which, mine)
            ratios.append(took[True] / took[False])
            seconds.append(took[False])
    except Exception as e:  # of a thread: told at the end
        failures.append("%s: %s" % (what, e))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


above = False
for what in o.what:
    if what not in WHAT:
        parser.error("%s: saving, watchdog or profile" % what)
    ranks = WHAT[what][0]
    jobs = max(1, min(o.jobs, len(cores) // ranks))
    ratios, seconds, threads, end = [], [], [], time.monotonic() + o.seconds
    for k in range(jobs):
        mine = set(cores[k * ranks:(k + 1) * ranks]) if jobs > 1 else set(cores)
        threads.append(threading.Thread(target=pairs, args=((o.pairs + jobs - 1) // jobs, what, mine, end, ratios, seconds)))
        threads[-1].start()
    for t in threads:
        t.join()
    if failures or len(ratios) < 4:
        print("\n".join(failures) or "four pairs are the least", file=sys.stderr)
        sys.exit(2)
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = 100 * 1.2533 * (high - low) / 1.349 / math.sqrt(len(ratios))
    cost = 100 * (middle - 1)
    print("%-8s  %4d pairs, %d beside each other, off %.2f s (median): %+.2f %% +- %.2f (quartiles %+.1f, %+.1f)" % (
        what, len(ratios), jobs, statistics.median(seconds), cost, error, 100 * (low - 1), 100 * (high - 1)), flush=True)
    above |= cost + error >= o.limit
sys.exit(1 if above else 0)
