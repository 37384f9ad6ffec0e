"""The kernel jail of a child: every layer that the host grants, put on in an order that needs no
right afterwards.

`JailPlan` is made once in the zygote; `enter` runs in each child after the fork. Nothing here is
Python-level filtering: a job may own its whole interpreter and still has no file, process, socket
or signal beyond its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig

from awf.sandbox import syscalls

NICE = 10  # of children, beside this program
FIRST_UID = 60706  # free for use by systemd's and Debian's tables of ids
MAX_SLOTS = 400
SCRATCH_BYTES = 16 << 20
SCRATCH_FILES = 1024
FILE_BYTES = 8 << 20
EXIT_NO_JAIL = 78

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP = 1, 4, 38, 22
_CLONE_NEWNS, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x04000000, 0x08000000
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_MS_NOSUID_NODEV_NOEXEC, _MS_REC_PRIVATE = 2 | 4 | 8, 0x4000 | 0x40000
_LANDLOCK_READ = (1 << 2) | (1 << 3)  # READ_FILE, READ_DIR
_LANDLOCK_WRITE = (
  (1 << 1) | (1 << 4) | (1 << 5) | (1 << 7) | (1 << 8)
)  # write, remove, make dir, make file
_LANDLOCK_TRUNCATE = 1 << 14
_LANDLOCK_HANDLED = {3: (1 << 15) - 1, 5: (1 << 16) - 1}
_LANDLOCK_NEEDED = 3  # Linux 6.2; before it nothing refuses to empty a file whose path is known
_PID_MARK = 0x7A5C3E91  # above any process id


class JailError(RuntimeError):
  """A layer that the plan counts on did not go on in this child."""


@dataclasses.dataclass
class JailPlan:
  """What this host grants, found out in the zygote.

  Attributes:
    machine: seccomp table in use, "" where there is none.
    landlock_abi: 0 where Landlock is missing, or too old to be of use.
    namespaces: names of the namespaces that the zygote was able to leave.
    private_tmp: each child can mount a private, size-limited tmpfs as its directory.
    drops_uid: the zygote is root and children get a user id of their own.
    read_only: directory descriptors (O_PATH) of what a child may read.
    base_bytes: address space of the zygote, on top of which a job's memory counts.
    filter: the seccomp program, with _PID_MARK where a child's process id belongs.
  """

  machine: str = ""
  landlock_abi: int = 0
  namespaces: tuple[str, ...] = ()
  private_tmp: bool = False
  drops_uid: bool = False
  read_only: tuple[int, ...] = ()
  base_bytes: int = 0
  filter: bytes = b""

  def layers(self) -> dict[str, bool]:
    """The layers by name, for the probe's report."""
    return {
      "seccomp": bool(self.machine),
      "landlock": self.landlock_abi > 0,
      "uid_drop": self.drops_uid,
      "network_namespace": "net" in self.namespaces,
      "private_tmp": self.private_tmp,
      "rlimits": True,
    }


_libc: ctypes.CDLL | None = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _call(name: str, *args: int | bytes | None) -> int:
  """Calls a C function by name; returns -1 with errno set, as C does."""
  assert _libc is not None
  wrapped = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
  return getattr(_libc, name)(*wrapped)


def make_plan() -> JailPlan:
  """Tries what the host grants and leaves the namespaces it may.

  Call it once, in the single-threaded zygote.
  """
  plan = JailPlan(drops_uid=os.getuid() == 0)
  if _libc is None:
    return plan
  machine = platform.machine()
  if machine in syscalls.ARCHITECTURES and _has_seccomp(machine):
    plan.machine = machine
  abi = _call("syscall", syscalls.LANDLOCK_CREATE, None, 0, 1)
  plan.landlock_abi = abi if abi >= _LANDLOCK_NEEDED else 0
  plan.namespaces = _leave_namespaces()
  if plan.landlock_abi:
    plan.read_only = _open_read_only()
  if plan.machine:
    plan.filter = syscalls.seccomp_program(
      plan.machine, _PID_MARK, with_paths=plan.landlock_abi > 0
    )
  return plan


