"""The GRPO learner: rollouts in, several clipped steps on the LoRA, metrics out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awf.grpo.advantages import Advantages, group_advantages
from awf.grpo.attention import block_attend, dense_attend, packed_block
from awf.grpo.batch import Batch, bin_size, fitted_size, make_batch
from awf.grpo.config import (
  GRPOConfig,
  OptimConfig,
  clip_by_norm,
  learning_rate_at,
  make_optimizer,
)
from awf.grpo.loss import grpo_token_loss, head_chunk, head_loss, k3, policy_terms
from awf.qwen.config import QwenConfig
from awf.qwen.looped import looped_hidden
from awf.qwen.lora import LoRAConfig, init_lora, scaled
from awf.qwen.model import Attend, Qwen, head_kernel
from awf.qwen.remat import remat_name
from awf.sharding import abstract, is_abstract, make_mesh, replicated, tree_shardings
from awf.types import Rollout

_MIN_STEPS = 8  # room for this many passes from the start, so that small batches share a shape
MLP_CHUNK = 2048  # tokens that pass the MLP at a time where layers are looped and recomputed
_ROW_TOKENS = 256  # a bin has room for grpo.micro_batch rows of this size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a step changes; donated to it."""

  lora: Any  # float32, not scaled
  opt_state: Any
  step: jax.Array  # int32, optimiser steps done
  key: jax.Array  # typed PRNG key; a new one after each step


