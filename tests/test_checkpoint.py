"""Checkpoints: exact, atomic, and typed about what does not fit."""

import contextlib
import dataclasses
import gc
import json
import logging
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding, PartitionSpec

from awf.checkpoint import Checkpointer
from awf.sharding import make_mesh
from awf.types import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
  lora: dict
  opt_state: tuple
  step: jax.Array
  key: jax.Array


def make_state(seed=0, rank=4):
  key = jax.random.key(seed)
  lora = {"layers_0": {"q_proj": {"a": jax.random.normal(key, (16, rank))}}}
  lora["layers_0"]["q_proj"]["b"] = jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42] * rank)
  lora["low"] = jax.random.normal(key, (8,)).astype(jnp.bfloat16)
  return State(lora, optax.adamw(1e-3).init(lora), jnp.int32(seed), jax.random.split(key)[0])


def leaf_bytes(state):
  leaves = [
    jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    for x in jax.tree.leaves(state)
  ]
  return [(str(x.dtype), np.asarray(x).tobytes()) for x in leaves]


def damage(directory, step):
  """Cuts every array file of a checkpoint to half, as a full disk or a broken copy leaves it."""
  files = [p for p in (directory / str(step) / "state").rglob("*") if p.is_file()]
  big = [p for p in files if p.stat().st_size > 200 and "metadata" not in p.name.lower()]
  assert big
  for path in big:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_round_trip_is_bit_equal_with_typed_key(tmp_path):
  state = make_state(3)
  Checkpointer(tmp_path).save(7, state, {"round": 7, "nodes": [1, 2], "text": "ä"})
  step, restored, extra = Checkpointer(tmp_path).restore(make_state(0))
  assert step == 7 and extra == {"round": 7, "nodes": [1, 2], "text": "ä"}
  assert isinstance(restored, State)
  assert leaf_bytes(restored) == leaf_bytes(state)
  assert restored.key.dtype == state.key.dtype
  drawn = jax.random.normal(restored.key, (3,))
  np.testing.assert_array_equal(drawn, jax.random.normal(state.key, (3,)))


def test_empty_directory_gives_none(tmp_path):
  assert Checkpointer(tmp_path / "new").restore(make_state()) is None


def test_keeps_the_newest_and_replaces_a_step(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpointer.save(step, make_state(step), {"step": step})
  assert checkpointer.steps() == [2, 3]
  checkpointer.save(3, make_state(9), {"step": 9})
  step, state, extra = Checkpointer(tmp_path).restore(make_state())
  assert (step, extra["step"], int(state.step)) == (3, 9, 9)


def test_damaged_newest_falls_back_to_the_one_before(tmp_path, caplog):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, make_state(1), {"step": 1})
  checkpointer.save(2, make_state(2), {"step": 2})
  damage(tmp_path, 2)
  with caplog.at_level(logging.WARNING):
    step, state, extra = Checkpointer(tmp_path).restore(make_state())
  assert (step, extra, int(state.step)) == (1, {"step": 1}, 1)
  assert leaf_bytes(state) == leaf_bytes(make_state(1))
  assert "checkpoint 2 is damaged" in caplog.text and "checkpoint 1 is used" in caplog.text


def test_a_damaged_checkpoint_neither_counts_nor_stays(tmp_path):
  checkpointer = Checkpointer(tmp_path, keep=2)
  for step in (1, 2):
    checkpointer.save(step, make_state(step))
  damage(tmp_path, 2)
  resumed = Checkpointer(tmp_path, keep=2)
  assert resumed.restore(make_state())[0] == 1
  resumed.save(3, make_state(3))
  assert resumed.steps() == [1, 3]


def test_a_first_save_that_was_never_completed_is_a_fresh_start(tmp_path, caplog):
  Checkpointer(tmp_path).save(1, make_state(1))
  (tmp_path / "1" / "manifest.json").unlink()
  assert Checkpointer(tmp_path).restore(make_state()) is None
  assert "checkpoint 1 was never completed; there is none before it" in caplog.text


