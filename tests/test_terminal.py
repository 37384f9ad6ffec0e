"""Progress: stages that parts open, bars on a terminal, plain lines elsewhere, silence if asked."""

import logging
import os
import pty
import re
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from awf import terminal
from awf.banner import banner_lines, memory_line, update_bytes
from awf.chips import GIB
from awf.plan_ideal import bytes_of
from awf.summary import round_line
from awf.terminal import Handler, Stage, clock, count_tokens, open_stages, show, track

SCRIPT = """
import logging, sys, time
from awf import terminal
from awf.terminal import count_tokens, show, track
handler = terminal.Handler()
logging.basicConfig(handlers=[handler], level=logging.WARNING)
log = logging.getLogger("awf")
log.setLevel(logging.INFO)
began = time.monotonic()
with show(handler, is_quiet="--quiet" in sys.argv):
  count_tokens(lambda: 1000 * (time.monotonic() - began))
  with track("rounds", 4, 1) as rounds, track("load weights", 2e9, unit="B") as load:
    log.info("a line of the log")
    print("[red]a stray line", file=sys.stderr)
    load.advance(5e8)
    time.sleep(3)
    rounds.advance(best=0.51234, nodes=7)
    time.sleep(3)
  log.warning("a warning")
print('{"done": true}')
"""


def on_a_terminal(*argv):
  """What a script writes to a terminal as its stderr, and to its stdout."""
  ours, theirs = pty.openpty()
  env = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
  process = subprocess.Popen(
    [sys.executable, "-c", SCRIPT, *argv], stderr=theirs, stdout=subprocess.PIPE, env=env, cwd=ROOT
  )
  os.close(theirs)
  shown = b""
  while True:
    try:
      data = os.read(ours, 1 << 16)
    except OSError:  # the other end is closed
      break
    if not data:
      break
    shown += data
  os.close(ours)
  out = process.communicate()[0].decode()
  assert process.returncode == 0, shown.decode()
  return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()), out


def test_a_terminal_gets_bars_below_the_log_and_stdout_the_json_alone():
  shown, out = on_a_terminal()
  assert out == '{"done": true}\n'
  for part in ("a line of the log", "[red]a stray line", "a warning", "rounds", "━", "2/4", "left"):
    assert part in shown
  assert "0.50/2.00 GB" in shown and "best 0.512, nodes 7" in shown
  assert re.search(r"\d+ tokens/s", shown)


def test_quiet_shows_warnings_alone():
  shown, out = on_a_terminal("--quiet")
  lines = [line.strip() for line in shown.splitlines() if line.strip()]
  assert out == '{"done": true}\n'
  assert len(lines) == 2 and lines[0] == "[red]a stray line" and lines[1].endswith("a warning")


@pytest.fixture
def heard(monkeypatch):
  """A handler of the log's lines, without waits."""
  monkeypatch.setattr(terminal, "_SILENCE", 0.0)
  handler, lines = Handler(), []
  monkeypatch.setattr(handler, "emit", lambda record: lines.append(record.getMessage()))
  logging.getLogger("awf").addHandler(handler)
  logging.getLogger("awf").setLevel(logging.INFO)
  yield handler, lines
  logging.getLogger("awf").removeHandler(handler)
  count_tokens(None)


def test_elsewhere_a_silent_run_says_where_it_is(heard):
  handler, lines = heard
  with show(handler), track("rounds", 20, 3) as rounds, track("update"):
    rounds.advance(best=0.5)
    deadline = time.monotonic() + 60
    while not lines and time.monotonic() < deadline:
      time.sleep(0.01)
  assert re.fullmatch(r"rounds: 4/20; best 0.500; .* left \| update: .*", lines[0])
  assert open_stages() == []


