"""Counts what a compiled program does: arithmetic and bytes moved, operand by operand.

XLA's own cost analysis counts the body of a loop once and charges whole operands where a slice is
touched. Here every instruction outside a fusion is one `Op` with the number of times it runs: the
product of the trip counts of the loops around it. Bytes are those that leave or enter the device's
main memory (an array that XLA keeps on the chip costs nothing):

- an operand that is only sliced or gathered costs the slices, inside a fusion too;
- an in-place update (dynamic-update-slice, scatter) costs the update, not the array;
- everything else costs its operands and its results, the padding of tiled layouts included.

FLOPs of matrix products (2 per multiply-add) are counted apart from element-wise operations (1 per
element of the result, whatever the function).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

from awf.hlo_loops import trip_count
from awf.hlo_text import Computation, Instruction, Module, parse_module

# Runs of a loop's body that the program's text does not tell: (op_name of the loop) -> count.
Trips = Callable[[str], float | None]
# Whether a branch of a conditional that does much is taken: (op_name) -> bool.
Taken = Callable[[str], bool | None]

_FREE = frozenset(
  """parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id
  opt-barrier copy-done slice-done all-gather-done all-reduce-done collective-permute-done
  async-update async-done add-dependency domain send recv send-done recv-done""".split()
)
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the update
_PURE_MOVES = frozenset(
  """bitcast reshape transpose copy broadcast slice dynamic-slice dynamic-update-slice gather
  concatenate pad reverse iota tuple get-tuple-element parameter constant bitcast-convert
  optimization-barrier copy-start copy-done custom-call fusion call while conditional
  dot convolution scatter sort all-gather all-to-all collective-permute after-all""".split()
)
_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Op:
  """One instruction that runs by itself, and all its runs."""

  name: str
  opcode: str
  op_name: str  # path of names of the traced program
  loops: tuple[str, ...]  # op_names of the loops around it, outermost first
  times: float
  flops: float  # of matrix products, one run
  elementwise: float  # one run
  read: float  # bytes, one run
  written: float  # bytes, one run

  @property
  def num_bytes(self) -> float:
    return self.read + self.written


@dataclasses.dataclass(frozen=True)
class Cost:
  """Totals over runs."""

  flops: float = 0.0
  elementwise: float = 0.0
  read: float = 0.0
  written: float = 0.0
  seconds: float = 0.0  # each op as long as the slower of its arithmetic and its bytes

  @property
  def num_bytes(self) -> float:
    return self.read + self.written


@dataclasses.dataclass
class Count:
  """All ops of a program, and what the counter had to guess."""

  ops: list[Op]
  unknown_loops: list[str]  # counted once: neither the program nor the caller knew their trips
  unknown_calls: list[str]  # custom calls whose arithmetic nobody added

  def total(
    self, ops: Iterable[Op] | None = None, peak: float = math.inf, bandwidth: float = math.inf
  ) -> Cost:
    """Sums ops (all by default); `peak` in FLOP/s and `bandwidth` in bytes/s give the seconds."""
    chosen = self.ops if ops is None else list(ops)
    return Cost(
      sum(x.times * x.flops for x in chosen),
      sum(x.times * x.elementwise for x in chosen),
      sum(x.times * x.read for x in chosen),
      sum(x.times * x.written for x in chosen),
      sum(x.times * max(x.flops / peak, x.num_bytes / bandwidth) for x in chosen),
    )

  def inside(self, *words: str) -> list[Op]:
    """Ops whose op_name, or that of a loop around them, has all the words."""
    return [x for x in self.ops if all(w in " ".join((*x.loops, x.op_name)) for w in words)]


def count_module(
  text: str | Module,
  trips: Trips | None = None,
  taken: Taken | None = None,
  call_flops: dict[str, Callable] | None = None,
) -> Count:
  """Counts the text of a compiled module.

  Args:
    text: `compiled.as_text()`, or what `parse_module` made of it.
    trips: runs of the loops that depend on data, by the loop's op_name; None where it does not
      know.
    taken: False where the caller knows that the cheapest branch of a conditional runs; else the
      dearest counts.
    call_flops: custom-call target -> function of the instruction and its operands that gives its
      FLOPs.

  Raises:
    ValueError: text that is no HLO module.
  """
  module = parse_module(text) if isinstance(text, str) else text
  no = lambda _: None  # noqa: E731
  walker = _Walker(module, trips or no, taken or no, call_flops or {})
  walker.walk(walker.module.entry, 1.0, ())
  return Count(walker.ops, walker.unknown_loops, walker.unknown_calls)


class _Walker:
  def __init__(self, module: Module, trips: Trips, taken: Taken, call_flops: dict[str, Callable]):
    self.module, self.trips, self.taken = module, trips, taken
    self.call_flops = call_flops
    self.ops: list[Op] = []
    self.unknown_loops: list[str] = []
    self.unknown_calls: list[str] = []

  def walk(self, computation: Computation, times: float, loops: tuple[str, ...]) -> None:
    """Adds the ops of a computation that runs `times` times."""
    for x in computation.instructions:
      if x.opcode in _FREE:
        continue
      called = [self.module.computations[n] for n in x.called if n in self.module.computations]
      if x.opcode == "while":
        self._walk_loop(computation, x, times, loops)
      elif x.opcode == "conditional":
        self._walk_branches(x, called, times, loops)
      elif x.opcode in ("call", "async-start"):
        for one in called:
          self.walk(one, times, loops)
      elif times:
        self.ops.append(self._op(computation, x, times, loops))

  def _walk_loop(self, computation, x: Instruction, times, loops) -> None:
    name = x.op_name or x.name
    runs = trip_count(self.module, computation, x)
    if runs is None:
      runs = self.trips(name)
    if runs is None:
      self.unknown_loops.append(name)
      runs = 1.0
    body = self.module.computations[x.attribute("body").lstrip("%")]
    condition = self.module.computations[x.attribute("condition").lstrip("%")]
    self.walk(body, times * runs, (*loops, name))
    self.walk(condition, times * (runs + 1), (*loops, name))

  def _walk_branches(self, x: Instruction, branches, times, loops) -> None:
    """One branch counts: the dearest, unless the caller knows that it is not taken."""
    before, found = (self.ops, self.unknown_loops, self.unknown_calls), []
    for branch in branches:
      self.ops, self.unknown_loops, self.unknown_calls = [], [], list(before[2])
      self.walk(branch, times, loops)
      found.append((self.ops, self.unknown_loops, self.unknown_calls))

    def weight(branch: tuple[list[Op], list[str], list[str]]) -> float:
      return sum(o.times * (o.num_bytes + o.flops + o.elementwise) for o in branch[0])

    choose = min if self.taken(x.op_name) is False else max
    ops, unknown, calls = choose(found, key=weight) if found else ([], [], before[2])
    self.ops, self.unknown_loops, self.unknown_calls = before[0] + ops, before[1] + unknown, calls

  def _op(self, computation, x: Instruction, times, loops) -> Op:
    flops, elementwise = self._arithmetic(computation, x)
    read, written = self._traffic(computation, x)
    return Op(x.name, x.opcode, x.op_name, loops, times, flops, elementwise, read, written)

  # --- arithmetic

  def _arithmetic(self, computation: Computation, x: Instruction) -> tuple[float, float]:
    if x.opcode == "dot":
      return dot_flops(computation, x), 0.0
    if x.opcode == "convolution":
      return convolution_flops(computation, x), 0.0
    if x.opcode in ("reduce", "reduce-window"):
      return 0.0, float(computation.operand(x, 0).size)
    if x.opcode == "custom-call":
      return self._custom_call(computation, x), 0.0
    if x.opcode in ("fusion", "call", "map"):
      inner = [self.module.computations[n] for n in x.called]
      pairs = [self._arithmetic(c, y) for c in inner for y in c.instructions]
      return sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    if x.opcode in _PURE_MOVES or x.opcode in _FREE:
      return 0.0, 0.0
    return 0.0, float(x.size)

  def _custom_call(self, computation: Computation, x: Instruction) -> float:
    target = x.attribute("custom_call_target").strip('"')
    if target in self.call_flops:
      return float(self.call_flops[target](x, [computation.by_name[n] for n in x.operands]))
    if "gemm" in target or "matmul" in target.lower():
      return _gemm_flops(computation, x)
    if target not in self.unknown_calls:
      self.unknown_calls.append(target)
    return 0.0

  # --- bytes

  def _traffic(self, computation: Computation, x: Instruction) -> tuple[float, float]:
    operands = [computation.by_name[n] for n in x.operands if n in computation.by_name]
    if x.opcode == "fusion" and x.called:
      inner = self.module.computations[x.called[0]]
      read = sum(
        self._touched(inner, inner.parameters[i]) * operand.num_bytes
        for i, operand in enumerate(operands)
        if i in inner.parameters
      )
      return read, self._written(inner, inner.root)
    if x.opcode in _SLICES:
      share = min(1.0, x.size / max(1, operands[0].size))
      rest = sum(o.num_bytes for o in operands[1:])
      return share * operands[0].num_bytes + rest, x.num_bytes
    if x.opcode in _UPDATES:
      update = operands[_UPDATES[x.opcode]]
      share = min(1.0, update.size / max(1, x.size))
      return sum(o.num_bytes for o in operands[1:]), share * x.num_bytes
    if x.opcode in ("copy-start", "slice-start", "dynamic-slice-start"):
      moved = x.result[0] if x.opcode == "copy-start" else x.result[-2 if len(x.result) > 2 else -1]
      share = moved.size / max(1, operands[0].size)
      return min(1.0, share) * operands[0].num_bytes, moved.num_bytes
    if x.opcode.removesuffix("-start") in _COLLECTIVES:
      return sum(o.num_bytes for o in operands), x.result[-1].num_bytes
    return sum(o.num_bytes for o in operands), x.num_bytes

  def _touched(self, inner: Computation, x: Instruction, depth: int = 0) -> float:
    """Share of `x` that the users inside a fusion need, at most 1."""
    if x.is_root or depth > 60:
      return 1.0
    share = 0.0
    for user in inner.users.get(x.name, []):
      share += self._touched_by(inner, x, user, depth)
      if share >= 1:
        return 1.0
    return share

  def _touched_by(self, inner, x: Instruction, user: Instruction, depth: int) -> float:
    first = bool(user.operands) and user.operands[0] == x.name
    twice = user.operands.count(x.name) > 1
    if user.opcode in _SLICES and first and not twice:
      return self._touched(inner, user, depth + 1) * user.size / max(1, x.size)
    if user.opcode in _UPDATES and first and not twice:
      return 0.0  # written in place; what is read of it is what its own users read
    if user.opcode == "fusion":
      nested = self.module.computations[user.called[0]]
      whole = user.is_root or self._touched(inner, user, depth + 1) >= 1
      shares = [
        self._touched(nested, nested.parameters[i], depth + 1) if whole else 1.0
        for i, name in enumerate(user.operands)
        if name == x.name and i in nested.parameters
      ]
      if not whole and user.size == x.size:
        return self._touched(inner, user, depth + 1)
      return min(1.0, sum(shares))
    if user.opcode == "tuple":
      return 1.0
    if user.size == x.size and user.opcode not in ("dot", "convolution", "reduce", "sort"):
      return self._touched(inner, user, depth + 1)
    return 1.0

  def _written(self, inner: Computation, root: Instruction, depth: int = 0) -> float:
    """Bytes that a fusion's root writes; an update of a parameter writes the update alone."""
    if root.opcode == "tuple":
      return sum(self._written(inner, inner.by_name[n], depth) for n in root.operands)
    found, whole = root, root.num_bytes
    while found.opcode in ("bitcast", "reshape", "copy") and found.operands:
      found = inner.operand(found, 0)
    if found.opcode == "fusion" and depth < 8:
      nested = self.module.computations[found.called[0]]
      return min(whole, self._written(nested, nested.root, depth + 1))
    if found.opcode in _UPDATES:
      base = inner.operand(found, 0)
      while base.opcode in ("bitcast", "reshape", *_UPDATES) and base.operands:
        base = inner.operand(base, 0)
      update = inner.operand(found, _UPDATES[found.opcode])
      if base.opcode == "parameter":
        return whole * min(1.0, update.size / max(1, found.size))
    if found.opcode == "parameter":
      return 0.0 if depth else whole
    return whole


