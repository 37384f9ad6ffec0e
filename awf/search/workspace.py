"""AFlow's workspace on disk: files that AFlow reads, and AFlow's own rounds read here.

`<root>/<Dataset>/workflows/` holds template/, round_N/, results.json and processed_experience.json
as AFlow defines them; `<root>/<Dataset>/journal.jsonl` is our own: the search's events. All files
are written atomically, and all but the wall-clock stamps that AFlow's formats ask for are a
function of the events.

Source: FoundationAgents/AFlow, `scripts/optimizer_utils/` and `benchmarks/benchmark.py` (file
formats only).
"""

from __future__ import annotations

import csv
import datetime
import functools
import io
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awf.files import write_atomic
from awf.search import adopt
from awf.search.adopt import ADOPTED
from awf.search.stages import LOGGED_BELOW, Trial
from awf.search.template import template_files
from awf.search.tree import NO_NODE, Node, Tree
from awf.types import Problem, WorkflowSource, price
from awf.workflow.contract import graph_header

_INPUTS_COLUMN = ("HumanEval", "MBPP", "DROP")  # data sets whose CSV calls the question `inputs`


# Hundreds of files a round, 3 ms of disk each; what a resumed search needs is in its checkpoint.
_write = functools.partial(write_atomic, is_durable=False)


def _dump(data: Any) -> str:
  return json.dumps(data, indent=4, ensure_ascii=True, allow_nan=False) + "\n"


class Workspace:
  """The files of one data set's search.

  Attributes:
    is_kept: False where another process writes them: then they are only read.
  """

  is_kept = True

  def __init__(
    self,
    root: Path | str,
    dataset: str,
    operators: tuple[str, ...],
    prices: tuple[float, float] = (0.0, 0.0),
  ):
    self.path = Path(root) / dataset / "workflows"
    self.journal = Path(root) / dataset / "journal.jsonl"
    self.dataset = dataset
    self._operators = operators  # that are offered to the optimiser
    self._prices = prices  # of the executor: USD of a million prompt and generated tokens

  def round_path(self, id: int) -> Path:
    return self.path / f"round_{id}"

  def round_ids(self) -> list[int]:
    return adopt.round_ids(self.path)

  def prepare(self, events: Sequence[Mapping[str, Any]], tree: Tree) -> None:
    """Makes the files agree with the search's events: used when a search starts and when one is
    resumed.

    Rounds that are newer than the events (an interrupted run had gone on) are removed, missing ones
    are written.
    """
    if not self.is_kept:
      return
    for name, text in template_files(self._operators, self.dataset).items():
      _write(self.path / "template" / name, text)
    for id in self.round_ids():
      if id not in tree.nodes:
        shutil.rmtree(self.round_path(id))
    _write(self.journal, "".join(json.dumps(e, allow_nan=False) + "\n" for e in events))
    for node in tree.nodes.values():
      if node.source.graph and not (self.round_path(node.id) / "graph.py").exists():
        self.write_round(node, ())
    for node in tree.nodes.values():
      if not (ADOPTED in node.scores and (self.round_path(node.id) / "experience.json").exists()):
        self.write_experience(node)

  def commit(
    self,
    events: Sequence[Mapping[str, Any]],
    tree: Tree,
    trials: Mapping[int, Sequence[Trial]],
    stages: tuple[str, ...],
  ) -> None:
    """Writes what a round of the search added.

    Args:
      events: the new events, appended to the journal.
      trials: node id -> trials of its evaluation in this round; nodes without one stay as they are.
      stages: stages whose scores enter results.json, that is, whose nodes can be selected.
    """
    if not self.is_kept:
      return
    for id in sorted(trials):
      if tree.nodes[id].source.graph:
        self.write_round(tree.nodes[id], trials[id])
    for event in events:
      if event["event"] in ("add", "evaluate"):
        id = event["node"]["id"] if event["event"] == "add" else event["id"]
        self.write_experience(tree.nodes[id])
    self.write_index(tree, stages)
    self.journal.parent.mkdir(parents=True, exist_ok=True)
    with open(self.journal, "a", encoding="utf-8") as f:
      f.writelines(json.dumps(e, allow_nan=False) + "\n" for e in events)

  def write_round(self, node: Node, trials: Sequence[Trial]) -> None:
    """graph.py, prompt.py, __init__.py, log.json and the CSV of one evaluation pass."""
    path = self.round_path(node.id)
    for old in path.glob("*.csv"):
      old.unlink()
    header = graph_header(self.dataset, node.id)
    _write(path / "graph.py", header.rstrip("\n") + "\n\n" + node.source.graph + "\n")
    _write(path / "prompt.py", node.source.prompt + "\n")
    _write(path / "__init__.py", "")
    log = [_log_entry(t) for t in trials if t.score < LOGGED_BELOW]
    if log:
      _write(path / "log.json", _dump(log))
    elif trials:
      (path / "log.json").unlink(missing_ok=True)  # of an evaluation on other problems
    if any(not math.isnan(t.score) for t in trials):
      stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
      score = node.score if node.evaluated else 0.0
      _write(path / f"{score:.5f}_{stamp}.csv", self._csv(trials))

  def write_experience(self, node: Node) -> None:
    if node.parent != NO_NODE and node.source.graph and not math.isnan(node.before):
      _write(self.round_path(node.id) / "experience.json", _dump(_experience(node)))

  def _csv(self, trials: Sequence[Trial]) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    question = "inputs" if self.dataset in _INPUTS_COLUMN else "question"
    columns = [question, *(["context"] if self.dataset == "HotpotQA" else [])]
    rows.writerow([*columns, "prediction", "expected_output", "score", "cost"])
    cost = 0.0  # AFlow's column is a running sum
    for t in trials:
      if not math.isnan(t.score):
        cost += price((t.prompt_tokens, t.tokens), self._prices)
        asked = [_question(t.problem)]
        if len(columns) > 1:
          asked.append(str(t.problem.hidden.get("context", "")))
        rows.writerow([*asked, t.output, _expected(t.problem), t.score, round(cost, 9)])
    return out.getvalue()

  def write_index(self, tree: Tree, stages: tuple[str, ...]) -> None:
    """results.json (a pass for each selectable round; AFlow's own stay) and the experience."""
    if not self.is_kept:
      return
    data, _ = adopt.read_json(self.path / "results.json")
    old = [row for row in data if isinstance(row, dict)] if isinstance(data, list) else []
    stamps = {
      (r["round"], r["score"]): r["time"] for r in old if {"round", "score", "time"} <= set(r)
    }
    now = datetime.datetime.now().isoformat()
    results = []
    for node in tree.selectable(stages):
      if ADOPTED in node.scores:
        own = [row for row in old if row.get("round") == node.id]
        lost = {"round": node.id, "score": node.score, "avg_cost": 0, "total_cost": 0, "time": now}
        results += own or [lost]
        continue
      stamp = stamps.get((node.id, node.score), now)
      cost = price(node.tokens, self._prices)
      costs = {"avg_cost": round(cost / len(node.scores), 9), "total_cost": round(cost, 9)}
      results.append({"round": node.id, "score": node.score, **costs, "time": stamp})
    _write(self.path / "results.json", _dump(results))
    _write(self.path / "processed_experience.json", _dump(processed_experience(tree)))

  def is_foreign(self) -> bool:
    """Whether AFlow wrote rounds here and no search of ours did."""
    has_graph = ((self.round_path(id) / "graph.py").is_file() for id in adopt.round_ids(self.path))
    return not self.journal.exists() and any(has_graph)

  def adopted(self) -> list[dict[str, Any]]:
    """The journal's events of rounds that AFlow evaluated; they come before any round of ours.

    A search that ended before its first checkpoint has them nowhere else.
    """
    if not self.journal.is_file():
      return []
    events: list[dict[str, Any]] = []
    for line in self.journal.read_text(encoding="utf-8").splitlines(keepends=True):
      if not line.endswith("\n"):
        break  # cut off by a crash
      event = json.loads(line)
      if "round" in event:
        break
      events.append(event)
    return events

  def adopt(self, problems: Sequence[Problem], root: WorkflowSource) -> list[Node]:
    """Reads the rounds that AFlow wrote, seed first, so that the search can go on from them.

    All files as they were are kept in `<Dataset>/aflow_original`; damaged ones are then repaired.

    Returns:
      Nodes as `awf.search.adopt.Reader.nodes` gives them: the seed may have no score yet.
    """
    kept = self.path.parent / "aflow_original"
    if not kept.exists():
      part = kept.with_name(".aflow_original.part")
      shutil.rmtree(part, ignore_errors=True)
      shutil.copytree(self.path, part, ignore=shutil.ignore_patterns("__pycache__"))
      os.replace(part, kept)
    reader = adopt.Reader(self.path)
    nodes = reader.nodes(problems, root)
    for file, content in reader.repairs.items():
      if content is None:
        file.unlink()
      else:
        write_atomic(file, _dump(content))
    return nodes


