"""What the kernels for NVIDIA GPUs share: where they serve, how they are called, their products.

Written in Pallas for Triton, which needs compute capability 8.0 and tiles of powers of two.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

LEAST_CAPABILITY = 8.0
LEAST_ROWS = 16  # of a product


def serves(device: Any, head_dim: int) -> bool:
  """Whether kernels for heads of this size run on a jax.Device."""
  if device.platform != "gpu" or "nvidia" not in device.device_kind.lower():
    return False
  if importlib.util.find_spec("jax.experimental.pallas.triton") is None:  # JAX means to drop it
    return False
  is_power = head_dim & (head_dim - 1) == 0
  return float(device.compute_capability) >= LEAST_CAPABILITY and is_power and 16 <= head_dim <= 256


def call(
  kernel: Callable,
  grid: tuple[int, ...],
  out_shape: Any,
  *args: jax.Array,
  aliases: Mapping[int, int] | None = None,
) -> Any:
  """The kernel over a grid, with whole arrays in the GPU's memory; interpreted where there is none.

  Args:
    kernel: takes a reference of each argument, then of each output.
    grid: instances along each axis.
    out_shape: jax.ShapeDtypeStruct of each output.
    args: arguments.
    aliases: argument -> output that is the same memory.
  """
  options: dict[str, Any] = {"interpret": True}
  if jax.default_backend() == "gpu":
    from jax.experimental.pallas import triton

    options = {"compiler_params": triton.CompilerParams(num_warps=4, num_stages=2)}
  return pl.pallas_call(
    kernel, grid=grid, out_shape=out_shape, input_output_aliases=dict(aliases or {}), **options
  )(*args)


def shape_of(x: jax.Array) -> jax.ShapeDtypeStruct:
  """An output like `x`."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def dot(left: jax.Array, right: jax.Array) -> jax.Array:
  """Product in float32; of float32 arrays three that make up for the matrix units' mantissa."""
  exact: Any = None
  if left.dtype == jnp.float32:
    on_gpu = jax.default_backend() == "gpu"
    three_products = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    exact = three_products if on_gpu else jax.lax.Precision.HIGHEST
  return jnp.dot(left, right, precision=exact, preferred_element_type=jnp.float32)


def divide(x: Any, by: int) -> tuple[jax.Array, jax.Array]:
  """(x // by, x % by) of what is not negative, which spares Python's rounding."""
  divisor = jnp.int32(by)
  return jax.lax.div(x, divisor), jax.lax.rem(x, divisor)
