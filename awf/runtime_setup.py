"""Process-wide JAX settings; called once by a mode, after the sandbox has started."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
from pathlib import Path

from awf.terminal import watch_compiles

log = logging.getLogger("awf")

CACHE_VARIABLE = "AWF_CACHE"


def cache_dir() -> Path | None:
  """Where compiled programs are kept: xla/<kind of host> below $AWF_CACHE or ~/.cache/awf.

  None when switched off.
  `AWF_CACHE=off` switches the cache off. Programs for a CPU hold its instructions, so hosts of
  another kind that share the directory must not share the programs.
  """
  text = os.environ.get(CACHE_VARIABLE, "")
  if text.lower() in ("off", "none", "0"):
    return None
  root = Path(text).expanduser() if text else Path("~/.cache/awf").expanduser()
  return root / "xla" / _host_kind()


def _host_kind() -> str:
  """A short name of the processor's instruction set."""
  try:
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
  except OSError:  # not Linux
    lines = []
  features = next((x for x in lines if x.lower().startswith(("flags", "features"))), "")
  text = f"{platform.machine()} {platform.processor()} {features}"
  return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _has_accelerator() -> bool:
  """Whether the host shows a device of a TPU or a GPU; asking JAX would start it."""
  devices = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")
  return any(next(Path("/dev").glob(x), None) is not None for x in devices)


def keep_freed_memory() -> None:
  """Has the C library keep what is freed, for programs on a CPU; elsewhere than glibc nothing.

  XLA's CPU client takes a program's temporaries from malloc at each call. By default they are
  mapped and given back each time, and the kernel clears every page again: a tenth of an update's
  processor time. One arena, because the others cannot hold large blocks. Threads that exist are not
  changed: to be called before JAX starts.
  """
  if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc" or _has_accelerator():
    return
  arena_max, mmap_max, trim_threshold = -8, -4, -1  # mallopt(3)
  libc = ctypes.CDLL(None)
  libc.mallopt(arena_max, 1)
  libc.mallopt(mmap_max, 0)
  libc.mallopt(trim_threshold, 2**31 - 1)


def setup_jax() -> None:
  """Sets the allocator (`keep_freed_memory`) and the persistent compilation cache up.

  Without a directory for the cache only time is lost.
  """
  keep_freed_memory()
  import jax  # not before the sandbox's zygote has started

  watch_compiles()
  directory = cache_dir()
  # Options are attributes from the import on; the class does not declare them.
  own = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  if directory is None or own:
    return
  try:
    directory.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    log.warning(
      "no compilation cache: %s (set %s to a directory that can be written)", e, CACHE_VARIABLE
    )
    return
  jax.config.update("jax_compilation_cache_dir", str(directory))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
