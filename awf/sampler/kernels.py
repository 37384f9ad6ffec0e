"""Attention kernels for NVIDIA GPUs: one launch for a decode step, two for a prefill call.

The loops of `awf.sampler.cache` have trip counts that the host of a GPU waits for, chunk by chunk
and layer by layer; here each row walks its own pages inside one kernel. Same cache, same result
within rounding; a row depends on its own tokens alone. Letters are those of `awf.sampler.cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from awf.qwen.config import QwenConfig
from awf.qwen.kernel import LEAST_ROWS, call, divide, dot, serves, shape_of
from awf.qwen.model import NEG_INF, Attend
from awf.sampler.cache import LayerCache

TILE = 64  # keys of one product
INSTANCES = 2048  # of the decode kernel: what keeps an H200 busy while half of the rows rest
MOST_SPLITS = 8


def can_attend(config: QwenConfig, mesh: jax.sharding.Mesh | None) -> bool:
  """Whether an engine on this mesh (None: the default device) has its attention from here."""
  return mesh is None and serves(jax.devices()[0], config.head_dim)


def num_splits(config: QwenConfig, rows: int, context: int) -> int:
  """Instances that share the keys of one row's key/value head, so that few rows fill a GPU too."""
  wanted = pl.next_power_of_2(pl.cdiv(INSTANCES, rows * config.num_key_value_heads))
  return min(wanted, MOST_SPLITS, pl.cdiv(context, TILE))


def _walk(q_QH: jax.Array, last_Q: jax.Array, tiles: tuple[Any, Any], load: Callable, carry):
  """Goes on with an online softmax over the tiles of keys tiles[0] ... tiles[1] - 1.

  `load(c)` gives (k_HW, v_WH) of tile c; query q sees the keys up to last_Q[q].
  """

  def step(c, carry):
    peak, total, out = carry
    k_HW, v_WH = load(c)
    key_W = c * TILE + jnp.arange(TILE, dtype=jnp.int32)
    is_visible = key_W[None, :] <= last_Q[:, None]
    scores = jnp.where(is_visible, dot(q_QH, k_HW), NEG_INF)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1))
    weights = jnp.where(is_visible, jnp.exp(scores - new_peak[:, None]), 0.0)
    keep = jnp.exp(peak - new_peak)
    part = dot(weights.astype(v_WH.dtype), v_WH)
    return new_peak, total * keep + jnp.sum(weights, axis=1), out * keep[:, None] + part

  return jax.lax.fori_loop(tiles[0], tiles[1], step, carry)


def _num_tiles(tokens):
  return divide(tokens + TILE - 1, TILE)[0]


def _tiles(keys, values, at: Callable, head) -> Callable:
  """`load` of `_walk`, where `at(c)` says at which place of the arrays chunk c lies."""
  per_chunk = keys.shape[-1] // TILE

  def load(c):
    chunk, part = divide(c, per_chunk)
    where = (*at(chunk), head)
    w = pl.ds(part * TILE, TILE) if per_chunk > 1 else slice(None)
    return keys[*where, :, w], values[*where, w, :]

  return load


def _decode_kernel(
  q, k_new, v_new, prompt_keys, prompt_values, keys, values, pages, known, made, order, out, peaks,
  totals, keys_out, values_out, *, num_q: int,
):  # fmt: skip
  """Part of a row's keys for one key/value head: the prompt's pages, then its own chunks.

  The parts of a row follow from its own lengths alone. The first has the new token, which is taken
  from the arguments, so nothing that was just written is read.
  """
  split, head, place = (pl.program_id(i) for i in range(3))
  b = order[place]
  num_splits = peaks.shape[0]
  made_b, known_b = made[b], known[b]
  # A product takes LEAST_ROWS queries or more; those beyond the head's own repeat its last.
  place_Q = jnp.arange(max(LEAST_ROWS, pl.next_power_of_2(num_q)), dtype=jnp.int32)
  place_Q = head * num_q + jnp.minimum(place_Q, num_q - 1)
  q_QH = q[b, place_Q, :]
  k_H, v_H = k_new[b, head], v_new[b, head]

  @pl.when((made_b >= 0) & (split == 0))
  def write():
    c, w = divide(made_b, keys.shape[4])
    keys_out[c, b, head, :, w] = k_H
    values_out[c, b, head, w, :] = v_H

  peak = jnp.sum(q_QH.astype(jnp.float32) * k_H.astype(jnp.float32)[None, :], axis=1)
  value = jnp.broadcast_to(v_H.astype(jnp.float32)[None, :], q_QH.shape)
  is_first = split == 0
  carry = (
    jnp.where(is_first, peak, NEG_INF),
    jnp.where(is_first, jnp.ones_like(peak), 0.0),
    jnp.where(is_first, value, 0.0),
  )
  num_prompt, num_own = _num_tiles(known_b), _num_tiles(made_b)
  start, stop = (divide(i * (num_prompt + num_own), num_splits)[0] for i in (split, split + 1))
  of_prompt = jnp.minimum(start, num_prompt), jnp.minimum(stop, num_prompt)
  of_own = jnp.maximum(start - num_prompt, 0), jnp.maximum(stop - num_prompt, 0)
  for last, tiles, load in (
    (known_b - 1, of_prompt, _tiles(prompt_keys, prompt_values, lambda c: (pages[b, c],), head)),
    (made_b - 1, of_own, _tiles(keys, values, lambda c: (c, b), head)),
  ):
    carry = _walk(q_QH, jnp.broadcast_to(last, peak.shape), tiles, load, carry)
  peak, total, value = carry
  peaks[split, b, place_Q] = peak
  totals[split, b, place_Q] = total
  out[split, b, place_Q, :] = value


