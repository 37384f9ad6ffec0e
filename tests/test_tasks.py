"""Data sets: files, splits, grading (code in the real sandbox), statistics, the evaluator."""

import asyncio
import contextlib
import gzip
import hashlib
import http.server
import itertools
import json
import math
import pathlib
import threading
import time

import numpy as np
import pytest

from awf.sandbox import Sandbox, SandboxConfig
from awf.tasks import (
  AIMEEvaluator,
  DatasetEvaluator,
  GSM8KEvaluator,
  HumanEvalEvaluator,
  NanoEvaluator,
  TaskConfig,
  WorkflowEvaluator,
  download,
  make_task,
  spans,
  stats,
)
from awf.tasks.code import PRELUDE, find_solution, unknown_names
from awf.tasks.counted import CountedTask
from awf.tasks.download import cache_dir
from awf.tasks.humaneval import public_tests
from awf.terminal import track
from awf.types import Grade, Problem, UserError

SHARED = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def write(path, rows, as_list=False):
  text = json.dumps(rows, indent=1) if as_list else "".join(json.dumps(r) + "\n" for r in rows)
  path.write_text(text)
  return str(path)


def aime_rows(count):
  return [{"id": i, "problem": f"What is {i}?", "answer": f"{i:03d}"} for i in range(count)]


def aime(path, **fields):
  return AIMEEvaluator(TaskConfig("aime", path=path, **fields))


def ids(problems):
  return [problem.id for problem in problems]


# ---- files ----


def test_json_list_and_json_lines_read_alike(tmp_path):
  rows = aime_rows(10)
  lines = aime(write(tmp_path / "a.jsonl", rows)).load_dataset()
  assert lines == aime(write(tmp_path / "b.json", rows, as_list=True)).load_dataset()
  assert lines[7].answer == "7" and lines[7].prompt == "What is 7?"
  (tmp_path / "c.jsonl").write_text("\ufeff" + (tmp_path / "a.jsonl").read_text() + "\n\n")
  assert aime(str(tmp_path / "c.jsonl")).load_dataset() == lines


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path):
  path = tmp_path / "a.jsonl"
  row = {"id": 1, "problem": "a\u2028b\x85c", "answer": 1}
  path.write_text(json.dumps(row, ensure_ascii=False) + "\n")
  assert aime(str(path)).load_dataset()[0].prompt == "a\u2028b\x85c"


GOOD = '{"id": 0, "problem": "p", "answer": 1}'


