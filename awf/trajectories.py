"""The proposals of every round as JSON lines: DIR/trajectories/round_NNNN.jsonl."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_round(folder: Path, step: int, records: Iterable[Mapping[str, Any]]) -> None:
  """Writes the file of one round, whole; a repeated round replaces it.

  Args:
    folder: made when it is not there.
    step: the round's number in the run, from 1.
    records: one for each proposal (`RoundResult.records`).
  """
  folder.mkdir(exist_ok=True)
  temporary = folder / ".new"
  temporary.write_text("".join(json.dumps(row) + "\n" for row in records), encoding="utf-8")
  temporary.replace(folder / f"round_{step:04d}.jsonl")


def drop_rounds_after(folder: Path, step: int) -> None:
  """Takes away the files of rounds that are still to come."""
  for file in folder.glob("round_*.jsonl"):
    if int(file.stem.removeprefix("round_")) > step:
      file.unlink()
