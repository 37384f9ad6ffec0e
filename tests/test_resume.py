"""State elsewhere and after faults: other meshes, numbers that are not finite, no memory left."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grpo import CONFIG, GRPO, LORA, OPTIM, make_rollouts
from test_train import run, small

from awf.checkpoint import Checkpointer
from awf.faults import explain, is_out_of_memory
from awf.grpo.guard import save_batch
from awf.grpo.trainer import GRPOTrainer
from awf.qwen.model import init_params
from awf.sharding import make_mesh
from awf.types import UserError
from configs.base import base_config


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, init_params(CONFIG, jax.random.key(0)))


def make_trainer(params, mesh=None, **changes):
  grpo = dataclasses.replace(GRPO, **changes)
  return GRPOTrainer(CONFIG, params, None, LORA, grpo, OPTIM, mesh, jax.random.key(2))


def leaves(state):
  keys = jax.random.key_data(state.key)
  return [np.asarray(x) for x in jax.tree.leaves((state.lora, state.opt_state, state.step, keys))]


def same(a, b):
  return all(
    np.array_equal(x, y, equal_nan=True) for x, y in zip(leaves(a), leaves(b), strict=True)
  )


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1)])
def test_a_checkpoint_goes_on_another_mesh(params, tmp_path, sizes):
  trainer = make_trainer(params)
  trainer.update(make_rollouts(seed=1))
  Checkpointer(tmp_path).save(1, trainer.state, {"room": list(trainer.room)})
  mesh = make_mesh(*sizes)
  moved = make_trainer(params, mesh)
  _, moved.state, extra = Checkpointer(tmp_path).restore(moved.state)
  moved.room = tuple(extra["room"])
  assert same(moved.state, trainer.state)
  assert all(
    set(x.sharding.device_set) == set(mesh.devices.flat) for x in jax.tree.leaves(moved.state)
  )
  here, there = (t.update(make_rollouts(seed=2)) for t in (trainer, moved))
  for name in ("loss", "grad_norm", "entropy"):
    assert there[name] == pytest.approx(here[name], rel=1e-4, abs=1e-6), name
  for x, y in zip(leaves(trainer.state), leaves(moved.state), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-4)


def test_the_room_of_a_batch_is_part_of_the_state(params):
  """A large batch grows the arrays for good; a resumed learner packs as the other one did."""
  trainer, resumed = make_trainer(params, micro_batch=1), make_trainer(params, micro_batch=1)
  first = resumed.room
  trainer.update(make_rollouts(groups=16, longest=200, seed=3))
  assert trainer.room > first
  resumed.room = trainer.room
  (a, b) = (t.pack(make_rollouts(seed=4)).tokens_ZBT for t in (trainer, resumed))
  assert a.shape == b.shape and np.array_equal(a, b)
  smaller = make_trainer(params, micro_batch=2)
  smaller.room = trainer.room  # lowered or raised, as after an update that did not fit
  assert smaller.room == (2 * first[0], trainer.room[1], 2)
  smaller.room = trainer.room[:2]  # of a run before that was kept
  assert smaller.room[:2] == trainer.room[:2]


@pytest.mark.usual_compile
def test_a_step_without_finite_numbers_changes_nothing_and_is_counted(params):
  trainer = make_trainer(params)
  rollouts = make_rollouts()
  sound = trainer.update(rollouts)
  assert sound["nonfinite_steps"] == 0.0 and sound["skipped"] == 0.0
  # A gradient that is not finite: the adapter itself is poisoned.
  poisoned = jax.tree.map(
    lambda x: x.at[0, 0].set(jnp.nan) if x.ndim == 2 else x, trainer.state.lora
  )
  trainer.state = dataclasses.replace(trainer.state, lora=poisoned)
  before = jax.tree.map(jnp.copy, trainer.state)
  metrics = trainer.update(rollouts)
  assert metrics["nonfinite_steps"] == 1.0 and metrics["skipped"] == 1.0
  assert "loss" not in metrics and "reward" in metrics
  assert same(trainer.state, before)


@pytest.mark.usual_compile
def test_an_infinite_reward_skips_the_update_and_a_missing_one_only_its_row(params):
  trainer = make_trainer(params)
  rollouts = make_rollouts()
  before = jax.tree.map(jnp.copy, trainer.state)
  broken = [dataclasses.replace(rollouts[0], reward=math.inf), *rollouts[1:]]
  metrics = trainer.update(broken)
  assert metrics["skipped"] == 1.0 and metrics["nonfinite_steps"] == 1.0
  assert same(trainer.state, before)
  missing = [dataclasses.replace(rollouts[0], reward=math.nan), *rollouts[1:]]
  assert trainer.update(missing)["skipped"] == 0.0


def test_a_kept_batch_is_strict_json(tmp_path):
  rollouts = [dataclasses.replace(r, reward=math.nan) for r in make_rollouts(groups=1, size=2)]
  path = save_batch(tmp_path / "faults" / "round_0003.jsonl", rollouts, {"loss": math.inf})
  rows = [json.loads(x, parse_constant=pytest.fail) for x in path.read_text().splitlines()]
  assert rows[0] == {"metrics": {"loss": "inf"}}
  assert [row["reward"] for row in rows[1:]] == ["nan", "nan"]
  assert tuple(rows[1]["token_ids"]) == rollouts[0].token_ids


def test_a_run_stops_after_too_many_updates_without_finite_numbers(tmp_path):
  """A learning rate that blows the adapter up in the first step."""
  changes = {"optim.learning_rate": 1e30, "train.nonfinite_limit": 2, "eval.parent_count": 0}
  config = small(3, **changes)
  with pytest.raises(
    UserError, match=r"round 2 .*round_0002.jsonl.*config.train.nonfinite_limit = 2"
  ):
    run(config, tmp_path)
  rows = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [row["step"] for row in rows] == [1] and rows[0]["nonfinite_steps"] >= 1
  kept = (tmp_path / "faults" / "round_0002.jsonl").read_text().splitlines()
  assert len(kept) == 1 + 2 * 4


def test_no_memory_left_names_the_plan_and_the_fields():
  with pytest.raises(RuntimeError) as full:
    jax.block_until_ready(jnp.zeros((1 << 50,), jnp.float32))
  assert is_out_of_memory(full.value)
  wrapped = RuntimeError("the seed could not be run")
  wrapped.__cause__ = full.value
  line = explain(wrapped, base_config(), "python launch.py --mode=plan")
  for part in ("`python launch.py --mode=plan`", "config.grpo.micro_batch (8)", "model.quant=int8"):
    assert part in line
  assert explain(ValueError("something else"), base_config(), "plan") is None
  line = explain(wrapped, base_config(), "plan", "bench")
  assert "config.bench.batch (" in line and "prompt_cache_gb (" in line and "lora" not in line
