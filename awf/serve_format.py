"""OpenAI's request bodies, those of chat completions and of (text) completions, as engine requests.

Fields that change what is sampled and that are not built are refused by name, never ignored.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from awf.sampler.engine import Engine, Request
from awf.sampler.generate import PolicyLike
from awf.sampler.request import JSON_NAMES, MOST_TOP, SHARED_FIELDS, is_json
from awf.types import SamplingParams, UserError, stable_hash

MOST_SAMPLES = 128  # n, as at OpenAI
MOST_STOPS = 16
_SHARED = (
  *SHARED_FIELDS, "model", "stop", "stream", "stream_options", "max_tokens", "logprobs",
  "stop_token_ids", "ignore_eos",
)  # fmt: skip
# Fields that say nothing about the sampling, and those that may only have the value that means off.
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_OFF: dict[str, tuple[Any, ...]] = {
  "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
  "response_format": ({"type": "text"},), "tools": ([],), "tool_choice": ("none",),
  "parallel_tool_calls": (True, False), "echo": (False,), "suffix": ("",), "best_of": (1,),
  "modalities": (["text"],),
}  # fmt: skip
# What pads the events of a stream, or adds the usage so far to each, changes no sample.
_STREAM_OPTIONS = ("include_usage", "include_obfuscation", "continuous_usage_stats")
# What the engine calls what clients call otherwise.
_FIELDS = {"stop_ids": "stop_token_ids", "prompt_ids": "prompt", "max_new_tokens": "max_tokens"}
_MESSAGE_CHARS = 300
# Fields of chat, and of completions, alone.
_OWN = {True: ("messages", "max_completion_tokens", "top_logprobs"), False: ("prompt",)}


class ApiError(Exception):
  """A refusal in OpenAI's form: status, message, the field, a code for programs."""

  def __init__(
    self, status: int, message: str, param: str | None = None, code: str | None = None
  ) -> None:
    super().__init__(message[:_MESSAGE_CHARS])
    self.status, self.param, self.code = status, param, code

  @property
  def kind(self) -> str:
    names = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    return "server_error" if self.status >= 500 else names.get(self.status, "invalid_request_error")

  def body(self) -> dict[str, Any]:
    fields = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
    return {"error": fields}


@dataclasses.dataclass(frozen=True)
class Call:
  """A checked request body."""

  is_chat: bool
  model: str
  requests: tuple[Request, ...]  # one per prompt; choice i of prompt p has index p * n + i
  stream: bool
  include_usage: bool
  top_logprobs: int | None  # None: no log-probs at all

  @property
  def n(self) -> int:
    return self.requests[0].n


def parse_call(
  body: Any, is_chat: bool, policy: PolicyLike, models: Mapping[str, int], defaults: SamplingParams
) -> Call:
  """Checks a body.

  Args:
    body: parsed JSON.
    is_chat: chat completions, else completions.
    policy: model, tokenizer, engine.
    models: adapter index by name.
    defaults: sampling of fields that the body leaves out.

  Raises:
    ApiError: what is wrong, with the field's name.
  """
  if not isinstance(body, dict):
    raise ApiError(400, "expected a JSON object")
  _check_names(body, is_chat)
  adapter = models.get(_field(body, "model", str, required=True))
  if adapter is None:
    known = ", ".join(models)
    message = f"The model {body['model']!r:.80} does not exist; it is one of {known}"
    raise ApiError(404, message, "model", "model_not_found")
  prompts = [_chat_ids(body, policy)] if is_chat else _prompts(body, policy)
  top_logprobs = _top_logprobs(body, is_chat)
  n = _field(body, "n", int, 1)
  if not 1 <= n <= MOST_SAMPLES:
    raise ApiError(400, f"n: expected 1 to {MOST_SAMPLES}, got {n}", "n")
  seed = _field(body, "seed", int, None)
  key = int.from_bytes(os.urandom(8), "big") if seed is None else seed
  try:
    sampling = _sampling(body, defaults, top_logprobs is not None)
    requests = []
    for i, ids in enumerate(prompts):
      most = _most_tokens(body, is_chat, len(ids), policy.engine)
      one = dataclasses.replace(sampling, max_new_tokens=most)
      request = dataclasses.replace(
        policy.request(ids, one, stable_hash(key, i) if i else key % 2**63, n, adapter),
        ignore_eos=_field(body, "ignore_eos", bool, False),
        top_logprobs=top_logprobs or 0,
      )
      policy.engine.check(request)
      requests.append(request)
  except ValueError as error:
    field = str(error).partition(":")[0]
    name = _FIELDS.get(field, field)
    raise ApiError(400, name + str(error)[len(field) :], name) from error
  options = _field(body, "stream_options", dict, None) or {}
  unknown = next((name for name in options if name not in _STREAM_OPTIONS), None)
  if unknown is not None:
    raise ApiError(400, f"stream_options: unknown field {unknown!r:.80}", "stream_options")
  stream = _field(body, "stream", bool, False)
  usage = _field(options, "include_usage", bool, False) and stream
  return Call(is_chat, body["model"], tuple(requests), stream, usage, top_logprobs)


def _check_names(body: dict[str, Any], is_chat: bool) -> None:
  for name, value in body.items():
    if name in _OFF:
      if value is not None and value not in _OFF[name]:
        if not (name == "best_of" and value == body.get("n")):
          raise ApiError(
            400, f"{name} is not supported here; expected {_OFF[name][0]!r} or nothing", name,
            "unsupported_parameter",
          )  # fmt: skip
    elif name not in (*_SHARED, *_IGNORED, *_OWN[is_chat]):
      name = name.encode("utf-8", "replace").decode()[:80]
      raise ApiError(400, f"Unrecognized request argument supplied: {name}", name)


