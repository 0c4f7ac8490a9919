#!/usr/bin/env python3
"""Many mixed requests of models/tiny on one GPU: all are answered, with room for all and with a cache that makes the youngest begin
again, to the same records; what memory it has in use does not grow; what the model was trained to answer is what the CPU answers.

usage: tests/run_mixed.py [options]        for a machine with a GPU; -h lists the options

One request in ten is a question or a tool call of tests/vectors/tiny, every other one of them behind up to LONGEST tokens of other
text; the rest have prompts of 1 to LONGEST tokens, 1 to 400 of answer, greedy or sampled with a seed, some with log-probabilities,
some beginning alike. Behind other text, which the model was not trained with, one answer in 20 may be another one than on the CPU,
whose activations are not rounded to fp8: rounded there, too, they turn out alike (BENCHMARKS.md, 2026-11-24).
Exit status: 0; 1 something differs, is missing or grew; 77 no GPU. With --device cpu the same without a look at memory.
"""
import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
SOURCE = os.environ.get("TR_SRCDIR", os.path.dirname(HERE))
VECTORS = os.path.join(SOURCE, "tests", "vectors", "tiny")
ROOM = 400  # tokens of answer, at most
BEHIND = "-behind"


def request(name, prompt, answer, **more):
    body = {"prompt": prompt, "max_tokens": answer, "temperature": 0, "return_token_ids": True}
    body.update(more)
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def requests(o):
    """The lines, and of the questions the ids that the reference goes on with."""
    draw = random.Random(o.seed)
    with open(os.path.join(VECTORS, "generation.json")) as f:
        cases = [c for c in json.load(f) if c["kind"] != "text"]
    with open(os.path.join(VECTORS, "nll.json")) as f:
        text = json.load(f)["ids"]
    text = text * (o.longest // len(text) + 2)
    lines, want = [], {}
    for i in range(o.requests):
        if i % 10 == 0:
            c = cases[i // 10 % len(cases)]
            before = 0 if i % 20 == 0 else draw.randrange(1, max(2, o.longest - len(c["prompt_ids"])))
            name = "%s-%d%s" % (c["kind"], i, BEHIND if before else "")
            want[name] = c["greedy_ids"]
            lines.append(request(name, text[:before] + c["prompt_ids"], len(c["greedy_ids"])))
            continue
        n = min(o.longest, int(o.longest ** draw.random()) + draw.randrange(2))
        begin = 0 if draw.random() < 0.2 else draw.randrange(len(text) // 2)
        more = {"logprobs": 2} if draw.random() < 0.1 else {}
        if draw.random() < 0.5:
            more.update(temperature=0.8, seed=i)
        lines.append(request("text-%d" % i, (text[begin:] + text)[:n], draw.randrange(1, ROOM if i % 4 == 1 else 64), **more))
    return lines, want


class Watch(threading.Thread):
    """MiB of GPU memory in use, once a second after the first record. Less at the end is a job that leaves. The first step of a
    kind that the start has not foreseen makes a record (a CUDA graph): 2 MiB at a time, while such kinds come up."""

    def __init__(self, path):
        super().__init__()
        self.path, self.seen, self.over = path, [], threading.Event()

    def run(self):
        while not self.over.wait(1):
            if not os.path.exists(self.path) or os.path.getsize(self.path) == 0:
                continue
            out = subprocess.run(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"],
                                 stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
            if out.returncode == 0:
                self.seen.append(int(out.stdout.split()[0]))


def job(o, place, name, lines, device, *options):
    """custom_id -> choices; preemptions; whether the GPU's memory in use grew after the first half of the job."""
    source, out = os.path.join(place, name + ".in"), os.path.join(place, name)
    with open(source, "w") as f:
        f.writelines(json.dumps(x) + "\n" for x in lines)
    watch = Watch(out) if device == "cuda" else None
    if watch:
        watch.start()
    begun = time.monotonic()
    p = subprocess.run([o.trireme, "batch", "-m", os.path.join(SOURCE, "models", "tiny"), "-i", source, "-o", out,
                        "--device", device, "--max-model-len", str(o.longest + ROOM)] + list(options), stderr=subprocess.PIPE)
    if watch:
        watch.over.set()
        watch.join()
    log = p.stderr.decode()
    if p.returncode:
        sys.exit("%s: exit status %d\n%s" % (name, p.returncode, log))
    records = {}
    with open(out) as f:
        for line in f:
            r = json.loads(line)
            if r["custom_id"] in records or r["error"] or r["response"]["status_code"] != 200:
                sys.exit("%s: %s" % (name, line[:300]))
            records[r["custom_id"]] = r["response"]["body"]["choices"]
    if set(records) != {x["custom_id"] for x in lines}:
        sys.exit("%s: %d records of %d requests" % (name, len(records), len(lines)))
    summary = re.search(r"trireme: (\d+ prompt tokens.*)", log).group(1)
    print("%-8s %d answered in %.1f s: %s" % (name, len(records), time.monotonic() - begun, summary), flush=True)
    grew = False
    if watch:
        half = len(watch.seen) // 2
        if half < 4:
            sys.exit("%s: how much memory the GPU had in use was seen %d times only" % (name, len(watch.seen)))
        first, second = max(watch.seen[:half]), max(watch.seen[half:])
        print("         GPU memory in use after the first answer %d MiB, at most %d in the first half, %d in the second" %
              (watch.seen[0], first, second))
        grew = second > first
    return records, int(re.search(r"(\d+) preemptions", summary).group(1)), grew


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--trireme", default=os.environ.get("TRIREME", "./trireme"))
    p.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    p.add_argument("--requests", type=int, default=2000)
    p.add_argument("--longest", type=int, default=8000, help="prompt tokens (default 8000)")
    p.add_argument("--sequences", type=int, default=64)
    p.add_argument("--cache", type=int, help="tokens of the small cache (default: as few as hold one sequence)")
    p.add_argument("--seed", type=int, default=0)
    o = p.parse_args()
    if o.device == "cuda" and not (shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"]).returncode == 0):
        print("skipped: no GPU")
        return 77
    cache = o.cache or (o.longest + ROOM + 63) // 64 * 64 + 64
    lines, want = requests(o)
    failed = []
    sequences = ["--max-sequences", str(o.sequences)]
    with tempfile.TemporaryDirectory() as place:
        roomy, _, grew = job(o, place, "roomy", lines, o.device, *sequences)
        small, preempted, grew_too = job(o, place, "small", lines, o.device, *sequences, "--max-cache-tokens", str(cache))
        if grew or grew_too:
            failed.append("the memory in use grew in the second half")
        if not preempted:
            failed.append("no preemption: --cache is too large")
        differ = [x for x in roomy if roomy[x] != small[x]]
        if differ:
            failed.append("%d records differ with the small cache: %s" % (len(differ), " ".join(differ[:5])))
        cpu, _, _ = job(o, place, "cpu", [x for x in lines if x["custom_id"] in want], "cpu")
    ids = {x: [c["token_ids"] for c in r] for x, r in roomy.items()}
    for behind in False, True:
        asked = [x for x in want if x.endswith(BEHIND) == behind]
        other = [x for x in asked if ids[x] != [c["token_ids"] for c in cpu[x]]]
        print("questions %s: %d of %d as on the CPU, %d as the reference says without other text" %
              ("behind other text" if behind else "by themselves", len(asked) - len(other), len(asked),
               sum(ids[x] == [want[x]] for x in asked)))
        if len(other) > (len(asked) // 20 if behind else 0):
            failed.append("%d questions have another answer than on the CPU: %s" % (len(other), " ".join(other[:5])))
    for x in failed:
        print("FAIL: " + x)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
