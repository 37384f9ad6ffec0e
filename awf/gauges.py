"""What the machine did in a round: seconds by part, compilation, memory, shares of its peaks.

Names are those of the `time/` and `perf/` metrics; none of it decides a result. JAX is imported
inside the functions: the sandbox starts first.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from awf.chips import find_chip

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # compiling, or reading from a cache
_PEAK_SIZE = 1024  # rows and columns of the product that measures an unknown device
_PEAK_BYTES = 1 << 26  # of the array whose sum measures its memory


class Gauges:
  """Seconds in which parts of a round were at work, and what compilation took.

  Args:
    clock: seconds, monotonic.
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._active: dict[str, int] = {}
    self._since: dict[str, float] = {}
    self._seconds: dict[str, float] = {}
    self._compiled = 0.0

  @contextlib.contextmanager
  def during(self, part: str) -> Iterator[None]:
    """Counts the time until it is left; work that overlaps counts once. Of one thread."""
    if not self._active.get(part):
      self._since[part] = self._clock()
    self._active[part] = self._active.get(part, 0) + 1
    try:
      yield
    finally:
      self._active[part] -= 1
      if not self._active[part]:
        spent = self._clock() - self._since[part]
        self._seconds[part] = self._seconds.get(part, 0.0) + spent

  def watch_compilation(self) -> None:
    """Has JAX report each program that it compiles or reads from its cache, of every thread."""
    from jax import monitoring

    def note(event: str, duration_secs: float, **_: Any) -> None:
      if event == _COMPILE_EVENT:
        self._compiled += duration_secs

    monitoring.register_event_duration_secs_listener(note)

  def restart(self) -> None:
    """Forgets the seconds of all parts: what follows is a round, what came before was none."""
    self._seconds = {}

  def take(self) -> dict[str, float]:
    """`time/<part>` of all parts and `perf/compile_seconds` since the last call."""
    seconds, compiled = self._seconds, self._compiled
    self._seconds, self._compiled = {}, self._compiled - compiled
    return {
      **{f"time/{part}": value for part, value in seconds.items()},
      "perf/compile_seconds": compiled,
    }

  def take_part(self, part: str) -> dict[str, float]:
    """`time/<part>` of one part since the last call; {} when it was not at work."""
    return {f"time/{part}": self._seconds.pop(part)} if part in self._seconds else {}


def peak_memory_gb() -> float:
  """Most memory in use since the start, GB: of the fullest device, on a CPU of this process."""
  import jax

  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  peak = max(x.get("peak_bytes_in_use", 0) for x in stats)
  if not peak:
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
  return peak / 1e9


class Peak(NamedTuple):
  """What all devices of this process reach at most."""

  flops: float  # FLOP/s
  bandwidth: float  # bytes/s


def find_peak() -> Peak:
  """The makers' figures (`awf.chips`); of a device that is not there, a CPU, measured ones."""
  import jax

  devices = jax.local_devices()
  chip = find_chip(devices[0].device_kind)
  if chip is not None:
    return Peak(chip.flops * len(devices), chip.bandwidth * len(devices))
  return _measured()


def _measured() -> Peak:
  """Of the default device: a product of two float32 matrices, and the sum of a large array."""
  import jax
  import jax.numpy as jnp

  def best(fn: Any, x: jax.Array) -> float:
    fn(x).block_until_ready()
    seconds = []
    for _ in range(3):
      start = time.perf_counter()
      fn(x).block_until_ready()
      seconds.append(time.perf_counter() - start)
    return min(seconds)

  product = best(jax.jit(lambda x: x @ x), jnp.ones((_PEAK_SIZE, _PEAK_SIZE), jnp.float32))
  total = best(jax.jit(jnp.sum), jnp.ones((_PEAK_BYTES // 4,), jnp.float32))
  return Peak(2 * _PEAK_SIZE**3 / product, _PEAK_BYTES / total)


def utilisation(
  peak: Peak, update_flops: float, update_seconds: float, decode: Mapping[str, float]
) -> dict[str, float]:
  """`perf/mfu` of an update and `perf/mbu` of the sampler's steps.

  Args:
    peak: of the devices.
    update_flops: what the update had to compute (`GRPOTrainer.flops`); 0 leaves its share out.
    update_seconds: what it took, compilation included.
    decode: steps and busy_seconds of the engine, and weight_bytes that each step reads; the cache
      of keys and values is left out.
  """
  out = {}
  if update_flops and update_seconds:
    out["perf/mfu"] = update_flops / update_seconds / peak.flops
  if decode["steps"] and decode["busy_seconds"]:
    read = decode["steps"] * decode["weight_bytes"]
    out["perf/mbu"] = read / decode["busy_seconds"] / peak.bandwidth
  return out
