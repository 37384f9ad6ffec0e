"""A workspace of AFlow in every state that a killed run leaves it in: read, repaired, kept."""

import json
import logging
import math
import random
import re
import shutil

import pytest
from search_world import PROBLEMS, SEED, in_order, make_search, reply, run_rounds, workflow
from test_workspace import aflow_workspace

from awf.sandbox import Sandbox, SandboxConfig
from awf.search.adopt import ADOPTED, import_workspace, salvage
from awf.search.tree import add_event, replay
from awf.search.workspace import Workspace
from awf.types import Problem, UserError
from awf.workflow.contract import PRELOAD


@pytest.fixture(scope="module")
def sandbox():
  with Sandbox(SandboxConfig(preload_numeric=False, wall_seconds=600.0), preload=PRELOAD) as box:
    yield box


def adopt(root):
  workspace = Workspace(root, "AIME", ("Custom",))
  assert workspace.is_foreign()
  return {node.id: node for node in workspace.adopt(PROBLEMS, SEED)}


def files(path):
  return {p.relative_to(path): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def mean(node):
  return node.scores.get(ADOPTED)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ('[{"a": 1}, {"b": 2}', [{"a": 1}, {"b": 2}]),
    ('[{"a": 1}, {"b":', [{"a": 1}]),
    ('[{"a": 1}]\n]]', [{"a": 1}]),
    ('{"a": 1, "b c": "x, y", "d": [1', {"a": 1, "b c": "x, y"}),
    ('{"a": "\\"', {}),
    ("[", []),
    ("{", {}),
    ("nonsense", None),
    ("", None),
  ],
)
def test_what_is_whole_in_a_cut_off_file_is_read(text, expected):
  assert salvage(text) == expected


def test_a_whole_workspace_needs_no_repair(tmp_path, caplog):
  path = aflow_workspace(tmp_path)
  (path / "round_2" / "log.json").write_text("[]")
  before = files(path)
  nodes = adopt(tmp_path)
  assert {id: mean(n) for id, n in nodes.items()} == {1: pytest.approx(0.3), 2: 0.9, 4: 0.2}
  assert [(n.parent, n.before) for n in nodes.values()][1:] == [(1, 0.3), (2, 0.9)]
  assert files(path) == files(tmp_path / "AIME" / "aflow_original") == before
  assert not caplog.records


SCORES = {1: 0.3, 2: 0.9, 4: 0.2}


@pytest.mark.parametrize(
  ("damage", "scores", "parents"),
  [
    ({"results.json": None}, SCORES, [0, 1, 2]),  # from the experiences of all rounds
    ({"results.json": ""}, SCORES, [0, 1, 2]),
    ({"results.json": 120}, {1: 0.25, 2: 0.9, 4: 0.2}, [0, 1, 2]),  # one of the seed's passes
    ({"results.json": "[{}, 3, null]"}, SCORES, [0, 1, 2]),
    ({"results.json": "{"}, SCORES, [0, 1, 2]),
    ({"round_4/experience.json": None}, SCORES, [0, 1, 0]),
    ({"round_4/experience.json": ""}, SCORES, [0, 1, 0]),
    ({"round_4/experience.json": 22}, SCORES, [0, 1, 2]),
    ({"round_2/experience.json": "[]"}, SCORES, [0, 0, 2]),
    ({"round_1/log.json": 30}, SCORES, [0, 1, 2]),
    ({"round_1/log.json": "{}"}, SCORES, [0, 1, 2]),
    ({"round_2/graph.py": None}, {1: 0.3, 4: 0.2}, [0, 0]),
    ({"round_2/graph.py": ""}, {1: 0.3, 4: 0.2}, [0, 0]),
    ({"round_2/prompt.py": None}, {1: 0.3, 4: 0.2}, [0, 0]),
    ({"round_1/prompt.py": None}, SCORES, [0, 1, 2]),  # the seed uses no prompt
    ({"results.json": "", "round_4/experience.json": ""}, {1: 0.3, 2: 0.9}, [0, 1]),
    (
      {"results.json": "", "round_2/experience.json": "", "round_4/experience.json": ""},
      {1: None},
      [0],
    ),
    ({"results.json": "", "round_1/graph.py": ""}, {1: None, 2: 0.9, 4: 0.2}, [0, 1, 2]),
  ],
)
def test_damaged_files_are_repaired_and_kept(tmp_path, caplog, damage, scores, parents):
  path = aflow_workspace(tmp_path)
  for name, change in damage.items():
    file = path / name
    if change is None:
      file.unlink()
    elif isinstance(change, int):
      file.write_bytes(file.read_bytes()[:change])
    else:
      file.write_text(change)
  before = files(path)
  with caplog.at_level(logging.WARNING):
    nodes = adopt(tmp_path)
  assert {id: mean(n) for id, n in nodes.items()} == pytest.approx(scores)
  assert [n.parent for n in nodes.values()] == parents
  assert files(tmp_path / "AIME" / "aflow_original") == before
  assert caplog.records or set(damage) <= {"round_1/log.json", "round_1/prompt.py"}
  used = [path / "results.json", *(f for id in nodes for f in path.glob(f"round_{id}/*.json"))]
  for file in used:  # whole, as AFlow needs it; the search removes the other rounds
    assert file.name == "results.json" or json.loads(file.read_text()) is not None
  results = json.loads((path / "results.json").read_text())
  keys = {"round", "score", "avg_cost", "total_cost", "time"}
  assert all(set(row) == keys for row in results)
  assert {row["round"] for row in results} == {id for id in scores if scores[id] is not None}
  shutil.rmtree(tmp_path / "AIME" / "aflow_original")
  caplog.clear()
  with caplog.at_level(logging.WARNING):
    again = adopt(tmp_path)
  assert {id: (mean(n), n.parent) for id, n in again.items()} == {
    id: (mean(n), n.parent) for id, n in nodes.items()
  }
  assert not [r for r in caplog.records if re.search("is damaged|lacks|rebuilt", r.getMessage())]


