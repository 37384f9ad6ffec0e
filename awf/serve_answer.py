"""Outputs of the sampler as OpenAI's answers, whole or in chunks."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from awf.qwen.tokenizer import Tokenizer
from awf.sampler.engine import Output, Part, Request
from awf.sampler.generate import PolicyLike
from awf.sampler.text import TextStream
from awf.serve_format import Call


class Piece(NamedTuple):
  """A token that was drawn, or might have been."""

  text: str
  bytes: bytes  # of a character, perhaps a part of it
  logprob: float


class Token(NamedTuple):
  """A drawn token and its place."""

  drawn: Piece
  place: int  # in the completion's text, characters
  top: list[Piece]  # the likeliest at its place, if asked for


@dataclasses.dataclass
class Choice:
  """One completion as it grows: what a client has not seen yet, with log-probs token by token."""

  index: int
  stream: TextStream
  tokenizer: Tokenizer
  sent: int = 0  # characters
  tokens: int = 0  # drawn, the one that stopped it included
  held: list[Token] = dataclasses.field(default_factory=list)  # that a stop string may take back

  def take(self, part: Part | Output) -> tuple[str, list[Token]]:
    """(new text that no stop string can take back, its tokens where log-probs are asked for).

    Args:
      part: what it gained, or all of it.
    """
    by_id = part.finish_reason == "stop" and part.stop is None
    spoken = part.token_ids[:-1] if by_id else part.token_ids
    self.tokens += len(part.token_ids)
    rows, self.held = self.held, []
    for i, token_id in enumerate(spoken):
      place = len(self.stream.text)
      self.stream.add(token_id)
      if part.full_logprobs:
        top = part.top_logprobs[i] if part.top_logprobs else ()
        drawn = self._piece(token_id, part.full_logprobs[i])
        if self.stream.text.endswith(drawn.text):  # else it is a part of a character
          place = max(place, len(self.stream.text) - len(drawn.text))
        rows.append(Token(drawn, place, [self._piece(*one) for one in top]))
    if part.finish_reason is not None:
      self.stream.close()
    end = len(self.stream.text)
    if part.finish_reason is None or self.stream.stop is not None:
      end = self.stream.sure
    text = self.stream.text[self.sent : end]
    self.sent = max(self.sent, end)
    if part.finish_reason is None:
      self.held = [row for row in rows if row.place >= end]
    if part.finish_reason is None or self.stream.stop is not None:
      rows = [row for row in rows if row.place < end]
    return text, rows

  def _piece(self, token_id: int, logprob: float) -> Piece:
    text = self.tokenizer.decode([token_id], skip_special=False)
    return Piece(text, self.tokenizer.token_bytes(token_id), logprob)


def new_choice(policy: PolicyLike, request: Request, index: int) -> Choice:
  """The choice of one completion; it finds stop strings as the engine does."""
  stop = () if request.ignore_eos else request.stop
  return Choice(index, TextStream(policy.tokenizer.decode, stop), policy.tokenizer)


def _logprobs(call: Call, rows: list[Token]) -> dict[str, Any] | None:
  if call.top_logprobs is None:
    return None
  if call.is_chat:
    content = [
      {**_token(row.drawn), "top_logprobs": [_token(one) for one in row.top]} for row in rows
    ]
    return {"content": content, "refusal": None}
  return {
    "tokens": [row.drawn.text for row in rows],
    "token_logprobs": [row.drawn.logprob for row in rows],
    "top_logprobs": [_by_text(row) for row in rows],
    "text_offset": [row.place for row in rows],
  }


def _by_text(row: Token) -> dict[str, float]:
  """The drawn token, then the likeliest; of several that read alike the first."""
  found = {row.drawn.text: row.drawn.logprob}
  for one in row.top:
    found.setdefault(one.text, one.logprob)
  return found


def _token(piece: Piece) -> dict[str, Any]:
  return {"token": piece.text, "logprob": piece.logprob, "bytes": list(piece.bytes)}


def usage(call: Call, choices: Sequence[Choice]) -> dict[str, int]:
  """Tokens of the prompts, each counted once, and of all completions."""
  prompt = sum(len(request.prompt_ids) for request in call.requests)
  completion = sum(choice.tokens for choice in choices)
  return {
    "prompt_tokens": prompt,
    "completion_tokens": completion,
    "total_tokens": prompt + completion,
  }


class Answer:
  """The objects of one answer, whole or in chunks."""

  def __init__(self, call: Call, policy: PolicyLike) -> None:
    self.call = call
    self.choices = [
      new_choice(policy, request, p * call.n + i)
      for p, request in enumerate(call.requests)
      for i in range(call.n)
    ]
    name = "chatcmpl" if call.is_chat else "cmpl"
    kind = "chat.completion" if call.is_chat else "text_completion"
    self._head = {
      "id": f"{name}-{os.urandom(12).hex()}",
      "object": kind,
      "created": int(time.time()),
      "model": call.model,
    }

  def whole(self, outputs: Sequence[Sequence[Output]]) -> dict[str, Any]:
    """The answer to a call that does not stream."""
    rows = []
    flat = [output for group in outputs for output in group]
    for choice, output in zip(self.choices, flat, strict=True):
      text, logprobs = choice.take(output)
      said = {"message": {"role": "assistant", "content": text, "refusal": None}}
      rows.append(
        {
          "index": choice.index,
          **(said if self.call.is_chat else {"text": text}),
          "logprobs": _logprobs(self.call, logprobs),
          "finish_reason": output.finish_reason,
        }
      )
    return {**self._head, "choices": rows, "usage": usage(self.call, self.choices)}

  def first_chunks(self) -> Iterator[dict[str, Any]]:
    """What comes before any text: a chat's role, for each choice."""
    if self.call.is_chat:
      for choice in self.choices:
        yield self._chunk(choice.index, {"role": "assistant", "content": ""}, None, None)

  def chunks(self, prompt: int, part: Part) -> Iterator[dict[str, Any]]:
    """What a part of one of the prompt's completions adds."""
    choice = self.choices[prompt * self.call.n + part.sample]
    text, rows = choice.take(part)
    if text or rows:
      logprobs = _logprobs(self.call, rows)
      yield self._chunk(choice.index, {"content": text}, None, logprobs)
    if part.finish_reason is not None:
      yield self._chunk(choice.index, {}, part.finish_reason, None)

  def last_chunk(self) -> dict[str, Any]:
    """The usage, for those who asked for it."""
    return {**self._stream_head(), "choices": [], "usage": usage(self.call, self.choices)}

  def _stream_head(self) -> dict[str, Any]:
    kind = "chat.completion.chunk" if self.call.is_chat else "text_completion"
    return {**self._head, "object": kind}

  def _chunk(
    self, index: int, delta: dict[str, str], reason: str | None, logprobs: Any
  ) -> dict[str, Any]:
    said = {"delta": delta} if self.call.is_chat else {"text": delta.get("content", "")}
    choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
    out = {**self._stream_head(), "choices": [choice]}
    return {**out, "usage": None} if self.call.include_usage else out
