"""NumericComparisonValidator: finds the answer in a response and compares it exactly."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import Callable
from fractions import Fraction

from awf.tasks import quantities
from awf.tasks.latex import NO_END, LatexComparer
from awf.types import Grade, UserError

MAX_RESPONSE_CHARS = 100_000  # only the end of a longer response is read
MAX_LINE_CHARS = 2_000  # only the end of a longer line is searched for numbers
MAX_ANSWER_CHARS = 200  # of the answer kept in a grade
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL | re.IGNORECASE)
_BOX = re.compile(r"\\f?boxed\s*(?=\{)|\\boxed\s+(?=[-0-9])")
_MARKER = re.compile(
  r"(?:answer(?:\s+is)?|result(?:\s+is)?|total(?:\s+is)?|equals|####|=|≈)\s*:?\s*(?=[-+0-9.])",
  re.IGNORECASE,
)
_CONCLUSION = re.compile(r"\banswer(?:\s+is)?\s*:?\s+(?=\S)|\banswer:", re.IGNORECASE)
_MATH_SPAN = re.compile(
  r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL
)
_MATH = re.compile(r"\\|[\^()*/+=!-]|\b(?:pi|sqrt)\b")


@dataclasses.dataclass(frozen=True)
class Extraction:
  """What a strategy took for the answer. `whole`: the text must be the answer and nothing else."""

  text: str
  strategy: str
  whole: bool


def _from_tag(text: str) -> Extraction | None:
  contents = _TAG.findall(text)
  if not contents:
    return None
  answer = re.sub(r"</?answer>", "", contents[-1], flags=re.IGNORECASE).strip()
  boxed = _from_box(answer)
  return Extraction(boxed.text if boxed else answer, "tag", True)


def _from_box(text: str) -> Extraction | None:
  """The last box; braces may nest. A box that is never closed reaches to the end of its line."""
  starts = [match.end() for match in _BOX.finditer(text)]
  if not starts:
    return None
  rest = text[starts[-1] :]
  if not rest.startswith("{"):
    return Extraction(rest.split()[0].rstrip(".,$"), "boxed", True)
  depth = 0
  for i, sign in enumerate(rest):
    depth += (sign == "{") - (sign == "}")
    if depth == 0:
      return Extraction(rest[1:i].strip(), "boxed", True)
  return Extraction(rest[1:].partition("\n")[0].strip(), "boxed", True)


def last_box(text: str) -> str:
  """The content of the last `\\boxed{}` of a text, "" without one."""
  found = _from_box(text)
  return found.text if found else ""


def _from_conclusion(text: str) -> Extraction | None:
  """What stands behind `answer is` or `answer:` in the last line, else the last formula of it."""
  lines = [line.strip(" \t*`_") for line in text.splitlines() if line.strip(" \t*`_.$")]
  if not lines:
    return None
  line = _end(lines[-1])
  announced = list(_CONCLUSION.finditer(line))
  rest = line[announced[-1].end() :] if announced else line
  spans = [next(filter(None, groups)) for groups in _MATH_SPAN.findall(rest)]
  if not announced and not spans:
    return None
  answer = spans[-1] if spans else rest
  return Extraction(answer.strip(" \t*`_").rstrip(".").strip(), "conclusion", True)


def _from_last_line(text: str) -> Extraction | None:
  """The number behind `answer is`, `=`, `####` ... in the last line, or the only number there."""
  lines = [line for line in text.splitlines() if line.strip(" \t*`.$")]
  if not lines:
    return None
  line = quantities.clean(_end(lines[-1]), is_prose=True)
  found = list(quantities.find_numbers(line))
  marked = None
  for marker in _MARKER.finditer(line):
    marked = next((q for q in found if q.start >= marker.end()), marked)
  chosen = marked or (found[0] if len(found) == 1 else None)
  return chosen and Extraction(line[chosen.start : chosen.end], "last_line", False)


def _end(line: str) -> str:
  """The end of a long line, from a blank on, so that no number is cut."""
  if len(line) <= MAX_LINE_CHARS:
    return line
  return line[-MAX_LINE_CHARS:].partition(" ")[2]


def _from_last_number(text: str) -> Extraction | None:
  for line in reversed(text.splitlines()):
    cleaned = quantities.clean(_end(line), is_prose=True)
    found = list(quantities.find_numbers(cleaned))
    if found:
      return Extraction(cleaned[found[-1].start : found[-1].end], "last_number", False)
  return None


STRATEGIES: dict[str, Callable[[str], Extraction | None]] = {
  "tag": _from_tag,
  "boxed": _from_box,
  "conclusion": _from_conclusion,
  "last_line": _from_last_line,
  "last_number": _from_last_number,
}
DEFAULT_STRATEGIES = ("tag", "boxed", "last_line", "last_number")


class NumericComparisonValidator:
  """Extracts an answer by strategies in order, then compares it with the expected one.

  When an `<answer>` tag or a box is there, nothing else in the response counts, and it must hold
  one answer: a tag with two numbers is wrong. Numbers compare as exact fractions; what is no plain
  number goes to math-verify in a helper process.

  Args:
    strategies: names out of `STRATEGIES`, tried in this order.
    tolerance: largest absolute difference between numbers that still counts as equal; 0 is exact.
    latex: compare expressions symbolically; False leaves numbers and equal texts.
    seconds: limit of one symbolic comparison.

  Raises:
    UserError: unknown strategy, none at all, or a negative tolerance.
  """

  def __init__(
    self,
    strategies: tuple[str, ...] = DEFAULT_STRATEGIES,
    tolerance: float | Fraction = 0,
    latex: bool = True,
    seconds: float = 5.0,
  ):
    unknown = [name for name in strategies if name not in STRATEGIES]
    if unknown or not strategies:
      raise UserError(
        f"unknown answer strategies {unknown}: expected one or more of {tuple(STRATEGIES)}"
      )
    if tolerance < 0:
      raise UserError(f"expected a tolerance of at least 0, got {tolerance}")
    self.strategies = tuple(strategies)
    self.tolerance = Fraction(tolerance)
    self._latex = LatexComparer(seconds) if latex else None

  def extract(self, response: str) -> Extraction | None:
    """The answer by the first strategy that finds one, or None."""
    text = response[-MAX_RESPONSE_CHARS:]
    for name in self.strategies:
      found = STRATEGIES[name](text)
      if found is not None:
        return found
    return None

  def compare(self, answer: str, expected: str) -> tuple[bool, str]:
    """Compares two short answers: (equal, reason). The reason never names the expected answer."""
    simple = self._compare_simply(answer, expected)
    return simple if simple is not None else self._compare_symbolically(answer, expected)

  def validate(self, response: str, expected: str | int | float | Fraction) -> Grade:
    """Grades a whole response; may wait up to `seconds` for a symbolic comparison."""
    found = self.extract(response)
    if found is None:
      return Grade(0.0, False, "", "no answer found in the response")
    return self._grade(found, *self.compare(found.text, str(expected)))

  async def grade(self, response: str, expected: str | int | float | Fraction) -> Grade:
    """As `validate`, without holding up the event loop."""
    found = self.extract(response)
    if found is None:
      return Grade(0.0, False, "", "no answer found in the response")
    outcome = self._compare_simply(found.text, str(expected))
    if outcome is None:
      outcome = await asyncio.to_thread(self._compare_symbolically, found.text, str(expected))
    return self._grade(found, *outcome)

  def close(self) -> None:
    """Ends the helper process, if one was started."""
    if self._latex is not None:
      self._latex.close()

  def _compare_simply(self, answer: str, expected: str) -> tuple[bool, str] | None:
    """Numbers and equal texts; None when only algebra can tell."""
    if not answer.strip():
      return False, "empty answer"
    ours, theirs = quantities.parse_quantity(answer), quantities.parse_quantity(expected)
    if ours is not None and theirs is not None:
      equal = quantities.same_quantity(ours, theirs) or (
        ours.percent == theirs.percent and abs(ours.value - theirs.value) <= self.tolerance
      )
      return equal, "" if equal else "wrong number"
    ours_plain, theirs_plain = _plain(answer), _plain(expected)
    if ours_plain == theirs_plain:
      return True, ""
    if theirs is None and ours_plain == theirs_plain.replace(", ", ","):
      return True, ""  # a list of two, of which the answer makes 1,200
    lists = ours is None and theirs is None and "," in answer and "," in expected
    if self._latex is None or not (
      lists or _MATH.search(answer) or (theirs is None and _MATH.search(expected))
    ):
      reason = "not one number" if ours is None and theirs is not None else "wrong answer"
      return False, reason
    return None

  def _compare_symbolically(self, answer: str, expected: str) -> tuple[bool, str]:
    assert self._latex is not None
    equal, reason = self._latex.equal(answer.strip().strip("$"), expected.strip().strip("$"))
    return equal, "" if equal else reason or "wrong answer"

  @staticmethod
  def _grade(found: Extraction, equal: bool, reason: str) -> Grade:
    failure = "timeout" if reason == NO_END else None
    return Grade(float(equal), equal, found.text[:MAX_ANSWER_CHARS], reason, failure)


def _plain(text: str) -> str:
  """Text for a literal comparison: case, blanks, dollar signs and a final stop do not matter."""
  return re.sub(r"\s+", " ", quantities.clean(text)).strip().rstrip(".").casefold()
