"""A chat model behind an OpenAI-compatible endpoint, as an `awf.types.LLM`."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import httpx

from awf.sampler.request import FinishReason
from awf.types import Completion, SamplingParams, UserError

RETRIED = (408, 409, 429, 500, 502, 503, 504)
_REASONS: dict[str, FinishReason] = {"length": "length", "stop": "stop"}


class RemoteError(RuntimeError):
  """The endpoint did not answer; an infrastructure failure, never the model's fault."""


class RemoteLLM:
  """Calls `POST <base_url>/chat/completions`.

  Token ids and log-probs are not known for a remote model: they stay empty, so its completions are
  no training rows. Equal arguments give equal completions as far as the endpoint honours `seed`.
  """

  def __init__(
    self,
    base_url: str,
    model: str,
    *,
    api_key: str | None = None,
    concurrency: int = 16,
    timeout: float = 120.0,
    retries: int = 4,
    first_wait: float = 0.5,
    transport: httpx.AsyncBaseTransport | None = None,
  ):
    """Makes the client; no connection is opened before the first call.

    Args:
      base_url: up to and including the version, such as http://localhost:8000/v1.
      model: the endpoint's name of the model.
      api_key: bearer token; None reads OPENAI_API_KEY, which may be unset.
      concurrency: requests in flight.
      timeout: seconds per try.
      retries: further tries after connection errors and the statuses of `RETRIED`.
      first_wait: seconds before the first retry; doubles with each, up to 30.
      transport: own httpx transport.

    Raises:
      UserError: the address is not an http(s) one.
    """
    if not base_url.startswith(("http://", "https://")):
      raise UserError(f"base_url: expected http://... or https://..., got {base_url!r}")
    key = os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    self.model, self._retries, self._first_wait = model, retries, first_wait
    self._client = httpx.AsyncClient(
      base_url=base_url.rstrip("/") + "/", headers=headers, timeout=timeout, transport=transport
    )
    self._slots = asyncio.Semaphore(concurrency)
    names = ("requests", "retries", "prompt_tokens", "tokens")
    self._counts: dict[str, int] = dict.fromkeys(names, 0)

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

    Raises:
      UserError: the endpoint refuses the request (bad key, unknown model, bad field).
      RemoteError: it does not answer, or answers with something else than a completion.
    """
    if adapter:
      raise ValueError(f"adapter: a remote model has only adapter 0, got {adapter}")
    body: dict[str, Any] = {
      "model": self.model,
      "messages": messages,
      "temperature": sampling.temperature,
      "top_p": sampling.top_p,
      "max_tokens": sampling.max_new_tokens,
      "seed": key & 0x7FFFFFFF,
    }
    if sampling.top_k:
      body["top_k"] = sampling.top_k
    if sampling.min_p:
      body["min_p"] = sampling.min_p
    if sampling.stop:
      body["stop"] = list(sampling.stop)
    async with self._slots:
      answer = await self._post(body)
    try:
      choice = answer["choices"][0]
      text, reason = choice["message"]["content"] or "", choice["finish_reason"]
    except (KeyError, IndexError, TypeError) as error:
      raise RemoteError(f"expected a chat completion, got {str(answer)[:200]}") from error
    usage = answer.get("usage") or {}
    self._counts["prompt_tokens"] += usage.get("prompt_tokens", 0)
    self._counts["tokens"] += usage.get("completion_tokens", 0)
    return Completion((), (), (), text, _REASONS.get(reason, "stop"))

  def stats(self) -> dict[str, int]:
    """Requests, retries and the tokens that the endpoint reported."""
    return dict(self._counts)

  async def close(self) -> None:
    """Closes the connections."""
    await self._client.aclose()

  async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
    problem = ""
    for attempt in range(self._retries + 1):
      if attempt:
        self._counts["retries"] += 1
        await asyncio.sleep(min(30.0, self._first_wait * 2 ** (attempt - 1)))
      self._counts["requests"] += 1
      try:
        response = await self._client.post("chat/completions", json=body)
      except httpx.TransportError as error:
        problem = f"{type(error).__name__}: {error}"
        continue
      if response.status_code in RETRIED:
        problem = f"status {response.status_code}: {response.text[:200]}"
        continue
      if response.status_code >= 400:
        raise UserError(
          f"{self._client.base_url} refused the request for model {self.model!r}: "
          f"status {response.status_code}: {response.text[:200]}"
        )
      try:
        return response.json()
      except ValueError as error:
        raise RemoteError(f"expected JSON, got {response.text[:200]!r}") from error
    raise RemoteError(f"{self._client.base_url} gave no answer in {attempt + 1} tries: {problem}")
