"""Every algorithm in the real learner against a plain reading of it on whole logits.

Gradients are compared, not Adam's steps: its first moment after one step is 0.1 times the gradient.
"""

import dataclasses
import functools

import grpo_reference as plain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awf.grpo.config import GRPOConfig, OptimConfig, make_optimizer
from awf.grpo.objective import Sampling
from awf.grpo.trainer import GRPOTrainer
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora, scaled
from awf.qwen.model import Qwen, head, init_params
from awf.sharding import make_mesh
from awf.types import Rollout

CONFIG = QwenConfig(53, 32, 48, 1, 4, 2, 8, tie_word_embeddings=True)
LORA = LoRAConfig(4, 8.0)
# With a large eps a step is nearly plain descent, large enough that ratios leave the clip range.
OPTIM = OptimConfig(learning_rate=20.0, eps=1.0, grad_clip=0.0, critic_learning_rate=0.05)
GRPO = GRPOConfig(group_size=4, micro_batch=2, steps_per_batch=2, horizon=24)
LENGTH = 64


@functools.cache
def world():
  params = init_params(CONFIG, jax.random.key(0))
  params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
  noise = np.random.default_rng(0)
  lora = init_lora(CONFIG, LORA, jax.random.key(1))
  lora = jax.tree.map(lambda x: x + 0.05 * noise.standard_normal(x.shape, np.float32), lora)
  return params, lora


