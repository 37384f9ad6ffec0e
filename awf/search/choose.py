"""Which workflow of a run to trust: the best of many by validation, allowing for the choice.

The highest of many measured means is too high: it was picked for its luck too. So every candidate
gets a lower bound that holds for all of them at once, and the one with the highest bound is taken.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from awf.search.adopt import ADOPTED
from awf.search.tree import NO_NODE, Node, Tree, replay
from awf.types import WorkflowSource

LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Choice:
  """The workflow that was picked, with what is known of it."""

  source: WorkflowSource
  search: str  # its workspace folder
  round: int  # its number there
  score: float  # mean on validation
  lower_bound: float  # one-sided, for all candidates at once
  candidates: int  # different workflows that it was picked from
  problems: int  # that its mean rests on

  def facts(self) -> dict[str, Any]:
    """Without the source, JSON-able."""
    named = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    return {"level": LEVEL, **{k: v for k, v in named.items() if k != "source"}}


def lower_bound(mean: float, problems: int, candidates: int, level: float = LEVEL) -> float:
  """Lower bound of a mean score, at once for all candidates that it is picked from.

  With z the (1 - (1 - level) / candidates) quantile of the normal distribution and n problems:

    (m + z^2 / 2n - z sqrt(m (1 - m) / n + z^2 / 4n^2)) / (1 + z^2 / n)

  Args:
    mean: m, of scores in [0, 1]. Scores between 0 and 1 vary no more than solved and unsolved ones
      of the same mean, so that the bound holds for them too.
    problems: n, at least 1.
    candidates: at least 1.
    level: one-sided coverage, in (0.5, 1).

  Source: Wilson 1927, one side of the score interval; Bonferroni's correction for the candidates;
    Bhatia and Davis 2000 for the variance m (1 - m).
  """
  if problems < 1 or candidates < 1 or not 0.5 < level < 1.0:
    raise ValueError(f"expected counts of at least 1 and a level in (0.5, 1), got {level}")
  mean = min(max(mean, 0.0), 1.0)
  z = statistics.NormalDist().inv_cdf(1.0 - (1.0 - level) / candidates)
  square = z * z / problems
  half = z * math.sqrt(mean * (1.0 - mean) / problems + square / (4 * problems))
  return max(0.0, (mean + square / 2 - half) / (1.0 + square))


def choose(
  trees: Mapping[str, Tree], stages: tuple[str, ...], validation: int, level: float = LEVEL
) -> Choice | None:
  """The candidate with the highest lower bound; on a tie the better mean, then the earlier one.

  Args:
    trees: forest of each search, by the name of its folder.
    stages: whose nodes can be selected (`Tree.selectable`).
    validation: problems behind the mean of a round that AFlow evaluated; it keeps no single scores.
    level: of the bound.
  """
  found: dict[str, tuple[str, Node]] = {}
  for name in sorted(trees):
    for node in trees[name].selectable(stages):
      found.setdefault(node.canonical or f"{name} {node.id}", (name, node))
  rows = []
  for name, node in found.values():
    count = validation if ADOPTED in node.scores else len(node.scores)
    bound = lower_bound(node.score, count, len(found), level)
    rows.append(Choice(node.source, name, node.id, node.score, bound, len(found), count))
  return max(rows, key=lambda c: (c.lower_bound, c.score), default=None)


def read_trees(workdir: Path, dataset: str) -> dict[str, Tree]:
  """The forests of a run's searches from their journals, by folder; a last line that is cut off is
  left out.

  Raises:
    ValueError: a journal that is no list of events.
  """
  trees = {}
  for journal in sorted(workdir.glob(f"workspace*/{dataset}/journal.jsonl")):
    tree = replay(_events(journal.read_text(encoding="utf-8").splitlines(keepends=True)))
    if tree.nodes:
      trees[journal.parent.parent.name] = tree
  return trees


def _events(lines: Iterable[str]) -> list[dict[str, Any]]:
  return [json.loads(line) for line in lines if line.endswith("\n")]


def seed_of(trees: Mapping[str, Tree]) -> WorkflowSource | None:
  """The workflow that the first search started from."""
  for name in sorted(trees):
    nodes = trees[name].nodes
    first = nodes[min(nodes)]
    if first.parent == NO_NODE and first.source.graph:
      return first.source
  return None
