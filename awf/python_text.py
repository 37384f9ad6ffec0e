"""Finds the Python code in a model's text; pure Python, shared by parent and child."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings

_FENCE = re.compile(
  r"(?:[^`]|`{1,2}(?!`))*(`{3,})[ \t]*(?:(python\w*|py3?)\b[^`]*|([\w+-]*)[ \t]*)$", re.IGNORECASE
)
_CODE_START = re.compile(r"(?:import|from|async|def|class)\s|@\w")
MAX_FENCE_ENDS = 4  # tried before a block counts as no Python
MAX_CODE_STARTS = 8  # lines of a reply without fences that its code may begin in
MAX_CODE_CUTS = 8


def parses(source: str) -> bool:
  """Whether a text is Python; a text of blanks is not."""
  return bool(source.strip()) and _error_line(source) is None


def _error_line(source: str) -> int | None:
  """The line, from 1 on, in which a text stops being Python; None when it is Python."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # odd escapes
      ast.parse(source)
  except SyntaxError as error:
    return error.lineno or 1
  except (ValueError, RecursionError, MemoryError):
    return 1
  return None


def code_blocks(text: str) -> list[tuple[str, str]]:
  """(language, text) of every fenced block; a fence may stand in a list or behind a text.

  A block ends at the first fence at which it is Python once dedented, so that one in a docstring
  ends nothing; a block that is no Python ends at the first fence. The last may have no end, as in a
  reply that was cut off.
  """
  lines = text.replace("\r\n", "\n").split("\n")
  blocks = []
  i = 0
  while i < len(lines):
    opening = _FENCE.match(lines[i])
    i += 1
    if opening is not None:
      body, i = _block(lines, i, opening[1])
      blocks.append(("python" if opening[2] else opening[3].lower(), body))
  return blocks


def _block(lines: list[str], start: int, fence: str) -> tuple[str, int]:
  """The block that begins at a line, and the line behind its end."""
  ends = (i for i in range(start, len(lines)) if fence in lines[i])
  first = None
  for _, end in zip(range(MAX_FENCE_ENDS), ends, strict=False):
    last = lines[end].partition(fence)[0]
    body = "\n".join([*lines[start:end], *([last] if last.strip() else [])])
    if first is None:
      first = body, end + 1
    if parses(textwrap.dedent(body)):
      return body, end + 1
  return first or ("\n".join(lines[start:]), len(lines))


def bare_code(text: str) -> list[str]:
  """Python that stands in a text without fences, longest first: what is left of it from a line on
  that may begin code, without the prose behind."""
  lines = text.replace("\r\n", "\n").split("\n")
  starts = [i for i, line in enumerate(lines) if _CODE_START.match(line)][:MAX_CODE_STARTS]
  found = []
  for start in starts:
    end = len(lines)
    for _ in range(MAX_CODE_CUTS):
      wrong = _error_line("\n".join(lines[start:end]))
      if wrong is None:
        break
      end = min(start + wrong, end) - 1
    else:
      continue
    if end > start:
      found.append("\n".join(lines[start:end]).strip("\n"))
  return sorted(found, key=len, reverse=True)


def code_of(text: str) -> str:
  """The Python code of a reply: its Python blocks joined, else other blocks, else all of it, or the
  part of it that is Python."""
  blocks = code_blocks(text)
  chosen = [body for language, body in blocks if language == "python"]
  chosen = chosen or [body for _, body in blocks]
  if chosen:
    return "\n\n".join(textwrap.dedent(body).strip("\n") for body in chosen)
  bare = [] if parses(text) else bare_code(text)
  return bare[0] if bare else text.strip("\n")
