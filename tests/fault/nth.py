"""Run a small batch job with its n-th call of every kind failing; see tests/run_nth.sh.

usage: nth.py FOLDER TRIREME MODEL [--quick] [-j JOBS] [--kinds LIST] [--part I/N] [--again PROGRAM]     FOLDER holds shim.so and is scratch
"""
import argparse
import concurrent.futures
import errno
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("trireme")
parser.add_argument("model")
parser.add_argument("--quick", action="store_true")
parser.add_argument("-j", dest="jobs", type=int, default=1)
parser.add_argument("--kinds", default="malloc,open,read,write,fsync,rename,truncate")
parser.add_argument("--part", default="0/1", help="of the cases every N-th, from I (from 0): what several machines or days share")
parser.add_argument("--again", help="finishes what the fault ended (default: TRIREME)")
given = parser.parse_args()

i_part, n_parts = (int(x) for x in given.part.split("/"))
if not 0 <= i_part < n_parts:
    sys.exit("--part takes I/N, I from 0 to N - 1")
kinds = ["malloc", "open", "read", "write", "fsync", "rename", "truncate"]
chosen = given.kinds.split(",")
if not set(chosen) <= set(kinds):
    sys.exit("--kinds takes " + ",".join(kinds))
trireme, model = os.path.abspath(given.trireme), os.path.abspath(given.model)
finisher = os.path.abspath(given.again or given.trireme)
source = os.path.join(given.folder, "in.jsonl")

weather = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
requests = [
    ("/v1/completions", {"prompt": "The code of", "max_tokens": 6}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5, "temperature": 0.5,
                              "logprobs": True, "top_logprobs": 2, "stop": ["zz"], "logit_bias": {"5": 1}}),
    ("/v1/chat/completions", {"messages": "no list"}),
    ("/v1/completions", {"prompt": [1, 2, 3, 4], "max_tokens": 0, "echo": True, "logprobs": 1}),
    ("/v1/chat/completions", {"messages": [
        {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"b\"}"}}]},
        {"role": "tool", "tool_call_id": "1", "content": "c"}], "tools": [weather], "n": 2, "max_tokens": 3, "presence_penalty": 1,
        "return_token_ids": True, "seed": 3, "chat_template_kwargs": {"thinking": True}}),
]
with open(source, "w") as f:
    for i, (url, body) in enumerate(requests):
        f.write(json.dumps({"custom_id": "r%d" % i, "method": "POST", "url": url, "body": body}) + "\n")
    f.write("no request\n")


class Scenario:
    """What is run under faults. before: how it finds OUT; after: calls count from the opening of this path on; stops: it gets USR1
    behind its first record."""

    def __init__(self, name, source, sequences, before=None, after=None, stops=False):
        self.name, self.source, self.before, self.after, self.stops = name, source, before, after, stops
        self.options = ["--max-sequences", str(sequences), "--max-model-len", "2048" if stops else "256", "--grace", "0"]
        self.whole = None  # the records of an undisturbed run


def write_long(path, tokens):
    """One short answer, and four that are still under way when it has its record; what is saved of them has all there is."""
    more = [{}, {"logprobs": 2, "temperature": 0.7}, {"n": 2, "temperature": 1}, {"echo": True, "logprobs": 1}]
    with open(path, "w") as f:
        for i in range(5):
            body = {"prompt": [1, 2, 3 + i], "max_tokens": tokens if i else 1, "ignore_eos": True, "return_token_ids": True}
            body.update(more[i - 1] if i else {})
            f.write(json.dumps({"custom_id": "l%d" % i, "method": "POST", "url": "/v1/completions", "body": body}) + "\n")


