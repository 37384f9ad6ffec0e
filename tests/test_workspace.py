"""AFlow's files: written so that AFlow's rules read them, read when AFlow wrote them."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from search_world import PROBLEMS, SEED, in_order, make_search, reply, run_rounds, workflow

from awf.sandbox import Sandbox, SandboxConfig
from awf.search.stages import Trial
from awf.search.tree import replay
from awf.search.workspace import Workspace
from awf.types import WorkflowSource
from awf.workflow.contract import PRELOAD, graph_header

REPLIES = (
  reply("Ask for steps.", workflow("Work in steps.")),
  reply("Ask for a na\u00efve guess.", workflow("Answer na\u00efvely.")),
  reply("Use an unknown prompt.", WorkflowSource(workflow("x").graph, "")),
)
PRICES = (2.0, 10.0)  # USD of a million prompt and generated tokens


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(SandboxConfig(preload_numeric=False, wall_seconds=600.0), preload=PRELOAD) as box:
    yield box


@pytest.fixture(scope="module")
def written(sandbox, tmp_path_factory):
  """(search, folder of its workflows) after two rounds."""
  root = tmp_path_factory.mktemp("run") / "workspace"
  fields = {
    "parents": 1, "group_size": 3, "full_top": 1, "problems": PROBLEMS[:6],
    "executor_prices": PRICES,
  }  # fmt: skip
  search = make_search(sandbox, root, in_order(REPLIES), **fields)
  run_rounds(search, 2)
  return search, root / "AIME" / "workflows"


def load(path: Path):
  return json.loads(path.read_text())


def test_rounds_hold_the_files_that_aflow_expects(written):
  search, path = written
  for node in search.tree.nodes.values():
    folder = path / f"round_{node.id}"
    graph = (folder / "graph.py").read_text()
    assert graph == graph_header("AIME", node.id) + node.source.graph + "\n"
    assert re.findall(r"class Workflow:.*", graph, re.DOTALL)[0].strip() == node.source.graph
    assert (folder / "prompt.py").read_text().strip() == node.source.prompt.strip()
    assert (folder / "__init__.py").read_text() == ""
    assert (folder / "experience.json").exists() == (node.id != 1)
  assert not list(path.rglob("*.part"))
  assert sorted(p.name for p in path.iterdir() if not p.name.startswith("round_")) == [
    "processed_experience.json",
    "results.json",
    "template",
  ]


def test_passes_and_rows_have_their_costs(written):
  """By the executor's prices; in a CSV as the running sum that AFlow takes the largest of."""
  search, path = written
  for row in load(path / "results.json"):
    node = search.tree.nodes[row["round"]]
    prompt, generated = node.tokens
    assert prompt > 0 and generated > 0
    assert row["total_cost"] == pytest.approx((2 * prompt + 10 * generated) / 1e6, abs=1e-9)
    assert row["avg_cost"] == pytest.approx(row["total_cost"] / len(node.scores), abs=1e-9)
    (table,) = (path / f"round_{node.id}").glob("*.csv")
    with open(table, newline="", encoding="utf-8") as f:
      costs = [float(line["cost"]) for line in csv.DictReader(f)]
    assert costs == sorted(costs) and 0 < costs[0] < costs[-1]
    assert costs[-1] == pytest.approx(row["total_cost"], abs=1e-9)


def test_results_and_experience_have_aflows_schema(written):
  search, path = written
  results = load(path / "results.json")
  assert all(set(r) == {"round", "score", "avg_cost", "total_cost", "time"} for r in results)
  assert {r["round"]: r["score"] for r in results} == {
    n.id: n.score for n in search.tree.selectable()
  }
  processed: dict = {}
  for file in sorted(path.glob("round_*/experience.json")):
    row = load(file)
    assert set(row) == {"father node", "modification", "before", "after", "succeed"}
    assert row["succeed"] is (row["after"] > row["before"])
    child = file.parent.name.removeprefix("round_")
    entry = processed.setdefault(
      str(row["father node"]), {"score": row["before"], "success": {}, "failure": {}}
    )
    side = entry["success" if row["succeed"] else "failure"]
    side[child] = {"modification": row["modification"], "score": row["after"]}
  assert load(path / "processed_experience.json") == processed
  broken = next(n for n in search.tree.nodes.values() if n.failure)
  assert load(path / f"round_{broken.id}" / "experience.json")["after"] == 0.0


