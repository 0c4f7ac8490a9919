"""Run a small batch job of two ranks with the n-th allocation of one of them failing; see tests/run_rank_nth.sh.

usage: rank_nth.py FOLDER TRIREME MODEL MPIEXEC CASES      FOLDER holds shim.so and is scratch
"""
import json
import os
import re
import shutil
import struct
import subprocess
import sys

folder, trireme, model, mpiexec, n_cases = sys.argv[1:5] + [int(sys.argv[5])]
trireme, model = os.path.abspath(trireme), os.path.abspath(model)
source, place = os.path.join(folder, "in.jsonl"), os.path.join(folder, "job")
counts = os.path.join(folder, "counts")
MALLOC = 0  # of the shim's counters
GOOD, MEMORY, LOST = 0, 71, 86

with open(source, "w") as f:
    for i in range(6):
        body = {"prompt": [41 + i] * (3 + 40 * i), "max_tokens": 6, "n": 1 + i % 2, "temperature": 1, "return_token_ids": True, "seed": i}
        f.write(json.dumps({"custom_id": "r%d" % i, "method": "POST", "url": "/v1/completions", "body": body}) + "\n")

# The rank decides in its own shell whether it gets the library.
with open(os.path.join(folder, "rank"), "w") as f:
    f.write("""rank=${OMPI_COMM_WORLD_RANK-${PMI_RANK-${PMIX_RANK-}}}
[ "$rank" != "$WHO" ] || export LD_PRELOAD="$SHIM"
exec "$@"
""")


def run(who, **how):
    env = dict(os.environ, WHO=str(who), SHIM=os.path.join(folder, "shim.so"), **how)
    command = [mpiexec, "-n", "2", "sh", os.path.join(folder, "rank"), trireme, "batch", "-m", model, "-i", source, "-o",
               os.path.join(place, "out"), "--max-sequences", "2", "--max-model-len", "512", "--step-timeout", "20",
               "--profile", os.path.join(place, "profile.h5")]
    try:
        p = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=150)
        return p.returncode, p.stderr.decode(errors="replace")
    except subprocess.TimeoutExpired:
        return "hang", ""


def fresh():
    shutil.rmtree(place, ignore_errors=True)
    os.mkdir(place)


def records():
    found = []
    with open(os.path.join(place, "out"), "rb") as f:
        for line in f.read().split(b"\n")[:-1]:
            r = json.loads(line)
            body = r["response"]["body"]
            body.pop("created", None)
            body.get("usage", {}).pop("prompt_tokens_details", None)
            found.append((r["custom_id"], body.get("error", {}).get("code"), json.dumps(r, sort_keys=True)))
    return sorted(found)


def wrong(status, text):
    """What is not as promised about a run of which an allocation failed, and about the one behind it."""
    if status not in (GOOD, MEMORY, LOST):
        return "exit status %s" % status
    said = [line for line in text.split("\n") if line.startswith("trireme: ")]
    if status != GOOD and not said:
        return "nobody says why"
    if any(re.match(r"trireme: rank \d+ on \S+: rank \d+ on ", line) for line in said):
        return "a message names a rank twice"
    # Who has waited for the others in vain does not wait for them again, to bring the profile together.
    if any("no joined profile" in line and "did not answer" in line for line in text.split("\n")):
        return "the others are waited for twice"
    again, more = run(-1)
    if again != 0:
        return "run again: exit status %s\n%s" % (again, more)
    now = records()
    if [r[0] for r in now] != [r[0] for r in whole]:
        return "run again: records of %s" % [r[0] for r in now]
    # One request that got no memory while it ran keeps its error record.
    if any(r != w and r[1] != "out_of_memory" for r, w in zip(now, whole)):
        return "run again: other records than an undisturbed run's"
    return None


fresh()
status, text = run(-1)
if status != 0:
    sys.exit("the undisturbed run: exit status %s\n%s" % (status, text))
whole = records()
n_failed, seen = 0, {}
for who in 0, 1:
    fresh()
    if os.path.exists(counts):
        os.unlink(counts)
    status, text = run(who, TRFAULT_COUNT=counts)
    if status != 0:
        sys.exit("rank %d, counted: exit status %s\n%s" % (who, status, text))
    with open(counts, "rb") as f:
        n = struct.unpack("<7Q", f.read())[MALLOC]
    # Most are the vocabulary and the tensors' names; what ranks do together comes behind them.
    first = max(1, n - 1200)
    tried = sorted(set(first + i * (n - first) // max(1, n_cases - 1) for i in range(n_cases)))
    for i in tried:
        fresh()
        status, text = run(who, TRFAULT="malloc:%d" % i)
        seen[status] = seen.get(status, 0) + 1
        why = wrong(status, text)
        if why:
            n_failed += 1
            print("FAILED  rank %d, allocation %d of %d: %s" % (who, i, n, why))
            print("".join("        %s\n" % line for line in text.split("\n")[-8:] if line), flush=True)
print("%d cases, %d failed; exit statuses %s" % (sum(seen.values()), n_failed, seen))
sys.exit(n_failed > 0)
