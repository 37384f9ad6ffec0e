"""Data types and protocols that all parts share, and the axis legend.

Axis legend. An array carries its axes as a suffix (`tokens_BT`), einsum strings use the same
letters: B rows, T query positions, S key positions, V vocabulary, D width, N query heads, K
key/value heads, H head size, F feed-forward, L layers, R LoRA rank, A adapters, Q prompts, G
samples per prompt, M tree nodes.

This module is imported inside the sandbox's child: it must stay free of JAX and NumPy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

if TYPE_CHECKING:
  import jax
  import numpy as np

FAILURE_KINDS = ("format", "policy", "timeout", "memory", "crash", "wrong", "infrastructure")
FailureKind = Literal["format", "policy", "timeout", "memory", "crash", "wrong", "infrastructure"]

# Of a struct that the host fills (NumPy) and a compiled program reads (JAX): Work[np.ndarray] and
# Work[jax.Array].
ArrayT = TypeVar("ArrayT", "np.ndarray", "jax.Array")


class UserError(ValueError):
  """A mistake of the user: one line that says what was wrong, what was expected and which field to
  change.
  """


@dataclasses.dataclass(frozen=True)
class Failure:
  """Why a piece of model-written text or code did not count; `infrastructure` is never the model's
  fault.
  """

  kind: FailureKind
  message: str

  def __post_init__(self) -> None:
    if self.kind not in FAILURE_KINDS:
      raise ValueError(f"expected a failure kind among {FAILURE_KINDS}, got {self.kind!r}")


@dataclasses.dataclass(frozen=True)
class Problem:
  """One problem of a data set. `answer` and `hidden` stay in the parent process, never in prompt
  or sandbox.
  """

  id: str
  prompt: str  # the text that a workflow receives as its first argument
  answer: Any = None  # expected answer, as the data set's grader wants it
  family: str = ""  # subset name for reports
  entry_point: str = ""  # code data sets: the function to write
  public_tests: tuple[str, ...] = ()  # code data sets: tests that a workflow may run
  solution_prelude: str = ""  # code data sets: source that is executed before a solution
  hidden: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # grader's material


@dataclasses.dataclass(frozen=True)
class Grade:
  """Outcome of grading one response: `score` in [0, 1]."""

  score: float
  correct: bool
  answer: str  # what was extracted from the response, capped
  reason: str = ""
  failure: FailureKind | None = None  # kept the answer from being read or compared


@dataclasses.dataclass(frozen=True)
class SamplingParams:
  """How to draw tokens. temperature 0 is argmax; top_k 0, top_p 1 and min_p 0 switch the
  truncations off.
  """

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  max_new_tokens: int = 256
  stop_ids: tuple[int, ...] = ()  # beside the tokenizer's own end-of-turn ids
  min_p: float = 0.0  # least probability as a share of the likeliest token's
  stop: tuple[str, ...] = ()  # texts that end a completion
  # none; drawn: under the distribution that was drawn from; both: before top-k, top-p, min-p too
  logprobs: Literal["none", "drawn", "both"] = "drawn"


@dataclasses.dataclass(frozen=True)
class Completion:
  """One sampled completion. The stop token, when one was drawn, is the last id and has its
  log-prob; so is the token that completed a stop string.
  """

  prompt_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  # under the distribution that was drawn from (temperature, top-k, top-p, min-p applied)
  logprobs: tuple[float, ...]
  text: str  # without the stop token; ends before a stop string
  finish_reason: Literal["stop", "length", "refused"]  # refused: the prompt does not fit
  full_logprobs: tuple[float, ...] = ()  # with the temperature alone; only when asked for
  # prompt and generated tokens as a remote endpoint counts them; None: the ids say it
  usage: tuple[int, int] | None = None

  @property
  def counts(self) -> tuple[int, int]:
    """Tokens of the prompt, and generated ones."""
    return self.usage or (len(self.prompt_ids), len(self.token_ids))


@runtime_checkable
class LLM(Protocol):
  """A chat model: the local sampler, or a remote OpenAI-compatible endpoint."""

  async def complete(
    self, messages: list[dict[str, str]], sampling: SamplingParams, key: int, adapter: int = 0
  ) -> Completion:
    """Draws one completion; equal (messages, sampling, key, adapter) give equal completions."""
    ...


@dataclasses.dataclass(frozen=True)
class WorkflowSource:
  """A workflow as AFlow stores it: the class text and the text of its prompt module."""

  graph: str  # from `class Workflow:` to the end; no header
  prompt: str  # module-level string constants


@dataclasses.dataclass(frozen=True)
class WorkflowResult:
  """One execution of a workflow on one problem."""

  answer: str | None  # None when it failed
  failure: Failure | None
  calls: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0
  programs: int = 0


@dataclasses.dataclass(frozen=True)
class Rollout:
  """One proposal of the policy with its reward: a row of a GRPO batch."""

  group: str  # rows with equal group share a baseline
  prompt_ids: tuple[int, ...]
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]
  reward: float  # NaN: infrastructure failure, masked out of mean, std and loss
  parts: Mapping[str, float] = dataclasses.field(default_factory=dict)  # logged as rewards/<part>
  truncated: bool = False


def stable_hash(*parts: Any) -> int:
  """A 63-bit hash of JSON-able parts, equal in every process and run; the source of all request
  keys.
  """
  text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
  return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def price(tokens: Sequence[int], prices: Sequence[float]) -> float:
  """USD of (prompt, generated) tokens at prices of a million of each."""
  return sum(n * p for n, p in zip(tokens, prices, strict=True)) / 1e6
