"""One round of the search: proposals with verdicts, the events they cause, rewards, metrics."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from awf.search.config import RewardConfig, SearchConfig
from awf.search.reward import own_parts
from awf.search.stages import Trial, Verdict, reward_parts
from awf.search.tree import NO_NODE, STAGES, Node, Tree, add_event, evaluate_event
from awf.tasks.stats import pass_at_k, solved_at_k
from awf.types import Completion, Problem, Rollout, WorkflowSource

SOLVED = 1.0 - 1e-9  # a problem with this score counts as solved
SOLVED_K = 4  # workflows of mcts/solved@k

_NO_SOURCE = WorkflowSource("", "")


@dataclasses.dataclass(frozen=True)
class Slot:
  """One parent of a round: a GRPO group is the children proposed for it."""

  index: int
  group: str
  parent: Node
  messages: list[dict[str, str]]
  key: int  # request key of the proposals


@dataclasses.dataclass(frozen=True)
class Child:
  """One proposal of a group, with what became of it."""

  slot: Slot
  index: int
  completion: Completion
  modification: str = ""
  source: WorkflowSource = _NO_SOURCE
  canonical: str = ""  # "" when it did not pass the static check, or copies its parent
  copies: bool = False  # equals its parent
  verdict: Verdict = Verdict("format", None)
  turn: int = 0  # 0: the proposal itself; its repairs enter the tree, but are no rollouts

  @property
  def refused(self) -> bool:
    """The prompt did not fit the context: nothing was sampled, nothing is learned."""
    return self.completion.finish_reason == "refused"

  @property
  def lost(self) -> bool:
    """No fault of the policy: refused, or the infrastructure failed."""
    failure = self.verdict.failure
    return self.refused or (failure is not None and failure.kind == "infrastructure")

  @property
  def runs(self) -> bool:
    """Evaluated on all common problems."""
    return not self.refused and self.verdict.failure is None


@dataclasses.dataclass(frozen=True)
class RoundResult:
  """Outcome of a round."""

  round: int
  rollouts: list[Rollout]  # by slot, then child; groups whose prompt was refused are left out
  nodes: list[Node]  # added to the tree
  metrics: dict[str, float]
  records: list[
    dict[str, Any]
  ]  # JSON objects for trajectories, one per proposal; no expected answers


class Draft:
  """The tree of a round in the making; becomes the search's state when the round is committed."""

  def __init__(self, tree: Tree, round: int):
    self.tree = tree
    self.round = round
    self.events: list[dict[str, Any]] = []
    self.trials: dict[int, Sequence[Trial]] = {}
    self.used: dict[tuple[str, str], Trial] = {}  # by workflow and problem

  def use(self, canonical: str, trials: Sequence[Trial]) -> None:
    """Counts trials among what the round cost; equal ones count once."""
    self.used |= {(canonical, t.problem.id): t for t in trials}

  def note(self, event: dict[str, Any]) -> None:
    """Records an event that changes no node."""
    self.events.append({**event, "round": self.round})

  def apply(self, event: dict[str, Any]) -> None:
    event = {**event, "round": self.round}
    self.events.append(event)
    self.tree = self.tree.apply(event)

  def add(self, node: Node, trials: Sequence[Trial]) -> None:
    self.apply(add_event(node))
    self.trials[node.id] = trials

  def find_root(self, canonical: str) -> Node | None:
    roots = (n for n in self.tree.nodes.values() if n.parent == NO_NODE)
    return next((n for n in roots if n.canonical == canonical), None)

  def add_root(
    self, source: WorkflowSource, canonical: str, name: str, stage: str, verdict: Verdict
  ) -> None:
    """Adds an evaluated root.

    Raises:
      RuntimeError: infrastructure failures on all problems, so that it has no score.
    """
    _refuse_unscored(name, verdict)
    self.use(canonical, verdict.trials)
    node = Node(
      id=self.tree.next_id,
      parent=NO_NODE,
      source=source,
      canonical=canonical,
      modification=name,
      stage=stage,
      scores=verdict.scores,
      tokens=verdict.tokens,
      born=self.round,
      log=verdict.log,
    )
    self.add(node, verdict.trials)

  def score(self, id: int, verdict: Verdict) -> None:
    """Gives its scores to a root that has none yet.

    Raises:
      RuntimeError: as `add_root`.
    """
    _refuse_unscored(f"workflow of round {id}", verdict)
    self.use(self.tree.nodes[id].canonical, verdict.trials)
    self.apply(evaluate_event(id, verdict.scores, "full", verdict.log, verdict.tokens))
    self.trials[id] = verdict.trials


def _refuse_unscored(name: str, verdict: Verdict) -> None:
  if not verdict.scores:
    failed = verdict.trials[0].failure
    why = failed.message if failed is not None else "no problem was run"
    raise RuntimeError(f"the {name} could not be run on any problem: {why}")


