"""A product with a frozen matrix and one low-rank adapter for all rows: x W + (x a) b.

The gradients are written out. By the products' own rules XLA's CPU compiler turns the inputs and
the output's gradient for those of `a` and `b`, which costs more than all products together; and
what the backward pass can make again from `x` would be kept.

On a CPU, many rows in float32 are multiplied by W + a b, which is made where it is used: one small
product and one addition of the matrix's size, in place of two products and an addition of the
activations' size. Nowhere else: in bfloat16 the sum would round the adapter away.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from awf.qwen.quant import (
  Kernel,
  QuantKernel,
  Transposed,
  at_compute_dtype,
  matmul,
  matmul_transposed,
  no_gradient,
)

MERGE_ROWS = 256  # fewer do not pay for the sum of the matrices


@jax.custom_vjp
def adapted_matmul(x: jax.Array, kernel: Kernel, a: jax.Array, b: jax.Array) -> jax.Array:
  """x W + (x a) b in the dtype of `x`.

  Args:
    x: [..., in], compute dtype.
    kernel: W, [in, out], of any layout; gets no gradient.
    a: [in, R], float32 on every platform; the products with it are float32.
    b: [R, out], likewise, the adapter's scale included.
  """
  return _forward(x, kernel, a, b)


def _is_merged(x: jax.Array, kernel: Kernel) -> bool:
  rows = math.prod(x.shape[:-1])
  return not isinstance(kernel, QuantKernel) and x.dtype == jnp.float32 and rows >= MERGE_ROWS


def _forward(x, kernel, a, b):
  def beside(x, kernel, a, b):
    base = matmul(x, at_compute_dtype(kernel, x.dtype))
    return base + ((x.astype(a.dtype) @ a) @ b).astype(x.dtype)

  def merged(x, kernel, a, b):
    return matmul(x, _sum(x, kernel, a, b))

  if not _is_merged(x, kernel):
    return beside(x, kernel, a, b)
  return jax.lax.platform_dependent(x, kernel, a, b, cpu=merged, default=beside)


def _d_input(d_y, d_low, kernel, a, b):
  """The gradient of x, given that of x a."""

  def beside(d_y, d_low, kernel, a, b):
    del b
    base = matmul_transposed(d_y, at_compute_dtype(kernel, d_y.dtype))
    return base + jnp.einsum("...r,ir->...i", d_low, a).astype(d_y.dtype)

  def merged(d_y, d_low, kernel, a, b):
    del d_low
    return matmul_transposed(d_y, _sum(d_y, kernel, a, b))

  if not _is_merged(d_y, kernel):
    return beside(d_y, d_low, kernel, a, b)
  return jax.lax.platform_dependent(d_y, d_low, kernel, a, b, cpu=merged, default=beside)


def _sum(x, kernel, a, b) -> Kernel:
  """W + a b in the layout of W, as a function of `x`.

  Else XLA would keep it from the forward to the backward pass, or make the sums of all matrices
  before a loop, a copy of the whole base.
  """
  zero = jnp.floor(jnp.clip(jnp.abs(x[(0,) * x.ndim]), 0.0, 0.5)).astype(a.dtype)
  if isinstance(kernel, Transposed):
    return Transposed(kernel.table.astype(x.dtype) + jnp.einsum("ro,ir->oi", b, a + zero))
  return kernel.astype(x.dtype) + (a + zero) @ b


def _fwd(x, kernel, a, b):
  return _forward(x, kernel, a, b), (x, kernel, a, b)


def _bwd(saved, d_y):
  x, kernel, a, b = saved
  x_xi = x.reshape(-1, x.shape[-1]).astype(a.dtype)
  d_xo = d_y.reshape(-1, d_y.shape[-1]).astype(b.dtype)
  d_low_xR = jnp.einsum("xo,ro->xr", d_xo, b)
  d_low = d_low_xR.reshape(*d_y.shape[:-1], -1)
  # Behind a barrier the transpose stays one of a small matrix.
  d_a = jax.lax.optimization_barrier(jnp.einsum("xr,xi->ri", d_low_xR, x_xi)).T
  d_b = jnp.einsum("xr,xo->ro", x_xi @ a, d_xo)
  return _d_input(d_y, d_low, kernel, a, b), jax.tree.map(no_gradient, kernel), d_a, d_b


adapted_matmul.defvjp(_fwd, _bwd)
