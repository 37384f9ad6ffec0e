"""Token losses through the head, in chunks of tokens: logits of a whole batch never exist.

The gradient with respect to the hidden states is made in the forward pass, chunk by chunk, while a
chunk's logits are at hand; nothing of vocabulary size is kept or recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from awf.qwen import quant
from awf.qwen.quant import (
  Kernel,
  Transposed,
  at_compute_dtype,
  frozen_logits,
  matmul_transposed,
  no_gradient,
)

HEAD_CHUNK = 512  # tokens; at a vocabulary of about 1,000 a chunk's logits stay in a CPU's cache
_CHUNK_VALUES = 24_000_000  # logits of a chunk at most: 96 MB, of which three exist at a time


def head_chunk(vocab_size: int) -> int:
  """Tokens whose logits exist at a time: `HEAD_CHUNK`, fewer for large vocabularies."""
  return max(64, min(HEAD_CHUNK, _CHUNK_VALUES // vocab_size // 64 * 64))


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
  """[n, ...] -> [ceil(n / chunk), chunk, ...], zero-padded."""
  missing = -x.shape[0] % chunk
  if missing:
    x = jnp.concatenate([x, jnp.zeros((missing, *x.shape[1:]), x.dtype)])
  return x.reshape(-1, chunk, *x.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted_nll(
  kernel_DV: Kernel,
  hidden_nD: jax.Array,
  target_n: jax.Array,
  weight_n: jax.Array,
  is_head_trained: bool = True,
  chunk: int = HEAD_CHUNK,
) -> jax.Array:
  """Sum of weight x negative log-likelihood of the targets, float32.

  The gradient is made in the forward pass, chunk by chunk, so that logits are computed once.

  Args:
    kernel_DV: head weights, of either layout (awf.qwen.quant).
    hidden_nD: final hidden states, one per position.
    target_n: int32 ids in [0, V).
    weight_n: float32; positions with weight 0 cost time but add nothing. It gets no gradient.
    is_head_trained: False gives the kernel a zero gradient and saves its matmul.
    chunk: positions whose logits exist at a time.
  """
  return _nll(kernel_DV, hidden_nD, target_n, weight_n, False, False, chunk)[0]


def _nll(kernel, hidden, target, weight, with_grad, with_kernel_grad, chunk):
  chunk = min(chunk, hidden.shape[0])
  num_v = kernel.shape[1]
  cast = at_compute_dtype(kernel, hidden.dtype)

  def one(carry, x):
    total, d_kernel = carry
    h, t, w = x
    logits = quant.logits(h, cast)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exp = jnp.exp(logits - top)
    norm = jnp.sum(exp, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, t[:, None], axis=-1)
    total += jnp.sum(w * (top + jnp.log(norm) - chosen)[:, 0])
    if not with_grad:
      return (total, d_kernel), None
    is_target = jnp.arange(num_v)[None] == t[:, None]
    d_logits = exp * (w[:, None] / norm) - jnp.where(is_target, w[:, None], 0.0)
    d_logits = d_logits.astype(h.dtype)
    if with_kernel_grad:
      d_kernel += (h.T @ d_logits).astype(jnp.float32)
    return (total, d_kernel), matmul_transposed(d_logits, cast)

  d_kernel = jnp.zeros(kernel.shape if with_kernel_grad else (), jnp.float32)
  xs = (_chunks(hidden, chunk), _chunks(target, chunk), _chunks(weight, chunk))
  (total, d_kernel), d_hidden = jax.lax.scan(one, (jnp.float32(0), d_kernel), xs)
  if d_hidden is not None:
    d_hidden = d_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]]
  return total, d_kernel, d_hidden


def _nll_fwd(kernel, hidden, target, weight, is_head_trained, chunk):
  total, d_kernel, d_hidden = _nll(kernel, hidden, target, weight, True, is_head_trained, chunk)
  return total, (d_kernel, d_hidden, kernel, target)


def _nll_bwd(is_head_trained, chunk, saved, g):
  del chunk
  d_kernel, d_hidden, kernel, target = saved
  if is_head_trained:
    d_kernel = (d_kernel * g).astype(kernel.dtype)
    d_kernel = Transposed(d_kernel.T) if isinstance(kernel, Transposed) else d_kernel
  else:
    d_kernel = jax.tree.map(no_gradient, kernel)
  no_grad = jnp.zeros(target.shape, jax.dtypes.float0)
  return d_kernel, d_hidden * g.astype(d_hidden.dtype), no_grad, jnp.zeros(target.shape)


weighted_nll.defvjp(_nll_fwd, _nll_bwd)


# fn(logits_BcV, data with leaves [B, c], scalars) -> (loss, aux with leaves [B, c])
TokenLoss = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def head_loss(
  kernel_DV: Kernel,
  hidden_BUD: jax.Array,
  data: Any,
  scalars: Any,
  num_targets: jax.Array,
  fn: TokenLoss,
  chunk: int = HEAD_CHUNK,
) -> tuple[jax.Array, Any]:
  """Sum of `fn` over chunks of the U axis, with a frozen head.

  Args:
    kernel_DV: head weights, of either layout; they get no gradient.
    hidden_BUD: final hidden states of the positions that predict a target.
    data: leaves [B, U], cut like hidden; no gradient.
    scalars: further arguments of fn; no gradient.
    num_targets: int32 scalar; chunks at and after it are not computed (their aux is 0).
    fn: the loss of one chunk; must give 0 for positions that are no targets.
    chunk: positions per row whose logits exist at a time.

  Returns:
    (loss, aux with leaves [B, U]).
  """
  return _head_loss(kernel_DV, hidden_BUD, data, scalars, num_targets, fn, chunk, False)[:2]


def _head_loss(kernel, hidden, data, scalars, num_targets, fn, chunk, with_grad):
  size = hidden.shape[1]
  chunk = min(chunk, size)
  pad = -size % chunk

  def padded(x):
    return jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)) if pad else x

  hidden, data = jax.tree.map(padded, (hidden, data))
  cast = at_compute_dtype(kernel, hidden.dtype)

  def of_chunk(h, d):
    return fn(frozen_logits(h, cast), d, scalars)

  def one(i, carry):
    total, aux, d_hidden = carry
    h, d = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1), (hidden, data)
    )
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=1)
    if with_grad:
      (loss, new), d_h = jax.value_and_grad(of_chunk, has_aux=True)(h, d)
      d_hidden = put(d_hidden, d_h)
    else:
      loss, new = of_chunk(h, d)
    return total + loss, jax.tree.map(put, aux, new), d_hidden

  first = jax.tree.map(lambda x: x[:, :chunk], (hidden, data))
  loss, aux = jax.eval_shape(of_chunk, *first)
  aux = jax.tree.map(lambda x: jnp.zeros((x.shape[0], size + pad, *x.shape[2:]), x.dtype), aux)
  zero = (jnp.zeros((), loss.dtype), aux, jnp.zeros_like(hidden) if with_grad else None)
  num_chunks = (num_targets + chunk - 1) // chunk
  with jax.named_scope("head_chunks"):
    total, aux, d_hidden = jax.lax.fori_loop(0, num_chunks, one, zero)
  if with_grad:
    d_hidden = d_hidden[:, :size]
  return total, jax.tree.map(lambda x: x[:, :size], aux), d_hidden


def _head_loss_fwd(kernel, hidden, data, scalars, num_targets, fn, chunk):
  total, aux, d_hidden = _head_loss(kernel, hidden, data, scalars, num_targets, fn, chunk, True)
  return (total, aux), (d_hidden, kernel, data, scalars, num_targets)


def _head_loss_bwd(fn, chunk, saved, g):
  del fn, chunk
  d_hidden, kernel, data, scalars, num_targets = saved
  none = jax.tree.map(no_gradient, (data, scalars, num_targets))
  return (jax.tree.map(no_gradient, kernel), d_hidden * g[0].astype(d_hidden.dtype), *none)


head_loss.defvjp(_head_loss_fwd, _head_loss_bwd)


@jax.custom_vjp
def logp_and_entropy(logits_xV: jax.Array, target_x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Log-probability of each target and entropy of its distribution, nats, in the logits' dtype.

  Both have gradients in closed form, made of the logits in one pass over the vocabulary.
  """
  return _logp_and_entropy_fwd(logits_xV, target_x)[0]


