"""WorkflowEvaluator: one interface to every data set: responses in, verdicts out."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from awf.tasks import stats
from awf.tasks.base import DatasetEvaluator
from awf.types import Grade, Problem


class WorkflowEvaluator:
  """Problems by id, their fixed split, verdicts on responses and the figures made of them.

  Args:
    task: the data set, from `make_task(config.task)`; loaded here.
    concurrency: responses graded at a time.

  Raises:
    UserError: as `DatasetEvaluator.load_dataset` and `split_dataset`.
  """

  def __init__(self, task: DatasetEvaluator, concurrency: int = 64):
    self.task = task
    self.concurrency = concurrency
    self.validation, self.test = task.split_dataset()
    self.problems: dict[str, Problem] = {p.id: p for p in (*self.validation, *self.test)}

  def evaluate_workflow_response(self, generated_text: str, problem_id: str) -> dict[str, Any]:
    """Grades one response, from code without an event loop.

    Returns:
      problem_id, correct (bool), score in [0, 1], answer (what was read in the response), reason.

    Raises:
      KeyError: no such problem.
    """
    return asyncio.run(self.grade(generated_text, problem_id))

  async def grade(self, generated_text: str, problem_id: str) -> dict[str, Any]:
    """As `evaluate_workflow_response`, inside an event loop."""
    if problem_id not in self.problems:
      raise KeyError(f"no problem {problem_id!r} in {self.task.name}")
    return _as_dict(problem_id, await self.task.grade(self.problems[problem_id], generated_text))

  async def evaluate_batch(self, responses: Iterable[tuple[str, str]]) -> list[dict[str, Any]]:
    """Grades (generated_text, problem_id) pairs at the same time; results in their order."""
    slots = asyncio.Semaphore(self.concurrency)

    async def one(text: str, problem_id: str) -> dict[str, Any]:
      async with slots:
        return await self.grade(text, problem_id)

    return list(await asyncio.gather(*(one(text, id) for text, id in responses)))

  def pass_at_k(self, correct: Mapping[str, Sequence[bool]], k: int) -> float:
    """Unbiased pass@k, the mean over problems; `correct`: verdicts of each one's samples."""
    values = stats.pass_at_k_values(correct, k)
    return sum(values.values()) / len(values)

  def solved_at_k(self, solved: Sequence[Iterable[str]], split: str = "test") -> float:
    """Share of a split's problems solved by any of k workflows (`solved`: ids by workflow)."""
    problems = self.test if split == "test" else self.validation
    return stats.solved_at_k(solved, [problem.id for problem in problems])


def _as_dict(problem_id: str, grade: Grade) -> dict[str, Any]:
  return {
    "problem_id": problem_id,
    "correct": grade.correct,
    "score": grade.score,
    "answer": grade.answer,
    "reason": grade.reason,
  }
