"""Mode report: one self-contained HTML page of a run, made of the run directory's files alone.

No script, no external resource, everything that a model wrote escaped. A file that is missing or
broken costs its section, never the page.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from awf import report_parts as parts
from awf.files import write_atomic
from awf.metrics import read_rows
from awf.search.tree import NO_NODE, Node, Tree, replay
from awf.snapshot import STATUS
from awf.types import UserError

MAX_FILE_BYTES = 200 << 20
MAX_SEARCHES = 8  # of single problems that are shown
MAX_DRAWN = 300  # nodes of a drawing
MAX_LISTED = 60  # rows of a list
# Shown first, in this order; every other metric follows behind a fold.
CURVES = (
  "reward",
  "reward_std",
  "mcts/best_score",
  "mcts/valid_rate",
  "mcts/success",
  "mcts/pass@",  # every k
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
_HEAD = (
  '<!doctype html><html lang="en"><head><meta charset="utf-8">'
  '<meta name="viewport" content="width=device-width,initial-scale=1">'
  '<meta http-equiv="Content-Security-Policy" '
  "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
)


@dataclasses.dataclass
class Run:
  """What could be read of a run; `faults` says what could not."""

  path: pathlib.Path
  record: dict[str, Any] = dataclasses.field(default_factory=dict)  # config.json
  metrics: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  timings: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)  # eval.json
  summary: dict[str, Any] = dataclasses.field(default_factory=dict)  # summary.json
  backup: dict[str, Any] = dataclasses.field(default_factory=dict)  # backup.json
  trees: dict[str, Tree] = dataclasses.field(default_factory=dict)  # data set -> forest
  scores: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)  # without a journal
  trajectories: dict[str, int] = dataclasses.field(default_factory=dict)  # file -> lines
  faults: list[str] = dataclasses.field(default_factory=list)


def run_report(config: Any, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Mode `report`: writes the page and returns the JSON line."""
  del config  # a report is made of files alone
  path = write_report(workdir)
  return {"report": str(path), "bytes": path.stat().st_size, "workdir": os.fspath(workdir)}


def write_report(workdir: str | os.PathLike[str]) -> pathlib.Path:
  """Writes DIR/report.html and returns its path.

  Raises:
    UserError: DIR does not exist or holds nothing of a run.
  """
  path = pathlib.Path(workdir)
  if not path.is_dir():
    raise UserError(f"no such directory: {path}; expected the directory of a run in --workdir")
  run = read_run(path)
  if not (run.record or run.metrics or run.timings or run.trees or run.evaluation):
    raise UserError(f"{path} holds no run: expected config.json or metrics.jsonl; set --workdir")
  target = path / "report.html"
  write_atomic(target, render(run))
  return target


def read_run(path: pathlib.Path) -> Run:
  """Reads a run directory; what is missing stays empty."""
  run = Run(path)
  run.record = _object(path / "config.json", run)
  run.evaluation = _object(path / "eval.json", run)
  run.summary = _object(path / "summary.json", run)
  run.backup = _object(path / STATUS, run)
  run.metrics = _rows(path / "metrics.jsonl", run)
  run.timings = _rows(path / "timings.jsonl", run)
  for journal in _journals(path):
    try:
      tree = replay(_rows(journal, run))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      run.faults.append(f"{journal.name} of {journal.parent.name}: {type(error).__name__}: {error}")
      continue
    if tree.nodes:
      name = journal.parent.name
      run.trees[name if len(journal.relative_to(path).parts) == 3 else journal.parts[-3]] = tree
  for results in sorted(path.glob("workspace/*/workflows/results.json")):
    if (name := results.parts[-3]) not in run.trees:
      run.scores[name] = _round_scores(results, run)
  for file in sorted(path.glob("trajectories/*.jsonl")):
    with open(file, "rb") as lines:
      run.trajectories[file.name] = sum(1 for line in lines if line.strip())
  return run


