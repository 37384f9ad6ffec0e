"""The sandbox with well-meaning jobs: protocol, determinism, budgets, scheduling, recovery."""

import asyncio
import collections
import enum
import os
import signal
import statistics
import struct
import subprocess
import sys
import textwrap
import time
from decimal import Decimal
from fractions import Fraction

import pytest

from awf.sandbox import (
  CallError,
  Job,
  Limits,
  Sandbox,
  SandboxConfig,
  frames,
  launcher,
  scratch,
  syscalls,
)
from awf.sandbox.program import MAX_ENTRIES, decode_value, encode_value
from awf.types import Failure, UserError


@pytest.fixture(scope="module")
def box():
  with Sandbox(SandboxConfig(workers=2), preload=("sandbox_jobs",)) as sandbox:
    yield sandbox


@pytest.fixture(scope="module")
def small_box():
  config = SandboxConfig(workers=1, max_children=4, preload_numeric=False)
  with Sandbox(config, preload=("sandbox_jobs",)) as sandbox:
    yield sandbox


def source_job(source, seed=0, limits=None, **payload):
  return Job(
    "sandbox_jobs:run_source", {"source": textwrap.dedent(source), **payload}, seed, limits
  )


def program_job(source, seed=0, **payload):
  payload = {"source": textwrap.dedent(source), **payload}
  return Job("awf.sandbox.program:run_program", payload, seed)


async def echo(method, params):
  await asyncio.sleep(0)
  return {"method": method, "params": params}


def test_probe_says_what_holds(box):
  report = box.probe
  assert report.strong and not report.missing
  for name in ("file_read", "file_write", "file_truncate"):
    assert report.attempts[name].startswith("refused")
  assert report.attempts["own_directory"] == "possible"
  assert "\n" not in report.summary()
  assert report.layers["seccomp"]


def test_program_value_text_and_stdout(box):
  result = box.run_sync(program_job("def solve():\n  print('hello')\n  return (1, [2.5, None])"))
  assert result.failure is None
  assert result.value == {
    "value": [1, [2.5, None]],
    "text": "(1, [2.5, None])",
    "stdout": "hello\n",
  }
  assert result.stdout == "hello\n"
  assert result.cpu_seconds > 0
  assert result.calls == 0


def test_program_arguments_and_name(box):
  result = box.run_sync(program_job("def add():\n  return 2 + 40", function="add"))
  assert result.value["value"] == 42


def test_programs_may_use_numpy_and_sympy(box):
  result = box.run_sync(
    program_job(
      """
      import numpy as np
      from sympy import symbols, solve as s, Integer
      def solve():
        x = symbols('x')
        return [int(r) for r in s(x**2 - 5*x + 6)] + [np.float64(1.5), np.linalg.norm([3.0, 4.0])]
      """
    )
  )
  assert result.failure is None
  assert result.value["value"] == [2, 3, 1.5, 5.0]


def test_allowed_library_imports(box):
  names = (
    "math re json collections itertools functools statistics fractions decimal random string "
    "datetime heapq bisect "
    "typing dataclasses asyncio textwrap copy operator"
  ).split()
  lines = "\n".join(f"import {name}" for name in names)
  result = box.run_sync(program_job(f"{lines}\ndef solve():\n  return math.factorial(5)"))
  assert result.value["value"] == 120


def test_crash_names_type_message_and_line(box):
  result = box.run_sync(program_job("def solve():\n  x = 1\n  return x / 0"))
  assert result.failure == Failure("crash", "ZeroDivisionError: division by zero (line 3)")


def test_missing_function_and_bad_syntax_are_format_failures(box):
  assert box.run_sync(program_job("x = 1")).failure.kind == "format"
  failure = box.run_sync(program_job("def solve(:\n  pass")).failure
  assert failure.kind == "format" and "SyntaxError" in failure.message


TESTS = {
  "tests": "def check(candidate):\n  assert candidate(2) == (2, [2])\n  assert candidate(x=3) "
  "== (3, [3]), 'x'",
  "entry_point": "pair",
}


def test_run_tests_passes_and_fails(box):
  good = {**TESTS, "solution": "def pair(x):\n  return (x, [x])"}
  bad = {**TESTS, "solution": "def pair(x):\n  return [x, [x]]"}
  entry = "awf.sandbox.program:run_tests"
  assert box.run_sync(Job(entry, good)).value == {"passed": True, "error": ""}
  value = box.run_sync(Job(entry, bad)).value
  assert value["passed"] is False and value["error"].startswith("AssertionError")


