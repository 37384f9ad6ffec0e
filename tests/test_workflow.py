"""Workflows in the real sandbox: contract, determinism, sharing, typed failures."""

import ast
import asyncio
import json

import pytest
from scripted import (
  COST,
  PROBLEM,
  SEED,
  ScriptedLLM,
  answer,
  failure,
  make_runner,
  new_sandbox,
  run,
  script,
  source,
)

from awf.types import LLM, Problem, UserError, WorkflowSource, price, stable_hash
from awf.workflow import contract, prompts
from awf.workflow.canonical import canonical
from awf.workflow.runner import Shared


@pytest.fixture(scope="module")
def sandbox():
  with new_sandbox() as one:
    yield one


# The contract.


def test_scripted_llm_has_the_real_interface():
  assert isinstance(ScriptedLLM(""), LLM)


def test_seed_answers_with_the_reply(sandbox):
  llm = script("The answer is 42.")
  result = run(sandbox, llm, SEED, system="Be brief.")
  assert (result.answer, result.failure) == ("The answer is 42.", None)
  assert (result.calls, result.prompt_tokens, result.completion_tokens) == (1, 3, 4)
  assert llm.requests[0][0] == [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 6*7?"},
  ]


def test_graph_with_aflows_header_runs_unmodified(sandbox):
  text = source(
    "s = await self.custom(input=problem, instruction=prompt_custom.SOLVE)\n"
    "assert DatasetType and Literal['a', 'b']\n"
    f"return s['response'], {COST}",
    prompt='SOLVE = """Think.\n"""',
  )
  whole = WorkflowSource(contract.graph_header("MATH", 12) + text.graph, text.prompt)
  llm = script("done")
  assert run(sandbox, llm, whole).answer == "done"
  assert llm.prompts == ["Think.\nWhat is 6*7?"]


@pytest.mark.parametrize(
  "line",
  [
    "from workspace.MATH.workflows.template import operator",
    "from workspace.MATH.workflows.template.operator import Custom",
    "import workspace.MATH.workflows.template.operator",
    "import scripts.operators as operator",
    "import math, re, json, statistics, collections.abc",
    "from collections import Counter, defaultdict",
  ],
)
def test_imports_that_work(sandbox, line):
  whole = WorkflowSource(f"{line}\n\n{SEED.graph}", "")
  assert run(sandbox, script("done"), whole).answer == "done"


@pytest.mark.parametrize("line", ["import os", "from subprocess import run", "import scripts.evil"])
def test_other_imports_are_a_policy_failure(sandbox, line):
  result = run(sandbox, script("done"), WorkflowSource(f"{line}\n\n{SEED.graph}", ""))
  assert (
    result.failure.kind == "policy" and "is not allowed in a workflow" in result.failure.message
  )


def test_code_workflows_get_the_entry_point_and_livecodebench_the_id(sandbox):
  problem = Problem("q/7", "Add.", entry_point="add")
  body = "return entry_point + question_id, 0.0"
  three = source(body, "", "problem, entry_point, question_id")
  result = run(sandbox, script(""), three, problem, kind="code", dataset="LiveCodeBench")
  assert result.answer == "addq/7"
  seed = contract.seed_source("code")
  llm = script("Here:\n```python\ndef add(a, b):\n  return a + b\n```\nThat is it.")
  result = run(sandbox, llm, seed, problem, kind="code", dataset="HumanEval")
  assert result.answer == "def add(a, b):\n  return a + b"
  assert llm.prompts == [prompts.code_generate("Add.", "add", "")]


def test_usage_summary_has_aflows_keys(sandbox):
  body = (
    "await self.llm(problem)\nawait self.custom(problem, 'x')\n"
    "s = self.llm.get_usage_summary()\n"
    "return str(sorted(s)) + str(s['total_tokens']) + str(sorted(s['history'][0])), s['total_cost']"
  )
  text = answer(sandbox, script("a b"), body)
  keys = ["call_count", "history", "total_cost", "total_input_tokens", "total_output_tokens"]
  assert text.startswith(str([*keys, "total_tokens"]) + "10")
  assert "'input_cost', 'input_tokens', 'model'" in text


def test_a_workflow_is_told_what_its_calls_cost(sandbox):
  body = (
    "await self.llm(problem)\n"
    "s = self.llm.get_usage_summary()\n"
    "return str([s['total_cost'], s['history'][0]['output_cost'], s['history'][0]['prices']]), 0.0"
  )
  told = run(sandbox, script("a b"), source(body), prices=(150.0, 600.0))
  total, output, prices = ast.literal_eval(told.answer)
  assert told.completion_tokens and output == pytest.approx(told.completion_tokens * 600.0 / 1e6)
  assert total == pytest.approx(price((told.prompt_tokens, told.completion_tokens), (150.0, 600.0)))
  assert prices == {"input_price": 0.15, "output_price": 0.6}  # of a thousand tokens, as AFlow's


