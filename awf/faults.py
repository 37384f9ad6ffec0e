"""What the machine refuses (memory, disk), in words that say what to do; no traceback is needed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from ml_collections import ConfigDict

from awf.remat import remat_name

# A full disk, a quota, a limit on file sizes, a disk that went read-only.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_MEMORY_MARKS = ("RESOURCE_EXHAUSTED", "Out of memory")  # XLA's, on every backend

# What lowers the memory; a resumed run may differ in the first ones (awf.workdir).
_RESUMABLE = ("grpo.micro_batch", "sampler.rows", "sampler.prefill_rows")
_BENCH = (
  *(f"bench.{name}" for name in ("batch", "prompt", "new", "lengths")), "sampler.prompt_cache_gb",
  "sampler.rows", "grpo.micro_batch",
)  # fmt: skip
_OTHER = ("sampler.context", "sampler.max_new_tokens", "lora.rank")


def disk_fault(error: BaseException) -> str | None:
  """Why the disk took no more, or None when the error says nothing of the kind."""
  if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
    return f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror)
  text = str(error)  # tensorstore keeps the number in its message
  found = next((e for e in _DISK_ERRORS if f"os_error_code='{e}'" in text), None)
  return None if found is None else os.strerror(found)


def is_out_of_memory(error: BaseException) -> bool:
  """Whether the device or the host had no memory left."""
  return isinstance(error, MemoryError) or any(mark in str(error) for mark in _MEMORY_MARKS)


def explain(
  error: BaseException, config: ConfigDict, plan_command: str, mode: str = ""
) -> str | None:
  """One line for a fault of the machine, or None for anything else.

  Args:
    error: what a mode raised; its causes count too.
    config: the run's.
    plan_command: the command that says what fits.
    mode: which one failed.
  """
  for one in _chain(error):
    reason = disk_fault(one)
    if reason is not None:
      return (
        f"the disk takes no more ({reason}); every earlier checkpoint is intact: make room, then "
        "run the same command to go on"
      )
    if is_out_of_memory(one):
      first = (str(one).strip().splitlines() or [type(one).__name__])[0][:200]
      if mode == "bench" and config.bench.what != "workflow":
        return f"out of memory ({first}): lower {_values(config, _BENCH)}"
      is_full = remat_name(config.grpo.remat) == "full"
      remat = "" if is_full else ", or set config.grpo.remat to full"
      quant = "" if config.model.quant != "none" else ", or config.model.quant=int8"
      return (
        f"out of memory ({first}): see what fits with `{plan_command}`; lower "
        f"{_values(config, _RESUMABLE)}{remat} (a run resumes with these changed), or in a "
        f"new --workdir {_values(config, _OTHER)}{quant}"
      )
  return None


def _values(config: ConfigDict, names: tuple[str, ...]) -> str:
  groups = (name.split(".") for name in names)
  return ", ".join(f"config.{group}.{field} ({config[group][field]})" for group, field in groups)


def _chain(error: BaseException) -> Iterator[BaseException]:
  """An error, then what it came from."""
  seen: BaseException | None = error
  for _ in range(20):
    if seen is None:
      return
    yield seen
    seen = seen.__cause__ or seen.__context__
