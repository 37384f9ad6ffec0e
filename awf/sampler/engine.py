"""The batched sampler: one thread drives the device, any thread submits requests.

Rows are refilled between dispatches of a few decode steps each; nothing is compiled after the first
dispatch except when adapters of another shape arrive. Strict mode: a completion is bit-equal
whatever its neighbours and whenever it is admitted, because every shape is fixed and no reduction
depends on another row.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np

from awf.qwen.config import QwenConfig
from awf.sampler.cache import LayerCache, init_cache, token_bytes
from awf.sampler.decode import Shapes, compile_dispatch
from awf.sampler.request import Output, Request
from awf.sampler.scheduler import Job, Scheduler

__all__ = ["Engine", "Output", "Request"]

PAGE, CHUNK = 128, 64  # tokens of a prompt's page and of a completion's chunk
TPU_WIDTH = 256  # of both: fewer and larger pieces of a decode step
PROMPT_BYTES = 3 << 29  # pages for prompts: what all rows could need unless that is more


def make_shapes(
  config: QwenConfig,
  rows: int,
  context: int,
  prefill_rows: int,
  steps: int,
  platform: str | None = None,
  max_new_tokens: int = 0,
  prompt_bytes: int = 0,
) -> Shapes:
  """Compiled shapes of an engine.

  Args:
    config: architecture; its dtype is the cache's.
    rows: completions decoded at once.
    context: prompt + completion, tokens.
    prefill_rows: prompt blocks of one prefill call.
    steps: most decode steps of one dispatch.
    platform: the default backend unless named.
    max_new_tokens: of the longest completion; 0 is the context.
    prompt_bytes: for the pages of prompts; 0 is as much as all rows could need, at most
      PROMPT_BYTES. One prompt of full length always has room.
  """
  platform = platform or jax.default_backend()
  on_cpu, on_tpu = platform == "cpu", platform == "tpu"
  page, chunk = (TPU_WIDTH, TPU_WIDTH) if on_tpu else (PAGE, CHUNK)
  prompt_chunks = -(-context // page)
  own_chunks = -(-min(max_new_tokens or context, context) // chunk)
  page_bytes = page * token_bytes(config)
  pages = prompt_bytes // page_bytes
  if not prompt_bytes:
    pages = min(rows * prompt_chunks, PROMPT_BYTES // page_bytes)
  group = 16 if on_cpu and rows % 16 == 0 else rows
  # Few rows of a group make no product slower on CPU, where each page is read from memory anyway.
  share = min(rows, 4 if on_cpu else 8)
  at_once = math.gcd(rows, 8 if on_cpu else 4)
  block = 128
  if on_cpu:
    block = 64 if context >= 512 else 32
  calls = max(-(-prompt_chunks * page // (prefill_rows * block)), 32)
  return Shapes(
    rows=rows, pages=max(pages, prompt_chunks), page=page, prompt_chunks=prompt_chunks,
    chunks=own_chunks, chunk=chunk, group=group, share=share, at_once=at_once,
    blocks=prefill_rows, block=block, calls=calls, steps=steps, is_pinned=on_tpu,
  )  # fmt: skip


def cache_shardings(config: QwenConfig, mesh: jax.sharding.Mesh) -> Any:
  """Key/value heads over `tensor` where it divides them, else the cache is whole everywhere.

  Returns:
    A tree of NamedSharding like the cache.
  """
  heads = "tensor" if config.num_key_value_heads % mesh.shape["tensor"] == 0 else None
  prompt, own = (
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(None,) * lead, heads))
    for lead in (1, 2)
  )
  return (LayerCache(prompt, prompt, own, own),) * config.num_hidden_layers


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
    pad_id: int = 0,
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
      strict: bit-equal rows whatever their neighbours.
      pad_id: token of unused places; never visible to any row.
      mesh: mesh that `params` lie on; the cache is split by key/value heads over `tensor`, else
        replicated.
    """
    for name, value in (
      ("rows", rows),
      ("context", context),
      ("prefill_rows", prefill_rows),
      ("steps_per_dispatch", steps_per_dispatch),
    ):
      if value < 1:
        raise ValueError(f"{name}: expected a positive number, got {value}: config.sampler.{name}")
    self.config, self.context, self.strict, self.pad_id = config, context, strict, pad_id
    self.shapes = make_shapes(
      config, rows, context, prefill_rows, steps_per_dispatch, None, max_new_tokens, prompt_bytes
    )
    self.num_traces = 0
    self._params, self._mesh = params, mesh
    self._cache = self._make_cache()
    self._dispatch = compile_dispatch(config, self.shapes, self._count_trace)
    self._scheduler = Scheduler(self.shapes, context)
    self._adapters: dict[int, object] = {0: None}  # by version
    self._version = 0
    self._inbox: list[Job] = []
    self._ready = threading.Condition()
    self._is_closed = False
    self._error: BaseException | None = None
    self._counts = dict.fromkeys(
      ("requests", "completions", "refused", "prompt_tokens", "tokens", "dispatches", "steps"), 0
    )
    self._busy_seconds = 0.0
    self._thread = threading.Thread(target=self._run, name="awf-engine", daemon=True)
    self._thread.start()

  def _count_trace(self) -> None:
    self.num_traces += 1

  def _make_cache(self):
    s = self.shapes

    def make():
      return init_cache(self.config, s.cache)

    if self._mesh is None:
      return jax.jit(make)()
    return jax.jit(make, out_shardings=cache_shardings(self.config, self._mesh))()

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
    with self._ready:
      self._version += 1
      self._adapters[self._version] = stacked_lora

  def submit(self, request: Request) -> Future[list[Output]]:
    """Queues a request; the future gives its n outputs in order of sample. Thread-safe."""
    future: Future[list[Output]] = Future()
    self._enqueue([(request, future)])
    return future

  async def asubmit(self, request: Request) -> list[Output]:
    """`submit` for asyncio callers."""
    return await asyncio.wrap_future(self.submit(request))

  def generate(self, requests: Iterable[Request]) -> list[list[Output]]:
    """Runs requests together and waits for all; results in their order."""
    pairs = [(request, Future()) for request in requests]
    self._enqueue(pairs)
    return [future.result() for _, future in pairs]

  def stats(self) -> dict[str, float]:
    """Counters since the start: requests, tokens, prompt cache, dispatches, busy seconds."""
    s = self._scheduler
    return {
      **self._counts,
      "prompt_hits": s.prompt_hits,
      "prompt_misses": s.prompt_misses,
      "prefill_tokens": s.prefill_tokens,
      "reused_tokens": s.reused_tokens,
      "busy_seconds": self._busy_seconds,
      "running": s.num_running,
      "waiting": len(s.pending) + len(self._inbox),
      "traces": self.num_traces,
    }

  def close(self) -> None:
    """Stops the thread after the running dispatch; unanswered requests fail with RuntimeError."""
    with self._ready:
      self._is_closed = True
      self._ready.notify()
    self._thread.join()

  def __enter__(self) -> Engine:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _enqueue(self, pairs: list[tuple[Request, Future]]) -> None:
    jobs = []
    with self._ready:
      if self._is_closed:
        raise RuntimeError("the engine is closed") from self._error
      for request, future in pairs:
        self.check(request)
        self._counts["requests"] += 1
        if not 0 < len(request.prompt_ids) < self.context:
          self._counts["refused"] += 1
          future.set_result([Output((), (), "refused")] * request.n)
          continue
        version = self._version if request.adapter else None
        jobs.append(Job(request, future, version, [None] * request.n))
      self._inbox.extend(jobs)
      self._ready.notify()

  def check(self, request: Request) -> None:
    """Raises ValueError for what no wait can make possible.

    That is ids outside the vocabulary, an adapter that is not set, more tokens than a row holds.
    """
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
        raise ValueError(f"{name}: expected ids in [0, {self.config.vocab_size}), got {ids}")

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
    with self._ready:
      while not (self._is_closed or self._inbox or scheduler.pending or scheduler.num_running):
        self._ready.wait()
      if self._is_closed:
        return False
      inbox, self._inbox = self._inbox, []
    for job in inbox:
      if job.future.set_running_or_notify_cancel():
        scheduler.add(job)
    work = scheduler.plan()
    self._drop_old_adapters()
    if work is None:
      return True
    began = time.perf_counter()
    lora = self._adapters[scheduler.version]
    self._cache, packed = self._dispatch(self._params, lora, self._cache, work)
    packed = np.asarray(packed)  # the one copy to the host; waits for the device
    self._busy_seconds += time.perf_counter() - began
    self._counts["dispatches"] += 1
    self._counts["steps"] += int(packed[-1, 0])
    for job, outputs in scheduler.harvest(packed):
      self._counts["completions"] += job.request.n
      self._counts["prompt_tokens"] += len(job.request.prompt_ids)
      self._counts["tokens"] += sum(len(output.token_ids) for output in outputs)
      job.future.set_result(outputs)
    return True

  def _drop_old_adapters(self) -> None:
    """Frees the adapters that no request can still ask for."""
    with self._ready:
      if len(self._adapters) <= 2:
        return
      scheduler = self._scheduler
      waiting = [*scheduler.pending, *(s for s in scheduler.rows if s is not None)]
      used = {job.version for job in [*self._inbox, *(s.job for s in waiting)]}
      used |= {self._version, scheduler.version}
      self._adapters = {v: lora for v, lora in self._adapters.items() if v in used}

  def _fail_all(self, error: Exception) -> None:
    with self._ready:
      self._is_closed = True
      scheduler = self._scheduler
      waiting = [*scheduler.pending, *(s for s in scheduler.rows if s is not None)]
      for job in [*self._inbox, *(s.job for s in waiting)]:
        if not job.future.done():
          job.future.set_exception(error)
      self._inbox = []
