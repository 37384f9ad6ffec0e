"""Architecture of a Qwen2, Qwen2.5 or Qwen3 dense model."""

from __future__ import annotations

import dataclasses


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