def _logp_and_entropy_fwd(logits_xV, target_x):
  top_x1 = jnp.max(logits_xV, axis=-1, keepdims=True)
  exp = jnp.exp(logits_xV - top_x1)
  # Sums as products: XLA's CPU compiler takes 20 times as long for a sum of products, and computes
  # the exponentials once more for a sum.
  ones_V = jnp.ones(exp.shape[-1], exp.dtype)
  norm_x1 = jnp.einsum("...v,v->...", exp, ones_V, precision="highest")[..., None]
  mean_x = jnp.einsum("...v,...v->...", exp, logits_xV - top_x1, precision="highest")
  mean_x1 = mean_x[..., None] / norm_x1
  chosen_x1 = jnp.take_along_axis(logits_xV, target_x[..., None], axis=-1) - top_x1
  log_norm_x1 = jnp.log(norm_x1)
  out = (chosen_x1 - log_norm_x1)[..., 0], (log_norm_x1 - mean_x1)[..., 0]
  return out, (logits_xV, target_x, top_x1, norm_x1, mean_x1)


def _logp_and_entropy_bwd(saved, d_out):
  logits_xV, target_x, top_x1, norm_x1, mean_x1 = saved
  d_logp_x1, d_entropy_x1 = (d[..., None] for d in d_out)
  shifted = logits_xV - top_x1
  factor = (d_entropy_x1 * mean_x1 - d_logp_x1) - d_entropy_x1 * shifted
  d_logits = jnp.exp(shifted) * (factor / norm_x1)
  is_target = target_x[..., None] == jax.lax.broadcasted_iota(
    target_x.dtype, logits_xV.shape, logits_xV.ndim - 1
  )
  return d_logits + jnp.where(is_target, d_logp_x1, 0.0), no_gradient(target_x)


logp_and_entropy.defvjp(_logp_and_entropy_fwd, _logp_and_entropy_bwd)
