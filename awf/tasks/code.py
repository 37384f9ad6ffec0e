"""Data sets of Python functions: finds the code in a response and has it judged by tests, in
processes that share nothing."""

from __future__ import annotations

import ast
import builtins
import collections
import dataclasses
import logging
import os
import pathlib
import symtable
import sys
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from awf import python_text
from awf.tasks.base import DatasetEvaluator, read_rows
from awf.types import Failure, Grade, Problem, UserError, stable_hash

if TYPE_CHECKING:
  from awf.sandbox import Sandbox

log = logging.getLogger(__name__)

# What AFlow's graders have in scope.
PRELUDE = (
  "import hashlib\nimport math\nimport re\nfrom typing import Any, Dict, List, Optional, Tuple\n"
)
MAX_CODE_CHARS = 60_000
MAX_REASON_CHARS = 80
# Functions that AFlow gives no public tests, whatever its files hold.
NO_PUBLIC_TESTS = {
  "HumanEval": frozenset(
    "find_zero decode_cyclic decode_shift by_length add triangle_area correct_bracketing solve "
    "sum_squares starts_one_ends".split()
  ),
  "MBPP": frozenset(
    "remove_odd replace_spaces snake_to_camel Split swap_List square_Sum sort_sublists "
    "unique_sublists".split()
  ),
}
_GIVEN = {*dir(builtins), "candidate", "__name__", "__doc__", "__builtins__"}  # to all tests


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


def unknown_names(tests: str, prelude: str, entry_point: str) -> set[str]:
  """Names that tests use and that only a solution could define, so that no solution passes them.

  Empty where that cannot be told: something does not parse, or imports by star.
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # odd escapes
      (bound, used), (helpers, _) = _global_names(tests), _global_names(prelude)
  except (SyntaxError, ValueError, RecursionError, MemoryError):
    return set()
  if "*" in bound | helpers:
    return set()
  return used - bound - helpers - _GIVEN - {entry_point}


def _global_names(source: str) -> tuple[set[str], set[str]]:
  """(bound, used) global names of Python source; "*" is bound by an import by star."""
  imports = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
  bound = {"*" for node in imports for alias in node.names if alias.name == "*"}
  used: set[str] = set()
  module = symtable.symtable(source, "tests", "exec")
  scopes = [module]
  while scopes:
    scope = scopes.pop()
    scopes += scope.get_children()
    names = [one for one in scope.get_symbols() if scope is module or one.is_global()]
    bound |= {one.get_name() for one in names if one.is_assigned() or one.is_imported()}
    used |= {one.get_name() for one in names if one.is_referenced()}
  return bound, used


def find_solution(response: str, prompt: str, entry_point: str) -> str:
  """The code of a response: the last fence that defines the function, else the whole text if it
  does, else the fences together, else what is code in the text; else `prompt` continued by the
  code, as a completion model writes it."""
  blocks = [body for _, body in python_text.code_blocks(response)]
  fences = [textwrap.dedent(body) for body in blocks]
  for body in reversed(fences):
    if defines(body, entry_point):
      return body
  if defines(response, entry_point):
    return response
  joined = "\n\n".join(fences)
  if joined and defines(joined, entry_point):
    return joined
  continued = prompt + "\n" + (blocks[-1] if blocks else response)
  if not (prompt and defines(continued, entry_point)):
    for body in python_text.bare_code(response):
      if defines(body, entry_point):
        return body
  return continued


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
    """As in the base, without the problems whose tests need a name that only a solution defines.

    A folder's `_public_test.jsonl` {entry_point, test: [...]} gives the tests that workflows may
    run, in the place of the data set's own: those of the row with the problem's `task_id`, else of
    its function's name, when that name is the only one of its kind in the file and in the data set.
    """
    problems = super().load_dataset(path, sys.maxsize)
    folder = self._folder(os.fspath(path))
    file = folder and folder / f"{self.dataset.lower()}_public_test.jsonl"
    if file and file.is_file():
      problems = self._with_public_tests(problems, file)
    unknown = {problem.id: _unknown(problem) for problem in problems}
    kept = [problem for problem in problems if not unknown[problem.id]]
    if len(kept) < len(problems):
      names = sorted(set().union(*unknown.values()))
      log.warning(
        "%s: %d of %d problems are left out, as their tests use what only a solution defines: %s",
        self.name, len(problems) - len(kept), len(problems), ", ".join(names[:8]),
      )  # fmt: skip
    if not kept:
      raise UserError(f"no problem of {self.name} has tests that stand alone (config.task.path)")
    return self._limited(kept, limit or self.config.limit)

  def raw_rows(self) -> Iterable[tuple[Mapping[str, Any], Problem]]:
    """As in the base, without the rows that `load_dataset` leaves out."""
    return ((row, problem) for row, problem in super().raw_rows() if not _unknown(problem))

  def _with_public_tests(self, problems: Sequence[Problem], file: pathlib.Path) -> list[Problem]:
    by_id: dict[tuple[str, str], tuple[str, ...]] = {}
    by_name: dict[str, set[tuple[str, ...]]] = collections.defaultdict(set)
    for row, line in read_rows(file):
      tests = row.get("test") if isinstance(row, dict) else None
      tests = [tests] if isinstance(tests, str) else tests
      if not isinstance(tests, list) or not all(isinstance(one, str) for one in tests):
        raise UserError(
          f"{file}, line {line}: expected {{entry_point, test: [texts]}} (config.task.path)"
        )
      name = str(row.get("entry_point"))
      if row.get("task_id") is not None:
        by_id[str(row["task_id"]), name] = tuple(tests)
      by_name[name].add(tuple(tests))
    for name, count in collections.Counter(p.entry_point for p in problems).items():
      if count > 1 or len(by_name[name]) > 1 or name in NO_PUBLIC_TESTS.get(self.dataset, ()):
        by_name.pop(name, None)

    def tests_of(problem: Problem) -> tuple[str, ...]:
      name = problem.entry_point
      (named,) = by_name.get(name) or {problem.public_tests}
      return by_id.get((problem.id, name), named)

    return [dataclasses.replace(p, public_tests=tests_of(p)) for p in problems]

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


def _unknown(problem: Problem) -> set[str]:
  hidden = problem.hidden
  return unknown_names(hidden["test"], hidden.get("prelude", ""), problem.entry_point)
