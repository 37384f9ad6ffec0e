"""Packs examples of different lengths into rows of one length, several to a row."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from awf.types import UserError

Example = tuple[Sequence[int], Sequence[int]]


def pack_examples(
  examples: Sequence[Example], length: int, prompt_weight: float = 0.0, seed: int = 0
) -> dict[str, np.ndarray]:
  """Packs (prompt ids, response ids) pairs into rows; the order of examples and rows is seeded.

  Args:
    examples: pairs; prompt and response are concatenated. Those longer than `length` are left out
      (logged).
    length: tokens per row.
    prompt_weight: loss weight of prompt tokens; response tokens weigh 1.
    seed: of the shuffle.

  Returns:
    tokens_BT int32, 0 in padding. segments_BT int32, 1, 2, ... within a row; 0 is padding.
    positions_BT int32, restart at each segment. weights_BT float32: the weight of the loss on
    predicting this very token from those before it; 0 for the first token of a segment and for
    padding.

  Raises:
    UserError: no example fits.
  """
  rng = np.random.default_rng(seed)
  sizes = np.array([len(p) + len(r) for p, r in examples], np.int64)
  order = [int(i) for i in rng.permutation(len(sizes)) if 0 < sizes[i] <= length]
  if not order:
    raise UserError(
      f"config.sft.length: no example has at most {length} tokens "
      f"(shortest: {int(sizes.min()) if len(sizes) else 'none given'}); raise it"
    )
  if len(order) < len(sizes):
    logging.warning("sft: left out %d examples longer than %d", len(sizes) - len(order), length)
  rows = _fill_rows(order, sizes, length)
  rows = [rows[i] for i in rng.permutation(len(rows))]
  packed = {
    "tokens_BT": np.zeros((len(rows), length), np.int32),
    "segments_BT": np.zeros((len(rows), length), np.int32),
    "positions_BT": np.zeros((len(rows), length), np.int32),
    "weights_BT": np.zeros((len(rows), length), np.float32),
  }
  for b, members in enumerate(rows):
    start = 0
    for segment, i in enumerate(members, 1):
      prompt, response = examples[i]
      middle, stop = start + len(prompt), start + len(prompt) + len(response)
      packed["tokens_BT"][b, start:stop] = (*prompt, *response)
      packed["segments_BT"][b, start:stop] = segment
      packed["positions_BT"][b, start:stop] = np.arange(stop - start)
      packed["weights_BT"][b, start:middle] = prompt_weight
      packed["weights_BT"][b, middle:stop] = 1.0
      packed["weights_BT"][b, start] = 0.0
      start = stop
  return packed


def _fill_rows(order: Sequence[int], sizes: np.ndarray, length: int) -> list[list[int]]:
  """Best fit decreasing; examples of equal size, and rows of equal space, in the given order."""
  rows: list[list[int]] = []
  by_space: list[list[int]] = [[] for _ in range(length + 1)]  # rows with this much space left
  for i in sorted(order, key=lambda i: -sizes[i]):
    size = int(sizes[i])
    space = next((s for s in range(size, length + 1) if by_space[s]), None)
    if space is None:
      rows.append([])
      row, space = len(rows) - 1, length
    else:
      row = by_space[space].pop()
    rows[row].append(i)
    by_space[space - size].append(row)
  return rows
