"""Upstream AFlow as the driver of a search, with our model behind it.

A stand-in (tests/mini_aflow) is always driven; AFLOW_PATH names a checkout of AFlow itself,
AFLOW_PYTHON an interpreter with its requirements.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, until
from test_report import data_of

from awf import cli
from awf.config import validate
from awf.config_io import load_config, resolve_paths
from awf.evaluate import run_eval
from awf.interrupt import Interrupted
from awf.preflight import check_files
from awf.search.aflow_driver import AFlowOptimizerWrapper, aflow_row, compact_messages
from awf.search.tree import SEED
from awf.train import run_search
from awf.types import UserError
from awf.workdir import Workdir
from awf.workflow.contract import seed_source

MINI = ROOT / "tests" / "mini_aflow"
AFLOW = os.environ.get("AFLOW_PATH", "")
SAMPLING = {name: {"temperature": 0, "top_p": 1} for name in ("awf-executor", "awf-optimizer")}
ROW = {"question": "1 + 1?", "answer": "#### 2"}
# Writes a round, starts a child of its own, and does not end.
STUBBORN = """
import json, pathlib, signal, subprocess, sys, time
class Optimizer:
  def __init__(self, optimized_path, dataset, **rest):
    self.path = pathlib.Path(optimized_path) / dataset / "workflows"
  def optimize(self, mode):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    pathlib.Path("pids").write_text(f"{child.pid}")
    print("working", flush=True)
    (self.path / "results.json").write_text(json.dumps([{"round": 1, "score": 0.5}]))
    time.sleep(600)
