"""The operators that workflows call, as AFlow's templates define them; they run inside the sandbox.

Source: FoundationAgents/AFlow, `workspace/*/workflows/template/operator.py` and
  `scripts/operators.py` for names, signatures and result keys. Where those are broken (Programmer,
  a malformed letter in ScEnsemble) this works instead.
"""

from __future__ import annotations

import textwrap
from typing import Any

from awf.workflow import prompts
from awf.workflow.client import ModelClient, client_of
from awf.workflow.extract import choice_letter, code_of, normal_answer, tag

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

  async def _fields(self, prompt: str, names: tuple[str, ...]) -> tuple[dict[str, str | None], str]:
    """Asks for tags, once more when one is missing; returns the fields and the last reply."""
    fields: dict[str, str | None] = {}
    text = ""
    for _ in range(2):
      text = await self.llm(prompt)
      fields = {name: tag(text, name) for name in names}
      if None not in fields.values():
        break
    return fields, text


class Custom(Operator):
  """The model's raw reply to the instruction followed by the input."""

  async def __call__(self, input: str, instruction: str) -> dict[str, Any]:
    """Returns "response"."""
    return {"response": await self.llm(prompts.custom(str(instruction), str(input)))}


class AnswerGenerate(Operator):
  """Steps, then a short answer."""

  async def __call__(self, input: str) -> dict[str, Any]:
    """Returns "thought" and "answer"; a reply without tags counts as the answer."""
    fields, text = await self._fields(prompts.answer_generate(str(input)), ("thought", "answer"))
    answer = fields["answer"]
    return {
      "thought": fields["thought"] or "",
      "answer": text.strip() if answer is None else answer,
    }


class CustomCodeGenerate(Operator):
  """Code that defines the entry point."""

  async def __call__(self, problem: str, entry_point: str, instruction: str) -> dict[str, Any]:
    """Returns "response": the code without fences."""
    prompt = prompts.code_generate(str(problem), str(entry_point), str(instruction))
    return {"response": code_of(await self.llm(prompt))}


class ScEnsemble(Operator):
  """Self-consistency: the most frequent answer wins, the model decides ties."""

  async def __call__(self, solutions: list[str], problem: str = "") -> dict[str, Any]:
    """Returns "response": the first solution that has the chosen answer.

    Answers are compared by `normal_answer`; empty ones do not count. The model is asked only when
    several answers are equally frequent; a reply without a valid letter means the first of them.
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
    reply = await self.llm(prompts.sc_ensemble(tied, str(problem)))
    return {"response": tied[choice_letter(reply, len(tied)) or 0]}


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
    for snippet in self.llm.session.public_tests:
      tests = snippet
      if "def check(" not in snippet:
        tests = "def check(candidate):\n" + textwrap.indent(snippet, "    ")
      reply = await self.llm.session.call(
        "test", {"solution": solution, "tests": tests, "entry_point": entry_point}
      )
      if not reply["passed"]:
        return reply["error"][:FEEDBACK_CHARS] or "a test fails"
    return ""


class Review(Operator):
  """Lets the model judge a solution."""

  async def __call__(self, problem: str, solution: str, mode: str | None = None) -> dict[str, Any]:
    """Returns "review_result" ("false", or "true" when the reply does not say so), "feedback"."""
    del mode
    prompt = prompts.review(str(problem), str(solution))
    fields, text = await self._fields(prompt, ("review_result", "feedback"))
    verdict = (fields["review_result"] or "").lower()
    feedback = fields["feedback"]
    return {
      "review_result": "false" if "false" in verdict else "true",
      "feedback": text.strip() if feedback is None else feedback,
    }


class Revise(Operator):
  """Lets the model correct a solution by the feedback."""

  async def __call__(
    self, problem: str, solution: str, feedback: str, mode: str | None = None
  ) -> dict[str, Any]:
    """Returns "solution"; a reply without the tag counts as the solution."""
    del mode
    prompt = prompts.revise(str(problem), str(solution), str(feedback))
    fields, text = await self._fields(prompt, ("solution",))
    revised = fields["solution"]
    return {"solution": text.strip() if revised is None else revised}


CLASSES: tuple[type[Operator], ...] = (
  Custom,
  AnswerGenerate,
  CustomCodeGenerate,
  ScEnsemble,
  Programmer,
  Test,
  Review,
  Revise,
)
