"""The command line: one line for each mistake, one JSON line for success, clean interrupts."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import sentencepiece
from conftest import ROOT

import launch
from awf import cli
from awf.grpo.sft import SFTTrainer
from awf.qwen.config import QwenConfig
from awf.qwen.hf import save_checkpoint
from awf.qwen.model import init_params
from awf.types import UserError
from awf.workdir import Workdir, differing_fields, new_record, versions
from configs.base import base_config

SMALL = "--config=configs/quickstart.py:smoke"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A random model of the Qwen2 layout, small enough to compile in seconds."""
  path = tmp_path_factory.mktemp("model")
  config = QwenConfig(256, 32, 64, 1, 2, 1, 16, tie_word_embeddings=True)
  save_checkpoint(path, init_params(config, jax.random.key(0)), config, (), dtype="float32")
  return path


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  """A tokenizer and training lines: what a model from nothing needs."""
  folder = tmp_path_factory.mktemp("text")
  lines = [f"{i} plus {j} is {i + j}" for i in range(30) for j in range(10)]
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(lines),
    model_prefix=str(folder / "tokenizer"),
    vocab_size=320,
    model_type="bpe",
    byte_fallback=True,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    user_defined_symbols=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    bos_id=-1,
    eos_id=-1,
    pad_id=-1,
    minloglevel=2,
  )
  rows = [json.dumps({"prompt": line[:8], "response": line}) for line in lines]
  (folder / "sft.jsonl").write_text("\n".join(rows))
  return folder


def run(*argv):
  """Exit code of one command in this process."""
  return launch.main(list(argv))


def one_line_error(capsys, *argv):
  """The single line that a mistake prints; stdout stays empty."""
  assert run(*argv) == 2
  out, err = capsys.readouterr()
  lines = [line for line in err.splitlines() if line]
  assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
  return lines[0]


