"""Entries for model-written programs: `run_program`, `run_calls`, and the two halves of an isolated
test run.

A test run takes two jobs, so that the code under test never shares a process with its tests:
`run_tests` holds the tests and asks the parent for each call of the candidate, `serve_function`
holds the solution and answers. Only JSON crosses (see `encode_value`); `awf.sandbox.grading`
connects the two.
"""

from __future__ import annotations

import ast
import builtins
import collections
import decimal
import fractions
import inspect
import itertools
import sys
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from awf.sandbox.child import PROGRAM_FILE, CappedText, Channel, JobError, clean, describe
from awf.sandbox.frames import FrameError, encode, json_fault, kind_name

MAX_SOURCE_BYTES = 64_000
MAX_DEPTH = 150
MAX_NODES = 20_000
TEXT_CHARS = 10_000
MAX_VALUE_BYTES = 200_000
MAX_ENTRIES = 50_000  # of an iterator that crosses

ALLOWED_MODULES = frozenset(
  "__future__ abc array ast asyncio base64 binascii bisect calendar cmath collections "
  "contextlib copy dataclasses "
  "datetime decimal difflib enum fractions functools graphlib hashlib heapq io itertools json "
  "keyword logging math "
  "mpmath numbers numpy operator pprint queue random re secrets statistics string struct sympy "
  "sys textwrap time "
  "timeit traceback types typing unicodedata unittest uuid warnings zlib".split()
)

channel: Channel | None = None  # of the running job; set after the fork

_real_import = builtins.__import__


def parse(source: Any) -> ast.Module:
  """Parses source under caps on size, depth and number of nodes.

  Raises:
    JobError: kind "format", with what was wrong.
  """
  if type(source) is not str:
    raise JobError("format", f"expected source as text, got {kind_name(type(source))}")
  size = len(source.encode("utf-8", "replace"))
  if size > MAX_SOURCE_BYTES:
    raise JobError("format", f"{size} bytes of source, at most {MAX_SOURCE_BYTES} are allowed")
  try:
    tree = ast.parse(source, PROGRAM_FILE)
  except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
    raise JobError("format", describe(error)) from None
  level: list[ast.AST] = [tree]
  nodes = depth = 0
  while level:
    nodes += len(level)
    depth += 1
    if depth > MAX_DEPTH or nodes > MAX_NODES:
      raise JobError(
        "format", f"source deeper than {MAX_DEPTH} levels or of more than {MAX_NODES} nodes"
      )
    level = [inner for node in level for inner in ast.iter_child_nodes(node)]
  return tree


def guarded_import(
  name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
) -> Any:
  """`__import__` of programs: the allow list and nothing else. A rule for honest programs, not the
  boundary.

  Raises:
    JobError: kind "policy", when the module is not on the list.
  """
  if level != 0 or type(name) is not str or name.partition(".")[0] not in ALLOWED_MODULES:
    raise JobError("policy", f"import of {str(name)[:80]!r} is not allowed")
  return _real_import(name, globals, locals, fromlist, level)


def new_namespace(name: str = "program") -> dict[str, Any]:
  """A fresh module namespace whose imports are guarded."""
  scope = {**vars(builtins), "__import__": guarded_import}
  return {"__name__": name, "__builtins__": scope, "__doc__": None}


def load(source: Any, namespace: dict[str, Any] | None = None) -> dict[str, Any]:
  """Parses and executes source in a namespace (by default a fresh one) and returns the namespace.

  Raises:
    JobError: kind "format". Whatever the source raises comes through.
  """
  tree = parse(source)
  try:
    code = compile(tree, PROGRAM_FILE, "exec", dont_inherit=True)
  except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
    raise JobError("format", describe(error)) from None
  namespace = new_namespace() if namespace is None else namespace
  exec(code, namespace)
  return namespace


def find_function(namespace: dict[str, Any], name: str) -> Any:
  """Finds the function that the caller asked for.

  Raises:
    JobError: kind "format", when the source does not define it.
  """
  function = namespace.get(name)
  if not callable(function):
    raise JobError("format", f"the source defines no function {name!r}")
  return function


def plain(value: Any, depth: int = 0) -> Any:
  """Tuples as lists, numpy scalars as Python's own; the rest unchanged (the caller checks it)."""
  kind = type(value)
  if depth > 60:
    return value
  if kind is list or kind is tuple:
    return [plain(entry, depth + 1) for entry in value]
  if kind is dict:
    return {key: plain(entry, depth + 1) for key, entry in value.items()}
  numpy = sys.modules.get("numpy")
  if numpy is not None and isinstance(value, numpy.generic):
    return value.item()
  return value


