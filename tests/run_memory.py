#!/usr/bin/env python3
"""Little memory on one GPU: a job either says at its start that there is too little, with the table and exit status 71, or answers
all requests, and the same as with room for all.

usage: tests/run_memory.py [options]        for a machine with a GPU; -h lists the options

Another process holds all of the GPU's memory but a part, which grows from job to job. A job: a prompt of LONGEST tokens and many
short ones, with short answers of models/tiny, up to 32 at a time: many kinds of steps, each with a record (CUDA graph).
Exit status: 0; 1 a job ended otherwise, or there was none of either kind; 77 no GPU.
"""
import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.environ.get("TR_SRCDIR", os.path.dirname(HERE))
HOLD = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *args):
    if getattr(cuda, name)(*args):
        sys.exit(name + " failed")
device, context, memory = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_uint64()
left, all = ctypes.c_size_t(), ctypes.c_size_t()
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(device), 0)
call("cuCtxCreate_v2", ctypes.byref(context), 0, device)
call("cuMemGetInfo_v2", ctypes.byref(left), ctypes.byref(all))
call("cuMemAlloc_v2", ctypes.byref(memory), ctypes.c_size_t(left.value - (int(sys.argv[1]) << 20)))
print("held", flush=True)
sys.stdin.read()
"""


def requests(longest):
    lines = []
    for i in range(96):
        n = longest if i == 0 else 1 + i * 37 % 700
        body = {"prompt": [5 + (i + j * 7) % 1900 for j in range(n)], "max_tokens": 1 + i % 24, "temperature": 0,
                "return_token_ids": True}
        lines.append(json.dumps({"custom_id": "r%d" % i, "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    return lines


def job(o, place, lines, left):
    """Exit status, records, what it said; left: MiB, None: all."""
    source, out = os.path.join(place, "in"), os.path.join(place, "out%s" % (left or ""))
    with open(source, "w") as f:
        f.writelines(lines)
    holder = None
    if left:
        holder = subprocess.Popen([sys.executable, "-c", HOLD, str(left)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if holder.stdout.readline() != b"held\n":
            sys.exit("the other process could not take the memory")
    try:
        p = subprocess.run([o.trireme, "batch", "-m", os.path.join(SOURCE, "models", "tiny"), "-i", source, "-o", out,
                            "--device", "cuda", "--max-model-len", str(o.longest + 64), "--max-sequences", "32"] + o.more,
                           stderr=subprocess.PIPE)
    finally:
        if holder:
            holder.communicate()
    records = {}
    if os.path.exists(out):
        with open(out) as f:
            for line in f:
                r = json.loads(line)
                records[r["custom_id"]] = r["response"] and r["response"]["body"].get("choices")
    return p.returncode, records, p.stderr.decode()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trireme", default=os.environ.get("TRIREME", "./trireme"))
    p.add_argument("--longest", type=int, default=8000, help="prompt tokens (default 8000)")
    p.add_argument("--least", type=int, default=500, help="MiB left for the first job (default 500)")
    p.add_argument("--most", type=int, default=2000, help="and for the last (default 2000)")
    p.add_argument("--steps", type=int, default=16, help="jobs (default 16)")
    p.add_argument("more", nargs="*", help="options of trireme batch, after --")
    o = p.parse_args()
    if not (shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"]).returncode == 0):
        print("skipped: no GPU")
        return 77
    lines, failed, kinds = requests(o.longest), 0, set()
    with tempfile.TemporaryDirectory() as place:
        rc, want, log = job(o, place, lines, None)
        if rc or len(want) != len(lines):
            sys.exit("with all of the memory: exit status %d, %d records\n%s" % (rc, len(want), log))
        for i in range(o.steps):
            left = o.least + (o.most - o.least) * i // max(1, o.steps - 1)
            rc, records, log = job(o, place, lines, left)
            table = "max-batch-tokens" in log
            good = (rc == 0 and records == want) or (rc == 71 and not records and table)
            kinds.add(rc)
            failed += not good
            cache = re.search(r"cache \w+, ([\d.]+ GB)", log)
            print("%s  %5d MiB left: exit status %d, %d of %d records%s%s" %
                  ("PASS" if good else "FAIL", left, rc, len(records), len(lines),
                   ", a cache of " + cache.group(1) if cache else "",
                   ", not all steps recorded" if "records of steps" in log else ""), flush=True)
            if not good:
                print(log, end="")
    if kinds != {0, 71}:
        print("FAIL  every job ended alike: another --least or --most")
    return 1 if failed or kinds != {0, 71} else 0


if __name__ == "__main__":
    sys.exit(main())
