"""GRPOConfig: what an update does, checked before JAX is imported."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from awf.remat import remat_name
from awf.types import UserError

ADVANTAGES = (
  "grpo",
  "dr_grpo",
  "batch",
  "rloo",
  "reinforce_plus_plus_baseline",
  "maxrl",
  "opo",
  "gae",
)
LOSSES = ("grpo", "ppo", "gspo", "cispo", "sapo", "reinforce")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
KL_ESTIMATES = ("k1", "k2", "k3")
KL_PLACES = ("loss", "reward")
IMPORTANCE = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def require(is_ok: bool, field: str, value: Any, expected: str) -> None:
  """Raises UserError with field, expectation and value unless `is_ok`."""
  if not is_ok:
    raise UserError(f"config.{field}: expected {expected}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
  """What one update does with one batch of rollouts; fields as in `config.grpo`.

  Formulas and sources: awf.grpo.advantages (advantage), awf.grpo.objective (the rest).
  """

  group_size: int = 8
  advantage: str = "grpo"  # one of ADVANTAGES
  std_eps: float = 1e-4
  gamma: float = 1.0  # gae
  lam: float = 0.95  # gae
  value_clip: float = 0.5  # gae: how far a value may move from that before the first step
  loss: str = "grpo"  # one of LOSSES; ppo is another name of grpo
  clip_low: float = 0.2
  clip_high: float = 0.28
  dual_clip: float = 0.0  # bound of the loss at negative advantages, above 1; 0 is off
  ratio_max: float = 0.0  # upper bound of the unclipped ratio; 0 is off
  cispo_max: float = 5.0
  sapo_tau_pos: float = 1.0
  sapo_tau_neg: float = 1.05
  beta: float = 0.0  # weight of the KL to the base
  kl: str = "k3"  # k1, k2, k3
  kl_in: str = "loss"  # loss, reward
  entropy_coef: float = 0.0
  entropy_target: float = 0.0  # above 0: the coefficient adapts towards this entropy
  entropy_delta: float = 0.005
  entropy_min: float = 0.0
  entropy_max: float = 1.0
  importance: str = "none"  # one of IMPORTANCE
  importance_min: float = 0.0
  importance_max: float = 3.0
  aggregation: str = "token_mean"  # one of AGGREGATIONS
  horizon: int = 0  # longest completion, tokens; 0 stands for sampler.max_new_tokens
  overlong_buffer: int = 0  # last tokens of the horizon over which the penalty grows; 0 is off
  overlong_penalty: float = 1.0  # taken from the reward of a completion as long as the horizon
  mask_truncated: bool = False
  drop_uniform: bool = False  # groups without a spread do not count in the aggregation
  refill: int = 0  # groups a round that are drawn again because they had no spread
  steps_per_batch: int = 1
  micro_batch: int = 8  # rows of one forward/backward pass
  vocab_chunk: int = 4096  # tokens per chunk of the head
  remat: bool | str = "none"  # what the backward pass computes again (awf.remat)

  def __post_init__(self) -> None:
    remat_name(self.remat)
    known = {
      "advantage": ADVANTAGES,
      "loss": LOSSES,
      "aggregation": AGGREGATIONS,
      "kl": KL_ESTIMATES,
      "kl_in": KL_PLACES,
      "importance": IMPORTANCE,
    }
    for name, words in known.items():
      value = getattr(self, name)
      require(value in words, f"grpo.{name}", value, f"one of {', '.join(words)}")
    at_least = {
      2: ("group_size",),
      1: ("steps_per_batch", "micro_batch", "vocab_chunk"),
      0: (
        "beta", "std_eps", "clip_high", "dual_clip", "ratio_max", "cispo_max", "entropy_coef",
        "entropy_target", "entropy_delta", "entropy_min", "importance_min", "horizon",
        "overlong_buffer", "overlong_penalty", "refill", "value_clip",
      ),
    }  # fmt: skip
    for low, names in at_least.items():
      for name in names:
        value = getattr(self, name)
        require(value >= low, f"grpo.{name}", value, f"at least {low}")
    for name in ("clip_low", "gamma", "lam"):
      value = getattr(self, name)
      require(0 <= value <= 1, f"grpo.{name}", value, "a number in [0, 1]")
    for name in ("sapo_tau_pos", "sapo_tau_neg"):
      require(getattr(self, name) > 0, f"grpo.{name}", getattr(self, name), "more than 0")
    for is_wrong, line in _conflicts(self):
      if is_wrong:
        raise UserError(line)

  @classmethod
  def from_config(cls, config: Mapping[str, Any], horizon: int = 0) -> GRPOConfig:
    """Takes `config.grpo` (ConfigDict or dict); `horizon` (the sampler's) stands in for a 0."""
    fields = {f.name: config[f.name] for f in dataclasses.fields(cls)}
    fields["horizon"] = fields["horizon"] or horizon
    return cls(**fields)

  @property
  def is_sequence_loss(self) -> bool:
    """Whether a token's loss depends on other tokens of its row through the parameters."""
    return self.loss == "gspo"

  @property
  def has_kl_in_loss(self) -> bool:
    return self.beta > 0 and self.kl_in == "loss"

  @property
  def has_kl_in_reward(self) -> bool:
    return self.beta > 0 and self.kl_in == "reward"

  @property
  def is_entropy_adaptive(self) -> bool:
    return self.entropy_target > 0

  @property
  def has_entropy(self) -> bool:
    """Whether the loss has an entropy term."""
    return self.entropy_coef > 0 or self.is_entropy_adaptive

  @property
  def has_critic(self) -> bool:
    return self.advantage == "gae"

  @property
  def needs_old_logp(self) -> bool:
    """Whether the first step needs the old log-probs beforehand, by a pass of their own."""
    whole_rows = self.importance.startswith("sequence")
    both = self.is_sequence_loss and self.importance != "none"
    return self.has_kl_in_reward or whole_rows or both


def _conflicts(c: GRPOConfig) -> tuple[tuple[bool, str], ...]:
  """Values that are fine alone and wrong or without effect together, each with its way out."""
  clips = c.loss in ("grpo", "ppo", "gspo")
  return (
    (
      c.loss == "reinforce" and c.steps_per_batch > 1,
      f"config.grpo.steps_per_batch = {c.steps_per_batch}: loss 'reinforce' has no ratio that "
      "corrects later steps; set config.grpo.steps_per_batch=1 or config.grpo.loss=grpo",
    ),
    (
      c.dual_clip > 0 and not (clips and c.dual_clip > 1),
      f"config.grpo.dual_clip = {c.dual_clip:g}: expected 0 (off), or more than 1 with "
      f"config.grpo.loss=grpo or gspo (is {c.loss}); set config.grpo.dual_clip=0",
    ),
    (
      c.ratio_max > 0 and not (clips and c.ratio_max > 1 + c.clip_high),
      f"config.grpo.ratio_max = {c.ratio_max:g}: expected 0 (off), or more than 1 + "
      f"config.grpo.clip_high = {1 + c.clip_high:g} with config.grpo.loss=grpo or gspo "
      f"(is {c.loss}); set config.grpo.ratio_max=0",
    ),
    (
      c.kl_in == "reward" and c.beta == 0,
      "config.grpo.kl_in = 'reward' has no effect with config.grpo.beta = 0; raise "
      "config.grpo.beta or set config.grpo.kl_in=loss",
    ),
    (
      c.is_entropy_adaptive and not c.entropy_min <= c.entropy_coef <= c.entropy_max,
      f"config.grpo.entropy_coef = {c.entropy_coef:g}: expected a start between "
      f"config.grpo.entropy_min = {c.entropy_min:g} and config.grpo.entropy_max = "
      f"{c.entropy_max:g}; change one of the three",
    ),
    (
      c.importance_min > c.importance_max,
      f"config.grpo.importance_min = {c.importance_min:g}: expected at most "
      f"config.grpo.importance_max = {c.importance_max:g}; lower it",
    ),
    (
      c.horizon == 0 and (c.aggregation == "constant" or c.overlong_buffer > 0),
      "config.grpo.horizon = 0: expected the longest completion in tokens, for "
      "config.grpo.aggregation=constant and config.grpo.overlong_buffer; set it",
    ),
    (
      c.overlong_buffer > c.horizon,
      f"config.grpo.overlong_buffer = {c.overlong_buffer}: expected at most "
      f"config.grpo.horizon = {c.horizon} tokens (0 takes config.sampler.max_new_tokens)",
    ),
    (
      c.has_critic and (c.drop_uniform or c.refill > 0),
      "config.grpo.advantage = 'gae' has no groups to drop or draw again; set "
      "config.grpo.drop_uniform=false and config.grpo.refill=0",
    ),
  )
