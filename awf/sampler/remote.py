"""A chat model behind an OpenAI-compatible endpoint, as an `awf.types.LLM`."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import random
import threading
from collections.abc import Mapping
from typing import Any

import httpx

from awf.sampler.limits import RateLimit, retry_after
from awf.sampler.request import FinishReason
from awf.types import Completion, SamplingParams, UserError, stable_hash

log = logging.getLogger("awf")

RETRIED = (408, 409, 425, 429)  # and every status from 500 on
LONGEST_PAUSE = 600.0  # seconds of a Retry-After that are waited
_REASONS: dict[str, FinishReason] = {"length": "length", "stop": "stop"}
# OpenAI's code, vLLM's words, llama.cpp's
_TOO_LONG = ("context_length_exceeded", "maximum context length", "context size")


class RemoteError(RuntimeError):
  """The endpoint did not answer; an infrastructure failure, never the model's fault."""


class _Again(Exception):
  """A try that may be made once more."""

  def __init__(self, problem: str, pause: float = 0.0) -> None:
    super().__init__(problem)
    self.pause = pause  # seconds that the endpoint asked for


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
  """Field by field `config.executor.remote` or `config.search.remote` (see configs/base.py)."""

  url: str
  model: str
  key_env: str = "OPENAI_API_KEY"
  timeout: float = 120.0
  retries: int = 6
  concurrency: int = 16
  requests_per_minute: int = 0
  tokens_per_minute: int = 0


def _encodable(text: str) -> str:
  """A text without lone surrogates, which no request can hold; `?` as at the local model."""
  return text.encode("utf-8", "replace").decode("utf-8")


