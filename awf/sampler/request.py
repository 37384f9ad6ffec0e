"""What goes into the sampler's engine and what comes out of it."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

FinishReason = Literal["stop", "length", "refused"]
MAX_STOP_IDS = 8  # width of the padded per-row array of stop ids


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt and how to sample from it.

  Sample `i` of a request is a function of (prompt_ids, seed, i, the sampling fields, the adapter's
  weights) only.
  """

  prompt_ids: tuple[int, ...]
  n: int = 1  # completions
  seed: int = 0  # 63 bits
  temperature: float = 1.0  # 0 is argmax
  top_p: float = 1.0  # in (0, 1]; 1 is off
  top_k: int = 0  # 0 is off
  max_new_tokens: int = 256
  stop_ids: tuple[int, ...] = ()
  adapter: int = 0  # 0 is the base, i the i-th stacked adapter
  ignore_eos: bool = False  # benchmarks: no id stops the row

  def __post_init__(self) -> None:
    if self.n < 1:
      raise ValueError(f"n: expected at least 1 completion, got {self.n}")
    if not 0 <= self.seed < 2**63:
      raise ValueError(f"seed: expected an integer in [0, 2**63), got {self.seed}")
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
    if self.top_k < 0:
      raise ValueError(f"top_k: expected 0 (off) or a positive count, got {self.top_k}")
    if self.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
    if len(self.stop_ids) > MAX_STOP_IDS:
      raise ValueError(f"stop_ids: expected at most {MAX_STOP_IDS} ids, got {len(self.stop_ids)}")


@dataclasses.dataclass(frozen=True)
class Output:
  """One completion; the stop token, when one was drawn, is the last id and has its log-prob."""

  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]  # under the distribution that was drawn from
  finish_reason: FinishReason  # refused: the prompt leaves no room in the context, no token drawn
