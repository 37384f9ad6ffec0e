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
  key = jax.random.key(seed)
  for i, (where, tensor) in enumerate(checkpoint_layout(config, is_turned).items()):
    leaves = leaves_of(where, tensor.shape, DTYPES[dtype], quant)
    kinds = [jnp.dtype(kind) for _, kind in leaves.values()]  # the integers come first
    size = _SIZE * math.sqrt(3) / jnp.iinfo(kinds[0]).max if len(kinds) > 1 else _SIZE
    for (path, (shape, _)), kind in zip(leaves.items(), kinds, strict=True):
      sharding = sharding_of(path, shape, mesh)
      put(params, path, _draw(path[-1], shape, kind, sharding, size, jax.random.fold_in(key, i)))
  return params


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(
  leaf: str, shape: tuple[int, ...], kind: Any, sharding: Any, size: float, key: jax.Array
) -> jax.Array:
  """One leaf: norms are ones, biases zeros, scales of integers `size`."""
  x = _values(leaf, shape, kind, size, key)
  return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _values(leaf: str, shape: tuple[int, ...], kind: Any, size: Any, key: jax.Array) -> jax.Array:
  if leaf == "scale":
    return jnp.ones(shape, kind)
  if leaf == "bias":
    return jnp.zeros(shape, kind)
  if leaf.endswith("_scale"):
    return jnp.full(shape, size, kind)
  if jnp.issubdtype(kind, jnp.integer):
    most = jnp.iinfo(kind).max
    return jax.random.randint(key, shape, -most, most + 1, jnp.int8).astype(kind)
  return (size * jax.random.normal(key, shape, jnp.float32)).astype(kind)