class RemoteLLM:
  """Calls `POST <base_url>/chat/completions`.

  Token ids and log-probs are not known for a remote model: they stay empty, so its completions are
  no training rows. Equal arguments give equal completions as far as the endpoint honours `seed`.
  The connections belong to a thread of the client's own: any event loop may ask.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    api_key: str | None = None,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 6,
    first_wait: float = 0.5,
    limit: RateLimit | None = None,
    field: str = "base_url",
  ):
    """Makes the client; no connection is opened before the first call.

    Args:
      base_url: up to and including the version, such as http://localhost:8000/v1.
      model: the endpoint's name of the model.
      api_key: bearer token; None reads OPENAI_API_KEY, which may be unset.
      concurrency: requests in flight.
      timeout: seconds of a try, from the first byte out to the last byte in.
      retries: further tries after connection errors, answers that are no JSON, the statuses of
        `RETRIED` and those from 500 on.
      first_wait: seconds before the first retry; doubles with each, up to 30. What is waited is
        drawn between half of it and all of it, and is no less than what Retry-After asks for.
      limit: requests and tokens a minute.
      field: what the user would change, for messages.

    Raises:
      UserError: the address is not an http(s) one.
    """
    if not base_url.startswith(("http://", "https://")):
      raise UserError(f"{field}: expected http://... or https://..., got {base_url!r}")
    try:
      _ = httpx.URL(base_url).host
    except (httpx.InvalidURL, UnicodeError) as error:  # idna's is one
      raise UserError(f"{field}: expected a valid address, got {base_url!r}") from error
    self._key = os.environ.get("OPENAI_API_KEY", "").strip() if api_key is None else api_key
    if not (self._key.isascii() and self._key.isprintable()):
      raise UserError(f"{field}: expected a key of printable ASCII characters in its variable")
    self.model, self.url = model, base_url.rstrip("/")
    self._field, self._retries, self._first_wait = field, retries, first_wait
    self._timeout, self._concurrency = timeout, concurrency
    self._limit = limit or RateLimit()
    self._loop: asyncio.AbstractEventLoop | None = None
    self._start = threading.Lock()
    self._limit_name = "max_tokens"  # newer models of OpenAI's want max_completion_tokens
    names = ("requests", "retries", "prompt_tokens", "tokens", "without_usage")
    self._counts: dict[str, int] = dict.fromkeys(names, 0)

  @classmethod
  def from_config(cls, fields: Mapping[str, Any], field: str) -> RemoteLLM:
    """The client that a group of config fields (`RemoteConfig`) describes.

    Raises:
      UserError: the named environment variable is not set; its name is not said, for it might be
        the key itself.
    """
    c = RemoteConfig(**dict(fields))
    default = next(f.default for f in dataclasses.fields(c) if f.name == "key_env")
    if c.key_env and c.key_env != default and not os.environ.get(c.key_env):
      raise UserError(
        f"config.{field}.key_env: expected the name of an environment variable that holds the "
        "key; the one that is named is not set"
      )
    return cls(
      c.url,
      c.model,
      api_key=os.environ.get(c.key_env, "").strip() if c.key_env else "",
      concurrency=c.concurrency,
      timeout=c.timeout,
      retries=c.retries,
      limit=RateLimit(c.requests_per_minute, c.tokens_per_minute),
      field=f"config.{field}",
    )

  async def complete(
    self, messages: list[dict[str, str]], sampling: SamplingParams, key: int, adapter: int = 0
  ) -> Completion:
    """Draws one completion.

    Args:
      messages: chat messages with `role` and `content`.
      sampling: `stop_ids` are ignored; `top_k` and `min_p` are sent only when they are on, as not
        every endpoint knows them.
      key: its low 31 bits are sent as `seed`.
      adapter: must be 0; a remote model has none.

    Returns:
      Text and usage; finish reason "refused" where the endpoint says that the prompt is too long.

    Raises:
      UserError: the endpoint refuses the request (bad key, unknown model, bad field).
      RemoteError: it does not answer, or answers with something else than a completion.
    """
    if adapter:
      raise ValueError(f"adapter: a remote model has only adapter 0, got {adapter}")
    body: dict[str, Any] = {
      "model": self.model,
      "messages": [{name: _encodable(x) for name, x in one.items()} for one in messages],
      "temperature": sampling.temperature,
      "top_p": sampling.top_p,
      "seed": key & 0x7FFFFFFF,
    }
    if sampling.top_k:
      body["top_k"] = sampling.top_k
    if sampling.min_p:
      body["min_p"] = sampling.min_p
    if sampling.stop:
      body["stop"] = list(sampling.stop)
    job = self._complete(body, sampling.max_new_tokens)
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(job, self._running_loop()))

  async def propose(
    self, messages: list[dict[str, str]], n: int, key: int, sampling: SamplingParams
  ) -> list[Completion]:
    """Draws n completions of one prompt, each by a request of its own (`n` is not known to all).

    Raises:
      UserError: as `complete`, and where the endpoint does not answer: a search cannot go on.
    """
    jobs = (self.complete(messages, sampling, stable_hash(key, i)) for i in range(n))
    try:
      return list(await asyncio.gather(*jobs))
    except RemoteError as error:
      raise UserError(f"{self._field}: {error}; the same command goes on later") from error

  async def check(self) -> None:
    """Asks for one token, so that a wrong key, model or address shows before anything is done.

    Raises:
      UserError: there is no answer, or a refusal.
    """
    try:
      await self.complete([{"role": "user", "content": "Hi"}], SamplingParams(max_new_tokens=16), 0)
    except RemoteError as error:
      raise UserError(f"{self._field}: {error}") from error

  def stats(self) -> dict[str, int]:
    """Requests, retries, the tokens that the endpoint reported, and answers without a report."""
    return dict(self._counts)

  def close(self) -> None:
    """Closes the connections; what is under way is given up."""
    with self._start:
      loop, self._loop = self._loop, None
    if loop is None:
      return
    asyncio.run_coroutine_threadsafe(self._end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    self._thread.join()
    loop.close()

  # ---- in the thread of the connections ----

  def _running_loop(self) -> asyncio.AbstractEventLoop:
    with self._start:
      if self._loop is None:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        self._client = httpx.AsyncClient(
          base_url=self.url + "/",
          headers=headers,
          timeout=self._timeout,
          limits=httpx.Limits(max_connections=self._concurrency),
        )
        self._slots = asyncio.Semaphore(self._concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()
      return self._loop

  async def _end(self) -> None:
    tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    for task in tasks:
      task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await self._client.aclose()

  async def _complete(self, body: dict[str, Any], most: int) -> Completion:
    async with self._slots:
      answer = await self._post(body, most)
    if answer is None:
      return Completion((), (), (), "", "refused")
    try:
      choice = answer["choices"][0]
      text, reason = choice["message"]["content"] or "", choice["finish_reason"]
      usage = answer.get("usage") or {}
      counts = [int(usage.get(f"{name}_tokens") or 0) for name in ("prompt", "completion")]
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
      raise RemoteError(f"expected a chat completion, got {self._shown(answer)}") from error
    if not usage:
      if not self._counts["without_usage"]:
        log.warning("%s reports no usage: its tokens and costs are not known", self.url)
      self._counts["without_usage"] += 1
    self._counts["prompt_tokens"] += counts[0]
    self._counts["tokens"] += counts[1]
    return Completion((), (), (), text, _REASONS.get(reason, "stop"), usage=(counts[0], counts[1]))

  async def _post(self, body: dict[str, Any], most: int) -> Any:
    """The answer's JSON; None where the prompt is too long."""
    estimate = sum(len(one["content"]) for one in body["messages"]) // 3 + most
    problem = ""
    for attempt in range(self._retries + 1):
      if attempt:
        self._counts["retries"] += 1
        wait = min(30.0, self._first_wait * 2 ** (attempt - 1))
        await asyncio.sleep(random.uniform(wait / 2, wait))
      settle = await self._limit.take(estimate)
      self._counts["requests"] += 1
      try:
        answer = await self._try({**body, self._limit_name: most})
      except _Again as error:
        problem = str(error)
        if error.pause > LONGEST_PAUSE:
          raise RemoteError(f"{self.url} asks to wait {error.pause:.0f} s: {problem}") from error
        self._limit.pause(error.pause)
        continue
      usage = answer.get("usage") if isinstance(answer, dict) else None
      if isinstance(usage, dict) and isinstance(usage.get("total_tokens"), int):
        settle(usage["total_tokens"])
      return answer
    raise RemoteError(f"{self.url} gave no answer in {self._retries + 1} tries: {problem}")

  async def _try(self, body: dict[str, Any]) -> Any:
    """One request.

    Raises:
      _Again: it may be repeated.
      UserError: it is refused.
    """
    try:
      async with asyncio.timeout(self._timeout):
        response = await self._client.post("chat/completions", json=body)
    except TimeoutError as error:
      raise _Again(f"no answer within {self._timeout:g} s") from error
    except httpx.RequestError as error:
      raise _Again(self._shown(f"{type(error).__name__}: {error}")) from error
    status, text = response.status_code, self._shown(response.text)
    if status in RETRIED or status >= 500:
      raise _Again(f"status {status}: {text}", retry_after(response.headers.get("Retry-After")))
    if status == 400 and any(mark in response.text for mark in _TOO_LONG):
      return None
    if status == 400 and "max_completion_tokens" in response.text and "max_tokens" in body:
      self._limit_name = "max_completion_tokens"
      raise _Again(text)
    if status >= 300:
      hint = "; does config say the right key_env?" if status in (401, 403) else ""
      raise UserError(
        f"{self._field}: {self.url} refused the request for model {self.model!r}: "
        f"status {status}: {text}{hint}"
      )
    try:
      return response.json()
    except ValueError as error:
      raise _Again(f"expected JSON, got {text!r}") from error

  def _shown(self, answer: Any) -> str:
    """What an endpoint said, short, in one line and without the key."""
    text = " ".join(str(answer).split())
    return (text.replace(self._key, "***") if self._key else text)[:200]
