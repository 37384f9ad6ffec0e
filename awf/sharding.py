"""Mesh from the config, and parameter-name -> PartitionSpec rules.

The mesh has three axes: `data` splits rows, `fsdp` splits rows and weights, `tensor` splits heads
and features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
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
  devices = list(_all_devices() if devices is None else devices)
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
  grid = np.asarray(_even(devices, total), dtype=object).reshape(sizes)
  return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _all_devices() -> list[Any]:
  """The devices of all processes, each one's together."""
  return sorted(jax.devices(), key=lambda d: (d.process_index, d.id))


def _even(devices: list[Any], total: int) -> list[Any]:
  """The first devices of each process, equally many, so that none stands aside."""
  owners = sorted({d.process_index for d in devices})
  each = total // len(owners)
  rows = [[d for d in devices if d.process_index == owner][:each] for owner in owners]
  if total % len(owners) or any(len(row) < each for row in rows) or not each:
    raise UserError(
      f"config.mesh: data x fsdp x tensor = {total}, but {len(owners)} processes take part with "
      f"{[sum(d.process_index == o for d in devices) for o in owners]} devices: expected the same "
      "number of each; set config.mesh.data=-1 for all"
    )
  return [d for row in rows for d in row]


def local_mesh(mesh: Mesh) -> Mesh:
  """The part of a mesh that this process's devices make: its rows of `data`, all of the rest.

  Raises:
    UserError: another axis than `data` crosses processes; each samples on its own devices.
  """
  is_own = np.vectorize(lambda d: d.process_index == jax.process_index())(mesh.devices)
  count_D = is_own.reshape(len(is_own), -1).sum(axis=1)
  whole = mesh.shape["fsdp"] * mesh.shape["tensor"]
  if not set(count_D.tolist()) <= {0, whole}:
    sizes = " x ".join(f"{name} {mesh.shape[name]}" for name in AXES)
    raise UserError(
      f"config.mesh: {sizes} over {jax.process_count()} processes: only data may cross processes, "
      "for each samples on its own devices; expected fsdp x tensor to divide the "
      f"{jax.local_device_count()} devices of each, got {whole}"
    )
  return Mesh(mesh.devices[count_D == whole], AXES, axis_types=(AxisType.Auto,) * 3)


def spread(tree, mesh: Mesh):
  """Arrays that lie equally on each process's part of `mesh`, as arrays of the whole mesh.

  Nothing is copied. On a mesh of one process the tree itself.
  """
  if not _crosses(mesh):
    return tree

  def one(x, sharding):
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  return jax.tree.map(one, tree, tree_shardings(tree, mesh))


def gathered_here(tree, mesh: Mesh):
  """The reverse of `spread`: what this process's devices hold, as arrays of its own."""
  if not _crosses(mesh):
    return tree
  own = local_mesh(mesh)

  def one(x, sharding):
    parts = [shard.data for shard in x.addressable_shards]
    return jax.make_array_from_single_device_arrays(x.shape, sharding, parts)

  if own.size == 1:
    return jax.tree.map(lambda x: x.addressable_data(0), tree)
  return jax.tree.map(one, tree, tree_shardings(tree, own))


def _crosses(mesh: Mesh) -> bool:
  return len({d.process_index for d in mesh.devices.flat}) > 1


def place(tree, shardings):
  """Puts arrays that every process has whole where `shardings` say; each process its own part."""

  def one(x, sharding):
    if sharding.is_fully_addressable:
      return jax.device_put(x, sharding)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(one(jax.random.key_data(x), sharding))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(one, tree, shardings)


def fetch(x: jax.Array) -> np.ndarray:
  """All of an array, on the host; every process must call it where others hold parts."""
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


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
