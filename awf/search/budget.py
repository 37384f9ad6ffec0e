"""When a search ends. All of it is a function of the rounds so far, so a resumed search ends where
it would have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from awf.search.config import SearchConfig
from awf.search.converge import search_converged
from awf.search.tree import Node


def spent(events: Iterable[Mapping[str, Any]]) -> dict[str, int]:
  """Model calls and generated tokens of all rounds in a search's events, proposals included.

  Equal trials of one round count once; what an earlier round left in a cache counts again, so that
  an interrupt changes nothing.
  """
  notes = [event for event in events if event["event"] == "round"]
  return {name: sum(note.get(name, 0) for note in notes) for name in ("calls", "tokens")}


def why_done(
  config: SearchConfig,
  nodes: Sequence[Node],
  events: Iterable[Mapping[str, Any]],
  rounds_done: int,
) -> str:
  """Why no further round is due: rounds, calls, tokens or AFlow's convergence; "" while one is.

  Args:
    config: the limits.
    nodes: those that can be selected.
    events: of the search.
    rounds_done: rounds so far.
  """
  if rounds_done >= config.rounds:
    return f"config.search.rounds = {config.rounds}"
  cost = spent(events)
  for name, limit in (("calls", config.max_calls), ("tokens", config.max_tokens)):
    if limit and cost[name] >= limit:
      return f"config.search.max_{name} = {limit}: {cost[name]} are spent"
  still = search_converged(nodes, rounds_done, config.converge_rounds, config.converge_z)
  if still is None:
    return ""
  return f"the best workflows did not change in rounds {still[0]} to {still[1]}"
