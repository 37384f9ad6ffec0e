"""Drives an upstream AFlow checkout, unmodified: files it wants, its process, its results.

AFlow runs with a folder of ours as its working directory and the checkout on its path, so that
nothing is written to the checkout. It reads config/config2.yaml, data/datasets and workspace there;
`workspace` is a link to the run's own.

Source: FoundationAgents/AFlow at 364399e, `run.py` and `scripts/` (names and file formats only).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from awf.files import write_atomic
from awf.search import adopt
from awf.search.compact import compact_prompt
from awf.search.stages import key_of
from awf.search.tree import SEED, Node, Tree, add_event, replay
from awf.types import Problem, UserError, WorkflowSource
from awf.workflow.contract import OPERATORS, graph_header
from awf.workflow.static import static_check

log = logging.getLogger("awf")

EXECUTOR, OPTIMIZER = "awf-executor", "awf-optimizer"  # the models' names, here and in AFlow
# Fields of a row that AFlow's benchmark reads, by data set.
FIELDS = {
  "GSM8K": ("question", "answer"),
  "MATH": ("problem", "solution"),
  "HumanEval": ("prompt", "entry_point", "canonical_solution", "test"),
  "MBPP": ("prompt", "entry_point", "code", "test"),
  "HotpotQA": ("question", "answer", "context"),
  "DROP": ("context", "ref_text"),
}
_END_SECONDS = 10.0  # between SIGTERM and SIGKILL
_SAMPLE = re.compile(
  r"<sample>.*?<score>(.*?)</score>\s*<graph>(.*?)</graph>\s*<prompt>(.*?)</prompt>", re.DOTALL
)


@dataclasses.dataclass(frozen=True)
class Proposal:
  """One reply to AFlow's optimiser, as our server gave it."""

  text: str
  tokens: int
  finish_reason: str


def check_checkout(path: str, python: str, dataset: str) -> None:
  """Checks what can be known before anything is started.

  Raises:
    UserError: no checkout, no such interpreter, or a data set that AFlow has not.
  """
  if not (Path(path) / "scripts" / "optimizer.py").is_file():
    raise UserError(
      f"config.aflow.path = {path!r}: expected a checkout of FoundationAgents/AFlow, found no "
      "scripts/optimizer.py there"
    )
  if python and shutil.which(os.path.expanduser(python)) is None:
    raise UserError(
      f"config.aflow.python = {python!r}: no such interpreter; expected one that has the packages "
      "of AFlow's requirements.txt"
    )
  if dataset not in FIELDS:
    raise UserError(
      f"config.task.name: AFlow has no data set {dataset}; expected one of {', '.join(FIELDS)}, or "
      "config.search.driver=awf"
    )


