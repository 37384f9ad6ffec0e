"""The README's extensions, run as they stand there, and mistakes in them."""

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT
from test_workspace import aflow_workspace

from awf import cli
from awf.compare import offered_operators
from awf.config import validate
from awf.config_io import load_config, resolve_paths, set_field
from awf.own_metrics import OwnMetrics
from awf.policy import make_policy
from awf.qwen.tokenizer import load_tokenizer
from awf.sampler.engine import Engine
from awf.search.config import RewardConfig
from awf.search.reward import load_reward, own_parts
from awf.search.stages import Trial, Verdict, reward_parts
from awf.search.template import template_files
from awf.system import System, make_executor
from awf.tasks import make_task
from awf.tasks.code import NO_PUBLIC_TESTS
from awf.train import run_search, run_train
from awf.types import Problem, Rollout, UserError, WorkflowSource
from awf.workdir import Workdir
from awf.workflow import contract
from awf.workflow.operators import CLASSES
from awf.workflow.own import add_operators
from awf.workflow.static import static_check
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
  load_reward.cache_clear()
  for name in set(contract.OPERATORS) - {one.__name__ for one in CLASSES}:
    del contract.OPERATORS[name]
  for name in set(sys.modules) - known:
    if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
      del sys.modules[name]


def flag_of(name):
  return {n: flags for n, (_, flags) in snippets().items()}[name]


def test_the_readme_has_six_snippets_of_at_most_15_lines():
  names = ["doubt.py", "ollama_api.py", "patient.py", "sums.py", "thrifty.py", "variety.py"]
  assert sorted(snippets()) == names
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


def test_a_policy_a_metric_and_a_reward_of_ones_own_run_in_the_loop(folder, monkeypatch):
  names = ("patient.py", "variety.py", "thrifty.py")
  argv = [*(flag for name in names for flag in flag_of(name)), "--config.mesh.data=1"]
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
  (written,) = (folder / "run/trajectories").glob("*.jsonl")
  proposals = [json.loads(line) for line in written.read_text().splitlines()]
  assert len(proposals) == len(completions)
  for row in proposals:
    assert set(row["parts"]) == {"stage", "score", "calls"}
    assert row["reward"] == pytest.approx(sum(row["parts"].values()))
    assert (row["parts"]["calls"] < 0) is (row["stage"] in ("smoke", "subset", "full"))


GRAPH = """class Workflow:
    def __init__(self, name: str, llm_config, dataset: DatasetType) -> None:
        self.llm = create_llm_instance(llm_config)
        self.doubt = operator.Doubt(self.llm)

    async def __call__(self, problem: str):
        checked = await self.doubt(problem=problem, solution="5")
        return checked['response'], 0.0
"""


class OllamaServer(BaseHTTPRequestHandler):
  """Answers as Ollama's /api/chat does; remembers what it was asked."""

  asked: list = []

  def do_POST(self):
    body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
    self.asked.append((self.path, body))
    reply = json.dumps({"message": {"role": "assistant", "content": "<answer>4</answer>"}}).encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(reply)))
    self.end_headers()
    self.wfile.write(reply)

  def log_message(self, *args):
    pass


def test_an_operator_and_a_remote_client_of_ones_own_work_together(folder, monkeypatch):
  server = ThreadingHTTPServer(("127.0.0.1", 0), OllamaServer)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv("OLLAMA_HOST", f"http://127.0.0.1:{server.server_port}")
  argv = [*flag_of("doubt.py"), *flag_of("ollama_api.py"), "--config.mesh.data=1"]
  config = resolve_paths(cli.parse(["--config=configs/quickstart.py:smoke", *argv]).config)
  try:
    with System(config, Workdir(folder / "run")) as system:
      offered = offered_operators(system)
      source, problem = WorkflowSource(GRAPH, "A = 'a'"), system.validation[0]
      result = asyncio.run(system.runner().run(source, problem))
  finally:
    server.shutdown()
    server.server_close()
  assert offered == ("Custom", "ScEnsemble", "Doubt")
  assert (
    "3. Doubt: Lets the model check a solution step by step and answer again, with interface "
    in (contract.describe(offered))
  )
  assert "doubt(problem: str, solution: str) -> dict with key 'response'." in (
    contract.describe(offered)
  )
  assert static_check(source, offered) is None
  wrong = static_check(WorkflowSource(GRAPH.replace("'response'", "'answer'"), "A = 'a'"), offered)
  assert wrong is not None and "response" in wrong.message
  assert (result.answer, result.failure, result.calls) == ("<answer>4</answer>", None, 1)
  ((path, body),) = OllamaServer.asked
  assert path == "/api/chat" and body["options"]["temperature"] == config.executor.temperature
  assert body["messages"][-1]["content"].startswith(problem.prompt + "\n\nSolution:\n5")
  written = template_files(offered)["operator.py"]  # what AFlow reads
  compile(written, "operator.py", "exec")
  assert "class Doubt(Operator):" in written and "awf" not in written.split("class Doubt")[1]


FIX = "```python\ndef plus(a, b):\n  return a + b\n```"
CHECK = f"""
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])
from template.operator import Test

async def fix(prompt):
  return {FIX!r}

async def all_of_them():
  test = Test(fix)
  broken = "def plus(a, b):\\n  return a / 0"
  for name, code in (("plus", broken), (sys.argv[2], "wrong"), ("x", "y")):
    yield await test(problem="add", solution=code, entry_point=name)

async def main():
  print(json.dumps([one async for one in all_of_them()]))

asyncio.run(main())
"""


