"""MetricsLogger: results and timings of a run as JSON lines, CSV and TensorBoard."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from awf.files import naming, write_atomic

Level = Literal["batch", "search", "epoch"]
# Values that depend on the machine or on interruptions: never in metrics.jsonl or metrics.csv.
TIMING_PREFIXES = ("perf/", "time/", "grader/")
EPOCH_PREFIX = "epoch/"  # of TensorBoard's tags whose step is an epoch's number
_KEYS = ("level", "epoch", "step")  # of every row; the rest are metrics
_EVENT_FILES = "events.out.tfevents.*"
_BINS = 20  # of a histogram


class MetricsLogger:
  """Writes metrics.jsonl, metrics.csv (both a function of config and seed), timings.jsonl and tb/.

  A metric is a name and a number: `logger.log(step, {"my/metric": 0.5})` adds one. Names that start
  with `perf/`, `time/` or `grader/` are timings wherever they are passed.

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
    self._events: _EventFile | None = None

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
    values = {name: number_of(name, value) for name, value in results.items()}
    clock = {name: number_of(name, value) for name, value in (timings or {}).items()}
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
    means |= {name: number_of(name, value) for name, value in (extra or {}).items()}
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
    self.close()
    if self._tensorboard:
      epochs = {row["epoch"] for row in kept if row["level"] == "epoch"}
      _drop_events(self.path / "tb", step, epochs)
    return dropped

  def log_text(self, tag: str, step: int, text: str) -> None:
    """A text for TensorBoard, which reads it as Markdown. A tag `epoch/...` counts epochs."""
    self._add_event(tag, step, lambda: _text_value(text))

  def log_histogram(self, tag: str, step: int, values: Sequence[float]) -> None:
    """A histogram for TensorBoard; values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if finite:
      self._add_event(tag, step, lambda: _histogram_value(np.asarray(finite, np.float64)))

  def log_image(self, tag: str, step: int, png: bytes, width: int, height: int) -> None:
    """An image for TensorBoard: a PNG of three colours."""
    self._add_event(tag, step, lambda: _image_value(png, width, height))

  def log_hparams(
    self, values: Mapping[str, str | bool | int | float], tags: Iterable[str]
  ) -> None:
    """What TensorBoard compares runs by: fields of the config, and the tags to compare."""
    if self._tensorboard:
      from tensorboardX.summary import hparams

      for summary in hparams(dict(values), dict.fromkeys(tags, 0.0))[:2]:
        value = summary.value[0]
        self._add_event(value.tag, 0, lambda value=value: {"metadata": value.metadata})

  def close(self) -> None:
    """Closes the event file; all files are complete after every call."""
    events, self._events = self._events, None
    if events is not None:
      events.close()

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
    prefix = "" if level == "batch" else f"{level}/"
    x = epoch if level == "epoch" else step
    known = {name: value for name, value in values.items() if value is not None}
    if self._tensorboard and known:
      for name, value in known.items():
        self._event_file().add(prefix + name, x, simple_value=value)
      self._event_file().flush()

  def _add_event(self, tag: str, step: int, make: Callable[[], dict[str, Any]]) -> None:
    if self._tensorboard:
      self._event_file().add(tag, step, **make())
      self._event_file().flush()

  def _event_file(self) -> _EventFile:
    if self._events is None:
      self._events = _EventFile(self.path / "tb")
    return self._events


class _EventFile:
  """A file of TensorBoard: records of `Event` messages, one value each. No thread, no queue.

  tensorboardX's own writer puts "_" for signs such as the "@" of pass@k, and takes the name of a
  file that was begun in the same second.
  """

  def __init__(self, folder: pathlib.Path):
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboardX.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    name = _EVENT_FILES.replace("*", f"{int(time.time())}.{socket.gethostname()}")
    number = 0
    while (path := folder / f"{name}.{number:04d}").exists():
      number += 1
    self._path = path
    self._make, self._writer = Event, RecordWriter(str(path))
    self.add_whole(Event(wall_time=time.time(), file_version="brain.Event:2"))

  def add(self, tag: str, step: int, **value: Any) -> None:
    event = self._make(wall_time=time.time(), step=step)
    event.summary.value.add(tag=tag, **value)
    self.add_whole(event)

  def add_whole(self, event: Any) -> None:
    with naming(self._path):
      self._writer.write(event.SerializeToString())

  def flush(self) -> None:
    with naming(self._path):
      self._writer.flush()

  def close(self) -> None:
    try:
      self.flush()
    finally:
      self._writer.close()


def _drop_events(folder: pathlib.Path, step: int, epochs: set[int]) -> None:
  """Takes away what an interrupted run wrote past its checkpoint: one file of the rest is left."""
  files = sorted(folder.glob(_EVENT_FILES))
  events = [event for file in files for event in read_events(file)]
  kept = {}
  for event in events:
    tag = event.summary.value[0].tag
    if event.step in epochs if tag.startswith(EPOCH_PREFIX) else event.step <= step:
      kept[tag, event.step] = event
  if len(kept) == len(events):
    return
  if kept:
    rest = _EventFile(folder)
    for event in kept.values():
      rest.add_whole(event)
    rest.close()
  for file in files:
    file.unlink()


def read_events(path: pathlib.Path) -> Iterator[Any]:
  """The `Event` messages of a file that hold a value; what a crash cut off ends them."""
  from google.protobuf.message import DecodeError
  from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

  data, at = path.read_bytes(), 0
  while at + 16 <= len(data):
    size = int.from_bytes(data[at : at + 8], "little")
    if at + 16 + size > len(data):
      return
    try:
      event = Event.FromString(data[at + 12 : at + 12 + size])
    except DecodeError:
      return
    if event.summary.value:
      yield event
    at += 16 + size


def _text_value(text: str) -> dict[str, Any]:
  from tensorboardX.summary import text as summary

  (value,) = summary("", text).value
  return {"metadata": value.metadata, "tensor": value.tensor}


def _histogram_value(values: np.ndarray) -> dict[str, Any]:
  from tensorboardX.summary import make_histogram

  return {"histo": make_histogram(values, _BINS)}


def _image_value(png: bytes, width: int, height: int) -> dict[str, Any]:
  from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

  size = {"width": width, "height": height, "colorspace": 3}
  return {"image": Summary.Image(encoded_image_string=png, **size)}


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


def number_of(name: str, value: Any) -> float | None:
  """The metric's value as a finite number, or None for NaN, an infinity and None.

  Raises:
    ValueError: a name that rows use themselves, or a value that is no number.
  """
  if name in _KEYS or not name or name.startswith(EPOCH_PREFIX):
    raise ValueError(
      f"expected a metric name other than {_KEYS} and {EPOCH_PREFIX}..., got {name!r}"
    )
  if value is None:
    return None
  try:
    number = float(value)
  except (TypeError, ValueError) as error:
    raise ValueError(f"metric {name}: expected a number, got {type(value).__name__}") from error
  return number if math.isfinite(number) else None
