"""Which problems an episode takes, and that a search for each of them goes on where it stopped."""

import asyncio
import dataclasses
import json
import random

import pytest
from search_world import PROBLEMS, SEED, Executor, make_search, scripted

from awf.progress import Progress
from awf.sandbox import Sandbox, SandboxConfig
from awf.scope import draws_of, make_scope
from awf.search.curriculum import episode_problems
from awf.tasks.aime import AIMEEvaluator
from awf.types import SamplingParams
from awf.workflow.contract import PRELOAD
from awf.workflow.runner import WorkflowRunner
from configs.base import base_config


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(SandboxConfig(preload_numeric=False, wall_seconds=600.0), preload=PRELOAD) as box:
    yield box


class World:
  """Stands where `awf.system.System` does; the search, its files and the sandbox are real."""

  def __init__(self, sandbox, path, **changes):
    self.config = base_config()
    self.config.search.scope = "problem"
    self.config.update_from_flattened_dict(changes)
    self.search_problems, self.task, self.seed_source = PROBLEMS, AIMEEvaluator(), SEED
    self._sandbox, self._path = sandbox, path

  def runner(self):
    fields = {"dataset": "AIME", "question_type": "math", "seed": 3}
    return WorkflowRunner(self._sandbox, Executor(), SamplingParams(), **fields)

  def make_search(self, number, agree, problems):
    path = self._path / str(number)
    fields = {"rounds": 2, "subset_problems": 2, "full_top": 1}
    return make_search(
      self._sandbox, path, scripted(), problems=problems, seed=number, starts=(), **fields
    )


def run_all(world, searches, kill_at=()):
  """The loop over searches and rounds; at these (search, round) only what JSON keeps goes on."""
  scope, p, search, ended = make_scope(world), Progress(), None, []
  rows = []
  while p.episode < searches:
    search = search or scope.make_search(p, None)
    while not search.why_done():
      result = asyncio.run(search.round())
      rows.append({"level": "batch", **result.metrics})
      if (p.episode, search.rounds_done) in kill_at:
        kept = json.loads(json.dumps([dataclasses.asdict(p), search.state_dict()]))
        scope, p = make_scope(world), Progress(**kept[0])
        search = scope.make_search(p, None)
        search.load_state_dict(kept[1])
    scope.end_search(p, search, rows[len(rows) - search.rounds_done :])
    ended.append(([x.id for x in search.problems], search.tree))
    p.episode, search = p.episode + 1, None
  return scope, p, ended


CHANGES = {"train.problems": 2, "train.episodes": 2, "search.draws": 3}


@pytest.mark.parametrize("order", ["none", "easy_first"])
def test_what_is_killed_amid_a_problem_goes_on_as_if_it_were_not(sandbox, tmp_path, order):
  changes = {**CHANGES, "search.curriculum": order}
  _, whole, searches = run_all(World(sandbox, tmp_path / "whole", **changes), 4)
  kills = {(0, 1), (1, 2), (3, 1)}
  _, again, same = run_all(World(sandbox, tmp_path / "killed", **changes), 4, kills)
  assert same == searches and again.by_problem == whole.by_problem
  problems = [ids[0].partition("#")[0] for ids, _ in searches]
  assert all([id.partition("#")[2] for id in ids] == ["1", "2", "3"] for ids, _ in searches)
  assert len(set(problems)) == 4 or order != "none"
  assert [row["problem"] for row in whole.by_problem["ended"]] == [
    [p.id for p in PROBLEMS].index(id) for id in problems
  ]


def test_the_end_takes_the_best_of_the_winners_on_the_data_set(sandbox, tmp_path):
  world = World(sandbox, tmp_path, **CHANGES)
  scope, p, searches = run_all(world, 2)
  best = asyncio.run(scope.best(p, None))
  assert "Work in steps." in best["prompt"] and best["score"] == 1.0 > best["seed_score"]
  figures = scope.figures(p)
  assert figures["searches"] == 2
  trees = [tree for _, tree in searches]
  seeds = [tree.nodes[1].score for tree in trees]
  assert figures["by_problem"]["seed_score"] == pytest.approx(sum(seeds) / 2)
  rates = p.by_problem["rates"]
  assert len(rates) == 2 and all(0.0 <= total <= count for total, count in rates.values())
  cut_off = scope.make_search(p, None)
  asyncio.run(cut_off.round())
  assert asyncio.run(scope.best(Progress(), cut_off))["score"] >= best["seed_score"]


def test_a_search_that_was_cut_off_may_have_found_the_best(sandbox, tmp_path):
  world = World(sandbox, tmp_path, **CHANGES, **{"search.scope": "dataset"})
  scope, p = make_scope(world), Progress()
  search = world.make_search(0, None, world.search_problems)
  asyncio.run(search.round())
  found = asyncio.run(scope.best(p, search))
  assert found["score"] == search.best().score
  for score, expected in ((found["score"] - 0.1, found["score"]), (2.0, 2.0)):
    p.best = {**found, "score": score}
    assert asyncio.run(scope.best(p, search))["score"] == expected
  assert asyncio.run(scope.best(p, None)) == p.best


def test_one_draw_where_the_executor_does_not_sample(sandbox, tmp_path):
  world = World(sandbox, tmp_path, **{**CHANGES, "executor.temperature": 0.0})
  assert len(make_scope(world).make_search(Progress(), None).problems) == 1


def choose(order, rates, start, count=2, progress=0.0, share=0.5):
  chosen = episode_problems(
    PROBLEMS, rates, order, share, progress, range(start, start + count),
    lambda *what: random.Random(repr(what)),
  )  # fmt: skip
  return [p.id for p in chosen]


def test_without_a_curriculum_every_problem_comes_once_a_turn():
  turn = [id for start in range(0, 12, 3) for id in choose("none", {}, start, 3)]
  assert sorted(turn) == sorted(p.id for p in PROBLEMS) and turn != [p.id for p in PROBLEMS]
  second = choose("none", {}, 12, 12)
  assert sorted(second) == sorted(turn) and second != turn
  assert choose("none", {}, 10, 4) == [*turn[10:], *second[:2]]


def test_a_curriculum_orders_the_episodes_problems_by_their_solve_rates():
  rates = {p.id: i / 12 for i, p in enumerate(PROBLEMS)}
  ids = [p.id for p in PROBLEMS]
  easy, hard = (choose(order, rates, 0, 4) for order in ("easy_first", "hard_first"))
  assert set(easy) <= set(ids[6:]) and easy == sorted(easy, key=ids.index, reverse=True)
  assert set(hard) <= set(ids[:6]) and hard == sorted(hard, key=ids.index)
  assert choose("easy_first", rates, 0, 12, progress=1.0) == ids[::-1]


def test_draws_are_the_same_question_under_other_names():
  first, second = draws_of(PROBLEMS[0], 2)
  assert (first.id, second.id) == ("p1#1", "p1#2")
  assert first.prompt == second.prompt and first.answer == second.answer
