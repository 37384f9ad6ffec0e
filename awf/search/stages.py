"""Staged evaluation of a workflow: static check, smoke run, common problems, full validation."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import math
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Protocol, TypeVar

from awf.search.config import RewardConfig
from awf.search.tree import LogEntry, Node
from awf.types import Failure, Grade, Problem, WorkflowResult, WorkflowSource, stable_hash
from awf.workflow.contract import allowed_operators
from awf.workflow.static import canonical, static_check

T = TypeVar("T")
LOGGED_BELOW = 0.3  # AFlow logs a problem as failed under this score
LOG_KEPT = 16  # failed problems that a node remembers for its prompts
MAX_OUTPUT = 2_000  # characters of an answer that are kept
COPY = Failure("wrong", "the workflow equals its parent")


class Runner(Protocol):
  """What the search needs of `awf.workflow.runner.WorkflowRunner`."""

  async def run(self, source: WorkflowSource, problem: Problem) -> WorkflowResult: ...


class Grader(Protocol):
  """What the search needs of `awf.tasks.base.DatasetEvaluator`."""

  async def grade(self, problem: Problem, response: str) -> Grade: ...


@dataclasses.dataclass(frozen=True)
class Trial:
  """One workflow on one problem."""

  problem: Problem
  score: float  # NaN: infrastructure failure
  output: str  # the answer, or the typed failure; capped
  extracted: str
  failure: Failure | None = None
  calls: int = 0  # of the model
  tokens: int = 0  # that it generated
  prompt_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Verdict:
  """How far a workflow came: `stage` is the one that it failed, or the last one that it passed."""

  stage: str
  failure: Failure | None
  trials: tuple[Trial, ...] = ()

  @property
  def mean(self) -> float:
    """Mean score over the trials; NaN without trials or with an infrastructure failure."""
    scores = [t.score for t in self.trials]
    return sum(scores) / len(scores) if scores else math.nan

  @property
  def scores(self) -> dict[str, float]:
    return {t.problem.id: t.score for t in self.trials if not math.isnan(t.score)}

  @property
  def tokens(self) -> tuple[int, int]:
    """Prompt and generated tokens of the trials that have a score."""
    scored = [t for t in self.trials if not math.isnan(t.score)]
    return sum(t.prompt_tokens for t in scored), sum(t.tokens for t in scored)

  @property
  def log(self) -> tuple[LogEntry, ...]:
    failed = [t for t in self.trials if t.score < LOGGED_BELOW]
    return tuple(
      LogEntry(t.problem.id, t.output[:600], t.extracted[:80]) for t in failed[:LOG_KEPT]
    )


async def gather_all(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
  """Runs all jobs at once, results in order; the first error cancels the others, then is raised."""
  tasks = [asyncio.ensure_future(job) for job in jobs]
  try:
    return list(await asyncio.gather(*tasks))
  except BaseException:
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    raise


def key_of(source: WorkflowSource) -> str:
  """A short name that equal (canonical) workflows share."""
  return f"{stable_hash(canonical(source)):016x}"


def check(
  source: WorkflowSource, parent: Node, operators: tuple[str, ...], is_code: bool
) -> str | Failure:
  """The key of an edit that passes the check, or why it does not (COPY: it changes nothing).

  It may use the operators that are offered and those of its parent.
  """
  failure = _checked(source, allowed_operators(operators, parent.source.graph), is_code)
  if failure is not None:
    return failure
  key = key_of(source)
  return COPY if key == parent.canonical else key


@functools.lru_cache(maxsize=4096)
def _checked(source: WorkflowSource, operators: tuple[str, ...], is_code: bool) -> Failure | None:
  """`static_check`, once for equal texts."""
  return static_check(source, operators, is_code)


class Trials:
  """Runs and grades workflows; equal (canonical) workflows are run and graded once per problem."""

  def __init__(self, runner: Runner, grader: Grader):
    self._runner = runner
    self._grader = grader
    self._done: dict[tuple[str, str], Trial] = {}

  async def one(self, source: WorkflowSource, key: str, problem: Problem) -> Trial:
    """One trial; `key` is that of `source`."""
    known = self._done.get((key, problem.id))
    if known is not None:
      return known
    result = await self._runner.run(source, problem)
    failure = result.failure
    if failure is not None:
      score = math.nan if failure.kind == "infrastructure" else 0.0
      text = f"failed: {failure.kind}: {failure.message}"
      trial = Trial(problem, score, text[:MAX_OUTPUT], "", failure)
    else:
      answer = result.answer or ""
      grade = await self._grader.grade(problem, answer)
      if math.isnan(grade.score):  # the grader itself failed
        failure = Failure("infrastructure", grade.reason or "the grader failed")
      trial = Trial(problem, float(grade.score), answer[-MAX_OUTPUT:], grade.answer, failure)
    trial = dataclasses.replace(
      trial,
      calls=result.calls,
      tokens=result.completion_tokens,
      prompt_tokens=result.prompt_tokens,
    )
    if not math.isnan(trial.score):
      self._done[key, problem.id] = trial
    return trial

  async def all(
    self, source: WorkflowSource, key: str, problems: Sequence[Problem]
  ) -> tuple[Trial, ...]:
    return tuple(await gather_all(self.one(source, key, p) for p in problems))

  async def judge(
    self, source: WorkflowSource, key: str, common: Sequence[Problem], smoke: int
  ) -> Verdict:
    """Smoke run on the first `smoke` common problems, then all of them."""
    first = await self.all(source, key, common[:smoke])
    failed = [t.failure for t in first if t.failure is not None]
    if failed:
      broken = [f for f in failed if f.kind == "infrastructure"]
      return Verdict("smoke", (broken or failed)[0], first)
    if first and not any(t.output.strip() for t in first):
      return Verdict("smoke", Failure("wrong", "empty answers"), first)
    trials = first + await self.all(source, key, common[smoke:])
    broken = [t.failure for t in trials if math.isnan(t.score)]
    return Verdict("subset", broken[0] if broken else None, trials)

  async def validate(
    self, source: WorkflowSource, key: str, problems: Sequence[Problem]
  ) -> Verdict:
    """Runs on all problems, without the stages; infrastructure failures are NaN trials."""
    return Verdict("full", None, await self.all(source, key, problems))


def reward_parts(verdict: Verdict, config: RewardConfig) -> dict[str, float]:
  """The reward's addends; {} for an infrastructure failure, which has no reward."""
  if verdict.failure is not None and verdict.failure.kind == "infrastructure":
    return {}
  if verdict.failure is not None:
    earned = {"format": config.parse, "static": config.static, "smoke": config.smoke}
    return {"stage": earned[verdict.stage], "score": 0.0}
  return {"stage": config.runs, "score": config.score * verdict.mean}
