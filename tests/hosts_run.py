"""A real training run by two processes beside one of one process: the same files, byte by byte.

  python tests/hosts_run.py [--folder=DIR]

Three runs of the quickstart at its smallest, all with programs compiled without optimisation: one
process with two devices; two processes with one each; and two that are stopped by a signal to one
of them after the first round and go on. Same mesh, so the same sums: adapter, tree, workspace and
trajectories are equal, and so are the metrics but for `sampling/`, how far the sampler's recorded
log-probs are from the learner's: a sampler that lies on two devices is another program than one on
one device and differs in the last digit. The interrupted run equals the other one of two processes
in all. The last line is JSON: the exit codes, and what differs.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_run import differences  # noqa: E402
from test_hosts import FAST_COMPILE, PATIENCE, finish, launch  # noqa: E402

METRICS = ("metrics.csv", "metrics.jsonl")
ROUNDING = 1e-4  # of log-probs
CONFIG = """from small_run import small

def get_config(arg=None):
  return small(**{"mesh.data": -1, "eval.parent_count": 0})
"""


def stopped(config: Path, folder: Path) -> list[int]:
  """Two processes, SIGTERM to the second after round 1, then both again: their exit codes."""
  started = launch(config, folder / "run", 2, folder / "first")
  deadline = time.monotonic() + PATIENCE
  while "round 1 of 2" not in started[0][2].read_text():
    if time.monotonic() > deadline or started[0][0].poll() is not None:
      raise SystemExit(f"no first round:\n{started[0][2].read_text()[-3000:]}")
    time.sleep(0.05)
  started[1][0].send_signal(signal.SIGTERM)
  first = finish(started)
  again = finish(launch(config, folder / "run", 2, folder / "again"))
  return [code for code, _, _ in (*first, *again)]


def main() -> int:
  parser = argparse.ArgumentParser(description="runs of two processes beside a run of one")
  parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
  folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="awf_hosts_"))
  folder.mkdir(parents=True, exist_ok=True)
  config = folder / "config.py"
  config.write_text(CONFIG, encoding="utf-8")
  devices = FAST_COMPILE["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
  codes = {"one": [], "two": [], "stopped": []}
  os.makedirs(folder / "stop", exist_ok=True)
  one = launch(config, folder / "one", 1, folder / "one_out", env={"XLA_FLAGS": devices})
  codes["one"] = [code for code, _, _ in finish(one)]
  codes["two"] = [c for c, _, _ in finish(launch(config, folder / "two", 2, folder / "two_out"))]
  codes["stopped"] = stopped(config, folder / "stop")
  two, stop = folder / "two", folder / "stop" / "run"
  sampling = sampling_differences(two, folder / "one")
  found = {
    "two": [
      name for name in differences(two, folder / "one") if sampling is None or name not in METRICS
    ],
    "stopped": differences(stop, two),
  }
  print(json.dumps({"codes": codes, "differ": found, "sampling": sampling, "folder": str(folder)}))
  return 1 if any(found.values()) or any(map(any, codes.values())) else 0


def sampling_differences(folder: Path, reference: Path) -> float | None:
  """The largest difference of a metric `sampling/`; None if others differ, or one by too much."""
  worst = 0.0
  files = [(x / "metrics.jsonl").read_text().splitlines() for x in (folder, reference)]
  for here, there in zip(*(map(json.loads, lines) for lines in files), strict=True):
    for name in here.keys() | there.keys():
      ours, theirs = here.get(name), there.get(name)
      if repr(ours) != repr(theirs):
        if not name.startswith("sampling/") or abs(ours - theirs) > ROUNDING:
          return None
        worst = max(worst, abs(ours - theirs))
  return worst


if __name__ == "__main__":
  sys.exit(main())
