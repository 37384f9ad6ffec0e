"""The forest of workflows: immutable nodes, back-propagated values, and the events that rebuild it.

Every change of a forest is an event (a plain JSON object); a forest is the fold of `apply` over its
events, so the append-only journal on disk, the checkpoint and the running search never disagree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from awf.types import Failure, WorkflowSource

NO_NODE = 0  # parent of a root; "no duplicate"
SEED = 1  # AFlow's round 1
STAGES = ("format", "static", "smoke", "subset", "full")  # in the order of their price


@dataclasses.dataclass(frozen=True)
class LogEntry:
  """A problem that a workflow failed, as the optimiser may see it: no expected answer."""

  problem: str  # problem id
  output: str  # what the workflow answered (or its typed failure), capped
  extracted: str  # what the grader read in it, capped


@dataclasses.dataclass(frozen=True)
class Node:
  """One proposed workflow; `id` is AFlow's round number."""

  id: int
  parent: int  # NO_NODE for a root
  source: WorkflowSource  # empty texts when the reply did not parse
  canonical: str  # key of the canonical text, equal for equal programs; "" when it failed the check
  modification: str
  stage: str  # the stage that it failed, or the last one that it passed
  failure: Failure | None = None  # None: evaluated; only such nodes can be selected
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)  # problem id -> [0, 1]
  tokens: tuple[int, int] = (0, 0)  # prompt and generated tokens of that evaluation
  before: float = math.nan  # the parent's score at selection
  born: int = 0  # search round that made it
  rated: int = 0  # later round that evaluated it anew; 0: none did
  duplicate_of: int = NO_NODE  # an earlier node with the same canonical text
  log: tuple[LogEntry, ...] = ()
  visits: int = 0  # own evaluation and those of all descendants
  value: float = 0.0  # sum of their scores
  expansions: int = 0  # how often it was a parent

  @property
  def score(self) -> float:
    """Mean over the problems of its last evaluation; NaN when there was none."""
    return sum(self.scores.values()) / len(self.scores) if self.scores else math.nan

  @property
  def evaluated(self) -> bool:
    return self.failure is None and bool(self.scores)

  def as_json(self) -> dict[str, Any]:
    """A JSON object; `Node.from_json` gives the node back."""
    out = dataclasses.asdict(self)
    out["before"] = None if math.isnan(self.before) else self.before
    out["log"], out["tokens"] = list(out["log"]), list(self.tokens)
    return out

  @staticmethod
  def from_json(data: Mapping[str, Any]) -> Node:
    fields = dict(data)
    fields["source"] = WorkflowSource(**fields["source"])
    fields["failure"] = Failure(**fields["failure"]) if fields["failure"] else None
    fields["before"] = math.nan if fields["before"] is None else fields["before"]
    fields["scores"] = dict(fields["scores"])
    fields["tokens"] = tuple(fields.get("tokens", (0, 0)))  # older runs have none
    fields["log"] = tuple(LogEntry(**entry) for entry in fields["log"])
    return Node(**fields)


@dataclasses.dataclass(frozen=True)
class Tree:
  """The forest: roots are the seed (id 1) and the start workflows, the others have a parent."""

  nodes: Mapping[int, Node] = dataclasses.field(default_factory=dict)

  @property
  def next_id(self) -> int:
    return max(self.nodes, default=0) + 1

  def children(self, id: int) -> list[Node]:
    """Children in the order of their ids, failed ones included."""
    return [n for n in self.nodes.values() if n.parent == id]

  def depth(self, id: int) -> int:
    """Edges to the root."""
    steps = 0
    while self.nodes[id].parent != NO_NODE:
      id, steps = self.nodes[id].parent, steps + 1
    return steps

  def max_depth(self) -> int:
    """Edges of the longest path over nodes that were evaluated."""
    return max((self.depth(n.id) for n in self.nodes.values() if n.evaluated), default=0)

  def find(self, canonical: str) -> Node | None:
    """The first evaluated node with this key."""
    hits = (n for n in self.nodes.values() if n.evaluated and n.canonical == canonical)
    return next(hits, None) if canonical else None

  def selectable(self, stages: tuple[str, ...] = ("full",)) -> list[Node]:
    """Evaluated nodes whose scores come from `stages`, duplicates left out."""
    nodes = self.nodes.values()
    return [n for n in nodes if n.evaluated and n.stage in stages and n.duplicate_of == NO_NODE]

  def apply(self, event: Mapping[str, Any]) -> Tree:
    """The forest after one event: `add`, `evaluate`, `expand` (others are notes and change
    nothing).

    Raises:
      ValueError: the event does not fit this forest.
    """
    kind = event["event"]
    if kind == "add":
      return self._add(Node.from_json(event["node"]))
    if kind == "evaluate":
      return self._evaluate(event)
    if kind == "expand":
      node = self.nodes[event["id"]]
      grown = dataclasses.replace(node, expansions=node.expansions + 1)
      return Tree({**self.nodes, node.id: grown})
    return self

  def _add(self, node: Node) -> Tree:
    if node.id in self.nodes or (node.parent != NO_NODE and node.parent not in self.nodes):
      raise ValueError(f"expected a new id and a known parent, got {node.id} under {node.parent}")
    nodes = {**self.nodes, node.id: node}
    counted = node.evaluated or (node.failure is not None and node.failure.kind != "infrastructure")
    score = node.score if node.evaluated else 0.0
    return Tree(_back_up(nodes, node.id, visits=1, value=score)) if counted else Tree(nodes)

  def _evaluate(self, event: Mapping[str, Any]) -> Tree:
    """New scores for a node (subset -> full); the difference goes up the tree, the visits stay."""
    node = self.nodes[event["id"]]
    log = tuple(LogEntry(**entry) for entry in event["log"])
    scores, tokens = dict(event["scores"]), tuple(event.get("tokens", (0, 0)))
    fresh = dataclasses.replace(
      node, scores=scores, tokens=tokens, stage=event["stage"], log=log, rated=event.get("round", 0)
    )
    change = fresh.score - (node.score if node.evaluated else 0.0)
    nodes = {**self.nodes, node.id: fresh}
    return Tree(_back_up(nodes, node.id, visits=0 if node.visits else 1, value=change))


def _back_up(nodes: dict[int, Node], id: int, visits: int, value: float) -> dict[int, Node]:
  while id != NO_NODE:
    node = nodes[id]
    nodes[id] = dataclasses.replace(node, visits=node.visits + visits, value=node.value + value)
    id = node.parent
  return nodes


def add_event(node: Node) -> dict[str, Any]:
  return {"event": "add", "node": node.as_json()}


def evaluate_event(
  id: int,
  scores: Mapping[str, float],
  stage: str,
  log: Iterable[LogEntry],
  tokens: tuple[int, int] = (0, 0),
) -> dict[str, Any]:
  entries = [dataclasses.asdict(entry) for entry in log]
  return {
    "event": "evaluate", "id": id, "scores": dict(scores), "tokens": list(tokens), "stage": stage,
    "log": entries,
  }  # fmt: skip


def expand_event(id: int) -> dict[str, Any]:
  return {"event": "expand", "id": id}


def replay(events: Iterable[Mapping[str, Any]]) -> Tree:
  """Folds events into a forest."""
  tree = Tree()
  for event in events:
    tree = tree.apply(event)
  return tree
