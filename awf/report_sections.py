"""Sections of the report page about what was found and learned; none needs a script."""

from __future__ import annotations

import collections
import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from awf import report_charts as charts
from awf import report_parts as parts
from awf.report_data import wilson_interval
from awf.report_facts import step_seconds, to_copy
from awf.report_read import Run, Search, best_node, is_number, lineage, numbers
from awf.search.tree import NO_NODE, Node, Tree

MAX_LISTED = 60  # rows of a list
# Shown first, in this order; every other metric follows behind a fold.
CURVES = (
  "reward",
  "reward_std",
  "mcts/best_score",
  "mcts/valid_rate",
  "mcts/success",
  "frac_reward_zero_std",
  "loss",
  "entropy",
  "kl",
  "grad_norm",
  "clip_ratio/region_mean",
  "completions/mean_length",
  "completions/clipped_ratio",
  "sampling/sampling_logp_difference/mean",
)
PASS = "mcts/pass@"


def scored(score: float, count: int) -> str:
  """A score with its interval."""
  low, high = wilson_interval(score, count)
  return f"{parts.number(score)} [{parts.number(low, 2)}, {parts.number(high, 2)}]"


def overview(run: Run) -> str:
  values: list[tuple[str, str]] = []
  for search in run.searches:
    tree, name = search.tree, search.name
    best, nodes = best_node(tree), list(tree.nodes.values())
    proposed = [node for node in nodes if node.parent != NO_NODE]
    valid = sum(node.failure is None for node in proposed)
    values += [
      (f"{name}: seed", parts.number(tree.nodes[min(tree.nodes)].score)),
      (f"{name}: best", parts.number(best.score if best else math.nan)),
      ("workflows evaluated", parts.number(sum(node.evaluated for node in nodes))),
      ("proposals that ran", f"{valid:,} / {len(proposed):,}"),
    ]
  steps = [row["step"] for row in run.metrics if isinstance(row.get("step"), int)]
  if steps:
    values.append(("rounds", parts.number(max(steps))))
  spent = step_seconds(run).get("time/step", 0.0)
  if spent:
    values.append(("minutes in rounds", parts.number(spent / 60, 3)))
  return parts.tiles(values) if values else ""


def learned(run: Run) -> str:
  """The policy's proposals before and after training, and the best workflow on the test split."""
  summary = run.summary
  rows = [
    (title, *(parts.number(summary.get(name)) for name in names))
    for title, *names in (
      ("mean score of the proposals", "proposal_score_before", "proposal_score_after"),
      ("among valid ones", "valid_score_before", "valid_score_after"),
      ("share that is valid", "valid_rate_first", "valid_rate_last"),
      ("different programs in 64", "different_in_64_before", "different_in_64_after"),
    )
    if summary.get(names[0]) is not None and summary.get(names[1]) is not None
  ]
  out = ""
  if rows and summary.get("parents") is not None:
    gain = summary.get("proposal_gain_interval")
    low, high = gain if isinstance(gain, list) and len(gain) == 2 else (None, None)
    out += parts.card(parts.table(("proposals of the policy", "before", "after"), rows, (1, 2)))
    out += parts.note(
      f"{parts.number(summary.get('proposals'))} proposals for {parts.number(summary['parents'])} "
      "parent workflows, scored on problems, neither of them seen in training. 95 % interval of "
      f"the gain: {parts.number(low)} to {parts.number(high)}."
    )
  out += _by_parent(run)
  if summary.get("test_score_best") is not None:
    out += parts.note(
      f"On the test split the best workflow scores {parts.number(summary['test_score_best'])}, "
      f"the seed workflow {parts.number(summary.get('test_score_seed'))}."
    )
  return out


def _by_parent(run: Run) -> str:
  """Mean score of the proposals for each held-out parent; during a run, what is known so far."""
  compared = numbers(run.summary.get("comparison"))
  before = numbers(compared.get("before")) or numbers(run.parts.get("before"))
  after = numbers(compared.get("after"))
  rows = [
    (f"parent {id}", _mean(scores), _mean(numbers(after.get("scores")).get(id)))
    for id, scores in numbers(before.get("scores")).items()
  ]
  if not rows:
    return ""
  text = "Each held-out parent: mean score of the policy's proposals, ring before, dot after."
  if not after:
    text += " The run has not ended: what follows training is still to come."
  return parts.card(charts.before_after(rows[:MAX_LISTED])) + parts.note(text)


def _mean(scores: Any) -> float | None:
  known = [x for x in scores if is_number(x)] if isinstance(scores, list) else []
  return sum(known) / len(known) if known else None


