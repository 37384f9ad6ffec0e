"""Pieces of the report page: escaping, tables, curves, the tree drawing and the style sheet.

Whatever enters a page goes through `esc`; nothing here reads files.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence

MAX_TEXT = 20_000  # characters of one model-written text that a page shows
# Control and format characters: they could reorder or hide text. Tab and newline stay.
_CONTROL = re.compile(
  r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
  r"\ud800-\udfff\U000e0000-\U000e007f]"
)

STYLE = """
:root{color-scheme:light dark;
--page:#f6f6f4;--card:#fff;--ink:#1b1b1a;--soft:#5d5c58;--line:#dcdbd6;
--accent:#2a6fc4;--good:#1c7a43;--good-bg:#e3f3e8;--bad:#b3352c;--bad-bg:#fbe7e5}
@media (prefers-color-scheme:dark){:root{--page:#161615;--card:#1f1f1d;--ink:#ecebe6;--soft:#a5a39b;
--line:#3a3935;--accent:#6ea8ec;--good:#7fd09c;--good-bg:#17301f;--bad:#f0938b;--bad-bg:#3a1c1a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:24px;max-width:1120px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:32px 0 10px}
h3{font-size:15px;margin:18px 0 6px}
p{margin:6px 0}.soft{color:var(--soft)}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px;
margin:10px 0;
overflow-x:auto}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tiles .card{margin:0}.tiles b{display:block;font-size:22px;font-variant-numeric:tabular-nums}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:10px}
.charts figure{margin:0}
figcaption{display:flex;justify-content:space-between;gap:8px;font-size:13px}
figcaption .soft{white-space:nowrap}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th{text-align:left;color:var(--soft);font-weight:500}
th,td{padding:4px 10px 4px 0;border-bottom:1px solid var(--line);vertical-align:top;
overflow-wrap:anywhere}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
pre{margin:0;font:12.5px/1.45 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
pre span{display:block}.add{color:var(--good);background:var(--good-bg)}
.del{color:var(--bad);background:var(--bad-bg)}.at{color:var(--soft)}
details{margin:8px 0}summary{cursor:pointer}
svg{display:block;max-width:100%;height:auto}svg.tree{max-width:none}
svg text{fill:var(--soft);font:11px system-ui,sans-serif}svg text.id{fill:var(--ink)}
.grid{stroke:var(--line);stroke-width:1}
.curve{fill:none;stroke:var(--accent);stroke-width:2;stroke-linejoin:round}
.dot{fill:var(--accent)}.edge{fill:none;stroke:var(--line);stroke-width:1.5}
.edge.best{stroke:var(--accent);stroke-width:2.5}.node{fill:var(--accent);stroke:var(--accent)}
.disc{fill:var(--card)}.ring{fill:none;stroke:var(--ink);stroke-width:2}
"""


def esc(text: object, limit: int = MAX_TEXT) -> str:
  """Text as inert HTML: markup escaped, control characters shown as U+FFFD, cut at `limit`."""
  plain = str(text)
  if len(plain) > limit:
    plain = plain[:limit] + f" … ({len(plain) - limit} more characters)"
  return html.escape(_CONTROL.sub("\ufffd", plain), quote=True)


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


def line_chart(name: str, points: Sequence[tuple[float, float | None]]) -> str:
  """A figure with one curve; a None breaks the line.

  Args:
    name: title; the last value stands beside it.
    points: (x, y) by increasing x; at least one y is a number.
  """
  width, height, left, top, bottom = 340, 150, 62, 8, 20
  known = [(x, y) for x, y in points if y is not None]
  low, high = _range([y for _, y in known])
  first, last = points[0][0], points[-1][0]

  def px(x: float) -> float:
    return left + (x - first) / ((last - first) or 1) * (width - left - 10)

  def py(y: float) -> float:
    return top + (high - y) / (high - low) * (height - top - bottom)

  parts = []
  for y in (low, (low + high) / 2, high):
    parts.append(
      f'<line class="grid" x1="{left}" x2="{width}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
      f'<text x="{left - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{esc(number(y, 3))}</text>'
    )
  ends = ((first, "start"), (last, "end")) if last > first else ((first, "start"),)
  for x, anchor in ends:
    parts.append(
      f'<text x="{px(x):.1f}" y="{height - 5}" text-anchor="{anchor}">{esc(number(x))}</text>'
    )
  for run in _runs(points):
    parts.append(
      f'<path class="curve" d="M{" L".join(f"{px(x):.1f},{py(y):.1f}" for x, y in run)}"/>'
    )
  if len(known) <= 60:
    parts.extend(
      f'<circle class="dot" cx="{px(x):.1f}" cy="{py(y):.1f}" r="3">'
      f"<title>{esc(number(x))}: {esc(number(y))}</title></circle>"
      for x, y in known
    )
  return (
    f'<figure class="card"><figcaption><span>{esc(name, 80)}</span>'
    f'<span class="soft">{esc(number(known[-1][1]))}</span></figcaption>'
    f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{esc(name, 80)}">'
    f"{''.join(parts)}</svg></figure>"
  )


def _range(values: Sequence[float]) -> tuple[float, float]:
  low, high = min(values), max(values)
  if high - low > 1e-12 * max(abs(low), abs(high), 1e-12):
    return low, high
  margin = abs(low) * 0.1 or 1.0
  return low - margin, high + margin


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
  runs: list[list[tuple[float, float]]] = [[]]
  for x, y in points:
    if y is None:
      runs.append([])
    else:
      runs[-1].append((x, y))
  return [run for run in runs if len(run) > 1]


def tree_drawing(
  parents: Mapping[int, int],
  labels: Mapping[int, str],
  shades: Mapping[int, float],
  hints: Mapping[int, str],
  best_path: Iterable[int] = (),
) -> str:
  """Draws a forest from left to right, roots first.

  Args:
    parents: node -> its parent; one that is no node itself makes a root.
    labels, hints: node -> text beside it, text of its tooltip.
    shades: node -> score in [0, 1], the strength of its colour.
    best_path: nodes and edges to mark; the one with the largest depth gets a ring.
  """
  children: dict[int, list[int]] = {}
  for node, parent in parents.items():
    children.setdefault(parent if parent in parents else 0, []).append(node)
  place: dict[int, tuple[int, float]] = {}  # node -> (depth, row)
  row = 0.0
  # Rows by post-order, without recursion: a chain may be long.
  stack = [(node, 0, False) for node in reversed(children.get(0, []))]
  while stack:
    node, depth, done = stack.pop()
    below = children.get(node, [])
    if done:
      place[node] = (depth, (place[below[0]][1] + place[below[-1]][1]) / 2)
    elif below:
      stack.append((node, depth, True))
      stack.extend((child, depth + 1, False) for child in reversed(below))
    else:
      place[node] = (depth, row)
      row += 1.0
  marked = set(best_path)
  spot = {node: (22 + depth * 104, 20 + at * 24) for node, (depth, at) in place.items()}
  edges, dots = [], []
  for node, (x, y) in spot.items():
    if parents[node] in spot:
      x0, y0 = spot[parents[node]]
      kind = "edge best" if {node, parents[node]} <= marked else "edge"
      edges.append(
        f'<path class="{kind}" d="M{x0},{y0:.1f} C{x0 + 52},{y0:.1f} '
        f'{x - 52},{y:.1f} {x},{y:.1f}"/>'
      )
    shade = 0.08 + 0.92 * min(max(shades.get(node, 0.0), 0.0), 1.0)
    dots.append(
      f"<g><title>{esc(hints.get(node, ''), 400)}</title>"
      f'<circle class="disc" cx="{x}" cy="{y:.1f}" r="7"/>'
      f'<circle class="node" cx="{x}" cy="{y:.1f}" r="7" fill-opacity="{shade:.2f}"/>'
      f'<text class="id" x="{x + 12}" y="{y + 4:.1f}">{esc(labels.get(node, node), 40)}</text></g>'
    )
  if marked & spot.keys():
    x, y = spot[max(marked & spot.keys(), key=lambda node: place[node][0])]
    dots.append(f'<circle class="ring" cx="{x}" cy="{y:.1f}" r="10"/>')
  width = max((x for x, _ in spot.values()), default=0) + 110
  height = 24 * row + 20
  return (
    f'<svg class="tree" width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}" '
    f'role="img" aria-label="search tree">{"".join(edges)}{"".join(dots)}</svg>'
  )
