"""Mode eval: the test split, contender by contender, with pass@k, intervals, tokens and costs."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from awf.files import write_atomic
from awf.search.choose import Choice, choose, read_trees, seed_of
from awf.system import System, hold_out
from awf.tasks.quantities import parse_quantity
from awf.tasks.stats import bootstrap_interval, paired_bootstrap, pass_at_k_values
from awf.terminal import track
from awf.types import Problem, UserError, WorkflowSource, price
from awf.workflow.contract import seed_source

log = logging.getLogger("awf")

EVAL_REPEAT = 1000  # noise of evaluation calls: apart from that of the search (repeat 0)
_USAGE = 'self.llm.get_usage_summary()["total_cost"]'
STEPS_PROMPT = 'STEPS_PROMPT = """Think step by step.\n"""'


@dataclasses.dataclass(frozen=True)
class Vote:
  """So many independent answers of a workflow; the most frequent one counts.

  Source: self-consistency, arXiv:2203.11171.
  """

  source: WorkflowSource
  votes: int


@dataclasses.dataclass(frozen=True)
class _Outcome:
  """One answer of a contender to a problem."""

  score: float  # NaN: infrastructure failure
  answer: str | None = None  # as the grader reads it; None: the workflow failed
  calls: int = 0
  prompt_tokens: int = 0
  completion_tokens: int = 0


def run_eval(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Scores the best workflow found, the seed, a plain call, chain of thought and self-consistency.

  Writes eval.json. Raises:
    UserError: sampling settings that pass@k cannot use.
  """
  start = time.perf_counter()
  _check_pass_k(config)
  with System(config, workdir) as system:
    if system.policy.lora is not None:
      system.policy.set_lora(None)  # workflows run on the base; an adapter's products only cost
    contenders, choice = find_contenders(system, Path(workdir))
    if "best" not in contenders:
      log.info("no best workflow in %s yet: train or search first", workdir)
    problems = test_problems(system)
    figures = asyncio.run(evaluate(system, contenders, problems, config.eval.samples))
    calls = system.executor_totals().get("llm_calls", 0)
    mine = {"calls": calls, "cost": system.cost(), "grader": system.task.grader_stats()}
    rows = system.hosts.meet_now(mine)
  for line in table(figures):
    log.info("%s", line)
  if choice is not None:
    log.info("%s", choice_line(choice))
  result = {
    "contenders": figures,
    "selection": None if choice is None else choice.facts(),
    "problems": len(problems),
    "samples": config.eval.samples,
    "prices": list(config.executor.prices),
    "llm_calls": sum(row["calls"] for row in rows),
    "cost_usd": round(sum(row["cost"] for row in rows), 6),
    "grader": {k: round(sum(row["grader"][k] for row in rows), 1) for k in mine["grader"]},
    "wall_seconds": round(time.perf_counter() - start, 1),
  }
  if system.hosts.is_writer:
    write_atomic(workdir / "eval.json", json.dumps(result, indent=2) + "\n")
  return result


def find_contenders(
  system: System, folder: Path
) -> tuple[dict[str, WorkflowSource | Vote], Choice | None]:
  """What is compared, the best round first, and how that was picked (`awf.search.choose`).

  Without a search's journal the best is what best/best.json holds.
  """
  kind, votes = system.task.question_type, system.config.eval.votes
  trees = read_trees(folder, system.task.dataset)
  stages = ("full",) if system.config.search.full_top else ("subset", "full")
  choice = choose(trees, stages, _validated_by_aflow(system))
  best = read_best(folder) if choice is None else choice.source
  contenders: dict[str, WorkflowSource | Vote] = {} if best is None else {"best": best}
  contenders["seed"] = seed_of(trees) or system.seed_source
  contenders["plain"] = seed_source(kind)  # the question alone, one call
  contenders["chain_of_thought"] = chain_of_thought(kind)
  contenders[f"self_consistency@{votes}"] = self_consistency(kind, votes)
  return contenders, choice


def _validated_by_aflow(system: System) -> int:
  """Problems behind the score of a round that AFlow evaluated; it keeps the mean alone."""
  search = system.config.search
  if search.driver != "aflow":  # rounds of a workspace that was taken over
    return len(system.validation)
  count = len(system.search_problems)
  return min(search.full_problems or count, count)


