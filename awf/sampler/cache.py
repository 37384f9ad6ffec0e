"""The KV cache: prompts in shared pages, completions in rows, and attention over the live part.

Letters beside the legend: C chunks of a context, W tokens of one chunk or page, P pages or prefill
blocks, X share groups worked on at once, M rows of one share group, Q queries of one product.

A layer's cache holds four arrays. Prompts: keys [P, K, H, W] and values [P, K, W, H], P pages of W
tokens that any number of rows read, so the samples of a prompt, and prompts that begin alike, keep
one copy; the last page takes padding. Completions: keys [C, B, K, H, W] and values [C, B, K, W, H],
token `t` of row `b` in chunk t // W at place t % W. All are the right-hand side of a plain matrix
product as they lie, so no step transposes or packs them (on CPU the score product takes a quarter
of its time with keys [.., W, H]).

A row attends to its prompt's pages in order, then to its own chunks in order, with one online
softmax. Chunks past its length are masked and change no bit of its result (weights exactly 0,
correction exactly 1), so the result depends neither on the allocated context, nor on who else reads
a page, nor on how long the neighbours are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from awf.qwen.config import QwenConfig
from awf.qwen.model import NEG_INF, Attend


class LayerCache(NamedTuple):
  """Keys and values of one layer, arrays or what stands for them; the module says their shapes."""

  prompt_keys: Any
  prompt_values: Any
  keys: Any
  values: Any


Cache = tuple[LayerCache, ...]
_Carry = tuple[jax.Array, jax.Array, jax.Array]  # peak, total [B, K, Q] and output [B, K, Q, H]


@dataclasses.dataclass(frozen=True)
class CacheSizes:
  """Sizes of a cache, one padding page and, where rows are pinned, one padding row included."""

  pages: int
  page: int  # tokens
  rows: int
  chunks: int  # of a completion
  chunk: int  # tokens


def init_cache(config: QwenConfig, sizes: CacheSizes) -> Cache:
  """Zeros, one LayerCache per layer."""
  k, h = config.num_key_value_heads, config.head_dim
  pages, own = (sizes.pages, k), (sizes.chunks, sizes.rows, k)
  w, y = sizes.page, sizes.chunk
  shapes = ((*pages, h, w), (*pages, w, h), (*own, h, y), (*own, y, h))
  return tuple(
    LayerCache(*(jnp.zeros(shape, config.dtype) for shape in shapes))
    for _ in range(config.num_hidden_layers)
  )


def token_bytes(config: QwenConfig) -> int:
  """Bytes of one token's keys and values over all layers."""
  itemsize = 2 if config.dtype == "bfloat16" else 4
  heads = config.num_key_value_heads * config.head_dim
  return 2 * config.num_hidden_layers * heads * itemsize


