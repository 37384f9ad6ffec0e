"""The process that forks the jobs: single-threaded, preloaded, without accelerator libraries.

It is started by the parent as a fresh interpreter, imports what jobs may need, freezes its heap and
then serves control frames on one Unix socket: `spawn` (with the job's socket as SCM_RIGHTS),
`kill`, `pin` (to one core). It reports `started` and `exit` and ends when the parent closes the
socket.

Numeric libraries make a process so large that its fork, its page faults and its end cost twice as
much. Only a second zygote has them, forked from the first; programs are forked from that one, and
its frames go through the first.
"""

from __future__ import annotations

import array
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from awf.sandbox import child, frames, jail, scratch

_LIBRARY = (
  "__future__ abc array ast asyncio base64 binascii bisect calendar cmath collections "
  "collections.abc contextlib "
  "copy csv dataclasses datetime decimal difflib enum fractions functools graphlib hashlib "
  "heapq hmac html inspect "
  "io itertools json keyword linecache locale math numbers operator pprint queue random re "
  "secrets statistics "
  "string struct sys textwrap threading time timeit token tokenize traceback types typing "
  "unicodedata unittest uuid "
  "warnings weakref zlib concurrent.futures concurrent.futures.thread encodings.idna "
  "encodings.ascii "
  "encodings.latin_1 encodings.utf_16 encodings.utf_32"
)
_NUMERIC = (
  "numpy numpy.linalg numpy.fft numpy.random numpy.polynomial sympy sympy.ntheory "
  "sympy.geometry sympy.combinatorics "
  "sympy.stats sympy.solvers.diophantine sympy.solvers.inequalities "
  "sympy.functions.combinatorial.numbers "
  "sympy.parsing.sympy_parser sympy.logic.inference sympy.series.sequences mpmath"
)
_POLICE_SECONDS = 0.2


class Zygote:
  """State of the zygote: the children that live, by job number."""

  def __init__(
    self,
    control: socket.socket,
    plan: jail.JailPlan,
    root: str,
    numeric: NumericZygote | None = None,
  ) -> None:
    self._control = control
    self._numeric = numeric
    self._plan = plan
    self._root = root
    self._children: dict[int, tuple[int, str]] = {}  # job number -> (pid, private directory or "")
    self._policed: set[int] = set()
    self._reader = frames.FrameReader(frames.REPLY_BYTES)
    self._descriptors: list[int] = []
    self._wake_read, self._wake_write = os.pipe()
    os.set_blocking(self._wake_write, False)
    os.set_blocking(self._wake_read, False)

  def serve(self) -> None:
    """Serves until the parent closes the control socket."""
    signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    watched = [self._control.fileno(), self._wake_read]
    if self._numeric is not None:
      watched.append(self._numeric.socket.fileno())
    while True:
      police = bool(self._children) and not self._plan.private_tmp
      ready, _, _ = select.select(watched, [], [], _POLICE_SECONDS if police else None)
      if self._wake_read in ready:
        try:
          os.read(self._wake_read, 4096)
        except BlockingIOError:
          pass
        self._reap()
      if self._control.fileno() in ready and not self._receive():
        return
      if self._numeric is not None and self._numeric.socket.fileno() in ready:
        reports = self._numeric.receive()
        if not reports:
          return  # it is lost, and what it had started
        for report in reports:
          self._send(report)
      if police:
        self._police()

  def end(self) -> None:
    """Kills what lives and removes the private directories."""
    for pid, _ in self._children.values():
      os.kill(pid, signal.SIGKILL)
    for pid, _ in self._children.values():
      os.waitpid(pid, 0)
    if self._numeric is not None:
      self._numeric.end()
    scratch.remove(self._root)

  def _receive(self) -> bool:
    size = array.array("i", [0] * 16)
    data, ancillary, _, _ = self._control.recvmsg(1 << 16, socket.CMSG_SPACE(size.itemsize * 16))
    for level, kind, body in ancillary:
      if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
        received = array.array("i")
        received.frombytes(body[: len(body) - len(body) % received.itemsize])
        self._descriptors += received
    if not data:
      return False
    for body in self._reader.feed(data):
      self._handle(frames.decode_trusted(body))
    return True

  def _handle(self, message: dict[str, Any]) -> None:
    if message["op"] == "spawn":
      descriptor = self._descriptors.pop(0)
      if self._numeric is not None and message["is_numeric"]:
        self._numeric.send(message, descriptor)
        os.close(descriptor)
      else:
        self._spawn(message, descriptor)
    elif message["id"] in self._children:
      pid, _ = self._children[message["id"]]
      if message["op"] == "kill":
        os.kill(pid, signal.SIGKILL)
      else:
        jail.pin(pid, message["id"])
    elif self._numeric is not None:
      self._numeric.send(message)

  def _spawn(self, message: dict[str, Any], descriptor: int) -> None:
    number, parent = message["id"], os.getpid()
    directory = ""
    try:
      if not self._plan.private_tmp:
        directory = self._make_directory(number, message["slot"])
      pid = os.fork()
    except OSError as error:
      os.close(descriptor)
      self._send({"op": "refused", "id": number, "error": str(error)})
      return
    if pid == 0:
      self._forget()
      spec = {**message, "cwd": directory or os.path.join(self._root, "mount")}
      try:
        child.run_child(descriptor, self._plan, spec, parent)
      finally:
        os._exit(1)
    os.close(descriptor)
    self._children[number] = (pid, directory)
    self._send({"op": "started", "id": number, "pid": pid})

  def _forget(self) -> None:
    """In the child: gives up what belongs to the zygote. Descriptors are closed by number later."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    self._control.detach()
    self._children.clear()

  def _make_directory(self, number: int, slot: int) -> str:
    directory = os.path.join(self._root, str(number))
    os.mkdir(directory, 0o700)
    if self._plan.drops_uid:
      os.chown(directory, jail.FIRST_UID + slot, jail.FIRST_UID + slot)
    return directory

  def _reap(self) -> None:
    by_pid = {pid: number for number, (pid, _) in self._children.items()}
    while self._children:
      pid, status, usage = os.wait4(-1, os.WNOHANG)
      if pid == 0:
        return
      if pid not in by_pid:
        continue  # the numeric zygote: its socket says so too
      number = by_pid[pid]
      _, directory = self._children.pop(number)
      full = number in self._policed
      self._policed.discard(number)
      if directory:
        scratch.remove(directory)
      self._send(
        {
          "op": "exit",
          "id": number,
          "code": os.waitstatus_to_exitcode(status),
          "cpu": usage.ru_utime + usage.ru_stime,
          "rss": usage.ru_maxrss,
          "full": full,
        }
      )

  def _police(self) -> None:
    """Where no tmpfs limits a job's directory: ends a job that fills it."""
    for number, (pid, directory) in self._children.items():
      if directory and scratch.is_full(directory, jail.SCRATCH_FILES, jail.SCRATCH_BYTES):
        self._policed.add(number)
        os.kill(pid, signal.SIGKILL)

  def _send(self, message: dict[str, Any]) -> None:
    self._control.sendall(frames.encode(message))


