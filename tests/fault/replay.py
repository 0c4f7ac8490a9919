"""Crash states of the journal. A run is logged (shim.c): every write, truncation, rename, creation and sync of OUT and what
lies beside it. From the log every state is built that a crash may leave: for each moment of the run, and for what was not
synced by then, each write whole, absent, cut at every 512-byte boundary and in front of its last byte, zeros up to there (its
blocks reach the disk in any order), or zeros; truncations and names done or not. Where four records at most are open at a time
every combination of these is tried, elsewhere every two.
The journal must accept each, count every record that was synced, and none that is not whole.

usage: replay.py RESUME_STATE SHIM.so FOLDER     FOLDER is scratch; in memory, or it takes minutes
"""
import itertools
import os
import subprocess
import sys
import time

program, shim, folder = sys.argv[1:4]
N, BLOCK = 20, 512
begun = time.time()


class Op:
    def __init__(self, what, path, other, at, data):
        self.what, self.path, self.other, self.at, self.data = what, path, other, at, data


def read_log(path):
    raw, i, ops = open(path, "rb").read(), 0, []
    while i < len(raw):
        end = raw.index(b"\n", i)
        what, name, other, at, n = raw[i:end].decode().split("\t")
        i = end + 1
        data = raw[i:i + int(n)]
        i += int(n)
        ops.append(Op(what, name, other, int(at), data))
    return ops


class Disk:
    """Files by number, names that point to them."""

    def __init__(self, other=None):
        self.names = dict(other.names) if other else {}
        self.files = {k: bytearray(v) for k, v in other.files.items()} if other else {}

    def apply(self, op, how="whole"):
        if op.what == "create":
            self.names[op.path] = op.file
            self.files.setdefault(op.file, bytearray())
        elif op.what == "rename":
            if op.path in self.names:
                self.names[op.other] = self.names.pop(op.path)
        elif op.what == "unlink":
            self.names.pop(op.path, None)
        elif op.what == "truncate":
            f = self.files[op.file]
            f[:] = f[:op.at] + b"\0" * (op.at - len(f))
        elif op.what == "write":
            data = op.data
            if how == "zeros":
                data = b"\0" * len(data)
            elif how != "whole" and how < 0:
                data = b"\0" * -how + data[-how:]
            elif how != "whole":
                data = data[:how]
            f = self.files[op.file]
            if len(f) < op.at:
                f += b"\0" * (op.at - len(f))
            f[op.at:op.at + len(data)] = data


def number(ops, disk):
    """Give every operation the file that its path stood for when it happened."""
    names, next_file = dict(disk.names), 1 + max([0] + list(disk.files))
    for op in ops:
        if op.what == "create":
            names[op.path] = next_file
            next_file += 1
        op.file = names.get(op.path)
        if op.what == "rename":
            names[op.other] = names.pop(op.path)
        elif op.what == "unlink":
            names.pop(op.path, None)


NAMES = ("create", "rename", "unlink")


def pending(ops, k):
    """Of the first k operations, those that no sync has made durable: data until its file is synced, names until their
    folder is (a file's first sync does not promise its name)."""
    left = []
    for op in ops[:k]:
        if op.what == "sync":
            is_folder = op.path == folder_of_out
            left = [o for o in left if (o.what not in NAMES if is_folder else o.what in NAMES or o.file != op.file)]
        else:
            left.append(op)
    return left


