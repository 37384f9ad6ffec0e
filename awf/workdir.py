"""A run's directory: layout, lock, log file, and whether a run found there may be resumed.

config.json    resolved config, mode, versions, devices, commit (written when the run starts)
metrics.jsonl, metrics.csv, timings.jsonl, tb/, checkpoints/, workspace/, trajectories/,
report.html (with problems.json and parts.json, which it reads), run.log
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from awf import __version__
from awf.config_io import ROOT, flatten
from awf.types import UserError

log = logging.getLogger("awf")

_TRANSPORT = (
  "concurrency", "key_env", "requests_per_minute", "retries", "timeout", "tokens_per_minute",
)  # fmt: skip
# A resumed run may differ in three kinds of fields. How it is carried out, never what it computes:
OPERATIONAL = (
  "name",
  "aflow.path",
  "aflow.python",
  "backup.",
  "bench.",
  "distributed.",
  "executor.prices",
  *(f"{group}.remote.{name}" for group in ("executor", "search") for name in _TRANSPORT),
  "export.",
  "generate.",
  "lora.paths",
  "plan.",
  "sampler.queue",
  "search.prices",
  "serve.",
  "sandbox.workers",
  "sandbox.max_children",
  "train.checkpoint_every",
  "train.keep_checkpoints",
  "train.minutes",
  "train.nonfinite_limit",
  "sft.save",
)
# What it computes stays the same within rounding (devices, sizes of batches and of buffers):
ROUNDING = (
  "mesh.",
  "grpo.micro_batch",
  "grpo.remat",
  "grpo.vocab_chunk",
  "sampler.prefill_rows",
  "sampler.rows",
  "sampler.steps_per_dispatch",
  "executor.concurrency",
)
# What follows is what the new value says; what was done stays:
ONWARD = (
  "metrics",
  "optim.critic_learning_rate",
  "optim.grad_clip",
  "optim.learning_rate",
  "optim.schedule",
  "optim.total_steps",
  "optim.warmup_steps",
  "search.converge_rounds",
  "search.converge_z",
  "search.max_calls",
  "search.max_tokens",
  "search.rounds",
  "sft.log_every",
  "train.epochs",
)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")
_OWN = ("config.json", "run.log", ".lock")  # what a run writes before it does anything


class _LogFile(logging.FileHandler):
  """run.log; a disk that takes no more must not drown what the run says about it."""

  def handleError(self, record: logging.LogRecord) -> None:
    del record
    logging.getLogger().removeHandler(self)
    print(f"run.log ends here: {sys.exc_info()[1]}", file=sys.stderr)

  def close(self) -> None:
    try:
      super().close()
    except OSError as e:  # what was still to be written; said above
      print(f"run.log: {e}", file=sys.stderr)


class Workdir(os.PathLike):
  """DIR of one run. `Path(workdir)` works; its parts have names here and nowhere else."""

  def __init__(self, path: str | os.PathLike) -> None:
    self.path = Path(path).expanduser()
    self._lock: int | None = None
    self._handler: logging.Handler | None = None
    self._is_fresh = self._made_folder = False
    self._claim: Callable[[], None] | None = None

  def __fspath__(self) -> str:
    return str(self.path)

  def __str__(self) -> str:
    return str(self.path)

  def __truediv__(self, name: str) -> Path:
    return self.path / name

  @property
  def config_file(self) -> Path:
    return self.path / "config.json"

  @property
  def checkpoints(self) -> Path:
    return self.path / "checkpoints"

  @property
  def workspace(self) -> Path:
    return self.path / "workspace"

  @property
  def trajectories(self) -> Path:
    return self.path / "trajectories"

  @property
  def is_claimed(self) -> bool:
    """Whether this process is the one that writes DIR."""
    return self._lock is not None

  def record(self) -> dict[str, Any] | None:
    """What config.json holds, or None when DIR holds no run.

    Raises:
      UserError: the file is there and cannot be read.
    """
    if not self.config_file.is_file():
      return None
    try:
      found = json.loads(self.config_file.read_text(encoding="utf-8"))
      dict(found["config"])
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise UserError(
        f"{self.config_file} cannot be read ({e}); move it away, or choose another --workdir"
      ) from e
    return found

  def open(self, config: ConfigDict, mode: str, command: str = "", is_shared: bool = False) -> bool:
    """Claims DIR for this process; starts a run or agrees to resume the one found.

    Args:
      config: as the user gave it (paths not resolved).
      mode: a run resumes in its own mode; "eval" may look at a run of any mode.
      command: kept in config.json.
      is_shared: several processes start here; nothing is written before `claim`.

    Returns:
      True when a run was found (resume), False when this is a fresh one.

    Raises:
      UserError: another process holds DIR, or the run found there has another config (the
        differing fields are listed, nothing is changed).
    """
    found = self.record()
    changed = self.check_agreement(found, config, mode)  # before anything is created or locked
    self._claim = lambda: self._begin(found, changed, config, mode, command)
    if not is_shared:
      self.claim(True)
    return found is not None

  def claim(self, is_writer: bool) -> None:
    """Makes DIR this process's to write, if it is the one that does; after a shared `open`.

    Raises:
      UserError: as `open`.
    """
    claim, self._claim = self._claim, None
    if claim is not None and is_writer:
      claim()

  def _begin(
    self,
    found: dict[str, Any] | None,
    changed: list[str],
    config: ConfigDict,
    mode: str,
    command: str,
  ) -> None:
    """Takes the lock, opens run.log, and records what runs here."""
    self._is_fresh, self._made_folder = found is None, not self.path.exists()
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._take_lock()
      self._handler = _LogFile(self.path / "run.log", encoding="utf-8")
    except OSError as e:
      raise UserError(
        f"--workdir={self.path}: cannot write there ({e.strerror}); choose another"
      ) from e
    self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(self._handler)
    log.info("%s %s in %s", "starting" if found is None else "resuming", mode, self)
    if found is None:
      self._write(new_record(config, mode, command))
    elif found.get("mode") == mode:
      self._note(found, config, changed)

  def _note(self, found: dict[str, Any], config: ConfigDict, changed: list[str]) -> None:
    """Keeps the config that the run goes on with, and what it was before."""
    if changed:
      log.info("going on with a changed config: %s", "; ".join(changed))
      now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
      found["changes"] = [*found.get("changes", ()), {"when": now, "fields": changed}]
    self._write({**found, "config": config.to_dict()})

  def record_devices(self) -> None:
    """Adds the accelerator's names to config.json; call it once JAX is up.

    A mode that only looks at DIR, and so did not open it, writes nothing.
    """
    if self._lock is None:
      return
    import jax  # not before the sandbox's zygote has started

    kinds = [d.device_kind for d in jax.devices()]
    counts = {k: kinds.count(k) for k in sorted(set(kinds))}
    before = (self.record() or {}).get("devices", counts)
    if before != counts:
      log.info(
        "this run was on %s and goes on with %s: it agrees with one that had not moved within "
        "rounding, not to the bit", before, counts,
      )  # fmt: skip
    self.add_to_record(devices=counts, backend=jax.default_backend())

  def add_to_record(self, **facts: Any) -> None:
    """Adds what is known after the start to config.json; nothing where DIR is not this run's."""
    if self._lock is not None:
      self._write({**(self.record() or {}), **facts})

  def discard(self) -> None:
    """Takes a run that failed before it did anything out of DIR again: nothing was written."""
    if not self._is_fresh or any(p.name not in _OWN for p in self.path.iterdir()):
      return
    self.close()
    for name in _OWN:
      (self.path / name).unlink(missing_ok=True)
    if self._made_folder:
      self.path.rmdir()

  def close(self) -> None:
    """Gives DIR back; run.log is complete afterwards."""
    if self._handler is not None:
      logging.getLogger().removeHandler(self._handler)
      self._handler.close()
      self._handler = None
    if self._lock is not None:
      os.close(self._lock)  # closing releases the lock
      self._lock = None

  def __enter__(self) -> Workdir:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _take_lock(self) -> None:
    """Holds an advisory lock on DIR/.lock; it ends with the process, however that ends."""
    fd = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
      os.close(fd)
      raise UserError(
        f"--workdir={self.path} is in use by process {owner}; wait for it, or choose another "
        f"--workdir"
      ) from e
    except OSError as e:  # some mounted drives know no locks
      log.warning("no lock on %s (%s): do not start a second process there", self.path, e.strerror)
    os.ftruncate(fd, 0)
    os.pwrite(fd, str(os.getpid()).encode(), 0)
    self._lock = fd

  def check_agreement(
    self, found: dict[str, Any] | None, config: ConfigDict, mode: str, where: object = None
  ) -> list[str]:
    """The fields that differ and may; raises UserError for those that may not.

    Args:
      found: what config.json holds of the run.
      where: what holds it, for messages; DIR unless given.
    """
    where = where or self.path
    if found is None:
      return []
    if mode != "eval" and found.get("mode") != mode:
      raise UserError(
        f"{where} holds a run of mode {found.get('mode')}, not {mode}; choose another --workdir"
      )
    refused, changed = differing_fields(found["config"], config, ignore_eval=mode == "eval")
    if refused:
      raise UserError(
        f"{where} holds a run with another config: {'; '.join(refused)}. Give these fields "
        f"back, or choose another --workdir (a run that goes on may change "
        f"{', '.join(ROUNDING + ONWARD)})"
      )
    return changed

  def _write(self, record: dict[str, Any]) -> None:
    """Replaces config.json in one step."""
    temporary = self.path / ".config.json.new"
    temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, self.config_file)


