"""One backup of a run as a file: a tar whose name holds its digest."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from awf.types import UserError

log = logging.getLogger("awf")

STATUS = "backup.json"  # in a run's directory, about its backups; not part of one
_NAME = re.compile(r"(\d{8,})-([0-9a-f]{64})\.tar")
_LEFT_OUT = ("checkpoints", "merged", STATUS)  # the first is handled apart
_MANIFEST = "manifest.json"  # the last file of a complete checkpoint (awf.checkpoint)
_PIECE = 1 << 20  # bytes copied at a time


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """One backup of a run, by its name; whether it is sound is another question."""

  path: Path
  step: int  # number of the checkpoint in it
  digest: str  # SHA-256 of the file, hexadecimal

  def is_sound(self) -> bool:
    """Whether the bytes are those that were written; reads them all."""
    try:
      return digest_of(self.path) == self.digest
    except OSError as error:
      log.warning("%s: %s", self.path, error.strerror)
      return False


def named_snapshot(path: Path) -> Snapshot | None:
  """The snapshot that a file's name stands for; None for another name."""
  match = _NAME.fullmatch(path.name)
  return Snapshot(path, int(match[1]), match[2]) if match else None


def snapshot_name(step: int, digest: str) -> str:
  return f"{step:08d}-{digest}.tar"


def snapshots(folder: Path) -> list[Snapshot]:
  """All of one run's folder, newest first; a run may drop some meanwhile."""
  found: list[tuple[int, int, Snapshot]] = []
  for one in map(named_snapshot, folder.iterdir()):
    if one is not None:
      with contextlib.suppress(FileNotFoundError):
        found.append((one.step, one.path.stat().st_mtime_ns, one))
  return [one for *_, one in sorted(found, key=lambda x: x[:2], reverse=True)]


def write_snapshot(part: Path, workdir: Path, source: Path, check: Callable[[], None]) -> str:
  """Writes a run's files and one of its checkpoints as a tar file, and reads it back.

  Args:
    part: the file to write.
    workdir: the run's directory.
    source: folder of a complete checkpoint.
    check: called before every piece; what it raises ends the writing.

  Returns:
    The file's SHA-256, hexadecimal.

  Raises:
    OSError: the target or the source.
    ValueError: the checkpoint is damaged, or bytes were not kept.
  """
  with contextlib.ExitStack() as files:
    # Opened first: a checkpoint that the run drops meanwhile stays readable.
    pinned = {
      path.relative_to(source).as_posix(): files.enter_context(open(path, "rb"))
      for path in sorted(source.rglob("*"))
      if path.is_file() and not path.name.startswith(".")
    }
    manifest = json.loads(pinned[_MANIFEST].read())
    pinned[_MANIFEST].seek(0)
    with open(part, "wb") as file:
      sink = _Sink(file, check)
      with tarfile.open(fileobj=sink, mode="w|", bufsize=_PIECE) as tar:
        for path in _files(workdir):
          with contextlib.suppress(FileNotFoundError), open(path, "rb") as data:  # replaced
            _add(tar, path.relative_to(workdir).as_posix(), data)
        for name, data in pinned.items():
          digest = _add(tar, f"checkpoints/{source.name}/{name}", data)
          if name != _MANIFEST and manifest.get(name) != digest:
            raise ValueError(f"checkpoint {source.name} is damaged: {name}")
      file.flush()
      os.fsync(file.fileno())
  if digest_of(part, evict=True) != sink.digest.hexdigest():
    raise ValueError(f"{part}: what was read back is not what was written")
  return sink.digest.hexdigest()


def unpack(snapshot: Snapshot, target: Path) -> None:
  """Makes the directory from the snapshot, whole or not at all."""
  if target.exists() and any(target.iterdir()):
    raise UserError(
      f"--workdir={target} holds files but no run: config.backup.restore needs an empty or a new "
      "one"
    )
  target.parent.mkdir(parents=True, exist_ok=True)
  draft = target.with_name(f".{target.name}.restored")
  if draft.exists():
    shutil.rmtree(draft)
  try:
    with tarfile.open(snapshot.path) as tar:
      for member in tar:
        data, path = tar.extractfile(member), draft / member.name
        if data is None or not path.resolve().is_relative_to(draft.resolve()):
          raise UserError(f"{snapshot.path}: expected plain files, got {member.name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
          shutil.copyfileobj(data, file, _PIECE)
          os.fsync(file.fileno())
        os.utime(path, (member.mtime, member.mtime))
    os.replace(draft, target)
  finally:
    if draft.exists():
      shutil.rmtree(draft)


def record_of(snapshot: Snapshot) -> dict[str, Any]:
  """The config.json in it."""
  with tarfile.open(snapshot.path) as tar:
    data = tar.extractfile("config.json")
    assert data is not None  # _files puts it first
    return json.load(data)


def newest_checkpoint(folder: Path) -> tuple[int, int, Path] | None:
  """(step, time of its manifest in ns, folder) of the newest complete checkpoint."""
  if not folder.is_dir():
    return None
  steps = sorted((int(p.name) for p in folder.iterdir() if p.name.isdigit()), reverse=True)
  for step in steps:
    with contextlib.suppress(FileNotFoundError):  # in the making, or on its way out
      stamp = (folder / str(step) / _MANIFEST).stat().st_mtime_ns
      return step, stamp, folder / str(step)
  return None


def _files(folder: Path) -> Iterator[Path]:
  """What a snapshot takes of DIR beside the checkpoint; config.json first."""
  yield folder / "config.json"
  for top in sorted(folder.iterdir()):
    if top.name in _LEFT_OUT or top.name == "config.json":
      continue
    for path in [top] if top.is_file() else sorted(top.rglob("*")):
      inside = path.relative_to(folder).parts
      if path.is_file() and not any(name.startswith(".") for name in inside):
        yield path


def _add(tar: tarfile.TarFile, name: str, data: BinaryIO) -> str:
  """Adds an open file as long as it is now; returns its SHA-256."""
  state = os.fstat(data.fileno())
  info = tarfile.TarInfo(name)
  info.size, info.mtime = state.st_size, int(state.st_mtime)
  reader = _Digested(data)
  tar.addfile(info, reader)
  return reader.digest.hexdigest()


class _Digested(io.RawIOBase):
  """Digests what is read."""

  def __init__(self, file: BinaryIO):
    self.file, self.digest = file, hashlib.sha256()

  def read(self, size: int = -1) -> bytes:
    data = self.file.read(size)
    self.digest.update(data)
    return data


class _Sink(io.RawIOBase):
  """Digests what is written; the edge where a target hangs, fills up or vanishes."""

  def __init__(self, file: BinaryIO, check: Callable[[], None]):
    self.file, self.digest, self.check = file, hashlib.sha256(), check

  def write(self, data: Any) -> int:
    self.check()
    self.digest.update(data)
    return self.file.write(data)


def digest_of(path: Path, evict: bool = False) -> str:
  """SHA-256 of a file; `evict` asks the kernel to read it from the device again."""
  with open(path, "rb") as file:
    if evict and hasattr(os, "posix_fadvise"):
      os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hashlib.file_digest(file, "sha256").hexdigest()
