"""The HTTP side of mode serve: routes, token, streaming, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from awf.sampler.engine import Output, Part, QueueFull
from awf.sampler.generate import PolicyLike
from awf.sampler.stream import PartStream
from awf.serve_answer import Answer
from awf.serve_format import ApiError, Call, parse_call
from awf.types import SamplingParams

log = logging.getLogger("awf")
_T = TypeVar("_T")
Watch = Callable[[Mapping[str, Any], Mapping[str, Any]], None]
_LONG = 1 << 16  # bytes of a body whose tokens a thread finds, while others are served
_MANY = 1 << 11  # log-probs of an answer that a thread renders, likewise
_LAST_SECONDS = 1.0  # for telling a stream's reader that it is cut off; one may read no more
OPEN = ("/health",)  # needs no token: a load balancer has none


class Gone(Exception):
  """The client has closed its connection."""


async def until_gone(receive: Receive, work: Awaitable[_T]) -> _T:
  """Waits for `work`, and cancels it when the client goes away.

  Raises:
    Gone: it did.
  """

  async def listen() -> None:
    while (await receive())["type"] != "http.disconnect":
      pass

  task, ear = asyncio.ensure_future(work), asyncio.ensure_future(listen())
  try:
    await asyncio.wait((task, ear), return_when=asyncio.FIRST_COMPLETED)
    if not task.done():
      raise Gone
    return task.result()
  finally:
    for one in (task, ear):
      one.cancel()
    await asyncio.gather(task, ear, return_exceptions=True)


class EventStream(Response):
  """Server-sent events, one JSON object each, and `[DONE]`."""

  media_type = "text/event-stream"

  def __init__(self, objects: AsyncGenerator[dict[str, Any]]) -> None:
    super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    del self.headers["content-length"]
    self._objects = objects

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def event(data: str, more: bool = True) -> None:
      body = f"data: {data}\n\n".encode()
      await send({"type": "http.response.body", "body": body, "more_body": more})

    is_whole = False

    async def run() -> None:
      nonlocal is_whole
      async for one in self._objects:
        await event(json.dumps(one, ensure_ascii=False))
      is_whole = True
      await event("[DONE]", more=False)

    try:
      await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
      await until_gone(receive, run())
    except Gone:
      pass
    except asyncio.CancelledError:  # the time for shutting down is over
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LAST_SECONDS):
          if not is_whole:
            await event(json.dumps(_shutting_down().body()))
            await event("[DONE]", more=False)
    finally:
      await self._objects.aclose()


class Counter:
  """Counts requests and answers that are errors; 499 is no answer but a client that left."""

  def __init__(self, app: ASGIApp, counts: dict[str, int]) -> None:
    self._app, self._counts = app, counts

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    async def counted(message: Message) -> None:
      if message["type"] == "http.response.start":
        self._counts["http_errors"] += message["status"] >= 400 and message["status"] != 499
      await send(message)

    self._counts["http_requests"] += scope["type"] == "http"
    try:
      await self._app(scope, receive, counted)
    except Exception:  # answered outside of all middleware
      self._counts["http_errors"] += 1
      raise


class TokenGate:
  """Lets through who has the bearer token."""

  def __init__(self, app: ASGIApp, token: str) -> None:
    self._app, self._want = app, token.encode()

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" and scope["path"] not in OPEN and scope["method"] != "OPTIONS":
      given = dict(scope["headers"]).get(b"authorization", b"")
      scheme, _, key = given.partition(b" ")
      if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._want):
        message = "Incorrect API key provided" if given else "You didn't provide an API key"
        error = ApiError(401, message, None, "invalid_api_key")
        await _refusal(error)(scope, receive, send)
        return
    await self._app(scope, receive, send)


def _shutting_down() -> ApiError:
  return ApiError(503, "the server is shutting down", None, "shutting_down")


def _refusal(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
  known = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
  return JSONResponse(error.body(), error.status, headers or known.get(error.status))


def _render(answer: Answer, outputs: list[list[Output]]) -> tuple[dict[str, Any], JSONResponse]:
  whole = answer.whole(outputs)
  return whole, JSONResponse(whole)


class Service:
  """The handlers.

  Attributes:
    counts: of the server: requests, answers that are errors, calls of the model, clients that left
      early.

  Args:
    policy: what answers.
    models: adapter index by the name that clients use; the first is the base.
    defaults: sampling that a body does not set.
    most_bytes: of a body.
    watch: is told of every whole answer: the request's body, and its own.
  """

  def __init__(
    self,
    policy: PolicyLike,
    models: Mapping[str, int],
    defaults: SamplingParams,
    most_bytes: int,
    watch: Watch = lambda body, answer: None,
  ) -> None:
    self._policy, self.models, self._defaults = policy, dict(models), defaults
    self._most_bytes, self._started, self._watch = most_bytes, int(time.time()), watch
    names = ("http_requests", "http_errors", "calls", "clients_gone")
    self.counts: dict[str, int] = dict.fromkeys(names, 0)

  async def chat(self, request: HttpRequest) -> Response:
    """POST /v1/chat/completions."""
    return await self._complete(request, True)

  async def complete(self, request: HttpRequest) -> Response:
    """POST /v1/completions."""
    return await self._complete(request, False)

  async def list_models(self, request: HttpRequest) -> Response:
    """GET /v1/models."""
    del request
    return JSONResponse({"object": "list", "data": [self._model(name) for name in self.models]})

  async def one_model(self, request: HttpRequest) -> Response:
    """GET /v1/models/NAME."""
    name = request.path_params["name"]
    if name not in self.models:
      message = f"The model {name!r} does not exist"
      raise ApiError(404, message, "model", "model_not_found")
    return JSONResponse(self._model(name))

  async def health(self, request: HttpRequest) -> Response:
    """GET /health: 503 once the engine has stopped."""
    del request
    alive = self._policy.engine.is_alive
    return JSONResponse({"status": "ok" if alive else "stopped"}, 200 if alive else 503)

  async def metrics(self, request: HttpRequest) -> Response:
    """GET /metrics: the engine's and the server's counters as Prometheus reads them."""
    del request
    gauges = ("occupancy", "running", "waiting")
    lines = []
    for name, value in {**self._policy.engine.stats(), **self.counts}.items():
      full = f"awf_{name}" if name in gauges else f"awf_{name}_total"
      lines += [f"# TYPE {full} {'gauge' if name in gauges else 'counter'}", f"{full} {value:.10g}"]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

  def _model(self, name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": self._started, "owned_by": "awf"}

  async def _complete(self, request: HttpRequest, is_chat: bool) -> Response:
    self.counts["calls"] += 1
    try:
      return await self._answer(request, is_chat)
    except asyncio.CancelledError as error:  # the time for shutting down is over
      raise _shutting_down() from error

  async def _answer(self, request: HttpRequest, is_chat: bool) -> Response:
    body, size = await self._body(request)
    parse = functools.partial(parse_call, body, is_chat, self._policy, self.models, self._defaults)
    call = await asyncio.to_thread(parse) if size > _LONG else parse()
    answer = Answer(call, self._policy)
    try:
      if call.stream:
        # Submitted before the answer begins: a full queue is still a status.
        return EventStream(self._chunks(answer, self._open(call)))
      outputs = await until_gone(request.receive, self._outputs(call))
    except QueueFull as error:
      raise ApiError(429, str(error), None, "queue_full") from error
    except Gone as error:
      self.counts["clients_gone"] += 1
      raise ClientDisconnect from error
    render = functools.partial(_render, answer, outputs)
    num_tokens = sum(len(output.token_ids) for of_prompt in outputs for output in of_prompt)
    is_long = call.top_logprobs is not None and num_tokens * (1 + call.top_logprobs) > _MANY
    whole, response = await asyncio.to_thread(render) if is_long else render()
    self._watch(body, whole)
    return response

  async def _outputs(self, call: Call) -> list[list[Output]]:
    futures = self._policy.engine.submit_all(call.requests, wait=False)
    try:
      return [await asyncio.wrap_future(future) for future in futures]
    finally:
      for future in futures:
        future.cancel()

  def _open(self, call: Call) -> list[PartStream]:
    streams: list[PartStream] = []
    try:
      for i, one in enumerate(call.requests):  # those behind the first stand in line
        streams.append(self._policy.engine.stream(one, wait=i > 0))
    except QueueFull:
      for stream in streams:
        stream.future.cancel()
      raise
    return streams

  async def _chunks(
    self, answer: Answer, streams: list[PartStream]
  ) -> AsyncGenerator[dict[str, Any]]:
    """All objects of a streamed answer; leaving it early cancels the requests."""
    merged: asyncio.Queue[tuple[int, Part] | BaseException | None] = asyncio.Queue()

    async def follow(i: int, stream: PartStream) -> None:
      try:
        async for part in stream:
          merged.put_nowait((i, part))
        merged.put_nowait(None)
      except Exception as error:  # raised again by the reader
        merged.put_nowait(error)

    tasks = [asyncio.ensure_future(follow(i, stream)) for i, stream in enumerate(streams)]
    is_done = False
    try:
      for chunk in answer.first_chunks():
        yield chunk
      left = len(tasks)
      while left:
        item = await merged.get()
        if isinstance(item, BaseException):
          raise item
        if item is None:
          left -= 1
          continue
        for chunk in answer.chunks(*item):
          yield chunk
      if answer.call.include_usage:
        yield answer.last_chunk()
      is_done = True
    except RuntimeError as error:  # the status is sent: an event is all that can still say it
      log.error("a stream ended early: %s", error)
      is_done = True
      yield ApiError(500, f"the sampler failed: {error}").body()
    finally:
      self.counts["clients_gone"] += not is_done
      for stream, task in zip(streams, tasks, strict=True):
        stream.future.cancel()
        task.cancel()

  async def _body(self, request: HttpRequest) -> tuple[Any, int]:
    """What a request's JSON says, and its bytes."""
    data = bytearray()
    async for piece in request.stream():
      data += piece
      if len(data) > self._most_bytes:
        raise ApiError(413, f"the body has more than {self._most_bytes} bytes")
    try:
      return json.loads(data), len(data)
    except (ValueError, RecursionError) as error:
      raise ApiError(400, f"We could not parse the JSON body of your request: {error}") from error


