"""Real searches for tests/replay.py: an outcome matrix of what they proposed; staged beside full.

`--collect`: programs that real searches proposed, each run on every problem. The searches are the
quickstart's (frozen policy, its parents, start workflows and stages); every different program that
passes the static check is then run on all problems of the matrix, validation and test alike.

`--live`: the same search twice, staged as the quickstart's and with every proposal in full.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from awf.config_io import ROOT, load_config, resolve_paths
from awf.search.config import load_starts
from awf.search.propose import Edit, parse_reply
from awf.search.stages import check, key_of
from awf.system import System
from awf.types import Problem, WorkflowSource
from awf.workdir import Workdir

AT_ONCE = 64  # programs that are run at the same time
RIGHT, WRONG, EMPTY, FAILED = "1", "0", "e", "f"  # outcome of a program on a problem
FULL = {"smoke_problems": 0, "full_top": 0}  # every proposal on all problems at once


def collect(folder: Path, children: int, starts: int, blocks: int, seeds: int) -> None:
  """Runs the searches and fills the matrix; a second call goes on where the first one ended.

  Args:
    folder: gets `searches.json` and `matrix.jsonl`: a line for a program and a block of problems.
    children: least number of different programs that are proposed.
    starts: start workflows of the searches.
    blocks: of problems, one validation and one test problem of each family; the programs are run on
      one block after the other, so that the first ones are complete whenever it is ended.
    seeds: searches that the rounds are spread over.
  """
  folder.mkdir(parents=True, exist_ok=True)
  lines = (ROOT / "data/nano/starts.jsonl").read_text(encoding="utf-8").splitlines()
  file = folder / "starts.jsonl"
  file.write_text("\n".join(random.Random(0).sample(lines, starts)) + "\n", encoding="utf-8")
  config = load_config("configs/quickstart.py")
  config.search.starts = str(file)
  # Cheap rounds: what is proposed is wanted of them, and how good it is comes later.
  config.search.smoke_problems, config.search.subset_problems = 2, 4
  config.search.full_problems = 9
  config.sandbox.wall_seconds = 600.0  # a machine with other work must not decide an outcome
  with Workdir(folder / "run") as workdir:
    workdir.open(config, "search")
    with System(resolve_paths(config), workdir) as system:
      asyncio.run(_collect(system, folder, children, blocks, seeds))


async def _collect(system: System, folder: Path, children: int, blocks: int, seeds: int) -> None:
  file = folder / "searches.json"
  if not file.exists():
    found = await _search(system, children, seeds)
    file.write_text(json.dumps(found), encoding="utf-8")
  found = json.loads(file.read_text(encoding="utf-8"))
  matrix = folder / "matrix.jsonl"
  rows = [json.loads(x) for x in matrix.read_text().splitlines()] if matrix.exists() else []
  done = {(row["key"], row["block"]) for row in rows}
  families = len({p.family for p in system.validation})
  splits = [_in_turns(split) for split in (system.search_problems, system.test)]
  for block in range(blocks):
    part = slice(block * families, (block + 1) * families)
    problems = [p for split in splits for p in split[part]]
    left = [(k, s) for k, s in found["programs"].items() if (k, block) not in done]
    for start in range(0, len(left), AT_ONCE):
      batch = left[start : start + AT_ONCE]
      made = await asyncio.gather(*(_row(system, key, s, problems) for key, s in batch))
      with open(matrix, "a", encoding="utf-8") as out:
        out.writelines(json.dumps({**row, "block": block}) + "\n" for row in made)
      print(f"block {block}: {start + len(batch)} of {len(left)} programs", flush=True)


def live(
  folder: Path, seeds: Sequence[int], searches: dict[str, int], problems: int
) -> list[dict[str, Any]]:
  """Searches with the shipped model, for each seed staged and in full.

  Args:
    folder: gets a run and a file of results for each; what has its results is not run again.
    seeds: of the runs.
    searches: fields of the staged searches; the full ones differ in their stages alone.
    problems: validation problems of a full evaluation; the common subset is a fifth of them.

  Returns:
    For each search: seed, mode, score of the chosen workflow on all test problems, its score on the
    validation problems, the executor's generated tokens, workflow runs.
  """
  results = []
  for seed in seeds:
    for mode in ("staged", "full"):
      run = folder / f"{mode}_{seed}"
      file = folder / f"{mode}_{seed}.json"
      if not file.exists():
        config = load_config("configs/quickstart.py")
        config.seed = seed
        config.search.update(searches)
        share = config.search.subset_problems / config.search.full_problems
        config.search.full_problems = problems
        config.search.subset_problems = max(4, round(problems * share))
        config.sandbox.wall_seconds = 600.0
        if mode == "full":
          config.search.update(FULL, subset_problems=problems)
        with Workdir(run) as workdir:
          workdir.open(config, "search")
          with System(resolve_paths(config), workdir) as system:
            result = asyncio.run(_live(system))
        file.write_text(json.dumps({"seed": seed, "mode": mode, **result}), encoding="utf-8")
      results.append(json.loads(file.read_text(encoding="utf-8")))
      print(json.dumps(results[-1]), flush=True)
  return results


async def _live(system: System) -> dict[str, Any]:
  search = system.make_search(0)
  while not search.why_done():
    await search.round()
  best, used = search.best(), system.executor_totals()
  cells = await asyncio.gather(*(_cell(system, best.source, p) for p in system.test))
  return {
    "test": sum(outcome == RIGHT for outcome, _ in cells) / len(cells),
    "validation": best.score,
    "tokens": used["completion_tokens"],
    "runs": used["jobs"],
  }


def _in_turns(problems: Sequence[Problem]) -> list[Problem]:
  """One problem of each family after the other."""
  families: dict[str, list[Problem]] = {}
  for problem in problems:
    families.setdefault(problem.family, []).append(problem)
  return [p for turn in zip(*(families[f] for f in sorted(families)), strict=False) for p in turn]


async def _search(system: System, children: int, seeds: int) -> dict[str, Any]:
  """Rounds of `seeds` searches in turns until there are enough programs.

  Returns:
    starts (keys of the roots, the seed first), proposals ([key of the parent, key of the child or
    "" when it does not pass the static check]), programs (key -> graph and prompt).
  """
  searches = [system.make_search(i) for i in range(seeds)]
  roots = [system.seed_source, *load_starts(system.config.search.starts)]
  sources = {key_of(source): source for source in roots}
  starts, proposals = list(sources), []
  while len(sources) < children + len(starts):
    for search in searches:
      result = await search.round()
      for row in result.records:
        parent = search.tree.nodes[row["parent"]]
        edit = parse_reply(row["text"])
        key: Any = ""
        if isinstance(edit, Edit):
          key = check(edit.source, parent, search.config.operators, search.config.is_code)
        if isinstance(edit, Edit) and isinstance(key, str) and key:
          sources.setdefault(key, edit.source)
          proposals.append([parent.canonical, key])
        else:
          proposals.append([parent.canonical, ""])
      print(f"round {search.rounds_done}: {len(sources)} programs", flush=True)
  named = {key: [s.graph, s.prompt] for key, s in sources.items()}
  return {"starts": starts, "proposals": proposals, "programs": named}


async def _row(
  system: System, key: str, texts: list[str], problems: Sequence[Problem]
) -> dict[str, Any]:
  """One program's line of a block: outcome and generated tokens by problem."""
  source = WorkflowSource(*texts)
  cells = await asyncio.gather(*(_cell(system, source, p) for p in problems))
  return {
    "key": key,
    "problems": [p.id for p in problems],
    "outcomes": "".join(outcome for outcome, _ in cells),
    "tokens": [tokens for _, tokens in cells],
  }


async def _cell(system: System, source: WorkflowSource, problem: Problem) -> tuple[str, int]:
  result = await system.runner().run(source, problem)
  if result.failure is not None:
    if result.failure.kind == "infrastructure":
      raise RuntimeError(f"{problem.id}: {result.failure.message}")
    return FAILED, result.completion_tokens
  grade = await system.task.grade(problem, result.answer or "")
  if math.isnan(grade.score):
    raise RuntimeError(f"{problem.id}: {grade.reason}")
  wrong = WRONG if (result.answer or "").strip() else EMPTY
  return (RIGHT if grade.score >= 1.0 else wrong), result.completion_tokens
