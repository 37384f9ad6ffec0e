"""Backups: whole, verified, restored to the byte; a target that fails or hangs costs them alone."""

import hashlib
import io
import json
import logging
import os
import resource
import shutil
import signal
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import until
from kill_run import Run
from small_run import differences
from test_cli import run, sft_argv, text  # noqa: F401  a fixture
from test_train import whole_run

from awf import backup, snapshot
from awf.backup import BackupManager, check_target, read_status, run_id, target_root
from awf.checkpoint import Checkpointer
from awf.restore import restore
from awf.snapshot import snapshots
from awf.types import UserError
from awf.workdir import Workdir
from configs.base import base_config

PATIENCE = 120.0  # seconds; machines stand still for a while


@pytest.fixture
def config(tmp_path):
  c = base_config()
  c.backup.path = str(tmp_path / "target")
  return c


@pytest.fixture
def workdir(config, tmp_path):
  """The directory of a run that was opened, with a log of its rounds and no checkpoint yet."""
  with Workdir(tmp_path / "run") as opened:
    opened.open(config, "train")
    (opened / "metrics.jsonl").write_text('{"level": "batch", "epoch": 0, "step": 1}\n')
    (opened / "workspace" / "NANO").mkdir(parents=True)
    (opened / "workspace" / "NANO" / "journal.jsonl").write_text("{}\n")
    (opened / "workspace" / "NANO" / ".journal.jsonl.part").write_text("half")
    yield opened


def save(workdir, step, numbers=8, keep=2):
  with_noise = np.random.default_rng(step).standard_normal(numbers).astype(np.float32)
  checkpoints = Checkpointer(workdir.checkpoints, keep)
  checkpoints.save(step, {"lora": with_noise}, {"step": step})
  checkpoints.close()


def steps(manager):
  return [s.step for s in snapshots(manager.folder)] if manager.folder.is_dir() else []


@pytest.fixture
def fast(monkeypatch):
  """Looks for checkpoints more often, so that tests need not wait."""
  monkeypatch.setattr(backup, "_POLL", 0.02)
  monkeypatch.setattr(backup, "_RETRY", 0.05)


def test_a_snapshot_holds_the_newest_checkpoint_and_every_result(config, workdir):
  save(workdir, 1)
  save(workdir, 2)
  (workdir / "merged").mkdir()
  (workdir / "merged" / "model.safetensors").write_text("made again by export")
  manager = BackupManager(config, workdir)
  with manager:
    pass
  (made,) = snapshots(manager.folder)
  assert made.step == 2 and made.is_sound()
  with tarfile.open(made.path) as tar:
    names = tar.getnames()
  assert names[0] == "config.json" and "workspace/NANO/journal.jsonl" in names
  assert "metrics.jsonl" in names and "checkpoints/2/manifest.json" in names
  assert not [n for n in names if n.startswith(("checkpoints/1/", "merged")) or "/." in n]
  assert not (manager.folder / ".part").exists()
  status = read_status(workdir)
  assert (status["step"], status["count"], status["failed"]) == (2, 1, "")
  assert backup.status_figures(workdir)["backup/step"] == 2


def test_the_newest_are_kept_and_the_new_one_always(config, workdir, fast):
  other = Path(config.backup.path) / "base-0a0a0a0a"  # another run of this name
  other.mkdir(parents=True)
  (other / f"00000001-{'0' * 64}.tar").write_bytes(b"not ours")
  with BackupManager(config, workdir) as manager:
    for step in (1, 2, 3, 4):
      save(workdir, step)
      until(lambda step=step: step in steps(manager), f"backup {step}")
    until(lambda: steps(manager) == [4, 3])
  assert steps(manager) == [4, 3]  # the last one replaced that of the same checkpoint
  assert list(other.iterdir())
  # After a fault the run went on from an older checkpoint: what it saves now is what counts.
  shutil.rmtree(workdir.checkpoints)
  save(workdir, 2)
  config.backup.keep = 1
  with BackupManager(config, workdir) as manager:
    pass
  assert steps(manager) == [2]


def test_a_backup_that_is_dropped_while_they_are_listed_is_left_out(tmp_path, monkeypatch):
  kept, dropped = (tmp_path / f"0000000{i}-{str(i) * 64}.tar" for i in (1, 2))
  kept.touch()
  there = [dropped, kept]
  monkeypatch.setattr(Path, "iterdir", lambda self: iter(there))
  assert [s.path for s in snapshots(tmp_path)] == [kept]