class GRPOTrainer:
  """Group-relative policy optimisation of a LoRA on a frozen base.

  Attributes:
    state: TrainState; replace it to resume (same structure, any placement).
    traces: how often the step was traced; 1 until a longer row or a larger batch needs more room.

  Args:
    model_config: architecture and compute dtype.
    params: base parameters, shared with the sampler, never changed. Shapes (jax.ShapeDtypeStruct)
      in their place make a trainer without arrays, which can only be lowered.
    lora: adapter to train (copied), or None for a new one drawn from `key`.
    lora_config: its rank and scale.
    grpo: the objective.
    optim: the optimiser.
    mesh: rows go over its data and fsdp axes; None is one device.
    key: typed PRNG key.
    temperature: the sampler's; the policy that is trained is the tempered softmax. Truncation
      (top-k, top-p) is not modelled: ratios are those of the full softmax, on both sides.
    is_looped: one loop over the layers (awf.qwen.looped) instead of a program with all of them;
      None: on a TPU.

  Source: GRPO, arXiv:2402.03300; token-level loss and clip range of DAPO, arXiv:2503.14476.
  """

  def __init__(
    self,
    model_config: QwenConfig,
    params: Any,
    lora: Any,
    lora_config: LoRAConfig,
    grpo: GRPOConfig,
    optim: OptimConfig,
    mesh: Mesh | None,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    is_looped: bool | None = None,
  ):
    self.grpo, self.optim, self.lora_config = grpo, optim, lora_config
    self.mesh = make_mesh(1, devices=jax.devices()[:1]) if mesh is None else mesh
    self._config = model_config
    platform = self.mesh.devices.flat[0].platform
    self.is_looped = platform == "tpu" if is_looped is None else is_looped
    self._params = params
    self._bins = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    self.block = packed_block(self.mesh)  # 0: attention over all keys at once
    self._size = grpo.micro_batch * _ROW_TOKENS  # tokens per bin; grows, never shrinks; on a CPU
    # the most that `fitted_size` may choose
    self._num_steps = _MIN_STEPS  # likewise; padded steps cost a few integers
    self._optimizer = make_optimizer(optim)
    self._token_loss = partial(
      grpo_token_loss, config=grpo, temperature=temperature if temperature > 0 else 1.0
    )
    self.head_chunk = min(grpo.vocab_chunk, head_chunk(model_config.vocab_size))
    self.traces = 0

    def first_state(key: jax.Array) -> TrainState:
      init_key, key = jax.random.split(key)
      tree = init_lora(model_config, lora_config, init_key) if lora is None else lora
      return TrainState(tree, self._optimizer.init(tree), jnp.int32(0), key)

    if is_abstract(params):
      state = jax.eval_shape(first_state, key)
      self.state = abstract(state, tree_shardings(state, self.mesh))
    else:
      # A copy: the state is donated, the caller's arrays are not.
      state = jax.tree.map(jnp.copy, first_state(key))
      self.state = jax.device_put(state, tree_shardings(state, self.mesh))
    self._step = jax.jit(self._train_step, donate_argnums=0)
    self._score = jax.jit(self._score_batch)

  def update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`grpo.steps_per_batch` optimiser steps on one batch, clipped against its first log-probs.

    Rows whose gradient is zero whatever the policy (zero advantage, no KL or entropy term) are not
    computed; they count in the mean over tokens. Entropy, KL and ratio metrics are over computed
    rows and averaged over the steps.

    Returns:
      Metrics by the names of the metrics files. `skipped` is 1 when no row has a gradient: the
      state is unchanged then, and only the reward and length metrics are there.
    """
    advantages = group_advantages(
      [r.reward for r in rollouts],
      [r.group for r in rollouts],
      self.grpo.advantage,
      self.grpo.std_eps,
    )
    metrics = _rollout_metrics(rollouts, advantages)
    is_used_B = advantages.is_valid_B.copy()
    if self.grpo.mask_truncated:
      is_used_B &= ~np.array([r.truncated for r in rollouts], bool)
    total = sum(len(r.token_ids) for r, used in zip(rollouts, is_used_B, strict=True) if used)
    if not (self.grpo.beta or self.grpo.entropy_coef):
      is_used_B &= advantages.values_B != 0
    rows = [i for i in np.flatnonzero(is_used_B).tolist() if rollouts[i].token_ids]
    if not rows:
      return metrics | {"skipped": 1.0}
    batch = self._batch(rollouts, rows)
    placed = self._place(batch)
    advantage_ZBU = np.where(batch.is_target_ZBU, advantages.values_B[batch.row_ZBU], 0.0)
    data = {
      "advantage": self._place(advantage_ZBU.astype(np.float32)),
      "old_logp": self._place(np.zeros(batch.target_ZBU.shape, np.float32)),
    }
    if self.grpo.beta:
      data["ref_logp"] = self._score({}, self._params, placed)
    steps = []
    for i in range(self.grpo.steps_per_batch):
      # The first step's forward pass gives the old log-probs: there the ratio is one by definition.
      scalars = {"has_old": np.bool_(i > 0), "total": np.float32(total)}
      self.state, logp_ZBU, of_step = self._step(self.state, self._params, placed, data, scalars)
      if i == 0:
        data["old_logp"] = logp_ZBU
      steps.append(of_step)
    steps = jax.device_get(steps)
    metrics |= {k: float(np.mean([s[k] for s in steps])) for k in steps[0]}
    metrics |= _sampling_metrics(batch, rollouts, np.asarray(data["old_logp"]))
    return metrics | {"skipped": 0.0}

  def logprobs(self, rollouts: Sequence[Rollout], is_base: bool = False) -> list[np.ndarray]:
    """Log-probability of each completion token under the present policy (or the base), float32."""
    rows = [i for i, r in enumerate(rollouts) if r.token_ids]
    out = [np.zeros(len(r.token_ids), np.float32) for r in rollouts]
    if rows:
      batch = self._batch(rollouts, rows)
      lora = {} if is_base else self.state.lora
      logp_ZBU = np.asarray(self._score(lora, self._params, self._place(batch)))
      for row, column, logp in _targets(batch, logp_ZBU):
        out[row][column] = logp
    return out

  def pack(self, rollouts: Sequence[Rollout]) -> Batch[np.ndarray]:
    """The batch that all completions of `rollouts` make, on the host."""
    return self._batch(rollouts, [i for i, r in enumerate(rollouts) if r.token_ids])

  def lower(self, batch: Batch[np.ndarray]) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """Lowers the programs for batches of this one's shape; nothing is put on a device.

    Returns:
      By name, a function that traces and lowers: `update`, one optimiser step, and `logprobs`, one
      pass over the same batch.
    """
    placed = abstract(batch, self._shardings(batch))
    names = ("advantage", "old_logp", *(("ref_logp",) if self.grpo.beta else ()))
    zero = np.zeros(batch.target_ZBU.shape, np.float32)
    data = abstract(dict.fromkeys(names, zero), self._shardings(dict.fromkeys(names, zero)))
    scalars = {"has_old": np.bool_(False), "total": np.float32(1)}
    scalars = abstract(scalars, self._shardings(scalars))
    return {
      "update": lambda: self._step.lower(self.state, self._params, placed, data, scalars),
      "logprobs": lambda: self._score.lower(self.state.lora, self._params, placed),
    }

  def _batch(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> Batch[np.ndarray]:
    if self.block and self.mesh.devices.flat[0].platform == "cpu":
      size = fitted_size(rollouts, rows, self._size, self.block)
    else:
      size = self._size = bin_size([rollouts[i] for i in rows], self._size)
    batch = make_batch(rollouts, rows, size, self._bins, self._num_steps, self.block)
    self._num_steps = batch.tokens_ZBT.shape[0]
    return batch

  def _place(self, tree: Any) -> Any:
    """Host arrays to the devices: [Z, B, ...] with bins over data and fsdp, the rest whole."""
    return jax.tree.map(jax.device_put, tree, self._shardings(tree))

  def _shardings(self, tree: Any) -> Any:
    rows = NamedSharding(self.mesh, PartitionSpec(None, ("data", "fsdp")))
    whole = replicated(self.mesh)
    return jax.tree.map(lambda x: rows if np.ndim(x) > 1 else whole, tree)

  def _forward(
    self, lora: Any, base: Any, bins: Batch[jax.Array], data: Any, scalars: Any
  ) -> tuple[jax.Array, Any]:
    """Loss and per-token aux of one step's bins (leaves [B, ...])."""
    if self.block:
      attend = block_attend(bins.segments_ZBT[0], bins.parents_ZBT[0], self.block)
    else:
      attend = dense_attend(bins.segments_ZBT, bins.parents_ZBT)
    lora = scaled(lora, self.lora_config) if lora else {}
    hidden_BTD = self._hidden(lora, base, bins, attend)
    hidden_BUD = jnp.take_along_axis(hidden_BTD, bins.source_ZBU[..., None], axis=1)
    data = data | {"target": bins.target_ZBU, "is_target": bins.is_target_ZBU}
    num_targets = bins.num_targets_Z
    kernel = jax.lax.stop_gradient(head_kernel(base))
    return head_loss(
      kernel, hidden_BUD, data, scalars, num_targets, self._token_loss, self.head_chunk
    )

  def _hidden(self, lora: Any, base: Any, bins: Batch[jax.Array], attend: Attend) -> jax.Array:
    """Final hidden states [B, T, D] of one step's bins."""
    tokens, positions, remat = bins.tokens_ZBT, bins.positions_ZBT, self.grpo.remat
    if self.is_looped:
      chunk = MLP_CHUNK if remat_name(remat) == "full" else 0
      return looped_hidden(
        self._config, base, lora, tokens, positions, attend, remat=remat, mlp_chunk=chunk
      )
    variables = {"params": base} | ({"lora": lora} if lora else {})
    return Qwen(self._config, remat=remat).apply(variables, tokens, positions, attend)[0]

  def _score_batch(self, lora: Any, base: Any, batch: Batch[jax.Array]) -> jax.Array:
    """Log-probs [Z, B, U] of the targets."""
    steps = dataclasses.replace(batch, num_steps=None)
    scalars = {"has_old": jnp.bool_(False), "total": jnp.float32(1)}

    def one(z, logp_ZBU):
      bins = jax.tree.map(lambda x: x[z], steps)
      zero = jnp.zeros(bins.target_ZBU.shape, jnp.float32)
      data = {"advantage": zero, "old_logp": zero, "ref_logp": zero}
      _, aux = self._forward(lora, base, bins, data, scalars)
      return logp_ZBU.at[z].set(aux["logp"])

    with jax.named_scope("bins"):
      return jax.lax.fori_loop(0, batch.num_steps, one, jnp.zeros(batch.target_ZBU.shape))

  def _train_step(
    self, state: TrainState, base: Any, batch: Batch[jax.Array], data: Any, scalars: Any
  ):
    self.traces += 1
    steps = dataclasses.replace(batch, num_steps=None)
    loss_and_grad = jax.value_and_grad(self._forward, has_aux=True)

    def one(z, carry):
      grads, sums, logp_ZBU = carry
      bins, data_z = jax.tree.map(lambda x: x[z], (steps, data))
      (loss, aux), new = loss_and_grad(state.lora, base, bins, data_z, scalars)
      grads = jax.tree.map(jnp.add, grads, new)
      new_sums = _token_sums(aux, data_z, bins.is_target_ZBU, scalars, self.grpo)
      sums = jax.tree.map(jnp.add, sums, {"loss": loss, **new_sums})
      return grads, sums, logp_ZBU.at[z].set(aux["logp"])

    zero = jax.tree.map(jnp.zeros_like, state.lora)
    sums = dict.fromkeys(("loss", *_SUMS), jnp.float32(0))
    with jax.named_scope("bins"):
      grads, sums, logp_ZBU = jax.lax.fori_loop(
        0, batch.num_steps, one, (zero, sums, jnp.zeros(batch.target_ZBU.shape))
      )
    grads, norm = clip_by_norm(grads, self.optim.grad_clip)
    updates, opt_state = self._optimizer.update(grads, state.opt_state, state.lora)
    key, _ = jax.random.split(state.key)
    lora = optax.apply_updates(state.lora, updates)
    count = jnp.maximum(jnp.sum(batch.is_target_ZBU), 1)
    metrics = {k: v / count for k, v in sums.items()}
    metrics["loss"], metrics["policy_loss"] = (
      sums["loss"],
      sums["policy_loss"] / scalars["total"],
    )
    metrics |= {"grad_norm": norm, "learning_rate": learning_rate_at(self.optim, state.step)}
    return TrainState(lora, opt_state, state.step + 1, key), logp_ZBU, metrics


