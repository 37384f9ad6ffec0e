"""Grades code in two jails: the solution never shares a process with the tests that judge it."""

from __future__ import annotations

import ast
import asyncio
import re
from typing import TYPE_CHECKING, Any

from awf.types import Failure, stable_hash

if TYPE_CHECKING:
  from awf.sandbox import Sandbox

MAX_CALLS = 2_000  # calls of the solution by one set of tests
MAX_REASON_CHARS = 200
_FENCE = re.compile(
  r"^[ \t]*```[ \t]*([\w+-]*)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE
)


def defines(source: str, name: str) -> bool:
  """Whether Python source defines `name` at module level."""
  try:
    body = ast.parse(source).body
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return False
  functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
  return any(
    (isinstance(node, functions) and node.name == name)
    or (
      isinstance(node, ast.Assign)
      and any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    )
    for node in body
  )


def find_solution(response: str, prompt: str, entry_point: str) -> str:
  """The code of a response: the last fence that defines the function, else the whole text if it
  does, else `prompt` continued by the code, as a completion model writes it."""
  fences = [body for _, body in _FENCE.findall(response)]
  for body in reversed(fences):
    if defines(body, entry_point):
      return body
  if defines(response, entry_point):
    return response
  joined = "\n\n".join(fences)
  if joined and defines(joined, entry_point):
    return joined
  return prompt + "\n" + (fences[-1] if fences else response)


class TestRunner:
  """Runs tests in one job and the solution in another; plain values cross, through this process.

  Args:
    sandbox: where both jobs run.
  """

  __test__ = False  # no test class, whatever its name looks like

  def __init__(self, sandbox: Sandbox):
    self.sandbox = sandbox
    # A pair waits for itself: half of the children must stay free for its second job.
    self._pairs = max(1, sandbox.config.max_children // 4)
    self._slots: dict[int, asyncio.Semaphore] = {}

  async def run(
    self, solution: str, tests: str, entry_point: str, prelude: str = ""
  ) -> Failure | None:
    """Returns None when all tests pass, else why not (kind "infrastructure": nobody knows).

    Args:
      solution: untrusted source that defines `entry_point`.
      tests: source that asserts about `candidate`, or defines `check(candidate)`.
      entry_point: name of the function under test.
      prelude: trusted helpers that the tests use.
    """
    loop = asyncio.get_running_loop()
    slots = self._slots.setdefault(id(loop), asyncio.Semaphore(self._pairs))
    async with slots:
      failure = await self._pair(solution, tests, entry_point, prelude)
      if failure is not None and failure.kind == "infrastructure":
        failure = await self._pair(solution, tests, entry_point, prelude)
    return failure

  async def _pair(
    self, solution: str, tests: str, entry_point: str, prelude: str
  ) -> Failure | None:
    from awf.sandbox import CallError, Job, Limits

    requests: asyncio.Queue[list[Any] | None] = asyncio.Queue()
    answers: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    fault: list[Failure] = []  # of the solution's job

    async def serve(method: str, answer: Any) -> Any:
      if method != "next":
        raise CallError("policy", "unknown call")
      if answer is not None:
        answers.put_nowait(_checked(answer))
      return await requests.get()

    async def ask(method: str, request: Any) -> Any:
      if method != "candidate":
        raise CallError("policy", "unknown call")
      arguments, named = request
      if named:
        raise CallError("format", "tests may pass positional arguments only")
      if not fault:
        requests.put_nowait(arguments)
      return await answers.get()

    seed = stable_hash("tests", entry_point, tests)
    limits = Limits(max_calls=MAX_CALLS)
    server = Job(
      "awf.sandbox.program:serve_function",
      {"source": solution, "function": entry_point}, seed, limits,
    )  # fmt: skip
    judge = Job(
      "awf.sandbox.program:run_tests",
      {"tests": tests, "entry_point": entry_point, "prelude": prelude}, seed, limits,
    )  # fmt: skip

    async def run_server() -> None:
      result = await self.sandbox.run(server, serve)
      fault.append(result.failure or Failure("wrong", "the solution ended before its tests"))
      for _ in range(MAX_CALLS):  # whatever the tests still ask has one answer
        answers.put_nowait({"error": "the solution does not run"})

    serving = asyncio.ensure_future(run_server())
    try:
      verdict = await self.sandbox.run(judge, ask)
      broken = fault[0] if fault else None
    finally:
      requests.put_nowait(None)
      serving.cancel()
      await asyncio.gather(serving, return_exceptions=True)
    if broken is not None:
      return broken
    if verdict.failure is not None:
      return verdict.failure
    if type(verdict.value) is dict and verdict.value.get("passed") is True:
      return None
    error = verdict.value.get("error", "") if type(verdict.value) is dict else ""
    return Failure("wrong", f"a test failed: {str(error).split(':')[0][:MAX_REASON_CHARS]}")


def _checked(answer: Any) -> dict[str, Any]:
  """An answer of the solution's job in the form that the tests' job expects."""
  if type(answer) is dict and "value" in answer:
    return {"value": answer["value"]}
  error = answer.get("error") if type(answer) is dict else None
  return {"error": error[:MAX_REASON_CHARS] if type(error) is str else "no answer"}
