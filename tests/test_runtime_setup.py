"""Process-wide settings, each in a process of its own."""

import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import ctypes, resource, threading
from awf import runtime_setup

runtime_setup._has_accelerator = lambda: False  # as on a host without one
if {is_kept}:
  runtime_setup.keep_freed_memory()

def faults():
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
  for _ in range(3):
    start = faults()
    block = libc.malloc(64 << 20)  # 16,384 pages
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    counts.append(faults() - start)

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
counts = []
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(counts[-1])
"""


def faults(is_kept):
  program = PROGRAM.format(is_kept=is_kept)
  done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)
  return int(done.stdout)


def test_large_blocks_are_not_mapped_again():
  before, kept = faults(False), faults(True)
  if platform.libc_ver()[0] == "glibc":
    assert kept < 100 < before
  else:  # nothing to set
    assert kept <= 2 * before
