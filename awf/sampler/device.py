"""The engine's cache and compiled programs, and the seconds that they take."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
import numpy as np

from awf.qwen.config import QwenConfig
from awf.sampler.cache import LayerCache, init_cache
from awf.sampler.decode import Shapes, Work, compile_dispatch

FEW = 4  # fast mode: a second program for one in FEW of the rows


def cache_shardings(config: QwenConfig, mesh: jax.sharding.Mesh) -> Any:
  """Key/value heads over `tensor` where it divides them, else the cache is whole everywhere.

  Returns:
    A tree of NamedSharding like the cache.
  """
  heads = "tensor" if config.num_key_value_heads % mesh.shape["tensor"] == 0 else None
  prompt, own = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(None,) * lead, heads))
    for lead in (1, 2)
  )
  return (LayerCache(prompt, prompt, own, own),) * config.num_hidden_layers


def fewer_rows(shapes: Shapes, rows: int) -> Shapes:
  """Shapes of a program that decodes the first `rows` rows of the same cache."""
  return dataclasses.replace(
    shapes,
    rows=rows,
    group=math.gcd(shapes.group, rows),
    at_once=math.gcd(shapes.at_once, rows),
    lone_at_once=math.gcd(shapes.lone_at_once, rows) if shapes.lone_at_once else 0,
  )


class Device:
  """Runs dispatches one after the other.

  Attributes:
    num_traces: programs traced.
    is_split: prefill and decode of a dispatch run apart, so that each has its seconds; for mode
      bench.
    counts: since the start: dispatches, steps, row_slots (rows x steps), busy_seconds, and, while
      `is_split`, prefill_seconds and decode_seconds.

  Args:
    config: architecture.
    params: base parameters, never donated.
    shapes: of the whole engine.
    strict: one program for everything. Else a dispatch whose running rows are all among the first
      rows // FEW takes a smaller one, whose results differ within rounding.
    mesh: where the parameters lie; None is the default device.
  """

  def __init__(
    self,
    config: QwenConfig,
    params: Any,
    shapes: Shapes,
    strict: bool,
    mesh: jax.sharding.Mesh | None,
  ) -> None:
    self.num_traces, self.is_split = 0, False
    self.counts: dict[str, float] = dict.fromkeys(("dispatches", "steps", "row_slots"), 0)
    self.counts |= dict.fromkeys(("busy_seconds", "prefill_seconds", "decode_seconds"), 0.0)
    self._params = params
    few = shapes.rows // FEW
    self._config = config
    self._programs: dict[Shapes, Any] = {}
    self._sizes = [shapes] if strict or not few else [fewer_rows(shapes, few), shapes]
    shardings = None if mesh is None else cache_shardings(config, mesh)
    self._cache = jax.jit(lambda: init_cache(config, shapes.cache), out_shardings=shardings)()
    self._home = None
    if mesh is None:
      self._home = next(iter(jax.tree.leaves(self._cache)[0].devices()))
      self._cache = jax.device_put(self._cache, self._home)

  def place(self, lora: Any) -> Any:
    """The adapters beside the cache: another placement, if only in name, is another program.

    On a mesh the caller has placed them.
    """
    return lora if self._home is None else jax.device_put(lora, self._home)

  def _count_trace(self) -> None:
    self.num_traces += 1

  def _program(self, shapes: Shapes) -> Any:
    """The jitted program of these shapes; nothing is compiled before it runs."""
    if shapes not in self._programs:
      self._programs[shapes] = compile_dispatch(self._config, shapes, self._count_trace)
    return self._programs[shapes]

  def run(self, lora: Any, work: Work[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """One dispatch; waits for its packed result, which may hold the first rows alone.

    Args:
      lora: stacked adapters, or None.
      work: what to do.

    Returns:
      (packed result, the likeliest tokens where they are wanted), as `dispatch` gives them.
    """
    used = work.rows_used()
    shapes = next(size for size in self._sizes if size.rows >= used)
    program = self._program(shapes)
    if shapes.rows < len(work.table_BX):
      work = work.first_rows(shapes.rows)
    stages = [("busy_seconds", work)]
    if self.is_split:
      parts = work.only_prefill(), work.only_decode()
      stages = list(zip(("prefill_seconds", "decode_seconds"), parts, strict=True))
    packed, top = np.zeros(0), None
    for name, part in stages:
      began = time.perf_counter()
      self._cache, packed, top = program(self._params, lora, self._cache, part)
      packed = np.asarray(packed)  # copied to the host; waits for the device
      top = np.asarray(top) if part.counts_6[5] else None
      seconds = time.perf_counter() - began
      self.counts[name] += seconds
      self.counts["busy_seconds"] += seconds if self.is_split else 0.0
    steps = int(packed[-1, 0])
    self.counts["dispatches"] += 1
    self.counts["steps"] += steps
    self.counts["row_slots"] += steps * shapes.rows
    return packed, top
