"""System-call numbers of x86_64 and aarch64 and the seccomp program made from them.

The filter is an allow list: what is not named answers EPERM, so a system call of a newer kernel is
refused too.
"""

from __future__ import annotations

import errno
import struct

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
_COLUMN = {"x86_64": 0, "aarch64": 1}

# name: (x86_64, aarch64); -1 where the architecture lacks the call. Most frequent first: the kernel
# walks the list.
PLAIN = {
  "read": (0, 63),
  "write": (1, 64),
  "futex": (202, 98),
  "mmap": (9, 222),
  "munmap": (11, 215),
  "mprotect": (10, 226),
  "brk": (12, 214),
  "madvise": (28, 233),
  "mremap": (25, 216),
  "clock_gettime": (228, 113),
  "close": (3, 57),
  "fstat": (5, 80),
  "lseek": (8, 62),
  "readv": (19, 65),
  "writev": (20, 66),
  "pread64": (17, 67),
  "pwrite64": (18, 68),
  "rt_sigaction": (13, 134),
  "rt_sigprocmask": (14, 135),
  "rt_sigreturn": (15, 139),
  "rt_sigpending": (127, 136),
  "rt_sigtimedwait": (128, 137),
  "rt_sigsuspend": (130, 133),
  "sigaltstack": (131, 132),
  "restart_syscall": (219, 128),
  "exit": (60, 93),
  "exit_group": (231, 94),
  "sched_yield": (24, 124),
  "nanosleep": (35, 101),
  "clock_nanosleep": (230, 115),
  "clock_getres": (229, 114),
  "gettimeofday": (96, 169),
  "time": (201, -1),
  "times": (100, 153),
  "getitimer": (36, 102),
  "setitimer": (38, 103),
  "alarm": (37, -1),
  "pause": (34, -1),
  "getpid": (39, 172),
  "gettid": (186, 178),
  "getppid": (110, 173),
  "getpgrp": (111, -1),
  "getpgid": (121, 155),
  "getsid": (124, 156),
  "getuid": (102, 174),
  "getgid": (104, 176),
  "geteuid": (107, 175),
  "getegid": (108, 177),
  "getrlimit": (97, 163),
  "getrusage": (98, 165),
  "sysinfo": (99, 179),
  "uname": (63, 160),
  "umask": (95, 166),
  "sched_getaffinity": (204, 123),
  "getrandom": (318, 278),
  "membarrier": (324, 283),
  "rseq": (334, 293),
  "set_robust_list": (273, 99),
  "wait4": (61, 260),
  "dup": (32, 23),
  "dup2": (33, -1),
  "dup3": (292, 24),
  "pipe": (22, -1),
  "pipe2": (293, 59),
  "select": (23, -1),
  "pselect6": (270, 72),
  "poll": (7, -1),
  "ppoll": (271, 73),
  "epoll_create1": (291, 20),
  "epoll_ctl": (233, 21),
  "epoll_wait": (232, -1),
  "epoll_pwait": (281, 22),
  "eventfd2": (290, 19),
  "recvfrom": (45, 207),
  "shutdown": (48, 210),
  "getsockname": (51, 204),
  "getsockopt": (55, 209),
  "getdents64": (217, 61),
  "ftruncate": (77, 46),
  "fsync": (74, 82),
  "fdatasync": (75, 83),
  "flock": (73, 32),
  "getcwd": (79, 17),
}

# Calls that take a path: allowed only under Landlock.
PATHS = {
  "openat": (257, 56),
  "open": (2, -1),
  "newfstatat": (262, 79),
  "stat": (4, -1),
  "lstat": (6, -1),
  "statx": (332, 291),
  "access": (21, -1),
  "faccessat": (269, 48),
  "faccessat2": (439, 439),
  "readlink": (89, -1),
  "readlinkat": (267, 78),
  "getdents": (78, -1),
  "chdir": (80, 49),
  "fchdir": (81, 50),
  "creat": (85, -1),
  "mkdir": (83, -1),
  "mkdirat": (258, 34),
  "rmdir": (84, -1),
  "unlink": (87, -1),
  "unlinkat": (263, 35),
  "rename": (82, -1),
  "renameat": (264, 38),
  "renameat2": (316, 276),
  "truncate": (76, 45),
}

CLONE = (56, 220)
CLONE3 = (435, 435)
KILL = (62, 129)
TGKILL = (234, 131)
PRCTL = (157, 167)
PRLIMIT64 = (302, 261)
IOCTL = (16, 29)
FCNTL = (72, 25)
SOCKETPAIR = (53, 199)
SENDTO = (44, 206)
SECCOMP = (317, 277)
CAPSET = (126, 91)
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same everywhere

_CLONE_THREAD = 0x00010000
_AF_UNIX = 1
_PRCTL_ALLOWED = (15, 16)  # PR_SET_NAME, PR_GET_NAME
# F_DUPFD F_GETFD F_SETFD F_GETFL F_GETLK F_SETLK F_SETLKW F_DUPFD_CLOEXEC; the others can make a
# descriptor send signals to any process of the user
_FCNTL_ALLOWED = (0, 1, 2, 3, 5, 6, 7, 1030)
_F_SETFL, _O_ASYNC = 4, 0x2000
_IOCTL_ALLOWED = (
  0x5401,
  0x541B,
  0x5421,
  0x5450,
  0x5451,
)  # TCGETS FIONREAD FIONBIO FIONCLEX FIOCLEX

