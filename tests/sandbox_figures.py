"""Figures of the sandbox: leaks over many jobs, containment by layer, what spinning jobs take.

  python tests/sandbox_figures.py jobs --count=10000
    random jobs; growth of memory, processes, descriptors and files; what a trivial job takes
  python tests/sandbox_figures.py containment
    all hostile jobs of tests/test_sandbox_hostile.py with all layers, without Landlock, with
    seccomp alone; as root and as an ordinary user
  python tests/sandbox_figures.py spin
    the sampler's speed beside 64 jobs that spin

Each ends with a line of JSON and exits 1 when a limit is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import random
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from awf.sandbox import Job, Limits, Sandbox, SandboxConfig  # noqa: E402
from awf.types import UserError  # noqa: E402

GROWTH_KB = 8_192  # that memory may grow by, once it is warm: what the allocator keeps
SHARE = 0.6  # of its speed that the sampler keeps
OVERHEAD_MS = 10.0  # that a trivial job may take, one after the other, median
NOBODY = 65534
LIMITS = Limits(cpu_seconds=0.2, wall_seconds=5.0, memory_mb=64, max_calls=5)


def raw(source: str, limits: Limits = LIMITS, **payload: Any) -> Job:
  """A job whose code gets the interpreter, as code that escaped the guarded imports."""
  return Job("sandbox_jobs:run_source", {"source": textwrap.dedent(source), **payload}, 0, limits)


def new_box(**fields: Any) -> Sandbox:
  config = SandboxConfig(workers=2, preload_numeric=False, **fields)
  return Sandbox(config, preload=("sandbox_jobs",))


# ---- jobs ----

KINDS = (
  "def main(call):\n  return {n}",
  "def main(call):\n  return 'x' * {n}",
  "def main(call):\n  return 1 / 0",
  "async def main(call):\n  return await call('x', {n})",
  "import asyncio\nasync def main(call):\n  return await asyncio.gather(call('x'), call('y'))",
  "async def main(call):\n  while True: await call('x')",
  "def main(call):\n  open('f', 'w').write('x' * {n})\n  return 1",
  "import os\ndef main(call):\n  os.mkdir('d')\n  open('d/f', 'w').close()\n  os._exit(3)",
  "import os\ndef main(call):\n  os.kill(os.getpid(), 9)",
  "import os\ndef main(call):\n  os.fork()",
  "import os\ndef main(call):\n  return [os.pipe() for _ in range(20)]",
  "import threading as t, time\ndef main(call):\n  t.Thread(target=time.sleep, args=(9,)).start()",
  "def main(call):\n  return bytearray(10**12)",
  "def main(call):\n  raise SystemExit(0)",
  "def main(call):\n  return object()",
  "import os\ndef main(call):\n  os.write(3, b'nonsense')\n  os._exit(0)",
  "import os\ndef main(call):\n  os.close(3)",
)
SLOW = "def main(call):\n  while True: pass"  # ends at its limit of processor time
AT_ONCE = 64


def standing(box: Sandbox) -> dict[str, int]:
  """What this process and the zygote hold now: kB, descriptors, processes, files."""
  pids = {"parent": os.getpid(), "zygote": box.stats()["zygote_pid"]}
  out = {"files": sum(len(names) + len(dirs) for _, dirs, names in os.walk(box._pool.root))}
  for name, pid in pids.items():
    fields = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1].split()
    out[f"{name}_kb"] = int(fields[0])
    out[f"{name}_descriptors"] = len(os.listdir(f"/proc/{pid}/fd"))
    tasks = [Path(f"/proc/{pid}/task/{t}/children") for t in os.listdir(f"/proc/{pid}/task")]
    out[f"{name}_children"] = sum(len(task.read_text().split()) for task in tasks)
    out[f"{name}_threads"] = len(tasks)
  return out


async def run_jobs(box: Sandbox, count: int, rng: random.Random) -> dict[str, int]:
  """Runs random jobs, AT_ONCE at a time; a hundredth are cancelled. Returns ends by name."""
  ends: dict[str, int] = {}
  numbers = iter(range(count))  # one task for each would itself look like a leak

  async def handler(method: str, params: Any) -> Any:
    await asyncio.sleep(0)
    return params

  async def one(number: int) -> None:
    source = SLOW if number % 200 == 0 else rng.choice(KINDS).format(n=rng.randrange(1, 5_000))
    task = asyncio.ensure_future(box.run(raw(source), handler))
    if rng.random() < 0.01:
      await asyncio.sleep(0.01)
      task.cancel()
    (result,) = await asyncio.gather(task, return_exceptions=True)
    end = "cancelled"
    if not isinstance(result, BaseException):
      end = result.failure.kind if result.failure else "ok"
    ends[end] = ends.get(end, 0) + 1

  async def some() -> None:
    for number in numbers:
      await one(number)

  await asyncio.gather(*(some() for _ in range(AT_ONCE)))
  deadline = time.monotonic() + 60
  while box.stats()["alive"] and time.monotonic() < deadline:
    await asyncio.sleep(0.05)
  return ends


def jobs(count: int, warm: int = 500, seed: int = 0) -> dict[str, Any]:
  """Runs `warm` jobs, then `count`; how much more is held after the second than after the first."""
  rng = random.Random(seed)
  with new_box() as box:
    asyncio.run(run_jobs(box, warm, rng))
    before, started = standing(box), time.monotonic()
    ends = asyncio.run(run_jobs(box, count, rng))
    after, seconds = standing(box), time.monotonic() - started
    overhead = statistics.median(trivial_seconds(box) for _ in range(200))
    restarts = box.stats()["restarts"]
    root = box._pool.root
  growth = {name: after[name] - before[name] for name in before}
  leaks = [n for n, x in growth.items() if x > (GROWTH_KB if n.endswith("_kb") else 0)]
  leaks += ["directory"] if os.path.exists(root) else []
  leaks += ["restarts"] if restarts else []
  return {
    "jobs": count,
    "ends": ends,
    "growth": growth,
    "leaks": leaks,
    "overhead_ms": round(1000 * overhead, 2),
    "seconds": round(seconds, 1),
  }


def trivial_seconds(box: Sandbox) -> float:
  """From asking for a job that only returns to its result, with a warm zygote."""
  started = time.perf_counter()
  assert box.run_sync(raw("def main(call):\n  return 1")).value == 1
  return time.perf_counter() - started


# ---- containment ----

LAYERS = {"all": (), "no_landlock": ("landlock",), "seccomp_alone": ("landlock", "namespaces")}
CALLS = {  # system calls that a layer needs, on x86_64 and aarch64
  "landlock": ((444, 444),),
  "namespaces": ((272, 97), (165, 40)),  # unshare, mount
  "seccomp": ((317, 277),),
}
# Cases of tests/test_sandbox_hostile.py that reach for something outside the job.
ESCAPES = (
  "fork", "fork bomb", "subprocess", "posix_spawn", "exec", "killing the parent", "device node",
  "killing everything", "killing the group", "reading passwords", "reading the parent's memory",
  "reading itself in proc", "listing the root", "writing to tmp", "leaving the directory",
  "symbolic link", "hard link", "a million files", "full disk", "one huge file", "TCP", "UDP",
  "DNS", "Unix socket", "netlink", "accelerator", "archive that traverses",
)  # fmt: skip
# Tries to reach a file and a process of its own user; gives the names of what worked.
REACH = """
  import ctypes, os
  def main(call):
    libc = ctypes.CDLL(None, use_errno=True)
    path, pid, x86 = payload['path'], payload['pid'], os.uname().machine == 'x86_64'
    tries = {
      'open': lambda: open(path).read(),
      'os.open': lambda: os.open(path, os.O_RDONLY),
      'write': lambda: open(path, 'a').write('x'),
      'unlink': lambda: os.unlink(path),
      'chmod': lambda: os.chmod(path, 0o777),
      'rename': lambda: os.rename(path, path + '2'),
      'stat of the parent': lambda: open('/proc/%d/environ' % pid).read(),
      'memory': lambda: open('/proc/%d/mem' % pid, 'rb+'),
      'descriptors': lambda: os.listdir('/proc/%d/fd' % pid),
      'kill': lambda: os.kill(pid, 0),
      'setuid': lambda: os.setuid(0) if os.getuid() else os.listdir('/root'),
    }
    calls = {
      'openat': (257 if x86 else 56, -100, path.encode(), 0, 0),
      'openat2': (437, -100, path.encode(), bytes(24), 24),
      'process_vm_readv': (310 if x86 else 270, pid, 0, 0, 0, 0, 0),
      'ptrace': (101 if x86 else 117, 0x4206, pid, 0, 0),
      'pidfd_open': (434, pid, 0),
      'io_uring_setup': (425, 4, bytes(120)),
      'unshare': (272 if x86 else 97, 0x10000000),
      'socket': (41 if x86 else 198, 2, 1, 0),
      'memfd_create': (319 if x86 else 279, b'x', 0),
      'userfaultfd': (323 if x86 else 282, 0),
      'setpriority': (141 if x86 else 140, 0, pid, 5),
      'sched_setaffinity': (203 if x86 else 122, pid, 8, bytes([1] + [0] * 7)),
      'prlimit of the parent': (302 if x86 else 261, pid, 7, bytes(16), 0),
    }
    found = []
    for name, act in tries.items():
      try:
        act()
      except (OSError, PermissionError):
        continue
      found.append(name)
    for name, (number, *args) in calls.items():
      args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
      if libc.syscall(ctypes.c_long(number), *args) >= 0:
        found.append(name)
    return found
