"""Hostile jobs: each ends in a typed failure or harmlessly, in bounded time, with the parent alive.

`RAW` cases get the interpreter without the guarded imports, as code does that escaped them.
"""

import asyncio
import dataclasses
import os
import textwrap
import time

import pytest

from awf.sandbox import Job, Limits, Sandbox, SandboxConfig, jail, syscalls

LIMITS = Limits(cpu_seconds=1.0, wall_seconds=20.0, memory_mb=128, max_calls=20)


def limits_of(kinds):
  """Only what may end by its time waits for it: a job has a small part of a busy machine."""
  return dataclasses.replace(LIMITS, wall_seconds=2.0) if "timeout" in kinds else LIMITS


@pytest.fixture(scope="module")
def box():
  with Sandbox(SandboxConfig(workers=2), preload=("sandbox_jobs",)) as sandbox:
    yield sandbox


async def echo(method, params):
  return params


def run_raw(box, source, handler=echo, limits=LIMITS, **payload):
  job = Job("sandbox_jobs:run_source", {"source": textwrap.dedent(source), **payload}, 0, limits)
  return box.run_sync(job, handler)


def run_program(box, source, limits=LIMITS):
  payload = {"source": source if "\x00" in source else textwrap.dedent(source)}
  return box.run_sync(Job("awf.sandbox.program:run_program", payload, 0, limits))


def solve(expression):
  return f"def solve():\n  return {expression}"


