"""Proposals, workflows and grades of a run of several processes: asked for by all, done by one.

Each stands in for what it wraps, so that search, comparison and evaluation know nothing of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from awf.hosts import Cluster, Value
from awf.types import (
  Completion,
  Failure,
  Grade,
  Problem,
  WorkflowResult,
  WorkflowSource,
  stable_hash,
)
from awf.workflow.canonical import canonical


class DealtRunner:
  """A workflow runner (`awf.workflow.runner.WorkflowRunner`) whose runs are dealt out."""

  def __init__(self, runner: Any, cluster: Cluster, repeat: int):
    self._runner, self._cluster, self._repeat = runner, cluster, repeat

  async def run(self, source: WorkflowSource, problem: Problem) -> WorkflowResult:
    """As the runner's own; the counts of `stats` are those of this process."""

    async def make() -> Value:
      result = await self._runner.run(source, problem)
      is_lasting = result.failure is None or result.failure.kind != "infrastructure"
      return dataclasses.asdict(result), is_lasting

    name = stable_hash(self._repeat, canonical(source), problem.id, problem.prompt)
    row = await self._cluster.share("run", f"{name:x}", make)
    failure = row["failure"] and Failure(**row["failure"])
    return WorkflowResult(**{**row, "failure": failure})

  def __getattr__(self, name: str) -> Any:
    return getattr(self._runner, name)


class DealtTask:
  """A data set (`awf.tasks.base.DatasetEvaluator`) whose answers are graded by one process each:
  a grader that runs code may end at a limit of time on one and not on another.
  """

  def __init__(self, task: Any, cluster: Cluster):
    self._task, self._cluster = task, cluster

  async def grade(self, problem: Problem, response: str) -> Grade:
    async def make() -> Value:
      grade = await self._task.grade(problem, response)
      return dataclasses.asdict(grade), not math.isnan(grade.score)

    name = stable_hash(problem.id, problem.prompt, response)
    return Grade(**await self._cluster.share("grade", f"{name:x}", make))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._task, name)


async def propose(
  cluster: Cluster, version: int, policy: Any, messages: Any, n: int, key: int, sampling: Any
) -> list[Completion]:
  """A group of `policy.propose`, drawn by one process.

  Args:
    version: of the policy's adapter: the same request gives something else after an update.
  """

  async def make() -> Value:
    return [dataclasses.asdict(c) for c in await policy.propose(messages, n, key, sampling)], False

  name = stable_hash(version, messages, n, key)
  return [_completion(row) for row in await cluster.share("propose", f"{name:x}", make)]


def _completion(row: dict[str, Any]) -> Completion:
  fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
  return Completion(**fields)


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What the runners of all processes hold (`System.state_dict`), as one; the first one wins."""
  out: dict[str, Any] = {}
  for state in states:
    for repeat, kinds in state.items():
      for kind, rows in kinds.items():
        mine = out.setdefault(repeat, {}).setdefault(kind, [])
        known = [key for key, _ in mine]
        mine += [row for row in rows if row[0] not in known]
  return out
