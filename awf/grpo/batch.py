"""Rollouts to arrays: completions laid behind one copy of their prompt, in bins of a fixed size.

A bin holds prompts and completions end to end, without padding between them; completions of one
prompt share it (`parents`, see awf.grpo.attention). The last token of a completion is only a
target, never an input. One bin size for all batches means one compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Generic

import jax
import numpy as np

from awf.types import ArrayT, Rollout

_GRAIN = 512  # bin sizes are multiples of it
_BASE = 1024  # tokens of a bin where small bins are as fast as large ones (`fitted_size`)
_GAIN = 0.92  # share of the tokens below which another size is worth a program of its own


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch(Generic[ArrayT]):
  """Z steps of B bins of T tokens; U = T targets per bin at most. Padding is 0."""

  tokens_ZBT: ArrayT  # int32
  segments_ZBT: ArrayT  # int32, sequence of each token; 0 is padding
  parents_ZBT: ArrayT  # int32, a completion's prompt
  positions_ZBT: ArrayT  # int32, rotary positions
  source_ZBU: ArrayT  # int32, where in the bin the target is predicted from
  target_ZBU: ArrayT  # int32, the completion's token
  is_target_ZBU: ArrayT  # bool
  row_ZBU: ArrayT  # int32, index of the rollout
  column_ZBU: ArrayT  # int32, index of the token in its completion
  num_targets_Z: ArrayT  # int32, the most targets of any bin of the step
  num_steps: ArrayT  # int32 scalar, steps with content; the rest is padding

  @property
  def num_tokens(self) -> int:
    """Input tokens, without padding."""
    return int(np.sum(self.segments_ZBT > 0))


@dataclasses.dataclass
class _Bin:
  """A bin while it fills: rollout indices behind each prompt."""

  space: int
  prompts: dict[tuple[int, ...], list[int]] = dataclasses.field(default_factory=dict)


def bin_size(rollouts: Sequence[Rollout], at_least: int) -> int:
  """Tokens per bin: enough for the longest row; `at_least`, or that grown by halves."""
  need = max((len(r.prompt_ids) + len(r.token_ids) for r in rollouts), default=0)
  size = -(-at_least // _GRAIN) * _GRAIN
  while size < need:
    size += max(_GRAIN, size // 2 // _GRAIN * _GRAIN)
  return size


def fitted_size(
  rollouts: Sequence[Rollout], rows: Sequence[int], at_most: int, block: int = 0
) -> int:
  """Tokens per bin that leave little padding; for one device without a preference for large bins.

  It is a function of the batch alone, so that a resumed run packs as the uninterrupted one. Few
  sizes can come out, and another than the usual one only where it saves a good part of the tokens.

  Args:
    rollouts, rows, block: as of `make_batch`.
    at_most: tokens per bin, unless a row is longer.
  """
  base = bin_size([rollouts[i] for i in rows], min(at_most, _BASE))
  sizes = [base + i * base // 4 for i in range(5) if i == 0 or base + i * base // 4 <= at_most]
  padded = {size: size * len(_fill_bins(rollouts, rows, size, block)) for size in sizes}
  best = min(sizes, key=lambda size: padded[size])
  return best if padded[best] <= _GAIN * padded[base] else base


def make_batch(
  rollouts: Sequence[Rollout],
  rows: Sequence[int],
  size: int,
  bins_per_step: int = 1,
  min_steps: int = 1,
  block: int = 0,
) -> Batch[np.ndarray]:
  """Packs some of the rollouts.

  Args:
    rollouts: all rollouts of the batch.
    rows: indices of those to pack; empty completions are left out.
    size: tokens per bin (`bin_size`).
    bins_per_step: B, a multiple of the devices that rows are split over.
    min_steps: Z is at least this, so that the shape need not change; padded steps are never run.
    block: tokens per block of the attention, or 0. Sequences that nearly end with a block are
      padded to its end: a block with two sequences looks at the keys of both.

  Raises:
    ValueError: an empty prompt, or one that does not fit with its completion.
  """
  bins = _fill_bins(rollouts, rows, size, block)
  num_steps = max(1, -(-len(bins) // bins_per_step))
  z = max(min_steps, 1 << (num_steps - 1).bit_length())  # few shapes
  shape = (z, bins_per_step, size)
  names = [f.name for f in dataclasses.fields(Batch) if f.name.endswith(("_ZBT", "_ZBU"))]
  arrays = {name: np.zeros(shape, bool if name.startswith("is_") else np.int32) for name in names}
  num_targets_Z = np.zeros(z, np.int32)
  for number, full in enumerate(bins):
    at = divmod(number, bins_per_step)
    count = _write_bin({name: x[at] for name, x in arrays.items()}, full, rollouts, block)
    num_targets_Z[at[0]] = max(num_targets_Z[at[0]], count)
  return Batch(**arrays, num_targets_Z=num_targets_Z, num_steps=np.array(num_steps, np.int32))


def _room(length: int, block: int) -> int:
  """Tokens that a sequence takes in a bin, with its padding."""
  missing = -length % block if block else 0
  return length + (missing if missing <= block // 8 else 0)


def _completion_room(rollout: Rollout, block: int) -> int:
  """Likewise of a completion; never less than its targets: a bin has room for T of them."""
  size = len(rollout.token_ids)
  return max(size, _room(size - 1, block))


def _fill_bins(
  rollouts: Sequence[Rollout], rows: Sequence[int], size: int, block: int
) -> list[_Bin]:
  """Each prompt's completions, longest first, into bins that hold the prompt, else the best fit."""
  by_prompt: dict[tuple[int, ...], list[int]] = {}
  for row in rows:
    if not rollouts[row].prompt_ids:
      raise ValueError(f"rollout {row}: expected a prompt of at least one token, got none")
    if rollouts[row].token_ids:
      by_prompt.setdefault(tuple(rollouts[row].prompt_ids), []).append(row)
  bins: list[_Bin] = []
  for prompt, members in by_prompt.items():
    for row in sorted(members, key=lambda i: -len(rollouts[i].token_ids)):
      both = len(prompt) + len(rollouts[row].token_ids) - 1
      if both > size:
        raise ValueError(f"rollout {row}: expected at most {size} tokens, got {both}")
      own = _completion_room(rollouts[row], block)
      both = min(size, _room(len(prompt), block) + own)
      shared = [b for b in bins if prompt in b.prompts and b.space >= own]
      fresh = [b for b in bins if prompt not in b.prompts and b.space >= both]
      if shared:
        chosen = min(shared, key=lambda b: b.space)
      elif fresh:
        chosen = min(fresh, key=lambda b: b.space)
      else:
        chosen = _Bin(size)
        bins.append(chosen)
      chosen.space -= own if prompt in chosen.prompts else both
      chosen.prompts.setdefault(prompt, []).append(row)
  return bins


