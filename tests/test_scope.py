"""A search for each problem: which problems, what is measured, a kill amid a problem, the end."""

import json
import random
import statistics

import pytest
from kill_run import Run
from small_run import differences, small
from test_train import run

from awf.config import validate
from awf.config_io import load_config
from awf.types import UserError

CHANGES = {
  "search.scope": "problem",
  "search.draws": 3,
  "search.curriculum": "easy_first",
  "train.problems": 2,
  "train.episodes": 2,
  "eval.parent_count": 0,
  "train.keep_checkpoints": 8,
}
CONFIG = (
  f"from small_run import small\n\ndef get_config(arg=None):\n  return small(1, **{CHANGES})\n"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run: two episodes, two problems each, one round a problem."""
  folder = tmp_path_factory.mktemp("problems")
  return folder, run(small(1, **CHANGES), folder)


def rows_of(folder, level):
  lines = (folder / "metrics.jsonl").read_text().splitlines()
  return [row for row in map(json.loads, lines) if row["level"] == level]


def test_each_problem_has_a_search_of_its_own(whole):
  folder, figures = whole
  assert figures["rounds"] == 4 and figures["searches"] == 4
  assert figures["updates"] + figures["skipped_updates"] == 4
  searches = sorted(path.name for path in (folder / "workspace").iterdir())
  assert [name[:6] for name in searches] == ["00001_", "00002_", "00003_", "00004_"]
  for name in searches:
    journal = folder / "workspace" / name / "NANO" / "journal.jsonl"
    events = map(json.loads, journal.read_text().splitlines())
    nodes = [e["node"] for e in events if e["event"] == "add"]
    seed, id = nodes[0], name[6:]
    assert set(seed["scores"]) == {f"{id}#{i}" for i in (1, 2, 3)}
    assert all(set(n["scores"]) <= set(seed["scores"]) for n in nodes)
  assert searches[0] in (folder / "report.html").read_text()


def test_figures_of_the_searches_are_those_of_their_rounds(whole):
  folder, figures = whole
  batches, ended = rows_of(folder, "batch"), rows_of(folder, "search")
  assert [row["step"] for row in ended] == [row["step"] for row in batches] == [1, 2, 3, 4]
  for batch, row in zip(batches, ended, strict=True):
    assert row["mcts/pass@4"] == batch["mcts/pass@4"]
    assert row["mcts/solved@4"] == batch["mcts/solved@4"]
    assert row["best_score"] == batch["mcts/best_score"] >= row["seed_score"]
  for name in ("mcts/pass@1", "mcts/pass@4", "mcts/solved@4", "best_score"):
    mean = statistics.fmean(row[name] for row in ended)
    assert figures["by_problem"][name.removeprefix("mcts/")] == pytest.approx(mean)
  (epoch,) = rows_of(folder, "epoch")
  assert epoch["checkpoint_quality"] == sum(r["best_score"] > r["seed_score"] for r in ended)


def test_the_end_compares_the_winners_on_the_data_set(whole):
  folder, figures = whole
  assert figures["best_score"] >= figures["seed_score"]
  assert 0.0 <= figures["test_score_best"] <= 1.0
  assert "class Workflow" in (folder / "best" / "graph.py").read_text()


def test_a_run_that_is_killed_amid_a_problem_ends_with_the_same_bytes(whole, tmp_path):
  config = tmp_path / "config.py"
  config.write_text(CONFIG)
  life = Run(tmp_path / "run", config)
  assert life.interrupt("manifest", random.Random(1)) != "end"
  again = run(small(1, **CHANGES), life.folder)
  assert again["searches"] == 4 and differences(life.folder, whole[0]) == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"train.problems": 3}, "config.train.problems = 3: expected 0"),
    ({"search.scope": "problems"}, "did you mean problem?"),
    ({"search.scope": "problem", "search.workspace": "awf"}, "config.search.workspace: "),
    ({"search.draws": 0}, "config.search.draws = 0: expected at least 1"),
  ],
)
def test_mistakes_name_their_field(changes, message):
  config = load_config("configs/quickstart.py:smoke")
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError) as found:
    validate(config)
  assert message in str(found.value)
