"""Reads the text of a compiled XLA module: computations, instructions, shapes with their layouts.

Only what awf.hlo_cost needs: result shapes, operands, called computations and attributes as text.
"""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cached_property

# Bits of one element.
_BITS = {
  "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32,
  "u32": 32, "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64,
  "c128": 128, "token": 0, "opaque": 0,
}  # fmt: skip
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_REF = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|true_computation|false_computation|called_computations|"
  r"branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of a result: element type, sizes, and where it lies."""

  dtype: str
  dims: tuple[int, ...]
  layout: str = ""  # text between the braces, as XLA prints it

  @property
  def size(self) -> int:
    return math.prod(self.dims)

  @cached_property
  def is_on_chip(self) -> bool:
    """Whether the array lies outside the device's main memory (TPU: vector or scalar memory)."""
    return re.search(r"S\([1-9]", self.layout) is not None

  @cached_property
  def num_bytes(self) -> float:
    """Bytes in main memory, the padding of a tiled layout included; 0 for on-chip arrays."""
    if self.is_on_chip:
      return 0.0
    bits = _BITS.get(self.dtype, 8 if self.dtype.startswith("f8") else 32)
    return self.size * self.padding * bits / 8

  @cached_property
  def padding(self) -> float:
    """Stored elements / elements: the minor dimensions fill whole tiles."""
    tile = re.search(r":T\(([\d,]+)\)", self.layout)
    if not tile or not self.size or not self.dims:
      return 1.0
    sizes = [int(x) for x in tile.group(1).split(",")]
    order = [int(x) for x in self.layout.split(":")[0].split(",") if x]
    if len(sizes) > len(order):
      return 1.0
    factor = 1.0
    for one, axis in zip(reversed(sizes), order, strict=False):
      have = self.dims[axis]
      # A sub-byte or 16-bit tile is packed along its second axis; small arrays shrink their tile.
      factor *= -(-have // one) * one / have if have > 1 else 1.0
    return factor


@dataclasses.dataclass
class Instruction:
  """One line of a computation."""

  name: str
  opcode: str
  result: tuple[Array, ...]  # leaves, in order; more than one for a tuple
  operands: tuple[str, ...]
  attributes: str
  is_root: bool
  literal: str  # text between the parentheses: a constant's value, a parameter's number

  @cached_property
  def op_name(self) -> str:
    """The path of names that the tracing left: jit(f)/scope/while/body/dot_general."""
    found = _OP_NAME.search(self.attributes)
    return found.group(1) if found else ""

  @cached_property
  def called(self) -> tuple[str, ...]:
    """Computations that the instruction runs, in order."""
    names: list[str] = []
    for text in _CALLED.findall(self.attributes):
      names += [x.strip().lstrip("%") for x in text.strip("{}").split(",") if x.strip()]
    return tuple(names)

  @property
  def num_bytes(self) -> float:
    return sum(array.num_bytes for array in self.result)

  @property
  def size(self) -> int:
    return sum(array.size for array in self.result)

  def attribute(self, name: str) -> str:
    """The text of `name=...` up to the next comma outside braces; "" when it is not there."""
    found = re.search(rf"(?:^|[ ,]){name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
    return found.group(1) if found else ""


class Computation:
  """Instructions in order, by name, and who uses whom."""

  def __init__(self, name: str, instructions: list[Instruction]):
    self.name, self.instructions = name, instructions
    self.by_name = {x.name: x for x in instructions}

  @cached_property
  def root(self) -> Instruction:
    return next((x for x in self.instructions if x.is_root), self.instructions[-1])

  @cached_property
  def users(self) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {x.name: [] for x in self.instructions}
    for x in self.instructions:
      for name in dict.fromkeys(x.operands):
        users.setdefault(name, []).append(x)
    return users

  @cached_property
  def parameters(self) -> dict[int, Instruction]:
    return {int(x.literal): x for x in self.instructions if x.opcode == "parameter"}

  def operand(self, instruction: Instruction, index: int) -> Instruction:
    return self.by_name[instruction.operands[index]]


@dataclasses.dataclass
class Module:
  """A compiled program."""

  entry: Computation
  computations: dict[str, Computation]


def parse_module(text: str) -> Module:
  """Parses what `compiled.as_text()` gives.

  Raises:
    ValueError: no entry computation, or a line that is no instruction.
  """
  computations: dict[str, Computation] = {}
  entry, name, lines = "", "", []
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header and "=" not in line.split("(", 1)[0]:
      name, lines = header.group(2), []
      entry = name if header.group(1) else entry
    elif line.startswith("}") and name:
      computations[name] = Computation(name, [x for x in map(_instruction, lines) if x])
      name = ""
    elif name:
      lines.append(line)
  if entry not in computations:
    raise ValueError("expected the text of an XLA module, found no ENTRY computation")
  return Module(computations[entry], computations)


def _instruction(line: str) -> Instruction | None:
  found = _LINE.match(_COMMENT.sub("", line))
  if not found:
    return None
  is_root, name, rest = bool(found.group(1)), found.group(2), found.group(3)
  stop = _closing(rest, 0) + 1 if rest.startswith("(") else _array_end(rest)
  kind, rest = rest[:stop], rest[stop:].lstrip()
  start = rest.index("(")
  end = _closing(rest, start)
  inside = rest[start + 1 : end]
  result = tuple(
    Array(d, tuple(int(x.lstrip("<=")) for x in dims.split(",") if x), layout or "")
    for d, dims, layout in _ARRAY.findall(kind)
  )
  opcode = rest[:start]
  operands = () if opcode in ("constant", "parameter") else tuple(_REF.findall(inside))
  return Instruction(name, opcode, result, operands, rest[end + 1 :], is_root, inside)


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  raise ValueError(f"expected balanced parentheses in {text[:80]!r}")


def _array_end(text: str) -> int:
  found = _ARRAY.match(text)
  if not found:
    raise ValueError(f"expected a shape at the start of {text[:80]!r}")
  return found.end()
