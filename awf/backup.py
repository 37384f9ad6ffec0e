"""Backups of a run: verified copies of its directory elsewhere, made beside training.

PATH/NAME-ID/                  one folder per run; ID is in its config.json
  STEP-SHA256.tar              a snapshot: the newest complete checkpoint, and results and logs
  .part                        one in the making

A snapshot's name holds its digest, so one rename makes it whole, and it counts only while its bytes
agree with the name. Older ones go after that, never before. It is taken while the run goes on: all
but the checkpoint may be newer than the checkpoint, which is what a killed run leaves too, and what
resuming puts right.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import logging
import os
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from awf.faults import disk_fault
from awf.files import write_atomic
from awf.snapshot import (
  STATUS,
  Snapshot,
  newest_checkpoint,
  snapshot_name,
  snapshots,
  write_snapshot,
)
from awf.types import UserError
from awf.workdir import Workdir

log = logging.getLogger("awf")

OFF = "off"
DRIVE = Path("/content/drive")  # where Colab mounts it
_PART = ".part"
_POLL = 1.0  # seconds between looks for a new checkpoint
_RETRY = 60.0  # seconds until a backup that failed is tried again
_START = 10.0  # seconds that the start waits for the first look at the target


def target_root(config: ConfigDict) -> Path | None:
  """The directory of all backups; None when there are none. The file system is not touched.

  Raises:
    UserError: a path in Google Drive, which is not mounted.
  """
  text = config.backup.path
  if text == OFF or (not text and not _drive_is_mounted()):
    return None
  root = Path(os.path.abspath(Path(text).expanduser())) if text else DRIVE / "MyDrive" / "awf"
  if root.is_relative_to(DRIVE) and not _drive_is_mounted():
    raise UserError(
      f"config.backup.path = {text!r}: Google Drive is not mounted at {DRIVE}; mount it first "
      "(from google.colab import drive; drive.mount('/content/drive'))"
    )
  return root


def check_target(config: ConfigDict, workdir: Workdir) -> None:
  """Refuses a target that no backup can go to; nothing is written.

  Raises:
    UserError: it cannot be written, or lies inside DIR.
  """
  root, given = target_root(config), config.backup.path
  if root is None:
    return
  if root.is_relative_to(os.path.abspath(workdir.path)):
    raise UserError(f"config.backup.path = {given!r} is inside --workdir={workdir}; choose another")
  problem = _within(_START, lambda: _problem_of(root))
  if isinstance(problem, str):
    raise UserError(
      f"config.backup.path = {given!r}: {problem}; give a directory that can be written, or {OFF}"
    )
  if problem is not None:
    log.warning("%s does not answer; backups wait for it, the run does not", root)


def read_status(workdir: os.PathLike[str]) -> dict[str, Any]:
  """What backup.json says; {} before the first backup."""
  path = Path(workdir) / STATUS
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    return {}
  except (OSError, ValueError) as error:
    log.warning("%s: %s", path, error)
    return {}
  return found if isinstance(found, dict) else {}


def status_figures(workdir: os.PathLike[str]) -> dict[str, float]:
  """The status as numbers, for TensorBoard and timings.jsonl."""
  names = ("step", "megabytes", "seconds", "failures")
  return {f"backup/{name}": value for name, value in read_status(workdir).items() if name in names}


class BackupManager:
  """Makes a snapshot after each new checkpoint, on a thread of its own; a context manager.

  Nothing in a step waits for it: the thread looks for new checkpoints itself, and a target that is
  slow or hangs delays only the thread. A target that fails is one warning, and tried again.

  Args:
    config: its group `backup`, and the run's name.
    workdir: of the run; opened.
  """

  def __init__(self, config: ConfigDict, workdir: Workdir):
    self._root, self._workdir = target_root(config), workdir
    self._keep, self._wait = config.backup.keep, config.backup.wait
    self._run = config.name
    self._seen: tuple[int, int] | None = None  # the checkpoint that was tried last
    self._failed_at = 0.0
    self._status = {"count": 0, "failures": 0, **read_status(workdir), "failed": ""}
    self._root_was_there = False
    self._closing, self._done = threading.Event(), threading.Event()
    self._abandoned = threading.Event()
    self._thread: threading.Thread | None = None

  def __enter__(self) -> BackupManager:
    if self._root is None:
      return self
    log.info("backups go to %s", self._root)
    self._thread = threading.Thread(target=self._work, name="backup", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  @property
  def folder(self) -> Path:
    """The run's folder at the target; a run has its id once DIR is claimed."""
    assert self._root is not None
    return self._root / f"{self._run}-{run_id(self._workdir.record() or {})}"

  def close(self) -> None:
    """Makes the last snapshot; waits `backup.wait` seconds for it and says when that was too short.

    Raises nothing: the run itself is complete.
    """
    if self._thread is None:
      return
    self._closing.set()
    if not self._done.wait(min(2.0, self._wait)):
      log.info("waiting for the backup, up to %g s (config.backup.wait)", self._wait)
      if not self._done.wait(max(0.0, self._wait - 2.0)):
        last = self._status.get("step")
        self._abandoned.set()
        log.warning(
          "the last backup in %s is not finished after %g s; %s", self.folder, self._wait,
          "there is none" if last is None else f"checkpoint {last} is the newest there",
        )  # fmt: skip
    self._thread = None

  # ---- the thread ----

  def _work(self) -> None:
    try:
      while not self._closing.wait(_POLL):
        if not self._workdir.is_claimed:  # not yet, or another process of this run writes DIR
          continue
        newest = newest_checkpoint(self._workdir.checkpoints)
        is_due = newest is not None and newest[:2] != self._seen
        is_retry = self._failed_at and time.monotonic() - self._failed_at > _RETRY
        if is_due or is_retry:
          self._try()
      if self._workdir.is_claimed and newest_checkpoint(self._workdir.checkpoints) is not None:
        self._try()
    finally:
      self._done.set()

  def _try(self) -> None:
    """One snapshot; a failure is said once, until one succeeds."""
    started = time.perf_counter()
    try:
      made = self._make()
      size = made.path.stat().st_size
    except _Abandoned:
      return
    except (OSError, tarfile.TarError, ValueError) as error:
      self._note_failure(disk_fault(error) or getattr(error, "strerror", None) or str(error))
      return
    except Exception as error:  # a fault of ours must not pass for a backup
      log.exception("backup")
      self._note_failure(f"{type(error).__name__}: {error}")
      return
    self._failed_at = 0.0
    seconds = time.perf_counter() - started
    log.info(
      "backup: checkpoint %d in %s (%.1f MB, %.1f s, verified)",
      made.step, made.path.parent, size / 1e6, seconds,
    )  # fmt: skip
    self._note(
      path=str(made.path), step=made.step, megabytes=round(size / 1e6, 3),
      seconds=round(seconds, 2), when=_now(), count=self._status["count"] + 1, failed="",
    )  # fmt: skip

  def _note_failure(self, reason: str) -> None:
    self._failed_at = time.monotonic()
    if not self._status["failed"]:
      log.warning(
        "no backup in %s: %s; the run goes on, and tries again",
        self._root,
        " ".join(reason.split()),
      )
    self._note(failed=reason, failures=self._status["failures"] + 1)

  def _note(self, **facts: Any) -> None:
    self._status |= facts
    try:
      write_atomic(self._workdir / STATUS, json.dumps(self._status, indent=1) + "\n")
    except OSError as error:
      log.warning("%s: %s", error.filename, error.strerror)

  def _make(self) -> Snapshot:
    """Writes, verifies and names a snapshot, then drops what it makes superfluous.

    Raises:
      OSError: the target, or the source.
      ValueError: a checkpoint that is damaged at the source, or bytes that were not kept.
    """
    newest = newest_checkpoint(self._workdir.checkpoints)
    if newest is None:
      raise ValueError("the run's checkpoint is gone")
    self._seen = newest[:2]
    step, _, source = newest
    folder = self._make_folder()
    part = folder / _PART
    try:
      digest = write_snapshot(part, self._workdir.path, source, self._check_abandoned)
      made = Snapshot(folder / snapshot_name(step, digest), step, digest)
      self._check_abandoned()
      os.replace(part, made.path)
    except BaseException:
      with contextlib.suppress(OSError):  # the target may be gone; the fault itself is on its way
        part.unlink()
      raise
    _flush_folder(folder)
    self._retain(made)
    return made

  def _make_folder(self) -> Path:
    """The run's folder; a root that was there and is not any more is not made again."""
    assert self._root is not None
    if not self._root_was_there:
      self._root.mkdir(parents=True, exist_ok=True)
      self._root_was_there = True
    folder = self.folder
    try:
      folder.mkdir(exist_ok=True)
    except FileNotFoundError as error:
      raise OSError(error.errno, f"{self._root} is gone") from error
    return folder

  def _retain(self, made: Snapshot) -> None:
    """Drops all but the new snapshot, which is verified, and the newest beside it."""
    others = [s for s in snapshots(made.path.parent) if s.path != made.path]
    steps = sorted({s.step for s in others} - {made.step}, reverse=True)[: self._keep - 1]
    kept: set[int] = set()
    for other in others:
      if other.step in steps and other.step not in kept:
        kept.add(other.step)
      else:
        other.path.unlink()

  def _check_abandoned(self) -> None:
    if self._abandoned.is_set():
      raise _Abandoned


