"""Mode search with `search.driver=aflow`: upstream AFlow searches, our model answers.

A server on the loopback device answers for two models: the base for workflows, the policy for
edits. AFlow runs in a process of its own (`awf.search.aflow_driver`); its rounds end up in the
run's workspace with a journal, so that mode eval and the report read them like a search of ours.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from awf.evaluate import evaluate, test_problems, write_best
from awf.files import write_atomic
from awf.interrupt import Interrupted, StopRequest
from awf.report import write_report
from awf.search.adopt import import_workspace
from awf.search.aflow_driver import (
  EXECUTOR,
  OPTIMIZER,
  AFlowOptimizerWrapper,
  Proposal,
  check_checkout,
  compact_messages,
)
from awf.search.tree import SEED, Node, Tree
from awf.serve import LocalServer
from awf.serve_app import Service, make_app
from awf.summary import drop_summary, read_summary, write_summary
from awf.system import System, hold_out
from awf.terminal import track
from awf.types import Problem, UserError, price
from awf.workflow.contract import operators_of

log = logging.getLogger("awf")

_MOST_BYTES = 8 << 20  # of a request


class _Compact:
  """A policy whose optimiser reads AFlow's request as our compact prompt."""

  def __init__(self, policy: Any) -> None:
    self._policy = policy

  def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    return self._policy.prompt_ids(compact_messages(messages))

  def __getattr__(self, name: str) -> Any:
    return getattr(self._policy, name)