def choice_line(choice: Choice) -> str:
  """How the best workflow was picked, for people."""
  return (
    f"best: round {choice.round} of {choice.search}, {choice.score:.3f} on {choice.problems} "
    f"validation problems, at least {choice.lower_bound:.3f} when {choice.candidates} candidates "
    "are allowed for (95 %)"
  )


def test_problems(system: System) -> tuple[Problem, ...]:
  """The test split, or `config.eval.problems` problems with a share of each family."""
  count = system.config.eval.problems
  if not count or count >= len(system.test):
    return system.test
  return hold_out(system.test, count, system.config.task.split_seed)[0]


async def evaluate(
  system: System,
  contenders: Mapping[str, WorkflowSource | Vote],
  problems: Sequence[Problem],
  samples: int,
) -> dict[str, dict[str, Any]]:
  """Runs every contender `samples` times on every problem, all in flight together.

  Returns:
    For each contender: score (mean over problems and samples), interval (95 %, problems
    resampled), pass_at_k, families (mean by family), calls, tokens and USD of a problem and in
    all, and gain_over_seed (paired by problem). Infrastructure failures are left out.
  """

  async def one(source: WorkflowSource, problem: Problem, repeat: int) -> _Outcome:
    result = await system.runner(EVAL_REPEAT + repeat).run(source, problem)
    used = (result.calls, result.prompt_tokens, result.completion_tokens)
    if result.failure is not None and result.failure.kind == "infrastructure":
      return _Outcome(math.nan, None, *used)
    if result.answer is None:
      return _Outcome(0.0, None, *used)
    grade = await system.task.grade(problem, result.answer)
    return _Outcome(grade.score, grade.answer, *used)

  async def sample(contender: WorkflowSource | Vote, problem: Problem, i: int) -> _Outcome:
    if isinstance(contender, WorkflowSource):
      outcome = await one(contender, problem, i)
    else:
      repeats = range(i * contender.votes, (i + 1) * contender.votes)
      answers = await asyncio.gather(*(one(contender.source, problem, r) for r in repeats))
      outcome = voted(answers)
    shown.advance()
    return outcome

  with track("test split", len(contenders) * len(problems) * samples) as shown:
    jobs = [sample(c, p, i) for c in contenders.values() for p in problems for i in range(samples)]
    done = iter(await asyncio.gather(*jobs))
  rows, scores = {}, {}
  for name in contenders:
    outcomes_QS = [[next(done) for _ in range(samples)] for _ in problems]
    scores[name] = np.array([[o.score for o in row] for row in outcomes_QS])
    rows[name] = _figures(scores[name], problems, system.config)
    rows[name] |= _costs([o for row in outcomes_QS for o in row], system.config)
  for name in rows.keys() - {"seed"} if "seed" in rows else ():
    rows[name]["gain_over_seed"] = _gain(scores["seed"], scores[name], system.config)
  return rows


def voted(outcomes: Sequence[_Outcome]) -> _Outcome:
  """The first of those with the most frequent answer; its cost is that of all.

  Failed and empty answers do not vote while there are others; of equally frequent answers the
  earliest wins.
  """
  ballots = [_ballot(o.answer or "") for o in outcomes]
  counts = collections.Counter(b for b in ballots if b)
  best = counts.most_common(1)[0][0] if counts else ""
  chosen = outcomes[ballots.index(best)]
  score = math.nan if any(math.isnan(o.score) for o in outcomes) else chosen.score
  sums = (
    sum(getattr(o, name) for o in outcomes)
    for name in ("calls", "prompt_tokens", "completion_tokens")
  )
  return _Outcome(score, chosen.answer, *sums)


def _ballot(answer: str) -> str:
  """What equal answers share: the number, where it is one; else the words."""
  number = None if any(map(str.isalpha, answer)) else parse_quantity(answer)
  if number is not None:
    return f"{number.value}{'%' * number.percent}"
  return " ".join(answer.split()).casefold()


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


