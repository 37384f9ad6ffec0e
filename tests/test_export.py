"""Mode export: PEFT files and merged checkpoints, from runs and adapters, and what is refused."""

import json

import jax
import numpy as np
import pytest
from test_adapters import noisy
from tiny_checkpoint import make_checkpoint, random_params

import launch
from awf.checkpoint import Checkpointer
from awf.export import Adapter, write_merged
from awf.grpo.config import OptimConfig, make_optimizer
from awf.grpo.trainer import TrainState
from awf.qwen import hf, peft
from awf.qwen.lora import LoRAConfig, merge, scaled
from awf.qwen.quant import QuantConfig, dequantise
from awf.types import UserError
from awf.workdir import Workdir
from configs.base import base_config

KIND = LoRAConfig(4, 8.0, ("q_proj", "up_proj", "down_proj"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("export") / "tiny")


@pytest.fixture(scope="module")
def lora(folder):
  return noisy(hf.load_config(folder), KIND, 0)


@pytest.fixture
def saved(folder, lora, tmp_path):
  peft.save_adapter(tmp_path / "adapter", lora, KIND, "tiny", hf.fingerprint(folder))
  return tmp_path / "adapter"


def export(capsys, folder, *argv, code=0):
  argv = ["--config=configs/quickstart.py:smoke", "--mode=export", *map(str, argv)]
  got = launch.main([*argv, f"--config.model.path={folder}"])
  out, err = capsys.readouterr()
  assert got == code, err
  if code:
    assert out == "" and err.splitlines()[-1].startswith("error: ")
    return err.splitlines()[-1]
  return json.loads(out.splitlines()[-1])


def test_peft_of_an_adapter(folder, lora, saved, tmp_path, capsys):
  out = tmp_path / "out"
  result = export(
    capsys, folder, f"--config.lora.init_path={saved}", f"--config.export.path={out}",
    f"--workdir={tmp_path / 'none'}",
  )  # fmt: skip
  assert result["format"] == "peft" and result["path"] == str(out) and result["rank"] == 4
  assert result["base_fingerprint"] == hf.fingerprint(folder)
  loaded, found = peft.load_adapter(
    out, hf.load_config(folder), base_fingerprint=hf.fingerprint(folder)
  )
  assert found == KIND and not (tmp_path / "none").exists()
  jax.tree.map(np.testing.assert_array_equal, loaded, lora)


@pytest.mark.parametrize(("dtype", "quant"), [("auto", "none"), ("bfloat16", "int8")])
def test_merged_is_base_plus_adapter(dtype, quant, folder, lora, saved, tmp_path, capsys):
  out = tmp_path / "out"
  result = export(
    capsys, folder, f"--config.lora.init_path={saved}", f"--config.export.path={out}",
    f"--workdir={tmp_path / 'none'}", "--config.export.format=merged",
    f"--config.export.dtype={dtype}", "--config.export.shard_bytes=50000",
    f"--config.model.quant={quant}",
  )  # fmt: skip
  assert result["lost"] is None and result["weight_files"] > 1
  assert result["dtype"] == ("float32" if dtype == "auto" else dtype)
  config = hf.load_config(out)
  assert config == hf.load_config(folder)
  names = {f.name for f in out.iterdir()}
  assert {"tokenizer.model", "generation_config.json", "model.safetensors.index.json"} <= names
  want = merge(hf.load_params(folder, config), scaled(lora, KIND))
  if dtype == "bfloat16":
    want = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), want)
  got = hf.load_params(out, config)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=0.01 if dtype != "auto" else 1e-6), got, want
  )
  assert max(f.stat().st_size for f in out.glob("*.safetensors")) < 51_000


@pytest.fixture
def run(folder, lora, tmp_path):
  """A run of mode train with two checkpoints, as training writes them."""
  config = base_config()
  config.model.path = str(folder)
  config.lora.rank, config.lora.alpha, config.lora.targets = KIND.rank, KIND.alpha, KIND.targets
  with Workdir(tmp_path / "run") as workdir:
    workdir.open(config, "train")
    workdir.add_to_record(base_fingerprint=hf.fingerprint(folder))
    checkpoints = Checkpointer(workdir.checkpoints)
    optimizer = make_optimizer(OptimConfig())
    for step in (1, 2):
      tree = jax.tree.map(lambda x, k=step: x * k / 2, lora)
      state = TrainState(tree, optimizer.init(tree), np.int32(step), jax.random.key(0))
      checkpoints.save(step, state)
    checkpoints.close()
  return tmp_path / "run"


def test_the_newest_checkpoint_of_a_run(folder, lora, run, capsys):
  result = export(capsys, folder, f"--workdir={run}")
  assert result["step"] == 2 and result["path"] == str(run / "peft")
  loaded, found = peft.load_adapter(run / "peft", hf.load_config(folder))
  assert found == KIND
  jax.tree.map(np.testing.assert_array_equal, loaded, lora)
  line = export(capsys, folder, f"--workdir={run}", code=2)
  assert "config.export.path" in line and "is not empty" in line


def test_what_cannot_be_exported(folder, run, saved, tmp_path, capsys):
  nothing = export(capsys, folder, f"--workdir={tmp_path / 'none'}", code=2)
  assert "nothing to export" in nothing
  other = make_checkpoint(tmp_path / "other")
  config = hf.load_config(other)
  hf.save_checkpoint(other, random_params(config, seed=5), config)
  line = export(capsys, other, f"--workdir={run}", code=2)
  assert "was trained on another base" in line and "config.model.path" in line
  line = export(
    capsys, other, f"--config.lora.init_path={saved}", f"--workdir={tmp_path / 'none'}", code=2
  )
  assert "was trained on another base" in line
  line = export(
    capsys, folder, f"--config.lora.init_path={saved}", f"--workdir={tmp_path / 'none'}",
    f"--config.export.path={folder}", code=2,
  )  # fmt: skip
  assert "is the base itself" in line
  for checkpoint in (run / "checkpoints").iterdir():
    for file in checkpoint.rglob("manifest.json"):
      file.write_text("{}")
  assert "all are damaged" in export(capsys, folder, f"--workdir={run}", code=2)
  assert not (run / "peft").exists() and not (tmp_path / "none").exists()


def test_without_the_original_weights_it_says_what_was_lost(folder, lora, tmp_path):
  gone = make_checkpoint(tmp_path / "gone")
  config = hf.load_config(gone)
  params = hf.load_params(gone, config, quant=QuantConfig("int8"))
  (gone / "model.safetensors").unlink()
  adapter = Adapter(lora, KIND, "memory")
  with pytest.raises(UserError, match="expected model.safetensors"):
    write_merged(tmp_path / "a", gone, config, adapter)
  result = write_merged(tmp_path / "b", gone, config, adapter, params=params)
  assert "rounding of int8" in result["lost"] and result["dtype"] == "float32"
  want = merge(dequantise(params), scaled(lora, KIND))
  got = hf.load_params(tmp_path / "b", config)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
