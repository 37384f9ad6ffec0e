"""What runs in a job's process after the fork: jail, protocol, the job's entry, its result."""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import os
import random
import sys
import traceback
import types
from collections import deque
from typing import Any

from awf.sandbox import frames, jail
from awf.sandbox.loop import DeterministicLoop, DeterministicPolicy, VirtualTimeout

CHANNEL_FD = 3
EXIT_NO_MEMORY = 77
EXIT_LOST_PARENT = 79
MESSAGE_CHARS = 500
STDOUT_CHARS = 64_000
PROGRAM_FILE = "<program>"  # file name under which model-written source is compiled
BLOCKED_MODULES = ("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "torch", "tensorflow")


class CallError(Exception):
  """A call that the parent refused or that failed there; `kind` is a failure kind."""

  def __init__(self, kind: str, message: str) -> None:
    super().__init__(f"{kind}: {message}")
    self.kind = kind
    self.message = message


class JobError(Exception):
  """Raised by an entry to end its job with a failure of this kind."""

  def __init__(self, kind: str, message: str) -> None:
    super().__init__(message)
    self.kind = kind
    self.message = message


class CappedText(io.StringIO):
  """Standard output of a job: keeps the first characters, drops the rest."""

  def __init__(self, limit: int = STDOUT_CHARS) -> None:
    super().__init__()
    self._left = limit

  def write(self, text: str, /) -> int:
    if type(text) is not str:
      raise TypeError(f"write() argument must be str, not {frames.kind_name(type(text))}")
    if self._left > 0:
      super().write(text[: self._left])
      self._left -= len(text)
    return len(text)


class Channel:
  """The child's end of the protocol: numbered frames out, replies in call order in."""

  def __init__(self, descriptor: int, nonce: str, frame_bytes: int) -> None:
    self._fd = descriptor
    self._nonce = nonce
    self._frame_bytes = frame_bytes
    self._sequence = 0
    self._calls = 0
    self._waiting: deque[tuple[int, asyncio.Future[Any] | None]] = deque()

  def send(self, kind: str, **fields: Any) -> None:
    """Sends one frame; blocks until it is written.

    Raises:
      FrameError: no JSON form, or larger than the job may send.
    """
    data = frames.encode({"n": self._nonce, "i": self._sequence, "t": kind, **fields})
    if len(data) > self._frame_bytes:
      raise frames.FrameError(f"{len(data)} bytes, at most {self._frame_bytes} are allowed")
    self._sequence += 1
    view = memoryview(data)
    while view:
      view = view[os.write(self._fd, view) :]

  def outstanding(self) -> bool:
    """Whether a call waits for its reply."""
    return bool(self._waiting)

  async def call(self, method: str, params: Any = None) -> Any:
    """Asks the parent's handler.

    Raises:
      CallError: the handler refused or failed; kind "format" when `params` are not plain JSON.
    """
    number = self._send_call(method, params)
    future = asyncio.get_running_loop().create_future()
    self._waiting.append((number, future))
    return await future

  def call_sync(self, method: str, params: Any = None) -> Any:
    """`call` for code that is not asynchronous; no other call may be outstanding.

    Raises:
      CallError: as `call`.
    """
    if self._waiting:
      raise CallError("policy", "call_sync while another call is outstanding")
    number = self._send_call(method, params)
    self._waiting.append((number, None))
    reply = self._read_reply()
    if "e" in reply:
      raise CallError(*reply["e"])
    return reply["v"]

  def deliver(self) -> None:
    """Blocks for the reply to the oldest call and hands it to its future."""
    future = self._waiting[0][1]
    reply = self._read_reply()
    if future is None or future.done():  # cancelled meanwhile: its reply is read and dropped
      return
    if "e" in reply:
      future.set_exception(CallError(*reply["e"]))
    else:
      future.set_result(reply["v"])

  def _send_call(self, method: str, params: Any) -> int:
    fault = "a method name that is not a string" if type(method) is not str else None
    fault = fault or frames.json_fault(params) or frames.json_fault(method)
    if fault:
      raise CallError("format", f"a call's arguments must be plain JSON, got {fault}")
    number = self._calls
    try:
      self.send("call", c=number, m=method, p=params)
    except frames.FrameError as error:
      raise CallError("format", f"a call's arguments: {error}") from error
    self._calls += 1
    return number

  def _read_reply(self) -> dict[str, Any]:
    number, _ = self._waiting[0]
    self.send("wait")
    reply = read_frame(self._fd)
    if reply.get("n") != self._nonce or reply.get("c") != number:
      raise VirtualTimeout("a reply that does not belong to the oldest call")
    self._waiting.popleft()
    return reply


def read_frame(descriptor: int) -> dict[str, Any]:
  """Blocks for one frame of the parent; ends the process when the parent is gone."""
  (length,) = frames.HEADER.unpack(_read_exactly(descriptor, frames.HEADER.size))
  return frames.decode_trusted(_read_exactly(descriptor, length))


def _read_exactly(descriptor: int, length: int) -> bytes:
  parts = []
  while length:
    part = os.read(descriptor, min(length, 1 << 20))
    if not part:
      os._exit(EXIT_LOST_PARENT)
    parts.append(part)
    length -= len(part)
  return b"".join(parts)


def block_modules() -> None:
  """Makes the import of accelerator libraries fail, also for modules to be preloaded."""
  for name in BLOCKED_MODULES:
    sys.modules[name] = None  # type: ignore[assignment]


def describe(error: BaseException) -> str:
  """One capped line "Type: message (line n)"; survives exceptions whose methods lie or raise."""
  name = frames.kind_name(type(error))
  try:
    text = BaseException.__str__(error) if _is_builtin(type(error)) else str(error)
    text = text if type(text) is str else "unprintable"
  except BaseException as inner:  # the text of a foreign exception runs foreign code
    text = f"unprintable ({frames.kind_name(type(inner))})"
  line = _program_line(error)
  text = " ".join(text[: 2 * MESSAGE_CHARS].split())[:MESSAGE_CHARS]
  where = f" (line {line})" if line else ""
  return clean(f"{name}: {text}{where}" if text else f"{name}{where}")


def _is_builtin(kind: type) -> bool:
  return type.__dict__["__module__"].__get__(kind) == "builtins" and kind not in (
    KeyError,
    SyntaxError,
    OSError,
  )


def _program_line(error: BaseException) -> int:
  """Line of the model-written source that was running, 0 when there is none."""
  line = 0
  trace = error.__traceback__
  while isinstance(trace, types.TracebackType):
    if trace.tb_frame.f_code.co_filename == PROGRAM_FILE:
      line = trace.tb_lineno
    trace = trace.tb_next
  return line


def clean(text: str) -> str:
  """Replaces lone surrogates, so that the text can cross."""
  return text.encode("utf-8", "replace").decode("utf-8")


def failure_of(error: BaseException) -> tuple[str, str]:
  """The failure kind and message of an exception that ended a job."""
  if isinstance(error, (JobError, CallError)):
    # A job's own code can raise these with any kind; the parent refuses the kinds that are its own
    # to give.
    text = error.message
    return str(error.kind), clean(text if type(text) is str else describe(error))[:MESSAGE_CHARS]
  if isinstance(error, VirtualTimeout):
    return "timeout", describe(error)
  if isinstance(error, MemoryError):
    return "memory", "the job's memory limit was reached"
  return "crash", describe(error)


async def _as_coroutine(value: Any) -> Any:
  return await value


def _run_entry(entry: Any, payload: Any, channel: Channel) -> tuple[Any, float]:
  """Calls the entry; returns its value and the virtual seconds that its loop ran."""
  asyncio.set_event_loop_policy(DeterministicPolicy(channel.outstanding, channel.deliver))
  value = entry(payload, channel.call)
  if not inspect.isawaitable(value):
    return value, 0.0
  loop = DeterministicLoop(channel.outstanding, channel.deliver)
  loop.set_exception_handler(lambda _loop, _context: None)
  asyncio.set_event_loop(loop)
  return loop.run_until_complete(_as_coroutine(value)), loop.time()


def _run_job(job: dict[str, Any], channel: Channel) -> None:
  module, _, function = job["entry"].partition(":")
  stdout = sys.stdout = sys.stderr = CappedText()
  sys.stdin = io.StringIO()
  random.seed(job["seed"])
  numpy_random = sys.modules.get("numpy.random")
  if numpy_random is not None:
    numpy_random.seed(job["seed"] % 2**32)
  if module == "awf.sandbox.program":
    sys.modules[module].channel = channel  # type: ignore[attr-defined]
  outcome: dict[str, Any]
  try:
    value, virtual = _run_entry(getattr(sys.modules[module], function), job["payload"], channel)
    fault = frames.json_fault(value)
    if fault:
      outcome = {"f": ["format", f"the result must be plain JSON, got {fault}"]}
    else:
      outcome = {"v": value, "d": virtual}
  except BaseException as error:  # SystemExit and KeyboardInterrupt of a job end the job only
    outcome = {"f": failure_of(error)}
  output = clean(io.StringIO.getvalue(stdout))
  try:
    channel.send("result", s=output, **outcome)
  except frames.FrameError as error:
    channel.send("result", s="", f=["format", f"the result: {error}"])


def run_child(descriptor: int, plan: jail.JailPlan, spec: dict[str, Any], zygote_pid: int) -> None:
  """Runs one job in a freshly forked process and ends the process.

  Args:
    descriptor: the job's socket.
    spec: "nonce", "slot", "cwd", "memory_bytes", "cpu_seconds", "frame_bytes".
    zygote_pid: for the check that the zygote still lives.
  """
  try:
    os.setpgid(0, 0)  # a group of its own; Linux may share by session, so that stays the zygote's
    os.environ.clear()
    os.dup2(descriptor, CHANNEL_FD)
    os.dup2(1, 2)  # the zygote's stdout is the null device, its stderr is not
    jail.enter(
      plan,
      slot=spec["slot"],
      cwd=spec["cwd"],
      memory_bytes=spec["memory_bytes"],
      cpu_seconds=spec["cpu_seconds"],
      zygote_pid=zygote_pid,
    )
    os.closerange(CHANNEL_FD + 1, 1 << 16)
    jail.seal(plan)
    channel = Channel(CHANNEL_FD, spec["nonce"], spec["frame_bytes"])
    channel.send("ready")
  except (OSError, RuntimeError, ValueError) as error:
    message = f"{type(error).__name__}: {error}".encode()
    os.write(CHANNEL_FD, frames.encode({"t": "broken", "e": message.decode()[:MESSAGE_CHARS]}))
    os._exit(jail.EXIT_NO_JAIL)
  gc.enable()
  try:
    _run_job(read_frame(CHANNEL_FD), channel)
  except MemoryError:
    os._exit(EXIT_NO_MEMORY)
  except BaseException:  # the channel is broken: the parent classifies by what it saw
    traceback.clear_frames(sys.exc_info()[2])
    os._exit(1)
  os._exit(0)