@functools.cache
def rollouts(spread=0.2):
  """Three groups of four and one of one; a lost reward, a uniform group, a row of one token."""
  rng = np.random.default_rng(5)
  found = []
  for i in range(13):
    prompt = tuple(np.random.default_rng(i // 4).integers(0, 53, 5 + i // 4).tolist())
    n = 1 if i == 6 else int(rng.integers(2, 24))
    ids = tuple(rng.integers(0, 53, n).tolist())
    reward = float("nan") if i == 3 else 0.5 if 8 <= i < 12 else float(rng.random())
    found.append(Rollout(f"g{i // 4}", prompt, ids, (0.0,) * n, reward, {}, n > 18))
  logps = trainer(GRPO).logprobs(found)
  near = [p + spread * rng.standard_normal(len(p)) for p in logps]
  return [
    dataclasses.replace(r, logprobs=tuple(map(float, p))) for r, p in zip(found, near, strict=True)
  ]


def trainer(grpo, sampling=None, **kwargs):
  params, lora = world()
  how = (sampling or Sampling())._asdict()
  return GRPOTrainer(
    CONFIG, params, lora, LORA, grpo, OPTIM, kwargs.pop("mesh", None), jax.random.key(7), **how
  )


@functools.cache
def compiled(grpo, sampling):
  """(learner, its first state)."""
  learner = trainer(grpo, sampling)
  return learner, jax.tree.map(jnp.copy, learner.state)


def restarted(grpo, sampling):
  """A learner at its start; those of the same settings share what is compiled."""
  learner, start = compiled(grpo, sampling)
  learner.state = jax.tree.map(jnp.copy, start)
  return learner


# The plain algorithm


@functools.partial(jax.jit, static_argnames="uses_lora")
def forward(lora, tokens_BT, keep_BTV, temperature, uses_lora=True):
  """(log-probs cut to `keep`, log-probs, entropies, tempered logits) of tokens[:, 1:]."""
  params = world()[0]
  variables = {"params": params} | ({"lora": scaled(lora, LORA)} if uses_lora else {})
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  hidden, _ = Qwen(CONFIG).apply(variables, tokens_BT, positions)
  logits = head(params, hidden)[:, :-1] / temperature
  whole = jax.nn.log_softmax(logits)
  cut = jax.nn.log_softmax(jnp.where(keep_BTV, logits, -1e30))
  index = tokens_BT[:, 1:, None]
  chosen = [jnp.take_along_axis(x, index, 2)[..., 0] for x in (cut, whole)]
  return *chosen, -jnp.sum(jnp.exp(whole) * whole, axis=-1), logits


@jax.jit
def pull_back(lora, tokens_BT, keep_BTV, temperature, d_cut, d_whole, d_entropy):
  """LoRA gradient of sums of log-probs and entropies with these weights."""

  def outputs(lora):
    return forward(lora, tokens_BT, keep_BTV, temperature)[:3]

  return jax.vjp(outputs, lora)[1]((d_cut, d_whole, d_entropy))[0]


class Plain:
  """The update on padded rows; mask and numbers [B, T] of tokens[:, 1:]."""

  def __init__(self, grpo, batch, sampling):
    self.c, self.batch, self.sampling = grpo, batch, sampling
    self.tokens = np.zeros((len(batch), LENGTH), np.int32)
    self.mask, self.sampled = np.zeros((2, len(batch), LENGTH - 1), np.float32)
    for i, r in enumerate(batch):
      ids, start = (*r.prompt_ids, *r.token_ids), len(r.prompt_ids) - 1
      self.tokens[i, : len(ids)] = ids
      self.mask[i, start : len(ids) - 1] = 1
      self.sampled[i, start : len(ids) - 1] = r.logprobs
    self.keep = np.ones((len(batch), LENGTH - 1, 53), bool)
    lora = world()[1]
    self.old, whole, _, logits = map(np.asarray, self.forward(lora))
    if sampling.is_truncated:
      self.keep_by_rule(logits)
      self.old = np.asarray(self.forward(lora)[0])
    self.ref = np.asarray(self.forward(lora, uses_lora=False)[1])
    self.old_kl = np.asarray(plain.kl(whole, self.ref, grpo.kl)) * self.mask
    self.choose()

  def forward(self, lora, uses_lora=True):
    args = self.tokens, self.keep, self.sampling.temperature
    return forward(lora, *args, uses_lora=uses_lora)

  def keep_by_rule(self, logits):
    for i, t in np.argwhere(self.mask):
      rule = plain.kept_by_rule(logits[i, t], *self.sampling[1:])
      self.keep[i, t] = rule
      self.keep[i, t, self.tokens[i, t + 1]] = True

  def choose(self):
    """Rows in the loss, their advantages and weights."""
    c, batch = self.c, self.batch
    lengths = np.array([len(r.token_ids) for r in batch])
    reward = np.array([r.reward for r in batch]) + [plain.overlong(n, c) for n in lengths]
    in_loss = np.isfinite(reward)
    if c.mask_truncated:
      in_loss &= [not r.truncated for r in batch]
    if c.kl_in == "reward":
      reward = reward - c.beta * self.old_kl.sum(1)
    groups = [r.group for r in batch]
    advantage = plain.advantages(reward, groups, c.advantage, c.std_eps, lengths * in_loss)
    self.num_rows = int(np.isfinite(reward).sum())
    if c.drop_uniform:
      uniform = np.array([groups.count(g) == 1 or g == "g2" for g in groups])
      self.num_rows -= int(uniform.sum())
      in_loss &= ~uniform
    self.set_rows(in_loss, (advantage * in_loss)[:, None] + 0 * self.mask)

  def set_rows(self, in_loss, advantage):
    c = self.c
    self.advantage = advantage.astype(np.float32)
    self.in_loss = self.mask * in_loss[:, None]
    self.weight = np.ones_like(self.mask)
    for i, m in enumerate(self.mask > 0):
      self.weight[i, m] = plain.importance_row(self.old[i, m], self.sampled[i, m], c)
    everything = (c.beta > 0 and c.kl_in == "loss") or c.entropy_coef > 0
    moves = np.any(self.advantage * self.mask != 0, axis=1) | everything
    self.computed = (self.in_loss * moves[:, None]) > 0

  def parts(self, cut, whole, entropy):
    """(loss, policy loss)."""
    c = self.c
    policy = self.weight * plain.policy(cut, self.old, self.advantage, self.mask, c)
    policy_loss = plain.aggregate(policy, self.in_loss, self.num_rows, c)
    loss = policy_loss
    if c.beta and c.kl_in == "loss":
      kl = plain.kl(whole, self.ref, c.kl)
      loss += c.beta * plain.aggregate(kl, self.in_loss, self.num_rows, c)
    if c.entropy_coef:
      loss -= c.entropy_coef * jnp.sum(entropy * self.in_loss) / self.in_loss.sum()
    return loss, policy_loss

  def update(self):
    """(metrics averaged over the steps, Adam's first moment, LoRA)."""
    lora = world()[1]
    optimizer = make_optimizer(OPTIM)
    state, metrics = optimizer.init(lora), []
    for _ in range(self.c.steps_per_batch):
      cut, whole, entropy, _ = self.forward(lora)
      loss_of = jax.value_and_grad(self.parts, argnums=(0, 1, 2), has_aux=True)
      (loss, policy_loss), d = loss_of(cut, whole, entropy)
      grads = pull_back(lora, self.tokens, self.keep, self.sampling.temperature, *d)
      metrics.append(self.metrics(cut, whole, entropy) | {"loss": loss, "policy_loss": policy_loss})
      metrics[-1]["grad_norm"] = np.sqrt(np.sum(flat(grads) ** 2))
      updates, state = optimizer.update(grads, state, lora)
      lora = optax.apply_updates(lora, updates)
    mean = {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0]}
    return mean | self.sampling_metrics(), state[0].mu, lora

  def metrics(self, cut, whole, entropy):
    """Token means over the computed rows, NumPy."""
    c, on = self.c, self.computed
    d = np.asarray(cut) - self.old
    share = on.astype(float)
    if c.loss == "gspo":  # a ratio belongs to a row
      d = np.sum(d * self.mask, axis=1, keepdims=True) / self.mask.sum(1, keepdims=True) + 0 * d
      share = share / self.mask.sum(1, keepdims=True)
    r, clips = np.exp(d), c.loss in ("grpo", "ppo", "gspo")
    low = (r < 1 - c.clip_low) & (self.advantage < 0) & clips
    high = r > (c.cispo_max if c.loss == "cispo" else 1 + c.clip_high)
    high = high & (self.advantage > 0) & (clips or c.loss == "cispo")
    kl = np.asarray(plain.kl(whole, self.ref, c.kl)) if c.kl_in == "loss" else self.old_kl
    return {
      "entropy": np.asarray(entropy)[on].mean(),
      "kl": kl[on].mean() if c.beta else 0.0,
      "clip_ratio/low_mean": np.average(low, weights=share),
      "clip_ratio/high_mean": np.average(high, weights=share),
      "clip_ratio/region_mean": np.average(low | high, weights=share),
    }

  def sampling_metrics(self):
    diff = (self.old - self.sampled)[self.computed]
    ratio = np.exp(diff) if self.c.importance == "none" else self.weight[self.computed]
    name = "sampling/importance_sampling_ratio"
    return {
      "sampling/sampling_logp_difference/mean": np.abs(diff).mean(),
      "sampling/sampling_logp_difference/max": np.abs(diff).max(),
      f"{name}/min": ratio.min(),
      f"{name}/mean": ratio.mean(),
      f"{name}/max": ratio.max(),
    }


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def assert_equals_plain(grpo, sampling=None, batch=None):
  batch, sampling = batch or rollouts(), sampling or Sampling()
  learner = restarted(grpo, sampling)
  got = learner.update(batch)
  want, moment, lora = Plain(grpo, batch, sampling).update()
  assert float(np.abs(flat(lora) - flat(world()[1])).max()) > 3e-3
  np.testing.assert_allclose(flat(learner.state.opt_state[0].mu), flat(moment), atol=1e-5)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, atol=2e-5, rtol=1e-4, err_msg=name)
  return got


