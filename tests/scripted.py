"""A scripted model behind the real LLM interface, and short ways to run workflows with it."""

import asyncio

from awf.sandbox import Sandbox, SandboxConfig
from awf.types import Completion, Problem, SamplingParams, WorkflowSource
from awf.workflow import contract
from awf.workflow.runner import WorkflowRunner

COST = 'self.llm.get_usage_summary()["total_cost"]'
PROBLEM = Problem("p1", "What is 6*7?", answer="SECRET-4711", hidden={"tests": "SECRET-4712"})
SEED = contract.seed_source("math")


class ScriptedLLM:
  """Answers by a function of prompt and key; notes every request."""

  def __init__(self, reply, finish="stop", delays=()):
    self.reply, self.finish, self.delays = reply, finish, list(delays)
    self.requests = []

  async def complete(self, messages, sampling, key, adapter=0):
    assert adapter == 0 and isinstance(sampling, SamplingParams)
    self.requests.append((messages, key))
    if self.delays:
      await asyncio.sleep(self.delays[len(self.requests) % len(self.delays)])
    text = self.reply(messages[-1]["content"], key) if callable(self.reply) else self.reply
    ids = tuple(range(len(text.split())))
    return Completion((1, 2, 3), ids, (0.0,) * len(ids), text, self.finish)

  @property
  def prompts(self):
    return [messages[-1]["content"] for messages, _ in self.requests]


def script(*replies):
  """Replies in the order of asking; the last one again and again."""
  left = list(replies)
  return ScriptedLLM(lambda prompt, key: left.pop(0) if len(left) > 1 else left[0])


def new_sandbox():
  """A sandbox with small budgets that runs workflows."""
  config = SandboxConfig(cpu_seconds=1.0, wall_seconds=10.0, max_calls=20, preload_numeric=False)
  return Sandbox(config, preload=contract.PRELOAD)


def make_runner(sandbox, llm, kind="math", temperature=1.0, **options):
  sampling = SamplingParams(temperature=temperature)
  name = {"dataset": "MATH", "question_type": kind}
  return WorkflowRunner(sandbox, llm, sampling, **{**name, **options})


def source(body, prompt="", arguments="problem: str"):
  """A workflow with most operators built and this body of `__call__`."""
  head = SEED.graph.partition("\n\n    async")[0]
  for name in ("AnswerGenerate", "CustomCodeGenerate", "ScEnsemble", "Programmer", "Test"):
    head += f"\n        self.{contract.OPERATORS[name].attribute} = operator.{name}(self.llm)"
  lines = "".join(f"\n        {line}" for line in body.splitlines())
  return WorkflowSource(f"{head}\n\n    async def __call__(self, {arguments}):{lines}\n", prompt)


def run(sandbox, llm, workflow, problem=PROBLEM, **options):
  return asyncio.run(make_runner(sandbox, llm, **options).run(workflow, problem))


def answer(sandbox, llm, body, **options):
  """The answer of a workflow that must work."""
  result = run(sandbox, llm, source(body), **options)
  assert result.failure is None, result.failure
  return result.answer


def failure(sandbox, llm, body, **options):
  """The failure of a workflow that must fail."""
  result = run(sandbox, llm, source(body), **options)
  assert result.answer is None
  return result.failure
