"""A small world for the search's tests: only the two models are scripted, all else is real."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Callable, Sequence

from awf.search.config import SearchConfig
from awf.search.mcts import MCTSOptimizer
from awf.tasks.aime import AIMEEvaluator
from awf.types import Completion, Problem, SamplingParams, WorkflowSource
from awf.workflow.contract import seed_source
from awf.workflow.runner import WorkflowRunner

SEED = seed_source("math")
PROBLEMS = tuple(
  Problem(id=f"p{i}", prompt=f"What is {40 + i} + {13 * i}?", answer=str(40 + 14 * i))
  for i in range(1, 13)
)


class Executor:
  """A weak adder: right in a third of its answers, always right when it is asked for steps.

  `jitter` answers in a random order, as a busy sampler does; `broken`: prompts that raise;
  `by_text`: luck depends on the prompt alone, not on the request's key.
  """

  def __init__(
    self,
    jitter: random.Random | None = None,
    broken: str = "",
    wrong: bool = False,
    by_text: bool = False,
  ):
    self.jitter, self.broken, self.wrong = jitter, broken, wrong
    self.by_text = by_text
    self.asked: list[str] = []
    self.on_call: Callable[[int], None] = lambda count: None

  async def complete(self, messages, sampling, key, adapter=0):
    text = messages[-1]["content"]
    self.asked.append(text)
    count = len(self.asked)
    for _ in range(self.jitter.randrange(40) if self.jitter else 3):
      await asyncio.sleep(0)
    self.on_call(count)  # once for every count, however many calls overlap
    if self.broken and self.broken in text:
      raise ConnectionError("the model is gone")
    a, b = map(int, re.search(r"(\d+) \+ (\d+)", text).groups())
    luck = random.Random(text if self.by_text else key).random() < 0.33
    right = ("steps" in text or luck) and not self.wrong and "Be silent" not in text
    answer = "" if "Say nothing" in text else f"<answer>{a + b if right else a}</answer>"
    return Completion((1, 2, 3), (4, 5), (-0.1, -0.2), answer, "stop")


def workflow(instruction: str) -> WorkflowSource:
  """The seed with an instruction."""
  graph = SEED.graph.replace('instruction=""', "instruction=prompt_custom.SOLVE")
  return WorkflowSource(graph, f'SOLVE = """{instruction}\n"""')


def body(line: str) -> WorkflowSource:
  """The seed with one more line before its call."""
  return WorkflowSource(
    SEED.graph.replace("        solution =", f"        {line}\n        solution ="), SEED.prompt
  )


def reply(modification: str, source: WorkflowSource) -> str:
  return (
    f"<modification>{modification}</modification>\n<graph>\n{source.graph}\n</graph>\n"
    f"<prompt>\n{source.prompt}\n</prompt>"
  )


REPLIES = (
  "I would rather talk about something else.",
  reply("Copy it.", SEED),
  reply("Use an unknown prompt.", WorkflowSource(workflow("x").graph, "")),
  reply("Divide by zero.", body("1 / 0")),
  reply("Ask for steps.", workflow("Work in steps.")),
  reply("Ask for haste.", workflow("Answer now.")),
  reply("Ask for silence.", workflow("Say nothing.")),
)


def scripted(replies: Sequence[str] = REPLIES, seen: list | None = None) -> Callable:
  """A policy that draws its replies by the request's key alone."""

  async def proposer(messages, n, key):
    if seen is not None:
      seen.append(messages[-1]["content"])
    rng = random.Random(key)
    texts = [rng.choice(replies) for _ in range(n)]
    return [Completion((7, 8), (len(t), 0), (-1.0, -0.5), t, "stop") for t in texts]

  return proposer


def in_order(replies: Sequence[str], seen: list | None = None) -> Callable:
  """A policy whose group is these replies, one each."""

  async def proposer(messages, n, key):
    if seen is not None:
      seen.append(messages[-1]["content"])
    return [
      Completion((7, 8), (9, 0), (-1.0, -0.5), replies[i % len(replies)], "stop") for i in range(n)
    ]

  return proposer


def make_search(
  sandbox, path, proposer, executor=None, *, seed=3, starts=(), problems=PROBLEMS, **fields
):
  """A search of AIME type in this world."""
  fields = {"group_size": 4, "parents": 2, "subset_problems": 4, "prompt": "compact", **fields}
  runner = WorkflowRunner(
    sandbox,
    executor or Executor(),
    SamplingParams(),
    seed=seed,
    dataset="AIME",
    question_type="math",
  )
  config = SearchConfig("AIME", "math", **fields)
  return MCTSOptimizer(
    config, runner, AIMEEvaluator(), proposer, problems, path, seed, starts=starts
  )


def run_rounds(search: MCTSOptimizer, count: int):
  """Runs rounds one after the other; returns their results."""

  async def go():
    return [await search.round() for _ in range(count)]

  return asyncio.run(go())