def _costs(outcomes: Sequence[_Outcome], config: ConfigDict) -> dict[str, Any]:
  """What the answers took: per answered problem, and in all."""
  names = ("calls", "prompt_tokens", "completion_tokens")
  sums = {name: sum(getattr(o, name) for o in outcomes) for name in names}
  cost = price((sums["prompt_tokens"], sums["completion_tokens"]), config.executor.prices)
  return {
    **sums,
    "calls_per_problem": sums["calls"] / len(outcomes),
    "tokens_per_problem": (sums["prompt_tokens"] + sums["completion_tokens"]) / len(outcomes),
    "cost_usd": round(cost, 6),
    "cost_usd_per_problem": round(cost / len(outcomes), 9),
    "not_measured": sum(math.isnan(o.score) for o in outcomes),
  }


def _gain(seed_QS: np.ndarray, score_QS: np.ndarray, config: ConfigDict) -> dict[str, Any]:
  """Mean difference to the seed workflow and its interval, paired by problem."""
  before, after = (
    {str(i): row.tolist() for i, row in enumerate(scores)} for scores in (seed_QS, score_QS)
  )
  mean, low, high = paired_bootstrap(before, after, n=config.eval.bootstrap, seed=config.seed)
  return {"mean": mean, "interval": [low, high]}


def table(figures: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """The contenders side by side, a line each."""
  ks = sorted({int(k) for row in figures.values() for k in row["pass_at_k"]})
  head = ["contender", "score", "95 % interval", *(f"pass@{k}" for k in ks)]
  rows = [[*head, "calls", "tokens", "USD"]]
  for name, row in figures.items():
    low, high = row["interval"]
    passed = [f"{row['pass_at_k'][str(k)]:.3f}" if str(k) in row["pass_at_k"] else "" for k in ks]
    rows.append(
      [
        name,
        f"{row['score']:.3f}",
        f"{low:.3f} to {high:.3f}",
        *passed,
        f"{row['calls_per_problem']:.1f}",
        f"{row['tokens_per_problem']:.0f}",
        f"{row['cost_usd_per_problem']:.6f}",
      ]
    )
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  lines = [
    "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
  ]
  return [*lines, "calls, tokens and USD are those of one problem"]


def chain_of_thought(question_type: str) -> WorkflowSource:
  """One call that is told to think step by step."""
  operator, signature, call, field = _steps(question_type)
  body = f"""        solution = await self.solve({call})
        return solution['{field}'], {_USAGE}"""
  return WorkflowSource(_graph(operator, signature, "", body), STEPS_PROMPT)


def self_consistency(question_type: str, votes: int) -> WorkflowSource | Vote:
  """Chain of thought, `votes` times, then the most frequent answer (arXiv:2203.11171).

  Programs are hardly ever equal: for code the model picks one of them, as AFlow's ensemble does.
  """
  if question_type != "code":
    return Vote(chain_of_thought(question_type), votes)
  operator, signature, call, field = _steps(question_type)
  more = "        self.sc_ensemble = operator.ScEnsemble(self.llm)\n"
  body = f"""        solutions = []
        for _ in range({votes}):
            solution = await self.solve({call})
            solutions.append(solution['{field}'])
        solution = await self.sc_ensemble(solutions=solutions, problem=problem)
        return solution['response'], {_USAGE}"""
  return WorkflowSource(_graph(operator, signature, more, body), STEPS_PROMPT)


def _steps(question_type: str) -> tuple[str, str, str, str]:
  """Operator that answers, signature of __call__, arguments and field of the operator's call."""
  if question_type == "qa":  # graded word by word: the answer comes without its steps
    return "AnswerGenerate", "problem: str", "input=problem", "answer"
  steps = "instruction=prompt_custom.STEPS_PROMPT"
  if question_type == "code":
    call = f"problem=problem, entry_point=entry_point, {steps}"
    return "CustomCodeGenerate", "problem: str, entry_point: str", call, "response"
  return "Custom", "problem: str", f"input=problem, {steps}", "response"


def _graph(operator: str, signature: str, more: str, body: str) -> str:
  return f"""class Workflow:
    def __init__(self, name: str, llm_config, dataset: DatasetType) -> None:
        self.name = name
        self.dataset = dataset
        self.llm = create_llm_instance(llm_config)
        self.solve = operator.{operator}(self.llm)
{more}
    async def __call__(self, {signature}):
{body}"""


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
