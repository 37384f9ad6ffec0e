"""Runs tests against a solution in two jobs that share nothing but JSON.

The solution's process never holds the tests, and the tests' process never holds an object of the
solution: there is no `__eq__` to lie, no frame to walk, no verdict to forge.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from typing import Any

from awf.sandbox.child import CallError

MAX_CANDIDATE_CALLS = 100_000
SOLUTION_PRELUDE = "solution_prelude"

Start = Callable[[str, dict[str, Any], Callable[[str, Any], Awaitable[Any]]], Awaitable[Any]]


class _Solution:
  """The solution's job, started at the first call of the candidate."""

  def __init__(self, start: Start, payload: dict[str, Any]) -> None:
    self._start = start
    self._payload = payload
    self._requests: asyncio.Queue[Any] = asyncio.Queue()
    self._answers: asyncio.Queue[Any] = asyncio.Queue()
    self.task: asyncio.Task[Any] | None = None

  async def ask(self, request: Any) -> Any:
    """One call of the candidate.

    Raises:
      CallError: the solution's job has ended, of the kind that it ended with.
    """
    if self.task is None:
      self.task = asyncio.ensure_future(
        self._start("awf.sandbox.program:serve_function", self._payload, self._next)
      )
    self._requests.put_nowait(request)
    answer = asyncio.ensure_future(self._answers.get())
    try:
      await asyncio.wait({answer, self.task}, return_when=asyncio.FIRST_COMPLETED)
      if answer.done():
        return answer.result()
    finally:
      answer.cancel()
    failure = self.task.result().failure
    raise CallError(
      failure.kind if failure else "crash",
      failure.message if failure else "the solution stopped answering",
    )

  async def _next(self, method: str, answer: Any) -> Any:
    if method != "next":
      raise CallError("policy", "a solution under test may not make calls")
    if answer is not None:
      self._answers.put_nowait(answer)
    return await self._requests.get()

  async def end(self) -> Any:
    """The job's result when it has ended by itself, else None; ends it."""
    if self.task is None:
      return None
    if self.task.done():
      return self.task.result()
    self.task.cancel()
    await asyncio.wait({self.task})
    return None


async def run_tests(start_tests: Start, start_solution: Start, payload: dict[str, Any]) -> Any:
  """Runs tests against a solution.

  Args:
    start_tests: runs a job for an entry, a payload and a handler, in the layer of tests.
    start_solution: likewise, in the layer of leaves.
    payload: "solution", "tests", "entry_point", optional "prelude" (trusted source that the tests
      see) and "solution_prelude" (that the solution sees).

  Returns:
    The JobResult of the tests; with the failure of the solution's job when that ended before the
    tests did.
  """
  source = {"source": payload["solution"], "function": payload["entry_point"]}
  solution = _Solution(start_solution, {**source, "prelude": payload.get(SOLUTION_PRELUDE, "")})

  async def candidate(method: str, request: Any) -> Any:
    if method != "candidate" or type(request) is not list or len(request) != 2:
      raise CallError("policy", "tests may call the candidate only")
    answer = await solution.ask(request)
    if type(answer) is not dict or len(answer) != 1 or not set(answer) <= {"value", "error"}:
      raise CallError("policy", "the solution's job forged an answer")
    return answer

  tests = {
    key: value for key, value in payload.items() if key not in ("solution", SOLUTION_PRELUDE)
  }
  ended = None
  try:
    result = await start_tests("awf.sandbox.program:run_tests", tests, candidate)
  finally:
    ended = await solution.end()
  if ended is None or ended.failure is None:
    return result
  return dataclasses.replace(
    result,
    value=None,
    failure=ended.failure,
    cpu_seconds=result.cpu_seconds + ended.cpu_seconds,
    stdout=ended.stdout,
  )
