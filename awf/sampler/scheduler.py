"""Host side of the engine: which completion sits in which row, which prompts are in the pool.

Pure Python and NumPy, one thread. A prompt is prefilled once into a pool row (all its tokens but
the last, which is the first token of the decode) and copied from there to the rows of its
completions; the pool keeps it for later requests, least recently used first out. None of these
choices changes a bit of any completion.
"""

from __future__ import annotations

import collections
import dataclasses
from concurrent.futures import Future

import numpy as np

from awf.sampler.decode import (
  COLUMN,
  IDLE,
  RUNNING,
  STOPPED,
  Shapes,
  Work,
  empty_work,
  float_bits,
  unpack,
)
from awf.sampler.request import MAX_STOP_IDS, Output, Request

PromptKey = tuple[tuple[int, ...], int, int | None]  # prompt ids, adapter, version


@dataclasses.dataclass
class Job:
  """One submitted request; its future is answered when all its completions are there."""

  request: Request
  future: Future
  version: int | None  # of the adapters it must run with; None: base rows run with any
  outputs: list[Output | None]

  @property
  def prompt_key(self) -> PromptKey:
    return (self.request.prompt_ids, self.request.adapter, self.version)

  def answer(self) -> list[Output] | None:
    """The outputs in order of sample, or None while one is missing."""
    there = [output for output in self.outputs if output is not None]
    return there if len(there) == len(self.outputs) else None


@dataclasses.dataclass
class Sequence:
  """One completion in a row, or waiting for one."""

  job: Job
  sample: int
  token_ids: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)


