"""What a person sees while a mode runs: bars on a terminal, plain lines elsewhere.

The parts of a run open stages (`track`) and say how far they are; whoever shows them only reads.
On a terminal the open stages stand below the log as bars; in a pipe, a notebook or a file a line
comes when nothing else was said for a while. `--quiet` shows warnings and errors alone.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

log = logging.getLogger("awf")

_SILENCE = 30.0  # seconds without a line until a plain display says where it is
_WINDOW = 20.0  # seconds over which tokens/s are taken
_REFRESH = 4  # pictures a second on a terminal


class Stage:
  """An activity that is under way.

  Attributes:
    name: what is shown.
    total: of `done`; None while it is not known.
    done: how much is.
    facts: shown beside it, in the order of their coming.
  """

  def __init__(self, name: str, total: float | None = None, done: float = 0, unit: str = ""):
    self.name, self.total, self.done, self.unit = name, total, done, unit
    self.facts: dict[str, Any] = {}
    self._began, self._done_before = time.monotonic(), done

  def advance(self, count: float = 1, **facts: Any) -> None:
    """So much more is done; facts replace those of the same name."""
    self.done += count
    self.facts |= facts

  def count(self, fact: str) -> None:
    """Adds one to a fact that counts."""
    self.facts[fact] = self.facts.get(fact, 0) + 1

  @property
  def seconds(self) -> float:
    """Since it began."""
    return time.monotonic() - self._began

  @property
  def seconds_left(self) -> float | None:
    """At the speed so far; None when nothing is known."""
    done = self.done - self._done_before
    if self.total is None or done <= 0 or self.done > self.total:
      return None
    return self.seconds / done * (self.total - self.done)

  def amount(self) -> str:
    """How far it is, for instance `3/20` or `1.2/15.4 GB`."""
    if self.unit == "B":
      known = "" if not self.total else f"/{self.total / 1e9:.2f}"
      return f"{self.done / 1e9:.2f}{known} GB"
    if self.total is None:
      return f"{self.done:g}" if self.done else ""
    return f"{self.done:g}/{self.total:g}"

  def times(self) -> str:
    left = self.seconds_left
    return clock(self.seconds) + (f", {clock(left)} left" if left is not None else "")

  def said(self) -> str:
    """The facts in one line."""
    texts = (f"{v:.3f}" if isinstance(v, float) else str(v) for v in self.facts.values())
    return ", ".join(f"{name} {text}" for name, text in zip(self.facts, texts, strict=True))

  def line(self) -> str:
    """All of it."""
    parts = (self.amount(), self.said(), self.times())
    return f"{self.name}: {'; '.join(part for part in parts if part)}"


_open: list[Stage] = []
_meter: list[Callable[[], float]] = []  # what counts tokens, if anything does
_watching: list[bool] = []  # whether compilations are


@contextlib.contextmanager
def track(
  name: str, total: float | None = None, done: float = 0, unit: str = ""
) -> Iterator[Stage]:
  """Opens a stage for the time of a `with`; costs nothing where nobody looks.

  Args:
    name: what is done.
    total: what there is to do, in `unit`s; None when it is not known.
    done: what was done before, which does not count for the speed.
    unit: "" for things, "B" for bytes.
  """
  stage = Stage(name, total, done, unit)
  _open.append(stage)
  try:
    yield stage
  finally:
    _open.remove(stage)


def open_stages() -> list[Stage]:
  """The stages under way, outermost first."""
  return list(_open)


def count_tokens(tokens: Callable[[], float] | None) -> None:
  """Has tokens/s shown: `tokens` gives the number generated so far, from any thread; None ends."""
  _meter[:] = [] if tokens is None else [tokens]


def watch_compiles() -> None:
  """Has every compilation of JAX open a stage. JAX is imported here."""
  import jax

  if _watching:
    return
  _watching.append(True)
  stages: list[Stage] = []

  def began(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/compile_requests_use_cache":
      stages.append(Stage("compile"))
      _open.append(stages[-1])

  def ended(event: str, duration_secs: float, **_: Any) -> None:
    del duration_secs
    if event == "/jax/core/compile/backend_compile_duration" and stages:
      _open.remove(stages.pop())

  jax.monitoring.register_event_listener(began)
  jax.monitoring.register_event_duration_secs_listener(ended)


class _Speed:
  """Tokens/s over the last seconds."""

  def __init__(self) -> None:
    self._seen: collections.deque[tuple[float, float]] = collections.deque()

  def __call__(self) -> float | None:
    meter = next(iter(_meter), None)
    if meter is None:
      return None
    now, tokens = time.monotonic(), meter()
    self._seen.append((now, tokens))
    while now - self._seen[0][0] > _WINDOW:
      self._seen.popleft()
    (began, first) = self._seen[0]
    return (tokens - first) / (now - began) if now > began and tokens > first else None


class Handler(logging.StreamHandler):
  """Log lines on whatever sys.stderr is at the time; remembers when the last one came."""

  def __init__(self) -> None:
    logging.Handler.__init__(self)
    self.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    self.last = time.monotonic()

  @property
  def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride]
    return sys.stderr

  def emit(self, record: logging.LogRecord) -> None:
    self.last = time.monotonic()
    super().emit(record)


@contextlib.contextmanager
def show(handler: Handler, is_quiet: bool = False) -> Iterator[None]:
  """Shows the stages for the time of a `with`.

  Args:
    handler: of the log lines.
    is_quiet: nothing but warnings and errors.
  """
  _meter.clear()
  if is_quiet:
    handler.setLevel(logging.WARNING)
    yield
  elif sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
    with _bars():
      yield
  else:
    with _lines(handler):
      yield


@contextlib.contextmanager
def _lines(handler: Handler) -> Iterator[None]:
  """Now and then a line of where the run is."""
  over, speed = threading.Event(), _Speed()

  def work() -> None:
    while not over.wait(1.0):
      tokens = speed()
      if time.monotonic() - handler.last >= _SILENCE and (stages := open_stages()):
        shown = [stage.line() for stage in stages]
        shown += [f"{tokens:,.0f} tokens/s"] if tokens else []
        log.info("%s", " | ".join(shown))
        handler.last = time.monotonic()

  thread = threading.Thread(target=work, name="progress", daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


@contextlib.contextmanager
def _bars() -> Iterator[None]:
  """Bars below the log, in place."""
  from rich.console import Console
  from rich.live import Live
  from rich.progress_bar import ProgressBar
  from rich.table import Table
  from rich.text import Text

  speed, turn = _Speed(), itertools.cycle("|/-\\")

  def picture() -> Table:
    table, tokens, sign = Table.grid(padding=(0, 1)), speed(), next(turn)
    for stage in open_stages():
      bar = (
        ProgressBar(total=stage.total, completed=min(stage.done, stage.total), width=24)
        if stage.total
        else Text(sign)
      )
      texts = (stage.amount(), stage.times(), stage.said())
      table.add_row(Text(stage.name), bar, *(Text(text, overflow="ellipsis") for text in texts))
    if tokens:
      table.add_row(Text("sampler"), Text(sign), Text(f"{tokens:,.0f} tokens/s"))
    return table

  console = Console(stderr=True)
  with Live(
    console=console, get_renderable=picture, refresh_per_second=_REFRESH, transient=True
  ):  # fmt: skip
    yield


def clock(seconds: float) -> str:
  """`42 s`, `3:07` or `2:03:07`."""
  whole = int(seconds)
  if whole < 60:
    return f"{whole} s"
  minutes, rest = divmod(whole, 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
