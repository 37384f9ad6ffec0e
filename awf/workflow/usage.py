"""Static checks of how a graph uses operators: arguments, await, result keys, returns."""

from __future__ import annotations

import ast

from awf.workflow.contract import OperatorSpec
from awf.workflow.graph import FUNCTIONS, Function, Graph, fail, self_attribute

_VALUES = (ast.Constant, ast.Subscript, ast.Dict, ast.JoinedStr, ast.BinOp, ast.Compare)


def check_calls(graph: Graph) -> None:
  """Arguments of operators, and the await before operators and the model."""
  handed_on: dict[ast.AST, set[str]] = {}
  for node in graph.walk(graph.workflow):
    if not isinstance(node, ast.Call):
      continue
    spec = graph.operator_of(node)
    if spec is not None:
      _check_arguments(node, spec)
    attribute = self_attribute(node.func)
    is_model = attribute is not None and graph.built.get(attribute) == {"llm"}
    method = graph.method(attribute) if attribute else None
    if spec is not None or is_model or isinstance(method, ast.AsyncFunctionDef):
      _check_await(graph, node, handed_on)


def _check_arguments(call: ast.Call, spec: OperatorSpec) -> None:
  names = spec.required + spec.optional
  if any(isinstance(one, ast.Starred) for one in call.args):
    return
  if any(one.arg is None for one in call.keywords):
    return
  if len(call.args) > len(names):
    fail(f"{spec.name} takes {', '.join(names)}, got {len(call.args)} arguments", call)
  given = list(names[: len(call.args)])
  for keyword in call.keywords:
    if keyword.arg not in names:
      fail(f"{spec.name} has no argument {keyword.arg!a}, expected {', '.join(names)}", call)
    if keyword.arg in given:
      fail(f"{spec.name} gets {keyword.arg} twice", call)
    given.append(keyword.arg)
  missing = [name for name in spec.required if name not in given]
  if missing:
    fail(f"{spec.name} lacks the argument {missing[0]}, expected {', '.join(names)}", call)


def _check_await(graph: Graph, call: ast.Call, handed_on: dict[ast.AST, set[str]]) -> None:
  """Fails for a call whose await is missing; `handed_on` keeps `_handed_on` of each function."""
  parent = graph.parents[call]
  if isinstance(parent, ast.Await):
    return
  what = ast.unparse(call.func)
  if isinstance(parent, (ast.Subscript, ast.Attribute)) and parent.value is call:
    fail(f"await binds too late here: write (await {what}(...)) before [...]", call)
  loose = (ast.Expr, ast.BinOp, ast.BoolOp, ast.Compare, ast.FormattedValue, ast.If, ast.While)
  if isinstance(parent, loose):
    fail(f"missing await: write await {what}(...)", call)
  function = _enclosing(graph, call)
  if isinstance(parent, (ast.Return, ast.Tuple)) and function is graph.method("__call__"):
    if isinstance(parent, ast.Return) or isinstance(graph.parents[parent], ast.Return):
      fail(f"missing await: write await {what}(...)", call)
  if isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Name) and function:
    name = parent.targets[0].id
    if function not in handed_on:
      handed_on[function] = _handed_on(graph, function)
    if name not in handed_on[function]:
      fail(f"missing await: write {name} = await {what}(...)", call)


def _enclosing(graph: Graph, node: ast.AST) -> Function | None:
  current: ast.AST | None = node
  while current is not None and not isinstance(current, FUNCTIONS):
    current = graph.parents.get(current)
  return current


def _handed_on(graph: Graph, function: ast.AST) -> set[str]:
  """Names such that a coroutine held by one may be awaited: directly, or by what gets it."""
  keeps = (ast.Await, ast.Call, ast.List, ast.Set, ast.Dict, ast.Starred)
  keeps += (ast.keyword, ast.Assign, ast.NamedExpr, ast.IfExp)
  if function is not graph.method("__call__"):
    keeps += (ast.Tuple, ast.Return)
  names = (node for node in graph.walk(function) if isinstance(node, ast.Name))
  loads = (node for node in names if isinstance(node.ctx, ast.Load))
  return {node.id for node in loads if isinstance(graph.parents[node], keeps)}


def _results(graph: Graph, function: ast.AST) -> dict[str, set[str]]:
  """Names that hold nothing but operators' results in a function, with the keys these can have."""
  keys: dict[str, set[str]] = {}
  other = set()
  for node in graph.walk(function):
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
      parent = graph.parents[node]
      spec = graph.awaited_operator(parent.value) if isinstance(parent, ast.Assign) else None
      if spec is None:
        other.add(node.id)
      else:
        keys.setdefault(node.id, set()).update(spec.keys)
    elif isinstance(node, ast.arg):
      other.add(node.arg)
    elif isinstance(node, (ast.Subscript, ast.Attribute)) and isinstance(node.value, ast.Name):
      if isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
        other.add(node.value.id)  # may be changed in place
  return {name: found for name, found in keys.items() if name not in other}


def check_keys(graph: Graph) -> None:
  for function in graph.methods():
    results = _results(graph, function)
    for node in graph.walk(function):
      if not (isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)):
        continue
      spec = graph.awaited_operator(node.value)
      keys = set(spec.keys) if spec else None
      if isinstance(node.value, ast.Name):
        keys = results.get(node.value.id)
      if keys is not None and node.slice.value not in keys:
        what, expected = ast.unparse(node.value)[:60], " or ".join(map(repr, sorted(keys)))
        fail(f"the result {what} has no key {node.slice.value!a}, expected {expected}", node)


def check_returns(graph: Graph) -> None:
  call = graph.method("__call__")
  assert call is not None
  results = _results(graph, call)
  returns = [
    node
    for node in graph.walk(call)
    if isinstance(node, ast.Return) and _enclosing(graph, node) is call
  ]
  pair = 'return answer, self.llm.get_usage_summary()["total_cost"]'
  if not returns:
    fail(f"__call__ returns nothing: end it with `{pair}`", call)
  for node in returns:
    value = node.value
    if value is None or isinstance(value, _VALUES) or graph.awaited_operator(value):
      fail(f"__call__ must return the pair (answer, cost): write `{pair}`", node)
    if isinstance(value, ast.Name) and value.id in results:
      fail(f"__call__ must return the pair (answer, cost): write `{pair}`", node)
    if isinstance(value, (ast.Tuple, ast.List)):
      if len(value.elts) != 2 and not any(isinstance(one, ast.Starred) for one in value.elts):
        fail(f"__call__ returns {len(value.elts)} values, expected the pair: `{pair}`", node)
      first = value.elts[0]
      if graph.awaited_operator(first) or (isinstance(first, ast.Name) and first.id in results):
        fail("the answer is a result dict: return one of its values, e.g. ['response']", node)