def test_a_restored_directory_is_that_of_the_run(config, workdir, tmp_path):
  save(workdir, 3)
  with BackupManager(config, workdir) as manager:
    pass
  here = {p.relative_to(workdir.path): p for p in workdir.path.rglob("*") if p.is_file()}
  for place in (config.backup.path, manager.folder, snapshots(manager.folder)[0].path):
    config.backup.restore = str(place)
    shutil.rmtree(tmp_path / "new", ignore_errors=True)
    found = restore(config, Workdir(tmp_path / "new"), "train")
    assert found is not None and found.step == 3
    for path in (p for p in (tmp_path / "new").rglob("*") if p.is_file()):
      name = path.relative_to(tmp_path / "new")
      if name.name != "run.log":
        assert path.read_bytes() == here[name].read_bytes(), name
    record = Workdir(tmp_path / "new").record()
    assert record is not None and run_id(record) == run_id(workdir.record())
    assert Checkpointer(tmp_path / "new" / "checkpoints").steps() == [3]
  assert restore(config, Workdir(tmp_path / "new"), "train") is None  # holds a run


def test_a_damaged_backup_is_passed_over_for_the_one_before(
  config, workdir, tmp_path, fast, caplog
):
  with BackupManager(config, workdir) as manager:
    for step in (1, 2):
      save(workdir, step)
      until(lambda step=step: step in steps(manager), f"backup {step}")
  newest, before = snapshots(manager.folder)
  data = bytearray(newest.path.read_bytes())
  data[len(data) // 2] ^= 1
  newest.path.write_bytes(data)
  config.backup.restore = str(manager.folder)
  found = restore(config, Workdir(tmp_path / "new"), "train")
  assert found == before and "is damaged and passed over" in caplog.text
  before.path.write_bytes(before.path.read_bytes()[:-5000])
  with pytest.raises(UserError, match="config.backup.restore.*nothing sound"):
    restore(config, Workdir(tmp_path / "newer"), "train")
  assert not (tmp_path / "newer").exists()


def test_a_backup_of_another_config_is_refused_and_auto_starts_afresh(config, workdir, tmp_path):
  save(workdir, 1)
  with BackupManager(config, workdir):
    pass
  config.lora.rank = 8
  config.backup.restore = config.backup.path
  with pytest.raises(UserError, match="config.lora.rank: there 16, here 8"):
    restore(config, Workdir(tmp_path / "new"), "train")
  config.backup.restore = "auto"
  assert restore(config, Workdir(tmp_path / "new"), "train") is None
  config.lora.rank = 16
  config.optim.learning_rate = 1e-3  # may change when a run goes on
  assert not (tmp_path / "new").exists()
  found = restore(config, Workdir(tmp_path / "new"), "train")
  assert found is not None and found.step == 1
  config.backup.restore = "/nowhere"
  with pytest.raises(UserError, match="no such file"):
    restore(config, Workdir(tmp_path / "newer"), "train")
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "notes.txt").write_text("mine")
  config.backup.restore = config.backup.path
  with pytest.raises(UserError, match="holds files but no run"):
    restore(config, Workdir(tmp_path / "full"), "train")
  assert os.listdir(tmp_path / "full") == ["notes.txt"]


def test_an_archive_that_writes_elsewhere_is_refused(config, tmp_path):
  data = io.BytesIO()
  with tarfile.open(fileobj=data, mode="w") as tar:
    record = json.dumps({"config": config.to_dict(), "mode": "train"}).encode()
    for name, content in (("config.json", record), ("../evil", b"x")):
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  digest = hashlib.sha256(data.getvalue()).hexdigest()
  path = tmp_path / f"00000001-{digest}.tar"
  path.write_bytes(data.getvalue())
  config.backup.restore = str(path)
  with pytest.raises(UserError, match="expected plain files, got '../evil'"):
    restore(config, Workdir(tmp_path / "new"), "train")
  assert sorted(os.listdir(tmp_path)) == [path.name]