"""


def take_away(layers: tuple[str, ...]) -> None:
  """Makes this process and its children see a kernel without these layers: ENOSYS."""
  machine = os.uname().machine
  column = {"x86_64": 0, "aarch64": 1}[machine]
  numbers = [call[column] for layer in layers for call in CALLS[layer]]
  code = struct.pack("<HBBI", 0x20, 0, 0, 0)  # load the call's number
  for number in numbers:
    code += struct.pack("<HBBI", 0x15, 0, 1, number) + struct.pack("<HBBI", 6, 0, 0, 0x50000 | 38)
  code += struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000)
  buffer = ctypes.create_string_buffer(code, len(code))
  program = struct.pack("@HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
  libc = ctypes.CDLL(None, use_errno=True)
  if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
    raise OSError(ctypes.get_errno(), "no filter could be installed")


async def never_or_echo(method: str, params: Any) -> Any:
  if method == "never":
    await asyncio.Event().wait()
  return params


def jail(layers: str, user: int) -> dict[str, Any]:
  """Tries hostile jobs in a sandbox of this process, which gives up layers and user first.

  They come as JSON from standard input, as `hostile_jobs` gives them.
  """
  hostile = json.load(sys.stdin)
  if layers:
    take_away(tuple(layers.split(",")))
  if user != os.getuid():
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
  with tempfile.TemporaryDirectory() as folder:
    secret = Path(folder) / "secret"
    secret.write_text("s3cr3t")
    secret.chmod(0o600)
    try:
      box = new_box()
    except UserError as error:
      return {"refused": str(error)}
    with box:
      result = box.run_sync(raw(REACH, path=str(secret), pid=os.getpid()))
      failed = {"reach": str(result.failure)} if result.failure else {}
      reached = list(result.value or ())
      failed |= asyncio.run(run_hostile(box, hostile))
      works = box.run_sync(raw("def main(call):\n  return 42")).value == 42
      kept = secret.read_text() == "s3cr3t" and not os.path.exists("/tmp/awf-escape")
      return {
        "layers": [name for name, holds in box.probe.layers.items() if holds],
        "missing": list(box.probe.missing), "jobs": len(hostile), "reached": reached,
        "failed": failed,
        "sound": works and kept and box.stats()["restarts"] == 0,
      }  # fmt: skip


async def run_hostile(box: Sandbox, hostile: list[list[Any]]) -> dict[str, str]:
  """Name and end of those that did not end in a failure of their kinds; a few run at a time."""
  limits = Limits(cpu_seconds=1.0, wall_seconds=8.0, memory_mb=128, max_calls=20)
  gate, failed = asyncio.Semaphore(8), {}

  async def one(name: str, entry: str, source: str, kinds: list[str]) -> None:
    async with gate:
      end = (await box.run(Job(entry, {"source": source}, 0, limits), never_or_echo)).failure
    if end is None or end.kind not in kinds:
      failed[name] = str(end)

  await asyncio.gather(*(one(*job) for job in hostile))
  return failed


def hostile_jobs() -> list[list[Any]]:
  """[name, entry, source, kinds of failure] of the jobs of tests/test_sandbox_hostile.py."""
  import test_sandbox_hostile as all_of

  raw_entry, program = "sandbox_jobs:run_source", "awf.sandbox.program:run_program"
  rows = [[n, raw_entry, source, sorted(kinds)] for n, (source, kinds) in all_of.RAW.items()]
  rows += [
    [f"program: {name}", program, source, sorted(kinds)]
    for name, (source, kinds) in all_of.PROGRAMS.items()
  ]
  rows += [
    [f"value: {name}", raw_entry, f"def main(call):\n  return {value}", ["format"]]
    for name, value in all_of.VALUES.items()
  ]
  names = all_of.FORGERIES
  return rows + [[f"frame: {n}", raw_entry, all_of.forgery(n), ["policy"]] for n in names]


def interpreter(user: int) -> str:
  """A Python that this user may run: this one, or one of the system's.

  Raises:
    RuntimeError: there is none, so that this user cannot be simulated.
  """
  code = "import sys; sys.exit(sys.version_info < (3, 11))"
  as_user: dict[str, Any] = {}
  if user != os.getuid():
    as_user = {"user": user, "group": user, "extra_groups": []}
  for path in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
    try:
      done = subprocess.run([path, "-c", code], capture_output=True, cwd="/", **as_user)
    except OSError:  # not there, or not for this user
      continue
    if done.returncode == 0:
      return path
  raise RuntimeError(f"no Python >= 3.11 that user {user} may run")


def jailed(
  layers: tuple[str, ...], user: int, names: tuple[str, ...] | None = None
) -> dict[str, Any]:
  """`jail` in a process of its own; with `names`, of these hostile jobs alone."""
  hostile = [job for job in hostile_jobs() if names is None or job[0] in names]
  command = [interpreter(user), str(Path(__file__).resolve()), "jail", f"--user={user}"]
  done = subprocess.run(
    [*command, f"--layers={','.join(layers)}"],
    input=json.dumps(hostile), capture_output=True, text=True, timeout=1200,
  )  # fmt: skip
  if done.returncode:
    raise RuntimeError(done.stderr[-2000:])
  return json.loads(done.stdout.splitlines()[-1])


def containment() -> dict[str, Any]:
  users = (0, NOBODY) if os.getuid() == 0 else (os.getuid(),)
  rows = {
    f"{name}, {'root' if user == 0 else 'user'}": jailed(layers, user)
    for name, layers in LAYERS.items()
    for user in users
  }
  return {**rows, "without seccomp": jailed(("seccomp",), users[-1])}


def is_contained(row: dict[str, Any]) -> bool:
  """Nothing was reached; or the sandbox refused to start."""
  if "refused" in row:
    return True
  return bool(row["sound"]) and not (row["reached"] or row["failed"] or row["missing"])


# ---- spin ----


def spin(turns: int, count: int = 64) -> dict[str, Any]:
  """Tokens a second of the shipped model's sampler alone and beside `count` jobs that spin."""
  from awf.config_io import load_config, resolve_paths

  box = Sandbox(SandboxConfig(preload_numeric=False, max_children=count), preload=("sandbox_jobs",))
  from awf.policy import make_policy
  from awf.runtime_setup import setup_jax
  from awf.types import SamplingParams

  setup_jax()
  policy = make_policy(resolve_paths(load_config("configs/quickstart.py")), None)
  sampling = SamplingParams(1.0, 1.0, 0, 96)
  limits = Limits(cpu_seconds=3600.0, wall_seconds=3600.0)

  async def speed(key: int) -> float:
    before, started = policy.engine.stats()["tokens"], time.perf_counter()
    messages = [{"role": "user", "content": "What is 12 times 13?"}]
    await policy.propose(messages, 64, key, sampling)
    return (policy.engine.stats()["tokens"] - before) / (time.perf_counter() - started)

  async def measure() -> tuple[list[float], list[float], int]:
    alone, beside, most = [], [], 0
    await speed(0)
    for turn in range(1, turns + 1):
      alone.append(await speed(turn))
      tasks = [asyncio.ensure_future(box.run(raw(SLOW, limits))) for _ in range(count)]
      while box.stats()["running"] < box._pool._schedule._workers:
        await asyncio.sleep(0.01)
      await asyncio.sleep(0.3)
      beside.append(await speed(turn))
      most = max(most, box.stats()["running"])
      for task in tasks:
        task.cancel()
      await asyncio.gather(*tasks, return_exceptions=True)
      while box.stats()["alive"]:
        await asyncio.sleep(0.01)
    return alone, beside, most

  try:
    alone, beside, most = asyncio.run(measure())
  finally:
    policy.close()
    box.close()
  medians = statistics.median(alone), statistics.median(beside)
  return {
    "tokens_per_second_alone": round(medians[0], 1), "beside": round(medians[1], 1),
    "share": round(medians[1] / medians[0], 3), "jobs": count, "running": most, "turns": turns,
    "nice": os.nice(0), "cores": len(os.sched_getaffinity(0)),
  }  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(description="figures of the sandbox")
  parser.add_argument("what", choices=("jobs", "containment", "spin", "jail"))
  parser.add_argument("--count", type=int, default=10_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--turns", type=int, default=7)
  parser.add_argument("--layers", default="", help="jail: layers that are taken away")
  parser.add_argument("--user", type=int, default=os.getuid(), help="jail: user id")
  args = parser.parse_args()
  if args.what == "jobs":
    result = jobs(args.count, seed=args.seed)
    is_good = not result["leaks"] and result["overhead_ms"] <= OVERHEAD_MS
  elif args.what == "containment":
    result = containment()
    is_good = all(map(is_contained, result.values()))
  elif args.what == "spin":
    result = spin(args.turns)
    is_good = result["share"] >= SHARE
  else:
    result, is_good = jail(args.layers, args.user), True
  print(json.dumps(result))
  return 0 if is_good else 1


if __name__ == "__main__":
  sys.exit(main())