KINDS = ("dr_grpo", "batch", "rloo", "reinforce_plus_plus_baseline", "maxrl", "opo")
CASES = {
  **{kind: {"advantage": kind} for kind in KINDS},
  "sequence_mean": {"aggregation": "sequence_mean", "mask_truncated": True},
  "sequence_sum": {"aggregation": "sequence_sum", "beta": 0.1, "kl": "k2"},
  "constant": {"aggregation": "constant", "drop_uniform": True},
  "dual": {"dual_clip": 1.05, "ratio_max": 1.5},
  "gspo": {"loss": "gspo", "clip_low": 0.02, "clip_high": 0.03, "beta": 0.1, "kl": "k1"},
  "gspo_token_weights": {"loss": "gspo", "importance": "token_truncate", "entropy_coef": 0.05},
  "cispo": {"loss": "cispo", "cispo_max": 1.1, "importance": "token_mask", "importance_min": 0.8},
  "sapo": {"loss": "sapo", "importance": "sequence_truncate", "importance_max": 1.5},
  "reinforce": {"loss": "reinforce", "steps_per_batch": 1, "importance": "sequence_mask"},
  "kl_in_reward": {"kl_in": "reward", "beta": 0.05, "kl": "k1"},
  "overlong": {"overlong_buffer": 16, "overlong_penalty": 0.7, "entropy_coef": 0.02},
}


