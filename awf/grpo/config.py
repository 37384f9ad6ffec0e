"""Hyper-parameters of the learner as frozen, validated dataclasses, and the optimiser they mean.

GRPOConfig itself is in awf.grpo_config, which needs no JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from awf.grpo_config import GRPOConfig, require

__all__ = [
  "GRPOConfig",
  "OptimConfig",
  "clip_by_norm",
  "learning_rate_at",
  "make_optimizer",
]
SCHEDULES = ("constant", "cosine", "linear")


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
  critic_learning_rate: float = 1e-4  # of the value head (grpo.advantage "gae"), constant

  def __post_init__(self) -> None:
    require(self.schedule in SCHEDULES, "optim.schedule", self.schedule, f"one of {SCHEDULES}")
    for name in (
      "learning_rate", "warmup_steps", "total_steps", "weight_decay", "grad_clip",
      "critic_learning_rate",
    ):  # fmt: skip
      require(getattr(self, name) >= 0, f"optim.{name}", getattr(self, name), "at least 0")
    for name in ("b1", "b2"):
      require(0 <= getattr(self, name) < 1, f"optim.{name}", getattr(self, name), "in [0, 1)")
    require(
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