@pytest.mark.parametrize(
  "text, message",
  [
    (f"{GOOD}\n\n{{broken\n", "line 3, column 2: not JSON"),
    (f"{GOOD}\n[1]\n", "line 2: expected a JSON object"),
    (f'{GOOD}\n{{"id": 1, "answer": 3}}\n', "line 2: no field 'problem'"),
    ('{"id": 1, "problem": "", "answer": 3}', "line 1: expected 'problem' to be a non-empty text"),
    ('{"id": 1, "problem": "p", "answer": 1000}', "from 0 to 999"),
    ('{"id": 1, "problem": "p", "answer": "1/2"}', "from 0 to 999"),
    ('{"id": 1, "problem": "p", "answer": true}', "from 0 to 999"),
    ('{"id": 1, "problem": "p"}', "from 0 to 999"),
    ('{"id": [], "problem": "p", "answer": 1}', "expected 'id'"),
    (f"{GOOD}\n{GOOD}\n", "problems 1 and 2 have the same id '0'"),
    (f'[\n{GOOD},\n\n{{"id": 1,\n "problem": "p"}}]', "line 4: "),
    (f"[{GOOD},\n]", "line 2, column 1: not JSON"),
    ("", "no problem in"),
    ("[" * 100_000, "nested too deeply"),
    ('{"id": 0, "problem": "p", "answer": 1, "split": "all"}', "expected 'split' among"),
    (b'{"id": 0}\n\xff\n', "line 2: expected UTF-8"),
  ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, text, message):
  path = tmp_path / "a.json"
  path.write_bytes(text if isinstance(text, bytes) else text.encode())
  with pytest.raises(UserError, match="config.task.path") as error:
    aime(str(path)).load_dataset()
  assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_file_and_field_mistakes(tmp_path):
  with pytest.raises(UserError, match="no such file"):
    aime(str(tmp_path / "none.json")).load_dataset()
  with pytest.raises(UserError, match="config.task.path"):
    NanoEvaluator().load_dataset()
  for fields in ({"limit": -1}, {"validation_share": 1.0}, {"test_path": "x"}):
    with pytest.raises(UserError, match="config.task"):
      TaskConfig("aime", **fields)


# ---- splits ----


def test_split_is_eighty_twenty_fixed_and_independent_of_order(tmp_path):
  rows = aime_rows(30)
  validation, test = aime(write(tmp_path / "a", rows)).split_dataset()
  assert (len(validation), len(test)) == (24, 6)
  again, other = aime(write(tmp_path / "b", rows[::-1])).split_dataset()
  assert set(ids(again)) == set(ids(validation)) and set(ids(other)) == set(ids(test))
  assert ids(test) == ["15", "22", "23", "25", "26", "27"]  # golden: seed 42
  moved = aime(write(tmp_path / "c", rows), split_seed=1).split_dataset()[1]
  assert set(ids(moved)) != set(ids(test))
  assert len(aime(write(tmp_path / "d", rows), validation_share=0.5).split_dataset()[1]) == 15


def test_equal_texts_never_stand_on_both_sides(tmp_path):
  rows = [{"id": i, "problem": f"twin {i // 5}", "answer": 1} for i in range(30)]
  for seed in range(8):
    validation, test = aime(write(tmp_path / "a", rows), split_seed=seed).split_dataset()
    assert not {p.prompt for p in validation} & {p.prompt for p in test}


@pytest.mark.parametrize("limit", [2, 5, 8, 29, 30, 99])
def test_a_limit_moves_no_problem_to_the_other_split(tmp_path, limit):
  path = write(tmp_path / "a", aime_rows(30))
  whole = [set(ids(part)) for part in aime(path).split_dataset()]
  parts = aime(path, limit=limit).split_dataset()
  assert sum(map(len, parts)) == min(limit, 30)
  assert all(set(ids(part)) <= every for part, every in zip(parts, whole, strict=True))


def test_a_data_set_that_comes_split_keeps_its_split(tmp_path):
  rows = [
    {**row, "split": "test" if i % 3 else "validation", "family": f"f{i % 2}"}
    for i, row in enumerate(aime_rows(9))
  ]
  task = make_task({"name": "nano", "path": write(tmp_path / "a", rows)})
  validation, test = task.split_dataset()
  assert ids(validation) == ["0", "3", "6"] and len(test) == 6
  assert [p.family for p in validation] == ["f0", "f1", "f0"]
  two = aime(write(tmp_path / "v", aime_rows(3)), test_path=write(tmp_path / "t", rows[5:]))
  assert [ids(part) for part in two.split_dataset()] == [["0", "1", "2"], ["5", "6", "7", "8"]]
  with pytest.raises(UserError, match="have no split"):
    aime(write(tmp_path / "m", rows[:3] + aime_rows(9)[5:])).split_dataset()


def test_an_empty_split_is_a_mistake(tmp_path):
  with pytest.raises(UserError, match="split of aime is empty"):
    aime(write(tmp_path / "a", aime_rows(1))).split_dataset()
  one_sided = [{**row, "split": "train"} for row in aime_rows(4)]
  with pytest.raises(UserError, match="the test split"):
    aime(write(tmp_path / "b", one_sided)).split_dataset()


# ---- counters ----


class SlowTask(AIMEEvaluator):
  """Real grading that takes a second of the clock; some responses break the grader."""

  now = 0.0

  async def grade(self, problem, response):
    type(self).now += 0.5
    await asyncio.sleep(0)
    type(self).now += 0.5
    if response == "lost":
      return Grade(math.nan, False, "", "infrastructure: gone", "infrastructure")
    if response == "raise":
      raise OSError("no helper")
    if response == "slow":
      return Grade(0.0, False, "x", "the symbolic comparison did not end", "timeout")
    return await super().grade(problem, response)


def test_what_a_grader_does_is_counted():
  task = CountedTask(SlowTask(TaskConfig("aime")), lambda: SlowTask.now)
  problem = task.to_problem({"problem": "1 + 2?", "answer": 3}, 0)
  assert task.name == "aime" and not any(task.grader_stats().values())

  async def run():
    grades = [task.grade(problem, r) for r in ("3", "it is 4", "no idea", "slow", "lost", "raise")]
    return await asyncio.gather(*grades, return_exceptions=True)

  grades = asyncio.run(run())
  assert [g.correct for g in grades[:4]] == [True, False, False, False]
  assert isinstance(grades[5], OSError)  # counted, and told
  # Six at once: one second of the clock each, but their time overlaps.
  assert task.grader_stats() == {
    "graded": 4, "right": 1, "malformed": 1, "timeouts": 1, "errors": 2, "seconds": SlowTask.now,
  }  # fmt: skip
  asyncio.run(task.grade(problem, "3"))
  assert task.grader_stats()["graded"] == 5 and task.grader_stats()["seconds"] == 7.0


# ---- registry ----


class WordTask(DatasetEvaluator):
  """The smallest data set of a user's own."""

  name, dataset, question_type = "words", "WORDS", "qa"

  def to_problem(self, row, index):
    return Problem(id=str(index), prompt=row["q"], answer=row["a"])

  async def grade(self, problem, response):
    correct = response.strip() == problem.answer
    return Grade(float(correct), correct, response)


def test_make_task(tmp_path):
  path = write(tmp_path / "a", [{"q": f"q{i}", "a": "x"} for i in range(5)])
  task = make_task({"name": f"{__name__}:WordTask", "path": path})
  assert isinstance(task, WordTask) and len(task.split_dataset()[0]) == 4
  for name, message in (
    ("aimee", "aime, drop, gsm8k, hotpotqa, humaneval, math, mbpp, nano"),
    ("no.such.module:X", "cannot import"),
    ("json:loads", "subclass of DatasetEvaluator"),
    ("humaneval", "needs a sandbox"),
  ):
    with pytest.raises(UserError, match=message):
      make_task({"name": name, "path": path})
  with pytest.raises(UserError, match="pth"):
    make_task({"name": "aime", "pth": path})


def test_defaults_of_the_config_file_fit():
  from configs.base import base_config

  assert make_task(base_config().task).config.validation_share == 0.8


# ---- download ----


@pytest.fixture
def server(tmp_path, monkeypatch):
  files = tmp_path / "www"
  files.mkdir()
  monkeypatch.setenv("AWF_CACHE", str(tmp_path / "cache"))

  class Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, directory=str(files), **kwargs)

    def log_message(self, *args):
      pass

  web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01})
  thread.start()
  yield f"http://127.0.0.1:{web.server_address[1]}", files
  web.shutdown()
  web.server_close()
  thread.join()


@pytest.mark.parametrize("own", ["off", "none", "0", ""])
def test_data_sets_are_kept_where_programs_are_not(monkeypatch, own):
  monkeypatch.setenv("AWF_CACHE", own)
  monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
  assert cache_dir() == pathlib.Path("/cache/awf/datasets")
  monkeypatch.setenv("AWF_CACHE", "~/x")
  assert cache_dir() == pathlib.Path.home() / "x" / "datasets"


def test_download_checks_unpacks_and_caches(server, monkeypatch):
  url, files = server
  shown = []

  @contextlib.contextmanager
  def told(*args, **kwargs):
    with track(*args, **kwargs) as stage:
      shown.append(stage)
      yield stage

  monkeypatch.setattr(download, "track", told)
  raw = gzip.compress(GOOD.encode())
  (files / "d.jsonl.gz").write_bytes(raw)
  source = download.Source(f"{url}/d.jsonl.gz", hashlib.sha256(raw).hexdigest())
  found = download.fetch(source)
  assert found.read_text() == GOOD and found.suffix == ".jsonl"
  assert [(s.name, s.done, s.total) for s in shown] == [("download d.jsonl.gz", len(raw), len(raw))]
  (files / "d.jsonl.gz").unlink()
  assert download.fetch(source) == found  # from the cache
  (files / "d.jsonl.gz").write_bytes(raw + b"x")
  with pytest.raises(UserError, match="sha256"):
    download.fetch(download.Source(source.url, "0" * 64))
  with pytest.raises(UserError, match="set config.task.path"):
    download.fetch(download.Source(f"{url}/none", "0" * 64))