@pytest.mark.parametrize("name", CASES)
def test_update_equals_the_plain_algorithm(name):
  assert_equals_plain(dataclasses.replace(GRPO, **CASES[name]))


@pytest.mark.parametrize("cuts", [(0.8, 30, 0.0), (1.0, 0, 0.3), (0.95, 40, 0.2)], ids=str)
def test_truncated_sampling_keeps_the_support_of_the_old_policy(cuts):
  sampling = Sampling(0.9, *cuts)
  grpo = dataclasses.replace(GRPO, beta=0.05, importance="token_truncate")
  got = assert_equals_plain(grpo, sampling)
  whole = restarted(grpo, Sampling(0.9)).update(rollouts())
  assert abs(got["policy_loss"] - whole["policy_loss"]) > 1e-4
  # A ratio of the whole softmax against what the sampler recorded is biased; this one is not.
  name = "sampling/sampling_logp_difference/mean"
  exact = [
    dataclasses.replace(r, logprobs=tuple(p.tolist()))
    for r, p in zip(rollouts(), restarted(grpo, sampling).logprobs(rollouts()), strict=True)
  ]
  plain_softmax = restarted(grpo, Sampling(0.9)).update(exact)
  assert restarted(grpo, sampling).update(exact)[name] < 1e-6 < 0.1 < plain_softmax[name]
  gspo = dataclasses.replace(GRPO, loss="gspo", importance="token_mask")
  assert_equals_plain(gspo, sampling)


def test_gae_trains_policy_and_critic_as_the_plain_algorithm():
  grpo = dataclasses.replace(GRPO, advantage="gae", gamma=0.98, lam=0.9, beta=0.02, kl_in="reward")
  batch, learner = rollouts(), trainer(grpo)
  reference, losses = Plain(grpo, batch, Sampling()), []
  on = reference.mask * np.isfinite([r.reward for r in batch])[:, None] > 0
  hidden = np.asarray(base_hidden(reference.tokens)[:, :-1])
  hidden = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + 1e-6)
  head = {"kernel": jnp.zeros(32), "bias": jnp.zeros(())}
  adam = optax.adam(OPTIM.critic_learning_rate, OPTIM.b1, OPTIM.b2, OPTIM.eps)
  adam_state = adam.init(head)
  for _ in range(2):  # the second batch meets values that are not zero
    old_value = hidden @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    advantage, returns = np.zeros_like(old_value), np.zeros_like(old_value)
    for i, r in enumerate(batch):
      if np.isfinite(r.reward):
        rewards = -grpo.beta * reference.old_kl[i, on[i]]
        rewards[-1] += r.reward
        found = plain.gae_row(rewards, old_value[i, on[i]], grpo.gamma, grpo.lam)
        advantage[i, on[i]], returns[i, on[i]] = found
    advantage[on] = plain.whiten([advantage[on]])[0]
    if not losses:
      reference.set_rows(on.any(1), advantage)
      moment = reference.update()[1]

    def value_loss(head, old_value=old_value, returns=returns):
      v = hidden @ head["kernel"] + head["bias"]
      near = jnp.minimum(jnp.maximum(v, old_value - 0.5), old_value + 0.5)
      terms = jnp.maximum((v - returns) ** 2, (near - returns) ** 2) / 2
      return jnp.sum(jnp.where(on, terms, 0.0)) / on.sum()

    got = learner.update(batch)
    if not losses:
      np.testing.assert_allclose(flat(learner.state.opt_state[0].mu), flat(moment), atol=1e-5)
      learner.state = dataclasses.replace(learner.state, lora=jax.tree.map(jnp.copy, world()[1]))
    for _ in range(2):
      loss, grads = jax.value_and_grad(value_loss)(head)
      updates, adam_state = adam.update(grads, adam_state, head)
      head = optax.apply_updates(head, updates)
      losses.append(float(loss))
    assert got["value_loss"] == pytest.approx(np.mean(losses[-2:]), rel=1e-4)
  critic = learner.state.extra["critic"]["head"]
  np.testing.assert_allclose(critic["kernel"], head["kernel"], atol=1e-4)
  assert losses[-1] < 0.8 * losses[0]


