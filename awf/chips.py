"""Accelerators: peak arithmetic, memory and its bandwidth, and the slices that can be planned for.

Figures are the makers' own: Cloud TPU's system architecture pages (v5e: 197 TFLOP/s, 16 GB, 819
GB/s; v6e: 918, 32 GB, 1640 GB/s; v5p: 459, 95 GB, 2765 GB/s) and NVIDIA's data sheets (dense bf16).
`memory` of a TPU is what its compiler lets a program use, which is a little less than the chip has.
"""

from __future__ import annotations

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One device as JAX sees it."""

  name: str
  kind: str  # part of jax.Device.device_kind
  flops: float  # bfloat16 FLOP/s, dense
  bandwidth: float  # bytes/s of its main memory
  memory: float  # bytes that programs may use


# The order matters: "TPU v5" is a part of "TPU v5 lite".
CHIPS = (
  Chip("v6e", "TPU v6 lite", 918e12, 1640e9, 31.24 * GIB),
  Chip("v5e", "TPU v5 lite", 197e12, 819e9, 15.75 * GIB),
  Chip("v5p", "TPU v5", 459e12, 2765e9, 95.73 * GIB),
  Chip("v4", "TPU v4", 275e12, 1228e9, 30.75 * GIB),
  Chip("h200", "H200", 989e12, 4800e9, 139.0 * GIB),
  Chip("h100", "H100", 989e12, 3350e9, 79.0 * GIB),
  Chip("a100", "A100", 312e12, 2039e9, 79.0 * GIB),
  Chip("l4", "L4", 121e12, 300e9, 22.0 * GIB),
  Chip("t4", "T4", 65e12, 320e9, 14.5 * GIB),
)


@dataclasses.dataclass(frozen=True)
class Slice:
  """A TPU slice by the name that it is rented under. A v5p is counted in cores, two to a chip."""

  chip: str
  topology: str  # libtpu's name
  bounds: tuple[int, int, int]  # chips of the one host


SLICES = {
  "v5e-1": Slice("v5e", "v5e:1x1", (1, 1, 1)),
  "v5e-4": Slice("v5e", "v5e:2x2", (2, 2, 1)),
  "v5e-8": Slice("v5e", "v5e:2x4", (2, 4, 1)),
  "v6e-1": Slice("v6e", "v6e:1x1", (1, 1, 1)),
  "v6e-8": Slice("v6e", "v6e:2x4", (2, 4, 1)),
  "v5p-8": Slice("v5p", "v5p:2x2x1", (2, 2, 1)),
}
TARGETS = (*SLICES, "h200", "cpu", "local")


def find_chip(device_kind: str) -> Chip | None:
  """The chip that a JAX device is, or None for one that is not in the table (a CPU)."""
  return next((c for c in CHIPS if c.kind in device_kind), None)


def chip_named(name: str) -> Chip:
  """The chip of a name in `CHIPS`."""
  return next(c for c in CHIPS if c.name == name)
