"""One text for all workflows that differ in form alone: results are shared under it.

Two sources with equal text behave equally. What is taken out: formatting, comments, docstrings,
AFlow's header, plain annotations, names of local variables, names of prompt constants and constants
that are not used.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
from collections.abc import Sequence
from typing import Any

from awf.types import WorkflowSource
from awf.workflow.contract import MAX_GRAPH_CHARS, PROVIDED_NAMES, strip_header
from awf.workflow.parse import SourceError, parse_text, prompt_constants

_SEES_NAMES = frozenset(("locals", "vars", "dir", "eval", "exec", "globals", "inspect", "sys"))
_PLAIN_TYPES = frozenset("str int float bool dict list tuple set object DatasetType".split())
_SKIPPED_FIELDS = frozenset(("ctx", "kind", "type_comment", "type_ignores", "type_params"))
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@functools.lru_cache(maxsize=8192)
def canonical(source: WorkflowSource) -> str:
  """The canonical text of a workflow; of one that does not parse, its own text."""
  try:
    tree = parse_text(strip_header(source.graph), "graph", MAX_GRAPH_CHARS)
  except SourceError:
    return "unparsed " + json.dumps([source.graph, source.prompt])
  try:
    constants: dict[str, Any] | None = prompt_constants(source.prompt)
  except SourceError:
    constants = None
  _drop_form(tree)
  prompt, nodes = _place_prompts(tree, constants, source.prompt)
  if not any(isinstance(node, ast.Name) and node.id in _SEES_NAMES for node in nodes):
    _rename_locals(tree, nodes)
  return _dump(tree) + prompt


def _drop_form(tree: ast.Module) -> None:
  for node in ast.walk(tree):
    for field in ("body", "orelse", "finalbody"):
      body = getattr(node, field, None)
      if isinstance(body, list):
        kept = [one for one in body if not _is_idle(one)]
        setattr(node, field, kept or ([ast.Pass()] if body else []))
    if isinstance(node, _FUNCTIONS) and _is_plain(node.returns):
      node.returns = None
    if isinstance(node, ast.arg) and _is_plain(node.annotation):
      node.annotation = None


def _is_idle(node: ast.stmt) -> bool:
  return isinstance(node, ast.Pass) or (
    isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
  )


def _is_plain(annotation: ast.expr | None) -> bool:
  if isinstance(annotation, ast.Constant):
    return True
  return isinstance(annotation, ast.Name) and annotation.id in _PLAIN_TYPES


class _Inline(ast.NodeTransformer):
  """Replaces `prompt_custom.NAME` by the text; counts what stays."""

  def __init__(self, texts: dict[str, str]) -> None:
    self._texts = texts

  def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
    if _is_prompt(node) and isinstance(node.ctx, ast.Load) and node.attr in self._texts:
      return ast.Constant(self._texts[node.attr])
    self.generic_visit(node)
    return node


def _is_prompt(node: ast.AST) -> bool:
  if not isinstance(node, ast.Attribute):
    return False
  return isinstance(node.value, ast.Name) and node.value.id == "prompt_custom"


def _prompt_uses(nodes: Sequence[ast.AST]) -> list[ast.Attribute]:
  return [one for one in nodes if isinstance(one, ast.Attribute) and _is_prompt(one)]


def _place_prompts(
  tree: ast.Module, constants: dict[str, Any] | None, text: str
) -> tuple[str, list[ast.AST]]:
  """Inlines the texts that are used.

  Returns:
    The text of what is left, the whole prompt where its use cannot be followed; and the tree's
    nodes.
  """
  nodes = list(ast.walk(tree))
  uses = _prompt_uses(nodes)
  names = sum(isinstance(one, ast.Name) and one.id == "prompt_custom" for one in nodes)
  written = any(not isinstance(node.ctx, ast.Load) for node in uses)
  imported = any("workspace" in name for name in _imports(nodes))
  if (
    constants is None
    or names != len(uses)
    or written
    or imported
    or ("prompt_custom" in _bound(nodes))
  ):
    return "\nprompt " + json.dumps(text), nodes
  _Inline({key: value for key, value in constants.items() if type(value) is str}).visit(tree)
  nodes = list(ast.walk(tree))
  left = sorted({node.attr for node in _prompt_uses(nodes)})
  kept = "".join(f"\n{name} = {constants[name]!r}" for name in left if name in constants)
  return kept, nodes


def _imports(nodes: Sequence[ast.AST]) -> list[str]:
  found = []
  for node in nodes:
    if isinstance(node, ast.Import):
      found += [one.name for one in node.names]
    elif isinstance(node, ast.ImportFrom):
      found.append(node.module or "")
  return found


def _bound(nodes: Sequence[ast.AST]) -> set[str]:
  """Names bound by anything but plain assignment, and names declared global or nonlocal."""
  names: set[str] = set()
  for node in nodes:
    if isinstance(node, ast.arg):
      names.add(node.arg)
    elif isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
      names.add(node.name)
    elif isinstance(node, ast.alias):
      names.add((node.asname or node.name).partition(".")[0])
    elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
      names.add(node.name)
    elif isinstance(node, ast.MatchMapping) and node.rest:
      names.add(node.rest)
    elif isinstance(node, (ast.Global, ast.Nonlocal)):
      names.update(node.names)
  return names


def _outermost_functions(tree: ast.AST) -> list[ast.AST]:
  found: list[ast.AST] = []
  level = [tree]
  while level:
    inner = [child for node in level for child in ast.iter_child_nodes(node)]
    found += [node for node in inner if isinstance(node, _FUNCTIONS)]
    level = [node for node in inner if not isinstance(node, _FUNCTIONS)]
  return found


def _rename_locals(tree: ast.Module, nodes: Sequence[ast.AST]) -> None:
  """Numbers the local variables of each function in the order in which the tree names them.

  A name is taken only where it can mean nothing else: not a parameter, not bound outside functions,
  no builtin.
  """
  functions = [list(ast.walk(function)) for function in _outermost_functions(tree)]
  inside = {id(node) for function in functions for node in function}
  outside = {
    node.id
    for node in nodes
    if isinstance(node, ast.Name) and id(node) not in inside and not isinstance(node.ctx, ast.Load)
  }
  taken = outside | _bound(nodes) | set(dir(builtins)) | set(PROVIDED_NAMES)
  for function in functions:
    if any(isinstance(node, ast.ClassDef) for node in function):
      continue
    names = [node for node in function if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)} - taken
    numbers: dict[str, str] = {}
    for node in names:
      if node.id in stored:
        node.id = numbers.setdefault(node.id, f"${len(numbers)}")


def _dump(node: Any) -> str:
  """The tree as text, without positions and without what depends on the interpreter."""
  if isinstance(node, ast.AST):
    parts = []
    for field in node._fields:
      value = getattr(node, field, None)
      if field not in _SKIPPED_FIELDS and value is not None and value != []:
        parts.append(f"{field}={_dump(value)}")
      elif isinstance(node, ast.Constant) and field == "value":
        parts.append("None")
    return f"{type(node).__name__}({' '.join(parts)})"
  if isinstance(node, list):
    return f"[{' '.join(map(_dump, node))}]"
  return hex(node) if type(node) is int else repr(node)
