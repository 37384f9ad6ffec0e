"""Checks a proposed workflow before it costs a model call; says in one line what to repair.

The rules are what AFlow's contract demands and what small optimisers get wrong. They are a courtesy
to honest
proposals: hostile ones are the sandbox's business.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Sequence
from typing import Any

from awf.types import Failure, WorkflowSource
from awf.workflow.canonical import canonical
from awf.workflow.contract import (
  ALLOWED_IMPORTS,
  MAX_GRAPH_CHARS,
  OPERATOR_MODULE,
  OPERATORS,
  PROMPT_MODULE,
  PROVIDED_NAMES,
  SCRIPT_MODULES,
)
from awf.workflow.graph import FUNCTIONS, Function, Graph, fail, read_graph, self_attribute
from awf.workflow.parse import SourceError, check_compiles, parse_text, prompt_constants
from awf.workflow.usage import check_calls, check_keys, check_returns

__all__ = ["canonical", "static_check"]

FORBIDDEN_NAMES = frozenset(
  "eval exec compile open input __import__ globals locals vars breakpoint exit quit".split()
)
HARMLESS_DUNDERS = frozenset(("__init__", "__call__", "__name__"))


def static_check(
  source: WorkflowSource, operators: tuple[str, ...], is_code: bool | None = None
) -> Failure | None:
  """Checks a workflow without running it.

  Args:
    source: graph and prompt text as the optimiser wrote them.
    operators: names of the operators that it may use.
    is_code: whether `__call__` gets an entry point; None: when an operator for code is among them.

  Returns:
    None when nothing is wrong, else kind "format" or "policy" with one line that says what to
    change.
  """
  try:
    constants = prompt_constants(source.prompt)
    tree = parse_text(source.graph, "graph", MAX_GRAPH_CHARS)
    check_compiles(tree, source.graph, "graph")
    nodes = list(ast.walk(tree))  # once: a walk costs more than what is done with its nodes
    _check_policy(nodes)
    _check_names(nodes)
    graph = read_graph(tree, nodes, operators)
    if is_code is None:
      is_code = "Test" in operators or "CustomCodeGenerate" in operators
    _check_signatures(graph, is_code)
    _check_operators(graph)
    _check_attributes(graph)
    _check_prompts(nodes, constants)
    check_calls(graph)
    check_keys(graph)
    check_returns(graph)
  except SourceError as error:
    return Failure(error.kind, str(error))
  return None


def _check_policy(nodes: Sequence[ast.AST]) -> None:
  for node in nodes:
    line = f"line {getattr(node, 'lineno', 0)}: "
    if isinstance(node, ast.Import):
      for one in node.names:
        _check_import(one.name, line)
    elif isinstance(node, ast.ImportFrom):
      if node.level:
        raise SourceError("policy", f"{line}relative imports are not allowed")
      _check_import(node.module or "", line)
    elif isinstance(node, ast.Name) and (_is_dunder(node.id) or node.id in FORBIDDEN_NAMES):
      raise SourceError("policy", f"{line}{node.id} is not allowed in a workflow")
    elif isinstance(node, ast.Attribute) and _is_dunder(node.attr):
      raise SourceError("policy", f"{line}the attribute {node.attr} is not allowed in a workflow")


def _is_dunder(name: str) -> bool:
  return name.startswith("__") and name.endswith("__") and name not in HARMLESS_DUNDERS


def _check_import(name: str, line: str) -> None:
  known = OPERATOR_MODULE.fullmatch(name) or PROMPT_MODULE.fullmatch(name)
  if known or name in SCRIPT_MODULES or name.partition(".")[0] in ALLOWED_IMPORTS:
    return
  allowed = ", ".join(ALLOWED_IMPORTS)
  raise SourceError("policy", f"{line}import of {name!r} is not allowed, only of {allowed}")


def _check_names(nodes: Sequence[ast.AST]) -> None:
  """Every name that is read is bound somewhere; the provided names keep their meaning."""
  bound: dict[str, ast.AST] = {}
  for node in nodes:
    for name in _names_bound(node):
      if not name.isascii():
        fail(f"the name {name!a} is not ASCII", node)
      if name in PROVIDED_NAMES:
        fail(f"{name} is already provided and must not be redefined or imported again", node)
      bound[name] = node
  known = bound.keys() | set(dir(builtins)) | set(PROVIDED_NAMES)
  for node in nodes:
    if isinstance(node, ast.Name) and node.id not in known:
      hint = f": add `import {node.id}`" if node.id in ALLOWED_IMPORTS else ""
      fail(f"the name {node.id!a} is not defined{hint}", node)


def _names_bound(node: ast.AST) -> list[str]:
  if isinstance(node, ast.Name):
    return [] if isinstance(node.ctx, ast.Load) else [node.id]
  if isinstance(node, ast.arg):
    return [node.arg]
  if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
    return [node.name]
  if isinstance(node, ast.Import):
    header = OPERATOR_MODULE, PROMPT_MODULE
    names = [one for one in node.names if not any(each.fullmatch(one.name) for each in header)]
    return [one.asname or one.name.partition(".")[0] for one in names]
  if isinstance(node, ast.ImportFrom):
    header_names = ("typing", "scripts.async_llm", "scripts.evaluator")
    names = [one.asname or one.name for one in node.names]
    return [one for one in names if node.module not in header_names or one not in PROVIDED_NAMES]
  if isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
    return [node.name]
  if isinstance(node, ast.MatchMapping) and node.rest:
    return [node.rest]
  return []


def _accepts(function: Function, count: int) -> bool:
  """Whether a method takes `count` positional arguments after self."""
  args = function.args
  positional = len(args.posonlyargs) + len(args.args) - 1
  required = positional - len(args.defaults)
  free_keywords = all(default is not None for default in args.kw_defaults)
  return required <= count and (count <= positional or args.vararg is not None) and free_keywords


def _check_signatures(graph: Graph, is_code: bool) -> None:
  for method in graph.methods():
    if not method.decorator_list and not (method.args.posonlyargs or method.args.args):
      fail(f"the method {method.name} lacks self", method)
  init, call = graph.method("__init__"), graph.method("__call__")
  if not isinstance(init, ast.FunctionDef) or not _accepts(init, 3):
    fail("Workflow needs `def __init__(self, name: str, llm_config, dataset: DatasetType)`", init)
  wanted = "(self, problem: str, entry_point: str)" if is_code else "(self, problem: str)"
  if not isinstance(call, ast.AsyncFunctionDef):
    fail(f"Workflow needs `async def __call__{wanted}`", call)
  if not any(_accepts(call, count) for count in ((2, 3) if is_code else (1,))):
    fail(f"__call__ takes other arguments, expected {wanted}", call)


def _check_operators(graph: Graph) -> None:
  """Operators exist, are offered, and are built with the model."""
  for node in graph.walk(graph.tree):
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
      continue
    if node.value.id != "operator":
      continue
    if node.attr not in graph.operators:
      fail(f"unknown operator {node.attr}, expected one of {', '.join(graph.operators)}", node)
    call = graph.parents[node]
    if isinstance(call, ast.Call) and call.func is node:
      model = [*call.args, *(one.value for one in call.keywords if one.arg == "llm")]
      if not model or (isinstance(model[0], ast.Name) and model[0].id == "llm_config"):
        fail(
          f"operator.{node.attr} is built without the model: write operator.{node.attr}(self.llm)",
          call,
        )


def _check_attributes(graph: Graph) -> None:
  """Attributes of self that are read are set somewhere in the class."""
  defined = set(graph.built) | {one.name for one in graph.methods()}
  for node in graph.workflow.body:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
  for node in graph.walk(graph.workflow):
    name = self_attribute(node)
    if name is None or name in defined or name in HARMLESS_DUNDERS:
      continue
    owner = next((one for one in graph.operators if OPERATORS[one].attribute == name), None)
    hint = f": add `self.{name} = operator.{owner}(self.llm)` to __init__" if owner else ""
    fail(f"self.{name} is used but never set{hint}", node)


def _check_prompts(nodes: Sequence[ast.AST], constants: dict[str, Any]) -> None:
  for node in nodes:
    if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
      continue
    if node.value.id == "prompt_custom" and node.attr not in constants:
      defined = ", ".join(list(constants)[:10]) or "nothing"
      fail(f"prompt_custom.{node.attr} is not defined in the prompt, which has {defined}", node)
