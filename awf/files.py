"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Iterator


def write_atomic(path: pathlib.Path, text: str, is_durable: bool = True) -> None:
  """Replaces a file by one rename, so that a reader or a crash never meets half of it.

  Args:
    path: the file; its folder is made.
    text: what it holds then.
    is_durable: on the disk before this returns. Without it a crash of the machine, not of the
      process, may leave the file empty: for what is made again from other files.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f".{path.name}.part")
  with naming(path), open(part, "w", encoding="utf-8", newline="") as file:
    file.write(text)
    if is_durable:
      file.flush()
      os.fsync(file.fileno())
  os.replace(part, path)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
  """A write that fails (a full disk) says where."""
  try:
    yield
  except OSError as error:
    error.filename = str(path)
    raise