def test_what_the_parent_knows_stays_there(sandbox, monkeypatch):
  jobs = []
  real = sandbox.run

  def spy(job, handler=None):
    jobs.append(job)
    return real(job, handler)

  monkeypatch.setattr(sandbox, "run", spy)
  run(sandbox, script("done"), SEED)
  assert len(jobs) == 1 and "SECRET" not in json.dumps(jobs[0].payload)


# Determinism and sharing.

THREE = source(
  "found = await asyncio.gather(*[self.custom(problem, 'x') for _ in range(3)])\n"
  f"return ' '.join(s['response'] for s in found), {COST}"
)
THREE = WorkflowSource("import asyncio\n" + THREE.graph, "")


def test_keys_are_hashes_of_what_is_asked(sandbox):
  llm = ScriptedLLM(lambda prompt, key: str(key))
  result = run(sandbox, llm, THREE, seed=5)
  messages = [{"role": "user", "content": "xWhat is 6*7?"}]
  keys = [stable_hash(5, canonical(THREE), "p1", messages, k) for k in range(3)]
  assert result.answer == " ".join(map(str, keys))
  other = run(sandbox, ScriptedLLM(lambda prompt, key: str(key)), THREE, seed=6)
  assert set(other.answer.split()).isdisjoint(result.answer.split())


def test_results_do_not_depend_on_the_timing_of_replies(sandbox):
  body = (
    "import asyncio, random\n"
    "order = []\n"
    "async def one(i):\n"
    "    s = await self.custom(problem, str(i % 2))\n"
    "    order.append((i, random.random(), s['response'][:3]))\n"
    "await asyncio.gather(*[one(i) for i in range(6)])\n"
    "try:\n"
    "    await asyncio.wait_for(self.custom(problem, 'slow'), timeout=0.001)\n"
    "    order.append('in time')\n"
    "except asyncio.TimeoutError:\n"
    "    order.append('late')\n"
    f"return str(order), {COST}"
  )
  answers = set()
  for delays in ((), (0.03, 0.0, 0.01), (0.0, 0.02)):
    llm = ScriptedLLM(lambda prompt, key: str(key), delays=delays)
    runner = make_runner(sandbox, llm, concurrency=2)
    problems = [Problem(str(i), f"Problem {i}") for i in range(3)]

    async def all_of(runner=runner, problems=problems):
      return await asyncio.gather(*[runner.run(source(body), one) for one in problems])

    answers.add(tuple(result.answer for result in asyncio.run(all_of())))
  assert len(answers) == 1 and "in time" in str(answers)


def test_equal_workflows_run_once_also_in_flight(sandbox):
  llm = ScriptedLLM("done", delays=(0.02,))
  runner = make_runner(sandbox, llm, concurrency=1)
  other = WorkflowSource(SEED.graph.replace("solution", "s") + "\n# comment", "UNUSED = 'x'")
  further = WorkflowSource(SEED.graph.replace('""', '"x"'), "")

  async def three():
    return await asyncio.gather(*[runner.run(one, PROBLEM) for one in (SEED, other, further)])

  first, second, third = asyncio.run(three())
  assert first == second == third and len(llm.requests) == 2
  assert asyncio.run(runner.run(SEED, PROBLEM)) == first  # another loop, the same runner
  stats = runner.stats()
  assert (stats["jobs"], stats["cached_results"], stats["llm_calls"]) == (2, 2, 2)


def test_greedy_calls_are_answered_once(sandbox):
  llm = ScriptedLLM("done", delays=(0.01,))
  runner = make_runner(sandbox, llm, temperature=0.0)
  results = [asyncio.run(runner.run(one, PROBLEM)) for one in (THREE, SEED)]
  assert [one.answer for one in results] == ["done done done", "done"]
  assert results[0].calls == 3 and len(llm.requests) == 2
  assert llm.requests[0][1] == stable_hash(llm.requests[0][0])
  assert runner.stats()["cached_calls"] == 2


def test_shared_work_survives_a_waiter_that_leaves():
  started = []

  async def both():
    shared = Shared(lambda value: True)

    async def work():
      started.append(1)
      await asyncio.sleep(0.02)
      return "value"

    first, second = (asyncio.ensure_future(shared.get("k", work)) for _ in range(2))
    await asyncio.sleep(0.005)
    first.cancel()
    assert await second == "value" and await shared.get("k", work) == "value"
    alone = asyncio.ensure_future(shared.get("other", work))
    await asyncio.sleep(0.005)
    alone.cancel()
    await asyncio.sleep(0.03)
    return len(asyncio.all_tasks())

  assert asyncio.run(both()) == 1 and len(started) == 2


# Failures.