def run_aflow(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Runs what is left of a search by AFlow, collects it, and scores its best round on test.

  Raises:
    UserError: no usable checkout or interpreter, a data set that AFlow has not, or AFlow failed.
    Interrupted: SIGTERM or Ctrl-C; the rounds so far are kept, and the same command goes on.
  """
  started = time.perf_counter()
  with System(config, workdir) as system, StopRequest() as stop:
    task = system.task
    check_checkout(config.aflow.path, config.aflow.python, task.dataset)
    if config.search.workspace:
      import_workspace(Path(config.search.workspace), Path(workdir.workspace), task.dataset)
    wrapper = AFlowOptimizerWrapper(
      config.aflow.path,
      config.aflow.python,
      Path(workdir / "aflow"),
      Path(workdir.workspace),
      dataset=task.dataset,
      question_type=task.question_type,
      operators=tuple(config.search.operators) or operators_of(task.question_type),
      seed=system.seed_source,
    )
    summary = read_summary(workdir)
    if summary is not None and summary["rounds"] + summary["lost_rounds"] >= config.search.rounds:
      log.info("this run is complete; its figures again (choose another --workdir for a new one)")
      return summary
    drop_summary(workdir)
    log.warning("AFlow runs the workflows that the model writes with your rights, in no sandbox")
    problems = _problems(system)
    counts = _search(system, wrapper, problems, stop)
    tree = wrapper.collect(problems)
    _write_trajectories(workdir, wrapper.trajectories(tree, counts["proposals"]))
    done = wrapper.rounds_done()
    if stop.number:
      write_report(workdir.path)
      raise Interrupted(stop.number, {"rounds": done})
    return _finish(system, tree, counts, time.perf_counter() - started)


def _problems(system: System) -> list[Problem]:
  """What AFlow validates on: `search.full_problems` of the search's, by a seeded hash."""
  count, found = system.config.search.full_problems, system.search_problems
  if not count or count >= len(found):
    return list(found)
  return list(hold_out(found, count, system.config.seed)[0])


def _rows(system: System, problems: Sequence[Problem]) -> list[Mapping[str, Any]]:
  """The rows of the data set's files that these problems were made of."""
  wanted = {p.prompt for p in problems}
  return [row for row, problem in system.task.raw_rows() if problem.prompt in wanted]


def _search(
  system: System, wrapper: AFlowOptimizerWrapper, problems: Sequence[Problem], stop: StopRequest
) -> dict[str, Any]:
  """Server and AFlow together; returns calls and the optimiser's replies, in order."""
  config, key = system.config, secrets.token_hex(16)
  proposals: list[Proposal] = []

  def watch(body: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    if body["model"] == OPTIMIZER:
      choice, usage = answer["choices"][0], answer["usage"]
      text, tokens = choice["message"]["content"], usage["completion_tokens"]
      proposals.append(Proposal(text, tokens, choice["finish_reason"]))
      for i, name in enumerate(("prompt_tokens", "completion_tokens")):
        spent[OPTIMIZER][i] += usage[name]
    else:
      for i, name in enumerate(("prompt_tokens", "completion_tokens")):
        spent[EXECUTOR][i] += answer["usage"][name]

  spent = {EXECUTOR: [0, 0], OPTIMIZER: [0, 0]}
  policy: Any = _Compact(system.policy) if config.search.prompt == "compact" else system.policy
  models = {EXECUTOR: 0, OPTIMIZER: 1 if system.policy.lora is not None else 0}
  service = Service(policy, models, system.executor_sampling, _MOST_BYTES, watch)
  folder = Path(config.task.path)
  public = folder / f"{wrapper.dataset.lower()}_public_test.jsonl" if folder.is_dir() else None
  sampling = {
    name: {"temperature": s.temperature, "top_p": s.top_p}
    for name, s in ((EXECUTOR, system.executor_sampling), (OPTIMIZER, system.policy_sampling))
  }
  rounds = config.search.rounds
  with (
    LocalServer(make_app(service, key)) as server,
    track("AFlow's rounds", rounds, wrapper.rounds_done()) as shown,
  ):
    wrapper.prepare(server.url, key, sampling, _rows(system, problems), public)
    log.info("AFlow of %s asks %s; it says more in %s", config.aflow.path, server.url, wrapper.log)

    def on_round(id: int, score: float) -> None:
      log.info("AFlow: round %d scores %.3f", id, score)
      shown.advance(id != SEED, best=max(wrapper.scores().values()))

    try:
      wrapper.run(
        rounds,
        sample=config.search.sample,
        validation_rounds=config.aflow.validation_rounds,
        converges=config.search.converge_rounds > 0,
        should_stop=lambda: bool(stop.number),
        on_round=on_round,
      )
    except UserError:
      if wrapper.scores():
        wrapper.collect(problems)
      raise
  return {"proposals": proposals, "calls": service.counts["calls"], "spent": spent}


def _finish(
  system: System, tree: Tree, counts: Mapping[str, Any], seconds: float
) -> dict[str, Any]:
  """The closing evaluation, best/, summary.json and the report."""
  config, workdir = system.config, system.workdir
  nodes = tree.selectable(("full",))
  if not nodes:
    raise UserError(
      f"config.aflow.path: AFlow evaluated no round; {workdir / 'aflow' / 'aflow.log'} says why"
    )
  best, seed = max(nodes, key=lambda n: (n.score, -n.id)), tree.nodes[SEED]
  write_best(workdir, best.source, {"score": best.score, "node": best.id})
  contenders = {"seed": seed.source, "best": best.source}
  tested = asyncio.run(evaluate(system, contenders, test_problems(system), 1))
  spent = counts["spent"]
  cost = price(spent[EXECUTOR], config.executor.prices)
  cost += price(spent[OPTIMIZER], config.search.prices) + system.cost()
  rounds = len([n for n in nodes if n.id != SEED])
  summary = {
    "driver": "aflow",
    "seed_score": seed.score if seed.evaluated else None,
    "best_score": best.score,
    "best_round": best.id,
    "test_score_seed": tested["seed"]["score"],
    "test_score_best": tested["best"]["score"],
    "test_interval_best": tested["best"]["interval"],
    "rounds": rounds,
    "lost_rounds": max(0, config.search.rounds - rounds),
    "proposals": len(counts["proposals"]),
    "llm_calls": counts["calls"] + system.executor_totals().get("llm_calls", 0),
    "tokens": system.tokens(),
    "cost_usd": round(cost, 6),
    "wall_seconds": round(seconds, 1),
    "workdir": str(workdir),
    "best_workflow": str(workdir / "best" / "graph.py"),
  }
  write_summary(workdir, summary, {})
  write_report(workdir.path)
  log.info("%s", _last_words(best, seed, summary))
  return summary


def _last_words(best: Node, seed: Node, summary: Mapping[str, Any]) -> str:
  return (
    f"best of AFlow's {summary['rounds']} rounds: {best.id}, {best.score:.3f} on validation (seed "
    f"{seed.score:.3f}), {summary['test_score_best']:.3f} on test (seed "
    f"{summary['test_score_seed']:.3f}); {summary['lost_rounds']} rounds were lost or left out"
  )


def _write_trajectories(workdir: Any, rows: Sequence[Mapping[str, Any]]) -> None:
  """A file per process that worked on the run: replies of earlier ones stay."""
  folder = Path(workdir.trajectories)
  folder.mkdir(exist_ok=True)
  name = f"aflow_{len(list(folder.glob('aflow_*.jsonl'))) + 1:04d}.jsonl"
  if rows:
    write_atomic(folder / name, "".join(json.dumps(row) + "\n" for row in rows))
