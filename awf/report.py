"""Mode report: one self-contained HTML page of a run, made of the run directory's files alone.

Nothing is loaded from elsewhere. What a model wrote is escaped where it stands in the page, and
packed as base64 where the script reads it; the page's policy names the script by its digest, so no
other one can run.
"""

from __future__ import annotations

import base64
import hashlib
import os
import pathlib
from typing import Any

from awf import report_facts as facts
from awf import report_parts as parts
from awf import report_sections as sections
from awf.files import write_atomic
from awf.report_data import pack
from awf.report_read import Run, Search, best_node, read_run
from awf.types import UserError

ASSETS = pathlib.Path(__file__).parent / "report_page"
SCRIPTS = ("base.js", "diff.js", "tree.js", "node.js", "main.js")  # in this order, as one
NO_SCRIPT = "The tree needs a browser of 2023 or later with scripts switched on."


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
  if run.is_empty:
    raise UserError(f"{path} holds no run: expected config.json or metrics.jsonl; set --workdir")
  target = path / "report.html"
  write_atomic(target, render(run))
  return target


def render(run: Run) -> str:
  """The page's HTML."""
  title = f"awf run {run.name}"
  about = {key: run.record.get(key) for key in ("mode", "started", "commit", "backend")}
  about["commit"] = str(about["commit"] or "")[:12]
  line = " · ".join(f"{key} {str(value)[:40]}" for key, value in about.items() if value)
  body = [
    f'<header><h1>{parts.esc(title)}</h1><button id="theme" type="button" hidden>theme</button>'
    f"{parts.note(line)}</header>",
    sections.overview(run),
    parts.section("Search tree", _tree()) if run.searches else "",
    *(_search(search) for search in run.searches),
    *(
      parts.section(f"Rounds on {name}", sections.rounds(scores))
      for name, scores in run.scores.items()
    ),
    parts.section("What was learned", sections.learned(run)),
    parts.section("Test split", sections.evaluation(run)),
    parts.section("Curves", sections.curves(run)),
    parts.section("Budget", facts.budget(run)),
    parts.section("Sandbox and grader", facts.machine(run)),
    parts.section("Backups", facts.backups(run)),
    parts.section("How to reproduce", facts.reproduce(run)),
    parts.section("Configuration", facts.configuration(run)),
    parts.section("Could not be read", *(parts.note(fault) for fault in run.faults)),
  ]
  style = (ASSETS / "style.css").read_text(encoding="utf-8")
  script = "".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
  return (
    f"{_head(title, script)}<style>{style}</style></head><body>{''.join(body)}"
    f'<script type="application/octet-stream" id="data">{pack(run)}</script>'
    f"<script>{script}</script></body></html>\n"
  )


def _head(title: str, script: str) -> str:
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
  policy = (
    f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
    "base-uri 'none'; form-action 'none'"
  )
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    f"<title>{parts.esc(title, 200)}</title>"
  )


def _tree() -> str:
  """Where the script draws the forest and opens its nodes."""
  return f'<div id="forest"><p class="soft">{parts.esc(NO_SCRIPT)}</p></div>'


def _search(search: Search) -> str:
  best = best_node(search.tree)
  return parts.section(
    f"Search on {search.name}",
    sections.best(search, best) if best else parts.note("No workflow was evaluated."),
    sections.failures(search.tree),
  )
