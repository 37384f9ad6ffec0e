"""Tokenizers behind one interface: Hugging Face fast tokenizers and SentencePiece `.model` files.

Text that comes from users, data sets or models never yields special ids: `encode` reads
`<|im_end|>` in a text as ten plain characters unless `allow_special` is set, and `chat_ids` applies
the same rule to every message's content.
"""

from __future__ import annotations

import abc
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from awf.types import UserError

CHATML_TEMPLATE = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
  "+ '<|im_end|>' + '\\n' }}{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
ROLES = ("system", "user", "assistant", "tool")
_SPACE = "\u2581"  # SentencePiece writes a space as this character
_MARK = "\ue000"  # private-use character that brackets a special token's index within a template
_SPECIAL_PIECE = re.compile(r"<\|[^|<>]+\|>")


class Tokenizer(abc.ABC):
  """Text to ids and back, and chat messages to ids.

  Attributes:
    vocab_size: number of ids the tokenizer knows; a model's table may be longer.
    stop_ids: ids that end an assistant's turn, ascending.
    pad_id: id to fill unused positions with; it carries no meaning, masks are kept apart.
    special_ids: all ids that only `allow_special` or the chat template may produce.
    files: the files to copy beside a saved model.
  """

  vocab_size: int
  stop_ids: tuple[int, ...]
  pad_id: int
  special_ids: frozenset[int]
  files: tuple[Path, ...]

  @abc.abstractmethod
  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    """Ids of a text; a lone surrogate is read as "?"."""

  @abc.abstractmethod
  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    """Text of ids; broken UTF-8 gives U+FFFD, ids past the vocabulary give nothing."""

  @abc.abstractmethod
  def token_bytes(self, token_id: int) -> bytes:
    """UTF-8 of one token, which may be a part of a character; nothing past the vocabulary."""

  @abc.abstractmethod
  def chat_ids(
    self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
  ) -> list[int]:
    """Prompt ids of a chat.

    Args:
      messages: dicts with "role" (system, user, assistant or tool) and "content" (text).
      add_generation_prompt: end with the header of the assistant's turn.

    Raises:
      ValueError: a message without these fields, or with others' types.
    """


