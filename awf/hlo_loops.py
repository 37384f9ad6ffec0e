"""How often the body of a compiled loop runs, where the program's text tells."""

from __future__ import annotations

import re

from awf.hlo_text import Computation, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"?(\d+)')


def trip_count(module: Module, around: Computation, loop: Instruction) -> float | None:
  """Runs of a `while` whose counter starts, steps and ends at constants; None for any other.

  Args:
    module: the program.
    around: the computation that holds the loop.
    loop: the `while` instruction.
  """
  known = _KNOWN.search(loop.attributes)
  if known:
    return float(known.group(1))
  condition = module.computations[loop.attribute("condition").lstrip("%")]
  body = module.computations[loop.attribute("body").lstrip("%")]
  compared = _comparison(module, condition)
  if compared is None:
    return None
  left, right, direction = compared
  if left[0] != "element":
    left, right, direction = right, left, {"LT": "GT", "GT": "LT"}.get(direction, direction)
  if left[0] != "element":
    return None
  start = _start(around, loop, int(left[1]))
  step = _step(module, body, int(left[1]))
  end = float(right[1]) if right[0] == "constant" else None
  if right[0] == "element" and _is_passed_on(body, int(right[1])):
    end = _start(around, loop, int(right[1]))
  if start is None or end is None or not step:
    return None
  distance = {"LT": end - start, "LE": end - start + 1, "NE": end - start}.get(direction)
  if direction in ("GT", "GE"):
    distance, step = start - end + (direction == "GE"), -step
  if distance is None or step <= 0:
    return None
  return max(0.0, float(-(-distance // step)))


def _value(computation: Computation, x: Instruction) -> tuple[str, float] | None:
  """("constant", value) or ("element", index of the loop's tuple)."""
  while x.opcode in ("copy", "bitcast", "convert") and x.operands:
    x = computation.operand(x, 0)
  if x.opcode == "constant":
    try:
      return "constant", float(x.literal)
    except ValueError:
      return None
  if x.opcode == "get-tuple-element" and computation.operand(x, 0).opcode == "parameter":
    return "element", float(x.attribute("index"))
  return None


def _comparison(module: Module, condition: Computation):
  """(left, right, direction) of the one comparison that decides; None if it is more than that."""
  root, where, bound = condition.root, condition, {}
  if root.opcode == "fusion":
    where = module.computations[root.called[0]]
    bound = {i: condition.by_name[name] for i, name in enumerate(root.operands)}
    root = where.root
  if root.opcode != "compare":
    return None
  values = []
  for i in range(2):
    x = where.operand(root, i)
    if x.opcode == "parameter" and where is not condition:
      values.append(_value(condition, bound[int(x.literal)]))
    else:
      values.append(_value(where, x))
  if None in values:
    return None
  return values[0], values[1], root.attribute("direction")


def _start(around: Computation, loop: Instruction, index: int) -> float | None:
  """The constant that element `index` of the loop's tuple starts with."""
  first = around.operand(loop, 0)
  while first.opcode in ("copy", "opt-barrier") and first.operands:
    first = around.operand(first, 0)
  if first.opcode != "tuple":
    return None
  value = _value(around, around.by_name[first.operands[index]])
  return value[1] if value and value[0] == "constant" else None


def _next(body: Computation, index: int) -> Instruction | None:
  """What the body puts at element `index` of the loop's tuple."""
  root = body.root
  return body.by_name[root.operands[index]] if root.opcode == "tuple" else None


def _is_passed_on(body: Computation, index: int) -> bool:
  x = _next(body, index)
  return x is not None and _value(body, x) == ("element", float(index))


def _step(module: Module, body: Computation, index: int) -> float | None:
  """What the body adds to element `index`."""
  x, where, bound = _next(body, index), body, {}
  while x is not None and x.opcode in ("copy", "bitcast"):
    x = body.operand(x, 0)
  if x is not None and x.opcode == "fusion":
    where = module.computations[x.called[0]]
    bound = {i: body.by_name[name] for i, name in enumerate(x.operands)}
    x = where.root
  if x is None or x.opcode not in ("add", "subtract"):
    return None
  values = []
  for i in range(2):
    y = where.operand(x, i)
    inner = y.opcode == "parameter" and where is not body
    values.append(_value(body, bound[int(y.literal)]) if inner else _value(where, y))
  for mine, other in ((0, 1), (1, 0)):
    if (
      values[mine] == ("element", float(index)) and values[other] and values[other][0] == "constant"
    ):
      sign = -1.0 if x.opcode == "subtract" else 1.0
      return sign * values[other][1]
  return None