def test_logs_and_tables_show_the_failures(written):
  search, path = written
  log = load(path / "round_1" / "log.json")
  names = ["question", "right_answer", "model_output", "extracted_output", "extract_answer_code"]
  assert log and all(list(row) == names for row in log)
  failed = {p.prompt for p in PROBLEMS if search.tree.nodes[1].scores.get(p.id) == 0.0}
  assert {row["question"] for row in log} == failed
  (table,) = (path / "round_1").glob("*.csv")
  assert re.fullmatch(r"\d\.\d{5}_\d{8}_\d{6}\.csv", table.name)
  with open(table, newline="") as f:
    rows = list(csv.DictReader(f))
  assert list(rows[0]) == ["question", "prediction", "expected_output", "score", "cost"]
  mean = sum(float(r["score"]) for r in rows) / len(rows)
  assert len(rows) == 6 and f"{mean:.5f}" == table.name[:7]


AFLOW = '''
import asyncio, json, sys, types
class AsyncLLM:
  """AFlow's client by its interface."""
  async def __call__(self, prompt): return "<answer>7</answer>" if "steps" in prompt else "5"
  def get_usage_summary(self): return {"total_cost": 0.25}
scripts = types.ModuleType("scripts")
sys.modules["scripts"] = scripts
for name, members in (
  ("async_llm", {"create_llm_instance": lambda config: AsyncLLM()}),
  ("evaluator", {"DatasetType": str}),
):
  module = types.ModuleType("scripts." + name)
  vars(module).update(members)
  sys.modules["scripts." + name] = module
import importlib
graph = importlib.import_module(f"workspace.AIME.workflows.round_{sys.argv[1]}.graph")
flow = graph.Workflow(name="AIME", llm_config=None, dataset="AIME")
template = importlib.import_module("workspace.AIME.workflows.template.operator")
vote = template.ScEnsemble(flow.llm)
answers = asyncio.run(vote(solutions=["It is 4.", "<answer>7</answer>", "So 7"], problem="x"))
print(json.dumps([asyncio.run(flow("What?")), answers["response"], "awf" in sys.modules]))
'''