@jax.jit
def base_hidden(tokens_BT):
  positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  return Qwen(CONFIG).apply({"params": world()[0]}, tokens_BT, positions)[0]


def test_adaptive_entropy_moves_its_coefficient_towards_the_target():
  grpo = dataclasses.replace(
    GRPO, steps_per_batch=1, entropy_coef=0.1, entropy_target=5.0, entropy_delta=0.2
  )
  learner, batch = trainer(grpo), rollouts()
  first = learner.update(batch)
  # No entropy is known before the first step, so nothing is applied to it.
  assert first["entropy"] < 5 and first["loss"] == pytest.approx(first["policy_loss"])
  np.testing.assert_allclose(learner.state.extra["entropy"], [0.3, first["entropy"]], rtol=1e-5)
  second = learner.update(batch)
  assert second["entropy_coef"] == pytest.approx(0.3)
  bonus = second["policy_loss"] - second["loss"]
  assert bonus == pytest.approx(0.3 * second["entropy"], rel=1e-4)
  learner.grpo = dataclasses.replace(grpo, entropy_target=0.1)
  high = trainer(learner.grpo)
  high.update(batch)
  assert float(high.state.extra["entropy"][0]) == 0.0  # 0.1 - 0.2, not below entropy_min


@pytest.mark.parametrize("name", ["grpo", "gspo", "gae"])
def test_micro_batches_change_nothing(name):
  settings = {
    "grpo": {"aggregation": "sequence_mean", "beta": 0.1, "importance": "sequence_truncate"},
    "gspo": {"loss": "gspo", "clip_low": 0.05, "clip_high": 0.05, "entropy_coef": 0.01},
    "gae": {"advantage": "gae"},
  }
  many = [
    dataclasses.replace(
      r, prompt_ids=(*r.prompt_ids, k), group=f"{r.group}{k}", reward=r.reward * k
    )
    for k in range(1, 5)
    for r in rollouts()
  ]
  found = {}
  for rows in (1, 8):
    grpo = dataclasses.replace(GRPO, micro_batch=rows, **settings[name])
    learner = trainer(grpo)
    found[rows] = learner.update(many), flat(learner.state.opt_state[0].mu)
  np.testing.assert_allclose(found[1][1], found[8][1], atol=1e-5)
  for key, value in found[8][0].items():
    np.testing.assert_allclose(found[1][0][key], value, atol=1e-5, rtol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["gspo", "gae"])
def test_devices_change_nothing(name):
  settings = {
    "gspo": {"loss": "gspo", "importance": "sequence_truncate", "beta": 0.1},
    "gae": {"advantage": "gae", "importance": "token_mask"},
  }
  grpo, cut = dataclasses.replace(GRPO, **settings[name]), Sampling(0.9, 0.9, 0)
  mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  one, four = trainer(grpo, cut), trainer(grpo, cut, mesh=mesh)
  want, got = one.update(rollouts()), four.update(rollouts())
  moments = (flat(jax.device_get(t.state.opt_state[0].mu)) for t in (one, four))
  np.testing.assert_allclose(*moments, atol=1e-5)
  for key, value in want.items():
    np.testing.assert_allclose(got[key], value, atol=2e-5, rtol=1e-4, err_msg=key)