def _journals(path: pathlib.Path) -> list[pathlib.Path]:
  """Of the search over the data set, or of the first searches over single problems."""
  found = sorted(path.glob("workspace/*/journal.jsonl"))
  return found or sorted(path.glob("workspace/*/*/journal.jsonl"))[:MAX_SEARCHES]


def _object(path: pathlib.Path, run: Run) -> dict[str, Any]:
  if not path.is_file():
    return {}
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError) as error:
    run.faults.append(f"{path.name}: {type(error).__name__}: {error}")
    return {}
  return found if isinstance(found, dict) else {}


def _round_scores(path: pathlib.Path, run: Run) -> dict[int, float]:
  """Mean score of each round in AFlow's results.json, as a search by AFlow itself leaves it."""
  passes: dict[int, list[float]] = {}
  try:
    text = path.read_text(encoding="utf-8")
    for row in json.loads(text) if text.strip() else []:
      passes.setdefault(int(row["round"]), []).append(float(row["score"]))
  except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
    run.faults.append(f"{path.name}: {type(error).__name__}: {error}")
    return {}
  return {id: sum(scores) / len(scores) for id, scores in sorted(passes.items())}


def _rows(path: pathlib.Path, run: Run) -> list[dict[str, Any]]:
  try:
    if path.is_file() and path.stat().st_size > MAX_FILE_BYTES:
      raise ValueError(f"larger than {MAX_FILE_BYTES} bytes")
    return read_rows(path)
  except (OSError, ValueError, RecursionError) as error:
    run.faults.append(f"{path.name}: {type(error).__name__}: {error}")
    return []


def render(run: Run) -> str:
  """The page's HTML."""
  config = run.record.get("config")
  name = config.get("name", "") if isinstance(config, dict) else ""
  title = f"awf run {name or run.path.resolve().name}"
  about = {key: run.record.get(key) for key in ("mode", "started", "commit", "backend")}
  about["commit"] = str(about["commit"] or "")[:12]
  line = " · ".join(f"{key} {value}" for key, value in about.items() if value)
  body = [
    f"<header><h1>{parts.esc(title)}</h1>{parts.note(line)}</header>",
    _summary(run),
    parts.section("What was learned", _learned(run.summary)),
    parts.section("Test split", _evaluation(run.evaluation)),
    parts.section("Curves", _curves(run)),
    *(_search(name, tree) for name, tree in run.trees.items()),
    *(_rounds(name, scores) for name, scores in run.scores.items()),
    parts.section("Backups", _backups(run.backup)),
    parts.section("Configuration", _configuration(run)),
    parts.section("Could not be read", *(parts.note(fault) for fault in run.faults)),
  ]
  head = f"{_HEAD}<title>{parts.esc(title, 200)}</title><style>{parts.STYLE}</style></head>"
  return f"{head}<body>{''.join(body)}</body></html>\n"


def best_node(tree: Tree) -> Node | None:
  """The best node by full validation, or by whatever validation there is."""
  for stages in (("full",), ("subset", "full")):
    nodes = tree.selectable(stages)
    if nodes:
      return max(nodes, key=lambda node: (node.score, -node.id))
  return None


def _lineage(tree: Tree, node: Node) -> list[Node]:
  """From the root to the node."""
  path = [node]
  while path[-1].parent != NO_NODE:
    path.append(tree.nodes[path[-1].parent])
  return path[::-1]


