"""One process of several on this machine, for tests/test_hosts.py: a part of the loop at a time.

python tests/host_worker.py PART FOLDER INDEX COUNT PORT     (PORT 0: as a cluster's variables say)

update   updates on the mesh of all processes, then a checkpoint
restore  the newest checkpoint, on the mesh of all processes
jobs     jobs dealt out, meetings, and a stop that one process is asked for
hang     meets the others, then waits for ever, in a collective or elsewhere (FOLDER names which)
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from awf import membership  # noqa: E402
from awf.types import UserError  # noqa: E402

TIMEOUT = 20.0


def make_trainer(mesh, **changes):
  import jax
  from test_grpo import GRPO, LORA, OPTIM, SHALLOW

  from awf.grpo.trainer import GRPOTrainer
  from awf.qwen.model import init_params
  from awf.sharding import spread

  params = jax.tree.map(
    lambda x: x * 4 if x.ndim > 1 else x, init_params(SHALLOW, jax.random.key(0))
  )
  params = spread(params, mesh) if mesh is not None else params
  grpo = dataclasses.replace(GRPO, **changes)
  return GRPOTrainer(SHALLOW, params, None, LORA, grpo, OPTIM, mesh, jax.random.key(7))


def leaves(state):
  """Every array of a state, whole, by this process's own part of it."""
  import jax
  import numpy as np

  found = {}
  for path, x in jax.tree_util.tree_flatten_with_path(state)[0]:
    x = jax.random.key_data(x) if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    found[jax.tree_util.keystr(path)] = np.asarray(x)
  return found


def digest(state):
  return hashlib.sha256(b"".join(x.tobytes() for x in leaves(state).values())).hexdigest()


def updated(mesh):
  """(metrics, trainer) after one update whose weights come from what other processes hold too."""
  from test_grpo import make_rollouts

  trainer = make_trainer(mesh, importance="token_truncate")
  return trainer.update(make_rollouts(seed=1)), trainer


def seen_ahead(mesh):
  """What advantages need from the models before an update: log-probs, KL and values of tokens."""
  import numpy as np
  from test_grpo import make_rollouts

  from awf.grpo.update import Update

  rollouts = make_rollouts(groups=2)
  step = Update(make_trainer(mesh, advantage="gae", beta=0.1, kl_in="reward"), rollouts)
  step._look_ahead(np.array([r.reward for r in rollouts]))
  return {"logp": step.old_logp_n, "kl": step.kl_n, "value": step.value_n}


def update(cluster, folder):
  import numpy as np

  from awf.checkpoint import Checkpointer
  from awf.sharding import make_mesh

  metrics, trainer = updated(make_mesh())
  checkpoints = Checkpointer(folder / "checkpoints", keep=1)
  for step in (1, 2):
    checkpoints.save(step, trainer.state, {"of": cluster.index})
  checkpoints.close()
  if cluster.is_writer:
    np.savez(folder / "state.npz", **leaves(trainer.state))
  ahead = {name: x.tolist() for name, x in seen_ahead(make_mesh()).items()}
  return {"metrics": metrics, "digest": digest(trainer.state), "ahead": ahead}


def restore(cluster, folder):
  from awf.checkpoint import Checkpointer
  from awf.sharding import make_mesh

  trainer = make_trainer(make_mesh())
  checkpoints = Checkpointer(folder / "checkpoints", keep=1)
  step, state, extra = checkpoints.restore(trainer.state)
  checkpoints.close()
  is_spread = all(
    x.sharding.device_set == set(trainer.mesh.devices.flat) for x in state_arrays(state)
  )
  return {"step": step, "digest": digest(state), "extra": extra, "is_spread": is_spread}


def state_arrays(state):
  import jax

  return jax.tree.leaves((state.lora, state.opt_state))


def jobs(cluster, folder):
  return asyncio.run(_jobs(cluster))


async def _jobs(cluster):
  done = []
  loop = asyncio.get_running_loop()

  def job(number, seconds=0.0):
    async def make():
      await asyncio.sleep(seconds)
      done.append(number)
      if number == 7:
        raise UserError("seven is refused")
      if number == 8:
        raise ValueError("eight failed")
      return {"square": number * number, "by": cluster.index}, number != 9

    return cluster.share("square", str(number), make)

  # Asked for in another order by each process, some of them twice at a time.
  order = list(range(7)) + [3, 4]
  order = order[::-1] if cluster.index % 2 else order
  rows = await asyncio.gather(*(job(n, 0.05 * (n % 3)) for n in order))
  by = {n: row["by"] for n, row in zip(order, rows, strict=True)}
  assert all(row["square"] == n * n for n, row in zip(order, rows, strict=True))
  errors = []
  for number in (7, 8):
    try:
      await job(number)
    except (UserError, RuntimeError, ValueError) as error:
      errors.append([type(error).__name__, str(error)])
  await job(9)
  facts = await cluster.meet({"index": cluster.index})
  before = sorted(done)
  await job(2)  # kept
  await job(9)  # not kept: done anew
  again = sorted(done)
  # One process is asked to stop amid a job that nobody finishes; the others come to know it.
  stopped = loop.create_future()
  cluster.on_stop(lambda: stopped.done() or stopped.set_result(None))
  if cluster.index == cluster.size - 1:
    loop.call_later(0.2, cluster.ask_stop, signal.SIGTERM)
  await stopped
  await cluster.meet({})
  return {
    "by": [by[n] for n in sorted(by)], "errors": errors, "facts": facts, "before": before,
    "again": again, "stop": [cluster.stop_number, cluster.is_stopped],
  }  # fmt: skip


def hang(cluster, folder):
  import jax
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec

  from awf.sharding import make_mesh, place

  mesh = make_mesh()
  total = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
  x = place(np.ones(cluster.size), NamedSharding(mesh, PartitionSpec("data")))
  assert float(total(x)) == cluster.size
  cluster.meet_now({})
  print("ready", flush=True)
  if folder.name == "collective" and cluster.index == 0:
    total(x).block_until_ready()  # the other one does not come
  time.sleep(600)


def main():
  part, folder = sys.argv[1], Path(sys.argv[2])
  index, count, port = map(int, sys.argv[3:])
  logging.basicConfig(level=logging.WARNING)
  from awf.runtime_setup import setup_jax

  os.environ["JAX_PLATFORMS"] = "cpu"
  setup_jax()
  chosen = membership.Settings(f"127.0.0.1:{port}", count, index, TIMEOUT)
  if not port:  # the environment says it
    chosen = membership.Settings(membership.AUTO, None, None, TIMEOUT)
  cluster = membership.join(chosen)
  try:
    result = globals()[part](cluster, folder)
  except Exception as error:  # raised again, unless another process was lost
    lost = membership.why_over()
    if not lost:
      raise
    print(f"error: {lost}", file=sys.stderr)
    return membership.leave(2, str(error))
  print(json.dumps(result), flush=True)
  return membership.leave(0)


if __name__ == "__main__":
  sys.exit(main())
