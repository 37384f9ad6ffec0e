"""Reads a workspace that AFlow wrote, also a damaged one: what is lost is rebuilt from the rest.

AFlow streams its JSON files while it runs, so a killed run leaves them empty or cut off, and a
failed round leaves a folder without a result. Nothing here raises for such a file; each repair is a
warning, and the files as they were are kept (`Workspace.adopt`).

Source: FoundationAgents/AFlow, `scripts/optimizer_utils/` and `benchmarks/benchmark.py` (file
formats only).
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from awf.search.text import one_line
from awf.search.tree import NO_NODE, SEED, LogEntry, Node
from awf.types import Problem, UserError, WorkflowSource
from awf.workflow.contract import SEED_PROMPT, strip_header

log = logging.getLogger(__name__)

ADOPTED = ""  # key of the mean score of a round that AFlow evaluated: it kept no scores by problem
ROUND = re.compile(r"round_(\d+)")
_CSV = re.compile(r"(\d+\.\d{5})_(\d{8}_\d{6})\.csv")
_EXPERIENCE = {"father node", "before", "after"}  # without which it says nothing


def _finite(text: str) -> float | None:
  value = float(text)
  return value if math.isfinite(value) else None


_decoder = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)  # "NaN" is a constant


def salvage(text: str) -> Any:
  """The whole elements at the start of a cut-off JSON list or object; None when there is none."""
  text = text.strip()
  if text.startswith("["):
    return [value for value, _ in _elements(text, 1)]
  if not text.startswith("{"):
    return None
  pairs: dict[str, Any] = {}
  at = 1
  while match := re.compile(r'[\s,]*("(?:[^"\\]|\\.)*")\s*:\s*').match(text, at):
    try:
      value, at = _decoder.raw_decode(text, match.end())
      pairs[json.loads(match.group(1), strict=False)] = value
    except (ValueError, RecursionError):
      break
  return pairs


def _elements(text: str, at: int):
  while True:
    while at < len(text) and text[at] in " \t\r\n,":
      at += 1
    try:
      value, at = _decoder.raw_decode(text, at)
    except (ValueError, RecursionError, IndexError):
      return
    yield value, at


def read_json(file: Path) -> tuple[Any, bool]:
  """(content, whether the file is whole); content None for one that is missing or empty.

  Numbers that are not finite, which AFlow writes and JSON does not know, are None.
  """
  try:
    text = file.read_bytes().decode("utf-8-sig", "replace")
  except OSError:
    return None, not file.exists()
  if not text.strip():
    return None, False
  try:
    return _decoder.decode(text), True
  except (ValueError, RecursionError) as error:
    found = salvage(text)
    log.warning("%s is damaged (%s): %s", file, error, _kept(found))
    return found, False


def _kept(found: Any) -> str:
  return f"its first {len(found)} entries are used" if found else "nothing in it can be read"


def round_ids(path: Path) -> list[int]:
  """Numbers of the round folders."""
  names = (ROUND.fullmatch(p.name) for p in path.glob("round_*"))
  return sorted(int(match.group(1)) for match in names if match)


def import_workspace(source: Path, root: Path, dataset: str) -> None:
  """Copies a workspace of AFlow to `<root>/<dataset>/workflows`; an earlier copy is left alone.

  Args:
    source: AFlow's `workspace` folder, the data set's folder in it, or the `workflows` in that.

  Raises:
    UserError: no round folder there.
  """
  target = root / dataset / "workflows"
  if target.exists() or (root / dataset / "journal.jsonl").exists():
    return
  found = [p for p in (source / dataset / "workflows", source / "workflows", source) if p.is_dir()]
  folder = next((p for p in found if round_ids(p)), None)
  if folder is None:
    raise UserError(
      f"config.search.workspace: expected {dataset}/workflows/round_1 of AFlow below {source}"
    )
  target.parent.mkdir(parents=True, exist_ok=True)
  part = target.with_name(".workflows.part")
  shutil.rmtree(part, ignore_errors=True)
  shutil.copytree(folder, part, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
  os.replace(part, target)
  log.info("copied the AFlow workspace %s", folder)


@dataclasses.dataclass
class Reader:
  """One reading of a workspace; `repairs` are files to be written, by their path.

  Attributes:
    path: the `workflows` folder.
    rows: result rows by round, those of unreadable rounds left out.
    repairs: content of JSON files that were damaged, missing or incomplete; None removes one.
  """

  path: Path
  rows: dict[int, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
  repairs: dict[Path, Any] = dataclasses.field(default_factory=dict)

  def nodes(self, problems: Sequence[Problem], root: WorkflowSource) -> list[Node]:
    """The rounds with a score, by number, the seed first; a seed without a score has to be
    evaluated.

    Args:
      problems: whose texts the logs may name.
      root: the seed's workflow, where the workspace has none.
    """
    sources = {id: self._source(id) for id in round_ids(self.path)}
    sources = {id: source for id, source in sources.items() if source is not None}
    experience = self._experiences(set(sources))
    self.rows = self._rows(set(sources), experience)
    for id in sorted(set(self.rows) - {SEED}):
      self._complete(id, experience[id])
    by_text: dict[str, str] = {}
    for problem in problems:
      for text in (problem.prompt, str(problem.hidden.get("question", ""))):
        by_text.setdefault(text.strip(), problem.id)
    nodes: dict[int, Node] = {}
    for id in sorted({SEED, *self.rows}):
      nodes[id] = self._node(id, sources.get(id, root), experience.get(id, {}), nodes, by_text)
    if SEED not in sources:
      log.warning("%s has no readable round 1: the search starts from the seed", self.path)
    lost = sorted(set(sources) - set(nodes))
    if lost:
      log.warning("%s: rounds %s have no score and are left out", self.path, lost)
    return list(nodes.values())

  def _source(self, id: int) -> WorkflowSource | None:
    """A round's workflow, or None when its graph is missing or has no class."""
    folder = self.path / f"round_{id}"
    texts = {}
    for name in ("graph.py", "prompt.py"):
      try:
        texts[name] = (folder / name).read_bytes().decode("utf-8-sig", "replace")
      except OSError:
        texts[name] = ""
    graph, prompt = strip_header(texts["graph.py"]), texts["prompt.py"].strip("\n")
    if not re.search(r"^class Workflow\b", graph, re.MULTILINE):
      if id == SEED or any(folder.iterdir()):
        log.warning("%s: graph.py is missing or cut off; the round is left out", folder)
      return None
    if not prompt.strip() and "prompt_custom." in graph:
      log.warning("%s: prompt.py is missing or empty; the round is left out", folder)
      return None
    return WorkflowSource(graph, prompt if prompt.strip() else SEED_PROMPT)

  def _experiences(self, ids: set[int]) -> dict[int, dict[str, Any]]:
    """experience.json by round; where it is lost, what processed_experience.json says."""
    found: dict[int, dict[str, Any]] = {}
    processed: dict[int, dict[str, Any]] = {}
    data, _ = read_json(self.path / "processed_experience.json")
    for father, entry in data.items() if isinstance(data, dict) else ():
      for side in ("success", "failure"):
        children = entry.get(side) if isinstance(entry, dict) else None
        for child, row in children.items() if isinstance(children, dict) else ():
          if str(child).isdigit() and str(father).isdigit() and isinstance(row, dict):
            processed[int(child)] = {
              "father node": int(father),
              "modification": str(row.get("modification", "")),
              "before": entry.get("score"),
              "after": row.get("score"),
              "succeed": side == "success",
            }
    for id in sorted(ids - {SEED}):
      row, _ = read_json(self._experience_file(id))
      found[id] = {**processed.get(id, {}), **(row if isinstance(row, dict) else {})}
    return found

  def _experience_file(self, id: int) -> Path:
    return self.path / f"round_{id}" / "experience.json"

  def _complete(self, id: int, row: dict[str, Any]) -> None:
    """Fills in what a round's experience lacks by the scores; without a parent it says nothing."""
    file = self._experience_file(id)
    father = _number(row.get("father node"))
    before, after = (self.mean(one) for one in (int(father or NO_NODE), id))
    full: dict[str, Any] = {"father node": father and int(father), "modification": ""}
    full |= {"before": before, "after": after, **row}
    full["before"] = before if _number(full["before"]) is None else full["before"]
    full["after"] = after if _number(full["after"]) is None else full["after"]
    if father is None or full["before"] is None or full["after"] is None:
      log.warning("%s: no parent is known; the round becomes a root", file.parent)
      if file.exists():
        self.repairs[file] = None
      return
    full["succeed"] = full["after"] > full["before"]
    row |= full
    on_disk, whole = read_json(file)
    if not whole or not isinstance(on_disk, dict) or not _EXPERIENCE <= set(on_disk):
      log.warning("%s is rebuilt from what is left", file)
      self.repairs[file] = full

  def mean(self, id: int) -> float | None:
    """Mean score of a round, None without one."""
    rows = self.rows.get(id, [])
    return sum(float(row["score"]) for row in rows) / len(rows) if rows else None

  def _rows(
    self, ids: set[int], experience: Mapping[int, Mapping[str, Any]]
  ) -> dict[int, list[dict[str, Any]]]:
    """results.json by round, completed by the rounds' own files."""
    file = self.path / "results.json"
    data, whole = read_json(file)
    entries = data if isinstance(data, list) else []
    rows: dict[int, list[dict[str, Any]]] = {}
    for row in entries:
      number = _number(row.get("round")) if isinstance(row, dict) else None
      if number is not None and int(number) in ids and _number(row.get("score")) is not None:
        rows.setdefault(int(number), []).append(row)
    rebuilt = {id: self._rebuilt_rows(id, experience) for id in sorted(ids - set(rows))}
    rebuilt = {id: found for id, found in rebuilt.items() if found}
    if rebuilt:
      log.warning("%s lacks rounds %s: their scores come from other files", file, list(rebuilt))
    rows |= rebuilt
    kept = [row for row in entries if any(row is one for own in rows.values() for one in own)]
    kept += [row for found in rebuilt.values() for row in found]
    if kept != entries or not whole:
      if len(entries) > len(kept) - sum(map(len, rebuilt.values())):
        log.warning("%s: entries without a readable round or score are left out", file)
      self.repairs[file] = kept
    return rows

  def _rebuilt_rows(
    self, id: int, experience: Mapping[int, Mapping[str, Any]]
  ) -> list[dict[str, Any]]:
    """Result rows of a round by the names of its tables, its own experience or its children's."""
    costs = {"avg_cost": 0.0, "total_cost": 0.0}
    names = sorted(
      (p.name for p in (self.path / f"round_{id}").glob("*.csv")), key=lambda name: name[-19:]
    )
    rows = []
    for name in names:
      if match := _CSV.fullmatch(name):
        try:
          time = datetime.datetime.strptime(match[2], "%Y%m%d_%H%M%S").isoformat()
        except ValueError:
          continue
        rows.append({"round": id, "score": float(match[1]), **costs, "time": time})
    if rows:
      return rows
    scores = [experience.get(id, {}).get("after")]
    scores += [row.get("before") for row in experience.values() if row.get("father node") == id]
    known = [score for score in map(_number, scores) if score is not None]
    time = datetime.datetime.fromtimestamp((self.path / f"round_{id}").stat().st_mtime)
    return [{"round": id, "score": score, **costs, "time": time.isoformat()} for score in known[:1]]

  def _node(
    self,
    id: int,
    source: WorkflowSource,
    experience: Mapping[str, Any],
    earlier: Mapping[int, Node],
    by_text: Mapping[str, str],
  ) -> Node:
    mean = self.mean(id)
    scores = {} if mean is None else {ADOPTED: mean}
    father = _number(experience.get("father node"))
    parent = earlier.get(int(father)) if father is not None else None
    before = _number(experience.get("before"))
    if parent is not None and before is None:
      before = parent.score
    return Node(
      id=id,
      parent=parent.id if parent is not None else NO_NODE,
      source=source,
      canonical="",
      modification=one_line(str(experience.get("modification", ""))),
      stage="full",
      scores=scores,
      before=before if parent is not None and before is not None else math.nan,
      log=self._log(id, by_text),
    )

  def _log(self, id: int, by_text: Mapping[str, str]) -> tuple[LogEntry, ...]:
    file = self.path / f"round_{id}" / "log.json"
    data, whole = read_json(file)
    rows = [row for row in data if isinstance(row, dict)] if isinstance(data, list) else []
    if file.exists() and (not whole or rows != data):
      self.repairs[file] = rows
    entries = []
    for row in rows:
      problem = by_text.get(str(row.get("question", "")).strip())
      if problem is not None:
        texts = (str(row.get(k, "")) for k in ("model_output", "extracted_output"))
        entries.append(LogEntry(problem, *(t[:600] for t in texts)))
    return tuple(entries)


def _number(value: Any) -> float | None:
  """A finite number, or None."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  try:
    return float(value) if math.isfinite(value) else None
  except OverflowError:  # an integer of more than 308 digits
    return None