@pytest.mark.parametrize(
  ("argv", "expected"),
  [
    ((), "--config is missing"),
    (("--config",), "--config is missing"),
    (("--config=configs/nope.py",), "no such file; known:"),
    (("--config=configs/quickstart.py:smoek",), "did you mean smoke?"),
    (("--config=configs/aime.py:model=gpt",), "expected one of qwen2-7b"),
    (("--config=launch.py",), "get_config"),
    ((SMALL, "--mode=evl"), "did you mean eval?"),
    ((SMALL, "--mode"), "--mode needs a value"),
    ((SMALL, "--mod=eval"), "did you mean --mode?"),
    ((SMALL, "--confg.seed=1"), "did you mean --config?"),
    ((SMALL, "eval"), "unexpected argument 'eval'"),
    ((SMALL, "--config.sed=1"), "nearest known field is --config.seed"),
    ((SMALL, "--config.gpro.group_size=1"), "--config.grpo.group_size"),
    ((SMALL, "--config.search.round", "1"), "--config.search.rounds"),
    ((SMALL, "--config.optim=1"), "group of fields"),
    ((SMALL, "--config.seed.x=1"), "--config.seed.x is unknown"),
    ((SMALL, "--config.=1"), "is unknown"),
    ((SMALL, "--config.lora.targets[0]=x"), "is unknown"),
    ((SMALL, "--config.seed=abc"), "--config.seed=abc: expected int (its default is 0)"),
    ((SMALL, "--config.seed=1.5"), "expected int"),
    ((SMALL, "--config.seed="), "expected int"),
    ((SMALL, "--config.seed"), "--config.seed needs a value"),
    ((SMALL, "--config.optim.learning_rate=fast"), "expected float"),
    ((SMALL, "--config.grpo.mask_truncated=perhaps"), "expected bool"),
    ((SMALL, "--config.eval.pass_k=1,b"), "config.eval.pass_k"),
    ((SMALL, "--config.grpo.group_size=1"), "config.grpo.group_size = 1: expected at least 2"),
    ((SMALL, "--config.model.path=/nowhere"), "configs/quickstart.py"),
    ((SMALL, "--flagfile=/nowhere"), "/nowhere"),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, argv, expected):
  assert expected in one_line_error(capsys, *argv)


def test_overrides_of_all_types(checkpoint):
  argv = [
    SMALL, "--mode=bench", f"--config.model.path={checkpoint}", "--config.seed", "7",
    "-config.lora.rank=4", "--config.optim.learning_rate=1", "--config.grpo.mask_truncated",
    "--noconfig.sampler.strict", "--config.lora.targets=q_proj,v_proj", "--config.eval.pass_k=(1,)",
    "--config.seed=8",
  ]  # fmt: skip
  command = cli.parse(argv)
  c = command.config
  assert (c.seed, c.lora.rank, c.optim.learning_rate) == (8, 4, 1.0)
  assert (c.grpo.mask_truncated, c.sampler.strict) == (True, False)
  assert (c.lora.targets, c.eval.pass_k) == (("q_proj", "v_proj"), (1,))
  assert str(command.workdir) == "runs/quickstart" and c.is_locked


def test_generate_needs_its_files(capsys, checkpoint):
  line = one_line_error(
    capsys, SMALL, f"--config.model.path={checkpoint}", "--mode=generate", "--input=x"
  )
  assert "--output" in line


def test_help_lists_every_mode(capsys):
  assert run("--help") == 0
  out = capsys.readouterr().out
  assert all(f"--mode={name}" in out for name in cli.MODES)


@pytest.mark.parametrize("what", ("sampler", "update"))
def test_bench_prints_one_json_line(capsys, checkpoint, tmp_path, what):
  code = run(
    SMALL, "--mode=bench", f"--workdir={tmp_path / 'run'}", f"--config.bench.what={what}",
    f"--config.model.path={checkpoint}", "--config.bench.group=2", "--config.lora.rank=2",
    "--config.mesh.data=1",
  )  # fmt: skip
  out = capsys.readouterr().out
  assert code == 0 and out.count("\n") == 1
  result = json.loads(out)
  assert result["tokens_per_second"] > 0 and result["what"] == what
  assert (result["batch"], result["prompt"], result["new"], result["group"]) == (4, 16, 16, 2)
  assert len(result["seconds"]) == 1 and result["versions"]["jax"] == jax.__version__
  assert result["peak_memory_gb"] > 0 and result["commit"] and result["device"]
  if what == "sampler":
    assert 0 < result["occupancy"] <= 1 and 0 < result["compile_seconds"]
    prefill, decode = result["prefill"], result["decode"]
    assert (prefill["tokens"], decode["tokens"], decode["steps"]) == (2 * 15, 4 * 16, 16)
    for part in (prefill, decode):
      assert part["seconds"] > 0
      assert part["tokens_per_second"] == pytest.approx(part["tokens"] / part["seconds"], rel=0.01)
  assert not (tmp_path / "run").exists()  # a benchmark leaves nothing behind


def test_bench_with_random_weights_reads_no_checkpoint(capsys, tmp_path):
  """A known model's shapes, cut to two layers here; the hub is not asked."""
  from awf.qwen import known

  name = "Qwen/Qwen2.5-0.5B-Instruct"
  tiny = dataclasses.replace(
    known.ARCHITECTURES[name],
    num_hidden_layers=2,
    hidden_size=28,
    intermediate_size=32,
    head_dim=16,
  )
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(known.ARCHITECTURES, name, tiny)
    code = run(
      SMALL, "--mode=bench", f"--workdir={tmp_path / 'run'}", f"--config.model.path={name}",
      "--config.bench.weights=random", "--config.model.quant=int8",
    )  # fmt: skip
  result = json.loads(capsys.readouterr().out)
  assert code == 0 and result["parameters"] == tiny.num_parameters and result["quant"] == "int8"
  assert result["tokens_per_second"] > 0


def test_bench_prompts_are_new_in_every_repeat():
  from awf.bench import sampler_requests

  config = base_config()
  config.bench.update(batch=2048, prompt=8, group=4)
  seen = [r.prompt_ids for salt in range(4) for r in sampler_requests(config, 1200, salt)]
  assert len(seen) == 2048 and len({p[:7] for p in seen}) == 2048
  again = sampler_requests(config, 1200, 3)
  assert [r.prompt_ids for r in again] == seen[-512:] and max(map(max, seen)) < 1200
  config.bench.batch = 16
  config.bench.lengths = "mixed"
  lengths = {len(r.prompt_ids) for r in sampler_requests(config, 1200, 0)}
  assert len(lengths) > 1 and max(lengths) <= 8


def test_a_bench_beyond_the_models_positions_is_refused(capsys):
  bench = "--config=configs/quickstart.py", "--mode=bench"
  line = one_line_error(capsys, *bench, "--config.bench.prompt=4000")
  assert "config.bench.prompt + config.bench.new: 4128 tokens" in line and "4096 positions" in line
  line = one_line_error(capsys, *bench, "--config.bench.lengths=10-2100")
  assert "config.bench.lengths: 4200 tokens" in line


@pytest.mark.parametrize(
  ("target", "code", "said"), [("pipe", 0, ""), ("/dev/full", 2, "No space left on device")]
)
def test_a_standard_output_that_takes_no_more(target, code, said):
  command = [sys.executable, str(ROOT / "launch.py"), "--config.help=sampler"]
  if target == "pipe":
    reader, out = os.pipe()
    os.close(reader)
  else:
    out = os.open(target, os.O_WRONLY)
  done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=400)
  os.close(out)
  assert done.returncode == code and len(done.stderr.splitlines()) == bool(said), done.stderr
  assert said in done.stderr


