"""Which leaves a base has: names and shapes in a Hugging Face checkpoint, here, and quantised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding

from awf.qwen.config import QwenConfig
from awf.qwen.lora import parent_module, target_shapes
from awf.qwen.quant import QuantConfig, quantised_leaves
from awf.sharding import spec_for

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
Where = tuple[str, ...]  # path of a parameter


@dataclasses.dataclass(frozen=True)
class Tensor:
  """One of our parameters in a checkpoint: its name there, our shape, transposed or not."""

  name: str
  shape: tuple[int, ...]
  is_transposed: bool = False

  @property
  def stored_shape(self) -> tuple[int, ...]:
    return self.shape[::-1] if self.is_transposed else self.shape


def checkpoint_layout(config: QwenConfig, is_turned: bool = False) -> dict[Where, Tensor]:
  """Our parameter path -> tensor of a Hugging Face checkpoint, in file order.

  `is_turned`: matrices lie as the checkpoint has them, `kernel_t` [out, in] (awf.qwen.quant).
  """
  c, d = config, config.hidden_size
  layout: dict[Where, Tensor] = {}
  layout["embed", "embedding"] = Tensor("model.embed_tokens.weight", (c.vocab_size, d))
  norms = {"input_layernorm": d, "post_attention_layernorm": d}
  if c.qk_norm:
    norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim}
  for i in range(c.num_hidden_layers):
    ours, theirs = f"layers_{i}", f"model.layers.{i}"
    for name, shape in target_shapes(c).items():
      prefix = f"{theirs}.{parent_module(name)}.{name}"
      leaf, tensor = _matrix(f"{prefix}.weight", shape, is_turned)
      layout[ours, name, leaf] = tensor
      if c.qkv_bias and name in ("q_proj", "k_proj", "v_proj"):
        layout[ours, name, "bias"] = Tensor(f"{prefix}.bias", shape[1:])
    for name, size in norms.items():
      layout[ours, name.rpartition(".")[2], "scale"] = Tensor(f"{theirs}.{name}.weight", (size,))
  layout["norm", "scale"] = Tensor("model.norm.weight", (d,))
  if not c.tie_word_embeddings:
    leaf, tensor = _matrix("lm_head.weight", (d, c.vocab_size), is_turned)
    layout["lm_head", leaf] = tensor
  return layout


def _matrix(name: str, shape: tuple[int, ...], is_turned: bool) -> tuple[str, Tensor]:
  """(leaf, tensor) of a matrix [in, out] that a checkpoint stores as [out, in]."""
  if is_turned:
    return "kernel_t", Tensor(name, shape[::-1])
  return "kernel", Tensor(name, shape, True)


def leaves_of(
  where: Where, shape: Sequence[int], dtype: Any, quant: QuantConfig
) -> dict[Where, tuple[tuple[int, ...], np.dtype]]:
  """Path -> (shape, dtype) of the leaves that one float leaf becomes; itself when not quantised."""
  return quantised_leaves(where, shape, quant) or {where: (tuple(shape), np.dtype(dtype))}


def abstract_params(
  config: QwenConfig,
  dtype: str = "float32",
  quant: QuantConfig | None = None,
  mesh: Mesh | None = None,
) -> dict[str, Any]:
  """The tree of `hf.load_params` as shapes alone; nothing is allocated or read.

  Args:
    config: architecture.
    dtype: stored dtype of leaves that are not quantised.
    quant: layout; None is the float one.
    mesh: when given, each leaf carries the sharding that loading would give it. Its devices need
      not be there.

  Returns:
    Nested dicts of jax.ShapeDtypeStruct.
  """
  params: dict[str, Any] = {}
  for where, tensor in checkpoint_layout(config).items():
    for path, (shape, kind) in leaves_of(
      where, tensor.shape, DTYPES[dtype], quant or QuantConfig()
    ).items():
      put(params, path, jax.ShapeDtypeStruct(shape, kind, sharding=sharding_of(path, shape, mesh)))
  return params


def sharding_of(where: Where, shape: Sequence[int], mesh: Mesh | None) -> NamedSharding | None:
  """Where a parameter lives on a mesh; None on the default device."""
  return None if mesh is None else NamedSharding(mesh, spec_for("/".join(where), shape, mesh))


def put(tree: dict[str, Any], where: Where, leaf: Any) -> None:
  """Sets one leaf of nested dicts."""
  for name in where[:-1]:
    tree = tree.setdefault(name, {})
  tree[where[-1]] = leaf


def get(tree: Mapping[str, Any], where: Where) -> Any:
  """One leaf of nested dicts."""
  for name in where:
    tree = tree[name]
  return tree
