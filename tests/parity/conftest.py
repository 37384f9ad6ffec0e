"""The real 135M checkpoint, made once by the project's tool and kept out of version control."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
REAL = ROOT / ".cache" / "real135m"
SHARED = pathlib.Path(os.environ.get("AWF_SHARED", ROOT.parent / "shared"))
TOOL = SHARED / "tools" / "real_checkpoint.py"


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
  """Directory with data sets and tools beside the checkout; $AWF_SHARED names another."""
  return SHARED.resolve()


@pytest.fixture(scope="session")
def real_checkpoint() -> pathlib.Path:
  """Directory of a pre-trained Qwen2-layout model with 135 million parameters, bfloat16.

  $AWF_PARITY_CHECKPOINT names one that is there already.
  """
  if os.environ.get("AWF_PARITY_CHECKPOINT"):
    return pathlib.Path(os.environ["AWF_PARITY_CHECKPOINT"])
  if not (REAL / "config.json").is_file():
    REAL.parent.mkdir(exist_ok=True)
    part = REAL.with_name(f"{REAL.name}.{os.getpid()}")
    subprocess.run([sys.executable, str(TOOL), str(part)], check=True, capture_output=True)
    part.rename(REAL)
  return REAL
