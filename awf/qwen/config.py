"""Architecture of a Qwen2, Qwen2.5 or Qwen3 dense model."""

from __future__ import annotations

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True)
class Yarn:
  """YaRN's stretch of the rotary frequencies beyond the positions of pre-training.

  Attributes:
    factor: how much longer the context becomes, at least 1.
    original_max_position_embeddings: positions of pre-training.
    beta_fast: dimensions with more rotations than this over those positions stay as they are.
    beta_slow: dimensions with fewer are slowed down by `factor`; a ramp lies between.
    attention_factor: of cosines and sines; None is 0.1 ln(factor) + 1.
    truncate: round the ends of the ramp to whole dimensions.

  Source: YaRN, arXiv:2309.00071; transformers modeling_rope_utils.py for names and defaults.
  """

  factor: float
  original_max_position_embeddings: int
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  attention_factor: float | None = None
  truncate: bool = True

  def __post_init__(self) -> None:
    if self.factor < 1 or self.original_max_position_embeddings < 1:
      raise ValueError(
        f"yarn: expected factor >= 1 and original_max_position_embeddings >= 1, got {self.factor} "
        f"and {self.original_max_position_embeddings}"
      )
    if self.attention_factor is None:
      object.__setattr__(self, "attention_factor", yarn_scale(self.factor))
    elif self.attention_factor <= 0:
      raise ValueError(f"yarn: expected a positive attention_factor, got {self.attention_factor}")

  @property
  def scale(self) -> float:
    """Of cosines and sines."""
    return yarn_scale(self.factor) if self.attention_factor is None else self.attention_factor

  def frequencies(self, head_dim: int, theta: float) -> np.ndarray:
    """Radians per position of each pair of dimensions, float32 [head_dim / 2]."""

    def dimension(rotations: float) -> float:
      turns = self.original_max_position_embeddings / (rotations * 2 * math.pi)
      return head_dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(self.beta_fast), dimension(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = np.arange(head_dim // 2, dtype=np.float32)
    ramp = np.clip((steps - low) / np.float32(max(high - low, 0.001)), 0, 1).astype(np.float32)
    plain = np.float32(1) / np.float32(theta) ** (2 * steps / np.float32(head_dim))
    return (plain / np.float32(self.factor) * ramp + plain * (1 - ramp)).astype(np.float32)


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
  """0.1 mscale ln(factor) + 1, or 1 without a stretch."""
  return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class QwenConfig:
  """Sizes and switches of one architecture; field names follow Hugging Face where they exist.

  `family` is "qwen2" (QKV bias, head size = width / heads) or "qwen3" (QK-norm, own head size).
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  head_dim: int
  family: str = "qwen2"
  rope_theta: float = 1_000_000.0
  rms_norm_eps: float = 1e-6
  tie_word_embeddings: bool = False
  max_position_embeddings: int = 32768
  dtype: str = "float32"  # compute dtype
  yarn: Yarn | None = None  # None: plain rotary positions

  def __post_init__(self) -> None:
    if self.family not in ("qwen2", "qwen3"):
      raise ValueError(f"family: expected 'qwen2' or 'qwen3', got {self.family!r}")
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
        f"num_key_value_heads ({self.num_key_value_heads})"
      )
    if self.head_dim % 2:
      raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")

  @property
  def qkv_bias(self) -> bool:
    return self.family == "qwen2"

  @property
  def qk_norm(self) -> bool:
    return self.family == "qwen3"

  @property
  def num_parameters(self) -> int:
    """Parameters of the base model; a tied head counts once."""
    d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
    n, k = self.num_attention_heads, self.num_key_value_heads
    layer = 2 * d + d * h * (n + 2 * k) + n * h * d + 3 * d * f
    layer += h * (n + 2 * k) if self.qkv_bias else 2 * h
    heads = 1 if self.tie_word_embeddings else 2
    return heads * self.vocab_size * d + self.num_hidden_layers * layer + d
