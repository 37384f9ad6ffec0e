"""MetricsLogger: deterministic files, aggregates, resume, TensorBoard."""

import csv
import json
import resource

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from awf.faults import explain
from awf.metrics import MetricsLogger, read_events, read_rows
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
  """All events of all files, in the order in which TensorBoard reads them."""
  return [event for file in sorted(path.iterdir()) for event in read_events(file)]


def scalars(path):
  """(step, tag, value) of all scalars."""
  return [
    (e.step, v.tag, v.simple_value)
    for e in events(path) for v in e.summary.value if v.HasField("simple_value")
  ]  # fmt: skip


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
    metrics.log(0, {"perf/tokens_per_second": 9.0, "x": 1, "grader/timeouts": 2})
    metrics.log(1, {}, {"time/step": 2.0})
  assert [set(row) for row in read_rows(tmp_path / "metrics.jsonl")] == [
    {"level", "epoch", "step", "x"}
  ]
  timings = read_rows(tmp_path / "timings.jsonl")
  assert timings[0]["grader/timeouts"] == 2.0
  assert timings[0]["perf/tokens_per_second"] == 9.0 and timings[1]["time/step"] == 2.0


def test_scalars_of_any_kind_and_no_other(tmp_path):
  with MetricsLogger(tmp_path, tensorboard=False) as metrics:
    values = {"a": jnp.float32(2), "b": np.int64(3), "c": True, "d": float("inf"), "e": None}
    metrics.log(0, values)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text) == {
      "level": "batch", "epoch": 0, "step": 0, "a": 2.0, "b": 3.0, "c": 1.0, "d": None, "e": None,
    }  # fmt: skip
    for bad in ({"a": "word"}, {"a": [1, 2]}, {"step": 1}, {"": 1}, {"epoch/a": 1}):
      with pytest.raises(ValueError, match="expected"):
        metrics.log(1, bad)
    with pytest.raises(ValueError, match="expected step >= 0"):
      metrics.log(-1, {"a": 1})
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_tensorboard_has_both_levels_and_timings_under_their_own_names(tmp_path):
  with MetricsLogger(tmp_path) as metrics:
    metrics.log(3, {"reward": 0.5, "mcts/pass@4": 0.25, "none": None}, {"time/step": 2.0})
    metrics.log_epoch(1, 3, {"avg_pass_at_k": 0.25})
    assert len(scalars(tmp_path / "tb")) == 4  # on disk at once
  assert sorted(scalars(tmp_path / "tb")) == [
    (1, "epoch/avg_pass_at_k", 0.25),
    (3, "mcts/pass@4", 0.25),
    (3, "reward", 0.5),
    (3, "time/step", 2.0),
  ]


def board_run(path, steps):
  """Two rounds an epoch, with all that TensorBoard gets."""
  with MetricsLogger(path) as metrics:
    if steps[0] == 1:
      metrics.log_hparams({"seed": 7, "task.name": "nano", "strict": True}, ["reward"])
    for step in steps:
      epoch = (step - 1) // 2
      metrics.log(step, {"reward": step / 4}, {"time/step": 1.0}, epoch=epoch)
      metrics.log_text("workflow/best", step, f"<b>{step}</b>")
      metrics.log_histogram("rewards/by_stage/full", step, [0.25, 0.5, float("nan"), 0.5 + step])
      yield metrics
      if step % 2 == 0:
        metrics.log_epoch(epoch, step)
        metrics.log_image("epoch/search_tree", epoch, b"PNG %d" % epoch, 3, 2)
      yield metrics


def shown(path):
  """What TensorBoard shows: every (tag, step) with its value, times of day apart."""
  return [(e.step, v.SerializeToString()) for e in events(path / "tb") for v in e.summary.value]


@pytest.mark.parametrize("half_steps", [1, 3, 4, 5, 7])
def test_no_row_of_tensorboard_stands_twice_after_a_resume(tmp_path, half_steps):
  """Killed half-way through a round or after its end, then resumed from the round before."""
  list(board_run(tmp_path / "whole", range(1, 5)))
  run = board_run(tmp_path / "cut", range(1, 5))
  for _ in range(half_steps):
    metrics = next(run)
  (file,) = (tmp_path / "cut" / "tb").iterdir()
  file.write_bytes(file.read_bytes()[:-3])  # the last record is cut off
  checkpoint = max(0, (half_steps - 1) // 2)
  covered = sum(row["step"] <= checkpoint for row in metrics.rows)
  if not checkpoint:
    covered, checkpoint = 0, -1
  with MetricsLogger(tmp_path / "cut") as resumed:
    resumed.truncate(checkpoint, covered)
  list(board_run(tmp_path / "cut", range(max(1, checkpoint + 1), 5)))
  whole, cut = shown(tmp_path / "whole"), shown(tmp_path / "cut")
  assert sorted(cut) == sorted(whole)
  tags = [(e.step, v.tag) for e in events(tmp_path / "cut" / "tb") for v in e.summary.value]
  assert len(set(tags)) == len(tags)


def test_what_tensorboard_gets_beside_curves_reads_back(tmp_path):
  list(board_run(tmp_path, range(1, 3)))
  found = {(v.tag, e.step): v for e in events(tmp_path / "tb") for v in e.summary.value}
  text = found["workflow/best", 2]
  assert (
    text.tensor.string_val[0] == b"<b>2</b>" and text.metadata.plugin_data.plugin_name == "text"
  )
  histogram = found["rewards/by_stage/full", 1].histo
  assert histogram.num == 3 and histogram.min == 0.25 and histogram.max == 1.5
  assert sum(histogram.bucket) == 3
  image = found["epoch/search_tree", 0].image
  assert image.encoded_image_string == b"PNG 0" and (image.width, image.height) == (3, 2)
  start = HParamsPluginData.FromString(
    found["_hparams_/session_start_info", 0].metadata.plugin_data.content
  )
  fields = start.session_start_info.hparams
  assert fields["seed"].number_value == 7 and fields["task.name"].string_value == "nano"
  assert fields["strict"].bool_value is True
  assert ("_hparams_/experiment", 0) in found


def test_files_of_one_second_do_not_take_each_other_s_place(tmp_path):
  for step in range(3):
    with MetricsLogger(tmp_path) as metrics:
      metrics.log(step, {"reward": step})
  assert scalars(tmp_path / "tb") == [(0, "reward", 0.0), (1, "reward", 1.0), (2, "reward", 2.0)]


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
