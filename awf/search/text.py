"""Makes model-written text inert before it enters a prompt."""

from __future__ import annotations

import re

# Elements of the proposal format; none may occur inside the text of another.
FORMAT_TAGS = (
  "modification", "graph", "prompt", "experience", "logs", "score", "sample", "operators",
)  # fmt: skip
_TAG = re.compile(rf"<(/?\s*(?:{'|'.join(FORMAT_TAGS)})\b[^<>]*)>", re.IGNORECASE)
_CHAT_TOKEN = re.compile(r"<\|([^<>|]{0,64})\|>")
_CONTROL = re.compile(  # control, zero-width and direction characters, lone surrogates
  r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]"
)

_READ = 10  # characters that are read for each that may be kept: nested tags take a pass each


def neutralise(text: str) -> str:
  """Turns `<score>` into `[score]` and `<|im_end|>` into `[im_end]`; drops control characters.

  Tabs and newlines stay. What is left holds nothing of the kind: applying it twice changes nothing.
  """
  text = _CONTROL.sub("", text.replace("\r\n", "\n"))
  while True:
    changed = _TAG.sub(r"[\1]", _CHAT_TOKEN.sub(r"[\1]", text))
    if changed == text:
      return text
    text = changed


def without_chat_tokens(text: str) -> str:
  """As `neutralise`, but the tags of the proposal format stay."""
  text = _CONTROL.sub("", text.replace("\r\n", "\n"))
  while _CHAT_TOKEN.search(text):
    text = _CHAT_TOKEN.sub(r"[\1]", text)
  return text


def forbidden(text: str) -> str | None:
  """The first format tag, chat-template token or control character in the text, or None."""
  for pattern in (_TAG, _CHAT_TOKEN, _CONTROL):
    hit = pattern.search(text)
    if hit:
      return ascii(hit.group(0)[:40])
  return None


def one_line(text: str, limit: int = 160) -> str:
  """One inert line of at most `limit` characters that cannot imitate an experience line's score."""
  text = text[: _READ * limit]
  text = " ".join(neutralise(text).replace("->", "to").replace("```", "'''").split())
  return text if len(text) <= limit else text[: limit - 3].rstrip() + "..."


def excerpt(text: str, limit: int, tail: bool = False) -> str:
  """Inert text of at most `limit` characters; `tail` keeps the end, where answers stand."""
  text = text[-_READ * limit :] if tail else text[: _READ * limit]
  text = neutralise(text).replace("```", "'''").strip()
  if len(text) <= limit:
    return text
  return "..." + text[-(limit - 3) :] if tail else text[: limit - 3] + "..."
