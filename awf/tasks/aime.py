"""AIME: problems whose answer is an integer from 0 to 999."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awf.tasks.base import DatasetEvaluator, TaskConfig, id_field, text_field
from awf.tasks.download import Source
from awf.tasks.numeric import NumericComparisonValidator
from awf.types import Grade, Problem

_HOME = "https://raw.githubusercontent.com/QwenLM/Qwen2.5-Math"
_COMMIT = "a45202bd16f1ec06f433442dc1152d0074773465"


class AIMEEvaluator(DatasetEvaluator):
  """AIME 2024 (30 problems). Fields: id, problem, answer (0 to 999; text or integer)."""

  name = "aime"
  dataset = "AIME"
  question_type = "math"
  sources = {
    "all": Source(
      f"{_HOME}/{_COMMIT}/evaluation/data/aime24/test.jsonl",
      "af2b8bd2aa911b6333ad0df32f3ca05c7ae8ed10f1731f4372c8ae26990bf7ac",
    )
  }

  def __init__(self, config: TaskConfig | None = None, sandbox: Any = None):
    super().__init__(config, sandbox)
    self.validator = NumericComparisonValidator()

  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    prompt = text_field(row, "problem", "question")
    return Problem(
      id=id_field(row, f"{self.name}-{index}"), prompt=prompt, answer=_integer(row.get("answer"))
    )

  async def grade(self, problem: Problem, response: str) -> Grade:
    return await self.validator.grade(response, problem.answer)


def _integer(value: Any) -> str:
  """An answer from 0 to 999 in plain digits; leading zeros go."""
  if isinstance(value, int) and not isinstance(value, bool):
    number = value
  elif isinstance(value, str) and value.strip().isascii() and value.strip().isdigit():
    number = int(value.strip()[:10])
  else:
    raise ValueError(f"expected 'answer' to be an integer from 0 to 999, got {str(value)[:40]!r}")
  if not 0 <= number <= 999:
    raise ValueError(f"expected 'answer' to be an integer from 0 to 999, got {number}")
  return str(number)
