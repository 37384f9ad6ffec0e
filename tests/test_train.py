"""The whole loop on the shipped model: figures, files, exact resume, kill -9, a fair comparison."""

import json
import logging
import math
import random
import resource
import signal
import statistics

import pytest
from kill_run import Run
from small_run import differences, made_once, results, small

from awf.config_io import resolve_paths
from awf.progress import Progress
from awf.system import hold_out
from awf.train import run_search, run_train
from awf.types import Problem, UserError
from awf.workdir import Workdir

FIGURES = (
  "seed_score", "best_score", "test_score_seed", "test_score_best", "valid_rate_first",
  "valid_rate_last", "proposal_score_before", "proposal_score_after", "proposal_gain_interval",
  "updates", "rounds", "llm_calls", "tokens_per_second", "wall_seconds", "workdir",
)  # fmt: skip

RESULTS = (
  "reward", "reward_std", "rewards/stage/mean", "rewards/score/mean", "frac_reward_zero_std",
  "completions/mean_length", "completions/min_length", "completions/max_length",
  "completions/clipped_ratio", "loss", "policy_loss", "entropy", "kl", "clip_ratio/low_mean",
  "clip_ratio/high_mean", "clip_ratio/region_mean", "grad_norm", "learning_rate",
  "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
  "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/mean",
  "sampling/importance_sampling_ratio/max", "mcts/pass@1", "mcts/pass@4", "mcts/total_rounds",
  "mcts/success", "mcts/best_score", "mcts/tree_depth", "mcts/duplicates",
  "mcts/stage/full/passed", "mcts/stage/full/failed", "checkpoint_quality",
)  # fmt: skip
TIMINGS = (
  "perf/tokens_per_second", "perf/mfu", "perf/mbu", "perf/peak_memory_gb", "time/search",
  "time/rollout", "time/evaluate", "time/grade", "time/update", "time/step", "grader/graded",
)  # fmt: skip


def run(config, folder, function=run_train):
  logging.getLogger("awf").setLevel(logging.INFO)  # as launch.py does
  with Workdir(folder) as workdir:
    workdir.open(config, "train")
    return function(resolve_paths(config), workdir)


