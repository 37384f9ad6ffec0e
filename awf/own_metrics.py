"""Metrics of the user's own: functions that `config.metrics` names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from awf.config_io import load_object
from awf.metrics import number_of
from awf.types import Rollout, UserError

Metric = Callable[[Sequence[Rollout]], Any]  # gives {name: number}; checked at each call


class OwnMetrics:
  """The functions that `config.metrics` names; each says something about a round's rollouts.

  Args:
    names: "package.module:function"; a function maps rollouts to {name: number}.

  Raises:
    UserError: a name that cannot be imported, or that is no function.
  """

  def __init__(self, names: Iterable[str]):
    self._functions: dict[str, Metric] = {}
    for name in names:
      found = load_object(name, "config.metrics")
      if not callable(found):
        raise UserError(f"config.metrics: {name}: expected a function, got {found!r:.60}")
      self._functions[name] = found

  def __call__(
    self, rollouts: Sequence[Rollout], taken: Collection[str]
  ) -> dict[str, float | None]:
    """The metrics of a round.

    Args:
      rollouts: all of the round, whether or not they gave a gradient.
      taken: names that the round's row has already.

    Raises:
      UserError: a function that gives anything but names with numbers, or a name that is taken.
    """
    found: dict[str, float | None] = {}
    for function, metric in self._functions.items():
      values = metric(rollouts)
      if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise UserError(
          f"config.metrics: {function}: expected {{name: number}}, got {values!r:.60}"
        )
      for name, value in values.items():
        if name in taken or name in found:
          raise UserError(f"config.metrics: {function}: the name {name!r} is taken; choose another")
        try:
          found[name] = number_of(name, value)
        except ValueError as error:
          raise UserError(f"config.metrics: {function}: {error}") from error
    return found