def _question(problem: Problem) -> str:
  """What AFlow logs as the question: HotpotQA's is without its context."""
  return str(problem.hidden.get("question", problem.prompt))


def _expected(problem: Problem) -> str:
  """The expected answer as AFlow's log shows it; reference code for a code data set."""
  answer = problem.answer
  if answer is None:
    answer = problem.hidden.get("canonical_solution", "")
  if isinstance(answer, list) and all(isinstance(spans, list) for spans in answer):
    answer = "|".join(dict.fromkeys(str(span) for spans in answer for span in spans))  # DROP
  return answer if isinstance(answer, str) else json.dumps(answer, default=str)


def _log_entry(trial: Trial) -> dict[str, str]:
  return {
    "question": _question(trial.problem),
    "right_answer": _expected(trial.problem),
    "model_output": trial.output,
    "extracted_output": trial.extracted,
    "extract_answer_code": "None",
  }


def _after(node: Node) -> float:
  return node.score if node.evaluated else 0.0


def _experience(node: Node) -> dict[str, Any]:
  after = _after(node)
  return {
    "father node": node.parent,
    "modification": node.modification,
    "before": node.before,
    "after": after,
    "succeed": after > node.before,
  }


def processed_experience(tree: Tree) -> dict[str, Any]:
  """Children of each parent by success; AFlow's in-memory view, keys as strings."""
  out: dict[str, Any] = {}
  for node in tree.nodes.values():
    if node.parent == NO_NODE or math.isnan(node.before) or not node.source.graph:
      continue
    entry = out.setdefault(str(node.parent), {"score": node.before, "success": {}, "failure": {}})
    side = entry["success" if _after(node) > node.before else "failure"]
    side[str(node.id)] = {"modification": node.modification, "score": _after(node)}
  return out
