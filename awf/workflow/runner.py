"""The parent's side of workflows: starts the jobs, answers their calls, shares equal work.

A result is a function of (seed, canonical workflow, problem): keys of model calls are hashes of
what is asked, never of when it is asked, and no cache changes an answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeGuard, TypeVar

from awf.sandbox import CallError, Job, JobResult, Sandbox
from awf.sandbox.frames import json_fault
from awf.types import (
  LLM,
  Failure,
  Problem,
  SamplingParams,
  UserError,
  WorkflowResult,
  WorkflowSource,
  stable_hash,
)
from awf.workflow.canonical import canonical
from awf.workflow.contract import (
  ENTRY,
  MAX_ANSWER_CHARS,
  MAX_GRAPH_CHARS,
  MAX_PROMPT_CHARS,
  operators_of,
)

MAX_MESSAGE_CHARS = 200_000  # of all messages of a call
PROGRAM_ENTRY = "awf.sandbox.program:run_program"
TESTS_ENTRY = "awf.sandbox.program:run_tests"
ATTEMPTS = 2  # of what failed as infrastructure

_log = logging.getLogger(__name__)
_V = TypeVar("_V")


class Shared(Generic[_V]):
  """Does the work of each key once, also while it is in flight.

  Args:
    keep: whether a value may serve later requests; others are dropped once those who wait for them
      have them.
  """

  def __init__(self, keep: Callable[[_V], bool]) -> None:
    self._keep = keep
    self._values: dict[Hashable, _V] = {}
    self._tasks: dict[Hashable, asyncio.Task[_V]] = {}
    self._waiting: Counter[Hashable] = Counter()
    self.hits = 0

  async def get(self, key: Hashable, make: Callable[[], Awaitable[_V]]) -> _V:
    """The value of a key; `make` is called when nobody has it or works on it.

    A caller that is cancelled leaves the work to the others; the last one ends it.
    """
    if key in self._values:
      self.hits += 1
      return self._values[key]
    task = self._tasks.get(key)
    if task is None or task.get_loop() is not asyncio.get_running_loop():
      task = asyncio.ensure_future(self._work(key, make))
      self._tasks[key] = task
      self._waiting[key] = 0
    else:
      self.hits += 1
    self._waiting[key] += 1
    try:
      return await asyncio.shield(task)
    finally:
      self._waiting[key] -= 1
      if self._waiting[key] <= 0:
        del self._waiting[key]
        if self._tasks.get(key) is task:
          del self._tasks[key]
        task.cancel()

  def kept(self, choose: Callable[[_V], bool]) -> list[tuple[Any, _V]]:
    """Keys and values that may serve later requests, as far as `choose` wants them."""
    return [(key, value) for key, value in self._values.items() if choose(value)]

  def put(self, key: Hashable, value: _V) -> None:
    """A value that serves later requests without work."""
    self._values[key] = value

  async def _work(self, key: Hashable, make: Callable[[], Awaitable[_V]]) -> _V:
    value = await make()
    if self._keep(value):
      self._values[key] = value
    return value


@dataclasses.dataclass
class _Attempt:
  """What one job asked for; if the sandbox starts it anew, equal calls count once."""

  canonical: str
  problem_id: str
  solution_prelude: str = ""
  tokens: dict[int, tuple[int, int]] = dataclasses.field(default_factory=dict)
  programs: set[int] = dataclasses.field(default_factory=set)
  infrastructure: str = ""
  user_error: UserError | None = None


class WorkflowRunner:
  """Runs workflows on problems in the sandbox.

  Args:
    sandbox: made with `preload=contract.PRELOAD`.
    llm: the executor that the workflows call, without adapter.
    sampling: how every call of a workflow is sampled.
    system: system message of every call that has none; "" for none.
    seed: of all randomness.
    dataset: AFlow's name of the data set.
    question_type: qa, math or code; code workflows also get the entry point.
    prices: of the executor, USD of a million prompt and generated tokens; for the cost that a
      workflow is told.
    concurrency: workflows that run at a time.
    watch: is entered while a workflow is asked for, until its result is there.

  Raises:
    UserError: unknown question type, or concurrency < 1.
  """

  def __init__(
    self,
    sandbox: Sandbox,
    llm: LLM,
    sampling: SamplingParams,
    *,
    system: str = "",
    seed: int = 0,
    dataset: str,
    question_type: str,
    prices: tuple[float, float] = (0.0, 0.0),
    concurrency: int = 64,
    watch: Callable[[], AbstractContextManager[None]] = nullcontext,
  ) -> None:
    operators_of(question_type)
    if concurrency < 1:
      raise UserError(f"config.executor.concurrency: expected at least 1, got {concurrency}")
    self._sandbox = sandbox
    self._llm = llm
    self._sampling = sampling
    self._system = system
    self._seed = seed
    self._dataset = dataset
    self._is_code = question_type == "code"
    self._prices = prices
    self._concurrency, self._watch = concurrency, watch
    self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None
    self._results: Shared[WorkflowResult] = Shared(lambda value: not _is_infrastructure(value))
    self._replies: Shared[dict[str, Any]] = Shared(lambda value: True)
    self._programs: Shared[JobResult] = Shared(lambda value: not _is_infrastructure(value))
    self._counts: Counter[str] = Counter()

  async def run(self, source: WorkflowSource, problem: Problem) -> WorkflowResult:
    """Runs a workflow on one problem; equal workflows on one problem are run once.

    Args:
      source: any text; what is wrong with it becomes the result's failure.
      problem: its `answer` and `hidden` do not leave this process.

    Returns:
      The answer, or a failure: "infrastructure" means that neither workflow nor problem is to
      blame.

    Raises:
      UserError: the executor says that the user has to change something.
    """
    fault = _source_fault(source)
    if fault:
      return WorkflowResult(None, Failure("format", fault))
    key = (canonical(source), problem.id, problem.prompt)
    with self._watch():
      return await self._results.get(key, lambda: self._run(source, problem, key[0]))

  def stats(self) -> dict[str, int]:
    """Counts since the start: jobs and results shared, model calls, tokens, programs and tests."""
    names = (
      "jobs",
      "llm_calls",
      "prompt_tokens",
      "completion_tokens",
      "programs",
      "infrastructure",
    )
    return {
      **{name: self._counts[name] for name in names},
      "cached_results": self._results.hits,
      "cached_calls": self._replies.hits,
      "cached_programs": self._programs.hits,
    }

  def state_dict(self) -> dict[str, list[Any]]:
    """What ended at a limit of time, as JSON: run again it might end another way."""
    return {
      "results": [[list(k), dataclasses.asdict(v)] for k, v in self._results.kept(_is_timeout)],
      "programs": [[k, dataclasses.asdict(v)] for k, v in self._programs.kept(_is_timeout)],
    }

  def load_state_dict(self, state: dict[str, list[Any]]) -> None:
    """Puts back what `state_dict` gave; it is not run again."""
    for key, row in state["results"]:
      self._results.put(tuple(key), WorkflowResult(**{**row, "failure": Failure(**row["failure"])}))
    for key, row in state["programs"]:
      self._programs.put(key, JobResult(**{**row, "failure": Failure(**row["failure"])}))

  async def _run(self, source: WorkflowSource, problem: Problem, text: str) -> WorkflowResult:
    loop = asyncio.get_running_loop()
    if self._gate is None or self._gate[0] is not loop:
      self._gate = (loop, asyncio.Semaphore(self._concurrency))
    async with self._gate[1]:
      for _ in range(ATTEMPTS - 1):
        result = await self._attempt(source, problem, text)
        if not _is_infrastructure(result):
          return result
        _log.warning("workflow run again: %s", result.failure)
      return await self._attempt(source, problem, text)

  async def _attempt(self, source: WorkflowSource, problem: Problem, text: str) -> WorkflowResult:
    attempt = _Attempt(text, problem.id, problem.solution_prelude)
    payload = {
      "graph": source.graph,
      "prompt": source.prompt,
      "problem": problem.prompt,
      "entry_point": problem.entry_point if self._is_code else "",
      "question_id": problem.id if self._dataset == "LiveCodeBench" else "",
      "dataset": self._dataset,
      "public_tests": list(problem.public_tests),
      "prices": list(self._prices),
    }
    methods = {"llm": self._ask, "program": self._program, "test": self._test}

    async def handler(method: str, params: Any) -> Any:
      if method not in methods or type(params) is not dict:
        raise CallError("policy", "a call that no operator makes")
      return await methods[method](attempt, params)

    job = Job(ENTRY, payload, seed=stable_hash(self._seed, "job", text, problem.id))
    result = await self._sandbox.run(job, handler)
    if attempt.user_error is not None:
      raise attempt.user_error
    prompt_tokens = sum(one for one, _ in attempt.tokens.values())
    completion_tokens = sum(one for _, one in attempt.tokens.values())
    self._counts.update(
      jobs=1,
      llm_calls=len(attempt.tokens),
      prompt_tokens=prompt_tokens,
      completion_tokens=completion_tokens,
      programs=len(attempt.programs),
    )
    answer, failure = _outcome(result, attempt)
    self._counts["infrastructure"] += failure is not None and failure.kind == "infrastructure"
    return WorkflowResult(
      answer,
      failure,
      calls=len(attempt.tokens),
      prompt_tokens=prompt_tokens,
      completion_tokens=completion_tokens,
      programs=len(attempt.programs),
    )

  async def _ask(self, attempt: _Attempt, params: dict[str, Any]) -> dict[str, Any]:
    messages, occurrence = params.get("messages"), params.get("occurrence")
    if not _are_messages(messages) or type(occurrence) is not int or occurrence < 0:
      raise CallError("policy", "a model call that no operator makes")
    if self._system and messages[0]["role"] != "system":
      messages = [{"role": "system", "content": self._system}, *messages]
    try:
      if self._sampling.temperature == 0:
        key = stable_hash(messages)
        reply = await self._replies.get(key, lambda: self._complete(messages, key))
      else:
        key = stable_hash(self._seed, attempt.canonical, attempt.problem_id, messages, occurrence)
        reply = await self._complete(messages, key)
    except UserError as error:
      attempt.user_error = error
      raise CallError("infrastructure", str(error)) from error
    except Exception as error:  # whatever a server or an engine raises: typed, and tried again
      attempt.infrastructure = f"the model failed: {type(error).__name__}: {error}"
      raise CallError("infrastructure", attempt.infrastructure) from error
    if reply["refused"]:
      raise CallError(
        "format",
        f"a prompt of {reply['prompt_tokens']} tokens does not fit the model's context",
      )
    tokens = (reply["prompt_tokens"], reply["completion_tokens"])
    attempt.tokens[stable_hash(messages, occurrence)] = tokens
    return {key: reply[key] for key in ("text", "prompt_tokens", "completion_tokens")}

  async def _complete(self, messages: list[dict[str, str]], key: int) -> dict[str, Any]:
    completion = await self._llm.complete(messages, self._sampling, key)
    prompt_tokens, completion_tokens = completion.counts
    return {
      "text": completion.text.encode("utf-8", "replace").decode("utf-8"),
      "prompt_tokens": prompt_tokens,
      "completion_tokens": completion_tokens,
      "refused": completion.finish_reason == "refused",
    }

  async def _program(self, attempt: _Attempt, params: dict[str, Any]) -> dict[str, Any]:
    payload = _texts(params, ("source", "function"))
    result = await self._extra_job(attempt, PROGRAM_ENTRY, payload)
    if result.failure is not None:
      failure = {"kind": result.failure.kind, "message": result.failure.message}
      return {"text": "", "none": True, "failure": failure}
    value = result.value if type(result.value) is dict else {}
    text = value.get("text")
    text = text if type(text) is str else ""
    is_none = text == "None" and value.get("value") is None
    return {"text": text, "none": is_none, "failure": None}

  async def _test(self, attempt: _Attempt, params: dict[str, Any]) -> dict[str, Any]:
    payload = _texts(params, ("solution", "tests", "entry_point"))
    payload["solution_prelude"] = attempt.solution_prelude
    result = await self._extra_job(attempt, TESTS_ENTRY, payload)
    if result.failure is not None:
      return {"passed": False, "error": f"{result.failure.kind}: {result.failure.message}"}
    value = result.value if type(result.value) is dict else {}
    return {"passed": value.get("passed") is True, "error": str(value.get("error", ""))}

  async def _extra_job(self, attempt: _Attempt, entry: str, payload: dict[str, str]) -> JobResult:
    """Runs a program or tests in a job of their own.

    Raises:
      CallError: kind "infrastructure", when it failed so twice.
    """
    key = stable_hash(entry, payload)
    attempt.programs.add(key)
    job = Job(entry, payload, seed=stable_hash(self._seed, "program", key))

    async def work() -> JobResult:
      result = await self._sandbox.run(job)
      for _ in range(ATTEMPTS - 1):
        if _is_infrastructure(result):
          result = await self._sandbox.run(job)
      return result

    result = await self._programs.get(key, work)
    if _is_infrastructure(result):
      attempt.infrastructure = str(result.failure)
      raise CallError("infrastructure", attempt.infrastructure)
    return result


def _is_infrastructure(result: WorkflowResult | JobResult) -> bool:
  return result.failure is not None and result.failure.kind == "infrastructure"


def _is_timeout(result: WorkflowResult | JobResult) -> bool:
  return result.failure is not None and result.failure.kind == "timeout"


def _source_fault(source: WorkflowSource) -> str:
  for name, text, limit in (
    ("graph", source.graph, MAX_GRAPH_CHARS),
    ("prompt", source.prompt, MAX_PROMPT_CHARS),
  ):
    fault = json_fault(text) if type(text) is str else "no text"
    if fault or len(text) > limit:
      return f"the {name} is {fault or f'longer than {limit} characters'}"
  return ""


def _are_messages(messages: Any) -> TypeGuard[list[dict[str, str]]]:
  """Whether a child's messages are what a model client sends: a user's, maybe after a system's."""
  if type(messages) is not list or len(messages) not in (1, 2):
    return False
  if any(type(one) is not dict or one.keys() != {"role", "content"} for one in messages):
    return False
  if [one["role"] for one in messages] != ["system", "user"][-len(messages) :]:
    return False
  texts = [one["content"] for one in messages]
  return all(type(one) is str for one in texts) and sum(map(len, texts)) <= MAX_MESSAGE_CHARS


def _texts(params: dict[str, Any], names: tuple[str, ...]) -> dict[str, str]:
  """The fields of a call of which all are texts.

  Raises:
    CallError: kind "policy", when they are not.
  """
  if params.keys() != set(names) or not all(type(one) is str for one in params.values()):
    raise CallError("policy", f"expected the texts {', '.join(names)}")
  return params


def _outcome(result: JobResult, attempt: _Attempt) -> tuple[str | None, Failure | None]:
  """Answer and failure of a job. What failed here outweighs what the child makes of it."""
  if attempt.infrastructure:
    return None, Failure("infrastructure", attempt.infrastructure)
  if result.failure is not None:
    return None, result.failure
  value = result.value
  answer = value.get("answer") if type(value) is dict else None
  if type(answer) is not str or len(answer) > MAX_ANSWER_CHARS:
    return None, Failure("format", "the job's result is not the answer of a workflow")
  return answer, None
