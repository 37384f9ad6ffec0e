"""`awf.grpo.attention.block_attend` on NVIDIA GPUs: its forward and backward passes as kernels.

Shapes and letters are those of `awf.grpo.attention`: q [I, K, G * X, H] (scaled), k and v
[I, K, X, H]; G query heads share a key/value head, and a block has X tokens. An instance of a
kernel has one block of queries (or of keys) of one head and walks the blocks that it may see (or
be seen by); the host waits for none of these loops.

Source: FlashAttention-2, arXiv:2307.08691, algorithms 1 and 2.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from awf.qwen.kernel import call, divide, dot, shape_of
from awf.qwen.model import NEG_INF


def _is_visible(i, j, segments, parents):
  """bool [X, X]: which keys of block j the queries of block i see."""
  own, parent, seen = segments[i], parents[i], segments[j]
  index = jnp.arange(own.shape[0], dtype=jnp.int32)
  is_related = (own[:, None] == seen[None, :]) | (parent[:, None] == seen[None, :])
  x = own.shape[0]
  return is_related & ((i * x + index)[:, None] >= (j * x + index)[None, :])


def _forward_kernel(q, k, v, keys, count, segments, parents, out, log_norm):
  i, head, g = (pl.program_id(axis) for axis in range(3))
  x = k.shape[2]
  rows = pl.ds(g * x, x)
  q_XH = q[i, head, rows, :]

  def key_block(step, carry):
    acc, top, norm = carry
    j = keys[i, step]
    is_visible = _is_visible(i, j, segments, parents)
    scores = jnp.where(is_visible, dot(q_XH, k[j, head].T), NEG_INF)
    new_top = jnp.maximum(top, jnp.max(scores, axis=1))
    weights = jnp.where(is_visible, jnp.exp(scores - new_top[:, None]), 0.0)
    decay = jnp.exp(top - new_top)
    part = dot(weights.astype(v.dtype), v[j, head])
    norm = norm * decay + jnp.sum(weights, axis=1)
    return acc * decay[:, None] + part, new_top, norm

  zero = jnp.zeros((x,), jnp.float32)
  start = jnp.zeros(q_XH.shape, jnp.float32), zero + NEG_INF, zero
  acc, top, norm = jax.lax.fori_loop(0, count[i], key_block, start)
  norm = jnp.maximum(norm, 1e-30)  # a query of padding may see nothing
  out[i, head, rows, :] = (acc / norm[:, None]).astype(out.dtype)
  log_norm[i, head, rows] = top + jnp.log(norm)


def _d_query_kernel(q, k, v, d_out, log_norm, delta, keys, count, segments, parents, d_q):
  i, head, g = (pl.program_id(axis) for axis in range(3))
  x = k.shape[2]
  rows = pl.ds(g * x, x)
  q_XH, d_out_XH = q[i, head, rows, :], d_out[i, head, rows, :]
  log_norm_X1, delta_X1 = log_norm[i, head, rows][:, None], delta[i, head, rows][:, None]

  def key_block(step, d_q_XH):
    j = keys[i, step]
    is_visible = _is_visible(i, j, segments, parents)
    k_XH = k[j, head]
    scores = dot(q_XH, k_XH.T)
    weights = jnp.where(is_visible, jnp.exp(scores - log_norm_X1), 0.0)
    d_scores = weights * (dot(d_out_XH, v[j, head].T) - delta_X1)
    return d_q_XH + dot(d_scores.astype(k.dtype), k_XH)

  found = jax.lax.fori_loop(0, count[i], key_block, jnp.zeros(q_XH.shape, jnp.float32))
  d_q[i, head, rows, :] = found.astype(d_q.dtype)


def _d_key_kernel(
  q, k, v, d_out, log_norm, delta, queries, count, segments, parents, d_k, d_v
):  # fmt: skip
  j, head = pl.program_id(0), pl.program_id(1)
  x = k.shape[2]
  num_g = q.shape[2] // x
  k_XH, v_XH = k[j, head], v[j, head]

  def query_block(step, carry):
    d_k_XH, d_v_XH = carry
    place, g = divide(step, num_g)
    i, rows = queries[j, place], pl.ds(g * x, x)
    is_visible = _is_visible(i, j, segments, parents)
    q_XH, d_out_XH = q[i, head, rows, :], d_out[i, head, rows, :]
    scores = dot(q_XH, k_XH.T)
    weights = jnp.where(is_visible, jnp.exp(scores - log_norm[i, head, rows][:, None]), 0.0)
    d_scores = weights * (dot(d_out_XH, v_XH.T) - delta[i, head, rows][:, None])
    d_v_XH += dot(weights.astype(v.dtype).T, d_out_XH)
    d_k_XH += dot(d_scores.astype(q.dtype).T, q_XH)
    return d_k_XH, d_v_XH

  zero = jnp.zeros(k_XH.shape, jnp.float32)
  found = jax.lax.fori_loop(0, count[j] * num_g, query_block, (zero, zero))
  d_k[j, head], d_v[j, head] = (grad.astype(d_k.dtype) for grad in found)


def forward(q, k, v, blocks) -> tuple[jax.Array, jax.Array]:
  """(outputs like q, float32 log-norms [I, K, G * X]) of `awf.grpo.attention.Blocks`."""
  num_g = q.shape[2] // k.shape[2]
  log_norm = jax.ShapeDtypeStruct(q.shape[:3], jnp.float32)
  return call(
    _forward_kernel,
    (*q.shape[:2], num_g),
    (shape_of(q), log_norm),
    q, k, v, blocks.keys_IJ, blocks.count_I, blocks.segments_IX, blocks.parents_IX,
  )  # fmt: skip


def backward(saved: tuple, d_out) -> tuple[Any, Any, Any]:
  """Gradients of q, k and v; `saved` is (q, k, v, blocks, out, log_norm)."""
  q, k, v, blocks, out, log_norm = saved
  delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  ids = blocks.segments_IX, blocks.parents_IX
  num_g = q.shape[2] // k.shape[2]
  given = q, k, v, d_out, log_norm, delta
  d_q = call(
    _d_query_kernel,
    (*q.shape[:2], num_g),
    shape_of(q),
    *given,
    blocks.keys_IJ,
    blocks.count_I,
    *ids,
  )
  d_k, d_v = call(
    _d_key_kernel,
    k.shape[:2],
    (shape_of(k), shape_of(v)),
    *given, blocks.queries_JI, blocks.count_J, *ids,
  )  # fmt: skip
  return d_q, d_k, d_v
