"""Timings of a round: overlapping work counts once, compilation, memory, shares of the peaks."""

import dataclasses
import math
import resource
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grpo import CONFIG, GRPO, LORA, OPTIM, make_rollouts

import awf.gauges
from awf.chips import chip_named
from awf.gauges import Gauges, Peak, find_peak, peak_memory_gb, utilisation
from awf.grpo.trainer import GRPOTrainer
from awf.qwen.model import init_params


def test_work_that_overlaps_counts_once():
  now = [0.0]
  gauges = Gauges(lambda: now[0])
  first, second = gauges.during("rollout"), gauges.during("rollout")
  for moment, step in ((1.0, first.__enter__), (2.0, second.__enter__)):
    now[0] = moment
    step()
  for moment, span in ((5.0, first), (7.0, second)):
    now[0] = moment
    span.__exit__(None, None, None)
  now[0] = 10.0
  with gauges.during("rollout"), gauges.during("evaluate"):
    now[0] = 10.5
  assert gauges.take() == {
    "time/rollout": 6.5, "time/evaluate": 0.5, "perf/compile_seconds": 0.0,
  }  # fmt: skip
  assert gauges.take() == {"perf/compile_seconds": 0.0}
  with gauges.during("evaluate"):
    now[0] = 20.0
  gauges.restart()
  assert gauges.take() == {"perf/compile_seconds": 0.0}


def test_a_part_that_fails_counts_too():
  now = [0.0]
  gauges = Gauges(lambda: now[0])
  with pytest.raises(ZeroDivisionError), gauges.during("rollout"):
    now[0] = 2.0
    raise ZeroDivisionError
  assert gauges.take_part("none") == {}
  assert gauges.take()["time/rollout"] == 2.0


def test_compilation_is_seen_on_every_thread_and_only_when_there_is_some():
  gauges = Gauges()
  gauges.watch_compilation()
  program = jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x).T)
  x = jnp.ones((8, 3))
  gauges.take()
  thread = threading.Thread(target=lambda: program(x).block_until_ready())
  thread.start()
  thread.join()
  assert gauges.take()["perf/compile_seconds"] > 0.0
  program(x).block_until_ready()
  assert gauges.take()["perf/compile_seconds"] == 0.0


def test_peak_memory_of_a_cpu_is_the_process_own():
  before = peak_memory_gb()
  held = np.ones(40_000_000)  # 0.32 GB
  assert peak_memory_gb() >= before and peak_memory_gb() > held.nbytes / 1e9
  assert peak_memory_gb() == pytest.approx(
    resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, rel=0.05
  )


def test_peaks_are_the_makers_where_the_chip_is_known_and_measured_elsewhere(monkeypatch):
  measured = find_peak()
  assert all(math.isfinite(x) and x > 1e6 for x in measured)
  v5e = chip_named("v5e")
  monkeypatch.setattr(awf.gauges, "find_chip", lambda kind: v5e)
  assert find_peak() == Peak(v5e.flops * jax.local_device_count(), v5e.bandwidth * 8)


def test_utilisation_is_work_over_time_over_peak():
  decode = {"steps": 30, "busy_seconds": 2.0, "weight_bytes": 5e9}
  found = utilisation(Peak(1e12, 3e11), 4e12, 8.0, decode)
  assert found == {"perf/mfu": pytest.approx(0.5), "perf/mbu": pytest.approx(0.25)}
  idle = {"steps": 0, "busy_seconds": 0.0, "weight_bytes": 5e9}
  assert utilisation(Peak(1e12, 3e11), 0.0, 1.0, idle) == {}


@pytest.mark.parametrize(
  "changes, passes",
  [
    ({"beta": 0.0}, 2),  # forward, backward
    ({"beta": 0.1}, 3),  # and the reference
    ({"beta": 0.1, "steps_per_batch": 3}, 7),
    ({"beta": 0.1, "kl_in": "reward"}, 4),  # old and reference log-probs
    ({"beta": 0.0, "loss": "gspo", "steps_per_batch": 2}, 5),  # ratios of the second step
  ],
)
def test_flops_of_an_update_follow_its_passes(changes, passes):
  params = init_params(CONFIG, jax.random.key(0))
  grpo = dataclasses.replace(GRPO, **{"steps_per_batch": 1, **changes})
  trainer = GRPOTrainer(CONFIG, params, None, LORA, grpo, OPTIM, None, jax.random.key(1))
  rollouts = make_rollouts()
  metrics = trainer.update(rollouts)
  assert not metrics["skipped"]
  # A completion's last token is a target alone; rows that share a prompt compute it once a bin.
  own = sum(len(r.token_ids) - 1 for r in rollouts if r.token_ids)
  shared = sum(len(p) for p in {r.prompt_ids for r in rollouts})
  size = sum(x.size for x in jax.tree.leaves(params))
  assert trainer.flops == pytest.approx(2 * size * passes * (own + shared), rel=1e-12)
  uniform = [dataclasses.replace(r, reward=1.0) for r in rollouts]
  if not changes["beta"]:
    assert trainer.update(uniform)["skipped"] and trainer.flops == 0.0