"""


def make_wrapper(folder, checkout=MINI):
  return AFlowOptimizerWrapper(
    str(checkout), "", folder / "run" / "aflow", folder / "run" / "workspace", dataset="GSM8K",
    question_type="math", operators=("Custom",), seed=seed_source("math"),
  )  # fmt: skip


def make_checkout(folder, optimizer):
  """A checkout with another Optimizer."""
  (folder / "scripts").mkdir(parents=True)
  (folder / "scripts" / "optimizer.py").write_text(optimizer)
  source = MINI / "scripts" / "async_llm.py"
  (folder / "scripts" / "async_llm.py").write_text(source.read_text())
  (folder / "workspace/GSM8K/workflows/template").mkdir(parents=True)
  return folder


def drive(wrapper, should_stop=lambda: False):
  told = {}
  ended = wrapper.run(
    3, sample=4, validation_rounds=1, converges=False, should_stop=should_stop,
    on_round=told.__setitem__,
  )  # fmt: skip
  return ended, told


def is_running(pid):
  try:
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
  except (FileNotFoundError, ProcessLookupError):
    return False
  return state != "Z"


def test_a_stop_ends_it_and_all_that_it_started(tmp_path):
  wrapper = make_wrapper(tmp_path, make_checkout(tmp_path / "checkout", STUBBORN))
  wrapper.prepare("http://127.0.0.1:1/v1", "key", SAMPLING, [ROW])
  ended, told = drive(wrapper, lambda: bool(wrapper.scores()))
  assert ended is False and told == {1: 0.5}
  pid = int((wrapper.folder / "pids").read_text())
  until(lambda: not is_running(pid))
  assert "working" in wrapper.log.read_text()


DRIVE = """
import sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
import test_aflow as t
wrapper = t.make_wrapper(Path(sys.argv[1]), Path(sys.argv[1]) / "checkout")
wrapper.prepare("http://127.0.0.1:1/v1", "key", t.SAMPLING, [t.ROW])
t.drive(wrapper)
"""


def test_it_does_not_outlive_a_killed_run(tmp_path):
  make_checkout(tmp_path / "checkout", STUBBORN)
  argv = [sys.executable, "-c", DRIVE, str(tmp_path), str(ROOT / "tests")]
  pids = tmp_path / "run" / "aflow" / "pids"
  with subprocess.Popen(argv, cwd=ROOT) as process:
    until(lambda: pids.is_file() and pids.read_text())
    process.kill()
  until(lambda: not is_running(int(pids.read_text())))


def test_its_failure_is_one_line(tmp_path):
  wrapper = make_wrapper(tmp_path, make_checkout(tmp_path / "checkout", "import no_such_package"))
  wrapper.prepare("http://127.0.0.1:1/v1", "key", SAMPLING, [ROW])
  with pytest.raises(UserError) as refused:
    drive(wrapper)
  text = str(refused.value)
  assert "exit code 1: ModuleNotFoundError: No module named 'no_such_package'" in text
  assert "config.aflow.python" in text and "\n" not in text


def test_rounds_that_cannot_reach_the_model_are_lost_and_it_ends(tmp_path):
  wrapper = make_wrapper(tmp_path)
  wrapper.prepare("http://127.0.0.1:9/v1", "key", SAMPLING, [ROW])
  assert drive(wrapper) == (True, {}) and wrapper.rounds_done() == 0
  assert wrapper.log.read_text().count("Error occurred") == 3
  config = wrapper.folder / "config" / "config2.yaml"
  assert config.stat().st_mode & 0o077 == 0
  tree = wrapper.collect(())
  assert not tree.selectable(("full",))


def test_rows_in_aflows_form():
  assert aflow_row("MATH", {"problem": "?", "answer": "2"})["solution"] == "\\boxed{2}"
  assert aflow_row("GSM8K", ROW) == ROW
  with pytest.raises(UserError, match="lacks canonical_solution: give its own files"):
    aflow_row("HumanEval", {"prompt": "", "entry_point": "f", "test": ""})


def test_aflows_request_as_the_compact_prompt():
  source = (MINI / "scripts" / "optimizer.py").read_text()
  (request,) = re.findall(r'^REQUEST = """(.*?)"""', source, re.DOTALL | re.MULTILINE)
  asked = request.format(score=0.5, graph="class Workflow:\n  x", prompt="P", operators="")
  (message,) = compact_messages([{"role": "user", "content": asked}])
  assert message["content"] == (
    "Improve this workflow.\n<score>0.50</score>\n<graph>\nclass Workflow:\n  x\n</graph>\n"
    "<prompt>\nP\n</prompt>"
  )
  others = [{"role": "user", "content": "What is 1 + 1?"}]
  assert compact_messages(others) == others and compact_messages([]) == []


@pytest.mark.parametrize(
  ("changes", "mode", "message"),
  [
    ({}, "search", "config.aflow.path is empty"),
    ({"aflow.path": str(MINI)}, "train", "config.search.driver = 'aflow'"),
    ({"aflow.path": str(ROOT)}, "search", "found no scripts/optimizer.py"),
    ({"aflow.path": str(MINI), "aflow.python": "no-such-python"}, "search", "config.aflow.python"),
    ({"aflow.path": str(MINI), "task.name": "aime"}, "search", "AFlow has no data set AIME"),
    (
      {"aflow.path": str(MINI), "executor.remote.url": "http://h/v1", "executor.remote.model": "m"},
      "search", "config.executor.remote.url: with config.search.driver=aflow",
    ),
  ],
)  # fmt: skip
def test_mistakes_are_said_before_anything_starts(changes, mode, message):
  config = load_config("configs/gsm8k.py:smoke")
  config.update_from_flattened_dict({"search.driver": "aflow", **changes})
  with pytest.raises(UserError) as refused:
    validate(config, mode)
    check_files(resolve_paths(config), mode)
  assert message in str(refused.value) and "\n" not in str(refused.value)


def run(folder, *argv, function=run_search):
  command = cli.parse(
    [
      "--config=configs/gsm8k.py:smoke", "--config.mesh.data=1", "--config.search.rounds=2",
      "--config.eval.problems=1", "--config.sandbox.wall_seconds=600",
      "--config.sandbox.preload_numeric=false", "--config.search.driver=aflow", *argv,
      f"--mode={'eval' if function is run_eval else 'search'}", f"--workdir={folder}",
    ]
  )  # fmt: skip
  with Workdir(command.workdir) as workdir:
    workdir.open(command.config, command.mode)
    return function(resolve_paths(command.config), workdir)


def readme_command(folder):
  """The README's flags, with what they name as files in a folder."""
  text = (ROOT / "README.md").read_text().split("\n### From AFlow\n")[1].split("```")[3]
  program, script, config, *argv = shlex.split(text.replace("\\\n", " "))
  assert (program, script, config) == ("python", "launch.py", "--config=configs/gsm8k.py")
  assert text.strip().count("\n") <= 4 and "--mode=search" in argv
  shutil.copytree(MINI, folder / "AFlow")
  interpreter = folder / "AFlow" / ".venv" / "bin" / "python"
  interpreter.parent.mkdir(parents=True)
  interpreter.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
  interpreter.chmod(0o755)
  data = folder / "AFlow" / "data" / "datasets"
  data.mkdir(parents=True)
  rows = (ROOT / "data" / "smoke" / "gsm8k.jsonl").read_text().splitlines(keepends=True)
  (data / "gsm8k_validate.jsonl").write_text("".join(rows[:6]))
  (data / "gsm8k_test.jsonl").write_text("".join(rows[6:]))
  return argv