def test_a_file_without_a_pinned_checksum_is_verified_after_its_first_use(server, monkeypatch):
  url, files = server
  (files / "d.jsonl").write_text(GOOD)
  source = download.Source(f"{url}/d.jsonl")
  found = download.fetch(source)
  assert found.read_text() == GOOD and download.fetch(source) == found
  found.write_text(GOOD + "\n")  # damaged in the cache
  with pytest.raises(UserError, match="when it was first used"):
    download.fetch(source)
  found.unlink()
  assert download.fetch(source).read_text() == GOOD
  found.unlink()
  (files / "d.jsonl").write_text(GOOD.replace("1", "2"))  # its home has another one
  with pytest.raises(UserError, match="has a new version"):
    download.fetch(source)
  hub = files / "hub.jsonl"
  hub.write_text(GOOD)
  monkeypatch.setattr(download, "_hub_file", lambda path, field: hub)
  assert download.local_file("hf://datasets/a/b/hub.jsonl") == hub
  hub.write_text(GOOD + GOOD)
  with pytest.raises(UserError, match="hf://datasets/a/b/hub.jsonl"):
    download.fetch(download.Source("hf://datasets/a/b/hub.jsonl"))


def test_offline_is_said_clearly(monkeypatch, tmp_path):
  monkeypatch.setenv("AWF_CACHE", str(tmp_path))
  with pytest.raises(UserError, match="go online once"):
    download.fetch(download.Source("http://127.0.0.1:9/x.jsonl", "0" * 64))
  with pytest.raises(UserError, match="hf://datasets/OWNER/NAME/FILE"):
    download.local_file("hf://models/x")
  with pytest.raises(UserError, match="from the hub"):
    download.local_file("hf://datasets/awf/none/data.jsonl")  # tests run with HF_HUB_OFFLINE


# ---- AFlow's files ----


def test_a_folder_of_aflows_files_is_read_by_their_names(tmp_path, sandbox):
  (tmp_path / "math_validate.jsonl").write_text('{"problem": "p", "solution": "\\\\boxed{1}"}\n')
  write(tmp_path / "math_test.jsonl", [{"problem": f"t{i}", "solution": BOX} for i in range(2)])
  task = make_task({"name": "math", "path": str(tmp_path)})
  validation, test = task.split_dataset()
  assert [p.prompt for p in validation] == ["p"] and [p.prompt for p in test] == ["t0", "t1"]
  assert [p.answer for p in (*validation, *test)] == ["1", "\\frac{1}{2}", "\\frac{1}{2}"]
  for kind, i, name in (("validate", 1, "add"), ("test", 2, "plus")):
    write(tmp_path / f"mbpp_{kind}.jsonl", [aflow_row(i, name)])
  rows = [{"entry_point": name, "test": [f"assert {name}(0, 0) == 0"]} for name in ("plus", "add")]
  write(tmp_path / "mbpp_public_test.jsonl", rows)
  task = make_task({"name": "mbpp", "path": str(tmp_path)}, sandbox)
  public = [p.public_tests for p in task.load_dataset()]
  assert public == [("assert add(0, 0) == 0",), ("assert plus(0, 0) == 0",)]
  write(tmp_path / "mbpp_public_test.jsonl", [{"entry_point": "add", "test": [1]}])
  with pytest.raises(UserError, match="mbpp_public_test.jsonl, line 1"):
    task.load_dataset()
  with pytest.raises(UserError, match="drop_validate.jsonl"):
    make_task({"name": "drop", "path": str(tmp_path)}).load_dataset()


def aflow_row(id, name):
  code, test = f"def {name}(a, b): return a + b", f"def check():\n  assert {name}(1, 2) == 3\n"
  return {"task_id": id, "prompt": "Add.", "entry_point": name, "code": code, "test": test}


def test_public_tests_of_a_doubled_name_are_told_apart_by_id_or_left_out(tmp_path, sandbox):
  names = ("one", "twice", "twice", "split", "split", "solve", "square_Sum", "alone")
  rows = [aflow_row(i, name) for i, name in enumerate(names)]
  write(tmp_path / "mbpp_validate.jsonl", rows[:2])
  write(tmp_path / "mbpp_test.jsonl", rows[2:])
  public = [
    {"entry_point": "one", "test": "assert 1"},
    {"entry_point": "twice", "test": "assert 2"},  # of one of two problems
    {"entry_point": "split", "test": "assert 3", "task_id": 4},
    {"entry_point": "split", "test": "assert 4", "task_id": 3},
    {"entry_point": "solve", "test": "assert 5"},  # of two rows
    {"entry_point": "solve", "test": "assert 6"},
    {"entry_point": "square_Sum", "test": "assert 7"},  # AFlow gives it none
    {"entry_point": "alone", "test": "assert 8", "task_id": 0},  # another problem's id
  ]
  write(tmp_path / "mbpp_public_test.jsonl", public)
  task = make_task({"name": "mbpp", "path": str(tmp_path)}, sandbox)
  found = [p.public_tests for p in task.load_dataset()]
  expected = ["assert 1", None, None, "assert 4", "assert 3", None, None, "assert 8"]
  assert found == [(text,) if text else () for text in expected]
  # A limit that hides the namesake changes nothing.
  assert [p.public_tests for p in task.load_dataset(limit=3)] == [found[0], found[1], found[2]]


def test_a_doubled_name_keeps_the_examples_of_its_docstring(tmp_path, sandbox):
  for kind, i in (("validate", 0), ("test", 1)):
    write(tmp_path / f"humaneval_{kind}.jsonl", [{**ADD, "task_id": f"T/{i}"}])
  row = {"entry_point": "add", "test": ["assert add('a', 'b') == 'ab'"]}
  write(tmp_path / "humaneval_public_test.jsonl", [row])
  task = make_task({"name": "humaneval", "path": str(tmp_path)}, sandbox)
  assert [p.public_tests for p in task.load_dataset()] == [("assert add(1, 2) == 3",)] * 2
  write(tmp_path / "humaneval_public_test.jsonl", [{**row, "task_id": "T/1"}])
  assert task.load_dataset()[1].public_tests == ("assert add('a', 'b') == 'ab'",)


