"""The GRPO learner against plain readings of its formulas, and what must not change its result."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awf.checkpoint import Checkpointer
from awf.grpo.advantages import group_advantages
from awf.grpo.batch import bin_size, make_batch
from awf.grpo.config import GRPOConfig, OptimConfig, make_optimizer
from awf.grpo.trainer import GRPOTrainer
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora, scaled
from awf.qwen.model import Qwen, head, init_params
from awf.sharding import make_mesh
from awf.types import Rollout

CONFIG = QwenConfig(53, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)
SHALLOW = dataclasses.replace(CONFIG, num_hidden_layers=1)  # compiles sooner
LORA = LoRAConfig(4, 8.0)
# A large eps keeps Adam near plain descent, so that rounding of tiny gradients is not blown up.
OPTIM = OptimConfig(learning_rate=3.0, eps=1.0, grad_clip=0.0)
GRPO = GRPOConfig(group_size=4, micro_batch=2)


@pytest.fixture(scope="module")
def params():
  return jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, init_params(CONFIG, jax.random.key(0)))


@pytest.fixture(scope="module")
def lora():
  new = init_lora(CONFIG, LORA, jax.random.key(1))
  noise = np.random.default_rng(0)
  return jax.tree.map(lambda x: x + 0.05 * noise.standard_normal(x.shape).astype(np.float32), new)


def make_rollouts(groups=3, size=4, seed=0, longest=20):
  rng = np.random.default_rng(seed)
  rollouts = []
  for g in range(groups):
    prompt = tuple(rng.integers(0, 53, rng.integers(3, 30)).tolist())
    for _ in range(size):
      n = int(rng.integers(1, longest))
      ids = tuple(rng.integers(0, 53, n).tolist())
      reward = float(rng.random())
      rollouts.append(
        Rollout(f"g{g}", prompt, ids, (-3.0,) * n, reward, {"runs": reward / 2}, bool(n > 15))
      )
  return rollouts


def first_layer(tree):
  return {name: x for name, x in tree.items() if name != "layers_1"}


def make_trainer(params, lora, grpo=GRPO, optim=OPTIM, mesh=None, **kwargs):
  key = jax.random.key(7)
  config = CONFIG if "layers_1" in params else SHALLOW
  return GRPOTrainer(config, params, lora, LORA, grpo, optim, mesh, key, **kwargs)


@jax.jit
def padded_logps(params, lora, tokens_BT, temperature):
  """Log-prob of each token given those before it, and the entropy there; whole logits."""
  variables = {"params": params} | ({"lora": scaled(lora, LORA)} if lora else {})
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  hidden, _ = Qwen(CONFIG).apply(variables, tokens_BT, positions)
  logp = jax.nn.log_softmax(head(params, hidden)[:, :-1] / temperature)
  chosen = jnp.take_along_axis(logp, tokens_BT[:, 1:, None], 2)[..., 0]
  return chosen, -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def padded(rollouts, length=96):
  """One rollout a row, right-padded: (tokens, is_completion of tokens[:, 1:])."""
  tokens_BT = np.zeros((len(rollouts), length), np.int32)
  is_completion_BT = np.zeros((len(rollouts), length), bool)
  for i, r in enumerate(rollouts):
    middle, stop = len(r.prompt_ids), len(r.prompt_ids) + len(r.token_ids)
    tokens_BT[i, :stop] = (*r.prompt_ids, *r.token_ids)
    is_completion_BT[i, middle:stop] = True
  return tokens_BT, is_completion_BT[:, 1:]


def plain_logps(params, lora, rollouts, temperature=1.0):
  """(log-probs, entropies), one array per rollout."""
  tokens_BT, is_completion_BT = padded(rollouts)
  values = jax.device_get(padded_logps(params, lora, tokens_BT, temperature))
  return tuple([x[m] for x, m in zip(v, is_completion_BT, strict=True)] for v in values)


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def assert_trees_close(a, b, tolerance=2e-6):
  np.testing.assert_allclose(flat(a), flat(b), atol=tolerance, rtol=1e-4)


# Batches


def test_batch_holds_every_token_once_and_shares_prompts():
  rollouts = make_rollouts(groups=4, size=5)
  batch = make_batch(rollouts, range(20), 96)
  assert bin_size(rollouts, 96) == 512
  seen = set()
  for z, b, u in np.argwhere(batch.is_target_ZBU):
    row, column = int(batch.row_ZBU[z, b, u]), int(batch.column_ZBU[z, b, u])
    seen.add((row, column))
    rollout, source = rollouts[row], int(batch.source_ZBU[z, b, u])
    assert batch.target_ZBU[z, b, u] == rollout.token_ids[column]
    before = (*rollout.prompt_ids, *rollout.token_ids)[len(rollout.prompt_ids) + column - 1]
    assert batch.tokens_ZBT[z, b, source] == before
    assert batch.positions_ZBT[z, b, source] == len(rollout.prompt_ids) + column - 1
  assert seen == {(i, j) for i, r in enumerate(rollouts) for j in range(len(r.token_ids))}
  alone = sum(len(r.prompt_ids) + len(r.token_ids) for r in rollouts)
  assert batch.num_tokens < 0.7 * alone


def test_batch_refuses_what_cannot_be_packed():
  empty = Rollout("a", (), (1,), (0.0,), 1.0)
  with pytest.raises(ValueError, match="expected a prompt"):
    make_batch([empty], [0], 512)
  with pytest.raises(ValueError, match="at most 16 tokens, got 20"):
    make_batch([Rollout("a", (1,) * 11, (1,) * 10, (0.0,) * 10, 1.0)], [0], 16)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_learner_logprobs_equal_the_plain_forward(params, lora, temperature):
  rollouts = make_rollouts(groups=6, size=8, longest=60)  # several bins, prompts split over them
  trainer = make_trainer(params, lora, temperature=temperature)
  expected = plain_logps(params, lora, rollouts, temperature)[0]
  for got, want in zip(trainer.logprobs(rollouts), expected, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5)
  base = trainer.logprobs(rollouts, is_base=True)
  want = plain_logps(params, None, rollouts, temperature)[0]
  np.testing.assert_allclose(base[0], want[0], atol=1e-5)


# Updates


def plain_update(params, lora, rollouts, grpo, optim):
  """The whole algorithm, one row per rollout, on whole logits."""
  advantage_B1 = group_advantages(
    [r.reward for r in rollouts], [r.group for r in rollouts], grpo.advantage, grpo.std_eps
  ).values_B[:, None]
  tokens_BT, is_completion_BT = padded(rollouts, 64)
  old, _ = padded_logps(params, lora, tokens_BT, 1.0)
  ref, _ = padded_logps(params, None, tokens_BT, 1.0)

  def loss(lora):
    logp, entropy = padded_logps(params, lora, tokens_BT, 1.0)
    r = jnp.exp(logp - old)
    clipped = jnp.clip(r, 1 - grpo.clip_low, 1 + grpo.clip_high)
    terms = -jnp.minimum(r * advantage_B1, clipped * advantage_B1) - grpo.entropy_coef * entropy
    terms += grpo.beta * (jnp.exp(ref - logp) - (ref - logp) - 1)
    return jnp.sum(jnp.where(is_completion_BT, terms, 0.0)) / np.sum(is_completion_BT)

  optimizer = make_optimizer(optim)
  state, losses = optimizer.init(lora), []
  for _ in range(grpo.steps_per_batch):
    value, grads = jax.jit(jax.value_and_grad(loss))(lora)
    updates, state = optimizer.update(grads, state, lora)
    lora = optax.apply_updates(lora, updates)
    losses.append(float(value))
  return lora, np.mean(losses)


def test_update_equals_the_plain_algorithm(params, lora):
  grpo = dataclasses.replace(GRPO, beta=0.1, entropy_coef=0.01, steps_per_batch=2)
  rollouts = make_rollouts(groups=2, size=3)
  trainer = make_trainer(params, lora, grpo)
  metrics = trainer.update(rollouts)
  expected, loss = plain_update(params, lora, rollouts, grpo, OPTIM)
  assert float(np.abs(flat(expected) - flat(lora)).max()) > 1e-3
  assert_trees_close(trainer.state.lora, expected, 1e-5)
  np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-4)
  assert int(trainer.state.step) == 2


def test_micro_batches_chunks_remat_and_mesh_change_nothing(params, lora):
  rollouts = make_rollouts(groups=6, size=8, longest=60)
  grpo = dataclasses.replace(GRPO, steps_per_batch=2)
  reference = make_trainer(params, lora, dataclasses.replace(grpo, micro_batch=16))
  want = reference.update(rollouts)
  others = {
    "micro": (dataclasses.replace(grpo, micro_batch=2, vocab_chunk=100, remat=True), None),
    "mesh": (grpo, make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])),
    "tensor": (grpo, make_mesh(data=1, tensor=2, devices=jax.devices()[:2])),
  }
  for name, (config, mesh) in others.items():
    trainer = make_trainer(params, lora, config, mesh=mesh)
    got = trainer.update(rollouts)
    assert_trees_close(trainer.state.lora, reference.state.lora, 1e-5)
    assert set(got) == set(want), name
    for key, value in want.items():
      np.testing.assert_allclose(got[key], value, rtol=2e-3, atol=1e-5, err_msg=f"{name} {key}")


def test_uniform_rewards_change_nothing(params, lora):
  trainer = make_trainer(params, lora)
  before = jax.device_get(jax.tree.map(jnp.copy, trainer.state.lora))
  rollouts = [dataclasses.replace(r, reward=0.3) for r in make_rollouts()]
  metrics = trainer.update(rollouts)
  assert metrics["skipped"] == 1.0 and metrics["frac_reward_zero_std"] == 1.0
  np.testing.assert_array_equal(flat(before), flat(trainer.state.lora))
  assert int(trainer.state.step) == 0 and trainer.traces == 0


def test_one_trace_new_keys_masked_rows_and_the_stop_token(params, lora):
  trainer = make_trainer(params, lora)
  rollouts = make_rollouts()

  def updated(batch):
    trainer.state = jax.tree.map(jnp.copy, start)
    return trainer.update(batch), flat(trainer.state.lora)

  start = jax.tree.map(jnp.copy, trainer.state)
  metrics, base = updated(rollouts)
  assert metrics["skipped"] == 0.0 and np.abs(base - flat(start.lora)).max() > 1e-3
  assert not np.array_equal(jax.random.key_data(trainer.state.key), jax.random.key_data(start.key))
  # A row without a reward is as if it had not been drawn.
  lost = dataclasses.replace(rollouts[0], reward=float("nan"), token_ids=(5,) * 9)
  metrics_lost, with_lost = updated([*rollouts, lost])
  np.testing.assert_allclose(with_lost, base, atol=1e-6)
  assert metrics_lost["reward"] == pytest.approx(metrics["reward"])
  # A row with zero advantage is not computed but counts in the mean over tokens.
  uniform = [dataclasses.replace(r, group="u", reward=0.5) for r in rollouts[:2]]
  extra = sum(len(r.token_ids) for r in uniform)
  total = sum(len(r.token_ids) for r in rollouts)
  metrics_uniform, _ = updated([*rollouts, *uniform])
  assert metrics_uniform["grad_norm"] == pytest.approx(
    metrics["grad_norm"] * total / (total + extra), rel=1e-3
  )
  # The last token (the stop token of a finished row) is trained on.
  ids = rollouts[1].token_ids
  other = dataclasses.replace(rollouts[1], token_ids=(*ids[:-1], (ids[-1] + 1) % 53))
  assert np.abs(updated([rollouts[0], other, *rollouts[2:]])[1] - base).max() > 1e-5
  # The order of rows does not matter.
  np.testing.assert_allclose(updated(rollouts[::-1])[1], base, atol=1e-6)
  updated(make_rollouts(groups=5, size=7, seed=3))
  assert trainer.traces == 1


FIELDS = {
  "advantage": "dr_grpo",
  "std_eps": 1.0,
  "clip_low": 0.01,
  "clip_high": 0.01,
  "beta": 0.5,
  "entropy_coef": 0.1,
  "steps_per_batch": 1,
  "mask_truncated": True,
}


def test_fields_of_the_objective_change_the_update(params, lora):
  params, lora = first_layer(params), first_layer(lora)
  grpo = dataclasses.replace(GRPO, steps_per_batch=2)
  rollouts = make_rollouts(groups=2)
  assert any(r.truncated for r in rollouts)

  def updated(config):
    trainer = make_trainer(params, lora, config)
    trainer.update(rollouts)
    return flat(trainer.state.lora)

  base = updated(grpo)
  for name, value in FIELDS.items():
    changed = updated(dataclasses.replace(grpo, **{name: value}))
    assert np.abs(changed - base).max() > 1e-5, name


@pytest.mark.usual_compile
def test_training_raises_the_rewarded_completion_and_resumes_exactly(params, tmp_path):
  params = first_layer(params)
  rollouts = [
    Rollout("a", (1, 2, 3), (4, 5, 0), (-4.0,) * 3, 1.0),
    Rollout("a", (1, 2, 3), (6, 7, 8, 0), (-4.0,) * 4, 0.0),
  ]
  optim = OptimConfig(learning_rate=1e-2)
  trainer = make_trainer(params, None, GRPO, optim)
  before = trainer.logprobs(rollouts)
  base = trainer.logprobs(rollouts, is_base=True)
  np.testing.assert_array_equal(before[0], base[0])  # a new adapter is the base
  trainer.update(rollouts)
  checkpointer = Checkpointer(tmp_path)
  checkpointer.save(1, trainer.state)
  metrics = [trainer.update(rollouts) for _ in range(3)]
  resumed = make_trainer(params, None, GRPO, optim)
  resumed.state = checkpointer.restore(resumed.state)[1]
  assert [resumed.update(rollouts) for _ in range(3)] == metrics
  np.testing.assert_array_equal(flat(resumed.state.lora), flat(trainer.state.lora))
  after = trainer.logprobs(rollouts)
  assert after[0].sum() > before[0].sum() and after[1].sum() < before[1].sum()


def test_metric_names_and_sampling_difference(params, lora):
  trainer = make_trainer(params, lora)
  rollouts = make_rollouts(groups=2)
  exact = [
    dataclasses.replace(r, logprobs=tuple(p.tolist()))
    for r, p in zip(rollouts, trainer.logprobs(rollouts), strict=True)
  ]
  metrics = trainer.update(exact)
  assert metrics["sampling/sampling_logp_difference/max"] < 1e-5
  assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
  assert metrics["clip_ratio/region_mean"] == 0 and metrics["kl"] == 0
  assert metrics["rewards/runs/mean"] == pytest.approx(metrics["reward"] / 2)
  expected = float(np.mean(np.concatenate(plain_logps(params, lora, rollouts)[1])))
  assert metrics["entropy"] == pytest.approx(expected, rel=1e-4)
  lengths = [len(r.token_ids) for r in rollouts]
  assert metrics["completions/max_length"] == max(lengths)
  names = {"reward_std", "loss", "policy_loss", "grad_norm", "learning_rate", "skipped"}
  assert names <= set(metrics) and all(type(v) is float for v in metrics.values())


def test_clipping_bounds_the_step(params, lora):
  params, lora = first_layer(params), first_layer(lora)
  rollouts = make_rollouts(groups=1)
  optim = OptimConfig(learning_rate=1.0, eps=1e3, grad_clip=1e-3)  # step ~ gradient / 1e3
  free = make_trainer(params, lora, optim=dataclasses.replace(optim, grad_clip=0.0))
  clipped = make_trainer(params, lora, optim=optim)
  norm = free.update(rollouts)["grad_norm"]
  assert clipped.update(rollouts)["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 1e-3
  far, near = (np.abs(flat(t.state.opt_state[0].mu)).max() for t in (free, clipped))
  assert near == pytest.approx(far * 1e-3 / norm, rel=1e-3)
