"""Modes train and search: for each epoch, for each episode, rounds of search, and GRPO on what
they found.

Everything that a step needs to be repeated exactly is in its checkpoint: LoRA, optimiser, step and
key as arrays; search, counters, the comparison before training, the number of metrics rows, the
learner's room and what hit a limit of time as JSON. A round is the unit: an interrupt loses at most
one.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from awf.backup import status_figures
from awf.board import best_key, log_round, log_start, log_tree
from awf.closing import closing_figures, compare
from awf.hosts import Cluster
from awf.interrupt import Interrupted, StopRequest
from awf.progress import Progress
from awf.scope import make_scope
from awf.spent import Spent
from awf.summary import closing_lines, drop_summary, read_summary, round_line, write_summary
from awf.system import System
from awf.terminal import track
from awf.trajectories import drop_rounds_after, write_round
from awf.types import Rollout, UserError

log = logging.getLogger("awf")


def run_train(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """The whole loop; resumes by itself. Returns the figures of the JSON line."""
  with System(config, workdir) as system, StopRequest() as stop:
    return asyncio.run(Loop(system, trains=True).run(stop))


def run_search(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Search only, with a frozen policy; writes an AFlow workspace and the best workflow."""
  if config.search.driver == "aflow":
    from awf.aflow import run_aflow

    return run_aflow(config, workdir)
  with System(config, workdir) as system, StopRequest() as stop:
    return asyncio.run(Loop(system, trains=False).run(stop))


