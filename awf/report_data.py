"""The data that the report's script reads: forests with code, failures and costs, packed.

Each text stands once; a node names it by number. Nothing is a difference: the browser makes those.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from awf.report_parts import clean
from awf.report_read import Run, Search, best_node, is_number, lineage
from awf.search.tree import NO_NODE, STAGES, Node

MAX_BYTES = 4_000_000  # of the packed data; the rest of a page has one million more
MAX_PROBLEM = 1_500  # characters of a problem's text
Z95 = 1.959963984540054  # of the normal distribution


class Detail(NamedTuple):
  """How much of each node is kept."""

  entries: int  # failed problems
  output: int  # characters of an answer
  text: int  # characters of a workflow or of its prompts


# The first that fits is taken.
DETAILS = (Detail(16, 600, 20_000), Detail(6, 300, 8_000), Detail(2, 150, 3_000), Detail(0, 0, 600))


def wilson_interval(mean: float, count: int) -> tuple[float, float]:
  """95 % interval of a share, from `count` scores in [0, 1]; too wide where scores are partial.

  Source: Wilson 1927; scores between 0 and 1 vary less than the coin that it assumes.
  """
  if not count or math.isnan(mean):
    return math.nan, math.nan
  spread = Z95 * Z95 / count
  middle = (mean + spread / 2) / (1 + spread)
  half = Z95 / (1 + spread) * math.sqrt(max(mean * (1 - mean), 0) / count + spread / count / 4)
  return max(0.0, middle - half), min(1.0, middle + half)


def pack(run: Run) -> str:
  """The data as base64 of gzip of JSON: letters that mean nothing in HTML. Equal for equal runs."""
  packed = ""
  for detail in DETAILS:
    text = json.dumps(payload(run, detail), separators=(",", ":"), ensure_ascii=False)
    packed = base64.b64encode(gzip.compress(text.encode("utf-8", "replace"), 6, mtime=0)).decode(
      "ascii"
    )
    if len(packed) <= MAX_BYTES:
      break
  return packed


def unpack(packed: str) -> dict[str, Any]:
  """What `pack` packed."""
  return json.loads(gzip.decompress(base64.b64decode(packed)))


def payload(run: Run, detail: Detail = DETAILS[0]) -> dict[str, Any]:
  """The data: `texts`, `problems` and `searches`; a search has one list per field of its nodes."""
  texts = _Texts(detail.text)
  problems: dict[str, str | None] = {}
  searches = [_search(search, detail, texts, problems) for search in run.searches]
  for id in problems:
    text = run.problems.get(id)
    problems[id] = cut(text, MAX_PROBLEM) if isinstance(text, str) else None
  return {"stages": STAGES, "searches": searches, "texts": texts.all, "problems": problems}


class _Texts:
  """Texts by number."""

  def __init__(self, limit: int):
    self.all: list[str] = []
    self._limit = limit
    self._numbers: dict[str, int] = {}

  def number(self, text: str) -> int:
    if text not in self._numbers:
      self._numbers[text] = len(self.all)
      self.all.append(cut(text, self._limit))
    return self._numbers[text]


def cut(text: str, limit: int) -> str:
  """Text without control characters, cut at `limit`."""
  if len(text) > limit:
    text = text[:limit] + f" … ({len(text) - limit} more characters)"
  return clean(text)


def _search(
  search: Search, detail: Detail, texts: _Texts, problems: dict[str, str | None]
) -> dict[str, Any]:
  nodes = list(search.tree.nodes.values())
  best = best_node(search.tree)
  rows = [_node(node, search, detail, texts, problems) for node in nodes]
  return {
    "name": clean(search.name),
    "best": best.id if best else NO_NODE,
    "path": [node.id for node in lineage(search.tree, best)] if best else [],
    "nodes": {name: [row[name] for row in rows] for name in (rows[0] if rows else ())},
  }


def _node(
  node: Node, search: Search, detail: Detail, texts: _Texts, problems: dict[str, str | None]
) -> dict[str, Any]:
  log = []
  for entry in node.log[: detail.entries]:
    id = clean(entry.problem)
    problems[id] = None
    log.append([id, cut(entry.output, detail.output), cut(entry.extracted, 80)])
  low, high = wilson_interval(node.score, len(node.scores))
  failure = node.failure
  return {
    "id": node.id,
    "parent": node.parent,
    "score": rounded(node.score) if node.failure is None else None,
    "low": rounded(low),
    "high": rounded(high),
    "count": len(node.scores),
    "wrong": sum(score < 1 for score in node.scores.values()),
    "stage": STAGES.index(node.stage) if node.stage in STAGES else 0,
    "failure": [failure.kind, cut(failure.message, 600)] if failure is not None else None,
    "edit": cut(node.modification, 1_000),
    "graph": texts.number(node.source.graph),
    "prompt": texts.number(node.source.prompt),
    "born": node.born,
    "copy": node.duplicate_of,
    "visits": node.visits,
    "value": rounded(node.value),
    "log": log,
    "cost": _cost(search.records_of(node)),
  }


def _cost(records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
  """What the proposals of a node took; runs on a problem are shared by equal ones."""
  if not records:
    return None
  first = records[0]
  reward = first.get("reward")
  out: dict[str, Any] = {"proposals": len(records), "reward": reward if is_number(reward) else None}
  out["tokens"] = sum(_number(row.get("tokens")) for row in records)
  for name in ("calls", "run_tokens"):
    if first.get(name) is not None:
      out[name] = max(_number(row.get(name)) for row in records)
  return out


def _number(value: Any) -> float:
  return value if is_number(value) else 0


def rounded(value: float) -> float | None:
  return round(value, 4) if math.isfinite(value) else None
