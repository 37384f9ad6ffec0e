"""What a run is, in a few lines at its start: model, chips, mesh, training, sandbox, memory."""

from __future__ import annotations

from typing import Any

from awf.chips import GIB
from awf.config import is_remote_alone
from awf.plan_target import device_memory

_HEAD_COPIES = 3  # of a chunk that exist at a time, as in awf/grpo/loss.py


def banner_lines(system: Any) -> list[str]:
  """One line for each of the things that a reader wants to know before anything runs."""
  import jax

  config, policy, mesh = system.config, system.policy, system.mesh
  own = next(d for d in mesh.devices.flat if d.process_index == jax.process_index())
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
    ("memory", memory_line(held_bytes(own), update_bytes(system), device_memory(own))),
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


def held_bytes(device: Any) -> float:
  """What one device holds now: weights, adapters, keys and values; nothing is compiled for it."""
  import jax

  return float(
    sum(
      shard.data.nbytes
      for array in jax.live_arrays()
      for shard in array.addressable_shards
      if shard.device == device
    )
  )


def update_bytes(system: Any) -> dict[str, float]:
  """What training adds on one device, counted; the layers' activations need a compiler.

  Returns:
    Bytes of `adapter` (the learner's copy, and the sampler's next one beside the present one),
    `optimiser` (AdamW's two means, float32) and `head` (logits of a chunk, three times: the logits,
    their exponentials and their gradient); nothing where no adapter is there to be trained.
  """
  from awf.grpo.loss import head_chunk
  from awf.plan_ideal import bytes_of

  config, policy = system.config, system.policy
  if policy.lora is None:
    return {}
  adapter, vocabulary = bytes_of(policy.lora), policy.config.vocab_size
  chunk = min(config.grpo.vocab_chunk, head_chunk(vocabulary))
  head = _HEAD_COPIES * 4.0 * chunk * vocabulary / system.mesh.shape["tensor"]
  return {"adapter": 2 * adapter, "optimiser": 2 * adapter, "head": head}


def memory_line(held: float, added: dict[str, float], limit: float | None) -> str:
  """The verdict in one line; all in bytes per device."""
  need = held + sum(added.values())
  parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in added.items())
  text = f"{held / GIB:.2f} GiB held by one device"
  if added:
    text += f", {need / GIB:.2f} with an update ({parts})"
  if limit is None:
    return f"{text}; the device does not say what it has"
  verdict = "fits" if need <= limit else "does not fit"
  return f"{text}: {verdict} {limit / GIB:.1f} GiB before activations, which --mode=plan compiles"
