"""What the report shows of a run, read from the run directory's files alone.

A file that is missing or broken costs what it holds, never the page.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from awf.metrics import read_rows
from awf.search.tree import NO_NODE, Node, Tree, replay
from awf.snapshot import STATUS

MAX_FILE_BYTES = 200 << 20
PROBLEMS = "problems.json"  # id -> text of the problems that the run uses, without answers
PARTS = "parts.json"  # counters of the process that wrote the report last


@dataclasses.dataclass
class Search:
  """One search: its forest, what its rounds cost, and the proposals that made its nodes."""

  name: str  # data set, and the number of the search from the second one on
  tree: Tree
  rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # the journal's notes
  # (round, parent, key or modification) -> records of the trajectories
  records: dict[tuple[Any, ...], list[dict[str, Any]]] = dataclasses.field(default_factory=dict)

  def records_of(self, node: Node) -> list[dict[str, Any]]:
    """The proposals that this node stands for: equal siblings share one."""
    what = node.canonical or node.modification
    return self.records.get((node.born, node.parent, what), [])


@dataclasses.dataclass
class Run:
  """What could be read of a run; `faults` says what could not."""

  path: pathlib.Path
  record: dict[str, Any] = dataclasses.field(default_factory=dict)  # config.json
  metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  timings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # eval.json
  summary: dict[str, Any] = dataclasses.field(default_factory=dict)  # summary.json
  backup: dict[str, Any] = dataclasses.field(default_factory=dict)  # backup.json
  problems: dict[str, Any] = dataclasses.field(default_factory=dict)  # problems.json
  parts: dict[str, Any] = dataclasses.field(default_factory=dict)  # parts.json
  searches: list[Search] = dataclasses.field(default_factory=list)
  scores: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)  # without a journal
  proposals: int = 0  # lines of the trajectories
  proposal_tokens: int = 0  # that they took
  faults: list[str] = dataclasses.field(default_factory=list)

  @property
  def is_empty(self) -> bool:
    return not (self.record or self.metrics or self.timings or self.searches or self.evaluation)

  @property
  def name(self) -> str:
    config = self.record.get("config")
    name = config.get("name") if isinstance(config, dict) else None
    return str(name or self.path.resolve().name)[:80]


def read_run(path: pathlib.Path) -> Run:
  """Reads a run directory; what is missing stays empty."""
  run = Run(path)
  run.record = _object(path / "config.json", run)
  run.evaluation = _object(path / "eval.json", run)
  run.summary = _object(path / "summary.json", run)
  run.backup = _object(path / STATUS, run)
  run.problems = _object(path / PROBLEMS, run)
  run.parts = _object(path / PARTS, run)
  run.metrics = _rows(path / "metrics.jsonl", run)
  run.timings = _rows(path / "timings.jsonl", run)
  for folder in _numbered(path.glob("workspace*/*")):
    _read_search(folder, folder.name, run)
  for journal in sorted(path.glob("workspace/*/*/journal.jsonl")):  # one search a problem
    _read_search(journal.parent, journal.parent.parent.name, run)
  _read_trajectories(run)
  return run


def _numbered(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
  """workspace/, then workspace_2/ and so on, by number."""

  def place(path: pathlib.Path) -> tuple[int, str]:
    found = re.fullmatch(r"workspace(?:_(\d+))?", path.parent.name)
    return (int(found[1] or 1) if found else 1 << 30), path.name

  return sorted(paths, key=place)


def _read_search(folder: pathlib.Path, name: str, run: Run) -> None:
  if folder.parent.name.startswith("workspace_"):
    name += f", search {folder.parent.name.rpartition('_')[2]}"
  events = _rows(folder / "journal.jsonl", run)
  try:
    tree = replay(events)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    run.faults.append(f"journal.jsonl of {name}: {type(error).__name__}: {error}")
    return
  if tree.nodes:
    rounds = [event for event in events if event.get("event") == "round"]
    run.searches.append(Search(name, tree, rounds))
  elif (results := folder / "workflows" / "results.json").is_file():
    run.scores[name] = _round_scores(results, run)


def _read_trajectories(run: Run) -> None:
  """Gives every search the records of its proposals; a round that starts anew is the next one's."""
  search, last = 0, 0
  for file in sorted(run.path.glob("trajectories/*.jsonl")):
    rows = _rows(file, run)
    run.proposals += len(rows)
    run.proposal_tokens += sum(_whole(row.get("tokens")) for row in rows)
    round = _whole(rows[0].get("round")) if rows else 0
    search, last = search + (0 < round <= last), round
    if search < len(run.searches):
      for row in rows:
        what = str(row.get("key") or row.get("modification") or "")
        key = (_whole(row.get("round")), _whole(row.get("parent")), what)
        run.searches[search].records.setdefault(key, []).append(row)


def _whole(value: Any) -> int:
  return value if isinstance(value, int) else 0


def _object(path: pathlib.Path, run: Run) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    run.faults.append(f"{path.name}: {type(error).__name__}: {error}")
    return {}
  return found if isinstance(found, dict) else {}


def _round_scores(path: pathlib.Path, run: Run) -> dict[int, float]:
  """Mean score of each round in AFlow's results.json, as a search by AFlow itself leaves it."""
  passes: dict[int, list[float]] = {}
  try:
    text = path.read_text(encoding="utf-8")
    for row in json.loads(text) if text.strip() else []:
      passes.setdefault(int(row["round"]), []).append(float(row["score"]))
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    run.faults.append(f"{path.name}: {type(error).__name__}: {error}")
    return {}
  return {id: sum(scores) / len(scores) for id, scores in sorted(passes.items())}


def _rows(path: pathlib.Path, run: Run) -> list[dict[str, Any]]:
  try:
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
      raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    return read_rows(path)
  except (OSError, ValueError, RecursionError) as error:
    run.faults.append(f"{path.name}: {type(error).__name__}: {error}")
    return []


def best_node(tree: Tree) -> Node | None:
  """The best node by full validation, or, where no proposal got one, by what validation there is.

  As the search itself says, without its config.
  """
  full = tree.selectable(("full",))
  nodes = full if any(n.parent != NO_NODE for n in full) else tree.selectable(("subset", "full"))
  return max(nodes, key=lambda node: (node.score, -node.id)) if nodes else None


def lineage(tree: Tree, node: Node) -> list[Node]:
  """From the root to the node."""
  path = [node]
  while path[-1].parent != NO_NODE:
    path.append(tree.nodes[path[-1].parent])
  return path[::-1]


def numbers(value: Any) -> Mapping[str, Any]:
  """A mapping, whatever a file held there."""
  return value if isinstance(value, dict) else {}


def is_number(value: Any) -> TypeGuard[float]:
  """Whether a file held a finite number there."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