_SUMS = (
  "policy_loss",
  "entropy",
  "kl",
  "clip_ratio/low_mean",
  "clip_ratio/high_mean",
  "clip_ratio/region_mean",
)


def _token_sums(aux: dict, data: dict, is_target, scalars: dict, grpo: GRPOConfig) -> dict:
  """Sums over target tokens of the quantities in `_SUMS`."""
  old_logp = jnp.where(scalars["has_old"], data["old_logp"], aux["logp"])
  advantage = data["advantage"]
  loss, ratio = policy_terms(aux["logp"], old_logp, advantage, grpo)
  is_low = (ratio < 1 - grpo.clip_low) & (advantage < 0)
  is_high = (ratio > 1 + grpo.clip_high) & (advantage > 0)
  kl = k3(aux["logp"], data["ref_logp"]) if grpo.beta else jnp.zeros_like(loss)
  values = (loss, aux["entropy"], kl, is_low, is_high, is_low | is_high)
  sums = [jnp.sum(jnp.where(is_target, v, 0.0)) for v in values]
  return dict(zip(_SUMS, sums, strict=True))


def rollout_metrics(
  rollouts: Sequence[Rollout], advantage: str, std_eps: float
) -> dict[str, float]:
  """Reward and length metrics of rollouts that are not trained on."""
  rewards, groups = [r.reward for r in rollouts], [r.group for r in rollouts]
  return _rollout_metrics(rollouts, group_advantages(rewards, groups, advantage, std_eps))


