"""Text of a growing completion: whole characters as they come, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_BROKEN = "\ufffd"  # what a character whose bytes are not all there is decoded to
_MOST_OPEN = 16  # tokens kept back for such a character
_MOST_PENDING = 3  # tokens of a character that is not whole: it has at most four bytes


def first_stop(text: str, stop: Sequence[str]) -> tuple[int, str] | None:
  """(place, string) of the stop string that begins first in a text; None without one."""
  found = [(text.find(one), one) for one in stop]
  return min(((place, one) for place, one in found if place >= 0), default=None)


def cut(text: str, stop: Sequence[str]) -> str:
  """The text before the first stop string in it."""
  found = first_stop(text, stop)
  return text if found is None else text[: found[0]]


class TextStream:
  """Text of token ids that come one by one.

  Attributes:
    text: of all whole characters so far, stop strings included.
    stop: the stop string that the ids complete, or None. With several the one that begins first.

  Args:
    decode: ids to text. The texts of the parts of a sequence, joined, are the text of the whole
      unless a character's bytes lie in both: true of byte-level BPE and of byte fallback.
    stop: strings to look for, none empty.
  """

  def __init__(self, decode: Decode, stop: Sequence[str] = ()) -> None:
    self.text = ""
    self.stop: str | None = None
    self._decode, self._strings = decode, tuple(stop)
    self._reach = max(map(len, self._strings), default=1) - 1
    self._open: list[int] = []  # ids whose last character is not whole

  def add(self, token_id: int) -> bool:
    """Takes the next id; whether a stop string is there now."""
    self._open.append(token_id)
    new = self._decode(self._open)
    before = self.text[max(0, len(self.text) - self._reach) :]
    found = first_stop(before + new, self._strings)
    if found is not None:
      self.stop = found[1]
    if found is not None or not new.endswith(_BROKEN):
      self.close()
    elif len(self._open) >= _MOST_OPEN:
      self._close_most(new)
    return found is not None

  def _close_most(self, text: str) -> None:
    """Of many stray bytes, all but what may become a character yet are text as they stand."""
    for kept in range(_MOST_PENDING, 0, -1):
      head, tail = self._open[:-kept], self._open[-kept:]
      if (known := self._decode(head)) + self._decode(tail) == text:
        self.text += known
        self._open = tail
        return
    self.close()

  def close(self) -> None:
    """No id follows: what is open is text as it stands."""
    self.text += self._decode(self._open) if self._open else ""
    self._open.clear()

  @property
  def sure(self) -> int:
    """How many characters of `text` no later id can take back: those before a stop string, or
    before what may be the beginning of one.
    """
    if self.stop is not None:
      return len(cut(self.text, self._strings))
    end = len(self.text)
    for start in range(max(0, end - self._reach), end):
      if any(one.startswith(self.text[start:]) for one in self._strings):
        return start
    return end
