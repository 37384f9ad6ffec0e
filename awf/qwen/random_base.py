"""A base of random weights at true shapes: what mode bench measures without a download."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from awf.qwen.config import QwenConfig
from awf.qwen.layout import DTYPES, checkpoint_layout, leaves_of, put, sharding_of
from awf.qwen.quant import QuantConfig

_SIZE = 0.02  # standard deviation of a weight


def random_base(
  config: QwenConfig,
  dtype: str,
  mesh: Mesh | None,
  quant: QuantConfig,
  is_turned: bool,
  seed: int,
) -> dict[str, Any]:
  """The tree of `hf.load_params` with random numbers, made where they will lie.

  Args:
    config: architecture.
    dtype: stored dtype of what is not quantised.
    mesh: where the parameters live; None is the default device.
    quant: their layout.
    is_turned: as in `hf.load_params`.
    seed: equal seeds give equal weights.
  """
  params: dict[str, Any] = {}
  leaves = [
    (path, shape, kind)
    for where, tensor in checkpoint_layout(config, is_turned).items()
    for path, (shape, kind) in leaves_of(where, tensor.shape, DTYPES[dtype], quant).items()
  ]
  for i, (path, shape, kind) in enumerate(leaves):
    key = jax.random.fold_in(jax.random.key(seed), i)
    sharding = sharding_of(path, shape, mesh)
    put(params, path, _draw(path[-1], shape, jnp.dtype(kind), sharding, key))
  return params


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(leaf: str, shape: tuple[int, ...], kind: Any, sharding: Any, key: jax.Array) -> jax.Array:
  """One leaf: norms are ones, biases zeros, scales those of numbers of `_SIZE`."""
  x = _values(leaf, shape, kind, key)
  return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _values(leaf: str, shape: tuple[int, ...], kind: Any, key: jax.Array) -> jax.Array:
  if leaf == "scale":
    return jnp.ones(shape, kind)
  if leaf == "bias":
    return jnp.zeros(shape, kind)
  if leaf.endswith("_scale"):
    return jnp.full(shape, _SIZE * math.sqrt(3) / 127, kind)
  if jnp.issubdtype(kind, jnp.integer):
    most = jnp.iinfo(kind).max
    return jax.random.randint(key, shape, -most, most + 1, jnp.int8).astype(kind)
  return (_SIZE * jax.random.normal(key, shape, jnp.float32)).astype(kind)
