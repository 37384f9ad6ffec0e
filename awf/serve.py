"""Mode serve: an OpenAI-compatible HTTP server on the sampler, with adapters as model names."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from ml_collections import ConfigDict

from awf.sampler.request import Request
from awf.types import SamplingParams, UserError

if TYPE_CHECKING:
  from awf.policy import QwenPolicy
  from awf.serve_app import Service

log = logging.getLogger("awf")

TOKEN_VARIABLE = "AWF_API_KEY"
BACKLOG = 2048  # connections that wait to be accepted, as many as at uvicorn


class Server(uvicorn.Server):
  """uvicorn's, whose first SIGTERM or Ctrl-C is an ordinary end: the mode returns its figures."""

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    before = {one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
      yield
    finally:
      for one, handler in before.items():
        signal.signal(one, handler)


class LocalServer:
  """An application on a free port of the loopback device, in a thread, while it is open.

  Attributes:
    url: its address with /v1.
  """

  def __init__(self, app: Any) -> None:
    self._socket = _bind("127.0.0.1", 0)
    self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
    settings = uvicorn.Config(
      app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=5
    )
    self._server = Server(settings)
    self._thread = threading.Thread(target=self._run, name="serve", daemon=True)

  def _run(self) -> None:
    asyncio.run(self._server.serve([self._socket]))

  def __enter__(self) -> LocalServer:
    self._thread.start()  # who has asked since the socket listens is answered now
    return self

  def __exit__(self, *_: object) -> None:
    self._server.should_exit = True
    self._thread.join()
    self._socket.close()


def run_serve(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Serves until SIGTERM or Ctrl-C; then answers what is under way, for a limited time.

  Args:
    config: resolved config; `config.serve` says where and for whom, `config.sampler` what a request
      that says nothing is sampled with, `config.lora.paths` which adapters are models by name.
    workdir: directory of the run; nothing is written there.

  Returns:
    `url`, counts of requests and tokens, `wall_seconds`.

  Raises:
    UserError: the address cannot be bound, or a model that cannot be used.
  """
  import jax

  from awf.policy import make_policy
  from awf.runtime_setup import setup_jax
  from awf.serve_app import make_app
  from awf.sharding import make_mesh

  del workdir
  serve = config.serve
  with contextlib.ExitStack() as stack:
    bound = stack.enter_context(_bind(serve.host, serve.port))
    setup_jax()
    mesh = make_mesh(**config.mesh) if jax.device_count() > 1 else None
    policy = make_policy(config, mesh)
    stack.callback(policy.close)
    if not config.lora.init_path:
      policy.set_lora(None)  # likewise in mode generate: a new adapter is not a model to serve
    service = _make_service(config, policy)
    token = _token(serve.api_key)
    host = f"[{serve.host}]" if ":" in serve.host else serve.host
    url = f"http://{host}:{bound.getsockname()[1]}/v1"
    if not token and not _is_loopback(serve.host):
      log.warning("anyone who reaches %s may use it: set %s", url, TOKEN_VARIABLE)
    for n in sorted({1, policy.engine.shapes.rows}):  # compiles before anyone waits
      policy.engine.generate([Request((0,), n=n, max_new_tokens=1)])  # fast mode has two programs
    server = Server(
      uvicorn.Config(
        make_app(service, token, serve.cors),
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=math.ceil(serve.shutdown_seconds),
      )
    )
    log.info("serving %s on %s", ", ".join(service.models), url)
    began = time.perf_counter()
    asyncio.run(server.serve([bound]))
    stats = policy.engine.stats()
  return {
    "url": url,
    "http_requests": service.counts["http_requests"],
    **{name: int(stats[name]) for name in ("requests", "completions", "cancelled", "tokens")},
    "wall_seconds": time.perf_counter() - began,
  }


def _token(configured: str) -> str:
  """The bearer token that clients have to show; "" asks for none.

  Read from a file it may end in a line break, and one of blanks alone is no open server.
  """
  given = configured or os.environ.get(TOKEN_VARIABLE, "")
  if given and not given.strip():
    raise UserError(f"{TOKEN_VARIABLE}: expected a key, got blanks alone; unset it to ask for none")
  return given.strip()


def _make_service(config: ConfigDict, policy: QwenPolicy) -> Service:
  """The handlers, with the base and the adapters under the names that clients use."""
  from awf.config_io import named_paths
  from awf.serve_app import Service

  own = ["policy"] if config.lora.init_path else []
  names = [*own, *named_paths(config.lora.paths)]
  base = config.serve.model_name or Path(config.model.path).name
  if base in names:
    raise UserError(f"config.serve.model_name: {base!r} is an adapter's name too; choose another")
  models = {base: 0, **{name: policy.adapter_index(name) for name in names}}
  s = config.sampler
  defaults = SamplingParams(s.temperature, s.top_p, s.top_k, s.max_new_tokens, min_p=s.min_p)
  return Service(policy, models, defaults, int(config.serve.max_body_mb * 2**20))


def _bind(host: str, port: int) -> socket.socket:
  """A listening socket, before any model is loaded; port 0 takes a free one."""
  bound = None
  try:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    bound.listen(BACKLOG)  # two that do not listen could share the address
  except (OSError, UnicodeError) as error:
    if bound is not None:
      bound.close()
    is_host = bound is None or getattr(error, "errno", None) == errno.EADDRNOTAVAIL
    advice = "expected a name or an address of this machine"
    if not is_host:
      advice = "choose another config.serve.port, or 0 for a free one"
    raise UserError(
      f"config.serve.{'host' if is_host else 'port'}: cannot listen on {host}:{port} ({error}); "
      f"{advice}"
    ) from error
  bound.set_inheritable(False)
  return bound


def _is_loopback(host: str) -> bool:
  return host in ("localhost", "::1") or host.startswith("127.")
