"""Draws one token per row: temperature, top-k and top-p without a sort, one uniform per row.

Everything is traced per row, so no value of a sampling field compiles anew, and each row is
computed from its own logits and its own counter-based uniform alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

VOCAB_BLOCK = 128  # two-level inverse CDF: block sums first, then inside one block


def uniforms(seed_B2: jax.Array, sample_B: jax.Array, index_B: jax.Array) -> jax.Array:
  """One float32 uniform in [0, 1) per row, a pure function of (seed, sample, index).

  Args:
    seed_B2: uint32 [B, 2], high and low word of the request's seed.
    sample_B: int32 [B], which of the request's completions.
    index_B: int32 [B], how many tokens of that completion came before.
  """

  def one(seed_2, sample, index):
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    return jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, sample), index))

  return jax.vmap(one)(seed_B2, sample_B, index_B)


def _ordered_bits(x: jax.Array) -> jax.Array:
  """uint32 image of float32 that keeps the order; a bisection over it ends in 32 steps, exactly."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest_threshold(bits_BV: jax.Array, is_enough) -> jax.Array:
  """Largest uint32 threshold per row for which `is_enough(bits_BV >= threshold)` still holds.

  `is_enough` maps the bool [B, V] of kept tokens to bool [B], is monotone, and holds when all are.
  """

  def step(_, bounds):
    low_B, high_B = bounds
    middle_B = low_B + (high_B - low_B + 1) // 2
    ok_B = is_enough(bits_BV >= middle_B[:, None])
    return jnp.where(ok_B, middle_B, low_B), jnp.where(ok_B, high_B, middle_B - 1)

  start = (jnp.min(bits_BV, axis=-1), jnp.max(bits_BV, axis=-1))
  return jax.lax.fori_loop(0, 32, step, start)[0]


def support_threshold(scaled_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array) -> jax.Array:
  """Per-row threshold of the kept support, as ordered bits: token v is kept if its bits reach it.

  Top-k first, then top-p on what is left, as Hugging Face's warpers do. Tokens that tie with the
  last kept one are kept too.

  Args:
    scaled_BV: float32 [B, V], logits divided by the temperature.
    top_p_B: float32 [B] in (0, 1]; 1 is off.
    top_k_B: int32 [B]; 0 is off.

  Returns:
    uint32 [B].
  """
  bits_BV = _ordered_bits(scaled_BV)

  def by_count(_):
    k_B = jnp.where(top_k_B > 0, top_k_B, scaled_BV.shape[-1])
    return _largest_threshold(bits_BV, lambda keep: jnp.sum(keep, axis=-1) >= k_B)

  def by_mass(low_B):
    weight_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True))
    weight_BV = jnp.where(bits_BV >= low_B[:, None], weight_BV, 0.0)
    need_B = top_p_B * jnp.sum(weight_BV, axis=-1)
    found_B = _largest_threshold(
      bits_BV, lambda keep: jnp.sum(jnp.where(keep, weight_BV, 0.0), axis=-1) >= need_B
    )
    return jnp.where(top_p_B < 1, jnp.maximum(found_B, low_B), low_B)

  none_B = jnp.zeros(top_k_B.shape, jnp.uint32)
  with jax.named_scope("top_k"):
    threshold_B = jax.lax.cond(jnp.any(top_k_B > 0), by_count, lambda _: none_B, None)
  threshold_B = jnp.where(top_k_B > 0, threshold_B, none_B)
  with jax.named_scope("top_p"):
    return jax.lax.cond(jnp.any(top_p_B < 1), by_mass, lambda low_B: low_B, threshold_B)


def support(scaled_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array) -> jax.Array:
  """bool [B, V]: the tokens that `draw` can give; arguments as of `support_threshold`."""
  return _ordered_bits(scaled_BV) >= support_threshold(scaled_BV, top_p_B, top_k_B)[:, None]


def _inverse_cdf(weight_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """The token at which the running sum of weights passes uniform x total; never one of weight 0."""
  b, v = weight_BV.shape
  blocks = -(-v // VOCAB_BLOCK)
  padded = jnp.pad(weight_BV, ((0, 0), (0, blocks * VOCAB_BLOCK - v)))
  weight_BXY = padded.reshape(b, blocks, VOCAB_BLOCK)

  def search(weight_BX, target_B):
    """First index whose running sum exceeds the target, at most the last of positive weight."""
    size = weight_BX.shape[-1]
    upper_XX = jnp.triu(jnp.ones((size, size), jnp.float32))
    sums_BX = jnp.dot(weight_BX, upper_XX, precision=jax.lax.Precision.HIGHEST)
    last_B = size - 1 - jnp.argmax(weight_BX[:, ::-1] > 0, axis=-1)
    index_B = jnp.minimum(jnp.sum(sums_BX <= target_B[:, None], axis=-1), last_B)
    before_B = jnp.take_along_axis(sums_BX, jnp.maximum(index_B - 1, 0)[:, None], axis=-1)[:, 0]
    return index_B, jnp.where(index_B > 0, before_B, 0.0)

  block_BX = jnp.sum(weight_BXY, axis=-1)
  target_B = uniform_B * jnp.sum(block_BX, axis=-1)
  x_B, before_B = search(block_BX, target_B)
  inside_BY = jnp.take_along_axis(weight_BXY, x_B[:, None, None], axis=1)[:, 0]
  y_B, _ = search(inside_BY, target_B - before_B)
  return (x_B * VOCAB_BLOCK + y_B).astype(jnp.int32)


def draw(
  logits_BV: jax.Array,
  uniform_B: jax.Array,
  temperature_B: jax.Array,
  top_p_B: jax.Array,
  top_k_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Draws one token per row.

  Args:
    logits_BV: float32 [B, V].
    uniform_B: float32 [B] in [0, 1).
    temperature_B: float32 [B]; 0 is argmax.
    top_p_B: float32 [B] in (0, 1]; 1 is off.
    top_k_B: int32 [B]; 0 is off.

  Returns:
    (int32 [B] ids, float32 [B] log-probs under the distribution that was drawn from: tempered, cut
    to the support and renormalised; at temperature 0 under the plain softmax).
  """
  is_greedy_B = temperature_B <= 0
  scaled_BV = logits_BV / jnp.where(is_greedy_B, 1.0, temperature_B)[:, None]
  top_p_B = jnp.where(is_greedy_B, 1.0, top_p_B)
  top_k_B = jnp.where(is_greedy_B, 0, top_k_B)
  threshold_B = support_threshold(scaled_BV, top_p_B, top_k_B)
  peak_B = jnp.max(scaled_BV, axis=-1)
  is_kept_BV = _ordered_bits(scaled_BV) >= threshold_B[:, None]
  weight_BV = jnp.where(is_kept_BV, jnp.exp(scaled_BV - peak_B[:, None]), 0.0)
  drawn_B = _inverse_cdf(weight_BV, uniform_B)
  with jax.named_scope("greedy"):
    id_B = jax.lax.cond(  # argmax costs as much as the rest of the draw: only when a row wants it
      jnp.any(is_greedy_B),
      lambda: jnp.where(is_greedy_B, jnp.argmax(scaled_BV, axis=-1).astype(jnp.int32), drawn_B),
      lambda: drawn_B,
    )
  chosen_B = jnp.take_along_axis(scaled_BV, id_B[:, None], axis=-1)[:, 0]
  return id_B, chosen_B - peak_B - jnp.log(jnp.sum(weight_BV, axis=-1))