def test_run_tests_with_helpers_of_the_prompt(box):
  payload = {
    "prelude": "def helper(x):\n  return x * 2\ndef double(x):\n  'doc'",
    "solution": "def double(x):\n  return x + x",
    "tests": "assert helper(4) == double(4)",
    "entry_point": "double",
  }
  assert box.run_sync(Job("awf.sandbox.program:run_tests", payload)).value["passed"] is True


def test_a_solution_sees_its_prelude_and_not_what_the_tests_see(box):
  payload = {
    "solution_prelude": "import math\nfrom typing import List\ndef helper(x):\n  return x * 2\n",
    "prelude": "expected = 9",
    "solution": "from __future__ import annotations\ndef f(x: List[int]) -> int:\n"
    "  return math.prod(map(helper, x)) + ('expected' in globals())",
    "tests": "assert f([1, 2]) == 8",
    "entry_point": "f",
  }
  entry = "awf.sandbox.program:run_tests"
  assert box.run_sync(Job(entry, payload)).value == {"passed": True, "error": ""}
  assert box.run_sync(Job(entry, {**payload, "solution_prelude": ""})).value["passed"] is False


def test_run_tests_reports_the_solutions_own_failure(box):
  spin = {**TESTS, "solution": "def pair(x):\n  while True: pass"}
  limits = Limits(cpu_seconds=0.3)
  result = box.run_sync(Job("awf.sandbox.program:run_tests", spin, limits=limits))
  assert result.failure.kind == "timeout"
  raising = {**TESTS, "solution": "def pair(x):\n  raise KeyError(x)"}
  value = box.run_sync(Job("awf.sandbox.program:run_tests", raising)).value
  assert value["passed"] is False and "KeyError" in value["error"]


def test_many_test_runs_do_not_lock_each_other_out(small_box):
  async def run_all():
    payload = {**TESTS, "solution": "def pair(x):\n  return (x, [x])"}
    job = Job("awf.sandbox.program:run_tests", payload)
    return await asyncio.gather(*(small_box.run(job) for _ in range(12)))

  results = asyncio.run(run_all())
  assert all(r.failure is None and r.value["passed"] for r in results)


def test_handlers_may_run_programs_while_every_child_waits(small_box):
  async def handler(method, params):
    result = await small_box.run(program_job(f"def solve():\n  return {params} * 2"))
    return result.value["value"]

  job = source_job("async def main(call):\n  return [await call('p', 4), await call('p', 5)]")

  async def run_all():
    return await asyncio.gather(*(small_box.run(job, handler) for _ in range(10)))

  assert [r.value for r in asyncio.run(run_all())] == [[8, 10]] * 10


def test_calls_reach_the_handler_and_come_back(box):
  job = source_job("async def main(call):\n  return await call('llm', {'messages': ['é', 1]})")
  result = box.run_sync(job, echo)
  assert result.value == {"method": "llm", "params": {"messages": ["é", 1]}}
  assert result.calls == 1


def test_call_error_is_raised_in_the_job(box):
  async def refuse(method, params):
    raise CallError("timeout", "too slow")

  job = source_job(
    """
    from awf.sandbox import CallError
    async def main(call):
      try:
        await call('llm')
      except CallError as error:
        return [error.kind, error.message]
    """
  )
  assert box.run_sync(job, refuse).value == ["timeout", "too slow"]
  uncaught = source_job("async def main(call):\n  await call('llm')")
  assert box.run_sync(uncaught, refuse).failure == Failure("timeout", "too slow")


def test_calls_without_a_handler_are_refused(box):
  failure = box.run_sync(source_job("async def main(call):\n  await call('llm')")).failure
  assert failure.kind == "policy"


def test_failing_handler_is_infrastructure(box, caplog):
  async def broken(method, params):
    raise ConnectionError("no route")

  failure = box.run_sync(source_job("async def main(call):\n  await call('llm')"), broken).failure
  assert failure.kind == "infrastructure" and "no route" in failure.message


