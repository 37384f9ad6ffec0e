"""The operators that workflows call, as AFlow's templates define them; they run inside the sandbox.

Source: FoundationAgents/AFlow, `workspace/*/workflows/template/operator.py` and
  `scripts/operators.py` for names, signatures and result keys. Where those are broken (Programmer,
  a malformed letter in ScEnsemble) this works instead.

A reply without the form that was asked for is asked for again, with what it lacked; after that the
workflow fails, with the kind "format".
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

from awf.python_text import code_of
from awf.workflow import prompts
from awf.workflow.client import ModelClient, client_of, malformed
from awf.workflow.extract import choice_letter, normal_answer, tag

T = TypeVar("T")

FORMAT_TRIES = 3
PROGRAM_TRIES = 3
FEEDBACK_CHARS = 300
MAX_CHOICES = 26


class Operator:
  """Base of all operators: holds the model."""

  def __init__(self, llm: ModelClient, name: str = "") -> None:
    self.name = name or type(self).__name__
    self.llm = client_of(llm, type(self).__name__)

  async def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Runs the operator; each subclass has its own arguments and result keys."""
    raise TypeError(f"{type(self).__name__} has no call of its own")

  async def _read(self, prompt: str, read: Callable[[str], T | None], wanted: str) -> T:
    """Asks until `read` finds what is wanted in the reply.

    Raises:
      JobError: kind "format", after `FORMAT_TRIES` replies without it.
    """
    asked = prompt
    for _ in range(FORMAT_TRIES):
      found = read(await self.llm(asked))
      if found is not None:
        return found
      asked = prompts.again(prompt, wanted)
    raise malformed(f"{type(self).__name__}: no {wanted} in {FORMAT_TRIES} replies")

  async def _fields(self, prompt: str, names: tuple[str, ...]) -> dict[str, str]:
    """Asks for tags, until all are there."""

    def read(text: str) -> dict[str, str] | None:
      found = {name: tag(text, name) for name in names}
      whole = {name: value for name, value in found.items() if value is not None}
      return whole if len(whole) == len(names) else None

    return await self._read(prompt, read, " and ".join(f"<{name}>" for name in names))

  async def _choose(self, prompt: str, count: int) -> int:
    """Asks for one of `count` letters; returns its index."""
    wanted = f"letter from A to {chr(64 + count)} in <solution_letter>"
    return await self._read(prompt, lambda text: choice_letter(text, count), wanted)


class Custom(Operator):
  """The model's raw reply to the instruction followed by the input."""

  async def __call__(self, input: str, instruction: str) -> dict[str, Any]:
    """Returns "response"."""
    return {"response": await self.llm(prompts.custom(str(instruction), str(input)))}


class AnswerGenerate(Operator):
  """Steps, then a short answer."""

  async def __call__(self, input: str) -> dict[str, Any]:
    """Returns "thought" and "answer"."""
    return await self._fields(prompts.answer_generate(str(input)), ("thought", "answer"))


class CustomCodeGenerate(Operator):
  """Code that defines the entry point."""

  async def __call__(self, problem: str, entry_point: str, instruction: str) -> dict[str, Any]:
    """Returns "response": the code without fences."""
    prompt = prompts.code_generate(str(problem), str(entry_point), str(instruction))
    return {"response": await self._read(prompt, _some_code, "Python code")}


def _some_code(text: str) -> str | None:
  code = code_of(text)
  return code if code.strip() else None


class ScEnsemble(Operator):
  """Self-consistency: the most frequent answer wins, the model decides ties."""

  async def __call__(self, solutions: list[str], problem: str = "") -> dict[str, Any]:
    """Returns "response": the first solution that has the chosen answer.

    Answers are compared by `normal_answer`; empty ones do not count. The model is asked only when
    several answers are equally frequent.
    """
    texts = ["" if one is None else str(one) for one in solutions]
    first: dict[str, str] = {}
    count: dict[str, int] = {}
    for text in texts:
      answer = normal_answer(text)
      if answer:
        first.setdefault(answer, text)
        count[answer] = count.get(answer, 0) + 1
    if not count:
      return {"response": texts[0] if texts else ""}
    most = max(count.values())
    tied = [first[answer] for answer, n in count.items() if n == most][:MAX_CHOICES]
    if len(tied) == 1:
      return {"response": tied[0]}
    return {
      "response": tied[await self._choose(prompts.sc_ensemble(tied, str(problem)), len(tied))]
    }


