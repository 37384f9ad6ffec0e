"""Commands from any thread to the thread that sits in a selector."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable


class Mailbox:
  """A queue of commands whose `socket` becomes readable when one was posted."""

  def __init__(self) -> None:
    self.socket, self._bell = socket.socketpair()
    self.socket.setblocking(False)
    self._bell.setblocking(False)
    self._commands: deque[Callable[[], None]] = deque()
    self._lock = threading.Lock()
    self._closed = False

  @property
  def closed(self) -> bool:
    """Whether commands are refused."""
    return self._closed

  def post(self, command: Callable[[], None]) -> bool:
    """Queues a command; False when the mailbox is closed."""
    with self._lock:
      if self._closed:
        return False
      self._commands.append(command)
    self._ring()
    return True

  def run_all(self) -> None:
    """Runs what is queued, in the owner's thread."""
    with contextlib.suppress(BlockingIOError):
      self.socket.recv(4096)
    while self._commands:
      self._commands.popleft()()

  def close(self) -> bool:
    """Refuses commands from now on and wakes the owner; False when it was closed before."""
    with self._lock:
      if self._closed:
        return False
      self._closed = True
    self._ring()
    return True

  def release(self) -> None:
    """Closes the sockets; for the owner, when it has ended."""
    self.socket.close()
    self._bell.close()

  def _ring(self) -> None:
    # A full buffer wakes the owner as well; released sockets have nobody to wake.
    with contextlib.suppress(OSError):
      self._bell.send(b"x")
