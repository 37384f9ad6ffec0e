"""Private directories of jobs where no tmpfs bounds them: how full one is, and its removal.

What a job has made there is hostile: nested deeper than a path may be long or Python may recurse,
and closed to its reader.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat

DEEPEST = 64  # levels of directories that a job may nest
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_full(directory: str, most_files: int, most_bytes: int) -> bool:
  """Whether a directory, which its owner may change meanwhile, holds too much or hides it.

  Args:
    directory: its path.
    most_files: entries of all levels.
    most_bytes: sizes of all entries.
  """
  left = [most_files, most_bytes]

  def exceeds(descriptor: int, depth: int) -> bool:
    with os.scandir(descriptor) as entries:
      for entry in entries:
        try:
          found = entry.stat(follow_symlinks=False)
          left[0], left[1] = left[0] - 1, left[1] - found.st_size
          if min(left) < 0:
            return True
          if not stat.S_ISDIR(found.st_mode):
            continue
          if depth == DEEPEST:
            return True
          inner = os.open(entry.name, _OPEN, dir_fd=descriptor)
        except FileNotFoundError:  # removed meanwhile
          continue
        try:
          if exceeds(inner, depth + 1):
            return True
        finally:
          os.close(inner)
    return False

  try:
    descriptor = os.open(directory, _OPEN)
    try:
      return exceeds(descriptor, 1)
    finally:
      os.close(descriptor)
  except OSError:  # closed to its reader, or no directory any more
    return True


def remove(directory: str) -> None:
  """Removes a directory whose owner has ended, with all that is in it, as far as it can be removed.

  Directories inside are moved to the top before they are emptied, so no path grows.
  """
  with contextlib.suppress(OSError):
    os.chmod(directory, 0o700)
  try:
    top = os.open(directory, _OPEN)
  except OSError:
    return
  try:
    _empty(top)
  finally:
    os.close(top)
  with contextlib.suppress(OSError):
    os.rmdir(directory)


def _empty(top: int) -> None:
  moved, count, stuck = secrets.token_hex(8), 0, set()  # no name that is there already
  while waiting := [name for name in os.listdir(top) if name not in stuck]:
    for name in waiting:
      try:
        if not _is_directory(name, top):
          os.unlink(name, dir_fd=top)
          continue
        os.chmod(name, 0o700, dir_fd=top)
        inner = os.open(name, _OPEN, dir_fd=top)
        try:
          for one in os.listdir(inner):
            if _is_directory(one, inner):
              os.chmod(one, 0o700, dir_fd=inner)  # to move it is to write in it
              count += 1
              os.rename(one, f"{moved}-{count}", src_dir_fd=inner, dst_dir_fd=top)
            else:
              os.unlink(one, dir_fd=inner)
        finally:
          os.close(inner)
        os.rmdir(name, dir_fd=top)
      except OSError:
        stuck.add(name)


def _is_directory(name: str, parent: int) -> bool:
  return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)
