"""Staged against full evaluation, by replay of what real searches proposed.

  python tests/replay.py --collect=DIR       runs the shipped model; goes on where it was ended
  python tests/replay.py --pack=DIR --matrix=FILE.json.gz    the complete blocks as one file
  python tests/replay.py --replay --matrix=FILE.json.gz --seeds=200
  python tests/replay.py --live=DIR --seeds=3 --rounds=4 --parents=4    real searches, both ways

The matrix holds the outcome and the generated tokens of every program on every problem. A replayed
search is `awf.search.mcts.MCTSOptimizer` as it is: its parents, stages, rewards and choices; only
the two models are replaced, the policy by a draw from what was proposed for the same parent (from
all proposals when there are fewer than a group), workflows by a look into the matrix. Each seed is
searched twice with equal rounds: staged (a smoke run, a common subset for each proposal, the best
of a round in full) and full (every proposal that passes the static check on all problems). The last
line is JSON: test scores of the two choices, their difference with its interval, executor tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gzip
import json
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from awf.config_io import load_config  # noqa: E402
from awf.search.config import SearchConfig  # noqa: E402
from awf.search.mcts import MCTSOptimizer  # noqa: E402
from awf.search.stages import key_of  # noqa: E402
from awf.tasks.stats import bootstrap_interval  # noqa: E402
from awf.types import Completion, Failure, Grade, Problem, WorkflowResult, WorkflowSource  # noqa: E402

RIGHT, WRONG, EMPTY, FAILED = "1", "0", "e", "f"  # outcome of a program on a problem
LOSS, SHARE = -0.02, 0.4  # what staging may lose of the test score, and cost of the tokens


@dataclasses.dataclass(frozen=True)
class Matrix:
  """Outcomes of programs on problems.

  Attributes:
    validation, test: ids of the problems; the outcomes have them in this order.
    starts: keys of the roots, the seed first.
    proposals: parent's key -> keys of what was proposed for it, "" for what cannot be run.
    programs: key -> graph, prompt, outcomes (a character a problem), tokens.
  """

  validation: tuple[str, ...]
  test: tuple[str, ...]
  starts: tuple[str, ...]
  proposals: dict[str, list[str]]
  programs: dict[str, dict[str, Any]]

  def source(self, key: str) -> WorkflowSource:
    return WorkflowSource(self.programs[key]["graph"], self.programs[key]["prompt"])

  def score(self, key: str, problems: Sequence[str]) -> float:
    """Share of these problems that a program solves."""
    place = {id: i for i, id in enumerate((*self.validation, *self.test))}
    outcomes = self.programs[key]["outcomes"]
    return statistics.fmean(outcomes[place[id]] == RIGHT for id in problems)


def pack(folder: Path) -> dict[str, Any]:
  """The matrix of a collection as JSON: all blocks that every program has."""
  found = json.loads((folder / "searches.json").read_text(encoding="utf-8"))
  rows = [json.loads(x) for x in (folder / "matrix.jsonl").read_text().splitlines()]
  cells = {(row["key"], row["block"]): row for row in rows}
  keys = list(found["programs"])
  blocks = 0
  while all((key, blocks) in cells for key in keys):
    blocks += 1
  if not blocks:
    raise SystemExit(f"{folder}: no block of problems is complete yet: go on with --collect")
  ids, is_test = [], []
  for block in range(blocks):
    part = cells[keys[0], block]["problems"]
    ids += part
    is_test += [i >= len(part) // 2 for i in range(len(part))]
  order = [i for i, test in enumerate(is_test) if not test]
  order += [i for i, test in enumerate(is_test) if test]
  programs = {}
  for key in keys:
    outcomes = "".join(cells[key, block]["outcomes"] for block in range(blocks))
    tokens = [t for block in range(blocks) for t in cells[key, block]["tokens"]]
    graph, prompt = found["programs"][key]
    programs[key] = {
      "graph": graph, "prompt": prompt, "outcomes": "".join(outcomes[i] for i in order),
      "tokens": [tokens[i] for i in order],
    }  # fmt: skip
  return {
    "validation": [ids[i] for i in order if not is_test[i]],
    "test": [ids[i] for i in order if is_test[i]],
    "starts": found["starts"],
    "proposals": found["proposals"],
    "programs": programs,
  }


def load(file: Path) -> Matrix:
  data = json.loads(gzip.decompress(file.read_bytes()))
  proposals: dict[str, list[str]] = {}
  for parent, child in data["proposals"]:
    proposals.setdefault(parent, []).append(child)
  return Matrix(
    tuple(data["validation"]), tuple(data["test"]), tuple(data["starts"]), proposals,
    data["programs"],
  )  # fmt: skip


class Replayed:
  """Runner, grader and policy of one search, out of a matrix; counts the tokens of what is run."""

  def __init__(self, matrix: Matrix):
    self._matrix = matrix
    self._place = {id: i for i, id in enumerate(matrix.validation)}
    self._all = [key for keys in matrix.proposals.values() for key in keys]
    self._keys = {text_of(matrix.source(key)): key for key in matrix.programs}
    self.tokens = self.runs = 0

  async def run(self, source: WorkflowSource, problem: Problem) -> WorkflowResult:
    program, place = self._matrix.programs[key_of(source)], self._place[problem.id]
    outcome, tokens = program["outcomes"][place], program["tokens"][place]
    self.tokens, self.runs = self.tokens + tokens, self.runs + 1
    if outcome == FAILED:
      return WorkflowResult(None, Failure("crash", "recorded"), completion_tokens=tokens)
    answer = "" if outcome == EMPTY else outcome
    return WorkflowResult(answer, None, completion_tokens=tokens)

  async def grade(self, problem: Problem, response: str) -> Grade:
    is_right = response == RIGHT
    return Grade(float(is_right), is_right, response)

  async def propose(self, messages: list[dict[str, str]], n: int, key: int) -> list[Completion]:
    graph, prompt = (
      re.findall(rf"<{tag}>\n(.*?)\n</{tag}>", messages[-1]["content"], re.DOTALL)[-1]
      for tag in ("graph", "prompt")
    )
    parent = self._keys.get(text_of(WorkflowSource(graph, prompt)), "")
    pool = self._matrix.proposals.get(parent, [])
    pool = pool if len(pool) >= n else self._all
    rng = random.Random(key)
    return [self._completion(rng.choice(pool)) for _ in range(n)]

  def _completion(self, key: str) -> Completion:
    text = "no proposal"
    if key:
      source = self._matrix.source(key)
      text = f"<modification>{key}</modification>\n<graph>\n{source.graph}\n</graph>\n"
      text += f"<prompt>\n{source.prompt}\n</prompt>"
    return Completion((0,), (0,), (0.0,), text, "stop")


def text_of(source: WorkflowSource) -> str:
  return f"{source.graph.strip()}\n{source.prompt.strip()}"


def settings(matrix: Matrix, is_full: bool, **fields: Any) -> SearchConfig:
  """The quickstart's search on the matrix's problems: staged as it is, or all of it in full."""
  config = load_config("configs/quickstart.py")
  count = len(matrix.validation)
  subset = max(4, round(count * config.search.subset_problems / config.search.full_problems))
  stages = {"subset_problems": subset, "full_problems": count, **fields}
  if is_full:
    stages |= {"smoke_problems": 0, "subset_problems": count, "full_top": 0}
  return SearchConfig.from_config(
    {**config.search, **stages},
    config.reward,
    group_size=config.grpo.group_size,
    dataset="NANO",
    question_type="math",
  )


def search(matrix: Matrix, config: SearchConfig, seed: int) -> dict[str, Any]:
  """One replayed search: the program that it chooses, its scores, and what was run."""
  replayed = Replayed(matrix)
  # The quickstart's ids are FAMILY-SPLIT-NUMBER.
  problems = [Problem(id, id, "1", family=id.split("-")[0]) for id in matrix.validation]
  with tempfile.TemporaryDirectory() as folder:
    optimizer = MCTSOptimizer(
      config, replayed, replayed, replayed.propose, problems, folder, seed,
      starts=[matrix.source(key) for key in matrix.starts[1:]],
      root=matrix.source(matrix.starts[0]),
    )  # fmt: skip
    optimizer.workspace.is_kept = False

    async def rounds() -> None:
      while not optimizer.why_done():
        await optimizer.round()

    asyncio.run(rounds())
    best = optimizer.best()
  key = best.canonical
  return {
    "key": key, "validation": best.score, "test": matrix.score(key, matrix.test),
    "tokens": replayed.tokens, "runs": replayed.runs, "nodes": len(optimizer.tree.nodes),
  }  # fmt: skip


def compare(matrix: Matrix, seeds: Sequence[int], **fields: Any) -> dict[str, Any]:
  """Searches every seed with staged and with full evaluation.

  Returns:
    Means of both, the difference of the chosen workflows' test scores with its 95 % interval, and
    the share of the executor's tokens (and runs) that staging takes.
  """
  found: dict[str, list[dict[str, Any]]] = {"staged": [], "full": []}
  for seed in seeds:
    for name, rows in found.items():
      rows.append(search(matrix, settings(matrix, name == "full", **fields), seed))
  gains = [a["test"] - b["test"] for a, b in zip(found["staged"], found["full"], strict=True)]
  low, high = bootstrap_interval(gains, n=4000)
  total = {
    name: {what: sum(row[what] for row in rows) for what in ("tokens", "runs")}
    for name, rows in found.items()
  }
  share = {what: total["staged"][what] / total["full"][what] for what in ("tokens", "runs")}
  return {
    "seeds": len(gains),
    "programs": len(matrix.programs), "problems": [len(matrix.validation), len(matrix.test)],
    "test_score_seed": matrix.score(matrix.starts[0], matrix.test),
    **{f"test_score_{n}": statistics.fmean(r["test"] for r in rows) for n, rows in found.items()},
    "difference": statistics.fmean(gains), "interval": [low, high],
    "token_share": share["tokens"], "run_share": share["runs"],
    "holds": low > LOSS and share["tokens"] <= SHARE,
  }  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(description="staged against full evaluation, by replay")
  parser.add_argument("--collect", type=Path, help="folder of a collection, new or to go on with")
  parser.add_argument("--pack", type=Path, help="folder of a collection")
  parser.add_argument("--replay", action="store_true")
  parser.add_argument("--live", type=Path, help="folder of real searches, new or to go on with")
  parser.add_argument("--matrix", type=Path, help="file of a packed matrix")
  parser.add_argument("--children", type=int, default=300)
  parser.add_argument("--starts", type=int, default=24)
  parser.add_argument("--blocks", type=int, default=10)
  parser.add_argument("--seeds", type=int, default=200)
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--parents", type=int, default=8)
  parser.add_argument("--problems", type=int, default=90, help="of a full evaluation, live")
  parser.add_argument("--full-top", type=int, default=1, help="of a round in full, when staged")
  args = parser.parse_args()
  if args.collect:
    from replay_collect import collect

    collect(args.collect, args.children, args.starts, args.blocks, seeds=2)
  if args.pack:
    text = json.dumps(pack(args.pack), separators=(",", ":"))
    args.matrix.write_bytes(gzip.compress(text.encode(), mtime=0))
  if args.live:
    from replay_collect import live

    searches = {"rounds": args.rounds, "parents": args.parents, "full_top": args.full_top}
    live(args.live, range(args.seeds), searches, args.problems)
  if args.replay:
    seeds = range(args.seeds)
    searches = {"rounds": args.rounds, "parents": args.parents, "full_top": args.full_top}
    result = compare(load(args.matrix), seeds, **searches)
    print(json.dumps(result))
    return 0 if result["holds"] else 1
  return 0


if __name__ == "__main__":
  sys.exit(main())
