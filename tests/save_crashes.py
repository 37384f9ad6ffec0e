"""Ends a process inside a save, at one file operation after the other, and looks what is left.

  python tests/save_crashes.py --every=1

Each process saves checkpoint 1, then 2, 2 once more and 3, with room for one checkpoint alone, and
ends without any clean-up at its n-th file operation after the first save. A sound checkpoint has to
be there each time, none older than one that was seen complete. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import jax  # noqa: E402
import numpy as np  # noqa: E402

from awf.checkpoint import Checkpointer  # noqa: E402

SAVES = ((2, 20), (2, 21), (3, 30))  # (step, what its array holds)
OPERATIONS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
CRASH, FAILED = 99, 98


def state(value):
  return {"a": np.full((64, 8), value, np.float32), "key": jax.random.key(value)}


def save_all(folder, crash_at, counter):
  """Ends the process at the `crash_at`-th operation; `counter` gets how many there were."""
  checkpoints = Checkpointer(folder, keep=1)
  checkpoints.save(1, state(10), {"value": 10})
  count = 0

  def watch(event, arguments):
    nonlocal count
    if event in OPERATIONS and any(str(folder) in str(x) for x in arguments):
      count += 1
      counter.write_text(str(count))
      if count == crash_at:
        os._exit(CRASH)

  is_writing_own = False

  def hook(event, arguments):
    nonlocal is_writing_own
    if not is_writing_own:
      is_writing_own = True
      watch(event, arguments)
      is_writing_own = False

  sys.addaudithook(hook)
  for step, value in SAVES:
    checkpoints.save(step, state(value), {"value": value})
    counter.with_suffix(".saved").write_text(str(value))
  return 0


def check(folder, counter):
  """The value of the newest sound checkpoint, which must be whole."""
  step, found, extra = Checkpointer(folder, keep=1).restore(state(0))
  value = extra["value"]
  saved = counter.with_suffix(".saved")
  assert value >= (int(saved.read_text()) if saved.exists() else 10), "an older one is used"
  assert step == value // 10 and np.all(found["a"] == value)
  assert np.array_equal(
    jax.random.key_data(found["key"]), jax.random.key_data(jax.random.key(value))
  )
  return value


def in_child(work):
  """The exit code of a forked process; JAX has not started anything here."""
  pid = os.fork()
  if pid == 0:
    code = FAILED
    try:
      code = work()
    except BaseException:  # the child must not go on as the parent
      traceback.print_exc()
    os._exit(code)
  return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--every", type=int, default=1, help="operations between two crashes")
  every = parser.parse_args().every
  root = Path(tempfile.mkdtemp(prefix="awf_save_"))
  found = []
  for number in range(1, 100_000, every):
    folder, counter = root / "checkpoints", root / "count"
    code = in_child(lambda f=folder, n=number, c=counter: save_all(f, n, c))
    if code not in (0, CRASH):
      raise SystemExit(f"the save failed at operation {number} by itself")
    value = in_child(lambda f=folder, c=counter: check(f, c))
    if value not in (10, 20, 21, 30):
      raise SystemExit(f"killed at operation {number}: no sound checkpoint as it should be")
    found.append(value)
    again = in_child(lambda f=folder, n=0, c=counter: save_all(f, n, c)) if value < 20 else 0
    if again:
      raise SystemExit(f"killed at operation {number}: the next save failed")
    shutil.rmtree(root)
    root.mkdir()
    if code == 0:
      break
  shutil.rmtree(root)
  print(json.dumps({"crashes": len(found) - 1, "operations": number, "newest": found}))


if __name__ == "__main__":
  main()
