"""The README's extensions, run as they stand there: data set, policy, metric; and mistakes."""

import asyncio
import json
import re
import shlex
import shutil
import sys

import pytest
from conftest import ROOT
from test_workspace import aflow_workspace

from awf import cli
from awf.config import validate
from awf.config_io import load_config, resolve_paths, set_field
from awf.own_metrics import OwnMetrics
from awf.policy import make_policy
from awf.qwen.tokenizer import load_tokenizer
from awf.sampler.engine import Engine
from awf.tasks import make_task
from awf.train import run_search, run_train
from awf.types import Rollout, UserError
from awf.workdir import Workdir
from configs.base import base_config

MAX_LINES = 15


def snippets():
  """File name -> (source, flags) of the Python blocks in the README's section Extend."""
  section = (ROOT / "README.md").read_text().split("\n## Extend\n")[1].split("\n## ")[0]
  found = {}
  for source in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
    name, flags = re.fullmatch(r"# (\w+\.py)   (--.*)", source.splitlines()[0]).groups()
    found[name] = (source, flags.split())
  return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working directory with the snippets as files; its modules are forgotten afterwards."""
  for name, (source, _) in snippets().items():
    (tmp_path / name).write_text(source)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  known = set(sys.modules)
  yield tmp_path
  for name in set(sys.modules) - known:
    if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
      del sys.modules[name]


def flag_of(name):
  return {n: flags for n, (_, flags) in snippets().items()}[name]


def test_the_readme_has_three_snippets_of_at_most_15_lines():
  assert sorted(snippets()) == ["patient.py", "sums.py", "variety.py"]
  for source, _ in snippets().values():
    assert len(source.splitlines()) <= MAX_LINES


def test_a_data_set_of_ones_own_is_loaded_split_and_graded(folder):
  rows = [{"question": f"What is {i} + 2?", "sum": i + 2} for i in range(10)]
  (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  argv = ["--config=configs/quickstart.py:smoke", *flag_of("sums.py")]
  task = make_task(resolve_paths(cli.parse(argv).config).task)
  validation, test = task.split_dataset()
  assert (len(validation), len(test)) == (8, 2)
  assert {p.prompt for p in (*validation, *test)} == {row["question"] for row in rows}
  problem = next(p for p in (*validation, *test) if p.id == "sums-7")
  for response, correct in (("<answer>9</answer>", True), ("7 + 2 is 9.0", True), ("8", False)):
    assert asyncio.run(task.grade(problem, response)).correct is correct, response
  (folder / "sums.jsonl").write_text('{"quest": "?", "sum": 1}\n')
  with pytest.raises(UserError, match="line 1: no field 'question'"):
    task.load_dataset()


def test_a_policy_and_a_metric_of_ones_own_run_in_the_loop(folder, monkeypatch):
  argv = [*flag_of("patient.py"), *flag_of("variety.py"), "--config.mesh.data=1"]
  command = cli.parse(["--config=configs/quickstart.py:smoke", "--workdir=run", *argv])
  config = resolve_paths(command.config)
  submit, drawn = Engine.asubmit, []

  async def recording(self, request):
    outputs = await submit(self, request)
    drawn.append((request, outputs))
    return outputs

  monkeypatch.setattr(Engine, "asubmit", recording)
  with Workdir(command.workdir) as workdir:
    workdir.open(command.config, "train")
    figures = run_train(config, workdir)
  decode = load_tokenizer(config.model.path).decode
  groups = [pair for pair in drawn if pair[0].n == config.grpo.group_size]
  assert len(groups) == config.search.parents and len(drawn) > len(groups)
  for request, _ in drawn:
    is_proposal = request.n == config.grpo.group_size
    assert ("Change one operator at a time." in decode(request.prompt_ids)) is is_proposal
  completions = [output.token_ids for _, outputs in groups for output in outputs]
  expected = len(set(completions)) / len(completions)
  rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
  assert figures["rounds"] == 1 and [row["level"] for row in rows] == ["batch", "epoch"]
  assert [row["proposals/distinct"] for row in rows] == [expected, expected]
  assert "proposals/distinct" in (folder / "run/metrics.csv").read_text().splitlines()[0]


def test_a_user_of_aflow_points_us_at_a_workspace(tmp_path, monkeypatch):
  text = (ROOT / "README.md").read_text().split("\n### From AFlow\n")[1].split("```")[1]
  program, script, *argv = shlex.split(text.replace("\\\n", " "))
  assert (program, script) == ("python", "launch.py") and text.count("\n") <= 5
  argv[0] += ":smoke"
  theirs = tmp_path / "AFlow" / "workspace" / "GSM8K" / "workflows"
  shutil.copytree(aflow_workspace(tmp_path / "made"), theirs)
  before = {p: p.read_bytes() for p in theirs.rglob("*") if p.is_file()}
  data = tmp_path / "AFlow" / "data" / "datasets"
  data.mkdir(parents=True)
  for kind, count in (("validate", 6), ("test", 2)):
    rows = [{"question": f"{kind} {i}?", "answer": f"#### {i}"} for i in range(count)]
    (data / f"gsm8k_{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  monkeypatch.chdir(tmp_path)
  command = cli.parse([*argv, "--config.mesh.data=1"])
  assert command.mode == "search"
  with Workdir(command.workdir) as workdir:
    workdir.open(command.config, command.mode)
    figures = run_search(resolve_paths(command.config), workdir)
  assert figures["rounds"] == 1 and figures["best_score"] >= 0.9
  written = tmp_path / "runs/continued/workspace/GSM8K/workflows"
  rounds = {row["round"] for row in json.loads((written / "results.json").read_text())}
  assert {1, 2, 4} <= rounds and (written / "round_4" / "graph.py").exists()
  assert {p: p.read_bytes() for p in theirs.rglob("*") if p.is_file()} == before


def test_several_metrics_are_given_by_repeating_the_flag(folder):
  argv = ["--config=configs/quickstart.py:smoke", *flag_of("variety.py")]
  assert cli.parse(argv).config.metrics == ("variety:distinct",)
  assert cli.parse([*argv, "--config.metrics=other:f"]).config.metrics == (
    "variety:distinct",
    "other:f",
  )


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("metrics", ("variety",), "config.metrics = ('variety',): expected package.module:function"),
    ("metrics", ("a:f", "a:f"), "each once"),
    ("metrics", ("a.b:",), "package.module:function"),
    ("model.policy", "QwenPolicy", "expected package.module:Class"),
    ("model.policy", "../policy.py:Mine", "expected package.module:Class"),
    ("task.name", "sums:", "or package.module:Class"),
  ],
)
def test_names_of_another_form_are_refused_before_anything_starts(field, value, message):
  config = load_config("configs/quickstart.py:smoke")
  set_field(config, field, value)
  with pytest.raises(UserError) as refused:
    validate(config)
  assert message in str(refused.value) and f"config.{field}" in str(refused.value)


def test_a_policy_that_cannot_be_had_is_refused_in_one_line(folder):
  (folder / "broken.py").write_text("class Mine(:\n")
  config = base_config()
  for name, message in (
    ("patience:Patient", "cannot import config.model.policy = 'patience:Patient'"),
    ("broken:Mine", "broken.py, line 1"),
    ("patient:Impatient", "the module patient has no 'Impatient'"),
    ("patient:RULE", "expected a subclass of QwenPolicy"),
    ("sums:Sums", "expected a subclass of QwenPolicy"),
  ):
    config.model.policy = name
    with pytest.raises(UserError) as refused:
      make_policy(config)
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_a_metric_that_gives_no_numbers_is_refused_in_one_line(folder):
  rollouts = [Rollout("g", (1,), (i, 2), (-1.0, -1.0), 0.5) for i in (5, 6, 6, 6)]
  assert OwnMetrics(("variety:distinct",))(rollouts, ()) == {"proposals/distinct": 0.5}
  assert OwnMetrics(())(rollouts, ("reward",)) == {}
  (folder / "bad.py").write_text(
    "ten = 10\n"
    "def listed(rollouts):\n  return [len(rollouts)]\n"
    "def worded(rollouts):\n  return {'mine/word': 'many'}\n"
    "def reward(rollouts):\n  return {'reward': 1.0}\n"
    "def step(rollouts):\n  return {'step': 1.0}\n"
  )
  for name, message in (
    ("bad:ten", "expected a function, got 10"),
    ("bad:eleven", "the module bad has no 'eleven'"),
    ("bad:listed", "expected {name: number}, got [4]"),
    ("bad:worded", "metric mine/word: expected a number, got str"),
    ("bad:reward", "the name 'reward' is taken"),
    ("bad:step", "expected a metric name other than"),
  ):
    with pytest.raises(UserError) as refused:
      OwnMetrics((name,))(rollouts, {"reward"})
    assert message in str(refused.value) and "config.metrics" in str(refused.value)
    assert "\n" not in str(refused.value)