def test_scores_come_from_the_tables_names_and_parents_from_the_processed_experience(tmp_path):
  path = aflow_workspace(tmp_path)
  (path / "results.json").write_text("")
  for name in ("0.50000_20250723_101500.csv", "0.70000_20250723_101000.csv", "x.csv"):
    (path / "round_4" / name).write_text("question,prediction\n")
  (path / "round_4" / "experience.json").unlink()
  entry = {"modification": "edit\nfour", "score": 0.2}
  processed = {"2": {"score": 0.9, "success": {}, "failure": {"4": entry}}, "x": [], "3": None}
  (path / "processed_experience.json").write_text(json.dumps(processed))
  nodes = adopt(tmp_path)
  assert mean(nodes[4]) == pytest.approx(0.6)
  assert (nodes[4].parent, nodes[4].before, nodes[4].modification) == (2, 0.9, "edit four")
  rows = [r for r in json.loads((path / "results.json").read_text()) if r["round"] == 4]
  assert [(r["score"], r["time"]) for r in rows] == [
    (0.7, "2025-07-23T10:10:00"), (0.5, "2025-07-23T10:15:00"),
  ]  # fmt: skip
  experience = json.loads((path / "round_4" / "experience.json").read_text())
  assert experience == {
    "father node": 2, "modification": "edit\nfour", "before": 0.9, "after": 0.2, "succeed": False,
  }  # fmt: skip


def test_no_damage_at_random_places_raises(tmp_path):
  rng = random.Random(0)
  for trial in range(60):
    root = tmp_path / str(trial)
    path = aflow_workspace(root)
    names = [p for p in sorted(path.rglob("*")) if p.is_file()]
    for file in rng.sample(names, 4):
      raw = bytearray(file.read_bytes())
      for _ in range(rng.randrange(4)):
        if raw:
          raw[rng.randrange(len(raw))] = rng.randrange(256)
      file.write_bytes(bytes(raw[: rng.randrange(len(raw) + 1)]))
    nodes = Workspace(root, "AIME", ()).adopt(PROBLEMS, SEED)
    assert nodes[0].id == 1 and all(n.parent < n.id for n in nodes)
    assert all(mean(n) is None or math.isfinite(mean(n)) for n in nodes)


def test_what_is_no_json_or_of_another_kind_ends_no_commit(tmp_path):
  path = aflow_workspace(tmp_path)
  rows = json.loads((path / "results.json").read_text())
  for row in rows:
    row["avg_cost"] = row["total_cost"] = math.nan  # a mean of no costs
  (path / "results.json").write_text(json.dumps(rows))
  entry = {"modification": "edit", "score": 0.2}
  processed = {"2": {"score": 0.9, "success": {}, "failure": {"4": entry}}}
  (path / "processed_experience.json").write_text(json.dumps(processed))
  (path / "round_4" / "experience.json").write_text("[{}]")
  for row in ({"round": 10**400, "score": 0.1}, {"round": 1, "score": 10**400}):
    rows.append(row)
  (path / "results.json").write_text(json.dumps(rows))
  workspace = Workspace(tmp_path, "AIME", ("Custom",))
  nodes = workspace.adopt(PROBLEMS, SEED)
  assert {n.id: mean(n) for n in nodes} == pytest.approx(SCORES) and nodes[2].parent == 2
  tree = replay([add_event(n) for n in nodes])
  for change in (lambda: None, lambda: (path / "results.json").write_text("")):
    change()  # the second: its disk was full
    workspace.write_index(tree, ("full",))
    written = json.loads((path / "results.json").read_text(), parse_constant=pytest.fail)
    found = {row["round"]: row["score"] for row in written}
    assert set(found) == set(SCORES)
    assert all({"avg_cost", "total_cost", "time"} <= set(row) for row in written)
  assert found == pytest.approx(SCORES)