def make_app(service: Service, token: str = "", origins: Sequence[str] = ()) -> Starlette:
  """The ASGI application.

  Args:
    service: the handlers.
    token: bearer token that every route but /health asks for; "" asks for none.
    origins: web origins that browsers may call from; none sends no CORS header.
  """

  async def refuse(request: HttpRequest, error: Exception) -> Response:
    if isinstance(error, ApiError):
      return _refusal(error)
    if isinstance(error, HTTPException):
      path = f"{request.method} {request.url.path}"
      refusal = ApiError(error.status_code, f"Invalid URL ({path}): {error.detail}")
      return _refusal(refusal, error.headers)
    log.error("serve: %s %s failed", request.method, request.url.path, exc_info=error)
    return _refusal(ApiError(500, "the server failed; its log says why"))

  async def gone(request: HttpRequest, error: Exception) -> Response:
    del request, error
    return Response(status_code=499)  # nobody reads it

  routes = [
    Route("/health", service.health),
    Route("/metrics", service.metrics),
    Route("/v1/models", service.list_models),
    Route("/v1/models/{name:path}", service.one_model),
    Route("/v1/chat/completions", service.chat, methods=["POST"]),
    Route("/v1/completions", service.complete, methods=["POST"]),
  ]
  middleware = [Middleware(Counter, counts=service.counts)]
  if origins:
    middleware.append(
      Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
      )
    )
  if token:
    middleware.append(Middleware(TokenGate, token=token))
  handlers: dict[Any, Any] = {
    ApiError: refuse, HTTPException: refuse, ClientDisconnect: gone, Exception: refuse,
  }  # fmt: skip
  return Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