def test_bench_expresses_mixed_work_of_a_given_range():
  from awf.bench import sampler_requests

  config = base_config()
  config.bench.update(batch=128, lengths="32-256")
  first, second = (sampler_requests(config, 1200, salt) for salt in (0, 1))
  for name, sizes in (
    ("prompts", [len(r.prompt_ids) for r in first]),
    ("completions", [r.max_new_tokens for r in first]),
  ):
    assert min(sizes) >= 32 and max(sizes) <= 256 and 120 < np.mean(sizes) < 168, name
    assert min(sizes) < 50 and max(sizes) > 235, name
  assert all(r.ignore_eos and r.n == 1 for r in first)
  shape = [(len(r.prompt_ids), r.max_new_tokens) for r in first]
  assert shape == [(len(r.prompt_ids), r.max_new_tokens) for r in second]


def test_json_line_is_strict():
  line = cli.json_line({"a": math.nan, "b": np.float32(1.5), "c": (np.arange(2), None), "d": 1e400})
  assert json.loads(line) == {"a": None, "b": 1.5, "c": [[0, 1], None], "d": None}


def sft_argv(text, workdir, *more):
  return [
    "--config=configs/nano.py", "--mode=sft", f"--workdir={workdir}", "--config.mesh.data=1",
    f"--config.model.tokenizer={text / 'tokenizer.model'}",
    "--config.model.architecture.vocab_size=320", "--config.model.architecture.hidden_size=16",
    "--config.model.architecture.num_hidden_layers=1",
    "--config.model.architecture.intermediate_size=16", "--config.model.architecture.head_dim=4",
    f"--config.sft.path={text / 'sft.jsonl'}", "--config.sft.batch=2", "--config.sft.length=64",
    "--config.optim.warmup_steps=0", *more,
  ]  # fmt: skip


