"""What the host knows of a batch of rollouts before its first step: rewards, weights, layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from awf.grpo.advantages import gae, group_advantages, overlong_penalty, row_weights
from awf.grpo.batch import Batch
from awf.grpo.config import GRPOConfig
from awf.types import Rollout


class Layout:
  """Values of all completion tokens of a list of rollouts, end to end, and laid into a batch.

  Attributes:
    length_B: tokens of each completion.
  """

  def __init__(self, rollouts: Sequence[Rollout]):
    self.length_B = np.array([len(r.token_ids) for r in rollouts], np.int64)
    self._start_B = np.cumsum(self.length_B) - self.length_B
    self.size = int(self.length_B.sum())

  def repeat(self, value_B: np.ndarray) -> np.ndarray:
    """A value of each row on each of its tokens, [n]."""
    return np.repeat(value_B, self.length_B)

  def row_sums(self, value_n: np.ndarray) -> np.ndarray:
    """Sum over each row's tokens, float64 [B]."""
    sums = np.cumsum(np.concatenate([[0.0], value_n]))
    return sums[self._start_B + self.length_B] - sums[self._start_B]

  def _index(self, batch: Batch[np.ndarray]) -> np.ndarray:
    return self._start_B[batch.row_ZBU] + batch.column_ZBU

  def into(self, batch: Batch[np.ndarray], value_n: np.ndarray) -> np.ndarray:
    """float32 [Z, B, U], 0 where there is no target."""
    found = np.zeros(batch.target_ZBU.shape, np.float32)
    keep = batch.is_target_ZBU
    found[keep] = value_n[self._index(batch)[keep]]
    return found

  def out_of(self, batch: Batch[np.ndarray], value_ZBU: np.ndarray) -> np.ndarray:
    """[n], 0 for tokens that are not in the batch."""
    found = np.zeros(self.size)
    keep = batch.is_target_ZBU
    found[self._index(batch)[keep]] = value_ZBU[keep]
    return found

  def is_in(self, batch: Batch[np.ndarray]) -> np.ndarray:
    """bool [n]: tokens that are targets of the batch."""
    return self.out_of(batch, batch.is_target_ZBU) > 0

  def table(self, value_n: np.ndarray) -> np.ndarray:
    """[B, T], 0 behind the end of a row."""
    found = np.zeros((len(self.length_B), max(int(self.length_B.max(initial=0)), 1)))
    found[self.mask] = value_n
    return found

  @property
  def mask(self) -> np.ndarray:
    """bool [B, T]: tokens of the table."""
    width = max(int(self.length_B.max(initial=0)), 1)
    return np.arange(width)[None] < self.length_B[:, None]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a batch is trained with."""

  rows: list[int]  # rollouts that are computed
  advantage_n: np.ndarray  # of each token (`Layout`)
  weight_n: np.ndarray  # of each token in the aggregation
  total: float  # trained tokens, those of rows without a gradient among them
  return_n: np.ndarray | None = None  # of each token, for the critic


def shaped_rewards(rollouts: Sequence[Rollout], grpo: GRPOConfig) -> tuple[np.ndarray, np.ndarray]:
  """(rewards with the penalty of overlong completions, the penalties), float64 [B]."""
  reward_B = np.array([r.reward for r in rollouts], np.float64)
  lengths = [len(r.token_ids) for r in rollouts]
  extra_B = overlong_penalty(lengths, grpo.horizon, grpo.overlong_buffer, grpo.overlong_penalty)
  return reward_B + extra_B, extra_B


def is_trained(rollouts: Sequence[Rollout], grpo: GRPOConfig) -> np.ndarray:
  """bool [B]: rows that may be in the loss; those without a reward or cut off are not."""
  is_valid_B = np.isfinite(np.array([r.reward for r in rollouts], np.float64))
  if grpo.mask_truncated:
    is_valid_B &= ~np.array([r.truncated for r in rollouts], bool)
  return is_valid_B & np.array([len(r.token_ids) > 0 for r in rollouts], bool)


def make_plan(
  rollouts: Sequence[Rollout],
  layout: Layout,
  grpo: GRPOConfig,
  reward_B: np.ndarray,
  kl_n: np.ndarray | None = None,
  value_n: np.ndarray | None = None,
) -> Plan:
  """Advantages and weights of every token.

  Args:
    rollouts: all rows of the batch.
    layout: of `rollouts`.
    grpo: the objective.
    reward_B: shaped rewards; NaN for rows without one.
    kl_n: KL of each token, taken from the rewards (beta times); None takes nothing.
    value_n: the critic's values, for advantage "gae".

  """
  is_trained_B = is_trained(rollouts, grpo)
  is_valid_B = np.isfinite(reward_B)
  groups = [r.group for r in rollouts]
  length_B = layout.length_B * is_trained_B
  cost_n = np.zeros(layout.size) if kl_n is None else grpo.beta * kl_n
  kind = "dr_grpo" if grpo.has_critic else grpo.advantage
  net_B = reward_B - layout.row_sums(cost_n)
  found = group_advantages(net_B, groups, kind, grpo.std_eps, length_B)
  if grpo.drop_uniform:
    is_trained_B, is_valid_B = is_trained_B & ~found.is_uniform_B, is_valid_B & ~found.is_uniform_B
    length_B = layout.length_B * is_trained_B
  advantage_n, return_n = layout.repeat(found.values_B), None
  if value_n is not None:
    advantage_n, return_n = _from_critic(layout, grpo, reward_B, cost_n, value_n, is_trained_B)
  weight_B = row_weights(length_B, int(is_valid_B.sum()), grpo.aggregation, grpo.horizon)
  is_used_B = is_trained_B.copy()
  if not (grpo.has_kl_in_loss or grpo.has_entropy or grpo.has_critic):
    is_used_B &= found.values_B != 0
  return Plan(
    np.flatnonzero(is_used_B).tolist(),
    advantage_n * layout.repeat(is_trained_B),
    layout.repeat(weight_B * is_trained_B),
    float(length_B.sum()),
    return_n,
  )


def _from_critic(layout, grpo, reward_B, cost_n, value_n, is_trained_B):
  """(advantages, returns) of each token; the outcome's reward sits on the last token of a row."""
  mask_BT = layout.mask
  reward_BT = -layout.table(cost_n)
  rows = np.flatnonzero(layout.length_B > 0)
  reward_BT[rows, layout.length_B[rows] - 1] += np.where(is_trained_B, reward_B, 0.0)[rows]
  is_counted_BT = mask_BT & is_trained_B[:, None]
  found = gae(reward_BT, layout.table(value_n), is_counted_BT, grpo.gamma, grpo.lam)
  return tuple(x[mask_BT] for x in found)


