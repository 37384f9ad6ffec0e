"""Starting, greeting and ending the zygote process."""

from __future__ import annotations

import array
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

from awf.sandbox import frames
from awf.types import UserError

START_SECONDS = 120.0
STOP_SECONDS = 5.0

_CODE = (
  "import json, sys; sys.path[:] = json.loads(sys.argv[2])['path']; "
  "from awf.sandbox.zygote import main; main()"
)


class ZygoteProcess:
  """A running zygote and its control socket.

  Attributes:
    control: stream of control frames.
    hello: the zygote's report of the host's layers.

  Raises:
    UserError: it ended or hung before it was ready; the message has the last line of its error
      output.
  """

  def __init__(self, options: dict[str, Any]) -> None:
    self.control, theirs = socket.socketpair()
    self._reader = frames.FrameReader(frames.REPLY_BYTES)
    self._errors = tempfile.TemporaryFile()
    arguments = json.dumps({**options, "path": _search_path()})
    command = [sys.executable, "-S", "-s", "-P", "-B", "-c", _CODE]
    try:
      self._process = subprocess.Popen(
        [*command, str(theirs.fileno()), arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=self._errors,
        pass_fds=(theirs.fileno(),),
        env=_environment(),
        cwd="/",
        start_new_session=True,
      )
    finally:
      theirs.close()
    self.pid = self._process.pid
    try:
      self.hello = self._greet()
    except BaseException:
      self.close()
      raise

  def send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
    """Sends one control frame, with a descriptor to hand over.

    Raises:
      OSError: the zygote is gone, or has not read for a long time.
    """
    data = frames.encode(message)
    ancillary = []
    if descriptor is not None:
      ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    sent = self.control.sendmsg([data], ancillary)
    if sent < len(data):
      self.control.sendall(data[sent:])

  def receive(self) -> list[dict[str, Any]]:
    """Reads what has arrived.

    Raises:
      OSError: the zygote is gone.
    """
    data = self.control.recv(1 << 16)
    if not data:
      raise ConnectionResetError("the zygote closed its socket")
    return [frames.decode_trusted(body) for body in self._reader.feed(data)]

  def close(self) -> None:
    """Closes the control socket, at which the zygote ends its children and itself, or is killed."""
    self.control.close()
    try:
      self._process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    self._errors.close()

  def kill(self) -> None:
    """Ends a zygote that does not answer; its children get the death signal."""
    self._process.kill()
    self.close()

  def _greet(self) -> dict[str, Any]:
    self.control.settimeout(STOP_SECONDS)  # later sends must not block for long
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
      readable, _, _ = select.select([self.control], [], [], max(0.0, deadline - time.monotonic()))
      if not readable:
        break
      try:
        messages = self.receive()
      except OSError:
        self._process.wait(STOP_SECONDS)
        raise UserError(f"the sandbox's zygote did not start: {self._last_error()}") from None
      if messages:
        return messages[0]
    raise UserError(f"the sandbox's zygote was not ready after {START_SECONDS:.0f} s")

  def _last_error(self) -> str:
    self._errors.seek(0)
    lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:500] if lines else f"exit status {self._process.returncode}"


def _environment() -> dict[str, str]:
  """Nothing of the parent's: a fixed hash seed and one thread for numeric libraries."""
  threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "VECLIB", "NUMEXPR")}
  return {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "PATH": os.defpath, **threads}


def _search_path() -> list[str]:
  """The parent's module path with the root of this package in front."""
  root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
  paths = [root, *(os.path.abspath(p) for p in sys.path if p)]
  return list(dict.fromkeys(p for p in paths if os.path.exists(p)))
