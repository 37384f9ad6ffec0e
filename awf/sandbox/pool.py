"""The parent's I/O thread: starts the zygote, schedules jobs, speaks the protocol, times and
classifies.

Everything that a child sends is untrusted: a frame that is malformed, misnumbered, forged or late
ends the job as a policy failure, and a well-formed result frame is the only success.
"""

from __future__ import annotations

import concurrent.futures
import logging
import secrets
import selectors
import socket
import tempfile
import threading
import time
from collections import Counter
from typing import Any

from awf.sandbox import frames, protocol, scratch
from awf.sandbox.launcher import ZygoteProcess
from awf.sandbox.mailbox import Mailbox
from awf.sandbox.schedule import Run, Schedule, threads_of
from awf.types import Failure, UserError

TICK_SECONDS = 0.2
EXIT_SECONDS = 20.0
MAX_RESTARTS = 5  # without a job that ended in between
FREE_THREADS = 8  # of a job; with more it is kept to one core, or they would crowd out this program
MOST_UNANSWERED = 1024  # calls of a job
PROGRAMS = "awf.sandbox.program"  # the module of the jobs that get the numeric libraries

_log = logging.getLogger(__name__)


class Pool:
  """Owner of the zygote and of all runs; public methods may be called from any thread."""

  def __init__(
    self, *, workers: int, max_children: int, preload: tuple[str, ...], numeric: bool
  ) -> None:
    self.root = tempfile.mkdtemp(prefix="awf-sandbox-")
    self._options = {"preload": list(preload), "numeric": numeric, "root": self.root}
    self._selector = selectors.DefaultSelector()
    self._mailbox = Mailbox()
    self._selector.register(self._mailbox.socket, selectors.EVENT_READ, "mailbox")
    self._zygote: ZygoteProcess | None = None
    self._schedule = Schedule(workers, max_children)
    self._restarts = 0
    self._restarts_in_a_row = 0
    self._next_tick = 0.0
    self._outcomes: Counter[str] = Counter()
    self._hello: concurrent.futures.Future[dict[str, Any]] = concurrent.futures.Future()
    self._thread = threading.Thread(target=self._main, name="awf-sandbox", daemon=True)

  # From any thread.

  def start(self) -> dict[str, Any]:
    """Starts the thread and the zygote; returns the zygote's report of layers.

    Raises:
      UserError: the zygote did not come up.
    """
    self._thread.start()
    return self._hello.result()

  def submit(self, run: Run) -> None:
    """Queues a run; its future gets the fields of a JobResult."""
    run.future.set_running_or_notify_cancel()
    if not self._mailbox.post(lambda: self._schedule.enqueue(run)):
      run.failure = Failure("infrastructure", "the sandbox is closed")
      run.future.set_result(run.outcome(0.0))

  def reply(self, run: Run, attempt: int, number: int, reply: dict[str, Any]) -> None:
    """Hands over the reply to a call: {"v": value} or {"e": [kind, message]}."""
    self._mailbox.post(lambda: self._take_reply(run, attempt, number, reply))

  def fail(self, run: Run, attempt: int, message: str) -> None:
    """Ends a run as an infrastructure failure."""
    failure = Failure("infrastructure", message)
    self._mailbox.post(lambda: self._stop(run, failure) if run.attempt == attempt else None)

  def cancel(self, run: Run) -> None:
    """Ends a run that nobody waits for any more."""
    self._mailbox.post(lambda: self._cancel(run))

  def stats(self) -> dict[str, Any]:
    """See Sandbox.stats."""
    zygote = self._zygote
    return {
      "jobs": sum(self._outcomes.values()),
      "outcomes": dict(self._outcomes),
      "queued": self._schedule.queued,
      "alive": len(self._schedule.alive),
      "running": self._schedule.running,
      "restarts": self._restarts,
      "zygote_pid": zygote.pid if zygote else 0,
    }

  def close(self) -> None:
    """Ends the thread, the zygote and every child."""
    self._mailbox.close()
    if self._thread.ident is not None and threading.current_thread() is not self._thread:
      self._thread.join()

  # The I/O thread.

  def _main(self) -> None:
    try:
      self._start_zygote()
      assert self._zygote is not None
      self._hello.set_result(self._zygote.hello)
    except BaseException as error:
      self._mailbox.close()
      self._hello.set_exception(error)
    try:
      while not self._mailbox.closed:
        self._turn()
    finally:
      self._mailbox.close()
      self._end()

  def _turn(self) -> None:
    for key, events in self._selector.select(self._timeout()):
      if key.data == "zygote":
        self._read_zygote()
      elif key.data != "mailbox" and key.data.sock is key.fileobj:
        if events & selectors.EVENT_WRITE:
          self._flush(key.data)
        if events & selectors.EVENT_READ and key.data.sock is not None:
          self._read_run(key.data)
    self._mailbox.run_all()
    if self._schedule.alive and time.monotonic() >= self._next_tick:
      self._tick()
    self._give_slots()

  def _timeout(self) -> float | None:
    if not self._schedule.alive:
      return None
    return max(0.0, self._next_tick - time.monotonic())

  def _start_zygote(self) -> None:
    self._zygote = ZygoteProcess(self._options)
    self._selector.register(self._zygote.control, selectors.EVENT_READ, "zygote")

  def _give_slots(self) -> None:
    while (run := self._schedule.next_resumed()) is not None:
      reply = run.replies.pop(run.next_reply)
      self._write(run, {"c": run.next_reply, **reply})
      run.next_reply += 1
    while (run := self._schedule.next_spawned()) is not None:
      if self._zygote is None:
        run.failure = run.failure or Failure("infrastructure", "the zygote does not start any more")
      if run.failure is None:
        self._spawn(run)
      else:
        self._schedule.remove(run)
        self._finish(run, 0.0)

  def _spawn(self, run: Run) -> None:
    assert self._zygote is not None
    run.nonce = secrets.token_hex(16)
    run.reader = frames.FrameReader(run.output_bytes)
    mine, theirs = socket.socketpair()
    mine.setblocking(False)
    run.sock = mine
    if len(self._schedule.alive) == 1:
      self._next_tick = run.since + TICK_SECONDS
    self._selector.register(mine, selectors.EVENT_READ, run)
    spec = {
      "op": "spawn",
      "id": run.number,
      "slot": run.slot,
      "is_numeric": run.message["entry"].partition(":")[0] == PROGRAMS,
      "nonce": run.nonce,
      "memory_bytes": run.memory_mb << 20,
      "cpu_seconds": run.cpu_seconds,
      "frame_bytes": run.output_bytes,
    }
    try:
      self._zygote.send(spec, theirs.fileno())
      self._write(run, run.message)
    except OSError as error:
      self._zygote_lost(str(error))
    finally:
      theirs.close()

  def _write(self, run: Run, message: dict[str, Any]) -> None:
    run.out += frames.encode({"n": run.nonce, **message})
    self._flush(run)

  def _flush(self, run: Run) -> None:
    if run.sock is None:
      return
    try:
      while run.out:
        del run.out[: run.sock.send(memoryview(run.out)[: 1 << 20])]
    except BlockingIOError:
      self._selector.modify(run.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, run)
      return
    except OSError:  # the child is gone; its exit report follows
      run.out.clear()
    self._selector.modify(run.sock, selectors.EVENT_READ, run)

  def _read_zygote(self) -> None:
    assert self._zygote is not None
    try:
      messages = self._zygote.receive()
    except OSError as error:
      self._zygote_lost(str(error))
      return
    for message in messages:
      run = self._schedule.alive.get(message["id"])
      if run is None:
        continue
      if message["op"] == "started":
        run.pid = message["pid"]
      elif message["op"] == "refused":
        self._detach(run)
        self._again(run, f"no process could be started: {message['error']}")
      elif message["op"] == "exit":
        self._exited(run, message)

  def _read_run(self, run: Run) -> bool:
    """Reads once from a job's socket; False when nothing more comes."""
    assert run.sock is not None and run.reader is not None
    try:
      data = run.sock.recv(1 << 16)
    except BlockingIOError:
      return False
    except OSError:
      data = b""
    if not data or run.dying:
      self._close_socket(run)  # its exit report follows
      return False
    run.bytes_in += len(data)
    try:
      if run.bytes_in > 4 * run.output_bytes:
        raise frames.FrameError(f"more than {4 * run.output_bytes} bytes in all")
      for body in run.reader.feed(data):
        self._take_frame(run, frames.decode(body))
        if run.dying:
          break
    except frames.FrameError as error:
      self._stop(run, Failure("policy", f"protocol: {error}"))
    return True

  def _take_frame(self, run: Run, message: dict[str, Any]) -> None:
    kind = protocol.check_frame(run, message)
    if kind == "ready":
      run.ready, run.since = True, time.monotonic()
    elif kind == "broken":
      self._stop(run, Failure("infrastructure", f"jail: {protocol.printable(message['e'])[:300]}"))
    elif kind == "call":
      self._dispatch(run, message)
    elif kind == "wait":
      self._schedule.park(run)
    else:
      run.result = message
      self._kill(run)

  def _dispatch(self, run: Run, message: dict[str, Any]) -> None:
    run.calls += 1
    if run.calls > run.max_calls:
      self._stop(run, Failure("policy", f"more than {run.max_calls} calls"))
    elif run.unanswered > MOST_UNANSWERED:
      self._stop(run, Failure("policy", f"more than {MOST_UNANSWERED} calls at a time"))
    elif run.on_call is None:
      run.replies[message["c"]] = {"e": ["policy", "this job may not make calls"]}
    else:
      try:
        run.on_call(run.attempt, message["c"], message["m"], message["p"])
      except RuntimeError as error:  # the caller's event loop is closed
        self._stop(run, Failure("infrastructure", f"nobody answers calls: {error}"))

  def _take_reply(self, run: Run, attempt: int, number: int, reply: dict[str, Any]) -> None:
    if attempt != run.attempt or number < run.next_reply or run.dying:
      return
    if "e" in reply and reply["e"][0] == "infrastructure":
      run.infrastructure_call = True
    run.replies[number] = reply
    if run.parked and number == run.next_reply:
      self._schedule.make_resumable(run)

  def _cancel(self, run: Run) -> None:
    run.attempt = 1  # not to be tried again
    self._stop(run, Failure("infrastructure", "cancelled"))

  def _stop(self, run: Run, failure: Failure) -> None:
    if run.dying or run.failure is not None or run.future.done():
      return
    run.failure = failure
    if run.number in self._schedule.alive:
      self._kill(run)

  def _kill(self, run: Run) -> None:
    self._schedule.stop_clock(run)
    run.dying, run.since = True, time.monotonic()
    self._order("kill", run)

  def _order(self, what: str, run: Run) -> None:
    assert self._zygote is not None
    try:
      self._zygote.send({"op": what, "id": run.number})
    except OSError as error:
      self._zygote_lost(str(error))

  def _exited(self, run: Run, report: dict[str, Any]) -> None:
    while not run.dying and run.sock is not None and self._read_run(run):
      pass
    self._schedule.stop_clock(run)
    self._detach(run)
    failure = protocol.verdict(run, report)
    self._restarts_in_a_row = 0
    if failure is not None and failure.kind == "infrastructure" and not run.ready:
      self._again(run, failure.message)
    else:
      run.failure = failure
      self._finish(run, report["cpu"])

  def _detach(self, run: Run) -> None:
    """Takes a run whose process is gone out of the books."""
    self._close_socket(run)
    self._schedule.remove(run)

  def _close_socket(self, run: Run) -> None:
    if run.sock is not None:
      self._selector.unregister(run.sock)
      run.sock.close()
      run.sock = None

  def _again(self, run: Run, reason: str) -> None:
    """Second attempt for a run that lost its process through no fault of its own."""
    if run.attempt == 0:
      run.start_again()
      self._schedule.enqueue(run, first=True)
    else:
      run.failure = Failure("infrastructure", reason)
      self._finish(run, 0.0)

  def _finish(self, run: Run, cpu: float) -> None:
    if run.future.done():
      return
    self._outcomes[run.failure.kind if run.failure else "ok"] += 1
    run.future.set_result(run.outcome(cpu))

  def _tick(self) -> None:
    now = time.monotonic()
    self._next_tick = now + TICK_SECONDS
    for run in list(self._schedule.alive.values()):
      if run.number not in self._schedule.alive:
        continue  # the zygote was lost on the way, and this one begins anew
      if run.dying:
        if now - run.since > EXIT_SECONDS:
          self._zygote_lost("it does not end a child")
          return
      else:
        failure = protocol.over_budget(run, now)
        if failure is not None:
          self._stop(run, failure)
        elif run.running and threads_of(run.pid) > FREE_THREADS:
          self._order("pin", run)  # in every tick: some may have begun while others were pinned

  def _zygote_lost(self, reason: str) -> None:
    """The zygote died or hangs: ends it, starts another, repeats what was in flight."""
    zygote, self._zygote = self._zygote, None
    if zygote is None:
      return
    _log.warning("the sandbox's zygote is lost (%s); starting another", reason)
    self._selector.unregister(zygote.control)
    zygote.kill()
    lost = list(self._schedule.alive.values())
    for run in lost:
      self._detach(run)
    self._restarts += 1
    self._restarts_in_a_row += 1
    if self._restarts_in_a_row <= MAX_RESTARTS:
      try:
        self._start_zygote()
      except (UserError, OSError) as error:
        _log.error("the sandbox's zygote does not start: %s", error)
    for run in reversed(lost):
      if run.failure is not None or run.result is not None:
        run.failure = protocol.verdict(run, {"code": 0, "cpu": 0.0, "rss": 0})
        self._finish(run, 0.0)
      else:
        self._again(run, f"the zygote was lost: {reason}")

  def _end(self) -> None:
    if self._zygote is not None:
      self._selector.unregister(self._zygote.control)
      self._zygote.close()
    self._mailbox.run_all()
    for run in [*self._schedule.alive.values(), *self._schedule.drain()]:
      self._close_socket(run)
      run.failure = run.failure or Failure("infrastructure", "the sandbox was closed")
      self._finish(run, 0.0)
    self._schedule.alive.clear()
    self._selector.close()
    self._mailbox.release()
    scratch.remove(self.root)