def rollout_metrics(rollouts: Sequence[Rollout], grpo: GRPOConfig) -> dict[str, float]:
  """Reward and length metrics: what is known without any forward pass."""
  reward_B, extra_B = shaped_rewards(rollouts, grpo)
  advantages = group_advantages(reward_B, [r.group for r in rollouts], "dr_grpo")
  rewards = reward_B[np.isfinite(reward_B)]
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
  if grpo.overlong_buffer:
    metrics["rewards/overlong/mean"] = float(extra_B.mean()) if len(extra_B) else 0.0
  return metrics


def sampler_logps(rollouts: Sequence[Rollout], layout: Layout) -> np.ndarray:
  """What the sampler recorded for each token, float64 [n]; NaN where it recorded nothing."""
  found = np.full(layout.size, np.nan)
  start = 0
  for rollout in rollouts:
    logps = rollout.logprobs[: len(rollout.token_ids)]
    found[start : start + len(logps)] = logps
    start += len(rollout.token_ids)
  return found


def sampling_metrics(
  old_logp: np.ndarray, sampler_logp: np.ndarray, weight: np.ndarray | None
) -> dict[str, float]:
  """How far the sampler's recorded log-probs are from the learner's before the first step.

  Args:
    old_logp: the learner's, of the computed tokens.
    sampler_logp: the sampler's; NaN where it recorded none.
    weight: what the correction multiplies the losses with; None is no correction, then the ratio
      itself is described.
  """
  is_known = ~np.isnan(sampler_logp)
  if not is_known.any():
    return {}
  diff = (old_logp - sampler_logp)[is_known].astype(np.float64)
  ratio = np.exp(diff) if weight is None else weight[is_known].astype(np.float64)
  return {
    "sampling/sampling_logp_difference/mean": float(np.abs(diff).mean()),
    "sampling/sampling_logp_difference/max": float(np.abs(diff).max()),
    "sampling/importance_sampling_ratio/min": float(ratio.min()),
    "sampling/importance_sampling_ratio/mean": float(ratio.mean()),
    "sampling/importance_sampling_ratio/max": float(ratio.max()),
  }
