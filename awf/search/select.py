"""Which nodes to expand: AFlow's soft mixture over the best workflows, UCT or PUCT."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from awf.search.tree import NO_NODE, SEED, Node, Tree

Bonus = Callable[[int, int, float], float]  # of (visits of the parent, of the arm, prior)


def mixture(
  scores: Sequence[float], mix_lambda: float = 0.3, mix_alpha: float = 0.2
) -> list[float]:
  """AFlow's probabilities over a pool of workflows.

  Args:
    scores: [M] mean scores in [0, 1].
    mix_lambda: weight of the uniform part, in [0, 1].
    mix_alpha: inverse temperature of the other part, per percent point.

  Returns:
    [M] probabilities: lambda/M + (1 - lambda) softmax(alpha * 100 * score).

  Source: AFlow, arXiv:2410.10762, its soft mixed-probability selection.
  """
  top = max(scores)
  weights = [math.exp(mix_alpha * 100.0 * (s - top)) for s in scores]
  total = sum(weights)
  return [mix_lambda / len(scores) + (1.0 - mix_lambda) * w / total for w in weights]


def pool_of(nodes: Sequence[Node], sample: int) -> list[Node]:
  """The seed and the best others: `sample` members (at least two, as in AFlow), best first."""
  seed = [n for n in nodes if n.id == SEED]
  others = sorted((n for n in nodes if n.id != SEED), key=lambda n: (-n.score, n.id))
  pool = seed + others[: max(sample, 2) - len(seed)]
  return sorted(pool, key=lambda n: (-n.score, n.id))


def select_aflow(
  nodes: Sequence[Node],
  count: int,
  rng: random.Random,
  *,
  sample: int,
  mix_lambda: float,
  mix_alpha: float,
) -> list[Node]:
  """Draws `count` parents without replacement; the pool is filled up again after every draw.

  With count 1 this is AFlow's rule. When every node was drawn, the drawing starts over, so a small
  tree gives the same parent several times.
  """
  chosen: list[Node] = []
  rest: list[Node] = []
  for _ in range(count):
    rest = rest or list(nodes)
    pool = pool_of(rest, sample)
    weights = mixture([n.score for n in pool], mix_lambda, mix_alpha)
    node = rng.choices(pool, weights)[0]
    chosen.append(node)
    rest = [n for n in rest if n.id != node.id]
  return chosen


def select_uct(tree: Tree, nodes: Sequence[Node], count: int, *, c: float) -> list[Node]:
  """Descends from the roots by upper confidence bounds, `count` times; each choice counts as a
  visit at once.

  At a node the arms are its subtrees (mean of the backed-up scores) and the node itself, whose
  bound is its own score with the number of its expansions: the tree is widened where a node beats
  its descendants. The bound is mean + c sqrt(ln(1 + N) / (1 + n)).

  Source: Kocsis & Szepesvari 2006 (UCT); virtual visits as in parallel tree search (Chaslot et al.
  2008).
  """
  return _select(tree, nodes, count, lambda total, n, prior: c * _log_bonus(total, n))


def select_puct(tree: Tree, nodes: Sequence[Node], count: int, *, c: float) -> list[Node]:
  """As `select_uct` with a prior over the arms: mean + c P sqrt(N) / (1 + n).

  P is AFlow's mixture over the scores of the arms' own nodes, times their number: equal scores give
  every arm 1.

  Source: Silver et al. 2017 (AlphaGo Zero), after Rosin 2011.
  """
  return _select(
    tree, nodes, count, lambda total, n, prior: c * prior * math.sqrt(total) / (1.0 + n)
  )


def adapted_c(nodes: Sequence[Node], c: float) -> float:
  """The exploration constant on the scale of the scores: c times their standard deviation.

  Scores that lie close together need a small bonus, or the search is a round robin; under two nodes
  the constant stays. Never under a twentieth of c.
  """
  if len(nodes) < 2:
    return c
  mean = sum(n.score for n in nodes) / len(nodes)
  spread = math.sqrt(sum((n.score - mean) ** 2 for n in nodes) / (len(nodes) - 1))
  return c * max(spread, 0.05)


def _log_bonus(total: int, n: int) -> float:
  return math.sqrt(math.log(1.0 + total) / (1 + n))


def _select(tree: Tree, nodes: Sequence[Node], count: int, bonus: Bonus) -> list[Node]:
  allowed = {n.id for n in nodes}
  visits = {n.id: n.visits for n in tree.nodes.values()}
  expansions = {n.id: n.expansions for n in tree.nodes.values()}
  arms = _arms(tree, allowed)
  chosen: list[Node] = []
  closed: set[int] = set()
  for _ in range(count):
    if closed >= allowed:
      closed = set()
    path = _descend(tree, arms, allowed - closed, visits, expansions, bonus)
    chosen.append(tree.nodes[path[-1]])
    closed.add(path[-1])
    expansions[path[-1]] += 1
    for id in path:
      visits[id] += 1
  return chosen


def _arms(tree: Tree, allowed: set[int]) -> dict[int, list[int]]:
  """Children that lead to an allowed node, by parent; NO_NODE holds the roots."""
  arms: dict[int, list[int]] = {}
  seen: set[int] = set()
  for id in sorted(allowed):
    while id not in seen and id != NO_NODE:
      seen.add(id)
      parent = tree.nodes[id].parent
      arms.setdefault(parent, []).append(id)
      id = parent
  return arms


def _open(arms: dict[int, list[int]], id: int, free: set[int]) -> bool:
  return id in free or any(_open(arms, child, free) for child in arms.get(id, []))


def _descend(
  tree: Tree,
  arms: dict[int, list[int]],
  free: set[int],
  visits: dict[int, int],
  expansions: dict[int, int],
  bonus: Bonus,
) -> list[int]:
  path: list[int] = []
  here = NO_NODE
  while True:
    children = [id for id in arms.get(here, []) if _open(arms, id, free)]
    total = visits[here] if here != NO_NODE else sum(visits[id] for id in children)
    own = [here] if here in free else []
    priors = _priors(tree, children + own)
    means = {id: tree.nodes[id].value / max(1, tree.nodes[id].visits) for id in children}
    bounds = [(means[id] + bonus(total, visits[id], priors[id]), -id) for id in children]
    best = max(bounds, default=(-math.inf, 0))
    if own:
      bound = tree.nodes[here].score + bonus(total, expansions[here], priors[here])
      if bound >= best[0]:
        return path
    here = -best[1]
    path.append(here)


def _priors(tree: Tree, ids: Sequence[int]) -> dict[int, float]:
  """AFlow's mixture over the nodes' scores, times their number; one without a score counts 0."""
  scores = [tree.nodes[id].score for id in ids]
  weights = mixture([0.0 if math.isnan(s) else s for s in scores]) if ids else []
  return {id: weight * len(ids) for id, weight in zip(ids, weights, strict=True)}
