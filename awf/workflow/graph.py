"""What the static check knows about a parsed graph."""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator
from typing import NoReturn

from awf.workflow.contract import OPERATORS, OperatorSpec
from awf.workflow.parse import SourceError

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def fail(message: str, node: ast.AST | None = None) -> NoReturn:
  line = getattr(node, "lineno", 0)
  raise SourceError("format", f"line {line}: {message}" if line else message)


@dataclasses.dataclass(frozen=True)
class Graph:
  """What the checks know about a graph."""

  tree: ast.Module
  workflow: ast.ClassDef
  operators: tuple[str, ...]
  parents: dict[ast.AST, ast.AST]
  built: dict[
    str, set[str]
  ]  # attribute of self -> operators it is built from; "llm" for the model, "" for others
  walks: dict[ast.AST, list[ast.AST]]  # what `walk` has found

  def walk(self, node: ast.AST) -> list[ast.AST]:
    """The node and all below it, as `ast.walk` gives them; each walk is made once."""
    if node not in self.walks:
      self.walks[node] = list(ast.walk(node))
    return self.walks[node]

  def methods(self) -> Iterator[Function]:
    """The methods of the class."""
    return (node for node in self.workflow.body if isinstance(node, FUNCTIONS))

  def method(self, name: str) -> Function | None:
    """The last method of that name."""
    return next((one for one in reversed(list(self.methods())) if one.name == name), None)

  def operator_of(self, call: ast.AST) -> OperatorSpec | None:
    """The operator that an expression calls, when that is certain."""
    if not isinstance(call, ast.Call):
      return None
    name = built_operator(call.func)
    if name is None:
      kinds = self.built.get(self_attribute(call.func) or "", set())
      name = next(iter(kinds)) if len(kinds) == 1 else ""
    return OPERATORS.get(name) if name in self.operators else None

  def awaited_operator(self, node: ast.AST) -> OperatorSpec | None:
    """The operator of `await self.x(...)`."""
    return self.operator_of(node.value) if isinstance(node, ast.Await) else None


def self_attribute(node: ast.AST) -> str | None:
  if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
    return node.attr if node.value.id == "self" else None
  return None


def built_operator(node: ast.AST) -> str | None:
  """NAME of the expression `operator.NAME(...)`."""
  func = node.func if isinstance(node, ast.Call) else None
  if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name):
    return func.attr if func.value.id == "operator" else None
  return None


def read_graph(tree: ast.Module, nodes: list[ast.AST], operators: tuple[str, ...]) -> Graph:
  """What the checks need of a parsed graph; `nodes` are those of the tree by `ast.walk`.

  Raises:
    SourceError: not one plain class Workflow.
  """
  found = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Workflow"]
  if len(found) != 1:
    fail(f"the graph defines {len(found)} classes `class Workflow:`, expected one")
  workflow = found[0]
  if workflow.bases or workflow.keywords:
    fail("write `class Workflow:` without a base class", workflow)
  parents = {child: node for node in nodes for child in ast.iter_child_nodes(node)}
  built: dict[str, set[str]] = {}
  walks: dict[ast.AST, list[ast.AST]] = {tree: nodes, workflow: list(ast.walk(workflow))}
  for node in walks[workflow]:
    name = self_attribute(node)
    if name is not None and not isinstance(node.ctx, ast.Load):  # type: ignore[attr-defined]
      parent = parents[node]
      value = parent.value if isinstance(parent, (ast.Assign, ast.AnnAssign)) else None
      built.setdefault(name, set()).add(_kind_of(value))
  return Graph(tree, workflow, operators, parents, built, walks)


def _kind_of(value: ast.expr | None) -> str:
  if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
    return "llm" if value.func.id == "create_llm_instance" else ""
  return (built_operator(value) if value is not None else None) or ""
