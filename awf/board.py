"""What TensorBoard shows beside curves: fields of the config, rewards by stage, the best workflow
and what it changed, a picture of the tree. None of it decides anything.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from awf.config_io import flatten
from awf.metrics import MetricsLogger
from awf.report_read import best_node, lineage
from awf.report_sections import difference
from awf.search.tree import NO_NODE, Tree

COMPARED = ("reward", "mcts/best_score", "mcts/valid_rate", "epoch/avg_pass_at_k")
WIDTH, HEIGHT, MARGIN = 960, 640, 12  # of the picture, pixels
PAPER, LINE, FULL = (255, 255, 255), (214, 214, 208), (31, 95, 180)
CROSS, MARK = (176, 64, 42), (230, 120, 20)


def log_start(metrics: MetricsLogger, config: ConfigDict) -> None:
  """The config of a run that begins."""
  fields = {
    name: value if isinstance(value, str | bool | int | float) else str(value)
    for name, value in flatten(config).items()
  }
  metrics.log_hparams(fields, COMPARED)


def best_key(search: Any) -> tuple[int, float] | None:
  """What tells one best workflow from another: node and score; None before the first round."""
  if best_node(search.tree) is None:
    return None
  node = search.best()
  return node.id, node.score


def log_round(
  metrics: MetricsLogger,
  step: int,
  records: Sequence[Mapping[str, Any]],
  search: Any,
  best_before: tuple[int, float] | None,
) -> None:
  """A round's rewards by the stage that each proposal reached; the best workflow when it is new.

  Args:
    records: the proposals (`RoundResult.records`).
    search: after the round.
    best_before: `best_key` before it.
  """
  rewards: dict[str, list[float]] = {}
  for row in records:
    if row["reward"] is not None:
      stage = row["stage"] if row["failure"] is None else f"{row['stage']}_failed"
      rewards.setdefault(stage, []).append(row["reward"])
  for stage, values in sorted(rewards.items()):
    metrics.log_histogram(f"rewards/by_stage/{stage}", step, values)
  if best_key(search) == best_before:
    return
  node = search.best()
  about = f"node {node.id}, score {node.score:.4f} on {len(node.scores)} problems\n\n"
  source = node.source
  metrics.log_text("workflow/best", step, about + block(f"{source.graph}\n\n{source.prompt}"))
  changes = difference(lineage(search.tree, node)[0], node)
  metrics.log_text("workflow/change", step, about + block("\n".join(changes) or "none"))


def block(text: str) -> str:
  """Text as a code block of Markdown."""
  return "".join(f"    {line}\n" for line in text.split("\n"))


def log_tree(metrics: MetricsLogger, epoch: int, search: Any) -> None:
  """The picture of an epoch's last search."""
  pixels = draw_tree(search.tree)
  metrics.log_image("epoch/search_tree", epoch, png(pixels), WIDTH, HEIGHT)


def draw_tree(tree: Tree) -> np.ndarray:
  """The forest as an outline, from left to right by depth, from top to bottom as it grew.

  Returns:
    uint8 [HEIGHT, WIDTH, 3]. Discs: the bluer, the better; crosses failed; the best one's line is
    orange.
  """
  pixels = np.full((HEIGHT, WIDTH, 3), PAPER, np.uint8)
  places = _places(tree)
  best = best_node(tree)
  path = {node.id for node in lineage(tree, best)} if best else set()
  edges = [id for id in places if tree.nodes[id].parent != NO_NODE]
  for id in sorted(edges, key=lambda id: id in path):
    (x0, y0), (x, y) = places[tree.nodes[id].parent], places[id]
    color, width = (MARK, 2) if id in path else (LINE, 1)
    pixels[y0 : y + width, x0 : x0 + width] = color
    pixels[y : y + width, x0 : x + 1] = color
  rows = max(1, len(places))
  radius = int(np.clip((HEIGHT - 2 * MARGIN) / rows / 2, 1, 6))
  ys, xs = np.mgrid[-radius - 2 : radius + 3, -radius - 2 : radius + 3]
  distance = np.hypot(ys, xs)
  diagonal = (abs(ys) == abs(xs)) & (abs(xs) <= radius)
  for id, (x, y) in places.items():
    node = tree.nodes[id]
    stamp = pixels[y - radius - 2 : y + radius + 3, x - radius - 2 : x + radius + 3]
    if not node.evaluated:
      stamp[diagonal] = CROSS
      continue
    share = 0.1 + 0.9 * min(max(node.score, 0.0), 1.0)
    shade = share * np.array(FULL) + (1 - share) * np.array(PAPER)
    stamp[distance <= radius] = FULL
    stamp[distance <= radius - 1] = shade.astype(np.uint8)
    if best is not None and id == best.id:
      stamp[(distance > radius) & (distance <= radius + 2)] = MARK
  return pixels


def _places(tree: Tree) -> dict[int, tuple[int, int]]:
  """Node -> (x, y) in pixels, far enough from the edges for a disc."""
  children: dict[int, list[int]] = {}
  for node in tree.nodes.values():
    children.setdefault(node.parent, []).append(node.id)
  order: list[tuple[int, int]] = []  # (node, depth) in rows
  stack = [(id, 0) for id in reversed(children.get(NO_NODE, []))]
  while stack:
    id, depth = stack.pop()
    order.append((id, depth))
    stack.extend((child, depth + 1) for child in reversed(children.get(id, [])))
  deepest = max((depth for _, depth in order), default=0)
  step_x = min(60.0, (WIDTH - 2 * MARGIN) / max(1, deepest))
  step_y = min(24.0, (HEIGHT - 2 * MARGIN) / max(1, len(order)))
  return {
    id: (int(MARGIN + depth * step_x), int(MARGIN + row * step_y))
    for row, (id, depth) in enumerate(order)
  }


def png(pixels: np.ndarray) -> bytes:
  """A PNG file of uint8 [height, width, 3]."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    checked = kind + data
    return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

  height, width, _ = pixels.shape
  # Each row begins with its filter: 0, none.
  rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], axis=1)
  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  data = zlib.compress(rows.tobytes(), 6)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
