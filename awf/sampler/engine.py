"""The batched sampler: one thread drives the device, any thread submits requests.

Rows are refilled between dispatches of a few decode steps each; nothing is compiled after the first
dispatch except when adapters of another shape arrive. Strict mode: a completion is bit-equal
whatever its neighbours and whenever it is admitted, because every shape is fixed and no reduction
depends on another row. Fast mode has a second shape for few rows.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import logging
import threading
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future

import jax

from awf.qwen.config import QwenConfig
from awf.sampler import kernels
from awf.sampler.device import Device
from awf.sampler.inbox import Inbox
from awf.sampler.job import Job
from awf.sampler.pages import BASE, Version
from awf.sampler.request import OnPart, Output, Part, QueueFull, Request
from awf.sampler.scheduler import Scheduler
from awf.sampler.shapes import make_shapes
from awf.sampler.stream import PartStream
from awf.sampler.text import Decode

__all__ = ["Engine", "Output", "Part", "QueueFull", "Request"]

EXIT_SECONDS = 60.0  # for a dispatch at the program's end; a callback may never return
QUEUE = 8192  # completions that may wait for a row unless told otherwise
COUNTS = ("requests", "completions", "refused", "failed", "prompt_tokens", "tokens")

log = logging.getLogger("awf")


def _form(tree) -> Hashable:
  """What a program is compiled for: structure of a tree, shapes and types of its leaves."""
  leaves, structure = jax.tree.flatten(tree)
  return structure, tuple((x.shape, str(x.dtype)) for x in leaves)


def _stop(inbox: Inbox, thread: threading.Thread, seconds: float | None = None) -> None:
  """Ends an engine's thread; its running dispatch ends first, or is waited for so long."""
  inbox.shut()
  thread.join(seconds)


@contextlib.contextmanager
def _outlived() -> Iterator[None]:
  """Goes on whatever a future's callbacks raise: asyncio's CancelledError and SystemExit pass
  through `concurrent.futures`, which calls no further one, and the thread serves others too.
  """
  try:
    yield
  except BaseException:
    log.exception("sampler: a callback of a request's future raised")


