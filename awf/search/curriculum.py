"""Which problems a round draws its common set from, by how often they are solved, and the draw.

The order is a function of the tree alone, so it is resumed with it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from awf.search.tree import NO_NODE, Tree
from awf.types import Problem

ORDERS = ("none", "easy_first", "hard_first")
PRIOR = 0.5  # rate of a problem that no workflow was run on; counts as one workflow


def solve_rates(tree: Tree, problems: Sequence[Problem]) -> dict[str, float]:
  """Mean score of each problem over the different workflows that were evaluated on it."""
  total = {p.id: PRIOR for p in problems}
  count = dict.fromkeys(total, 1)
  for node in tree.nodes.values():
    if not node.evaluated or node.duplicate_of != NO_NODE:
      continue
    for id in node.scores.keys() & total.keys():
      total[id] += node.scores[id]
      count[id] += 1
  return {id: total[id] / count[id] for id in total}


def by_solve_rate(tree: Tree, problems: Sequence[Problem], order: str) -> list[Problem]:
  """The problems in one of `ORDERS`; equal rates keep the data set's order."""
  if order == "none":
    return list(problems)
  rates = solve_rates(tree, problems)
  return sorted(problems, key=lambda p: rates[p.id], reverse=order == "easy_first")


def episode_problems(
  problems: Sequence[Problem],
  rates: Mapping[str, float],
  order: str,
  share: float,
  progress: float,
  places: range,
  make_rng: Callable[..., random.Random],
) -> list[Problem]:
  """The problems that an episode searches on one by one, in the order of the searches.

  Args:
    problems: all problems of the training split.
    rates: solve rate of those that were searched on; the others count as PRIOR.
    order: one of `ORDERS`. "none": turn by turn through all problems, each turn in a seeded order;
      else the episode's problems are drawn from the first ones of the order, and come in it.
    share, progress: as in `problem_pool`, over the episodes.
    places: of the episode's searches among all of the run.
    make_rng: makes the generator for a turn, or for an episode's draw.
  """
  if order == "none":
    count = len(problems)
    turns = range(places.start // count, (places.stop - 1) // count + 1)
    shuffled = {turn: make_rng("turn", turn).sample(problems, count) for turn in turns}
    return [shuffled[place // count][place % count] for place in places]
  ranked = sorted(problems, key=lambda p: rates.get(p.id, PRIOR), reverse=order == "easy_first")
  part = share + (1.0 - share) * min(max(progress, 0.0), 1.0)
  pool = ranked[: max(len(places), math.ceil(part * len(problems)))]
  chosen = {p.id for p in make_rng("draw", places.start).sample(pool, len(places))}
  return [p for p in pool if p.id in chosen]


def problem_pool(
  tree: Tree, problems: Sequence[Problem], order: str, share: float, progress: float, least: int
) -> list[Problem]:
  """The first problems of the order, more of them as the search goes on.

  Args:
    tree: what was evaluated so far.
    problems: all problems of the search.
    order: one of `ORDERS`; "none" gives all problems.
    share: part of the problems that the first round draws from, in (0, 1].
    progress: 0 in the first round, 1 in the last: then all problems are in.
    least: never fewer than these.
  """
  if order == "none":
    return list(problems)
  part = share + (1.0 - share) * min(max(progress, 0.0), 1.0)
  count = max(least, math.ceil(part * len(problems)))
  return by_solve_rate(tree, problems, order)[:count]


def spread(problems: Sequence[Problem], count: int, rng: random.Random) -> list[Problem]:
  """`count` different problems in a random order, each family with its share of them, rounded.

  Every problem is as likely as any other. Drawn without regard to families, few problems leave
  some out, and a workflow that fails all of these looks as good as one that fails none.
  """
  by_family = sorted(rng.sample(problems, len(problems)), key=lambda p: p.family)
  start = rng.randrange(len(by_family))
  chosen = [by_family[(i * len(by_family) + start) // count] for i in range(count)]
  return rng.sample(chosen, count)
