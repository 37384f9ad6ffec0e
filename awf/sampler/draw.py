"""Draws one token per row: temperature, top-k, top-p, min-p without a sort, one uniform per row.

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
  The bisection ends when only one more token could go in every row: which is settled by its value.
  """

  def is_open(bounds):
    i, low_B, high_B, kept_B, spared_B = bounds
    return (i < 32) & jnp.any((low_B < high_B) & (kept_B > spared_B + 1))

  def step(bounds):
    i, low_B, high_B, kept_B, spared_B = bounds
    middle_B = low_B + (high_B - low_B + 1) // 2
    keep_BV = bits_BV >= middle_B[:, None]
    ok_B, count_B = is_enough(keep_BV), jnp.sum(keep_BV, axis=-1, dtype=jnp.int32)
    return (
      i + 1,
      jnp.where(ok_B, middle_B, low_B),
      jnp.where(ok_B, high_B, middle_B - 1),
      jnp.where(ok_B, count_B, kept_B),
      jnp.where(ok_B, spared_B, count_B),
    )

  b, v = bits_BV.shape
  # Tokens kept by the lower bound, and by the first threshold that keeps too few.
  start = (
    jnp.int32(0), jnp.min(bits_BV, axis=-1), jnp.max(bits_BV, axis=-1),
    jnp.full(b, v, jnp.int32), jnp.zeros(b, jnp.int32),
  )  # fmt: skip
  return jax.lax.while_loop(is_open, step, start)[1]


def support_threshold(
  scaled_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
  """Per-row threshold of the kept support, as ordered bits: token v is kept if its bits reach it.

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
    threshold_B = jax.lax.cond(jnp.any(top_p_B < 1), by_mass, lambda low_B: low_B, threshold_B)

  def by_peak(low_B):
    least_B = _ordered_bits(jnp.max(scaled_BV, axis=-1) + jnp.log(min_p_B))
    return jnp.where(min_p_B > 0, jnp.maximum(low_B, least_B), low_B)

  with jax.named_scope("min_p"):
    return jax.lax.cond(jnp.any(min_p_B > 0), by_peak, lambda low_B: low_B, threshold_B)


def support(
  scaled_BV: jax.Array, top_p_B: jax.Array, top_k_B: jax.Array, min_p_B: jax.Array
) -> jax.Array:
  """bool [B, V]: the tokens that `draw` can give; arguments as of `support_threshold`."""
  threshold_B = support_threshold(scaled_BV, top_p_B, top_k_B, min_p_B)
  return _ordered_bits(scaled_BV) >= threshold_B[:, None]


def _block_sums(scaled_BV: jax.Array, threshold_B: jax.Array | None, peak_B: jax.Array):
  """Sums of exp(scaled - peak) over blocks of VOCAB_BLOCK tokens, of kept ones if cut."""
  weight_BV = jnp.exp(scaled_BV - peak_B[:, None])
  if threshold_B is not None:
    weight_BV = jnp.where(_ordered_bits(scaled_BV) >= threshold_B[:, None], weight_BV, 0.0)
  missing = -weight_BV.shape[1] % VOCAB_BLOCK
  weight_BV = jnp.pad(weight_BV, ((0, 0), (0, missing))) if missing else weight_BV
  return jnp.sum(weight_BV.reshape(len(weight_BV), -1, VOCAB_BLOCK), axis=-1)


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

  def among(logits_BV, threshold_B):
    """Ids and log-probs of all rows; None keeps every token."""
    scaled_BV = logits_BV / divisor_B[:, None]
    peak_B = jnp.max(scaled_BV, axis=-1)
    sum_BX = _block_sums(scaled_BV, threshold_B, peak_B)
    total_B = jnp.sum(sum_BX, axis=-1)
    block_B, before_B = _search(sum_BX, uniform_B * total_B)
    inside_BY = _take_block(logits_BV, block_B) / divisor_B[:, None]
    weight_BY = jnp.exp(inside_BY - peak_B[:, None])
    if threshold_B is not None:
      weight_BY = jnp.where(_ordered_bits(inside_BY) >= threshold_B[:, None], weight_BY, 0.0)
    place_B, _ = _search(weight_BY, uniform_B * total_B - before_B)
    id_B = (block_B * VOCAB_BLOCK + place_B).astype(jnp.int32)
    return id_B, peak_B + jnp.log(total_B)

  def special(logits_BV):
    scaled_BV = logits_BV / divisor_B[:, None]
    id_B, norm_B = among(logits_BV, support_threshold(scaled_BV, top_p_B, top_k_B, min_p_B))
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
        lambda x: jax.nn.logsumexp(x / divisor_B[:, None], axis=-1),
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
  chosen_B = jnp.take_along_axis(logits_BV, id_B[:, None], axis=-1)[:, 0] / divisor_B
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