def _pin(keys: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Keeps one memory layout through the whole program, that of its arguments.

  Without it XLA:TPU lays the cache out anew for the writes of each part, with copies of the whole.
  A head size that does not fill a tile's 128 lanes gives them to the tokens.
  """
  n = values.ndim
  lead = tuple(range(n - 2))
  minor = (n - 2, n - 1) if values.shape[-1] % 128 == 0 else (n - 1, n - 2)
  return (
    with_layout_constraint(keys, Layout(major_to_minor=(*lead, n - 2, n - 1))),
    with_layout_constraint(values, Layout(major_to_minor=(*lead, *minor))),
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


# --- attention


def _nothing(shape_BKQ: tuple[int, int, int], h: int) -> _Carry:
  """The online softmax before the first key."""
  zero = jnp.zeros(shape_BKQ, jnp.float32)
  return zero + NEG_INF, zero, jnp.zeros((*shape_BKQ, h), jnp.float32)


def _product(spec: str, left, right):
  """Batched product in float32; `right` may come as a tuple, one array per batch element."""
  if not isinstance(right, tuple):
    return jnp.einsum(spec, left, right, preferred_element_type=jnp.float32)
  spec = spec.replace("b", "")
  return jnp.stack(
    [jnp.einsum(spec, left[i], x, preferred_element_type=jnp.float32) for i, x in enumerate(right)]
  )


def _attend_chunks(q_BKQH, last_BQ, num_chunks, load: Callable, carry: _Carry) -> _Carry:
  """Goes on with an online softmax over `num_chunks` (traced) chunks.

  `load(c)` gives (k_BKHW, v_BKWH) of chunk c; `last_BQ` is the last key that a query sees.
  """
  last_B1Q1 = last_BQ[:, None, :, None]

  def step(c, carry):
    peak, total, out = carry
    k_BKHW, v_BKWH = load(c)
    scores = _product("bkqh,bkhw->bkqw", q_BKQH, k_BKHW)
    width = scores.shape[3]
    key_W = c * width + jnp.arange(width, dtype=jnp.int32)
    is_visible = key_W[None, None, None] <= last_B1Q1
    scores = jnp.where(is_visible, scores, NEG_INF)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
    weights = jnp.where(is_visible, jnp.exp(scores - new_peak[..., None]), 0.0)
    keep = jnp.exp(peak - new_peak)
    part = _product("bkqw,bkwh->bkqh", weights.astype(q_BKQH.dtype), v_BKWH)
    total = total * keep + jnp.sum(weights, axis=-1)
    return new_peak, total, out * keep[..., None] + part

  return jax.lax.fori_loop(0, num_chunks, step, carry)


def _finite(values: jax.Array) -> jax.Array:
  """Values to keep: zero times what is not finite would spoil those who may not see it."""
  return jnp.where(jnp.isfinite(values), values, 0)


def _finish(carry: _Carry, dtype) -> jax.Array:
  """Outputs [B, K, Q, H]; a query that saw no key gets zeros."""
  _, total, out = carry
  return (out / jnp.maximum(total, 1e-30)[..., None]).astype(dtype)


def _load_pages(keys, values, page_X, unrolled: bool):
  """(keys [X, K, H, W], values [X, K, W, H]) of some pages.

  Unrolled, each page is a slice of its own, which XLA:TPU reads in place where a gather would be
  written out first; on CPU a gather is the cheaper of the two.
  """
  if not unrolled:
    return keys[page_X], values[page_X]
  return tuple(
    tuple(
      jax.lax.dynamic_index_in_dim(array, page_X[i], 0, keepdims=False)
      for i in range(page_X.shape[0])
    )
    for array in (keys, values)
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sharing:
  """Which rows read which pages during one dispatch; S prompts, A share groups of M rows each."""

  pages_SC: jax.Array  # int32, pages of each prompt, in order
  known_S: jax.Array  # int32, tokens of each prompt that the pages hold
  rows_AM: jax.Array  # int32, rows of each share group, all of one prompt; B where there is none
  prompt_A: jax.Array  # int32, their prompt
  num_groups: jax.Array  # int32 scalar, share groups in use, those first
  row_L: jax.Array  # int32, rows that read their prompt alone
  prompt_L: jax.Array  # int32, their prompt
  num_lone: jax.Array  # int32 scalar, such rows, those first


def _prompt_part(
  q_BKGH, keys, values, sharing: Sharing, at_once: tuple[int, int], unrolled: bool
) -> _Carry:
  """The online softmax [B, K, G] of every row over its prompt's pages, each page read once a group.

  `at_once` share groups and lone rows are worked on together, with as many pages as the longest
  prompt of theirs. Lone rows are groups of one: a product for a whole group would cost them three
  times as much, but may differ from theirs in the last digit.
  """
  b, k, g, h = q_BKGH.shape
  carry = _nothing((b, k, g), h)
  shared = sharing.rows_AM, sharing.prompt_A, sharing.num_groups
  alone = sharing.row_L[:, None], sharing.prompt_L, sharing.num_lone
  for name, size, groups in (
    ("share_groups", at_once[0], shared),
    ("lone_rows", at_once[1], alone),
  ):
    if size:
      with jax.named_scope(name):
        carry = _group_part(q_BKGH, keys, values, sharing, size, unrolled, groups, carry)
  return carry


def _group_part(q_BKGH, keys, values, sharing, at_once, unrolled, groups, carry) -> _Carry:
  """`carry` with the rows of `groups` put in: (rows_AM, prompt_A, how many of them)."""
  rows_AM, prompt_A, num_groups = groups
  _, k, g, h = q_BKGH.shape
  width, m = values.shape[2], rows_AM.shape[1]

  def some_groups(i, carry):
    rows_XM, prompt_X = (
      jax.lax.dynamic_slice_in_dim(x, i * at_once, at_once) for x in (rows_AM, prompt_A)
    )
    q_XMKGH = jnp.take(q_BKGH, rows_XM, axis=0, mode="clip")
    q_XKQH = jnp.moveaxis(q_XMKGH, 1, 2).reshape(at_once, k, m * g, h)
    known_X, page_XC = sharing.known_S[prompt_X], sharing.pages_SC[prompt_X]
    is_used_X = jnp.arange(at_once) + i * at_once < num_groups
    num_pages = jnp.max(jnp.where(is_used_X, (known_X + width - 1) // width, 0))
    last_XQ = jnp.broadcast_to(known_X[:, None] - 1, (at_once, m * g))

    def load(c):
      page_X = jax.lax.dynamic_index_in_dim(page_XC, c, 1, keepdims=False)
      return _load_pages(keys, values, page_X, unrolled)

    with jax.named_scope("prompt_chunks"):
      found = _attend_chunks(q_XKQH, last_XQ, num_pages, load, _nothing((at_once, k, m * g), h))

    def put(all_rows, x):
      x = jnp.moveaxis(x.reshape(at_once, k, m, g, *x.shape[3:]), 2, 1)
      x = x.reshape(at_once * m, k, g, *x.shape[4:])
      return all_rows.at[rows_XM.reshape(-1)].set(x, mode="drop")

    return tuple(put(all_rows, x) for all_rows, x in zip(carry, found, strict=True))

  return jax.lax.fori_loop(0, (num_groups + at_once - 1) // at_once, some_groups, carry)


def decode_attend(
  made_B: jax.Array,
  is_running_B: jax.Array,
  sharing: Sharing,
  group: int,
  at_once: tuple[int, int],
  is_pinned: bool = False,
) -> Attend:
  """Attention of one new token per row; it first writes the token's key and value.

  Args:
    made_B: int32, place of the token among the row's own, from 0.
    is_running_B: rows that are not running write nothing (if `is_pinned`: to the last row, which
      nobody reads).
    sharing: prompts of the rows.
    group: neighbouring rows that are worked on together, with as many of their own chunks as the
      longest running row of theirs needs.
    at_once: share groups, and lone rows, that are worked on together.
    is_pinned: one memory layout throughout, and pages read in place; for TPUs.
  """
  b = made_B.shape[0]
  num_groups = b // group
  last_B = jnp.where(is_running_B, made_B, -1)

  def attend(q_B1NH, k_B1KH, v_B1KH, cache: LayerCache):
    prompt_keys, prompt_values, keys, values = cache
    if is_pinned:
      prompt_keys, prompt_values = _pin(prompt_keys, prompt_values)
    width, (n, h), k = values.shape[3], q_B1NH.shape[2:], values.shape[2]
    g = n // k
    nowhere = keys.shape[1] - is_pinned
    write_B = jnp.where(is_running_B, jnp.arange(b, dtype=jnp.int32), nowhere)
    c_B, w_B = made_B // width, made_B % width
    k_BKH, v_BKH = k_B1KH[:, 0].astype(keys.dtype), _finite(v_B1KH[:, 0].astype(values.dtype))
    if is_pinned:
      keys, values = _write_tokens(keys, values, k_BKH, v_BKH, c_B, write_B, w_B)
    else:
      keys = keys.at[c_B, write_B, :, :, w_B].set(k_BKH, mode="drop")
      values = values.at[c_B, write_B, :, w_B].set(v_BKH, mode="drop")
    q_BKGH = (q_B1NH * jnp.asarray(h**-0.5, q_B1NH.dtype)).reshape(b, k, g, h)
    state = _prompt_part(q_BKGH, prompt_keys, prompt_values, sharing, at_once, is_pinned)
    chunks_Y = jnp.max(last_B.reshape(num_groups, group), axis=1) // width + 1

    def one_group(y, out):
      rows = (y * group, group)
      q, last, peak, total, so_far = (
        jax.lax.dynamic_slice_in_dim(x, *rows)
        for x in (q_BKGH, jnp.broadcast_to(last_B[:, None], (b, g)), *state)
      )

      def load(c):
        start = (c, y * group, 0, 0, 0)
        return tuple(
          jax.lax.dynamic_slice(array, start, (1, group) + array.shape[2:])[0]
          for array in (keys, values)
        )

      # A cache of one chunk is read where it lies; keys that nobody sees change nothing.
      num_chunks = 1 if keys.shape[0] == 1 else chunks_Y[y]
      with jax.named_scope("live_chunks"):
        part = _finish(_attend_chunks(q, last, num_chunks, load, (peak, total, so_far)), q.dtype)
      return jax.lax.dynamic_update_slice_in_dim(out, part, y * group, 0)

    out = jax.lax.fori_loop(0, num_groups, one_group, jnp.zeros_like(q_BKGH))
    return out.reshape(b, 1, n, h), LayerCache(prompt_keys, prompt_values, keys, values)

  return attend


def prefill_attend(
  prompt_P: jax.Array, start_P: jax.Array, pages_SC: jax.Array, is_pinned: bool = False
) -> Attend:
  """Attention of prompt blocks.

  Block p holds tokens start_P[p] ... start_P[p] + T - 1 of prompt prompt_P[p]. T divides a page, so
  a block lies in one page. All blocks are written before any attends, so blocks of one prompt may
  share a call. Padding blocks name prompt S, whose tokens go to the last page, which nobody reads.
  """

  def attend(q_PTNH, k_PTKH, v_PTKH, cache: LayerCache):
    keys, values = cache.prompt_keys, cache.prompt_values
    (p, t, n, h), k, width = q_PTNH.shape, values.shape[1], values.shape[2]
    position_PT = start_P[:, None] + jnp.arange(t, dtype=jnp.int32)[None]
    page_PC = jnp.take(pages_SC, prompt_P, axis=0, mode="fill", fill_value=keys.shape[0] - 1)
    k_PKHT, v_PKTH = jnp.moveaxis(k_PTKH, 1, 3), _finite(jnp.moveaxis(v_PTKH, 1, 2))
    for i in range(p):
      page, w = page_PC[i, start_P[i] // width], start_P[i] % width
      block_k, block_v = k_PKHT[i, None].astype(keys.dtype), v_PKTH[i, None].astype(values.dtype)
      keys = jax.lax.dynamic_update_slice(keys, block_k, (page, 0, 0, w))
      values = jax.lax.dynamic_update_slice(values, block_v, (page, 0, w, 0))
    if is_pinned:
      keys, values = _pin(keys, values)

    def load(c):
      page_P = jax.lax.dynamic_index_in_dim(page_PC, c, 1, keepdims=False)
      return _load_pages(keys, values, page_P, is_pinned)

    g = n // k
    q_PKGTH = jnp.moveaxis((q_PTNH * h**-0.5).astype(q_PTNH.dtype).reshape(p, t, k, g, h), 1, 3)
    q_PKQH = q_PKGTH.reshape(p, k, g * t, h)
    last_PQ = jnp.broadcast_to(position_PT[:, None], (p, g, t)).reshape(p, g * t)
    num_chunks = jnp.max(start_P) // width + 1
    with jax.named_scope("live_chunks"):
      carry = _attend_chunks(q_PKQH, last_PQ, num_chunks, load, _nothing((p, k, g * t), h))
    out_PKGTH = _finish(carry, q_PTNH.dtype).reshape(p, k, g, t, h)
    out_PTNH = jnp.moveaxis(out_PKGTH, 3, 1).reshape(p, t, n, h)
    return out_PTNH, cache._replace(prompt_keys=keys, prompt_values=values)

  return attend
