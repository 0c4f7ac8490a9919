"""Exports of tests/test_profile_command.sh in the folder given: c.json c1.json cz.json h.json h3.json tau csv, of 4 ranks, 3 layers,
6 steps with a trace; r.json of a real run where there was one. Prints what is wrong and ends with 1; says which consumers are
not installed."""
import ast
import collections
import csv
import itertools
import json
import os
import re
import sys

folder = sys.argv[1]
N_RANKS, N_LAYERS, N_STEPS, N_EXPERTS = 4, 3, 6, 8


def path(name):
    return os.path.join(folder, name)


def load(name):
    with open(path(name), encoding="utf-8") as f:
        return json.load(f)


# What the Trace Event Format asks of an event, by its phase.
EVENT = {
    "type": "object",
    "required": ["ph", "pid", "tid"],
    "properties": {
        "ph": {"enum": ["B", "E", "C", "M", "b", "e"]},
        "pid": {"type": "integer", "minimum": 0},
        "tid": {"type": "integer", "minimum": 0},
        "ts": {"type": "number"},
        "name": {"type": "string", "minLength": 1},
        "cat": {"type": "string"},
        "id": {"type": ["integer", "string"]},
        "args": {"type": "object"},
    },
    "additionalProperties": False,
    "allOf": [
        {"if": {"properties": {"ph": {"enum": ["B", "E", "C", "b", "e"]}}}, "then": {"required": ["ts"]}},
        {"if": {"properties": {"ph": {"enum": ["B", "C", "M", "b", "e"]}}}, "then": {"required": ["name"]}},
        {"if": {"properties": {"ph": {"enum": ["C", "M"]}}}, "then": {"required": ["args"]}},
        {"if": {"properties": {"ph": {"enum": ["b", "e"]}}}, "then": {"required": ["id", "cat"]}},
        {"if": {"properties": {"ph": {"const": "C"}}},
         "then": {"properties": {"args": {"minProperties": 1, "additionalProperties": {"type": "number"}}}}},
    ],
}
TRACE = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "traceEvents": {"type": "array", "items": EVENT},
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "otherData": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


def check_pairs(events):
    """Every begin has its end, in brackets, on its thread; the same of async events by id and name."""
    open_, last, pairs = collections.defaultdict(list), {}, collections.Counter()
    flying = collections.Counter()
    for e in events:
        line = (e["pid"], e["tid"])
        if e["ph"] == "B":
            assert e["ts"] >= last.get(line, e["ts"]), "events of a thread go back in time"
            last[line] = e["ts"]
            open_[line].append(e)
        elif e["ph"] == "E":
            assert open_[line], "an end without a begin"
            assert e["ts"] >= open_[line][-1]["ts"], "it ends before it begins"
            last[line] = e["ts"]
            pairs[open_[line].pop()["name"].split()[0]] += 1
        elif e["ph"] in "be":
            flying[(e["id"], e["name"])] += 1 if e["ph"] == "b" else -1
            assert flying[(e["id"], e["name"])] >= 0
    assert not any(open_.values()), "a begin without an end"
    assert not any(flying.values()), "an async begin without an end"
    return pairs


def check_chrome():
    try:
        import jsonschema
    except ImportError:
        jsonschema = None
        print("skipped: the trace's schema: no jsonschema for python3")
    names = ["c.json", "c1.json", "cz.json"] + (["r.json"] if os.path.exists(path("r.json")) else [])
    for name in names:
        trace = load(name)
        if jsonschema:
            jsonschema.validate(trace, TRACE)
        pairs = check_pairs(trace["traceEvents"])
        if name == "cz.json":
            assert not pairs, "a run without steps has none"
        else:
            assert pairs["step"] > 0, pairs
    events = load("c.json")["traceEvents"]
    pairs = check_pairs(events)
    assert pairs["step"] == 2 * N_RANKS * N_STEPS, pairs  # once by /steps, once by /trace
    assert pairs["layer"] == N_RANKS * N_STEPS * N_LAYERS, pairs
    assert pairs["main"] == N_RANKS, pairs
    for rank in range(N_RANKS):  # longer than its row can say, and still around everything
        mine = [e for e in events if e["pid"] == rank and e["ph"] in "BE"]
        line = next(e["tid"] for e in mine if e.get("name") == "main")
        mine = [e for e in mine if e["tid"] == line]
        assert mine[0]["name"] == "main" and mine[0]["args"] == {}, mine[0]
        depth = list(itertools.accumulate(1 if e["ph"] == "B" else -1 for e in mine))
        assert min(depth[:-1]) > 0 and depth[-1] == 0, "the stream's root ends before what is in it"
    named = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert named == set(range(N_RANKS + 1)), "one process per rank, one of requests"


def walk(nodes):
    for node in nodes:
        yield node
        yield from walk(node["children"])