def check_run(folder, figures, rounds):
  """What a search by AFlow leaves: rounds, a journal, trajectories, no key, a report."""
  workflows = folder / "workspace" / "GSM8K" / "workflows"
  scores = {row["round"] for row in json.loads((workflows / "results.json").read_text())}
  events = [json.loads(x) for x in (workflows.parent / "journal.jsonl").read_text().splitlines()]
  assert {event["node"]["id"] for event in events} == scores
  assert figures["driver"] == "aflow" and figures["rounds"] == len(scores - {1}) <= rounds
  assert figures["rounds"] + figures["lost_rounds"] == rounds and 1 in scores
  assert 0 <= figures["seed_score"] <= figures["best_score"] <= 1
  assert figures["llm_calls"] > 0 and figures["tokens"] > 0
  rows = [
    json.loads(line)
    for file in sorted((folder / "trajectories").glob("aflow_*.jsonl"))
    for line in file.read_text().splitlines()
  ]
  assert len(rows) >= rounds and all(row["text"] and row["tokens"] > 0 for row in rows)
  assert {row["round"] for row in rows} - {None} == scores - {1}
  shown = json.dumps(data_of((folder / "report.html").read_text()), ensure_ascii=False)
  assert all(json.dumps(e["node"]["modification"])[1:-1] in shown for e in events)
  last_line = events[0]["node"]["source"]["graph"].splitlines()[-1]
  assert json.dumps(last_line)[1:-1] in shown
  assert (folder / "best" / "best.json").is_file()
  assert re.search(r"class Workflow\b", (folder / "best" / "graph.py").read_text())
  return scores


def test_the_readmes_command_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
  argv, folder = readme_command(tmp_path), tmp_path / "run"
  monkeypatch.chdir(tmp_path)
  checkout = tmp_path / "AFlow"
  before = {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()}

  class Interrupting(AFlowOptimizerWrapper):
    """Sends this process Ctrl-C once the seed has a score."""

    def run(self, rounds, **fields):
      told = fields["on_round"]

      def on_round(id, score):
        told(id, score)
        if id == SEED:  # a quick round may end before AFlow does; a second one would end at once
          os.kill(os.getpid(), signal.SIGINT)

      return super().run(rounds, **{**fields, "on_round": on_round})

  with monkeypatch.context() as patch:
    patch.setattr("awf.aflow.AFlowOptimizerWrapper", Interrupting)
    with pytest.raises(Interrupted):
      run(folder, *argv)
  figures = run(folder, *argv)
  check_run(folder, figures, 2)
  assert {p: p.read_bytes() for p in checkout.rglob("*") if p.is_file()} == before
  evaluated = run(folder, *argv, "--config.eval.samples=1", "--config.eval.pass_k=1",
                  "--config.eval.votes=1", function=run_eval)  # fmt: skip
  assert evaluated["selection"]["score"] == figures["best_score"]
  assert evaluated["selection"]["problems"] == 4  # search.full_problems of a smoke run


@pytest.mark.skipif(not AFLOW, reason="AFLOW_PATH names no checkout of AFlow")
def test_a_search_by_aflow_itself(tmp_path):
  argv = [f"--config.aflow.path={AFLOW}"]
  if os.environ.get("AFLOW_PYTHON"):
    argv.append(f"--config.aflow.python={os.environ['AFLOW_PYTHON']}")
  figures = run(tmp_path / "run", *argv)
  check_run(tmp_path / "run", figures, 2)
