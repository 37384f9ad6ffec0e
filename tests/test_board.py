"""What TensorBoard shows beside curves, made of a search that really ran."""

import random
import struct
import zlib

import numpy as np
from made_run import made_nodes

from awf.board import (
  CROSS,
  FULL,
  HEIGHT,
  MARK,
  WIDTH,
  best_key,
  draw_tree,
  log_round,
  log_tree,
  png,
)
from awf.metrics import MetricsLogger, read_events
from awf.search.tree import add_event, replay


class Found:
  """A search as far as the board looks at it."""

  def __init__(self, nodes):
    self.tree = replay(add_event(node) for node in nodes)

  def best(self):
    return max(self.tree.selectable(), key=lambda n: (n.score, -n.id))


def made(count, seed=0):
  return made_nodes(random.Random(seed), count, [f"p{i}" for i in range(8)], 4)


def decoded(data):
  """Pixels of a PNG of three colours without filters, every chunk's sum checked."""
  assert data[:8] == b"\x89PNG\r\n\x1a\n"
  at, chunks = 8, {}
  while at < len(data):
    (size,) = struct.unpack(">I", data[at : at + 4])
    body = data[at + 4 : at + 8 + size]
    assert struct.unpack(">I", data[at + 8 + size : at + 12 + size]) == (zlib.crc32(body),)
    chunks[body[:4]] = body[4:]
    at += 12 + size
  width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
  assert kind == [8, 2, 0, 0, 0]
  rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
  assert not rows[:, 0].any()
  return rows[:, 1:].reshape(height, width, 3)


def test_a_png_gives_its_pixels_back():
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
  np.testing.assert_array_equal(decoded(png(pixels)), pixels)


def count(pixels, color):
  return int((pixels == color).all(axis=-1).sum())


def test_the_picture_shows_discs_crosses_and_the_best(tmp_path):
  nodes = made(40)
  pixels = draw_tree(Found(nodes).tree)
  assert pixels.shape == (HEIGHT, WIDTH, 3)
  failed = sum(n.failure is not None for n in nodes)
  assert 0 < failed < 39
  assert count(pixels, CROSS) >= 5 * failed and count(pixels, FULL) > 0 and count(pixels, MARK) > 0
  alone = draw_tree(Found(nodes[:1]).tree)
  assert 0 < count(alone, FULL) < count(pixels, FULL) and count(alone, CROSS) == 0
  for many in (made(1500), []):  # crowded, and empty
    assert draw_tree(Found(many).tree).shape == (HEIGHT, WIDTH, 3)


def test_a_round_s_rewards_and_its_new_best(tmp_path):
  nodes = made(30)
  search, records = Found(nodes), [
    {"reward": 0.5, "stage": "subset", "failure": None},
    {"reward": 0.75, "stage": "subset", "failure": None},
    {"reward": 0.1, "stage": "smoke", "failure": {"kind": "crash"}},
    {"reward": None, "stage": "smoke", "failure": {"kind": "infrastructure"}},
  ]  # fmt: skip
  with MetricsLogger(tmp_path) as metrics:
    log_round(metrics, 1, records, search, None)
    log_round(metrics, 2, records[:1], search, best_key(search))  # the best is no new one
    log_tree(metrics, 0, search)
  (file,) = (tmp_path / "tb").iterdir()
  found = {(v.tag, e.step): v for e in read_events(file) for v in e.summary.value}
  assert found["rewards/by_stage/subset", 1].histo.num == 2
  assert found["rewards/by_stage/smoke_failed", 1].histo.num == 1
  assert found["rewards/by_stage/subset", 2].histo.num == 1
  best = search.best()
  text = found["workflow/best", 1].tensor.string_val[0].decode()
  assert text.startswith(f"node {best.id}, score") and "    class Workflow:" in text
  assert "    +++ graph of" in found["workflow/change", 1].tensor.string_val[0].decode()
  assert ("workflow/best", 2) not in found
  image = found["epoch/search_tree", 0].image
  np.testing.assert_array_equal(decoded(image.encoded_image_string), draw_tree(search.tree))
