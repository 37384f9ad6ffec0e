"""Kills a real training run over and over, lets it resume, and compares it with one left alone.

  python tests/kill_run.py --kills=25 --seed=0        (this is `make test-kill`)

The run is the quickstart at its smallest: the shipped model, real workflows in the sandbox, strict
mode. Where a kill falls is chosen by what appears in the run's directory (nothing in the product
knows of the test) or by the clock; SIGTERM and Ctrl-C come in between. A run that reaches its end
is compared byte by byte with the reference: LoRA, optimiser, search tree, workspace, trajectories,
metrics.jsonl, metrics.csv. AFlow's `time` fields and file stamps are left out. Then the next run
starts, until all kills are done. The last line is JSON: where the kills fell, and what differed.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_run import differences  # noqa: E402

CONFIG = """from small_run import small

def get_config(arg=None):
  return small(rounds={rounds}, **{{"train.keep_checkpoints": 1}})
"""
ROUNDS = 2
PATIENCE = 1800.0  # seconds that a process may take, on a machine with other work
GONE = 60.0  # seconds in which a killed run's sandbox has to end


@dataclasses.dataclass(frozen=True)
class Look:
  """What a directory shows at one moment; a difference between two moments is an event."""

  log: int  # bytes of run.log
  journal: int
  rounds: int  # folders of the workspace
  trajectories: int
  metrics: int  # bytes of metrics.jsonl
  drafts: int  # checkpoints in the making
  folders: int  # checkpoints, complete or not
  manifests: tuple[str, ...]  # of complete ones
  dropped: int
  jobs: int  # processes that run workflows
  start_log: int = 0  # bytes of run.log when the process started

  def lowest(self, other: "Look") -> "Look":
    """The smaller figures: a resumed run first takes back what is past its checkpoint."""
    names = ("log", "journal", "rounds", "trajectories", "metrics", "drafts", "folders", "dropped")
    return dataclasses.replace(
      self, **{name: min(getattr(self, name), getattr(other, name)) for name in names}
    )


def look(folder: Path, pid: int = 0) -> Look:
  """The present state of a run's directory and, for a process id, of its sandbox."""
  inside = names(folder / "checkpoints")
  workflows = folder / "workspace" / "NANO" / "workflows"
  return Look(
    log=size(folder / "run.log"),
    journal=size(folder / "workspace" / "NANO" / "journal.jsonl"),
    rounds=sum(n.startswith("round_") for n in names(workflows)),
    trajectories=len(names(folder / "trajectories")),
    metrics=size(folder / "metrics.jsonl"),
    drafts=sum(".orbax-checkpoint-tmp" in n for n in inside),
    folders=sum(n.isdigit() for n in inside),
    manifests=tuple(n for n in inside if (folder / "checkpoints" / n / "manifest.json").exists()),
    dropped=sum(n.endswith(".dropped") for n in inside),
    jobs=sum(len(children(child)) for child in children(pid)) if pid else 0,
  )


# Name -> whether it has come, given two looks that follow each other.
EVENTS = {
  "workflow": lambda a, b: b.jobs > 0 and b.log > a.start_log + 400,  # the model is loaded
  "commit": lambda a, b: b.rounds > a.rounds,
  "journal": lambda a, b: b.journal > a.journal,  # then: the update
  "trajectory": lambda a, b: b.trajectories > a.trajectories,
  "metrics": lambda a, b: b.metrics > a.metrics,
  "save": lambda a, b: b.drafts > a.drafts,
  "rename": lambda a, b: b.folders > a.folders,
  "manifest": lambda a, b: bool(set(b.manifests) - set(a.manifests)),
  "retain": lambda a, b: b.dropped > a.dropped or bool(set(a.manifests) - set(b.manifests)),
}
CLOCK = ("time", "after journal", "after workflow")  # an event, or the start, and a random wait


def size(path: Path) -> int:
  try:
    return path.stat().st_size
  except OSError:  # not there yet, or just replaced
    return 0


def names(path: Path) -> list[str]:
  try:
    return sorted(os.listdir(path))
  except OSError:  # not there yet
    return []


def children(pid: int) -> list[int]:
  """Process ids of a process's children, of all its threads."""
  found = []
  for task in names(Path(f"/proc/{pid}/task")):
    try:
      found += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    except OSError:  # it has just ended
      continue
  return found


def tree(pid: int) -> list[int]:
  return [x for child in children(pid) for x in (child, *tree(child))]