async def settle(tasks: Collection[asyncio.Task[Any]]) -> None:
  """Ends tasks that are still running, after an error or an interrupt, and waits for them."""
  for task in tasks:
    task.cancel()
  await asyncio.gather(*tasks, return_exceptions=True)


def grow(draft: Draft, children: Sequence[Child], full: Mapping[str, Verdict]) -> None:
  """Adds the round's proposals to the tree: evaluated ones as nodes, failed ones as experience of
  their parent.

  Proposals without any readable text, equal siblings and lost ones add nothing.
  """
  for key, verdict in full.items():
    known = draft.tree.find(key)
    if known is not None:
      event = evaluate_event(known.id, verdict.scores, "full", verdict.log, verdict.tokens)
      draft.apply(event)
      draft.trials[known.id] = verdict.trials
  for child in children:
    if child.lost or not (child.source.graph or child.modification):
      continue
    if not _has_sibling(draft.tree, child):
      _add_child(draft, child, full)


def _has_sibling(tree: Tree, child: Child) -> bool:
  for node in tree.children(child.slot.parent.id):
    if child.canonical and node.canonical == child.canonical:
      return True
    if node.source == child.source and (
      child.source.graph or node.modification == child.modification
    ):
      return True
  return False


def _add_child(draft: Draft, child: Child, full: Mapping[str, Verdict]) -> None:
  known = draft.tree.find(child.canonical)
  verdict = full.get(child.canonical, child.verdict)
  stage = "full" if child.canonical in full else verdict.stage
  scores = verdict.scores if verdict.failure is None else {}
  log, tokens, trials = verdict.log, verdict.tokens, verdict.trials
  if known is not None and known.stage == "full":  # its own scores rest on more problems
    stage, scores, log, trials = known.stage, known.scores, known.log, ()
    tokens = known.tokens
  node = Node(
    id=draft.tree.next_id,
    parent=child.slot.parent.id,
    source=child.source,
    canonical=child.canonical,
    modification=child.modification,
    stage=stage,
    failure=verdict.failure,
    scores=scores,
    tokens=tokens,
    before=child.slot.parent.score,
    born=draft.round,
    duplicate_of=known.id if known is not None else NO_NODE,
    log=log,
  )
  draft.add(node, trials)


def reward_of(child: Child, config: RewardConfig) -> tuple[float, dict[str, float]]:
  """Reward and its addends; NaN and {} when the proposal was lost."""
  parts = {} if child.refused else reward_parts(child.verdict, config)
  if parts and config.function:
    parts = own_parts(config.function, parts, child.source, child.verdict)
  return (sum(parts.values()) if parts else math.nan), parts


def rollout_of(child: Child, config: RewardConfig) -> Rollout:
  reward, parts = reward_of(child, config)
  done = child.completion
  return Rollout(
    group=child.slot.group,
    prompt_ids=done.prompt_ids,
    token_ids=done.token_ids,
    logprobs=done.logprobs,
    reward=reward,
    parts=parts,
    truncated=done.finish_reason == "length",
  )


class Problems(NamedTuple):
  """What a round is measured on."""

  common: Sequence[Problem]  # of all proposals
  full: Sequence[Problem]  # of the best ones


def summarise(
  draft: Draft,
  children: Sequence[Child],
  validated: Mapping[str, Verdict],
  problems: Problems,
  config: SearchConfig,
  stages: tuple[str, ...],
) -> RoundResult:
  """The round's result, from the finished draft; `validated` are the full validations, by key."""
  common, first = problems.common, [c for c in children if not c.turn]
  added = {e["node"]["id"] for e in draft.events if e["event"] == "add"}
  earlier = {n.canonical for n in draft.tree.nodes.values() if n.born < draft.round}
  metrics = {
    **_tree_metrics(draft, problems.full, stages),
    **_child_metrics(first, common, earlier),
    **_full_metrics(validated),
    **_pass_metrics(first, common, config.group_size),
  }
  if config.repairs:
    metrics["repaired"] = float(sum(c.runs for c in children if c.turn))
  return RoundResult(
    round=draft.round,
    rollouts=[rollout_of(c, config.reward) for c in first if not c.refused],
    nodes=[draft.tree.nodes[id] for id in sorted(added)],
    metrics={f"mcts/{name}": value for name, value in metrics.items()},
    records=[_record(c, draft.round, config.reward) for c in children],
  )


def _tree_metrics(
  draft: Draft, full: Sequence[Problem], stages: tuple[str, ...]
) -> dict[str, float]:
  tree = draft.tree
  ranked = sorted(tree.selectable(stages), key=lambda n: (-n.score, n.id))
  ids = [p.id for p in full]
  solved = [{id for id in ids if n.scores.get(id, 0.0) >= SOLVED} for n in ranked[:SOLVED_K]]
  return {
    "total_rounds": float(draft.round),
    "nodes": float(len(tree.nodes)),
    "best_score": ranked[0].score,
    "seed_score": tree.nodes[min(tree.nodes)].score,
    "tree_depth": float(tree.max_depth()),
    f"solved@{SOLVED_K}": solved_at_k(solved, ids),
  }


