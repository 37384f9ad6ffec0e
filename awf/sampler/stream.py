"""Parts of a request's completions, handed from the engine's thread to an asyncio caller."""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import Future

from awf.sampler.request import Output, Part


class PartStream:
  """The parts as they come, those of all samples mixed: `with engine.stream(r) as parts`, then
  `async for part in parts`. Leaving the block early cancels the request.

  Attributes:
    future: of the whole outputs; set by the engine.
  """

  def __init__(self) -> None:
    self.future: Future[list[Output]] = Future()
    self._loop, self._parts = asyncio.get_running_loop(), asyncio.Queue()
    self._is_ended = False

  def put(self, part: Part) -> None:
    """Takes a part, in the engine's thread; raises RuntimeError when the loop is closed."""
    self._loop.call_soon_threadsafe(self._parts.put_nowait, part)

  def end(self, future: Future) -> None:
    """No part follows."""
    del future
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens
      self._loop.call_soon_threadsafe(self._parts.put_nowait, None)

  def __enter__(self) -> PartStream:
    return self

  def __exit__(self, *_) -> None:
    self.future.cancel()

  def __aiter__(self) -> PartStream:
    return self

  async def __anext__(self) -> Part:
    part = None if self._is_ended else await self._parts.get()
    if part is None:
      self._is_ended = True
      self.future.result()  # raises what ended it
      raise StopAsyncIteration
    return part
