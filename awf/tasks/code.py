"""Finds the code in a response and has it judged by tests, in processes that share nothing."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

from awf.types import Failure, stable_hash

if TYPE_CHECKING:
  from awf.sandbox import Sandbox

MAX_REASON_CHARS = 80
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


async def judge(
  sandbox: Sandbox, solution: str, tests: str, entry_point: str, prelude: str = ""
) -> Failure | None:
  """Runs tests against a solution in jails of their own.

  Args:
    sandbox: where both run.
    solution: untrusted source that defines `entry_point`.
    tests: source that asserts about `candidate`, or defines `check(candidate)`.
    entry_point: name of the function under test.
    prelude: trusted helpers that the tests use.

  Returns:
    None when all tests pass, else why not. The message never quotes a test or an expected value;
    kind "infrastructure" means that nobody knows, after two tries.
  """
  from awf.sandbox import Job

  payload = {
    "solution": solution,
    "tests": tests,
    "entry_point": entry_point,
    "prelude": prelude,
  }
  job = Job("awf.sandbox.program:run_tests", payload, stable_hash("tests", entry_point, tests))
  result = await sandbox.run(job)
  if result.failure is not None and result.failure.kind == "infrastructure":
    result = await sandbox.run(job)
  if result.failure is not None:
    return result.failure
  verdict = result.value if type(result.value) is dict else {}
  if verdict.get("passed") is True:
    return None
  kind = str(verdict.get("error", "")).partition(":")[0]
  return Failure("wrong", f"a test failed: {kind[:MAX_REASON_CHARS]}")