def _score_on(node: Node, problems: Sequence[Problem]) -> float:
  """The node's mean over these problems where it has all of them, else over its own."""
  if all(p.id in node.scores for p in problems):
    return sum(node.scores[p.id] for p in problems) / len(problems)
  return node.score


def _mean(values: Sequence[float]) -> float:
  return sum(values) / len(values) if values else 0.0


def _child_metrics(
  children: Sequence[Child], common: Sequence[Problem], known: Collection[str]
) -> dict[str, float]:
  """Metrics of the proposals; `known` are the keys of earlier rounds."""
  counted = [c for c in children if not c.lost]
  running = [c for c in counted if c.runs]
  gains = [c.verdict.mean - _score_on(c.slot.parent, common) for c in running]
  seen = set(known)
  duplicates = 0
  for child in counted:
    duplicates += child.copies or (child.canonical != "" and child.canonical in seen)
    seen.add(child.canonical)
  out = {
    "success": sum(g > 0 for g in gains) / len(counted) if counted else 0.0,
    "valid_rate": len(running) / len(counted) if counted else 0.0,
    "parent_score": _mean([c.slot.parent.score for c in counted]),
    "child_score": _mean([c.verdict.mean for c in running]),
    "duplicates": float(duplicates),
    "lost": float(len(children) - len(counted)),
  }
  for index, stage in enumerate(STAGES[:4]):
    failed = sum(c.verdict.failure is not None and c.verdict.stage == stage for c in counted)
    reached = sum(STAGES.index(c.verdict.stage) >= index for c in counted)
    out[f"stage/{stage}/passed"] = float(reached - failed)
    out[f"stage/{stage}/failed"] = float(failed)
  return out


def _full_metrics(validated: Mapping[str, Verdict]) -> dict[str, float]:
  """Workflows that were validated in full, and of them those that failed on some problem."""
  failed = sum(any(t.failure is not None for t in v.trials) for v in validated.values())
  return {"stage/full/passed": float(len(validated) - failed), "stage/full/failed": float(failed)}


def _pass_metrics(
  children: Sequence[Child], common: Sequence[Problem], group_size: int
) -> dict[str, float]:
  """Unbiased pass@k of the round's proposals; one that does not run solves no problem."""
  counted = [c for c in children if not c.lost]
  out = {}
  for k in sorted({1, min(4, group_size), group_size}):
    if k <= len(counted):
      correct = [sum(c.runs and c.verdict.scores[p.id] >= SOLVED for c in counted) for p in common]
      out[f"pass@{k}"] = _mean([pass_at_k(len(counted), n, k) for n in correct])
  return out


def _or_none(value: float) -> float | None:
  return None if math.isnan(value) else value


def _record(child: Child, round: int, config: RewardConfig) -> dict[str, Any]:
  """One proposal for the trajectory file."""
  reward, parts = reward_of(child, config)
  failure = child.verdict.failure
  return {
    "round": round,
    "group": child.slot.group,
    "child": child.index,
    "turn": child.turn,
    "parent": child.slot.parent.id,
    "parent_score": _or_none(child.slot.parent.score),
    "reward": _or_none(reward),
    "parts": parts,
    "stage": child.verdict.stage,
    "failure": dataclasses.asdict(failure) if failure is not None else None,
    "score": _or_none(child.verdict.mean) if child.runs else None,
    "scores": child.verdict.scores,
    "modification": child.modification,
    "key": child.canonical,
    "calls": sum(t.calls for t in child.verdict.trials),
    "run_tokens": sum(t.tokens for t in child.verdict.trials),
    "finish_reason": child.completion.finish_reason,
    "tokens": child.completion.counts[1],
    "text": child.completion.text,
  }


def round_note(
  draft: Draft,
  common: Sequence[Problem],
  children: Sequence[Child],
  full: Mapping[str, Verdict],
) -> dict[str, Any]:
  """The journal's line for a round as a whole, with what it cost."""
  for child in children:
    draft.use(child.canonical, child.verdict.trials)
  for key, verdict in full.items():
    draft.use(key, verdict.trials)
  trials = draft.used.values()
  slots = {c.slot.index: c.slot for c in children}
  ends = [[c.slot.index, c.index, c.verdict.stage, c.runs] for c in children if not c.turn]
  return {
    "event": "round",
    "common": [p.id for p in common],
    "parents": [slots[i].parent.id for i in sorted(slots)],
    "proposals": ends,
    "calls": len(children) + sum(t.calls for t in trials),
    "tokens": sum(c.completion.counts[1] for c in children) + sum(t.tokens for t in trials),
  }