def differing_fields(
  old: dict[str, Any], config: ConfigDict, ignore_eval: bool = False
) -> tuple[list[str], list[str]]:
  """`config.x: there OLD, here NEW` for each field whose value changes what a run computes.

  A field that the run's config lacks was made later: it counts as its default. One that is no
  longer known is passed over with a warning.

  Returns:
    (those that a resumed run may not differ in, those that it may).
  """
  from configs.base import base_config

  defaults, now = _plain(base_config()), _plain(config)
  before = flatten(old)
  skip = OPERATIONAL + (("eval.",) if ignore_eval else ())
  gone = sorted(before.keys() - now.keys())
  if gone:
    log.warning("fields of this run that are no longer known: %s", ", ".join(gone))
  refused, allowed = [], []
  for name in sorted(now):
    there = before.get(name, defaults.get(name))
    if _is_under(name, skip) or there == now[name]:
      continue
    line = f"config.{name}: there {json.dumps(there)}, here {json.dumps(now[name])}"
    (allowed if _is_under(name, ROUNDING + ONWARD) else refused).append(line)
  return refused, allowed


def _plain(config: ConfigDict) -> dict[str, Any]:
  """Flat, with lists for tuples, as JSON gives it back."""
  return flatten(json.loads(json.dumps(config.to_dict())))


