"""GSM8K: grade-school word problems; the answer is the number behind #### in the solution."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awf.tasks import quantities
from awf.tasks.base import DatasetEvaluator, TaskConfig, id_field, text_field
from awf.tasks.download import Source
from awf.tasks.numeric import NumericComparisonValidator
from awf.types import Grade, Problem

_HOME = "https://raw.githubusercontent.com/openai/grade-school-math"
_COMMIT = "3101c7d5072418e28b9008a6636bde82a006892c"
_FOLDER = f"{_HOME}/{_COMMIT}/grade_school_math/data"


class GSM8KEvaluator(DatasetEvaluator):
  """Fields: question, answer (a solution that ends with `#### N`).

  Its training file is our validation split, its test file our test split; a single file of the
  user's is divided by the seed.
  """

  name = "gsm8k"
  dataset = "GSM8K"
  question_type = "math"
  sources = {
    "validation": Source(
      f"{_FOLDER}/train.jsonl",
      "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    ),
    "test": Source(
      f"{_FOLDER}/test.jsonl",
      "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
    ),
  }

  def __init__(self, config: TaskConfig | None = None, sandbox: Any = None):
    super().__init__(config, sandbox)
    self.validator = NumericComparisonValidator()

  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    answer = text_field(row, "answer").rpartition("####")[2].strip()
    if quantities.parse_quantity(answer) is None:
      raise ValueError(f"expected 'answer' to end with '#### NUMBER', got {answer[-40:]!r}")
    prompt = text_field(row, "question")
    return Problem(id=id_field(row, f"{self.name}-{index}"), prompt=prompt, answer=answer)

  async def grade(self, problem: Problem, response: str) -> Grade:
    return await self.validator.grade(response, problem.answer)
