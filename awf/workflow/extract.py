"""Takes answers, tags and letters out of a model's text; pure Python, shared with the child."""

from __future__ import annotations

import re
from fractions import Fraction

from awf.python_text import code_of

_NUMBER = re.compile(
  r"(?:(?<![\w.)\]}])[-\u2212]\s?)?"  # a sign, unless it subtracts
  r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
  r"(?:[eE][+-]?\d{1,3}(?!\w))?(?:\s?/\s?\d+)*"  # several: a date
)
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_CODE_LINE = re.compile(r"^\s*(?:async\s+)?def\s+\w+\s*\(", re.MULTILINE)
_FIRST_LETTER = re.compile(r"\W*([A-Z]\b|[a-z](?=\W*\Z|[).:,]))")
_UNIT = re.compile(r"\\(?:text|textbf|textrm|mathrm|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?|\\(?:quad|[ ,;:!$%()\[\]])|~|\*\*")
_NOT_BESIDE = re.compile(r"[^\w\s$\u20ac\u00a3%\u00b0.,:;='\"`*()/]|[\d_]")
_JOINED = re.compile(
  r"[^\W\d_]\s?[(/*]\s?#|#(?:\(|\s?[/*])\s?[^\W\d_]|\([^()]*,"
)  # sqrt(#), #*x, (x, #)
UNIT_LETTERS = set("mgshlLNJKCFWVA")  # after a number; any other letter alone is a variable
SCALES = {"dozen", "hundred", "thousand", "million", "billion", "trillion"}  # they change a number
FEW_WORDS = 4  # of an answer as QA data sets have it
MAX_DIGITS = 60


def numbers(text: str) -> list[str]:
  """All numbers of a text in one form: no thousands separators, reduced fractions, 7.0 as 7.

  A date, as 9/11/2001, is one of them and stays as it is: it is not the fraction that it starts
  with.
  """
  return [_normal_number(match.group()) for match in _NUMBER.finditer(text)]


def _normal_number(text: str) -> str:
  plain = "".join(text.replace(",", "").replace("\u2212", "-").split())
  if len(plain) > MAX_DIGITS or plain.count("/") > 1:
    return plain
  top, _, bottom = plain.partition("/")
  value = Fraction(top)
  if bottom and int(bottom) != 0:
    value /= int(bottom)
  return str(value)


def last_boxed(text: str) -> str | None:
  """Content of the last `\\boxed{...}` with balanced braces, or None."""
  start = text.rfind("\\boxed")
  while start >= 0:
    i = start + len("\\boxed")
    while i < len(text) and text[i] == " ":
      i += 1
    if i < len(text) and text[i] == "{":
      depth = 0
      for j in range(i, len(text)):
        depth += (text[j] == "{") - (text[j] == "}")
        if depth == 0:
          return text[i + 1 : j]
    start = text.rfind("\\boxed", 0, start)
  return None


def normal_answer(text: str) -> str:
  """The answer that a solution stands for, in a form that equal answers share.

  In order: the last `<answer>` tag, the last `\\boxed{}`, the code when the text is code, the last
  number, else the text in lower case with single blanks. A tag, a box or a text of a few words that
  is no equation counts as a number only when it is one, perhaps with a unit or a name: 3 and
  3\\pi differ, and so do October 1, 1990 and October 3, 1990.
  """
  tagged = _ANSWER.findall(text)
  inner = tagged[-1] if tagged else last_boxed(text)
  if inner is None and _CODE_LINE.search(text):
    return "\n".join(line.rstrip() for line in code_of(text).splitlines() if line.strip())
  if inner is None and _is_short_answer(text):
    inner = text.rstrip(" !")
  if inner is not None:
    return _lone_number(inner) or _plain(inner)
  found = numbers(text)
  return found[-1] if found else _plain(text)


def _is_short_answer(text: str) -> bool:
  return len(text.split()) <= FEW_WORDS and "=" not in text and any(map(str.isalpha, text))


def _lone_number(text: str) -> str | None:
  """The number that a short answer is, units and names beside it left out; None if it is none."""
  text = _SPACING.sub(" ", _UNIT.sub(r" \1 ", text))
  found = list(_NUMBER.finditer(text))
  if len(found) != 1:
    return None
  before, after = text[: found[0].start()], text[found[0].end() :]
  words, units = (re.findall(r"[^\W\d_]+", part) for part in (before, after))
  touches = before[-1:].isalpha() or after[:1].isalpha()
  is_variable = len(units) == 1 and len(units[0]) == 1 and units[0] not in UNIT_LETTERS
  if touches or is_variable or SCALES & {word.lower() for word in (*words, *units)}:
    return None
  if _NOT_BESIDE.search(before + after) or _JOINED.search(f"{before}#{after}"):
    return None
  return _normal_number(found[0].group())


def _plain(text: str) -> str:
  return " ".join(text.lower().split()).strip(" .$")


def tag(text: str, name: str) -> str | None:
  """Stripped content of the last `<name>...</name>`, else of an unclosed `<name>`, else None."""
  closed = re.findall(rf"<{name}>(.*?)</{name}>", text, re.DOTALL | re.IGNORECASE)
  if closed:
    return closed[-1].strip()
  opened = re.search(rf"<{name}>(.*)\Z", text, re.DOTALL | re.IGNORECASE)
  return opened.group(1).strip() if opened else None


def choice_letter(text: str, count: int) -> int | None:
  """Index of the letter that a reply names, None when it is none of the first `count`.

  Looks into `<solution_letter>` first: at the letter that it begins with, else a lone capital, else
  a lone letter; then for a lone capital letter in the last line that has one.
  """
  inner = tag(text, "solution_letter")
  for part in ([inner] if inner else []) + text.splitlines()[::-1]:
    first = _FIRST_LETTER.match(part) if part is inner else None
    capitals = re.findall(r"\b([A-Z])\b", part)
    found = [first[1]] if first else [c for c in capitals if c != "I"] or capitals
    if not found and part is inner:
      found = re.findall(r"\b([a-z])\b", part)
    if found:
      index = ord(found[-1].upper()) - ord("A")
      return index if index < count else None
  return None
