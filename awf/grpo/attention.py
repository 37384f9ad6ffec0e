"""Attention over packed tokens: several sequences in a row, completions that share their prompt.

Each token carries two ids. `segments` names its own sequence; `parents` names one more that it may
see: for a token of a completion, its prompt; else the same as `segments`. Token t sees token s when
s is not after t in the row and s's segment is t's segment or t's parent. Id 0 is padding, whose
outputs are finite and meaningless.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from awf.grpo import attention_kernels
from awf.qwen.kernel import serves
from awf.qwen.model import NEG_INF, Attend

BLOCK = 64  # tokens per block of queries and keys in block_attend; measured best on a CPU
TPU_BLOCK = 256  # likewise; large enough for the matrix units
GPU_BLOCK = 64  # of the kernels


def prefers_blocks(mesh: Mesh | None) -> bool:
  """Whether `block_attend` serves: on one CPU device (it has no batch to shard)."""
  if mesh is None:
    return jax.default_backend() == "cpu"
  return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def has_kernels(mesh: Mesh, head_dim: int) -> bool:
  """Whether `block_attend` on this mesh has kernels of its own."""
  return mesh.size == 1 and serves(mesh.devices.flat[0], head_dim)


def packed_block(mesh: Mesh, head_dim: int) -> int:
  """Tokens per block with which `block_attend` serves one packed row on this mesh; 0: it does not.

  On a TPU the unrolled query blocks of `dense_attend` cost code and minutes of compilation: 50 MB
  and 110 CPU seconds for one layer of 7B at 1,536 tokens.
  """
  if mesh.size > 1:
    return 0
  if has_kernels(mesh, head_dim):
    return GPU_BLOCK
  return {"cpu": BLOCK, "tpu": TPU_BLOCK}.get(mesh.devices.flat[0].platform, 0)


def dense_attend(segments_BT: jax.Array, parents_BT: jax.Array, block: int = 128) -> Attend:
  """Query blocks against all keys up to the block's end; any backend, any sharding."""
  t = segments_BT.shape[1]
  index_T = jnp.arange(t)

  def attend(q_BTNH, k_BTKH, v_BTKH, cache):
    b, _, n, h = q_BTNH.shape
    k = k_BTKH.shape[2]
    q_BTKGH = (q_BTNH * h**-0.5).reshape(b, t, k, n // k, h)
    outs = []
    for start in range(0, t, block):
      end = min(t, start + block)
      own_BT1, parent_BT1 = segments_BT[:, start:end, None], parents_BT[:, start:end, None]
      seen_B1S = segments_BT[:, None, :end]
      is_visible_BTS = (own_BT1 == seen_B1S) | (parent_BT1 == seen_B1S)
      is_visible_BTS &= (index_T[start:end, None] >= index_T[None, :end])[None]
      scores = jnp.einsum("btkgh,bskh->bkgts", q_BTKGH[:, start:end], k_BTKH[:, :end])
      scores = jnp.where(is_visible_BTS[:, None, None], scores.astype(jnp.float32), NEG_INF)
      weights = jax.nn.softmax(scores, axis=-1).astype(v_BTKH.dtype)
      out = jnp.einsum("bkgts,bskh->btkgh", weights, v_BTKH[:, :end])
      outs.append(out.reshape(b, end - start, n, h))
    return jnp.concatenate(outs, axis=1), cache

  return attend


class Blocks(NamedTuple):
  """Key blocks that each of I query blocks looks at, and the ids of the masks; X tokens a block."""

  keys_IJ: jax.Array  # int32, visible key blocks first, ascending
  count_I: jax.Array  # int32, how many of them are visible
  queries_JI: jax.Array  # int32, query blocks that see key block j first, ascending
  count_J: jax.Array  # int32, how many of them do
  segments_IX: jax.Array
  parents_IX: jax.Array


def block_attend(
  segments_T: jax.Array, parents_T: jax.Array, block: int = BLOCK, has_kernels: bool = False
) -> Attend:
  """Attention of one row (B = 1) that visits visible blocks only; how many is no part of the shape.

  Its work follows the lengths of the sequences, whatever their arrangement, and one program serves
  all. The softmax is accumulated block by block and recomputed in the backward pass. `has_kernels`:
  by `awf.grpo.attention_kernels`, on a GPU.

  Source: FlashAttention, arXiv:2205.14135, algorithms 1 and 4.
  """
  t = segments_T.shape[0]
  pad = -t % block
  segments_IX = jnp.pad(segments_T, (0, pad)).reshape(-1, block)
  parents_IX = jnp.pad(parents_T, (0, pad)).reshape(-1, block)
  num_i = segments_IX.shape[0]
  is_seen_IJ = _related_blocks(segments_IX, parents_IX) & jnp.tri(num_i, dtype=bool)
  blocks = Blocks(*_listed(is_seen_IJ), *_listed(is_seen_IJ.T), segments_IX, parents_IX)

  def attend(q_BTNH, k_BTKH, v_BTKH, cache):
    n, h = q_BTNH.shape[2:]
    k = k_BTKH.shape[2]

    def split(x, scale=1.0):  # [1, T, heads, H] -> [I, K, heads / K * X, H]
      x = jnp.pad(x[0] * scale if scale != 1.0 else x[0], ((0, pad), (0, 0), (0, 0)))
      x = x.reshape(num_i, block, k, -1, h).transpose(0, 2, 3, 1, 4)
      return x.reshape(num_i, k, -1, h)

    q, key, v = split(q_BTNH, h**-0.5), split(k_BTKH), split(v_BTKH)
    out: jax.Array = _attend_blocks(q, key, v, blocks, has_kernels)
    out = out.reshape(num_i, k, n // k, block, h).transpose(0, 3, 1, 2, 4)
    return out.reshape(1, num_i * block, n, h)[:, :t], cache

  return attend


def _listed(is_seen_IJ: jax.Array) -> tuple[jax.Array, jax.Array]:
  """(int32 [I, J], those that are seen first; int32 [I], how many are) of a bool [I, J]."""
  order = jnp.argsort(~is_seen_IJ, axis=1, stable=True).astype(jnp.int32)
  return order, jnp.sum(is_seen_IJ, axis=1, dtype=jnp.int32)


def _related_blocks(segments_IX: jax.Array, parents_IX: jax.Array) -> jax.Array:
  """bool [I, J]: some token of block i may see one of block j, as far as ids tell.

  By the range of ids in block j, which may name too many blocks where ids do not ascend; their
  tokens are masked.
  """
  none = jnp.iinfo(segments_IX.dtype).max
  low_J = jnp.min(jnp.where(segments_IX > 0, segments_IX, none), axis=1)
  high_J = jnp.max(segments_IX, axis=1)

  def meets(ids_IX):
    ids_IX1 = ids_IX[:, :, None]
    is_inside = (ids_IX1 >= low_J[None, None]) & (ids_IX1 <= high_J[None, None])
    return jnp.any(is_inside & (ids_IX1 > 0), axis=1)

  return meets(segments_IX) | meets(parents_IX)


def _scores(q, k, i, j, segments_X, parents_X, blocks):
  """Masked float32 scores [K, heads / K * X, X] of query block i against key block j."""
  x = segments_X.shape[0]
  seen = blocks.segments_IX[j][None, :]
  is_visible = (segments_X[:, None] == seen) | (parents_X[:, None] == seen)
  is_visible &= (i * x + jnp.arange(x))[:, None] >= (j * x + jnp.arange(x))[None, :]
  bias = jnp.where(is_visible, 0.0, NEG_INF)
  scores = jnp.einsum("kmh,kxh->kmx", q, k).astype(jnp.float32)
  shape = scores.shape
  return (scores.reshape(shape[0], -1, x, x) + bias[None, None]).reshape(shape)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend_blocks(q, k, v, blocks: Blocks, has_kernels: bool) -> jax.Array:
  """q [I, K, heads / K * X, H] (scaled), k and v [I, K, X, H] -> like q."""
  return _attend_fwd(q, k, v, blocks, has_kernels)[0]


def _forward(q, k, v, blocks):
  def query_block(_, xs):
    i, q_i, count, keys, segments, parents = xs

    def key_block(step, carry):
      acc, top, norm = carry
      j = keys[step]
      scores = _scores(q_i, k[j], i, j, segments, parents, blocks)
      new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
      weights = jnp.exp(scores - new_top)
      decay = jnp.exp(top - new_top)
      norm = norm * decay + jnp.sum(weights, axis=-1, keepdims=True)
      acc = acc * decay + jnp.einsum("kmx,kxh->kmh", weights.astype(v.dtype), v[j])
      return acc, new_top, norm

    shape = (*q_i.shape[:-1], 1)
    zero = (jnp.zeros(q_i.shape), jnp.full(shape, NEG_INF), jnp.zeros(shape))
    with jax.named_scope("key_blocks"):
      acc, top, norm = jax.lax.fori_loop(0, count, key_block, zero)
    norm = jnp.maximum(norm, 1e-30)  # a block of padding alone looks at nothing
    return None, ((acc / norm).astype(q.dtype), (top + jnp.log(norm))[..., 0])

  xs = (jnp.arange(q.shape[0]), q, blocks.count_I, blocks.keys_IJ)
  _, (out, log_norm) = jax.lax.scan(query_block, None, (*xs, blocks.segments_IX, blocks.parents_IX))
  return out, log_norm


def _attend_fwd(q, k, v, blocks, has_kernels):
  forward = attention_kernels.forward if has_kernels else _forward
  out, log_norm = forward(q, k, v, blocks)
  return out, (q, k, v, blocks, out, log_norm)


def _attend_bwd(has_kernels, saved, d_out):
  backward = attention_kernels.backward if has_kernels else _backward
  blocks = saved[3]
  none = jax.tree.map(lambda x: jnp.zeros(x.shape, jax.dtypes.float0), blocks)
  return *backward(saved, d_out), none


def _backward(saved, d_out):
  q, k, v, blocks, out, log_norm = saved
  delta = jnp.sum((d_out * out).astype(jnp.float32), axis=-1)

  def query_block(carry, xs):
    i, q_i, d_out_i, log_norm_i, delta_i, count, keys, segments, parents = xs

    def key_block(step, carry):
      d_q, d_k, d_v = carry
      j = keys[step]
      scores = _scores(q_i, k[j], i, j, segments, parents, blocks)
      weights = jnp.exp(scores - log_norm_i[..., None])
      d_weights = jnp.einsum("kmh,kxh->kmx", d_out_i, v[j]).astype(jnp.float32)
      d_scores = (weights * (d_weights - delta_i[..., None])).astype(q.dtype)
      d_v = d_v.at[j].add(jnp.einsum("kmx,kmh->kxh", weights.astype(v.dtype), d_out_i))
      d_k = d_k.at[j].add(jnp.einsum("kmx,kmh->kxh", d_scores, q_i))
      return d_q + jnp.einsum("kmx,kxh->kmh", d_scores, k[j]), d_k, d_v

    d_k, d_v = carry
    start = (jnp.zeros(q_i.shape), d_k, d_v)
    with jax.named_scope("key_blocks"):
      d_q, d_k, d_v = jax.lax.fori_loop(0, count, key_block, start)
    return (d_k, d_v), d_q.astype(q.dtype)

  xs = (jnp.arange(q.shape[0]), q, d_out, log_norm, delta, blocks.count_I, blocks.keys_IJ)
  zero = (jnp.zeros(k.shape), jnp.zeros(v.shape))
  (d_k, d_v), d_q = jax.lax.scan(query_block, zero, (*xs, blocks.segments_IX, blocks.parents_IX))
  return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


_attend_blocks.defvjp(_attend_fwd, _attend_bwd)