PROGRAMS = {
  "endless loop": ("def solve():\n  while True: pass", {"timeout"}),
  "swallowed BaseException": (
    "def solve():\n  while True:\n    try:\n      raise KeyboardInterrupt\n    except "
    "BaseException: pass",
    {"timeout"},
  ),
  "deep recursion": ("def solve():\n  return solve()", {"crash", "memory"}),
  "recursion with a raised limit": (
    "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n  return f(n + 1)\ndef solve():\n  "
    "return f(0)",
    {"crash", "memory", "timeout"},
  ),
  "recursion through repr": (
    "import sys\nsys.setrecursionlimit(10**9)\nclass A:\n  def __repr__(self): return "
    "repr([self])\n"
    "def solve():\n  return repr(A())",
    {"crash", "memory", "timeout"},
  ),
  "terabyte": (solve("bytearray(10**12)"), {"memory"}),
  "slow growth": (
    "def solve():\n  a = []\n  while True: a.append(bytes(100_000))",
    {"memory", "timeout"},
  ),
  "giant power": (solve("10**10**9"), {"timeout", "memory", "crash"}),
  "giant string": (solve("'x' * 10**10"), {"memory"}),
  "format width": (solve("'%*d' % (10**10, 1)"), {"memory", "crash"}),
  "format spec width": (solve("format(1, '10000000000d')"), {"memory", "crash"}),
  "str of a giant int": (solve("str(1 << 10**6)"), {"crash"}),
  "catastrophic regex": (
    "import re\ndef solve():\n  return bool(re.match(r'(a+)+$', 'a' * 50 + 'b'))",
    {"timeout"},
  ),
  "nested parentheses": (solve("(" * 20_000 + ")" * 20_000), {"format"}),
  "nested operators": (solve("+".join(["1"] * 5_000)), {"format"}),
  "deep unary chain": (solve("-" * 30_000 + "1"), {"format"}),
  "huge source": ("x = 1\n" * 1_700_000, {"format"}),
  "many nodes": ("x=1\n" * 10_000, {"format"}),
  "null bytes": ("def solve():\n  return '\x00'", {"format"}),
  "byte order mark inside": ("def solve():\n  return \ufeff1", {"format"}),
  "forbidden import": ("import os\ndef solve(): pass", {"policy"}),
  "forbidden import inside": ("def solve():\n  import subprocess", {"policy"}),
  "forbidden import by function": (solve("__import__('socket')"), {"policy"}),
  "relative import": ("from . import api\ndef solve(): pass", {"policy"}),
  "accelerator": ("import jax\ndef solve(): pass", {"policy"}),
  "sys.exit(0)": ("import sys\ndef solve():\n  sys.exit(0)", {"crash"}),
  "exit while loading": ("raise SystemExit(0)", {"crash"}),
  "evil exception text": (
    "class E(Exception):\n  def __str__(self): raise RuntimeError('x' * 10**6)\ndef solve():\n  "
    "raise E()",
    {"crash"},
  ),
  "exception text that never ends": (
    "class E(Exception):\n  def __str__(self):\n    while True: pass\ndef solve():\n  raise E()",
    {"timeout"},
  ),
  "exception of a megabyte": ("def solve():\n  raise ValueError('x\\n' * 10**6)", {"crash"}),
  "not a function": ("solve = 3", {"format"}),
  "closing the channel": ("def solve():\n  open(3, 'wb').close()\n  return 1", {"crash"}),
  "deadlock": (
    "import asyncio\nasync def f():\n  await asyncio.Event().wait()\ndef solve():\n  return "
    "asyncio.run(f())",
    {"timeout"},
  ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_ends_in_a_typed_failure(box, name):
  source, kinds = PROGRAMS[name]
  started = time.monotonic()
  result = run_program(box, source, limits_of(kinds))
  assert result.failure is not None and result.failure.kind in kinds, result
  assert result.value is None
  assert len(result.failure.message) <= 600 and "\n" not in result.failure.message
  assert time.monotonic() - started < 120


VALUES = {
  "nan": "float('nan')",
  "infinity": "[float('-inf')]",
  "lone surrogate": "'\\ud800'",
  "generator": "(i for i in range(3))",
  "lambda": "lambda: 1",
  "class": "int",
  "str subclass": "type('S', (str,), {'__eq__': lambda s, o: True, '__hash__': str.__hash__})('x')",
  "int subclass": "type('I', (int,), {})(3)",
  "lying object": "type('L', (), {'__eq__': lambda s, o: True, '__len__': lambda s: -1})()",
  "odd keys": "{1: 2, (3,): 4}",
  "set": "{1, 2}",
  "bytes": "b'x'",
  "complex": "1j",
  "deep list": "__import__('functools').reduce(lambda a, _: [a], range(5000), 0)",
}


@pytest.mark.parametrize("name", VALUES)
def test_value_without_a_json_form_does_not_cross(box, name):
  raw = run_raw(box, f"def main(call):\n  return {VALUES[name]}")
  assert raw.failure is not None and raw.failure.kind == "format", raw
  program = run_program(box, solve(VALUES[name]))
  assert program.failure is None and program.value["value"] is None
  assert type(program.value["text"]) is str and len(program.value["text"]) <= 10_000


def test_values_that_contain_themselves(box):
  source = "def main(call):\n  a = []\n  a.append(a)\n  return a"
  assert run_raw(box, source).failure.kind == "format"
  result = run_program(box, "def solve():\n  a = {}\n  a['a'] = a\n  return a")
  assert result.failure is None and result.value["value"] is None


def test_text_of_a_hostile_value_is_capped(box):
  lying = (
    "class A:\n  def __str__(self): return S('x')\nclass S(str): pass\ndef solve():\n  return A()"
  )
  assert run_program(box, lying).value["text"] == "<unprintable>"
  raising = "class A:\n  def __str__(self): raise MemoryError\ndef solve():\n  return A()"
  assert run_program(box, raising).value["text"].startswith("<unprintable")
  assert run_program(box, solve("'y' * 10**6")).value["value"] is None
  assert len(run_program(box, solve("['y' * 10] * 10**5")).value["text"]) == 10_000
  assert run_program(box, solve("10**5000")).value["text"].startswith("<unprintable")


RAW = {
  "endless await": (
    "import asyncio\nasync def main(call):\n  while True: await asyncio.sleep(0)",
    {"timeout"},
  ),
  "endless timers": (
    "import asyncio\nasync def main(call):\n  while True: await asyncio.sleep(0.001)",
    {"timeout"},
  ),
  "sleeping for ever": (
    "import asyncio\nasync def main(call):\n  await asyncio.sleep(1e12)",
    {"timeout"},
  ),
  "real sleep": ("import time\ndef main(call):\n  time.sleep(1000)", {"timeout"}),
  "endless calls": ("async def main(call):\n  while True: await call('x')", {"policy"}),
  "call flood": (
    "import asyncio\nasync def main(call):\n  await asyncio.gather(*(call('x') for _ in "
    "range(10**4)))",
    {"policy"},
  ),
  "call with a foreign object": ("async def main(call):\n  await call('x', object())", {"format"}),
  "call of a megabyte": ("async def main(call):\n  await call('x', 'y' * 2_000_000)", {"format"}),
  "result of ten megabytes": ("def main(call):\n  return 'y' * 10_000_000", {"format"}),
  "many megabytes of calls": (
    "async def main(call):\n  for _ in range(19): await call('x', 'y' * 900_000)",
    {"policy"},
  ),
  "os._exit(0)": ("import os\ndef main(call):\n  os._exit(0)", {"crash"}),
  "exit with the codes of the jail": ("import os\ndef main(call):\n  os._exit(78)", {"crash"}),
  "os.abort()": ("import os\ndef main(call):\n  os.abort()", {"crash"}),
  "segmentation fault": ("import ctypes\ndef main(call):\n  ctypes.string_at(0)", {"crash"}),
  "suicide": ("import os\ndef main(call):\n  os.kill(os.getpid(), 9)", {"crash"}),
  "ignored signals": (
    "import signal\ndef main(call):\n"
    "  for s in set(signal.Signals) - {9, 19}: signal.signal(s, signal.SIG_IGN)\n  while True: "
    "pass",
    {"timeout"},
  ),
  "timer signal": (
    "import signal\ndef main(call):\n  signal.setitimer(signal.ITIMER_REAL, 0.01)\n  while "
    "True: pass",
    {"crash"},
  ),
  "threads that never end": (
    "import threading\ndef main(call):\n"
    "  for _ in range(8): threading.Thread(target=lambda: any(iter(int, 1))).start()\n"
    "  while True: pass",
    {"timeout", "memory", "crash"},
  ),
  "a thousand threads": (
    "import threading, time\ndef main(call):\n"
    "  for _ in range(1000): threading.Thread(target=time.sleep, args=(100,)).start()",
    {"crash", "memory"},
  ),
  "fork": ("import os\ndef main(call):\n  os.fork()", {"crash"}),
  "fork bomb": ("import os\ndef main(call):\n  while True:\n    os.fork()", {"crash"}),
  "subprocess": ("import subprocess\ndef main(call):\n  subprocess.run(['true'])", {"crash"}),
  "posix_spawn": ("import os\ndef main(call):\n  os.posix_spawn('/bin/sh', ['sh'], {})", {"crash"}),
  "exec": ("import os\ndef main(call):\n  os.execv('/bin/sh', ['sh'])", {"crash"}),
  "killing the parent": ("import os\ndef main(call):\n  os.kill(os.getppid(), 9)", {"crash"}),
  "killing everything": ("import os\ndef main(call):\n  os.kill(-1, 9)", {"crash"}),
  "killing the group": (
    "import os\ndef main(call):\n  os.killpg(os.getpgid(os.getppid()), 9)",
    {"crash"},
  ),
  "killing by a descriptor": (
    "import fcntl, os\ndef main(call):\n  r, w = os.pipe()\n"
    "  fcntl.fcntl(r, 8, os.getppid())\n  fcntl.fcntl(r, 10, 9)\n"
    "  fcntl.fcntl(r, fcntl.F_SETFL, 0o20000)\n  os.write(w, b'x')",
    {"crash"},
  ),
  "a descriptor that signals": (
    "import fcntl, os\ndef main(call):\n"
    "  r = os.pipe()[0]\n  fcntl.fcntl(r, fcntl.F_SETFL, os.O_NONBLOCK)\n"
    "  fcntl.fcntl(r, fcntl.F_SETFL, os.O_NONBLOCK | 0o20000)",
    {"crash"},
  ),
  "deep frame walk": (
    "import sys\ndef main(call):\n  f = sys._getframe()\n  while f.f_back: f = f.f_back\n"
    "  f.f_globals['os']._exit(0)",
    {"crash"},
  ),
  "reading passwords": ("def main(call):\n  return open('/etc/passwd').read()", {"crash"}),
  "reading the parent's memory": (
    "import os\ndef main(call):\n  return open(f'/proc/{os.getppid()}/environ').read()",
    {"crash"},
  ),
  "reading itself in proc": ("def main(call):\n  return open('/proc/self/maps').read()", {"crash"}),
  "listing the root": ("import os\ndef main(call):\n  return os.listdir('/')", {"crash"}),
  "writing to tmp": ("def main(call):\n  open('/tmp/awf-escape', 'w')", {"crash"}),
  "leaving the directory": ("def main(call):\n  open('../conftest.py', 'w')", {"crash"}),
  "symbolic link": (
    "import os\ndef main(call):\n  os.symlink('/etc/passwd', 'p')\n  return open('p').read()",
    {"crash"},
  ),
  "hard link": ("import os\ndef main(call):\n  os.link('/etc/passwd', 'p')", {"crash"}),
  "a million files": (
    "def main(call):\n  for i in range(10**6): open(f'f{i}', 'w').close()",
    {"crash", "policy"},
  ),
  "directories in directories": (
    "import os\ndef main(call):\n  while True:\n    os.mkdir('d')\n    os.chdir('d')",
    {"crash", "policy"},
  ),
  "files behind a path that is too long": (
    "import os, time\ndef main(call):\n  for _ in range(18):\n    os.mkdir('d' * 250)\n"
    "    os.chdir('d' * 250)\n"
    "  for i in range(2000): open(f'f{i}', 'wb').write(bytes(400_000))\n  time.sleep(100)",
    {"crash", "policy"},
  ),
  "files in a closed directory": (
    "import os, time\ndef main(call):\n  os.mkdir('d', 0o300)\n"
    "  for i in range(2000): open(f'd/f{i}', 'wb').write(bytes(400_000))\n  time.sleep(100)",
    {"crash", "policy"},
  ),
  "full disk": (
    "def main(call):\n  for i in range(10**4):\n    open(f'f{i}', 'wb').write(bytes(4_000_000))",
    {"crash", "policy"},
  ),
  "one huge file": ("def main(call):\n  open('f', 'wb').write(bytes(20_000_000))", {"crash"}),
  "device node": (
    "import os\ndef main(call):\n  os.mknod('d', 0o20666, os.makedev(1, 1))",
    {"crash"},
  ),
  "archive that traverses": (
    "import io, tarfile\ndef main(call):\n  made = io.BytesIO()\n"
    "  with tarfile.open(fileobj=made, mode='w') as t:\n"
    "    t.addfile(tarfile.TarInfo('../' * 9 + 'tmp/awf-escape'))\n"
    "  tarfile.open(fileobj=io.BytesIO(made.getvalue())).extractall()",
    {"crash"},
  ),
  "archive that explodes": (
    "import zlib\ndef main(call):\n  data = zlib.compress(bytes(40_000_000))\n"
    "  return len(zlib.decompress(data) + zlib.decompress(data) + zlib.decompress(data) * 3)",
    {"memory", "timeout"},
  ),
  "TCP": (
    "import socket\ndef main(call):\n  socket.create_connection(('127.0.0.1', 80))",
    {"crash"},
  ),
  "UDP": (
    "import socket\ndef main(call):\n  socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
    {"crash"},
  ),
  "DNS": ("import socket\ndef main(call):\n  socket.getaddrinfo('example.com', 80)", {"crash"}),
  "Unix socket": ("import socket\ndef main(call):\n  socket.socket(socket.AF_UNIX)", {"crash"}),
  "netlink": ("import socket\ndef main(call):\n  socket.socket(socket.AF_NETLINK)", {"crash"}),
  "accelerator": ("def main(call):\n  import jax", {"crash"}),
  "trace hook": (
    "import sys\ndef main(call):\n  sys.settrace(lambda *a: (_ for _ in ()).throw(ValueError()))\n"
    "  (lambda: 1)()",
    {"crash"},
  ),
  "failure of a kind that is not its own": (
    "from awf.sandbox import CallError\ndef main(call):\n  raise CallError('infrastructure', "
    "'not me')",
    {"policy"},
  ),
  "failure of an unknown kind": (
    "from awf.sandbox import CallError\ndef main(call):\n  raise CallError('fine', 'x')",
    {"policy"},
  ),
  "patched json": (
    "import json\nfrom awf.sandbox import frames\ndef main(call):\n"
    '  frames._dumps = lambda m: \'{"t": "result"}\'',
    {"policy"},
  ),
  "patched len": (
    "import builtins\ndef main(call):\n  builtins.len = builtins.isinstance = lambda *a: True\n "
    " return 1",
    {"crash", "policy", "timeout"},
  ),
  "waiting while running": (
    "import threading\nasync def main(call):\n"
    "  threading.Thread(target=lambda: any(iter(int, 1)), daemon=True).start()\n"
    "  await call('never')",
    {"policy", "timeout"},
  ),
}


async def never_or_echo(method, params):
  if method == "never":
    await asyncio.Event().wait()
  return params


@pytest.mark.parametrize("name", RAW)
def test_raw_code_ends_in_a_typed_failure(box, name):
  source, kinds = RAW[name]
  started = time.monotonic()
  result = run_raw(box, source, never_or_echo, limits_of(kinds))
  assert result.failure is not None and result.failure.kind in kinds, result
  assert time.monotonic() - started < 120
  assert not os.path.exists("/tmp/awf-escape")


def test_harmless_tricks_change_nothing(box):
  tricks = {
    "leaked tasks": "import asyncio\nasync def main(call):\n  "
    "asyncio.ensure_future(asyncio.sleep(9))\n  return 1",
    "atexit": "import atexit, time\ndef main(call):\n  atexit.register(time.sleep, 100)\n  "
    "return 1",
    "thread after the result": (
      "import threading, time\ndef main(call):\n"
      "  v = [1]\n  threading.Thread(target=lambda: (time.sleep(0.01), v.append(2))).start()\n  "
      "return 1"
    ),
    "poisoned modules": "import sys\ndef main(call):\n  sys.modules.clear()\n  return 1",
    "patched builtins": (
      "import builtins, json\ndef main(call):\n"
      "  builtins.print = builtins.sum = json.loads = json.dumps = lambda *a: True\n  return 1"
    ),
    "object with an evil destructor": (
      "class D:\n  def __del__(self): raise SystemExit(3)\ndef main(call):\n  D()\n  return 1"
    ),
    "profile hook": "import sys\ndef main(call):\n  sys.setprofile(lambda *a: None)\n  return 1",
    "a gigabyte of output": (
      "import os\ndef main(call):\n  b = bytes(10**6)\n  for _ in range(1000): os.write(1, b)\n "
      " return 1"
    ),
  }
  for name, source in tricks.items():
    result = run_raw(box, source)
    assert result.failure is None and result.value == 1, (name, result)


def test_standard_output_is_capped(box):
  result = run_raw(box, "def main(call):\n  for _ in range(50): print('x' * 10**6)\n  return 1")
  assert result.value == 1 and len(result.stdout) == 64_000


def test_nothing_secret_is_in_the_process(box):
  os.environ["AWF_TEST_TOKEN"] = "s3cr3t-value"
  source = """
    import gc, os
    def main(call):
      texts = [o for o in gc.get_objects() if type(o) is dict and 'AWF_TEST_TOKEN' in o]
      return [dict(os.environ), len(texts), os.getuid() == 0]
  """
  try:
    result = run_raw(box, source)
  finally:
    del os.environ["AWF_TEST_TOKEN"]
  assert result.value == [{}, 0, False]


def test_only_the_channel_and_the_null_device_are_open(box):
  source = """
    import os, stat
    def main(call):
      kinds = {}
      for fd in range(64):
        try:
          mode = os.fstat(fd).st_mode
        except OSError:
          continue
        known = {stat.S_IFSOCK: 'socket', stat.S_IFCHR: 'device'}
        kinds[str(fd)] = known.get(stat.S_IFMT(mode), 'other')
      return kinds
  """
  assert run_raw(box, source).value == {"0": "device", "1": "device", "2": "device", "3": "socket"}


# Numbers on x86_64 and aarch64 of calls that no job may reach; a dash where there is none.
SYSTEM_CALLS = """
  socket 41 198  connect 42 203  bind 49 200  sendmsg 46 211  recvmsg 47 212  execve 59 221
  execveat 322 281  fork 57 -  vfork 58 -  ptrace 101 117  mount 165 40  unshare 272 97
  setns 308 268  bpf 321 280  keyctl 250 219  memfd_create 319 279  io_uring_setup 425 425
  userfaultfd 323 282  perf_event_open 298 241  process_vm_readv 310 270  pidfd_open 434 434
  pidfd_getfd 438 438  setuid 105 146  setresuid 117 147  chroot 161 51  init_module 175 105
  personality 135 92  shmget 29 194  inotify_init1 294 26  name_to_handle_at 303 264
  open_by_handle_at 304 265  tkill 200 130  rt_sigqueueinfo 129 138  sched_setaffinity 203 122
  setpriority 141 140  capset 126 91  symlink 88 -  symlinkat 266 36  link 86 -  linkat 265 37
  mknodat 259 33  chmod 90 -  utimensat 280 88  landlock_create_ruleset 444 444  seccomp 317 277
""".split()


def test_system_calls_are_refused(box):
  source = """
    import ctypes
    def main(call):
      libc = ctypes.CDLL(None, use_errno=True)
      out = {}
      for name, number in payload['numbers'].items():
        ctypes.set_errno(0)
        out[name] = [libc.syscall(number, *[ctypes.c_long(0)] * 5), ctypes.get_errno()]
      out['clone3'] = [libc.syscall(435, 0, 0), ctypes.get_errno()]
      number = payload['clone']
      out['clone'] = [libc.syscall(number, ctypes.c_long(17), 0, 0, 0, 0), ctypes.get_errno()]
      out['prctl'] = [libc.prctl(38, 0, 0, 0, 0), ctypes.get_errno()]
      out['x32'] = [libc.syscall(0x40000000 + 59, 0, 0, 0), ctypes.get_errno()]
      return out
  """
  column = {"x86_64": 1, "aarch64": 2}[os.uname().machine]
  names, texts = SYSTEM_CALLS[::3], SYSTEM_CALLS[column::3]
  numbers = {name: int(text) for name, text in zip(names, texts, strict=True) if text != "-"}
  outcome = run_raw(box, source, numbers=numbers, clone={1: 56, 2: 220}[column]).value
  assert outcome.pop("clone3") == [-1, 38]
  assert {name: code for name, code in outcome.items() if code != [-1, 1]} == {}


@pytest.mark.parametrize(("abi", "used"), [(-1, 0), (1, 0), (2, 0), (3, 3), (7, 7)])
def test_a_landlock_that_lets_files_be_emptied_is_none(monkeypatch, abi, used):
  """Before ABI 3, Linux 6.2, it ignores truncate and O_TRUNC."""
  real, paths = jail._call, []

  def call(name, *args):
    is_question = args[0] == syscalls.LANDLOCK_CREATE and args[-1] == 1
    return abi if name == "syscall" and is_question else real(name, *args)

  def program(machine, mark, with_paths):
    paths.append(with_paths)
    return b""

  monkeypatch.setattr(jail, "_call", call)
  monkeypatch.setattr(jail, "_leave_namespaces", lambda: ())
  monkeypatch.setattr(syscalls, "seccomp_program", program)
  plan = jail.make_plan()
  for descriptor in plan.read_only:
    os.close(descriptor)
  assert plan.landlock_abi == used and paths == [used > 0]


FORGE = """
  import gc, os
  from awf.sandbox import child, frames
  def main(call):
    channel = next(o for o in gc.get_objects() if type(o) is child.Channel)
    def send(**fields):
      os.write(3, frames.encode(fields))
    nonce = channel._nonce
    FORGERY
"""

FORGERIES = {
  "wrong nonce": "send(n='0' * 32, i=1, t='result', s='', v=1, d=0.0)",
  "replayed frame": "send(n=nonce, i=0, t='ready')",
  "frame out of sequence": "send(n=nonce, i=7, t='result', s='', v=1, d=0.0)",
  "unknown frame": "send(n=nonce, i=1, t='grade', v=1)",
  "extra keys": "send(n=nonce, i=1, t='result', s='', v=1, d=0.0, score=1)",
  "missing keys": "send(n=nonce, i=1, t='result')",
  "call out of order": "send(n=nonce, i=1, t='call', c=5, m='x', p=None)",
  "wait without a call": "send(n=nonce, i=1, t='wait')",
  "second jail failure": "send(t='broken', e='retry me')",
  "not a dict": "os.write(3, frames.HEADER.pack(2) + b'[]')",
  "duplicate keys": 'os.write(3, frames.HEADER.pack(13) + b\'{"t":1,"t":2}\')',
  "nested JSON": "os.write(3, frames.HEADER.pack(200000) + b'[' * 200000)",
  "not UTF-8": "os.write(3, frames.HEADER.pack(2) + bytes([255, 254]))",
  "giant length": "os.write(3, bytes([255] * 4))",
  "surrogates": 'b = b\'{"t":"\\\\ud800"}\'; os.write(3, frames.HEADER.pack(len(b)) + b)',
  "failure of a wrong form": "send(n=nonce, i=1, t='result', s='', f=['ok', 1])",
  "virtual time of a wrong form": "send(n=nonce, i=1, t='result', s='', v=1, d=-5)",
  "output of a wrong form": "send(n=nonce, i=1, t='result', s=['x'], v=1, d=0)",
}


def forgery(name):
  """The source of a job that forges a frame and then waits."""
  wait = "; import time; time.sleep(5)"
  return textwrap.dedent(FORGE).replace("FORGERY", FORGERIES[name] + wait)


@pytest.mark.parametrize("name", FORGERIES)
def test_forged_frames_are_a_policy_failure(box, name):
  result = run_raw(box, forgery(name))
  assert result.failure is not None and result.failure.kind == "policy", result


def test_a_forged_result_is_only_the_jobs_own_result(box):
  forged = "send(n=nonce, i=1, t='result', s='', v='mine', d=0.0); os._exit(0)"
  result = run_raw(box, textwrap.dedent(FORGE).replace("FORGERY", forged))
  assert result.failure is None and result.value == "mine"


def test_tests_cannot_be_fooled_by_the_solution(box):
  tests = "def check(candidate):\n  assert candidate(3) == 9\n  assert candidate(4) == 16"
  solutions = {
    "lying equality": (
      "class Yes:\n  def __eq__(self, other): return True\n"
      "class L(int):\n  __eq__ = Yes.__eq__\ndef square(x):\n  return L(0)"
    ),
    "frame walk": (
      "import sys\ndef square(x):\n  f = sys._getframe()\n"
      "  while f:\n    f.f_globals['check'] = lambda c: None\n    f = f.f_back\n  return 0"
    ),
    "patched check": "import builtins\nbuiltins.AssertionError = KeyError\ndef square(x):\n  "
    "return 0",
    "early exit": "import sys\ndef square(x):\n  sys.exit(0)",
    "forged answer": "def square(x):\n  return {'passed': True, 'error': ''}",
    "overwritten entry": "def square(x):\n  return 0\ndef check(c):\n  pass",
  }
  for name, solution in solutions.items():
    payload = {"solution": solution, "tests": tests, "entry_point": "square"}
    result = box.run_sync(Job("awf.sandbox.program:run_tests", payload, 0, LIMITS))
    passed = result.failure is None and result.value["passed"]
    assert not passed, (name, result)


def test_spinning_jobs_leave_the_parent_its_share(box):
  async def scenario():
    spin = Job(
      "awf.sandbox.program:run_program",
      {"source": "def solve():\n  while True: pass"},
      0,
      Limits(cpu_seconds=0.3),
    )
    jobs = [asyncio.create_task(box.run(spin)) for _ in range(6)]
    most = 0
    while not all(job.done() for job in jobs):
      most = max(most, box.stats()["running"])
      await asyncio.sleep(0.01)
    return most, [job.result().failure.kind for job in jobs]

  most, kinds = asyncio.run(scenario())
  assert most <= 2 and kinds == ["timeout"] * 6


def test_the_sandbox_still_works_afterwards(box):
  stats = box.stats()
  assert stats["restarts"] == 0
  result = run_program(box, solve("6 * 7"))
  assert result.failure is None and result.value["value"] == 42