_PLAIN_COPIES = {
  dict: lambda value: dict(dict.items(value)),
  list: lambda value: list(list.__iter__(value)),
  tuple: lambda value: tuple(tuple.__iter__(value)),
  set: lambda value: set(set.__iter__(value)),
  frozenset: lambda value: frozenset(frozenset.__iter__(value)),
  int: int.__pos__,
  float: float.__pos__,
  str: str.__str__,
}
_VIEWS = {"keys": KeysView, "values": ValuesView, "items": ItemsView}


def encode_value(value: Any, depth: int = 0) -> Any:
  """JSON form of a Python value that keeps tuples, sets, bytes, deques, ranges, complex and exact
  numbers, odd floats and odd keys. An instance of a subclass crosses as the built-in beneath it.

  An iterator is run to its end here, and what it gave crosses as an iterator; the view of a dict
  crosses as the view of a dict of its own.

  Raises:
    ValueError: a type that has no such form, nesting beyond 50 levels, or an iterator of more than
      MAX_ENTRIES values. Whatever an iterator raises comes through.
  """
  kind = type(value)
  if depth > 50:
    raise ValueError("nested too deeply, or containing itself")
  if value is None or kind is bool or kind is int or kind is str:
    return value
  if kind is float:
    return value if value - value == 0 else {"@": "float", "v": repr(value)}
  if kind is list:
    return [encode_value(entry, depth + 1) for entry in value]
  if kind is dict:
    pairs = [[encode_value(k, depth + 1), encode_value(v, depth + 1)] for k, v in value.items()]
    if all(type(key) is str and key != "@" for key, _ in pairs):
      return dict(pairs)
    return {"@": "dict", "v": pairs}
  if kind is tuple or kind is set or kind is frozenset:
    entries = [encode_value(entry, depth + 1) for entry in value]
    if kind is not tuple:
      entries.sort(key=repr)
    return {"@": kind.__name__, "v": entries}
  if kind is bytes:
    return {"@": "bytes", "v": list(value)}
  if kind is complex:
    return {"@": "complex", "v": [encode_value(value.real), encode_value(value.imag)]}
  numpy = sys.modules.get("numpy")
  if numpy is not None and isinstance(value, numpy.generic):
    return encode_value(value.item(), depth + 1)
  if numpy is not None and kind is numpy.ndarray:
    return encode_value(value.tolist(), depth + 1)
  if kind is range:
    return {"@": "range", "v": [value.start, value.stop, value.step]}
  if kind is decimal.Decimal or kind is fractions.Fraction:
    return {"@": kind.__name__, "v": str(value)}
  if isinstance(value, collections.deque):
    return {"@": "deque", "v": [encode_value(entry, depth + 1) for entry in value]}
  for base, copy in _PLAIN_COPIES.items():
    if isinstance(value, base):  # Counter, defaultdict, a named tuple, IntEnum ...
      return encode_value(copy(value), depth + 1)
  for name, view in _VIEWS.items():
    if isinstance(value, view):
      return {"@": name, "v": _entries(value, depth)}
  if isinstance(value, Iterator):
    return {"@": "iterator", "v": _entries(value, depth)}
  raise ValueError(f"a value of type {kind_name(kind)} cannot cross")


def _entries(values: Any, depth: int) -> list[Any]:
  """The encoded entries of an iterator or a view, which need not have an end."""
  entries = [encode_value(entry, depth + 1) for entry in itertools.islice(values, MAX_ENTRIES + 1)]
  if len(entries) > MAX_ENTRIES:
    raise ValueError(f"an iterator of more than {MAX_ENTRIES} values cannot cross")
  return entries


_CONTAINERS = {
  "tuple": tuple,
  "set": set,
  "frozenset": frozenset,
  "deque": collections.deque,
  "iterator": iter,
  "keys": lambda entries: dict.fromkeys(entries).keys(),
  "values": lambda entries: dict(enumerate(entries)).values(),
  "items": lambda entries: dict(entries).items(),
}
_NUMBERS = {"Decimal": decimal.Decimal, "Fraction": fractions.Fraction}