class NumericZygote:
  """The first zygote's side of the second one.

  Attributes:
    socket: its control socket.
    missing: numeric modules that are not installed.
  """

  def __init__(self, plan: jail.JailPlan, root: str, control: socket.socket) -> None:
    """Forks it and waits until it has imported what it is for."""
    self.socket, theirs = socket.socketpair()
    self._reader = frames.FrameReader(frames.REPLY_BYTES)
    self._pid = os.fork()
    if self._pid == 0:
      try:
        self.socket.close()
        control.close()
        _serve_numeric(theirs, plan, root)
      finally:
        os._exit(0)
    theirs.close()
    greeting = self.receive()
    if not greeting:
      raise RuntimeError("the numeric libraries could not be preloaded")
    self.missing: list[str] = greeting[0]["missing"]

  def send(self, message: dict[str, Any], descriptor: int | None = None) -> None:
    """Passes on a control frame of the parent's, with the job's socket."""
    ancillary = []
    if descriptor is not None:
      rights = array.array("i", [descriptor])
      ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)]
    data = frames.encode(message)
    sent = self.socket.sendmsg([data], ancillary)
    if sent < len(data):
      self.socket.sendall(data[sent:])

  def receive(self) -> list[dict[str, Any]]:
    """Waits for its reports; none when it is gone."""
    reports: list[dict[str, Any]] = []
    while not reports:
      data = self.socket.recv(1 << 16)
      if not data:
        return []
      reports = [frames.decode_trusted(body) for body in self._reader.feed(data)]
    return reports

  def end(self) -> None:
    """Closes its socket, at which it kills its children and ends, and waits for it."""
    self.socket.close()
    with contextlib.suppress(ChildProcessError):  # it has been waited for
      os.waitpid(self._pid, 0)


def _serve_numeric(control: socket.socket, plan: jail.JailPlan, root: str) -> None:
  """What the second zygote does, from its fork to its end."""
  missing = _preload(_NUMERIC.split(), optional=True)
  _warm_up()
  plan.base_bytes = _address_space()
  gc.collect()
  gc.freeze()
  control.sendall(frames.encode({"op": "hello", "missing": missing}))
  zygote = Zygote(control, plan, root)
  try:
    zygote.serve()
  finally:
    zygote.end()


def _preload(names: Sequence[str], *, optional: bool) -> list[str]:
  missing = []
  for name in names:
    try:
      importlib.import_module(name)
    except ImportError:
      if not optional:
        raise
      missing.append(name)
  return missing


def _address_space() -> int:
  try:
    with open("/proc/self/statm") as file:
      return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  except FileNotFoundError:
    return 0


def main() -> None:
  """Entry of the zygote: argv holds the control descriptor and a JSON object of options."""
  control = socket.socket(fileno=int(sys.argv[1]))
  options = json.loads(sys.argv[2])
  sys.path[:] = options["path"] + sys.path
  sys.dont_write_bytecode = True
  if hasattr(signal, "SIGINT"):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
  gc.disable()
  child.block_modules()
  _preload(_LIBRARY.split(), optional=True)
  _preload(["awf.sandbox.program", "awf.sandbox.probe", *options["preload"]], optional=False)
  _warm_up()
  plan = jail.make_plan()
  root = options["root"]
  os.makedirs(os.path.join(root, "mount"), mode=0o700, exist_ok=True)
  os.chmod(root, 0o711)
  if "mnt" in plan.namespaces:
    plan.private_tmp = jail.try_private_tmp(os.path.join(root, "mount"))
  numeric = NumericZygote(plan, root, control) if options["numeric"] else None
  plan.base_bytes = _address_space()
  gc.collect()
  gc.freeze()
  zygote = Zygote(control, plan, root, numeric)
  report = {
    "layers": plan.layers(),
    "landlock_abi": plan.landlock_abi,
    "namespaces": list(plan.namespaces),
    "missing": numeric.missing if numeric is not None else [],
  }
  control.sendall(frames.encode({"op": "hello", **report}))
  try:
    zygote.serve()
  finally:
    zygote.end()


def _warm_up() -> None:
  """Runs what fills caches that every child would otherwise fill again."""
  program = sys.modules["awf.sandbox.program"]
  program.run_program({"source": "import re\ndef solve():\n  return 1", "function": "solve"}, None)


if __name__ == "__main__":
  main()
