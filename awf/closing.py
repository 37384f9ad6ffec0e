"""What frames the rounds of a run: the policy's proposals before and after, the test at the end."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from awf.compare import Proposals, gain, score_proposals
from awf.evaluate import evaluate, test_problems, write_best
from awf.progress import Progress
from awf.system import System
from awf.terminal import track
from awf.types import WorkflowSource

log = logging.getLogger("awf")


async def compare(system: System, when: str) -> dict[str, Any]:
  """Scores the policy's proposals for the held-out parents, as they are `when` training."""
  started = time.perf_counter()
  with track(f"proposals {when} training"):
    scored = await score_proposals(system)
  log.info(
    "proposals %s training: score %.3f, valid %.2f (%.0f s)",
    when, scored.mean, scored.valid_rate, time.perf_counter() - started,
  )  # fmt: skip
  return dataclasses.asdict(scored)


async def closing_figures(
  system: System,
  scope: Any,
  search: Any,
  p: Progress,
  agree: Callable[[], Awaitable[None]],
  cost: Callable[[], dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Compares the policy once more, tests the best workflow beside the seed, and writes best/.

  Args:
    system: whose policy has the last adapter.
    scope: says which workflow is the best (`awf.scope`).
    search: that was cut off, or None.
    p: of the run.
    agree: waits for the other processes.
    cost: figures of what the run has taken, asked at the end.

  Returns:
    The run's summary, and the comparison {"before", "after"} that is kept beside it.
  """
  config, workdir = system.config, system.workdir
  figures: dict[str, Any] = {}
  after = None
  if p.before is not None:
    after = await compare(system, "after")
    figures = gain(Proposals(**p.before), Proposals(**after), config.eval.bootstrap, config.seed)
  else:
    figures = {
      "proposal_score_before": None, "proposal_score_after": None, "proposal_gain_interval": None,
      "valid_rate_first": p.valid_first, "valid_rate_last": p.valid_last,
    }  # fmt: skip
  best = await scope.best(p, search)
  source = WorkflowSource(best["graph"], best["prompt"])
  if system.hosts.is_writer:
    write_best(workdir, source, {"score": best["score"], "node": best["node"]})
  contenders = {"seed": system.seed_source, "best": source}
  tested = await evaluate(system, contenders, test_problems(system), 1)
  await agree()
  summary = {
    "seed_score": best["seed_score"],
    "best_score": best["score"],
    "test_score_seed": tested["seed"]["score"],
    "test_score_best": tested["best"]["score"],
    "test_interval_best": tested["best"]["interval"],
    **figures,
    **scope.figures(p),
    "trainable_share": system.policy.trainable_share,
    "updates": p.updates,
    "skipped_updates": p.skipped,
    "rounds": p.step,
    "stages": _stages_run(workdir, p),
    **cost(),
    "workdir": str(workdir),
    "best_workflow": str(Path(workdir / "best") / "graph.py"),
  }
  return summary, {"before": p.before, "after": after}


def _stages_run(workdir: Any, p: Progress) -> dict[str, bool]:
  """Which parts of the loop have really run."""
  return {
    "search": p.step > 0,
    "grpo": p.updates + p.skipped > 0,
    "checkpoint": any(Path(workdir.checkpoints).iterdir()),
    "eval": True,
  }
