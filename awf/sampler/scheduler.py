"""Host side of the engine: which completion sits in which row, what is prefilled when.

Pure Python and NumPy, one thread. A prompt is prefilled once, a limited number of tokens in each
dispatch while rows decode; the rows of its completions read its pages in groups. None of these
choices changes a bit of any completion.
"""

from __future__ import annotations

import collections

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
from awf.sampler.job import Job, Sequence, Waiting
from awf.sampler.pages import BASE, PageTable, Prompt, Version
from awf.sampler.request import MAX_STOP_IDS, FinishReason, Part
from awf.sampler.text import Decode

LEAST_HEAT, MOST_HEAT = 1e-4, 1e4  # temperatures but 0: beyond them float32 may overflow
MOST_SEARCHES = 64  # jobs without pages that a plan looks past


class Scheduler:
  """Tables of rows, prompts and queue.

  Args:
    shapes: of the compiled program.
    context: prompt + completion, tokens.
    decode: ids to text, for stop strings.
    is_packed: completions get the first free row, so that a program of fewer rows may do; else one
      beside others of its length.
  """

  def __init__(
    self, shapes: Shapes, context: int, decode: Decode | None = None, is_packed: bool = False
  ) -> None:
    self.shapes, self.context = shapes, context
    self._decode, self._is_packed = decode, is_packed
    self.waiting = Waiting(shapes.rows)
    self.rows: list[Sequence | None] = [None] * shapes.rows
    self.pages = PageTable(shapes.pages, shapes.page)
    self.unready: collections.deque[Prompt] = collections.deque()  # in order of admission
    self.version = BASE  # of the adapters that running rows use
    self.stall_tokens = shapes.stall  # most prompt tokens of a dispatch in which rows decode
    self.prompt_hits = self.prompt_misses = self.prefill_tokens = self.reused_tokens = 0
    self.row_steps = 0  # tokens drawn, those behind a stop string too
    self.table_BX = empty_work(shapes).table_BX

  @property
  def num_running(self) -> int:
    return sum(s is not None for s in self.rows)

  @property
  def has_work(self) -> bool:
    return bool(self.waiting or self.num_running or self.unready)

  def drop(self, job: Job) -> None:
    """Forgets a job: its rows and pages are free; a dispatch is not under way."""
    self.waiting.remove(job)
    for row, sequence in enumerate(self.rows):
      if sequence is not None and sequence.job is job:
        self._free_row(row)
    for prompt in reversed(list(self.unready)):  # those that count on others first
      if prompt.readers == 1 and self.pages.abandon(prompt):
        self.unready.remove(prompt)

  def plan(self, newest: Version = BASE) -> Work[np.ndarray] | None:
    """Admits what fits and lists the device's work; None when there is nothing to do.

    Args:
      newest: adapters set last, which take the place of those that nobody asks for any more.
    """
    work = empty_work(self.shapes)
    is_decoding = bool(np.any(self.table_BX[:, COLUMN["status"]] == RUNNING))
    if newest.program == self.version.program and self.waiting.next_version() is None:
      self._take_over(newest)
    self._admit_all()
    if not (self.num_running or self.unready):
      return None
    slots: dict[Prompt, int] = {}
    calls = self._list_blocks(work, slots, is_decoding)
    for row, sequence in enumerate(self.rows):
      if sequence is not None and sequence.prompt.is_ready:
        self.table_BX[row, COLUMN["status"]] = RUNNING
    groups, lone = self._list_groups(work, slots)
    work.table_BX = self.table_BX
    may_fill = calls > 0 and not is_decoding
    wants_top = any(s is not None and s.job.request.top_logprobs for s in self.rows)
    work.counts_6[:] = (calls, groups, lone, *self._decode_budget(may_fill), wants_top)
    return work

  def _decode_budget(self, may_fill: bool) -> tuple[int, int]:
    """(decode steps, finished rows that end them early): short turns while rows stand empty.

    Args:
      may_fill: prompts are filled in this turn, and no row ran before it who would wait.
    """
    rows = self.shapes.rows
    running = int(np.sum(self.table_BX[:, COLUMN["status"]] == RUNNING))
    is_short = bool(self.waiting or self.unready)
    if is_short and may_fill and running < rows // 2:
      return 0, rows + 1  # prompts of one dispatch are limited; fill the rows first
    steps = self.shapes.steps if running > rows // 2 else max(1, self.shapes.steps // 4)
    if self.num_running - running > max(1, rows // 32):
      # Rows that wait for prompts: with more steps as many would end as are filled.
      steps = max(1, self.shapes.steps * running // (4 * rows))
    return steps, max(1, rows // 8) if is_short else rows + 1

  def _admit_all(self) -> None:
    """Gives rows to those whose turn it is, as far as there are rows and pages."""
    stuck: dict[Job, None] = {}
    refused: set[tuple[bool, Version]] = set()  # adapters of those who wait for rows to end
    searches = 0  # in vain
    while None in self.rows:
      for job in self.waiting.turns(stuck):
        adapters = job.request.adapter > 0, job.version
        if adapters in refused or not self._fits_adapters(job):
          refused.add(adapters)
        elif self._admit(job, stuck):
          break
        else:
          searches += 1
          if searches == MOST_SEARCHES:
            return
        stuck[job] = None
      else:
        return

  def _admit(self, job: Job, stuck: dict[Job, None]) -> bool:
    """Gives the next completion of a job a row, and its prompt pages if there are any."""
    prompt = self.pages.acquire(job.prompt_key)
    if prompt is None:
      return False
    row = self._choose_row(job)
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
    self._start_row(row, Sequence(job, self.waiting.start(job, stuck), prompt, self._decode))
    return True

  def _fits_adapters(self, job: Job) -> bool:
    """Rows with other adapters' weights must end before the first row with new ones starts.

    Adapters of another shape are another program, whose last digits may differ: rows of the base
    run in that of the adapters that were there when they were asked for, whoever is beside them.
    """
    if not job.request.adapter and job.version.program == self.version.program:
      return True
    if not self.num_running:  # whoever is looked at first: the next in line may be looked past
      return self._take_over(job.version)
    if job.request.adapter and self.waiting.next_version() != job.version:
      return job.version == self.version
    return self._take_over(job.version)

  def _take_over(self, version: Version) -> bool:
    """Lets rows run with other adapters, unless those that run need the ones that are there."""
    if version == self.version:
      return True
    is_alike = version.program == self.version.program
    if any(s is not None and (s.job.request.adapter or not is_alike) for s in self.rows):
      return False
    self.version = version
    self.pages.forget(*([None] if is_alike else []), version)
    return True

  def _choose_row(self, job: Job) -> int:
    """A free row in the group whose longest completion is nearest: it shares a trip count."""
    first_free = self.rows.index(None)
    if self._is_packed:
      return first_free
    length = job.request.max_new_tokens // 2
    best, best_cost = first_free, None
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
    temperature = request.temperature and min(max(request.temperature, LEAST_HEAT), MOST_HEAT)
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
      "temperature": float_bits(temperature),
      "top_p": float_bits(request.top_p),
      "min_p": float_bits(request.min_p),
      "wants_full": request.logprobs == "both",
    }
    for name, value in values.items():
      line[COLUMN[name]] = value
    stops = () if request.ignore_eos else request.stop_ids
    line[COLUMN["stop"] :] = stops + (-1,) * (MAX_STOP_IDS - len(stops))
    self.rows[row] = sequence

  def _list_blocks(self, work: Work[np.ndarray], slots: dict[Prompt, int], slow: bool) -> int:
    """Fills prefill calls; returns how many there are.

    In order of position, so that a block never comes before its beginning.
    """
    shapes = self.shapes
    calls = shapes.calls
    if slow:
      calls = min(calls, max(1, self.stall_tokens // (shapes.blocks * shapes.block)))
    room = calls * shapes.blocks
    running = {s.prompt for s in self.rows if s is not None and s.prompt.is_ready}
    free = shapes.rows - len(running)  # lines of the tables that running rows leave
    blocks: list[tuple[int, int, Prompt]] = []  # (start, slot, prompt)
    for prompt, most in self._prefill_turns(room):
      if prompt.is_ready or not self.pages.is_open(prompt):
        continue
      slot = self._slot(work, slots, prompt, free)
      if slot is None:
        break
      end = min(room, len(blocks) + most)
      while prompt.next_token < prompt.known and len(blocks) < end:
        blocks.append((prompt.next_token, slot, prompt))
        prompt.next_token = min(prompt.next_token + shapes.block, prompt.known)
      self.pages.fill(prompt)
      if prompt.next_token >= prompt.known:
        self.pages.finish(prompt)
        self.unready.remove(prompt)
        self.pages.release(prompt)
    blocks.sort(key=lambda block: block[0])
    for i, (start, slot, prompt) in enumerate(blocks):
      call, place = divmod(i, shapes.blocks)
      ids, adapter, _ = prompt.key
      tokens = ids[start : min(start + shapes.block, prompt.known)]
      work.place_CP3[call, place] = slot, start, adapter
      work.tokens_CPT[call, place, : len(tokens)] = tokens
    return -(-len(blocks) // shapes.blocks)

  def _prefill_turns(self, room: int) -> list[tuple[Prompt, int]]:
    """(prompt, most blocks): half for the oldest, so that it gets on whatever comes; then the
    shortest first, so that none of them waits behind a long one; then the oldest again.
    """
    if not self.unready:
      return []
    oldest, *others = self.unready
    others.sort(key=lambda prompt: prompt.known - prompt.next_token)
    return [(oldest, max(1, room // 2)), *((one, room) for one in others), (oldest, room)]

  def _slot(
    self, work: Work[np.ndarray], slots: dict[Prompt, int], prompt: Prompt, most: int
  ) -> int | None:
    """The prompt's line in the dispatch's tables; None when `most` are taken."""
    if prompt not in slots:
      if len(slots) == most:
        return None
      slots[prompt] = slot = len(slots)
      work.pages_SC[slot, : len(prompt.pages)] = prompt.pages
      work.known_S[slot] = prompt.known
    return slots[prompt]

  def _list_groups(self, work: Work[np.ndarray], slots: dict[Prompt, int]) -> tuple[int, int]:
    """Puts running rows of equal prompts into share groups, long prompts first.

    Where rows can read their prompt alone, requests of one completion do. That is a matter of the
    request only: the two paths may differ in a row's last digit, which must not say who else has
    its prompt.

    Returns:
      (share groups, rows that are in none).
    """
    rows: dict[tuple[Prompt, bool], list[int]] = {}
    for row, sequence in enumerate(self.rows):
      if self.table_BX[row, COLUMN["status"]] == RUNNING and sequence is not None:
        is_lone = bool(self.shapes.lone_at_once) and sequence.job.request.n == 1
        rows.setdefault((sequence.prompt, is_lone), []).append(row)
    group, lone, share = 0, 0, self.shapes.share
    for prompt, is_lone in sorted(rows, key=lambda key: -key[0].known):
      if not prompt.known:
        continue
      slot = self._slot(work, slots, prompt, self.shapes.rows)
      if slot is None:
        raise RuntimeError("more running prompts than rows")
      some = rows[prompt, is_lone]
      if is_lone:
        work.row_L[lone : lone + len(some)] = some
        work.prompt_L[lone : lone + len(some)] = slot
        lone += len(some)
        continue
      for first in range(0, len(some), share):
        members = some[first : first + share]
        work.rows_AM[group, : len(members)] = members
        work.prompt_A[group] = slot
        group += 1
    return group, lone

  def harvest(
    self, packed: np.ndarray, top_SXB: np.ndarray | None
  ) -> tuple[list[tuple[Job, Part]], list[Job]]:
    """Takes over one dispatch's result.

    Returns:
      (what every completion gained, jobs all of whose outputs are there now).
    """
    drawn = unpack(packed, top_SXB, self.shapes.steps)
    parts: list[tuple[Job, Part]] = []
    done: list[Job] = []
    for row, sequence in enumerate(self.rows):
      line = self.table_BX[row]
      if sequence is None or line[COLUMN["status"]] != RUNNING:
        continue
      made = int(drawn.made_B[row]) - int(line[COLUMN["made"]])
      self.row_steps += made
      reason: FinishReason | None = None
      if drawn.status_B[row] != RUNNING:
        reason = "stop" if drawn.status_B[row] == STOPPED else "length"
      ids, logps, fulls = (
        x[:made, row].tolist() for x in (drawn.ids_SB, drawn.logp_SB, drawn.full_SB)
      )
      job = sequence.job
      top = job.request.top_logprobs
      tops = drawn.likeliest(row, made, top) if top else []
      part = sequence.take(ids, logps, fulls, tops, reason)
      if job.on_part is not None and (part.token_ids or part.finish_reason):
        parts.append((job, part))
      if part.finish_reason is not None:
        self._free_row(row)
        job.outputs[sequence.sample] = sequence.output(part.finish_reason)
        if len(job.outputs) == job.request.n:
          done.append(job)
      elif made:
        line[COLUMN["token"]] = ids[-1]
        line[COLUMN["position"]] += made
        line[COLUMN["made"]] += made
    return parts, done

  def _free_row(self, row: int) -> None:
    sequence, self.rows[row] = self.rows[row], None
    self.table_BX[row, COLUMN["status"]] = IDLE
    if sequence is not None:
      sequence.job.running -= 1
      self.pages.release(sequence.prompt)
