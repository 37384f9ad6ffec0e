"""Bringing a run back from a backup, on any machine; what follows is an ordinary resume."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from awf.backup import target_root
from awf.faults import disk_fault
from awf.snapshot import Snapshot, named_snapshot, record_of, snapshots, unpack
from awf.types import UserError
from awf.workdir import Workdir

log = logging.getLogger("awf")

AUTO = "auto"


def restore(config: ConfigDict, workdir: Workdir, mode: str) -> Snapshot | None:
  """Puts the newest sound backup of `config.backup.restore` into DIR, when DIR holds no run.

  The value is a snapshot, a run's folder, or a directory of such folders, of which the newest that
  agrees with the config is taken. `auto` is the directory of this config's own backups, where
  nothing may be yet.

  Returns:
    What was restored, or None when DIR holds a run already or `auto` found nothing.

  Raises:
    UserError: nothing sound there, a run with another config, or DIR is in the way. DIR stays as it
      was.
  """
  wanted = config.backup.restore
  if not wanted:
    return None
  if workdir.record() is not None:
    log.info("%s holds a run: config.backup.restore = %r is passed over", workdir, wanted)
    return None
  root = target_root(config) if wanted == AUTO else Path(wanted).expanduser()
  if root is None:
    raise UserError(
      f"config.backup.restore={AUTO} needs config.backup.path: expected a directory with backups"
    )
  try:
    found = _choose(root, config, workdir, mode, is_auto=wanted == AUTO)
    if found is not None:
      unpack(found, workdir.path)
      log.info("restored %s from checkpoint %d of %s", workdir, found.step, found.path)
    return found
  except (OSError, tarfile.TarError) as error:
    reason = disk_fault(error) or getattr(error, "strerror", None) or str(error)
    raise UserError(f"config.backup.restore = {wanted!r}: {reason}") from error


def _choose(
  root: Path, config: ConfigDict, workdir: Workdir, mode: str, is_auto: bool
) -> Snapshot | None:
  """The newest sound snapshot that agrees with the config."""
  refused: UserError | None = None
  for candidates in _runs(root):
    snapshot = next((s for s in candidates if _is_usable(s)), None)
    if snapshot is None:
      continue
    try:
      workdir.check_agreement(record_of(snapshot), config, mode, snapshot.path)
    except UserError as error:
      refused = refused or error
      continue
    return snapshot
  if is_auto:
    log.info("%s: no backup of this run (%s); it starts afresh", root, refused or "none is there")
    return None
  if refused is not None:
    raise refused
  raise UserError(
    f"config.backup.restore = {str(root)!r}: expected a backup (STEP-SHA256.tar), a folder of "
    f"them, or {AUTO}; found {'nothing sound' if root.exists() else 'no such file'}"
  )


def _runs(root: Path) -> Iterator[list[Snapshot]]:
  """The snapshots of each run at a place, each newest first; the run backed up last comes first."""
  single = named_snapshot(root)
  if single is not None and root.is_file():
    yield [single]
  if not root.is_dir():
    return
  folders = [root, *(path for path in root.iterdir() if path.is_dir())]
  runs = [run for run in map(snapshots, folders) if run]
  yield from sorted(runs, key=lambda run: max(_stamp(s.path) for s in run), reverse=True)


def _is_usable(snapshot: Snapshot) -> bool:
  if snapshot.is_sound():
    return True
  log.warning("%s is damaged and passed over", snapshot.path)
  return False


def _stamp(path: Path) -> int:
  """When a file was written; 0 if it has been dropped meanwhile."""
  try:
    return path.stat().st_mtime_ns
  except FileNotFoundError:
    return 0
