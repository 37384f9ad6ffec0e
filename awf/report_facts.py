"""Sections of the report page about the run as such: budget, grader, machine, how to reproduce."""

from __future__ import annotations

import json
import shlex
from typing import Any

from awf import report_charts as charts
from awf import report_parts as parts
from awf.report_read import Run, is_number, numbers

# Parts of a round's time; the first three overlap within the search.
TIMES = (
  ("time/rollout", "drawing proposals"),
  ("time/evaluate", "running workflows"),
  ("time/grade", "grading answers"),
  ("time/search", "search, all these within"),
  ("time/update", "update"),
  ("time/checkpoint", "checkpoint"),
)


def to_copy(name: str, text: str) -> str:
  """Text under its name, with a button that the script makes work."""
  head = f'<h4>{parts.esc(name)} <button class="copy" type="button" hidden>copy</button></h4>'
  return f'<div class="copied">{head}<div class="card">{parts.code(text)}</div></div>'


GRADER = {  # what the counters of parts.json mean (`awf.tasks.counted`)
  "graded": "verdicts",
  "right": "right",
  "malformed": "malformed: nothing could be read",
  "timeouts": "time-outs of code or of a comparison",
  "errors": "errors of the grader: no verdict",
  "seconds": "seconds at work",
}


def step_seconds(run: Run) -> dict[str, float]:
  """Seconds of all rounds by part."""
  out: dict[str, float] = {}
  for row in run.timings:
    for name, value in row.items():
      if name.startswith("time/") and is_number(value):
        out[name] = out.get(name, 0.0) + value
  return out


def budget(run: Run) -> str:
  """Where tokens and time went."""
  out = ""
  notes = [note for search in run.searches for note in search.rounds]
  total = sum(note["tokens"] for note in notes if is_number(note.get("tokens")))
  calls = sum(note["calls"] for note in notes if is_number(note.get("calls")))
  if total:
    tokens: list[tuple[str, float]] = [
      ("proposals", run.proposal_tokens),
      ("workflows", total - run.proposal_tokens),
    ]
    whole = run.summary.get("tokens")
    if is_number(whole) and whole > total:
      tokens.append(("comparison, test", whole - total))
    everything = sum(value for _, value in tokens) or 1
    rows = [
      (name, max(0.0, value), f"{parts.number(value)} ({100 * value / everything:.0f} %)")
      for name, value in tokens
    ]
    out += "<h3>Tokens generated</h3>" + parts.card(charts.bars(rows))
    out += parts.note(f"{parts.number(calls)} model calls in the search; results shared by equal "
                      "calls count once.")  # fmt: skip
  seconds = step_seconds(run)
  whole_time = seconds.get("time/step", 0.0)
  if whole_time:
    rows = [
      (text, seconds[name], f"{seconds[name]:,.1f} s ({100 * seconds[name] / whole_time:.0f} %)")
      for name, text in TIMES if seconds.get(name)
    ]  # fmt: skip
    out += "<h3>Time</h3>" + parts.card(charts.bars(rows))
    out += parts.note("Shares of the rounds' time. Proposals are drawn and answers graded while "
                      "workflows run: these times overlap.")  # fmt: skip
  return out


def grading(run: Run) -> str:
  """What the grader said of the answers, each of a workflow on a problem once."""
  seen: dict[tuple[str, str], float] = {}
  unread: set[tuple[str, str]] = set()
  broken: set[tuple[str, str]] = set()
  for search in run.searches:
    for node in search.tree.nodes.values():
      key = node.canonical or f"{search.name} {node.id}"
      seen |= {(key, problem): score for problem, score in node.scores.items()}
      for entry in node.log:
        if entry.output.startswith("failed: "):
          broken.add((key, entry.problem))
        elif not entry.extracted:
          unread.add((key, entry.problem))
  if not seen:
    return ""
  right, wrong = sum(s >= 1 for s in seen.values()), sum(s <= 0 for s in seen.values())
  rows = [
    ("answers graded", len(seen)),
    ("right", right),
    ("partly right", len(seen) - right - wrong),
    ("wrong", wrong),
    ("kept failures: the workflow ended with an error", len(broken)),
    ("kept failures: no answer could be read", len(unread)),
  ]
  lost = sum(
    node.failure is not None and node.failure.kind == "infrastructure"
    for search in run.searches for node in search.tree.nodes.values()
  )  # fmt: skip
  rows.append(("proposals lost to the infrastructure", lost))
  shown = [(name, parts.number(count)) for name, count in rows]
  table = parts.table(("answers", "number"), shown, numeric=(1,))
  return f"<div><h3>Answers of the search</h3>{parts.card(table)}</div>"