def decode_value(value: Any) -> Any:
  """Inverse of `encode_value`; safe on JSON from an untrusted sender.

  Raises:
    ValueError: not a form that `encode_value` writes.
  """
  if type(value) is list:
    return [decode_value(entry) for entry in value]
  if type(value) is not dict:
    return value
  if "@" not in value:
    return {key: decode_value(entry) for key, entry in value.items()}
  try:
    kind, body = value["@"], value["v"]
    if kind == "float" and body in ("nan", "inf", "-inf"):
      return float(body)
    if kind == "dict":
      return {decode_value(key): decode_value(entry) for key, entry in body}
    if kind == "bytes":
      return bytes(body)
    if kind == "complex":
      return complex(decode_value(body[0]), decode_value(body[1]))
    if kind == "range":
      return range(*body)
    if kind in _NUMBERS and type(body) is str and len(body) <= 4_000:
      return _NUMBERS[kind](body)
    entries = [decode_value(entry) for entry in body]
    return _CONTAINERS[kind](entries)
  except (TypeError, KeyError, IndexError, ArithmeticError) as error:
    raise ValueError(f"not an encoded value: {type(error).__name__}") from error


def text_of(value: Any) -> str:
  """`str(value)`, capped; says why when there is none."""
  try:
    text = str(value)
  except Exception as error:  # foreign __str__, or an integer of too many digits
    return f"<unprintable: {describe(error)}>"
  return clean(text[:TEXT_CHARS] if type(text) is str else "<unprintable>")


def run_program(payload: dict[str, Any], call: Any) -> dict[str, Any]:
  """Executes a program and calls one function of it.

  Args:
    payload: "source"; "function" (default "solve"), called without arguments.

  Returns:
    "value" (plain JSON, None when it has no such form), "text" (`str` of it, capped), "stdout".

  Raises:
    JobError: kinds "format" and "policy". Exceptions of the program end the job as kind "crash".
  """
  del call
  stdout = CappedText()
  previous, sys.stdout = sys.stdout, stdout
  try:
    function = find_function(load(payload["source"]), payload.get("function", "solve"))
    value = function()
  finally:
    sys.stdout = previous
  text = text_of(value)
  value = plain(value)
  output = clean(stdout.getvalue())
  sys.stdout.write(output)
  return {"value": value if _crosses(value) else None, "text": text, "stdout": output}


def _crosses(value: Any) -> bool:
  if json_fault(value):
    return False
  try:
    return len(encode({"v": value})) <= MAX_VALUE_BYTES
  except FrameError:
    return False


def _answer(function: Any, arguments: list[Any], named: dict[str, Any]) -> dict[str, Any]:
  try:
    value = encode_value(function(*decode_value(arguments), **decode_value(named)))
  except Exception as error:  # one input's failure is that input's outcome
    return {"error": describe(error)}
  fault = json_fault(value)
  return {"error": f"the output holds {fault}"} if fault else {"value": value}


async def serve_function(payload: dict[str, Any], call: Any) -> None:
  """The solution's half of an isolated test run: answers requests until there are no more.

  Args:
    payload: "source", "function", and "prelude", source that is executed before it.
    call: `next` is asked with the last answer (None at first) and replies with the next
      [arguments, named arguments] or None.
  """
  namespace = load(payload["prelude"]) if payload["prelude"] else None
  function = find_function(load(payload["source"], namespace), payload["function"])
  answer = None
  while (request := await call("next", answer)) is not None:
    answer = _answer(function, *request)


class CandidateError(Exception):
  """What a test sees when the candidate raised."""


def run_tests(payload: dict[str, Any], call: Any) -> dict[str, Any]:
  """The tests' half of an isolated test run: executes tests that call the candidate through the
  parent.

  Args:
    payload: "tests", "entry_point"; optional "prelude" (trusted helpers that the tests name). When
      the tests define `check`, it is called with the candidate, as in HumanEval, or without
      arguments if it takes none, as in AFlow's MBPP.

  Returns:
    "passed", and "error": the failing assertion in one line.
  """
  del call
  connection = channel
  assert connection is not None

  def candidate(*arguments: Any, **named: Any) -> Any:
    request = [encode_value(list(arguments)), encode_value(named)]
    answer = connection.call_sync("candidate", request)
    if "error" in answer:
      raise CandidateError(answer["error"])
    return decode_value(answer["value"])

  namespace = new_namespace("tests")
  try:
    if payload.get("prelude"):
      load(payload["prelude"], namespace)
    namespace[payload["entry_point"]] = namespace["candidate"] = candidate
    load(payload["tests"], namespace)
    check = namespace.get("check")
    if callable(check) and check is not candidate:
      check(*[candidate][: len(inspect.signature(check).parameters)])
  except JobError:
    raise
  except Exception as error:  # the verdict of the tests
    return {"passed": False, "error": describe(error)}
  return {"passed": True, "error": ""}