def test_a_run_leaves_its_record_and_a_changed_config_is_refused(capsys, text, tmp_path):
  run_dir = tmp_path / "run"
  argv = sft_argv(text, run_dir, "--config.sft.steps=2", "--config.sft.log_every=1")
  assert run(*argv) == 0
  result = json.loads(capsys.readouterr().out.splitlines()[-1])
  assert result["workdir"] == str(run_dir) and result["mode"] == "sft"
  record = json.loads((run_dir / "config.json").read_text())
  assert record["config"]["sft"]["steps"] == 2 and record["versions"]["jax"] == jax.__version__
  assert record["backend"] == "cpu" and "--mode=sft" in record["command"]
  assert "starting sft" in (run_dir / "run.log").read_text()

  before = {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
  line = one_line_error(capsys, *argv, "--config.seed=5", "--config.sft.batch=4")
  assert "config.seed: there 0, here 5" in line and "config.sft.batch: there 2, here 4" in line
  other = [*argv, "--config.model.path=data/nano/model", "--mode=train"]
  assert "mode sft, not train" in one_line_error(capsys, *other)
  assert before == {p: p.read_bytes() for p in run_dir.rglob("*") if p.is_file()}
  assert run(*argv, "--config.train.minutes=9") == 0  # how, not what: resumes


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_an_interrupted_run_says_how_to_resume(text, tmp_path, sent, code):
  run_dir = tmp_path / "run"
  argv = sft_argv(text, run_dir, "--config.sft.steps=100000", "--config.sft.log_every=1")
  process = subprocess.Popen(
    [sys.executable, str(ROOT / "launch.py"), *argv],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env={**os.environ, "PYTHONWARNINGS": "ignore"},
    # A shell's background job ignores SIGINT, and its children inherit that.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
  )
  log, deadline = run_dir / "metrics.jsonl", time.monotonic() + 240
  while not (log.exists() and log.stat().st_size):
    assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
    time.sleep(0.05)
  process.send_signal(sent)
  out, err = process.communicate(timeout=120)
  assert process.returncode == code, err
  last, figures = err.splitlines()[-1], json.loads(out)
  assert figures["interrupted"] and figures["steps"] > 0 and "Traceback" not in err
  assert last.startswith("interrupted") and "resume with: python launch.py --config=" in last


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_eval_keeps_nothing_and_says_so(capsys, tmp_path, monkeypatch, sent, code):
  monkeypatch.setattr("awf.evaluate.run_eval", lambda *_: signal.raise_signal(sent))
  argv = ["--config=configs/quickstart.py:smoke", "--mode=eval", f"--workdir={tmp_path / 'run'}"]
  assert run(*argv) == code
  out, err = capsys.readouterr()
  assert out == "" and err.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_while_the_command_line_is_read_waits_until_the_mode_is_known(
  capsys, text, tmp_path, monkeypatch, sent, code
):
  original = cli.parse

  def parse(argv):
    signal.raise_signal(sent)
    return original(argv)

  monkeypatch.setattr(cli, "parse", parse)
  assert run(*sft_argv(text, tmp_path / "run")) == code
  out, err = capsys.readouterr()
  assert json.loads(out)["interrupted"] and "resume with: python launch.py --config=" in err
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupted_sft_resumes_to_the_same_rows(capsys, text, tmp_path, monkeypatch):
  """SIGTERM at a step that is no multiple of log_every."""
  flags = ("--config.sft.steps=9", "--config.sft.log_every=4")
  assert run(*sft_argv(text, tmp_path / "whole", *flags)) == 0
  original, calls = SFTTrainer.step, []

  def step(self, batch):
    calls.append(1)
    if len(calls) == 6:
      signal.raise_signal(signal.SIGTERM)
    return original(self, batch)

  monkeypatch.setattr(SFTTrainer, "step", step)
  argv = sft_argv(text, tmp_path / "run", *flags)
  capsys.readouterr()
  assert run(*argv) == 0
  figures = json.loads(capsys.readouterr().out)
  assert figures["interrupted"] and figures["steps"] == 6
  monkeypatch.undo()
  assert run(*argv) == 0
  for name in ("metrics.jsonl", "metrics.csv"):
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
  ("sent", "caught"), [("SIGINT", "KeyboardInterrupt"), ("SIGTERM", "_Terminated")]
)
def test_an_interrupt_that_python_drops_is_sent_again(sent, caught):
  code = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
import launch
launch.catch_signals()

class Finalised:
  def __del__(self):
    os.kill(os.getpid(), signal.{sent})
    time.sleep(1)  # the handler raises here, where nobody can catch it

went_on = False
try:
  Finalised()
  went_on = True
  time.sleep(60)
except KeyboardInterrupt as e:
  print(went_on, type(e).__name__)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
  assert done.stdout.split() == ["True", caught], done.stderr


