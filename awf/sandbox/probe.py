"""What the jail refuses on this host: tried in a jailed job, not read from version numbers."""

from __future__ import annotations

import ctypes
import dataclasses
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

NEEDED = {
  "file_read": "reading files outside the job's directory",
  "file_write": "writing outside the job's directory",
  "file_truncate": "emptying files outside the job's directory",
  "fork": "starting processes",
  "exec": "running other programs",
  "network": "opening sockets",
  "kill_parent": "signals to other processes",
  "signal_owner": "signals to other processes by a descriptor",
  "ptrace": "reading other processes",
  "environment": "the parent's environment variables",
}


@dataclasses.dataclass(frozen=True)
class ProbeReport:
  """Outcome of the probe.

  Attributes:
    layers: kernel layers by name, whether each is on.
    attempts: what a jailed job tried, with "refused: ..." or "possible".
  """

  layers: dict[str, bool]
  attempts: dict[str, str]

  @property
  def missing(self) -> tuple[str, ...]:
    """What the jail should refuse and does not, in words."""
    return tuple(
      text for name, text in NEEDED.items() if not self.attempts.get(name, "").startswith("refused")
    )

  @property
  def strong(self) -> bool:
    """Whether model-written code may run here."""
    return not self.missing

  def summary(self) -> str:
    """One line for the log."""
    on = [name for name, holds in self.layers.items() if holds]
    off = [name for name, holds in self.layers.items() if not holds]
    verdict = "strong" if self.strong else f"WEAK (possible: {'; '.join(self.missing)})"
    return f"sandbox {verdict}; on: {', '.join(on)}" + (f"; off: {', '.join(off)}" if off else "")


def attempts(payload: dict[str, Any], call: Any) -> dict[str, str]:
  """Entry of the probe job: tries each thing once; success has no effect beyond this job."""
  del call
  tries: dict[str, Callable[[], str]] = {
    "file_read": lambda: _read(payload["read"]),
    "file_write": lambda: _write(payload["write"]),
    "file_truncate": lambda: _truncate(payload["truncate"]),
    "fork": _fork,
    "exec": _exec,
    "network": _network,
    "kill_parent": lambda: _kill(os.getppid()),
    "signal_owner": _own,
    "ptrace": _ptrace,
    "environment": lambda: "possible" if os.environ else "refused: empty",
    "own_directory": lambda: _write("probe"),
  }
  return {name: _outcome(attempt) for name, attempt in tries.items()}


def _outcome(attempt: Callable[[], str]) -> str:
  try:
    return attempt()
  except OSError as error:
    return f"refused: {os.strerror(error.errno or 0)}"


def _read(paths: list[str]) -> str:
  refusals = []
  for path in paths:
    try:
      with open(path, "rb") as file:
        file.read(1)
    except OSError as error:
      refusals.append(os.strerror(error.errno or 0))
    else:
      return f"possible: {path}"
  return f"refused: {refusals[0]}" if refusals else "refused: nothing to read"


def _write(path: str) -> str:
  with open(path, "w") as file:
    file.write("x")
  os.unlink(path)
  return "possible"


def _truncate(path: str) -> str:
  os.truncate(path, 0)
  return "possible"


def _fork() -> str:
  pid = os.fork()
  if pid == 0:
    os._exit(0)
  os.waitpid(pid, 0)
  return "possible"


def _exec() -> str:
  try:
    os.execv("/nonexistent", ["nonexistent"])
  except FileNotFoundError:  # the kernel looked for it: the right is there
    return "possible"
  return "possible"


def _network() -> str:
  socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()
  return "possible"


def _kill(pid: int) -> str:
  os.kill(pid, 0 * signal.SIGTERM)  # signal 0 asks for the right only
  return "possible"


def _own() -> str:
  if sys.platform != "linux":
    return "refused: not on this platform"
  ends = os.pipe()
  try:
    fcntl.fcntl(ends[0], fcntl.F_SETOWN, os.getpid())
  finally:
    for end in ends:
      os.close(end)
  return "possible"


def _ptrace() -> str:
  if sys.platform != "linux":
    return "refused: not on this platform"
  library = ctypes.CDLL(None, use_errno=True)
  if library.ptrace(0x4206, os.getppid(), None, None) == 0:  # PTRACE_SEIZE
    library.ptrace(17, os.getppid(), None, None)  # PTRACE_DETACH
    return "possible"
  return f"refused: {os.strerror(ctypes.get_errno())}"
