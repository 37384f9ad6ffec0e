"""Counts what a grader does: verdicts, answers that it could not read, time-outs, errors, time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from awf.types import Grade, Problem


class CountedTask:
  """A data set (`awf.tasks.base.DatasetEvaluator`) whose gradings are counted. Of one thread.

  Args:
    task: the data set; all but `grade` is its own.
    clock: seconds, monotonic.
  """

  def __init__(self, task: Any, clock: Callable[[], float] = time.perf_counter):
    self._task, self._clock = task, clock
    self._counts = dict.fromkeys(("graded", "right", "malformed", "timeouts", "errors"), 0)
    self._seconds, self._since = 0.0, 0.0
    self._active = 0

  async def grade(self, problem: Problem, response: str) -> Grade:
    """As the data set's own; an exception counts as an error of the grader, and is passed on."""
    if not self._active:
      self._since = self._clock()
    self._active += 1
    try:
      grade = await self._task.grade(problem, response)
    except Exception:  # counted and passed on; a grading that was called off is no error
      self._counts["errors"] += 1
      raise
    finally:
      self._active -= 1
      if not self._active:
        self._seconds += self._clock() - self._since
    self._count(grade)
    return grade

  def _count(self, grade: Grade) -> None:
    counts = self._counts
    if math.isnan(grade.score):
      counts["errors"] += 1
      return
    counts["graded"] += 1
    counts["right"] += grade.correct
    counts["timeouts"] += grade.failure == "timeout"
    counts["malformed"] += grade.failure == "format" or not grade.answer.strip()

  def grader_stats(self) -> dict[str, float]:
    """Counts since the start.

    Returns:
      graded: answers with a verdict; of them right, malformed (nothing could be read in them) and
      timeouts (the answer's own code, or its comparison, ran into a limit). errors: answers that
      the grader failed on. seconds: in which some answer was being graded; overlaps count once.
    """
    return {**self._counts, "seconds": self._seconds}

  def __getattr__(self, name: str) -> Any:
    return getattr(self._task, name)
