"""When a search ends: rounds, calls, tokens, AFlow's convergence; and which arms it prefers."""

import dataclasses
import json
import math
import random

import pytest
from search_world import PROBLEMS, Executor, in_order, make_search, reply, run_rounds, workflow

from awf.sandbox import Sandbox, SandboxConfig
from awf.search.budget import spent
from awf.search.converge import converged, search_converged, standard_error
from awf.search.select import adapted_c, mixture, select_puct, select_uct
from awf.search.tree import NO_NODE, Node, Tree
from awf.types import WorkflowSource
from awf.workflow.contract import PRELOAD


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(SandboxConfig(preload_numeric=False, wall_seconds=600.0), preload=PRELOAD) as box:
    yield box


def aflows_rule(means, errors, rounds, z, top=3):
  """The rule as AFLOW states it, step by step, with rounds counted from 1."""
  if len(means) < top + 1:
    return None
  count, previous = 0, None
  for i in range(len(means)):
    order = sorted(range(i + 1), key=lambda r: means[r], reverse=True)[:top]
    y = sum(means[r] for r in order) / len(order)
    se = math.sqrt(sum(errors[r] ** 2 for r in order) / top**2)
    if previous is not None:
      if abs(y - previous[0]) <= z * math.sqrt(se**2 + previous[1] ** 2) + 1e-12:
        count += 1
        if count >= rounds:
          return i + 2 - rounds, i + 1
      else:
        count = 0
    previous = (y, se)
  return None


def test_convergence_is_aflows_with_the_right_rounds():
  assert converged([0.5] * 6, [0.0] * 6, 5) == (2, 6)
  assert converged([0.5] * 5, [0.0] * 5, 5) is None
  assert converged([0.1, 0.2, 0.3, 0.4, 0.2, 0.2, 0.1, 0.3, 0.3], [0.0] * 9, 5) is None
  assert converged([0.1, 0.2, 0.3, 0.4, 0.2, 0.2, 0.1, 0.2, 0.2], [0.0] * 9, 5) == (5, 9)
  assert converged([0.5] * 9, [0.0] * 9, 0) is None
  assert converged([0.5, 0.5, 0.5], [0.0] * 3, 1) is None  # not before top + 1 rounds
  noisy = [0.50, 0.52, 0.49, 0.51, 0.52, 0.53, 0.52, 0.53]
  assert converged(noisy, [0.0] * 8, 5) is None
  assert converged(noisy, [0.1] * 8, 5, z=1.0) == (2, 6)
  rng = random.Random(0)
  hits = 0
  for _ in range(500):
    size = rng.randrange(1, 14)
    means = [rng.choice((0.2, 0.3, 0.4)) for _ in range(size)]
    errors = [rng.choice((0.0, 0.05)) for _ in range(size)]
    rounds, z = rng.randrange(1, 6), rng.choice((0.0, 1.0))
    expected = aflows_rule(means, errors, rounds, z)
    hits += expected is not None
    if z == 0 or len(set(errors)) == 1:  # with equal means the order of errors is a matter of taste
      assert converged(means, errors, rounds, z) == expected
  assert 100 < hits < 500


def node(id, parent, score, **fields):
  scores = {"a": score, "b": score}
  return Node(id, parent, WorkflowSource("g", ""), str(id), "", "full", scores=scores, **fields)


def test_rounds_that_add_nothing_move_nothing():
  nodes = [node(1, 0, 0.5, born=1), node(2, 1, 0.6, born=1), node(3, 1, 0.4, born=2)]
  assert search_converged(nodes, 4, 3, 0.0) is None  # the top three still changed in round 2
  assert search_converged(nodes, 6, 3, 0.0) == (3, 5)
  # One that was made in round 1 and found to be good in round 4, when it was evaluated anew.
  late = dataclasses.replace(node(4, 1, 0.9, born=1), rated=4)
  assert search_converged([*nodes, late], 6, 3, 0.0) is None
  assert search_converged([*nodes, late], 7, 3, 0.0) == (5, 7)
  # Better ones of a workspace that was taken over: the new rounds move nothing.
  old = [node(10 + i, 1, 0.95) for i in range(3)]
  assert search_converged([*nodes, late, *old], 6, 3, 0.0) == (2, 4)
  mixed = Node(1, 0, WorkflowSource("g", ""), "", "", "full", scores={"a": 1.0, "b": 0.0})
  assert standard_error(mixed) == pytest.approx(0.5) and standard_error(nodes[0]) == 0.0


