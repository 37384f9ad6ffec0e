"""The curriculum: which problems a round's common set is drawn from, as the search goes on."""

import collections
import json
import random

import pytest
from search_world import PROBLEMS, Executor, make_search, run_rounds, scripted

from awf.sandbox import Sandbox, SandboxConfig
from awf.search.curriculum import PRIOR, by_solve_rate, problem_pool, solve_rates, spread
from awf.search.tree import Node, Tree
from awf.types import Failure, Problem, UserError, WorkflowSource
from awf.workflow.contract import PRELOAD


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(SandboxConfig(preload_numeric=False, wall_seconds=600.0), preload=PRELOAD) as box:
    yield box


def node(id, scores, **fields):
  return Node(id, 0, WorkflowSource("g", ""), str(id), "", "full", scores=scores, **fields)


TREE = Tree(
  {
    1: node(1, {"p1": 1.0, "p2": 0.0, "p3": 1.0}),
    2: node(2, {"p1": 1.0, "p2": 0.0, "": 1.0}),
    3: node(3, {"p1": 0.0, "p4": 0.0}, duplicate_of=1),
    4: node(4, {"p4": 0.0}, failure=Failure("wrong", "x")),
  }
)
FIVE = PROBLEMS[:5]


def test_solve_rates_count_different_workflows_that_were_evaluated():
  rates = solve_rates(TREE, FIVE)
  assert rates == {
    "p1": (PRIOR + 2) / 3, "p2": PRIOR / 3, "p3": (PRIOR + 1) / 2, "p4": PRIOR, "p5": PRIOR,
  }  # fmt: skip


def test_orders_are_stable():
  names = {
    "easy_first": ["p1", "p3", "p4", "p5", "p2"],
    "hard_first": ["p2", "p4", "p5", "p3", "p1"],
    "none": ["p1", "p2", "p3", "p4", "p5"],
  }
  for order, expected in names.items():
    assert [p.id for p in by_solve_rate(TREE, FIVE, order)] == expected


@pytest.mark.parametrize(
  ("share", "progress", "least", "size"),
  [(0.4, 0.0, 1, 2), (0.4, 0.5, 1, 4), (0.4, 1.0, 1, 5), (0.1, 0.0, 3, 3), (0.0, 0.0, 1, 1)],
)
def test_the_pool_grows_to_all_problems(share, progress, least, size):
  pool = problem_pool(TREE, FIVE, "easy_first", share, progress, least)
  assert pool == by_solve_rate(TREE, FIVE, "easy_first")[:size]
  assert problem_pool(TREE, FIVE, "none", share, progress, least) == list(FIVE)


def test_common_problems_go_from_easy_to_all_and_a_resumed_search_draws_the_same(sandbox, tmp_path):
  def search(name, order, **fields):
    fields = {"rounds": 3, "curriculum": order, "curriculum_share": 0.25, **fields}
    proposer, executor = scripted(), Executor(by_text=True)
    return make_search(sandbox, tmp_path / name, proposer, executor, **fields)

  def commons(one):
    return [set(e["common"]) for e in one._state.events if e["event"] == "round"]

  easy, hard, plain = (search(o, o) for o in ("easy_first", "hard_first", "none"))
  for one in (easy, hard, plain):
    run_rounds(one, 1)
  solved = {id for id, score in plain.tree.nodes[1].scores.items() if score}
  assert 2 <= len(solved) <= 8  # luck by text: some problems are easy for every workflow
  assert len(commons(easy)[0] & solved) >= 2 and not commons(hard)[0] & solved
  assert easy.common_problems(1) != plain.common_problems(1)
  state = json.loads(json.dumps(easy.state_dict()))
  run_rounds(easy, 2)
  again = search("again", "easy_first")
  again.load_state_dict(state)
  run_rounds(again, 2)
  assert commons(again) == commons(easy) and again.tree == easy.tree
  last = problem_pool(easy.tree, PROBLEMS, "easy_first", 0.25, 1.0, 4)
  assert {p.id for p in last} == {p.id for p in PROBLEMS}


def test_a_wrong_order_is_refused(sandbox, tmp_path):
  with pytest.raises(UserError, match="config.search.curriculum: expected one of none"):
    make_search(sandbox, tmp_path, scripted(), curriculum="easy")


def test_a_draw_has_its_share_of_every_family_and_each_problem_alike():
  sizes = {"a": 18, "b": 9, "c": 3}
  problems = [Problem(f"{f}{i}", "", family=f) for f, n in sizes.items() for i in range(n)]
  times = collections.Counter()
  for seed in range(400):
    drawn = spread(problems, 10, random.Random(seed))
    assert collections.Counter(p.family for p in drawn) == {"a": 6, "b": 3, "c": 1}
    times.update(p.id for p in drawn)
  assert len(times) == 30 and all(90 < count < 180 for count in times.values())  # of 133
  uneven = collections.Counter(p.family for p in spread(problems, 4, random.Random(0)))
  assert uneven["a"] in (2, 3) and uneven["b"] in (1, 2)
  assert {p.id for p in spread(problems, 30, random.Random(0))} == {p.id for p in problems}
  assert spread(problems, 10, random.Random(7)) == spread(problems, 10, random.Random(7))
  assert len({spread(problems, 10, random.Random(s))[0].family for s in range(9)}) > 1
