"""Mistakes that users make, each through the real command line.

Exit code 2; nothing on stdout; on stderr one line, which names the field; nothing written; and no
accelerator, sandbox or JAX started, which the time that it takes shows.
"""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from awf.config_io import load_config
from awf.workdir import Workdir

Q = "--config=configs/quickstart.py:smoke"
NANO = ROOT / "data/nano/model"
PROBLEM = {"id": "p", "problem": "What is 1 + 1?", "answer": 2}
IMPORTS = """
import sys, launch
code = launch.main(sys.argv[1:])
heavy = sorted({'jax', 'flax', 'orbax', 'transformers'} & set(sys.modules))
sys.exit(f'imported {heavy}' if heavy else code)
"""


def lines(path, rows):
  path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))


def model(path, **changes):
  """The shipped model, with fields of its config changed; weights by link."""
  path.mkdir()
  for file in NANO.iterdir():
    os.symlink(file, path / file.name)
  if changes:
    raw = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(raw))
  return path


@pytest.fixture(scope="module")
def here(tmp_path_factory):
  """A user's working directory with files that are wrong in one way each."""
  p = tmp_path_factory.mktemp("user")
  model(p / "llama", architectures=["LlamaForCausalLM"], model_type="llama")
  (model(p / "bad_config") / "config.json").unlink()
  (p / "bad_config" / "config.json").write_text("{")
  (model(p / "no_weights") / "model.safetensors").unlink()
  cut = model(p / "cut") / "model.safetensors"
  cut.unlink()
  cut.write_bytes((NANO / "model.safetensors").read_bytes()[:1000])
  (model(p / "no_tokenizer") / "tokenizer.model").unlink()
  (p / "empty_dir").mkdir()
  (p / "file").write_text("text")
  rows = [{"id": f"p{i}", "problem": f"What is {i} + 1?", "answer": i + 1} for i in range(10)]
  lines(p / "aime.jsonl", rows)
  lines(p / "line3.jsonl", [PROBLEM, {**PROBLEM, "id": "q"}, '{"id": '])
  lines(p / "no_answer.jsonl", [{"id": f"p{i}", "problem": "?"} for i in range(10)])
  lines(p / "twice.jsonl", [PROBLEM, PROBLEM])
  lines(p / "one.jsonl", [PROBLEM])
  lines(p / "none.jsonl", [])
  lines(p / "starts.jsonl", [{"graph": "x"}])
  lines(p / "parents.jsonl", [{"graph": "class Workflow: pass", "prompt": ""}])
  (p / "bad.yaml").write_text("optim:\n  learning_rte: 1\n")
  (p / "bad_type.yaml").write_text("lora: {rank: sixteen}\n")
  (p / "broken.yaml").write_text("seed: [1\n")
  (p / "broken.py").write_text("def get_config(:\n")
  adapter = p / "adapter"
  adapter.mkdir()
  (adapter / "README.md").write_text("weights to come")
  config = load_config("configs/quickstart.py:smoke")
  with Workdir(p / "run") as run:  # a run that was begun
    run.open(config, "train")
  (p / "spoilt").mkdir()
  (p / "spoilt" / "config.json").write_text('{"config": ')
  (p / "notes").mkdir()
  (p / "notes" / "notes.txt").write_text("mine")
  return p