def _merge(out_SBNH: jax.Array, peak_SBN: jax.Array, total_SBN: jax.Array) -> jax.Array:
  """The outputs [B, N, H] of S parts of each row's keys."""
  share_SBN = jnp.exp(peak_SBN - jnp.max(peak_SBN, axis=0, keepdims=True))
  total_BN = jnp.sum(total_SBN * share_SBN, axis=0)
  return jnp.sum(out_SBNH * share_SBN[..., None], axis=0) / total_BN[..., None]


def decode_attend(
  made_B: jax.Array,
  is_running_B: jax.Array,
  pages_BC: jax.Array,
  known_B: jax.Array,
  order_B: jax.Array,
  splits: int,
) -> Attend:
  """Attention of one new token per row, whose key and value are written too.

  Args:
    made_B: int32, place of the token among the row's own, from 0.
    is_running_B: other rows write nothing, and what they get means nothing.
    pages_BC: int32, pages of each row's prompt.
    known_B: int32, tokens of each row's prompt that the pages hold.
    order_B: int32, the rows in the order in which a GPU starts on them: the longest first, as what
      is started last decides when it is done.
    splits: of `num_splits`.
  """
  last_B = jnp.where(is_running_B, made_B, -1)
  known_B = jnp.where(is_running_B, known_B, 0)

  def attend(q_B1NH, k_B1KH, v_B1KH, cache: LayerCache):
    prompt_keys, prompt_values, keys, values = cache
    b, _, n, h = q_B1NH.shape
    k = k_B1KH.shape[2]
    q_BNH = (q_B1NH * jnp.asarray(h**-0.5, q_B1NH.dtype))[:, 0]
    shapes = (splits, b, n, h), (splits, b, n), (splits, b, n)
    *parts, keys, values = call(
      partial(_decode_kernel, num_q=n // k),
      (splits, k, b),
      (*(jax.ShapeDtypeStruct(x, jnp.float32) for x in shapes), shape_of(keys), shape_of(values)),
      q_BNH, k_B1KH[:, 0].astype(keys.dtype), v_B1KH[:, 0].astype(values.dtype),
      prompt_keys, prompt_values, keys, values, pages_BC, known_B, last_B, order_B,
      aliases={5: 3, 6: 4},
    )  # fmt: skip
    out_BNH = _merge(*parts).astype(q_B1NH.dtype)
    return out_BNH[:, None], LayerCache(prompt_keys, prompt_values, keys, values)

  return attend


def _write_kernel(k_new, v_new, keys, values, pages, start, keys_out, values_out):
  """Writes block p of one key/value head into its page."""
  del keys, values  # the outputs are the same memory
  p, head = pl.program_id(0), pl.program_id(1)
  block, width = k_new.shape[1], keys_out.shape[3]
  c, first_w = divide(start[p], width)
  page = pages[p, c]
  w = pl.ds(first_w, block) if block < width else slice(None)
  keys_out[page, head, :, w] = k_new[p, :, head, :].T
  values_out[page, head, w, :] = v_new[p, :, head, :]


def _prefill_kernel(q, keys, values, pages, start, out):
  """Block p's queries of one head, TILE of them."""
  p, n, part = (pl.program_id(i) for i in range(3))
  head, _ = divide(n, q.shape[2] // keys.shape[1])
  t = pl.ds(part * TILE, TILE)
  q_QH = q[p, t, n, :]
  q_QH = (q_QH * q_QH.shape[1] ** -0.5).astype(q_QH.dtype)
  first = start[p] + part * TILE
  last_Q = first + jnp.arange(TILE, dtype=jnp.int32)
  zero = jnp.zeros((TILE,), jnp.float32)
  carry = zero + NEG_INF, zero, jnp.zeros(q_QH.shape, jnp.float32)
  load = _tiles(keys, values, lambda c: (pages[p, c],), head)
  _, total, value = _walk(q_QH, last_Q, (0, _num_tiles(first + TILE)), load, carry)
  out[p, t, n, :] = (value / total[:, None]).astype(out.dtype)


def prefill_attend(prompt_P: jax.Array, start_P: jax.Array, pages_SC: jax.Array) -> Attend:
  """Attention of prompt blocks of a multiple of TILE; as `awf.sampler.cache.prefill_attend`."""

  def attend(q_PTNH, k_PTKH, v_PTKH, cache: LayerCache):
    keys, values = cache.prompt_keys, cache.prompt_values
    (p, t, n, _), k = q_PTNH.shape, values.shape[1]
    page_PC = jnp.take(pages_SC, prompt_P, axis=0, mode="fill", fill_value=keys.shape[0] - 1)
    keys, values = call(
      _write_kernel,
      (p, k),
      (shape_of(keys), shape_of(values)),
      k_PTKH.astype(keys.dtype), v_PTKH.astype(values.dtype), keys, values, page_PC, start_P,
      aliases={2: 0, 3: 1},
    )  # fmt: skip
    out_PTNH = call(
      _prefill_kernel,
      (p, n, t // TILE),
      shape_of(q_PTNH),
      q_PTNH, keys, values, page_PC, start_P,
    )  # fmt: skip
    return out_PTNH, cache._replace(prompt_keys=keys, prompt_values=values)

  return attend