def test_a_target_that_cannot_be_written_is_refused_at_the_start(config, workdir, tmp_path):
  (tmp_path / "file").write_text("")
  for path, message in (
    (tmp_path / "file" / "x", "file is no directory"),
    (Path("/proc/self/x"), "cannot be written"),
    (workdir / "backup", "is inside --workdir"),
    (backup.DRIVE / "MyDrive", "Google Drive is not mounted"),
  ):
    config.backup.path = str(path)
    with pytest.raises(UserError, match=f"config.backup.path = .*{message}"):
      check_target(config, workdir)
  assert not (workdir / "backup").exists()


def test_a_mounted_drive_is_found_and_off_is_off(config, monkeypatch, tmp_path):
  config.backup.path = ""
  assert target_root(config) is None  # no drive here
  monkeypatch.setattr(backup, "DRIVE", Path("/proc"))  # a mount that every machine has
  assert target_root(config) == Path("/proc/MyDrive/awf")
  config.backup.path = "off"
  assert target_root(config) is None


def test_a_full_target_is_one_warning_and_is_tried_again(config, workdir, fast, caplog):
  save(workdir, 1, numbers=100_000)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  try:
    with BackupManager(config, workdir) as manager:
      until(lambda: read_status(workdir).get("failures", 0) >= 3, "the third failure")
      assert steps(manager) == []
      until(lambda: not (manager.folder / ".part").exists())  # each attempt clears up
      assert "File too large" in read_status(workdir)["failed"]
      resource.setrlimit(resource.RLIMIT_FSIZE, before)
      until(lambda: steps(manager) == [1])
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  warned = [r for r in caplog.records if r.levelno >= logging.WARNING]
  assert len(warned) == 1 and "no backup in" in warned[0].message
  assert read_status(workdir)["failed"] == ""


def test_a_target_that_vanishes_is_one_warning_and_is_not_made_again(
  config, workdir, fast, caplog, tmp_path
):
  save(workdir, 1)
  with BackupManager(config, workdir) as manager:
    until(lambda: read_status(workdir).get("step") == 1)
    (tmp_path / "target").rename(tmp_path / "elsewhere")
    save(workdir, 2)
    until(lambda: read_status(workdir).get("failures", 0) >= 2)
    assert not (tmp_path / "target").exists() and "is gone" in read_status(workdir)["failed"]
    (tmp_path / "elsewhere").rename(tmp_path / "target")
    until(lambda: steps(manager) == [2, 1])
  assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1


def test_a_snapshot_gone_before_it_is_measured_is_one_more_failure(
  config, workdir, fast, monkeypatch
):
  make = BackupManager._make

  def lost(self):
    made = make(self)
    made.path.unlink()
    return made

  monkeypatch.setattr(BackupManager, "_make", lost)
  save(workdir, 1)
  with BackupManager(config, workdir) as manager:
    until(lambda: read_status(workdir).get("failures", 0) >= 1)
    monkeypatch.undo()
    until(lambda: read_status(workdir).get("step") == 1)
    assert steps(manager) == [1]


def let_go(part):
  """Reads a FIFO that the backup's thread writes, or is about to: it finds that nobody waits."""
  file = os.open(part, os.O_RDONLY | os.O_NONBLOCK)  # a thread that ends first opens it never
  until(lambda: "backup" not in {t.name for t in threading.enumerate()}, "the thread's end")
  os.close(file)


def test_a_hanging_target_delays_only_the_backup(config, workdir, fast, caplog):
  """The part file is a FIFO that nobody reads: opening it never returns."""
  config.backup.wait = 0.5
  with BackupManager(config, workdir) as manager:
    manager.folder.mkdir(parents=True)
    os.mkfifo(manager.folder / ".part")
    save(workdir, 1)
    until(lambda: manager._seen is not None)
    for step in (2, 3):  # the run goes on; what the thread is about to read stays
      save(workdir, step, keep=9)
    started = time.monotonic()
  assert time.monotonic() - started < 30.0
  assert "is not finished after 0.5 s; there is none" in caplog.text
  let_go(manager.folder / ".part")
  assert steps(manager) == []


