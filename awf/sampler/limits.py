"""How often an endpoint may be asked: windows of a minute, and pauses that it asks for."""

from __future__ import annotations

import asyncio
import collections
import datetime
import email.utils
import time
from collections.abc import Callable, Sequence


class Window:
  """What was spent within the last `seconds`, held under a limit.

  Source: a sliding log, so that no stretch of `seconds` ever sees more than the limit.
  """

  def __init__(self, limit: int, seconds: float = 60.0) -> None:
    self.limit, self.seconds = limit, seconds
    self._spent: collections.deque[list[float]] = collections.deque()  # [time, cost]

  def delay(self, cost: float, now: float) -> float:
    """Seconds until `cost` may be spent; one above the limit counts as the limit."""
    while self._spent and self._spent[0][0] <= now - self.seconds:
      self._spent.popleft()
    excess = sum(one[1] for one in self._spent) + min(cost, self.limit) - self.limit
    at = now
    for spent_at, spent in self._spent:
      if excess <= 0:
        break
      excess, at = excess - spent, spent_at + self.seconds
    return max(0.0, at - now)

  def take(self, cost: float, now: float) -> list[float]:
    """Spends; returns the entry, whose cost `[1]` may be set to what it really was."""
    entry = [now, min(cost, self.limit)]
    self._spent.append(entry)
    return entry


class RateLimit:
  """Requests and tokens a minute, in order of arrival; used from one event loop.

  Args:
    requests: a minute; 0 is no limit.
    tokens: a minute, prompt and completion; 0 is no limit.
    seconds: of the windows.
    clock: monotonic seconds.
  """

  def __init__(
    self,
    requests: int = 0,
    tokens: int = 0,
    seconds: float = 60.0,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    self._windows = [Window(limit, seconds) if limit else None for limit in (requests, tokens)]
    self._clock, self._resume_at = clock, 0.0
    self._turn = asyncio.Lock()
    self.waited = 0.0  # seconds

  def pause(self, seconds: float) -> None:
    """No request starts before so many seconds have passed."""
    self._resume_at = max(self._resume_at, self._clock() + seconds)

  async def take(self, tokens: int) -> Callable[[int], None]:
    """Waits until a request of so many tokens may start.

    Returns:
      A function that is told how many tokens it was in the end.
    """
    costs = (1, tokens)
    async with self._turn:
      while (delay := self._delay(costs)) > 0:
        self.waited += delay
        await asyncio.sleep(delay)
      now = self._clock()
      entries = [w and w.take(c, now) for w, c in zip(self._windows, costs, strict=True)]

    def settle(spent: int) -> None:
      if entries[1]:
        entries[1][1] = float(spent)

    return settle

  def _delay(self, costs: Sequence[float]) -> float:
    now = self._clock()
    delays = [w.delay(c, now) for w, c in zip(self._windows, costs, strict=True) if w]
    return max([self._resume_at - now, *delays])


def retry_after(text: str | None) -> float:
  """Seconds that a Retry-After header asks for, in seconds or as a date; 0 without one.

  Source: RFC 9110, section 10.2.3.
  """
  if not text:
    return 0.0
  try:
    return max(0.0, float(text))
  except ValueError:
    pass  # a date
  try:
    when = email.utils.parsedate_to_datetime(text)
  except (ValueError, OverflowError):
    return 0.0
  if when.tzinfo is None:
    when = when.replace(tzinfo=datetime.UTC)
  return max(0.0, (when - datetime.datetime.now(datetime.UTC)).total_seconds())