def _write_bin(
  arrays: dict[str, np.ndarray], full: _Bin, rollouts: Sequence[Rollout], block: int
) -> int:
  """Writes one bin into its slices; returns the number of targets."""
  start, segment, num_targets = 0, 0, 0
  rooms = [_room(len(prompt), block) for prompt in full.prompts]
  rooms += [_completion_room(rollouts[i], block) for m in full.prompts.values() for i in m]
  block = block if sum(rooms) <= len(arrays["tokens_ZBT"]) else 0  # a row as long as the bin

  def put(ids, parent, first_position):
    stop = start + len(ids)
    arrays["tokens_ZBT"][start:stop] = ids
    arrays["segments_ZBT"][start:stop] = segment
    arrays["parents_ZBT"][start:stop] = parent
    arrays["positions_ZBT"][start:stop] = first_position + np.arange(len(ids))
    return start + _room(len(ids), block)

  for prompt, members in full.prompts.items():
    segment += 1
    parent = segment
    last = start + len(prompt) - 1
    start = put(prompt, parent, 0)
    for row in members:
      segment += 1
      ids = rollouts[row].token_ids
      span = slice(num_targets, num_targets + len(ids))
      arrays["source_ZBU"][span] = [last, *range(start, start + len(ids) - 1)]
      arrays["target_ZBU"][span] = ids
      arrays["is_target_ZBU"][span] = True
      arrays["row_ZBU"][span] = row
      arrays["column_ZBU"][span] = np.arange(len(ids))
      start = put(ids[:-1], parent, len(prompt))
      num_targets += len(ids)
  return num_targets