class AFlowOptimizerWrapper:
  """One search by upstream AFlow.

  Args:
    checkout: of AFlow; it is not changed.
    python: interpreter with its requirements; "" is the one that runs this.
    folder: AFlow's working directory, made here.
    workspace: the run's workspace, where its rounds end up.
    dataset: AFlow's name.
    question_type: qa, math or code.
    operators: that are offered to the optimiser.
    seed: the first workflow, where the workspace has none.

  Raises:
    UserError: as `check_checkout`.
  """

  def __init__(
    self,
    checkout: str,
    python: str,
    folder: Path,
    workspace: Path,
    *,
    dataset: str,
    question_type: str,
    operators: tuple[str, ...],
    seed: WorkflowSource,
  ) -> None:
    check_checkout(checkout, python, dataset)
    self._checkout = Path(checkout).resolve()
    found = shutil.which(os.path.expanduser(python)) if python else None
    self._python = os.path.abspath(found) if found else sys.executable  # links stay: a venv's do
    self.folder, self._workspace = Path(folder).resolve(), Path(workspace).resolve()
    self.dataset, self._kind, self._operators, self._seed = dataset, question_type, operators, seed
    self.path = self._workspace / dataset / "workflows"
    self.log = self.folder / "aflow.log"

  # ---- before ----

  def prepare(
    self,
    base_url: str,
    key: str,
    sampling: Mapping[str, Mapping[str, float]],
    rows: Iterable[Mapping[str, Any]],
    public_tests: Path | None = None,
  ) -> None:
    """Writes what AFlow reads.

    Args:
      base_url: of the server that answers for both models, with /v1.
      key: its bearer token.
      sampling: temperature and top_p of `EXECUTOR` and of `OPTIMIZER`.
      rows: problems of the validation, in AFlow's form.
      public_tests: AFlow's file of them, for code.

    Raises:
      UserError: rows without a field that AFlow reads, or a checkout without the data set's
        template.
    """
    data = self.folder / "data" / "datasets"
    for path in (data, self.folder / "config", self._workspace):
      path.mkdir(parents=True, exist_ok=True)
    link = self.folder / "workspace"
    if not link.is_symlink():
      link.symlink_to(os.path.relpath(self._workspace, self.folder), target_is_directory=True)
    models = {
      name: {"api_type": "openai", "base_url": base_url, "api_key": key, **dict(sampling[name])}
      for name in (EXECUTOR, OPTIMIZER)
    }
    config = self.folder / "config" / "config2.yaml"
    write_atomic(config, json.dumps({"models": models}, indent=2) + "\n")  # JSON is YAML
    config.chmod(0o600)
    lines = [json.dumps(aflow_row(self.dataset, row)) + "\n" for row in rows]
    write_atomic(data / f"{self.dataset.lower()}_validate.jsonl", "".join(lines))
    if public_tests is not None and public_tests.is_file():
      shutil.copyfile(public_tests, data / public_tests.name)
    self._make_workspace()

  def _make_workspace(self) -> None:
    """The operators' template of the checkout, and round 1."""
    template = self.path / "template"
    if not template.is_dir():
      own = self._checkout / "workspace" / self.dataset / "workflows" / "template"
      if not own.is_dir():
        raise UserError(f"config.aflow.path: expected the data set's operators in {own}")
      shutil.copytree(own, template, ignore=shutil.ignore_patterns("__pycache__"))
    first = self.path / "round_1"
    if not (first / "graph.py").is_file():
      first.mkdir(parents=True, exist_ok=True)
      write_atomic(first / "graph.py", graph_header(self.dataset, 1) + self._seed.graph + "\n")
      write_atomic(first / "prompt.py", self._seed.prompt + "\n")
      write_atomic(first / "__init__.py", "")
    results = self.path / "results.json"
    if not results.is_file() or not results.stat().st_size:
      write_atomic(results, "[]\n")  # an empty file is what its reader fails on

  def rounds_done(self) -> int:
    """Rounds with a score, the seed not among them."""
    return max([*self.scores(), 1]) - 1

  def scores(self) -> dict[int, float]:
    """Mean score by round, of what AFlow has written so far."""
    try:
      rows = json.loads((self.path / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it is writing
      return {}
    found: dict[int, list[float]] = {}
    for row in rows if isinstance(rows, list) else []:
      found.setdefault(int(row["round"]), []).append(float(row["score"]))
    return {id: sum(x) / len(x) for id, x in sorted(found.items())}

  # ---- its process ----

  def run(
    self,
    rounds: int,
    *,
    sample: int,
    validation_rounds: int,
    converges: bool,
    should_stop: Callable[[], bool],
    on_round: Callable[[int, float], None],
  ) -> bool:
    """Runs AFlow's Optimizer in a process of its own until it ends.

    Args:
      rounds: that are to be made in all; those in the workspace count.
      sample: size of AFlow's pool of parents.
      validation_rounds: evaluations of a workflow, averaged.
      converges: whether it may stop early.
      should_stop: asked twice a second; True ends the process.
      on_round: told of each round with a score, once.

    Returns:
      Whether it ended by itself.

    Raises:
      UserError: it failed, with the last line that it said.
    """
    done = self.rounds_done()
    fields = {
      "dataset": self.dataset,
      "question_type": self._kind,
      "optimizer": OPTIMIZER,
      "executor": EXECUTOR,
      "operators": list(self._operators),
      "sample": sample,
      "check_convergence": converges,
      "optimized_path": "workspace",
      "initial_round": done + 1,
      "max_rounds": max(0, rounds - done),
      "validation_rounds": validation_rounds,
    }
    told = self.scores()
    with open(self.log, "ab") as out:
      process = self._start(fields, out)
      try:
        while process.poll() is None and not should_stop():
          time.sleep(0.5)
          told = self._tell(told, on_round)
        is_over = process.poll() is not None
      finally:
        _end(process)
    self._tell(told, on_round)
    if is_over and process.returncode:
      raise UserError(
        f"AFlow ended with exit code {process.returncode}: {self._last_line()}; {self.log} says "
        "more. config.aflow.python must name an interpreter with AFlow's requirements"
      )
    return is_over

  def _start(self, fields: Mapping[str, Any], out: IO[bytes]) -> subprocess.Popen[bytes]:
    main = Path(__file__).with_name("aflow_main.py").read_text(encoding="utf-8")
    kept = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR")
    env = {name: os.environ[name] for name in kept if name in os.environ}
    env |= {
      "HOME": str(self.folder),
      "PYTHONPATH": os.pathsep.join([str(self.folder), str(self._checkout)]),
      "PYTHONDONTWRITEBYTECODE": "1",  # the checkout stays as it is
      "PYTHONUNBUFFERED": "1",
    }
    return subprocess.Popen(
      [self._python, "-c", main, json.dumps(fields)],
      cwd=self.folder,
      env=env,
      stdin=subprocess.DEVNULL,
      stdout=out,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )

  def _tell(
    self, told: Mapping[int, float], on_round: Callable[[int, float], None]
  ) -> Mapping[int, float]:
    now = self.scores()
    for id in sorted(now.keys() - told.keys()):
      on_round(id, now[id])
    return {**told, **now}

  def _last_line(self) -> str:
    text = self.log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"

  # ---- after ----

  def collect(self, problems: Sequence[Problem]) -> Tree:
    """Reads AFlow's rounds, repairs what it left half written, and writes the search's journal."""
    reader = adopt.Reader(self.path)
    events = []
    for node in reader.nodes(problems, self._seed):
      is_valid = static_check(node.source, tuple(OPERATORS), self._kind == "code") is None
      events.append(add_event(dataclasses.replace(node, canonical=_key(node, is_valid))))
    for file, content in reader.repairs.items():
      if content is None:
        file.unlink()
      else:
        write_atomic(file, json.dumps(content, indent=4) + "\n")
    text = "".join(json.dumps(event, allow_nan=False) + "\n" for event in events)
    write_atomic(self.path.parent / "journal.jsonl", text)
    return replay(events)

  def trajectories(self, tree: Tree, proposals: Sequence[Proposal]) -> list[dict[str, Any]]:
    """The optimiser's replies in order, with the round that each became, if it did."""
    nodes = (n for n in tree.nodes.values() if n.evaluated and n.id != SEED)
    known = {_squeezed(n.source.graph, n.source.prompt): n for n in nodes}
    rows = []
    for proposal in proposals:
      parts = dict(re.findall(r"<(\w+)>(.*?)</\1>", proposal.text, re.DOTALL))
      node = known.get(_squeezed(parts.get("graph", ""), parts.get("prompt", "")))
      rows.append(
        {
          "round": None if node is None else node.id,
          "parent": None if node is None else node.parent,
          "score": None if node is None else node.score,
          "modification": parts.get("modification", "").strip(),
          "finish_reason": proposal.finish_reason,
          "tokens": proposal.tokens,
          "text": proposal.text,
        }
      )
    return rows


def _key(node: Node, is_valid: bool) -> str:
  return key_of(node.source) if is_valid else ""


def _squeezed(*texts: str) -> str:
  return "".join("".join(text.split()) for text in texts)


def _end(process: subprocess.Popen[bytes]) -> None:
  """Ends the process and all that it started; it has a group of its own."""
  for number in (signal.SIGTERM, signal.SIGKILL):
    if process.poll() is None:
      os.killpg(process.pid, number)
      try:
        process.wait(_END_SECONDS)
      except subprocess.TimeoutExpired:
        log.warning("AFlow does not end after signal %d", number)
  with contextlib.suppress(ProcessLookupError):  # the programs that it had started
    os.killpg(process.pid, signal.SIGKILL)


def aflow_row(dataset: str, row: Mapping[str, Any]) -> dict[str, Any]:
  """A row as AFlow's benchmark reads it.

  Raises:
    UserError: a field is missing.
  """
  out = dict(row)
  if dataset == "MATH" and "solution" not in out and "answer" in out:
    out["solution"] = f"\\boxed{{{out['answer']}}}"
  missing = [name for name in FIELDS[dataset] if name not in out]
  if missing:
    raise UserError(
      f"config.task.path: AFlow's {dataset} reads the fields {', '.join(FIELDS[dataset])}; a row "
      f"lacks {', '.join(missing)}: give its own files, config.task.path=AFlow/data/datasets"
    )
  return out


def compact_messages(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
  """AFlow's request for an edit as the compact prompt (`config.search.prompt`); others as they are.

  A small model that was trained on that prompt can so be AFlow's optimiser.
  """
  found = _SAMPLE.search(messages[-1]["content"]) if messages else None
  if found is None:
    return list(messages)
  score, graph, prompt = (part.strip() for part in found.groups())
  try:
    text = compact_prompt(WorkflowSource(graph, prompt), float(score))
  except ValueError:  # the score is no number
    return list(messages)
  return [*messages[:-1], {"role": "user", "content": text}]