def test_one_sound_checkpoint_is_there_wherever_a_save_is_killed():
  """`make test-kill` takes every operation in turn, this one of nine."""
  command = [sys.executable, str(ROOT / "tests" / "save_crashes.py"), "--every=9"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  found = json.loads(done.stdout.splitlines()[-1])
  assert found["crashes"] >= 8 and set(found["newest"]) == {10, 20, 21, 30}


@contextlib.contextmanager
def full_disk(largest):
  """No file may grow beyond `largest` bytes, which is how a full disk looks to a writer."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("step", [2, 3])
def test_a_full_disk_leaves_every_earlier_checkpoint_intact(tmp_path, step):
  checkpointer = Checkpointer(tmp_path, keep=1)
  checkpointer.save(2, make_state(2), {"round": 2})
  before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
  big = {"noise": jax.random.normal(jax.random.key(0), (256, 256))}
  with full_disk(20_000), pytest.raises(UserError, match=r"File too large.*intact \(\[2\]\)"):
    checkpointer.save(step, big)
  assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
  checkpointer.save(step, make_state(3))
  assert Checkpointer(tmp_path).restore(make_state())[0] == step


# orbax's threads still tell their event loop of the write when it has been closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_while_arrays_are_written_is_one_error(tmp_path, monkeypatch, caplog):
  """Another program took the room that was found free."""
  monkeypatch.setattr("awf.checkpoint._reserve", lambda folder, size: None)
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, make_state(1))
  big = {f"noise{i}": jax.random.normal(jax.random.key(i), (256, 256)) for i in range(3)}
  with full_disk(20_000), pytest.raises(UserError, match=r"File too large.*intact \(\[1\]\)"):
    checkpointer.save(2, big)
  gc.collect()  # asyncio tells of failures that nobody asked for when they are freed
  assert not [r for r in caplog.records if r.exc_info or r.levelname == "ERROR"]
  assert Checkpointer(tmp_path).restore(make_state())[0] == 1


def test_unfinished_save_is_not_seen(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, make_state(1))
  (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
  assert Checkpointer(tmp_path).restore(make_state())[0] == 1


def test_crash_before_the_manifest_falls_back(tmp_path):
  checkpointer = Checkpointer(tmp_path)
  for step in (1, 2):
    checkpointer.save(step, make_state(step))
  (tmp_path / "2" / "manifest.json").unlink()
  assert Checkpointer(tmp_path).restore(make_state())[0] == 1


def test_all_damaged_is_a_user_error(tmp_path):
  Checkpointer(tmp_path).save(1, make_state(1))
  damage(tmp_path, 1)
  with pytest.raises(UserError, match="all are damaged.*--workdir"):
    Checkpointer(tmp_path).restore(make_state())


def test_other_base_is_refused(tmp_path):
  Checkpointer(tmp_path, base_hash="a" * 64).save(1, make_state(1))
  assert Checkpointer(tmp_path, base_hash="a" * 64).restore(make_state())[0] == 1
  with pytest.raises(UserError, match="another base model.*config.model.path"):
    Checkpointer(tmp_path, base_hash="b" * 64).restore(make_state())


def test_other_structure_is_refused_by_name(tmp_path):
  Checkpointer(tmp_path).save(1, make_state(1, rank=4))
  with pytest.raises(UserError, match=r"q_proj\.a: expected \[\[16, 8\].*got \[\[16, 4\].*lora"):
    Checkpointer(tmp_path).restore(make_state(1, rank=8))


def test_restores_onto_the_templates_sharding(tmp_path):
  state = make_state(2)
  Checkpointer(tmp_path).save(1, state)
  mesh = make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
  whole = NamedSharding(mesh, PartitionSpec())
  template = jax.device_put(make_state(0), whole)
  rows = NamedSharding(mesh, PartitionSpec("fsdp"))
  a = jax.device_put(template.lora["layers_0"]["q_proj"]["a"], rows)
  template.lora["layers_0"]["q_proj"]["a"] = a
  _, restored, _ = Checkpointer(tmp_path).restore(template)
  assert restored.lora["layers_0"]["q_proj"]["a"].sharding == rows
  assert restored.key.sharding.is_equivalent_to(whole, 0)
  assert leaf_bytes(restored) == leaf_bytes(state)


def test_bad_arguments(tmp_path):
  with pytest.raises(UserError, match="keep_checkpoints"):
    Checkpointer(tmp_path, keep=0)
  with pytest.raises(TypeError):
    Checkpointer(tmp_path).save(1, make_state(), {"x": object()})
