"""Configs: each loads and validates, arguments and overlays are typed, mistakes are one line."""

import asyncio
import json

import pytest
from conftest import ROOT

import launch
from awf.config import REMOTES, RULES, validate
from awf.config_help import comments, fields
from awf.config_io import (
  PATH_FIELDS,
  coerce,
  flatten,
  get_field,
  load_config,
  nearest_field,
  overlay,
  resolve_paths,
  set_field,
)
from awf.tasks import make_task
from awf.types import UserError
from configs.args import Choice, parse_args
from configs.base import base_config
from configs.common import MODELS

BASE = (ROOT / "configs/base.py").read_text(encoding="utf-8")
TASKS = ("aime", "gsm8k", "math", "humaneval", "mbpp", "hotpotqa", "drop")
NAMES = ("quickstart", "nano", *TASKS)


@pytest.fixture
def config(tmp_path):
  """The defaults with a model directory, which is all that they lack."""
  (tmp_path / "config.json").write_text("{}")
  c = base_config()
  c.model.path = str(tmp_path)
  return c


def refusal(call, *args, **kwargs):
  with pytest.raises(UserError) as caught:
    call(*args, **kwargs)
  assert "\n" not in str(caught.value)
  return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_every_config_loads_and_its_smoke_run_needs_only_what_ships(name):
  full, smoke = load_config(f"configs/{name}.py"), load_config(f"configs/{name}.py:smoke")
  assert full.name == smoke.name == name
  assert set(flatten(full)) == set(flatten(base_config()))
  assert smoke.model.path == "data/nano/model"
  for field in ("task.path", "sft.path", "search.starts", "eval.parents"):
    path = get_field(smoke, field)
    assert not path or (ROOT / path).is_file(), field
  assert smoke.search.rounds * smoke.search.parents * smoke.grpo.group_size <= 8
  # One compiled sampler serves all of them.
  assert smoke.sampler == load_config("configs/quickstart.py:smoke").sampler


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_models_by_name_pass_validation_without_being_loaded(name, model):
  config = load_config(f"configs/{name}.py:model={model}")
  assert config.model.path == MODELS[model]
  validate(config)


def test_smoke_data_is_whole():
  for name in TASKS:
    rows = (ROOT / f"data/smoke/{name}.jsonl").read_text().splitlines()
    assert len({line for line in rows if json.loads(line)}) == 10
  for line in (ROOT / "data/smoke/humaneval.jsonl").read_text().splitlines():
    row, names = json.loads(line), {}
    exec(row["prompt"] + row["canonical_solution"] + row["test"], names)
    names["check"](names[row["entry_point"]])
  for line in (ROOT / "data/smoke/mbpp.jsonl").read_text().splitlines():
    row, names = json.loads(line), {}
    exec(row["code"] + row["test"], names)
    names["check"]()
    assert row["test_list"][-1] in row["test"]


@pytest.mark.parametrize("name", ("aime", "gsm8k", "math", "hotpotqa", "drop"))
def test_answers_of_the_smoke_data_are_graded_right(name):
  config = load_config(f"configs/{name}.py:smoke")
  task = make_task(resolve_paths(config).task)
  for problem in task.load_dataset():
    expected = "|".join(problem.answer[-1]) if name == "drop" else problem.answer
    grade = asyncio.run(task.grade(problem, f"<answer>{expected}</answer>"))
    assert grade.correct and grade.score == 1.0, problem
    assert not asyncio.run(task.grade(problem, "<answer>-77</answer>")).correct


def test_a_file_of_the_hub_is_looked_up_when_the_data_set_is_loaded():
  config = load_config("configs/aime.py:model=qwen2.5-0.5b")
  config.task.path = "hf://datasets/owner/name/test.jsonl"
  validate(config)


def test_arguments_have_types_and_choices():
  spec = dict(model=Choice("a", ("a", "b")), smoke=False, scale=1.5, count=2)
  assert vars(parse_args(None, **spec)) == dict(model="a", smoke=False, scale=1.5, count=2)
  got = parse_args("model=b, smoke,scale=2,count=7", **spec)
  assert vars(got) == dict(model="b", smoke=True, scale=2.0, count=7)
  assert parse_args("b,smoke=false", **spec).model == "b"


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("smok", "did you mean smoke?"),
    ("modle=a", "did you mean model?"),
    ("model=c", "expected one of a, b"),
    ("count=x", "expected int"),
    ("count", "expected int"),
    ("smoke=maybe", "expected bool"),
    ("smoke,smoke", "given twice"),
    ("nothing=1", "known: model=a|b, smoke, count=<int>"),
  ],
)
def test_wrong_arguments_are_refused_with_what_is_known(text, expected):
  spec = dict(model=Choice("a", ("a", "b")), smoke=False, count=2)
  assert expected in refusal(parse_args, text, **spec)