def _has_seccomp(machine: str) -> bool:
  """Asks with a null program: EFAULT means that filters exist, another error that not."""
  number = syscalls.number(syscalls.SECCOMP, machine)
  return _call("syscall", number, 1, 0, None) == -1 and ctypes.get_errno() == 14


def _leave_namespaces() -> tuple[str, ...]:
  uid, gid = os.getuid(), os.getgid()
  flags = _CLONE_NEWNS | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
  names = ("mnt", "net", "ipc", "uts")
  if _call("unshare", flags) != 0:
    if uid == 0 or _call("unshare", flags | _CLONE_NEWUSER) != 0:
      return ()
    names = (*names, "user")
    for path, text in (
      ("/proc/self/setgroups", "deny"),
      ("/proc/self/uid_map", f"{uid} {uid} 1"),
      ("/proc/self/gid_map", f"{gid} {gid} 1"),
    ):
      with open(path, "w") as file:
        file.write(text)
  if _call("mount", b"none", b"/", None, _MS_REC_PRIVATE, None) != 0:
    return tuple(name for name in names if name != "mnt")
  return names


def _open_read_only() -> tuple[int, ...]:
  """Opens the standard library and the numeric packages that are installed."""
  paths = [sysconfig.get_path("stdlib")]
  for name in ("numpy", "numpy.libs", "sympy", "mpmath"):
    paths += [os.path.join(base, name) for base in sys.path if base]
  return tuple(_high_descriptor(path) for path in paths if os.path.isdir(path))


def try_private_tmp(path: str) -> bool:
  """Whether a tmpfs can be mounted at `path`: tried in a throw-away child."""
  pid = os.fork()
  if pid == 0:
    done = False
    try:
      done = _call("unshare", _CLONE_NEWNS) == 0 and _mount_tmp(path, os.getuid(), os.getgid())
    finally:
      os._exit(0 if done else 1)
  return os.waitpid(pid, 0)[1] == 0


def _mount_tmp(path: str, uid: int, gid: int) -> bool:
  options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=0700,uid={uid},gid={gid}"
  args = (b"tmpfs", path.encode(), b"tmpfs", _MS_NOSUID_NODEV_NOEXEC, options.encode())
  return _call("mount", *args) == 0


def enter(
  plan: JailPlan, *, slot: int, cwd: str, memory_bytes: int, cpu_seconds: float, zygote_pid: int
) -> None:
  """Puts every layer of the plan on this process, for good.

  Args:
    slot: number of the child among those alive; gives it a user id of its own.
    cwd: its private directory, a mount point when `plan.private_tmp`.
    memory_bytes: address space on top of the zygote's.
    cpu_seconds: hard limit, rounded up to whole seconds.

  Raises:
    JailError: a layer of the plan failed; the job must not run.
    OSError: likewise.
  """
  uid = FIRST_UID + slot if plan.drops_uid else os.getuid()
  gid = FIRST_UID + slot if plan.drops_uid else os.getgid()
  if plan.private_tmp:
    _require(_call("unshare", _CLONE_NEWNS) == 0, "unshare")
    _require(_mount_tmp(cwd, uid, gid), "mount tmpfs")
  os.chdir(cwd)
  os.nice(NICE)
  _limit(plan, memory_bytes, cpu_seconds)
  scratch = _path_descriptor(".") if plan.landlock_abi else -1
  if plan.drops_uid:
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
  if _libc is None:
    return
  # Changing the user id clears the death signal, so it comes after; the parent may have died in
  # between.
  _require(_call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0, "death signal")
  _require(os.getppid() == zygote_pid, "zygote alive")
  _require(_call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "no_new_privs")
  _require(_call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0) == 0, "dumpable")
  if plan.machine:
    _drop_capabilities(plan.machine)
  if plan.landlock_abi:
    _landlock(plan, scratch)


