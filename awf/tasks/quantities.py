"""Reads numbers out of prose and LaTeX as exact fractions; no floating point anywhere."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction

MAX_DIGITS = 400  # longer numerals are not numbers; bounds the cost of exact arithmetic
MAX_EXPONENT = 400
MAX_CHARS = 1_000  # of a text that may be one number
_WINDOW = 40  # characters before a number that can belong to it
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
# Symbols that may follow a number as its unit; any other single letter is read as a variable.
_UNIT_LETTERS = frozenset("mgshLlNJWVACKFTkMGdcHzΩ")
_FUNCTION_WORDS = frozenset("pi sqrt sin cos tan log ln exp mod choose plus minus".split())
_VULGAR = {
  "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5", "⅗": "3/5",
  "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8", "⅞": "7/8",
}  # fmt: skip
_CHARACTERS = str.maketrans(
  {
    **{chr(0xFF10 + i): str(i) for i in range(10)},
    **dict.fromkeys("−–‐‑﹣－", "-"),
    **dict.fromkeys("\u00a0\u2009\u200a\u202f\u3000~", " "),
    **dict.fromkeys("\u200b\u2060\ufeff$€£¥", ""),
    "\u2044": "/",
    "％": "%",
    "°": " deg ",
    "²": "^2",
    "³": "^3",
  }
)
_THOUSANDS = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9])"
_LATEX = (
  # Commas that are spelt as thousands stay so inside brackets, where a plain one separates.
  (re.compile(r"(?<=[0-9])(?:\{,\}|,\\!)(?=[0-9]{3}(?![0-9]))"), ""),
  (
    re.compile(rf"(?<=[(\[])\s?\\?[$€£¥]\s?{_THOUSANDS}"),
    lambda match: match.group().replace(",", ""),
  ),
  (re.compile(r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lr]?|!|,)(?![A-Za-z])"), ""),
  (re.compile(r"\\(?:left|right)(?=[A-Za-z])"), ""),
  (re.compile(r"\\(?:quad|qquad|;|:| )"), " "),
  (re.compile(r"\{,\}"), ","),
  (re.compile(r"(?<=[A-Za-z])\\?[$€£¥](?=\s?[0-9.])"), " "),  # US$5
  (re.compile(r"\\\$"), ""),
  (re.compile(r"\\%"), "%"),
  (re.compile(r"\^\s*(?:\{\s*)?\\(?:circ|degree)\s*\}?|\\degree"), " deg "),
  (re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|textit)\s*\{([^{}]*)\}"), r" \1 "),
  (re.compile(r"(?<=[0-9])\s*\\[dtc]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r" \1/\2"),
  (re.compile(r"\\[dtc]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r"\1/\2"),
  (re.compile(r"(?<=[0-9])\s*\\[dtc]?frac\s*([0-9])\s*([0-9])(?![0-9])"), r" \1/\2"),
  (re.compile(r"\\[dtc]?frac\s*([0-9])\s*([0-9])(?![0-9])"), r"\1/\2"),
  (re.compile(r"\\(?:times|cdot)(?![A-Za-z])"), "×"),
  (re.compile(r"([\^_])\{([0-9]+)\}"), r"\1\2"),
  (re.compile(r"(?<![0-9])[0-9]{4}-[0-9]{2}-[0-9]{2}(?![0-9])"), " date "),
  # Markdown emphasis, but not Python's power sign between two operands.
  (re.compile(r"(?<![0-9A-Za-z)])\*\*|\*\*(?![0-9A-Za-z(])"), ""),
)
_POINT = re.compile(r"(?:(?<!\\)[(\[]|\\\{)[-+0-9.,/\s]*(?:[)\]]|\\\})")  # or interval, or set
_INTEGER = rf"(?:{_THOUSANDS}|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|(?<!\.)\.[0-9]+)"
_NUMBER = re.compile(
  rf"(?<![0-9A-Za-z_^\\])(?<![0-9]\.)(?:"
  rf"(?P<whole>{_INTEGER})\s+(?P<part>[0-9]+)\s*/\s*(?P<of>[0-9]+)(?![0-9])"
  rf"|(?P<top>{_DECIMAL})\s*/\s*(?P<bottom>{_DECIMAL})(?![0-9])"
  rf"|(?P<plain>{_DECIMAL})"
  r"(?:[eE](?P<e>[-+]?[0-9]{1,4})(?![0-9A-Za-z])"
  r"|\s*[×x·*]\s*10\s*(?:\^|\*\*)\s*\{?\s*(?P<p>[-+]?[0-9]{1,4})\s*\}?)?"
  r")"
)
_AFTER = re.compile(
  r"\s*(?P<percent>%|per\s?cent\b)|\s+(?P<scale>thousand|million|billion|trillion)\b"
)


@dataclasses.dataclass(frozen=True)
class Quantity:
  """An exact number found in a text; `percent` when a percent sign or word follows it."""

  value: Fraction  # the number as written: 45 for "45%"
  percent: bool
  start: int  # span in the cleaned text, sign included
  end: int


def clean(text: str, is_prose: bool = False) -> str:
  """Replaces LaTeX typography, currency signs and unusual characters by plain ones.

  In an answer that is a point, interval or set of numbers, as (2,500), a blank follows each comma:
  it has no thousands. In prose brackets say nothing about a number.
  """
  for sign, fraction in _VULGAR.items():
    if sign in text:
      text = re.sub(rf"(?<=[0-9])\s*{sign}", f" {fraction}", text).replace(sign, fraction)
  text = re.sub(r"(?<!\\)\\\\(?=[%$,])", r"\\", text)
  for pattern, replacement in _LATEX:
    text = pattern.sub(replacement, text)
  text = text.translate(_CHARACTERS)
  return text if is_prose else _POINT.sub(lambda match: match.group().replace(",", ", "), text)


def _decimal(text: str) -> Fraction | None:
  digits = text.replace(",", "")
  return Fraction(digits) if len(digits) <= MAX_DIGITS else None


def _value(match: re.Match[str]) -> Fraction | None:
  if match["whole"] is not None:
    whole, part, of = (_decimal(match[name]) for name in ("whole", "part", "of"))
    return None if whole is None or part is None or not of else whole + part / of
  if match["top"] is not None:
    top, bottom = _decimal(match["top"]), _decimal(match["bottom"])
    return None if top is None or not bottom else top / bottom
  value = _decimal(match["plain"])
  exponent = int(match["e"] or match["p"] or 0)
  if value is None or abs(exponent) > MAX_EXPONENT:
    return None
  return value * Fraction(10) ** exponent


def _sign(text: str, start: int) -> tuple[int, int]:
  """Returns (sign, start of the number with its sign); a minus between two operands is no sign."""
  window = text[max(0, start - _WINDOW) : start]
  before = window.rstrip()
  if not before or before[-1] not in "+-":
    return 1, start
  operand = before[:-1].rstrip()
  glued, follows = before == window, operand == before[:-1]
  if operand and (operand[-1] in "0123456789)}]" or (follows and operand[-1].isalnum())):
    return 1, start
  if not glued and operand and operand[-1] not in "=:(":
    return 1, start
  return (-1 if before[-1] == "-" else 1), start - len(window) + len(before) - 1


def find_numbers(text: str) -> Iterator[Quantity]:
  """Yields the numbers of a cleaned text from left to right.

  Powers, clock times, version numbers, dates and digits inside words or units are not numbers.
  """
  for match in _NUMBER.finditer(text):
    start, end = match.span()
    rest = text[end : end + 40]
    if re.match(r"\s*(?:\^|\*\*)|[:.][0-9]|\s*/\s*[0-9]", rest):
      continue
    if re.search(r"[0-9][:/]$|(?:\^|\*\*)\s*[-+]?$", text[max(0, start - 8) : start]):
      continue
    value = _value(match)
    if value is None:
      continue
    sign, start = _sign(text, start)
    after = _AFTER.match(rest)
    if after:
      end += after.end()
    scale = _SCALES[after["scale"]] if after and after["scale"] else 1
    yield Quantity(sign * value * scale, bool(after and after["percent"]), start, end)


def parse_quantity(text: str) -> Quantity | None:
  """Reads a short answer that is one number, perhaps with a name before and a unit behind it.

  Returns None when it holds no number, more than one, or an expression: a list of guesses is not
  an answer.
  """
  if len(text) > MAX_CHARS:
    return None
  text = clean(text).strip()
  while text.startswith("{") and text.endswith("}"):
    text = text[1:-1].strip()
  found = list(find_numbers(text))
  if len(found) != 1:
    return None
  before, behind = text[: found[0].start].rstrip(), text[found[0].end :]
  if re.search(r"[^\w\s.,:;!?'\"()\[\]=≈#-]|[\\_]|[-+]$|[0-9]", before):
    return None
  if re.match(r"\s*!(?!\s*$)|!", behind) or re.search(r"[^\w\s.,:;!?'\"()\[\]/^%Ω-]", behind):
    return None
  if re.search(r"(?<!\^)[0-9]|\^(?![23](?![0-9]))|[-+]\s*$", behind):
    return None
  words = re.findall(r"[^\W\d_]+", behind)
  if any(word.lower() in _FUNCTION_WORDS for word in words):
    return None
  if re.search(r"(?<![\w])-", behind):
    return None
  letters = [word for word in words if len(word) == 1 and word not in _UNIT_LETTERS]
  if any(letter not in "aAI" for letter in letters) or re.match(r"[aAI](?!\w)", behind):
    return None
  return found[0]


def same_quantity(answer: Quantity, expected: Quantity) -> bool:
  """Whether two numbers are exactly equal.

  A percent sign on one side only is either a unit (45% = 45) or a division by 100 (45% = 0.45); the
  first reading needs an expected size of at least 1.
  """
  if answer.percent == expected.percent:
    return answer.value == expected.value
  plain, percent = (expected, answer) if answer.percent else (answer, expected)
  as_unit = plain.value == percent.value and abs(plain.value) >= 1
  return as_unit or plain.value == percent.value / 100
