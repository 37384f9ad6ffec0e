"""The whole loop on the shipped model: figures, files, exact resume, kill -9, a fair comparison."""

import json
import logging
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from awf.config_io import load_config, resolve_paths
from awf.system import hold_out
from awf.train import Loop, Progress, run_search, run_train
from awf.types import Problem, UserError
from awf.workdir import Workdir

FIGURES = (
  "seed_score", "best_score", "test_score_seed", "test_score_best", "valid_rate_first",
  "valid_rate_last", "proposal_score_before", "proposal_score_after", "proposal_gain_interval",
  "updates", "rounds", "llm_calls", "tokens_per_second", "wall_seconds", "workdir",
)  # fmt: skip


def small(rounds=2, **changes):
  """The quickstart, shrunk to seconds, with a comparison before and after."""
  c = load_config("configs/quickstart.py:smoke")
  c.search.rounds = rounds
  c.search.starts = "data/nano/starts.jsonl"
  c.search.start_share = 0.5
  c.search.full_problems = 2
  c.eval.parents = "data/nano/parents.jsonl"
  c.eval.parent_count, c.eval.parent_problems, c.eval.proposals_per_parent = 2, 2, 2
  c.eval.problems = 2
  c.sandbox.preload_numeric = False
  c.mesh.data = 1
  c.update_from_flattened_dict(changes)
  return c


def run(config, folder, function=run_train):
  logging.getLogger("awf").setLevel(logging.INFO)  # as launch.py does
  with Workdir(folder) as workdir:
    workdir.open(config, "train")
    return function(resolve_paths(config), workdir)


def results(folder):
  """Every file of a run that must be a function of config and seed."""
  files = ["metrics.jsonl", "metrics.csv", "best/graph.py", "best/prompt.py"]
  files += [f"trajectories/{p.name}" for p in sorted((folder / "trajectories").iterdir())]
  return {name: (folder / name).read_bytes() for name in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run of two rounds: (its folder, its figures)."""
  folder = tmp_path_factory.mktemp("whole")
  return folder, run(small(), folder)


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
  assert not [name for row in rows for name in row if name.startswith(("time/", "perf/"))]


def test_an_interrupted_run_resumes_to_the_same_results(whole, tmp_path, monkeypatch):
  folder, figures = whole
  original = Loop._round

  async def interrupted(self, search, epoch):
    if self.progress.step == 1:
      raise KeyboardInterrupt
    await original(self, search, epoch)

  monkeypatch.setattr(Loop, "_round", interrupted)
  with pytest.raises(KeyboardInterrupt):
    run(small(), tmp_path)
  monkeypatch.undo()
  again = run(small(), tmp_path)
  assert results(tmp_path) == results(folder)
  for name in ("proposal_score_before", "proposal_score_after", "test_score_best", "updates"):
    assert again[name] == figures[name], name


def test_a_killed_run_resumes_to_the_same_results(whole, tmp_path):
  folder, _ = whole
  config = tmp_path / "config.py"
  config.write_text("from test_train import small\n\ndef get_config(arg=None):\n  return small()\n")
  env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
  command = [sys.executable, "launch.py", f"--config={config}", f"--workdir={tmp_path / 'run'}"]
  first = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
  for line in first.stderr:
    if "round 1 of 2" in line:
      first.send_signal(signal.SIGKILL)
      break
  first.wait()
  first.stderr.close()
  assert first.returncode == -signal.SIGKILL
  done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  assert json.loads(done.stdout.splitlines()[-1])["rounds"] == 2
  assert results(tmp_path / "run") == results(folder)


def test_a_complete_run_gives_its_figures_again_without_running(whole):
  folder, figures = whole
  before = results(folder)
  again = run(small(), folder)
  assert results(folder) == before
  assert again["test_score_best"] == figures["test_score_best"]
  assert again["llm_calls"] == figures["llm_calls"]


def test_search_alone_trains_nothing_and_writes_a_workspace(tmp_path):
  figures = run(small(rounds=1), tmp_path, run_search)
  assert figures["updates"] == 0 and figures["rounds"] == 1
  assert (tmp_path / "workspace/NANO/workflows/results.json").is_file()


def test_an_unchanged_policy_gains_exactly_nothing(tmp_path):
  """Before and after draw with the same keys: without an update the comparison is zero."""
  figures = run(small(rounds=1, **{"optim.learning_rate": 0.0}), tmp_path)
  assert figures["proposal_gain"] == 0.0
  assert figures["proposal_score_before"] == figures["proposal_score_after"]


def test_another_seed_gives_another_run(whole, tmp_path):
  run(small(rounds=2, seed=1), tmp_path)
  assert results(tmp_path)["metrics.jsonl"] != results(whole[0])["metrics.jsonl"]


def test_held_out_problems_are_balanced_apart_and_seeded():
  problems = [Problem(f"{f}{i}", "text", "1", family=f) for f in "abc" for i in range(10)]
  held, rest = hold_out(problems, 6, seed=0)
  assert sorted(p.family for p in held) == list("aabbcc")
  assert {p.id for p in held}.isdisjoint(p.id for p in rest) and len(held) + len(rest) == 30
  assert held != hold_out(problems, 6, seed=1)[0]
  assert hold_out(problems, 0, seed=0) == ((), tuple(problems))
  with pytest.raises(UserError, match="config.eval.parent_problems"):
    hold_out(problems, 30, seed=0)


def test_progress_survives_json():
  progress = Progress(step=3, best={"score": 0.5})
  assert Progress(**json.loads(json.dumps(progress.__dict__))).step == 3
