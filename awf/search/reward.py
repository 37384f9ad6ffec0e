"""A reward of a user's own: the function that `config.reward.function` names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

from awf.config_io import load_object
from awf.search.stages import Verdict
from awf.types import UserError, WorkflowSource

_FIELD = "config.reward.function"


@functools.cache
def load_reward(name: str) -> Callable[..., Any]:
  """The function `package.module:function`.

  Raises:
    UserError: it cannot be imported, or is no function.
  """
  found = load_object(name, _FIELD)
  if not callable(found):
    raise UserError(f"{_FIELD} = {name!r}: expected a function, got {found!r:.60}")
  return found


def own_parts(
  name: str, parts: dict[str, float], source: WorkflowSource, verdict: Verdict
) -> dict[str, float]:
  """The reward's addends as the user's function gives them.

  Args:
    name: of the function; it is a function of its arguments alone, and may be called again.
    parts: the addends without it, "stage" and "score".
    source: the proposed workflow; empty texts when the proposal has none.
    verdict: the stage it reached, why it failed, and its trials (score, calls, tokens).

  Raises:
    UserError: it gives anything but names with finite numbers.
  """
  found = load_reward(name)(dict(parts), source, verdict)
  if not isinstance(found, Mapping) or not found:
    raise UserError(f"{_FIELD} = {name!r}: expected {{name: number}}, got {found!r:.60}")
  for part, value in found.items():
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (isinstance(part, str) and is_number and math.isfinite(value)):
      raise UserError(
        f"{_FIELD} = {name!r}: expected finite numbers by name, got {part!r}: {value!r:.60}"
      )
  return {part: float(value) for part, value in found.items()}
