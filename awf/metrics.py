"""MetricsLogger: results and timings of a run as JSON lines, CSV and TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal

from awf.config_io import load_object
from awf.files import naming, write_atomic
from awf.types import Rollout, UserError

Metric = Callable[[Sequence[Rollout]], Any]  # gives {name: number}; checked at each call
Level = Literal["batch", "search", "epoch"]
TIMING_PREFIXES = ("perf/", "time/")  # wall-clock values: never in metrics.jsonl or metrics.csv
_KEYS = ("level", "epoch", "step")  # of every row; the rest are metrics


class MetricsLogger:
  """Writes metrics.jsonl, metrics.csv (both a function of config and seed), timings.jsonl and tb/.

  A metric is a name and a number: `logger.log(step, {"my/metric": 0.5})` adds one. Names that start
  with `perf/` or `time/` are timings wherever they are passed.

  Args:
    workdir: the run's directory; made when it is not there. Rows found there are kept.
    tensorboard: write event files.
    is_kept: False where another process writes the same rows: then there are no files.
  """

  def __init__(
    self, workdir: str | os.PathLike[str], tensorboard: bool = True, is_kept: bool = True
  ):
    self.path = pathlib.Path(workdir)
    self._is_kept, self._tensorboard = is_kept, tensorboard and is_kept
    if is_kept:
      self.path.mkdir(parents=True, exist_ok=True)
    self._results = self.path / "metrics.jsonl"
    self._timings = self.path / "timings.jsonl"
    self._csv = self.path / "metrics.csv"
    self._rows = read_rows(self._results)
    # A crash can leave half a line behind, which would spoil the next one.
    self._replace(self._results, _lines(self._rows))
    self._replace(self._timings, _lines(read_rows(self._timings)))
    self._columns: list[str] = []
    self._write_csv()
    self._writer: Any = None

  @property
  def rows(self) -> list[dict[str, Any]]:
    """All result rows, oldest first."""
    return [dict(row) for row in self._rows]

  @property
  def position(self) -> int:
    """Number of result rows written; belongs into a checkpoint, for `truncate`."""
    return len(self._rows)

  def log(
    self,
    step: int,
    results: Mapping[str, Any],
    timings: Mapping[str, Any] | None = None,
    epoch: int = 0,
    level: Level = "batch",
  ) -> None:
    """Writes one row.

    Args:
      step: optimiser step or search round, >= 0; rows come in the order of their steps.
      results: name -> number (Python, NumPy or JAX scalar); NaN and infinities are stored as null.
      timings: name -> number that depends on the machine: seconds, throughput, memory.
      epoch: of the training loop.
      level: "batch", "search" for what one search of a problem came to, or "epoch" for an
        aggregate.

    Raises:
      ValueError: a name that rows use themselves, a value that is no number, a step that is too
        early.
    """
    if self._rows and step < self._rows[-1]["step"]:
      raise ValueError(f"expected step >= {self._rows[-1]['step']}, got {step}: truncate() first")
    values = {name: _number(name, value) for name, value in results.items()}
    clock = {name: _number(name, value) for name, value in (timings or {}).items()}
    clock |= {name: values.pop(name) for name in list(values) if name.startswith(TIMING_PREFIXES)}
    head = {"level": level, "epoch": int(epoch), "step": int(step)}
    if values or not clock:
      self._add({**head, **dict(sorted(values.items()))})
    if clock:
      self._append(self._timings, _lines([{**head, **dict(sorted(clock.items()))}]))
    self._log_tensorboard(level, int(epoch), int(step), {**values, **clock})

  def log_epoch(
    self, epoch: int, step: int, extra: Mapping[str, Any] | None = None
  ) -> dict[str, float | None]:
    """Writes the epoch's row: the mean of every batch metric of the epoch, and `extra` as it is.

    Read from the batch rows themselves, so an epoch that was interrupted gives the same row.
    """
    batches = [row for row in self._rows if row["level"] == "batch" and row["epoch"] == epoch]
    means: dict[str, float | None] = {}
    for name in sorted({name for row in batches for name in row} - set(_KEYS)):
      values = [row[name] for row in batches if row.get(name) is not None]
      means[name] = math.fsum(values) / len(values) if values else None
    means |= {name: _number(name, value) for name, value in (extra or {}).items()}
    self.log(step, means, epoch=epoch, level="epoch")
    return means

  def truncate(self, step: int, rows: int | None = None) -> int:
    """Drops rows past a checkpoint, so that a resumed run writes them again.

    Args:
      step: last step that the checkpoint covers; -1 drops everything.
      rows: number of result rows that it covers; a step may have a batch's row and an epoch's.

    Returns:
      Number of result rows dropped.
    """
    kept = [row for row in self._rows if row["step"] <= step][:rows]
    dropped = len(self._rows) - len(kept)
    self._rows = kept
    self._replace(self._results, _lines(kept))
    timings = [row for row in read_rows(self._timings) if row["step"] <= step]
    self._replace(self._timings, _lines(timings))
    self._write_csv()
    self._close_writer()
    self._open_writer(purge_step=step + 1)
    return dropped

  def close(self) -> None:
    """Flushes and closes the event file; the other files are complete after every `log`."""
    self._close_writer()

  def __enter__(self) -> MetricsLogger:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def _add(self, row: dict[str, Any]) -> None:
    self._rows.append(row)
    self._append(self._results, _lines([row]))
    if set(row) <= set(self._columns):
      self._append(self._csv, _table([row], self._columns))
    else:
      self._write_csv()

  def _write_csv(self) -> None:
    names = sorted({name for row in self._rows for name in row} - set(_KEYS))
    self._columns = [*_KEYS, *names]
    header = io.StringIO()
    csv.writer(header, lineterminator="\n").writerow(self._columns)
    self._replace(self._csv, header.getvalue() + _table(self._rows, self._columns))

  def _replace(self, path: pathlib.Path, text: str) -> None:
    if self._is_kept:
      write_atomic(path, text)

  def _append(self, path: pathlib.Path, text: str) -> None:
    if self._is_kept:
      _append(path, text)

  def _log_tensorboard(
    self, level: Level, epoch: int, step: int, values: Mapping[str, float | None]
  ) -> None:
    if self._writer is None:
      self._open_writer()
    if self._writer is None:
      return
    prefix = "" if level == "batch" else f"{level}/"
    x = epoch if level == "epoch" else step
    for name, value in values.items():
      if value is not None:
        self._writer.add_scalar(prefix + name, value, x, walltime=time.time())
    self._writer.flush()

  def _open_writer(self, purge_step: int | None = None) -> None:
    if not self._tensorboard:
      return
    from tensorboardX import SummaryWriter

    # purge_step makes TensorBoard hide what an interrupted run wrote past its checkpoint.
    self._writer = SummaryWriter(str(self.path / "tb"), purge_step=purge_step)

  def _close_writer(self) -> None:
    if self._writer is not None:
      self._writer.close()
      self._writer = None


class OwnMetrics:
  """The functions that `config.metrics` names; each says something about a round's rollouts.

  Args:
    names: "package.module:function"; a function maps rollouts to {name: number}.

  Raises:
    UserError: a name that cannot be imported, or that is no function.
  """

  def __init__(self, names: Iterable[str]):
    self._functions: dict[str, Metric] = {}
    for name in names:
      found = load_object(name, "config.metrics")
      if not callable(found):
        raise UserError(f"config.metrics: {name}: expected a function, got {found!r:.60}")
      self._functions[name] = found

  def __call__(
    self, rollouts: Sequence[Rollout], taken: Collection[str]
  ) -> dict[str, float | None]:
    """The metrics of a round.

    Args:
      rollouts: all of the round, whether or not they gave a gradient.
      taken: names that the round's row has already.

    Raises:
      UserError: a function that gives anything but names with numbers, or a name that is taken.
    """
    found: dict[str, float | None] = {}
    for function, metric in self._functions.items():
      values = metric(rollouts)
      if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
        raise UserError(
          f"config.metrics: {function}: expected {{name: number}}, got {values!r:.60}"
        )
      for name, value in values.items():
        if name in taken or name in found:
          raise UserError(f"config.metrics: {function}: the name {name!r} is taken; choose another")
        try:
          found[name] = _number(name, value)
        except ValueError as error:
          raise UserError(f"config.metrics: {function}: {error}") from error
    return found


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Rows of a JSON-lines file; [] without one. A last line that was cut off is left out.

  Raises:
    ValueError: a line before the last that is no JSON object.
  """
  if not path.is_file():
    return []
  lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
  while lines and not lines[-1].strip():
    lines.pop()
  rows = []
  for number, line in enumerate(lines, 1):
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      if number == len(lines):
        break
      raise ValueError(f"{path}, line {number}: {error.msg}") from error
    if not isinstance(row, dict):
      raise ValueError(f"{path}, line {number}: expected a JSON object")
    rows.append(row)
  return rows


def _append(path: pathlib.Path, text: str) -> None:
  with naming(path), open(path, "a", encoding="utf-8", newline="") as file:
    file.write(text)


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
  return "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)


def _table(rows: Iterable[Mapping[str, Any]], columns: list[str]) -> str:
  out = io.StringIO()
  writer = csv.writer(out, lineterminator="\n")
  for row in rows:
    writer.writerow(["" if row.get(name) is None else row[name] for name in columns])
  return out.getvalue()


def _number(name: str, value: Any) -> float | None:
  if name in _KEYS or not name:
    raise ValueError(f"expected a metric name other than {_KEYS}, got {name!r}")
  if value is None:
    return None
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"metric {name}: expected a number, got {type(value).__name__}") from error
  return number if math.isfinite(number) else None