class Loop:
  """The loop of one run over a built system. A search is that of an episode, or of a problem."""

  def __init__(self, system: System, trains: bool):
    from awf.checkpoint import Checkpointer
    from awf.metrics import MetricsLogger
    from awf.own_metrics import OwnMetrics
    from awf.qwen import hf
    from awf.report_live import LiveReport

    self.system, self.config, self.trains = system, system.config, trains
    self.workdir, self.hosts = system.workdir, system.hosts
    self.spent = Spent(system)
    self.progress = Progress()
    self.own_metrics = OwnMetrics(self.config.metrics)
    self.metrics = MetricsLogger(self.workdir, is_kept=self.hosts.is_writer)
    self.checkpoints = Checkpointer(
      self.workdir.checkpoints,
      self.config.train.keep_checkpoints,
      base_hash=hf.base_hash(system.policy.params),
    )
    self.scope = make_scope(system)
    self.trainer = system.make_trainer(self.total_rounds) if trains else None
    used = (*system.held_out, *system.search_problems)
    self.report = LiveReport(self.workdir.path, used, self.hosts.is_writer)
    self.search = None
    self._finished: dict[str, Any] | None = None  # the last search, for more rounds of it
    self._saved = -1  # number of the newest checkpoint

  @property
  def per_epoch(self) -> int:
    """Searches of an epoch."""
    return self.config.train.episodes * self.scope.per_episode

  @property
  def episodes(self) -> int:
    """Searches in all."""
    return self.config.train.epochs * self.per_epoch

  @property
  def total_rounds(self) -> int:
    return self.episodes * self.config.search.rounds

  async def run(self, stop: StopRequest) -> dict[str, Any]:
    """Runs what is left of the run and its closing evaluation.

    Raises:
      Interrupted: `stop` asked for the end; the state after the last whole round is kept.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    end: Callable[[], object] = task.cancel
    if isinstance(self.hosts, Cluster):
      hosts = self.hosts
      hosts.on_stop(task.cancel)
      end = lambda: hosts.ask_stop(stop.number)  # noqa: E731
    stop.then = lambda: None if loop.is_closed() else loop.call_soon_threadsafe(end)
    if stop.number:
      stop.then()
    try:
      return await self._run()
    except asyncio.CancelledError:
      number = stop.number or self.hosts.stop_number
      if not number:
        raise
      if not self.hosts.is_stopped:
        await self.hosts.meet({}, number)
      # A task is cancelled where it waits, so never amid an update or a commit.
      if self.progress.step or self.progress.before is not None:
        self._save()
      self.metrics.close()
      self.checkpoints.close()
      figures = {"rounds": self.progress.step, "updates": self.progress.updates}
      raise Interrupted(number, figures) from None
    finally:
      with contextlib.suppress(OSError):  # of a full disk, which has been told of
        self.metrics.close()

  async def _agree(self) -> None:
    """Waits for the other processes, before what all do together."""
    await self.spent.agree(self.progress)

  async def _run(self) -> dict[str, Any]:
    self._resume()
    p = self.progress
    summary = read_summary(self.workdir) if p.episode >= self.episodes else None
    if summary is not None:
      log.info("this run is complete; its figures again (choose another --workdir for a new one)")
      self._close(summary)
      return summary
    if self.hosts.is_writer:
      drop_summary(self.workdir)
    if self.trains and self.config.eval.parent_count and p.before is None:
      before = await compare(self.system, "before")
      await self._agree()
      p.before = before
      self._save()
    with track("rounds", self.total_rounds, p.step) as self._shown:
      while p.episode < self.episodes and not p.is_stopped:
        await self._episode()
    return await self._finish()

  # ---- one episode: one search ----

  async def _episode(self) -> None:
    p = self.progress
    search = self.search = self.search or self.scope.make_search(p, self._agree)
    if self.hosts.size > 1:  # the others read what AFlow left there before the first changes it
      if self.config.search.workspace:
        await self._agree()  # the first has copied it
      if not self.hosts.is_writer:
        search.open_workspace()
      await self._agree()
    epoch = p.episode // self.per_epoch
    while not search.why_done() and not p.is_stopped:
      await self._round(search, epoch)
    if p.is_stopped:
      return
    log.info("search %d ends: %s", p.episode + 1, search.why_done())
    best, seed = search.best(), search.tree.nodes[1]
    if self.scope.goes_on:
      self._finished = {
        "search": search.state_dict(),
        "progress": dataclasses.asdict(p),
        "rows": self.metrics.position,
        "limits": self._limits(),
      }
    p.beaten += best.score > seed.score
    rows = [row for row in self.metrics.rows if row["level"] == "batch"]
    self.scope.end_search(p, search, rows[len(rows) - search.rounds_done :])
    p.episode += 1
    if found := self.scope.search_metrics(p):
      self.metrics.log(p.step, found, epoch=epoch, level="search")
    if p.episode % self.per_epoch == 0:
      extra = {"checkpoint_quality": p.beaten, "avg_pass_at_k": self._mean_pass_at_k(epoch)}
      self.metrics.log_epoch(epoch, p.step, extra)
      log_tree(self.metrics, epoch, search)
    self.search = None
    self._save()

  def _limits(self) -> list[float]:
    """What may end a search before its last round, and that round."""
    s = self.config.search
    return [s.rounds, s.max_calls, s.max_tokens, s.converge_rounds, s.converge_z]

  async def _round(self, search, epoch: int) -> None:
    p, started = self.progress, time.perf_counter()
    before, best_before = self.spent.totals(p), best_key(search)
    self.system.gauges.restart()
    result = await search.round()
    searched = time.perf_counter()
    update = self._update(result.rollouts)
    self._check_finite(result.rollouts, update)
    updated = time.perf_counter()
    p.step += 1
    share = result.metrics["mcts/valid_rate"]
    p.valid_first = share if math.isnan(p.valid_first) else p.valid_first
    p.valid_last = share
    if self.hosts.is_writer:
      write_round(self.workdir.trajectories, p.step, result.records)
    self._check_time_limit()
    totals = self.spent.totals(p)
    tokens, jobs = totals["tokens"] - before["tokens"], totals["jobs"] - before["jobs"]
    timings = {
      "time/search": searched - started,
      "time/update": updated - searched,
      "time/step": updated - started,
      "perf/tokens_per_second": tokens / (searched - started),
      "perf/problems_per_hour": 3600 * jobs / (searched - started),
      **status_figures(self.workdir),
      **self.system.machine(before, totals, self.trainer, updated - searched),
    }
    best, seed = search.best(), search.tree.nodes[1]
    quality = p.beaten + (best.score > seed.score)
    results = {**result.metrics, **update, "checkpoint_quality": quality}
    results |= self.own_metrics(result.rollouts, results)
    self.metrics.log(p.step, results, timings, epoch=epoch)
    log_round(self.metrics, p.step, result.records, search, best_before)
    if p.step % self.config.train.checkpoint_every == 0 or p.is_stopped:
      self._save()
    self._shown.advance(best=best.score, nodes=len(search.tree.nodes), updates=p.updates)
    # A row of its own: the checkpoint covers the round's.
    saved = self.system.gauges.take_part("checkpoint")
    if saved:
      self.metrics.log(p.step, {}, saved, epoch=epoch)
    log.info("%s", round_line(p.step, self.total_rounds, results, timings, best.score))
    self.report.update(self._parts)

  def _parts(self) -> dict[str, Any]:
    """Counters for the report; those of this process alone."""
    return {"before": self.progress.before, **self.system.counters()}

  def _mean_pass_at_k(self, epoch: int) -> float:
    """Mean over an epoch's rounds of pass@k of the proposals, k being a whole group."""
    name = f"mcts/pass@{self.config.grpo.group_size}"
    rows = [row for row in self.metrics.rows if row["level"] == "batch" and row["epoch"] == epoch]
    found = [row[name] for row in rows if row.get(name) is not None]
    return math.fsum(found) / len(found) if found else math.nan

  def _update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """GRPO on the round's rollouts; the policy's new adapter serves the next proposals."""
    if self.trainer is None:
      from awf.grpo.config import GRPOConfig
      from awf.grpo.rows import rollout_metrics

      horizon = self.config.sampler.max_new_tokens
      return rollout_metrics(rollouts, GRPOConfig.from_config(self.config.grpo, horizon))
    with track("update"):
      metrics = self.trainer.update(list(rollouts))
    if metrics.get("skipped"):
      self.progress.skipped += 1
    else:
      self.progress.updates += 1
      self.system.serve(self.trainer.state.lora)
    return metrics

  def _check_finite(self, rollouts: Sequence[Rollout], update: dict[str, float]) -> None:
    """Keeps the batch of a step that was skipped, and stops after too many in a row."""
    p, limit = self.progress, self.config.train.nonfinite_limit
    if not update.get("nonfinite_steps"):
      p.nonfinite = 0
      return
    from awf.grpo.guard import save_batch

    p.nonfinite += 1
    file = self.workdir / "faults" / f"round_{p.step + 1:04d}.jsonl"
    if self.hosts.is_writer:
      save_batch(file, rollouts, update)
    what = f"loss, gradient or reward of round {p.step + 1} is no finite number; batch in {file}"
    if p.nonfinite >= limit:
      raise UserError(
        f"{what}; config.train.nonfinite_limit = {limit} such rounds in a row: lower "
        "config.optim.learning_rate or config.optim.grad_clip and resume, or look at config.reward"
      )
    log.warning("%s; its steps changed nothing (%d of %d in a row)", what, p.nonfinite, limit)

  def _check_time_limit(self) -> None:
    limit = self.config.train.minutes
    if limit and self.spent.deciding_seconds(self.progress) >= 60 * limit:
      self.progress.is_stopped, self.progress.limit = True, limit
      log.info("config.train.minutes: the limit of %g minutes is reached", limit)

  # ---- the end ----

  async def _finish(self) -> dict[str, Any]:
    p = self.progress
    cost = lambda: self.spent.figures(p)  # noqa: E731
    summary, comparison = await closing_figures(
      self.system, self.scope, self.search, p, self._agree, cost
    )
    if self.hosts.is_writer:
      write_summary(self.workdir, summary, comparison)
    self._close(summary)
    return summary

  def _close(self, summary: dict[str, Any]) -> None:
    self.metrics.close()
    self.checkpoints.close()
    if not self.hosts.is_writer:
      return
    self.report.write(self._parts())
    for line in closing_lines(summary, self.workdir):
      log.info("%s", line)

  # ---- state ----

  def _resume(self) -> None:
    # 1. arrays and JSON of the newest whole checkpoint, or nothing
    found = self.checkpoints.restore(self._state())
    self.hosts.agree(
      "newest checkpoint", found and found[0], "--workdir must be one directory for all processes"
    )
    if found is None:
      self.metrics.truncate(-1)
      log_start(self.metrics, self.config)
      self._drop_trajectories()
      return
    self._saved, state, extra = found
    # 2. learner, then the adapter that the sampler serves
    if self.trainer is not None:
      self.trainer.state = state
      self.trainer.room = extra.get("room") or self.trainer.room
      self.system.serve(state.lora)
    # 3. counters, the search in hand, and the rows that the checkpoint covers
    self.progress, rows = Progress(**extra["progress"]), extra.get("rows")
    search, self._finished = extra["search"], extra.get("finished")
    last = self._finished
    if last and self.progress.episode >= self.episodes:
      more = last["search"]["rounds_done"] < self.config.search.rounds
      if more and last.get("limits") != self._limits():  # more rounds were asked for
        kept = self.spent.carried(extra["progress"])
        self.progress = Progress(**{**last["progress"], **kept})
        search, rows = last["search"], last["rows"]
    if search is not None:
      self.search = self.scope.make_search(self.progress, self._agree)
      self.search.load_state_dict(search)
    self.system.load_state_dict(extra.get("runners") or {})
    if self.config.train.minutes != self.progress.limit:
      self.progress.is_stopped = False
    # 4. files: what the interrupted process had written past the checkpoint goes
    self.metrics.truncate(self.progress.step, rows)
    self._drop_trajectories()
    log.info("resumed after round %d of %d", self.progress.step, self.total_rounds)
    if not self.config.sampler.strict:
      log.info(
        "config.sampler.strict is off: this run agrees with an uninterrupted one statistically"
      )

  def _state(self):
    """The arrays of a checkpoint; search mode has none of its own but keeps the format."""
    return self.trainer.state if self.trainer is not None else {"none": np.zeros(())}

  def _save(self) -> None:
    if self.hosts.size > 1:  # what ended at a limit of time on one process ends so on all
      self.system.load_state_dict(self._all_states())
    extra = {
      "progress": dataclasses.asdict(self.spent.kept(self.progress)),
      "search": None if self.search is None else self.search.state_dict(),
      "finished": self._finished if self.search is None else None,
      "rows": self.metrics.position,
      "room": None if self.trainer is None else list(self.trainer.room),
      "runners": self.system.state_dict(),
    }
    # An episode's end saves again at the same step, with what comes after it.
    number = 2 * self.progress.step + (self.search is None)
    if number > self._saved:
      with self.system.gauges.during("checkpoint"):
        self.checkpoints.save(number, self._state(), extra)
      self._saved = number

  def _all_states(self) -> dict[str, Any]:
    from awf.dealt import merged

    return merged([f["state"] for f in self.hosts.meet_now({"state": self.system.state_dict()})])

  def _drop_trajectories(self) -> None:
    if self.hosts.is_writer:
      drop_rounds_after(self.workdir.trajectories, self.progress.step)
