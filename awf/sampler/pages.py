"""Which pages of the cache hold which prompts: shared beginnings, reference counts, eviction.

Pure Python. A page holds some tokens of a prompt and is named by what stands before it, the tokens
themselves and the adapter that made it, so prompts that begin alike share pages up to the first
difference (counted in whole pages). A page that nobody reads stays until its place is needed; the
least recently used goes first, and never before the pages that follow it.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple


class Version(NamedTuple):
  """Adapters that rows run with and prompts are prefilled with."""

  number: int = 0  # in the order in which they were set; 0 is none
  program: int = 0  # equal where the adapters' shapes are: one compiled program serves both


BASE = Version()  # no adapters

PromptKey = tuple[tuple[int, ...], int, Version | None]  # prompt ids, adapter, its version
_Root = tuple[int, Version | None]


class _Name(NamedTuple):
  root: _Root
  parent: int  # page before it, -1 for the first
  tokens: tuple[int, ...]


@dataclasses.dataclass
class _Page:
  index: int
  name: _Name
  readers: int = 0
  is_filled: bool = False


@dataclasses.dataclass(eq=False)
class Prompt:
  """A prompt whose pages are held for as long as it has readers."""

  key: PromptKey
  pages: list[int]
  known: int  # tokens in the pages: all but the last, which is the first that decode reads
  next_token: int  # first that this prompt has still to prefill; `known` when none is
  is_ready: bool  # all is prefilled, what others were to prefill included
  start: int = 0  # first token that it has to prefill itself; others see to those before
  readers: int = 1


class PageTable:
  """Places prompts on `count` pages of `width` tokens."""

  def __init__(self, count: int, width: int):
    self.width = width
    self._free = list(range(count))[::-1]
    self._pages: collections.OrderedDict[_Name, _Page] = collections.OrderedDict()
    self._by_index: dict[int, _Page] = {}
    self._live: dict[PromptKey, Prompt] = {}
    self._num_unread = 0

  @property
  def num_held(self) -> int:
    """Pages that hold tokens, read or not."""
    return len(self._pages)

  def acquire(self, key: PromptKey) -> Prompt | None:
    """The prompt with one reader more; None when there is no place for it now.

    Of one that is not ready, tokens from `next_token` on are not in their pages yet: the caller
    sees to that, prompt by prompt in the order in which it got them, and then calls `finish`.
    """
    prompt = self._live.get(key)
    if prompt is not None:
      prompt.readers += 1
      return prompt
    ids, adapter, version = key
    known = len(ids) - 1
    places = range(0, known, self.width)

    def name(start: int) -> _Name:
      parent = held[-1].index if held else -1
      return _Name((adapter, version), parent, ids[start : min(start + self.width, known)])

    held: list[_Page] = []
    for start in places:
      page = self._pages.get(name(start))
      if page is None:
        break
      held.append(page)
    room = len(self._free) + self._num_unread - sum(not page.readers for page in held)
    if len(places) - len(held) > room:
      return None  # and what is kept for others stays
    there = min(len(held) * self.width, known)  # tokens found
    for page in held:
      self._num_unread -= not page.readers
      page.readers += 1
    for start in places[len(held) :]:
      held.append(self._claim(name(start)))
    is_ready = all(page.is_filled for page in held)
    pages = [page.index for page in held]
    self._live[key] = Prompt(key, pages, known, there, is_ready, there)
    return self._live[key]

  def fill(self, prompt: Prompt) -> None:
    """Tokens before `next_token` are in their pages now: others may read those that are full."""
    for index in prompt.pages[: prompt.next_token // self.width]:
      self._by_index[index].is_filled = True

  def finish(self, prompt: Prompt) -> None:
    """All tokens of the prompt are in its pages now."""
    prompt.is_ready = True
    for index in prompt.pages:
      self._by_index[index].is_filled = True

  def is_open(self, prompt: Prompt) -> bool:
    """Whether the pages that others fill for it are filled, so that it may go on itself."""
    before = prompt.pages[: -(-prompt.start // self.width)]
    return all(self._by_index[index].is_filled for index in before)

  def abandon(self, prompt: Prompt) -> bool:
    """Gives up a prompt that is not ready and has one reader; full pages stay for others.

    Returns:
      False when another prompt counts on what this one was to fill: it ends there now.
    """
    first = -(-prompt.start // self.width)
    own = [self._by_index[index] for index in prompt.pages[first:]]
    needed = sum(page.readers > 1 and not page.is_filled for page in own)
    if not needed:
      self.release(prompt)
      for page in own:
        if not page.is_filled:
          self._evict(page)
      return True
    kept = first + max(i + 1 for i, page in enumerate(own) if page.readers > 1)
    if kept < len(prompt.pages):
      self._unname(prompt)
      for page in own[kept - first :]:
        page.readers -= 1
        self._num_unread += 1
        self._evict(page)
      del prompt.pages[kept:]
      prompt.known = kept * self.width
    return False

  def release(self, prompt: Prompt) -> None:
    """One reader less; the pages of a prompt without readers may be taken by others."""
    prompt.readers -= 1
    if prompt.readers == 0:
      self._unname(prompt)
      for index in reversed(prompt.pages):  # the first page is the most recent: it is evicted last
        page = self._by_index[index]
        page.readers -= 1
        self._num_unread += not page.readers
        self._pages.move_to_end(page.name)

  def _unname(self, prompt: Prompt) -> None:
    """Nobody finds it under its key any more; after `abandon` another one may have that."""
    if self._live.get(prompt.key) is prompt:
      del self._live[prompt.key]

  def forget(self, *kept: Version | None) -> None:
    """Frees the pages that adapters of other versions made; those still read go later.

    Args:
      kept: versions whose pages stay; None is the base's.
    """
    for page in [p for p in self._pages.values() if p.name.root[1] not in kept]:
      if not page.readers:
        self._evict(page)

  def _claim(self, name: _Name) -> _Page:
    """A place for a page that has a reader; there is one."""
    if not self._free:
      self._evict(next(page for page in self._pages.values() if not page.readers))
    page = _Page(self._free.pop(), name, readers=1)
    self._pages[name] = self._by_index[page.index] = page
    return page

  def _evict(self, page: _Page) -> None:
    """Frees the place of a page without readers."""
    self._num_unread -= 1
    del self._pages[page.name], self._by_index[page.index]
    self._free.append(page.index)