def whole_run(tmp_path_factory):
  """`small()` left alone; made once for all test files."""
  return made_once(tmp_path_factory, "whole", lambda folder: run(small(), folder))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run of two rounds: (its folder, its figures)."""
  return whole_run(tmp_path_factory)


def test_a_run_reports_every_figure_and_leaves_every_file(whole):
  folder, figures = whole
  assert not [name for name in FIGURES if name not in figures]
  assert figures["rounds"] == 2 and all(figures["stages"].values())
  low, high = figures["proposal_gain_interval"]
  assert low <= figures["proposal_gain"] <= high
  for name in ("config.json", "timings.jsonl", "report.html", "summary.json", "run.log"):
    assert (folder / name).stat().st_size > 0, name
  assert list((folder / "tb").iterdir()) and list((folder / "checkpoints").iterdir())
  assert (folder / "workspace/NANO/workflows/results.json").is_file()
  rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [r["step"] for r in rows if r["level"] == "batch"] == [1, 2]
  assert not [
    name for row in rows for name in row if name.startswith(("time/", "perf/", "grader/"))
  ]


def read(path):
  return [json.loads(x) for x in path.read_text().splitlines()]


def test_every_metric_is_there_and_agrees_with_the_trajectories(whole):
  """Names of the documentation; values computed here from what the run wrote of its proposals."""
  folder, _ = whole
  rows = read(folder / "metrics.jsonl")
  batches = [row for row in rows if row["level"] == "batch"]
  (epoch,) = [row for row in rows if row["level"] == "epoch"]
  size = 4  # of a group
  for row in batches:
    assert not [name for name in RESULTS if row.get(name) is None]
    made = read(folder / "trajectories" / f"round_{row['step']:04d}.jsonl")
    rewards = [x["reward"] for x in made]
    assert row["reward"] == pytest.approx(statistics.fmean(rewards))
    groups = {x["group"]: [y["reward"] for y in made if y["group"] == x["group"]] for x in made}
    spread = [statistics.stdev(g) for g in groups.values()]
    assert row["reward_std"] == pytest.approx(statistics.fmean(spread))
    assert row["frac_reward_zero_std"] == pytest.approx(sum(s == 0 for s in spread) / len(spread))
    for part in ("stage", "score"):
      values = [x["parts"][part] for x in made]
      assert row[f"rewards/{part}/mean"] == pytest.approx(statistics.fmean(values))
    lengths = [x["tokens"] for x in made]
    assert row["completions/mean_length"] == pytest.approx(statistics.fmean(lengths))
    assert row["completions/min_length"] == min(lengths)
    assert row["completions/max_length"] == max(lengths)
    cut = sum(x["finish_reason"] == "length" for x in made)
    assert row["completions/clipped_ratio"] == pytest.approx(cut / len(made))
    for k in (1, size):
      assert row[f"mcts/pass@{k}"] == pytest.approx(proposals_pass_at_k(made, k))
    for stage in ("format", "static", "smoke", "subset"):
      failed = sum(x["failure"] is not None and x["stage"] == stage for x in made)
      assert row[f"mcts/stage/{stage}/failed"] == failed
    assert row["mcts/total_rounds"] == row["step"]
    assert row["checkpoint_quality"] == (row["mcts/best_score"] > row["mcts/seed_score"])
  each = [row[f"mcts/pass@{size}"] for row in batches]
  assert epoch["avg_pass_at_k"] == pytest.approx(statistics.fmean(each))
  assert epoch["checkpoint_quality"] == batches[-1]["checkpoint_quality"]
  assert epoch["loss"] == pytest.approx(statistics.fmean(row["loss"] for row in batches))


def proposals_pass_at_k(made, k):
  """Mean over the problems of 1 - C(n - c, k) / C(n, k)."""
  ids = {id for x in made if x["score"] is not None for id in x["scores"]}
  solved = {id: sum(x["scores"].get(id, 0) == 1 for x in made if x["score"] is not None)
            for id in ids}  # fmt: skip
  n = len(made)
  return statistics.fmean(1 - math.comb(n - c, k) / math.comb(n, k) for c in solved.values())


def test_timings_name_every_part_and_add_up(whole):
  timings = read(whole[0] / "timings.jsonl")
  rounds = [row for row in timings if "time/step" in row]
  assert [row["step"] for row in rounds] == [1, 2]
  for row in rounds:
    assert not [name for name in TIMINGS if not row.get(name, 0.0) > 0.0]
    assert row["time/step"] == pytest.approx(row["time/search"] + row["time/update"])
    assert max(row["time/rollout"], row["time/evaluate"]) <= row["time/search"]
    assert row["perf/mfu"] < 1.5  # of a measured peak
    assert row["time/grade"] <= row["time/search"] and row["grader/errors"] == 0
  counters = json.loads((whole[0] / "parts.json").read_text())["grader"]
  # The comparison before and after, and the test at the end, have answers graded too.
  assert counters["graded"] > sum(row["grader/graded"] for row in rounds)
  assert counters["graded"] >= counters["right"] > 0
  saved = [row["step"] for row in timings if row.get("time/checkpoint", 0.0) > 0.0]
  assert saved[:2] == [1, 2] and all("time/checkpoint" not in row for row in rounds[1:])
  assert rounds[0]["perf/compile_seconds"] > 0.0


def test_a_complete_run_goes_on_when_more_rounds_are_asked_for(whole, tmp_path):
  """One round, then a second one: the files are those of two rounds at a stretch."""
  assert run(small(rounds=1), tmp_path)["rounds"] == 1
  again = run(small(), tmp_path)
  assert again["rounds"] == 2 and differences(tmp_path, whole[0]) == []


def fill_disk(rollouts):
  """A metric (`config.metrics`) after which no large file can be written: the checkpoint fails."""
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
  return {}


def test_a_run_survives_a_full_disk_signals_and_kills(whole, tmp_path):
  """One directory, six processes; `make test-kill` does it at length."""
  config = tmp_path / "config.py"
  config.write_text("from small_run import small\n\ndef get_config(arg=None):\n  return small()\n")
  life, rng = Run(tmp_path / "run", config), random.Random(0)
  full = life.start("--config.metrics=test_train:fill_disk")
  assert full.wait() == 2
  (line,) = [x for x in life.output().splitlines() if x.startswith("error: ")]
  assert "could not be written" in line and "File too large" in line and "intact ([1])" in line
  assert "Traceback" not in life.output()
  places = [life.interrupt(*at) for at in (
    ("metrics", rng), ("after workflow", rng, signal.SIGTERM), ("save", rng), ("rename", rng),
  )]  # fmt: skip
  assert places.count("end") <= 2, places
  life.finish()
  assert differences(life.folder, whole[0]) == []


def test_a_complete_run_gives_its_figures_again_without_running(whole):
  folder, figures = whole
  before = results(folder)
  again = run(small(), folder)
  assert results(folder) == before
  assert again["test_score_best"] == figures["test_score_best"]
  assert again["llm_calls"] == figures["llm_calls"]


def test_search_alone_trains_nothing_writes_a_workspace_and_ends_in_time(tmp_path):
  """Of three rounds the first is all that a limit of a moment leaves."""
  figures = run(small(rounds=3, **{"train.minutes": 1e-6}), tmp_path, run_search)
  assert figures["updates"] == 0 and figures["rounds"] == 1
  assert (tmp_path / "workspace/NANO/workflows/results.json").is_file()


def test_an_unchanged_policy_gains_exactly_nothing_and_another_seed_draws_otherwise(
  whole, tmp_path
):
  """Before and after draw with the same keys: without an update the comparison is zero.

  The proposals of the first round come before any update, so only the seed can change them.
  """
  figures = run(small(rounds=1, **{"optim.learning_rate": 0.0, "seed": 1}), tmp_path)
  assert figures["proposal_gain"] == 0.0
  assert figures["proposal_score_before"] == figures["proposal_score_after"]
  ours, theirs = (
    read(folder / "trajectories" / "round_0001.jsonl") for folder in (tmp_path, whole[0])
  )
  assert len(ours) == len(theirs) > 0
  assert [row["text"] for row in ours] != [row["text"] for row in theirs]


def test_held_out_problems_have_their_families_shares_apart_and_seeded():
  problems = [Problem(f"{f}{i}", "text", "1", family=f) for f in "abc" for i in range(10)]
  held, rest = hold_out(problems, 6, seed=0)
  assert sorted(p.family for p in held) == list("aabbcc")
  assert {p.id for p in held}.isdisjoint(p.id for p in rest) and len(held) + len(rest) == 30
  assert held != hold_out(problems, 6, seed=1)[0]
  assert hold_out(problems, 0, seed=0) == ((), tuple(problems))
  few = problems[:10] + problems[10:13]  # ten of a, three of b
  for count in range(1, 13):
    held = hold_out(few, count, seed=count)[0]
    assert len(held) == count and abs(sum(p.family == "b" for p in held) - count * 3 / 13) < 1
  with pytest.raises(UserError, match="config.eval.parent_problems"):
    hold_out(problems, 30, seed=0)


def test_progress_survives_json():
  progress = Progress(step=3, best={"score": 0.5})
  assert Progress(**json.loads(json.dumps(progress.__dict__))).step == 3
