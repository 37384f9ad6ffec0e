"""Measures the nano model for its card: `python -m data.nano.card [--model=DIR] [--problems=110]
[--markdown]`.

Fresh problems (the reserved "card" set), the operators' own prompts, temperature 1. Prints a table
and one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import pathlib
import re

from awf.sandbox import Job, Sandbox, SandboxConfig
from awf.types import SamplingParams, WorkflowSource, stable_hash
from data.nano import corpus, families, proposals

HERE = pathlib.Path(__file__).parent
VOTES = 5
METHODS = (
  "terse",
  "steps",
  "careful",
  "vote",
  "program",
  "program_then_steps",
  "program_then_vote",
)


def answer_of(text: str) -> str | None:
  """The tagged answer, whole; anything else is wrong."""
  found = re.findall(r"<answer>(-?\d+)</answer>", text)
  return found[-1] if found else None


def majority(answers: list[str | None]) -> str | None:
  """The most frequent answer; on a tie the first (ScEnsemble would ask the model)."""
  counts = collections.Counter(a for a in answers if a is not None)
  return counts.most_common(1)[0][0] if counts else None


async def measure_problems(policy, sandbox: Sandbox, items: list[families.Item]) -> dict:
  """Share of correct answers by method and family."""
  from awf.workflow import prompts

  sampling = SamplingParams(1.0, max_new_tokens=160)

  async def ask(text: str, *key) -> str:
    message = [{"role": "user", "content": text}]
    return (await policy.complete(message, sampling, stable_hash("card", *key))).text

  async def one(item: families.Item) -> dict[str, bool]:
    async def call(kind: str, i: int) -> str | None:
      phrase = (
        proposals.INSTRUCTIONS[kind][i % len(proposals.INSTRUCTIONS[kind])] + "\n" if kind else ""
      )
      return answer_of(await ask(phrase + item.question, kind, i, item.question))

    async def run_program() -> str | None:
      text = await ask(prompts.programmer(item.question), "program", item.question)
      code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
      if code is None:
        return None
      job = Job(
        "awf.sandbox.program:run_program",
        {"source": code.group(1), "function": "solve", "args": []},
      )
      value = (await sandbox.run(job)).value
      return str(value["value"]) if value and value["value"] is not None else None

    terse, careful, program, *steps = await asyncio.gather(
      call("", 0), call("careful", 0), run_program(), *(call("steps", i) for i in range(VOTES))
    )
    right = str(item.answer)
    vote = majority(steps)
    return {
      "terse": terse == right, "steps": steps[0] == right, "careful": careful == right,
      "vote": vote == right, "program": program == right,
      "program_then_steps": (program or steps[0]) == right,
      "program_then_vote": (program or vote) == right,
    }  # fmt: skip

  results = await asyncio.gather(*(one(item) for item in items))
  table: dict[str, dict[str, float]] = {m: {} for m in METHODS}
  for family in [*families.FAMILIES, "all"]:
    rows = [r for item, r in zip(items, results, strict=True) if family in (item.family, "all")]
    for method in METHODS:
      table[method][family] = sum(r[method] for r in rows) / len(rows)
  return table


async def measure_proposals(policy, parents: list[WorkflowSource], per_parent: int) -> dict:
  """Validity, copies, variety and agreement of proposals with the adapter off."""
  from awf.search.compact import compact_prompt
  from awf.search.propose import parse_reply
  from awf.types import Failure
  from awf.workflow.contract import OPERATORS_BY_TYPE
  from awf.workflow.static import canonical, static_check

  sampling = SamplingParams(1.0, max_new_tokens=320)
  total = valid = copies = agree = read = 0
  distinct = []
  for p, parent in enumerate(parents):
    message = [{"role": "user", "content": compact_prompt(parent, 0.4)}]
    texts = await asyncio.gather(
      *(policy.complete(message, sampling, stable_hash("card", p, i)) for i in range(per_parent))
    )
    programs = set()
    for text in texts:
      total += 1
      edit = parse_reply(text.text)
      if isinstance(edit, Failure) or static_check(edit.source, OPERATORS_BY_TYPE["math"]):
        continue
      valid += 1
      copies += canonical(edit.source) == canonical(parent)
      programs.add(canonical(edit.source))
      before, after = proposals.read_state(parent), proposals.read_state(edit.source)
      read += after is not None
      agree += (
        after is not None
        and before is not None
        and proposals.agrees(edit.modification, before, after)
      )
    distinct.append(len(programs))
  return {
    "valid": valid / total, "copies": copies / total,
    "different_in_64": sum(distinct) / len(distinct),
    "of_known_form": read / max(1, valid), "description_agrees": agree / max(1, valid),
  }  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--model", type=pathlib.Path, default=HERE / "model")
  parser.add_argument("--problems", type=int, default=110, help="per family, at most 110")
  parser.add_argument("--parents", type=int, default=8)
  args = parser.parse_args()
  with Sandbox(SandboxConfig()) as sandbox:
    from awf.policy import QwenPolicy
    from awf.search.config import load_starts
    from awf.workflow.contract import seed_source
    from configs.quickstart import get_config

    config = get_config()
    config.model.path = str(args.model)
    policy = QwenPolicy.from_config(config)
    items = corpus.problem_sets()["card"]
    items = [
      i for f in families.FAMILIES for i in [x for x in items if x.family == f][: args.problems]
    ]
    table = asyncio.run(measure_problems(policy, sandbox, items))
    names = [*families.FAMILIES, "all"]
    print(f"| method | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for method, row in table.items():
      print(f"| {method} | " + " | ".join(f"{100 * row[f]:.0f}" for f in names) + " |")
    parents = [seed_source("math"), *load_starts(str(HERE / "parents.jsonl"))[: args.parents - 1]]
    shares = asyncio.run(measure_proposals(policy, parents, 64)) if args.parents else {}
    print(json.dumps({"abilities": table, "proposals": shares, "problems": len(items)}))
    policy.close()


if __name__ == "__main__":
  main()
