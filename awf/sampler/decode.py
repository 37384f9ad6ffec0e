"""The one compiled program of the engine: prefill prompts, then decode some steps.

Host and device exchange one packed int32 row table and one packed result per dispatch; only shapes
are static, so sampling fields, stop ids, seeds, lengths and work lists never compile anew.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from awf.qwen.config import QwenConfig
from awf.qwen.model import Attend, Qwen, head
from awf.sampler import kernels
from awf.sampler.cache import Cache, CacheSizes, Sharing, decode_attend, prefill_attend
from awf.sampler.draw import draw, likeliest, uniforms
from awf.sampler.request import MAX_STOP_IDS, MOST_TOP, Top
from awf.types import ArrayT

IDLE, RUNNING, STOPPED, FULL = 0, 1, 2, 3  # status of a row

# Columns of the packed row table; floats travel as their bits.
COLUMNS = (
  "status", "token", "position", "made", "limit", "seed_high", "seed_low", "sample", "top_k",
  "adapter", "temperature", "top_p", "min_p", "wants_full", "stop",
)  # fmt: skip
COLUMN = {name: i for i, name in enumerate(COLUMNS)}
NUM_COLUMNS = len(COLUMNS) - 1 + MAX_STOP_IDS  # `stop` is the first of MAX_STOP_IDS columns


@dataclasses.dataclass(frozen=True)
class Shapes:
  """Everything that the program is compiled for, beside the model and the adapters' shapes."""

  rows: int  # decode rows
  pages: int  # of prompts; one more behind them takes padding
  page: int  # tokens of a page
  prompt_chunks: int  # pages of the longest prompt
  chunks: int  # of the longest completion
  chunk: int  # tokens of a chunk
  group: int  # neighbouring decode rows that share a trip count
  share: int  # rows of one share group: they read a prompt's pages together
  at_once: int  # share groups of one trip
  lone_at_once: int  # rows of one trip that read their prompt alone; 0: they are groups too
  blocks: int  # prompt blocks of one prefill call
  block: int  # tokens of one prompt block; divides page
  calls: int  # most prefill calls of one dispatch
  steps: int  # most decode steps of one dispatch
  stall: int  # most prompt tokens of a dispatch in which rows decode
  is_pinned: bool = False  # one memory layout of the cache in all parts, for TPUs
  splits: int = 0  # of a row's keys in awf.sampler.kernels, for GPUs; 0: awf.sampler.cache attends

  def __post_init__(self) -> None:
    if self.page % self.block:
      raise ValueError(f"block ({self.block}) must divide page ({self.page})")
    for name in ("group", "at_once", "lone_at_once"):
      if self.rows % (getattr(self, name) or 1):
        raise ValueError(f"{name} ({getattr(self, name)}) must divide rows ({self.rows})")

  @property
  def cache(self) -> CacheSizes:
    """Sizes of the cache, with room for padding."""
    rows = self.rows + self.is_pinned
    return CacheSizes(self.pages + 1, self.page, rows, self.chunks, self.chunk)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Work(Generic[ArrayT]):
  """What the host asks of one dispatch; every array has one fixed shape. S = A = L = rows."""

  table_BX: ArrayT  # int32 [rows, NUM_COLUMNS]
  tokens_CPT: ArrayT  # int32 [calls, blocks, block], prompt tokens to prefill
  place_CP3: ArrayT  # int32 [calls, blocks, 3]: prompt, first position, adapter
  pages_SC: ArrayT  # int32 [rows, prompt_chunks], pages of each prompt
  known_S: ArrayT  # int32 [rows], prefilled tokens of each prompt
  rows_AM: ArrayT  # int32 [rows, share], rows of each share group
  prompt_A: ArrayT  # int32 [rows], prompt of each share group
  row_L: ArrayT  # int32 [rows], rows that read their prompt alone
  prompt_L: ArrayT  # int32 [rows], prompt of each of these
  # int32 [6]: prefill calls, share groups, lone rows, decode steps, finished rows that end the
  # loop, whether the likeliest tokens are wanted
  counts_6: ArrayT

  def rows_used(self) -> int:
    """First rows, prompts and share groups that hold all there is to do."""
    running = np.flatnonzero(np.asarray(self.table_BX)[:, COLUMN["status"]] == RUNNING)
    prompts = np.flatnonzero(np.asarray(self.known_S))
    return max(1, *(int(x[-1]) + 1 for x in (running, prompts) if len(x)), *self.counts_6[1:3])

  def first_rows(self, rows: int) -> Work[ArrayT]:
    """The same for a program of fewer rows; padding, which named row B, lies beyond them still."""
    names = ("table_BX", "pages_SC", "known_S", "rows_AM", "prompt_A", "row_L", "prompt_L")
    return dataclasses.replace(self, **{name: getattr(self, name)[:rows] for name in names})

  def only_prefill(self) -> Work[ArrayT]:
    """The same without decode steps."""
    return dataclasses.replace(
      self, counts_6=self.counts_6 * np.asarray([1, 1, 1, 0, 1, 1], np.int32)
    )

  def only_decode(self) -> Work[ArrayT]:
    """The same without prefill calls."""
    return dataclasses.replace(
      self, counts_6=self.counts_6 * np.asarray([0, 1, 1, 1, 1, 1], np.int32)
    )


