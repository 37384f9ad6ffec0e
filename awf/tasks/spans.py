"""Short answers in words: exact match and F1 as the scripts of HotpotQA and DROP define them.

Everything is linear in the text but DROP's alignment, whose spans are capped.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

MAX_CHARS = 20_000  # only the end of a longer response is read
MAX_SPANS = 50  # of one answer; further ones count as wrong spans
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_TAG = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.DOTALL | re.IGNORECASE)
_CLOSED = ("yes", "no", "noanswer")  # answers that are right or wrong, never half


def short_answer(response: str) -> str:
  """What counts in a response: its last `<answer>` tag, or all of it when it has none."""
  text = response[-MAX_CHARS:]
  tagged = _TAG.findall(text)
  return (tagged[-1] if tagged else text).strip()


def normalise(text: str) -> str:
  """Lower case without punctuation, articles and surplus blanks.

  Source: HotpotQA, `hotpot_evaluate_v1.py` (as SQuAD's).
  """
  return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def token_f1(answer: str, expected: str) -> tuple[float, bool]:
  """(F1 over tokens, exact match) of two short answers.

  A yes or no on one side alone earns nothing, whatever stands around it.

  Source: HotpotQA, `hotpot_evaluate_v1.py`; AFlow, `benchmarks/hotpotqa.py`, without that rule.
  """
  ours, theirs = normalise(answer), normalise(expected)
  if ours == theirs:
    return 1.0, True
  if ours in _CLOSED or theirs in _CLOSED:
    return 0.0, False
  return _f1(Counter(ours.split()), Counter(theirs.split())), False


def _f1(ours: Counter[str], theirs: Counter[str]) -> float:
  same = (ours & theirs).total()
  return 2 * same / (ours.total() + theirs.total()) if same else 0.0


def is_number(text: str) -> bool:
  """Whether `float` reads the text."""
  try:
    float(text)
  except ValueError:
    return False
  return True


def normalise_drop(text: str) -> str:
  """As `normalise` token by token, with hyphens as blanks and every number in one form.

  Source: DROP, `drop_eval.py` (allennlp-reading-comprehension).
  """
  tokens = []
  for token in re.split(r"[\s-]", text.lower()):
    plain = token if is_number(token) else token.translate(_NO_PUNCTUATION)
    if is_number(plain):
      plain = str(float(plain))
    tokens += _ARTICLES.sub(" ", plain).split()
  return " ".join(tokens)


def drop_f1(answer: Sequence[str], expected: Sequence[str]) -> tuple[float, bool]:
  """(F1 to four decimals, exact match) of an answer of several spans.

  Spans are aligned one to one for the highest sum of F1; a span without a partner earns 0, so a
  list of guesses is not an answer. A pair counts only when a number in the expected span is in the
  answer's.

  Source: DROP, `drop_eval.py`: bags of tokens are sets there.
  """
  ours, theirs = ([normalise_drop(span) for span in spans] for spans in (answer, expected))
  exact = set(ours) == set(theirs) and len(ours) == len(theirs)
  bags, gold = ([set(span.split()) for span in spans] for spans in (ours, theirs))
  size = max(len(bags), len(gold))
  if not bags or not gold:
    return 0.0, False
  scores = [[_bag_f1(bag, other) for bag in bags[:MAX_SPANS]] for other in gold[:MAX_SPANS]]
  return round(_best_alignment(scores) / size, 4), exact


def _bag_f1(bag: set[str], gold: set[str]) -> float:
  numbers = {word for word in gold if is_number(word)}
  if numbers and not numbers & bag:
    return 0.0
  if not bag or not gold:
    return float(bag == gold)
  same = len(bag & gold)
  return 2 * same / (len(bag) + len(gold))


def _best_alignment(scores: list[list[float]]) -> float:
  """Largest sum over pairs of different rows and columns."""
  if len(scores) == 1 or len(scores[0]) == 1:
    return max(max(row) for row in scores)
  import numpy as np
  from scipy.optimize import linear_sum_assignment

  matrix = np.asarray(scores)
  rows, columns = linear_sum_assignment(matrix, maximize=True)
  return float(matrix[rows, columns].sum())
