"""Mode eval after a search: the choice of the best, self-consistency, intervals, tokens, costs."""

import contextlib
import json
import logging
import math
import shlex
import statistics

import numpy as np
import pytest
from conftest import ROOT

from awf import cli
from awf.config_io import resolve_paths
from awf.evaluate import _Outcome, run_eval, voted
from awf.search.adopt import ADOPTED
from awf.search.choose import Choice, choose, lower_bound, read_trees, seed_of
from awf.search.tree import NO_NODE, Node, Tree
from awf.terminal import track
from awf.train import run_search
from awf.types import Failure, WorkflowSource
from awf.workdir import Workdir

SMALL = (
  "--config=configs/quickstart.py:smoke", "--config.mesh.data=1", "--config.eval.problems=3",
  "--config.sandbox.wall_seconds=600", "--config.sandbox.preload_numeric=false",
  "--config.executor.max_new_tokens=64",
  "--config.search.starts=data/nano/starts.jsonl", "--config.search.start_share=0.5",
)  # fmt: skip


@pytest.mark.parametrize(("mean", "n", "candidates"), [(0.5, 20, 1), (0.9, 50, 8), (1.0, 10, 3)])
def test_the_bound_is_where_the_measured_mean_lies_z_standard_errors_above(mean, n, candidates):
  bound = lower_bound(mean, n, candidates)
  z = statistics.NormalDist().inv_cdf(1 - 0.05 / candidates)
  assert (mean - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(z)
  assert lower_bound(mean, n, candidates + 1) < bound < lower_bound(mean, n + 1, candidates) < mean


def test_the_bound_of_the_best_of_many_holds_and_its_mean_does_not():
  rng, truth, n, many, times = np.random.default_rng(0), 0.6, 60, 12, 2000
  best = rng.binomial(n, truth, (times, many)).max(axis=1) / n
  assert np.mean(best > truth) > 0.99
  assert np.mean([lower_bound(m, n, many) > truth for m in best]) <= 0.05
  assert np.mean([lower_bound(m, n, 1) > truth for m in best]) > 0.3  # without the correction
  for bad in ((0.5, 0, 1), (0.5, 5, 0), (0.5, 5, 1, 0.4)):
    with pytest.raises(ValueError, match="expected"):
      lower_bound(*bad)


def node(id, solved, n, key="", parent=1, **fields):
  scores = {f"p{i}": float(i < solved) for i in range(n)}
  return Node(
    id, parent, WorkflowSource(f"graph {id}", ""), key or f"k{id}", "", "full", scores=scores,
    **fields,
  )  # fmt: skip


def test_more_problems_outweigh_a_slightly_better_mean():
  seed = node(1, 5, 20, parent=NO_NODE)
  few, many = node(2, 5, 5), node(3, 95, 100)
  failed = Node(4, 1, few.source, "k4", "", "smoke", failure=Failure("wrong", "x"))
  copy = node(5, 20, 20, key="k2", duplicate_of=2)
  adopted = Node(6, 1, WorkflowSource("graph 6", ""), "", "", "full", scores={ADOPTED: 0.99})
  tree = Tree({n.id: n for n in (seed, few, many, failed, copy)})
  chosen = choose({"workspace": tree}, ("full",), 1000)
  expected = lower_bound(0.95, 100, 3)
  assert chosen == Choice(many.source, "workspace", 3, 0.95, expected, 3, 100)
  assert "source" not in chosen.facts() and chosen.facts()["level"] == 0.95
  both = {"workspace": tree, "workspace_2": Tree({1: seed, 6: adopted})}
  chosen = choose(both, ("full",), 1000)
  assert (chosen.search, chosen.round, chosen.problems) == ("workspace_2", 6, 1000)
  assert chosen.candidates == 4  # the seed of both searches is one workflow
  assert choose({}, ("full",), 1) is None and seed_of({}) is None
  assert seed_of(both) == seed.source


def test_the_most_frequent_answer_counts():
  def vote(*answers):
    return voted([_Outcome(float(a == "7"), a, 1, 10, 2) for a in answers])

  assert vote("5", "7", "7.0", "5.", " 7") == _Outcome(1.0, "7", 5, 50, 10)
  assert vote("5", "7").answer == "5"  # the earlier one of equals
  assert vote("Tom  Sawyer", "7", "tom sawyer").answer == "Tom  Sawyer"
  assert vote(None, "", "7").answer == "7"  # who fails or says nothing has no vote
  assert vote("50%", "50", "50 %").answer == "50%"
  assert vote(None, None) == _Outcome(0.0, None, 2, 20, 4)
  lost = voted([_Outcome(1.0, "7"), _Outcome(math.nan)])
  assert math.isnan(lost.score)


def readme_flags():
  text = (ROOT / "README.md").read_text().split("\n### Evaluate\n")[1].split("```")[1]
  program, script, *argv = shlex.split(text)
  assert (program, script) == ("python", "launch.py")
  return argv


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
  """(search's figures, eval's figures, its log lines, the run's directory)."""
  folder, lines = tmp_path_factory.mktemp("flow") / "run", []
  handler = logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage())
  log, results = logging.getLogger("awf"), []
  level = log.level
  log.setLevel(logging.INFO)
  log.addHandler(handler)

  @contextlib.contextmanager
  def told(*args, **kwargs):
    with track(*args, **kwargs) as stage:
      yield stage
      lines.append(stage.amount() + " of the " + stage.name)

  patch = pytest.MonkeyPatch()
  patch.setattr("awf.evaluate.track", told)
  for mode, function in (("search", run_search), ("eval", run_eval)):
    argv = readme_flags() if mode == "eval" else ["--mode=search"]
    command = cli.parse([*argv, *SMALL, f"--workdir={folder}"])
    assert command.mode == mode
    with Workdir(command.workdir) as workdir:
      workdir.open(command.config, mode)
      results.append(function(resolve_paths(command.config), workdir))
  patch.undo()
  log.removeHandler(handler)
  log.setLevel(level)
  return *results, lines, folder