def test_rows_whose_tests_need_the_solutions_own_names_are_left_out(tmp_path, sandbox, caplog):
  pair = "class Pair:\n  def __init__(self, a, b): self.a, self.b = a, b\n"
  code = pair + "def chain(pairs, n): return n"
  row = {"text": "Chain.", "code": code, "test_list": ["assert chain([Pair(5, 24)], 4) == 4"]}
  aflow = {**aflow_row(3, "chain"), "test": "def check():\n  assert chain([Pair(1, 2)], 4) == 4"}
  rows = [
    {**row, "task_id": 1},
    {**row, "task_id": 2, "test_setup_code": pair},
    aflow,
    MERGE,
  ]
  task = make_task({"name": "mbpp", "path": write(tmp_path / "rows", rows)}, sandbox)
  with caplog.at_level("WARNING", "awf"):
    assert ids(task.load_dataset()) == ["2", "9"]
  assert [record.getMessage() for record in caplog.records] == [
    "mbpp: 2 of 4 problems are left out, as their tests use what only a solution defines: Pair"
  ]
  assert [problem.id for _, problem in task.raw_rows()] == ["2", "9"]
  assert ids(task.load_dataset(limit=2)) == ["2", "9"]
  with pytest.raises(UserError, match="stand alone"):
    task.load_dataset(write(tmp_path / "all", rows[:1]))


@pytest.mark.parametrize(
  "tests, unknown",
  [
    ("assert f(x for x in range(3)) == [y for y in (1, 2)]", set()),
    ("import math\ndef g(a): return math.floor(a) + h\nh = 1\nassert f(g(1)) and re.match", set()),
    ("def check(candidate):\n  global state\n  state = 1\nassert candidate() == state", set()),
    ("try:\n  f()\nexcept ValueError as error:\n  assert str(error)", set()),
    ("assert f(Pair(1, 2)) == g(3)", {"Pair", "g"}),
    ("def check():\n  g = 1\n  assert f(g) == Pair(1, 2)\nassert g", {"Pair", "g"}),
    ("from x import *\nassert f(Pair(1, 2))", set()),
    ("assert f(Pair(1, 2)", set()),
  ],
)
def test_names_that_only_a_solution_defines(tests, unknown):
  assert unknown_names(tests, PRELUDE, "f") == unknown


BOX = "So $x = \\frac{1}{4} + \\frac{1}{4} = \\boxed{\\frac{1}{2}}$."


@pytest.mark.parametrize(
  "row",
  [
    {"id": "2025-I-1", "problem": "p", "answer": "70"},
    {"question": "p", "answer": 70},
    {"problem": "p", "answer": "070", "url": "x", "year": 2026},
  ],
)
def test_other_years_of_aime_have_the_same_form(tmp_path, row):
  (problem,) = aime(write(tmp_path / "aime", [row])).load_dataset()
  assert (problem.prompt, problem.answer) == ("p", "70")


# ---- graders ----


@pytest.mark.parametrize(
  "answer, expected, correct",
  [
    ("0.5", "\\frac{1}{2}", True), ("\\dfrac12", "\\frac12", True), ("0.333", "\\frac13", False),
    ("\\sqrt{12}", "2\\sqrt{3}", True), ("3.4641", "2\\sqrt{3}", False),
    ("(1, 2)", "(1,2)", True), ("(2,1)", "(1,2)", False), ("x \\in [2,5)", "[2,5)", True),
    ("3, 5, 7", "3,5,7", True), ("0,1", "0, 1", True), ("3,4,5", "5,4,3", True),
    ("1,2", "1,2,3", False), ("3,5", "5", False), ("A, C, D", "A,C,D", True),
    ("1,200", "1, 200", True), ("1, 200", "1,200", False),
    ("5.5", "1\\frac12", False), ("\\frac32", "1\\frac12", True), ("-1\\frac12", "-1.5", True),
    ("1\\frac12", "\\frac{11}{2}", False),
    ("(2,5)", "[2,5)", False), ("-2, 1", "1,-2", True), ("1, 2, 3", "1,2", False),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", True),
    ("\\begin{pmatrix}1\\\\3\\end{pmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", False),
    ("C", "\\text{(C)}", True), ("B", "\\text{(C)}", False), ("Evelyn", "\\text{Evelyn}", True),
    ("\\$32{,}348", "32,\\!348", True), ("10\\%", "10", True), ("5\\text{ cm}^2", "5", True),
    ("90", "90^\\circ", True), ("3+2x", "y = 2x+3", True), ("6-5i", "-5i+6", True),
    ("3-2\\sqrt2, 3+2\\sqrt{2}", "3 \\pm 2\\sqrt{2}", True), ("(x-1)(x+1)", "x^2-1", True),
    ("x^2+1", "x^2-1", False), ("2517_8", "2516_8", False), ("\\{3,2,1\\}", "\\{1,2,3\\}", True),
    ("(-\\infty,3)\\cup(5,\\infty)", "(-\\infty, 3) \\cup (5, \\infty)", True),
  ],
)  # fmt: skip
def test_math_compares_what_is_in_the_box(math_task, answer, expected, correct):
  problem = Problem("m", "", answer=expected)
  grade = asyncio.run(
    math_task.grade(problem, f"From $x = 7$ we get $\\boxed{{{answer}}}$ at once.")
  )
  assert grade.correct is correct, grade


@pytest.fixture(scope="module")
def math_task():
  task = make_task({"name": "math"})
  yield task
  task.validator.close()


@pytest.mark.parametrize(
  "response, answer",
  [
    ("First $1$.\nHence the answer is $\\frac{3}{4}$.", "\\frac{3}{4}"),
    ("**Answer:** Evelyn", "Evelyn"),
    ("Thus\n\\[ 3x + 1 \\]", "3x + 1"),
    ("<answer>$\\frac12$</answer> or \\boxed{9}", "$\\frac12$"),
    ("\\boxed{1} no, \\boxed{\\frac{2}{\\sqrt{3}}}", "\\frac{2}{\\sqrt{3}}"),
    ("In all 42 ways", "42"),
  ],
)
def test_math_finds_the_answer(math_task, response, answer):
  assert math_task.validator.extract(response).text == answer


