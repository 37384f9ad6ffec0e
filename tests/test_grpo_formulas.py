"""The learner's formulas: advantages, losses, attention, schedules, validated settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awf.grpo.advantages import group_advantages
from awf.grpo.attention import block_attend, dense_attend
from awf.grpo.config import GRPOConfig, OptimConfig, learning_rate_at, make_optimizer
from awf.grpo.loss import head_loss, logp_and_entropy
from awf.grpo.objective import kl_estimate, policy_terms
from awf.types import UserError

GRPO = GRPOConfig()


# Advantages


def test_advantages_match_their_formula():
  rewards = [0.0, 1.0, 0.5, 0.2, 0.9]
  got = group_advantages(rewards, ["a", "a", "a", "b", "b"], "grpo", 1e-4)
  a, b = np.array(rewards[:3]), np.array(rewards[3:])
  std_a, std_b = np.sqrt(((a - a.mean()) ** 2).sum() / 2), np.sqrt(((b - b.mean()) ** 2).sum())
  expected = np.concatenate([(a - a.mean()) / (std_a + 1e-4), (b - b.mean()) / (std_b + 1e-4)])
  np.testing.assert_allclose(got.values_B, expected, rtol=1e-6)
  np.testing.assert_allclose(got.mean_std, (std_a + std_b) / 2, rtol=1e-9)
  centred = group_advantages(rewards, ["a", "a", "a", "b", "b"], "dr_grpo")
  np.testing.assert_allclose(centred.values_B[:3], a - a.mean(), rtol=1e-6)


def test_advantages_ignore_shift_order_and_missing_rows():
  rng = np.random.default_rng(0)
  rewards, groups = rng.random(12), [f"g{i % 3}" for i in range(12)]
  base = group_advantages(rewards, groups).values_B
  np.testing.assert_allclose(group_advantages(rewards + 5, groups).values_B, base, atol=1e-6)
  order = rng.permutation(12)
  mixed = group_advantages(rewards[order], [groups[i] for i in order]).values_B
  np.testing.assert_allclose(mixed, base[order], atol=1e-6)
  with_nan = group_advantages([*rewards, np.nan], [*groups, "g0"])
  np.testing.assert_array_equal(with_nan.values_B, [*base, 0.0])
  assert not with_nan.is_valid_B[-1]


def test_uniform_groups_and_groups_of_one_are_exactly_zero():
  got = group_advantages([0.1, 0.1, 0.1, 0.7, np.nan, np.nan], ["a", "a", "a", "b", "c", "c"])
  np.testing.assert_array_equal(got.values_B, np.zeros(6))
  assert got.zero_std_share == 1.0 and got.mean_std == 0.0
  with pytest.raises(ValueError, match="grpo.advantage"):
    group_advantages([1.0], ["a"], "best")


# Formulas


def test_logp_and_entropy_match_numpy():
  logits = np.random.default_rng(0).normal(0, 30, (2, 5, 11)).astype(np.float32)
  target = np.random.default_rng(1).integers(0, 11, (2, 5))
  wide = logits.astype(np.float64)
  p = np.exp(wide - wide.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  logp, entropy = logp_and_entropy(jnp.array(logits), jnp.array(target))
  chosen = np.take_along_axis(p, target[..., None], -1)[..., 0]
  np.testing.assert_allclose(logp, np.log(chosen), rtol=1e-5, atol=1e-5)
  safe = np.where(p > 0, p, 1)
  np.testing.assert_allclose(entropy, -(p * np.log(safe)).sum(-1), rtol=1e-5, atol=1e-5)


def test_policy_terms_and_k3_match_numpy():
  rng = np.random.default_rng(0)
  logp, old, advantage = (rng.normal(0, 0.4, 200) for _ in range(3))
  loss, ratio = policy_terms(jnp.array(logp), jnp.array(old), jnp.array(advantage), GRPO)
  r = np.exp(logp - old)
  expected = [-min(x * a, min(max(x, 0.8), 1.28) * a) for x, a in zip(r, advantage, strict=True)]
  np.testing.assert_allclose(ratio, r, rtol=1e-5)
  np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
  d = old - logp
  np.testing.assert_allclose(
    kl_estimate(jnp.array(logp), jnp.array(old)), np.exp(d) - d - 1, atol=1e-6
  )
  assert float(jnp.min(kl_estimate(jnp.array(logp), jnp.array(old)))) >= 0


def test_head_loss_gradient_is_that_of_whole_logits():
  key = jax.random.split(jax.random.key(0), 3)
  kernel, hidden = jax.random.normal(key[0], (8, 11)), jax.random.normal(key[1], (2, 10, 8))
  data = {"t": jax.random.randint(key[2], (2, 10), 0, 11), "w": jnp.arange(20.0).reshape(2, 10)}
  data["w"] = jnp.where(jnp.arange(10)[None] < 7, data["w"], 0.0)

  def fn(logits, d, scale):
    logp, entropy = logp_and_entropy(logits, d["t"])
    return scale * jnp.sum(d["w"] * (logp + entropy)), {"logp": logp}

  def chunked(h):
    return head_loss(kernel, h, data, jnp.float32(3), jnp.int32(7), fn, 4)

  (loss, aux), grad = jax.value_and_grad(chunked, has_aux=True)(hidden)
  want, want_grad = jax.value_and_grad(lambda h: fn(h @ kernel, data, 3.0)[0])(hidden)
  np.testing.assert_allclose(loss, want, rtol=1e-5)
  np.testing.assert_allclose(grad, want_grad, atol=1e-4)
  np.testing.assert_allclose(aux["logp"][:, :7], fn(hidden @ kernel, data, 3.0)[1]["logp"][:, :7])
  assert np.all(aux["logp"][:, 8:] == 0)  # the chunk behind the last target is not computed


def test_block_attention_equals_dense_attention_and_its_gradient():
  segments = np.zeros(150, np.int32)
  parents = np.zeros(150, np.int32)
  segments[:40], parents[:40] = 1, 1
  for i, start in enumerate((40, 70, 71, 90)):
    stop = (70, 71, 90, 130)[i]
    segments[start:stop], parents[start:stop] = 2 + i, 1
  keys = jax.random.split(jax.random.key(0), 4)
  q, g = (jax.random.normal(k, (1, 150, 4, 8)) for k in keys[:2])
  k, v = (jax.random.normal(k, (1, 150, 2, 8)) for k in keys[2:])
  g = g * (segments > 0)[None, :, None, None]

  def run(attend):
    out, pull = jax.vjp(lambda *x: attend(*x, None)[0], q, k, v)
    return out * (segments > 0)[None, :, None, None], pull(g)

  dense = run(dense_attend(jnp.array(segments)[None], jnp.array(parents)[None], 64))
  for block in (16, 64):
    blocks = run(block_attend(jnp.array(segments), jnp.array(parents), block))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), blocks, dense)


# Optimiser and configs


def test_schedules_and_warm_up():
  cosine = OptimConfig(1.0, "cosine", warmup_steps=2, total_steps=10)
  rates = [float(learning_rate_at(cosine, s)) for s in range(11)]
  expected = [0.5, 1.0] + [0.5 * (1 + np.cos(np.pi * s / 8)) for s in range(9)]
  np.testing.assert_allclose(rates, expected, atol=1e-6)
  linear = OptimConfig(1.0, "linear", total_steps=4)
  np.testing.assert_allclose([float(learning_rate_at(linear, s)) for s in (0, 2, 4)], [1, 0.5, 0])


@pytest.mark.parametrize(
  "field, value",
  [("learning_rate", 0.3), ("weight_decay", 0.1), ("b1", 0.5), ("b2", 0.5), ("eps", 1e-2)],
)
def test_every_field_of_the_optimiser_changes_the_step(field, value):
  weights = {"kernel": jnp.array([[1.0, -2.0]]), "scale": jnp.array([3.0])}
  grads = [{"kernel": jnp.array([[g, 0.3]]), "scale": jnp.array([0.0])} for g in (0.1, -0.5, 0.2)]

  def run(optim):
    optimizer, tree = make_optimizer(optim), weights
    state = optimizer.init(tree)
    for grad in grads:
      updates, state = optimizer.update(grad, state, tree)
      tree = optax.apply_updates(tree, updates)
    return tree

  base, changed = (
    run(OptimConfig(0.1)),
    run(dataclasses.replace(OptimConfig(0.1), **{field: value})),
  )
  assert np.abs(base["kernel"] - changed["kernel"]).max() > 1e-4
  np.testing.assert_array_equal(base["scale"], changed["scale"])  # vectors are not decayed


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: GRPOConfig(group_size=1), "config.grpo.group_size: expected at least 2, got 1"),
    (lambda: GRPOConfig(advantage="best"), "config.grpo.advantage"),
    (lambda: GRPOConfig(clip_low=2.0), "config.grpo.clip_low"),
    (lambda: OptimConfig(schedule="cosin"), "config.optim.schedule"),
    (lambda: OptimConfig(schedule="cosine"), "config.optim.total_steps"),
    (lambda: OptimConfig(b1=1.0), "config.optim.b1"),
  ],
)
def test_bad_settings_name_their_field(make, message):
  with pytest.raises(UserError, match=message):
    make()
