"""What a run is, in a few lines at its start: model, chips, mesh, training, sandbox, memory."""

from __future__ import annotations

from typing import Any

from awf.config import is_remote_alone


def banner_lines(system: Any) -> list[str]:
  """One line for each of the things that a reader wants to know before anything runs."""
  import jax

  config, policy, mesh = system.config, system.policy, system.mesh
  kinds = [d.device_kind for d in mesh.devices.flat]
  chips = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds)))
  sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
  rows = (
    *([] if is_remote_alone(config) else _model_rows(config, policy)),
    *_remote_rows(config),
    ("chips", f"{chips} ({jax.default_backend()}); mesh {sizes}"),
    (
      "data",
      f"{system.task.dataset}: {len(system.search_problems)} problems to search on, "
      f"{len(system.held_out)} held out, {len(system.test)} to test",
    ),
    ("sandbox", system.sandbox.probe.summary().removeprefix("sandbox ")),
    ("memory", _memory(mesh.devices.flat[0])),
  )
  return [f"{name:<9} {text}" for name, text in rows]


def _model_rows(config: Any, policy: Any) -> list[tuple[str, str]]:
  """The local model, and what of it is trained."""
  quant = "" if config.model.quant == "none" else f", base in {config.model.quant}"
  size = policy.config.num_parameters / 1e6
  training = (
    f"LoRA of rank {config.lora.rank}: {policy.trainable_parameters:,} parameters, "
    f"{100 * policy.trainable_share:.3f} % of the base"
  )
  return [
    ("model", f"{config.model.path}, {size:,.1f}M parameters{quant}"),
    ("training", training),
  ]


def _remote_rows(config: Any) -> list[tuple[str, str]]:
  """What answers or proposes elsewhere."""
  named = (("executor", config.executor.remote), ("optimiser", config.search.remote))
  return [(name, f"{remote.model} at {remote.url}") for name, remote in named if remote.url]


def _memory(device: Any) -> str:
  """What one device holds now: weights, adapters, cache; nothing is compiled for it."""
  import jax

  held = sum(
    shard.data.nbytes
    for array in jax.live_arrays()
    for shard in array.addressable_shards
    if shard.device == device
  )
  limit = (device.memory_stats() or {}).get("bytes_limit")
  room = f" of {limit / 2**30:.1f}" if limit else ""
  return f"{held / 2**30:.2f}{room} GiB held by one device; --mode=plan says what a step adds"
