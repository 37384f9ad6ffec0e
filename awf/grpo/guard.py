"""Steps whose loss or gradient is not a number change nothing; their batch is kept for a look."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from awf.types import Rollout

T = TypeVar("T")


def keep_if(is_sound: jax.Array, new: T, old: T) -> T:
  """`new` where the bool scalar holds, else `old`, leaf by leaf (PRNG keys too)."""
  return jax.tree.map(lambda a, b: jnp.where(is_sound, a, b), new, old)


def mean_of_sound(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """Means over an update's sound steps, and how many were not, or had a critic that was not
  (`nonfinite_steps`).

  Without a sound one only the number is there, and `skipped` is 1.
  """
  sound = [step for step in steps if not step["nonfinite_steps"]]
  values = [float(step["value_loss"]) for step in sound if "value_loss" in step]  # of the critic
  means = {
    name: math.fsum(float(step[name]) for step in sound) / len(sound)
    for name in (sound[0] if sound else ())
    if name != "nonfinite_steps"
  }
  bad = float(len(steps) - len(sound) + sum(not math.isfinite(x) for x in values))
  return {**means, "nonfinite_steps": bad, "skipped": float(not sound)}


def save_batch(path: Path, rollouts: Sequence[Rollout], metrics: Mapping[str, float]) -> Path:
  """Writes a batch as JSON lines: the update's metrics, then a rollout a line. Returns the path.

  Numbers that JSON does not have (NaN, infinities) are texts.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  rows = [{"metrics": dict(metrics)}, *(dataclasses.asdict(r) for r in rollouts)]
  text = "".join(json.dumps(_strict(row), allow_nan=False) + "\n" for row in rows)
  path.write_text(text, encoding="utf-8")
  return path


def _strict(value: Any) -> Any:
  if isinstance(value, Mapping):
    return {k: _strict(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_strict(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value