def test_infrastructure_call_error_passes_through(box):
  async def down(method, params):
    raise CallError("infrastructure", "model is down")

  failure = box.run_sync(source_job("async def main(call):\n  await call('llm')"), down).failure
  assert failure == Failure("infrastructure", "model is down")


ORDER = """
  import asyncio
  async def main(call):
    log = []
    async def one(i):
      log.append(['reply', await call('x', i)])
      await asyncio.sleep(0)
      log.append(['after', i])
    async def timer():
      for k in range(3):
        await asyncio.sleep(5)
        log.append(['tick', k])
    await asyncio.gather(timer(), *(one(i) for i in range(4)))
    return log
"""


def test_order_of_events_does_not_depend_on_the_replies_timing(box):
  def handler_with(delays):
    async def handler(method, params):
      await asyncio.sleep(delays[params])
      return params

    return handler

  logs = [
    box.run_sync(source_job(ORDER), handler_with(delays)).value
    for delays in ((0.0, 0.0, 0.0, 0.0), (0.06, 0.03, 0.015, 0.0), (0.0, 0.04, 0.0, 0.02))
  ]
  assert logs[0] == logs[1] == logs[2]
  assert logs[0][:2] == [["reply", 0], ["after", 0]]
  assert [entry for entry in logs[0] if entry[0] == "tick"] == logs[0][-3:]


def test_sleep_is_virtual_and_waits_for_calls(box):
  job = source_job(
    """
    import asyncio, time
    async def main(call):
      loop = asyncio.get_running_loop()
      await asyncio.sleep(1000)
      at = loop.time()
      reply = await asyncio.wait_for(call('slow'), timeout=0.001)
      try:
        await asyncio.wait_for(asyncio.sleep(50), timeout=2)
      except asyncio.TimeoutError:
        return [at, reply['method'], loop.time()]
    """
  )
  started = time.monotonic()
  result = box.run_sync(job, echo)
  assert result.value == [1000.0, "slow", 1002.0]
  assert result.virtual_seconds == 1002.0
  assert time.monotonic() - started < 10


def test_asyncio_run_inside_a_program_is_virtual_too(box):
  job = program_job(
    """
    import asyncio
    async def work(i):
      await asyncio.sleep(i * 100)
      return i
    async def main():
      inner = await asyncio.to_thread(sum, [1, 2])
      return list(await asyncio.gather(*(work(i) for i in range(4)))) + [inner]
    def solve():
      return asyncio.run(main())
    """
  )
  assert box.run_sync(job).value["value"] == [0, 1, 2, 3, 3]


def test_a_job_is_a_function_of_payload_seed_and_replies(box):
  source = """
    import random
    def main(call):
      return [random.random(), hash('text'), list({'a', 'b', 'c'})]
  """
  program = """
    import random, numpy
    def solve():
      return [random.random(), numpy.random.rand(), hash('text'), list({'a', 'b', 'c'})]
  """
  first, second, other = (box.run_sync(source_job(source, seed=s)).value for s in (7, 7, 8))
  assert first == second
  assert first[0] != other[0] and first[1:] == other[1:]
  runs = (box.run_sync(program_job(program, seed=s)).value["value"] for s in (7, 7, 8))
  first, second, other = runs
  assert first == second
  assert first[0] != other[0] and first[1] != other[1] and first[2:] == other[2:]


def test_wall_time_excludes_waiting(box):
  async def slow(method, params):
    await asyncio.sleep(5.5)
    return None

  job = source_job(
    "async def main(call):\n  await call('x')\n  return 1", limits=Limits(wall_seconds=5.0)
  )
  result = box.run_sync(job, slow)
  assert result.failure is None and result.wall_seconds < 5.0


def test_waiting_children_leave_their_slot(small_box):
  async def run_all():
    gate = asyncio.Event()

    async def wait(method, params):
      await gate.wait()
      return 1

    parked = [
      asyncio.create_task(
        small_box.run(source_job("async def main(c):\n  return await c('x')"), wait)
      )
      for _ in range(3)
    ]
    result = await small_box.run(program_job("def solve():\n  return 5"))
    gate.set()
    return result, await asyncio.gather(*parked)

  result, parked = asyncio.run(run_all())
  assert result.value["value"] == 5
  assert [p.value for p in parked] == [1, 1, 1]


