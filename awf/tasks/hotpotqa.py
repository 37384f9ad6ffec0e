"""HotpotQA: questions over several paragraphs; the answer is a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from awf.tasks.base import DatasetEvaluator, id_field, text_field
from awf.tasks.download import Source
from awf.tasks.spans import short_answer, token_f1
from awf.types import Grade, Problem

_HOME = "http://curtis.ml.cmu.edu/datasets/hotpot"


class HotpotQAEvaluator(DatasetEvaluator):
  """Fields: question, answer, context (a list of [title, sentences]; AFlow's file is the official
  one, sampled).

  The score is the official F1, `correct` the exact match. When a response has an `<answer>` tag,
  nothing else of it counts; else all of it is the answer, as in AFlow.
  """

  name = "hotpotqa"
  dataset = "HotpotQA"
  question_type = "qa"
  sources = {"all": Source(f"{_HOME}/hotpot_dev_distractor_v1.json")}

  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    question, context = text_field(row, "question"), _context(row.get("context"))
    return Problem(
      id=id_field(row, f"{self.name}-{index}", "_id"),
      prompt=f"Context: {context}\n\nQuestion: {question}\n\nAnswer:",
      answer=text_field(row, "answer"),
      family=str(row.get("type") or ""),
      hidden={"question": question, "context": context},
    )

  async def grade(self, problem: Problem, response: str) -> Grade:
    answer = short_answer(response)
    score, exact = token_f1(answer, problem.answer)
    return Grade(score, exact, answer[:200], "" if exact else "not the expected words")


def _context(value: Any) -> str:
  """The paragraphs, a line each, with their sentences joined; titles are left out, as in AFlow.

  The form of the hub's copy, {title: [...], sentences: [[...]]}, is read too.
  """
  paragraphs = value.get("sentences") if isinstance(value, dict) else value
  if isinstance(paragraphs, list) and not isinstance(value, dict):
    paragraphs = [one[1] for one in paragraphs if isinstance(one, list) and len(one) == 2]
  if not isinstance(paragraphs, list) or not paragraphs:
    raise ValueError(f"expected 'context' as a list of [title, sentences], got {str(value)[:40]!r}")
  if not all(isinstance(p, list) and all(isinstance(s, str) for s in p) for p in paragraphs):
    raise ValueError("expected the sentences of 'context' to be lists of texts")
  return "\n".join(" ".join(paragraph) for paragraph in paragraphs)
