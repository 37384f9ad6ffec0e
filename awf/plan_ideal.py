"""What a decode step must read and an update must compute: the denominators of a plan's ratios."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from awf.grpo.batch import Batch
from awf.qwen.config import QwenConfig
from awf.qwen.lora import target_shapes


def bytes_of(tree: Any) -> float:
  """Bytes per device of a tree of arrays or shapes, split as their shardings say, unpadded."""
  import jax

  total = 0.0
  for x in jax.tree.leaves(tree):
    sharding = getattr(x, "sharding", None)
    shape = sharding.shard_shape(x.shape) if sharding is not None else np.shape(x)
    name = str(x.dtype)
    if name.startswith("key<"):
      size = 8.0
    else:
      size = 0.5 if name in ("int4", "uint4") else np.dtype(x.dtype).itemsize
    total += float(np.prod(shape, dtype=np.float64)) * size
  return total


@dataclasses.dataclass(frozen=True)
class Load:
  """What the decode rows do: some prompts, a group of completions of each."""

  prompts: int
  group: int  # rows of each prompt
  prompt: int  # tokens
  new: int  # tokens of a whole completion

  @property
  def live_tokens(self) -> float:
    """Tokens whose keys and values a step reads, in the middle of the completions."""
    return self.prompts * (self.prompt + self.group * self.new / 2)


def decode_step_bytes(
  config: QwenConfig, params: Any, lora: Any, load: Load, tensor: int = 1
) -> dict[str, float]:
  """Bytes that one decode step must read on a device: every weight once, and the live KV.

  Args:
    config: architecture.
    params: base weights, arrays or shapes. An untied embedding counts one line per row.
    lora: stacked adapters, or None.
    load: what the rows do; the keys and values of a prompt are read once for its group.
    tensor: devices that the key/value heads are split over.
  """
  weights = bytes_of(params)
  if not config.tie_word_embeddings:
    table = bytes_of(params["embed"])
    weights -= table * (1 - min(1.0, load.prompts * load.group / config.vocab_size))
  heads = config.num_key_value_heads
  heads = heads / tensor if heads % tensor == 0 else heads
  itemsize = 4 if config.dtype == "float32" else 2
  kv = 2.0 * config.num_hidden_layers * heads * config.head_dim * itemsize * load.live_tokens
  adapters = 0.0 if lora is None else bytes_of(lora)
  return {"weights": weights, "lora": adapters, "kv": kv, "total": weights + adapters + kv}


def visible_pairs(batch: Batch) -> float:
  """(query, key) pairs that attention must score, over all bins of the batch."""
  pairs = 0.0
  for segments_T, parents_T in zip(
    batch.segments_ZBT.reshape(-1, batch.segments_ZBT.shape[-1]),
    batch.parents_ZBT.reshape(-1, batch.parents_ZBT.shape[-1]),
    strict=True,
  ):
    ids, counts = np.unique(segments_T[segments_T > 0], return_counts=True)
    size = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    parent = {int(s): int(parents_T[segments_T == s][0]) for s in ids}
    for s, n in size.items():
      pairs += n * (n + 1) / 2
      if parent[s] != s:
        pairs += n * size[parent[s]]
  return pairs


def update_flops(
  config: QwenConfig, rank: int, targets: tuple[str, ...], batch: Batch, remat: bool
) -> dict[str, float]:
  """FLOPs of matrix products that one optimiser step must do, without padding.

  Forward, the recomputation (only with `remat`), and the backward pass of a frozen base with a
  LoRA: gradients of activations through every matrix, of weights for the adapter alone. What no
  gradient needs is left out: down_proj's product in the recomputation, the way through the first
  layer's q, k and v. The head is passed forward and backward once for each target.

  Returns:
    forward, recompute, backward, head, total.
  """
  shapes, layers = target_shapes(config), config.num_hidden_layers
  tokens, targets_made = float(batch.num_tokens), float(np.sum(batch.is_target_ZBU))
  base = 2.0 * layers * sum(i * o for i, o in shapes.values()) * tokens
  lora = 2.0 * layers * rank * sum(sum(shapes[t]) for t in targets) * tokens
  attention = 4.0 * layers * config.num_attention_heads * config.head_dim * visible_pairs(batch)
  head = 2.0 * config.hidden_size * config.vocab_size * targets_made
  size = {name: 2.0 * i * o * tokens for name, (i, o) in shapes.items()}
  first = size["q_proj"] + size["k_proj"] + size["v_proj"]
  forward = base + lora + attention
  parts = {
    "forward": forward,
    "recompute": (forward - layers * size["down_proj"]) if remat else 0.0,
    "backward": base - first + 2.0 * lora + 2.0 * attention,
    "head": 2.0 * head,
  }
  return parts | {"total": sum(parts.values())}