def _summary(run: Run) -> str:
  values: list[tuple[str, str]] = []
  for name, tree in run.trees.items():
    best, nodes = best_node(tree), list(tree.nodes.values())
    proposed = [node for node in nodes if node.parent != NO_NODE]
    seed = tree.nodes[min(tree.nodes)]
    valid = sum(node.failure is None for node in proposed)
    values += [
      (f"{name}: seed", parts.number(seed.score)),
      (f"{name}: best", parts.number(best.score if best else math.nan)),
      ("workflows evaluated", parts.number(sum(node.evaluated for node in nodes))),
      ("proposals that ran", f"{valid} of {len(proposed)}"),
    ]
  steps = [row["step"] for row in run.metrics if isinstance(row.get("step"), int)]
  if steps:
    values.append(("last step", parts.number(max(steps))))
  seconds = [row.get("time/step") for row in run.timings]
  spent = sum(value for value in seconds if isinstance(value, int | float))
  if spent:
    values.append(("minutes of steps", parts.number(spent / 60, 3)))
  if run.trajectories:
    values.append(("trajectory lines", parts.number(sum(run.trajectories.values()))))
  return parts.tiles(values) if values else ""


def _learned(summary: Mapping[str, Any]) -> str:
  """The policy's proposals before and after training, and the best workflow on the test split."""
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
  if summary.get("test_score_best") is not None:
    out += parts.note(
      f"On the test split the best workflow scores {parts.number(summary['test_score_best'])}, "
      f"the seed workflow {parts.number(summary.get('test_score_seed'))}."
    )
  return out


def _evaluation(evaluation: Mapping[str, Any]) -> str:
  contenders = evaluation.get("contenders")
  if not isinstance(contenders, dict):
    return ""
  rows = []
  for name, figures in contenders.items():
    if not isinstance(figures, dict):
      continue
    interval, pass_at = figures.get("interval"), figures.get("pass_at_k")
    ends = interval if isinstance(interval, list) and len(interval) == 2 else (None, None)
    shares = pass_at.items() if isinstance(pass_at, dict) else ()
    rows.append(
      (
        name,
        parts.number(figures.get("score")),
        f"{parts.number(ends[0])} to {parts.number(ends[1])}",
        ", ".join(f"@{k} {parts.number(value)}" for k, value in shares),
      )
    )
  header = ("contender", "score", "95 % interval", "pass@k")
  problems = parts.number(evaluation.get("problems"))
  text = f"Shares of the {problems} problems of the test split, which the search never saw."
  return parts.card(parts.table(header, rows, numeric=(1, 2))) + parts.note(text)


def _series(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float | None]]]:
  """Metric -> points of the batch rows."""
  out: dict[str, list[tuple[float, float | None]]] = {}
  for row in rows:
    step = row.get("step")
    if (
      row.get("level") in ("search", "epoch")
      or isinstance(step, bool)
      or not isinstance(step, int | float)
    ):
      continue
    for name, value in row.items():
      if name in ("step", "epoch", "level"):
        continue
      known = isinstance(value, int | float) and not isinstance(value, bool)
      point = float(value) if known and math.isfinite(value) else None
      out.setdefault(name, []).append((float(step), point))
  return {name: points for name, points in out.items() if any(y is not None for _, y in points)}


def _curves(run: Run) -> str:
  results, timings = _series(run.metrics), _series(run.timings)
  first = [
    name for curve in CURVES for name in results
    if name == curve or (curve.endswith("@") and name.startswith(curve))
  ]  # fmt: skip
  rest = sorted(set(results) - set(first))
  shown = [parts.line_chart(name, results[name]) for name in first]
  folded = [parts.line_chart(name, results[name]) for name in rest]
  folded += [parts.line_chart(name, points) for name, points in sorted(timings.items())]
  out = f'<div class="charts">{"".join(shown)}</div>' if shown else ""
  if folded:
    out += parts.details(
      f"{len(folded)} further metrics and timings", f'<div class="charts">{"".join(folded)}</div>'
    )
  return out


def _search(name: str, tree: Tree) -> str:
  best = best_node(tree)
  return parts.section(
    f"Search on {name}",
    _drawing(tree, best),
    _best(tree, best) if best else parts.note("No workflow was evaluated."),
    _failures(tree),
  )


def _rounds(name: str, scores: Mapping[int, float]) -> str:
  rows = [(id, parts.number(score)) for id, score in scores.items()]
  listed = parts.table(("round", "score"), rows, numeric=(1,)) if rows else ""
  return parts.section(f"Rounds on {name}", listed and parts.card(listed))