class SentencePieceTokenizer(Tokenizer):
  """A SentencePiece model with ChatML turns; `decode(encode(x)) == x` for every text.

  The model needs byte fallback, the identity normaliser, no dummy prefix, and `<|im_start|>`,
  `<|im_end|>`, `<|endoftext|>` as user-defined (or control) symbols.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    import sentencepiece

    self.files = (Path(path),)
    try:
      self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
      raise UserError(
        f"config.model.path: {path} is no readable SentencePiece model: {error}"
      ) from error
    model = self._model
    self.vocab_size = model.get_piece_size()
    self._bytes: list[bytes] = []
    special: dict[str, int] = {}
    byte_ids: dict[int, int] = {}
    for i in range(self.vocab_size):
      piece = model.id_to_piece(i)
      if model.is_byte(i):
        byte_ids[int(piece[3:5], 16)] = i
        self._bytes.append(bytes([int(piece[3:5], 16)]))
        continue
      if model.is_control(i) or model.is_unknown(i) or _SPECIAL_PIECE.fullmatch(piece):
        special[piece] = i
      self._bytes.append(piece.replace(_SPACE, " ").encode())
    self._special = special
    self.special_ids = frozenset(special.values())
    missing = [name for name in (IM_START, IM_END, END_OF_TEXT) if name not in special]
    if missing or len(byte_ids) != 256:
      raise UserError(
        f"config.model.path: {path} must have byte fallback and the symbols {IM_START}, {IM_END}, "
        f"{END_OF_TEXT}; missing: {', '.join(missing) or 'byte pieces'}"
      )
    self._space_ids = [byte_ids[b] for b in _SPACE.encode()]
    self.stop_ids = tuple(sorted({special[IM_END], special[END_OF_TEXT]}))
    self.pad_id = special[END_OF_TEXT]
    names = sorted((name for name in special), key=len, reverse=True)
    self._find = re.compile("|".join(re.escape(name) for name in names))
    probe = "  a b\n\n \u00e4\t1 "
    if self.decode(self.encode(probe)) != probe:
      raise UserError(
        f"config.model.path: {path} changes text; train it with add_dummy_prefix=false, "
        "remove_extra_whitespaces=false and normalization_rule_name=identity"
      )

  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    text = text.encode("utf-8", "replace").decode()
    if not allow_special:
      return self._encode_plain(text)
    ids: list[int] = []
    start = 0
    for match in self._find.finditer(text):
      ids += self._encode_plain(text[start : match.start()])
      ids.append(self._special[match.group()])
      start = match.end()
    return ids + self._encode_plain(text[start:])

  def _encode_plain(self, text: str) -> list[int]:
    """Ids of a text in which nothing is special: a special string is cut after one character."""
    ids: list[int] = []
    for part in self._cut(text):
      for i, piece in enumerate(part.split(_SPACE)):  # a literal U+2581 would come back as a space
        ids += self._space_ids if i else []
        ids += self._model.encode(piece) if piece else []
    return ids

  def _cut(self, text: str) -> list[str]:
    cuts = [m.start() + 1 for name in self._special for m in re.finditer(re.escape(name), text)]
    cuts = [0, *sorted(cuts), len(text)]
    return [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    size, special = self.vocab_size, self.special_ids
    parts = (self._bytes[i] for i in ids if 0 <= i < size and not (skip_special and i in special))
    return b"".join(parts).decode("utf-8", "replace")

  def token_bytes(self, token_id: int) -> bytes:
    return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

  def chat_ids(
    self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
  ) -> list[int]:
    start, end, newline = self._special[IM_START], self._special[IM_END], self.encode("\n")
    ids: list[int] = []
    for message in check_messages(messages):
      ids += [start, *self.encode(message["role"] + "\n"), *self.encode(message["content"])]
      ids += [end, *newline]
    return ids + [start, *self.encode("assistant\n")] if add_generation_prompt else ids


class HuggingFaceTokenizer(Tokenizer):
  """The fast tokenizer of a Hugging Face checkpoint, with the checkpoint's own chat template."""

  def __init__(self, path: str | os.PathLike[str]) -> None:
    import tokenizers

    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # there is no torch to miss
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and forks do not mix
    import transformers

    folder = Path(path)
    try:
      self._hf = transformers.AutoTokenizer.from_pretrained(str(folder), use_fast=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(
        f"config.model.path: no tokenizer can be read in {folder}: {error}"
      ) from error
    if not self._hf.is_fast:
      raise UserError(f"config.model.path: {folder} holds no fast tokenizer (tokenizer.json)")
    backend = self._hf.backend_tokenizer.to_str()
    self._parsing = tokenizers.Tokenizer.from_str(backend)
    self._plain = tokenizers.Tokenizer.from_str(backend)
    self._plain.encode_special_tokens = True  # special strings are split like any text
    for tokenizer in (self._parsing, self._plain):
      tokenizer.no_padding()
      tokenizer.no_truncation()
    decoder = self._parsing.decoder
    self._has_bytes = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    added = self._hf.added_tokens_decoder
    self._added = frozenset(added)
    self._special = {t.content: i for i, t in added.items() if t.special}
    self.special_ids = frozenset(self._special.values())
    self.vocab_size = self._parsing.get_vocab_size(with_added_tokens=True)
    self.stop_ids = self._stop_ids(folder)
    pad = self._hf.pad_token_id
    self.pad_id = pad if pad is not None else (self.stop_ids[0] if self.stop_ids else 0)
    self.files = tuple(folder / n for n in _HF_FILES if (folder / n).is_file())
    names = sorted(self._special, key=len, reverse=True)
    self._find = re.compile("|".join(map(re.escape, names))) if names else re.compile(r"(?!)")
    self._names = names
    self._template = self._hf.chat_template
    if self._template is None and IM_START in self._special:
      self._template = CHATML_TEMPLATE

  def _stop_ids(self, folder: Path) -> tuple[int, ...]:
    """End-of-turn ids: the generation config's, the tokenizer's, and ChatML's own."""
    ids = {self._hf.eos_token_id}
    ids |= {self._special.get(name) for name in (IM_END, END_OF_TEXT)}
    for name in ("generation_config.json", "config.json"):
      file = folder / name
      if file.is_file():
        eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ids |= set(eos) if isinstance(eos, list) else {eos}
    return tuple(sorted(i for i in ids if i is not None and i < self.vocab_size))

  def encode(self, text: str, allow_special: bool = False) -> list[int]:
    text = text.encode("utf-8", "replace").decode()
    tokenizer = self._parsing if allow_special else self._plain
    # For a batch, if only of one, other threads of Python run meanwhile.
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids

  def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
    known = [i for i in ids if 0 <= i < self.vocab_size]
    return self._parsing.decode(known, skip_special_tokens=skip_special)

  def token_bytes(self, token_id: int) -> bytes:
    token = self._parsing.id_to_token(token_id) or ""
    if not self._has_bytes or token_id in self._added or not _BYTE_OF.keys() >= set(token):
      return self.decode([token_id], skip_special=False).encode()
    return bytes(_BYTE_OF[character] for character in token)

  def chat_ids(
    self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True
  ) -> list[int]:
    if self._template is None:
      raise UserError(
        "config.model.path: this checkpoint has no chat template; use an instruct model"
      )
    checked = check_messages(messages)
    hidden = any(self._find.search(m["content"]) for m in checked)
    text = self._render(
      [{**m, "content": self._hide(m["content"])} for m in checked] if hidden else checked,
      add_generation_prompt,
    )
    if not hidden:
      return self.encode(text, allow_special=True)
    ids: list[int] = []
    for i, part in enumerate(re.split(f"{_MARK}(\\d+){_MARK}", text)):  # odd: indices of names
      ids += self.encode(self._names[int(part)]) if i % 2 else self.encode(part, True)
    return ids

  def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    import jinja2

    try:
      return self._hf.apply_chat_template(
        messages,
        chat_template=self._template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
      )
    except jinja2.TemplateError as error:
      raise ValueError(f"messages: the chat template refuses them: {error}") from error

  def _hide(self, text: str) -> str:
    """Puts numbered marks in place of special strings, so that the whole can be parsed."""
    text = text.replace(_MARK, "\ufffd")
    return self._find.sub(lambda m: f"{_MARK}{self._names.index(m.group())}{_MARK}", text)


def _byte_characters() -> dict[str, int]:
  """Which byte each character of a byte-level vocabulary stands for, as in GPT-2's: itself where it
  can be seen, else one of those from U+0100 on, in order.
  """
  seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  unseen = [byte for byte in range(256) if byte not in seen]
  return {chr(b): b for b in seen} | {chr(0x100 + i): b for i, b in enumerate(unseen)}


_BYTE_OF = _byte_characters()

_HF_FILES = (
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "chat_template.jinja",
)


def check_messages(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
  """Checks role and content of each message and drops other fields."""
  checked = []
  for i, message in enumerate(messages):
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str):
      raise ValueError(
        f"messages[{i}]: expected a role among {ROLES} and a text content, got {message!r:.200}"
      )
    checked.append({"role": role, "content": content})
  if not checked:
    raise ValueError("messages: expected at least one message, got none")
  return checked


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
  """The tokenizer of a checkpoint directory (or a `.model` file).

  Raises:
    UserError: neither tokenizer.json nor tokenizer.model is there, or it cannot be used.
  """
  file = tokenizer_file(path)
  return (
    HuggingFaceTokenizer(file.parent) if file.suffix == ".json" else SentencePieceTokenizer(file)
  )


def tokenizer_file(path: str | os.PathLike[str]) -> Path:
  """The file that says which tokenizer it is; not read.

  Raises:
    UserError: neither tokenizer.json nor tokenizer.model is there.
  """
  folder = Path(path)
  if folder.is_file() and folder.suffix == ".model":
    return folder
  for name in ("tokenizer.json", "tokenizer.model"):
    if (folder / name).is_file():
      return folder / name
  raise UserError(
    f"config.model.path: expected tokenizer.json or tokenizer.model in {folder}, found neither"
  )
