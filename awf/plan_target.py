"""What a plan is made for: a TPU slice that need not be here, this machine, or a chip's figures."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from awf.chips import GIB, SLICES, Chip, chip_named, find_chip
from awf.types import UserError

# The compiler alone: no look for a TPU of this machine, of a cluster or of a cloud.
_COMPILE_ONLY = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing runs, so several plans may compile at once
  "JAX_PLATFORMS": "cpu",
}
CPU = Chip("cpu", "cpu", 1e11, 2e10, float("inf"))  # two cores, roughly; only ratios are of use


@dataclasses.dataclass(frozen=True)
class Target:
  """Devices to compile for and the figures of one of them."""

  name: str
  chip: Chip
  devices: tuple[Any, ...]  # jax.Device; empty when nothing is compiled
  platform: str

  @property
  def is_compiled(self) -> bool:
    return bool(self.devices)


def find_target(name: str) -> Target:
  """Resolves `config.plan.target`.

  Raises:
    UserError: a TPU slice without libtpu, or a device whose memory nobody knows.
  """
  if name in SLICES:
    return _slice(name)
  if name == "cpu":
    import jax

    devices = tuple(jax.devices("cpu"))
    return Target(
      name, dataclasses.replace(CPU, memory=_host_memory() / len(devices)), devices, name
    )
  if name == "local":
    return _local()
  return Target(name, chip_named(name), (), "gpu")


def _slice(name: str) -> Target:
  for variable, value in _COMPILE_ONLY.items():
    os.environ.setdefault(variable, value)
  from jax.experimental import topologies

  one = SLICES[name]
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=one.topology, chips_per_host_bounds=one.bounds
    )
  except RuntimeError as error:
    raise UserError(
      f"config.plan.target = {name!r} needs the TPU compiler: pip install 'jax[tpu]' (the extra "
      "`plan` of this project), or set config.plan.target to cpu, local or h200 "
      f"({str(error).splitlines()[0]})"
    ) from error
  return Target(name, chip_named(one.chip), tuple(found.devices), "tpu")


def _local() -> Target:
  import jax

  devices = tuple(jax.devices())
  platform = devices[0].platform
  if platform == "cpu":
    return dataclasses.replace(find_target("cpu"), name="local")
  chip = find_chip(devices[0].device_kind)
  limit = (devices[0].memory_stats() or {}).get("bytes_limit")
  if chip is None:
    if not limit:
      raise UserError(
        f"config.plan.target = 'local': nothing is known of {devices[0].device_kind}; set "
        "config.plan.target to one of the named chips"
      )
    chip = Chip(devices[0].device_kind, devices[0].device_kind, 1e12, 1e11, limit)
  return Target("local", dataclasses.replace(chip, memory=limit or chip.memory), devices, platform)


def device_memory(device: Any) -> float | None:
  """Bytes of one device that programs may use, a CPU device's share of the host; None: unknown."""
  import jax

  limit = (device.memory_stats() or {}).get("bytes_limit")
  if limit:
    return float(limit)
  if device.platform == "cpu":
    return _host_memory() / len(jax.local_devices())
  chip = find_chip(device.device_kind)
  return chip.memory if chip else None


def _host_memory() -> float:
  try:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
  except (ValueError, OSError):  # not POSIX
    return 8.0 * GIB
