"""Completes JSON lines: all are checked first, run together, and the output appears whole."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any, Protocol

from awf.qwen.config import QwenConfig
from awf.qwen.tokenizer import Tokenizer
from awf.sampler.engine import Engine, Output, Request
from awf.sampler.request import JSON_NAMES, SHARED_FIELDS, is_json
from awf.types import Completion, SamplingParams, UserError, stable_hash

log = logging.getLogger("awf")

SOURCES = ("prompt", "messages", "prompt_ids")
_NUMBERS = {**SHARED_FIELDS, "max_new_tokens": int}
FIELDS = (*SOURCES, *_NUMBERS, "stop_ids", "stop", "logprobs", "adapter")
_REPORT_SECONDS = 10.0  # between two lines of progress


class PolicyLike(Protocol):
  """What completing lines needs of `awf.policy.QwenPolicy`."""

  config: QwenConfig
  tokenizer: Tokenizer
  engine: Engine

  def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]: ...

  def request(
    self, prompt_ids: Sequence[int], sampling: SamplingParams, key: int, n: int, adapter: int
  ) -> Request: ...

  def adapter_index(self, name: str) -> int: ...

  def completion(self, request: Request, output: Output) -> Completion: ...


def run_generate(
  policy: PolicyLike,
  input: str,
  output: str,
  *,
  sampling: SamplingParams,
  seed: int,
  adapter: int,
) -> dict[str, Any]:
  """Completes every line of a JSON-lines file.

  Args:
    policy: model, tokenizer and engine.
    input: path of lines with one of `prompt` (raw text, special tokens in it are read as such),
      `messages` (a chat, completed by the assistant) and `prompt_ids`, and any of `temperature`,
      `top_p`, `top_k`, `min_p`, `max_new_tokens`, `stop_ids`, `stop` (a text or several; the
      line's text ends before the first of them, its ids with the token that completed it),
      `logprobs` (none, drawn, both: those before top-k, top-p and min-p too, as `full_logprobs`),
      `seed`, `n`, `adapter` (by name). Blank lines are passed over.
    output: path to write; one line per completion, in input order, the n samples of a line side by
      side. `index` counts the input's objects from 0, `sample` a line's completions. It replaces an
      older file once all is done and is not touched before.
    sampling: for lines that do not say otherwise; a line's stop ids come on top of these.
    seed: a line's completions are a function of (seed, index), or of the line's own `seed`.
    adapter: for lines that name none; 0 is the base, 1 the policy's adapter.

  Returns:
    Counts `lines`, `completions`, `tokens` (drawn), then `tokens_per_second`, `wall_seconds` (with
    prefill and compilation) and `output`.

  Raises:
    UserError: a line that cannot be completed (file, number and reason), no line at all, an input
      that cannot be read or an output that cannot be written.
  """
  requests = _read_requests(policy, input, sampling, seed, adapter)
  completions = tokens = 0
  with _whole_file(output, input) as file:
    began = reported = time.perf_counter()
    futures: list[Future[list[Output]]] = []
    try:
      for request in requests:  # waits while the engine's queue is full
        futures.append(policy.engine.submit(request))
      for index, (request, future) in enumerate(zip(requests, futures, strict=True)):
        for sample, drawn in enumerate(future.result()):
          completion = policy.completion(request, drawn)
          try:
            line = _output_line(completion, index, sample)
          except ValueError as error:  # JSON has no such numbers
            raise UserError(
              f"{input}, object {index}: its log-probs are no finite numbers; expected weights "
              f"that do not overflow: those of the base or of the line's adapter do"
            ) from error
          file.write(line)
          completions, tokens = completions + 1, tokens + len(completion.token_ids)
        if time.perf_counter() - reported > _REPORT_SECONDS:
          reported = time.perf_counter()
          log.info("generate: %d of %d lines, %d tokens", index + 1, len(requests), tokens)
    finally:
      for future in futures:
        future.cancel()  # after an error or Ctrl-C; a finished one stays as it is
    wall_seconds = time.perf_counter() - began
  return {
    "lines": len(requests),
    "completions": completions,
    "tokens": tokens,
    "tokens_per_second": tokens / wall_seconds,
    "wall_seconds": wall_seconds,
    "output": str(output),
  }


def _output_line(completion: Completion, index: int, sample: int) -> str:
  line = {**dataclasses.asdict(completion), "index": index, "sample": sample}
  order = (
    "prompt_ids", "text", "token_ids", "logprobs", "finish_reason", "index", "sample",
    *(("full_logprobs",) if completion.full_logprobs else ()),
  )  # fmt: skip
  return (
    json.dumps({name: line[name] for name in order}, ensure_ascii=False, allow_nan=False) + "\n"
  )


# --- reading


def _read_requests(
  policy: PolicyLike, path: str, sampling: SamplingParams, seed: int, adapter: int
) -> list[Request]:
  """All lines as engine requests; the first line that cannot be one ends it."""
  try:
    raw = Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f"--input: expected a JSON-lines file that can be read, got {str(path)!r} ({error.strerror})"
    ) from error
  requests: list[Request] = []
  for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
    if not line.strip():
      continue
    try:
      fields = _parse(line)
      key = stable_hash(seed, len(requests))
      requests.append(_make_request(policy, fields, sampling, key, adapter))
    except ValueError as error:
      raise UserError(f"{path}, line {number}: {error}") from error
  if not requests:
    raise UserError(f"--input: {path} holds no line; expected JSON objects with {_one_of()}")
  return requests


def _one_of() -> str:
  return "one of " + ", ".join(SOURCES)


def _parse(line: bytes) -> dict[str, Any]:
  """One line's fields, their names and types checked."""
  try:
    fields = json.loads(line.decode("utf-8"))
  except UnicodeDecodeError as error:
    raise ValueError(f"expected UTF-8 text, byte {error.start + 1} is not") from error
  except (ValueError, RecursionError) as error:
    raise ValueError(f"expected one JSON object, got {_short(line)} ({error})") from error
  if not isinstance(fields, dict):
    raise ValueError(f"expected one JSON object, got {_short(fields)}")
  unknown = [name for name in fields if name not in FIELDS]
  if unknown:
    raise ValueError(f"unknown field {_short(unknown[0])}; expected some of {', '.join(FIELDS)}")
  if sum(name in fields for name in SOURCES) != 1:
    found = ", ".join(name for name in SOURCES if name in fields) or "none"
    raise ValueError(f"expected exactly {_one_of()}, got {found}")
  for name, value in fields.items():
    _check_type(name, value)
  return fields


def _check_type(name: str, value: Any) -> None:
  if name in _NUMBERS:
    ok, expected = is_json(value, _NUMBERS[name]), JSON_NAMES[_NUMBERS[name]]
  elif name in ("prompt", "adapter", "logprobs"):
    ok, expected = isinstance(value, str) and value != "", "a text that is not empty"
  elif name == "messages":
    ok = isinstance(value, list) and all(isinstance(item, dict) for item in value)
    expected = "a list of {role, content}"
  elif name == "stop":
    texts = value if isinstance(value, list) else [value]
    ok = all(isinstance(text, str) and text for text in texts)
    expected = "a text that is not empty, or a list of such"
  else:
    ok = isinstance(value, list) and all(is_json(item, int) for item in value)
    expected = "a list of token ids"
  if not ok:
    raise ValueError(f"{name}: expected {expected}, got {_short(value)}")


def _short(value: Any) -> str:
  text = repr(value)
  return text if len(text) <= 80 else text[:77] + "..."


def _make_request(
  policy: PolicyLike, fields: dict[str, Any], sampling: SamplingParams, key: int, adapter: int
) -> Request:
  """Raises ValueError on a prompt that is empty or too long, ids or settings out of range."""
  ids = _prompt_ids(policy, fields)
  vocab_size, context = policy.config.vocab_size, policy.engine.context
  stop_ids = tuple(fields.get("stop_ids", ()))
  for name, some in (("prompt_ids", ids), ("stop_ids", stop_ids)):
    wrong = next((i for i in some if not 0 <= i < vocab_size), None)
    if wrong is not None:
      raise ValueError(f"{name}: expected ids from 0 to {vocab_size - 1}, got {wrong}")
  if not ids:
    raise ValueError("the prompt is empty; expected at least one token")
  if len(ids) >= context:
    raise ValueError(
      f"the prompt has {len(ids)} tokens; expected at most {context - 1}, one less than "
      f"config.sampler.context ({context}): shorten it or raise config.sampler.context"
    )
  names = ("temperature", "top_p", "min_p", "max_new_tokens", "logprobs")
  own: dict[str, Any] = {name: fields[name] for name in names if name in fields}
  if "stop" in fields:
    own["stop"] = tuple(fields["stop"] if isinstance(fields["stop"], list) else [fields["stop"]])
  drawing = dataclasses.replace(
    sampling,
    **own,
    top_k=min(fields.get("top_k", sampling.top_k), vocab_size),  # the whole vocabulary at most
    stop_ids=(*sampling.stop_ids, *stop_ids),
  )
  if "adapter" in fields:
    adapter = policy.adapter_index(fields["adapter"])
  request = policy.request(ids, drawing, fields.get("seed", key), fields.get("n", 1), adapter)
  policy.engine.check(request)
  return request


def _prompt_ids(policy: PolicyLike, fields: dict[str, Any]) -> tuple[int, ...]:
  if "prompt" in fields:
    return tuple(policy.tokenizer.encode(fields["prompt"], allow_special=True))
  if "messages" in fields:
    return policy.prompt_ids(fields["messages"])
  return tuple(fields["prompt_ids"])


# --- writing


def _is_stdout(path: Path) -> bool:
  try:
    return os.path.samestat(path.stat(), os.fstat(1))
  except OSError:  # not there, or closed
    return False


@contextlib.contextmanager
def _whole_file(output: str, input: str) -> Iterator[IO[str]]:
  """A file that takes the place of `output` if the block ends well, and else leaves no trace."""
  given = Path(output).expanduser()
  if given.exists() and not given.is_file():
    raise UserError(f"--output: expected the path of a file, got {str(output)!r}")
  if _is_stdout(given):
    raise UserError(f"--output: {output} is the standard output, whose last line is the result's")
  path = given.resolve()  # a link stays a link to the new file
  if path == Path(input).resolve():
    raise UserError(f"--output: {output} is the input; expected another path")
  part = path.with_name(f".{path.name}.{os.getpid()}.part")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    file = part.open("w", encoding="utf-8", newline="\n")
  except OSError as error:
    raise UserError(f"--output: cannot write {output} ({error.strerror})") from error
  try:
    with file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(part, path)
  finally:
    part.unlink(missing_ok=True)
