"""Checkpoints of the training state: atomic, exact, the newest sound one wins.

A checkpoint holds the state's arrays, a JSON dict of the caller, and a description: path, shape and
dtype of each array, and the hash of the base model, which is not stored. The last file written is a
manifest with a digest of every other; a checkpoint counts when its files agree with it. Nothing is
deleted before what takes its place is complete, so from the first save on there is a sound one at
every instant:

N/           checkpoint N: orbax's files, then manifest.json
N.replaced/  what N was, while N is saved anew
N.dropped/   on its way out
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from awf.faults import disk_fault
from awf.types import UserError

_MANIFEST = "manifest.json"
_REPLACED, _DROPPED = ".replaced", ".dropped"
T = TypeVar("T")

# What orbax and tensorstore raise on missing, truncated or altered files.
_BROKEN = (ValueError, OSError, KeyError, TypeError, json.JSONDecodeError)

_PIECE = 1 << 30  # bytes of a probe; some file systems know no larger files than 4 GiB

log = logging.getLogger("awf")
_ECHOING = (logging.getLogger("asyncio"), logging.getLogger("absl"))  # of failed writes


class BrokenCheckpointError(ValueError):
  """A checkpoint whose files are damaged."""


class Checkpointer:
  """Saves and restores one run's state under `directory`.

  Args:
    directory: made when missing; one folder per step in it.
    keep: newest checkpoints to keep, at least 1.
    base_hash: hash of the frozen base; a checkpoint of another base is refused. "" checks nothing.
  """

  def __init__(self, directory: str | Path, keep: int = 2, base_hash: str = ""):
    if keep < 1:
      raise UserError(f"config.train.keep_checkpoints: expected at least 1, got {keep}")
    self.directory, self._base_hash, self._keep = Path(directory).resolve(), base_hash, keep
    self._damaged: set[int] = set()  # found so while restoring
    # Nothing is deleted by orbax: it would go before the new one's manifest is there.
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None, create=True, enable_async_checkpointing=False
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)
    handler = ocp.CompositeCheckpointHandler(
      state=ocp.StandardCheckpointHandler(), meta=ocp.JsonCheckpointHandler()
    )
    self._reader = ocp.Checkpointer(handler)

  def steps(self) -> list[int]:
    """Steps that have a folder, ascending."""
    return sorted({step for step, _ in self._folders()})

  def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
    """Writes a checkpoint, in full or not at all; an earlier one of that step is replaced.

    Older ones beyond `keep` go once this one is complete, and so do damaged ones.

    Args:
      step: 0 or more; the highest is the newest.
      state: pytree of jax or NumPy arrays; typed PRNG keys are arrays too.
      extra: JSON-able; comes back as JSON gives it back (tuples as lists).

    Raises:
      TypeError: `extra` is not JSON-able.
      UserError: the disk is full, or cannot be written; earlier checkpoints are as they were.
    """
    arrays = _arrays(state)
    meta = {
      "extra": json.loads(json.dumps(extra or {})),
      "layout": _layout(arrays),
      "base_hash": self._base_hash,
    }
    is_writer = jax.process_index() == 0
    if is_writer:
      self._sweep()
      self._set_aside(step)
    _meet(f"save {step}")
    self._manager.reload()
    items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
    for logger in _ECHOING:
      logger.addFilter(_is_no_echo)
    try:
      if is_writer:
        _reserve(self.directory, sum(x.nbytes for x in arrays.values()))
      self._manager.save(step, args=items, force=True)
      self._manager.wait_until_finished()
      if is_writer:
        _seal(self.directory / str(step))
    except (OSError, ValueError) as error:  # tensorstore reports a full disk as ValueError
      reason = disk_fault(error)
      if reason is None:
        raise
      self._sweep()
      self._manager.reload()
      raise UserError(
        f"checkpoint {step} could not be written in {self.directory}: {reason}; earlier ones are "
        f"intact ({self.steps()}): make room, then run the same command to go on"
      ) from error
    for logger in _ECHOING:  # after a failure it stays: the echoes come late
      logger.removeFilter(_is_no_echo)
    if is_writer:
      self._retain(step)
    _meet(f"saved {step}")

  def restore(self, template: Any) -> tuple[int, Any, dict[str, Any]] | None:
    """Reads the newest sound checkpoint; a damaged one is logged and the one before it is tried.

    Args:
      template: a state of the same structure, shapes and dtypes; each array comes back with the
        sharding of its counterpart.

    Returns:
      (step, state, extra), or None when there is no checkpoint.

    Raises:
      UserError: it belongs to another base or another structure, or all checkpoints are damaged.
    """
    return self._newest(lambda folder, step: self._restore_from(folder, step, template))

  def arrays(self, prefixes: tuple[str, ...]) -> tuple[int, dict[str, np.ndarray]] | None:
    """Some arrays of the newest sound checkpoint, without its state's structure.

    Args:
      prefixes: of the arrays' dotted paths, for instance "lora.".

    Returns:
      (step, path -> array), or None when there is no checkpoint.

    Raises:
      UserError: all checkpoints are damaged.
    """

    def read(folder: Path, step: int) -> tuple[int, dict[str, np.ndarray]]:
      layout = self._read(folder, meta=ocp.args.JsonRestore())["layout"]
      empty = {name: np.empty(shape, kind) for name, (shape, kind) in layout.items()}
      found = self._read(folder, state=ocp.args.StandardRestore(empty))
      return step, {name: x for name, x in found.items() if name.startswith(prefixes)}

    return self._newest(read)

  def close(self) -> None:
    """Frees the manager's threads."""
    self._manager.close()
    self._reader.close()

  def _folders(self) -> list[tuple[int, Path]]:
    """(step, folder) of all that may hold a checkpoint, newest first; N before N.replaced."""
    pattern = re.compile(rf"(\d+)({re.escape(_REPLACED)})?")
    found = [(pattern.fullmatch(p.name), p) for p in self.directory.iterdir() if p.is_dir()]
    rows = [(int(m.group(1)), m.group(2) is None, p) for m, p in found if m]
    return [(step, path) for step, _, path in sorted(rows, key=lambda x: x[:2], reverse=True)]

  def _newest(self, read: Callable[[Path, int], T]) -> T | None:
    """What `read` gives of the newest sound checkpoint; those passed over are named in a warning.

    None when no save was ever completed: the manifest is written before an older one goes.
    """
    passed: list[str] = []
    damaged = False
    for step, folder in self._folders():
      if not (folder / _MANIFEST).is_file():
        passed.append(f"checkpoint {step} was never completed")
        self._damaged.add(step)
        continue
      try:
        # Checked before orbax reads: a read that fails half-way leaves others behind.
        if json.loads((folder / _MANIFEST).read_text()) != _digests(folder):
          raise BrokenCheckpointError("its files are not those that were written")
        found = read(folder, step)
      except UserError:
        raise
      except _BROKEN as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        passed.append(f"checkpoint {step} is damaged ({reason[0][:300]})")
        self._damaged.add(step)
        damaged = True
        continue
      self._damaged.discard(step)
      if passed:
        log.warning("%s: %s; checkpoint %d is used", self.directory, "; ".join(passed), step)
      return found
    if damaged:
      raise UserError(
        f"{self.directory}: expected a sound checkpoint among {self.steps()}, all are damaged; "
        "restore a backup or choose another --workdir"
      )
    if passed:
      log.warning("%s: %s; there is none before it", self.directory, "; ".join(passed))
    return None

  def _read(self, folder: Path, **items: Any) -> Any:
    """One item of a checkpoint."""
    (name,) = items
    return self._reader.restore(folder, args=ocp.args.Composite(**items))[name]

  def _restore_from(
    self, folder: Path, step: int, template: Any
  ) -> tuple[int, Any, dict[str, Any]]:
    meta = self._read(folder, meta=ocp.args.JsonRestore())
    self._check(step, meta, _layout(_arrays(template)))
    abstract = {name: _abstract(leaf) for name, leaf in _arrays(template).items()}
    arrays = self._read(folder, state=ocp.args.StandardRestore(abstract))
    return step, _rebuild(template, arrays), meta["extra"]

  def _set_aside(self, step: int) -> None:
    """Makes room for a save of `step`; what is sound there stays readable until it is complete."""
    folder = self.directory / str(step)
    if not folder.exists():
      return
    if step in self._damaged or not (folder / _MANIFEST).is_file():
      _drop(folder)
    else:
      folder.rename(folder.with_name(folder.name + _REPLACED))

  def _retain(self, step: int) -> None:
    """Drops what `step`, now complete, makes superfluous."""
    self._damaged.discard(step)
    others = [s for s in self.steps() if s != step and s not in self._damaged]
    kept = {step, *sorted(others)[max(0, len(others) - self._keep + 1) :]}
    for old, folder in self._folders():
      if old not in kept or folder.name.endswith(_REPLACED):
        _drop(folder)
    self._manager.reload()

  def _sweep(self) -> None:
    """Removes what an interrupted save or deletion has left."""
    for path in self.directory.iterdir():
      if path.name.endswith(_DROPPED) or ".orbax-checkpoint-tmp" in path.name:
        shutil.rmtree(path)
      elif path.name.endswith(_REPLACED):
        whole = path.with_name(path.name.removesuffix(_REPLACED))
        if (whole / _MANIFEST).is_file():
          _drop(path)
        else:
          if whole.exists():
            _drop(whole)
          path.rename(whole)

  def _check(self, step: int, meta: dict[str, Any], expected: dict[str, list]) -> None:
    saved = meta["base_hash"]
    if self._base_hash and saved and saved != self._base_hash:
      raise UserError(
        f"checkpoint {step} in {self.directory} was trained on another base model, or on its "
        f"weights in another type (hash {saved[:12]}, expected {self._base_hash[:12]}); change "
        "config.model.path or --workdir, or go on where config.model.dtype means the same: auto is "
        "float32 on a CPU and bfloat16 elsewhere"
      )
    differing = sorted(
      name
      for name in {*meta["layout"], *expected}
      if meta["layout"].get(name) != expected.get(name)
    )
    if differing:
      name = differing[0]
      raise UserError(
        f"checkpoint {step} in {self.directory} does not fit this config: {len(differing)} arrays "
        f"differ, first {name}: expected {expected.get(name)}, got {meta['layout'].get(name)}; "
        "change config.lora or --workdir"
      )


