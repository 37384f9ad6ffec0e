"""Every test runs on eight virtual CPU devices; warnings and silent rank promotion are errors."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from quick_compile import set_quick

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A shell that starts the tests in the background has Ctrl-C ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Read when JAX is imported, so before any test module.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
).strip()
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
# Compiled programs of earlier test runs; child processes of the tests share them.
CACHE = ROOT / ".cache"
os.environ["AWF_CACHE"] = str(CACHE)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

# Files that take longest come first, so that two processes end together (Makefile).
LONGEST = ("test_train", "test_notebook", "test_scope", "test_backup", "test_cli", "test_sampler")
# Compiled quickly (quick_compile.py): formulas within tolerances, arrays and costs of programs,
# loops whose figures are counted. Bits, commands and resumed runs: compiled as users do.
QUICK = """
  eval export extend gauges grpo grpo_algorithms grpo_formulas grpo_oracles grpo_rows hf hlo_cost
  hosts learner load nano one_copy plan quant qwen remote resume sft sharded
""".split()

# The reference implementation is installed by .ci/run only.
collect_ignore = [] if importlib.util.find_spec("torch") else ["parity"]

# Each exception names where the warning comes from.
WARNINGS = (
  "error",
  # ml_collections and other packages built with SWIG or pybind11, on Python 3.12 and later.
  "ignore:builtin type .* has no __module__ attribute:DeprecationWarning",
  # jax and orbax on os.fork() of libraries that they start themselves.
  "ignore:os.fork\\(\\) was called:RuntimeWarning",
  # Both workers and their children share one compilation cache, and jax writes it in place: an
  # entry read meanwhile, or left cut by a killed child, is only compiled once more. So is a
  # program for a chip that is not here.
  "ignore:Error reading persistent compilation cache:UserWarning",
)


def pytest_configure(config):
  for line in WARNINGS:
    config.addinivalue_line("filterwarnings", line)
  import jax

  from awf.runtime_setup import setup_jax

  setup_jax()
  if len(jax.devices()) != 8:
    raise RuntimeError(f"expected 8 virtual CPU devices, got {jax.devices()}")


def until(condition, what="it", seconds=600):
  """Waits for what another thread or process does; machines stand still for a while."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline, f"{what} did not come"
    time.sleep(0.005)


def is_quick(item):
  in_list = item.path.stem.removeprefix("test_") in QUICK
  return in_list and not item.get_closest_marker("usual_compile")


def pytest_collection_modifyitems(items):
  """Longest files first, then those that compile alike, each in its own order."""
  rank = {name: i for i, name in enumerate(LONGEST)}
  files = {item.path: is_quick(item) for item in reversed(items)}
  items.sort(key=lambda item: (rank.get(item.path.stem, len(rank)), files[item.path]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Before the fixtures of the file."""
  set_quick(is_quick(item))
