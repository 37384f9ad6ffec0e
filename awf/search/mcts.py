"""The search: select parents, let the policy propose edits, judge them in stages, grow the tree.

A round is computed without touching the state; its events are applied and written at its end, in
one go. So an interrupt loses at most the running round, and a resumed search repeats it exactly:
every random choice and every request key is a hash of the seed and of what it is for.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import math
import random
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from awf.search import rounds
from awf.search.budget import why_done
from awf.search.config import SearchConfig
from awf.search.curriculum import problem_pool, spread
from awf.search.propose import (
  Edit,
  experience_lines,
  log_text,
  modification_of,
  parse_reply,
  repair_messages,
)
from awf.search.propose import proposal_messages as messages_for
from awf.search.rounds import Child, RoundResult, Slot
from awf.search.select import adapted_c, select_aflow, select_puct, select_uct
from awf.search.stages import COPY, Grader, Runner, Trials, Verdict, check, gather_all, key_of
from awf.search.tree import SEED, Node, Tree, add_event, expand_event, replay
from awf.search.workspace import Workspace
from awf.terminal import track
from awf.types import Completion, Failure, Problem, UserError, WorkflowSource, stable_hash
from awf.workflow.contract import OPERATORS, seed_source
from awf.workflow.static import static_check

log = logging.getLogger(__name__)

Proposer = Callable[[list[dict[str, str]], int, int], Awaitable[list[Completion]]]
STATE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class SearchState:
  """All that a search remembers between rounds; replaced as a whole, so never half new."""

  events: tuple[Mapping[str, Any], ...] = ()
  tree: Tree = Tree()  # the fold of the events
  rounds_done: int = 0
  starts_used: int = 0


class MCTSOptimizer:
  """Searches over workflows and collects the proposals as GRPO rollouts.

  Args:
    config: the search's configuration.
    runner: runs a workflow on a problem (`awf.workflow.runner.WorkflowRunner`).
    evaluator: grades an answer (`awf.tasks.base.DatasetEvaluator`).
    proposer: `proposer(messages, n, key)` draws n completions of one prompt from the policy.
    problems: the validation problems; no other problem is ever used.
    workspace: folder that gets `<Dataset>/workflows/...`; a workspace that AFlow wrote is
      continued.
    seed: of every choice of the search.
    starts: further start workflows; config.start_share of each round's parents are taken from them.
    root: the first workflow; None is AFlow's seed of the question type.
    agree: called when a round is computed and not yet committed; what it raises gives it up.

  Raises:
    UserError: no problems, or a start workflow that fails the static check.
  """

  def __init__(
    self,
    config: SearchConfig,
    runner: Runner,
    evaluator: Grader,
    proposer: Proposer,
    problems: Sequence[Problem],
    workspace: Path | str,
    seed: int,
    starts: Sequence[WorkflowSource] = (),
    root: WorkflowSource | None = None,
    agree: Callable[[], Awaitable[None]] | None = None,
  ):
    if not problems:
      raise UserError("config.task: the search needs at least one validation problem, got none")
    if config.start_share > 0 and not starts:
      raise UserError(
        "config.search.start_share is above 0 without start workflows: set config.search.starts"
      )
    self.config = config
    self.problems = tuple(problems)
    self.seed = seed
    self.workspace = Workspace(workspace, config.dataset, config.operators, config.executor_prices)
    self._by_id = {p.id: p for p in self.problems}
    self._proposer, self._agree = proposer, agree
    self._trials = Trials(runner, evaluator)
    self._starts = tuple(starts)
    self._root = root or seed_source(config.question_type)
    for number, source in enumerate((self._root, *self._starts)):
      failure = static_check(source, tuple(OPERATORS), config.is_code)
      if failure is not None:
        raise UserError(
          f"config.search.starts: workflow {number} fails the static check: {failure.message}"
        )
    self._start_keys = tuple(key_of(source) for source in self._starts)
    self._full = self._full_set()
    self._state = SearchState()
    self._prepared = False

  # ---- state ----

  @property
  def tree(self) -> Tree:
    return self._state.tree

  @property
  def rounds_done(self) -> int:
    return self._state.rounds_done

  @property
  def _stages(self) -> tuple[str, ...]:
    """Stages whose nodes can be selected: one kind of score only, so that scores compare."""
    return ("full",) if self.config.full_top else ("subset", "full")

  def why_done(self) -> str:
    """Why no further round is due, "" while one is: see `awf.search.budget.why_done`."""
    nodes = self.tree.selectable(self._stages)
    return why_done(self.config, nodes, self._state.events, self.rounds_done)

  def best(self) -> Node:
    """The selectable node with the highest score; the earlier one on a tie.

    Raises:
      ValueError: no round has been run yet.
    """
    nodes = self.tree.selectable(self._stages)
    if not nodes:
      raise ValueError("the search has no evaluated node yet: run a round first")
    return max(nodes, key=lambda n: (n.score, -n.id))

  def state_dict(self) -> dict[str, Any]:
    """The search as JSON; `load_state_dict` continues from it exactly."""
    return {
      "version": STATE_VERSION,
      "seed": self.seed,
      "problems": self._problems_hash(),
      "full_problems": self._full_hash(),
      "rounds_done": self.rounds_done,
      "starts_used": self._state.starts_used,
      "events": list(self._state.events),
    }

  def load_state_dict(self, state: Mapping[str, Any]) -> None:
    """Restores a state and makes the workspace's files agree with it.

    Raises:
      UserError: the state belongs to another version, seed or set of problems.
    """
    mine = {
      "version": (STATE_VERSION, "the code's version"),
      "seed": (self.seed, "config.seed"),
      "problems": (self._problems_hash(), "config.task or draw of config.eval.parent_problems"),
      "full_problems": (self._full_hash(), "draw of config.search.full_problems"),
    }
    for field, (value, name) in mine.items():
      saved = state.get(field, 0)  # older runs have no `full_problems`, and drew them otherwise
      if saved != value:
        raise UserError(
          f"the saved search was made with another {name}: expected {saved}, got {value}; change "
          "it back or take a new --workdir"
        )
    events = tuple(dict(event) for event in state["events"])
    counts = int(state["rounds_done"]), int(state["starts_used"])
    self._state = SearchState(events, replay(events), *counts)
    self.workspace.prepare(events, self.tree)
    if self.tree.nodes:
      self.workspace.write_index(self.tree, self._stages)
    self._prepared = True

  def _problems_hash(self) -> int:
    return stable_hash([[p.id, p.prompt] for p in self.problems])

  def _full_hash(self) -> int:
    """0 where all problems are those of the full validation."""
    return stable_hash([p.id for p in self._full]) if len(self._full) < len(self.problems) else 0

  def _rng(self, *what: Any) -> random.Random:
    return random.Random(stable_hash(self.seed, *what))

  def _full_set(self) -> tuple[Problem, ...]:
    """Problems of the full validation: the same for the whole search, in the data set's order."""
    count = self.config.full_problems
    if not count or count >= len(self.problems):
      return self.problems
    chosen = {p.id for p in spread(self.problems, count, self._rng("full"))}
    return tuple(p for p in self.problems if p.id in chosen)

  def common_problems(self, round: int, tree: Tree | None = None) -> tuple[Problem, ...]:
    """The problems on which every child of a round is scored; the first ones serve as smoke run.

    With a curriculum they come from the easiest (or hardest) problems by the solve rates in `tree`
    (None is the search's own).
    """
    config = self.config
    count = min(config.subset_problems, len(self.problems))
    progress = (round - 1) / max(1, config.rounds - 1)
    order, share = config.curriculum, config.curriculum_share
    tree = self.tree if tree is None else tree
    pool = problem_pool(tree, self.problems, order, share, progress, count)
    return tuple(spread(pool, count, self._rng("common", round)))

  # ---- one round ----

  async def round(self) -> RoundResult:
    """Runs one round: parents, proposals, stages; then commits it to state and workspace.

    Raises:
      UserError: no prompt of the round fits the policy's context.
      RuntimeError: the seed or a start workflow could not be run at all (infrastructure).
    """
    self.open_workspace()
    draft = rounds.Draft(self.tree, self.rounds_done + 1)
    await self._ensure_seed(draft)
    common = self.common_problems(draft.round, draft.tree)
    slots, starts_used = await self._pick_slots(draft, common)
    verdicts: dict[str, asyncio.Task[Verdict]] = {}
    try:
      with track("proposals", len(slots) * self.config.group_size) as self._shown:
        groups = await gather_all(self._run_slot(slot, common, verdicts) for slot in slots)
        groups += await self._refill(draft.round, slots, groups, common, verdicts)
    finally:
      await rounds.settle(verdicts.values())
    children = [child for group in groups for child in group]
    self._refuse_if_nothing_fits([child for child in children if not child.turn])
    with track("full validation"):
      full = await self._validate_best(draft.tree, children)
    rounds.grow(draft, children, full)
    problems = rounds.Problems(common, self._full)
    result = rounds.summarise(draft, children, full, problems, self.config, self._stages)
    draft.note(rounds.round_note(draft, common, children, full))
    if self._agree is not None:
      await self._agree()
    self._commit(draft, starts_used)
    return result

  def open_workspace(self) -> None:
    """Takes over what the workspace holds and makes its files agree; `round` does it by itself."""
    if self._prepared:
      return
    if self.workspace.is_foreign():
      self._adopt()
    elif not self._state.events:
      events = tuple(self.workspace.adopted())
      self._state = SearchState(events, replay(events))
    self.workspace.prepare(self._state.events, self.tree)
    self._prepared = True

  def _adopt(self) -> None:
    """Takes over the rounds of a workspace that AFlow wrote."""
    events = []
    for node in self.workspace.adopt(self.problems, self._root):
      valid = static_check(node.source, tuple(OPERATORS), self.config.is_code) is None
      key = key_of(node.source) if valid else ""
      events.append(add_event(dataclasses.replace(node, canonical=key)))
    self._state = SearchState(tuple(events), replay(events))
    evaluated = sum(node.evaluated for node in self.tree.nodes.values())
    log.info("continuing an AFlow workspace with %d evaluated rounds", evaluated)

  async def _ensure_seed(self, draft: rounds.Draft) -> None:
    seed = draft.tree.nodes.get(SEED)
    if seed is not None:
      if not seed.evaluated:  # of a workspace of AFlow that has no score of it
        key = key_of(seed.source)
        verdict = await self._trials.validate(seed.source, key, self._full)
        draft.score(SEED, verdict)
      return
    key = key_of(self._root)
    with track("seed workflow"):
      verdict = await self._trials.validate(self._root, key, self._full)
    draft.add_root(self._root, key, "seed", "full", verdict)

  async def _pick_slots(
    self, draft: rounds.Draft, common: Sequence[Problem]
  ) -> tuple[list[Slot], int]:
    """The round's parents, start workflows first; and the new count of used starts."""
    config, used = self.config, self._state.starts_used
    share = int(config.start_share * config.parents + 0.5) if self._starts else 0
    order = [self._start_index(used + i) for i in range(share)]
    sources = {self._start_keys[i]: self._starts[i] for i in order}
    fresh = {k: s for k, s in sources.items() if draft.find_root(k) is None}
    verdicts = await gather_all(self._trials.validate(s, k, common) for k, s in fresh.items())
    for (key, source), verdict in zip(fresh.items(), verdicts, strict=True):
      draft.add_root(source, key, "start workflow", "subset", verdict)
    roots = [draft.find_root(self._start_keys[i]) for i in order]
    nodes = [n for n in roots if n is not None]
    nodes += self._select(draft.tree, draft.round, config.parents - len(nodes))
    for node in nodes:
      draft.apply(expand_event(node.id))
    slots = [self._slot(draft, index, node) for index, node in enumerate(nodes)]
    return slots, used + share

  def _start_index(self, position: int) -> int:
    """Start workflows in a seeded order; each pass uses every one once."""
    turn, offset = divmod(position, len(self._starts))
    order = list(range(len(self._starts)))
    self._rng("starts", turn).shuffle(order)
    return order[offset]

  def _select(self, tree: Tree, round: int, count: int) -> list[Node]:
    nodes = tree.selectable(self._stages)
    c = self.config
    if c.selection in ("uct", "puct"):
      constant = adapted_c(nodes, c.uct_c) if c.uct_adapt else c.uct_c
      select = select_uct if c.selection == "uct" else select_puct
      return select(tree, nodes, count, c=constant)
    mix = {"sample": c.sample, "mix_lambda": c.mix_lambda, "mix_alpha": c.mix_alpha}
    return select_aflow(nodes, count, self._rng("select", round), **mix)

  def _slot(self, draft: rounds.Draft, index: int, parent: Node) -> Slot:
    """The prompt and the request key of one parent."""
    config, round = self.config, draft.round
    experience = experience_lines(draft.tree.children(parent.id), config.experience)
    rng = self._rng("logs", round, parent.id, index)
    logs = log_text(parent.log, self._by_id, config.logs, rng)
    messages = messages_for(
      parent,
      experience,
      logs,
      style=config.prompt,
      question_type=config.question_type,
      operators=config.operators,
    )
    key = stable_hash(self.seed, "propose", round, parent.id, index)
    return Slot(index, f"{round}/{index}", parent, messages, key)

  async def _run_slot(
    self, slot: Slot, common: Sequence[Problem], verdicts: dict[str, asyncio.Task[Verdict]]
  ) -> list[Child]:
    """Proposes and judges one group; groups overlap, equal children of a round are judged once."""
    completions = await self._proposer(slot.messages, self.config.group_size, slot.key)
    if len(completions) != self.config.group_size:
      raise ValueError(
        f"the proposer gave {len(completions)} completions, expected {self.config.group_size}"
      )
    jobs = (self._child(slot, i, c, common, verdicts) for i, c in enumerate(completions))
    judged = await gather_all(self._counted(job) for job in jobs)
    return [child for turns in judged for child in turns]

  async def _counted(self, job: Coroutine[Any, Any, list[Child]]) -> list[Child]:
    """A proposal's turns, once they are judged; shown by the last stage that it reached."""
    turns = await job
    self._shown.advance()
    child = turns[-1]
    self._shown.count("running" if child.runs else f"failed {child.verdict.stage}")
    return turns

  async def _child(
    self,
    slot: Slot,
    index: int,
    completion: Completion,
    common: Sequence[Problem],
    verdicts: dict[str, asyncio.Task[Verdict]],
  ) -> list[Child]:
    """A proposal, then its repairs until one runs; the policy is told what was wrong each time."""
    child = await self._judge(slot, index, completion, common, verdicts)
    turns, messages = [child], slot.messages
    for turn in range(1, self.config.repairs + 1):
      failure = child.verdict.failure
      if failure is None or child.lost:
        break
      messages = repair_messages(messages, child.completion.text, failure)
      key = stable_hash(self.seed, "repair", slot.key, index, turn)
      (repaired,) = await self._proposer(messages, 1, key)
      child = await self._judge(slot, index, repaired, common, verdicts)
      child = dataclasses.replace(child, turn=turn)
      turns.append(child)
    return turns

  async def _refill(
    self,
    round: int,
    slots: Sequence[Slot],
    groups: Sequence[Sequence[Child]],
    common: Sequence[Problem],
    verdicts: dict[str, asyncio.Task[Verdict]],
  ) -> list[list[Child]]:
    """Second groups for parents whose proposals all earned the same; at most config.refill a round.

    Source: dynamic sampling of DAPO, arXiv:2503.14476, section 3.2, with a budget.
    """
    again = []
    for slot, group in zip(slots, groups, strict=True):
      own = (c for c in group if not c.turn and not c.lost)
      rewards = {rounds.reward_of(c, self.config.reward)[0] for c in own}
      if len(rewards) == 1 and len(again) < self.config.refill:
        key = stable_hash(self.seed, "refill", round, slot.parent.id, slot.index)
        again.append(dataclasses.replace(slot, group=f"{slot.group}/again", key=key))
    return await gather_all(self._run_slot(slot, common, verdicts) for slot in again)

  async def _judge(
    self,
    slot: Slot,
    index: int,
    completion: Completion,
    common: Sequence[Problem],
    verdicts: dict[str, asyncio.Task[Verdict]],
  ) -> Child:
    child = Child(slot, index, completion, modification=modification_of(completion.text))
    edit = parse_reply(completion.text)
    if not isinstance(edit, Edit):
      return dataclasses.replace(child, verdict=Verdict("format", edit))
    child = dataclasses.replace(child, source=edit.source)
    key = check(edit.source, slot.parent, self.config.operators, self.config.is_code)
    if isinstance(key, Failure):
      return dataclasses.replace(child, verdict=Verdict("static", key), copies=key is COPY)
    if key not in verdicts:
      job = self._trials.judge(edit.source, key, common, self.config.smoke_problems)
      verdicts[key] = asyncio.ensure_future(job)
    return dataclasses.replace(child, canonical=key, verdict=await verdicts[key])

  def _refuse_if_nothing_fits(self, children: Sequence[Child]) -> None:
    if children and all(c.completion.finish_reason == "refused" for c in children):
      raise UserError(
        "no proposal prompt of this round fits the policy's context: raise "
        "config.sampler.context, or lower config.search.logs, config.search.experience or "
        "config.sampler.max_new_tokens"
      )

  async def _validate_best(self, tree: Tree, children: Sequence[Child]) -> dict[str, Verdict]:
    """Full validation of the round's best children that have none yet, by key."""
    ranked = sorted(
      (c for c in children if c.runs), key=lambda c: (-c.verdict.mean, c.slot.index, c.index)
    )
    sources: dict[str, WorkflowSource] = {}
    for child in ranked:
      known = tree.find(child.canonical)
      if len(sources) < self.config.full_top and (known is None or known.stage != "full"):
        sources.setdefault(child.canonical, child.source)
    verdicts = await gather_all(self._trials.validate(s, k, self._full) for k, s in sources.items())
    done = zip(sources, verdicts, strict=True)
    return {key: v for key, v in done if not any(math.isnan(t.score) for t in v.trials)}

  def _commit(self, draft: rounds.Draft, starts_used: int) -> None:
    events = (*self._state.events, *draft.events)
    self._state = SearchState(events, draft.tree, draft.round, starts_used)
    self.workspace.commit(draft.events, draft.tree, draft.trials, self._stages)
