"""Charts of the report page as SVG, without a script: curves, bars, before and after.

A series is told from its neighbours by its dashes and its label, not by its colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from awf.report_parts import esc, number

Points = Sequence[tuple[float, float | None]]
MAX_POINTS = 400  # of one curve; longer ones are thinned
WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 340, 150, 62, 8, 20


def thinned(points: Points) -> Points:
  """At most about `MAX_POINTS`: the last, and of each stretch its least and its largest value."""
  if len(points) <= MAX_POINTS:
    return points
  size = -(-2 * len(points) // MAX_POINTS)
  kept: list[tuple[float, float | None]] = []
  for start in range(0, len(points), size):
    stretch = points[start : start + size]
    known = [(y, i) for i, (_, y) in enumerate(stretch) if y is not None]
    ends = {min(known)[1], max(known)[1]} if known else {0}
    kept += [stretch[i] for i in sorted(ends)]
  return [*kept[:-1], points[-1]]


def line_chart(title: str, series: Mapping[str, Points], x_name: str = "round") -> str:
  """A figure with one curve per series; a None breaks its line.

  Args:
    title: of the figure; the last value stands beside it when there is one series.
    series: label -> (x, y) by increasing x; at least one y of all is a number.
    x_name: what x counts.
  """
  series = {label: thinned(points) for label, points in series.items()}
  everything = [point for points in series.values() for point in points]
  low, high = _range([y for _, y in everything if y is not None])
  first, last = min(x for x, _ in everything), max(x for x, _ in everything)
  right = WIDTH - (10 if len(series) == 1 else 62)

  def px(x: float) -> float:
    return LEFT + (x - first) / ((last - first) or 1) * (right - LEFT)

  def py(y: float) -> float:
    return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

  out = []
  for y in (low, (low + high) / 2, high):
    out.append(
      f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>'
      f'<text x="{LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{esc(number(y, 3))}</text>'
    )
  for x, anchor in ((first, "start"), (last, "end"))[: 1 + (last > first)]:
    out.append(
      f'<text x="{px(x):.1f}" y="{HEIGHT - 5}" text-anchor="{anchor}">{esc(number(x))}</text>'
    )
  out.append(
    f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 5}" text-anchor="middle">{x_name}</text>'
  )
  for place, points in enumerate(series.values()):
    out.append(_curve(points, px, py, place % 6))
  if len(series) > 1:
    out.append(_labels(series, right, py))
    shown = ""
  else:
    known = [y for _, y in everything if y is not None]
    shown = f'<span class="soft">{esc(number(known[-1]))}</span>'
  return (
    f'<figure class="card"><figcaption><span>{esc(title, 80)}</span>{shown}</figcaption>'
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{esc(title, 80)}">'
    f"{''.join(out)}</svg></figure>"
  )


def _curve(points: Points, px, py, place: int) -> str:
  lines = "".join(
    f'<path class="curve s{place}" d="M{" L".join(f"{px(x):.1f},{py(y):.1f}" for x, y in run)}"/>'
    for run in _runs(points)
  )
  known = [(x, y) for x, y in points if y is not None]
  if len(known) > 60:
    return lines
  return lines + "".join(
    f'<circle class="dot s{place}" cx="{px(x):.1f}" cy="{py(y):.1f}" r="2.5">'
    f"<title>{esc(number(x))}: {esc(number(y))}</title></circle>"
    for x, y in known
  )


def _labels(series: Mapping[str, Points], right: float, py) -> str:
  """Names of the series beside their ends, moved apart where they would touch."""
  ends = []
  for place, (label, points) in enumerate(series.items()):
    known = [y for _, y in points if y is not None]
    if known:
      ends.append([py(known[-1]), place % 6, label])
  ends.sort()
  for above, below in zip(ends, ends[1:], strict=False):
    below[0] = max(below[0], above[0] + 12)
  over = max(0.0, ends[-1][0] - (HEIGHT - BOTTOM)) if ends else 0.0
  return "".join(
    f'<text class="label s{place}" x="{right + 6}" y="{y - over + 4:.1f}">{esc(label, 12)}</text>'
    for y, place, label in ends
  )


def _range(values: Sequence[float]) -> tuple[float, float]:
  low, high = min(values), max(values)
  if high - low > 1e-12 * max(abs(low), abs(high), 1e-12):
    return low, high
  margin = abs(low) * 0.1 or 1.0
  return low - margin, high + margin


def _runs(points: Points) -> list[list[tuple[float, float]]]:
  runs: list[list[tuple[float, float]]] = [[]]
  for x, y in points:
    if y is None:
      runs.append([])
    else:
      runs[-1].append((x, y))
  return [run for run in runs if len(run) > 1]


def bars(rows: Sequence[tuple[str, float, str]]) -> str:
  """Horizontal bars, the longest as long as there is room.

  Args:
    rows: (name, value >= 0, what stands beside the bar).
  """
  most = max((value for _, value, _ in rows), default=0) or 1
  lines = "".join(
    f'<tr><th scope="row">{esc(name, 80)}</th><td class="bar"><svg viewBox="0 0 100 10" '
    f'preserveAspectRatio="none" aria-hidden="true"><rect width="{100 * value / most:.2f}" '
    f'height="10"/></svg></td><td class="n">{esc(text, 80)}</td></tr>'
    for name, value, text in rows
  )
  return f'<table class="bars"><tbody>{lines}</tbody></table>'


def before_after(rows: Sequence[tuple[str, float | None, float | None]]) -> str:
  """One line per row from a hollow ring (before) to a full dot (after), both in [0, 1]."""
  height, left, right = 20 * len(rows) + 34, 90, 560

  def px(value: float) -> float:
    return left + min(max(value, 0.0), 1.0) * (right - left)

  out = []
  for value in (0.0, 0.25, 0.5, 0.75, 1.0):
    out.append(
      f'<line class="grid" x1="{px(value)}" x2="{px(value)}" y1="8" y2="{height - 22}"/>'
      f'<text x="{px(value)}" y="{height - 6}" text-anchor="middle">{value:g}</text>'
    )
  for place, (name, before, after) in enumerate(rows):
    y = 20 + 20 * place
    out.append(
      f'<text class="id" x="{left - 10}" y="{y + 4}" text-anchor="end">{esc(name, 20)}</text>'
    )
    if before is not None and after is not None:
      kind = "gain" if after >= before else "loss"
      out.append(f'<line class="{kind}" x1="{px(before)}" x2="{px(after)}" y1="{y}" y2="{y}"/>')
    for value, kind in ((before, "before"), (after, "after")):
      if value is not None:
        out.append(
          f'<circle class="{kind}" cx="{px(value):.1f}" cy="{y}" r="5">'
          f"<title>{kind} {esc(number(value))}</title></circle>"
        )
  return (
    f'<svg class="pairs" viewBox="0 0 {right + 20} {height}" role="img" '
    f'aria-label="proposals before and after training">{"".join(out)}</svg>'
  )
