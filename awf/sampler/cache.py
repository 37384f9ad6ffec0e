"""The KV cache in chunks, and attention over the live part of it.

Letters beside the legend: C chunks of the context, W keys of one chunk, P prefill blocks, X
groups of decode rows. A layer's cache is a pair of arrays, keys [C, B, K, H, W] and values [C, B,
K, W, H]; token `t` of row `b` lies in chunk t // W at place t % W. Both are the right-hand side
of a plain matrix product as they lie, so no step transposes or packs them (on CPU the score
product takes a quarter of its time with keys [.., W, H]).

A row attends to its own chunks in order with an online softmax. Chunks past its length are masked
and change no bit of its result (weights exactly 0, correction exactly 1), so the result depends
neither on the allocated context nor on how long the neighbours are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from awf.qwen.config import QwenConfig
from awf.qwen.model import NEG_INF, Attend

Cache = tuple[tuple[jax.Array, jax.Array], ...]


def init_cache(config: QwenConfig, rows: int, chunks: int, chunk: int) -> Cache:
  """Zeros for `rows` rows of `chunks * chunk` tokens, one (keys, values) pair per layer."""
  lead, h, dtype = (chunks, rows, config.num_key_value_heads), config.head_dim, config.dtype
  return tuple(
    (jnp.zeros((*lead, h, chunk), dtype), jnp.zeros((*lead, chunk, h), dtype))
    for _ in range(config.num_hidden_layers)
  )


def _pin(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keeps one memory layout through the whole program, that of its arguments.

  Without it XLA:TPU lays the cache out anew for the writes of each part, with copies of the whole.
  A head size that does not fill a tile's 128 lanes gives them to the tokens.
  """
  minor = (3, 4) if values.shape[4] % 128 == 0 else (4, 3)
  return (
    with_layout_constraint(keys, Layout(major_to_minor=(0, 1, 2, 3, 4))),
    with_layout_constraint(values, Layout(major_to_minor=(0, 1, 2, *minor))),
  )


def _write_tokens(keys, values, k_BKH, v_BKH, c_B, write_B, w_B):
  """Writes row b's token at (c_B[b], write_B[b], w_B[b]), row by row, in the pinned layout."""

  def put(i, pair):
    keys, values = pair
    k_KH, v_KH = (jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False) for x in (k_BKH, v_BKH))
    at = (c_B[i], write_B[i], 0)
    keys = jax.lax.dynamic_update_slice(keys, k_KH[None, None, :, :, None], (*at, 0, w_B[i]))
    values = jax.lax.dynamic_update_slice(values, v_KH[None, None, :, None], (*at, w_B[i], 0))
    return _pin(keys, values)

  return jax.lax.fori_loop(0, k_BKH.shape[0], put, (keys, values))


def _chunked_attention(q_BKGTH, position_BT, num_chunks, load):
  """Online softmax over `num_chunks` (traced) chunks; `load(c)` gives (k_BKHW, v_BKWH) of chunk c.

  `position_BT` is the last key position that a query sees. A row that sees nothing yields zeros.
  """
  b, k, g, t, h = q_BKGTH.shape
  q = (q_BKGTH * jnp.asarray(h**-0.5, q_BKGTH.dtype)).reshape(b, k, g * t, h)
  last_B1Q1 = jnp.broadcast_to(position_BT[:, None, None], (b, 1, g, t)).reshape(b, 1, g * t, 1)

  def step(c, carry):
    peak, total, out = carry
    k_BKHW, v_BKWH = load(c)
    scores = jnp.einsum("bkqh,bkhw->bkqw", q, k_BKHW, preferred_element_type=jnp.float32)
    key_W = c * k_BKHW.shape[3] + jnp.arange(k_BKHW.shape[3], dtype=jnp.int32)
    is_visible = key_W[None, None, None] <= last_B1Q1
    scores = jnp.where(is_visible, scores, NEG_INF)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights = jnp.where(is_visible, jnp.exp(scores - new_peak[..., None]), 0.0)
    keep = jnp.exp(peak - new_peak)
    part = jnp.einsum(
      "bkqw,bkwh->bkqh", weights.astype(v_BKWH.dtype), v_BKWH, preferred_element_type=jnp.float32
    )
    total = total * keep + jnp.sum(weights, axis=-1)
    return new_peak, total, out * keep[..., None] + part

  zero = jnp.zeros((b, k, g * t), jnp.float32)
  start = (zero + NEG_INF, zero, jnp.zeros((b, k, g * t, h), jnp.float32))
  with jax.named_scope("live_chunks"):
    _, total, out = jax.lax.fori_loop(0, num_chunks, step, start)
  out = out / jnp.maximum(total, 1e-30)[..., None]
  return out.astype(q_BKGTH.dtype).reshape(b, k, g, t, h)


