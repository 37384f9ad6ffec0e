"""What a run of train or search says after a round and at its end, and keeps in summary.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awf.files import write_atomic
from awf.terminal import clock


def about_best(search: Any) -> dict[str, Any]:
  """The best node of a search and the seed's score, as kept in checkpoints and best.json."""
  best = search.best()
  return {
    "graph": best.source.graph,
    "prompt": best.source.prompt,
    "score": best.score,
    "node": best.id,
    "modification": best.modification,
    "seed_score": search.tree.nodes[1].score,
  }


def write_summary(workdir: Any, summary: dict[str, Any], comparison: dict[str, Any]) -> None:
  """Keeps the figures of a complete run; the file is there whole or not at all."""
  text = json.dumps({"comparison": comparison, **summary}, indent=2)
  write_atomic(_path(workdir), text + "\n")


def read_summary(workdir: Any) -> dict[str, Any] | None:
  """The figures of a complete run, without the comparison's details; None when there are none."""
  if not _path(workdir).is_file():
    return None
  summary = json.loads(_path(workdir).read_text(encoding="utf-8"))
  summary.pop("comparison")
  return summary


def drop_summary(workdir: Any) -> None:
  """Takes away the figures of a run that goes on."""
  _path(workdir).unlink(missing_ok=True)


def _path(workdir: Any) -> Path:
  return Path(workdir / "summary.json")


def round_line(
  step: int, rounds: int, results: Mapping[str, Any], timings: Mapping[str, Any], best: float
) -> str:
  """How a round went, and how long the rest of the `rounds` takes at its speed."""
  loss = results.get("loss", math.nan)  # none where nothing is trained
  learned = "" if loss is None or math.isnan(loss) else f"loss {loss:.4f}, "
  left = (rounds - step) * timings["time/step"]
  return (
    f"round {step} of {rounds}: best {best:.3f}, reward {results['reward']:.3f}, "
    f"valid {results['mcts/valid_rate']:.2f}, {learned}"
    f"{timings['perf/tokens_per_second']:.0f} tokens/s, {timings['time/step']:.0f} s, "
    f"about {clock(left)} left"
  )


def closing_lines(summary: dict[str, Any], workdir: Any) -> list[str]:
  """What was learned and where everything is, for people."""
  lines = [
    f"best workflow: {summary['best_score']:.3f} on validation (seed {summary['seed_score']:.3f}), "
    f"{summary['test_score_best']:.3f} on test (seed {summary['test_score_seed']:.3f})"
  ]
  if summary.get("proposal_score_after") is not None:
    low, high = summary["proposal_gain_interval"]
    lines.append(
      f"the policy's proposals for {summary['parents']} held-out parents: "
      f"{summary['proposal_score_before']:.3f} before training, "
      f"{summary['proposal_score_after']:.3f} after "
      f"(gain 95 % interval {low:+.3f} to {high:+.3f}); "
      f"valid {summary['valid_rate_first']:.2f} -> {summary['valid_rate_last']:.2f}; "
      f"different programs in 64: {summary['different_in_64_before']} -> "
      f"{summary['different_in_64_after']}"
    )
  if "by_problem" in summary:
    means = ", ".join(f"{name} {value:.3f}" for name, value in summary["by_problem"].items())
    lines.append(f"means of {summary['searches']} searches over single problems: {means}")
  lines += [
    f"{summary['updates']} updates in {summary['rounds']} rounds, "
    f"{summary['llm_calls']} model calls, "
    f"{summary['wall_seconds']:.0f} s",
    f"report: {workdir / 'report.html'}",
    f"best workflow: {summary['best_workflow']}",
    f"checkpoints: {workdir / 'checkpoints'}; search: {workdir / 'workspace'}; "
    f"proposals: {workdir / 'trajectories'}",
    f"TensorBoard: tensorboard --logdir {workdir / 'tb'}",
    "adapter for other programs: the same command with --mode=export",
  ]
  return lines
