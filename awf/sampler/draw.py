"""Draws one token per row: temperature, top-k, top-p, min-p without a sort, one uniform per row.

Everything is traced per row, so no value of a sampling field compiles anew, and each row is
computed from its own logits and its own counter-based uniform alone.
"""

from __future__ import annotations

from collections.abc import Callable

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


def _from_ordered(bits: jax.Array) -> jax.Array:
  """The float32 of `_ordered_bits`."""
  bits = jnp.where(bits >> 31 == 1, bits ^ jnp.uint32(1 << 31), ~bits)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _block_sums(x_BV: jax.Array) -> jax.Array:
  """Sums [B, X] over blocks of VOCAB_BLOCK tokens."""
  missing = -x_BV.shape[1] % VOCAB_BLOCK
  x_BV = jnp.pad(x_BV, ((0, 0), (0, missing))) if missing else x_BV
  return jnp.sum(x_BV.reshape(len(x_BV), -1, VOCAB_BLOCK), axis=-1)


def _largest_threshold(
  measure: Callable, need_B: jax.Array, bounds: tuple, measured_B: jax.Array, least: Callable
) -> jax.Array:
  """Largest float32 threshold per row whose kept tokens still measure `need_B`, by bisection.

  A row has ended when what it keeps measures less than one token more than is needed, and it stays
  as it is then, however many steps other rows take. A step reads one array once, and counts
  nothing beside what it measures: XLA:CPU takes three times as long for two sums.

  Args:
    measure: float32 [B] thresholds to float32 [B], of the tokens that reach them; monotone.
    need_B: float32.
    bounds: float32 [B], a threshold that keeps enough, and the largest value that a token has.
    measured_B: float32, of what the first of them keeps.
    least: float32 [B] thresholds to the least that a token which reaches them can measure.
  """

  def open_rows(low_B, high_B, measured_B):
    return (high_B - low_B > 1) & (measured_B - need_B >= least(_from_ordered(low_B)))

  def step(state):
    low_B, high_B, measured_B = state
    is_open_B = open_rows(*state)
    middle_B = low_B + (high_B - low_B) // 2
    found_B = measure(_from_ordered(middle_B))
    is_enough_B = found_B >= need_B
    return (
      jnp.where(is_open_B & is_enough_B, middle_B, low_B),
      jnp.where(is_open_B & ~is_enough_B, middle_B, high_B),
      jnp.where(is_open_B & is_enough_B, found_B, measured_B),
    )

  low_B, high_B = (_ordered_bits(x) for x in bounds)
  state = low_B, high_B + 1, measured_B
  return _from_ordered(jax.lax.while_loop(lambda s: jnp.any(open_rows(*s)), step, state)[0])


