"""Messages among the processes of a run, in one order that is the same for all: process 0 relays
them over TCP.

Frames are JSON behind their length. A process whose connection ends without a farewell, or that
says nothing for too long, is lost. JAX is not needed here.
"""

from __future__ import annotations

import hmac
import json
import logging
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

log = logging.getLogger(__name__)

Message = dict[str, Any]

_LENGTH = struct.Struct(">Q")
_MAX_FRAME = 1 << 32
_TICK = 1.0  # seconds between two looks at who was silent
_PING_EVERY = 3  # ticks
_HELLO_SECONDS = 30.0  # that a connection has to say who it is


def encode(message: Message) -> bytes:
  data = json.dumps(message).encode()
  return _LENGTH.pack(len(data)) + data


def read_frame(sock: socket.socket) -> Message | None:
  """The next message, or None at the end of the connection.

  Raises:
    OSError: the connection broke.
    ValueError: what came is no message.
  """
  head = _read(sock, _LENGTH.size)
  if head is None:
    return None
  (size,) = _LENGTH.unpack(head)
  if size > _MAX_FRAME:
    raise ValueError(f"a frame of {size} bytes")
  data = _read(sock, size)
  return None if data is None else json.loads(data)


def _read(sock: socket.socket, size: int) -> bytes | None:
  parts, left = [], size
  while left:
    part = sock.recv(min(left, 1 << 20))
    if not part:
      return None
    parts.append(part)
    left -= len(part)
  return b"".join(parts)