def seal(plan: JailPlan) -> None:
  """Installs the seccomp filter, the last layer; every descriptor but the channel is closed by now.

  Raises:
    JailError: the kernel refused the filter.
  """
  if not plan.machine:
    return
  code = plan.filter.replace(struct.pack("<I", _PID_MARK), struct.pack("<I", os.getpid()))
  buffer = ctypes.create_string_buffer(code, len(code))
  program = ctypes.create_string_buffer(
    struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
  )
  number = syscalls.number(syscalls.SECCOMP, plan.machine)
  assert _libc is not None
  _require(_libc.syscall(ctypes.c_long(number), 1, 4, program) == 0, "seccomp")


def pin(pid: int, number: int) -> None:
  """Keeps every thread of a process, and those that they start, to one core, chosen by `number`.

  The filter forbids the process to change it. Does nothing where the system has no such call.
  """
  if not hasattr(os, "sched_setaffinity"):
    return
  cores = sorted(os.sched_getaffinity(0))
  core = cores[number % len(cores)]
  with contextlib.suppress(OSError):  # it has ended, or /proc is not there
    for thread in os.listdir(f"/proc/{pid}/task"):
      with contextlib.suppress(OSError):
        os.sched_setaffinity(int(thread), {core})


def _require(holds: bool, layer: str) -> None:
  if not holds:
    raise JailError(f"{layer}: {os.strerror(ctypes.get_errno())}")


def _high_descriptor(path: str) -> int:
  """Opens above the numbers that a child puts to its own use."""
  low = _path_descriptor(path)
  high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 16)
  os.close(low)
  return high


def _path_descriptor(path: str) -> int:
  return os.open(path, os.O_PATH | os.O_CLOEXEC)


def _limit(plan: JailPlan, memory_bytes: int, cpu_seconds: float) -> None:
  cpu = int(cpu_seconds) + 1
  limits = {
    "RLIMIT_AS": plan.base_bytes + memory_bytes,
    "RLIMIT_CPU": cpu,
    "RLIMIT_FSIZE": FILE_BYTES,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
    "RLIMIT_MEMLOCK": 0,
    "RLIMIT_MSGQUEUE": 0,
    "RLIMIT_SIGPENDING": 256,
    "RLIMIT_STACK": 8 << 20,
  }
  if plan.drops_uid:  # counts per user id, which only a private one makes meaningful
    limits["RLIMIT_NPROC"] = 64
  if not plan.base_bytes:
    del limits["RLIMIT_AS"]
  for name, value in limits.items():
    which = getattr(resource, name, None)
    if which is None:
      continue
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))


def _drop_capabilities(machine: str) -> None:
  header = struct.pack("<Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
  number = syscalls.number(syscalls.CAPSET, machine)
  _require(_call("syscall", number, header, bytes(24)) == 0, "capabilities")


def _landlock(plan: JailPlan, scratch: int) -> None:
  abi = plan.landlock_abi
  handled = _LANDLOCK_HANDLED[max(known for known in _LANDLOCK_HANDLED if known <= abi)]
  attributes = struct.pack("<Q", handled)
  if abi >= 4:
    attributes += struct.pack("<Q", 0b11)  # TCP bind and connect
  if abi >= 6:
    attributes += struct.pack("<Q", 0b11)  # abstract Unix sockets and signals stay inside
  ruleset = _call("syscall", syscalls.LANDLOCK_CREATE, attributes, len(attributes), 0)
  _require(ruleset >= 0, "landlock ruleset")
  writable = _LANDLOCK_READ | _LANDLOCK_WRITE | _LANDLOCK_TRUNCATE
  rules = [(fd, _LANDLOCK_READ) for fd in plan.read_only] + [(scratch, writable)]
  for descriptor, access in rules:
    rule = struct.pack("<Qi", access, descriptor)
    _require(_call("syscall", syscalls.LANDLOCK_ADD, ruleset, 1, rule, 0) == 0, "landlock rule")
  _require(_call("syscall", syscalls.LANDLOCK_RESTRICT, ruleset, 0) == 0, "landlock restrict")
