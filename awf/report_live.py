"""report.html and what stands beside it, kept up to date while a run goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from awf.files import write_atomic
from awf.report import write_report
from awf.report_read import PARTS, PROBLEMS
from awf.types import Problem

log = logging.getLogger("awf")

SHARE = 0.05  # of the run's time that the page may take


class LiveReport:
  """Writes the page of a run anew after a round, unless that takes more than its share of time.

  Args:
    folder: of the run.
    problems: that the run uses, of the validation split; their texts are kept, not their answers.
    is_writer: False where another process writes the run's files: then nothing is written.
    clock: seconds, monotonic.
  """

  def __init__(
    self,
    folder: Path,
    problems: Iterable[Problem],
    is_writer: bool = True,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._folder, self._is_writer, self._clock = folder, is_writer, clock
    self._due = -float("inf")
    if is_writer:
      texts = {problem.id: problem.prompt for problem in problems}
      write_atomic(folder / PROBLEMS, json.dumps(texts) + "\n")

  def update(self, parts: Callable[[], dict[str, Any]]) -> bool:
    """After a round: writes the page when it is due. Returns whether it did.

    A page that cannot be written costs a warning, never the run.

    Args:
      parts: gives the counters that stand in parts.json: grader, sandbox, workflows,
        sampler, before.
    """
    started = self._clock()
    if not self._is_writer or started < self._due:
      return False
    try:
      self.write(parts())
    except OSError as error:
      log.warning("report.html is not up to date: %s", error)
    ended = self._clock()
    self._due = ended + (ended - started) * (1 / SHARE - 1)
    return True

  def write(self, parts: dict[str, Any]) -> None:
    """Writes the page, due or not."""
    if self._is_writer:
      write_atomic(self._folder / PARTS, json.dumps(parts, indent=2) + "\n")
      write_report(self._folder)
