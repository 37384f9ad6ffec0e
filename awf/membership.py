"""How the processes of a run find each other, and how each leaves: settings, joining, the end.

JAX's own coordination brings them together; process 0 then tells the others where its hub is. When
one is lost the others end too, at once and with a line that says why, instead of waiting for it.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import logging
import os
import secrets
import socket
import sys
import threading
from typing import Any

from awf.hosts import Cluster, Hosts
from awf.hub import Gate
from awf.types import UserError

log = logging.getLogger("awf")

AUTO = "auto"
LOST_CODE = 2  # exit code of a process whose run was ended by another one's end
START_SECONDS = 300  # that the processes wait for each other at the start
_GRACE = 3.0  # seconds that a process has to end by itself when the run is over
_DAY = 86_400
_CARD_BYTES = 1024  # room for what process 0 says about its hub


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