def decode_attend(
  position_B: jax.Array, is_running_B: jax.Array, group: int, is_pinned: bool = False
) -> Attend:
  """Attention of one new token per row; it first writes the token's key and value at `position_B`.

  Rows are worked on in groups of `group` neighbours, each with as many chunks as its longest
  running row needs. Rows that are not running write nothing (if `is_pinned`: to the last row, which
  nobody reads).
  """
  b = position_B.shape[0]
  num_groups = b // group
  last_B = jnp.where(is_running_B, position_B, -1)

  def attend(layer, q_B1NH, k_B1KH, v_B1KH, cache):
    del layer
    keys, values = cache
    width, (n, h), k = values.shape[3], q_B1NH.shape[2:], values.shape[2]
    nowhere = keys.shape[1] - is_pinned
    write_B = jnp.where(is_running_B, jnp.arange(b, dtype=jnp.int32), nowhere)
    c_B, w_B = position_B // width, position_B % width
    k_BKH, v_BKH = k_B1KH[:, 0].astype(keys.dtype), v_B1KH[:, 0].astype(values.dtype)
    if is_pinned:
      keys, values = _write_tokens(keys, values, k_BKH, v_BKH, c_B, write_B, w_B)
    else:
      keys = keys.at[c_B, write_B, :, :, w_B].set(k_BKH, mode="drop")
      values = values.at[c_B, write_B, :, w_B].set(v_BKH, mode="drop")
    q_XBKGTH = q_B1NH.reshape(num_groups, group, k, n // k, 1, h)
    last_XB1 = last_B.reshape(num_groups, group, 1)
    chunks_X = jnp.max(last_XB1, axis=(1, 2)) // width + 1  # -1 // width + 1 = 0: nothing to do

    def one_group(x, out):
      def load(c):
        start = (c, x * group, 0, 0, 0)
        return tuple(
          jax.lax.dynamic_slice(array, start, (1, group) + array.shape[2:])[0]
          for array in (keys, values)
        )

      part = _chunked_attention(q_XBKGTH[x], last_XB1[x], chunks_X[x], load)
      return jax.lax.dynamic_update_index_in_dim(out, part, x, 0)

    out = jax.lax.fori_loop(0, num_groups, one_group, jnp.zeros_like(q_XBKGTH))
    return out.reshape(b, 1, n, h), (keys, values)

  return attend


def prefill_attend(row_P: jax.Array, start_P: jax.Array, is_pinned: bool = False) -> Attend:
  """Attention of prompt blocks.

  Block p holds tokens start_P[p] ... start_P[p] + T - 1 of cache row row_P[p]. T divides the chunk,
  so a block lies in one chunk. All blocks are written before any attends, so blocks of one prompt
  may share a call. Padding blocks name a cache row that nobody reads.
  """

  def attend(layer, q_PTNH, k_PTKH, v_PTKH, cache):
    del layer
    keys, values = cache
    (p, t, n, h), k, width = q_PTNH.shape, values.shape[2], values.shape[3]
    position_PT = start_P[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
    k_PKHT, v_PKTH = jnp.moveaxis(k_PTKH, 1, 3), jnp.moveaxis(v_PTKH, 1, 2)
    for i in range(p):
      c, w = start_P[i] // width, start_P[i] % width
      block_k, block_v = k_PKHT[i].astype(keys.dtype), v_PKTH[i].astype(values.dtype)
      keys = jax.lax.dynamic_update_slice(keys, block_k[None, None], (c, row_P[i], 0, 0, w))
      values = jax.lax.dynamic_update_slice(values, block_v[None, None], (c, row_P[i], 0, w, 0))
    if is_pinned:
      keys, values = _pin(keys, values)

    def load(c):
      return keys[c, row_P], values[c, row_P]

    q_PKGTH = jnp.moveaxis(q_PTNH.reshape(p, t, k, n // k, h), 1, 3)
    num_chunks = jnp.max(start_P) // width + 1
    out_PKGTH = _chunked_attention(q_PKGTH, position_PT, num_chunks, load)
    return jnp.moveaxis(out_PKGTH, 3, 1).reshape(p, t, n, h), (keys, values)

  return attend


def copy_chunks(
  cache: Cache, copies_X3: jax.Array, num_copies: jax.Array, is_pinned: bool = False
) -> Cache:
  """Copies chunks between rows in place; `num_copies` lines are (source, target, chunk)."""

  def one(i, cache):
    source, target, c = copies_X3[i, 0], copies_X3[i, 1], copies_X3[i, 2]

    def move(array):
      size = (1, 1) + array.shape[2:]
      chunk = jax.lax.dynamic_slice(array, (c, source, 0, 0, 0), size)
      return jax.lax.dynamic_update_slice(array, chunk, (c, target, 0, 0, 0))

    cache = jax.tree.map(move, cache)
    return tuple(_pin(*pair) for pair in cache) if is_pinned else cache

  return jax.lax.fori_loop(0, num_copies, one, cache)