@pytest.mark.parametrize("dataset", ["HumanEval", "MBPP", "GSM8K"])
def test_test_finds_the_public_tests_in_aflows_folder(tmp_path, dataset):
  """In the folder that we write and AFlow runs: its own file, its names without tests."""
  folder = tmp_path / "workspace" / "template"
  folder.mkdir(parents=True)
  for name, text in template_files(("Custom", "Test"), dataset).items():
    (folder / name).write_text(text)
  (folder / "__init__.py").write_text("")
  untested = min(NO_PUBLIC_TESTS.get(dataset, ("add",)))
  data = tmp_path / "data" / "datasets"
  data.mkdir(parents=True)
  rows = [{"entry_point": n, "test": ["assert candidate(1, 2) == 3"]} for n in ("plus", untested)]
  (data / f"{dataset.lower()}_public_test.jsonl").write_text("\n".join(map(json.dumps, rows)))
  done = subprocess.run(
    [sys.executable, "-c", CHECK, str(folder.parent), untested], cwd=tmp_path, text=True,
    check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
  )  # fmt: skip
  first, second, third = json.loads(done.stdout)
  fixed = (
    "def plus(a, b):\n  return a + b" if dataset != "GSM8K" else "def plus(a, b):\n  return a / 0"
  )
  assert (first["result"], first["solution"]) == (True, fixed)
  assert second == {"result": True, "solution": "wrong"} and third["solution"] == "y"


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
    ("reward.function", "thrifty", "expected package.module:function"),
    ("executor.client", "Ollama", "expected package.module:Class"),
    ("search.operators", ("Custom", "doubt:"), "names of operators or package.module:Class"),
  ],
)
def test_names_of_another_form_are_refused_before_anything_starts(field, value, message):
  config = load_config("configs/quickstart.py:smoke")
  set_field(config, field, value)
  with pytest.raises(UserError) as refused:
    validate(config)
  assert message in str(refused.value) and f"config.{field}" in str(refused.value)


def test_two_that_answer_workflows_are_refused():
  config = load_config("configs/quickstart.py:smoke")
  config.executor.client = "ollama_api:Ollama"
  config.executor.remote.update(url="http://localhost:8000/v1", model="m")
  assert "expected one of them" in refused(validate, config)


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


def refused(call, *args):
  """The one line in which something of the user's own is refused."""
  with pytest.raises(UserError) as caught:
    call(*args)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_a_reward_that_gives_no_numbers_is_refused_in_one_line(folder):
  trials = tuple(Trial(Problem(str(n), "?"), 1.0, "", "", calls=n) for n in (2, 4))
  verdict, source = Verdict("subset", None, trials), WorkflowSource("", "")
  parts = reward_parts(verdict, RewardConfig())
  own = own_parts("thrifty:reward", parts, source, verdict)
  assert own == {**parts, "calls": pytest.approx(-0.06)} and "calls" not in parts
  (folder / "bad_reward.py").write_text(
    "ten = 10\n"
    "def one(parts, source, verdict):\n  return 1.0\n"
    "def worded(parts, source, verdict):\n  return {'stage': 'much'}\n"
    "def endless(parts, source, verdict):\n  return {'stage': float('inf')}\n"
  )
  for name, message in (
    ("bad_reward:ten", "expected a function, got 10"),
    ("bad_reward:none", "the module bad_reward has no 'none'"),
    ("bad_reward:one", "expected {name: number}, got 1.0"),
    ("bad_reward:worded", "expected finite numbers by name, got 'stage': 'much'"),
    ("bad_reward:endless", "expected finite numbers by name, got 'stage': inf"),
  ):
    line = refused(own_parts, name, parts, source, verdict)
    assert message in line and "config.reward.function" in line


def test_an_operator_or_a_client_that_cannot_work_is_refused_in_one_line(folder, monkeypatch):
  (folder / "bad_kinds.py").write_text(
    "from awf.workflow.operators import Operator\n"
    "class Silent(Operator):\n  keys = ('a',)\n  async def __call__(self, x): ...\n"
    "class Keyless(Operator):\n  'Does.'\n  async def __call__(self, x): ...\n"
    "class Callless(Operator):\n  'Does.'\n  keys = ('a',)\n"
    "class Custom(Operator):\n  'Does.'\n  keys = ('a',)\n  async def __call__(self, x): ...\n"
    "class Mute:\n  pass\n"
  )
  for name, message in (
    ("Silent", "expected a docstring for the optimiser and `keys`"),
    ("Keyless", "expected a docstring for the optimiser and `keys`"),
    ("Callless", "expected `async def __call__(self, ...)`"),
    ("Custom", "the name Custom is taken"),
    ("Mute", "expected a subclass of Operator"),
  ):
    line = refused(add_operators, (f"bad_kinds:{name}",))
    assert message in line and "config.search.operators" in line
  assert "expected `async def complete(" in refused(make_executor, "bad_kinds:Mute")
  assert "missing 1 required" in refused(make_executor, "bad_kinds:Silent")
  assert "cannot import config.executor.client" in refused(make_executor, "nothing_here:Client")


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
