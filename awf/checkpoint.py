"""Checkpoints of the training state: atomic, exact, the newest sound one wins.

A checkpoint holds the state's arrays, a JSON dict of the caller, and a description: path, shape and
dtype of each array, and the hash of the base model, which is not stored. The last file written is a
manifest with a digest of every other; a checkpoint counts when its files agree with it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from awf.types import UserError

_MANIFEST = "manifest.json"

# What orbax and tensorstore raise on missing, truncated or altered files.
_BROKEN = (ValueError, OSError, KeyError, TypeError, json.JSONDecodeError)


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
    self.directory, self._base_hash = Path(directory).resolve(), base_hash
    options = ocp.CheckpointManagerOptions(
      max_to_keep=keep, create=True, enable_async_checkpointing=False
    )
    self._manager = ocp.CheckpointManager(self.directory, options=options)

  def steps(self) -> list[int]:
    """Steps that have a complete folder, ascending."""
    self._manager.reload()
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, extra: dict[str, Any] | None = None) -> None:
    """Writes a checkpoint, in full or not at all; an earlier one of that step is replaced.

    Args:
      step: 0 or more; the highest is the newest.
      state: pytree of jax or NumPy arrays; typed PRNG keys are arrays too.
      extra: JSON-able; comes back as JSON gives it back (tuples as lists).

    Raises:
      TypeError: `extra` is not JSON-able.
    """
    arrays = _arrays(state)
    meta = {
      "extra": json.loads(json.dumps(extra or {})),
      "layout": _layout(arrays),
      "base_hash": self._base_hash,
    }
    if step in self.steps():
      self._manager.delete(step)
    items = ocp.args.Composite(state=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta))
    self._manager.save(step, args=items, force=True)
    self._manager.wait_until_finished()
    if jax.process_index() == 0:
      folder = self.directory / str(step)
      draft = self.directory / f"{_MANIFEST}.{step}"
      draft.write_text(json.dumps(_digests(folder), indent=1))
      os.replace(draft, folder / _MANIFEST)

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
    steps = self.steps()
    for step in reversed(steps):
      try:
        return self._restore_step(step, template)
      except UserError:
        raise
      except _BROKEN as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logging.warning("checkpoint %d in %s is damaged: %s", step, self.directory, reason[0][:300])
    if steps:
      raise UserError(
        f"{self.directory}: expected a sound checkpoint among {steps}, all are damaged; "
        "restore a backup or choose another --workdir"
      )
    return None

  def arrays(self, prefixes: tuple[str, ...]) -> tuple[int, dict[str, np.ndarray]] | None:
    """Some arrays of the newest sound checkpoint, without its state's structure.

    Args:
      prefixes: of the arrays' dotted paths, for instance "lora.".

    Returns:
      (step, path -> array), or None when there is no checkpoint.

    Raises:
      UserError: all checkpoints are damaged.
    """
    for step in reversed(self.steps()):
      folder = self.directory / str(step)
      try:
        if json.loads((folder / _MANIFEST).read_text()) != _digests(folder):
          raise BrokenCheckpointError("its files are not those that were written")
        items = ocp.args.Composite(meta=ocp.args.JsonRestore())
        layout = self._manager.restore(step, args=items)["meta"]["layout"]
        empty = {name: np.empty(shape, kind) for name, (shape, kind) in layout.items()}
        items = ocp.args.Composite(state=ocp.args.StandardRestore(empty))
        found = self._manager.restore(step, args=items)["state"]
      except _BROKEN as error:
        logging.warning("checkpoint %d in %s is damaged: %s", step, self.directory, error)
        continue
      return step, {name: x for name, x in found.items() if name.startswith(prefixes)}
    if self.steps():
      raise UserError(
        f"{self.directory}: expected a sound checkpoint among {self.steps()}, all are damaged"
      )
    return None

  def close(self) -> None:
    """Frees the manager's threads."""
    self._manager.close()

  def _restore_step(self, step: int, template: Any) -> tuple[int, Any, dict[str, Any]]:
    # Checked before orbax reads: a read that fails half-way leaves others behind.
    folder = self.directory / str(step)
    if json.loads((folder / _MANIFEST).read_text()) != _digests(folder):
      raise BrokenCheckpointError("its files are not those that were written")
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    self._check(step, meta, _layout(_arrays(template)))
    abstract = {name: _abstract(leaf) for name, leaf in _arrays(template).items()}
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    arrays = self._manager.restore(step, args=items)["state"]
    return step, _rebuild(template, arrays), meta["extra"]

  def _check(self, step: int, meta: dict[str, Any], expected: dict[str, list]) -> None:
    saved = meta["base_hash"]
    if self._base_hash and saved and saved != self._base_hash:
      raise UserError(
        f"checkpoint {step} in {self.directory} was trained on another base model "
        f"(hash {saved[:12]}, expected {self._base_hash[:12]}); "
        "change config.model.path or --workdir"
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
    if name != _MANIFEST:
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
