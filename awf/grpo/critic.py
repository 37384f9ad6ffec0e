"""A value head on the frozen base's last hidden state, for GAE; trained beside the policy.

The base carries no gradient for it: a step is a forward pass of the base and a linear regression.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from awf.grpo.config import OptimConfig, clip_by_norm
from awf.grpo.guard import keep_if

Critic = dict[str, Any]  # {"head": {"kernel" [D], "bias" []}, "opt_state"}
_EPS = 1e-6


def make_critic_optimizer(optim: OptimConfig) -> optax.GradientTransformation:
  """Adam with the policy's moments, at a constant rate of its own."""
  return optax.adam(optim.critic_learning_rate, b1=optim.b1, b2=optim.b2, eps=optim.eps)


def init_critic(width: int, optim: OptimConfig) -> Critic:
  """A head that gives 0 everywhere, and its optimiser's state."""
  head = {"kernel": jnp.zeros(width), "bias": jnp.zeros(())}
  return {"head": head, "opt_state": make_critic_optimizer(optim).init(head)}


def values(head: dict[str, jax.Array], hidden_xD: jax.Array) -> jax.Array:
  """Value of each state, float32: linear in the hidden state scaled to a mean square of 1."""
  hidden = hidden_xD.astype(jnp.float32)
  scale = jax.lax.rsqrt(jnp.mean(jnp.square(hidden), axis=-1, keepdims=True) + _EPS)
  return jnp.dot(hidden * scale, head["kernel"]) + head["bias"]


def value_terms(
  value: jax.Array, old_value: jax.Array, returns: jax.Array, clip: float
) -> jax.Array:
  """Clipped squared error of each token.

  Returns:
    1/2 max((v - ret)^2, (clip(v, old - clip, old + clip) - ret)^2).

  Source: PPO's value loss as in arXiv:2005.12729, section 3; verl's compute_value_loss.
  """
  near = jnp.clip(value, old_value - clip, old_value + clip)
  return 0.5 * jnp.maximum(jnp.square(value - returns), jnp.square(near - returns))


def critic_loss(
  head: dict[str, jax.Array], hidden_BUD: jax.Array, data: dict[str, jax.Array], clip: float
) -> jax.Array:
  """Weighted sum of `value_terms`; data: old_value, returns, weight, is_target, all [B, U]."""
  terms = value_terms(values(head, hidden_BUD), data["old_value"], data["returns"], clip)
  return jnp.sum(jnp.where(data["is_target"], data["weight"] * terms, 0.0))


def critic_step(critic: Critic, grads: Any, optim: OptimConfig) -> Critic:
  """One optimiser step, the gradient clipped by its own norm; none where that is not finite."""
  grads, norm = clip_by_norm(grads, optim.grad_clip)
  optimizer = make_critic_optimizer(optim)
  updates, opt_state = optimizer.update(grads, critic["opt_state"], critic["head"])
  new = {"head": optax.apply_updates(critic["head"], updates), "opt_state": opt_state}
  return keep_if(jnp.isfinite(norm), new, critic)