def _int_list(text: str) -> list[int]:
  return [int(x) for x in re.findall(r"\d+", text)]


def dot_flops(computation: Computation, x: Instruction) -> float:
  """2 x elements of the result x contracted sizes."""
  left = computation.operand(x, 0).result[0]
  contracted = _int_list(x.attribute("lhs_contracting_dims"))
  return 2.0 * x.result[0].size * math.prod(left.dims[i] for i in contracted)


def convolution_flops(computation: Computation, x: Instruction) -> float:
  """2 x multiply-adds that meet data, not padding or the holes of a dilation.

  XLA:TPU writes matrix products as convolutions, batched ones with windows that touch one element.
  """
  left, right = (computation.operand(x, i).result[0] for i in (0, 1))
  names_left, rest = x.attribute("dim_labels").split("_")
  names_right, names_out = rest.split("->")
  out = x.result[0]
  flops = 2.0 * out.dims[names_out.index("b")] * out.dims[names_out.index("f")]
  flops *= right.dims[names_right.index("i")]
  window = dict(re.findall(r"(\w+)=([\dx_\-]+)", x.attribute("window")))
  spatial = [c for c in names_out if c.isdigit()]
  for axis, name in enumerate(sorted(spatial)):

    def part(field, default, axis=axis):
      return window[field].split("x")[axis] if field in window else default

    low = int(part("pad", "0_0").split("_")[0])
    flops *= _meetings(
      int(left.dims[names_left.index(name)]),
      int(right.dims[names_right.index(name)]),
      int(out.dims[names_out.index(name)]),
      (int(part("stride", 1)), low, int(part("lhs_dilate", 1)), int(part("rhs_dilate", 1))),
    )
  return flops / int(x.attribute("batch_group_count") or 1)


def _meetings(size: int, window: int, out: int, how: tuple[int, int, int, int]) -> int:
  """Pairs of an output place and a window place that meet an element of the input, on one axis."""
  stride, low, dilate, spread = how
  count = 0
  for o in range(out):
    for w in range(window):
      at = o * stride - low + w * spread
      count += at >= 0 and at % dilate == 0 and at // dilate < size
  return count


def _gemm_flops(computation: Computation, x: Instruction) -> float:
  """A library's matrix product: elements of the result x contracted sizes of the left operand."""
  left = computation.operand(x, 0).result[0]
  found = re.search(r'"?lhs_contracting_dimensions"?:\s*\[([^\]]*)\]', x.attributes)
  contracted = _int_list(found.group(1)) if found else [len(left.dims) - 1]
  return 2.0 * x.result[0].size * math.prod(left.dims[i] for i in contracted)