def _meet(name: str) -> None:
  """Waits for the other processes, if there are any: one of them tidies up, all of them write."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"awf {name}")


def _reserve(folder: Path, size: int) -> None:
  """Raises OSError when the disk does not take `size` bytes more; orbax says so array by array.

  The files have no name and are gone at once; where a file system cannot reserve, nothing is known.
  """
  if not hasattr(os, "posix_fallocate"):  # not on every system
    return
  with contextlib.ExitStack() as files:
    for start in range(0, size, _PIECE):
      probe = files.enter_context(tempfile.TemporaryFile(dir=folder))
      try:
        os.posix_fallocate(probe.fileno(), 0, min(_PIECE, size - start))
      except OSError as error:
        if disk_fault(error) is not None:
          raise
        log.debug("%s cannot reserve room: %s", folder, error)
        return


def _is_no_echo(record: logging.LogRecord) -> bool:
  """False for what asyncio and orbax say of a failed write, array by array; it is raised too."""
  error = record.exc_info[1] if record.exc_info else None
  is_disk = isinstance(error, Exception) and disk_fault(error) is not None
  return not is_disk and "exception was never retrieved" not in record.getMessage()


def _seal(folder: Path) -> None:
  """Writes the manifest, after everything that it describes is on the disk."""
  for path in folder.rglob("*"):
    if path.is_file():
      _flush(path)
  draft = folder / f".{_MANIFEST}"
  draft.write_text(json.dumps(_digests(folder), indent=1))
  _flush(draft)
  os.replace(draft, folder / _MANIFEST)


def _flush(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _drop(folder: Path) -> None:
  """Deletes a folder; interrupted, it leaves nothing that looks like a checkpoint."""
  doomed = folder.with_name(folder.name + _DROPPED)
  folder.rename(doomed)
  shutil.rmtree(doomed)


def _is_key(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _arrays(state: Any) -> dict[str, Any]:
  """Path -> array; PRNG keys as their raw uint32 data."""
  leaves = jax.tree_util.tree_flatten_with_path(state)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="."): (
      jax.random.key_data(leaf) if _is_key(leaf) else leaf
    )
    for path, leaf in leaves
  }


def _layout(arrays: dict[str, Any]) -> dict[str, list]:
  return {name: [list(np.shape(x)), str(x.dtype)] for name, x in arrays.items()}


def _digests(folder: Path) -> dict[str, str]:
  """Relative path -> SHA-256 of every file of a checkpoint but the manifest."""
  digests = {}
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    name = path.relative_to(folder).as_posix()
    if name not in (_MANIFEST, f".{_MANIFEST}"):
      with path.open("rb") as file:
        digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
  return digests


def _abstract(leaf: Any) -> Any:
  if isinstance(leaf, jax.Array):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
  return np.empty(np.shape(leaf), leaf.dtype)


def _rebuild(template: Any, arrays: dict[str, Any]) -> Any:
  """The template's structure with the restored arrays; keys get the template's implementation."""
  leaves, treedef = jax.tree.flatten(template)
  restored = [
    jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if _is_key(leaf) else x
    for leaf, x in zip(leaves, (arrays[name] for name in _arrays(template)), strict=True)
  ]
  return jax.tree.unflatten(treedef, restored)
