"""Mode eval: the test split, contender by contender, with pass@k and bootstrap intervals."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from awf.system import System, hold_out
from awf.tasks.stats import bootstrap_interval, pass_at_k_values
from awf.types import Problem, UserError, WorkflowSource
from awf.workflow.contract import seed_source

log = logging.getLogger("awf")

EVAL_REPEAT = 1000  # noise of evaluation calls: apart from that of the search (repeat 0)
_USAGE = 'self.llm.get_usage_summary()["total_cost"]'


def run_eval(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Scores the best workflow found, the seed, a plain call and self-consistency on the test split.

  Raises:
    UserError: sampling settings that pass@k cannot use.
  """
  start = time.perf_counter()
  _check_pass_k(config)
  best = read_best(workdir)
  with System(config, workdir) as system:
    kind = system.task.question_type
    contenders = {
      "seed": system.seed_source,
      "plain": plain_call(kind),
      # fmt: skip
      "self_consistency": self_consistency(kind, max(2, config.eval.samples)),
    }
    if best is not None:
      contenders = {"best": best, **contenders}
    else:
      log.info("no best workflow in %s yet: train or search first", workdir)
    problems = test_problems(system)
    figures = asyncio.run(evaluate(system, contenders, problems, config.eval.samples))
    calls = system.executor_totals().get("llm_calls", 0)
    calls = sum(row["calls"] for row in system.hosts.meet_now({"calls": calls}))
  for name, row in figures.items():
    low, high = row["interval"]
    log.info("%-16s %.3f  [%.3f, %.3f]  %s", name, row["score"], low, high,
             " ".join(f"pass@{k} {v:.3f}" for k, v in row["pass_at_k"].items()))  # fmt: skip
  result = {
    "contenders": figures,
    "problems": len(problems),
    "samples": config.eval.samples,
    "llm_calls": calls,
    "wall_seconds": round(time.perf_counter() - start, 1),
  }
  if system.hosts.is_writer:
    (workdir / "eval.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
  return result


def test_problems(system: System) -> tuple[Problem, ...]:
  """The test split, or its first `config.eval.problems` problems in a family-balanced order."""
  count = system.config.eval.problems
  if not count or count >= len(system.test):
    return system.test
  return hold_out(system.test, count, system.config.task.split_seed)[0]


async def evaluate(
  system: System,
  contenders: Mapping[str, WorkflowSource],
  problems: Sequence[Problem],
  samples: int,
) -> dict[str, dict[str, Any]]:
  """Runs every contender `samples` times on every problem, all in flight together.

  Returns:
    For each contender: score (mean over problems and samples), interval (95 %, problems
    resampled), pass_at_k, families (mean by family), calls per problem. Infrastructure failures
    are left out.
  """

  async def one(source: WorkflowSource, problem: Problem, repeat: int) -> tuple[float, int]:
    result = await system.runner(EVAL_REPEAT + repeat).run(source, problem)
    if result.failure is not None and result.failure.kind == "infrastructure":
      return math.nan, result.calls
    if result.answer is None:
      return 0.0, result.calls
    return (await system.task.grade(problem, result.answer)).score, result.calls

  jobs = [one(s, p, i) for s in contenders.values() for p in problems for i in range(samples)]
  flat = np.array(await asyncio.gather(*jobs), np.float64).reshape(
    len(contenders), len(problems), samples, 2
  )
  rows = {}
  for c, name in enumerate(contenders):
    rows[name] = _figures(flat[c, :, :, 0], problems, system.config)
    rows[name]["calls_per_problem"] = float(flat[c, :, :, 1].mean())
  return rows


def _figures(
  score_QS: np.ndarray, problems: Sequence[Problem], config: ConfigDict
) -> dict[str, Any]:
  groups = [p.id for p in problems for _ in range(score_QS.shape[1])]
  flat = score_QS.reshape(-1)
  if not np.isfinite(flat).any():
    raise UserError("config.sandbox: every evaluation failed for reasons of the host; see run.log")
  low, high = bootstrap_interval(flat, groups, n=config.eval.bootstrap, seed=config.seed)
  full = {
    p.id: [s >= 1.0 for s in row]
    for p, row in zip(problems, score_QS, strict=True)
    if np.isfinite(row).all()
  }
  passed = {}
  for k in config.eval.pass_k:
    if k <= score_QS.shape[1] and full:
      passed[str(k)] = float(np.mean(list(pass_at_k_values(full, k).values())))
  families = sorted({p.family for p in problems if p.family})
  return {
    "score": float(np.nanmean(flat)),
    "interval": [low, high],
    "pass_at_k": passed,
    "families": {
      f: float(np.nanmean(score_QS[[p.family == f for p in problems]])) for f in families
    },
  }


def plain_call(question_type: str) -> WorkflowSource:
  """The question alone, one call; for code with the operator that asks for code."""
  return seed_source(question_type)


def self_consistency(question_type: str, votes: int) -> WorkflowSource:
  """Chain of thought, `votes` times, then the most frequent answer (arXiv:2203.11171)."""
  code = question_type == "code"
  operator = "CustomCodeGenerate" if code else "Custom"
  signature = "problem: str, entry_point: str" if code else "problem: str"
  call = (
    "problem=problem, entry_point=entry_point, instruction=prompt_custom.STEPS_PROMPT"
    if code
    else "input=problem, instruction=prompt_custom.STEPS_PROMPT"
  )
  ensemble = "solutions=solutions" + ("" if question_type == "qa" else ", problem=problem")
  graph = f"""class Workflow:
    def __init__(self, name: str, llm_config, dataset: DatasetType) -> None:
        self.name = name
        self.dataset = dataset
        self.llm = create_llm_instance(llm_config)
        self.solve = operator.{operator}(self.llm)
        self.sc_ensemble = operator.ScEnsemble(self.llm)

    async def __call__(self, {signature}):
        solutions = []
        for _ in range({votes}):
            solution = await self.solve({call})
            solutions.append(solution['response'])
        solution = await self.sc_ensemble({ensemble})
        return solution['response'], {_USAGE}"""
  return WorkflowSource(graph, 'STEPS_PROMPT = """Think step by step.\n"""')


def write_best(workdir: Any, source: WorkflowSource, about: Mapping[str, Any]) -> Path:
  """Keeps the best workflow where people and `eval` find it: DIR/best/{graph,prompt}.py and
  best.json.
  """
  folder = Path(workdir / "best")
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "graph.py").write_text(source.graph + "\n", encoding="utf-8")
  (folder / "prompt.py").write_text(source.prompt + "\n", encoding="utf-8")
  row = {"graph": source.graph, "prompt": source.prompt, **about}
  temporary = folder / ".best.json.new"
  temporary.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
  temporary.replace(folder / "best.json")
  return folder


def read_best(workdir: Any) -> WorkflowSource | None:
  """The best workflow that a run in DIR wrote, or None."""
  file = Path(workdir / "best" / "best.json")
  if not file.is_file():
    return None
  row = json.loads(file.read_text(encoding="utf-8"))
  return WorkflowSource(row["graph"], row["prompt"])


def _check_pass_k(config: ConfigDict) -> None:
  if max(config.eval.pass_k, default=1) > config.eval.samples:
    raise UserError(
      f"config.eval.pass_k: {max(config.eval.pass_k)} needs at least as many samples per problem, "
      f"config.eval.samples is {config.eval.samples}"
    )