class Engine:
  """Samples completions for requests from any thread; see the module's docstring."""

  def __init__(
    self,
    config: QwenConfig,
    params,
    *,
    rows: int,
    context: int,
    prefill_rows: int,
    steps_per_dispatch: int,
    max_new_tokens: int = 0,
    prompt_bytes: int = 0,
    strict: bool = True,
    queue: int = QUEUE,
    decode: Decode | None = None,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Allocates the cache and starts the engine's thread; compiles at the first request.

    Args:
      config: architecture; `config.dtype` is the compute and cache dtype.
      params: base parameters, read and never donated.
      rows: completions decoded at once.
      context: prompt + completion, tokens.
      prefill_rows: prompt blocks of one prefill call.
      steps_per_dispatch: decode steps between two looks at the queue.
      max_new_tokens: of the longest completion, for which each row keeps room; 0 is the context.
      prompt_bytes: for keys and values of prompts, shared and kept for later requests; 0 is as much
        as all rows could need, within reason.
      strict: bit-equal rows whatever their neighbours; else a smaller program decodes when few rows
        are at work, and log-probs agree within 1e-4.
      queue: completions that may wait for a row; who submits more waits.
      decode: ids to text, for stop strings; see `awf.sampler.text.TextStream`.
      mesh: mesh that `params` lie on; the cache is split by key/value heads over `tensor`, else
        replicated.
    """
    for name, value in (
      ("rows", rows),
      ("context", context),
      ("prefill_rows", prefill_rows),
      ("steps_per_dispatch", steps_per_dispatch),
      ("queue", queue),
    ):
      if value < 1:
        raise ValueError(f"{name}: expected a positive number, got {value}: config.sampler.{name}")
    self.config, self.context, self.strict = config, context, strict
    self.shapes = make_shapes(
      config,
      rows,
      context,
      prefill_rows,
      steps_per_dispatch,
      None,
      max_new_tokens,
      prompt_bytes,
      kernels.can_attend(config, mesh),
    )
    self.device = Device(config, params, self.shapes, strict, mesh)
    self._mesh, self._decode = mesh, decode
    self._scheduler = Scheduler(self.shapes, context, decode, not strict)
    self._version = BASE
    self._adapters: dict[Version, object] = {self._version: None}
    self._programs: dict[Hashable, int] = {_form(None): self._version.program}
    self._open: dict[Job, None] = {}  # those that the thread has fetched and not ended
    self._inbox = Inbox(queue)
    self._error: BaseException | None = None
    self._counts = dict.fromkeys(COUNTS, 0)
    self._thread = threading.Thread(target=self._run, name="awf-engine", daemon=True)
    # A thread at work in JAX when the interpreter ends would abort the process. JAX is imported, so
    # this comes before JAX's own end.
    self._at_exit = functools.partial(_stop, self._inbox, self._thread, EXIT_SECONDS)
    atexit.register(self._at_exit)
    self._thread.start()

  @property
  def mesh(self) -> jax.sharding.Mesh | None:
    """Where the weights lie; None is the default device."""
    return self._mesh

  # --- any thread

  def set_adapters(self, stacked_lora) -> None:
    """Sets the adapters of requests submitted from now on; None leaves only the base.

    Args:
      stacked_lora: LoRA tree with leaves [A, in, R] and [A, R, out], alpha / rank folded into `b`.
    """
    form, placed = _form(stacked_lora), self.device.place(stacked_lora)
    with self._inbox.lock:
      program = self._programs.setdefault(form, len(self._programs))
      version = Version(self._version.number + 1, program)
      self._adapters[version] = placed
      self._version = version  # the engine's thread may look at any time
      self._inbox.stir()  # to forget older ones

  def submit(
    self, request: Request, on_part: OnPart | None = None, wait: bool = True
  ) -> Future[list[Output]]:
    """Queues a request; thread-safe.

    Args:
      request: what to sample.
      on_part: called in the engine's thread with what each completion gained, dispatch by dispatch.
      wait: block until the queue has a place, instead of raising.

    Returns:
      A future of the n outputs in order of sample. `cancel` works until it is done: rows and pages
      are free before the next dispatch.

    Raises:
      ValueError: see `check`.
      QueueFull: the queue has no place, and `wait` is False.
      RuntimeError: the engine is closed.
    """
    job = self._put(request, on_part, wait)
    try:
      if threading.current_thread() is not self._thread:  # which makes the place
        job.placed.result()
    except BaseException:  # Ctrl-C while waiting: nobody will ask for the result
      job.future.cancel()
      raise
    return job.future

  def submit_all(
    self, requests: Iterable[Request], wait: bool = True
  ) -> list[Future[list[Output]]]:
    """Queues requests that the engine sees all at once, without blocking.

    Args:
      requests: what to sample; all of them or none are queued.
      wait: they stand in line when the queue has no place. Else the first of them needs one; the
        others stand in line behind it, before whoever comes later.

    Returns:
      Their futures, as `submit`.

    Raises:
      As `submit`.
    """
    requests, futures = list(requests), []
    try:
      with self._inbox.lock:
        for request in requests:
          futures.append(self._put(request, wait=wait or bool(futures)).future)
    except BaseException:  # one cannot be sampled, or Ctrl-C: nobody will ask for the others
      for future in futures:
        future.cancel()
      raise
    return futures

  async def asubmit(self, request: Request, on_part: OnPart | None = None) -> list[Output]:
    """`submit` and its result for asyncio callers; a cancelled caller cancels the request."""
    return await asyncio.wrap_future(self._put(request, on_part).future)

  def stream(self, request: Request, wait: bool = True) -> PartStream:
    """Queues a request whose parts an asyncio caller reads as they come; see `PartStream`.

    Raises:
      As `submit`.
    """
    parts = PartStream()
    parts.future = self._put(request, parts.put, wait).future
    parts.future.add_done_callback(parts.end)
    return parts

  def generate(self, requests: Iterable[Request]) -> list[list[Output]]:
    """Runs requests together and waits for all; results in their order."""
    if threading.current_thread() is self._thread:
      raise RuntimeError("generate: called in the engine's own thread, which would wait for itself")
    futures = self.submit_all(requests)
    try:
      return [future.result() for future in futures]
    finally:
      for future in futures:
        future.cancel()  # after an error or Ctrl-C; a finished one stays as it is

  def stats(self) -> dict[str, float]:
    """Counters since the start.

    `occupancy` is the share of decoded places (`row_slots`: rows x steps) that gave a token.
    """
    s = self._scheduler
    slots = self.device.counts["row_slots"]
    return {
      **self._counts,
      "cancelled": self._inbox.num_cancelled,
      **self.device.counts,
      "prompt_hits": s.prompt_hits,
      "prompt_misses": s.prompt_misses,
      "prefill_tokens": s.prefill_tokens,
      "reused_tokens": s.reused_tokens,
      "row_steps": s.row_steps,
      "occupancy": s.row_steps / slots if slots else 0.0,
      "running": s.num_running,
      "waiting": s.waiting.count + len(self._inbox),
      "traces": self.device.num_traces,
    }

  @property
  def is_alive(self) -> bool:
    """Whether the engine's thread is at work; a fault or `close` ends it."""
    return self._thread.is_alive()

  def close(self) -> None:
    """Stops the thread after the running dispatch; unanswered requests fail with RuntimeError."""
    _stop(self._inbox, self._thread)
    atexit.unregister(self._at_exit)

  def __enter__(self) -> Engine:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _put(self, request: Request, on_part: OnPart | None = None, wait: bool = True) -> Job:
    with self._inbox.lock:
      if self._inbox.is_closed:
        raise RuntimeError("the engine is closed") from self._error
      self.check(request)
      job = Job(request, Future(), self._version, on_part)
      is_fit = 0 < len(request.prompt_ids) < self.context
      if is_fit:
        self._inbox.put(job, wait)
      self._counts["requests"] += 1
      self._counts["refused"] += not is_fit
    if not is_fit:
      for i in range(request.n):
        job.outputs[i] = Output((), (), "refused")
        job.tell(Part(i, (), (), "refused"))
      job.answer()
    return job

  def check(self, request: Request) -> None:
    """Raises ValueError for what no wait can make possible.

    That is ids outside the vocabulary, an adapter that is not set, more tokens than a row holds,
    stop strings without an engine's `decode`.
    """
    with self._inbox.lock:
      lora = self._adapters[self._version]
    count = 0 if lora is None else jax.tree.leaves(lora)[0].shape[0]
    if not 0 <= request.adapter <= count:
      raise ValueError(f"adapter: expected 0 (base) to {count}, got {request.adapter}")
    room = self.shapes.chunks * self.shapes.chunk
    if min(request.max_new_tokens, self.context - len(request.prompt_ids)) > room:
      raise ValueError(
        f"max_new_tokens: expected at most {room}, got {request.max_new_tokens}: "
        "config.sampler.max_new_tokens"
      )
    for name, ids in (("prompt_ids", request.prompt_ids), ("stop_ids", request.stop_ids)):
      if ids and not 0 <= min(ids) <= max(ids) < self.config.vocab_size:
        wrong = next(i for i in ids if not 0 <= i < self.config.vocab_size)
        raise ValueError(f"{name}: expected ids in [0, {self.config.vocab_size}), got {wrong}")
    if request.stop and self._decode is None:
      raise ValueError("stop: this engine was made without `decode` and knows no texts")

  # --- the engine's thread

  def _run(self) -> None:
    try:
      while self._turn():
        pass
      self._fail_all(RuntimeError("the engine was closed before the request was answered"))
    except BaseException as error:
      self._error = error
      self._fail_all(RuntimeError(f"the sampler's engine stopped: {error!r}"))
      raise

  def _turn(self) -> bool:
    """One dispatch, or a wait for work; False when closed."""
    scheduler = self._scheduler
    self._inbox.settle(scheduler.waiting.count)  # one that failed has left its places
    news = self._inbox.fetch(scheduler.has_work)
    if news is None:
      return False
    new, gone = news
    for job in new:
      self._open[job] = None
      scheduler.waiting.add(job)
    for job in gone:
      self._drop(job)
    work = scheduler.plan(self._version)
    self._inbox.settle(scheduler.waiting.count)
    self._drop_old_adapters()
    if work is None:
      return True
    drawn = self.device.run(self._adapters[scheduler.version], work)
    parts, done = scheduler.harvest(*drawn)
    for job, part in parts:
      try:
        if not job.is_ended:
          job.tell(part)
      except BaseException as error:  # the caller's own code: ends its own request
        scheduler.drop(job)
        self._counts["failed"] += not job.future.cancelled()
        self._end(job, error)
    for job in done:
      if not (job.is_ended or job.future.cancelled()):  # counted before the caller can look
        self._counts["completions"] += job.request.n
        self._counts["prompt_tokens"] += len(job.request.prompt_ids)
        self._counts["tokens"] += sum(len(x.token_ids) for x in job.outputs.values())
      self._end(job)
    return True

  def _end(self, job: Job, error: BaseException | None = None) -> None:
    """Answers a job, or tells its caller why it is not answered."""
    self._open.pop(job, None)
    with _outlived():
      if error is None:
        job.answer()
      else:
        job.fail(error)

  def _drop(self, job: Job) -> None:
    """Frees what a request holds whose caller has gone."""
    self._scheduler.drop(job)
    job.call_off()
    self._open.pop(job, None)

  def _drop_old_adapters(self) -> None:
    """Frees the adapters that no request can still ask for."""
    with self._inbox.lock:
      if len(self._adapters) <= 2:
        return
      used = {job.version for job in [*self._inbox.jobs(), *self._open]}
      used |= {self._version, self._scheduler.version}
      self._adapters = {v: lora for v, lora in self._adapters.items() if v in used}

  def _fail_all(self, error: Exception) -> None:
    for job in [*self._inbox.close(), *self._open]:
      with _outlived():
        job.fail(error)
