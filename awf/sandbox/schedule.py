"""Jobs in flight and who may run: queues, slots, caps. No input or output happens here.

Jobs come in three layers, and a job waits only for jobs of later layers, so that caps cannot lock
each other out: layer 0, jobs with a handler (its calls may start jobs of their own); layer 1, tests
of a solution; layer 2, jobs that nobody else waits behind: programs without calls, and the
solutions under test.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import heapq
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from awf.sandbox import frames
from awf.types import Failure

LAYER_CALLS, LAYER_TESTS, LAYER_LEAF = 0, 1, 2
MAX_TESTS = 16


@dataclasses.dataclass(eq=False)
class Run:
  """One job in flight; touched by the I/O thread alone after it was submitted.

  A run holds a slot (`running`) from its spawn on, gives it up while `parked` for a reply, and
  takes one again when the reply to its oldest call can be delivered.
  """

  message: dict[str, Any]
  on_call: Callable[..., None] | None  # (attempt, number, method, params)
  layer: int
  cpu_seconds: float
  wall_seconds: float
  memory_mb: int
  output_bytes: int
  max_calls: int
  future: concurrent.futures.Future[dict[str, Any]] = dataclasses.field(
    default_factory=concurrent.futures.Future
  )
  attempt: int = 0
  number: int = -1  # of the process; -1 before the spawn
  slot: int = -1
  pid: int = 0
  sock: socket.socket | None = None
  reader: frames.FrameReader | None = None
  out: bytearray = dataclasses.field(default_factory=bytearray)
  nonce: str = ""
  sequence: int = 0  # frames received
  bytes_in: int = 0
  calls: int = 0
  next_reply: int = 0
  replies: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
  ready: bool = False
  running: bool = False
  parked: bool = False
  since: float = 0.0  # when the present phase began: set-up, running, or dying
  wall: float = 0.0  # running time of the phases before
  cpu_parked: float = 0.0
  infrastructure_call: bool = False  # a call of it failed as infrastructure
  failure: Failure | None = None
  result: dict[str, Any] | None = None
  dying: bool = False

  @property
  def unanswered(self) -> int:
    """Calls without a reply."""
    return self.calls - self.next_reply - len(self.replies)

  def start_again(self) -> None:
    """Back to the state before the spawn, for the second attempt."""
    for field in dataclasses.fields(self)[9:]:
      fresh = field.default_factory() if callable(field.default_factory) else field.default
      setattr(self, field.name, fresh)
    self.attempt = 1

  def outcome(self, cpu: float) -> dict[str, Any]:
    """The fields of the JobResult; `failure` has been decided."""
    result = self.result or {}
    return {
      "value": result.get("v") if self.failure is None else None,
      "failure": self.failure,
      "cpu_seconds": cpu,
      "wall_seconds": self.wall,
      "stdout": result.get("s", ""),
      "calls": self.calls,
      "virtual_seconds": float(result.get("d", 0.0)),
    }


class Schedule:
  """Who waits, who lives, who runs."""

  def __init__(self, workers: int, max_children: int) -> None:
    self._workers = workers
    self._caps = (max_children, MAX_TESTS, 1 << 30)
    self._queues: tuple[deque[Run], ...] = (deque(), deque(), deque())
    self._resumable: deque[Run] = deque()
    self._living = [0, 0, 0]
    self._free_slots = list(range(max_children + 2 * MAX_TESTS + workers + 8))
    self._next_number = 0
    self.running = 0
    self.alive: dict[int, Run] = {}

  @property
  def queued(self) -> int:
    """Runs that have no process yet."""
    return sum(map(len, self._queues))

  def enqueue(self, run: Run, *, first: bool = False) -> None:
    """Queues a run that has no process."""
    queue = self._queues[run.layer]
    if first:
      queue.appendleft(run)
    else:
      queue.append(run)

  def make_resumable(self, run: Run) -> None:
    """The reply that a parked run waits for is there."""
    self._resumable.append(run)

  def next_resumed(self) -> Run | None:
    """Gives a slot to a parked run whose reply has come; those go before new processes."""
    while self._resumable and self.running < self._workers:
      run = self._resumable.popleft()
      if run.parked and not run.dying:
        run.parked = False
        self._take_slot(run)
        return run
    return None

  def next_spawned(self) -> Run | None:
    """Gives a slot and a number to a queued run; those that others wait for go first."""
    for layer in (LAYER_LEAF, LAYER_TESTS, LAYER_CALLS):
      free = self.running < self._workers and self._living[layer] < self._caps[layer]
      if free and self._queues[layer] and self._free_slots:
        run = self._queues[layer].popleft()
        run.number, self._next_number = self._next_number, self._next_number + 1
        run.slot = heapq.heappop(self._free_slots)
        self._living[layer] += 1
        self.alive[run.number] = run
        self._take_slot(run)
        return run
    return None

  def _take_slot(self, run: Run) -> None:
    run.running, run.since = True, time.monotonic()
    self.running += 1

  def park(self, run: Run) -> None:
    """The run waits for a reply: its clock stops and its slot is free."""
    run.parked = True
    run.cpu_parked = cpu_of(run.pid)
    self.stop_clock(run)
    self._leave_slot(run)
    if run.next_reply in run.replies:
      self.make_resumable(run)

  def stop_clock(self, run: Run) -> None:
    """Adds the present phase to the run's wall time; only a run in its job counts."""
    if run.running and run.ready and not run.dying:
      run.wall += time.monotonic() - run.since

  def _leave_slot(self, run: Run) -> None:
    if run.running:
      run.running = False
      self.running -= 1

  def remove(self, run: Run) -> None:
    """Takes a run whose process is gone out of the books."""
    self._leave_slot(run)
    del self.alive[run.number]
    self._living[run.layer] -= 1
    heapq.heappush(self._free_slots, run.slot)

  def drain(self) -> list[Run]:
    """Empties the queues."""
    runs = [run for queue in self._queues for run in queue]
    for queue in self._queues:
      queue.clear()
    return runs


def threads_of(pid: int) -> int:
  """Threads of a process; 0 where the system does not tell, or when it is gone."""
  try:
    return os.stat(f"/proc/{pid}/task").st_nlink - 2
  except OSError:
    return 0


def cpu_of(pid: int) -> float:
  """Processor seconds of a process by its CPU clock; 0 where there is none, or when it is gone."""
  if pid == 0 or sys.platform != "linux":
    return 0.0
  try:
    return time.clock_gettime((~pid << 3) | 2)
  except OSError:
    return 0.0