def test_aflow_runs_a_round_without_our_package(written):
  search, path = written
  root = path.parents[2]
  out = subprocess.run(
    [sys.executable, "-c", AFLOW, str(search.best().id)],
    cwd=root, env={}, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert out.returncode == 0, out.stderr
  assert json.loads(out.stdout) == [["<answer>7</answer>", 0.25], "<answer>7</answer>", False]
  operators = load(path / "template" / "operator.json")
  assert list(operators) == ["Custom", "ScEnsemble", "Programmer"]
  assert all(set(o) == {"description", "interface"} for o in operators.values())


def test_a_log_of_other_problems_goes(tmp_path):
  """A round that failed on a part and fails nowhere in full has no log.json any more."""
  log = aflow_workspace(tmp_path) / "round_1" / "log.json"
  workspace = Workspace(tmp_path, "AIME", ("Custom",))
  node = workspace.adopt(PROBLEMS, SEED)[0]
  failed, right = Trial(PROBLEMS[0], 0.0, "no", "no"), Trial(PROBLEMS[1], 1.0, "yes", "yes")
  for trials, expected in (((failed,), True), ((), True), ((right,), False)):
    workspace.write_round(node, trials)
    assert log.exists() is expected


def test_the_journal_rebuilds_the_tree(written):
  search, path = written
  lines = (path.parent / "journal.jsonl").read_text().splitlines()
  events = [json.loads(line) for line in lines]
  assert replay(events) == search.tree
  assert [e["round"] for e in events if e["event"] == "round"] == [1, 2]


def test_a_resumed_search_drops_newer_rounds_and_writes_lost_ones(sandbox, written, tmp_path):
  search, path = written
  state = search.state_dict()
  here = tmp_path / "AIME" / "workflows"
  (here / "round_99").mkdir(parents=True)
  (here / "round_99" / "graph.py").write_text("x")
  again = make_search(sandbox, tmp_path, in_order(REPLIES), problems=PROBLEMS[:6])
  again.load_state_dict(json.loads(json.dumps(state)))
  assert not (here / "round_99").exists()
  for file in path.rglob("*"):
    if file.name in ("graph.py", "prompt.py", "experience.json", "processed_experience.json"):
      assert (here / file.relative_to(path)).read_text() == file.read_text()
  assert (tmp_path / "AIME/journal.jsonl").read_text() == (
    path.parent / "journal.jsonl"
  ).read_text()


def aflow_workspace(root: Path) -> Path:
  """A workspace as AFlow leaves it: round 3 was lost, round 1 was evaluated twice."""
  path = root / "AIME" / "workflows"
  graphs = {1: SEED, 2: workflow("Work in steps."), 4: workflow("Guess.")}
  for id, source in graphs.items():
    folder = path / f"round_{id}"
    folder.mkdir(parents=True)
    header = graph_header("AIME", id)
    (folder / "graph.py").write_text(header + source.graph + "\n                    ")
    (folder / "prompt.py").write_text(source.prompt)
    (folder / "__init__.py").write_text("")
  (path / "round_3").mkdir()
  rows = [(1, 0.25), (1, 0.35), (2, 0.9), (4, 0.2)]
  results = [
    {"round": r, "score": s, "avg_cost": 0.001, "total_cost": 0.01, "time": "2025-07-23T10:00:00"}
    for r, s in rows
  ]
  (path / "results.json").write_text(json.dumps(results))
  for id, father, before, after in ((2, 1, 0.3, 0.9), (4, 2, 0.9, 0.2)):
    row = {"father node": father, "modification": f"edit {id}", "before": before, "after": after}
    (path / f"round_{id}" / "experience.json").write_text(
      json.dumps({**row, "succeed": after > before})
    )
  entry = {"question": PROBLEMS[0].prompt, "right_answer": "54", "model_output": "x 53"}
  entry |= {"extracted_output": "53", "extract_answer_code": "None"}
  (path / "round_1" / "log.json").write_text(json.dumps([entry]))
  (path / "round_2" / "log.json").write_text("")
  (path / "processed_experience.json").write_text("")
  return path


def test_a_workspace_of_aflow_is_continued(sandbox, tmp_path):
  path = aflow_workspace(tmp_path)
  before = load(path / "results.json")
  seen: list[str] = []
  fields = {"parents": 3, "group_size": 1, "full_top": 1, "problems": PROBLEMS[:6]}
  search = make_search(
    sandbox,
    tmp_path,
    in_order([reply("Shout.", workflow("STEPS! Work in steps."))], seen),
    **fields,
  )
  (result,) = run_rounds(search, 1)
  tree = search.tree
  assert [tree.nodes[i].parent for i in (1, 2, 4)] == [0, 1, 2]
  assert tree.nodes[1].score == pytest.approx(0.3) and tree.nodes[1].log[0].extracted == "53"
  assert {r["parent"] for r in result.records} == {1, 2, 4}
  assert [n.id for n in result.nodes] == [5, 6, 7]
  shown = next(text for text in seen if "<score>0.30</score>" in text)
  assert "edit 2 -> 0.90" in shown and "54" not in shown.replace(PROBLEMS[0].prompt, "")
  after = load(path / "results.json")
  assert after[:4] == before and [r["round"] for r in after[4:]] == [5]
  again = make_search(sandbox, tmp_path, in_order(REPLIES), **fields)
  again.load_state_dict(search.state_dict())
  assert again.tree == tree
  # Ended before its first checkpoint, a search has AFlow's rounds in its journal alone.
  with open(tmp_path / "AIME" / "journal.jsonl", "a") as journal:
    journal.write('{"event": "ad')
  lost = make_search(
    sandbox, tmp_path, in_order([reply("Shout.", workflow("STEPS! Work in steps."))]), **fields
  )
  run_rounds(lost, 1)
  assert lost.tree == tree
  assert [r["round"] for r in load(path / "results.json")] == [1, 1, 2, 4, 5]
