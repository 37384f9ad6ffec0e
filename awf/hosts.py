"""Several processes as one run: whose work a job is, and where they agree.

Every process runs the same search on the same results. A job (a group of proposals, a workflow on
a problem, a grade) is asked for by all and done by one, to which process 0 deals it; what comes out
is told to all. A job's result is a function of what is asked, so it does not matter who did it.
Before anything that all do together (an update, a checkpoint) the processes meet: each says that it
got there, or that it was asked to stop, and all go on or all stop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from awf.hub import Hub, Message
from awf.types import UserError

log = logging.getLogger("awf")

Value = tuple[Any, bool]  # a job's result as JSON, and whether it may serve later requests for it


class Hosts:
  """The processes of a run; this class is the one process of a run without others.

  Attributes:
    index, size: of this process, and how many there are.
    stop_number: of the signal that asked any of them to stop; 0 as long as none did.
    is_stopped: they have met, and all stop.
  """

  index, size = 0, 1
  stop_number = 0
  is_stopped = False

  @property
  def is_writer(self) -> bool:
    """Whether this process writes the run's files."""
    return self.index == 0

  async def meet(self, facts: dict[str, Any], stop: int = 0) -> list[dict[str, Any]]:
    """Waits for all; gives what each of them says, by index."""
    del stop
    return [facts]

  def meet_now(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """`meet` outside of an event loop."""
    return [facts]

  def agree(self, what: str, value: Any, hint: str) -> None:
    """Refuses to go on when a process has another value than process 0.

    Raises:
      UserError: on every process.
    """
    values = [json.loads(json.dumps(f["value"])) for f in self.meet_now({"value": value})]
    for index, found in enumerate(values):
      if found != values[0]:
        raise UserError(
          f"process {index} has another {what} than process 0: expected {values[0]!r:.200}, got "
          f"{found!r:.200}; {hint}"
        )


@dataclasses.dataclass
class _Job:
  """What a process knows of one job."""

  make: Callable[[], Awaitable[Value]] | None = None  # once it was asked for here
  is_mine: bool = False
  is_started: bool = False
  answer: Message | None = None
  error: BaseException | None = None  # as it was raised here
  waiting: list[asyncio.Future[None]] = dataclasses.field(default_factory=list)


class Cluster(Hosts):
  """The processes of a run of several; made by `join`."""

  def __init__(self, index: int, size: int, timeout: float, lost: Callable[[str], None]):
    self.index, self.size = index, size
    self.hub = Hub(index, self._deliver, self._lost, timeout)
    self._end = lost
    self._changed = threading.Condition()
    self._loop: asyncio.AbstractEventLoop | None = None
    self._jobs: dict[str, _Job] = {}
    self._tasks: set[asyncio.Task[None]] = set()
    self._in_hand: dict[str, list[int]] = {}  # process 0: jobs of a kind that each has
    self._owners: dict[str, tuple[str, int]] = {}  # process 0: kind and owner of a job in hand
    self._meetings = 0
    self._votes: dict[int, dict[int, Message]] = {}
    self._on_stop: Callable[[], object] = lambda: None
    self._is_meeting = self._stop_waits = False
    self._meeting_waiter: asyncio.Future[None] | None = None

  # ---- jobs ----

  async def share(self, kind: str, name: str, make: Callable[[], Awaitable[Value]]) -> Any:
    """The result of a job that all processes ask for and one does.

    Args:
      kind: jobs of a kind are dealt out evenly.
      name: says all that the result depends on.
      make: does the job; its JSON-able value, and whether that may serve later requests (else
        only those before the processes meet next).

    Raises:
      UserError: the job raised one, wherever it was done.
      RuntimeError: it failed otherwise on another process.
    """
    loop = self._loop = asyncio.get_running_loop()
    name = f"{kind}/{name}"
    deal = None
    with self._changed:
      job = self._jobs.setdefault(name, _Job())
      if job.make is None:
        job.make = make
        if self.index == 0 and job.answer is None:
          deal = {"type": "deal", "name": name, "to": self._pick(kind, name)}
        self._start(name, job)
      waiter: asyncio.Future[None] = loop.create_future()
      if job.answer is None:
        job.waiting.append(waiter)
      else:
        waiter.set_result(None)
    if deal is not None:
      self.hub.send(deal)
    await waiter
    answer = job.answer
    assert answer is not None
    if job.error is not None:
      raise job.error
    if answer.get("error"):
      raise UserError(answer["error"]) if answer["is_user"] else RuntimeError(answer["error"])
    return answer["value"]

  def _pick(self, kind: str, name: str) -> int:
    """The process with the fewest jobs of that kind in hand."""
    counts = self._in_hand.setdefault(kind, [0] * self.size)
    owner = counts.index(min(counts))
    counts[owner] += 1
    self._owners[name] = kind, owner
    return owner

  def _start(self, name: str, job: _Job) -> None:
    """Starts a job of this process once it was dealt and asked for; the lock is held."""
    if job.is_mine and not job.is_started and job.make is not None:
      job.is_started = True
      self._call(lambda: self._launch(name, job))

  def _launch(self, name: str, job: _Job) -> None:
    task = asyncio.ensure_future(self._do(name, job))
    self._tasks.add(task)
    task.add_done_callback(self._tasks.discard)

  async def _do(self, name: str, job: _Job) -> None:
    assert job.make is not None
    done: Message = {"type": "done", "name": name}
    try:
      value, keep = await job.make()
      done |= {"value": value, "keep": keep}
    except Exception as error:  # raised again wherever the job was asked for
      job.error = error
      text = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
      text = f"process {self.index}: {text}" if not isinstance(error, UserError) else text
      done |= {"error": text, "is_user": isinstance(error, UserError), "keep": False}
    self.hub.send(done)

  def _call(self, function: Callable[[], object]) -> None:
    """Runs a function in the event loop; nothing where that has ended."""
    if self._loop is None:
      return
    try:
      self._loop.call_soon_threadsafe(function)
    except RuntimeError:  # closed: nobody waits any more
      log.debug("a message came after the end of the event loop")

  # ---- meetings ----

  async def meet(self, facts: dict[str, Any], stop: int = 0) -> list[dict[str, Any]]:
    loop = self._loop = asyncio.get_running_loop()
    self._is_meeting = True  # what was said is said: a stop does not interrupt this
    number = self._vote(facts, stop or self.stop_number)
    waiter: asyncio.Future[None] = loop.create_future()
    with self._changed:
      if len(self._votes[number]) == self.size:
        waiter.set_result(None)
      else:
        self._meeting_waiter = waiter
    await waiter
    self._is_meeting = False
    found = self._close_meeting(number)
    if self._stop_waits and not self.is_stopped:
      self._call(self._on_stop)
    return found

  def meet_now(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
    number = self._vote(facts, 0)
    with self._changed:
      self._changed.wait_for(lambda: len(self._votes[number]) == self.size)
      return self._close_meeting(number)

  def _vote(self, facts: dict[str, Any], stop: int) -> int:
    number = self._meetings
    self._meetings += 1
    with self._changed:
      self._votes.setdefault(number, {})
    self.hub.send({"type": "vote", "number": number, "facts": facts, "stop": stop})
    return number

  def _close_meeting(self, number: int) -> list[dict[str, Any]]:
    votes = self._votes.pop(number)
    stops = [v["stop"] for v in votes.values() if v["stop"]]
    if stops:
      self.is_stopped, self.stop_number = True, self.stop_number or stops[0]
    return [votes[i]["facts"] for i in range(self.size)]

  def ask_stop(self, number: int) -> None:
    """Asks all processes to stop where they meet next."""
    self.hub.send({"type": "stop", "number": number})

  def on_stop(self, function: Callable[[], object]) -> None:
    """Sets what is called in the event loop when any process was asked to stop."""
    self._loop = asyncio.get_running_loop()
    self._on_stop = function
    if self.stop_number:
      self._call(self._stop_here)

  def _stop_here(self) -> None:
    if self._is_meeting:
      self._stop_waits = True
    else:
      self._on_stop()

  # ---- messages, in the common order ----

  def _deliver(self, message: Message) -> None:
    with self._changed:
      getattr(self, f"_got_{message['type']}")(message)
      self._changed.notify_all()

  def _got_deal(self, message: Message) -> None:
    if message["to"] == self.index:
      job = self._jobs.setdefault(message["name"], _Job())
      job.is_mine = True
      self._start(message["name"], job)

  def _got_done(self, message: Message) -> None:
    name = message["name"]
    if name in self._owners:
      kind, owner = self._owners.pop(name)
      self._in_hand[kind][owner] -= 1
    job = self._jobs.setdefault(name, _Job())
    job.answer = message
    waiting, job.waiting = job.waiting, []
    if waiting:
      self._call(lambda: _wake(waiting))

  def _got_vote(self, message: Message) -> None:
    votes = self._votes.setdefault(message["number"], {})
    votes[message["from"]] = message
    if len(votes) < self.size:
      return
    # Everything that was dealt before is done, and none of it is asked for any more.
    self._jobs = {n: j for n, j in self._jobs.items() if j.answer and j.answer["keep"]}
    waiter, self._meeting_waiter = self._meeting_waiter, None
    if waiter is not None:
      self._call(lambda: _wake([waiter]))

  def _got_stop(self, message: Message) -> None:
    if not self.stop_number:
      self.stop_number = message["number"]
      self._call(self._stop_here)

  def _got_bye(self, message: Message) -> None:
    del message

  def _got_fail(self, message: Message) -> None:
    if message["from"] != self.index:
      self._end(message["text"])

  def _lost(self, index: int, why: str) -> None:
    text = f"process {index} of {self.size} is lost: {why}"
    if self.index == 0:
      self.hub.send({"type": "fail", "text": text})
    self._end(text)


def _wake(waiting: Sequence[asyncio.Future[None]]) -> None:
  for waiter in waiting:
    if not waiter.done():  # else it was cancelled
      waiter.set_result(None)
