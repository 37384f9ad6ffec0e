"""The report page: whole, self-contained, tolerant, and inert whatever a model wrote."""

import base64
import hashlib
import html.parser
import json
import re

import pytest
from made_run import make_run

from awf.report import best_node, read_run, run_report, write_report
from awf.report_charts import line_chart, thinned
from awf.report_data import DETAILS, MAX_BYTES, pack, payload, unpack, wilson_interval
from awf.report_live import LiveReport
from awf.report_parts import esc, number
from awf.search.tree import LogEntry, Node, add_event, expand_event
from awf.types import Failure, Problem, UserError, WorkflowSource

HOSTILE = (
  "</pre></style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'&lt;"
  "<svg/onload=alert(3)>\x00\x1b[31m\u202eevil\ud800\u2028"
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


def node(
  id, parent, score=None, failure=None, source=SEED, modification="edit", stage="full", log=()
):
  scores = {} if score is None else {"p": score}
  return Node(id, parent, source, f"c{id}", modification, stage, failure, scores, born=1, log=log)


def data_of(text):
  """What the page's script reads."""
  return unpack(re.search(r'id="data">([^<]*)</script>', text)[1])


def script_of(text):
  """The page's own script, checked against the digest in its policy."""
  script = text.rpartition("<script>")[2].partition("</script>")[0]
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  assert f"script-src &#x27;sha256-{digest}&#x27;" in text or f"'sha256-{digest}'" in text
  return script


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
  contender = {"score": 0.75, "interval": [0.5, 0.9], "pass_at_k": {"1": 0.75, "4": 0.875}}
  (tmp_path / "eval.json").write_text(
    json.dumps({"contenders": {"best": contender}, "problems": 9, "grader": {"graded": 54}})
  )
  text = write_report(tmp_path).read_text()
  page = Page(text)
  shown = " ".join(page.text)
  assert 'aria-label="pass@k on the test split"' in text
  for expected in (
    "NANO: seed",
    "0.25",
    "NANO: best",
    "0.75",
    "no graph tag",
    "2 / 3",
    "0.5 to 0.9",
    "@1 0.75, @4 0.875",
    "Answers graded: 54; malformed: –;",
  ):
    assert expected in shown
  assert '<span class="del">-  a = 1</span>' in text and '<span class="add">+  a = 2</span>' in text
  (search,) = data_of(text)["searches"]
  nodes = search["nodes"]
  assert search["best"] == 3 and search["path"] == [1, 2, 3]
  assert nodes["id"] == [1, 2, 3, 4] and nodes["parent"] == [0, 1, 2, 1]
  assert nodes["score"] == [0.25, 0.5, 0.75, None]
  assert nodes["failure"] == [None, None, None, ["format", "no graph tag"]]
  assert len(data_of(text)["texts"]) == 4  # two workflows and two prompts, each once
  assert ">99<" not in text  # epoch rows are no points of a curve
  assert best_node(read_run(tmp_path).searches[0].tree).id == 3
  assert write_report(tmp_path).read_text() == text


def test_hostile_texts_stay_text(tmp_path):
  evil = WorkflowSource(f"class Workflow:\n  {HOSTILE}", HOSTILE)
  failure = Failure("crash", HOSTILE)
  nodes = [
    node(1, 0, 0.1),
    node(2, 1, 0.9, source=evil, modification=HOSTILE, log=(LogEntry(HOSTILE, HOSTILE, HOSTILE),)),
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
  (tmp_path / "problems.json").write_text(json.dumps({HOSTILE: HOSTILE}))
  (tmp_path / "parts.json").write_text(json.dumps({"sandbox": {HOSTILE: HOSTILE}}))
  text = write_report(tmp_path).read_text(encoding="utf-8")
  page = Page(text)
  assert not {"img", "iframe", "link", "object", "a"} & set(page.tags)
  assert page.tags.count("script") == 2 and "alert(" not in script_of(text)
  assert text.count("<style>") == 1 and page.tags.count("title") == text.count("<title>")
  assert not [
    name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")
  ]
  assert "alert(1)" in " ".join(page.text)  # shown, not dropped
  data = json.dumps(data_of(text), ensure_ascii=False)
  assert "alert(1)" in data
  for sign in ("\x00", "\x1b", "\u202e", "\ud800", "\u2028"):
    assert sign not in data
    assert sign not in text


def test_no_external_resource_and_both_colour_schemes(tmp_path):
  write_run(tmp_path, [node(1, 0, 0.5)])
  text = write_report(tmp_path).read_text()
  for line in text.replace("http://www.w3.org/2000/svg", "").split("\n"):
    assert "http://" not in line and "https://" not in line and "url(" not in line
  assert "prefers-color-scheme:dark" in text and "default-src 'none'" in text


@pytest.mark.parametrize(
  "name",
  [
    "config.json",
    "metrics.jsonl",
    "timings.jsonl",
    "workspace/NANO/journal.jsonl",
    "trajectories/round_0001.jsonl",
    "parts.json",
    "problems.json",
  ],
)
@pytest.mark.parametrize(
  "content",
  [
    None,
    "",
    "{",
    "[1]\n[2]\n",
    '{"event": "add"}\n{}\n',
    "\xff\x00",
    '{"round": [], "parent": {}, "key": [1], "tokens": "x", "sandbox": 3, "before": []}',
  ],
)
def test_missing_and_broken_files_cost_their_section_only(tmp_path, name, content):
  write_run(tmp_path, [node(1, 0, 0.5)])
  file = tmp_path / name
  file.parent.mkdir(exist_ok=True)
  file.unlink(missing_ok=True)
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
  assert "set config.backup.path" in write_report(tmp_path).read_text()
  status = {"path": "/drive/x.tar", "step": 12, "megabytes": 3.5, "failures": 1, "failed": HOSTILE}
  (tmp_path / "backup.json").write_text(json.dumps(status))
  page = Page(write_report(tmp_path).read_text())
  shown = " ".join(page.text)
  assert "/drive/x.tar" in shown and "3.5" in shown and "alert(1)" in shown
  assert page.tags.count("script") == 2


def test_run_report_gives_the_json_line(tmp_path):
  write_run(tmp_path, [node(1, 0, 0.5)])
  out = run_report(None, tmp_path)
  assert out["report"].endswith("report.html") and out["bytes"] > 1000
  json.dumps(out)


def test_a_long_chain_and_a_large_forest(tmp_path):
  write_run(tmp_path, [node(i, i - 1, i / 700) for i in range(1, 320)])
  text = write_report(tmp_path).read_text()
  Page(text)
  assert len(data_of(text)["searches"][0]["path"]) == 319


def test_two_thousand_nodes_in_a_page_of_less_than_five_megabytes(tmp_path):
  nodes = make_run(tmp_path, 2000)
  text = write_report(tmp_path).read_text(encoding="utf-8")
  assert len(text.encode()) < 5_000_000
  data = data_of(text)
  (search,) = data["searches"]
  kept = search["nodes"]
  assert kept["id"] == [n.id for n in nodes] and len(set(data["texts"])) == len(data["texts"])
  last = max(range(2000), key=lambda at: len(kept["log"][at]))
  assert data["texts"][kept["graph"][last]] == nodes[last].source.graph
  assert kept["log"][last][0][:2] == [nodes[last].log[0].problem, nodes[last].log[0].output[:600]]
  assert data["problems"][kept["log"][last][0][0]].endswith("?")
  assert kept["cost"][1] == {
    "proposals": 1, "reward": 0.1, "tokens": 400, "calls": 120, "run_tokens": 7000,
  }  # fmt: skip
  assert kept["low"][1] <= kept["score"][1] <= kept["high"][1]
  shown = " ".join(Page(text).text)
  for expected in (
    "Tokens generated", "drawing proposals", "answers graded", "git checkout",
    "pass@k of the proposals", "pass@1", "pass@4", "pass@8",
  ):  # fmt: skip
    assert expected in shown


def test_data_that_do_not_fit_lose_failures_first_and_texts_last(tmp_path, monkeypatch):
  make_run(tmp_path, 60)
  run = read_run(tmp_path)
  sizes = [len(json.dumps(payload(run, detail))) for detail in DETAILS]
  assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
  whole = len(pack(run))
  assert whole < MAX_BYTES
  monkeypatch.setattr("awf.report_data.MAX_BYTES", whole - 1)
  assert unpack(pack(run)) == json.loads(json.dumps(payload(run, DETAILS[1])))


def test_several_searches_have_their_own_trees_and_costs(tmp_path):
  write_run(tmp_path, [node(1, 0, 0.5), node(2, 1, 0.75)])
  second = tmp_path / "workspace_2" / "NANO"
  second.mkdir(parents=True)
  events = [add_event(node(1, 0, 0.25)), add_event(node(2, 1, 1.0))]
  (second / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
  (tmp_path / "trajectories").mkdir()
  for step, tokens in ((1, 10), (2, 20)):  # one round each: the second counts anew
    row = {"round": 1, "parent": 1, "key": "c2", "tokens": tokens, "reward": 0.5}
    file = tmp_path / "trajectories" / f"round_{step:04d}.jsonl"
    file.write_text(json.dumps(row) + "\n")
  data = payload(read_run(tmp_path))
  assert [s["name"] for s in data["searches"]] == ["NANO", "NANO, search 2"]
  assert [s["nodes"]["cost"][1]["tokens"] for s in data["searches"]] == [10, 20]


def test_interval_of_a_share():
  low, high = wilson_interval(0.5, 100)
  assert abs(low - 0.4038) < 1e-3 and abs(high - 0.5962) < 1e-3  # Wilson's interval of 50 in 100
  assert wilson_interval(1.0, 5)[1] == 1.0 and wilson_interval(0.0, 5)[0] == 0.0
  assert wilson_interval(0.0, 5)[1] > 0.3


def test_a_curve_breaks_where_a_value_is_missing():
  drawn = line_chart("x", {"": [(0, 1.0), (1, 2.0), (2, None), (3, 1.0), (4, 3.0)]})
  assert drawn.count('class="curve') == 2 and drawn.count("<circle") == 4
  for points in ([(0, 5.0)], [(0, 0.0), (1, 0.0)]):
    assert "nan" not in line_chart("x", {"": points})
  several = line_chart("x", {"a": [(0, 1.0), (1, 2.0)], "b": [(0, 1.0), (1, 1.0)]})
  assert 'class="curve s1"' in several and ">a</text>" in several and ">b</text>" in several


def test_a_thinned_curve_keeps_its_peaks_and_its_end():
  points = [(float(i), 0.0) for i in range(5000)]
  points[1234], points[-1] = (1234.0, 9.0), (4999.0, 3.0)
  few = thinned(points)
  assert len(few) <= 402 and (1234.0, 9.0) in few and few[-1] == (4999.0, 3.0)
  assert [x for x, _ in few] == sorted(x for x, _ in few)


def test_the_page_of_a_run_that_goes_on_takes_a_small_share_of_its_time(tmp_path, caplog):
  write_run(tmp_path, [node(1, 0, 0.5, log=(LogEntry("p", "7", "7"),))])
  now = iter([0.0, 1.0, 19.0, 20.5, 21.0, 50.0, 50.0])
  live = LiveReport(tmp_path, [Problem("p", "What is 3 + 3?", "6")], clock=lambda: next(now))
  parts = {"sandbox": {"jobs": 12, "layers": {"seccomp": True}}, "workflows": {}, "sampler": {}}
  parts["before"] = {"scores": {"0": [0.25, 0.5]}}
  parts["grader"] = {"graded": 91, "malformed": 3, "timeouts": 2, "errors": HOSTILE, "seconds": 4.5}
  assert live.update(lambda: parts)  # took 1 s: none for 19
  assert not live.update(lambda: parts)
  text = (tmp_path / "report.html").read_text()
  shown = " ".join(Page(text).text)
  for part in (
    "verdicts 91",
    "nothing could be read 3",
    "comparison 2",
    "no verdict –",
    "work 4.5",
  ):
    assert part in shown
  assert "layers on seccomp" in shown and "The run has not ended" in shown
  assert data_of(text)["problems"] == {"p": "What is 3 + 3?"}
  assert json.loads((tmp_path / "problems.json").read_text()) == {"p": "What is 3 + 3?"}
  assert live.update(lambda: parts)
  (tmp_path / "report.html").unlink()
  (tmp_path / ".report.html.part").mkdir()
  assert live.update(lambda: parts)  # cannot be written: the run goes on
  assert "report.html is not up to date" in caplog.text


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
  compared = {
    "before": {"scores": {"0": [0.25, 0.75], "1": [1.0]}},
    "after": {"scores": {"0": [1.0, None], "1": [0.5]}},
  }
  (tmp_path / "summary.json").write_text(json.dumps(summary | {"comparison": compared}))
  text = write_report(tmp_path).read_text()
  for kind, value in (("before", "0.5"), ("after", "1"), ("before", "1"), ("after", "0.5")):
    assert f"<title>{kind} {value}</title>" in text
  assert text.count('<line class="gain"') == text.count('<line class="loss"') == 1
  # Figures of a foreign or damaged file cost their row, never the page.
  broken = summary | {"proposal_gain_interval": "x", "proposal_score_after": {"a": 1}}
  (tmp_path / "summary.json").write_text(json.dumps(broken))
  assert "What was learned" in write_report(tmp_path).read_text()