class Place:
    """A folder of its own for the output of one case after the other."""

    def __init__(self, name):
        self.folder = os.path.join(given.folder, name)
        os.mkdir(self.folder)
        self.out = os.path.join(self.folder, "out")
        self.scratch = self.folder + ".tmp"  # MPI's: two starts at a time get in each other's way in one
        os.mkdir(self.scratch)

    def run(self, scenario, fault=None, count=None, program=trireme, stops=False, clock=None, names=True):
        """names: a sanitizer finds out the functions of leaks, by which some are known; two thirds of a run's time."""
        env = dict(os.environ, TMPDIR=self.scratch)
        env["ASAN_OPTIONS"] = "%s:symbolize=%d" % (env.get("ASAN_OPTIONS", ""), names)
        if fault or count or stops or clock:
            env["LD_PRELOAD"] = os.path.join(given.folder, "shim.so")
        if fault:
            env["TRFAULT"] = fault
        if count:
            env["TRFAULT_COUNT"] = count
        if (fault or count) and scenario.after:
            env["TRFAULT_AFTER"] = scenario.after
        if clock:
            env["TRFAULT_CLOCK"] = clock
        if stops:
            env["TRFAULT_STOP"] = "/out"
        command = [program, "batch", "-m", model, "-i", scenario.source, "-o", self.out] + scenario.options
        try:
            p = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=600)
            return p.returncode, p.stderr.decode(errors="replace")
        except subprocess.TimeoutExpired:
            return "hang", ""

    def fresh(self):
        shutil.rmtree(self.folder)
        os.mkdir(self.folder)

    def prepare(self, scenario):
        self.fresh()
        for end, data in (scenario.before or {}).items():
            with open(self.out + end, "wb") as f:
                f.write(data)

    def files(self):
        found = {}
        for end in ("", ".run", ".saved"):
            if os.path.exists(self.out + end):
                with open(self.out + end, "rb") as f:
                    found[end] = f.read()
        return found

    def records(self):
        """What OUT holds: None if it is damaged."""
        if not os.path.exists(self.out):
            return []
        with open(self.out, "rb") as f:
            data = f.read()
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
                if "usage" in r["response"]["body"]:
                    r["response"]["body"]["usage"].pop("prompt_tokens_details", None)
            found.append(json.dumps(r, sort_keys=True))
        return sorted(found)

    def counts(self, scenario, wanted=0):
        """Of a run that nothing disturbs; None: it ended in another way, which only a stop that came too late may do."""
        path = os.path.join(given.folder, "counts")
        if os.path.exists(path):
            os.unlink(path)
        status, text = self.run(scenario, count=path, stops=scenario.stops)
        if status != wanted:
            if scenario.stops and status == 0:
                return None
            sys.exit("%s, undisturbed: exit status %s\n%s" % (scenario.name, status, text))
        with open(path, "rb") as f:
            return dict(zip(kinds, struct.unpack("<%dQ" % len(kinds), f.read())))


def key(record):
    r = json.loads(record)
    return r["custom_id"] or r["error"]["line"]


def out_of_memory(record):
    r = json.loads(record)
    return r["response"] and r["response"]["body"].get("error", {}).get("code") == "out_of_memory"


def sanitizer_said(text):
    """A sanitizer's report in the log: its first lines say what and where."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if "ERROR: " in line and "Sanitizer" in line or "runtime error: " in line:
            return lines[i:i + 25]
    return None


def only_leaks(text):
    """Nothing but leaks: perhaps of those that are known by the name of a function (tests/lsan.supp)."""
    said = sanitizer_said(text)
    return said and "LeakSanitizer" in said[0]


totals = {"cases": 0, "failed": 0, "no memory": 0, "kept": 0}
seen = {}
lock = threading.Lock()
free_places = []


# What OUT.saved may be blamed for is what the fault was.
wrong_blame = {"read": ["out of memory", "is damaged", "it is damaged", "is not what"], "malloc": ["damaged", "Input/output error"]}


def case(scenario, label, fault, allowed):
    with lock:
        place = free_places.pop()
    place.prepare(scenario)
    status, text = place.run(scenario, fault, stops=scenario.stops, names=False)
    if only_leaks(text):
        place.prepare(scenario)
        status, text = place.run(scenario, fault, stops=scenario.stops)
    faults, n_without = [], 0
    about_saved = [l for l in text.split("\n") if ".saved" in l]
    if any(w in l for l in about_saved for w in wrong_blame.get(fault.split(":")[0], [])):
        faults.append("a wrong reason")
    if status not in allowed:
        faults.append("exit status %s, not one of %s" % (status, sorted(allowed)))
    said = [l for l in text.split("\n") if l]
    if status not in (0, "hang") and not (said and said[-1].startswith("trireme: ") and len(said[-1]) > 12):
        faults.append("no message")
    if sanitizer_said(text):
        faults.append("a sanitizer's report")
    if scenario is not mending and place.records() is None:
        faults.append("a torn record")
    kept = "requests have saved tokens" in text or os.path.exists(place.out + ".saved")
    again, more = place.run(scenario, program=finisher)
    now, wanted = place.records(), scenario.whole
    if now is not None and "malloc" in label:
        # One request that got no memory while it ran has a 500 as its record (chat.md 4.1), and keeps it.
        failed = {key(r) for r in now if out_of_memory(r)}
        n_without = len(failed)
        now = [r for r in now if key(r) not in failed]
        wanted = [r for r in wanted if key(r) not in failed]
    if again != 0 or now != wanted:
        faults.append("run again: exit status %s, %s" % (again, "damaged" if now is None else "%d records%s" % (
            len(now), "" if now == wanted else ", others than an undisturbed run's")))
        text += more
    with lock:
        free_places.append(place)
        totals["cases"] += 1
        totals["failed"] += bool(faults)
        totals["no memory"] += n_without
        totals["kept"] += scenario.stops and kept
        row = seen.setdefault(label, {})
        row[status] = row.get(status, 0) + 1
        if faults:
            shown = sanitizer_said(text) or [l for l in text.split("\n")[-6:] if l]
            print("FAILED  %s%s: %s\n%s" % (fault, ", " + scenario.name if scenario.name else "", "; ".join(faults),
                                            "".join("        %s\n" % l for l in shown)), flush=True)


def every(n, most):
    """1..n; with --quick about `most` of them, the first and the last among them."""
    step = max(1, n // most) if given.quick else 1
    return sorted(set(range(1, n + 1, step)) | ({n} if n else set()))


def allocations(n):
    """Almost all allocations are the model's names and the vocabulary; the last ones are the requests."""
    job = max(1, n - 600)
    return sorted(set(every(job, 40)) | {job + i for i in every(n - job, 60)})


