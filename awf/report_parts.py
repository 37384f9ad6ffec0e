"""Pieces of the report page: escaping, tables, code, differences.

Whatever enters a page goes through `esc`; nothing here reads files.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence

MAX_TEXT = 20_000  # characters of one model-written text that a page shows
# Control and format characters: they could reorder or hide text. Tab and newline stay.
_CONTROL = re.compile(
  r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
  r"\ud800-\udfff\U000e0000-\U000e007f]"
)


def esc(text: object, limit: int = MAX_TEXT) -> str:
  """Text as inert HTML: markup escaped, control characters shown as U+FFFD, cut at `limit`."""
  plain = str(text)
  if len(plain) > limit:
    plain = plain[:limit] + f" … ({len(plain) - limit} more characters)"
  return html.escape(clean(plain), quote=True)


def clean(text: str) -> str:
  """Text with control, format and lone surrogate characters shown as U+FFFD."""
  return _CONTROL.sub("\ufffd", text)


def number(value: object, digits: int = 4) -> str:
  """A number for a reader; a dash for what is none."""
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    return "–"
  if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
    return f"{int(value):,}"
  return f"{value:.{digits}g}"


def section(title: str, *parts: str) -> str:
  body = "".join(part for part in parts if part)
  return f"<section><h2>{esc(title)}</h2>{body}</section>" if body else ""


def card(content: str) -> str:
  return f'<div class="card">{content}</div>'


def note(text: str) -> str:
  return f'<p class="soft">{esc(text)}</p>'


def details(summary: str, content: str) -> str:
  return f"<details><summary>{esc(summary)}</summary>{card(content)}</details>"


def tiles(values: Iterable[tuple[str, str]]) -> str:
  cells = (
    f'<div class="card"><span class="soft">{esc(k)}</span><b>{esc(v)}</b></div>' for k, v in values
  )
  return f'<div class="tiles">{"".join(cells)}</div>'


def table(
  header: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()
) -> str:
  """A table of escaped cells; columns in `numeric` are set to the right."""

  def line(tag: str, cells: Sequence[object]) -> str:
    kind = [' class="n"' if i in numeric else "" for i in range(len(cells))]
    return "".join(f"<{tag}{k}>{esc(c, 2000)}</{tag}>" for k, c in zip(kind, cells, strict=True))

  body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
  return f"<table><thead><tr>{line('th', header)}</tr></thead><tbody>{body}</tbody></table>"


def code(text: str) -> str:
  return f"<pre>{esc(text)}</pre>"


def diff(lines: Iterable[str]) -> str:
  """A unified diff with added and removed lines marked."""
  kinds = {"+": "add", "-": "del", "@": "at"}
  spans = (
    f'<span class="{kinds.get(line[:1], "same")}">{esc(line) or " "}</span>' for line in lines
  )
  return f"<pre>{''.join(spans)}</pre>"
