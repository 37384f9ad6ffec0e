"""Length-prefixed JSON frames between parent and child, and the check of what may cross.

A frame is a 4-byte big-endian length and that many bytes of UTF-8 JSON. Both sides bind the JSON
functions at import, so that a job that replaces `json.loads` changes nothing here.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from typing import Any

HEADER = struct.Struct(">I")
MAX_DEPTH = 64  # nesting of a JSON value
MAX_NODES = 200_000  # values in one frame
REPLY_BYTES = 64 << 20  # a frame from the parent: trusted in kind, capped in size

_dumps = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class FrameError(ValueError):
  """A frame that breaks the protocol: too long, not JSON, or a value that may not cross."""


def json_fault(value: Any) -> str | None:
  """Says why `value` is not plain JSON of exact types, or None when it is.

  Allowed are None, bool, int, finite float, str without lone surrogates, list, and dict with such
  str keys; no subclasses, no cycles, at most MAX_DEPTH levels and MAX_NODES values. No method of a
  foreign object is called.
  """
  stack = [(value, 0)]
  nodes = 0
  while stack:
    item, depth = stack.pop()
    nodes += 1
    kind = type(item)
    if nodes > MAX_NODES:
      return f"more than {MAX_NODES} values"
    if depth > MAX_DEPTH:
      return f"nested deeper than {MAX_DEPTH} levels (or containing itself)"
    if kind is str:
      if not _is_clean(item):
        return "a string with a lone surrogate"
    elif kind is float:
      if not math.isfinite(item):
        return "a float that is not finite"
    elif kind is list:
      stack.extend((entry, depth + 1) for entry in item)
    elif kind is dict:
      for key, entry in item.items():
        if type(key) is not str or not _is_clean(key):
          return "a dict key that is not a plain string"
        stack.append((entry, depth + 1))
    elif kind is not bool and kind is not int and item is not None:
      return f"a value of type {kind_name(kind)}"
  return None


def kind_name(kind: type) -> str:
  """The name of a type, read past any metaclass, printable and capped."""
  name = type.__dict__["__name__"].__get__(kind)
  return "".join(
    c if c.isprintable() and not 0xD800 <= ord(c) <= 0xDFFF else "?" for c in name[:80]
  )


def _is_clean(text: str) -> bool:
  if text.isascii():
    return True
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    return False
  return True


def encode(message: dict[str, Any]) -> bytes:
  """Encodes one frame; the caller has checked the value with `json_fault`.

  Raises:
    FrameError: the value has no JSON form, for instance an integer of more digits than the
      interpreter prints.
  """
  try:
    body = _dumps(message).encode("utf-8")
  except (ValueError, TypeError, RecursionError) as error:
    raise FrameError(f"no JSON form: {error}") from error
  return HEADER.pack(len(body)) + body


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  result = dict(pairs)
  if len(result) != len(pairs):
    raise FrameError("duplicate key")
  return result


def _constant(name: str) -> Any:
  raise FrameError(f"the constant {name}")


_decoder = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)
_trusting_decoder = json.JSONDecoder()


def decode(body: bytes) -> dict[str, Any]:
  """Decodes one frame's body from an untrusted sender.

  Raises:
    FrameError: not UTF-8, not one JSON object, duplicate keys, or a value that `json_fault`
      refuses.
  """
  try:
    message = _decoder.decode(body.decode("utf-8"))
  except FrameError:
    raise
  except (ValueError, RecursionError) as error:
    raise FrameError(f"not JSON: {type(error).__name__}") from error
  if type(message) is not dict:
    raise FrameError("not a JSON object")
  fault = json_fault(message)
  if fault:
    raise FrameError(fault)
  return message


def decode_trusted(body: bytes) -> dict[str, Any]:
  """Decodes one frame's body from the parent, without the checks."""
  return _trusting_decoder.decode(body.decode("utf-8"))


class FrameReader:
  """Cuts a byte stream into frame bodies."""

  def __init__(self, max_bytes: int) -> None:
    self._max_bytes = max_bytes
    self._buffer = bytearray()

  def feed(self, data: bytes) -> Iterator[bytes]:
    """Yields the bodies that `data` completes.

    Raises:
      FrameError: a frame announces more than the cap.
    """
    self._buffer += data
    while len(self._buffer) >= HEADER.size:
      (length,) = HEADER.unpack_from(self._buffer)
      if length > self._max_bytes:
        raise FrameError(f"a frame of {length} bytes, at most {self._max_bytes} are allowed")
      end = HEADER.size + length
      if len(self._buffer) < end:
        return
      body = bytes(self._buffer[HEADER.size : end])
      del self._buffer[:end]
      yield body