class Link:
  """One connection: a thread that reads and one that writes.

  Attributes:
    silent: ticks since anything came.
  """

  def __init__(
    self,
    sock: socket.socket,
    receive: Callable[[Message], None],
    ended: Callable[[str], None],
  ):
    self.silent = 0
    self._sock, self._receive, self._ended = sock, receive, ended
    self._out: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    self._reader = threading.Thread(target=self._read, name="awf-hub-read", daemon=True)
    self._writer = threading.Thread(target=self._write, name="awf-hub-write", daemon=True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(None)

  def start(self) -> None:
    self._reader.start()
    self._writer.start()

  def put(self, frame: bytes) -> None:
    self._out.put(frame)

  def close(self, seconds: float = 5.0) -> None:
    """Sends what is queued, then says that no more comes."""
    self._out.put(None)
    if self._writer is not threading.current_thread():
      self._writer.join(seconds)

  def wait(self, seconds: float) -> None:
    """Until the other side has closed, at most so long."""
    if self._reader is not threading.current_thread():
      self._reader.join(seconds)

  def _read(self) -> None:
    why = "its connection closed"
    try:
      while (message := read_frame(self._sock)) is not None:
        self.silent = 0
        self._receive(message)
    except (OSError, ValueError) as error:
      why = f"its connection broke: {error}"
    self._ended(why)

  def _write(self) -> None:
    try:
      while (frame := self._out.get()) is not None:
        self._sock.sendall(frame)
      self._sock.shutdown(socket.SHUT_WR)
    except OSError as error:  # the reader sees the end of the connection, and says so
      log.debug("a message could not be sent: %s", error)


class Hub:
  """One process's end of the exchange.

  Args:
    index: of this process.
    deliver: called with each message, in the common order, by one thread at a time; must not block
      and must not send.
    lost: called with (index, why) of a process that is gone without a farewell.
    timeout: seconds of silence after which a process counts as lost.
  """

  def __init__(
    self,
    index: int,
    deliver: Callable[[Message], None],
    lost: Callable[[int, str], None],
    timeout: float,
  ):
    self.index = index
    self._deliver, self._lost = deliver, lost
    self._limit = max(2 * _PING_EVERY, int(timeout / _TICK))
    self._links: dict[int, Link] = {}
    self._gone: set[int] = set()  # said farewell, or reported as lost
    self._order = threading.Lock()
    self._ticker = threading.Thread(target=self._tick, name="awf-hub-tick", daemon=True)

  def serve(self, server: socket.socket, size: int, token: str, seconds: float) -> None:
    """Process 0: waits for all others.

    Raises:
      TimeoutError: not all came in time.
    """
    deadline = time.monotonic() + seconds
    with server:
      while len(self._links) < size - 1:
        server.settimeout(max(0.01, deadline - time.monotonic()))
        sock, address = server.accept()
        try:
          sock.settimeout(_HELLO_SECONDS)
          hello = read_frame(sock) or {}
          other = hello.get("hello")
          is_known = hmac.compare_digest(str(hello.get("token")), token)
          if not is_known or type(other) is not int or not 0 < other < size:
            raise ValueError("not a process of this run")
        except (OSError, ValueError) as error:
          log.warning("a connection from %s was refused: %s", address, error)
          sock.close()
          continue
        self._add(other, sock)
    for link in self._links.values():
      link.start()
    self._ticker.start()

  def connect(self, addresses: Sequence[tuple[str, int]], token: str, seconds: float) -> None:
    """Another process: connects to process 0 at the first address that answers.

    Raises:
      OSError: none did.
    """
    error: OSError | None = None
    for address in addresses:
      try:
        sock = socket.create_connection(address, timeout=seconds)
      except OSError as e:
        error = e
        continue
      sock.sendall(encode({"hello": self.index, "token": token}))
      self._add(0, sock)
      self._links[0].start()
      self._ticker.start()
      return
    raise error or OSError("no address")

  def _add(self, other: int, sock: socket.socket) -> None:
    self._links[other] = Link(
      sock, lambda message: self._receive(other, message), lambda why: self._ended(other, why)
    )

  def send(self, message: Message) -> None:
    """Puts a message into the common order. Thread-safe; never from `deliver`."""
    message = {**message, "from": self.index}
    if self.index == 0:
      self._relay(message)
    else:
      self._links[0].put(encode(message))

  def farewell(self) -> None:
    """Says that this process ends in order: the end of its connections is no loss."""
    self.send({"type": "bye"})

  def close(self, seconds: float) -> None:
    """Sends what is queued; process 0 then waits until the others have closed, at most so long."""
    for link in self._links.values():
      link.close()
    deadline = time.monotonic() + seconds
    for link in self._links.values():
      link.wait(max(0.0, deadline - time.monotonic()))

  def _receive(self, other: int, message: Message) -> None:
    if message.get("type") == "ping":
      if self.index:
        self._links[0].put(encode({"type": "ping"}))
    elif self.index:
      if message["type"] in ("bye", "fail"):
        self._gone.add(message["from"])
      self._deliver(message)
    else:
      self._relay({**message, "from": other})

  def _relay(self, message: Message) -> None:
    frame = encode(message)
    with self._order:
      if message["type"] in ("bye", "fail"):
        self._gone.add(message["from"])
      for link in self._links.values():
        link.put(frame)
      self._deliver(message)

  def _ended(self, other: int, why: str) -> None:
    if other in self._gone:
      return
    self._gone.add(other)
    self._lost(other, why)

  def _tick(self) -> None:
    """Counts ticks and not time: a machine that stood still has not lost anybody."""
    count = 0
    while True:
      time.sleep(_TICK)
      count += 1
      for other, link in self._links.items():
        link.silent += 1
        if self.index == 0 and count % _PING_EVERY == 0:
          link.put(encode({"type": "ping"}))
        if link.silent > self._limit:
          self._ended(other, f"it has said nothing for {self._limit} seconds")


class Gate:
  """A door on this host to a service on process 0, for a client that ends the program when the
  connection breaks: who stands in the door sees that first, and keeps the client's side open.

  Args:
    target: host and port of the service.
    lost: called once, when the service is gone before `close`.
  """

  def __init__(self, target: tuple[str, int], lost: Callable[[], None]):
    self._target, self._lost = target, lost
    self._is_closed = False
    self._server = socket.create_server(("127.0.0.1", 0))
    self.port: int = self._server.getsockname()[1]
    self._held: list[socket.socket] = []
    threading.Thread(target=self._accept, name="awf-gate", daemon=True).start()

  def close(self) -> None:
    """From now on a connection that ends is one that ends."""
    self._is_closed = True

  def _accept(self) -> None:
    while True:
      inner, _ = self._server.accept()
      try:
        outer = socket.create_connection(self._target, timeout=_HELLO_SECONDS)
      except OSError as error:  # not there yet: the client tries again, as long as it likes
        log.debug("%s:%s does not answer: %s", *self._target, error)
        inner.close()
        time.sleep(0.2)
        continue
      for sock in (inner, outer):
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
      for job in (self._up, self._down):
        threading.Thread(target=job, args=(inner, outer), name="awf-gate", daemon=True).start()

  def _up(self, inner: socket.socket, outer: socket.socket) -> None:
    _pump(inner, outer)
    _end(outer)

  def _down(self, inner: socket.socket, outer: socket.socket) -> None:
    _pump(outer, inner)
    if self._is_closed or self._answers():
      _end(inner)
      return
    self._held.append(inner)
    self._lost()

  def _answers(self) -> bool:
    time.sleep(_TICK)  # a process that dies closes its connections before its door
    try:
      socket.create_connection(self._target, timeout=5.0).close()
    except OSError:
      return False
    return True


def _pump(source: socket.socket, sink: socket.socket) -> None:
  """Copies bytes until one side ends."""
  try:
    while data := source.recv(1 << 16):
      sink.sendall(data)
  except OSError as error:
    log.debug("a connection broke: %s", error)


def _end(sock: socket.socket) -> None:
  try:
    sock.shutdown(socket.SHUT_WR)
  except OSError as error:
    log.debug("a connection was closed before: %s", error)
