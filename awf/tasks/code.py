"""Data sets of Python functions: finds the code in a response and has it judged by tests, in
processes that share nothing."""

from __future__ import annotations

import ast
import dataclasses
import os
import re
from typing import TYPE_CHECKING, ClassVar

from awf.tasks.base import DatasetEvaluator, read_rows
from awf.types import Failure, Grade, Problem, UserError, stable_hash

if TYPE_CHECKING:
  from awf.sandbox import Sandbox

# What AFlow's graders have in scope.
PRELUDE = (
  "import hashlib\nimport math\nimport re\nfrom typing import Any, Dict, List, Optional, Tuple\n"
)
MAX_CODE_CHARS = 60_000
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
  sandbox: Sandbox,
  solution: str,
  tests: str,
  entry_point: str,
  prelude: str = "",
  solution_prelude: str = "",
) -> Failure | None:
  """Runs tests against a solution in jails of their own.

  Args:
    sandbox: where both run.
    solution: untrusted source that defines `entry_point`.
    tests: source that asserts about `candidate`, or defines `check(candidate)`.
    entry_point: name of the function under test.
    prelude: trusted helpers that the tests use.
    solution_prelude: those that the solution may use.

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
    "solution_prelude": solution_prelude,
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


class CodeEvaluator(DatasetEvaluator):
  """Base of the data sets whose answer is a function, judged by hidden tests.

  `hidden` of a problem has "test" and may have "prelude", see `judge`.
  """

  question_type = "code"
  needs_sandbox = True
  is_completion: ClassVar[bool] = False  # whether a prompt is code that a response may continue

  def load_dataset(self, path: str | os.PathLike[str] = "", limit: int = 0) -> list[Problem]:
    """As in the base; a folder's `_public_test.jsonl` {entry_point, test: [...]} gives the tests
    that workflows may run, in the place of the data set's own."""
    problems = super().load_dataset(path, limit)
    folder = self._folder(os.fspath(path))
    file = folder and folder / f"{self.dataset.lower()}_public_test.jsonl"
    if not file or not file.is_file():
      return problems
    public: dict[str, tuple[str, ...]] = {}
    for row, line in read_rows(file):
      tests = row.get("test") if isinstance(row, dict) else None
      tests = [tests] if isinstance(tests, str) else tests
      if not isinstance(tests, list) or not all(isinstance(one, str) for one in tests):
        raise UserError(
          f"{file}, line {line}: expected {{entry_point, test: [texts]}} (config.task.path)"
        )
      public[str(row.get("entry_point"))] = tuple(tests)
    return [
      dataclasses.replace(p, public_tests=public.get(p.entry_point, p.public_tests))
      for p in problems
    ]

  async def grade(self, problem: Problem, response: str) -> Grade:
    assert self.sandbox is not None
    start = problem.prompt if self.is_completion else ""
    solution = find_solution(response[-MAX_CODE_CHARS:], start, problem.entry_point)
    hidden = problem.hidden
    failure = await judge(
      self.sandbox,
      solution,
      hidden["test"],
      problem.entry_point,
      hidden.get("prelude", ""),
      problem.solution_prelude,
    )
    shown = solution[:2000]
    if failure is None:
      return Grade(1.0, True, shown)
    score = float("nan") if failure.kind == "infrastructure" else 0.0
    kind = None if failure.kind == "wrong" else failure.kind
    return Grade(score, False, shown, f"{failure.kind}: {failure.message}", kind)