def test_cancelled_run_ends_its_child(small_box):
  async def scenario():
    async def never(method, params):
      await asyncio.Event().wait()

    job = source_job("async def main(call):\n  await call('x')")
    task = asyncio.create_task(small_box.run(job, never))
    while not small_box.stats()["alive"]:
      await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    while small_box.stats()["alive"]:
      await asyncio.sleep(0.01)

  asyncio.run(asyncio.wait_for(scenario(), 20))


def test_jobs_start_in_an_empty_private_directory(box):
  source = """
    import os
    def main(call):
      before = os.listdir('.')
      with open('note.txt', 'w') as file:
        file.write('x')
      return [before, os.listdir('.'), os.getcwd()]
  """
  first, second = (box.run_sync(source_job(source)).value for _ in range(2))
  assert first[:2] == second[:2] == [[], ["note.txt"]]
  assert not os.path.exists(os.path.join(first[2], "note.txt"))


def test_zygote_that_dies_is_replaced_and_jobs_run_again():
  config = SandboxConfig(workers=1, preload_numeric=False)
  with Sandbox(config, preload=("sandbox_jobs",)) as sandbox:
    calls = []

    async def killer(method, params):
      calls.append(params)
      if len(calls) == 1:
        os.kill(sandbox.stats()["zygote_pid"], signal.SIGKILL)
        await asyncio.sleep(30)
      return params

    job = source_job("async def main(call):\n  return await call('x', 3)")
    result = sandbox.run_sync(job, killer)
    assert result.failure is None and result.value == 3
    assert calls == [3, 3]
    assert sandbox.stats()["restarts"] == 1


def test_programs_alone_have_the_numeric_libraries_and_a_zygote_of_their_own():
  """It is replaced with the first one when it dies; nothing of it outlives the sandbox."""
  with Sandbox(SandboxConfig(workers=2), preload=("sandbox_jobs",)) as sandbox:
    seen = source_job("import sys\ndef main(call):\n  return 'numpy' in sys.modules")
    program = program_job("import sympy\ndef solve():\n  return int(sympy.Integer(6) * 7)")
    assert sandbox.run_sync(seen).value is False
    first = sandbox.stats()["zygote_pid"]
    (numeric,) = children_of(first)
    assert sandbox.run_sync(program).value["value"] == 42
    endless = program_job("def solve():\n  while True: pass")

    async def scenario():
      job = asyncio.ensure_future(sandbox.run(endless))
      while not children_of(numeric):
        await asyncio.sleep(0.01)
      os.kill(numeric, signal.SIGKILL)
      while sandbox.stats()["zygote_pid"] in (0, first):
        await asyncio.sleep(0.01)
      job.cancel()
      return await asyncio.gather(job, return_exceptions=True)

    asyncio.run(scenario())
    assert sandbox.run_sync(program).value["value"] == 42
    assert sandbox.stats()["restarts"] == 1
    left = [numeric, *children_of(sandbox.stats()["zygote_pid"])]
  assert len(left) == 2 and not [pid for pid in left if os.path.exists(f"/proc/{pid}")]


def children_of(pid):
  with open(f"/proc/{pid}/task/{pid}/children") as file:
    return [int(child) for child in file.read().split()]


def test_two_lost_zygotes_are_an_infrastructure_failure():
  config = SandboxConfig(workers=1, preload_numeric=False)
  with Sandbox(config, preload=("sandbox_jobs",)) as sandbox:

    async def killer(method, params):
      os.kill(sandbox.stats()["zygote_pid"], signal.SIGKILL)
      await asyncio.sleep(30)

    result = sandbox.run_sync(source_job("async def main(call):\n  await call('x')"), killer)
    assert result.failure.kind == "infrastructure"
    assert sandbox.run_sync(program_job("def solve():\n  return 1")).value["value"] == 1


def test_those_behind_a_lost_zygote_are_tried_again(monkeypatch):
  """The zygote is found lost while the pool goes through the runs in flight."""
  config = SandboxConfig(workers=3, preload_numeric=False)
  with Sandbox(config, preload=("sandbox_jobs",)) as sandbox:
    broken = []

    def send(zygote, message, descriptor=None, real=launcher.ZygoteProcess.send):
      if message["op"] == "kill" and not broken:
        broken.append(zygote)
        raise BrokenPipeError
      real(zygote, message, descriptor)

    monkeypatch.setattr(launcher.ZygoteProcess, "send", send)
    spin = source_job("def main(call):\n  while True: pass", limits=Limits(wall_seconds=0.5))
    long = source_job("import time\ndef main(call):\n  time.sleep(1.5)\n  return 1")

    async def all_of_them():
      return await asyncio.gather(*(sandbox.run(job) for job in (spin, long, long)))

    first, *rest = asyncio.run(all_of_them())
  assert broken and first.failure.kind == "timeout"
  assert [(one.value, one.failure) for one in rest] == [(1, None)] * 2


