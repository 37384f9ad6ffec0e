"""Mode serve: an OpenAI-compatible HTTP server on the sampler, with adapters as model names."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from ml_collections import ConfigDict

from awf.types import SamplingParams, UserError

log = logging.getLogger("awf")

TOKEN_VARIABLE = "AWF_API_KEY"


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
  from awf.qwen.peft import named_paths
  from awf.runtime_setup import setup_jax
  from awf.serve_app import Service, make_app
  from awf.sharding import make_mesh

  del workdir
  serve = config.serve
  bound = _bind(serve.host, serve.port)
  try:
    setup_jax()
    mesh = make_mesh(**config.mesh) if jax.device_count() > 1 else None
    policy = make_policy(config, mesh)
  except BaseException:
    bound.close()
    raise
  try:
    own = ["policy"] if config.lora.init_path else []
    names = [*own, *named_paths(config.lora.paths)]
    base = serve.model_name or Path(config.model.path).name
    models = {base: 0, **{name: policy.adapter_index(name) for name in names}}
    if len(models) != 1 + len(names):
      raise UserError(f"config.serve.model_name: {base!r} is an adapter's name too; choose another")
    s = config.sampler
    defaults = SamplingParams(s.temperature, s.top_p, s.top_k, s.max_new_tokens, min_p=s.min_p)
    service = Service(policy, models, defaults, int(serve.max_body_mb * 2**20))
    token = serve.api_key or os.environ.get(TOKEN_VARIABLE, "")
    app = make_app(service, token, serve.cors)
    port = bound.getsockname()[1]
    shown = f"[{serve.host}]" if ":" in serve.host else serve.host
    url = f"http://{shown}:{port}/v1"
    if not token and not _is_loopback(serve.host):
      log.warning("anyone who reaches %s may use it: set %s", url, TOKEN_VARIABLE)
    began = time.perf_counter()
    server = Server(
      uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=int(serve.shutdown_seconds),
      )
    )
    log.info("serving %s on %s", ", ".join(models), url)
    asyncio.run(server.serve([bound]))
    stats = policy.engine.stats()
  finally:
    policy.close()
    bound.close()
  names = ("requests", "completions", "cancelled", "tokens")
  return {
    "url": url,
    "http_requests": service.counts["http_requests"],
    **{name: int(stats[name]) for name in names},
    "wall_seconds": time.perf_counter() - began,
  }


def _bind(host: str, port: int) -> socket.socket:
  """A listening socket, before any model is loaded; port 0 takes a free one."""
  try:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
  except OSError as error:
    raise UserError(
      f"config.serve.host, config.serve.port: cannot listen on {host}:{port} ({error}); "
      "choose another port, or 0 for a free one"
    ) from error
  bound.set_inheritable(False)
  return bound


def _is_loopback(host: str) -> bool:
  return host in ("localhost", "::1") or host.startswith("127.")
