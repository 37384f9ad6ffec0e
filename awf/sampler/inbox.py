"""Where requests come in from any thread, wait for a place in the queue, and are called off.

Rows and pages are fixed, and the engine's queue holds a limited number of completions. Who submits
beyond that waits, first come, first served; what comes without blocking stands in line here.
"""

from __future__ import annotations

import functools
import threading
from concurrent.futures import Future

from awf.sampler.job import Job
from awf.sampler.request import QueueFull


class Inbox:
  """Jobs between their callers and the engine's thread.

  Attributes:
    lock: held by whoever changes what a new job is made of (the engine's adapters).
    is_closed: nothing comes in any more.
    num_cancelled: jobs whose callers went before the answer.

  Args:
    most: completions that may wait for a row; a job that asks for more has the queue to itself.
  """

  def __init__(self, most: int) -> None:
    self.lock = threading.RLock()
    self.is_closed = False
    self._most = most
    self._ready = threading.Condition(self.lock)
    self._new: list[Job] = []
    self._beyond: dict[Job, None] = {}  # no place in the queue yet, in order of arrival
    self._gone: list[Job] = []  # called off by their callers
    self._held = 0  # completions in the engine's queue and in `_new`
    self._numbers = self.num_cancelled = 0
    self._is_stirred = False

  def put(self, job: Job, wait: bool = True) -> None:
    """Takes a job in; `job.placed` tells when the queue has a place for it. Never blocks.

    Raises:
      QueueFull: there is no place, and `wait` is False.
    """
    with self.lock:
      if not wait and (self._beyond or not self._fits(job)):
        raise QueueFull(f"the sampler's queue is full: {self._held} completions wait for a row")
      job.number = self._numbers
      self._numbers += 1
      self._beyond[job] = None
      self._let_in()
      self._ready.notify()
    job.future.add_done_callback(functools.partial(self._on_end, job))

  def settle(self, waiting: int) -> None:
    """Tells how many completions still wait in the engine: others may have their places."""
    with self.lock:
      self._held = waiting + sum(job.request.n for job in self._new)
      self._let_in()

  def fetch(self, has_work: bool) -> tuple[list[Job], list[Job]] | None:
    """What changed since the last call; waits for a change when the engine has no work.

    Args:
      has_work: the engine can go on without news.

    Returns:
      (new jobs, jobs that were called off, some of them perhaps new), or None when closed.
    """
    with self.lock:
      while not (self.is_closed or has_work or self._new or self._gone or self._is_stirred):
        self._ready.wait()
      self._is_stirred = False
      if self.is_closed:
        return None
      new, self._new = self._new, []
      gone, self._gone = self._gone, []
      return new, gone

  def stir(self) -> None:
    """Lets the engine look at what has changed beside its jobs."""
    with self.lock:
      self._is_stirred = True
      self._ready.notify()

  def jobs(self) -> list[Job]:
    """Those that the engine has not fetched."""
    with self.lock:
      return [*self._new, *self._beyond]

  def __len__(self) -> int:
    """Completions of those jobs."""
    return sum(job.request.n for job in self.jobs())

  def close(self) -> list[Job]:
    """Lets nothing in any more; gives the jobs that were never fetched."""
    with self.lock:
      self.is_closed = True
      left = self.jobs()
      self._new, self._beyond = [], {}
      self._ready.notify()
    return left

  def shut(self) -> None:
    """Asks the engine's thread to end."""
    with self.lock:
      self.is_closed = True
      self._ready.notify()

  def _fits(self, job: Job) -> bool:
    return self._held == 0 or self._held + job.request.n <= self._most

  def _let_in(self) -> None:
    while self._beyond and self._fits(job := next(iter(self._beyond))):
      del self._beyond[job]
      self._new.append(job)
      self._held += job.request.n
      job.place()

  def _on_end(self, job: Job, future: Future) -> None:
    """In the thread that ended the future: the engine learns of those that were called off."""
    if not future.cancelled():
      return
    with self.lock:
      self.num_cancelled += 1
      if job in self._beyond:
        del self._beyond[job]
        job.call_off()
        self._let_in()
      else:
        self._gone.append(job)
      self._ready.notify()
