"""What goes into the sampler's engine and what comes out of it."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any, Literal, get_args

FinishReason = Literal["stop", "length", "refused"]
LogProbs = Literal["none", "drawn", "both"]
MAX_STOP_IDS = 8  # width of the padded per-row array of stop ids
MOST_TOP = 20  # likeliest tokens whose log-probs a request may ask for, as at OpenAI
Top = tuple[tuple[int, float], ...]  # (id, log-prob) of the likeliest tokens, likeliest first
# Fields that a line of mode generate and a body of mode serve have alike, and their JSON types.
SHARED_FIELDS: dict[str, type] = {
  **dict.fromkeys(("temperature", "top_p", "min_p"), float),
  **dict.fromkeys(("top_k", "seed", "n"), int),
}
JSON_NAMES = {
  **{str: "a text", int: "a whole number", float: "a number", bool: "true or false"},
  **{list: "a list", dict: "an object"},
}
MOST_COMPLETIONS = 1 << 16  # of one request


def is_json(value: Any, kind: type) -> bool:
  """Whether a JSON value is of a type: a whole number is a float too, a boolean is neither."""
  if isinstance(value, bool):
    return kind is bool
  return isinstance(value, kind) or (kind is float and isinstance(value, int))


class QueueFull(RuntimeError):
  """The engine's queue has no place now, and the caller would not wait."""


def _whole(name: str, value: Any) -> int:
  """A field's whole number, of whatever type, as an int."""
  try:
    return operator.index(value)
  except TypeError:
    raise ValueError(f"{name}: expected whole numbers, got {value!r}") from None


@dataclasses.dataclass(frozen=True)
class Request:
  """One prompt and how to sample from it.

  Sample `i` of a request is a function of (prompt_ids, seed, i, the sampling fields, the adapter's
  weights, whether n is 1) only: one completion alone reads its prompt by another path, which may
  differ in the last digit. Its noise is a function of (seed, i, position): the seed names the
  request, and requests of equal seed share their noise.

  A completion ends at the first token that is a stop id, or that completes a stop string in the
  text of the completion (special tokens have no text, and a string may lie over several tokens).
  That token is kept as the last one, with its log-prob; what a stop string changes beside is the
  text that is made of the tokens (`awf.sampler.text.cut`).
  """

  prompt_ids: tuple[int, ...]
  n: int = 1  # completions
  seed: int = 0  # 63 bits
  temperature: float = 1.0  # 0 is argmax; else what is outside 1e-4 to 1e4 counts as the nearer
  top_p: float = 1.0  # in (0, 1]; 1 is off
  top_k: int = 0  # 0 is off
  min_p: float = 0.0  # least probability as a share of the likeliest token's; 0 is off
  max_new_tokens: int = 256
  stop_ids: tuple[int, ...] = ()
  stop: tuple[str, ...] = ()  # texts that end a completion; needs an engine with `decode`
  logprobs: LogProbs = "drawn"  # "both": also before top-k, top-p and min-p
  top_logprobs: int = 0  # likeliest tokens whose log-probs before the cut come too; needs "both"
  adapter: int = 0  # 0 is the base, i the i-th stacked adapter
  ignore_eos: bool = False  # benchmarks: neither id nor text stops the row

  def __post_init__(self) -> None:
    for name in ("prompt_ids", "stop_ids"):
      ids = tuple(_whole(name, x) for x in getattr(self, name))
      object.__setattr__(self, name, ids)
    for name in ("n", "seed", "top_k", "max_new_tokens", "top_logprobs", "adapter"):
      object.__setattr__(self, name, _whole(name, getattr(self, name)))
    if isinstance(self.stop, str):
      raise ValueError(f"stop: expected a tuple of texts, got the text {self.stop!r}")
    object.__setattr__(self, "stop", tuple(self.stop))
    if not 1 <= self.n <= MOST_COMPLETIONS:
      raise ValueError(f"n: expected 1 to {MOST_COMPLETIONS} completions, got {str(self.n)[:20]}")
    if not 0 <= self.seed < 2**63:
      raise ValueError(f"seed: expected an integer in [0, 2**63), got {self.seed}")
    if not 0 <= self.temperature < math.inf:
      raise ValueError(f"temperature: expected a finite number >= 0, got {self.temperature}")
    if not 0 < self.top_p <= 1:
      raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
    if self.top_k < 0:
      raise ValueError(f"top_k: expected 0 (off) or a positive count, got {self.top_k}")
    if not 0 <= self.min_p <= 1:
      raise ValueError(f"min_p: expected a number in [0, 1], got {self.min_p}")
    if self.max_new_tokens < 1:
      raise ValueError(f"max_new_tokens: expected at least 1, got {self.max_new_tokens}")
    if len(self.stop_ids) > MAX_STOP_IDS:
      raise ValueError(
        f"stop_ids: expected at most {MAX_STOP_IDS} ids, the model's own among them, "
        f"got {len(self.stop_ids)}"
      )
    if not all(isinstance(text, str) and text for text in self.stop):
      raise ValueError(f"stop: expected texts that are not empty, got {list(self.stop)!r}")
    if self.logprobs not in get_args(LogProbs):
      expected = ", ".join(get_args(LogProbs))
      raise ValueError(f"logprobs: expected one of {expected}, got {self.logprobs!r}")
    if not 0 <= self.top_logprobs <= MOST_TOP:
      raise ValueError(f"top_logprobs: expected 0 to {MOST_TOP}, got {self.top_logprobs}")
    if self.top_logprobs and self.logprobs != "both":
      raise ValueError(f"top_logprobs: expected logprobs 'both', got {self.logprobs!r}")


@dataclasses.dataclass(frozen=True)
class Output:
  """One completion; the token that stopped it, if any, is the last id and has its log-prob."""

  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]  # under the distribution that was drawn from; () if not wanted
  finish_reason: FinishReason  # refused: the prompt leaves no room in the context, no token drawn
  full_logprobs: tuple[float, ...] = ()  # before the cut by top-k, top-p, min-p; only if wanted
  stop: str | None = None  # the stop string that the last token completed
  top_logprobs: tuple[Top, ...] = ()  # of each token's place; only if wanted


@dataclasses.dataclass(frozen=True)
class Part:
  """What one completion gained in one dispatch."""

  sample: int
  token_ids: tuple[int, ...]
  logprobs: tuple[float, ...]  # as of Output
  finish_reason: FinishReason | None  # None: it goes on
  full_logprobs: tuple[float, ...] = ()
  stop: str | None = None
  top_logprobs: tuple[Top, ...] = ()


# Called in the engine's thread, which waits for it: it hands the part on and returns. What it
# raises, of whatever type, ends its own request alone.
OnPart = Callable[[Part], None]
