"""A run of the whole loop in seconds, and what of its files must not depend on interruptions."""

import fcntl
import json
import os
import re
import shutil

from awf.checkpoint import Checkpointer
from awf.config_io import load_config

COSTS = ("seconds", "calls", "tokens", "cost")  # of a run's counters: they tell of all attempts
SUMMARY_COSTS = (
  "llm_calls", "tokens", "cost_usd", "tokens_per_second", "problems_per_hour", "wall_seconds",
  "workdir", "best_workflow",
)  # fmt: skip
STAMP = re.compile(r"_\d{8}_\d{6}\.csv$")


def small(rounds=2, **changes):
  """The quickstart, shrunk to seconds, with a comparison before and after."""
  c = load_config("configs/quickstart.py:smoke")
  c.search.rounds = rounds
  c.search.starts = "data/nano/starts.jsonl"
  c.search.start_share = 0.5
  c.search.full_problems = 2
  c.eval.parents = "data/nano/parents.jsonl"
  c.eval.parent_count, c.eval.parent_problems, c.eval.proposals_per_parent = 2, 2, 2
  c.eval.problems = 2
  c.sandbox.preload_numeric = False
  c.sandbox.wall_seconds = 600.0  # tests run on machines that stand still for a while
  c.mesh.data = 1
  c.update_from_flattened_dict(changes)
  return c


def made_once(tmp_path_factory, name, make):
  """(folder, figures) of a run that all processes of a test session share; none may change it.

  The first that asks makes it, `make(folder)` gives its figures; the others wait for it.
  """
  top = tmp_path_factory.getbasetemp()
  top = top.parent if os.environ.get("PYTEST_XDIST_WORKER") else top
  folder, figures = top / name, top / f"{name}.json"
  with open(top / f"{name}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not figures.is_file():
      shutil.rmtree(folder, ignore_errors=True)  # of one that failed
      figures.write_text(json.dumps(make(folder), default=float))
  return folder, json.loads(figures.read_text())


def results(folder):
  """Every file of a run that must be a function of config and seed: name -> content."""
  out = {}
  for name in ("metrics.jsonl", "metrics.csv"):
    out[name] = (folder / name).read_bytes()
  for top in ("best", "trajectories", "faults", *(p.name for p in folder.glob("workspace*"))):
    for path in sorted(p for p in (folder / top).rglob("*") if p.is_file()):
      name = STAMP.sub(".csv", path.relative_to(folder).as_posix())
      assert name not in out, f"{name} is there twice"
      out[name] = path.read_bytes()
      if path.name == "results.json":
        rows = json.loads(out[name])
        out[name] = [{k: v for k, v in row.items() if k != "time"} for row in rows]
  summary = folder / "summary.json"
  if summary.is_file():
    rows = json.loads(summary.read_text())
    out["summary.json"] = {k: v for k, v in rows.items() if k not in SUMMARY_COSTS}
  return out


def saved_state(folder):
  """The newest checkpoint: arrays (LoRA, optimiser, step, key) and JSON, without costs."""
  checkpoints = Checkpointer(folder / "checkpoints")
  step, arrays = checkpoints.arrays(("",))
  checkpoints.close()
  meta = json.loads((folder / "checkpoints" / str(step) / "meta" / "metadata").read_text())
  extra = meta["extra"]
  for progress in (extra["progress"], (extra["finished"] or {}).get("progress", {})):
    for name in COSTS:
      progress.pop(name, None)
  out = {f"array {name}": (x.dtype, x.shape, x.tobytes()) for name, x in arrays.items()}
  folders = sorted(p.name for p in (folder / "checkpoints").iterdir())
  return out | {f"state {name}": value for name, value in extra.items()} | {"folders": folders}


def differences(folder, reference):
  """Names of what differs between two runs, in files or in the newest checkpoint."""
  found = []
  for read in (results, saved_state):
    here, there = read(folder), read(reference)
    found += [
      n for n in sorted(here.keys() | there.keys()) if repr_of(here, n) != repr_of(there, n)
    ]
  return found


def repr_of(values, name):
  """The value in a form in which NaN equals NaN."""
  return repr(values.get(name, "absent"))