def test_without_network_the_full_config_names_what_to_give_and_the_quickstart(tmp_path):
  dead = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
  env = {**os.environ, **dead, "HOME": str(tmp_path), "AWF_CACHE": str(tmp_path / "cache")}
  env |= {"HF_HOME": str(tmp_path / "hub"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
  argv = [sys.executable, str(ROOT / "launch.py"), "--config=configs/aime.py"]
  for extra in ([], ["--config.task.path=data/smoke/aime.jsonl"]):  # the data set, then the model
    command = [*argv, *extra, f"--workdir={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "--config.model.path" in line and "configs/quickstart.py" in line


def test_a_second_process_is_kept_out(tmp_path):
  config = base_config()
  with Workdir(tmp_path / "run") as first:
    assert first.open(config, "train") is False
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
      Workdir(tmp_path / "run").open(config, "train")
  with Workdir(tmp_path / "run") as again:
    assert again.open(config, "train") is True


def test_the_record_of_a_run_must_be_readable(tmp_path):
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="cannot be read"):
    Workdir(tmp_path).open(base_config(), "train")


def test_workdir_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write there"):
    Workdir(tmp_path / "file").open(base_config(), "train")


def test_differing_fields_tells_what_a_resumed_run_may_change():
  old = json.loads(json.dumps(new_record(base_config(), "train")))["config"]
  config = base_config()
  assert differing_fields(old, config) == ([], [])  # tuples equal the lists of JSON
  config.backup.path = "/drive"
  config.sandbox.workers = 3
  config.train.minutes = 1.0
  assert differing_fields(old, config) == ([], [])  # how, not what
  config.optim.learning_rate = 1e-3
  config.mesh.fsdp = 2
  allowed = ["config.mesh.fsdp: there 1, here 2", "config.optim.learning_rate: there 1e-05, "]
  assert differing_fields(old, config) == ([], [allowed[0], allowed[1] + "here 0.001"])
  config.eval.samples = 9
  assert differing_fields(old, config, ignore_eval=True)[0] == []
  assert differing_fields(old, config)[0] == ["config.eval.samples: there 4, here 9"]


def test_a_run_from_before_a_field_existed_counts_as_its_default(caplog):
  old = json.loads(json.dumps(new_record(base_config(), "train")))["config"]
  config = base_config()
  del old["grpo"]["beta"], old["train"]["nonfinite_limit"]
  assert differing_fields(old, config) == ([], [])
  config.grpo.beta = 0.1
  assert differing_fields(old, config)[0] == ["config.grpo.beta: there 0.0, here 0.1"]
  old["grpo"]["dropped_since"] = 3
  assert len(differing_fields(old, config)[0]) == 1
  assert "no longer known: grpo.dropped_since" in caplog.text


def test_a_resumed_run_goes_on_with_a_changed_config_or_names_every_refused_field(tmp_path):
  config = base_config()
  with Workdir(tmp_path / "run") as workdir:
    workdir.open(config, "train")
  config.optim.learning_rate, config.search.rounds = 1e-3, 20
  with Workdir(tmp_path / "run") as workdir:
    assert workdir.open(config, "train") is True
  record = Workdir(tmp_path / "run").record()
  assert record["config"]["search"]["rounds"] == 20
  (change,) = record["changes"]
  assert change["fields"][1] == "config.search.rounds: there 10, here 20"
  config.seed, config.lora.rank, config.grpo.beta = 3, 8, 0.5
  with pytest.raises(UserError) as refused:
    Workdir(tmp_path / "run").open(config, "train")
  for field in ("config.seed: there 0, here 3", "config.lora.rank: ", "config.grpo.beta: "):
    assert field in str(refused.value)
  assert Workdir(tmp_path / "run").record() == record


def test_a_machine_without_the_memory_says_what_to_lower_and_keeps_no_empty_run(capsys, tmp_path):
  smoke = ["--config=configs/quickstart.py:smoke", f"--workdir={tmp_path / 'run'}"]
  assert run(*smoke, "--config.sampler.rows=20000000", "--config.mesh.data=1") == 2
  out, err = capsys.readouterr()
  (line,) = [x for x in err.splitlines() if x.startswith("error: ")]
  assert out == "" and "Traceback" not in err
  for part in ("RESOURCE_EXHAUSTED", "--mode=plan", "config.sampler.rows (20000000)"):
    assert part in line
  assert not (tmp_path / "run").exists()


def test_versions_name_what_results_depend_on():
  assert {"python", "awf", "jax", "jaxlib", "flax"} <= set(versions())


def test_eval_and_report_look_at_a_run_of_another_mode(capsys, tmp_path):
  config = base_config()
  with Workdir(tmp_path / "run") as workdir:
    workdir.open(config, "train")
  with Workdir(tmp_path / "run") as workdir:
    assert workdir.open(config, "eval") is True
  assert run("--mode=report", f"--workdir={tmp_path / 'run'}") == 0
  result = json.loads(capsys.readouterr().out)
  assert os.path.isfile(result["report"])
  assert "holds no run" in one_line_error(capsys, "--mode=report", f"--workdir={tmp_path / 'no'}")


def test_a_hub_model_without_network_names_the_way_out(capsys, tmp_path):
  line = one_line_error(
    capsys, "--config=configs/aime.py:qwen3-0.6b", "--mode=bench", f"--workdir={tmp_path / 'r'}"
  )
  assert "--config.model.path" in line and "configs/quickstart.py" in line


def test_random_weights_of_a_model_that_nobody_knows(capsys, tmp_path):
  line = one_line_error(
    capsys, SMALL, "--mode=bench", "--config.bench.weights=random", "--config.model.path=no/such",
    f"--workdir={tmp_path / 'r'}",
  )  # fmt: skip
  assert "config.model.path = 'no/such'" in line and "Qwen/Qwen3-0.6B" in line