def test_math_reads_every_form_of_its_rows(math_task):
  row = {"problem": "p", "solution": BOX, "type": "Algebra", "level": "Level 5"}
  problem = math_task.to_problem(row, 3)
  assert (problem.id, problem.answer, problem.family) == ("math-3", "\\frac{1}{2}", "Algebra")
  row = {"problem": "p", "solution": "-", "answer": "x", "subject": "Geometry", "unique_id": "g/1"}
  problem = math_task.to_problem(row, 0)
  assert (problem.id, problem.answer, problem.family) == ("g/1", "x", "Geometry")
  with pytest.raises(ValueError, match="boxed"):
    math_task.to_problem({"problem": "p", "solution": "It is 4."}, 0)


@pytest.mark.parametrize(
  "answer, expected, f1, exact",
  [
    ("The Eiffel-Tower!", "eiffeltower", 1.0, True),
    ("tower, Eiffel", "Eiffel Tower", 1.0, False),
    ("the old tower of Paris", "Paris tower", 2 * 2 / 6, False),
    ("a b b", "b b b", 4 / 5, False),  # "a" is an article
    ("yes, both were", "yes", 0.0, False),
    ("yes", "no", 0.0, False),
    ("Yes.", "yes", 1.0, True),
    ("", "x", 0.0, False),
  ],
)
def test_hotpotqa_scores_tokens(answer, expected, f1, exact):
  score, same = spans.token_f1(answer, expected)
  assert score == pytest.approx(f1) and same is exact


@pytest.mark.parametrize(
  "answer, expected, f1, exact",
  [
    (["5.0 goals"], ["5 goal"], 0.5, False),
    (["$1,000"], ["1000"], 1.0, True),
    (["12 yards"], ["13 yards"], 0.0, False),  # the number decides
    (["5-yard run"], ["run of 5 yards"], round(4 / 7, 4), False),
    (["Bo", "Al"], ["Al", "Bo"], 1.0, True),
    (["Al"], ["Al", "Bo"], 0.5, False),
    (["Al", "Bo", "Cy", "Di"], ["Bo"], 0.25, False),  # guesses cost
    (["Al Bo", "Al"], ["Al", "Bo"], round((1 + 2 / 3) / 2, 4), False),
    (["x", "x y"], ["x", "x"], round((1 + 2 / 3) / 2, 4), False),
    ([], ["Al"], 0.0, False),
    (["the"], ["Al"], 0.0, False),
  ],
)
def test_drop_aligns_spans(answer, expected, f1, exact):
  score, same = spans.drop_f1(answer, expected)
  assert score == pytest.approx(f1) and same is exact


def test_hotpotqa_and_drop_read_aflows_rows_and_the_public_ones():
  hotpot, drop = make_task({"name": "hotpotqa"}), make_task({"name": "drop"})
  context = [["T", ["One.", " Two."]], ["U", ["Three."]]]
  row = {"_id": "5a", "question": "Who?", "answer": "Ida", "context": context, "type": "bridge"}
  problem = hotpot.to_problem(row, 0)
  assert problem.prompt == "Context: One.  Two.\nThree.\n\nQuestion: Who?\n\nAnswer:"
  assert (problem.id, problem.family, problem.hidden["question"]) == ("5a", "bridge", "Who?")
  columns = {"title": ["T", "U"], "sentences": [["One.", " Two."], ["Three."]]}
  assert hotpot.to_problem({**row, "context": columns}, 0) == problem
  for response, score, correct in (
    ("I think that <answer>Ida</answer>, not Bo.", 1.0, True),
    ("Ida Solberg", 2 / 3, False),
  ):
    grade = asyncio.run(hotpot.grade(problem, response))
    assert grade.score == pytest.approx(score) and grade.correct is correct
  for bad in (None, [], "x", [["T", "One."]], {"sentences": [1]}):
    with pytest.raises(ValueError, match="context"):
      hotpot.to_problem({**row, "context": bad}, 0)

  problem = drop.to_problem(
    {"context": "Passage: ...", "completion": "", "ref_text": "a1|b2|a1"}, 7
  )
  assert (problem.id, problem.prompt) == ("drop-7", "Passage: ...")
  for response, score in (("a1", 1.0), ("b2 | a1", 1.0), ("a1|c3|d4|e5", 0.25), ("x", 0.0)):
    assert asyncio.run(drop.grade(problem, response)).score == score
  date = {"number": "", "date": {"day": "4", "month": "May", "year": "1820"}, "spans": []}
  number = {"number": "3", "date": {}, "spans": []}
  public = {"passage": "p", "question": "q", "query_id": "x"}
  problem = drop.to_problem({**public, "answer": date, "validated_answers": [number]}, 0)
  assert problem.answer == [["4 May 1820"], ["3"]] and "Question: q" in problem.prompt
  hub = drop.to_problem({**public, "answers_spans": {"spans": ["Al", "Bo", "Al"]}}, 0)
  assert hub.answer == [["Al"], ["Bo"], ["Al", "Bo"]]
  for response, correct in (("<answer>Bo|Al</answer>", 1), ("Bo", 1), ("Al and Bo", 0)):
    assert asyncio.run(drop.grade(hub, response)).correct == correct
  hub = drop.to_problem({**public, "answers_spans": {"spans": ["13", "13"]}}, 0)
  assert asyncio.run(drop.grade(hub, "13")).score == 1.0
  for spans_of_none in ([], [" "], "13", None):
    with pytest.raises(ValueError, match="answers_spans"):
      drop.to_problem({**public, "answers_spans": {"spans": spans_of_none}}, 0)
  with pytest.raises(ValueError, match="ref_text"):
    drop.to_problem({"context": "x", "ref_text": " | "}, 0)


def test_graders_end_soon_on_hostile_text():
  texts = ["|" * 90_000, "a " * 45_000, "1-" * 45_000, "<answer>" * 12_000, "\\boxed{" * 15_000]
  texts += ["$" * 90_000, "answer: " * 12_000, "\\[" * 45_000, "|".join(map(str, range(20_000)))]
  texts += ["9" * 90_000, "\\frac" * 15_000, "the answer is \\(" * 6_000]
  for name, answer in (("hotpotqa", "1 a"), ("drop", [["1", "2", "a"]]), ("math", "x^2")):
    task = make_task({"name": name})
    for text in texts:
      started = time.process_time()
      grade = asyncio.run(task.grade(Problem("x", "", answer=answer), text))
      assert not grade.correct and time.process_time() - started < 1.0, (name, text[:20])


