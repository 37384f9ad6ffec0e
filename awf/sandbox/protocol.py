"""Reading of an untrusted child's frames, and the verdict on how its process ended."""

from __future__ import annotations

import signal
from typing import Any

from awf.sandbox import frames
from awf.sandbox.child import EXIT_NO_MEMORY, MESSAGE_CHARS, STDOUT_CHARS
from awf.sandbox.schedule import Run, cpu_of
from awf.types import FAILURE_KINDS, Failure

SETUP_SECONDS = 30.0
PARKED_CPU_SECONDS = 0.3

_KEYS = {
  "ready": ({"n", "i", "t"},),
  "wait": ({"n", "i", "t"},),
  "call": ({"n", "i", "t", "c", "m", "p"},),
  "result": ({"n", "i", "t", "s", "v", "d"}, {"n", "i", "t", "s", "f"}),
}


def check_frame(run: Run, message: dict[str, Any]) -> str:
  """Checks one decoded frame against the state of its run and counts it.

  Returns:
    "ready", "call", "wait", "result", or "broken" (no jail, and no code of the job ran).

  Raises:
    frames.FrameError: malformed, forged, repeated, or out of order.
  """
  kind = message.get("t")
  if kind == "broken" and run.sequence == 0 and type(message.get("e")) is str:
    return "broken"
  if type(kind) is not str or set(message) not in _KEYS.get(kind, ()):
    raise frames.FrameError("not a frame of the protocol")
  if message["n"] != run.nonce:
    raise frames.FrameError("the nonce of another job")
  if type(message["i"]) is not int or message["i"] != run.sequence:
    raise frames.FrameError("a repeated or missing frame")
  run.sequence += 1
  if (kind == "ready") == run.ready:
    raise frames.FrameError(f"an unexpected {kind} frame")
  if run.parked:
    raise frames.FrameError(f"a {kind} frame while it waits for a reply")
  if kind == "call" and (type(message["c"]) is not int or message["c"] != run.calls):
    raise frames.FrameError("a call out of order")
  if kind == "call" and (type(message["m"]) is not str or len(message["m"]) > 100):
    raise frames.FrameError("a method name that is none")
  if kind == "wait" and run.calls <= run.next_reply:
    raise frames.FrameError("a wait without a call")
  if kind == "result":
    _check_result(message)
  return kind


def _check_result(message: dict[str, Any]) -> None:
  if type(message["s"]) is not str or len(message["s"]) > STDOUT_CHARS:
    raise frames.FrameError("captured output that is none")
  if "f" in message:
    failure = message["f"]
    if (
      type(failure) is not list
      or len(failure) != 2
      or any(type(part) is not str for part in failure)
      or failure[0] not in FAILURE_KINDS
    ):
      raise frames.FrameError("a failure that is none")
  elif type(message["d"]) not in (int, float) or not 0 <= message["d"] < 1e9:
    raise frames.FrameError("a virtual time that is none")


def verdict(run: Run, report: dict[str, Any]) -> Failure | None:
  """Why a run whose process has ended counts as failed, None when it succeeded.

  Args:
    report: the zygote's exit report: "code" (exit status, negative for a signal), "cpu" seconds,
      "rss" KiB, "full".
  """
  if run.failure is not None:
    return run.failure
  if run.result is not None:
    if "f" not in run.result:
      return None
    kind, message = run.result["f"]
    message = printable(message)[:MESSAGE_CHARS]
    if kind == "infrastructure" and not run.infrastructure_call:
      return Failure(
        "policy", f"a job cannot end as an infrastructure failure by itself: {message}"
      )
    return Failure(kind, message)
  code = report["code"]
  if not run.ready:
    return Failure("infrastructure", f"the child ended before its job began (status {code})")
  if report.get("full"):
    return Failure("policy", "the job filled its directory")
  if code == EXIT_NO_MEMORY:
    return Failure("memory", "the job's memory limit was reached")
  if code == -signal.SIGXCPU or (code == -signal.SIGKILL and report["cpu"] >= run.cpu_seconds):
    return Failure("timeout", f"more than {run.cpu_seconds:g} s of processor time")
  if code == -signal.SIGKILL and report["rss"] * 1024 > 0.8 * (run.memory_mb << 20):
    return Failure("memory", "the process was killed near its memory limit")
  if code < 0:
    names = {s.value: s.name for s in signal.Signals}
    return Failure("crash", f"the process died of {names.get(-code, f'signal {-code}')}")
  return Failure("crash", f"the process ended with status {code} and without a result")


def over_budget(run: Run, now: float) -> Failure | None:
  """Why a living run has to end, None when it may go on; `now` is of the monotonic clock."""
  if not run.ready:
    if now - run.since > SETUP_SECONDS:
      return Failure("infrastructure", "the child did not begin its job in time")
    return None
  cpu = cpu_of(run.pid)
  if cpu > run.cpu_seconds:
    return Failure("timeout", f"more than {run.cpu_seconds:g} s of processor time")
  if run.running and run.wall + now - run.since > run.wall_seconds:
    return Failure("timeout", f"more than {run.wall_seconds:g} s of running time")
  if run.parked and cpu - run.cpu_parked > PARKED_CPU_SECONDS:
    return Failure("policy", "it kept running while it said that it waits for a reply")
  return None


def printable(text: str) -> str:
  """One line without control characters."""
  return "".join(c if c.isprintable() else " " for c in text)
