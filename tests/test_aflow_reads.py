"""AFlow's own code reads what a search writes; AFLOW_PATH names a checkout of it.

AFLOW_PYTHON names a Python that has its requirements; the default is the one that runs the tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from search_world import PROBLEMS, in_order, make_search, reply, run_rounds, workflow

from awf.sandbox import Sandbox, SandboxConfig
from awf.types import WorkflowSource
from awf.workflow.contract import PRELOAD

AFLOW = os.environ.get("AFLOW_PATH", "")
pytestmark = pytest.mark.skipif(not AFLOW, reason="AFLOW_PATH names no checkout of AFlow")

REPLIES = (
  reply("Ask for steps.", workflow("Work in steps.")),
  reply("Ask for haste.", workflow("Answer now.")),
  reply("Use an unknown prompt.", WorkflowSource(workflow("x").graph, "")),
)
SCRIPT = """
import asyncio, json, sys
from scripts.async_llm import LLMConfig
from scripts.optimizer_utils.convergence_utils import ConvergenceUtils
from scripts.optimizer_utils.data_utils import DataUtils
from scripts.optimizer_utils.experience_utils import ExperienceUtils
from scripts.optimizer_utils.graph_utils import GraphUtils

root, folder = "workspace/AIME", "workspace/AIME/workflows"
data, experience, graphs = DataUtils(root), ExperienceUtils(root), GraphUtils(root)
convergence = ConvergenceUtils(root)
top = data.get_top_rounds(4)
chosen = data.select_round(top)
processed = experience.load_experience()
built = {}
for row in data.load_results(folder):
  prompt, graph = graphs.read_graph_files(row["round"], folder)
  (text,) = graphs.extract_solve_graph(graph)
  kind = graphs.load_graph(row["round"], folder)
  fields = {"model": "m", "temperature": 0, "key": "k", "base_url": "http://localhost/v1"}
  flow = kind(name="AIME", llm_config=LLMConfig({**fields, "top_p": 1}), dataset="MATH")
  built[row["round"]] = [prompt, text, type(flow.custom).__module__]
described = graphs.load_operators_description(["Custom", "ScEnsemble", "Programmer"])
asked = graphs.create_graph_optimize_prompt(
  experience.format_experience(processed, 1), chosen["score"], text, prompt, described, "math",
  data.load_log(1),
)
print("RESULT" + json.dumps({
  "top": top, "processed": processed, "built": built, "described": described, "asked": len(asked),
  "new": experience.check_modification(processed, "Something else.", 1),
  "old": experience.check_modification(processed, "Ask for steps.", 1),
  "log": data.load_log(1), "means": list(map(float, convergence.calculate_avg_and_std()[0])),
  "converged": convergence.check_convergence()[0],
}))
"""


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
  root = tmp_path_factory.mktemp("run")
  fields = {"parents": 1, "group_size": 3, "full_top": 2, "problems": PROBLEMS[:6]}
  with Sandbox(
    SandboxConfig(preload_numeric=False, wall_seconds=600.0), preload=PRELOAD
  ) as sandbox:
    search = make_search(sandbox, root / "workspace", in_order(REPLIES), **fields)
    run_rounds(search, 2)
  return search, root


def ask_aflow(root, script):
  path = os.pathsep.join([str(root), str(Path(AFLOW).resolve())])
  done = subprocess.run(
    [os.environ.get("AFLOW_PYTHON", sys.executable), "-c", script],
    cwd=root, env={"PYTHONPATH": path, "PATH": os.environ["PATH"]},
    capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
  line = next(one for one in done.stdout.splitlines() if one.startswith("RESULT"))
  return json.loads(line.removeprefix("RESULT"))


def test_its_utilities_agree_with_the_search(searched):
  search, root = searched
  folder = root / "workspace" / "AIME" / "workflows"
  ours = json.loads((folder / "processed_experience.json").read_text())
  found = ask_aflow(root, SCRIPT)
  selectable = {node.id: node.score for node in search.tree.selectable()}
  assert {row["round"]: row["score"] for row in found["top"]} == selectable and len(selectable) > 2
  assert found["means"] == pytest.approx([selectable[id] for id in sorted(selectable)])
  assert (
    found["processed"] == ours == json.loads((folder / "processed_experience.json").read_text())
  )
  for id, (prompt, graph, module) in found["built"].items():
    node = search.tree.nodes[int(id)]
    assert (prompt.strip(), graph.strip()) == (node.source.prompt.strip(), node.source.graph)
    assert module == "workspace.AIME.workflows.template.operator"
  assert found["new"] is True and found["old"] is False and found["converged"] is False
  assert "1. Custom: " in found["described"] and "programmer(problem: str" in found["described"]
  assert '"right_answer"' in found["log"] and found["asked"] > 2000


WRITER = """
import json, os
from scripts.optimizer_utils.data_utils import DataUtils
from scripts.optimizer_utils.experience_utils import ExperienceUtils
from scripts.optimizer_utils.graph_utils import GraphUtils

root, folder = "theirs/AIME", "theirs/AIME/workflows"
data, experience, graphs = DataUtils(root), ExperienceUtils(root), GraphUtils(root)
results = []
for number, (graph, prompt, father, score) in enumerate(json.load(open("rounds.json")), 1):
  directory = graphs.create_round_directory(folder, number)
  graphs.write_graph_files(directory, {"graph": graph, "prompt": prompt}, number, "AIME")
  results += [data.create_result_data(number, score + noise, 0.1, 0.2) for noise in (-0.05, 0.05)]
  data.save_results(data.get_results_file_path(folder), results)
  if father:
    sample = {"round": father, "score": 0.25}
    row = experience.create_experience_data(sample, f"edit\\n{number}")
    experience.update_experience(directory, row, score)
experience.load_experience()
print("RESULT" + json.dumps(len(results)))
"""


def test_what_it_writes_is_continued(tmp_path):
  from awf.search.adopt import ADOPTED, import_workspace

  sources = [workflow("One."), workflow("Two."), workflow("Three.")]
  fathers, scores = [0, 1, 2], [0.25, 0.5, 0.4]
  rows = [[s.graph, s.prompt, f, m] for s, f, m in zip(sources, fathers, scores, strict=True)]
  (tmp_path / "rounds.json").write_text(json.dumps(rows))
  assert ask_aflow(tmp_path, WRITER) == 6
  import_workspace(tmp_path / "theirs", tmp_path / "workspace", "AIME")
  fields = {"parents": 1, "group_size": 3, "full_top": 1, "problems": PROBLEMS[:6]}
  with Sandbox(
    SandboxConfig(preload_numeric=False, wall_seconds=600.0), preload=PRELOAD
  ) as sandbox:
    search = make_search(sandbox, tmp_path / "workspace", in_order(REPLIES), **fields)
    run_rounds(search, 1)
  for id, (source, father, score) in enumerate(zip(sources, fathers, scores, strict=True), 1):
    node = search.tree.nodes[id]
    assert (node.source.graph, node.parent) == (source.graph.strip(), father)
    assert node.scores[ADOPTED] == pytest.approx(score) and len(node.canonical) == 16
  assert search.tree.nodes[3].modification == "edit 3" and 4 in search.tree.nodes
  found = ask_aflow(tmp_path, SCRIPT.split("built = {}")[0] + 'print("RESULT" + json.dumps(top))')
  assert {row["round"] for row in found} >= {1, 2, 3}
