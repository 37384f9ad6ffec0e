"""Several processes as one run: who they are, whose work a job is, and where they agree.

Every process runs the same search on the same results. A job (a group of proposals, a workflow on
a problem, a grade) is asked for by all and done by one, to which process 0 deals it; what comes out
is told to all. A job's result is a function of what is asked, so it does not matter who did it.
Before anything that all do together (an update, a checkpoint) the processes meet: each says that it
got there, or that it was asked to stop, and all go on or all stop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ipaddress
import json
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from awf.hub import Gate, Hub, Message
from awf.types import UserError

log = logging.getLogger("awf")

AUTO = "auto"
LOST_CODE = 2  # exit code of a process whose run was ended by another one's end
START_SECONDS = 300  # that the processes wait for each other at the start
_GRACE = 3.0  # seconds that a process has to end by itself when the run is over
_DAY = 86_400
_CARD_BYTES = 1024  # room for what process 0 says about its hub

Value = tuple[Any, bool]  # a job's result as JSON, and whether it may serve later requests for it


@dataclasses.dataclass(frozen=True)
class Settings:
  """How the processes find each other."""

  coordinator: str  # HOST:PORT of process 0, or "auto"
  num_processes: int | None  # None: the cluster says it
  process_id: int | None
  timeout: float  # seconds without a sign of life


def settings(config: Any) -> Settings | None:
  """What `config.distributed` and the environment say; None is a run of one process.

  Raises:
    UserError: a coordinator without the number of processes or of this one.
  """
  d = config.get("distributed")
  if d is None:  # of a run that is older than the field
    return None
  coordinator = d.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", "")
  if not coordinator:
    return None
  count = d.num_processes or _variable("JAX_NUM_PROCESSES")
  index = d.process_id if d.process_id >= 0 else _variable("JAX_PROCESS_ID")
  if coordinator == AUTO:
    return Settings(AUTO, None, None, d.timeout)
  if not coordinator.rpartition(":")[2].isdigit():
    raise UserError(
      f"config.distributed.coordinator = {coordinator!r}: expected HOST:PORT of process 0, or auto"
    )
  if count is None or index is None or not 0 <= index < count:
    raise UserError(
      f"config.distributed.coordinator = {coordinator!r} needs config.distributed.num_processes "
      f"and config.distributed.process_id below it (or JAX_NUM_PROCESSES and JAX_PROCESS_ID), got "
      f"{count} and {index}"
    )
  return Settings(coordinator, count, index, d.timeout) if count > 1 else None


def _variable(name: str) -> int | None:
  text = os.environ.get(name, "")
  if text and not text.isdigit():
    raise UserError(f"{name}={text}: expected a number")
  return int(text) if text else None


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


# ---- joining and leaving ----


class _Membership:
  """This process's part in a run of several, from `join` to `leave`."""

  def __init__(self) -> None:
    self.cluster: Cluster | None = None
    self.gate: Gate | None = None
    self.is_joining = False
    self.reason = ""  # why the run is over
    self.over = threading.Event()
    self.is_leaving = threading.Event()

  def lose_first(self) -> None:
    """Process 0 is gone, and JAX's coordination service with it."""
    if self.cluster is not None:
      self.end(f"process 0 of {self.cluster.size} is lost: its connection closed")

  def end(self, reason: str) -> None:
    """Ends this process, which may hang where another one is missing; called by any thread."""
    if self.over.is_set() or self.is_leaving.is_set():
      return
    self.reason = reason
    self.over.set()
    threading.Thread(target=self._end_soon, name="awf-end", daemon=True).start()

  def _end_soon(self) -> None:
    if not self.is_leaving.wait(_GRACE):
      self.exit(LOST_CODE)

  def exit(self, code: int) -> None:
    """Says why and goes, without the exit handlers: some of them wait for the missing one."""
    assert self.cluster is not None
    print(f"error: {lost_line(self.reason)}", file=sys.stderr, flush=True)
    self.cluster.hub.close(10.0 if self.cluster.index == 0 else 0.0)
    os._exit(code)


_membership = _Membership()


def lost_line(reason: str) -> str:
  return (
    f"{reason}; this process ends too. What the last checkpoint holds is kept: start all processes "
    "again to go on"
  )


def join(chosen: Settings) -> Cluster | Hosts:
  """Connects this process with the others; JAX sees the devices of all of them afterwards.

  Raises:
    UserError: they cannot be found, or did not all come.
  """
  import jax  # not before the sandbox's zygote has started

  _use_gloo(jax)
  # It would take SIGTERM, which this program handles itself.
  jax.config.update("jax_enable_preemption_service", False)
  where: dict[str, Any] = {
    "coordinator_address": chosen.coordinator,
    "num_processes": chosen.num_processes,
    "process_id": chosen.process_id,
  }
  _membership.is_joining = True
  try:
    if chosen.coordinator == AUTO:
      where = _detected()
    address = where.get("coordinator_address", "")
    if where.get("process_id"):
      # JAX aborts when its connection to process 0 breaks; behind the gate it does not see that.
      host, _, port = address.rpartition(":")
      _membership.gate = Gate((host.strip("[]"), int(port)), _membership.lose_first)
      where["coordinator_address"] = f"127.0.0.1:{_membership.gate.port}"
    if where:
      where["cluster_detection_method"] = "deactivate"
    jax.distributed.initialize(
      **where,
      initialization_timeout=START_SECONDS,
      # The hub watches who is there; JAX would take hosts that stood still for lost ones.
      heartbeat_timeout_seconds=_DAY,
      shutdown_timeout_seconds=START_SECONDS,
    )
    index, size = jax.process_index(), jax.process_count()
  except (RuntimeError, ValueError) as error:
    said = " ".join(str(error).split())[:300]
    raise UserError(
      f"config.distributed.coordinator = {chosen.coordinator!r}: the processes of this run did not "
      f"find each other ({said}); expected {chosen.num_processes or 'all'} processes started with "
      "the same command, and a port that is free and open"
    ) from error
  if size == 1:
    _membership.is_joining = False
    return Hosts()
  cluster = Cluster(index, size, chosen.timeout, _membership.end)
  try:
    _connect(cluster, address)
  except RuntimeError as error:  # of the first collective
    said = " ".join(str(error).split())[:300]
    raise UserError(
      f"config.distributed: process {index} of {size} could not reach the others ({said}); open "
      "the ports among the hosts"
    ) from error
  _membership.cluster, _membership.is_joining = cluster, False
  log.info("process %d of %d, %d of %d devices", index, size, jax.local_device_count(),
           jax.device_count())  # fmt: skip
  if index:
    log.setLevel(logging.WARNING)  # one process tells what the run does
  return cluster


