"""DROP: reading with counting, sorting and sums; answers are numbers, dates or spans of text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from awf.tasks.base import DatasetEvaluator, id_field, text_field
from awf.tasks.download import Source
from awf.tasks.spans import drop_f1, short_answer
from awf.types import Grade, Problem

_HOME = "https://openaipublic.blob.core.windows.net/simple-evals"
_DATE = ("day", "month", "year")


class DROPEvaluator(DatasetEvaluator):
  """Fields of AFlow's files: context (passage and question), ref_text (answers between pipes); or
  of the public data set: passage, question and answers_spans, or answer and validated_answers.

  The score is the official F1, the best over all annotators; `correct` is the exact match. Several
  spans stand between pipes, in AFlow's answers as in a response: they are aligned with the expected
  ones, so a list of guesses loses what it adds. When a response has an `<answer>` tag, nothing else
  of it counts.
  """

  name = "drop"
  dataset = "DROP"
  question_type = "qa"
  sources = {
    "validation": Source(f"{_HOME}/drop_v0_train.jsonl.gz"),
    "test": Source(f"{_HOME}/drop_v0_dev.jsonl.gz"),
  }

  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    if "context" in row:
      prompt, answers = text_field(row, "context"), _references(text_field(row, "ref_text"))
    else:
      passage, question = text_field(row, "passage"), text_field(row, "question")
      prompt, answers = f"Passage: {passage}\nQuestion: {question}\nAnswer:", _annotated(row)
    if not answers:
      raise ValueError("expected an answer in 'ref_text', 'answers_spans' or 'answer'")
    return Problem(
      id=id_field(row, f"{self.name}-{index}", "query_id"), prompt=prompt, answer=answers
    )

  async def grade(self, problem: Problem, response: str) -> Grade:
    answer = short_answer(response)
    spans = _spans(answer)
    graded = [drop_f1(spans, expected) for expected in problem.answer]
    score, exact = max(f1 for f1, _ in graded), any(exact for _, exact in graded)
    return Grade(score, exact, answer[:200], "" if exact else "not the expected answer")


def _spans(text: str) -> list[str]:
  return [part.strip() for part in text.split("|") if part.strip()]


def _references(text: str) -> list[list[str]]:
  """Every part of AFlow's `ref_text` is an answer; all its different parts together are one too.

  The file does not say whether its pipes stand between annotators or between spans.
  """
  return _each_and_all(_spans(text))


def _each_and_all(parts: Sequence[str]) -> list[list[str]]:
  parts = list(dict.fromkeys(parts))
  return [[part] for part in parts] + ([parts] if len(parts) > 1 else [])


def _annotated(row: Mapping[str, Any]) -> list[list[str]]:
  """The answers of all annotators, each a list of spans.

  The hub's `answers_spans` is one flat list over all annotators, so it is read as `ref_text` is.
  """
  found = row.get("answers_spans")
  if isinstance(found, dict):
    spans = found.get("spans")
    if not isinstance(spans, Sequence) or isinstance(spans, str):
      return []
    return _each_and_all([text for text in map(str, spans) if text.strip()])
  validated = row.get("validated_answers")
  answers = [row.get("answer"), *(validated if isinstance(validated, list) else [])]
  return [spans for spans in map(_official, answers) if spans]


def _official(answer: Any) -> list[str]:
  """One annotator's {number, date, spans}; the first that is not empty."""
  if not isinstance(answer, dict):
    return []
  number, spans, date = (answer.get(name) for name in ("number", "spans", "date"))
  if number not in (None, ""):
    return [str(number)]
  if isinstance(spans, list) and spans:
    return [str(span) for span in spans]
  parts = [str(date.get(name) or "") for name in _DATE] if isinstance(date, dict) else []
  text = re.sub(r"\s+", " ", " ".join(parts)).strip()
  return [text] if text else []
