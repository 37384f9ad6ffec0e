"""`--config.help`: every field with its type, default, range or choices, and one line.

The lines are the comments of configs/base.py, the ranges those of awf/config.py: nothing is said
twice.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import io
import tokenize
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from awf.config import RULES
from awf.config_io import flatten
from awf.types import UserError
from configs import base


@dataclasses.dataclass(frozen=True)
class Field:
  """What the listing says of one field."""

  name: str
  kind: str
  default: Any
  expected: str  # range or choices; "" = anything of the kind
  line: str


def help_text(config: ConfigDict, words: str = "") -> str:
  """The listing.

  Args:
    config: whose values are the defaults shown.
    words: only fields with this in their name; "" = all.

  Raises:
    UserError: no field has it in its name; the nearest field is named.
  """
  found = [field for field in fields(config) if words in field.name]
  if not found:
    names = list(flatten(config))
    near = difflib.get_close_matches(words, [*names, *{n.rpartition(".")[2] for n in names}], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--config.help={words}: no field has this in its name{hint}")
  lines = [f"{len(found)} fields, for --config.NAME=VALUE:"]
  group = None
  for field in found:
    if group != (group := field.name.rpartition(".")[0]):
      lines.append("")
    expected = f", {field.expected}" if field.expected else ""
    lines.append(f"{field.name}={_shown(field.default)}  ({field.kind}{expected})")
    if field.line:
      lines.append(f"    {field.line}")
  return "\n".join(lines)


def _shown(value: Any) -> str:
  """As it would be written on the command line."""
  return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def fields(config: ConfigDict) -> list[Field]:
  """All fields of a config, in the order of configs/base.py; its own come last, without a line."""
  lines, values = comments(Path(base.__file__).read_text(encoding="utf-8")), flatten(config)
  order = {name: i for i, name in enumerate(lines)}
  out = []
  for name in sorted(values, key=lambda n: order.get(n, len(order))):
    value, rule = values[name], RULES.get(name)
    kind = f"{type(value[0] if value else '').__name__},..." if isinstance(value, tuple) else None
    expected = rule.expected if rule else ""
    out.append(Field(name, kind or type(value).__name__, value, expected, lines.get(name, "")))
  return out


def comments(source: str) -> dict[str, str]:
  """Field name -> its comment, of a program that fills a ConfigDict `c` as configs/base.py does.

  A field's comment stands behind it, on its first or last line, or on the lines above it.
  """
  notes: dict[int, tuple[str, bool]] = {}  # line -> (text, whether it has the line for itself)
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      alone = not token.line[: token.start[1]].strip()
      notes[token.start[0]] = (token.string.lstrip("# ").rstrip(), alone)
  out: dict[str, str] = {}
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
      out |= _named(f"{node.targets[0].attr}", node.value, node.lineno, notes)
  return out


def _named(
  name: str, value: ast.expr, first: int, notes: dict[int, tuple[str, bool]]
) -> dict[str, str]:
  """The comment of one field, or those of a group's fields."""
  inner = value
  while isinstance(inner, ast.Call) and inner.args:  # ConfigDict(dict(...))
    inner = inner.args[0]
  if isinstance(value, ast.Call) and isinstance(inner, ast.Call):
    out: dict[str, str] = {}
    for keyword in inner.keywords:
      assert keyword.arg is not None
      out |= _named(f"{name}.{keyword.arg}", keyword.value, keyword.lineno, notes)
    return out
  for line in (first, value.end_lineno or first):
    if line in notes and not notes[line][1]:
      return {name: notes[line][0]}
  above: list[str] = []
  line = first - 1
  while line in notes and notes[line][1]:
    above.insert(0, notes[line][0])
    line -= 1
  return {name: " ".join(above)}
