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
from awf.types import Rollout

CONFIG = QwenConfig(53, 32, 48, 1, 4, 2, 8, tie_word_embeddings=True)
LORA = LoRAConfig(4, 8.0)
# With a large eps a step is nearly plain descent, large enough that ratios leave the clip range.
OPTIM = OptimConfig(learning_rate=60.0, eps=1.0, grad_clip=0.0, critic_learning_rate=0.05)
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
  """The update, row after row."""

  def __init__(self, grpo, batch, sampling):
    self.c, self.batch, self.sampling = grpo, batch, sampling
    self.tokens = np.zeros((len(batch), LENGTH), np.int32)
    self.spans = []
    for i, r in enumerate(batch):
      ids = (*r.prompt_ids, *r.token_ids)
      self.tokens[i, : len(ids)] = ids
      self.spans.append((i, slice(len(r.prompt_ids) - 1, len(ids) - 1)))
    self.keep = np.ones((len(batch), LENGTH - 1, 53), bool)
    lora = world()[1]
    cut, whole, _, logits = self.forward(lora)
    if sampling.is_truncated:
      self.keep_by_rule(np.asarray(logits))
      cut, whole, _, _ = self.forward(lora)
    self.old = [np.asarray(x) for x in self.rows(cut)]
    self.ref = self.rows(self.forward(lora, uses_lora=False)[1])
    self.old_kl = [plain.kl_row(a, b, grpo.kl) for a, b in zip(self.rows(whole), self.ref)]
    self.choose()

  def forward(self, lora, uses_lora=True):
    args = self.tokens, self.keep, self.sampling.temperature
    return forward(lora, *args, uses_lora=uses_lora)

  def rows(self, x):
    return [x[i, span] for i, span in self.spans]

  def keep_by_rule(self, logits):
    for i, span in self.spans:
      for t in range(span.start, span.stop):
        rule = plain.kept_by_rule(logits[i, t], self.sampling.top_p, self.sampling.top_k)
        self.keep[i, t] = rule
        self.keep[i, t, self.tokens[i, t + 1]] = True

  def choose(self):
    """Rows in the loss, their advantages and weights."""
    c, batch = self.c, self.batch
    lengths = [len(r.token_ids) for r in batch]
    reward = np.array([r.reward + plain.overlong(n, c) for r, n in zip(batch, lengths)])
    self.in_loss = [
      np.isfinite(x) and not (c.mask_truncated and r.truncated) for x, r in zip(reward, batch)
    ]
    if c.kl_in == "reward":
      reward = reward - c.beta * np.array([np.sum(k) for k in self.old_kl])
    groups = [r.group for r in batch]
    lengths = [n * m for n, m in zip(lengths, self.in_loss)]
    advantage = plain.advantages(reward, groups, c.advantage, c.std_eps, lengths)
    self.num_rows = int(np.isfinite(reward).sum())
    if c.drop_uniform:
      uniform = [groups.count(g) == 1 or g == "g2" for g in groups]
      self.num_rows -= sum(uniform)
      self.in_loss = [m and not u for m, u in zip(self.in_loss, uniform)]
    self.advantage = [a * np.ones(n) for a, n in zip(advantage, lengths)]
    sampled = [np.array(r.logprobs) for r in batch]
    self.weight = [plain.importance_row(o, s, c) for o, s in zip(self.old, sampled)]
    self.computed = [
      m and (bool(a[0]) or c.beta > 0 and c.kl_in == "loss" or c.entropy_coef > 0)
      for m, a in zip(self.in_loss, self.advantage)
    ]

  def parts(self, cut, whole, entropy):
    """(loss, policy loss)."""
    c, policy, kl, bonus = self.c, [], [], []
    logp, whole, entropy = self.rows(cut), self.rows(whole), self.rows(entropy)
    for i in np.flatnonzero(self.in_loss):
      adv, old = jnp.asarray(self.advantage[i]), self.old[i]
      policy.append(self.weight[i] * plain.policy_row(logp[i], old, adv, c))
      kl.append(plain.kl_row(whole[i], self.ref[i], c.kl))
      bonus.append(entropy[i])
    policy_loss = plain.aggregate(policy, self.num_rows, c)
    loss = policy_loss
    if c.beta and c.kl_in == "loss":
      loss += c.beta * plain.aggregate(kl, self.num_rows, c)
    if c.entropy_coef:
      loss -= c.entropy_coef * sum(map(jnp.sum, bonus)) / sum(map(len, bonus))
    return loss, policy_loss

  def update(self):
    """(metrics averaged over the steps, Adam's first moment, LoRA)."""
    lora = world()[1]
    optimizer = make_optimizer(OPTIM)
    state, metrics = optimizer.init(lora), []
    for _ in range(self.c.steps_per_batch):
      cut, whole, entropy, _ = self.forward(lora)
      loss_of = functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
      (loss, policy_loss), d = loss_of(self.parts)(cut, whole, entropy)
      grads = pull_back(lora, self.tokens, self.keep, self.sampling.temperature, *d)
      metrics.append(self.metrics(cut, whole, entropy) | {"loss": loss, "policy_loss": policy_loss})
      metrics[-1]["grad_norm"] = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
      updates, state = optimizer.update(grads, state, lora)
      lora = optax.apply_updates(lora, updates)
    mean = {k: float(np.mean([m[k] for m in metrics])) for k in metrics[0]}
    return mean | self.sampling_metrics(), state[0].mu, lora

  def metrics(self, cut, whole, entropy):
    """Token means over the computed rows, NumPy."""
    c = self.c
    rows = np.flatnonzero(self.computed)
    low, high = [], []
    for i in rows:
      d = np.asarray(self.rows(cut)[i]) - self.old[i]
      r, a = np.exp(d.mean(keepdims=True) if c.loss == "gspo" else d), self.advantage[i]
      a = a[: len(r)]
      clips = c.loss in ("grpo", "ppo", "gspo")
      low.append((r < 1 - c.clip_low) & (a < 0) & clips)
      top = c.cispo_max if c.loss == "cispo" else 1 + c.clip_high
      high.append((r > top) & (a > 0) & (clips or c.loss == "cispo"))
    kl = [np.asarray(plain.kl_row(self.rows(whole)[i], self.ref[i], c.kl)) for i in rows]
    if c.kl_in == "reward":
      kl = [np.asarray(self.old_kl[i]) for i in rows]
    return {
      "entropy": np.mean(np.concatenate([np.asarray(self.rows(entropy)[i]) for i in rows])),
      "kl": np.mean(np.concatenate(kl)) if c.beta else 0.0,
      "clip_ratio/low_mean": np.mean(np.concatenate(low)),
      "clip_ratio/high_mean": np.mean(np.concatenate(high)),
      "clip_ratio/region_mean": np.mean(np.concatenate(low) | np.concatenate(high)),
    }

  def sampling_metrics(self):
    rows = np.flatnonzero(self.computed)
    diff = np.concatenate([self.old[i] - np.array(self.batch[i].logprobs) for i in rows])
    ratio = np.exp(diff)
    if self.c.importance != "none":
      ratio = np.concatenate([self.weight[i] for i in rows])
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
  batch = batch or rollouts()
  learner = trainer(grpo, sampling)
  got = learner.update(batch)
  want, moment, lora = Plain(grpo, batch, sampling or Sampling()).update()
  assert float(np.abs(flat(lora) - flat(world()[1])).max()) > 1e-2
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