def test_gsm8k_takes_the_number_behind_the_hashes(tmp_path):
  rows = [{"question": f"q{i}", "answer": f"2+2=<<2+2=4>>4\n#### 1,{i:03d}"} for i in range(5)]
  task = GSM8KEvaluator(TaskConfig("gsm8k", path=write(tmp_path / "a", rows)))
  problem = task.load_dataset()[3]
  assert problem.answer == "1,003" and "split" in problem.hidden
  assert asyncio.run(task.grade(problem, "so $1003.00")).correct
  assert not asyncio.run(task.grade(problem, "4")).correct
  with pytest.raises(UserError, match="#### NUMBER"):
    path = write(tmp_path / "b", [{"question": "q", "answer": "no number"}])
    GSM8KEvaluator(TaskConfig("gsm8k", path=path)).load_dataset()


ADD = {
  "task_id": "T/0",
  "entry_point": "add",
  "prompt": 'def add(a, b):\n  """Adds.\n\n  >>> add(1, 2)\n  3\n  >>> print(1)\n  1\n  """\n',
  "canonical_solution": "  return a + b\n",
  "test": "def check(candidate):\n  assert candidate(1, 2) == 3\n"
  "  assert candidate((1,), (2,)) == (1, 2), 'secret 12'\n",
}


@pytest.fixture(scope="module")
def sandbox():
  config = SandboxConfig(workers=2, preload_numeric=False, cpu_seconds=2, wall_seconds=30)
  with Sandbox(config) as made:
    yield made


@pytest.fixture(scope="module")
def add_task(sandbox, tmp_path_factory):
  path = write(tmp_path_factory.mktemp("h") / "a", [ADD, {**ADD, "task_id": "T/1"}])
  return HumanEvalEvaluator(TaskConfig("humaneval", path=path), sandbox)


@pytest.mark.parametrize(
  "response, correct, reason",
  [
    ("```python\ndef add(a, b):\n  return a + b\n```", True, ""),
    ("```\ndef add(a, b):\n  return 0\n```\nOr:\n```py\nadd = lambda a, b: a + b\n```", True, ""),
    ("def add(a, b):\n  return a + b", True, ""),
    ("  return a + b\n", True, ""),
    ("```python\n  return a + b\n```", True, ""),
    ("```python\ndef add(a, b):\n  return 3\n```", False, "wrong: a test failed: AssertionError"),
    ("```python\ndef add(a, b):\n  return [*a, *b] if a != 1 else 3\n```", False, "wrong"),
    ("```python\ndef add(a, b):\n  raise ValueError('x')\n```", False, "wrong"),
    ("```python\ndef add(a, b):\n  while True: pass\n```", False, "timeout"),
    ("", False, "wrong"),
    ("I cannot do this.", False, "format"),
    ("```python\ndef add(a, b): return a +\n```", False, "format"),
    ("```python\nimport os\ndef add(a, b): return a + b\n```", False, "policy"),
    (
      "class Yes:\n  def __eq__(self, other): return True\n  __hash__ = None\n"
      "def add(a, b): return Yes()",
      False, "wrong",
    ),
    (
      "class Int(int):\n  def __eq__(self, other): return True\n  __hash__ = None\n"
      "def add(a, b): return Int(9)",
      False, "wrong",
    ),
    (
      "import sys\ndef add(a, b):\n  f = sys._getframe()\n  while f:\n    f.f_globals['check'] = "
      "lambda c: None\n    f.f_locals['passed'] = True\n    f = f.f_back\n  return 0",
      False, "wrong",
    ),
    ("import sys\ndef add(a, b): sys.exit(0)", False, ""),
    ("raise SystemExit(0)\ndef add(a, b): pass", False, ""),
  ],
)  # fmt: skip
def test_code_is_judged_where_it_cannot_reach_its_judge(add_task, response, correct, reason):
  grade = asyncio.run(add_task.grade(add_task.load_dataset()[0], response))
  assert grade.correct is correct and grade.score == float(correct)
  assert grade.reason.startswith(reason) and "secret" not in grade.reason
  assert reason not in ("timeout", "format", "policy") or grade.failure == reason


def test_many_gradings_at_once_do_not_wait_for_each_other(add_task):
  problem = add_task.load_dataset()[0]
  responses = [f"def add(a, b): return {'a + b' if i % 2 else 'None'}" for i in range(16)]

  async def run():
    return await asyncio.gather(*(add_task.grade(problem, r) for r in responses))

  assert [g.correct for g in asyncio.run(run())] == [bool(i % 2) for i in range(16)]


MERGE = {
  "task_id": 9,
  "prompt": "Write a function that counts what is in a list.",
  "code": "from collections import Counter\ndef helper(x): return x\n"
  "def tally(items, start=0):\n  return Counter(helper(items))",
  "test_imports": ["import math"],
  "test_list": [
    "assert tally([1, 1, 2]) == {1: 2, 2: 1}",
    "assert len(tally(['secret'])) == math.floor(1.5)",
  ],
}


@pytest.mark.parametrize(
  "response, correct, reason",
  [
    (f"```python\n{MERGE['code']}\n```", True, ""),
    ("def tally(items):\n  return {i: items.count(i) for i in items}", True, ""),
    ("from collections import defaultdict\ndef tally(items):\n  d = defaultdict(int)\n"
     "  for i in items: d[i] += 1\n  return d", True, ""),
    ("def tally(items):\n  return {1: 2, 2: 1}", False, "wrong: a test failed: AssertionError"),
    ("def count(items):\n  return 1", False, "format"),
    ("class D(dict):\n  def __eq__(self, o): return True\n  def __len__(self): return 1\n"
     "def tally(items):\n  return D()", False, "wrong"),
    ("def tally(items):\n  while True: pass", False, "timeout"),
  ],
)  # fmt: skip
def test_mbpp_is_judged_by_its_assertions(sandbox, response, correct, reason):
  task = make_task({"name": "mbpp"}, sandbox)
  problem = task.to_problem(MERGE, 0)
  assert problem.prompt == MERGE["prompt"] + "\n\ndef tally(items, start=0):"
  assert problem.public_tests == ("import math\n\nassert tally([1, 1, 2]) == {1: 2, 2: 1}",)
  grade = asyncio.run(task.grade(problem, response))
  assert grade.correct is correct and grade.reason.startswith(reason), grade
  assert "secret" not in grade.reason


