"""Mesh from the config, and parameter-name -> PartitionSpec rules.

The mesh has three axes: `data` splits rows, `fsdp` splits rows and weights, `tensor` splits heads
and features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from awf.types import UserError

AXES = ("data", "fsdp", "tensor")

# First match wins. Kernels are [in, out]; LoRA a is [in, R], b is [R, out], stacked adapters lead
# with A. Quantised integers lie as the floats that they stand for, scales as their outputs
# ([out], or [groups, out]).
PARAM_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"embed/embedding(_q)?$", ("tensor", "fsdp")),
  (r"embed/embedding_scale$", ("tensor",)),
  (r"lm_head/kernel(_q)?$", ("fsdp", "tensor")),
  (r"lm_head/kernel_scale$", ("tensor",)),
  (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel(_q)?$", ("fsdp", "tensor")),
  (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel_scale$", ("tensor",)),
  (r"(o_proj|down_proj)/kernel(_q)?$", ("tensor", "fsdp")),
  (r"(o_proj|down_proj)/kernel_scale$", ("fsdp",)),
  (r"(q_proj|k_proj|v_proj)/bias$", ("tensor",)),
  (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/a$", ("fsdp", None)),
  (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/b$", (None, "tensor")),
  (r"(o_proj|down_proj)/a$", ("tensor", None)),
  (r"(o_proj|down_proj)/b$", (None, "fsdp")),
)


def make_mesh(
  data: int = -1,
  fsdp: int = 1,
  tensor: int = 1,
  devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # no stub
) -> Mesh:
  """Makes the mesh ("data", "fsdp", "tensor") over the devices; one size may be -1 (what is left).

  Raises:
    UserError: the sizes do not multiply to at most the number of devices, or more than one is -1.
  """
  devices = list(jax.devices() if devices is None else devices)
  sizes = [data, fsdp, tensor]
  if sizes.count(-1) > 1 or any(s == 0 or s < -1 for s in sizes):
    raise UserError(f"config.mesh: expected positive sizes, at most one -1, got {sizes}")
  fixed = int(np.prod([s for s in sizes if s != -1]))
  if -1 in sizes:
    sizes[sizes.index(-1)] = max(1, len(devices) // fixed)
  total = int(np.prod(sizes))
  if total > len(devices):
    raise UserError(
      f"config.mesh: data x fsdp x tensor = {total}, but {len(devices)} devices are here; lower it"
    )
  grid = np.asarray(devices[:total], dtype=object).reshape(sizes)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def spec_for(name: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
  """PartitionSpec of one parameter; a dimension that its mesh axis does not divide stays whole."""
  for pattern, axes in PARAM_RULES:
    if re.search(pattern, name):
      lead = len(shape) - len(axes)  # a stacked adapter axis stays whole
      full = (None,) * lead + axes
      fits = [a if a and shape[i] % mesh.shape[a] == 0 else None for i, a in enumerate(full)]
      return PartitionSpec(*fits)
  return PartitionSpec()


def tree_shardings(tree, mesh: Mesh):
  """NamedSharding for each leaf of a parameter tree, by its slash-joined path."""

  def leaf(path, x):
    name = "/".join(str(getattr(p, "key", getattr(p, "idx", p))) for p in path)
    return NamedSharding(mesh, spec_for(name, x.shape, mesh))

  return jax.tree_util.tree_map_with_path(leaf, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def abstract(tree, shardings):
  """The tree with jax.ShapeDtypeStruct leaves: what a jitted function is lowered with."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=s), tree, shardings
  )


def is_abstract(tree) -> bool:
  """Whether the tree's leaves are shapes, not arrays."""
  return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))
