"""The parent's side as others see it: configuration, jobs, results, `Sandbox`."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Awaitable, Callable
from typing import Any

from awf.sandbox import grading
from awf.sandbox.child import CallError
from awf.sandbox.frames import json_fault
from awf.sandbox.jail import MAX_SLOTS
from awf.sandbox.pool import Pool
from awf.sandbox.probe import ProbeReport
from awf.sandbox.schedule import LAYER_CALLS, LAYER_LEAF, LAYER_TESTS, Run
from awf.types import Failure, UserError

Handler = Callable[[str, Any], Awaitable[Any]]

ENTRIES = ("awf.sandbox.program", "awf.sandbox.probe")  # modules that are always preloaded
TESTS_ENTRY = "awf.sandbox.program:run_tests"
TESTS_OUTPUT_BYTES = 8 << 20  # arguments and outputs of many calls
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SandboxConfig:
  """Budgets of jobs and of the sandbox as a whole; made from config.sandbox.

  Attributes:
    workers: children that may run at a time, 0 for the number of cores.
    max_children: children alive at a time; most of them wait for a model.
    cpu_seconds: processor time of one job.
    wall_seconds: a job's own running time; waiting for a call's reply does not count.
    memory_mb: address space of a job on top of the preloaded modules.
    output_bytes: size of one frame that a job sends; four times as much in all.
    max_calls: calls that a job may make.
    preload_numeric: import numpy and sympy, where installed, before jobs are forked.
    allow_weak: run even where the probe finds that the host cannot confine a job.
  """

  workers: int = 0
  max_children: int = 128
  cpu_seconds: float = 10.0
  wall_seconds: float = 30.0
  memory_mb: int = 512
  output_bytes: int = 1_000_000
  max_calls: int = 64
  preload_numeric: bool = True
  allow_weak: bool = False

  def __post_init__(self) -> None:
    bounds = {
      "workers": (0, 4096),
      "max_children": (1, MAX_SLOTS),
      "cpu_seconds": (0.01, 86_400),
      "wall_seconds": (0.01, 86_400),
      "memory_mb": (16, 1 << 20),
      "output_bytes": (1_000, 32 << 20),
      "max_calls": (0, 1_000_000),
    }
    for name, (low, high) in bounds.items():
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(
          f"config.sandbox.{name}: expected a number in [{low}, {high}], got {value!r}"
        )


@dataclasses.dataclass(frozen=True)
class Limits:
  """Budgets of one job where they differ from the configuration; None keeps the configured one."""

  cpu_seconds: float | None = None
  wall_seconds: float | None = None
  memory_mb: int | None = None
  output_bytes: int | None = None
  max_calls: int | None = None


@dataclasses.dataclass(frozen=True)
class Job:
  """One piece of work for a child.

  Attributes:
    entry: "module:function" out of the preloaded modules; called as `function(payload, call)`,
      plain or async.
    payload: plain JSON.
    seed: of `random` and `numpy.random` in the child, >= 0.
    limits: budgets that differ from the configuration.
  """

  entry: str
  payload: Any
  seed: int = 0
  limits: Limits | None = None


@dataclasses.dataclass(frozen=True)
class JobResult:
  """How a job ended. `value` counts only when `failure` is None.

  Attributes:
    value: plain JSON of exact types.
    failure: why the job gave no value.
    cpu_seconds: processor time of the child, by the kernel.
    wall_seconds: running time without the time that it waited for replies or for a slot.
    stdout: what the job printed (stdout and stderr), capped; "" when the job was killed.
    calls: calls that it made.
    virtual_seconds: time that its event loop slept through.
  """

  value: Any
  failure: Failure | None
  cpu_seconds: float
  wall_seconds: float
  stdout: str
  calls: int
  virtual_seconds: float


def _num_cores() -> int:
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


class Sandbox:
  """Runs model-written code in jailed children that are forked from a zygote.

  Args:
    config: budgets.
    preload: modules that hold entries of jobs; imported once, in the zygote, where accelerator
      libraries cannot be imported.

  Raises:
    UserError: the host confines too little and `config.allow_weak` is False, or a module cannot be
      preloaded.
  """

  def __init__(self, config: SandboxConfig, preload: tuple[str, ...] = ()) -> None:
    self.config = config
    self._preload = preload
    self._pool = Pool(
      workers=config.workers or _num_cores(),
      max_children=config.max_children,
      preload=preload,
      numeric=config.preload_numeric,
    )
    hello = self._pool.start()
    try:
      self.probe = self._probe(hello)
      if not self.probe.strong and not config.allow_weak:
        raise UserError(
          "this host cannot confine model-written code: a job was able to do the following: "
          f"{'; '.join(self.probe.missing)}; expected Linux with seccomp (and Landlock); set "
          "config.sandbox.allow_weak=True to run all the same"
        )
    except BaseException:
      self._pool.close()
      raise
    _log.debug("%s", self.probe.summary())

  def _probe(self, hello: dict[str, Any]) -> ProbeReport:
    kept = os.path.join(self._pool.root, "kept")
    with open(kept, "w") as file:
      file.write("x")
    payload = {
      "read": [os.path.realpath(__file__), "/etc/passwd", "/proc/self/status"],
      "write": os.path.join(self._pool.root, "probe"),
      "truncate": kept,
    }
    result = self.run_sync(Job("awf.sandbox.probe:attempts", payload, limits=Limits(max_calls=0)))
    os.unlink(kept)
    if result.failure is not None and result.failure.kind == "infrastructure":
      raise UserError(
        f"the sandbox cannot start a job on this host: {result.failure.message}; set "
        "config.sandbox.allow_weak only if that is meant to be so"
      )
    attempts = result.value if isinstance(result.value, dict) else {}
    return ProbeReport(dict(hello["layers"]), attempts)

  async def run(self, job: Job, handler: Handler | None = None) -> JobResult:
    """Runs one job; any number of them at once, from any event loop.

    Args:
      job: what to run. The entry "awf.sandbox.program:run_tests" takes a payload {"solution",
        "tests", "entry_point", optional "prelude", "solution_prelude"} and is spread over two
        jobs, see
        `awf.sandbox.grading`.
      handler: answers the job's calls. It may raise `CallError`, which the job sees; any other
        exception ends the job as an infrastructure failure. Without a handler calls are refused. A
        handler may run jobs that have no handler themselves, and tests.

    Raises:
      ValueError: the job itself is malformed (unknown entry, payload that is not plain JSON).
    """
    if job.entry == TESTS_ENTRY:
      return await self._run_tests(job)
    return await self._run(job, handler, LAYER_LEAF if handler is None else LAYER_CALLS)

  async def _run_tests(self, job: Job) -> JobResult:
    limits = dataclasses.replace(
      job.limits or Limits(), max_calls=grading.MAX_CANDIDATE_CALLS, output_bytes=TESTS_OUTPUT_BYTES
    )

    def starter(layer: int) -> grading.Start:
      def start(entry: str, payload: dict[str, Any], handler: Handler) -> Awaitable[JobResult]:
        return self._run(Job(entry, payload, job.seed, limits), handler, layer)

      return start

    fault = json_fault(job.payload)
    missing = {"solution", "tests", "entry_point"} - set(job.payload if not fault else ())
    if fault or missing:
      raise ValueError(
        f"run_tests: expected solution, tests and entry_point, got {fault or f'no {missing}'}"
      )
    return await grading.run_tests(starter(LAYER_TESTS), starter(LAYER_LEAF), job.payload)

  async def _run(self, job: Job, handler: Handler | None, layer: int) -> JobResult:
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()

    def start(attempt: int, number: int, method: str, params: Any) -> None:
      assert handler is not None
      task = loop.create_task(self._answer(run, attempt, number, handler(method, params)))
      tasks.add(task)
      task.add_done_callback(tasks.discard)

    def on_call(*call: Any) -> None:
      loop.call_soon_threadsafe(start, *call)

    run = self._make_run(job, on_call if handler is not None else None, layer)
    self._pool.submit(run)
    try:
      return JobResult(**await asyncio.wrap_future(run.future))
    except asyncio.CancelledError:
      self._pool.cancel(run)
      raise
    finally:
      for task in list(tasks):
        task.cancel()

  def run_sync(self, job: Job, handler: Handler | None = None) -> JobResult:
    """`run` for callers without an event loop; with a handler it starts one.

    Raises:
      ValueError: the job itself is malformed.
    """
    if handler is not None or job.entry == TESTS_ENTRY:
      return asyncio.run(self.run(job, handler))
    run = self._make_run(job, None, LAYER_LEAF)
    self._pool.submit(run)
    return JobResult(**run.future.result())

  def stats(self) -> dict[str, Any]:
    """Counts of jobs by outcome, children, restarts; the zygote's process id."""
    return self._pool.stats()

  def close(self) -> None:
    """Ends the zygote and every child; jobs in flight fail as infrastructure. Idempotent."""
    self._pool.close()

  def __enter__(self) -> Sandbox:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  async def _answer(self, run: Run, attempt: int, number: int, answer: Awaitable[Any]) -> None:
    try:
      value = await answer
      fault = json_fault(value)
      if fault:
        raise TypeError(f"the handler's reply must be plain JSON, got {fault}")
      self._pool.reply(run, attempt, number, {"v": value})
    except CallError as error:
      self._pool.reply(run, attempt, number, {"e": [error.kind, error.message]})
    except Exception as error:  # not the job's fault: typed so, and logged with its trace
      _log.exception("the handler of a sandbox call failed")
      self._pool.fail(run, attempt, f"handler: {type(error).__name__}: {error}")

  def _make_run(self, job: Job, on_call: Callable[..., None] | None, layer: int) -> Run:
    module, _, function = job.entry.partition(":")
    known = (*ENTRIES, *self._preload)
    if module not in known or not function.isidentifier():
      raise ValueError(f"expected an entry 'module:function' out of {known}, got {job.entry!r}")
    fault = json_fault(job.payload)
    if fault or type(job.seed) is not int or job.seed < 0:
      raise ValueError(f"expected a payload of plain JSON and a seed >= 0, got {fault or job.seed}")
    limits = job.limits or Limits()
    merged = {
      field.name: getattr(self.config, field.name)
      if getattr(limits, field.name) is None
      else getattr(limits, field.name)
      for field in dataclasses.fields(Limits)
    }
    SandboxConfig(**merged)  # the same bounds hold for one job
    message = {"entry": job.entry, "payload": job.payload, "seed": job.seed}
    return Run(message=message, on_call=on_call, layer=layer, **merged)
