"""An asyncio event loop without file descriptors, on a virtual clock, for jobs in the child.

Order of events is a function of the job and of its replies alone:
- a reply is read only when nothing is ready, one at a time, in the order of the calls;
- `time()` moves only when nothing is ready and no call is outstanding, and then jumps to the next
  timer.
"""

from __future__ import annotations

import asyncio
import asyncio.base_events
from collections.abc import Callable
from typing import Any

MAX_VIRTUAL_SECONDS = 1e6
MAX_TIMER_JUMPS = 100_000


class VirtualTimeout(BaseException):
  """The job cannot end: deadlock, or too much virtual time. `except Exception` misses it."""


class _IdlePoint:
  """Stands where asyncio expects a selector: asked for events after each run of the ready queue."""

  def __init__(self, loop: DeterministicLoop) -> None:
    self._loop = loop

  def select(self, timeout: float | None) -> list[Any]:
    if timeout is None or timeout > 0:
      self._loop.idle()
    return []

  def close(self) -> None:
    return None


class DeterministicLoop(asyncio.base_events.BaseEventLoop):
  """Event loop of a job.

  Args:
    outstanding: says whether a call waits for its reply.
    deliver: blocks for the next reply and hands it to its future.
  """

  _scheduled: list[asyncio.TimerHandle]  # the base's heap of timers; its type stub leaves it out

  def __init__(self, outstanding: Callable[[], bool], deliver: Callable[[], None]) -> None:
    super().__init__()
    self._selector = _IdlePoint(self)
    self._clock_resolution = 1e-9
    self._outstanding = outstanding
    self._deliver = deliver
    self._now = 0.0
    self._jumps = 0

  def time(self) -> float:
    return self._now

  def idle(self) -> None:
    """Takes the next reply; without outstanding calls jumps to the next timer.

    Raises:
      VirtualTimeout: neither calls nor timers are left, or the clock ran too far.
    """
    if self._outstanding():
      self._deliver()
      return
    if not self._scheduled:
      raise VirtualTimeout("deadlock: every task waits and neither a call nor a timer is left")
    self._jumps += 1
    self._now = max(self._now, self._scheduled[0].when())
    if self._now > MAX_VIRTUAL_SECONDS or self._jumps > MAX_TIMER_JUMPS:
      raise VirtualTimeout(
        f"slept for {self._now:.3g} virtual seconds in {self._jumps} steps, at most "
        f"{MAX_VIRTUAL_SECONDS:.0e} and {MAX_TIMER_JUMPS} are allowed"
      )

  def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
    """Runs `func` at once, in this thread: with a pool, timing would decide the order of events."""
    future = self.create_future()
    try:
      future.set_result(func(*args))
    except Exception as error:  # handed to the awaiting task, as a pool would
      if isinstance(error, StopIteration):
        error = RuntimeError("a function in an executor raised StopIteration")
      future.set_exception(error)
    return future

  def _process_events(self, event_list: list[Any]) -> None:
    return None

  def _write_to_self(self) -> None:
    return None

  def close(self) -> None:
    super().close()
    self._selector.close()


class DeterministicPolicy(asyncio.DefaultEventLoopPolicy):
  """Makes `asyncio.run` inside a job use the deterministic loop."""

  def __init__(self, outstanding: Callable[[], bool], deliver: Callable[[], None]) -> None:
    super().__init__()
    self._make = lambda: DeterministicLoop(outstanding, deliver)

  def new_event_loop(self) -> asyncio.AbstractEventLoop:
    return self._make()
