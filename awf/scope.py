"""Which searches a run makes, and which workflow it ends with: config.search.scope.

dataset: one search an episode, over all problems; its best workflow is the run's.
problem: one search for each problem that an episode takes. A workflow's score is on that problem,
drawn several times where the executor samples: the draws are copies of the problem, each with noise
of its own, so that the search itself knows of no scope.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from typing import Any

from awf.progress import Progress
from awf.search.curriculum import episode_problems, spread
from awf.search.stages import Trials, gather_all, key_of
from awf.summary import about_best
from awf.system import System
from awf.types import Problem, WorkflowSource, stable_hash

KEPT = 64  # workflows of single problems that are compared on the data set at the end
FINAL = 4  # of them that are validated in full


def make_scope(system: System) -> DatasetScope | ProblemScope:
  """The scope that the config asks for."""
  return (ProblemScope if system.config.search.scope == "problem" else DatasetScope)(system)


def draws_of(problem: Problem, count: int) -> tuple[Problem, ...]:
  """The problem `count` times, under names of its own: the same question, other noise."""
  return tuple(dataclasses.replace(problem, id=f"{problem.id}#{i + 1}") for i in range(count))


class DatasetScope:
  """One search an episode.

  Attributes:
    per_episode: searches of an episode.
    goes_on: whether a complete run goes on when more rounds of its last search are asked for.
  """

  per_episode, goes_on = 1, True

  def __init__(self, system: System):
    self._system = system

  def make_search(self, p: Progress, agree: Any) -> Any:
    """The search that is next."""
    return self._system.make_search(p.episode, agree)

  def end_search(self, p: Progress, search: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Takes the result of a search into the progress; `rows` are the metrics of its rounds."""
    del rows
    if p.best is None or search.best().score > p.best["score"]:
      p.best = about_best(search)

  def search_metrics(self, p: Progress) -> dict[str, float]:
    """A row of metrics for the search that has just ended; {} for none."""
    del p
    return {}

  async def best(self, p: Progress, search: Any) -> dict[str, Any]:
    """The run's workflow, as `about_best` tells of it; `search` is one that was cut off."""
    if p.best is None:
      return about_best(search)
    is_begun = search is not None and search.rounds_done
    last = about_best(search) if is_begun else p.best
    return last if last["score"] > p.best["score"] else p.best

  def figures(self, p: Progress) -> dict[str, Any]:
    """What the run's summary says beside the figures that all runs have."""
    del p
    return {}


class ProblemScope(DatasetScope):
  """One search for each problem of an episode; attributes as in DatasetScope."""

  goes_on = False

  def __init__(self, system: System):
    super().__init__(system)
    config, problems = system.config, system.search_problems
    self.per_episode = min(config.train.problems or len(problems), len(problems))
    self._draws = config.search.draws if config.executor.temperature > 0 else 1
    self._place = {p.id: i for i, p in enumerate(problems)}

  def make_search(self, p: Progress, agree: Any) -> Any:
    episode, index = divmod(p.episode, self.per_episode)
    state = self._state(p)
    if index == 0 and state["episode"] != episode:
      state["episode"], state["order"] = episode, self._order(state, episode)
    problem = self._system.search_problems[self._place[state["order"][index]]]
    return self._system.make_search(p.episode, agree, draws_of(problem, self._draws))

  def _state(self, p: Progress) -> dict[str, Any]:
    if p.by_problem is None:
      p.by_problem = {"episode": -1, "order": [], "rates": {}, "winners": {}, "ended": []}
    return p.by_problem

  def _order(self, state: dict[str, Any], episode: int) -> list[str]:
    """The problems of an episode: in turns of a seeded order, or by the solve rates so far."""
    config = self._system.config
    last = config.train.epochs * config.train.episodes - 1
    chosen = episode_problems(
      self._system.search_problems,
      {id: total / count for id, (total, count) in state["rates"].items()},
      config.search.curriculum,
      config.search.curriculum_share,
      episode / max(1, last),
      range(episode * self.per_episode, (episode + 1) * self.per_episode),
      lambda *what: random.Random(stable_hash(config.seed, "episode", *what)),
    )
    return [problem.id for problem in chosen]

  def end_search(self, p: Progress, search: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    state, best = self._state(p), search.best()
    id = state["order"][p.episode % self.per_episode]
    tree, seed = search.tree, search.tree.nodes[1]
    nodes = [n for n in tree.nodes.values() if n.evaluated and not n.duplicate_of]
    total, count = state["rates"].get(id, (0.0, 0))
    state["rates"][id] = [total + sum(n.score for n in nodes), count + len(nodes)]
    names = sorted({name for row in rows for name in row if name.startswith("mcts/pass@")})
    found = {name: [row[name] for row in rows if row.get(name) is not None] for name in names}
    figures = {name: sum(values) / len(values) for name, values in found.items() if values}
    figures |= {k: v for k, v in rows[-1].items() if k.startswith("mcts/solved@")} if rows else {}
    figures |= {"seed_score": seed.score, "best_score": best.score}
    state["ended"].append({"problem": self._place[id], **figures})
    winner = state["winners"].setdefault(best.canonical, {**about_best(search), "wins": 0})
    winner["wins"] += best.score > seed.score

  def search_metrics(self, p: Progress) -> dict[str, float]:
    """pass@k (mean over its rounds), solved@k, scores of seed and best, place of the problem."""
    return dict(self._state(p)["ended"][-1])

  async def best(self, p: Progress, search: Any) -> dict[str, Any]:
    """Of the workflows that are best on single problems, the best on the data set.

    Those that beat the seed most often, and the seed, run on `search.subset_problems` problems, the
    best of them on `search.full_problems`; validation problems alone.
    """
    system, config = self._system, self._system.config.search
    won = sorted(self._state(p)["winners"].values(), key=lambda w: -w["wins"])[:KEPT]
    if search is not None and search.rounds_done:
      won.append(about_best(search))
    source = system.seed_source
    seed = {"graph": source.graph, "prompt": source.prompt, "node": 1, "modification": "seed"}
    trials, rng = Trials(system.runner(), system.task), random.Random(stable_hash("final"))
    problems = system.search_problems
    full = spread(problems, min(config.full_problems or len(problems), len(problems)), rng)
    common = spread(full, min(config.subset_problems, len(full)), rng)

    async def ranked(workflows: list[dict[str, Any]], problems: Sequence[Problem]) -> Any:
      sources = [WorkflowSource(w["graph"], w["prompt"]) for w in workflows]
      verdicts = await gather_all(trials.validate(s, key_of(s), problems) for s in sources)
      scores = [sum(v.scores.values()) / max(1, len(v.scores)) for v in verdicts]
      rows = [{**w, "score": s} for w, s in zip(workflows, scores, strict=True)]
      return sorted(rows, key=lambda w: -w["score"])

    (tested,) = await ranked([seed], full)
    finalists = (await ranked(won, common))[:FINAL]
    best = (await ranked([tested, *finalists], full))[0]
    names = ("graph", "prompt", "score", "node", "modification")
    return {**{name: best[name] for name in names}, "seed_score": tested["score"]}

  def figures(self, p: Progress) -> dict[str, Any]:
    """Means over all searches that ended: scores on the problem itself, pass@k, solved@k."""
    ended = self._state(p)["ended"]
    names = sorted({name for row in ended for name in row} - {"problem"})
    rows = {name: [row[name] for row in ended if name in row] for name in names}
    means = {name.removeprefix("mcts/"): sum(values) / len(values) for name, values in rows.items()}
    return {"searches": len(ended), "by_problem": means}
