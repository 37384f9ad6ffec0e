"""SIGTERM and Ctrl-C end a run in order: its state is kept before the process goes."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

log = logging.getLogger("awf")

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
  """A run ended after a signal, its state kept.

  Attributes:
    figures: for the JSON line: the signal's name, and how far the run is.
  """

  def __init__(self, number: int, figures: dict[str, Any]):
    name = signal.Signals(number).name
    super().__init__(name)
    self.figures = {"signal": name, **figures}


class StopRequest:
  """While open, the first SIGTERM or Ctrl-C asks for the end, the second one is as before.

  Attributes:
    number: of the signal that asked; 0 as long as none did.
    then: called in the main thread when it does; must not raise.
  """

  def __init__(self) -> None:
    self.number = 0
    self.then: Callable[[], object] = lambda: None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> StopRequest:
    if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
      self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
    return self

  def __exit__(self, *_: object) -> None:
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _ask(self, number: int, frame: FrameType | None) -> None:
    del frame
    self.number = number
    self._restore()
    name = signal.Signals(number).name
    log.info("%s: the state is kept, then this ends (once more: at once)", name)
    self.then()
