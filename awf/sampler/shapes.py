"""What an engine's program is compiled for: sizes of pages, chunks and groups by platform."""

from __future__ import annotations

import math

import jax

from awf.qwen.config import QwenConfig
from awf.sampler import kernels
from awf.sampler.cache import token_bytes
from awf.sampler.decode import Shapes

PAGE, CHUNK = 128, 64  # tokens of a prompt's page and of a completion's chunk
IN_PLACE = 1 << 20  # most bytes of a layer's keys, of all rows, in the one chunk that has them all
TPU_WIDTH = 256  # of both: fewer and larger pieces of a decode step
PROMPT_BYTES = 3 << 29  # pages for prompts: what all rows could need unless that is more
STALL_TOKENS, GPU_STALL_TOKENS = 2048, 8192  # most prompt tokens of a dispatch in which rows decode


def make_shapes(
  config: QwenConfig,
  rows: int,
  context: int,
  prefill_rows: int,
  steps: int,
  platform: str | None = None,
  max_new_tokens: int = 0,
  prompt_bytes: int = 0,
  has_kernels: bool = False,
) -> Shapes:
  """Compiled shapes of an engine.

  Args:
    config: architecture; its dtype is the cache's.
    rows: completions decoded at once.
    context: prompt + completion, tokens.
    prefill_rows: prompt blocks of one prefill call.
    steps: most decode steps of one dispatch.
    platform: the default backend unless named.
    max_new_tokens: of the longest completion; 0 is the context.
    prompt_bytes: for the pages of prompts; 0 is as much as all rows could need, at most
      PROMPT_BYTES. One prompt of full length always has room.
    has_kernels: attention by awf.sampler.kernels. A GPU without them works on all rows at once, as
      it waits for its host at each trip of a loop.
  """
  platform = platform or jax.default_backend()
  on_cpu, on_tpu = platform == "cpu", platform == "tpu"
  page, chunk = (TPU_WIDTH, TPU_WIDTH) if on_tpu else (PAGE, CHUNK)
  prompt_chunks = -(-context // page)
  own_tokens = min(max_new_tokens or context, context)
  page_bytes = page * token_bytes(config)
  layer_bytes = page_bytes // (2 * config.num_hidden_layers)
  if on_cpu and chunk < own_tokens <= page and rows * layer_bytes <= IN_PLACE:
    # One chunk is read where it lies. With more keys to read, copies of what is live are faster:
    # the copy takes two threads, a product of few rows takes one.
    chunk = page
  own_chunks = -(-own_tokens // chunk)
  pages = prompt_bytes // page_bytes
  if not prompt_bytes:
    pages = min(rows * prompt_chunks, PROMPT_BYTES // page_bytes)
  group = 16 if on_cpu and rows % 16 == 0 else rows
  # Few rows of a group make no product slower on CPU, where each page is read from memory anyway.
  share = min(rows, 4 if on_cpu else 8)
  # With a fourth of the rows, groups of four full rows leave no place of a trip unused.
  at_once = math.gcd(rows, min(8, max(1, rows // 4)) if on_cpu else 4)
  lone_at_once = at_once if on_cpu else 0
  if platform == "gpu" and not has_kernels:
    at_once = lone_at_once = rows
  block = 128
  if on_cpu:
    block = 64 if context >= 512 else 32
  calls = max(-(-prompt_chunks * page // (prefill_rows * block)), 32)
  return Shapes(
    rows=rows, pages=max(pages, prompt_chunks), page=page, prompt_chunks=prompt_chunks,
    chunks=own_chunks, chunk=chunk, group=group, share=share, at_once=at_once,
    lone_at_once=lone_at_once, blocks=prefill_rows, block=block, calls=calls,
    steps=steps, stall=GPU_STALL_TOKENS if platform == "gpu" else STALL_TOKENS, is_pinned=on_tpu,
    splits=kernels.num_splits(config, rows, context) if has_kernels else 0,
  )  # fmt: skip