def _field(body: dict[str, Any], name: str, kind: type, default: Any = None, required=False) -> Any:
  """A field of one JSON type; null counts as left out."""
  value = body.get(name)
  if value is None:
    if required:
      raise ApiError(
        400, f"you must provide a {name} parameter", name, "missing_required_parameter"
      )
    return default
  if not is_json(value, kind):
    expected = JSON_NAMES.get(kind, "an object")
    raise ApiError(400, f"{name}: expected {expected}, got {value!r:.80}", name, "invalid_type")
  return value


def _sampling(
  body: dict[str, Any], defaults: SamplingParams, wants_logprobs: bool
) -> SamplingParams:
  stop = body.get("stop")
  stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
  if not isinstance(stop, list) or len(stop) > MOST_STOPS:
    raise ApiError(400, f"stop: expected a text or at most {MOST_STOPS} of them", "stop")
  ids = _field(body, "stop_token_ids", list, [])
  if not all(type(i) is int for i in ids):
    raise ApiError(400, "stop_token_ids: expected a list of token ids", "stop_token_ids")
  names = ("temperature", "top_p", "min_p", "top_k")
  own = {name: _field(body, name, SHARED_FIELDS[name]) for name in names}
  own = {name: value for name, value in own.items() if value is not None}
  if own.get("top_k") == -1:  # vLLM's word for off
    own["top_k"] = 0
  return dataclasses.replace(
    defaults,
    **own,
    stop=tuple(stop),
    stop_ids=tuple(ids),
    logprobs="both" if wants_logprobs else "none",
  )


def _top_logprobs(body: dict[str, Any], is_chat: bool) -> int | None:
  """How many likeliest tokens come with the log-probs; None when these are not asked for."""
  name = "top_logprobs" if is_chat else "logprobs"
  count = _field(body, name, int, None)
  if count is not None and not 0 <= count <= MOST_TOP:
    raise ApiError(400, f"{name}: expected 0 to {MOST_TOP}, got {count}", name)
  if not is_chat:
    return count
  if _field(body, "logprobs", bool, False):
    return count or 0
  if count:
    raise ApiError(400, "top_logprobs: expected logprobs: true with it", name)
  return None


def _most_tokens(body: dict[str, Any], is_chat: bool, prompt: int, engine: Engine) -> int:
  """max_tokens; what fits, where a chat leaves it out (completions: 16, as at OpenAI)."""
  left = engine.context - prompt
  if left < 1:
    raise ApiError(
      400,
      f"This model's maximum context length is {engine.context} tokens; the prompt has {prompt}",
      "messages" if is_chat else "prompt",
      "context_length_exceeded",
    )
  names = ("max_completion_tokens", "max_tokens") if is_chat else ("max_tokens",)
  given = [_field(body, name, int) for name in names]
  most = next((value for value in given if value is not None), None)
  room = engine.shapes.chunks * engine.shapes.chunk
  if most is None:
    return min(left, room) if is_chat else min(left, room, 16)
  if most < 1:
    raise ApiError(400, f"max_tokens: expected at least 1, got {most}", "max_tokens")
  if min(most, left) > room:
    message = f"max_tokens is too large: {most}. This server completes at most {room} tokens"
    raise ApiError(400, message, "max_tokens")
  return most


def _chat_ids(body: dict[str, Any], policy: PolicyLike) -> tuple[int, ...]:
  messages = _field(body, "messages", list, required=True)
  plain = []
  for i, message in enumerate(messages):
    if not isinstance(message, dict):
      raise ApiError(400, f"messages[{i}]: expected an object with role and content", "messages")
    role = "system" if message.get("role") == "developer" else message.get("role")
    for name in ("tool_calls", "function_call"):
      if message.get(name):
        raise ApiError(
          400, f"messages[{i}].{name} is not supported here", "messages", "unsupported_parameter"
        )
    plain.append({"role": role, "content": _content(message.get("content"), i)})
  try:
    return policy.prompt_ids(plain)
  except UserError as error:
    raise ApiError(400, str(error), "messages") from error
  except ValueError as error:
    raise ApiError(400, str(error), "messages") from error


def _content(content: Any, i: int) -> str:
  """A text, or the texts of a list of parts."""
  if isinstance(content, list):
    objects = [part for part in content if isinstance(part, dict)]
    parts = [part.get("text") for part in objects if part.get("type", "text") == "text"]
    if parts and len(parts) == len(content) and all(isinstance(part, str) for part in parts):
      return "".join(map(str, parts))
  elif isinstance(content, str):
    return content
  raise ApiError(400, f"messages[{i}].content: expected a text or a list of text parts", "messages")


def _prompts(body: dict[str, Any], policy: PolicyLike) -> list[tuple[int, ...]]:
  """Ids of a text, of token ids, or of a list of either."""
  prompt = body.get("prompt")
  if isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt):
    prompt = [prompt]
  many = prompt if isinstance(prompt, list) else [prompt]
  found = []
  for one in many:
    if isinstance(one, str):
      found.append(tuple(policy.tokenizer.encode(one, allow_special=True)))
    elif isinstance(one, list) and all(type(i) is int for i in one):
      found.append(tuple(one))
    else:
      raise ApiError(400, "prompt: expected a text, token ids, or a list of either", "prompt")
  if not found or not all(found) or len(found) > MOST_SAMPLES:
    message = f"prompt: expected 1 to {MOST_SAMPLES} prompts, none empty"
    raise ApiError(400, message, "prompt")
  return found
