"""Hyper-parameters of the learner as frozen, validated dataclasses, and the optimiser they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from awf.qwen.remat import remat_name
from awf.types import UserError

ADVANTAGES = ("grpo", "dr_grpo")
AGGREGATIONS = ("token_mean",)
SCHEDULES = ("constant", "cosine", "linear")


def _require(is_ok: bool, field: str, value: Any, expected: str) -> None:
  if not is_ok:
    raise UserError(f"config.{field}: expected {expected}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
  """What one update does with one batch of rollouts; fields as in `config.grpo`."""

  group_size: int = 8
  advantage: str = "grpo"  # grpo, dr_grpo
  std_eps: float = 1e-4
  clip_low: float = 0.2
  clip_high: float = 0.28
  beta: float = 0.0  # weight of the k3 KL to the base
  entropy_coef: float = 0.0
  aggregation: str = "token_mean"
  steps_per_batch: int = 1
  micro_batch: int = 8  # rows of one forward/backward pass
  mask_truncated: bool = False
  vocab_chunk: int = 4096  # tokens per chunk of the head
  remat: bool | str = "none"  # what the backward pass computes again (awf.qwen.remat)

  def __post_init__(self) -> None:
    _require(self.group_size >= 2, "grpo.group_size", self.group_size, "at least 2")
    _require(self.advantage in ADVANTAGES, "grpo.advantage", self.advantage, f"one of {ADVANTAGES}")
    _require(
      self.aggregation in AGGREGATIONS,
      "grpo.aggregation",
      self.aggregation,
      f"one of {AGGREGATIONS}",
    )
    remat_name(self.remat)
    for name in ("steps_per_batch", "micro_batch", "vocab_chunk"):
      _require(getattr(self, name) >= 1, f"grpo.{name}", getattr(self, name), "at least 1")
    for name in ("beta", "std_eps", "clip_high"):
      _require(getattr(self, name) >= 0, f"grpo.{name}", getattr(self, name), "at least 0")
    _require(0 <= self.clip_low <= 1, "grpo.clip_low", self.clip_low, "a number in [0, 1]")

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> GRPOConfig:
    """Takes `config.grpo` (ConfigDict or dict)."""
    return cls(**{f.name: config[f.name] for f in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW with a schedule and clipping of the global norm; fields as in `config.optim`."""

  learning_rate: float = 1e-5
  schedule: str = "constant"  # constant, cosine, linear
  warmup_steps: int = 0
  total_steps: int = 0
  weight_decay: float = 0.0
  b1: float = 0.9
  b2: float = 0.99
  eps: float = 1e-8
  grad_clip: float = 1.0  # 0 switches clipping off

  def __post_init__(self) -> None:
    _require(self.schedule in SCHEDULES, "optim.schedule", self.schedule, f"one of {SCHEDULES}")
    for name in ("learning_rate", "warmup_steps", "total_steps", "weight_decay", "grad_clip"):
      _require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "at least 0")
    for name in ("b1", "b2"):
      _require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
    _require(
      self.schedule == "constant" or self.total_steps > self.warmup_steps,
      "optim.total_steps",
      self.total_steps,
      f"more than optim.warmup_steps ({self.warmup_steps}) for schedule {self.schedule!r}",
    )

  @classmethod
  def from_config(cls, config: Mapping[str, Any], total_steps: int = 0) -> OptimConfig:
    """Takes `config.optim`; `total_steps` (what the run will do) stands in for a 0 there."""
    fields = {f.name: config[f.name] for f in dataclasses.fields(cls)}
    fields["total_steps"] = fields["total_steps"] or total_steps
    return cls(**fields)


def learning_rate_at(optim: OptimConfig, step: ArrayLike) -> jax.Array:
  """Learning rate of the 0-based `step`: linear warm-up, then constant, or decay to zero."""
  step = jnp.asarray(step, jnp.float32)
  warm = jnp.minimum(1.0, (step + 1.0) / max(1, optim.warmup_steps))
  if optim.schedule == "constant":
    return optim.learning_rate * warm
  left = max(1, optim.total_steps - optim.warmup_steps)
  share = jnp.clip((step - optim.warmup_steps) / left, 0.0, 1.0)
  decay = 1.0 - share if optim.schedule == "linear" else 0.5 * (1.0 + jnp.cos(jnp.pi * share))
  return optim.learning_rate * warm * decay


def make_optimizer(optim: OptimConfig) -> optax.GradientTransformation:
  """AdamW; weight decay spares vectors (norms, biases). `clip_by_norm` comes before it."""
  return optax.adamw(
    lambda step: learning_rate_at(optim, step),
    b1=optim.b1,
    b2=optim.b2,
    eps=optim.eps,
    weight_decay=optim.weight_decay,
    mask=lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree),
  )


def clip_by_norm(grads: Any, limit: float) -> tuple[Any, jax.Array]:
  """Scales the whole gradient to at most `limit` (0: never); returns it and its norm before."""
  squares = [jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)]
  norm = jnp.sqrt(sum(squares))
  if limit == 0:
    return grads, norm
  factor = jnp.minimum(1.0, limit / jnp.maximum(norm, 1e-12))
  return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm
