"""Advantages on the host: relative to a group of any size, or from a critic's values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from awf.grpo_config import ADVANTAGES
from awf.types import UserError

GROUP_KINDS = tuple(kind for kind in ADVANTAGES if kind != "gae")
_WHITEN_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class Advantages:
  """Advantages of a batch and what its groups look like."""

  values_B: np.ndarray  # float64; 0 for rows without a valid reward
  is_valid_B: np.ndarray  # bool: the reward is a number
  is_uniform_B: np.ndarray  # bool: the valid rewards of the row's group are all alike
  mean_std: float  # mean over groups of the standard deviation (n - 1); 0 for groups of one
  zero_std_share: float  # share of groups whose valid rewards are all alike


def group_advantages(
  rewards: Sequence[float] | np.ndarray,
  groups: Sequence[str],
  kind: str = "grpo",
  std_eps: float = 1e-4,
  lengths: Sequence[int] | np.ndarray | None = None,
) -> Advantages:
  """What a row's reward is worth beside those of its group.

  Args:
    rewards: one per row; NaN marks a row without a reward, left out of every mean and deviation.
    groups: one label per row; equal labels share a baseline.
    kind: with the mean and the standard deviation (n - 1) of the group's rewards,
      "grpo" (R - mean) / (std + std_eps); "dr_grpo" R - mean;
      "batch" (R - mean) / (std of the whole batch + std_eps);
      "rloo" R - mean of the others; "maxrl" (R - mean) / mean, 0 where the mean is not positive;
      "opo" R - (mean weighted by length); "reinforce_plus_plus_baseline" R - mean, whitened over
      the tokens of the batch.
    std_eps: see `kind`.
    lengths: trained tokens of each row (0 where it is masked), for "opo" and
      "reinforce_plus_plus_baseline"; None counts every row once.

  Returns:
    Advantages. A group of one valid row, or whose rewards are all alike, is exactly zero before
    the whitening.

  Raises:
    ValueError: unknown kind, or lengths that differ.

  Source: GRPO, arXiv:2402.03300, section 4.1.2; Dr. GRPO, arXiv:2503.20783; RLOO,
    arXiv:2402.14740; REINFORCE++, arXiv:2501.03262; OPO, arXiv:2505.23585; "batch" as TRL's
    scale_rewards.
  """
  if kind not in GROUP_KINDS:
    raise UserError(f"config.grpo.advantage: expected one of {GROUP_KINDS}, got {kind!r}")
  if len(rewards) != len(groups):
    raise ValueError(f"expected one group per reward, got {len(groups)} for {len(rewards)}")
  reward_B = np.asarray(rewards, np.float64)
  length_B = np.ones(len(reward_B)) if lengths is None else np.asarray(lengths, np.float64)
  is_valid_B = np.isfinite(reward_B)
  values_B, is_uniform_B = np.zeros(len(reward_B)), np.zeros(len(reward_B), bool)
  group_B, stds = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1], []
  for group in dict.fromkeys(group_B.tolist()):
    rows = np.flatnonzero((group_B == group) & is_valid_B)
    reward_G = reward_B[rows]
    if len(rows) < 2 or np.all(reward_G == reward_G[0]):
      is_uniform_B[group_B == group] = True
      stds.append(0.0)
      continue
    stds.append(float(reward_G.std(ddof=1)))
    values_B[rows] = _of_group(reward_G, length_B[rows], kind, stds[-1] + std_eps)
  if kind == "batch" and is_valid_B.sum() > 1:
    values_B /= reward_B[is_valid_B].std(ddof=1) + std_eps
  if kind == "reinforce_plus_plus_baseline":
    values_B = np.where(is_valid_B, _whiten(values_B, length_B * is_valid_B), 0.0)
  mean_std = float(np.mean(stds)) if stds else 0.0
  zero_share = float(np.mean([s == 0 for s in stds])) if stds else 1.0
  return Advantages(values_B, is_valid_B, is_uniform_B, mean_std, zero_share)


def _of_group(reward_G: np.ndarray, length_G: np.ndarray, kind: str, scale: float) -> np.ndarray:
  """Advantages of one group of at least two rewards that are not all alike."""
  mean, size = reward_G.mean(), len(reward_G)
  if kind == "grpo":
    return (reward_G - mean) / scale
  if kind == "rloo":
    return (reward_G - mean) * (size / (size - 1))
  if kind == "maxrl":
    return (reward_G - mean) / mean if mean > 0 else np.zeros(size)
  if kind == "opo":
    total = length_G.sum()
    return reward_G - (length_G @ reward_G / total if total else mean)
  return reward_G - mean


def _whiten(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
  """Mean 0 and variance 1 (n - 1) over what the weights count; 0 when they count less than two."""
  total = weight.sum()
  if total < 2:
    return np.zeros_like(values)
  mean = (weight * values).sum() / (total + _WHITEN_EPS)
  centred = values - mean
  variance = (weight * centred**2).sum() / (total + _WHITEN_EPS) * total / (total - 1)
  return centred / np.sqrt(variance + _WHITEN_EPS)


def gae(
  reward_BT: np.ndarray, value_BT: np.ndarray, mask_BT: np.ndarray, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
  """Generalised advantage estimation over tokens; masked tokens are skipped.

  Args:
    reward_BT: float [B, T], of each token; an outcome reward sits on the row's last token.
    value_BT: float [B, T], the critic's estimate before each token.
    mask_BT: bool or 0/1 [B, T], tokens that count.
    gamma: discount in [0, 1].
    lam: weight of longer returns in [0, 1].

  Returns:
    (advantages whitened over the counted tokens, returns = advantages + values before the
    whitening), both [B, T] in the values' dtype; meaningless where masked.

  Source: GAE, arXiv:1506.02438, eq. 16; the skipping of masked tokens and the whitening as verl's
    compute_gae_advantage_return.
  """
  mask_BT = np.asarray(mask_BT, value_BT.dtype)
  advantage_BT = np.zeros_like(value_BT)
  next_value_B, last_B = np.zeros_like(value_BT[:, 0]), np.zeros_like(value_BT[:, 0])
  for t in reversed(range(value_BT.shape[1])):
    delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
    m_B = mask_BT[:, t]
    last_B = m_B * (delta_B + gamma * lam * last_B) + (1 - m_B) * last_B
    next_value_B = m_B * value_BT[:, t] + (1 - m_B) * next_value_B
    advantage_BT[:, t] = last_B
  return _whiten(advantage_BT, mask_BT), advantage_BT + value_BT


def overlong_penalty(
  lengths: Sequence[int] | np.ndarray, horizon: int, buffer: int, penalty: float
) -> np.ndarray:
  """What a completion's length takes from its reward: 0 up to horizon - buffer, then linear.

  Args:
    lengths: tokens of each completion.
    horizon: the longest completion, tokens.
    buffer: tokens over which the penalty grows; 0 is off.
    penalty: taken at the horizon and beyond.

  Returns:
    float64 [B], not positive.

  Source: DAPO, arXiv:2503.14476, eq. 13.
  """
  length_B = np.asarray(lengths, np.float64)
  if not buffer:
    return np.zeros(len(length_B))
  return -penalty * np.clip((length_B - (horizon - buffer)) / buffer, 0.0, 1.0)


def row_weights(
  lengths: Sequence[int] | np.ndarray, num_rows: int, kind: str, horizon: int
) -> np.ndarray:
  """Weight of each token of a row in the mean over the batch: every aggregation is such a sum.

  The weights are made of the whole batch, so micro-batches and devices cannot change them.

  Args:
    lengths: trained tokens of each row of the batch, 0 where a row is masked.
    num_rows: rows that count in a mean over rows; masked and empty rows among them.
    kind: "token_mean" 1 / sum of lengths; "sequence_mean" 1 / (num_rows max(length, 1));
      "sequence_sum" 1 / num_rows; "constant" 1 / (num_rows horizon).
    horizon: the longest completion, tokens; for "constant".

  Returns:
    float64 [B].

  Source: DAPO's token-level loss, GRPO, LUSPO and Dr. GRPO; TRL's names are dapo, grpo, luspo,
    dr_grpo, verl's token-mean, seq-mean-token-mean, seq-mean-token-sum, seq-mean-token-sum-norm.
  """
  length_B = np.asarray(lengths, np.float64)
  num_rows = max(num_rows, 1)
  if kind == "token_mean":
    return np.full(len(length_B), 1.0 / max(length_B.sum(), 1.0))
  if kind == "sequence_mean":
    return 1.0 / (num_rows * np.maximum(length_B, 1.0))
  if kind == "sequence_sum":
    return np.full(len(length_B), 1.0 / num_rows)
  if kind == "constant":
    return np.full(len(length_B), 1.0 / (num_rows * horizon))
  raise UserError(f"config.grpo.aggregation: unknown kind {kind!r}")
