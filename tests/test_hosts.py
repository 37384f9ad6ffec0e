"""Several processes on this machine as one run: the numbers of one process, one writer, no hang."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from conftest import CACHE, ROOT
from host_worker import digest, leaves, make_trainer, seen_ahead, updated
from quick_compile import XLA_FLAGS

import launch as launch_module
from awf.checkpoint import Checkpointer
from awf.dealt import merged
from awf.hosts import Hosts
from awf.hub import Hub
from awf.membership import settings
from awf.types import UserError
from configs.base import base_config

PATIENCE = 900  # seconds, on machines that stand still for a while
ENV = {
  **os.environ,
  "XLA_FLAGS": "",  # one device each
  "JAX_PLATFORMS": "cpu",
  "AWF_CACHE": str(CACHE),
  "PYTHONPATH": str(ROOT / "tests"),
}


# Each process compiles for itself; how well does not matter where tolerances decide.
FAST_COMPILE = {"XLA_FLAGS": XLA_FLAGS}


def free_port():
  """One that the kernel gives to nobody else before it is used (they start at 32,768)."""
  while True:
    port = random.SystemRandom().randrange(12_000, 32_000)
    with socket.socket() as sock, contextlib.suppress(OSError):
      sock.bind(("127.0.0.1", port))
      return port


def start(commands, folder, envs=None):
  """Starts processes whose outputs go to files; [(process, stdout, stderr)]."""
  folder.mkdir(exist_ok=True)
  found = []
  for index, command in enumerate(commands):
    files = [folder / f"{name}_{index}" for name in ("stdout", "stderr")]
    with files[0].open("w") as out, files[1].open("w") as err:
      env = {**ENV, **(envs[index] if envs else {})}
      process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err)
    found.append((process, *files))
  return found


def finish(started):
  """Waits for all: [(exit code, stdout, stderr)]."""
  try:
    codes = [process.wait(PATIENCE) for process, _, _ in started]
  finally:
    for process, _, _ in started:
      process.kill()
  return [(c, o.read_text(), e.read_text()) for c, (_, o, e) in zip(codes, started, strict=True)]


def workers(part, folder, count, outputs):
  script, port = str(ROOT / "tests" / "host_worker.py"), str(free_port())
  return start(
    [[sys.executable, script, part, str(folder), str(i), str(count), port] for i in range(count)],
    outputs,
    [FAST_COMPILE] * count,
  )


def answers(part, folder, count, outputs):
  """The JSON line of each process of a part of the loop (tests/host_worker.py)."""
  done = finish(workers(part, folder, count, outputs))
  assert [code for code, _, _ in done] == [0] * count, done
  return [json.loads(out.strip().splitlines()[-1]) for _, out, _ in done]


def launch(config, folder, count, outputs, *flags, env=FAST_COMPILE):
  """launch.py as `count` processes of one run."""
  command = [sys.executable, "launch.py", f"--config={config}", f"--workdir={folder}", *flags]
  command += [f"--config.distributed.coordinator=127.0.0.1:{free_port()}"]
  command += [f"--config.distributed.num_processes={count}"]
  ids = (f"--config.distributed.process_id={i}" for i in range(count))
  return start([[*command, flag] for flag in ids], outputs, [env] * count)


# ---------------------------------------------------------------------------- jobs and meetings


def test_a_job_is_done_once_and_told_to_all_and_one_stop_stops_all(tmp_path):
  rows = answers("jobs", tmp_path, 4, tmp_path / "out")
  assert len({json.dumps(row["by"]) for row in rows}) == 1
  assert sorted(set(rows[0]["by"])) == [0, 1, 2, 3]  # dealt out evenly
  by = rows[0]["by"]
  for index, row in enumerate(rows):
    mine = [n for n in range(7) if by[n] == index]
    assert [n for n in row["before"] if n < 7] == mine
    assert [n for n in row["again"] if n < 7] == mine  # a result that lasts is kept
    assert row["errors"][0] == ["UserError", "seven is refused"]
    assert "eight failed" in row["errors"][1][1]
    assert row["facts"] == [{"index": i} for i in range(4)]
    assert row["stop"] == [signal.SIGTERM, True]
  for number, times in ((7, 1), (8, 1), (9, 2)):
    assert sum(row["again"].count(number) for row in rows) == times


def test_a_hub_tells_all_in_one_order_and_refuses_strangers():
  heard, hubs = [[], [], []], []
  for index in range(3):
    hubs.append(Hub(index, lambda m, i=index: heard[i].append((m["from"], m["n"])), print, 60))
  server = socket.create_server(("127.0.0.1", 0))
  address = server.getsockname()
  serving = threading.Thread(target=hubs[0].serve, args=(server, 3, "secret", 60))
  serving.start()
  stranger = Hub(1, print, lambda *_: None, 60)
  stranger.connect([address], "guess", 10)
  for hub in hubs[1:]:
    hub.connect([("127.0.0.1", 1), address], "secret", 10)  # the second address answers
  serving.join(60)

  def talk(hub):
    for n in range(200):
      hub.send({"type": "say", "n": n})

  threads = [threading.Thread(target=talk, args=(hub,)) for hub in hubs]
  for thread in threads:
    thread.start()
  deadline = time.monotonic() + 60
  while min(map(len, heard)) < 600 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert heard[0] == heard[1] == heard[2]
  assert [n for who, n in heard[1] if who == 2] == list(range(200))


def test_one_process_meets_itself():
  hosts = Hosts()
  assert asyncio.run(hosts.meet({"a": 1})) == hosts.meet_now({"a": 1}) == [{"a": 1}]
  assert hosts.is_writer and not hosts.is_stopped
  hosts.agree("model", [1, (2,)], "change it")


def test_states_of_runners_are_merged():
  one, two = {"0": {"results": [[["k"], 1]], "programs": []}}, {"0": {"results": [[["k"], 2]]}}
  two["1"] = {"programs": [["p", 3]]}
  assert merged([one, two]) == {
    "0": {"results": [[["k"], 1]], "programs": []},
    "1": {"programs": [["p", 3]]},
  }


def test_processes_that_slurm_started_find_each_other(tmp_path):
  script, port = str(ROOT / "tests" / "host_worker.py"), str(free_port())
  common = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
  envs = [
    {**common, "SLURM_PROCID": i, "SLURM_LOCALID": i, "JAX_COORDINATOR_PORT": port} for i in "01"
  ]
  command = [sys.executable, script, "jobs", str(tmp_path), "0", "0", "0"]
  done = finish(start([command] * 2, tmp_path / "out", envs))
  assert [code for code, _, _ in done] == [0, 0], done
  facts = [json.loads(out.strip().splitlines()[-1])["facts"] for _, out, _ in done]
  assert facts == [[{"index": 0}, {"index": 1}]] * 2


# ---------------------------------------------------------------------------- settings


def test_processes_are_off_by_default_and_found_by_the_usual_means(monkeypatch):
  config = base_config()
  assert settings(config) is None
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
  with pytest.raises(UserError, match=r"config.distributed.num_processes .*JAX_PROCESS_ID.*None"):
    settings(config)
  monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
  monkeypatch.setenv("JAX_PROCESS_ID", "3")
  found = settings(config)
  assert (found.coordinator, found.num_processes, found.process_id) == ("host:1234", 4, 3)
  config.distributed.process_id = 4
  with pytest.raises(UserError, match="config.distributed.process_id"):
    settings(config)
  config.distributed.coordinator = "auto"
  assert settings(config).num_processes is None
  config.distributed.coordinator = "host"
  with pytest.raises(UserError, match="HOST:PORT"):
    settings(config)


def test_modes_of_one_process_say_so(monkeypatch, capsys):
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
  monkeypatch.setenv("JAX_PROCESS_ID", "0")
  assert launch_module.main(["--config=configs/quickstart.py:smoke", "--mode=bench"]) == 2
  assert "config.distributed: --mode=bench runs in one process" in capsys.readouterr().err


# ---------------------------------------------------------------------------- learner, checkpoints


@pytest.fixture(scope="module")
def four(tmp_path_factory):
  """An update and two checkpoints by four processes: (folder, what each said)."""
  folder = tmp_path_factory.mktemp("four")
  return folder, answers("update", folder, 4, folder / "out")


def test_four_processes_update_as_one(four):
  folder, rows = four
  metrics, trainer = updated(None)
  assert len({row["digest"] for row in rows}) == 1  # to the bit, among the processes
  for row in rows:
    assert row["metrics"].keys() == metrics.keys()
    for name, value in metrics.items():
      assert row["metrics"][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
  for name, x in seen_ahead(None).items():
    assert len({json.dumps(row["ahead"][name]) for row in rows}) == 1
    np.testing.assert_allclose(rows[0]["ahead"][name], x, atol=1e-5, err_msg=name)
  there = np.load(folder / "state.npz")
  here = leaves(trainer.state)
  assert sorted(there.files) == sorted(here)
  moved = make_trainer(None)
  first = leaves(moved.state)
  for name, x in here.items():
    np.testing.assert_allclose(there[name], x, atol=1e-5, rtol=1e-4, err_msg=name)
  assert any("lora" in n and np.abs(here[n] - first[n]).max() > 1e-3 for n in here)


@pytest.mark.parametrize("count", [1, 2])
def test_what_four_processes_saved_is_read_by_fewer(four, count, tmp_path):
  folder, rows = four
  if count == 1:
    trainer = make_trainer(None)
    checkpoints = Checkpointer(folder / "checkpoints", keep=1)
    step, state, extra = checkpoints.restore(trainer.state)
    checkpoints.close()
    found = [{"step": step, "digest": digest(state), "extra": extra, "is_spread": True}]
  else:
    found = answers("restore", folder, count, tmp_path)
  wanted = {"step": 2, "digest": rows[0]["digest"], "extra": {"of": 0}, "is_spread": True}
  assert found == [wanted] * count
  names = sorted(p.name for p in (folder / "checkpoints").iterdir())
  assert names == ["2"]  # the first one went when the second was complete


# ---------------------------------------------------------------------------- a lost process


@pytest.mark.parametrize(("victim", "where"), [(1, "sleep"), (1, "collective"), (0, "sleep")])
def test_a_lost_process_ends_the_others_with_one_line(victim, where, tmp_path):
  started = workers("hang", tmp_path / where, 2, tmp_path / "out")
  try:
    deadline = time.monotonic() + PATIENCE
    while not all("ready" in out.read_text() for _, out, _ in started):
      assert all(p.poll() is None for p, _, _ in started), started[1 - victim][2].read_text()
      assert time.monotonic() < deadline
      time.sleep(0.05)
    time.sleep(0.5)
    started[victim][0].kill()
    code = started[1 - victim][0].wait(60)
  finally:
    for process, _, _ in started:
      process.kill()
  (line,) = [x for x in started[1 - victim][2].read_text().splitlines() if "[Gloo]" not in x]
  assert code == 2
  assert line.startswith(f"error: process {victim} of 2 is lost: its connection ")
  assert "start all processes again to go on" in line


def test_a_mesh_whose_other_axes_cross_processes_is_refused(tmp_path):
  flags = ("--config.mesh.data=1", "--config.mesh.fsdp=2")
  done = finish(
    launch("configs/quickstart.py:smoke", tmp_path / "run", 2, tmp_path / "out", *flags)
  )
  for code, out, err in done:
    lines = [x for x in err.splitlines() if x.startswith("error: ")]
    assert code == 2 and "Traceback" not in err and not out.strip().endswith("}")
    assert "only data may cross processes" in lines[0] and "config.mesh" in lines[0]
  assert not (tmp_path / "run").exists()