# BPF_LD|W|ABS, BPF_JMP with JEQ|K, JGE|K, JSET|K and JA, BPF_RET|K
_LOAD, _JEQ, _JGE, _JSET, _JUMP, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x05, 0x06
_ALLOW, _KILL_PROCESS, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = (
  0,
  4,
  16,
)  # of struct seccomp_data; both architectures are little-endian


def number(entry: tuple[int, int], machine: str) -> int:
  """The number of a call on `machine` ("x86_64" or "aarch64")."""
  return entry[_COLUMN[machine]]


def _instruction(code: int, jump_true: int, jump_false: int, value: int) -> bytes:
  return struct.pack("<HBBI", code, jump_true, jump_false, value & 0xFFFFFFFF)


def _argument(index: int, *, high: bool = False) -> bytes:
  return _instruction(_LOAD, 0, 0, _ARGS_OFFSET + 8 * index + (4 if high else 0))


def _return(action: int) -> bytes:
  return _instruction(_RETURN, 0, 0, action)


def _one_of(index: int, values: tuple[int, ...]) -> list[bytes]:
  """Allows when the low half of an argument is among `values`, else EPERM."""
  body = [_argument(index)]
  for value in values:
    body += [_instruction(_JEQ, 0, 1, value), _return(_ALLOW)]
  return [*body, _return(_ERRNO | errno.EPERM)]


def _is_null(index: int) -> list[bytes]:
  """Allows when the pointer argument is null, else EPERM."""
  denied = _return(_ERRNO | errno.EPERM)
  return [
    _argument(index),
    _instruction(_JEQ, 1, 0, 0),
    denied,
    _argument(index, high=True),
    _instruction(_JEQ, 1, 0, 0),
    denied,
    _return(_ALLOW),
  ]


def _choose(cases: list[tuple[int, list[bytes]]]) -> list[bytes]:
  """Binary search over the call's number, sorted; every body ends in a return on every path.

  The kernel walks the program once for each call that exists when a filter is installed, so that a
  linear list would cost each child a millisecond.
  """
  if len(cases) <= 3:
    code = []
    for nr, body in cases:
      code += [_instruction(_JEQ, 0, len(body), nr), *body]
    return [*code, _return(_ERRNO | errno.EPERM)]
  middle = len(cases) // 2
  low, high = _choose(cases[:middle]), _choose(cases[middle:])
  ask = _instruction(_JGE, 0, 1, cases[middle][0])
  return [ask, _instruction(_JUMP, 0, 0, len(low)), *low, *high]


def seccomp_program(machine: str, pid: int, *, with_paths: bool) -> bytes:
  """Builds the BPF program of a child as an array of struct sock_filter.

  Args:
    machine: "x86_64" or "aarch64"; a call under another architecture kills the process.
    pid: the child's own, the only target that kill and tgkill may name.
    with_paths: allow calls that take paths; only safe when Landlock confines them.

  Raises:
    KeyError: unknown machine.
  """
  code = [
    _instruction(_LOAD, 0, 0, _ARCH_OFFSET),
    _instruction(_JEQ, 1, 0, ARCHITECTURES[machine]),
    _return(_KILL_PROCESS),
    _instruction(_LOAD, 0, 0, _NR_OFFSET),
  ]
  thread_only = [
    _argument(0),
    _instruction(_JSET, 1, 0, _CLONE_THREAD),
    _return(_ERRNO | errno.EPERM),
    _return(_ALLOW),
  ]
  set_flags = [_argument(2), _instruction(_JSET, 0, 1, _O_ASYNC), _return(_ERRNO | errno.EPERM)]
  fcntl = [
    _argument(1),
    _instruction(_JEQ, 0, len(set_flags) + 1, _F_SETFL),
    *set_flags,
    _return(_ALLOW),
    *_one_of(1, _FCNTL_ALLOWED),
  ]
  special = (
    (FCNTL, fcntl),
    (CLONE, thread_only),
    (
      CLONE3,
      [_return(_ERRNO | errno.ENOSYS)],
    ),  # its flags lie in memory; the C library falls back to clone
    (KILL, _one_of(0, (pid,))),
    (TGKILL, _one_of(0, (pid,))),
    (PRCTL, _one_of(0, _PRCTL_ALLOWED)),
    (PRLIMIT64, _is_null(2)),  # reading limits only
    (IOCTL, _one_of(1, _IOCTL_ALLOWED)),
    (SOCKETPAIR, _one_of(0, (_AF_UNIX,))),
    (SENDTO, _is_null(4)),  # to the connected peer only
  )
  allowed = {**PLAIN, **PATHS} if with_paths else PLAIN
  cases = [(entry, [_return(_ALLOW)]) for entry in allowed.values()]
  numbered = [(number(entry, machine), body) for entry, body in (*cases, *special)]
  code += _choose(sorted(case for case in numbered if case[0] >= 0))
  return b"".join(code)
