"""AFlow's rule of convergence: the mean of the best workflows did not move for some rounds.

Source: FoundationAgents/AFlow, `scripts/optimizer_utils/convergence_utils.py`. There the rounds it
names are indices from 0, and its noise is never used (z = 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from awf.search.tree import Node

TOP = 3


def converged(
  means: Sequence[float | None],
  errors: Sequence[float],
  rounds: int,
  z: float = 0.0,
  top: int = TOP,
  before: Sequence[tuple[float, float]] = (),
) -> tuple[int, int] | None:
  """The first and last of `rounds` consecutive rounds in which the top did not move.

  Args:
    means: mean score by round, in the order of the rounds, which are counted from 1; None for a
      round without one, which moves nothing.
    errors: standard error of each mean.
    rounds: how many rounds in a row; 0 never converges.
    z: a move of the top's mean up to z times its standard error is none.
    top: rounds whose mean is watched, the best so far; nothing is said before there are top + 1.
    before: (mean, error) of what was there before the first round and is among the best too.
  """
  if rounds < 1 or len(means) <= top:
    return None
  still, last = 0, (0.0, 0.0)
  for i in range(1, len(means) + 1):
    pairs = [*before, *zip(means[:i], errors[:i], strict=True)]
    found = [(mean, error) for mean, error in pairs if mean is not None]
    ranked = sorted(found, key=lambda pair: -pair[0])[:top]  # the earlier one first on a tie
    level = sum(mean for mean, _ in ranked) / max(1, len(ranked))
    error = math.sqrt(sum(error**2 for _, error in ranked)) / top
    moved = abs(level - last[0]) > z * math.hypot(error, last[1]) + 1e-12
    still = 0 if i == 1 or moved else still + 1
    if still >= rounds:
      return i - rounds + 1, i
    last = level, error
  return None


def standard_error(node: Node) -> float:
  """Of a node's mean over its problems; 0 for one that has no scores by problem."""
  scores = list(node.scores.values())
  if len(scores) < 2:
    return 0.0
  mean = sum(scores) / len(scores)
  return math.sqrt(sum((s - mean) ** 2 for s in scores) / (len(scores) - 1) / len(scores))


def best_by_round(nodes: Sequence[Node], rounds: int) -> list[Node | None]:
  """The best node to which each search round gave its score, None where none was.

  That is the round that made it (AFlow makes one a round), or a later one that evaluated it anew:
  only then is it known how good it is.
  """
  rated: list[Node | None] = []
  for round in range(1, rounds + 1):
    found = [n for n in nodes if (n.rated or n.born) == round]
    rated.append(max(found, key=lambda n: (n.score, -n.id)) if found else None)
  return rated


def search_converged(
  nodes: Sequence[Node], rounds_done: int, rounds: int, z: float
) -> tuple[int, int] | None:
  """`converged` for the rounds of a search, each with the best node to which it gave a score, and
  for the rounds of a workspace that it took over.

  Args:
    nodes: those that can be selected.
    rounds_done: search rounds so far.
    rounds: how many of them in a row; 0 never converges.
    z: as in `converged`.
  """
  rated = best_by_round(nodes, rounds_done)
  means = [None if node is None else node.score for node in rated]
  errors = [0.0 if node is None else standard_error(node) for node in rated]
  before = [(n.score, standard_error(n)) for n in nodes if not (n.rated or n.born)]
  return converged(means, errors, rounds, z, before=before)