def check_hatchet():
    with open(path("h.json"), encoding="utf-8") as f:
        text = f.read()
    tree = json.loads(text)
    assert ast.literal_eval(text) == tree, "no Python literal"
    nodes = list(walk(tree))
    assert [n["frame"]["name"] for n in tree] == ["main", "writer"]
    assert len(nodes) == 4 + 7 * N_LAYERS + 4
    keys = set(nodes[0]["metrics"])
    for n in nodes:
        assert set(n) == {"frame", "metrics", "children"} and set(n["frame"]) == {"name", "type"}
        assert set(n["metrics"]) == keys
        below = sum(c["metrics"]["time (inc)"] for c in n["children"])
        assert abs(n["metrics"]["time"] + below - n["metrics"]["time (inc)"]) < 1e-6, n["frame"]
    mean = {n["frame"]["name"]: n["metrics"] for n in nodes}
    last = {n["frame"]["name"]: n["metrics"] for n in walk(load("h3.json"))}
    assert abs(mean["mla_decode"]["max time (inc)"] - last["mla_decode"]["time"]) < 1e-9
    assert mean["mla_decode"]["max rank"] == N_RANKS - 1
    try:
        import hatchet
    except ImportError:
        print("skipped: loading the tree in Hatchet: hatchet is not installed")
        return
    frame = hatchet.GraphFrame.from_literal(tree)
    assert len(frame.dataframe) == len(nodes)


def check_tau():
    """As TAU's and Hatchet's readers do: a count, a head with the metric, quoted names, whole numbers."""
    files = sorted(os.listdir(path("tau")))
    assert files == sorted(f"profile.{r}.0.{t}" for r in range(N_RANKS) for t in range(2)), files
    for name in files:
        with open(path("tau/" + name), encoding="utf-8") as f:
            lines = f.read().splitlines()
        n, kind = lines[0].split()
        assert kind == "templated_functions_MULTI_TIME"
        assert re.match(r"# (.*) #", lines[1]).group(1) == "Name Calls Subrs Excl Incl ProfileCalls"
        assert re.search(r"<value>(.*?)</value>", lines[1]).group(1) == "TIME"
        flat, paths = {}, {}
        for line in lines[2:2 + int(n)]:
            m = re.fullmatch(r'"([^"]*)" (\d+) (\d+) (\d+) (\d+) 0 GROUP="([^"]+)"', line)
            assert m, line
            numbers = [int(v) for v in m.groups()[1:5]]
            assert numbers[3] >= numbers[2], "inclusive time is less than exclusive"
            if "=>" in m.group(1):
                assert "TAU_CALLPATH" in m.group(6)
                paths[tuple(p.strip() for p in m.group(1).split("=>"))] = numbers
            else:
                flat[m.group(1)] = numbers
        root = "main" if name.endswith(".0.0") else "writer"
        assert next(iter(flat)) == root, "the first line is the stream's root"
        assert abs(sum(v[2] for v in flat.values()) - flat[root][3]) <= len(flat), "exclusive times are the root's time"
        for p in paths:
            assert p[0] == root and (len(p) == 2 or p[:-1] in paths), p
        assert lines[2 + int(n)] == "0 aggregates"
        events = int(re.fullmatch(r"(\d+) userevents", lines[3 + int(n)]).group(1))
        assert len(lines) == 5 + int(n) + events


def table(name):
    with open(path(f"csv/{name}.csv"), newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))
    assert all(len(r) == len(rows[0]) for r in rows), f"{name}: rows of different lengths"
    return [dict(zip(rows[0], r)) for r in rows[1:]]


def check_csv():
    rows = {  # table: rows, and columns that users' scripts name
        "ranks": (N_RANKS, "present rank tp dp pp cp ep host clock_offset_ns"),
        "regions": (N_RANKS * (8 + 7 * N_LAYERS), "rank path name kind layer count time_incl_ns time_excl_ns bytes flops"),
        "steps": (N_RANKS * N_STEPS, "rank step t0_ns t1_ns mode tok_prefill tok_decode queue"),
        "requests": (3, "line t_arrive_ns t_first_ns t_done_ns n_prompt n_out finish"),
        "comm": (2 * N_RANKS, "rank group op calls bytes time_ns exposed_ns"),
        "matrix": (N_RANKS * (N_RANKS - 1), "group from to bytes"),
        "overlap": (N_RANKS * N_LAYERS, "rank layer gatherK_ns exposedK_ns"),
        "experts": (N_LAYERS * N_EXPERTS, "layer expert tokens"),
        "rank_tokens": (N_RANKS * N_LAYERS, "rank layer tokens"),
        "trace": (N_RANKS * (N_STEPS * (N_LAYERS + 1) + 1), "stream rank region step t0_ns dur_ns bytes"),
        "log": (1, "line text"),
        "groups": (2, "id name size members"),
        "memory": (N_RANKS * 5, "rank t_ns weights kv free"),
        "counters": (N_RANKS * 5, "source name rank t_ns value units"),
    }
    for name, (n, columns) in rows.items():
        t = table(name)
        assert len(t) == n, f"{name}: {len(t)} rows, not {n}"
        for c in columns.split():
            assert c in t[0], f"{name}: no column {c}"
    for name in ("run", "phases", "balance", "kv", "io", "phase_counters", "counters_absent"):
        table(name)
    run = {(r["object"], r["name"]): r["value"] for r in table("run")}
    assert run[("/run", "command_line")] == 'trireme batch "quoted", comma'
    assert run[("/run/env", "OMP_NUM_THREADS")] == "1"
    for t in table("trace"):
        assert 0 <= int(t["region"]) < 8 + 7 * N_LAYERS


check_chrome()
check_hatchet()
check_tau()
check_csv()