def _is_under(name: str, fields: tuple[str, ...]) -> bool:
  """Whether a field, or the group (`group.`) that it is in, is among `fields`."""
  return any(name == x or (x.endswith(".") and name.startswith(x)) for x in fields)


def new_record(config: ConfigDict, mode: str, command: str = "") -> dict[str, Any]:
  """What config.json of a fresh run holds, short of the devices."""
  return {
    "config": config.to_dict(),
    "id": secrets.token_hex(4),  # tells runs of one name apart
    "mode": mode,
    "command": command,
    "versions": versions(),
    "commit": commit(),
    "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
  }


def versions() -> dict[str, str]:
  """Versions of Python, of awf and of the packages that results depend on; nothing is imported."""
  out = {"python": platform.python_version(), "awf": __version__, "platform": platform.platform()}
  for name in _PACKAGES:
    try:
      out[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      out[name] = "missing"
  return out


def commit() -> str:
  """The commit of the code, `+changes` when tracked files differ; "" outside a git checkout."""
  try:
    run = subprocess.run(
      [
        "git",
        "-C",
        str(ROOT),
        "describe",
        "--always",
        "--abbrev=40",
        "--dirty=+changes",
        "--exclude=*",
      ],
      capture_output=True,
      text=True,
      timeout=10,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as e:
    log.info("commit unknown: %s", e)
    return ""
  return run.stdout.strip()
