"""What stands where the local model does when remote models do all: it holds nothing."""

from __future__ import annotations

from typing import Any


class NoEngine:
  """A sampler that has done nothing."""

  def stats(self) -> dict[str, float]:
    return {"tokens": 0, "steps": 0, "busy_seconds": 0.0}


class NoPolicy:
  """No base, no adapter; it is never asked for a completion (`awf.config.is_remote_alone`)."""

  base_fingerprint = ""
  trainable_parameters, trainable_share = 0, 0.0
  params: dict[str, Any] = {}
  lora = None
  engine = NoEngine()

  def close(self) -> None:
    """Nothing is open."""
