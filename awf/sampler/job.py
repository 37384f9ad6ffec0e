"""A submitted request on its way through the engine, and the order in which requests get rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

from awf.sampler.pages import Prompt, PromptKey, Version
from awf.sampler.request import FinishReason, OnPart, Output, Part, Request, Top
from awf.sampler.text import Decode, TextStream

HEAVY = 4  # a job with this share (one in HEAVY) of the rows waits for those that have fewer
_PATIENCE = 2  # times all rows: completions that may overtake one that has no place


@dataclasses.dataclass(eq=False)
class Job:
  """One submitted request; its future is answered when all its completions are there.

  The future stays pending, so that `cancel` works at any time, until one of `answer`, `fail` and
  `call_off` ends it; the first of them counts.
  """

  request: Request
  future: Future[list[Output]]
  version: Version  # when it was submitted; rows of the base run with any of that program
  on_part: OnPart | None = None
  outputs: dict[int, Output] = dataclasses.field(default_factory=dict)  # by sample
  started: int = 0  # completions that have, or had, a row
  running: int = 0  # rows
  number: int = 0  # in order of arrival
  overtaken: int = 0  # completions of later jobs that got a row while this one was passed over
  placed: Future[None] = dataclasses.field(default_factory=Future)  # the queue has room for it
  is_ended: bool = False  # answered, failed or called off

  @property
  def own_version(self) -> Version | None:
    """That whose adapter it asks for; None for the base."""
    return self.version if self.request.adapter else None

  @property
  def prompt_key(self) -> PromptKey:
    return (self.request.prompt_ids, self.request.adapter, self.own_version)

  @property
  def waiting(self) -> int:
    """Completions without a row."""
    return self.request.n - self.started

  def tell(self, part: Part) -> None:
    """Hands a part to the caller that wants to see it; it may raise anything."""
    if self.on_part is not None:
      self.on_part(part)

  def place(self) -> None:
    """Lets the thread that waits for the queue go on."""
    if not self.placed.done():
      self.placed.set_result(None)

  def answer(self) -> None:
    """Gives the caller all outputs in order of sample, unless it has gone."""
    if self._claim():
      self.future.set_result([self.outputs[i] for i in range(self.request.n)])

  def fail(self, error: BaseException) -> None:
    """Ends the job with an error, unless it has ended or its caller has gone."""
    if self._claim():
      self.future.set_exception(error)

  def call_off(self) -> None:
    """Tells those who wait for a cancelled future, perhaps for several, that it will not come."""
    self._claim()

  def _claim(self) -> bool:
    """Whether the future can be set; true once, and never after `cancel`."""
    self.place()
    if self.is_ended:
      return False
    self.is_ended = True
    return self.future.set_running_or_notify_cancel()


class Sequence:
  """One completion in a row."""

  def __init__(self, job: Job, sample: int, prompt: Prompt, decode: Decode | None) -> None:
    self.job, self.sample, self.prompt = job, sample, prompt
    self.token_ids: list[int] = []
    self.logprobs: list[float] = []
    self.full_logprobs: list[float] = []
    self.top_logprobs: list[Top] = []
    request = job.request
    looks = bool(request.stop) and not request.ignore_eos and decode is not None
    self._text = TextStream(decode, request.stop) if looks and decode else None

  def take(
    self,
    ids: list[int],
    logps: list[float],
    fulls: list[float],
    tops: list[Top],
    reason: FinishReason | None,
  ) -> Part:
    """Takes what one dispatch drew, up to the token that completes a stop string.

    What was drawn behind that is lost: its keys and values lie in the row's own part of the cache,
    which the row's next owner writes anew before it reads.

    Args:
      ids: tokens; the last is a stop id where `reason` is "stop".
      logps: their log-probs as drawn.
      fulls: their log-probs before the cut.
      tops: the likeliest tokens at their places; empty where they are not wanted.
      reason: why the device ended the row, if it did.
    """
    if self._text is not None:
      spoken = len(ids) - (reason == "stop")  # a stop id is no text
      end = next((i for i in range(spoken) if self._text.add(ids[i])), None)
      if end is not None:
        end += 1
        ids, logps, fulls, tops, reason = ids[:end], logps[:end], fulls[:end], tops[:end], "stop"
    wanted = self.job.request.logprobs
    logps, fulls = logps if wanted != "none" else [], fulls if wanted == "both" else []
    self.token_ids += ids
    self.logprobs += logps
    self.full_logprobs += fulls
    self.top_logprobs += tops
    return Part(self.sample, tuple(ids), tuple(logps), reason, tuple(fulls), self.stop, tuple(tops))

  @property
  def stop(self) -> str | None:
    """The stop string that ended it."""
    return None if self._text is None else self._text.stop

  def output(self, reason: FinishReason) -> Output:
    return Output(
      tuple(self.token_ids), tuple(self.logprobs), reason, tuple(self.full_logprobs), self.stop,
      tuple(self.top_logprobs),
    )  # fmt: skip


class Waiting:
  """Jobs with completions that have no row yet, and whose turn it is.

  The oldest goes first, until the rest is what all rows take in two turns: then the longest do, so
  that no long one begins when the others end and keeps the rows empty. Two things keep one job from
  standing in the way of all: who has a quarter of the rows waits for those that have less, and who
  finds no place (no page for its prompt, rows with other adapters still at work) lets others pass.
  Whoever was passed over by so many that all rows could have had it twice goes first.
  """

  def __init__(self, rows: int) -> None:
    self._jobs: dict[Job, None] = {}  # in order of arrival
    self._heavy, self._patience = max(1, rows // HEAVY), _PATIENCE * rows
    self.count = 0  # completions

  def __iter__(self) -> Iterator[Job]:
    return iter(self._jobs)

  def __bool__(self) -> bool:
    return bool(self._jobs)

  def add(self, job: Job) -> None:
    self._jobs[job] = None
    self.count += job.waiting

  def remove(self, job: Job) -> None:
    """Takes a job out, if it is there."""
    if job in self._jobs:
      del self._jobs[job]
      self.count -= job.waiting

  def start(self, job: Job, stuck: dict[Job, None]) -> int:
    """The next completion of a job has a row now; `stuck` jobs had no place.

    Returns:
      Its sample.
    """
    passed = self._jobs if self._is_ending else stuck
    for other in passed:
      other.overtaken += other.number < job.number
    sample = job.started
    job.started += 1
    job.running += 1
    self.count -= 1
    if not job.waiting:
      del self._jobs[job]
    return sample

  @property
  def _is_ending(self) -> bool:
    return self.count <= self._patience

  def turns(self, stuck: dict[Job, None]) -> Iterator[Job]:
    """Jobs in the order in which they may have the next row.

    Those in `stuck` are passed over; the caller adds a job that turns out to have no place.
    """
    jobs: Iterable[Job] = self._jobs
    if self._is_ending:  # a stable sort: the oldest first among equals
      jobs = sorted(
        jobs, key=lambda job: (job.overtaken < self._patience, -job.request.max_new_tokens)
      )
    heavy = []
    for job in jobs:
      if job not in stuck:
        if job.running < self._heavy:
          yield job
        else:
          heavy.append(job)
      if job in stuck and job.overtaken >= self._patience:
        break  # nobody younger any more
    yield from heavy

  def next_version(self) -> Version | None:
    """The adapters that come next: those of the oldest job that asks for one."""
    return next((job.version for job in self._jobs if job.request.adapter), None)