def empty_work(shapes: Shapes) -> Work[np.ndarray]:
  """A Work that does nothing; all prefill blocks are padding."""
  place = np.zeros((shapes.calls, shapes.blocks, 3), np.int32)
  place[..., 0] = shapes.rows
  return Work(
    np.zeros((shapes.rows, NUM_COLUMNS), np.int32),
    np.zeros((shapes.calls, shapes.blocks, shapes.block), np.int32),
    place,
    np.full((shapes.rows, shapes.prompt_chunks), shapes.pages, np.int32),
    np.zeros(shapes.rows, np.int32),
    np.full((shapes.rows, shapes.share), shapes.rows, np.int32),
    np.zeros(shapes.rows, np.int32),
    np.full(shapes.rows, shapes.rows, np.int32),
    np.zeros(shapes.rows, np.int32),
    np.zeros(6, np.int32),
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rows:
  """Live part of the rows inside the decode loop."""

  token_B: jax.Array  # int32, last token, not yet in the cache
  position_B: jax.Array  # int32, where it goes
  status_B: jax.Array  # int32
  made_B: jax.Array  # int32, tokens drawn so far


def _forward(
  model: Qwen,
  weights: tuple[Any, Any],
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  attend: Attend,
  cache: Cache,
  adapter_B: jax.Array,
) -> tuple[jax.Array, Cache]:
  """Hidden states and the cache with the new keys and values; `weights` is (params, lora)."""
  params, lora = weights
  variables = {"params": params} if lora is None else {"params": params, "lora": lora}
  # `apply` gives the output alone, as no collection is mutable; its type cannot say so.
  out = model.apply(variables, tokens_BT, positions_BT, attend, cache, adapter_B)
  return cast(tuple[jax.Array, Cache], out)


def prompts_of_rows(work: Work[jax.Array]) -> tuple[jax.Array, jax.Array]:
  """(pages [B, C], known tokens [B]) of each row's prompt, from the lists of groups."""
  rows_AM, prompt_A = work.rows_AM, work.prompt_A
  prompt_AM = jnp.broadcast_to(prompt_A[:, None], rows_AM.shape)
  nothing_B = jnp.zeros_like(work.known_S)
  prompt_B = nothing_B.at[rows_AM].set(prompt_AM, mode="drop")
  known_B = nothing_B.at[rows_AM].set(work.known_S[prompt_AM], mode="drop")
  return work.pages_SC[prompt_B], known_B


def _prefill(
  config: QwenConfig, shapes: Shapes, params, lora, cache: Cache, work: Work[jax.Array]
) -> Cache:
  model = Qwen(config)

  def call(i, cache):
    prompt_P, start_P, adapter_P = (work.place_CP3[i, :, j] for j in range(3))
    tokens_PT = work.tokens_CPT[i]
    position_PT = start_P[:, None] + jnp.arange(tokens_PT.shape[1], dtype=jnp.int32)[None]
    if shapes.splits:
      attend = kernels.prefill_attend(prompt_P, start_P, work.pages_SC)
    else:
      attend = prefill_attend(prompt_P, start_P, work.pages_SC, shapes.is_pinned)
    return _forward(model, (params, lora), tokens_PT, position_PT, attend, cache, adapter_P)[1]

  return jax.lax.fori_loop(0, work.counts_6[0], call, cache)


def _decode(config: QwenConfig, shapes: Shapes, params, lora, cache: Cache, work: Work[jax.Array]):
  """Runs decode steps until the step count, all rows at rest, or enough rows finished."""
  model, top = Qwen(config), min(MOST_TOP, config.vocab_size)
  table = work.table_BX

  def column(name):
    return table[:, COLUMN[name]]

  temperature_B, top_p_B, min_p_B = (
    jax.lax.bitcast_convert_type(column(name), jnp.float32)
    for name in ("temperature", "top_p", "min_p")
  )
  stop_BX = table[:, COLUMN["stop"] :]
  seed_B2 = jax.lax.bitcast_convert_type(
    table[:, COLUMN["seed_high"] : COLUMN["seed_low"] + 1], jnp.uint32
  )
  index_SB = column("made")[None] + jnp.arange(shapes.steps, dtype=jnp.int32)[:, None]
  uniform_SB = jax.vmap(uniforms, (None, None, 0))(seed_B2, column("sample"), index_SB)
  num_started = jnp.sum(column("status") == RUNNING)
  sharing = Sharing(
    work.pages_SC, work.known_S, work.rows_AM, work.prompt_A, work.counts_6[1], work.row_L,
    work.prompt_L, work.counts_6[2],
  )  # fmt: skip
  prompts: tuple[jax.Array, ...] = ()
  if shapes.splits:
    pages_BC, known_B = prompts_of_rows(work)
    length_B = jnp.where(column("status") == RUNNING, known_B + column("made"), -1)
    prompts = pages_BC, known_B, jnp.argsort(length_B, descending=True)

  def is_going(carry):
    i, _, rows, *_ = carry
    num_running = jnp.sum(rows.status_B == RUNNING)
    is_wanted = num_started - num_running < work.counts_6[4]
    return (i < work.counts_6[3]) & (num_running > 0) & is_wanted

  def step(carry):
    i, cache, rows, out_S3B, top_SXB = carry
    is_running_B = rows.status_B == RUNNING
    if shapes.splits:
      attend = kernels.decode_attend(rows.made_B, is_running_B, *prompts, splits=shapes.splits)
    else:
      attend = decode_attend(
        rows.made_B,
        is_running_B,
        sharing,
        shapes.group,
        (shapes.at_once, shapes.lone_at_once),
        shapes.is_pinned,
      )
    hidden_B1D, cache = _forward(
      model, (params, lora),
      rows.token_B[:, None], rows.position_B[:, None], attend, cache, column("adapter"),
    )  # fmt: skip
    logits_BV = head(params, hidden_B1D[:, 0])
    uniform_B = jax.lax.dynamic_index_in_dim(uniform_SB, i, 0, keepdims=False)
    id_B, logp_B, full_B = draw(
      logits_BV, uniform_B, temperature_B, top_p_B, column("top_k"), min_p_B,
      (column("wants_full") > 0) & is_running_B,
    )  # fmt: skip
    made_B = rows.made_B + 1
    status_B = jnp.where(made_B >= column("limit"), FULL, RUNNING)
    status_B = jnp.where(jnp.any(id_B[:, None] == stop_BX, axis=-1), STOPPED, status_B)
    bits_2B = jax.lax.bitcast_convert_type(jnp.stack([logp_B, full_B]), jnp.int32)
    drawn_3B = jnp.concatenate([id_B[None], bits_2B])
    out_S3B = jax.lax.dynamic_update_index_in_dim(out_S3B, drawn_3B, i, 0)

    def find_likeliest(logits_BV):
      id_KB, logp_KB = likeliest(logits_BV, temperature_B, top)
      return jnp.concatenate([id_KB, jax.lax.bitcast_convert_type(logp_KB, jnp.int32)])

    def find_nothing(logits_BV):
      return jnp.zeros((2 * top, logits_BV.shape[0]), jnp.int32)

    with jax.named_scope("likeliest"):
      is_wanted = work.counts_6[5] > 0
      found_XB = jax.lax.cond(is_wanted, find_likeliest, find_nothing, logits_BV)
    top_SXB = jax.lax.dynamic_update_index_in_dim(top_SXB, found_XB, i, 0)
    rows = Rows(
      jnp.where(is_running_B, id_B, rows.token_B),
      jnp.where(is_running_B, rows.position_B + 1, rows.position_B),
      jnp.where(is_running_B, status_B, rows.status_B),
      jnp.where(is_running_B, made_B, rows.made_B),
    )
    return i + 1, cache, rows, out_S3B, top_SXB

  rows = Rows(column("token"), column("position"), column("status"), column("made"))
  out_S3B = jnp.zeros((shapes.steps, 3, shapes.rows), jnp.int32)
  top_SXB = jnp.zeros((shapes.steps, 2 * top, shapes.rows), jnp.int32)
  steps, cache, rows, out_S3B, top_SXB = jax.lax.while_loop(
    is_going, step, (jnp.int32(0), cache, rows, out_S3B, top_SXB)
  )
  tail = jnp.stack([rows.status_B, rows.made_B, jnp.full_like(rows.made_B, steps)])
  return cache, jnp.concatenate([out_S3B.reshape(-1, shapes.rows), tail]), top_SXB


def dispatch(config: QwenConfig, shapes: Shapes, params, lora, cache: Cache, work: Work[jax.Array]):
  """Prefills prompts into their pages, then decodes.

  Returns:
    (cache, int32 [3 * steps + 3, B], int32 [steps, 2K, B]): for each step ids and bits of log-probs
    as drawn and before the cut, then status, tokens made, steps run; ids and bits of log-probs of
    the K likeliest of each step, or zeros where nobody wants them.
  """
  # The names tell the parts of the compiled program apart (awf.plan).
  with jax.named_scope("prefill"):
    cache = _prefill(config, shapes, params, lora, cache, work)
  with jax.named_scope("decode"):
    return _decode(config, shapes, params, lora, cache, work)


def compile_dispatch(config: QwenConfig, shapes: Shapes, on_trace=None):
  """The jitted `dispatch` of one engine: (params, lora, cache, work) -> (cache, packed, likeliest).

  The cache is donated: no second copy of it exists, and no copy of a layer's part is made inside.
  `on_trace` is called once per trace, so that tests can count them.
  """

  def traced(params, lora, cache, work):
    if on_trace is not None:
      on_trace()
    return dispatch(config, shapes, params, lora, cache, work)

  return jax.jit(traced, donate_argnums=(2,))


class Drawn(NamedTuple):
  """What a dispatch drew."""

  ids_SB: np.ndarray
  logp_SB: np.ndarray  # as drawn
  full_SB: np.ndarray  # before the cut, where it was wanted
  top_id_SKB: np.ndarray  # K = 0 where nobody wants them
  top_logp_SKB: np.ndarray  # before the cut
  status_B: np.ndarray
  made_B: np.ndarray  # tokens drawn so far, those of earlier dispatches included
  steps: int  # run

  def likeliest(self, row: int, made: int, count: int) -> list[Top]:
    """The `count` likeliest tokens of each of a row's `made` places.

    The drawn token has the log-prob that comes with it, to the last digit.
    """
    own = zip(self.ids_SB[:made, row].tolist(), self.full_SB[:made, row].tolist(), strict=True)
    ids = self.top_id_SKB[:made, :count, row].tolist()
    logps = self.top_logp_SKB[:made, :count, row].tolist()
    return [
      tuple((i, full if i == drawn else p) for i, p in zip(*pair, strict=True))
      for pair, (drawn, full) in zip(zip(ids, logps, strict=True), own, strict=True)
    ]


def unpack(packed: np.ndarray, top_SXB: np.ndarray | None, steps: int) -> Drawn:
  """Splits the packed result and the likeliest tokens, if these were wanted."""
  drawn_S3B = packed[:-3].reshape(steps, 3, packed.shape[-1])
  floats_S3B = drawn_S3B.view(np.float32)
  if top_SXB is None:
    top_SXB = np.zeros((steps, 0, packed.shape[-1]), np.int32)
  top = top_SXB.shape[1] // 2
  return Drawn(
    drawn_S3B[:, 0], floats_S3B[:, 1], floats_S3B[:, 2], top_SXB[:, :top],
    top_SXB[:, top:].view(np.float32), packed[-3], packed[-2], int(packed[-1, 0]),
  )  # fmt: skip


def float_bits(x: float) -> int:
  """The int32 whose bits are those of float32 `x`."""
  return int(np.float32(x).view(np.int32))