def say_counts(what, counts):
    print("%s reaches %s" % (what, ", ".join("%d %s" % (counts[k], k) for k in kinds)), flush=True)


begun = time.time()
place = Place("first")
plain = Scenario("", source, 2)
reached = place.counts(plain)
plain.whole = place.records()
say_counts("a job", reached)
if len(plain.whole) != len(requests) + 1 or not reached["malloc"] or not reached["write"]:
    sys.exit("the undisturbed run made %d records" % len(plain.whole))

# A finished run whose first record was lost and left a stray line: resume writes OUT anew. It is like any run until it opens
# OUT.run: from there on its calls count.
damaged = place.files()
damaged[""] = b"\n".join([b"{}"] + damaged[""].split(b"\n")[1:])
mending = Scenario("resuming a damaged OUT", source, 2, damaged, "/out.run")
mending.whole = plain.whole
place.prepare(mending)
again = place.counts(mending)
if place.records() != plain.whole:
    sys.exit("a damaged OUT was not mended")
say_counts("a resume that writes OUT anew, from OUT.run on,", again)
if not again["rename"]:
    sys.exit("the damaged OUT was not written anew")

# A job that is stopped and saves the tokens of what runs; and one that goes on with them, one request at a time, and is stopped
# when the first of these is done: what it has not come to is carried over. The stop must come before the others have ended, which
# takes more tokens where tokens are faster than threads.
tokens = 250
while True:
    long_source = os.path.join(given.folder, "long-%d.jsonl" % tokens)
    write_long(long_source, tokens)
    stopping = Scenario("stopped", long_source, 6, None, "/out.run", True)
    place.fresh()
    saving = place.counts(stopping, 75)
    saved = place.files()
    if saving and saved.get(".saved"):
        going_on = Scenario("going on with saved tokens, stopped", long_source, 1, saved, "/out.saved", True)
        going_on.options[1] = "2"  # one of them has two choices
        place.prepare(going_on)
        carrying = place.counts(going_on, 75)
        if carrying and place.files().get(".saved"):
            break
    tokens *= 2
    if tokens > 1900:
        sys.exit("no job was stopped before it had ended")
status, text = place.run(going_on)
if status != 0 or os.path.exists(place.out + ".saved"):
    sys.exit("a job that goes on after two stops: exit status %s\n%s" % (status, text))
twice_stopped = place.records()
place.fresh()
status, text = place.run(stopping)
stopping.whole = going_on.whole = place.records()
if status != 0 or twice_stopped != stopping.whole:
    sys.exit("other records after two stops than after none\n%s" % text)
# The wall clock is set a day forward and back again and again: nothing may take that for time that has passed.
for clock in ("86400", "-86400"):
    place.fresh()
    status, text = place.run(stopping, clock=clock)
    if status != 0 or place.records() != stopping.whole or "warning" in text:
        sys.exit("with a wall clock that jumps by %s s: exit status %s\n%s" % (clock, status, text))
    with open(place.out) as f:
        created = [json.loads(line)["response"]["body"]["created"] for line in f]
    if max(created) - min(created) < 80000:
        sys.exit("the wall clock did not jump: %s" % created)
