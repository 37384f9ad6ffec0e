"""What a run has taken so far, earlier processes and the others beside this one included."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Any

from awf.progress import Progress
from awf.system import System

_COSTS = ("calls", "tokens", "cost")  # counted over all processes that worked on a run


class Spent:
  """Counters and clock of a run; the progress that a call gets holds those of earlier processes.

  Args:
    system: of this process.
  """

  def __init__(self, system: System):
    self._system = system
    self._start = time.perf_counter()
    self._others: list[dict[str, Any]] = []  # facts of the other processes, when all met last
    self._common_seconds = 0.0  # process 0's clock then

  async def agree(self, p: Progress) -> None:
    """Waits for the other processes, before what all do together, and hears what they took.

    Raises:
      asyncio.CancelledError: one of them was asked to stop: all do.
    """
    hosts = self._system.hosts
    if hosts.size == 1:
      return
    mine = {"totals": self._own(), "seconds": self.seconds(p), "step": p.step}
    facts = await hosts.meet(mine)
    if hosts.is_stopped:
      raise asyncio.CancelledError
    self._others = [f for i, f in enumerate(facts) if i != hosts.index]
    self._common_seconds = facts[0]["seconds"]

  def seconds(self, p: Progress) -> float:
    """Wall time of all processes one after the other."""
    return p.seconds + time.perf_counter() - self._start

  def deciding_seconds(self, p: Progress) -> float:
    """`seconds` for a limit of time: where there are several processes, one's clock decides."""
    return self.seconds(p) if self._system.hosts.size == 1 else self._common_seconds

  def totals(self, p: Progress) -> dict[str, Any]:
    """Executor calls, generated tokens and USD, earlier runs included; of this one alone executed
    problems, the engines' decode steps, the seconds that they were busy, and `grader/...`.

    Those of other processes are as they were when all met last.
    """
    rows = [self._own(), *(f["totals"] for f in self._others)]
    total = {name: sum(row[name] for row in rows) for name in rows[0]}
    for name in _COSTS:
      total[name] += getattr(p, name)
    return total

  def _own(self) -> dict[str, Any]:
    system = self._system
    engine, executor = system.policy.engine.stats(), system.executor_totals()
    return {
      "calls": executor.get("llm_calls", 0),
      "tokens": system.tokens(),
      "cost": system.cost(),
      "jobs": executor.get("jobs", 0),
      "steps": int(engine["steps"]),
      "busy_seconds": engine["busy_seconds"],
      **{f"grader/{name}": value for name, value in system.task.grader_stats().items()},
    }

  def kept(self, p: Progress) -> Progress:
    """The progress as a checkpoint keeps it."""
    totals = self.totals(p)
    return dataclasses.replace(
      p, seconds=self.seconds(p), **{name: totals[name] for name in _COSTS}
    )

  def carried(self, saved: dict[str, Any]) -> dict[str, Any]:
    """What of a saved progress stays true when the run goes on from an earlier place."""
    return {name: saved.get(name, 0) for name in ("seconds", *_COSTS)}

  def figures(self, p: Progress) -> dict[str, Any]:
    """Of the JSON line."""
    totals, seconds = self.totals(p), self.seconds(p)
    return {
      "llm_calls": totals["calls"],
      "tokens": totals["tokens"],
      "cost_usd": round(totals["cost"], 6),
      "tokens_per_second": round(totals["tokens"] / seconds, 1),
      "problems_per_hour": round(3600 * totals["jobs"] / (time.perf_counter() - self._start), 0),
      "wall_seconds": round(seconds, 1),
    }
