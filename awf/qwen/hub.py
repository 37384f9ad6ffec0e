"""From a path or hub id to a local directory that holds a checkpoint."""

from __future__ import annotations

import io
import logging
import os
import re
from pathlib import Path

from awf.terminal import Stage, track
from awf.types import UserError

log = logging.getLogger("awf")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What loading and export read; other weight formats and subfolders of a repository stay there.
_WANTED = (
  "config.json",
  "generation_config.json",
  "model*.safetensors",
  "model.safetensors.index.json",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "tokenizer.model",
  "*.jinja",
)


def resolve_path(path: str | os.PathLike[str]) -> Path:
  """The local directory of a checkpoint; a hub id (owner/name) is downloaded or found in the cache.

  A download shows its progress and goes on where an interrupted one ended. $HF_ENDPOINT,
  $HF_HOME, $HF_TOKEN and $HF_HUB_OFFLINE mean what they mean to huggingface_hub.

  Raises:
    UserError: no such directory, and no such model can be had from the hub.
  """
  folder = Path(path).expanduser()
  if str(path) and folder.is_dir():
    return folder
  if not _HUB_ID.fullmatch(str(path)):
    raise UserError(
      f"config.model.path: expected a Hugging Face directory or hub id (owner/name), got {path!r}"
    )
  return _download(str(path))


def _bar_of(shown: Stage) -> type:
  """The hub's own bar, which draws nothing and feeds ours with its bytes."""
  from tqdm.auto import tqdm

  class Bar(tqdm):
    def __init__(self, *args, **kwargs):
      super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

    def update(self, n=1):
      drawn = super().update(n)
      if self.unit == "B" and self.n > shown.done:
        shown.done, shown.total = self.n, self.total or None
      return drawn

  return Bar


def _download(name: str) -> Path:
  import httpx
  import huggingface_hub
  from huggingface_hub import constants, errors

  if not constants.HF_HUB_OFFLINE:
    log.info("%s: asking %s", name, constants.ENDPOINT)
  try:
    with track(f"download {name}", unit="B") as shown:
      folder = huggingface_hub.snapshot_download(
        name,
        allow_patterns=list(_WANTED),
        ignore_patterns=["*/*"],
        tqdm_class=_bar_of(shown),
      )
  except (OSError, ValueError, httpx.HTTPError, errors.HfHubHTTPError) as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(
      f"config.model.path: {name!r} is no local directory and could not be downloaded "
      f"({reason[0]}); pass a local copy with --config.model.path=DIR, or run "
      "--config=configs/quickstart.py, which needs no download"
    ) from error
  return Path(folder)
