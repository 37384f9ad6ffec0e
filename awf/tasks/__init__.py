"""Data sets and graders. `make_task` finds one by the name in `config.task.name`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awf.config_io import load_class
from awf.tasks.aime import AIMEEvaluator
from awf.tasks.base import DatasetEvaluator, TaskConfig, id_field, text_field
from awf.tasks.drop import DROPEvaluator
from awf.tasks.evaluator import WorkflowEvaluator
from awf.tasks.gsm8k import GSM8KEvaluator
from awf.tasks.hotpotqa import HotpotQAEvaluator
from awf.tasks.humaneval import HumanEvalEvaluator
from awf.tasks.math import MATHEvaluator
from awf.tasks.mbpp import MBPPEvaluator
from awf.tasks.nano import NanoEvaluator
from awf.tasks.numeric import NumericComparisonValidator
from awf.types import UserError

TASKS: dict[str, type[DatasetEvaluator]] = {
  task.name: task
  for task in (
    AIMEEvaluator,
    GSM8KEvaluator,
    MATHEvaluator,
    HumanEvalEvaluator,
    MBPPEvaluator,
    HotpotQAEvaluator,
    DROPEvaluator,
    NanoEvaluator,
  )
}

__all__ = [
  "TASKS",
  "AIMEEvaluator",
  "DROPEvaluator",
  "DatasetEvaluator",
  "GSM8KEvaluator",
  "HotpotQAEvaluator",
  "HumanEvalEvaluator",
  "MATHEvaluator",
  "MBPPEvaluator",
  "NanoEvaluator",
  "NumericComparisonValidator",
  "TaskConfig",
  "WorkflowEvaluator",
  "id_field",
  "make_task",
  "text_field",
]


def make_task(config: Mapping[str, Any], sandbox: Any = None) -> DatasetEvaluator:
  """Builds the evaluator of `config.task`.

  Args:
    config: config.task. Its name is one of `TASKS`, or "package.module:Class" of the user's own
      subclass of DatasetEvaluator.
    sandbox: awf.sandbox.Sandbox, for data sets that run code to grade it.

  Raises:
    UserError: unknown name or field, or a data set that needs a sandbox and got none.
  """
  task = TaskConfig.make(config)
  return _find(task.name)(task, sandbox)


def _find(name: str) -> type[DatasetEvaluator]:
  if name in TASKS:
    return TASKS[name]
  if ":" not in name:
    raise UserError(
      f"unknown config.task.name={name!r}: expected one of {', '.join(sorted(TASKS))}, or "
      "package.module:Class of your own"
    )
  return load_class(name, "config.task.name", DatasetEvaluator)