def test_a_stage_counts_and_tells_the_time(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(time, "monotonic", lambda: now[0])
  stage = Stage("proposals", 20, done=10)
  assert stage.seconds_left is None and stage.line() == "proposals: 10/20; 0 s"
  now[0] += 30
  stage.advance(5)
  stage.count("running")
  stage.count("running")
  assert stage.seconds_left == 30.0  # what was done before says nothing about the speed
  assert stage.line() == "proposals: 15/20; running 2; 30 s, 30 s left"
  assert Stage("x").amount() == "" and Stage("x", unit="B").amount() == "0.00 GB"
  assert [clock(s) for s in (0.4, 59.9, 187, 7387)] == ["0 s", "59 s", "3:07", "2:03:07"]


def test_a_stage_ends_with_its_with_whatever_happens():
  with pytest.raises(ValueError), track("one"), track("two"):
    assert [s.name for s in open_stages()] == ["one", "two"]
    raise ValueError
  assert open_stages() == []


def test_compilations_are_stages(monkeypatch):
  terminal.watch_compiles()
  terminal.watch_compiles()
  seen = []

  @jax.jit
  def f(x):
    seen.extend(s.name for s in open_stages())  # while it is traced: not yet compiling
    return jnp.sin(x) * 3.25

  opened = []
  monkeypatch.setattr(terminal, "_open", _Recorder(opened))
  f(jnp.ones(7)).block_until_ready()
  assert "compile" in opened and open_stages() == [] and seen == []


class _Recorder(list):
  """A list that remembers what was ever in it."""

  def __init__(self, opened):
    super().__init__()
    self.opened = opened

  def append(self, stage):
    self.opened.append(stage.name)
    super().append(stage)


def test_the_banner_says_what_runs(tmp_path):
  from small_run import small

  from awf.config_io import resolve_paths
  from awf.system import System
  from awf.workdir import Workdir

  with System(resolve_paths(small()), Workdir(tmp_path)) as system:
    rows = dict(line.split(maxsplit=1) for line in banner_lines(system))
    added = update_bytes(system)
    state = system.make_trainer(1).state
  assert list(rows) == ["model", "training", "chips", "data", "sandbox", "memory"]
  assert "3.1M parameters" in rows["model"] and "mesh data 1" in rows["chips"]
  assert "286,720 parameters, 9.358 %" in rows["training"] and "2 held out" in rows["data"]
  assert "landlock" in rows["sandbox"] and ": fits " in rows["memory"]
  assert added["adapter"] == 2 * bytes_of(state.lora)
  assert added["optimiser"] == pytest.approx(bytes_of(state.opt_state), rel=1e-3)
  assert added["head"] == 3 * 4 * 512 * 1200  # float32, chunks of 512 tokens, 1,200 words


def test_the_memory_line_says_whether_it_fits():
  added = {"adapter": 0.25 * GIB, "optimiser": 0.25 * GIB, "head": 0.5 * GIB}
  for limit, words in (
    (16.0 * GIB, "14.00 GiB held by one device, 15.00 with an update"),
    (16.0 * GIB, "(adapter 0.25, optimiser 0.25, head 0.50): fits 16.0 GiB before activations"),
    (15.0 * GIB, ": fits 15.0 GiB"),
    (14.9 * GIB, ": does not fit 14.9 GiB"),
    (None, "does not say what it has"),
  ):
    assert words in memory_line(14.0 * GIB, added, limit), limit
  assert "update" not in memory_line(14.0 * GIB, {}, 16.0 * GIB)


def test_a_round_is_one_line_without_the_loss_of_no_training():
  results = {"reward": 0.38771, "mcts/valid_rate": 0.875, "loss": -0.02841}
  timings = {"time/step": 13.6, "perf/tokens_per_second": 363.2}
  assert round_line(2, 10, results, timings, 0.5) == (
    "round 2 of 10: best 0.500, reward 0.388, valid 0.88, loss -0.0284, 363 tokens/s, 14 s, "
    "about 1:48 left"
  )
  del results["loss"]
  assert "valid 0.88, 363 tokens/s" in round_line(2, 10, results, timings, 0.5)