def support_threshold(
  scaled_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
  """Per-row threshold of the kept support: token v is kept if its scaled logit reaches it.

  Top-k first, then top-p on what is left, then min-p, in the order of Hugging Face's warpers.
  Min-p compares with the likeliest token, which no cut takes away, so only its order to top-p
  matters (vLLM cuts by min-p first, and top-p then counts the mass of what is left: it keeps the
  same tokens or fewer). Tokens that tie with the last kept one are kept too.

  Args:
    scaled_BV: float32 [B, V], logits divided by the temperature.
    top_p_B: float32 [B] in (0, 1]; 1 is off.
    top_k_B: int32 [B]; 0 is off.
    min_p_B: float32 [B] in [0, 1], least probability as a share of the likeliest token's; 0 is off.

  Returns:
    float32 [B]; -inf keeps every token.
  """
  peak_B, v = jnp.max(scaled_BV, axis=-1), scaled_BV.shape[-1]

  def by_count(_):
    def count(threshold_B):
      return jnp.sum(_block_sums(jnp.where(scaled_BV >= threshold_B[:, None], 1.0, 0.0)), axis=-1)

    need_B = jnp.where(top_k_B > 0, jnp.minimum(top_k_B, v), v).astype(jnp.float32)
    bounds = jnp.min(scaled_BV, axis=-1), peak_B
    return _largest_threshold(count, need_B, bounds, jnp.full_like(need_B, v), jnp.ones_like)

  def by_mass(low_B):
    weight_BV = jnp.exp(scaled_BV - peak_B[:, None])
    weight_BV = jnp.where(scaled_BV >= low_B[:, None], weight_BV, 0.0)

    def mass(threshold_B):
      kept_BV = jnp.where(weight_BV >= threshold_B[:, None], weight_BV, 0.0)
      return jnp.sum(_block_sums(kept_BV), axis=-1)

    total_B = mass(jnp.zeros_like(peak_B))
    need_B = jnp.where(top_p_B < 1, top_p_B * total_B, jnp.inf)  # rows without it end at once
    # All tokens below a V-th of the mass to spare are no more than that together.
    bounds = (1 - top_p_B) * total_B / (2 * v), jnp.ones_like(peak_B)
    least_B = _largest_threshold(mass, need_B, bounds, total_B, lambda threshold_B: threshold_B)
    kept_BV = jnp.where(weight_BV >= least_B[:, None], scaled_BV, jnp.inf)
    return jnp.where(top_p_B < 1, jnp.min(kept_BV, axis=-1), low_B)

  all_B = jnp.full_like(peak_B, -jnp.inf)
  with jax.named_scope("top_k"):
    threshold_B = jax.lax.cond(jnp.any(top_k_B > 0), by_count, lambda _: all_B, None)
  threshold_B = jnp.where(top_k_B > 0, threshold_B, all_B)
  with jax.named_scope("top_p"):
    threshold_B = jax.lax.cond(jnp.any(top_p_B < 1), by_mass, lambda low_B: low_B, threshold_B)
  # The logarithm of 0 is -inf, which cuts nothing.
  return jnp.maximum(threshold_B, peak_B + jnp.log(min_p_B))


def support(
  scaled_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
  """bool [B, V]: the tokens that `draw` can give; arguments as of `support_threshold`."""
  return scaled_BV >= support_threshold(scaled_BV, top_p_B, top_k_B, min_p_B)[:, None]


def _search(weight_BX: jax.Array, target_B: jax.Array) -> tuple[jax.Array, jax.Array]:
  """First index whose running sum exceeds the target, at most the last of positive weight.

  Returns:
    (index [B], running sum before it [B]).
  """
  size = weight_BX.shape[-1]
  upper_XX = jnp.triu(jnp.ones((size, size), jnp.float32))
  sums_BX = jnp.dot(weight_BX, upper_XX, precision=jax.lax.Precision.HIGHEST)
  last_B = size - 1 - jnp.argmax(weight_BX[:, ::-1] > 0, axis=-1)
  index_B = jnp.minimum(jnp.sum(sums_BX <= target_B[:, None], axis=-1), last_B)
  before_B = jnp.take_along_axis(sums_BX, jnp.maximum(index_B - 1, 0)[:, None], axis=-1)[:, 0]
  return index_B, jnp.where(index_B > 0, before_B, 0.0)


def _take_block(logits_BV: jax.Array, block_B: jax.Array) -> jax.Array:
  """The logits [B, VOCAB_BLOCK] of one block per row; -inf beyond the vocabulary."""
  token_BY = block_B[:, None] * VOCAB_BLOCK + jnp.arange(VOCAB_BLOCK, dtype=block_B.dtype)[None]
  return jnp.take_along_axis(logits_BV, token_BY, axis=1, mode="fill", fill_value=-jnp.inf)


def draw(
  logits_BV: jax.Array,
  uniform_B: jax.Array,
  temperature_B: jax.Array,
  top_p_B: jax.Array,
  top_k_B: jax.Array,
  min_p_B: jax.Array,
  wants_full_B: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Draws one token per row.

  Args:
    logits_BV: float32 [B, V].
    uniform_B: float32 [B] in [0, 1).
    temperature_B: float32 [B]; 0 is argmax.
    top_p_B: float32 [B] in (0, 1]; 1 is off.
    top_k_B: int32 [B]; 0 is off.
    min_p_B: float32 [B] in [0, 1]; 0 is off.
    wants_full_B: bool [B]; where the distribution is cut, the second log-prob takes one more pass
      over the vocabulary, which is left out when no row wants it.

  Returns:
    (int32 [B] ids, float32 [B] log-probs under the distribution that was drawn from: tempered, cut
    to the support and renormalised; at temperature 0 under the plain softmax; float32 [B] log-probs
    under the same distribution before the cut, undefined in rows that do not want them).
  """
  is_greedy_B = temperature_B <= 0
  divisor_B = jnp.where(is_greedy_B, 1.0, temperature_B)
  top_p_B = jnp.where(is_greedy_B, 1.0, top_p_B)
  top_k_B = jnp.where(is_greedy_B, 0, top_k_B)
  min_p_B = jnp.where(is_greedy_B, 0.0, min_p_B)
  is_cut_B = (top_p_B < 1) | (top_k_B > 0) | (min_p_B > 0)

  # Less its peak first: a product that a sum follows is rounded or not as the compiler fuses it.
  peak_B = jnp.max(logits_BV, axis=-1)

  def scaled(logits_BX):
    return (logits_BX - peak_B[:, None]) / divisor_B[:, None]

  def weights(scaled_BX, threshold_B):
    if threshold_B is not None:
      scaled_BX = jnp.where(scaled_BX >= threshold_B[:, None], scaled_BX, -jnp.inf)
    return jnp.exp(scaled_BX)

  def among(logits_BV, threshold_B):
    """Ids and log-masses of all rows; None keeps every token."""
    sum_BX = _block_sums(weights(scaled(logits_BV), threshold_B))
    total_B = jnp.sum(sum_BX, axis=-1)
    block_B, before_B = _search(sum_BX, uniform_B * total_B)
    inside_BY = scaled(_take_block(logits_BV, block_B))
    place_B, _ = _search(weights(inside_BY, threshold_B), uniform_B * total_B - before_B)
    return (block_B * VOCAB_BLOCK + place_B).astype(jnp.int32), jnp.log(total_B)

  def special(logits_BV):
    threshold_B = support_threshold(scaled(logits_BV), top_p_B, top_k_B, min_p_B)
    id_B, norm_B = among(logits_BV, threshold_B)
    with jax.named_scope("greedy"):
      id_B = jax.lax.cond(
        jnp.any(is_greedy_B),
        lambda x: jnp.where(is_greedy_B, jnp.argmax(x, axis=-1).astype(jnp.int32), id_B),
        lambda _: id_B,
        logits_BV,
      )
    with jax.named_scope("full_logp"):
      full_B = jax.lax.cond(
        jnp.any(is_cut_B & wants_full_B),
        lambda x: jax.nn.logsumexp(scaled(x), axis=-1),
        lambda _: norm_B,
        logits_BV,
      )
    # Where nothing is cut both are one number, to the last bit.
    return id_B, norm_B, jnp.where(is_cut_B, full_B, norm_B)

  def plain(logits_BV):
    id_B, norm_B = among(logits_BV, None)
    return id_B, norm_B, norm_B

  # One branch, in which all is done: what comes in ready-made, or goes on behind it, is copied.
  with jax.named_scope("special"):
    is_special = jnp.any(is_greedy_B | is_cut_B)
    id_B, norm_B, full_B = jax.lax.cond(is_special, special, plain, logits_BV)
  chosen_B = scaled(jnp.take_along_axis(logits_BV, id_B[:, None], axis=-1))[:, 0]
  return id_B, chosen_B - norm_B, chosen_B - full_B


def likeliest(
  logits_BV: jax.Array, temperature_B: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
  """The likeliest tokens of each row, before any cut.

  Args:
    logits_BV: float32 [B, V].
    temperature_B: float32 [B]; 0 counts as 1, as in `draw`.
    count: K, how many.

  Returns:
    (int32 [K, B] ids, float32 [K, B] log-probs), likeliest first.
  """
  scaled_BV = logits_BV / jnp.where(temperature_B <= 0, 1.0, temperature_B)[:, None]
  top_BK, id_BK = jax.lax.top_k(scaled_BV, count)
  logp_BK = top_BK - jax.nn.logsumexp(scaled_BV, axis=-1, keepdims=True)
  return id_BK.T.astype(jnp.int32), logp_BK.T
