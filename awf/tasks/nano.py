"""The embedded data set of the quickstart: generated word problems with integer answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from awf.tasks.aime import AIMEEvaluator
from awf.types import Problem


class NanoEvaluator(AIMEEvaluator):
  """Fields: id, problem, answer as in AIME, and family, split ("validation" or "test")."""

  name = "nano"
  dataset = "NANO"
  sources = {}

  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    problem = super().to_problem(row, index)
    family = row.get("family", "")
    if not isinstance(family, str):
      raise ValueError(f"expected 'family' to be a text, got {str(family)[:40]!r}")
    return dataclasses.replace(problem, family=family)
