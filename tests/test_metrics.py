"""MetricsLogger: deterministic files, aggregates, resume, TensorBoard."""

import csv
import json
import resource

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import directory_check

from awf.faults import explain
from awf.metrics import MetricsLogger, read_rows
from configs.base import base_config

FILES = ("metrics.jsonl", "metrics.csv")


def contents(path):
  return {name: (path / name).read_bytes() for name in FILES}


def run_steps(path, steps, crash_at=None):
  with MetricsLogger(path, tensorboard=False) as metrics:
    for step in steps:
      metrics.log(step, {"reward": step / 3, "loss": np.float32(0.1)}, {"time/step": 0.5 + step})
      if step % 2:
        metrics.log(step, {"late/metric": step})
      if step == crash_at:
        return
    metrics.log_epoch(0, steps[-1], {"checkpoint_quality": 1})


def events(path):
  """(step, tag, value) of all scalars in event files, by their record format."""
  directory_check(str(path))
  found = []
  for file in sorted(path.iterdir()):
    data, at = file.read_bytes(), 0
    while at < len(data):
      size = int.from_bytes(data[at : at + 8], "little")
      event = Event.FromString(data[at + 12 : at + 12 + size])
      found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
      at += 16 + size
  return found


def test_files_are_a_function_of_what_was_logged(tmp_path):
  for name in ("a", "b"):
    run_steps(tmp_path / name, range(4))
  assert contents(tmp_path / "a") == contents(tmp_path / "b")
  rows = read_rows(tmp_path / "a" / "metrics.jsonl")
  assert rows[0] == {
    "level": "batch",
    "epoch": 0,
    "step": 0,
    "loss": float(np.float32(0.1)),
    "reward": 0.0,
  }
  assert not any(name.startswith(("time/", "perf/")) for row in rows for name in row)
  assert len(read_rows(tmp_path / "a" / "timings.jsonl")) == 4


def test_csv_has_every_metric_and_row(tmp_path):
  run_steps(tmp_path, range(4))
  table = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
  rows = read_rows(tmp_path / "metrics.jsonl")
  assert len(table) == len(rows) and table[0]["late/metric"] == ""
  for cells, row in zip(table, rows, strict=True):
    assert {k: v for k, v in cells.items() if v} == {k: str(v) for k, v in row.items()}


def test_epoch_row_is_the_mean_of_its_batches(tmp_path):
  with MetricsLogger(tmp_path, tensorboard=False) as metrics:
    metrics.log(0, {"reward": 1.0}, epoch=0)
    metrics.log(1, {"reward": 0.25, "only": 3.0}, epoch=1)
    metrics.log(2, {"reward": float("nan")}, epoch=1)
    metrics.log(3, {"reward": 0.75}, epoch=1)
    assert metrics.log_epoch(1, 3, {"extra": 7}) == {"reward": 0.5, "only": 3.0, "extra": 7.0}
    row = metrics.rows[-1]
  assert row == {"level": "epoch", "epoch": 1, "step": 3, "extra": 7.0, "only": 3.0, "reward": 0.5}


@pytest.mark.parametrize("crash_at", range(5))
def test_resume_equals_an_uninterrupted_run(tmp_path, crash_at):
  run_steps(tmp_path / "whole", range(6))
  run_steps(tmp_path / "resumed", range(6), crash_at)
  with open(tmp_path / "resumed" / "metrics.jsonl", "a") as file:
    file.write('{"level": "ba')  # a line that the crash cut off
  checkpoint = crash_at - 1
  with MetricsLogger(tmp_path / "resumed", tensorboard=False) as metrics:
    assert metrics.truncate(checkpoint) == 1 + crash_at % 2
  run_steps(tmp_path / "resumed", range(checkpoint + 1, 6))
  assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")
  assert len(read_rows(tmp_path / "resumed" / "timings.jsonl")) == 6


def test_timings_keep_out_of_results_wherever_they_are_passed(tmp_path):
  with MetricsLogger(tmp_path, tensorboard=False) as metrics:
    metrics.log(0, {"perf/tokens_per_second": 9.0, "x": 1})
    metrics.log(1, {}, {"time/step": 2.0})
  assert [set(row) for row in read_rows(tmp_path / "metrics.jsonl")] == [
    {"level", "epoch", "step", "x"}
  ]
  timings = read_rows(tmp_path / "timings.jsonl")
  assert timings[0]["perf/tokens_per_second"] == 9.0 and timings[1]["time/step"] == 2.0


def test_scalars_of_any_kind_and_no_other(tmp_path):
  with MetricsLogger(tmp_path, tensorboard=False) as metrics:
    values = {"a": jnp.float32(2), "b": np.int64(3), "c": True, "d": float("inf"), "e": None}
    metrics.log(0, values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {
      "level": "batch", "epoch": 0, "step": 0, "a": 2.0, "b": 3.0, "c": 1.0, "d": None, "e": None,
    }  # fmt: skip
    for bad in ({"a": "word"}, {"a": [1, 2]}, {"step": 1}, {"": 1}):
      with pytest.raises(ValueError, match="expected"):
        metrics.log(1, bad)
    with pytest.raises(ValueError, match="expected step >= 0"):
      metrics.log(-1, {"a": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_tensorboard_has_both_levels_and_timings(tmp_path):
  with MetricsLogger(tmp_path) as metrics:
    metrics.log(3, {"reward": 0.5, "none": None}, {"time/step": 2.0})
    metrics.log_epoch(1, 3, {"avg_pass_at_k": 0.25})
  assert set(events(tmp_path / "tb")) == {
    (3, "reward", 0.5),
    (3, "time/step", 2.0),
    (1, "epoch/avg_pass_at_k", 0.25),
  }


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{broken\n{"step": 1}\n')
  with pytest.raises(ValueError, match="line 2"):
    MetricsLogger(tmp_path)


def test_the_number_of_rows_tells_a_batch_from_its_epoch(tmp_path):
  """A crash between an epoch's row and its checkpoint: both rows have the last batch's step."""
  run = tmp_path / "run"
  with MetricsLogger(run, tensorboard=False) as metrics:
    metrics.log(1, {"reward": 1.0})
    covered = metrics.position
    before = contents(run)
    metrics.log_epoch(0, 1, {"extra": 2})
  with MetricsLogger(run, tensorboard=False) as metrics:
    assert metrics.truncate(1, covered) == 1
    assert contents(run) == before
    metrics.log_epoch(0, 1, {"extra": 2})
    assert [row["level"] for row in metrics.rows] == ["batch", "epoch"]


def test_a_full_disk_names_the_file_and_loses_no_row(tmp_path):
  with MetricsLogger(tmp_path, tensorboard=False) as metrics:
    metrics.log(1, {"reward": 1.0})
    before = contents(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["metrics.jsonl"]) + 9, limit[1]))
    try:
      with pytest.raises(OSError, match="metrics.jsonl") as full:
        metrics.log(2, {"reward": 2.0})
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limit)
  assert "takes no more (File too large" in explain(full.value, base_config(), "plan")
  with MetricsLogger(tmp_path, tensorboard=False) as metrics:
    metrics.truncate(1, 1)
  assert contents(tmp_path) == before