def machine(run: Run) -> str:
  """Counters of the grader, the sandbox, the workflows and the sampler."""
  counted = numbers(run.parts.get("grader"))
  rows = [(text, parts.number(counted[name])) for name, text in GRADER.items() if name in counted]
  table = parts.card(parts.table(("counter", "value"), rows, (1,))) if rows else ""
  shown = [grading(run), f"<div><h3>Grader</h3>{table}</div>" if table else ""]
  for title in ("sandbox", "workflows", "sampler"):
    counters = dict(numbers(run.parts.get(title)))
    layers = numbers(counters.pop("layers", None))
    rows = [
      (name, parts.number(value) if is_number(value) else value) for name, value in _flat(counters)
      if name
    ]  # fmt: skip
    for text, wanted in (("layers on", True), ("layers off", False)):
      named = sorted(name for name, is_on in layers.items() if is_on is wanted)
      if named:
        rows.insert(0, (text, ", ".join(named)))
    if rows:
      table = parts.table(("counter", "value"), rows)
      shown.append(f"<div><h3>{title.capitalize()}</h3>{parts.card(table)}</div>")
  if not any(shown):
    return ""
  text = "All but the first table: since the process started that wrote this page last."
  is_counted = any(shown[1:])
  return f'<div class="charts">{"".join(shown)}</div>' + (parts.note(text) if is_counted else "")


def backups(run: Run) -> str:
  """What the newest backup is, and why there is no newer one."""
  status = run.backup
  rows = [
    (title, parts.number(value) if isinstance(value, int | float) else value)
    for title, value in (
      ("newest", status.get("path")),
      ("made", status.get("when")),
      ("checkpoint", status.get("step")),
      ("megabytes", status.get("megabytes")),
      ("seconds", status.get("seconds")),
      ("backups made", status.get("count")),
      ("failed", status.get("failures")),
      ("last failure", status.get("failed")),
    )
    if value not in (None, "")
  ]
  if rows:
    return parts.card(parts.table(("backup", ""), rows))
  target = numbers(numbers(run.record.get("config")).get("backup")).get("path")
  return parts.note("No backup yet." if target not in (None, "", "off") else
                    "None: set config.backup.path to have them.") if run.record else ""  # fmt: skip


def reproduce(run: Run) -> str:
  """The commands that make this run again, and what must be equal."""
  command, commit = run.record.get("command"), run.record.get("commit")
  if not isinstance(command, str) or not command:
    return ""
  lines = [f"git checkout {shlex.quote(str(commit))}"] if commit else []
  lines.append(command)
  config = numbers(run.record.get("config"))
  versions = numbers(run.record.get("versions"))
  facts = [
    (name, value)
    for name, value in (
      ("seed", config.get("seed")),
      ("backend", run.record.get("backend")),
      ("base model", run.record.get("base_fingerprint")),
      ("versions", ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))),
      ("changes of the config on the way", json.dumps(run.record.get("changes") or "none")),
    )
    if value not in (None, "")
  ]
  strict = numbers(config.get("sampler")).get("strict") is True
  text = (
    "In strict mode the files become the same, byte for byte, on the same machine."
    if strict
    else "Without strict mode a run agrees with another one statistically."
  )
  return (
    to_copy("commands", "\n".join(lines))
    + (parts.card(parts.table(("what", ""), facts)) if facts else "")
    + parts.note(text)
  )


def _flat(value: Any, name: str = "") -> list[tuple[str, Any]]:
  if isinstance(value, dict):
    return [
      row for key in sorted(value, key=str) for row in _flat(value[key], f"{name}.{key}".strip("."))
    ]
  return [(name, value)]


def configuration(run: Run) -> str:
  out = ""
  for key in ("config", "versions", "devices"):
    value = run.record.get(key)
    if isinstance(value, dict) and value:
      rows = [(name, json.dumps(field)) for name, field in _flat(value)]
      out += parts.details(key, parts.table(("field", "value"), rows))
  return out