def test_children_die_with_the_parent():
  script = textwrap.dedent(
    """
    import os, signal, threading, time
    from awf.sandbox import Job, Sandbox, SandboxConfig
    box = Sandbox(SandboxConfig(workers=1, preload_numeric=False))
    source = "def solve():\\n  while True: pass"
    job = Job("awf.sandbox.program:run_program", {"source": source})
    threading.Thread(target=box.run_sync, args=(job,), daemon=True).start()
    while True:
      pids = [run.pid for run in box._pool._schedule.alive.values() if run.ready and run.pid]
      if pids:
        break
      time.sleep(0.01)
    print(box.stats()["zygote_pid"], *pids, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
    """
  )
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run(
    [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=60
  )
  pids = [int(text) for text in done.stdout.split()]
  assert len(pids) == 2
  deadline = time.monotonic() + 20
  while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
    time.sleep(0.02)
  assert not any(_runs(pid) for pid in pids)


def _runs(pid):
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rpartition(")")[2].split()[0] not in "ZX"
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_closed_sandbox_answers_infrastructure():
  sandbox = Sandbox(SandboxConfig(workers=1, preload_numeric=False))
  root = sandbox._pool.root
  sandbox.close()
  sandbox.close()
  assert not os.path.exists(root)
  result = sandbox.run_sync(program_job("def solve():\n  return 1"))
  assert result.failure.kind == "infrastructure"


def test_user_errors_name_the_field():
  with pytest.raises(UserError, match="config.sandbox.memory_mb"):
    SandboxConfig(memory_mb=1)
  with pytest.raises(UserError, match="no_such_module"):
    Sandbox(SandboxConfig(preload_numeric=False), preload=("no_such_module",))


def test_accelerator_libraries_cannot_be_preloaded():
  with pytest.raises(UserError, match="jax"):
    Sandbox(SandboxConfig(preload_numeric=False), preload=("jax",))


def test_malformed_jobs_are_refused_at_once(box):
  for job in (
    Job("os:system", {}),
    Job("awf.sandbox.program:run_program", {"source": float("nan")}),
    Job("awf.sandbox.program:run_program", {}, seed=-1),
    Job("awf.sandbox.program:run_tests", {"tests": ""}),
  ):
    with pytest.raises(ValueError):
      box.run_sync(job)


def test_frames_refuse_what_may_not_cross():
  for body in (
    b"[1]",
    b"{",
    b'{"a":1,"a":2}',
    b'{"a":NaN}',
    b'{"a":1e999}',
    b'{"a":"\\ud800"}',
    b"\xff",
  ):
    with pytest.raises(frames.FrameError):
      frames.decode(body)
  with pytest.raises(frames.FrameError):
    frames.decode(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
  with pytest.raises(frames.FrameError):
    list(frames.FrameReader(10).feed(frames.HEADER.pack(11)))
  assert frames.decode(b'{"a":[1,-0.0,"\\u00e9",null,true]}') == {"a": [1, -0.0, "é", None, True]}
  pieces = frames.encode({"a": 1}) + frames.encode({"b": 2})
  reader = frames.FrameReader(100)
  bodies = [body for byte in pieces for body in reader.feed(bytes([byte]))]
  assert [frames.decode(body) for body in bodies] == [{"a": 1}, {"b": 2}]


def test_encoded_values_come_back_equal():
  value = [
    (1, 2.5, "x"), {3: (4,), "k": None}, {"@": 1}, {1, 2}, frozenset({"a"}), b"\x00\xff", 1 + 2j,
    float("inf"), True,
  ]  # fmt: skip
  value += [collections.deque([1, (2,)]), range(2, 9, 3), Decimal("0.10"), Fraction(-2, 3)]
  form = encode_value(value)
  assert frames.json_fault(form) is None
  assert decode_value(form) == value
  assert list(map(type, decode_value(form))) == list(map(type, value))
  assert decode_value({"a": {"b": [1]}}) == {"a": {"b": [1]}}
  for forged in (
    {"@": "eval", "v": []},
    {"@": "tuple"},
    {"@": "bytes", "v": [999]},
    {"@": "set", "v": [[1]]},
    {"@": "Fraction", "v": "1/0"},
    {"@": "Decimal", "v": "9" * 5_000},
    {"@": "range", "v": [0, 1, 0]},
    {"@": "iterator", "v": 5},
    {"@": "keys", "v": [[1]]},
    {"@": "items", "v": [[1, 2, 3]]},
  ):
    with pytest.raises(ValueError):
      decode_value(forged)


def test_iterators_and_views_come_back_as_such():
  given = {1: "a", (2,): "b"}
  for view in (given.keys(), given.values(), given.items()):
    form = encode_value([view])
    assert frames.json_fault(form) is None
    (back,) = decode_value(form)
    assert type(back) is type(view) and list(back) == list(view)
  (back,) = decode_value(encode_value([enumerate("ab")]))
  assert next(back) == (0, "a") and list(back) == [(1, "b")] and list(back) == []
  whole = decode_value(encode_value(iter(range(MAX_ENTRIES))))
  assert sum(1 for _ in whole) == MAX_ENTRIES
  with pytest.raises(ValueError, match=f"more than {MAX_ENTRIES} values"):
    encode_value(iter(range(MAX_ENTRIES + 1)))


def test_instances_of_subclasses_cross_as_what_they_hold():
  class Liar(int):
    def __eq__(self, other):
      return True

    __hash__ = None

  class Backwards(list):
    def __iter__(self):
      return iter([9])

  pair = collections.namedtuple("pair", "a b")
  counts = collections.Counter("aab")
  values = [counts, collections.OrderedDict(z=1, a=2), collections.defaultdict(list, {1: [2]})]
  values += [pair(1, 2), Liar(4), Backwards([1]), enum.IntEnum("Size", "S M").M]
  plain = [decode_value(encode_value(value)) for value in values]
  assert plain == [{"a": 2, "b": 1}, {"z": 1, "a": 2}, {1: [2]}, (1, 2), 4, [1], 2]
  assert [type(value) for value in plain] == [dict, dict, dict, tuple, int, list, int]


def test_a_check_without_arguments_and_a_candidate_of_that_name(small_box):
  payload = {"solution": "def check(n):\n  return n + 1", "entry_point": "check"}
  for tests, passed in (("assert check(1) == 2", True), ("assert check(1) == 3", False)):
    result = small_box.run_sync(Job("awf.sandbox.program:run_tests", {**payload, "tests": tests}))
    assert result.value["passed"] is passed
  payload = {"solution": "def f(n):\n  return n + 1", "entry_point": "f"}
  tests = "def check():\n  assert f(1) == "
  for expected, passed in (("2", True), ("3", False)):
    job = Job("awf.sandbox.program:run_tests", {**payload, "tests": tests + expected})
    assert small_box.run_sync(job).value["passed"] is passed


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_program_is_well_formed(machine):
  for with_paths in (True, False):
    code = syscalls.seccomp_program(machine, 1234, with_paths=with_paths)
    count = len(code) // 8
    assert len(code) % 8 == 0 and count < 4096
    for index in range(count):
      kind, _, jump_true, jump_false, value = struct.unpack_from("<BBBBI", code, 8 * index)
      jump = value if kind == 0x05 else max(jump_true, jump_false)
      assert kind == 0x06 or index + 1 + jump < count  # only a return may be last
  columns = {**syscalls.PLAIN, **syscalls.PATHS}
  numbers = [syscalls.number(entry, machine) for entry in columns.values()]
  known = [n for n in numbers if n >= 0]
  assert len(known) == len(set(known))


def test_import_of_the_package_needs_no_numeric_library():
  code = "import sys, awf.sandbox; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
  environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
  )
  assert done.stdout.strip() == "[]"


def test_latency_of_a_trivial_job(box):
  job = program_job("def solve():\n  return 1")
  cpu = [box.run_sync(job).cpu_seconds for _ in range(15)]
  assert statistics.median(cpu) < 0.25


# --- private directories where no tmpfs bounds them


CORES = """
  import random
  real_import = random.__builtins__["__import__"]
  os, threading, time = map(real_import, ("os", "threading", "time"))

  def {function}({argument}):
    threading.stack_size(1 << 16)
    leave = threading.Event()
    for _ in range({count}):
      threading.Thread(target=leave.wait, daemon=True).start()
    deadline = time.monotonic() + {seconds}
    others = {{thread.native_id for thread in threading.enumerate()[1:]}}
    while time.monotonic() < deadline:
      seen = [len(os.sched_getaffinity(tid)) for tid in (0, *others)]
      if max(seen) == 1:
        break
    try:
      os.sched_setaffinity(0, range(64))
    except OSError:
      seen.append(len(os.sched_getaffinity(0)))
    leave.set()
    return seen
"""


@pytest.mark.skipif(
  not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="one core"
)
@pytest.mark.parametrize("program", [False, True], ids=["source", "program"])
def test_one_with_many_threads_is_kept_to_one_core(box, program):
  """Each zygote does so for its own; a few threads keep every core."""
  make, names = (program_job, ("solve", "")) if program else (source_job, ("main", "call"))
  for count, seconds, expected in ((3, 1.0, len(os.sched_getaffinity(0))), (20, 20.0, 1)):
    source = CORES.format(function=names[0], argument=names[1], count=count, seconds=seconds)
    result = box.run_sync(make(source))
    assert result.failure is None
    seen = result.value["value"] if program else result.value
    assert seen == [expected] * (count + 2)


def nested(folder, names):
  """Makes directories in one another, however long their path is."""
  here = os.open(folder, os.O_RDONLY)
  for name in names:
    os.mkdir(name, dir_fd=here)
    inner = os.open(name, os.O_RDONLY, dir_fd=here)
    os.close(here)
    here = inner
  return here


def test_hostile_directories_are_measured_and_removed(tmp_path):
  def is_full(folder):
    return scratch.is_full(str(folder), 100, 1000)

  plain = tmp_path / "plain"
  (plain / "a" / "b").mkdir(parents=True)
  (plain / "a" / "x").write_bytes(bytes(10))
  (plain / "link").symlink_to("/")
  assert not scratch.is_full(str(plain), 4, 100_000)
  assert scratch.is_full(str(plain), 3, 100_000) and scratch.is_full(str(plain), 4, 10)
  for i in range(8):
    (plain / f"{i}").write_bytes(bytes(100))
  shallow = tmp_path / "shallow"
  shallow.mkdir()
  os.close(nested(shallow, ["d"] * 40))
  assert not scratch.is_full(str(shallow), 100, 1_000_000)
  steep = tmp_path / "steep"
  steep.mkdir()
  os.close(nested(steep, ["d"] * 80))
  assert scratch.is_full(str(steep), 100, 1_000_000), "deeper than a job may nest"
  deep = tmp_path / "deep"
  deep.mkdir()
  os.close(nested(deep, ["d"] * 2000))
  long = tmp_path / "long"
  long.mkdir()
  here = nested(long, ["d" * 250] * 18)
  os.close(os.open("f", os.O_CREAT, 0o600, dir_fd=here))
  os.truncate(f"/proc/self/fd/{here}/f", 10_000)
  os.close(here)
  closed = tmp_path / "closed"
  (closed / "in").mkdir(parents=True)
  (closed / "in" / "f").write_bytes(bytes(2000))
  (closed / "in").chmod(0)
  closed.chmod(0o300)
  assert all(map(is_full, (plain, deep, long, closed)))
  for folder in (plain, shallow, steep, deep, long, closed):
    scratch.remove(str(folder))
    assert not folder.exists()
  scratch.remove(str(tmp_path / "nothing"))
  assert os.listdir("/")


def test_one_that_calls_without_waiting_is_ended(box):
  limits = Limits(max_calls=10_000, wall_seconds=600)
  source = """
    import asyncio
    async def main(call):
      await asyncio.gather(*(call('never') for _ in range(3000)))
  """
  tasks = []

  async def never(method, params):
    tasks.append(method)
    await asyncio.Event().wait()

  result = box.run_sync(source_job(source, limits=limits), never)
  assert result.failure.kind == "policy" and "1024 calls at a time" in result.failure.message
  assert len(tasks) <= 1024