def ways(op):
    """How an operation that was not synced may have come out, but whole."""
    if op.what != "write":
        return ["absent"]
    cuts = {c - op.at for c in range((op.at // BLOCK + 1) * BLOCK, op.at + len(op.data), BLOCK)}
    return ["absent", "zeros"] + sorted(cuts | {len(op.data) - 1}) + sorted(-c for c in cuts if c > 0)


def states(ops, combined):
    """(moment, disk) for every state of interest, each once: everything from one operation on is absent, and, of those before
    it, no more than two come out otherwise than whole (combined: any number of them)."""
    seen = set()
    for k in range(len(ops) + 1):
        left = pending(ops, k)
        plans = [{}]
        for i, op in enumerate(left):
            plans += [{id(op): how} for how in ways(op)]
            plans.append({id(o): "absent" for o in left[i:]})
            plans += [dict([(id(o), "absent") for o in left[i + 1:]] + [(id(op), how)]) for how in ways(op)]
        if k < len(ops) and ops[k].what != "sync":
            pass  # the most is open just before a sync
        elif combined:
            for hows in itertools.product(*[["whole"] + ways(op) for op in left]):
                plans.append(dict(zip(map(id, left), hows)))
        else:
            for a, b in itertools.combinations(left, 2):
                plans += [{id(a): x, id(b): y} for x in ways(a) for y in ways(b)]
        for plan in plans:
            disk = Disk(start)
            for op in ops[:k]:
                if op.what == "sync" or plan.get(id(op)) == "absent":
                    continue
                if op.what != "create" and op.what in NAMES and op.path not in disk.names:
                    continue # its creation is absent
                if op.what in ("write", "truncate"):
                    disk.files.setdefault(op.file, bytearray())
                disk.apply(op, plan.get(id(op), "whole"))
            print_of = tuple(sorted((n, bytes(disk.files[f])) for n, f in disk.names.items()))
            if (k, print_of) not in seen:
                seen.add((k, print_of))
                yield k, disk


def whole_records(data):
    lines = data.split(b"\n")[:-1]
    return sorted({index[l] for l in lines if l in index})


def synced_records(ops, k):
    """Those that a sync of OUT had made durable before operation k. (At a rename: those of the synced file that took the name.)"""
    disk = Disk(start)
    durable = whole_records(bytes(disk.files.get(disk.names.get(out), b"")))
    for op in ops[:k]:
        if op.what == "sync" and op.path == out:
            durable = whole_records(bytes(disk.files[disk.names[out]]))
        elif op.what != "sync":
            disk.apply(op)
    return durable


def scenario(name, before, sync_lines, combined=False):
    """before: bytes of OUT when the logged run begins (OUT.run beside it), or None for nothing at all."""
    global start, out, folder_of_out
    work = os.path.join(folder, name)
    os.mkdir(work)
    folder_of_out, out = work, os.path.join(work, "out")
    start = Disk()
    if before is not None:
        subprocess.run([program, "write", out, "0", "64"], check=True)
        with open(out, "wb") as f:
            f.write(before)
        for i, n in enumerate((out, out + ".run"), 1):
            start.names[n] = i
            start.files[i] = bytearray(open(n, "rb").read())
    log = os.path.join(folder, name + ".log")
    env = dict(os.environ, LD_PRELOAD=shim, TRFAULT_LOG=log, TRFAULT_LOG_PATH=out)
    subprocess.run([program, "write", out, str(N), str(sync_lines)], check=True, env=env)
    ops = read_log(log)
    number(ops, start)
    last = Disk(start)
    for op in ops:
        if op.what != "sync":
            last.apply(op)
    if bytes(last.files[last.names[out]]) != open(out, "rb").read():
        sys.exit("%s: the log does not give the file that the run left" % name)

    # One process checks them all; each state has a folder of its own for a moment.
    checker = subprocess.Popen([program, "check", str(N)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    n_states = n_bad = 0
    must = {k: set(synced_records(ops, k)) for k in range(len(ops) + 1)}
    if must[len(ops)] != set(range(N)):
        sys.exit("%s: the run ended with records that were not synced" % name)
    if max(sum(op.what == "write" and op.path == out for op in pending(ops, k)) for k in must) > sync_lines:
        sys.exit("%s: more than %d records were not synced at some moment" % (name, sync_lines))
    place = os.path.join(folder, "state")
    for k, disk in states(ops, combined):
        n_states += 1
        os.mkdir(place)
        content = b""
        for path, f in disk.names.items():
            with open(os.path.join(place, os.path.basename(path)), "wb") as g:
                g.write(disk.files[f])
            if path == out:
                content = bytes(disk.files[f])
        checker.stdin.write(os.path.join(place, "out") + "\n")
        checker.stdin.flush()
        said = checker.stdout.readline().strip()
        wanted = whole_records(content)
        if said != " ".join(map(str, wanted)) or not must[k] <= set(wanted):
            n_bad += 1
            if n_bad <= 5:
                print("FAILED  %s, moment %d of %d (%s): found [%s], whole are %s, synced were %s; %s" % (
                    name, k, len(ops), ops[k].what if k < len(ops) else "end", said, wanted, sorted(must[k]),
                    ", ".join("%s %d bytes" % (os.path.basename(p), len(disk.files[f])) for p, f in disk.names.items())))
        for n in os.listdir(place):
            os.unlink(os.path.join(place, n))
        os.rmdir(place)
    checker.stdin.close()
    checker.wait()
    print("%-10s %3d operations, %5d states, %d bad" % (name, len(ops), n_states, n_bad))
    return n_states, n_bad


text = subprocess.run([program, "print", str(N)], check=True, stdout=subprocess.PIPE).stdout
lines = text.split(b"\n")[:-1]
index = {l: i for i, l in enumerate(lines)}
if len(index) != N:
    sys.exit("%d records instead of %d" % (len(index), N))
upto = [sum(len(l) + 1 for l in lines[:i]) for i in range(N + 1)]
hole = bytearray(text[:upto[9]])
hole[upto[3] + 10:upto[4] + 100] = b"\0" * (upto[4] + 90 - upto[3])
results = [
    scenario("groups", None, 6),
    scenario("all", None, 4, True),
    scenario("one-group", None, 64),
    scenario("torn", text[:upto[8] + 77], 8),
    scenario("holes", bytes(hole) + text[upto[9]:upto[9] + 50], 8),
    scenario("empty", b"", 8),
]
n, bad = sum(r[0] for r in results), sum(r[1] for r in results)
print("%d states, %d bad, %.1f s" % (n, bad, time.time() - begun))
sys.exit(1 if bad or n < 1000 else 0)