MISTAKES = {
  # flags
  "nothing given": ((), "--config"),
  "config without a value": (("--config",), "--config"),
  "config that does not exist": (("--config=configs/quickstrt.py",), "configs/quickstart.py"),
  "config that is YAML": (("--config=bad.yaml",), "configs/from_file.py:"),
  "config with a syntax error": (("--config=broken.py",), "broken.py: line 1"),
  "config argument misspelt": (("--config=configs/aime.py:model=qwen2-70b",), "model='qwen2-70b'"),
  "argument of another config": (("--config=configs/quickstart.py:model=x",), "smoke"),
  "mode misspelt": ((Q, "--mode=trian"), "did you mean train?"),
  "flag misspelt": ((Q, "--wrkdir=x"), "did you mean --workdir?"),
  "flag without dashes": ((Q, "mode=eval"), "'mode=eval'"),
  "field misspelt": ((Q, "--config.grpo.group_sise=4"), "--config.grpo.group_size"),
  "field in the wrong group": ((Q, "--config.optim.rank=4"), "--config.lora.rank"),
  "group for a field": ((Q, "--config.lora=4"), "config.lora"),
  "text for a number": ((Q, "--config.lora.rank=high"), "--config.lora.rank=high: expected int"),
  "fraction for a count": ((Q, "--config.search.rounds=2.5"), "--config.search.rounds=2.5"),
  "word for a switch": ((Q, "--config.sampler.strict=maybe"), "--config.sampler.strict"),
  "listing of no field": (("--config.help=lora.rnk",), "did you mean lora.rank?"),
  "unknown field in a file": (("--config=configs/from_file.py:bad.yaml",), "optim.learning_rate"),
  "wrong type in a file": (("--config=configs/from_file.py:bad_type.yaml",), "lora.rank: expected"),
  "broken file": (("--config=configs/from_file.py:broken.yaml",), "broken.yaml: line"),
  "generate without files": ((Q, "--mode=generate"), "--input"),
  "generate from no file": (
    (Q, "--mode=generate", "--input=in.jsonl", "--output=out.jsonl"), "--input=in.jsonl",
  ),
  "generate from a folder": (
    (Q, "--mode=generate", "--input=.", "--output=out.jsonl"), "--input=.: a folder",
  ),
  "generate to nowhere": (
    (Q, "--mode=generate", "--input=aime.jsonl", "--output=no/out.jsonl"), "--output=no/out.jsonl",
  ),
  # ranges, choices, combinations
  "group of one": ((Q, "--config.grpo.group_size=1"), "config.grpo.group_size"),
  "temperature below zero": ((Q, "--config.sampler.temperature=-1"), "config.sampler.temperature"),
  "top-p of zero": ((Q, "--config.sampler.top_p=0"), "config.sampler.top_p"),
  "loss misspelt": ((Q, "--config.grpo.loss=gsop"), "did you mean gspo?"),
  "bits that are not built": ((Q, "--config.model.quant=int5"), "config.model.quant"),
  "layer without an adapter": ((Q, "--config.lora.targets=qproj"), "did you mean q_proj?"),
  "learning rate not a number": ((Q, "--config.optim.learning_rate=nan"), "optim.learning_rate"),
  "no room for a prompt": ((Q, "--config.sampler.max_new_tokens=700"), "config.sampler.context"),
  "more context than the model": ((Q, "--config.sampler.context=999999"), "config.sampler.context"),
  "k above the samples": ((Q, "--config.eval.pass_k=64"), "config.eval.samples"),
  "two rests of the mesh": ((Q, "--config.mesh.fsdp=-1"), "config.mesh.data"),
  "KL in a reward without weight": (
    (Q, "--config.grpo.kl_in=reward", "--config.grpo.beta=0"), "config.grpo.beta",
  ),
  "several steps without a ratio": (
    (Q, "--config.grpo.loss=reinforce", "--config.grpo.steps_per_batch=2"),
    "config.grpo.steps_per_batch",
  ),
  "share of no start workflows": ((Q, "--config.search.start_share=0.5"), "config.search.starts"),
  "wall below processor time": ((Q, "--config.sandbox.wall_seconds=1"), "sandbox.cpu_seconds"),
  "too little memory for a job": ((Q, "--config.sandbox.memory_mb=8"), "config.sandbox.memory_mb"),
  "chip that is not known": ((Q, "--mode=plan", "--config.plan.target=v5e"), "config.plan.target"),
  "batch that groups do not divide": (
    (Q, "--mode=bench", "--config.bench.batch=5", "--config.bench.group=2"), "config.bench.group",
  ),
  "more steps than a number counts": (
    (Q, "--config.sampler.steps_per_dispatch=3000000000"), "sampler.steps_per_dispatch",
  ),
  "a cache beyond all measure": (
    (Q, "--config.sampler.prompt_cache_gb=1e300"), "config.sampler.prompt_cache_gb",
  ),
  "a prompt beyond all measure": (
    (Q, "--mode=bench", "--config.bench.prompt=99999999999999999999"), "config.bench.prompt",
  ),
  "digits of another script": (
    (Q, "--mode=bench", "--config.bench.lengths=\u0663-\u0665"), "config.bench.lengths",
  ),
  "workflows by random weights": (
    (Q, "--mode=bench", "--config.bench.what=workflow", "--config.bench.weights=random"),
    "config.bench.weights",
  ),
  # model and adapters
  "no model": ((Q, "--config.model.path="), "config.model.path"),
  "model directory misspelt": ((Q, "--config.model.path=./modle"), "config.model.path"),
  "directory without a model": ((Q, "--config.model.path=empty_dir"), "config.model.path"),
  "model of another family": ((Q, "--config.model.path=llama"), "config.model.path"),
  "broken config.json": ((Q, "--config.model.path=bad_config"), "config.model.path"),
  "model without weights": ((Q, "--config.model.path=no_weights"), "config.model.path"),
  "download that was cut short": ((Q, "--config.model.path=cut"), "config.model.path"),
  "model without a tokenizer": ((Q, "--config.model.path=no_tokenizer"), "config.model.path"),
  "no adapter there": ((Q, "--config.lora.init_path=adapter"), "config.lora.init_path"),
  "adapter with a taken name": ((Q, "--config.lora.paths=base=adapter"), "config.lora.paths"),
  "policy without a module": ((Q, "--config.model.policy=patien:Patient"), "config.model.policy"),
  "metric without a module": ((Q, "--config.metrics=varety:distinct"), "config.metrics"),
  # data
  "data set misspelt": ((Q, "--config.task.name=nan"), "config.task.name"),
  "data set of no module": ((Q, "--config.task.name=smus:Sums"), "config.task.name"),
  "no such data file": ((Q, "--config.task.path=nano.jsonl"), "config.task.path"),
  "line that is not JSON": (
    (Q, "--config.task.name=aime", "--config.task.path=line3.jsonl"), "config.task.path",
  ),
  "rows without an answer": (
    (Q, "--config.task.name=aime", "--config.task.path=no_answer.jsonl"), "config.task.path",
  ),
  "ids given twice": (
    (Q, "--config.task.name=aime", "--config.task.path=twice.jsonl"), "config.task.path",
  ),
  "too few problems to split": (
    (Q, "--config.task.name=aime", "--config.task.path=one.jsonl"), "config.task.path",
  ),
  "empty data file": (
    (Q, "--config.task.name=aime", "--config.task.path=none.jsonl"), "config.task.path",
  ),
  "all problems held out": (
    (Q, "--config.task.name=aime", "--config.task.path=aime.jsonl", "--config.eval.parent_count=1",
     "--config.eval.parents=parents.jsonl", "--config.eval.parent_problems=50"),
    "config.eval.parent_problems",
  ),
  "fewer parents than asked for": (
    (Q, "--config.eval.parent_count=2", "--config.eval.parents=parents.jsonl"),
    "config.eval.parent_count",
  ),
  "start workflow without a prompt": (
    (Q, "--config.search.starts=starts.jsonl"), "config.search.starts",
  ),
  "sft without text": ((Q, "--mode=sft"), "config.sft.path"),
  # directories, resume, backups
  "another seed for a run": ((Q, "--workdir=run", "--config.seed=1"), "config.seed: there 0"),
  "another mode for a run": ((Q, "--workdir=run", "--mode=search"), "--workdir"),
  "record that cannot be read": ((Q, "--workdir=spoilt"), "--workdir"),
  "a file for a directory": ((Q, "--workdir=file/run"), "--workdir"),
  "report of no run": (("--mode=report", "--workdir=empty_dir"), "--workdir"),
  "backup below a file": ((Q, "--config.backup.path=file/x"), "config.backup.path"),
  "backup inside the run": (
    (Q, "--workdir=run", "--config.backup.path=run/backup"), "config.backup.path",
  ),
  "no backups kept": ((Q, "--config.backup.keep=0"), "config.backup.keep"),
  "restore from nowhere": ((Q, "--config.backup.restore=backups"), "config.backup.restore"),
  "restore over other files": (
    (Q, "--workdir=notes", "--config.backup.restore=backups"), "config.backup.restore",
  ),
  "automatic restore of no place": ((Q, "--config.backup.restore=auto"), "config.backup.path"),
}  # fmt: skip