def _detected() -> dict[str, Any]:
  """What JAX finds out about the cluster that started this process; {} leaves it to JAX."""
  try:
    from jax._src.clusters import ClusterEnv

    found = ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, START_SECONDS
    )
  except (ImportError, AttributeError, TypeError) as error:  # another version of JAX
    log.debug("the cluster is left to JAX: %s", error)
    return {}
  names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
  where = {name: value for name, value in zip(names, found, strict=True) if value is not None}
  if os.environ.get("JAX_LOCAL_DEVICE_IDS"):  # JAX reads it; a cluster says one device a process
    where.pop("local_device_ids", None)
  if not {*names[:3]} <= where.keys():
    raise ValueError("no TPU pod, SLURM, Open MPI or Kubernetes was found here")
  return where


def _use_gloo(jax: Any) -> None:
  """Collectives among processes on CPUs."""
  name = "jax_cpu_collectives_implementation"
  if getattr(jax.config, name, None) is None:
    jax.config.update(name, "gloo")


def _connect(cluster: Cluster, coordinator: str) -> None:
  """Opens the hub: process 0 tells its address and a token through JAX."""
  import numpy as np
  from jax.experimental import multihost_utils

  server, card = None, b""
  if cluster.index == 0:
    hosts = _own_addresses(coordinator)
    is_local = all(_is_loopback(host) for host in hosts)
    server = socket.create_server(("127.0.0.1" if is_local else "", 0), backlog=cluster.size)
    port, token = server.getsockname()[1], secrets.token_hex(16)
    card = json.dumps([hosts, port, token]).encode()
  room_T = np.zeros(_CARD_BYTES, np.uint8)
  room_T[: len(card)] = np.frombuffer(card, np.uint8)
  told_T = np.asarray(multihost_utils.broadcast_one_to_all(room_T))
  hosts, port, token = json.loads(told_T.tobytes().rstrip(b"\0"))
  try:
    if server is not None:
      cluster.hub.serve(server, cluster.size, token, START_SECONDS)
    else:
      cluster.hub.connect([(host, port) for host in hosts], token, START_SECONDS / 5)
  except OSError as error:
    raise UserError(
      f"config.distributed: process {cluster.index} could not connect with process 0 at "
      f"{', '.join(hosts)}, port {port} ({error}); open the ports among the hosts"
    ) from error


def _own_addresses(coordinator: str) -> list[str]:
  """Names under which others may reach this host, the surest first."""
  found = [coordinator.rpartition(":")[0].strip("[]")] if coordinator else []
  if found and _is_loopback(found[0]):
    return found
  with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
    try:
      probe.connect(("192.0.2.1", 9))  # sends nothing: asks which address faces the network
      found.append(probe.getsockname()[0])
    except OSError as error:
      log.debug("no route to other hosts: %s", error)
  found.append(socket.getfqdn())
  return list(dict.fromkeys(found))


def _is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


def leave(code: int, why: str = "") -> int:
  """Ends this process's part in the run, at the very end of a command.

  Args:
    code: the exit code that the command ended with.
    why: what ended this process alone; "" when all end here, in order.

  Returns:
    `code`. When this process ends alone it does not return but goes at once: exit handlers wait for
    the others.
  """
  cluster = _membership.cluster
  if cluster is None:
    if _membership.is_joining:  # exit handlers would wait for processes that may not be there
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    return code
  if not why:
    import jax

    cluster.meet_now({})
    _membership.is_leaving.set()
    if _membership.gate is not None:
      _membership.gate.close()
    cluster.hub.farewell()
    jax.distributed.shutdown()
    cluster.hub.close(10.0)
    _membership.cluster = None
    return code
  _membership.is_leaving.set()
  text = f"process {cluster.index} of {cluster.size} ended: {why}"
  cluster.hub.send({"type": "fail", "text": text})
  sys.stdout.flush()
  sys.stderr.flush()
  cluster.hub.close(10.0 if cluster.index == 0 else 0.0)
  os._exit(code)


def why_over() -> str:
  """Why the run is over for all, if another process ended it or does so in a moment; "" if not."""
  if _membership.cluster is None or not _membership.over.wait(_GRACE - 1):
    return ""
  return lost_line(_membership.reason)


def is_writer() -> bool:
  """Whether this process speaks for the run."""
  return _membership.cluster is None or _membership.cluster.is_writer