def test_load_config_refuses_what_is_no_config(tmp_path):
  assert "did you mean configs/quickstart.py" in refusal(load_config, "configs/quickstar.py")
  (tmp_path / "empty.py").write_text("x = 1\n")
  assert "defines get_config" in refusal(load_config, str(tmp_path / "empty.py"))
  (tmp_path / "broken.py").write_text("def get_config(:\n")
  assert "line 1" in refusal(load_config, str(tmp_path / "broken.py"))
  (tmp_path / "list.py").write_text("def get_config(arg=None):\n  return []\n")
  assert "must return a ConfigDict" in refusal(load_config, str(tmp_path / "list.py"))
  (tmp_path / "plain.yaml").write_text("seed: 3\n")
  assert "configs/from_file.py:" in refusal(load_config, str(tmp_path / "plain.yaml"))


def test_a_users_config_takes_its_file_name(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(
    "from configs.base import base_config\n\ndef get_config(arg=None):\n  return base_config()\n"
  )
  assert load_config(str(path)).name == "mine"


@pytest.mark.parametrize("suffix", ("yaml", "json"))
def test_a_file_is_laid_over_a_config(tmp_path, suffix):
  values = {
    "base": "quickstart:smoke",
    "seed": 3,
    "optim": {"learning_rate": 1},
    "lora.targets": ["q_proj", "v_proj"],
  }
  path = tmp_path / f"exp.{suffix}"  # JSON is YAML
  path.write_text(json.dumps(values))
  config = load_config(f"configs/from_file.py:{path}")
  assert (config.name, config.seed, config.optim.learning_rate) == ("exp", 3, 1.0)
  assert config.lora.targets == ("q_proj", "v_proj")
  assert config.search.rounds == 1  # from quickstart:smoke


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("sead: 3", "nearest known field is"),
    ("grpo: {grup_size: 3}", "grpo.group_size"),
    ("seed: three", "seed: expected int, got str 'three'"),
    ("seed: 1.5", "expected int, got float 1.5"),
    ("seed: true", "expected int, got bool True"),
    ("model: x", "model is a group of fields"),
    ("eval: {pass_k: [1, a]}", "eval.pass_k[1]: expected int, got str 'a'"),
    ("seed: [", "line 1"),
    ("- 1", "expected config fields at the top"),
    ("base: 3", "base: expected the name of a config"),
    ("base: from_file", "only be laid over a Python config"),
    ("base: quickstrt", "no such file"),
  ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, text, expected):
  path = tmp_path / "exp.yaml"
  path.write_text(text)
  assert expected in refusal(load_config, f"configs/from_file.py:{path}")


def test_from_file_without_a_readable_file():
  assert "needs a file" in refusal(load_config, "configs/from_file.py")
  assert "no such file" in refusal(load_config, "configs/from_file.py:/nowhere.yaml")
  assert ".yaml, .yml or .json" in refusal(load_config, "configs/from_file.py:README.md")


def test_coerce_keeps_the_type_of_the_default():
  assert coerce(3, 1.0, "x") == 3.0 and type(coerce(3, 1.0, "x")) is float
  assert coerce("1e-5", 1.0, "x") == 1e-5
  assert coerce("a, b", ("c",), "x") == ("a", "b")
  assert coerce([1, 2], (4,), "x") == (1, 2)
  assert coerce((), ("c",), "x") == ()
  for value, old in (("1", 1), (1, True), (1.0, 1), (None, ""), ({}, "a"), ([1], ("a",))):
    refusal(coerce, value, old, "x")


def test_nearest_field_prefers_the_same_last_part(config):
  assert nearest_field(config, "sampler.topp") == "sampler.top_p"
  assert nearest_field(config, "learning_rate") == "optim.learning_rate"
  assert nearest_field(config, "gpro.group_size") == "grpo.group_size"


def test_defaults_pass_and_every_rule_names_a_field(config):
  validate(config)
  assert set(RULES) <= set(flatten(config))


@pytest.mark.parametrize(
  ("field", "value", "expected"),
  [
    ("seed", -1, "[0, "),
    ("model.quant", "int3", "one of none, int8, int4"),
    ("model.dtype", "fp8", "one of auto, float32, bfloat16"),
    ("lora.rank", 0, "at least 1"),
    ("lora.targets", ("q_proj", "qproj"), "some of q_proj"),
    ("lora.targets", (), "some of q_proj"),
    ("sampler.top_p", 0.0, "more than 0 and at most 1"),
    ("sampler.temperature", float("nan"), "finite"),
    ("optim.learning_rate", float("inf"), "finite"),
    ("sampler.max_new_tokens", 2048, "leaves no room"),
    ("executor.max_new_tokens", 9000, "sampler.context = 2048"),
    ("eval.pass_k", (1, 8), "eval.samples"),
    ("eval.pass_k", (0,), "positive"),
    ("bench.group", 3, "multiple of config.bench.group"),
    ("bench.lengths", "long", "LOW-HIGH"),
    ("bench.weights", "none", "checkpoint, random"),
    ("bench.lengths", "256-32", "LOW-HIGH"),
    ("sampler.min_p", 1.5, "a number in [0, 1]"),
    ("executor.min_p", -0.1, "a number in [0, 1]"),
    ("sampler.queue", 0, "at least 1"),
    ("mesh.tensor", -1, "at most one"),
    ("mesh.fsdp", 0, "positive size"),
    ("task.validation_share", 1.0, "between 0 and 1"),
    ("search.start_share", 0.5, "search.starts"),
    ("eval.parent_count", 4, "eval.parents"),
    ("sandbox.wall_seconds", 1.0, "sandbox.cpu_seconds"),
    ("grpo.group_size", 1, "at least 2"),
    ("search.selection", "ucb", "one of aflow, uct, puct"),
    ("task.path", "/nowhere.jsonl", "no such file"),
    ("model.path", "", "configs/quickstart.py"),
    ("model.path", "./nowhere", "--config.model.path"),
    ("name", "a/b", "letters"),
  ],
)
def test_values_that_cannot_work_are_refused_by_field(config, field, value, expected):
  set_field(config, field, value)
  message = refusal(validate, config)
  assert f"config.{field}" in message and expected in message