ITERATORS = {
  "filter(lambda x: x in b, a)": "set(f(A, B)) == {4, 5}",
  "map(abs, a)": "list(f(A, B)) == A",
  "zip(a, b)": "list(f(A, B))[0] == (3, 5)",
  "(x for x in a)": "sorted(f(A, B)) == A",
  "reversed(a)": "next(f(A, B)) == 5",
  "enumerate(a)": "dict(f(A, B)) == {0: 3, 1: 4, 2: 5}",
  "iter([iter(a)])": "[list(one) for one in f(A, B)] == [A]",
  "dict.fromkeys(a).keys()": "f(A, B) == {3, 4, 5} and len(f(A, B)) == 3",
  "{3: 4, 5: [6]}.items()": "(3, 4) in f(A, B) and len(f(A, B)) == 2",
  "{3: 4, 5: [6]}.values()": "sorted(map(str, f(A, B))) == ['4', '[6]']",
  "range(2, 9, 3)": "f(A, B) == range(2, 9, 3) and f(A, B)[1] == 5",
}


@pytest.mark.parametrize("value", ITERATORS)
def test_a_solution_may_return_an_iterator_or_a_view(sandbox, value):
  tests = f"A, B = [3, 4, 5], [5, 7, 4]\nassert {ITERATORS[value]}"
  exec(tests, {"f": lambda a, b: eval(value, {"a": a, "b": b})})  # as in one namespace
  problem = Problem("i", "", entry_point="f", hidden={"test": tests})
  task = make_task({"name": "mbpp"}, sandbox)
  grade = asyncio.run(task.grade(problem, f"def f(a, b):\n  return {value}"))
  assert grade.correct, grade
  assert not asyncio.run(task.grade(problem, "def f(a, b):\n  return iter([9])")).correct


def test_an_iterator_is_one_shot_and_has_an_end(sandbox):
  task = make_task({"name": "mbpp"}, sandbox)
  tests = "it = f()\nassert list(it) == [0, 1]\nassert list(it) == []\nassert it != [0, 1]"
  problem = Problem("i", "", entry_point="f", hidden={"test": tests})
  start = "import itertools\nclass It:\n  def __init__(self): self.n = -1\n"
  start += "  def __iter__(self): return self\n  def __eq__(self, other): return False\n"
  start += "  def __next__(self):\n    self.n += 1\n    if self.n > LAST: raise StopIteration\n"
  for body, last, correct in (
    ("It()", 1, True),
    ("[0, 1]", 0, False),  # a list can be read twice
    ("It()", "self.n", False),
    ("itertools.count()", 0, False),
    ("(1 // 0 for _ in range(2))", 0, False),
    ("itertools.repeat(itertools.count())", 0, False),
  ):
    response = start.replace("LAST", str(last)) + f"    return self.n\ndef f(): return {body}"
    grade = asyncio.run(task.grade(problem, response))
    assert grade.correct is correct and (correct or grade.reason.startswith("wrong")), grade


def test_mbpp_reads_aflows_rows_and_a_function_called_check(sandbox):
  task = make_task({"name": "mbpp"}, sandbox)
  row = {"prompt": "Add.\n\ndef add(a, b):", "entry_point": "add", "code": "def add(a, b): ..."}
  problem = task.to_problem({**row, "test": "def check():\n    assert add(1, 2) == 3\n"}, 4)
  assert (problem.id, problem.public_tests, problem.prompt) == ("mbpp-4", (), row["prompt"])
  right, wrong = "def add(a, b): return a + b", "def add(a, b): return 4"
  assert [asyncio.run(task.grade(problem, r)).correct for r in (right, wrong)] == [True, False]
  code = "def rev(n): return int(str(n)[::-1])\ndef check(n): return 2 * rev(n) == n + 1"
  row = {"text": "Odd one.", "code": code, "test_list": ["assert check(73) == True"]}
  problem = task.to_problem({**row, "entry_point": "check", "test": "def check(): ..."}, 0)
  assert asyncio.run(task.grade(problem, code)).correct
  assert not asyncio.run(task.grade(problem, "def check(n): return n")).correct
  for change, message in (
    ({"test_list": ["assert f(1)"]}, "calls no function"),
    ({"test_list": []}, "no field 'test_list'"),
    ({"code": "def f(:"}, "to be Python"),
    ({"test_list": "x"}, "list of texts"),
  ):
    with pytest.raises(ValueError, match=message):
      task.to_problem({**row, **change}, 0)


def test_a_dead_sandbox_is_nobodys_fault(tmp_path):
  with Sandbox(SandboxConfig(workers=1, preload_numeric=False)) as made:
    task = HumanEvalEvaluator(TaskConfig("humaneval", path=write(tmp_path / "a", [ADD])), made)
    problem = task.to_problem(ADD, 0)
  grade = asyncio.run(task.grade(problem, "def add(a, b): return a + b"))
  assert math.isnan(grade.score) and grade.reason.startswith("infrastructure")


def test_public_tests_come_from_the_docstring_alone():
  assert public_tests(ADD["prompt"], "add") == ("assert add(1, 2) == 3",)
  assert public_tests("def add(a, b):\n  pass", "add") == ()
  assert public_tests("def broken(", "add") == ()


def test_find_solution_prefers_the_last_fence_that_defines_it():
  fences = "```python\ndef f(): return 1\n```\n```python\ndef g(): return 2\n```"
  assert find_solution(fences, "", "f").strip() == "def f(): return 1"
  assert find_solution("```python\nimport math\ndef f(): return 1", "", "f").endswith("return 1")