def _drawing(tree: Tree, best: Node | None) -> str:
  """Evaluated nodes; children that failed are counted at their parent."""
  path = [node.id for node in _lineage(tree, best)] if best else []
  shown = [node for node in tree.nodes.values() if node.evaluated]
  left_out = max(0, len(shown) - MAX_DRAWN)
  if left_out:
    ranked = sorted(shown, key=lambda node: (-node.score, node.id))[:MAX_DRAWN]
    keep: set[int] = set()
    for node in ranked:
      while node.id not in keep:
        keep.add(node.id)
        node = tree.nodes.get(node.parent, node)
    shown = [node for node in shown if node.id in keep]
  failed = collections.Counter(node.parent for node in tree.nodes.values() if node.failure)
  drawing = parts.tree_drawing(
    parents={node.id: node.parent for node in shown},
    labels={
      node.id: f"{node.id}: {node.score:.2f}" + (f"  −{failed[node.id]}" if failed[node.id] else "")
      for node in shown
    },
    shades={node.id: node.score for node in shown},
    hints={
      node.id: f"{node.id}: {node.modification or 'seed'} ({node.stage}, {len(node.scores)} "
      f"problems, visits {node.visits})"
      for node in shown
    },
    best_path=path,
  )
  text = "Number and score of each workflow; −n counts its children that failed; ring: the best."
  if left_out:
    text += f" The best {len(shown)} of {len(shown) + left_out} are drawn."
  return parts.card(drawing) + parts.note(text)


def _best(tree: Tree, best: Node) -> str:
  lineage = _lineage(tree, best)
  rows = [
    (node.id, node.modification or "start", parts.number(node.score), len(node.scores))
    for node in lineage
  ]
  root = lineage[0]
  changes = [
    line.rstrip("\n")
    for kind in ("graph", "prompt")
    for line in difflib.unified_diff(
      getattr(root.source, kind).splitlines(),
      getattr(best.source, kind).splitlines(),
      f"{kind} of {root.id}",
      f"{kind} of {best.id}",
      lineterm="",
    )
  ]
  changed = parts.card(parts.diff(changes)) if changes else parts.note("The start is still best.")
  header = ("round", "modification", "score", "problems")
  return (
    f"<h3>Best workflow: {best.id}, score {parts.esc(parts.number(best.score))}</h3>"
    + parts.card(parts.table(header, rows, numeric=(2, 3)))
    + f"<h3>What it changed in its start, {root.id}</h3>"
    + changed
    + parts.details("graph", parts.code(best.source.graph))
    + parts.details("prompts", parts.code(best.source.prompt))
  )


def _failures(tree: Tree) -> str:
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


def _backups(status: Mapping[str, Any]) -> str:
  """What the newest backup is, and why there is no newer one."""
  rows = [
    (title, parts.number(value) if isinstance(value, int | float) else value)
    for title, value in (
      ("newest", status.get("path")),
      ("made", status.get("when")),
      ("checkpoint", status.get("step")),
      ("megabytes", status.get("megabytes")),
      ("seconds", status.get("seconds")),
      ("backups made", status.get("count")),
      ("failed", status.get("failures")),
      ("last failure", status.get("failed")),
    )
    if value not in (None, "")
  ]
  return parts.card(parts.table(("backup", ""), rows)) if rows else ""


def _flat(value: Any, name: str = "") -> list[tuple[str, str]]:
  if isinstance(value, dict) and value:
    return [row for key in sorted(value, key=str) for row in _flat(value[key], f"{name}.{key}")]
  return [(name.lstrip("."), json.dumps(value))]


def _configuration(run: Run) -> str:
  out = ""
  for key in ("config", "versions", "devices"):
    value = run.record.get(key)
    if isinstance(value, dict) and value:
      out += parts.details(key, parts.table(("field", "value"), _flat(value)))
  return out