class MdEnsemble(Operator):
  """Votes on the solutions in a shuffled order, a new one each time; the majority wins."""

  def __init__(self, llm: ModelClient, name: str = "", vote_count: int = 5) -> None:
    super().__init__(llm, name)
    self.vote_count = int(vote_count)

  async def __call__(
    self, solutions: list[str], problem: str, mode: str | None = None
  ) -> dict[str, Any]:
    """Returns "solution": the one with most votes, the earlier one on a tie. Equal texts are one
    option."""
    del mode
    options = list(dict.fromkeys("" if one is None else str(one) for one in solutions))
    options = options[:MAX_CHOICES]
    if len(options) < 2:
      return {"solution": options[0] if options else ""}
    ballots = (self._vote(options, str(problem), i) for i in range(self.vote_count))
    votes = Counter(await asyncio.gather(*ballots))
    return {"solution": max(options, key=votes.__getitem__)}

  async def _vote(self, options: list[str], problem: str, index: int) -> str:
    order = random.Random(f"{index} {options}").sample(options, len(options))
    return order[await self._choose(prompts.md_ensemble(order, problem), len(order))]


class Programmer(Operator):
  """Writes a program, runs it in a sandbox job of its own, repairs it when it fails."""

  async def __call__(self, problem: str, analysis: str = "None") -> dict[str, Any]:
    """Returns "code", "output" (text of the value; "" for None or after failures), "error"."""
    code = error = ""
    for _ in range(PROGRAM_TRIES):
      prompt = prompts.programmer(str(problem), str(analysis), error)
      code = code_of(await self.llm(prompt))
      reply = await self.llm.session.call("program", {"source": code, "function": "solve"})
      if reply["failure"] is None:
        return {"code": code, "output": "" if reply["none"] else reply["text"], "error": ""}
      error = reply["failure"]["message"][:FEEDBACK_CHARS]
    return {"code": code, "output": "", "error": error}


class Test(Operator):
  """Runs the public tests on a solution and lets the model repair it."""

  __test__ = False  # not a test class, whatever collects this module

  async def __call__(
    self, problem: str, solution: str, entry_point: str, test_loop: int = 3, question_id: str = ""
  ) -> dict[str, Any]:
    """Returns "result" (the last solution passes; True without public tests), "solution"."""
    del question_id  # the problem's public tests came with the job
    solution = code_of(str(solution))
    for _ in range(int(test_loop)):
      failure = await self._failure(solution, str(entry_point))
      if not failure:
        return {"result": True, "solution": solution}
      reply = await self.llm(prompts.reflect_on_test(str(problem), solution, failure))
      solution = code_of(reply)
    return {"result": not await self._failure(solution, str(entry_point)), "solution": solution}

  async def _failure(self, solution: str, entry_point: str) -> str:
    """One line on the first public test that fails, "" when all pass."""
    for tests in self.llm.session.tests_of(entry_point):
      reply = await self.llm.session.call(
        "test", {"solution": solution, "tests": tests, "entry_point": entry_point}
      )
      if not reply["passed"]:
        return reply["error"][:FEEDBACK_CHARS] or "a test fails"
    return ""


class Format(Operator):
  """Lets the model take the short answer out of a solution."""

  async def __call__(self, problem: str, solution: str, mode: str | None = None) -> dict[str, Any]:
    """Returns "response"."""
    del mode
    return {"response": (await self.llm(prompts.short_answer(str(problem), str(solution)))).strip()}


class Review(Operator):
  """Lets the model judge a solution."""

  async def __call__(self, problem: str, solution: str, mode: str | None = None) -> dict[str, Any]:
    """Returns "review_result" ("true" or "false") and "feedback"."""
    del mode

    def read(text: str) -> dict[str, Any] | None:
      verdict, feedback = tag(text, "review_result"), tag(text, "feedback")
      word = (verdict or "").strip(" .").lower()
      if word not in ("true", "false") or feedback is None:
        return None
      return {"review_result": word, "feedback": feedback}

    prompt = prompts.review(str(problem), str(solution))
    return await self._read(prompt, read, "<review_result> of true or false and <feedback>")


class Revise(Operator):
  """Lets the model correct a solution by the feedback."""

  async def __call__(
    self, problem: str, solution: str, feedback: str, mode: str | None = None
  ) -> dict[str, Any]:
    """Returns "solution"."""
    del mode
    prompt = prompts.revise(str(problem), str(solution), str(feedback))
    return await self._fields(prompt, ("solution",))


CLASSES: tuple[type[Operator], ...] = (
  Custom,
  AnswerGenerate,
  CustomCodeGenerate,
  ScEnsemble,
  MdEnsemble,
  Programmer,
  Test,
  Format,
  Review,
  Revise,
)
