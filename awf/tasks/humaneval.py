"""HumanEval: Python functions to complete, judged by hidden tests."""

from __future__ import annotations

import ast
import doctest
import re
from collections.abc import Mapping
from typing import Any

from awf.tasks.base import id_field, text_field
from awf.tasks.code import PRELUDE, CodeEvaluator
from awf.tasks.download import Source
from awf.types import Problem

_HOME = "https://raw.githubusercontent.com/openai/human-eval"
_COMMIT = "6d43fb980f9fee3c892a914eda09951f772ad10d"


class HumanEvalEvaluator(CodeEvaluator):
  """Fields: task_id, prompt, entry_point, test; the reference solution stays hidden."""

  name = "humaneval"
  dataset = "HumanEval"
  is_completion = True
  sources = {
    "all": Source(
      f"{_HOME}/{_COMMIT}/data/HumanEval.jsonl.gz",
      "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    )
  }

  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    prompt, entry_point = text_field(row, "prompt"), text_field(row, "entry_point")
    if not entry_point.isidentifier():
      raise ValueError(f"expected 'entry_point' to be a name, got {entry_point[:40]!r}")
    reference = row.get("canonical_solution")
    return Problem(
      id=id_field(row, f"{self.name}-{index}", "task_id"),
      prompt=prompt,
      entry_point=entry_point,
      public_tests=public_tests(prompt, entry_point),
      solution_prelude=PRELUDE + _before(prompt, entry_point),
      hidden={
        "test": text_field(row, "test"),
        # Some tests call helpers that the prompt defines beside the function.
        "prelude": prompt + reference if isinstance(reference, str) else _with_body(prompt),
        "canonical_solution": reference if isinstance(reference, str) else "",
      },
    )


def _before(prompt: str, entry_point: str) -> str:
  """What a prompt imports and defines before the function: a solution may repeat it or not."""
  start = re.search(rf"^def\s+{entry_point}\s*\(", prompt, re.MULTILINE)
  before = prompt[: start.start()] if start else ""
  try:
    ast.parse(before)
  except (SyntaxError, ValueError):
    return ""
  return before


def public_tests(prompt: str, entry_point: str) -> tuple[str, ...]:
  """Assertions made of the examples in the function's docstring, which the prompt shows anyway."""
  try:
    body = ast.parse(_with_body(prompt)).body
  except (SyntaxError, ValueError):
    return ()
  functions = [node for node in body if isinstance(node, ast.FunctionDef)]
  docstrings = [ast.get_docstring(node) for node in functions if node.name == entry_point]
  tests = []
  for docstring in filter(None, docstrings):
    try:
      examples = doctest.DocTestParser().get_examples(docstring)
    except ValueError:  # an example with uneven indentation
      continue
    for example in examples:
      call, expected = example.source.strip(), example.want.strip()
      if f"{entry_point}(" in call and _is_expression(call) and _is_literal(expected):
        call = ast.unparse(ast.parse(call, mode="eval"))  # a comment would take what follows
        tests.append(f"assert {call} == {expected}")
  return tuple(tests)


def _with_body(prompt: str) -> str:
  """A prompt that parses: a docstring is a body, a lone signature needs one."""
  return prompt if prompt.rstrip().endswith(('"""', "'''")) else prompt + "\n    pass\n"


def _is_expression(text: str) -> bool:
  try:
    ast.parse(text, mode="eval")
  except (SyntaxError, ValueError):
    return False
  return True


def _is_literal(text: str) -> bool:
  try:
    ast.literal_eval(text)
  except (SyntaxError, ValueError):
    return False
  return True
