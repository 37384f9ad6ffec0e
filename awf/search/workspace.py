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
import dataclasses
import datetime
import io
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awf.search.stages import LOGGED_BELOW, Trial
from awf.search.template import template_files
from awf.search.text import one_line
from awf.search.tree import NO_NODE, SEED, LogEntry, Node, Tree
from awf.types import Problem, UserError, WorkflowSource
from awf.workflow.contract import graph_header, strip_header

_ROUND = re.compile(r"round_(\d+)")
_INPUTS_COLUMN = ("HumanEval", "MBPP", "DROP")  # data sets whose CSV calls the question `inputs`
ADOPTED = ""  # key of the mean score of a round that AFlow evaluated: it kept no scores by problem


def write_atomic(path: Path, text: str) -> None:
  """Writes the file whole or not at all; readers never see a part of it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.part")
  with open(part, "w", encoding="utf-8", newline="") as f:
    f.write(text)
  os.replace(part, path)


def _dump(data: Any) -> str:
  return json.dumps(data, indent=4, ensure_ascii=True, allow_nan=False) + "\n"


def _load(path: Path) -> Any:
  """Content of a JSON file; None when it is missing or empty (AFlow ships zero-byte files).

  Raises:
    UserError: the file is there but is not JSON.
  """
  try:
    text = path.read_text(encoding="utf-8")
  except FileNotFoundError:
    return None
  try:
    return json.loads(text) if text.strip() else None
  except json.JSONDecodeError as e:
    raise UserError(
      f"{path} is not JSON (line {e.lineno}): repair or remove it, or set --workdir"
    ) from None


class Workspace:
  """The files of one data set's search.

  Attributes:
    is_kept: False where another process writes them: then they are only read.
  """

  is_kept = True

  def __init__(self, root: Path | str, dataset: str, question_type: str):
    self.path = Path(root) / dataset / "workflows"
    self.journal = Path(root) / dataset / "journal.jsonl"
    self.dataset = dataset
    self._question_type = question_type

  def round_path(self, id: int) -> Path:
    return self.path / f"round_{id}"

  def round_ids(self) -> list[int]:
    names = (_ROUND.fullmatch(p.name) for p in self.path.glob("round_*"))
    return sorted(int(m.group(1)) for m in names if m)

  def prepare(self, events: Sequence[Mapping[str, Any]], tree: Tree) -> None:
    """Makes the files agree with the search's events: used when a search starts and when one is
    resumed.

    Rounds that are newer than the events (an interrupted run had gone on) are removed, missing ones
    are written.
    """
    if not self.is_kept:
      return
    for name, text in template_files(self._question_type).items():
      write_atomic(self.path / "template" / name, text)
    for id in self.round_ids():
      if id not in tree.nodes:
        shutil.rmtree(self.round_path(id))
    write_atomic(self.journal, "".join(json.dumps(e, allow_nan=False) + "\n" for e in events))
    for node in tree.nodes.values():
      if node.source.graph and not (self.round_path(node.id) / "graph.py").exists():
        self.write_round(node, ())
    for node in tree.nodes.values():
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
    write_atomic(path / "graph.py", header.rstrip("\n") + "\n\n" + node.source.graph + "\n")
    write_atomic(path / "prompt.py", node.source.prompt + "\n")
    write_atomic(path / "__init__.py", "")
    log = [_log_entry(t) for t in trials if t.score < LOGGED_BELOW]
    if log:
      write_atomic(path / "log.json", _dump(log))
    if any(not math.isnan(t.score) for t in trials):
      stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
      score = node.score if node.evaluated else 0.0
      write_atomic(path / f"{score:.5f}_{stamp}.csv", self._csv(trials))

  def write_experience(self, node: Node) -> None:
    if node.parent != NO_NODE and node.source.graph and not math.isnan(node.before):
      write_atomic(self.round_path(node.id) / "experience.json", _dump(_experience(node)))

  def _csv(self, trials: Sequence[Trial]) -> str:
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    question = "inputs" if self.dataset in _INPUTS_COLUMN else "question"
    rows.writerow([question, "prediction", "expected_output", "score", "cost"])
    for t in trials:
      if not math.isnan(t.score):
        rows.writerow([t.problem.prompt, t.output, _expected(t.problem), t.score, 0.0])
    return out.getvalue()

  def write_index(self, tree: Tree, stages: tuple[str, ...]) -> None:
    """results.json (a pass for each selectable round; AFlow's own stay) and the experience."""
    if not self.is_kept:
      return
    old = _load(self.path / "results.json") or []
    stamps = {
      (r["round"], r["score"]): r["time"] for r in old if {"round", "score", "time"} <= set(r)
    }
    now = datetime.datetime.now().isoformat()
    results = []
    for node in tree.selectable(stages):
      if ADOPTED in node.scores:
        results += [row for row in old if row.get("round") == node.id]
        continue
      stamp = stamps.get((node.id, node.score), now)
      costs = {"avg_cost": 0.0, "total_cost": 0.0}
      results.append({"round": node.id, "score": node.score, **costs, "time": stamp})
    write_atomic(self.path / "results.json", _dump(results))
    write_atomic(self.path / "processed_experience.json", _dump(processed_experience(tree)))

  def is_foreign(self) -> bool:
    """Whether AFlow evaluated rounds here and no search of ours did."""
    return not self.journal.exists() and bool(_load(self.path / "results.json"))

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

  def adopt(self, problems: Sequence[Problem]) -> list[Node]:
    """Reads the rounds that AFlow evaluated, seed first, so that the search can go on from them.

    Raises:
      UserError: no evaluated seed round, or a file of it is malformed.
    """
    passes: dict[int, list[float]] = {}
    for row in _load(self.path / "results.json") or []:
      passes.setdefault(int(row["round"]), []).append(float(row["score"]))
    by_text = {p.prompt.strip(): p.id for p in problems}
    nodes: dict[int, Node] = {}
    for id in sorted(passes):
      node = self._adopt_round(id, sum(passes[id]) / len(passes[id]), by_text)
      if node.parent not in nodes:
        node = _as_root(node)
      nodes[id] = node
    if SEED not in nodes:
      raise UserError(f"{self.path}: expected a score of round 1 in results.json, found none")
    return list(nodes.values())

  def _adopt_round(self, id: int, score: float, by_text: Mapping[str, str]) -> Node:
    path = self.round_path(id)
    try:
      graph = strip_header((path / "graph.py").read_text(encoding="utf-8"))
      prompt = (path / "prompt.py").read_text(encoding="utf-8").strip("\n")
    except OSError as e:
      raise UserError(f"{path} has a score in results.json but cannot be read: {e}") from None
    experience = _load(path / "experience.json") or {}
    log = []
    for row in _load(path / "log.json") or []:
      problem = by_text.get(str(row.get("question", "")).strip())
      if problem is not None:
        texts = (str(row.get(k, "")) for k in ("model_output", "extracted_output"))
        log.append(LogEntry(problem, *(t[:600] for t in texts)))
    return Node(
      id=id,
      parent=int(experience.get("father node", NO_NODE)),
      source=WorkflowSource(graph, prompt),
      canonical="",
      modification=one_line(str(experience.get("modification", ""))),
      stage="full",
      scores={ADOPTED: score},
      before=float(experience.get("before", math.nan)),
      log=tuple(log),
    )


def _as_root(node: Node) -> Node:
  return dataclasses.replace(node, parent=NO_NODE, before=math.nan)


def _expected(problem: Problem) -> str:
  """The expected answer as AFlow's log shows it; reference code for a code data set."""
  answer = problem.answer
  if answer is None:
    answer = problem.hidden.get("canonical_solution", "")
  return answer if isinstance(answer, str) else json.dumps(answer, default=str)


def _log_entry(trial: Trial) -> dict[str, str]:
  return {
    "question": trial.problem.prompt,
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
