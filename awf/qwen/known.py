"""Architectures of the models that the configs name, so that a plan needs no download.

Figures are those of each model's public config.json on the Hugging Face hub.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from awf.qwen.config import QwenConfig
from awf.qwen.hf_config import load_config
from awf.types import UserError


def _qwen2(vocab, width, feed_forward, layers, heads, kv_heads, is_tied) -> QwenConfig:
  return QwenConfig(
    vocab, width, feed_forward, layers, heads, kv_heads, width // heads, tie_word_embeddings=is_tied
  )


def _qwen3(width, feed_forward, layers, heads, is_tied) -> QwenConfig:
  return QwenConfig(
    151936, width, feed_forward, layers, heads, 8, 128, "qwen3",
    tie_word_embeddings=is_tied, max_position_embeddings=40960,
  )  # fmt: skip


_HALF = _qwen2(151936, 896, 4864, 24, 14, 2, True)
_ONE_AND_A_HALF = _qwen2(151936, 1536, 8960, 28, 12, 2, True)
_SEVEN = _qwen2(152064, 3584, 18944, 28, 28, 4, False)

# Hub id -> architecture.
ARCHITECTURES: dict[str, QwenConfig] = {
  "Qwen/Qwen2-0.5B-Instruct": _HALF,
  "Qwen/Qwen2-1.5B-Instruct": _ONE_AND_A_HALF,
  "Qwen/Qwen2-7B-Instruct": _SEVEN,
  "Qwen/Qwen2.5-0.5B-Instruct": _HALF,
  "Qwen/Qwen2.5-1.5B-Instruct": _ONE_AND_A_HALF,
  "Qwen/Qwen2.5-3B-Instruct": _qwen2(151936, 2048, 11008, 36, 16, 2, True),
  "Qwen/Qwen2.5-7B-Instruct": _SEVEN,
  "Qwen/Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, True),
  "Qwen/Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, True),
  "Qwen/Qwen3-4B": _qwen3(2560, 9728, 36, 32, True),
  "Qwen/Qwen3-8B": _qwen3(4096, 12288, 36, 32, False),
}


def find_architecture(name: str, folder: Path, dtype: str) -> QwenConfig:
  """The architecture of a model whose weights are not needed.

  Args:
    name: `config.model.path`: a known model, or a hub id whose config.json is fetched.
    folder: the same as a directory; its config.json comes first if it is there.
    dtype: compute dtype of the returned config.

  Raises:
    UserError: none of these.
  """
  if folder.is_dir():
    return load_config(folder, dtype)
  if name in ARCHITECTURES:
    return dataclasses.replace(ARCHITECTURES[name], dtype=dtype)
  return load_config(_download_config(name), dtype)


def _download_config(name: str) -> Path:
  import httpx
  import huggingface_hub

  try:
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=["config.json"]))
  except (OSError, ValueError, httpx.HTTPError, huggingface_hub.errors.HfHubHTTPError) as error:
    raise UserError(
      f"config.model.path = {name!r}: its config.json could not be had from the hub; give a "
      f"directory, or one of {', '.join(ARCHITECTURES)}"
    ) from error