class Run:
  """One directory and the processes that train in it, one after the other."""

  def __init__(self, folder: Path, config: Path):
    self.folder, self.config = folder, config

  def start(self, *flags: str) -> subprocess.Popen[str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    env.setdefault("AWF_CACHE", str(ROOT / ".cache"))
    command = [sys.executable, "launch.py", f"--config={self.config}", *flags]
    command.append(f"--workdir={self.folder}")
    with open(self.folder.with_suffix(".out"), "a", encoding="utf-8") as out:
      return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out, text=True)

  def finish(self) -> None:
    """Lets the run reach its end.

    Raises:
      SystemExit: it failed; the end of its output is the message.
    """
    code = self.start().wait(PATIENCE)
    if code != 0:
      raise SystemExit(f"{self.folder} failed with {code}:\n{self.output()[-3000:]}")

  def output(self) -> str:
    return self.folder.with_suffix(".out").read_text(encoding="utf-8", errors="replace")

  def interrupt(self, where: str, rng: random.Random, sent: int = signal.SIGKILL) -> str:
    """Starts the run and ends it at an event.

    Args:
      where: a name of EVENTS or CLOCK.
      rng: of the random waits.
      sent: the signal.

    Returns:
      What the directory shows afterwards, or "end" when the run was complete before.

    Raises:
      SystemExit: a signal that is not obeyed in order, or processes that stay.
    """
    floor = seen = dataclasses.replace(look(self.folder), start_log=size(self.folder / "run.log"))
    process = self.start()
    event = EVENTS.get(where.removeprefix("after "))
    # Most of a process's life is its start; waits are longer once it has shown that it is up.
    wait = rng.uniform(0.0, 25.0) if event is None else rng.choice((0.0, rng.uniform(0.0, 0.05)))
    if where.startswith("after "):
      wait = rng.uniform(0.0, 3.0)
    due, deadline = None if event else time.monotonic() + wait, time.monotonic() + PATIENCE
    while process.poll() is None:
      now = look(self.folder, process.pid if "workflow" in where else 0)
      last, seen = seen, dataclasses.replace(now, start_log=floor.start_log)
      is_saved = set(seen.manifests) > set(last.manifests) and not seen.dropped
      floor = seen if is_saved else floor.lowest(seen)
      if due is None and event and event(last, seen):
        due = time.monotonic() + wait
      if due is not None and time.monotonic() >= due:
        break
      if time.monotonic() > deadline:
        process.kill()
        raise SystemExit(f"{self.folder}: nothing to see of {where!r} in {PATIENCE:.0f} s")
      time.sleep(0.02 if "workflow" in where else 0.001)
    if process.poll() is not None:
      if process.returncode != 0:
        raise SystemExit(f"{self.folder} failed:\n{self.output()[-3000:]}")
      return "end"
    started, family = time.monotonic(), tree(process.pid)
    process.send_signal(sent)
    code = process.wait(PATIENCE)
    self.check_gone(family)
    if sent != signal.SIGKILL:
      if code == -sent and size(self.folder / "run.log") == floor.start_log:
        return "before it was up"  # while Python imported the program
      self.check_order(code, sent, time.monotonic() - started)
    return fell(floor, look(self.folder))

  def check_gone(self, family: list[int]) -> None:
    deadline = time.monotonic() + GONE
    while any(Path(f"/proc/{pid}/status").exists() for pid in family):
      if time.monotonic() > deadline:
        raise SystemExit(f"processes of a run that has ended are still there: {family}")
      time.sleep(0.05)

  def check_order(self, code: int, sent: int, seconds: float) -> None:
    wanted = 0 if sent == signal.SIGTERM else 130
    out = self.output()
    if code != wanted or "resume with: python launch.py" not in out[-2000:]:
      raise SystemExit(f"{signal.Signals(sent).name}: exit code {code}:\n{out[-3000:]}")
    print(f"  {signal.Signals(sent).name}: exit code {code} after {seconds:.1f} s", flush=True)


def fell(floor: Look, now: Look) -> str:
  """Where a kill fell, by what it left behind."""
  if now.drafts > floor.drafts:
    return "in a save"
  if now.folders - len(now.manifests) > floor.folders - len(floor.manifests):
    return "between rename and manifest"
  if now.dropped > floor.dropped:
    return "amid the deletion of an old checkpoint"
  if set(now.manifests) - set(floor.manifests):
    return "right after a save"
  if now.metrics > floor.metrics:
    return "after the metrics' row, before the save"
  if now.trajectories > floor.trajectories:
    return "after the trajectories, before the metrics"
  if now.journal > floor.journal:
    return "after the commit: in the update"
  if now.rounds > floor.rounds:
    return "amid the workspace's commit"
  return (
    "in start, rollout or workflows" if now.log > floor.start_log else "before the first log line"
  )


def series(folder: Path, kills: int, seed: int) -> dict:
  """The whole test; see the module's docstring."""
  rng, config = random.Random(seed), folder / "config.py"
  config.write_text(CONFIG.format(rounds=ROUNDS), encoding="utf-8")
  reference = Run(folder / "reference", config)
  started = time.monotonic()
  reference.finish()
  print(f"reference: {time.monotonic() - started:.0f} s", flush=True)
  fallen, wrong, lives, done = collections.Counter(), [], 0, 0
  plan: list[tuple[str, int]] = []
  while done < kills:
    life = Run(folder / f"life_{lives}", config)
    lives += 1
    for _ in range(3 * kills):
      if not plan:
        plan = [(where, signal.SIGKILL) for where in (*EVENTS, *CLOCK)]
        plan += [("time", signal.SIGTERM), ("after workflow", signal.SIGINT)]
        rng.shuffle(plan)
      where, sent = plan.pop()
      place = life.interrupt(where, rng, sent)
      if place == "end":
        break
      done += sent == signal.SIGKILL
      is_order = sent != signal.SIGKILL and place != "before it was up"
      fallen[signal.Signals(sent).name if is_order else place] += 1
      print(f"kill {done} at {where!r}: {place}", flush=True)
      if done >= kills:
        life.finish()
        break
    found = differences(life.folder, reference.folder)
    wrong += [f"{life.folder.name}: {name}" for name in found]
    print(f"life {lives}: {'equal' if not found else f'differs in {found}'}", flush=True)
  seconds = round(time.monotonic() - started, 1)
  return {"kills": done, "lives": lives, "fell": dict(fallen), "differ": wrong, "seconds": seconds}


def main() -> int:
  parser = argparse.ArgumentParser(description="kills a real run and compares what it resumes to")
  parser.add_argument("--kills", type=int, default=25)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
  args = parser.parse_args()
  folder = args.folder or Path(tempfile.mkdtemp(prefix="awf_kill_"))
  folder.mkdir(parents=True, exist_ok=True)
  result = series(folder, args.kills, args.seed)
  if not args.folder and not result["differ"]:
    shutil.rmtree(folder)
  print(json.dumps(result))
  return 1 if result["differ"] else 0


if __name__ == "__main__":
  sys.exit(main())