FAILING = {
  "crash": ("return str([1][3]), 0.0", "crash", "IndexError"),
  "assertion": ("assert problem == ''", "crash", "AssertionError"),
  "exit": ("raise SystemExit(0)", "crash", "SystemExit"),
  "single value": ("return 'x'", "format", "expected the pair"),
  "nothing": ("pass", "format", "NoneType, expected the pair"),
  "three values": ("return 1, 2, 3", "format", "returned 3 values"),
  "none as the answer": ("return None, 0.0", "format", "answer of type NoneType"),
  "dict as the answer": ("return await self.custom(problem, ''), 0.0", "format", "type dict"),
  "long answer": ("return 'x' * 50_000, 0.0", "format", "50000 characters"),
  "surrogate": ("return chr(0xD800), 0.0", "format", "surrogate"),
  "call that never ends": ("import asyncio\nawait asyncio.Future()", "timeout", "deadlock"),
  "endless calls": ("while True:\n    await self.custom(problem, '')", "policy", "20 calls"),
  "wrong argument": ("return await self.llm(3), 0.0", "crash", "TypeError"),
  "operator without model": ("operator.Custom(None)", "format", r"operator.Custom(self.llm)"),
  "unknown method": ("await self.llm.session.call('read', {})", "policy", "no operator makes"),
  "forged messages": (
    "await self.llm.session.call('llm', {'messages': [{'role': 'tool', 'content': ''}]})",
    "policy",
    "no operator makes",
  ),
  "forged infrastructure": (
    "raise type('E', (Exception,), {})('infrastructure')",
    "crash",
    "infrastructure",
  ),
}


@pytest.mark.parametrize("name", FAILING)
def test_failures_are_typed(sandbox, name):
  body, kind, message = FAILING[name]
  found = failure(sandbox, script("x"), body)
  assert found.kind == kind and message in found.message, found


def test_endless_loop_is_a_timeout(sandbox):
  assert failure(sandbox, script("x"), "while True:\n    pass").kind == "timeout"


def test_what_a_clock_decided_is_not_run_again_after_a_resume(sandbox):
  """A limit of time may fall another way on another day: checkpoints keep such results."""
  endless, quick = source("while True:\n    pass"), source(f"return 'x', {COST}")
  first = make_runner(sandbox, script("x"))
  want = asyncio.run(first.run(endless, PROBLEM))
  asyncio.run(first.run(quick, PROBLEM))
  state = json.loads(json.dumps(first.state_dict()))
  assert len(state["results"]) == 1 and state["programs"] == []
  resumed = make_runner(sandbox, script("x"))
  resumed.load_state_dict(state)
  assert asyncio.run(resumed.run(endless, PROBLEM)) == want
  assert resumed.stats()["jobs"] == 0


def test_messages_do_not_tell_local_names(sandbox):
  bodies = [f"if not problem:\n    {name} = 1\nreturn {name}, 0.0" for name in ("first", "second")]
  one, two = (source(body) for body in bodies)
  assert canonical(one) == canonical(two)
  assert run(sandbox, script("x"), one) == run(sandbox, script("x"), two)


@pytest.mark.parametrize(
  "bad",
  [
    WorkflowSource("class Workflow(:", ""),
    WorkflowSource("x = 1", ""),
    WorkflowSource(SEED.graph, "A = = 1"),
    WorkflowSource(SEED.graph + "\n# \ud800", ""),
    WorkflowSource(SEED.graph + "#" * 20_000, ""),
    WorkflowSource(SEED.graph + "\0", ""),
  ],
)
def test_broken_sources_are_format_failures(sandbox, bad):
  assert run(sandbox, script("x"), bad).failure.kind == "format"


def test_refused_prompt_is_a_format_failure(sandbox):
  found = run(sandbox, ScriptedLLM("", finish="refused"), SEED).failure
  assert found.kind == "format" and "3 tokens does not fit" in found.message


class FlakyLLM(ScriptedLLM):
  """Fails the first n times."""

  def __init__(self, failures, error=OSError):
    super().__init__("done")
    self.failures, self.error = failures, error

  async def complete(self, *args, **kwargs):
    if self.failures:
      self.failures -= 1
      raise self.error("connection lost")
    return await super().complete(*args, **kwargs)


def test_infrastructure_failures_are_tried_again_and_never_kept(sandbox):
  assert run(sandbox, FlakyLLM(1), SEED).answer == "done"
  runner = make_runner(sandbox, FlakyLLM(2))
  found = asyncio.run(runner.run(SEED, PROBLEM)).failure
  assert found.kind == "infrastructure" and "connection lost" in found.message
  assert asyncio.run(runner.run(SEED, PROBLEM)).answer == "done"
  assert runner.stats()["infrastructure"] == 2


def test_a_workflow_cannot_hide_an_infrastructure_failure(sandbox):
  body = (
    "try:\n    s = await self.custom(problem, '')\n"
    "except Exception:\n    s = {'response': 'guess'}\n"
    f"return s['response'], {COST}"
  )
  found = failure(sandbox, FlakyLLM(2), body)
  assert found.kind == "infrastructure"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_mistakes_of_the_user_come_through(sandbox, temperature):
  with pytest.raises(UserError, match="connection lost"):
    run(sandbox, FlakyLLM(9, UserError), SEED, temperature=temperature)


def test_user_mistakes_at_construction(sandbox):
  with pytest.raises(UserError, match="config.task.name"):
    make_runner(sandbox, script("x"), kind="poetry")
  with pytest.raises(UserError, match="config.executor.concurrency"):
    make_runner(sandbox, script("x"), concurrency=0)