def state(folder):
  return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def command(here, *argv, code=IMPORTS):
  env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
  return subprocess.run(
    [sys.executable, "-c", code, *argv], cwd=here, env=env, capture_output=True, text=True,
    timeout=900, check=False,
  )  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_field(here, name):
  argv, expected = MISTAKES[name]
  before = state(here)
  done = command(here, *argv)
  assert done.returncode == 2, done.stderr[-2000:]
  shown = done.stderr.splitlines()
  assert done.stdout == "" and len(shown) == 1, done.stderr[-2000:]
  assert shown[0].startswith("error: ") and expected in shown[0] and len(shown[0]) < 700
  assert state(here) == before


LATE = {  # mistakes that only the started machine can tell
  "more devices than are here": ((Q, "--config.mesh.tensor=64"), "config.mesh"),
  "module of a policy without it": (
    (Q, "--config.model.policy=mine:Patience"), "config.model.policy",
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_a_mistake_found_late_is_one_line_too_and_leaves_nothing(here, name):
  argv, expected = LATE[name]
  (here / "mine.py").write_text("class Patient:\n  pass\n")
  before = state(here)
  done = command(here, *argv, code="import sys, launch; sys.exit(launch.main(sys.argv[1:]))")
  errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
  assert len(errors) == 1 and expected in errors[0], done.stderr[-2000:]
  new = {p for p in set(state(here)) - set(before) if "__pycache__" not in p.parts}
  assert new <= {here / "runs"}  # the folder of runs stays, empty
