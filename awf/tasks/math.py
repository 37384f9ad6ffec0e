"""MATH: competition problems whose answer is a LaTeX expression."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awf.tasks.base import DatasetEvaluator, TaskConfig, id_field, text_field
from awf.tasks.download import Source
from awf.tasks.numeric import NumericComparisonValidator, last_box
from awf.types import Grade, Problem

_HOME = "hf://datasets/HuggingFaceH4/MATH-500"
_COMMIT = "ff5b20257d8185524591543f8ff5993951537bb8"


class MATHEvaluator(DatasetEvaluator):
  """Fields: problem, solution (its last box is the answer), or answer; type or subject; level.

  Its public home here is MATH-500; AFlow's files and the whole data set have the same fields.
  Answers are equal when they are as numbers or texts, or by math-verify.
  """

  name = "math"
  dataset = "MATH"
  question_type = "math"
  sources = {"all": Source(f"{_HOME}/test.jsonl@{_COMMIT}")}

  def __init__(self, config: TaskConfig | None = None, sandbox: Any = None):
    super().__init__(config, sandbox)
    self.validator = NumericComparisonValidator(
      ("tag", "boxed", "conclusion", "last_line", "last_number")
    )

  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    answer = row.get("answer")
    if answer is None:
      answer = last_box(text_field(row, "solution"))
      if not answer:
        raise ValueError("expected 'solution' to have its answer in \\boxed{}")
    if not isinstance(answer, str) or not answer.strip():
      raise ValueError(f"expected 'answer' to be a non-empty text, got {str(answer)[:40]!r}")
    return Problem(
      id=id_field(row, f"{self.name}-{index}", "unique_id"),
      prompt=text_field(row, "problem"),
      answer=answer,
      family=str(row.get("type") or row.get("subject") or ""),
    )

  async def grade(self, problem: Problem, response: str) -> Grade:
    return await self.validator.grade(response, problem.answer)