class _Abandoned(Exception):
  """The run has ended, and nobody waits for this snapshot."""


def run_id(record: dict[str, Any]) -> str:
  """What tells a run from others of its name; runs of before the field existed get one too."""
  text = json.dumps([record.get("started"), record.get("command")])
  return record.get("id") or hashlib.sha256(text.encode()).hexdigest()[:8]


def _flush_folder(folder: Path) -> None:
  """Makes a rename last; some mounted drives know no such thing."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    log.debug("%s: %s", folder, error)
  finally:
    os.close(descriptor)


def _problem_of(root: Path) -> str:
  """Why nothing can be written at a place, or ""; nothing is made."""
  place = root
  while not place.exists():
    place = place.parent
  if not place.is_dir():
    return f"{place} is no directory"
  return "" if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written"


def _within(seconds: float, call: Callable[[], str]) -> str | TimeoutError | None:
  """What `call` gives, "" as None, or a TimeoutError when the file system hangs."""
  found: list[str] = []
  thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
  thread.start()
  thread.join(seconds)
  if thread.is_alive():
    return TimeoutError()
  return (found[0] or None) if found else "it cannot be read"


def _drive_is_mounted() -> bool:
  """Read from the kernel's table: the drive itself may hang."""
  try:
    mounts = Path("/proc/mounts").read_text(errors="replace").splitlines()
  except OSError:  # not Linux, so not Colab
    return False
  return any(line.split()[1] == str(DRIVE) for line in mounts)


def _now() -> str:
  return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
