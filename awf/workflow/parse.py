"""Parses model-written text under caps and says in one line what is wrong with it."""

from __future__ import annotations

import ast
import re
import warnings
from typing import Any

from awf.types import FailureKind
from awf.workflow.contract import MAX_PROMPT_CHARS

MAX_DEPTH = 80
MAX_NODES = 2_000  # a check takes some 10 microseconds a node; AFlow's best have a few hundred
MAX_SYMBOLS = 4_000  # characters that are no letter, digit or blank: what parsing costs
MAX_BITS = 4_096  # of an integer; Python refuses to write those of more than 4,300 digits
MAX_CONSTANT = 64_000  # characters and members of a prompt constant, those it refers to included
MESSAGE_CHARS = 300

_XML_LINE = re.compile(r"^\s*</?[A-Za-z][\w-]*(?:\s[^<>]*)?/?>\s*$")
_PLAIN = re.compile(r"[\w\s]+")
_STRIP_METHODS = ("strip", "lstrip", "rstrip")


class SourceError(ValueError):
  """Model-written text that does not count; `kind` is a failure kind, the message one line."""

  def __init__(self, kind: FailureKind, message: str) -> None:
    super().__init__(one_line(message))
    self.kind: FailureKind = kind


def one_line(text: str, limit: int = MESSAGE_CHARS) -> str:
  """Printable ASCII on one line, capped."""
  plain = "".join(c if " " <= c <= "~" else " " if c.isspace() else "?" for c in text[: 4 * limit])
  return " ".join(plain.split())[:limit]


def parse_text(text: str, what: str, max_chars: int) -> ast.Module:
  """Parses Python text.

  Args:
    text: what the model wrote.
    what: "graph" or "prompt", for the message.
    max_chars: cap on the text.

  Raises:
    SourceError: kind "format": no text, too long, no Python, too deep, too many nodes.
  """
  if type(text) is not str:
    raise SourceError("format", f"the {what} is not a text")
  if len(text) > max_chars:
    raise SourceError(
      "format", f"the {what} has {len(text)} characters, at most {max_chars} are allowed"
    )
  if len(_PLAIN.sub("", text)) > MAX_SYMBOLS:
    raise SourceError("format", f"the {what} has more than {MAX_SYMBOLS} symbols: make it simpler")
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # such as an invalid escape in a string: not an error
      tree = ast.parse(text)
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise SourceError("format", _syntax_reason(text, what, error)) from None
  check_size(tree, what)
  return tree


def check_size(tree: ast.AST, what: str) -> None:
  """Caps depth, number of nodes and integers, without recursion.

  Raises:
    SourceError: kind "format".
  """
  level: list[ast.AST] = [tree]
  depth = nodes = 0
  while level:
    depth += 1
    nodes += len(level)
    if depth > MAX_DEPTH:
      raise SourceError(
        "format", f"the {what} is nested too deeply, at most {MAX_DEPTH} levels are allowed"
      )
    if nodes > MAX_NODES:
      raise SourceError(
        "format", f"the {what} has more than {MAX_NODES} syntax nodes: make it simpler"
      )
    constants = (node.value for node in level if isinstance(node, ast.Constant))
    if any(isinstance(value, int) and value.bit_length() > MAX_BITS for value in constants):
      raise SourceError("format", f"the {what} has an integer of too many digits")
    level = [child for node in level for child in ast.iter_child_nodes(node)]


def check_compiles(tree: ast.Module, text: str, what: str) -> None:
  """Finds what the parser lets through, such as await outside async def.

  Raises:
    SourceError: kind "format".
  """
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      compile(tree, f"<{what}>", "exec", dont_inherit=True)
  except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
    raise SourceError("format", _syntax_reason(text, what, error)) from None


def _syntax_reason(text: str, what: str, error: BaseException) -> str:
  for number, line in enumerate(text.splitlines(), start=1):
    if line.lstrip().startswith("```"):
      return f"the {what} has a Markdown fence in line {number}: write plain Python without ```"
    if _XML_LINE.match(line):
      return f"the {what} has a tag in line {number}: write Python, not XML nodes"
  if isinstance(error, SyntaxError):
    where = f" in line {error.lineno}" if error.lineno else ""
    return f"the {what} has a syntax error{where}: {error.msg}"
  if isinstance(error, (RecursionError, MemoryError)):
    return f"the {what} is nested too deeply"
  return f"the {what} is no Python that can be read: {type(error).__name__}"


def prompt_constants(text: str) -> dict[str, Any]:
  """The constants that a prompt module defines.

  Understands literals, joined strings, earlier constants, f-strings of these and `.strip()`.

  Raises:
    SourceError: kind "format", when the module holds anything but assignments of such constants.
  """
  constants: dict[str, Any] = {}
  sizes: dict[str, int] = {}
  for node in parse_text(text, "prompt", MAX_PROMPT_CHARS).body:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
      continue
    if isinstance(node, ast.Assign):
      targets, value = node.targets, node.value
    elif isinstance(node, ast.AnnAssign) and node.value is not None:
      targets, value = [node.target], node.value
    else:
      raise SourceError(
        "format",
        f"the prompt has a statement in line {node.lineno} that is not NAME = text: only string"
        " constants are allowed",
      )
    size = _size(value, sizes)
    if size > MAX_CONSTANT:  # before it is made: NAME = A + A doubles with every line
      raise SourceError("format", f"the prompt has a value that is too large in line {node.lineno}")
    for target in targets:
      if not isinstance(target, ast.Name):
        raise SourceError("format", f"the prompt assigns to no plain name in line {node.lineno}")
      constants[target.id] = _value(value, constants)
      sizes[target.id] = size
  return constants


def _size(node: ast.expr, sizes: dict[str, int]) -> int:
  """No less than the characters and members of the value of a constant expression."""
  size = 0
  for one in ast.walk(node):
    text = one.value if isinstance(one, ast.Constant) else ""
    size += 1 + (len(text) if isinstance(text, str) else 0)
    size += sizes.get(one.id, 0) if isinstance(one, ast.Name) else 0
  return size


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
  """Value of a constant expression.

  Raises:
    SourceError: it is no such expression.
  """
  if isinstance(node, ast.Constant):
    return node.value
  if isinstance(node, ast.Name) and node.id in known:
    return known[node.id]
  if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
    left, right = _value(node.left, known), _value(node.right, known)
    if type(left) is str and type(right) is str:
      return left + right
  if isinstance(node, ast.JoinedStr):
    parts = [
      _value(one.value, known)
      if isinstance(one, ast.FormattedValue) and one.conversion == -1 and one.format_spec is None
      else _value(one, known)
      for one in node.values
    ]
    if all(type(part) is str for part in parts):
      return "".join(parts)
  if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
    if node.func.attr in _STRIP_METHODS and not node.args and not node.keywords:
      inner = _value(node.func.value, known)
      if type(inner) is str:
        return getattr(inner, node.func.attr)()
  if isinstance(node, (ast.List, ast.Tuple)):
    values = [_value(one, known) for one in node.elts]
    return values if isinstance(node, ast.List) else tuple(values)
  if isinstance(node, ast.Dict) and None not in node.keys:
    keys = [_value(one, known) for one in node.keys if one is not None]
    if all(type(key) in (str, int) for key in keys):
      return dict(zip(keys, (_value(one, known) for one in node.values), strict=True))
  raise SourceError(
    "format",
    f'the prompt has a value in line {node.lineno} that is not a constant: write NAME = """text"""',
  )
