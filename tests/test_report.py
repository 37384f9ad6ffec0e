"""The report page: whole, self-contained, tolerant, and inert whatever a model wrote."""

import html.parser
import json

import pytest

from awf.report import best_node, read_run, run_report, write_report
from awf.report_parts import esc, line_chart, number, tree_drawing
from awf.search.tree import Node, add_event, expand_event
from awf.types import Failure, UserError, WorkflowSource

HOSTILE = (
  "</pre></style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;"
  "<svg/onload=alert(3)>\x00\x1b[31m\u202eevil\ud800"
)
SEED = WorkflowSource("class Workflow:\n  a = 1", 'P = "x"')


class Page(html.parser.HTMLParser):
  """Collects tags and attributes, and checks that tags are balanced."""

  VOID = {"meta"}

  def __init__(self, text):
    super().__init__(convert_charrefs=True)
    self.tags, self.attributes, self.open, self.text = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text.append(data)


def node(id, parent, score=None, failure=None, source=SEED, modification="edit", stage="full"):
  scores = {} if score is None else {"p": score}
  return Node(id, parent, source, f"c{id}", modification, stage, failure, scores)


def write_run(path, nodes, dataset="NANO"):
  folder = path / "workspace" / dataset
  folder.mkdir(parents=True)
  events = [add_event(n) for n in nodes] + [expand_event(1), {"event": "round", "note": 1}]
  (folder / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
  config = {"config": {"name": "demo", "task": {"path": "x"}}, "mode": "train", "commit": "abc"}
  (path / "config.json").write_text(json.dumps(config))
  rows = [
    {"level": "batch", "epoch": 0, "step": i, "reward": i / 7, "own/x": 1.0} for i in range(4)
  ]
  rows[2]["reward"] = None
  rows.append({"level": "epoch", "epoch": 0, "step": 3, "reward": 99.0})
  (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
  (path / "timings.jsonl").write_text('{"level":"batch","epoch":0,"step":0,"time/step":60.0}\n')


def test_page_of_a_whole_run(tmp_path):
  better = WorkflowSource("class Workflow:\n  a = 2", 'P = "y"')
  failed = node(4, 1, failure=Failure("format", "no graph tag"), stage="format")
  write_run(tmp_path, [node(1, 0, 0.25), node(2, 1, 0.5), node(3, 2, 0.75, source=better), failed])
  contender = {"score": 0.75, "interval": [0.5, 0.9], "pass_at_k": {"1": 0.75}}
  (tmp_path / "eval.json").write_text(
    json.dumps({"contenders": {"best": contender}, "problems": 9})
  )
  text = write_report(tmp_path).read_text()
  page = Page(text)
  shown = " ".join(page.text)
  for expected in (
    "NANO: seed",
    "0.25",
    "NANO: best",
    "0.75",
    "no graph tag",
    "2 of 3",
    "0.5 to 0.9",
  ):
    assert expected in shown
  assert '<span class="del">-  a = 1</span>' in text and '<span class="add">+  a = 2</span>' in text
  assert text.count('class="edge best"') == 2
  assert "1: 0.25  −1" in shown  # the failed child is counted at its parent
  assert "99" not in shown  # epoch rows are no points of a curve
  assert best_node(read_run(tmp_path).trees["NANO"]).id == 3
  assert write_report(tmp_path).read_text() == text


def test_hostile_texts_stay_text(tmp_path):
  evil = WorkflowSource(f"class Workflow:\n  {HOSTILE}", HOSTILE)
  failure = Failure("crash", HOSTILE)
  nodes = [
    node(1, 0, 0.1),
    node(2, 1, 0.9, source=evil, modification=HOSTILE),
    node(3, 1, failure=failure, source=evil, modification=HOSTILE, stage="smoke"),
  ]
  write_run(tmp_path, nodes)
  config = {
    "config": {"name": HOSTILE, HOSTILE: HOSTILE},
    "mode": HOSTILE,
    "versions": {HOSTILE: 1},
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  row = {"level": "batch", "epoch": 0, "step": 0, HOSTILE: 1.0}
  (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  (tmp_path / "eval.json").write_text(json.dumps({"contenders": {HOSTILE: {"score": HOSTILE}}}))
  text = write_report(tmp_path).read_text(encoding="utf-8")
  page = Page(text)
  assert not {"script", "img", "iframe", "link", "object", "a"} & set(page.tags)
  assert text.count("<style>") == 1 and page.tags.count("title") == text.count("<title>")
  assert not [
    name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")
  ]
  assert "alert(1)" in " ".join(page.text)  # shown, not dropped
  for sign in ("\x00", "\x1b", "\u202e", "\ud800"):
    assert sign not in text


def test_no_external_resource_and_both_colour_schemes(tmp_path):
  write_run(tmp_path, [node(1, 0, 0.5)])
  text = write_report(tmp_path).read_text()
  assert "http://" not in text and "https://" not in text and "url(" not in text
  assert "prefers-color-scheme:dark" in text and "default-src 'none'" in text


@pytest.mark.parametrize(
  "name", ["config.json", "metrics.jsonl", "timings.jsonl", "workspace/NANO/journal.jsonl"]
)
@pytest.mark.parametrize(
  "content", [None, "", "{", "[1]\n[2]\n", '{"event": "add"}\n{}\n', "\xff\x00"]
)
def test_missing_and_broken_files_cost_their_section_only(tmp_path, name, content):
  write_run(tmp_path, [node(1, 0, 0.5)])
  file = tmp_path / name
  file.unlink()
  if content is not None:
    file.write_text(content, encoding="latin-1")
  Page(write_report(tmp_path).read_text())


def test_aflow_workspace_without_a_journal(tmp_path):
  folder = tmp_path / "workspace" / "GSM8K" / "workflows"
  folder.mkdir(parents=True)
  passes = [{"round": 1, "score": 0.5}, {"round": 1, "score": 0.25}, {"round": 2, "score": 0.8}]
  (folder / "results.json").write_text(json.dumps(passes))
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "metrics.jsonl").write_text('{"level":"batch","epoch":0,"step":0,"loss":1}\n')
  shown = " ".join(Page(write_report(tmp_path).read_text()).text)
  assert "Rounds on GSM8K" in shown and "0.375" in shown


def test_mistakes_of_the_user(tmp_path):
  with pytest.raises(UserError, match="no such directory"):
    write_report(tmp_path / "none")
  with pytest.raises(UserError, match="holds no run"):
    write_report(tmp_path)


def test_the_page_says_where_the_backups_are(tmp_path):
  write_run(tmp_path, [node(1, 0, 0.5)])
  assert "Backups" not in write_report(tmp_path).read_text()
  status = {"path": "/drive/x.tar", "step": 12, "megabytes": 3.5, "failures": 1, "failed": HOSTILE}
  (tmp_path / "backup.json").write_text(json.dumps(status))
  page = Page(write_report(tmp_path).read_text())
  shown = " ".join(page.text)
  assert "/drive/x.tar" in shown and "3.5" in shown and "alert(1)" in shown
  assert "script" not in page.tags


def test_run_report_gives_the_json_line(tmp_path):
  write_run(tmp_path, [node(1, 0, 0.5)])
  out = run_report(None, tmp_path)
  assert out["report"].endswith("report.html") and out["bytes"] > 1000
  json.dumps(out)


def test_a_long_chain_and_a_large_forest(tmp_path):
  chain = [node(i, i - 1, i / 700) for i in range(1, 320)]
  write_run(tmp_path, chain)
  Page(write_report(tmp_path).read_text())
  many = {i: 0 for i in range(1, 400)}
  assert tree_drawing(many, {}, {}, {}).count("<g>") == 399


def test_a_curve_breaks_where_a_value_is_missing():
  drawn = line_chart("x", [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 3.0)])
  assert drawn.count('class="curve"') == 2 and drawn.count("<circle") == 4
  assert "nan" not in line_chart("x", [(0, 5.0)]) and "nan" not in line_chart(
    "x", [(0, 0.0), (1, 0.0)]
  )


def test_numbers_and_escapes():
  assert [number(x) for x in (3, 0.12345, 1234567, None, float("nan"), True)] == [
    "3", "0.1235", "1,234,567", "–", "–", "–",
  ]  # fmt: skip
  assert esc('<a b="c">') == "&lt;a b=&quot;c&quot;&gt;"
  assert esc("x" * 50, 10).startswith("xxxxxxxxxx … (40 more")


def test_what_was_learned_stands_in_the_page_once_a_run_has_ended(tmp_path):
  write_run(tmp_path, [node(1, 0, 0.25)])
  assert "What was learned" not in write_report(tmp_path).read_text()
  summary = {
    "parents": 16, "proposals": 128,
    "proposal_score_before": 0.4375, "proposal_score_after": 0.6875,
    "proposal_gain_interval": [0.125, 0.375], "test_score_seed": 0.0625, "test_score_best": 0.9375,
  }  # fmt: skip
  (tmp_path / "summary.json").write_text(json.dumps(summary))
  shown = " ".join(Page(write_report(tmp_path).read_text()).text)
  for text in ("0.4375", "0.6875", "0.125 to 0.375", "128 proposals for 16", "0.9375", "0.0625"):
    assert text in shown
  assert "among valid ones" not in shown  # not in this summary
  # Figures of a foreign or damaged file cost their row, never the page.
  broken = summary | {"proposal_gain_interval": "x", "proposal_score_after": {"a": 1}}
  (tmp_path / "summary.json").write_text(json.dumps(broken))
  assert "What was learned" in write_report(tmp_path).read_text()
