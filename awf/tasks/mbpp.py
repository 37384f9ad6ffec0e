"""MBPP: short Python functions described in words, judged by hidden assertions."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from awf.tasks.base import id_field, text_field
from awf.tasks.code import PRELUDE, CodeEvaluator
from awf.tasks.download import Source
from awf.types import Problem

_HOME = "https://raw.githubusercontent.com/google-research/google-research"
_COMMIT = "30adf0ec5f35f9609c2f1d896005e184195d9146"


class MBPPEvaluator(CodeEvaluator):
  """Fields of AFlow's files: prompt, entry_point, code, test (defines a `check` without arguments);
  or of the public files: prompt or text, code, test_list, test_imports or test_setup_code.

  A public row names no function in its text, so the signature of the reference solution is added to
  the prompt, and its first assertion is the one that workflows may run. A `test_list` is preferred
  to `test`, whose `check` would hide a function of that name.
  """

  name = "mbpp"
  dataset = "MBPP"
  sources = {"all": Source(f"{_HOME}/{_COMMIT}/mbpp/sanitized-mbpp.json")}

  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    prompt, code = text_field(row, "prompt", "text"), text_field(row, "code")
    tests = _texts(row, "test_list")
    if "entry_point" in row:
      entry_point = text_field(row, "entry_point")
    else:
      entry_point = _function_under_test(code, tests)
      prompt = f"{prompt}\n\n{_signature(code, entry_point)}"
    if not entry_point.isidentifier():
      raise ValueError(f"expected 'entry_point' to be a name, got {entry_point[:40]!r}")
    setup = [*_texts(row, "test_imports"), str(row.get("test_setup_code") or "")]
    test = "\n".join([*setup, *tests]) if tests else text_field(row, "test")
    return Problem(
      id=id_field(row, f"{self.name}-{index}", "task_id"),
      prompt=prompt,
      entry_point=entry_point,
      public_tests=("\n".join([*setup, tests[0]]).strip(),) if tests else (),
      solution_prelude=PRELUDE,
      hidden={"test": test, "prelude": PRELUDE, "canonical_solution": code},
    )


def _texts(row: Mapping[str, Any], name: str) -> list[str]:
  value = row.get(name) or []
  if not isinstance(value, Sequence) or isinstance(value, str):
    raise ValueError(f"expected {name!r} to be a list of texts, got {str(value)[:40]!r}")
  if not all(isinstance(one, str) for one in value):
    raise ValueError(f"expected {name!r} to be a list of texts, got {str(list(value))[:40]!r}")
  return list(value)


def _functions(code: str) -> dict[str, ast.FunctionDef]:
  try:
    body = ast.parse(code).body
  except (SyntaxError, ValueError) as error:
    raise ValueError(f"expected 'code' to be Python: {error}") from None
  return {node.name: node for node in body if isinstance(node, ast.FunctionDef)}


def _function_under_test(code: str, tests: Sequence[str]) -> str:
  """The function of the reference solution that the first assertion calls."""
  if not tests:
    raise ValueError("no field 'test_list' and no 'entry_point' with a 'test'")
  called = re.findall(r"([A-Za-z_]\w*)\s*\(", tests[0])
  names = [name for name in called if name in _functions(code)]
  if not names:
    raise ValueError(f"the first of 'test_list' calls no function of 'code': {tests[0][:60]!r}")
  return names[0]


def _signature(code: str, name: str) -> str:
  return f"def {name}({ast.unparse(_functions(code)[name].args)}):"