def test_one_flow_from_a_search_to_the_comparison(evaluated):
  searched, figures, lines, folder = evaluated
  assert json.loads(cli.json_line(figures)) == json.loads((folder / "eval.json").read_text())
  graded = figures["grader"]  # four contenders, and five votes of the fifth
  assert 0 < graded["graded"] <= (4 + 5) * 3 * 2 and graded["errors"] == 0
  assert "6/6 of the test split" in lines and "30/30 of the test split" in lines
  rows = figures["contenders"]
  assert list(rows) == ["best", "seed", "plain", "chain_of_thought", "self_consistency@5"]
  for row in rows.values():
    low, high = row["interval"]
    assert 0 <= low <= row["score"] <= high <= 1 and row["not_measured"] == 0
    assert list(row["pass_at_k"]) == ["1", "2"]
    assert row["pass_at_k"]["1"] == pytest.approx(row["score"])
    assert row["pass_at_k"]["1"] <= row["pass_at_k"]["2"]
    cost = (row["prompt_tokens"] * 0.15 + row["completion_tokens"] * 0.6) / 1e6
    assert row["cost_usd"] == pytest.approx(cost, abs=1e-6)
    assert row["cost_usd_per_problem"] * 3 * 2 == pytest.approx(cost, abs=1e-6)
  assert "gain_over_seed" not in rows["seed"] and rows["plain"]["gain_over_seed"]["mean"] == 0
  assert rows["plain"]["prompt_tokens"] == rows["seed"]["prompt_tokens"] > 0
  thought, voted = rows["chain_of_thought"], rows["self_consistency@5"]
  assert (thought["calls_per_problem"], voted["calls_per_problem"]) == (1, 5)
  assert voted["prompt_tokens"] == 5 * thought["prompt_tokens"]
  gain = rows["best"]["gain_over_seed"]
  assert gain["mean"] == pytest.approx(rows["best"]["score"] - rows["seed"]["score"])
  # plain calls are the seed's, and those of chain of thought are among those that vote
  different = rows["best"]["calls"] * (searched["best_score"] > searched["seed_score"])
  assert figures["llm_calls"] == rows["seed"]["calls"] + voted["calls"] + different
  assert figures["prices"] == [0.15, 0.6] and figures["problems"] == 3 and figures["samples"] == 2


def test_the_best_round_is_picked_by_its_bound_and_shown(evaluated):
  searched, figures, lines, folder = evaluated
  picked = figures["selection"]
  trees = read_trees(folder, "NANO")
  chosen = trees[picked["search"]].nodes[picked["round"]]
  assert chosen.score == picked["score"] == searched["best_score"]
  assert picked["lower_bound"] == lower_bound(chosen.score, 4, picked["candidates"])
  assert picked["problems"] == 4 and picked["candidates"] >= 2
  (head,) = [i for i, line in enumerate(lines) if line.startswith("contender")]
  assert head >= 0 and "pass@1  pass@2  calls  tokens" in lines[head]
  names = [line.split()[0] for line in lines[head + 1 : head + 6]]
  assert names == list(figures["contenders"])
  assert lines[head + 7].startswith(f"best: round {picked['round']} of workspace, ")
