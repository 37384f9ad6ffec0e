"""Host side of the engine: which completion sits in which row, what is prefilled when.

Pure Python and NumPy, one thread. A prompt is prefilled once, a limited number of tokens in each
dispatch while rows decode; the rows of its completions read its pages in groups. None of these
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
from awf.sampler.pages import PageTable, Prompt, PromptKey
from awf.sampler.request import MAX_STOP_IDS, Output, Request

STALL_TOKENS = 2048  # most prompt tokens of a dispatch in which rows decode


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
  prompt: Prompt | None = None  # while it has a row
  token_ids: list[int] = dataclasses.field(default_factory=list)
  logprobs: list[float] = dataclasses.field(default_factory=list)


class Scheduler:
  """Tables of rows, prompts and queue."""

  def __init__(self, shapes: Shapes, context: int):
    self.shapes, self.context = shapes, context
    self.pending: collections.deque[Sequence] = collections.deque()
    self.rows: list[Sequence | None] = [None] * shapes.rows
    self.pages = PageTable(shapes.pages, shapes.page)
    self.unready: collections.deque[Prompt] = collections.deque()  # in order of admission
    self.version = 0  # of the adapters that running rows use
    self.prompt_hits = self.prompt_misses = self.prefill_tokens = self.reused_tokens = 0
    self.table_BX = empty_work(shapes).table_BX

  @property
  def num_running(self) -> int:
    return sum(s is not None for s in self.rows)

  def add(self, job: Job) -> None:
    """Queues all completions of a job."""
    self.pending.extend(Sequence(job, i) for i in range(job.request.n))

  def plan(self) -> Work[np.ndarray] | None:
    """Admits what fits and lists the device's work; None when there is nothing to do."""
    work = empty_work(self.shapes)
    is_decoding = bool(np.any(self.table_BX[:, COLUMN["status"]] == RUNNING))
    while self.pending and self._admit(self.pending[0]):
      self.pending.popleft()
    if not (self.num_running or self.unready):
      return None
    slots: dict[Prompt, int] = {}
    calls = self._list_blocks(work, slots, is_decoding)
    for row, sequence in enumerate(self.rows):
      if sequence is not None and sequence.prompt is not None and sequence.prompt.is_ready:
        self.table_BX[row, COLUMN["status"]] = RUNNING
    groups = self._list_groups(work, slots)
    work.table_BX = self.table_BX
    work.counts_4[:] = (calls, groups, *self._decode_budget(calls > 0))
    return work

  def _decode_budget(self, is_filling: bool) -> tuple[int, int]:
    """(decode steps, finished rows that end them early): short turns while rows stand empty.

    A turn that filled nothing always decodes: what is pending may wait for running rows to end.
    """
    rows = self.shapes.rows
    running = int(np.sum(self.table_BX[:, COLUMN["status"]] == RUNNING))
    is_short = bool(self.pending or self.unready)
    if is_short and is_filling and running < rows // 2:
      return 0, rows + 1  # prompts of one dispatch are limited; fill the rows first
    steps = self.shapes.steps if running > rows // 2 else max(1, self.shapes.steps // 4)
    return steps, max(1, rows // 8) if is_short else rows + 1

  def _admit(self, sequence: Sequence) -> bool:
    """Gives a completion a row and its prompt's pages, if there are any."""
    job = sequence.job
    row = self._choose_row(job)
    if row is None or not self._fits_adapters(job):
      return False
    prompt = self.pages.acquire(job.prompt_key)
    if prompt is None:
      return False
    is_new = prompt.readers == 1
    if is_new and (not prompt.is_ready or not prompt.known):
      self.prompt_misses += 1
      self.prefill_tokens += prompt.known - prompt.next_token
      self.reused_tokens += prompt.next_token
    else:
      self.prompt_hits += 1
    if is_new and not prompt.is_ready:
      prompt.readers += 1  # until all of it is prefilled, whatever becomes of the completion
      self.unready.append(prompt)
    sequence.prompt = prompt
    self._start_row(row, sequence)
    return True

  def _fits_adapters(self, job: Job) -> bool:
    """Rows with other adapters' weights must end before the first row with new ones starts."""
    if job.version is None or job.version == self.version:
      return True
    if any(s is not None and s.job.version is not None for s in self.rows):
      return False
    self.version = job.version
    self.pages.forget(job.version)
    return True

  def _choose_row(self, job: Job) -> int | None:
    """A free row in the group whose longest completion is nearest: it shares a trip count."""
    length = job.request.max_new_tokens // 2
    best, best_cost = None, None
    group = self.shapes.group
    for first in range(0, self.shapes.rows, group):
      free, longest = None, 0
      for row in range(first, first + group):
        if self.rows[row] is None:
          free = row if free is None else free
        else:
          longest = max(longest, int(self.table_BX[row, COLUMN["made"]]))
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
      "status": IDLE,  # until its prompt is there
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

  def _list_blocks(self, work: Work[np.ndarray], slots: dict[Prompt, int], slow: bool) -> int:
    """Fills prefill calls from the oldest prompts on; returns how many there are.

    In order of position, so that a block never comes before its beginning.
    """
    shapes = self.shapes
    calls = shapes.calls
    if slow:
      calls = min(calls, max(1, STALL_TOKENS // (shapes.blocks * shapes.block)))
    room = calls * shapes.blocks
    blocks: list[tuple[int, int, Prompt]] = []  # (start, slot, prompt)
    while self.unready and len(blocks) < room:
      prompt = self.unready[0]
      slot = self._slot(work, slots, prompt)
      if slot is None:
        break
      while prompt.next_token < prompt.known and len(blocks) < room:
        blocks.append((prompt.next_token, slot, prompt))
        prompt.next_token = min(prompt.next_token + shapes.block, prompt.known)
      if prompt.next_token >= prompt.known:
        self.pages.finish(prompt)
        self.unready.popleft()
        self.pages.release(prompt)
    blocks.sort(key=lambda block: block[0])
    for i, (start, slot, prompt) in enumerate(blocks):
      call, place = divmod(i, shapes.blocks)
      ids, adapter, _ = prompt.key
      tokens = ids[start : min(start + shapes.block, prompt.known)]
      work.place_CP3[call, place] = slot, start, adapter
      work.tokens_CPT[call, place, : len(tokens)] = tokens
    return -(-len(blocks) // shapes.blocks)

  def _slot(self, work: Work[np.ndarray], slots: dict[Prompt, int], prompt: Prompt) -> int | None:
    """The prompt's line in the dispatch's tables; None when all are taken."""
    if prompt not in slots:
      if len(slots) == self.shapes.rows:
        return None
      slots[prompt] = slot = len(slots)
      work.pages_SC[slot, : len(prompt.pages)] = prompt.pages
      work.known_S[slot] = prompt.known
    return slots[prompt]

  def _list_groups(self, work: Work[np.ndarray], slots: dict[Prompt, int]) -> int:
    """Puts running rows of equal prompts into share groups, long prompts first."""
    rows: dict[Prompt, list[int]] = {}
    for row, sequence in enumerate(self.rows):
      if self.table_BX[row, COLUMN["status"]] == RUNNING and sequence and sequence.prompt:
        rows.setdefault(sequence.prompt, []).append(row)
    group, share = 0, self.shapes.share
    for prompt in sorted(rows, key=lambda p: -p.known):
      if not prompt.known:
        continue
      slot = self._slot(work, slots, prompt)
      if slot is None:
        raise RuntimeError("more running prompts than rows")
      for first in range(0, len(rows[prompt]), share):
        some = rows[prompt][first : first + share]
        work.rows_AM[group, : len(some)] = some
        work.prompt_A[group] = slot
        group += 1
    return group

  def harvest(self, packed: np.ndarray) -> list[tuple[Job, list[Output]]]:
    """Takes over one dispatch's result; returns the jobs that are complete now, with answers."""
    ids_SB, logp_SB, status_B, made_B, steps = unpack(packed, self.shapes.steps)
    done = []
    for row, sequence in enumerate(self.rows):
      line = self.table_BX[row]
      if sequence is None or line[COLUMN["status"]] != RUNNING:
        continue
      made = int(made_B[row]) - int(line[COLUMN["made"]])
      if made:
        sequence.token_ids += ids_SB[:made, row].tolist()
        sequence.logprobs += logp_SB[:made, row].tolist()
        line[COLUMN["token"]] = sequence.token_ids[-1]
        line[COLUMN["position"]] += made
        line[COLUMN["made"]] += made
      if status_B[row] != RUNNING:
        self._free_row(row)
        job = sequence.job
        reason = "stop" if status_B[row] == STOPPED else "length"
        job.outputs[sequence.sample] = Output(
          tuple(sequence.token_ids), tuple(sequence.logprobs), reason
        )
        answer = job.answer()
        if answer is not None:
          done.append((job, answer))
    return done

  def _free_row(self, row: int) -> None:
    sequence, self.rows[row] = self.rows[row], None
    self.table_BX[row, COLUMN["status"]] = IDLE
    if sequence is not None and sequence.prompt is not None:
      self.pages.release(sequence.prompt)
      sequence.prompt = None
