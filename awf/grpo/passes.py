"""Programs over the bins of a batch beside the update: values, a critic's step, sums over rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from awf.grpo.batch import Batch
from awf.grpo.config import GRPOConfig, OptimConfig
from awf.grpo.critic import critic_loss, critic_step, values
from awf.grpo.objective import RowSum, Sampling, importance_weights, policy_gradient

# hidden states [B, U, D] of one step's bins, by the base alone
Hidden = Callable[[Batch[jax.Array]], jax.Array]


def zeros(batch: Batch[jax.Array]) -> jax.Array:
  """float32 [Z, B, U]."""
  return jnp.zeros(batch.target_ZBU.shape)


def room(batch: Batch[jax.Array], sampling: Sampling, support_bytes: int = 0) -> dict[str, Any]:
  """Zeros [Z, B, U, ...] for what the head says of each target (`grpo_token_loss`)."""
  found = {"logp": zeros(batch)}
  if sampling.is_truncated:
    found["kl_logp"] = zeros(batch)
  if support_bytes:
    found["support"] = jnp.zeros((*batch.target_ZBU.shape, support_bytes), jnp.uint8)
  return found


def put(whole: Any, z: jax.Array, part: Any) -> Any:
  """Writes the results of step z's bins, leaves [B, ...] into leaves [Z, B, ...]."""
  return jax.tree.map(lambda x, new: x.at[z].set(new), whole, part)


def over_bins(fn: Callable[[Any], Any], batch: Batch[jax.Array], data: Any, into: Any) -> Any:
  """`fn((bins, data))` of each step, put into zeros; steps of padding are not run.

  Args:
    fn: maps one step's bins and data (leaves [B, ...]) to leaves [B, ...].
    batch: of Z steps.
    data: leaves [Z, B, ...].
    into: leaves [Z, B, ...], like what `fn` gives.
  """
  steps = dataclasses.replace(batch, num_steps=None)

  def one(z, whole):
    return put(whole, z, fn(jax.tree.map(lambda x: x[z], (steps, data))))

  with jax.named_scope("bins"):
    return jax.lax.fori_loop(0, batch.num_steps, one, into)


def uncut(scored: dict[str, jax.Array]) -> jax.Array:
  """Log-probs of a scoring pass as the KL wants them: of the softmax before top-k and top-p."""
  return scored.get("kl_logp", scored["logp"])


def make_row_sum(batch: Batch[jax.Array]) -> RowSum:
  """The function that sums [Z, B, U] over the targets of each completion, laid on each of them.

  The values must be 0 where there is no target. A completion lies in one bin, its targets in order.
  """
  is_first = batch.is_target_ZBU & (batch.column_ZBU == 0)
  number_ZBU = jnp.maximum(jnp.cumsum(is_first, axis=-1) - 1, 0)
  size = number_ZBU.shape[-1]

  def of_bin(value_U: jax.Array, number_U: jax.Array) -> jax.Array:
    return jax.ops.segment_sum(value_U, number_U, size)[number_U]

  def row_sum(value_ZBU: jax.Array) -> jax.Array:
    return jax.vmap(jax.vmap(of_bin))(value_ZBU, number_ZBU)

  return row_sum


def gradient_of_rows(
  grpo: GRPOConfig, batch: Batch[jax.Array], logp_ZBU: jax.Array, data: Any, scalars: Any
) -> jax.Array:
  """`policy_gradient` of a batch, [Z, B, U]."""
  data = data | {"is_target": batch.is_target_ZBU}
  return policy_gradient(logp_ZBU, data, scalars, grpo, make_row_sum(batch))


def importance_of_rows(
  grpo: GRPOConfig, batch: Batch[jax.Array], old_logp_ZBU: jax.Array, sampler_logp_ZBU: jax.Array
) -> jax.Array:
  """`importance_weights` of a batch, [Z, B, U]."""
  row_sum, is_target = make_row_sum(batch), batch.is_target_ZBU
  return importance_weights(old_logp_ZBU, sampler_logp_ZBU, is_target, grpo, row_sum)


def values_of(hidden: Hidden, head: Any, batch: Batch[jax.Array]) -> jax.Array:
  """The critic's values [Z, B, U] before each target."""
  return over_bins(lambda x: values(head, hidden(x[0])), batch, {}, zeros(batch))


def train_critic(
  hidden: Hidden,
  critic: Any,
  batch: Batch[jax.Array],
  data: Any,
  grpo: GRPOConfig,
  optim: OptimConfig,
) -> tuple[Any, jax.Array]:
  """(critic after one step, value loss before it)."""
  loss_and_grad = jax.value_and_grad(critic_loss)
  steps = dataclasses.replace(batch, num_steps=None)

  def one(z, carry):
    bins, data_z = jax.tree.map(lambda x: x[z], (steps, data))
    hidden_BUD = jax.lax.stop_gradient(hidden(bins))
    new = loss_and_grad(critic["head"], hidden_BUD, data_z, grpo.value_clip)
    return jax.tree.map(jnp.add, carry, new)

  zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, critic["head"]))
  with jax.named_scope("bins"):
    loss, grads = jax.lax.fori_loop(0, batch.num_steps, one, zero)
  return critic_step(critic, grads, optim), loss