if SHARED.is_dir():  # public benchmark data beside the checkout

  def test_public_data_sets(sandbox):
    task = aime(str(SHARED / "aime24" / "data.json"))
    assert [len(part) for part in task.split_dataset()] == [24, 6]
    task = GSM8KEvaluator(TaskConfig("gsm8k", path=str(SHARED / "gsm8k" / "test_400.jsonl")))
    for problem in task.load_dataset()[:50]:
      assert asyncio.run(task.grade(problem, f"<answer>{problem.answer}</answer>")).correct
    path = SHARED / "humaneval" / "HumanEval.jsonl"
    task = HumanEvalEvaluator(TaskConfig("humaneval", path=str(path)), sandbox)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = [rows[i] for i in (0, 32, 38, 50, 160)]  # helpers, floats, random inputs

    async def run():
      problems = [task.to_problem(row, 0) for row in chosen]
      right = [f"```python\n{r['prompt']}{r['canonical_solution']}```" for r in chosen]
      wrong = [f"```python\n{r['prompt']}    return None\n```" for r in chosen]
      pairs = zip(problems * 2, right + wrong, strict=True)
      return await asyncio.gather(*(task.grade(p, response) for p, response in pairs))

    assert [g.correct for g in asyncio.run(run())] == [True] * 5 + [False] * 5

  def test_a_humaneval_solution_need_not_repeat_what_the_prompt_imports_and_defines(sandbox):
    path = SHARED / "humaneval" / "HumanEval.jsonl"
    task = HumanEvalEvaluator(TaskConfig("humaneval", path=str(path)), sandbox)
    problems, responses = [], []
    for row in map(json.loads, path.read_text().splitlines()):
      start = row["prompt"].index(f"def {row['entry_point']}(")
      if row["prompt"][:start].strip():  # all but the function itself
        problems.append(task.to_problem(row, 0))
        alone = row["prompt"][start:] + row["canonical_solution"]
        responses.append(f"Here it is:\n```python\n{alone}\n```")
    assert len(problems) > 20

    async def run():
      pairs = zip(problems, responses, strict=True)
      return await asyncio.gather(*(task.grade(*pair) for pair in pairs))

    assert [g.reason for g in asyncio.run(run()) if not g.correct] == []
    (zero,) = [p for p in problems if p.entry_point == "find_zero"]
    assert zero.public_tests[0] == "assert round(find_zero([1, 2]), 2) == -0.5"


# ---- evaluator ----


def test_workflow_evaluator(tmp_path):
  evaluator = WorkflowEvaluator(aime(write(tmp_path / "a", aime_rows(10))))
  assert len(evaluator.problems) == 10 and len(evaluator.test) == 2
  out = evaluator.evaluate_workflow_response("so <answer>4</answer>", "4")
  assert out == {"problem_id": "4", "correct": True, "score": 1.0, "answer": "4", "reason": ""}
  batch = asyncio.run(evaluator.evaluate_batch([(f"it is {i}", str(i % 3)) for i in range(6)]))
  assert [row["correct"] for row in batch] == [True] * 3 + [False] * 3
  assert [row["problem_id"] for row in batch] == ["0", "1", "2"] * 2
  with pytest.raises(KeyError):
    evaluator.evaluate_workflow_response("1", "none")
  assert evaluator.pass_at_k({"0": [True, False], "1": [False, False]}, 1) == 0.25
  first, second = ids(evaluator.test)
  assert evaluator.solved_at_k([[first], []]) == 0.5
  assert evaluator.solved_at_k([[first], [second, first]]) == 1.0


# ---- statistics ----


@pytest.mark.parametrize("n, c, k", [(4, 1, 2), (5, 2, 3), (6, 0, 2), (6, 6, 1), (5, 4, 5)])
def test_pass_at_k_is_the_mean_over_all_subsets(n, c, k):
  samples = [i < c for i in range(n)]
  subsets = list(itertools.combinations(samples, k))
  assert stats.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_of_large_n_and_refusals():
  product = 1.0 - np.prod(1.0 - 100 / np.arange(1000 - 10 + 1, 1001))  # Chen et al., their code
  assert stats.pass_at_k(1000, 10, 100) == pytest.approx(product, rel=1e-9)
  for bad in ((4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)):
    with pytest.raises(ValueError, match="expected|needs"):
      stats.pass_at_k(*bad)


def test_solved_at_k():
  assert stats.solved_at_k([["a"], ["b"]], ["a", "b", "c", "d"]) == 0.5
  assert stats.solved_at_k([], ["a"]) == 0.0
  with pytest.raises(ValueError):
    stats.solved_at_k([["x"]], ["a"])
  with pytest.raises(ValueError):
    stats.solved_at_k([], [])


def test_bootstrap_covers_the_true_mean_and_repeats():
  generator = np.random.default_rng(0)
  hits = 0
  for trial in range(40):
    low, high = stats.bootstrap_interval(generator.random(60) < 0.3, n=200, seed=trial)
    hits += low <= 0.3 <= high
  assert 33 <= hits <= 40
  values = generator.random(20)
  assert stats.bootstrap_interval(values, seed=3) == stats.bootstrap_interval(values, seed=3)
  assert stats.bootstrap_interval(values, seed=3) != stats.bootstrap_interval(values, seed=4)
  assert stats.bootstrap_interval([0.5] * 9) == (0.5, 0.5)
  assert stats.bootstrap_interval([0.25, math.nan]) == (0.25, 0.25)


def test_grouped_values_give_a_wider_interval_than_pretended_independence():
  generator = np.random.default_rng(1)
  values = np.repeat(generator.random(12), 8)  # 8 equal samples of each of 12 problems
  groups = np.repeat(np.arange(12), 8).tolist()
  apart, together = (stats.bootstrap_interval(values, g) for g in (None, groups))
  assert together[1] - together[0] > 2 * (apart[1] - apart[0])
  each = stats.bootstrap_interval(values[::8])
  assert together == pytest.approx(each)


def test_paired_bootstrap_removes_what_parents_share():
  level = np.random.default_rng(2).random(30)
  before = {str(i): [level[i], level[i] + 0.1] for i in range(30)}
  after = {str(i): [level[i] + 0.1, level[i] + 0.2, math.nan] for i in range(30)}
  gain, low, high = stats.paired_bootstrap(before, after)
  assert (gain, low, high) == pytest.approx((0.1, 0.1, 0.1))
  assert stats.paired_bootstrap(after, before)[0] == pytest.approx(-0.1)
  with pytest.raises(ValueError, match="same parents"):
    stats.paired_bootstrap(before, {})
  with pytest.raises(ValueError, match="needs"):
    stats.paired_bootstrap({"a": [math.nan]}, {"a": [1.0]})


@pytest.mark.parametrize(
  "arguments", [{"n": 0}, {"level": 1.0}, {"groups": [1]}, {"values": []}, {"values": [math.nan]}]
)
def test_bootstrap_refuses(arguments):
  with pytest.raises(ValueError):
    stats.bootstrap_interval(**{"values": [0.0, 1.0], **arguments})