TREE = Tree(
  {
    1: node(1, NO_NODE, 0.4, visits=6, value=3.0, expansions=2),
    2: node(2, 1, 0.5, visits=3, value=1.5, expansions=1),
    3: node(3, 1, 0.6, visits=2, value=1.2, expansions=1),
    4: node(4, 2, 0.5, visits=1, value=0.5),
    5: node(5, 2, 0.5, visits=1, value=0.5),
  }
)


def test_puct_weighs_the_bonus_by_the_prior():
  nodes = TREE.selectable()
  assert [n.id for n in select_puct(TREE, nodes, 1, c=0.0)] == [3]
  priors = {i: 3 * p for i, p in zip((2, 3, 1), mixture([0.5, 0.6, 0.4]), strict=True)}
  for c in (0.05, 0.3, 1.0, 4.0):
    bound = {
      2: 0.5 + c * priors[2] * math.sqrt(6) / 4,
      3: 0.6 + c * priors[3] * math.sqrt(6) / 3,
      1: 0.4 + c * priors[1] * math.sqrt(6) / 3,
    }
    (chosen,) = select_puct(TREE, nodes, 1, c=c)
    path = {4: 2, 5: 2}.get(chosen.id, chosen.id)
    assert path == max(bound, key=bound.__getitem__), (c, bound)
  assert sorted(n.id for n in select_puct(TREE, nodes, 5, c=1.0)) == [1, 2, 3, 4, 5]
  assert [n.id for n in select_uct(TREE, nodes, 2, c=0.0)] == [3, 2]


def test_the_adapted_constant_follows_the_spread():
  close, far = [node(i, 0, 0.5 + 0.001 * i) for i in range(4)], [node(1, 0, 0.0), node(2, 0, 1.0)]
  assert adapted_c(close, 2.0) == pytest.approx(0.1)
  assert adapted_c(far, 2.0) == pytest.approx(2 * math.sqrt(0.5))
  assert adapted_c(far[:1], 2.0) == 2.0


STEPS = reply("Ask for steps.", workflow("Work in steps."))
HASTE = reply("Ask for haste.", workflow("Answer now."))
FIELDS = {"parents": 1, "group_size": 2, "full_top": 1, "problems": PROBLEMS[:6], "rounds": 9}


def until_done(search):
  while not search.why_done():
    run_rounds(search, 1)
  return search.rounds_done, search.why_done()


@pytest.mark.parametrize(
  ("fields", "rounds", "why"),
  [
    ({"rounds": 2}, 2, "config.search.rounds = 2"),
    ({"max_calls": 1}, 1, "config.search.max_calls = 1: "),
    ({"max_tokens": 1}, 1, "config.search.max_tokens = 1: "),
    # the second proposal is validated in round 2, when it comes again
    ({"converge_rounds": 4}, 6, "did not change in rounds 3 to 6"),
    ({"converge_rounds": 0, "rounds": 7}, 7, "config.search.rounds = 7"),
  ],
)
def test_a_search_ends_by_what_comes_first(sandbox, tmp_path, fields, rounds, why):
  search = make_search(
    sandbox, tmp_path, in_order([STEPS, HASTE]), Executor(by_text=True), **{**FIELDS, **fields}
  )
  done, reason = until_done(search)
  assert done == rounds and why in reason


def test_what_was_spent_does_not_depend_on_an_interrupt(sandbox, tmp_path):
  def new(name):
    executor = Executor(by_text=True)
    return make_search(
      sandbox, tmp_path / name, in_order([STEPS, HASTE]), executor, **FIELDS
    ), executor

  whole, executor = new("a")
  run_rounds(whole, 1)
  first = spent(whole._state.events)
  # the seed on six problems, two children on four common ones, the better one on all six
  assert first["calls"] == 2 + len(executor.asked) and first["tokens"] == 2 * 2 + 2 * len(
    executor.asked
  )
  state = json.loads(json.dumps(whole.state_dict()))
  run_rounds(whole, 2)
  resumed, _ = new("b")
  resumed.load_state_dict(state)
  run_rounds(resumed, 2)
  assert (
    spent(resumed._state.events) == spent(whole._state.events)
    and spent(whole._state.events)["calls"] > first["calls"]
  )