say_counts("a job that is stopped and saves, from OUT.run on,", saving)
say_counts("one that goes on and is stopped again, from OUT.saved on,", carrying)

cases = []
if "malloc" in chosen:
    cases += [(plain, "malloc", "malloc:%d" % n, {0, 71}) for n in allocations(reached["malloc"])]
    cases += [(mending, "resume: malloc", "malloc:%d" % n, {0, 71}) for n in allocations(again["malloc"])]
    cases += [(stopping, "stop: malloc", "malloc:%d" % n, {0, 71, 75}) for n in every(saving["malloc"], 20)]
    cases += [(going_on, "go on: malloc", "malloc:%d" % n, {0, 71, 75}) for n in every(carrying["malloc"], 20)]
if "open" in chosen:
    cases += [(plain, "open", "open:%d" % n, {0, 74}) for n in every(reached["open"], 100)]
if "read" in chosen:
    for n in every(reached["read"], 15):
        cases.append((plain, "read", "read:%d" % n, {0, 74}))
        cases.append((plain, "read, EINTR", "read:%d:%d" % (n, errno.EINTR), {0}))
    cases += [(mending, "resume: read", "read:%d" % n, {0, 74}) for n in every(again["read"], 15)]
    of_saved = sorted({*range(1, min(16, carrying["read"]) + 1), *every(carrying["read"], 4)})  # the first ones are of OUT.saved
    cases += [(going_on, "go on: read", "read:%d" % n, {0, 74, 75}) for n in of_saved]
    cases += [(going_on, "go on: read from then on", "read:%d+" % n, {0, 74, 75}) for n in of_saved[::1 if not given.quick else 4]]
for kind in ("write", "fsync", "truncate"):
    for n in every(reached[kind], 100) if kind in chosen else []:
        cases.append((plain, kind + " once", "%s:%d" % (kind, n), {0, 74}))
        cases.append((plain, kind + " from then on", "%s:%d+:%d" % (kind, n, errno.ESTALE), {74}))
        if kind == "fsync":  # where NFS says that the quota is used up
            cases.append((plain, "fsync, EDQUOT", "fsync:%d:%d" % (n, errno.EDQUOT), {0, 74}))
        if kind == "write":
            cases.append((plain, "write, ENOSPC", "write:%d:%d" % (n, errno.ENOSPC), {0, 74}))
            cases.append((plain, "write, EDQUOT", "write:%d:%d" % (n, errno.EDQUOT), {0, 74}))
            cases.append((plain, "write, EINTR", "write:%d:%d" % (n, errno.EINTR), {0}))
for kind in ("open", "write", "fsync", "rename", "truncate"):
    if kind in chosen:
        cases += [(mending, "resume: " + kind, "%s:%d:%d" % (kind, n, errno.ESTALE), {0, 74}) for n in every(again[kind], 100)]
        cases += [(stopping, "stop: " + kind, "%s:%d:%d" % (kind, n, errno.ESTALE), {0, 74, 75}) for n in every(saving[kind], 8)]
        cases += [(going_on, "go on: " + kind, "%s:%d:%d" % (kind, n, errno.ENOSPC), {0, 74, 75}) for n in every(carrying[kind], 8)]

free_places = [Place("place-%d" % i) for i in range(given.jobs)]
with concurrent.futures.ThreadPoolExecutor(given.jobs) as pool:
    for done in concurrent.futures.as_completed([pool.submit(case, *c) for c in cases[i_part::n_parts]]):
        done.result()

# What a full disk is, a used up quota is too: records wait for room, all but the very first writes.
if not given.quick and n_parts == 1 and seen.get("write, ENOSPC") != seen.get("write, EDQUOT"):
    sys.exit("a used up quota is not taken as a full disk is: %s, %s" % (seen["write, EDQUOT"], seen["write, ENOSPC"]))

for label, row in seen.items():
    print("%-24s %s" % (label, ", ".join("%d x exit %s" % (row[s], s) for s in sorted(row, key=str))))
print("%d requests had no memory and say so in their record" % totals["no memory"])
print("%d jobs that a fault and a stop ended had saved tokens" % totals["kept"])
print("%d faults, %d failed, %.0f s" % (totals["cases"], totals["failed"], time.time() - begun))
sys.exit(1 if totals["failed"] else 0)
