#!/usr/bin/env python3
"""answers.py IN OUT: print each request of a batch input beside its answer, shortened, in input order."""

import json
import re
import sys


def short(text, width):
    text = " ".join(str(text).split())
    return text if len(text) <= width else text[: width * 2 // 3] + " ... " + text[-(width // 3 - 5) :]


def question(body):
    if "messages" in body:
        last = body["messages"][-1] if body["messages"] else {}
        said = last.get("content") or ""
        if isinstance(said, list):
            said = "".join(part.get("text", "") for part in said)
        lines = said.splitlines() or [""]
        who = "" if last.get("role") == "user" else f"({last.get('role')}) "
        return who + ("... " if len(lines) > 1 else "") + short(lines[-1], 64)
    prompt = body.get("prompt")
    if prompt is None:
        return "(no question)"
    return f"[{len(prompt)} token ids]" if isinstance(prompt, list) else short(prompt, 64)


def tokens(record):
    usage = ((record or {}).get("response") or {}).get("body", {}).get("usage")
    return f" ({usage['prompt_tokens']} + {usage['completion_tokens']} tokens)" if usage else ""


def calls_in(text):
    """Tool calls that stand in the text, in the model's own notation."""
    for call in re.split(r"(?=<｜DSML｜invoke )", text)[1:]:
        name = re.match(r'<｜DSML｜invoke name="([^"]*)"', call)
        if not name:  # cut off
            continue
        values = re.findall(r'<｜DSML｜parameter name="([^"]*)"[^>]*>(.*?)</｜DSML｜parameter>', call, re.S)
        yield name.group(1), dict(values)


def answers(request, record):
    """One line per choice."""
    if record is None:
        return ["(no record: run again to continue)"]
    if record.get("error"):
        return [f"error: {record['error'].get('message')}"]
    body = record["response"]["body"]
    if "error" in body:
        return [f"refused: {body['error'].get('message')}"]
    lines = []
    for choice in body["choices"]:
        message = choice.get("message", {})
        text = choice.get("text", message.get("content") or "")
        if message.get("reasoning_content"):
            lines.append("(thinks) " + short(message["reasoning_content"], 76))
        for call in message.get("tool_calls") or []:
            lines.append(f"(calls) {call['function']['name']} {call['function']['arguments']}")
        scores = (choice.get("logprobs") or {}).get("token_logprobs")
        known = [s for s in scores or [] if s is not None]
        if request["body"].get("echo") and known:
            text = f"{len(known)} tokens scored, mean log-probability {sum(known) / len(known):.3f}"
        for name, values in calls_in(text):
            lines.append(f"(calls) {name} {json.dumps(values, ensure_ascii=False)}")
        text = text.split("<｜DSML｜function_calls>")[0]
        if text.strip():
            lines.append(short(text, 86))
    return lines or ["(empty)"]


def records_in(lines):
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:  # the last one of a job that was killed
            continue


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: answers.py IN OUT")
    with open(sys.argv[1], encoding="utf-8") as f:
        requests = [json.loads(line) for line in f if line.strip()]
    with open(sys.argv[2], encoding="utf-8") as f:
        records = {r["custom_id"]: r for r in records_in(f)}
    for request in requests:
        record = records.get(request["custom_id"])
        print(f"{request['custom_id']}{tokens(record)}: {question(request['body'])}")
        for line in answers(request, record):
            print("    " + line)


if __name__ == "__main__":
    main()