def _rollout_metrics(rollouts: Sequence[Rollout], advantages: Advantages) -> dict[str, float]:
  """What is known before any forward pass."""
  rewards = np.array([r.reward for r in rollouts], np.float64)[advantages.is_valid_B]
  lengths = np.array([len(r.token_ids) for r in rollouts] or [0])
  metrics = {
    "reward": float(rewards.mean()) if len(rewards) else 0.0,
    "reward_std": advantages.mean_std,
    "frac_reward_zero_std": advantages.zero_std_share,
    "completions/mean_length": float(lengths.mean()),
    "completions/min_length": float(lengths.min()),
    "completions/max_length": float(lengths.max()),
    "completions/clipped_ratio": float(np.mean([r.truncated for r in rollouts] or [0.0])),
  }
  for part in sorted({name for r in rollouts for name in r.parts}):
    values = [r.parts[part] for r in rollouts if part in r.parts and np.isfinite(r.parts[part])]
    metrics[f"rewards/{part}/mean"] = float(np.mean(values)) if values else 0.0
  return metrics


def _targets(batch: Batch[np.ndarray], values_ZBU: np.ndarray):
  """(row, column, value) of each target."""
  keep = batch.is_target_ZBU
  return zip(
    batch.row_ZBU[keep].tolist(), batch.column_ZBU[keep].tolist(), values_ZBU[keep], strict=True
  )


def _sampling_metrics(
  batch: Batch[np.ndarray], rollouts: Sequence[Rollout], old_logp_ZBU: np.ndarray
) -> dict[str, float]:
  """How far the sampler's recorded log-probs are from the learner's before the first step."""
  diff = np.array(
    [
      logp - rollouts[row].logprobs[column]
      for row, column, logp in _targets(batch, old_logp_ZBU)
      if column < len(rollouts[row].logprobs)
    ],
    np.float64,
  )
  if not len(diff):
    return {}
  ratio = np.exp(diff)
  return {
    "sampling/sampling_logp_difference/mean": float(np.abs(diff).mean()),
    "sampling/sampling_logp_difference/max": float(np.abs(diff).max()),
    "sampling/importance_sampling_ratio/min": float(ratio.min()),
    "sampling/importance_sampling_ratio/mean": float(ratio.mean()),
    "sampling/importance_sampling_ratio/max": float(ratio.max()),
  }
