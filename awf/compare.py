"""The policy before and after training: its proposals for held-out parents, scored on held-out
problems.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from typing import Any

import numpy as np

from awf.search.config import load_starts
from awf.search.propose import parse_reply, proposal_messages
from awf.search.tree import NO_NODE, SEED, Node
from awf.system import System
from awf.tasks.stats import paired_bootstrap
from awf.types import Failure, UserError, WorkflowSource, stable_hash
from awf.workflow.contract import allowed_operators, operators_of
from awf.workflow.own import operator_names
from awf.workflow.static import canonical, static_check

COLLAPSE_SAMPLES = 64  # proposals for the seed workflow whose different programs are counted


@dataclasses.dataclass(frozen=True)
class Proposals:
  """Scores of a policy's proposals; JSON-able.

  `scores` has one list per parent: the proposed workflow's mean score on the held-out problems, 0
  when it is not valid, NaN when the infrastructure failed. `valid` has the same shape.
  """

  scores: dict[str, list[float]]
  valid: dict[str, list[bool]]
  different: int  # canonical programs among all valid proposals
  different_in_64: int  # among 64 proposals for the seed workflow

  @property
  def mean(self) -> float:
    """Mean over all proposals; those that are not valid count 0."""
    return float(np.nanmean([s for row in self.scores.values() for s in row]))

  @property
  def valid_rate(self) -> float:
    return float(np.mean([v for row in self.valid.values() for v in row]))

  @property
  def mean_valid(self) -> float:
    """Mean over the valid proposals alone; NaN when there is none."""
    chosen = [s for s, v in self.pairs() if v and not math.isnan(s)]
    return float(np.mean(chosen)) if chosen else math.nan

  def pairs(self) -> list[tuple[float, bool]]:
    return [(s, v) for p in self.scores for s, v in zip(self.scores[p], self.valid[p], strict=True)]


async def score_proposals(system: System) -> Proposals:
  """Draws and scores proposals of the present policy for the parents of `config.eval.parents`.

  Keys depend on the parent alone, so a policy that did not change proposes the same again.

  Raises:
    UserError: fewer parents in the file than `config.eval.parent_count`.
  """
  config = system.config
  parents = held_out_parents(config)
  per_parent = config.eval.proposals_per_parent
  scores_of_parents = await asyncio.gather(*(mean_score(system, p) for p in parents))
  groups = await asyncio.gather(
    *(
      _replies(system, parent, score, per_parent, i)
      for i, (parent, score) in enumerate(zip(parents, scores_of_parents, strict=True))
    )
  )
  checked = [[check(system, parent, text) for text in group]
             for parent, group in zip(parents, groups, strict=True)]  # fmt: skip
  scored = await asyncio.gather(*(_score(system, source) for row in checked for source in row))
  rows = [scored[i * per_parent : (i + 1) * per_parent] for i in range(len(parents))]
  programs = {canonical(s) for row in checked for s in row if isinstance(s, WorkflowSource)}
  return Proposals(
    scores={str(i): [s for s, _ in row] for i, row in enumerate(rows)},
    valid={str(i): [v for _, v in row] for i, row in enumerate(rows)},
    different=len(programs),
    different_in_64=await count_programs(system),
  )


async def count_programs(system: System) -> int:
  """Different canonical programs among 64 proposals for the seed workflow; a collapse shows
  here.
  """
  score = await mean_score(system, system.seed_source)
  texts = await _replies(system, system.seed_source, score, COLLAPSE_SAMPLES, -1)
  checked = [check(system, system.seed_source, text) for text in texts]
  return len({canonical(s) for s in checked if isinstance(s, WorkflowSource)})


def check(system: System, parent: WorkflowSource, text: str) -> WorkflowSource | Failure:
  """The proposed workflow, or why it is not one: format, static check, or a copy of its parent."""
  edit = parse_reply(text)
  if isinstance(edit, Failure):
    return edit
  allowed = allowed_operators(offered_operators(system), parent.graph)
  failure = static_check(edit.source, allowed, system.task.question_type == "code")
  if failure is not None:
    return failure
  if canonical(edit.source) == canonical(parent):
    return Failure("format", "a copy of its parent")
  return edit.source


def offered_operators(system: System) -> tuple[str, ...]:
  """The operators that the policy is told of."""
  return operator_names(system.config.search.operators) or operators_of(system.task.question_type)


async def mean_score(system: System, source: WorkflowSource) -> float:
  """Mean score of a workflow on the held-out problems; NaN when nothing could be measured."""
  return (await _score(system, source))[0]


async def _score(system: System, source: WorkflowSource | Failure) -> tuple[float, bool]:
  """(mean score, valid): a workflow that answers no problem at all is not valid."""
  if isinstance(source, Failure):
    return 0.0, False
  runner = system.runner()
  results = await asyncio.gather(*(runner.run(source, p) for p in system.held_out))
  scores, ran = [], False
  for problem, result in zip(system.held_out, results, strict=True):
    if result.failure is not None and result.failure.kind == "infrastructure":
      continue
    ran = ran or result.failure is None
    answer = result.answer if result.failure is None else None
    scores.append(0.0 if answer is None else (await system.task.grade(problem, answer)).score)
  finite = [s for s in scores if not math.isnan(s)]
  return (float(np.mean(finite)) if finite else math.nan), ran


async def _replies(system, parent, score, count, slot) -> list[str]:
  """Replies of the policy to the prompt for a parent without any past."""
  node = Node(SEED, NO_NODE, parent, canonical(parent), "", "full", scores={"held out": score})
  messages = proposal_messages(
    node,
    (),
    "",
    style=system.config.search.prompt,
    question_type=system.task.question_type,
    operators=offered_operators(system),
  )
  key = stable_hash(system.config.seed, "compare", slot)
  return [c.text for c in await system.propose(messages, count, key)]


def held_out_parents(config) -> list[WorkflowSource]:
  """The first `config.eval.parent_count` workflows of `config.eval.parents`."""
  parents = load_starts(config.eval.parents, "config.eval.parents")
  if len(parents) < config.eval.parent_count:
    raise UserError(
      f"config.eval.parent_count: {config.eval.parents or 'config.eval.parents'} holds "
      f"{len(parents)} workflows, fewer than {config.eval.parent_count}"
    )
  return list(parents[: config.eval.parent_count])


def gain(before: Proposals, after: Proposals, resamples: int, seed: int) -> dict[str, Any]:
  """The comparison's figures for the JSON line; the interval resamples parents."""
  mean, low, high = paired_bootstrap(before.scores, after.scores, n=resamples, seed=seed)
  return {
    "proposal_score_before": before.mean,
    "proposal_score_after": after.mean,
    "proposal_gain": mean,
    "proposal_gain_interval": [low, high],
    "valid_score_before": before.mean_valid,
    "valid_score_after": after.mean_valid,
    "valid_rate_first": before.valid_rate,
    "valid_rate_last": after.valid_rate,
    "different_before": before.different,
    "different_after": after.different,
    "different_in_64_before": before.different_in_64,
    "different_in_64_after": after.different_in_64,
    "proposals": sum(map(len, before.scores.values())),
    "parents": len(before.scores),
  }