def test_a_checkpoint_that_the_run_drops_meanwhile_stays_readable(
  config, workdir, fast, monkeypatch, tmp_path
):
  """A target so slow that the checkpoint is gone before its bytes are written."""
  held, go = threading.Event(), threading.Event()
  write = snapshot._Sink.write

  def slow(self, data):
    held.set()
    assert go.wait(PATIENCE)
    return write(self, data)

  monkeypatch.setattr(snapshot._Sink, "write", slow)
  save(workdir, 1, keep=1)
  with BackupManager(config, workdir) as manager:
    assert held.wait(PATIENCE)
    save(workdir, 2, keep=1)
    assert not (workdir.checkpoints / "1").exists()
    monkeypatch.undo()
    go.set()
    until(lambda: 1 in steps(manager))
    old = snapshots(manager.folder)[-1]
    assert old.step == 1 and old.is_sound()
    config.backup.restore = str(old.path)
    restore(config, Workdir(tmp_path / "new"), "train")
    found = Checkpointer(tmp_path / "new" / "checkpoints").restore(
      {"lora": np.zeros(8, np.float32)}
    )
    assert found is not None
    step, state, _ = found
    assert step == 1
    expected = np.random.default_rng(1).standard_normal(8).astype(np.float32)
    np.testing.assert_array_equal(state["lora"], expected)


def test_a_damaged_checkpoint_is_no_backup(config, workdir, fast):
  save(workdir, 1)
  with BackupManager(config, workdir) as manager:
    until(lambda: steps(manager) == [1])
  save(workdir, 2)
  victim = next(p for p in (workdir.checkpoints / "2" / "state").rglob("*") if p.is_file())
  victim.write_bytes(victim.read_bytes()[:-1] + b"?")
  with BackupManager(config, workdir) as manager:
    until(lambda: read_status(workdir)["failures"])
  assert steps(manager) == [1] and "checkpoint 2 is damaged" in read_status(workdir)["failed"]


def test_a_run_ends_well_beside_a_target_that_hangs(text, tmp_path, capsys, caplog):  # noqa: F811
  """Through the command line: exit code 0, the figures, and one warning."""
  argv = sft_argv(
    text, tmp_path / "run", "--config.sft.steps=2", "--config.sft.log_every=1",
    f"--config.backup.path={tmp_path / 'target'}",
  )  # fmt: skip
  assert run(*argv) == 0
  (folder,) = (tmp_path / "target").iterdir()
  assert [s.step for s in snapshots(folder)] == [2] and "verified" in caplog.text
  for old in folder.iterdir():
    old.unlink()
  os.mkfifo(folder / ".part")
  capsys.readouterr()
  assert run(*argv, "--config.backup.wait=1") == 0
  assert json.loads(capsys.readouterr().out)["steps"] == 2
  assert caplog.text.count("is not finished after 1 s") == 1
  let_go(folder / ".part")


def die_once_backed_up(rollouts):
  """A metric (`config.metrics`) that ends the run, at its second round, once the first is safe."""
  folder = Path(os.environ["AWF_TEST_TARGET"])
  if os.environ.get("AWF_TEST_ROUND"):
    until(lambda: [p for p in folder.glob("*/*.tar") if int(p.name[:8]) >= 2], "the backup")
    os.kill(os.getpid(), signal.SIGKILL)
  os.environ["AWF_TEST_ROUND"] = "1"
  return {}


def test_a_run_that_lost_its_machine_is_restored_and_ends_as_if_left_alone(
  tmp_path, tmp_path_factory, monkeypatch
):
  whole, _ = whole_run(tmp_path_factory)
  target = tmp_path / "target"
  monkeypatch.setenv("AWF_TEST_TARGET", str(target))
  config = tmp_path / "config.py"
  config.write_text("from small_run import small\n\ndef get_config(arg=None):\n  return small()\n")
  flags = (f"--config.backup.path={target}", "--config.train.keep_checkpoints=1")
  life = Run(tmp_path / "run", config)
  assert life.start(*flags, "--config.metrics=test_backup:die_once_backed_up").wait() == -9
  shutil.rmtree(life.folder)
  again = Run(tmp_path / "elsewhere", config)
  assert again.start(f"--config.backup.path={target}", "--config.backup.restore=auto").wait() == 0
  assert "resumed after round 1 of 2" in again.output() and "restored " in again.output()
  assert differences(again.folder, whole) == []
  (folder,) = target.iterdir()  # the restored run goes on with its own backups
  newest = snapshots(folder)[0]
  assert newest.step == 5 and newest.is_sound()
  rows = [json.loads(x) for x in (again.folder / "timings.jsonl").read_text().splitlines()]
  assert any("backup/step" in row for row in rows)