def test_sft_needs_text_and_a_model_or_an_architecture(config, tmp_path):
  assert "config.sft.path" in refusal(validate, config, "sft")
  config.sft.path = str(tmp_path / "config.json")
  validate(config, "sft")
  config.model.path = ""
  assert "config.model.path" in refusal(validate, config, "sft")
  config.model.architecture.vocab_size = 1200
  validate(config, "sft")


def test_resolved_paths_are_absolute_and_the_given_config_is_untouched(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)  # the repository is found from anywhere
  config = load_config("configs/aime.py:smoke")
  resolved = resolve_paths(config)
  assert resolved.task.path == str(ROOT / "data/smoke/aime.jsonl")
  assert config.task.path == "data/smoke/aime.jsonl"
  hub = overlay(base_config(), {"model": {"path": "Qwen/Qwen3-0.6B"}}, "x")
  assert resolve_paths(hub).model.path == "Qwen/Qwen3-0.6B"


# Text that is free: names of files and places, and messages.
FREE = (
  "aflow.python", *(f"{g}.remote.{n}" for g in REMOTES for n in ("url", "model", "key_env")),
  *PATH_FIELDS, "executor.system", "lora.paths", "sft.save", "export.path", "backup.path",
  "backup.restore", "distributed.coordinator", "serve.host", "serve.model_name", "serve.api_key",
  "serve.cors",
)  # fmt: skip


def test_every_field_has_its_line_and_its_range(config):
  listed = {f.name: f for f in fields(config)}
  assert set(listed) == set(flatten(config)) and set(comments(BASE)) == set(listed)
  assert [n for n, f in listed.items() if not f.line] == []
  unchecked = [n for n, f in listed.items() if not f.expected and f.kind != "bool"]
  assert sorted(unchecked) == sorted(FREE)
  assert listed["lora.rank"].default == 16 and listed["lora.rank"].expected == "at least 1"
  assert listed["grpo.advantage"].line.startswith("grpo, dr_grpo") and "maxrl" in (
    listed["grpo.advantage"].expected
  )


def test_a_field_without_a_line_is_noticed():
  source = (
    "c.a = 1\nc.b = ConfigDict(\n  dict(\n    x=1,  # the x\n    y=2,\n    # of two\n    # lines\n"
    "    z=(\n      1,\n    ),\n  )\n)\n"
  )
  assert comments(source) == {"a": "", "b.x": "the x", "b.y": "", "b.z": "of two lines"}


def test_the_listing_is_of_the_config_given_and_of_the_fields_asked_for(capsys):
  assert launch.main(["--config.help"]) == 0
  everything = capsys.readouterr().out
  assert everything.startswith(f"{len(flatten(base_config()))} fields")
  assert launch.main(["--config=configs/quickstart.py", "--config.help=group_size"]) == 0
  out = capsys.readouterr().out
  assert "grpo.group_size=8  (int, at least 2)\n    proposals for one parent" in out
  assert out.startswith("1 fields")
  assert launch.main(["--config.help=lerning_rate"]) == 2
  assert "did you mean learning_rate?" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("field", "value", "expected"),
  [
    ("model.quant", "int88", "did you mean int8?"),
    ("grpo.loss", "gsop", "did you mean gspo?"),
    ("lora.targets", ("q_prj",), "did you mean q_proj?"),
    ("plan.target", "v5e", "did you mean v5e-"),
    ("grpo.remat", "ful", "did you mean full?"),
    ("reward.score", 1e9, "a number in [-10, 10]"),
    ("sandbox.max_children", 1000, "a number in [1, 400]"),
    ("model.architecture.num_key_value_heads", 3, "expected a divisor"),
    ("lora.paths", ("a=/nowhere",), "no adapter_config.json there"),
    ("lora.paths", ("base=x",), "expected NAME=DIR"),
    ("task.split_seed", -1, "[0, 2147483647]"),
  ],
)
def test_a_wrong_value_is_refused_with_the_nearest_right_one(config, field, value, expected):
  set_field(config, field, value)
  message = refusal(validate, config)
  assert f"config.{field}" in message and expected in message