def evaluation(run: Run) -> str:
  contenders = run.evaluation.get("contenders")
  if not isinstance(contenders, dict):
    return ""
  rows, curves = [], {}
  for name, figures in contenders.items():
    if not isinstance(figures, dict):
      continue
    interval, shares = figures.get("interval"), numbers(figures.get("pass_at_k"))
    ends = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    points = [(float(k), v) for k, v in shares.items() if k.isdigit() and is_number(v)]
    if len(points) > 1:
      curves[name] = sorted(points)
    rows.append(
      (
        name,
        parts.number(figures.get("score")),
        f"{parts.number(ends[0])} to {parts.number(ends[1])}",
        ", ".join(f"@{k} {parts.number(value)}" for k, value in shares.items()),
      )
    )
  header = ("contender", "score", "95 % interval", "pass@k")
  problems = parts.number(run.evaluation.get("problems"))
  text = f"Shares of the {problems} problems of the test split, which the search never saw."
  counted = numbers(run.evaluation.get("grader"))
  if counted:
    names = ("graded", "malformed", "timeouts", "errors")
    graded, malformed, timeouts, errors = (parts.number(counted.get(name)) for name in names)
    text += (
      f" Answers graded: {graded}; malformed: {malformed}; time-outs: {timeouts}; errors of the "
      f"grader: {errors}."
    )
  chart = charts.line_chart("pass@k on the test split", curves, "k") if curves else ""
  listed = parts.card(parts.table(header, rows, numeric=(1, 2)))
  return listed + parts.note(text) + _charts([chart] if chart else [])


def _series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float | None]]]:
  """Metric -> points of the batch rows."""
  out: dict[str, list[tuple[float, float | None]]] = {}
  for row in rows:
    step = row.get("step")
    if row.get("level") in ("search", "epoch") or not is_number(step):
      continue
    for name, value in row.items():
      if name not in ("step", "epoch", "level"):
        point = float(value) if is_number(value) else None
        out.setdefault(name, []).append((float(step), point))
  return {name: points for name, points in out.items() if any(y is not None for _, y in points)}


def _charts(figures: Sequence[str]) -> str:
  return f'<div class="charts">{"".join(figures)}</div>' if figures else ""


def curves(run: Run) -> str:
  results, timings = _series(run.metrics), _series(run.timings)
  by_k = {name: points for name, points in results.items() if name.startswith(PASS)}
  first = [name for name in CURVES if name in results]
  shown = [charts.line_chart(name, {"": results[name]}) for name in first]
  if by_k:
    ordered = sorted(by_k, key=lambda name: (len(name), name))
    series = {name.removeprefix("mcts/"): by_k[name] for name in ordered}
    shown.insert(3, charts.line_chart("pass@k of the proposals", series))
  rest = sorted(set(results) - set(first) - set(by_k))
  folded = [charts.line_chart(name, {"": results[name]}) for name in rest]
  folded += [charts.line_chart(name, {"": points}) for name, points in sorted(timings.items())]
  out = _charts(shown)
  if folded:
    out += parts.details(f"{len(folded)} further metrics and timings", _charts(folded))
  return out


def best(search: Search, node: Node) -> str:
  """The best workflow: how it came to be, its code to copy, what it changed in its start."""
  path = lineage(search.tree, node)
  rows = [
    (at.id, at.modification or "start", scored(at.score, len(at.scores)), len(at.scores))
    for at in path
  ]
  changes = difference(path[0], node)
  changed = parts.card(parts.diff(changes)) if changes else parts.note("The start is still best.")
  header = ("node", "modification", "score [95 % interval]", "problems")
  return (
    f"<h3>Best workflow: node {node.id}, score {parts.esc(scored(node.score, len(node.scores)))}"
    "</h3>"
    + parts.card(parts.table(header, rows, numeric=(2, 3)))
    + to_copy("graph.py", node.source.graph)
    + to_copy("prompt.py", node.source.prompt)
    + f"<h4>What it changed in its start, node {path[0].id}</h4>"
    + changed
  )


def difference(root: Node, node: Node) -> list[str]:
  """Unified diff of workflow and prompts, from an earlier node to a later one."""
  return [
    line.rstrip("\n")
    for kind in ("graph", "prompt")
    for line in difflib.unified_diff(
      getattr(root.source, kind).splitlines(),
      getattr(node.source, kind).splitlines(),
      f"{kind} of {root.id}",
      f"{kind} of {node.id}",
      lineterm="",
    )
  ]


def failures(tree: Tree) -> str:
  failed = [node for node in tree.nodes.values() if node.failure is not None]
  if not failed:
    return ""
  counts: collections.Counter[tuple[str, str, str]] = collections.Counter()
  for node in failed:
    assert node.failure is not None
    counts[(node.stage, node.failure.kind, node.failure.message[:300])] += 1
  rows = [
    (stage, kind, count, message)
    for (stage, kind, message), count in sorted(
      counts.items(), key=lambda item: (-item[1], item[0])
    )
  ]
  more = (
    parts.note(f"{len(rows) - MAX_LISTED} rarer ones left out.") if len(rows) > MAX_LISTED else ""
  )
  header = ("stage", "kind", "times", "message")
  heading = f"<h3>Failed proposals: {len(failed)}</h3>"
  return heading + parts.card(parts.table(header, rows[:MAX_LISTED], numeric=(2,))) + more


def rounds(scores: Mapping[int, float]) -> str:
  rows = [(id, parts.number(score)) for id, score in scores.items()]
  return parts.card(parts.table(("round", "score"), rows, numeric=(1,))) if rows else ""
