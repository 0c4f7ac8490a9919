"""Run a small batch job with its n-th call of every kind failing; see tests/run_nth.sh.

usage: nth.py FOLDER TRIREME MODEL [--quick]     FOLDER holds shim.so and is scratch
"""
import errno
import json
import os
import struct
import subprocess
import sys
import time

folder, trireme, model = sys.argv[1:4]
quick = "--quick" in sys.argv[4:]
kinds = ["malloc", "open", "read", "write", "fsync", "rename", "truncate"]
out = os.path.join(folder, "out")
source = os.path.join(folder, "in.jsonl")
command = [os.path.abspath(trireme), "batch", "-m", os.path.abspath(model), "-i", source, "-o", out,
           "--max-sequences", "2", "--max-model-len", "256"]

requests = [
    ("/v1/completions", {"prompt": "The code of", "max_tokens": 6}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0.5,
                              "logprobs": True, "stop": ["zz"], "logit_bias": {"5": 1}}),
    ("/v1/chat/completions", {"messages": "no list"}),
]
with open(source, "w") as f:
    for i, (url, body) in enumerate(requests):
        f.write(json.dumps({"custom_id": "r%d" % i, "method": "POST", "url": url, "body": body}) + "\n")
    f.write("no request\n")


def run(fault=None, count=None):
    env = dict(os.environ)
    if fault or count:
        env["LD_PRELOAD"] = os.path.join(folder, "shim.so")
    if fault:
        env["TRFAULT"] = fault
    if count:
        env["TRFAULT_COUNT"] = count
    try:
        p = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=100)
        return p.returncode, p.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired:
        return "hang", ""


def clear():
    for name in os.listdir(folder):
        if name.startswith("out"):
            os.unlink(os.path.join(folder, name))


def records():
    """What OUT holds: None if it is damaged."""
    if not os.path.exists(out):
        return []
    data = open(out, "rb").read()
    if data and not data.endswith(b"\n"):
        return None
    found = []
    for line in data.split(b"\n")[:-1]:
        try:
            r = json.loads(line)
        except ValueError:
            return None
        if isinstance(r, dict) and r.get("response"):
            r["response"]["body"].pop("created", None)
            r["response"]["body"].get("usage", {}).pop("prompt_tokens_details", None)
        found.append(json.dumps(r, sort_keys=True))
    return sorted(found)


def fresh():
    clear()


def damaged():
    """A finished run whose first record was lost and left a stray line: resume writes OUT anew."""
    clear()
    with open(out, "wb") as f:
        lines = finished.split(b"\n")
        f.write(b"\n".join([b"{}"] + lines[1:]))
    with open(out + ".run", "wb") as f:
        f.write(identity)


def key(record):
    r = json.loads(record)
    return r["custom_id"] or r["error"]["line"]


def out_of_memory(record):
    r = json.loads(record)
    return r["response"] and r["response"]["body"].get("error", {}).get("code") == "out_of_memory"


n_cases = n_failed = n_without_memory = 0
seen = {}


def case(prepare, label, fault, allowed):
    global n_cases, n_failed, n_without_memory
    prepare()
    status, text = run(fault)
    n_cases += 1
    faults = []
    if status not in allowed:
        faults.append("exit status %s, not one of %s" % (status, sorted(allowed)))
    said = [l for l in text.split("\n") if l]
    if status not in (0, "hang") and not (said and said[-1].startswith("trireme: ") and len(said[-1]) > 12):
        faults.append("no message")
    if prepare is fresh and records() is None:
        faults.append("a torn record")
    again, more = run()
    now, wanted = records(), whole
    if now is not None and label == "malloc":
        # One request that got no memory while it ran has a 500 as its record (chat.md 4.1), and keeps it.
        failed = {key(r) for r in now if out_of_memory(r)}
        n_without_memory += len(failed)
        now = [r for r in now if key(r) not in failed]
        wanted = [r for r in whole if key(r) not in failed]
    if again != 0 or now != wanted:
        faults.append("run again: exit status %s, %s" % (again, "damaged" if now is None else "%d records%s" % (
            len(now), "" if now == wanted else ", others than an undisturbed run's")))
        text += more
    row = seen.setdefault(label, {})
    row[status] = row.get(status, 0) + 1
    if faults:
        n_failed += 1
        print("FAILED  %s (%s): %s\n%s" % (fault, prepare.__name__, "; ".join(faults),
                                           "".join("        %s\n" % l for l in text.split("\n")[-6:] if l)), flush=True)


def counts():
    path = os.path.join(folder, "counts")
    if os.path.exists(path):
        os.unlink(path)
    status, text = run(count=path)
    if status != 0:
        sys.exit("the undisturbed run: exit status %s\n%s" % (status, text))
    return dict(zip(kinds, struct.unpack("<%dQ" % len(kinds), open(path, "rb").read())))


def every(n, most):
    """1..n; with --quick about `most` of them, the first and the last among them."""
    step = max(1, n // most) if quick else 1
    return sorted(set(range(1, n + 1, step)) | ({n} if n else set()))


begun = time.time()
fresh()
reached = counts()
whole = records()
finished, identity = open(out, "rb").read(), open(out + ".run", "rb").read()
print("a job reaches " + ", ".join("%d %s" % (reached[k], k) for k in kinds))
if len(whole) != 4 or not reached["malloc"] or not reached["write"]:
    sys.exit("the undisturbed run made %d records" % len(whole))

# Almost all allocations are the model's names and the vocabulary; the last ones are the requests.
job = max(1, reached["malloc"] - 150)
for n in sorted(set(every(job, 40)) | {job + i for i in every(reached["malloc"] - job, 40)}):
    case(fresh, "malloc", "malloc:%d" % n, {0, 71})
for n in every(reached["open"], 100):
    case(fresh, "open", "open:%d" % n, {0, 74})
for n in every(reached["read"], 15):
    case(fresh, "read", "read:%d" % n, {0, 74})
    case(fresh, "read, EINTR", "read:%d:%d" % (n, errno.EINTR), {0})
for kind in ("write", "fsync", "truncate"):
    for n in every(reached[kind], 100):
        case(fresh, kind + " once", "%s:%d" % (kind, n), {0, 74})
        case(fresh, kind + " from then on", "%s:%d+:%d" % (kind, n, errno.ESTALE), {74})
        if kind == "write":
            case(fresh, "write, ENOSPC", "write:%d:%d" % (n, errno.ENOSPC), {0, 74})
            case(fresh, "write, EINTR", "write:%d:%d" % (n, errno.EINTR), {0})

damaged()
again = counts()
if records() != whole:
    sys.exit("a damaged OUT was not mended")
print("a resume that writes OUT anew reaches " + ", ".join("%d %s" % (again[k], k) for k in kinds))
for kind in ("open", "write", "fsync", "rename", "truncate"):
    for n in every(again[kind], 100):
        case(damaged, "resume: " + kind, "%s:%d:%d" % (kind, n, errno.ESTALE), {0, 74})
if not again["rename"]:
    sys.exit("the damaged OUT was not written anew")

for label, row in seen.items():
    print("%-24s %s" % (label, ", ".join("%d x exit %s" % (row[s], s) for s in sorted(row, key=str))))
print("%d requests had no memory and say so in their record" % n_without_memory)
print("%d faults, %d failed, %.0f s" % (n_cases, n_failed, time.time() - begun))
sys.exit(1 if n_failed else 0)
