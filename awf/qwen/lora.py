"""Low-rank adapters: a tree with the base's paths, leaves `a` [in, R] and `b` [R, out], float32.

Source: LoRA, arXiv:2106.09685; the initial distribution is that of PEFT's `reset_lora_parameters`.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from awf.qwen.config import QwenConfig
from awf.qwen.quant import kernel_shape
from awf.types import UserError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Lora = dict[str, dict[str, dict[str, jax.Array]]]  # layers_<l> -> projection -> {a, b}


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Rank R, scale alpha / R (or alpha / sqrt(R)), and the projections that get an adapter.

  Source: rank-stabilised scale, rsLoRA, arXiv:2312.03732.
  """

  rank: int = 16
  alpha: float = 32.0
  targets: tuple[str, ...] = TARGETS
  rslora: bool = False

  @classmethod
  def from_config(cls, lora: Any) -> LoRAConfig:
    """From the `lora` part of a resolved config."""
    return cls(lora.rank, lora.alpha, tuple(lora.targets), lora.rslora)

  def __post_init__(self) -> None:
    object.__setattr__(self, "targets", tuple(self.targets))
    if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
      raise UserError(f"config.lora.rank: expected a whole number >= 1, got {self.rank!r}")
    if not 0 < self.alpha < float("inf"):
      raise UserError(f"config.lora.alpha: expected a positive number, got {self.alpha!r}")
    unknown = [name for name in self.targets if name not in TARGETS]
    if unknown or not self.targets or len(set(self.targets)) != len(self.targets):
      raise UserError(
        f"config.lora.targets: expected one or more of {', '.join(TARGETS)}, each once, "
        f"got {self.targets!r}"
      )

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def target_shapes(config: QwenConfig) -> dict[str, tuple[int, int]]:
  """(in, out) of each projection of a layer."""
  d, f = config.hidden_size, config.intermediate_size
  q = config.num_attention_heads * config.head_dim
  k = config.num_key_value_heads * config.head_dim
  return {
    "q_proj": (d, q),
    "k_proj": (d, k),
    "v_proj": (d, k),
    "o_proj": (q, d),
    "gate_proj": (d, f),
    "up_proj": (d, f),
    "down_proj": (f, d),
  }


def parent_module(target: str) -> str:
  """Name of the Hugging Face module that holds a projection."""
  return "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"


def init_lora(base: QwenConfig | dict[str, Any], lora_config: LoRAConfig, key: jax.Array) -> Lora:
  """A new adapter that changes nothing yet: `a` uniform in +-1/sqrt(in), `b` zero.

  Args:
    base: the model's config, or its parameter tree.
    lora_config: rank and targets. A target's values do not depend on the other targets.
    key: PRNG key.

  Returns:
    The `lora` collection of `awf.qwen.model.Qwen`, float32, not scaled (see `scaled`).
  """
  if isinstance(base, QwenConfig):
    one = target_shapes(base)
    layers = {f"layers_{i}": one for i in range(base.num_hidden_layers)}
  else:
    layers = {
      name: {target: kernel_shape(layer[target]) for target in TARGETS}
      for name, layer in base.items()
      if name.startswith("layers_")
    }
  lora: Lora = {}
  for name, shapes in layers.items():
    lora[name] = {}
    for target in lora_config.targets:
      fan_in, fan_out = shapes[target]
      leaf_key = jax.random.fold_in(key, zlib.crc32(f"{name}/{target}".encode()) >> 1)
      bound = fan_in**-0.5
      lora[name][target] = {
        "a": jax.random.uniform(leaf_key, (fan_in, lora_config.rank), jnp.float32, -bound, bound),
        "b": jnp.zeros((lora_config.rank, fan_out), jnp.float32),
      }
  return lora


def scaled(lora: Lora, lora_config: LoRAConfig) -> Lora:
  """The adapter as the model applies it: its scale folded into `b`."""
  return {
    layer: {
      target: {"a": leaf["a"], "b": leaf["b"] * lora_config.scale}
      for target, leaf in targets.items()
    }
    for layer, targets in lora.items()
  }


def stack_adapters(adapters: Sequence[Lora]) -> Lora:
  """Scaled adapters of one shape to leaves [A, in, R], [A, R, out]; row index i + 1 uses adapter i.

  Raises:
    ValueError: no adapter, or adapters with different targets or ranks.
  """
  if not adapters:
    raise ValueError("expected at least one adapter to stack, got none")
  shapes = [jax.tree.map(jnp.shape, adapter) for adapter in adapters]
  for i, other in enumerate(shapes):
    if other != shapes[0]:
      raise ValueError(f"adapter {i} differs from adapter 0 in targets or rank; equal ones stack")
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)


def widen(adapters: Sequence[Lora]) -> list[Lora]:
  """Scaled adapters of different ranks and targets in one shape, filled up with exact zeros."""
  shapes: dict[tuple[str, str], list[int]] = {}  # (layer, target) -> in, out, largest rank
  for adapter in adapters:
    for layer, targets in adapter.items():
      for target, leaf in targets.items():
        (fan_in, rank), fan_out = leaf["a"].shape, leaf["b"].shape[1]
        known = shapes.setdefault((layer, target), [fan_in, fan_out, 0])
        known[2] = max(known[2], rank)

  def fill(adapter: Lora) -> Lora:
    wide: Lora = {}
    for (layer, target), (fan_in, fan_out, rank) in shapes.items():
      leaf = adapter.get(layer, {}).get(target)
      if leaf is None:
        leaf = {"a": jnp.zeros((fan_in, rank)), "b": jnp.zeros((rank, fan_out))}
      missing = rank - leaf["a"].shape[1]
      wide.setdefault(layer, {})[target] = {
        "a": jnp.pad(leaf["a"], ((0, 0), (0, missing))),
        "b": jnp.pad(leaf["b"], ((0, missing), (0, 0))),
      }
    return wide

  return [fill(adapter) for adapter in adapters]


def merge(params: dict[str, Any], scaled_lora: Lora) -> dict[str, Any]:
  """Base parameters with a scaled adapter's `a @ b` added to the kernels, in their dtypes.

  The base must be a float one: what a quantised base would lose is not decided here.
  """
  merged = dict(params)
  for layer, targets in scaled_lora.items():
    merged[layer] = dict(params[layer])
    for target, leaf in targets.items():
      delta = leaf["a"] @ leaf["b"]
      name = "kernel_t" if "kernel_t" in params[layer][target] else "kernel"
      kernel = params[layer][target][name]
      total = kernel.astype(jnp.float32) + (delta.T if name == "kernel_t" else delta)
      merged[layer][target] = {**params[layer][target], name: total.astype(kernel.dtype)}
  return merged


def count(lora: Lora) -> int:
  """Trainable numbers of an adapter."""
  return sum(leaf.size for leaf in jax.tree.leaves(lora))