class Scheduler:
  """Tables of rows, pool and queue."""

  def __init__(self, shapes: Shapes, context: int):
    self.shapes, self.context = shapes, context
    self.pending: collections.deque[Sequence] = collections.deque()
    self.rows: list[Sequence | None] = [None] * shapes.rows
    self.pool: collections.OrderedDict[PromptKey, int] = collections.OrderedDict()
    self.free_pool = list(range(shapes.rows, shapes.rows + shapes.pool))
    self.version = 0  # of the adapters that running rows use
    self.prompt_hits = self.prompt_misses = self.prefill_tokens = 0
    self.table_BX = empty_work(shapes).table_BX
    self._block_arange = np.arange(shapes.block)

  @property
  def num_running(self) -> int:
    return sum(s is not None for s in self.rows)

  def add(self, job: Job) -> None:
    """Queues all completions of a job."""
    self.pending.extend(Sequence(job, i) for i in range(job.request.n))

  def plan(self) -> Work[np.ndarray] | None:
    """Admits what fits and lists the device's work; None when there is nothing to do."""
    work = empty_work(self.shapes)
    blocks: list[tuple[int, int, int, tuple[int, ...]]] = []  # (start, cache row, adapter, tokens)
    copies: list[tuple[int, int, int]] = []
    in_use: set[int] = set()  # pool rows that this dispatch reads or writes
    is_full = False
    while self.pending and not is_full:
      sequence = self.pending[0]
      is_full = not self._admit(sequence, blocks, copies, in_use)
      if not is_full:
        self.pending.popleft()
    if not self.num_running:
      return None
    self._list_blocks(work, blocks)
    if copies:
      work.copies_X3[: len(copies)] = copies
    work.table_BX = self.table_BX
    steps, early = self._decode_budget(bool(in_use))
    calls = -(-len(blocks) // self.shapes.blocks)
    work.counts_4[:] = (calls, len(copies), steps, early)
    return work

  def _decode_budget(self, is_admitting: bool) -> tuple[int, int]:
    """(decode steps, finished rows that end them early): short turns while rows stand empty.

    A turn that admitted nothing always decodes: what is pending may wait for running rows to end.
    """
    rows, running = self.shapes.rows, self.num_running
    if self.pending and is_admitting and running < rows // 2:
      return 0, rows + 1  # prompts of one dispatch are limited; fill the rows first
    steps = self.shapes.steps if running > rows // 2 else max(1, self.shapes.steps // 4)
    return steps, max(1, rows // 8) if self.pending else rows + 1

  def _admit(self, sequence, blocks, copies, in_use) -> bool:
    job, shapes = sequence.job, self.shapes
    row = self._choose_row(job)
    if row is None or not self._fits_adapters(job):
      return False
    known = len(job.request.prompt_ids) - 1
    source = self.pool.get(job.prompt_key)
    if source is None:
      need = -(-known // shapes.block)
      if len(blocks) + need > shapes.calls * shapes.blocks:
        return False
      source = self._claim_pool_row(job.prompt_key, in_use)
      if source is None:
        return False
      for start in range(0, known, shapes.block):
        tokens = job.request.prompt_ids[start : min(start + shapes.block, known)]
        blocks.append((start, source, job.request.adapter, tokens))
      self.prompt_misses += 1
      self.prefill_tokens += known
    else:
      self.prompt_hits += 1
    self.pool.move_to_end(job.prompt_key)
    in_use.add(source)
    copies.extend((source, row, c) for c in range(-(-known // shapes.chunk)))
    self._start_row(row, sequence)
    return True

  def _claim_pool_row(self, key: PromptKey, in_use: set[int]) -> int | None:
    """A pool row for a new prompt: a free one, else the least recently used one not in use."""
    if self.free_pool:
      self.pool[key] = self.free_pool.pop()
      return self.pool[key]
    for old, row in self.pool.items():
      if row not in in_use:
        del self.pool[old]
        self.pool[key] = row
        return row
    return None

  def _fits_adapters(self, job: Job) -> bool:
    """Rows with other adapters' weights must end before the first row with new ones starts."""
    if job.version is None or job.version == self.version:
      return True
    if any(s is not None and s.job.version is not None for s in self.rows):
      return False
    self.version = job.version
    for key in [k for k in self.pool if k[2] not in (None, job.version)]:
      self.free_pool.append(self.pool.pop(key))
    return True

  def _choose_row(self, job: Job) -> int | None:
    """A free row in the group whose longest row is nearest in length: it shares a trip count."""
    length = len(job.request.prompt_ids) + job.request.max_new_tokens // 2
    best, best_cost = None, None
    group = self.shapes.group
    for first in range(0, self.shapes.rows, group):
      free, longest = None, 0
      for row in range(first, first + group):
        if self.rows[row] is None:
          free = row if free is None else free
        else:
          longest = max(longest, int(self.table_BX[row, COLUMN["position"]]))
      if free is None:
        continue
      cost = abs(longest - length) if longest else 0
      if best_cost is None or cost < best_cost:
        best, best_cost = free, cost
    return best

  def _start_row(self, row: int, sequence: Sequence) -> None:
    request, line = sequence.job.request, self.table_BX[row]
    known = len(request.prompt_ids) - 1
    limit = min(request.max_new_tokens, self.context - known - 1)
    values = {
      "status": RUNNING,
      "token": request.prompt_ids[-1],
      "position": known,
      "made": 0,
      "limit": limit,
      "seed_high": np.uint32(request.seed >> 32).view(np.int32),
      "seed_low": np.uint32(request.seed & 0xFFFFFFFF).view(np.int32),
      "sample": sequence.sample,
      "top_k": min(request.top_k, 2**31 - 1),
      "adapter": request.adapter,
      # Below 1e-4 float32 logits overflow and the draw is greedy to all digits.
      "temperature": float_bits(
        0.0 if request.temperature < 1e-4 else min(request.temperature, 1e4)
      ),
      "top_p": float_bits(request.top_p),
    }
    for name, value in values.items():
      line[COLUMN[name]] = value
    stops = () if request.ignore_eos else request.stop_ids
    line[COLUMN["stop"] :] = stops + (-1,) * (MAX_STOP_IDS - len(stops))
    self.rows[row] = sequence

  def _list_blocks(self, work: Work[np.ndarray], blocks) -> None:
    """Fills the prefill calls in order of position: a block never comes before its prefix."""
    blocks.sort(key=lambda block: block[0])
    for i, (start, row, adapter, tokens) in enumerate(blocks):
      call, slot = divmod(i, self.shapes.blocks)
      work.place_CP3[call, slot] = row, start, adapter
      work.tokens_CPT[call, slot, : len(tokens)] = tokens

  def harvest(self, packed: np.ndarray) -> list[tuple[Job, list[Output]]]:
    """Takes over one dispatch's result; returns the jobs that are complete now, with answers."""
    ids_SB, logp_SB, status_B, made_B, steps = unpack(packed, self.shapes.steps)
    done = []
    for row, sequence in enumerate(self.rows):
      if sequence is None:
        continue
      line = self.table_BX[row]
      made = int(made_B[row]) - int(line[COLUMN["made"]])
      if made:
        sequence.token_ids += ids_SB[:made, row].tolist()
        sequence.logprobs += logp_SB[:made, row].tolist()
        line[COLUMN["token"]] = sequence.token_ids[-1]
        line[COLUMN["position"]] += made
        line[COLUMN["made"]] += made
      if status_B[row] != RUNNING:
        self.rows[row] = None
        line[COLUMN["status"]] = IDLE
        job = sequence.job
        reason = "stop" if status_B[row] == STOPPED else "length"
        job.outputs[sequence.sample] = Output(
          tuple(sequence.token_ids), tuple(sequence.logprobs), reason
        )
        answer = job.answer()
        if answer is not None:
          done.append((job, answer))
    return done