@pytest.mark.parametrize("lost", ["scores", "graphs"])
def test_a_seed_without_a_score_is_evaluated(sandbox, tmp_path, lost):
  """Also AFlow's shipped workspace: a seed, a template and empty JSON files."""
  path = aflow_workspace(tmp_path)
  for id in (2, 4):
    shutil.rmtree(path / f"round_{id}")
  (path / "results.json").write_text("")
  if lost == "graphs":
    shutil.rmtree(path / "round_1")
    (path / "round_7").mkdir()
    (path / "round_7" / "graph.py").write_text("")
  edit = reply("Shout.", workflow("STEPS! Work in steps."))
  fields = {"parents": 1, "group_size": 1, "full_top": 1, "problems": PROBLEMS[:6]}
  search = make_search(sandbox, tmp_path, in_order([edit]), **fields)
  run_rounds(search, 1)
  seed = search.tree.nodes[1]
  assert len(seed.scores) == 6 and seed.stage == "full" and seed.visits == 2
  assert search.tree.nodes[2].parent == 1 and search.best().id == 2
  results = json.loads((path / "results.json").read_text())
  assert [row["round"] for row in results] == [1, 2]
  state = json.loads(json.dumps(search.state_dict()))
  again = make_search(sandbox, tmp_path, in_order([edit]), **fields)
  again.load_state_dict(state)
  assert again.tree == search.tree


def test_children_may_use_the_operators_of_a_round_of_aflow(sandbox, tmp_path):
  path = aflow_workspace(tmp_path)
  file = path / "round_2" / "graph.py"
  file.write_text(file.read_text().replace("operator.Custom(", "operator.Review(self.llm)\n"
    "        self.custom = operator.Custom("))  # fmt: skip
  source = workflow("Work in steps!")
  graph = source.graph.replace("        self.custom =", "        self.review = operator.Review("
    "self.llm)\n        self.custom =")  # fmt: skip
  seen: list[str] = []
  edit = reply("Shout.", type(source)(graph, source.prompt))
  fields = {"parents": 3, "group_size": 1, "full_top": 1, "problems": PROBLEMS[:6]}
  search = make_search(sandbox, tmp_path, in_order([edit], seen), **{**fields, "prompt": "full"})
  (result,) = run_rounds(search, 1)
  ends = {r["parent"]: (r["stage"], r["failure"]) for r in result.records}
  assert ends[2] == ("subset", None)
  assert "unknown operator Review" in ends[1][1]["message"]
  told = [text for text in seen if "4. Review: " in text]
  assert len(told) == 1 and "<score>0.90</score>" in told[0]


def test_a_workspace_elsewhere_is_copied_and_never_changed(sandbox, tmp_path):
  path = aflow_workspace(tmp_path / "theirs")
  before = files(path)
  for number, source in enumerate((path.parent.parent, path.parent, path)):
    import_workspace(source, tmp_path / str(number), "AIME")
    assert files(tmp_path / str(number) / "AIME" / "workflows") == before
  root = tmp_path / "0"
  edit = reply("Shout.", workflow("STEPS! Work in steps."))
  fields = {"parents": 1, "group_size": 1, "full_top": 1, "problems": PROBLEMS[:6]}
  search = make_search(sandbox, root, in_order([edit]), **fields)
  run_rounds(search, 1)
  assert sorted(search.tree.nodes) == [1, 2, 4, 5] and files(path) == before
  import_workspace(path, root, "AIME")  # a resumed run: what is there stays
  assert (root / "AIME" / "workflows" / "round_5" / "graph.py").exists()
  with pytest.raises(UserError, match="config.search.workspace: expected GSM8K/workflows/rou"):
    import_workspace(path / "round_1", tmp_path / "x", "GSM8K")


def test_logs_of_hotpotqa_name_the_question_alone(tmp_path):
  path = aflow_workspace(tmp_path)
  entry = {"question": "Who?", "model_output": "Bo", "extracted_output": "Bo"}
  (path / "round_1" / "log.json").write_text(json.dumps([entry, "x", {"question": 3}]))
  problem = Problem("h", "Context: ...\n\nQuestion: Who?\n\nAnswer:", hidden={"question": "Who?"})
  node = Workspace(tmp_path, "AIME", ()).adopt([problem], SEED)[0]
  assert [(e.problem, e.output) for e in node.log] == [("h", "Bo")]
