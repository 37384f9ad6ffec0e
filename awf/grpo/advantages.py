"""Group-relative advantages on the host; a group may have any number of rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Advantages:
  """Advantages of a batch and what its groups look like."""

  values_B: np.ndarray  # float32; 0 for rows without a valid reward
  is_valid_B: np.ndarray  # bool: the reward is a number
  mean_std: float  # mean over groups of the standard deviation (n - 1); 0 for groups of one
  zero_std_share: float  # share of groups whose valid rewards are all alike


def group_advantages(
  rewards: Sequence[float], groups: Sequence[str], kind: str = "grpo", std_eps: float = 1e-4
) -> Advantages:
  """Centres each reward on its group's mean; "grpo" also divides by the standard deviation.

  Args:
    rewards: one per row; NaN marks a row without a reward, left out of mean and deviation.
    groups: one label per row; equal labels share a baseline.
    kind: "grpo": (R - mean) / (std + std_eps), std with n - 1; "dr_grpo": R - mean.
    std_eps: see `kind`.

  Returns:
    Advantages. A group of one valid row, or whose rewards are all alike, is exactly zero.

  Raises:
    ValueError: unknown kind, or lengths that differ.

  Source: GRPO, arXiv:2402.03300, section 4.1.2; Dr. GRPO, arXiv:2503.20783.
  """
  if kind not in ("grpo", "dr_grpo"):
    raise ValueError(
      f"expected kind 'grpo' or 'dr_grpo', got {kind!r}: change config.grpo.advantage"
    )
  if len(rewards) != len(groups):
    raise ValueError(f"expected one group per reward, got {len(groups)} for {len(rewards)}")
  reward_B = np.asarray(rewards, np.float64)
  is_valid_B = np.isfinite(reward_B)
  values_B = np.zeros(len(reward_B), np.float64)
  labels = np.asarray(groups, dtype=object)
  stds = []
  for label in dict.fromkeys(groups):
    rows = np.flatnonzero((labels == label) & is_valid_B)
    reward_G = reward_B[rows]
    if len(rows) < 2 or np.all(reward_G == reward_G[0]):
      stds.append(0.0)
      continue
    centred_G = reward_G - reward_G.mean()
    std = float(reward_G.std(ddof=1))
    stds.append(std)
    values_B[rows] = centred_G / (std + std_eps) if kind == "grpo" else centred_G
  mean_std = float(np.mean(stds)) if stds else 0.0
  zero_share = float(np.mean([s == 0 for s in stds])) if stds else 1.0
  return Advantages(values_B.astype(np.float32), is_valid_B, mean_std, zero_share)
