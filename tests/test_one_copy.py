"""One resident copy of the base: decode and training read the same arrays, no program copies it."""

import gc
import re
from collections import Counter

import jax
import numpy as np
import pytest

from awf.config_io import load_config, resolve_paths
from awf.grpo.batch import make_batch
from awf.grpo.config import GRPOConfig, OptimConfig
from awf.grpo.trainer import GRPOTrainer
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora, scaled, stack_adapters
from awf.qwen.model import init_params
from awf.sampler.cache import init_cache
from awf.sampler.decode import compile_dispatch, empty_work
from awf.sampler.shapes import make_shapes
from awf.system import System
from awf.train import Loop
from awf.types import Rollout
from awf.workdir import Workdir

TOKENS = 32  # of a bin: activations take little beside the weights
LORA = LoRAConfig(2, 4.0)
PROGRAMS = ("dispatch", "update", "logprobs", "reference")

# Dimensions differ from each other and from those of activations, so that a shape in a compiled
# program tells what it is.
SIZES = dict(
  vocab_size=2048,
  hidden_size=1024,
  intermediate_size=2816,
  num_hidden_layers=2,
  num_attention_heads=14,
  num_key_value_heads=2,
  head_dim=64,
  max_position_embeddings=512,
)


def test_policy_engine_and_learner_hold_the_very_same_arrays(tmp_path):
  config = load_config("configs/quickstart.py:smoke")
  config.mesh.data, config.sandbox.preload_numeric = 1, False
  gc.collect()
  before = jax.live_arrays()
  known = {id(x) for x in before}
  with Workdir(tmp_path) as workdir:
    workdir.open(config, "train")
    with System(resolve_paths(config), workdir) as system:
      loop = Loop(system, trains=True)
      base = jax.tree.leaves(system.policy.params)
      for other in (system.policy.engine.device._params, loop.trainer._params):
        assert all(a is b for a, b in zip(base, jax.tree.leaves(other), strict=True))
      own = {x.unsafe_buffer_pointer() for x in base}  # views of a buffer are no copies
      shapes = {x.shape for x in base if x.ndim == 2}
      gc.collect()
      new = [x for x in jax.live_arrays() if id(x) not in known]
      alike = [x for x in new if x.shape in shapes or x.shape[::-1] in shapes]
      assert len(alike) >= len([x for x in base if x.ndim == 2])
      assert not [x.shape for x in alike if x.unsafe_buffer_pointer() not in own]
      loop.metrics.close()
      loop.checkpoints.close()


@pytest.fixture(scope="module", params=["tied", "untied"])
def compiled(request):
  """(base, {program: compiled}) of a model whose weights far outweigh its activations."""
  config = QwenConfig(family="qwen2", tie_word_embeddings=request.param == "tied", **SIZES)
  params = init_params(config, jax.random.key(0))
  lora = init_lora(config, LORA, jax.random.key(1))
  shapes = make_shapes(config, rows=2, context=128, prefill_rows=1, steps=2)
  cache = init_cache(config, shapes.cache)
  adapters = stack_adapters([scaled(lora, LORA)])
  dispatch = compile_dispatch(config, shapes)
  grpo = GRPOConfig(group_size=2, beta=0.1, entropy_coef=0.01, micro_batch=1, vocab_chunk=16)
  learner = GRPOTrainer(config, params, lora, LORA, grpo, OptimConfig(), None, jax.random.key(2))
  rollouts = [Rollout("g", (1, 2), (3 + i, 4), (-1.0, -1.0), float(i)) for i in range(2)]
  batch = learner._place(make_batch(rollouts, range(2), TOKENS))
  zero = np.zeros(batch.target_ZBU.shape, np.float32)
  data = dict.fromkeys(("advantage", "old_logp", "ref_logp", "weight"), zero)
  scalars = {"has_old": np.bool_(True), "total": np.float32(4), "entropy_coef": np.float32(0.01)}
  lowered = {
    "dispatch": dispatch.lower(params, adapters, cache, empty_work(shapes)),
    "update": learner._step.lower(learner.state, params, batch, data, scalars),
    "logprobs": learner._score.lower(learner.state.lora, params, batch),
    "reference": learner._score.lower({}, params, batch),
  }
  assert set(lowered) == set(PROGRAMS)
  return params, {name: program.compile() for name, program in lowered.items()}


def matrices(params):
  """Dimensions of the base's matrices, sorted: a transpose counts as the matrix."""
  return {tuple(sorted(x.shape)) for x in jax.tree.leaves(params) if x.ndim == 2}


def made(program):
  """(operation, sorted dimensions) of the arrays that a program's instructions make."""
  found = Counter()
  for kind, dims, name in re.findall(r"= (\w+)\[([\d,]+)\]\S* ([a-z][\w-]*)\(", program.as_text()):
    shape = tuple(sorted(int(d) for d in dims.split(",") if d != "1"))
    if kind.startswith(("f", "bf")) and name not in ("parameter", "get-tuple-element", "bitcast"):
      found[name, shape] += 1
  return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_makes_a_second_copy_of_the_base(compiled, name):
  params, programs = compiled
  base_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
  memory = programs[name].memory_analysis()
  assert base_bytes > 50e6
  assert memory.argument_size_in_bytes >= base_bytes
  assert memory.temp_size_in_bytes < base_bytes / 4
  assert memory.output_size_in_bytes < base_bytes / 4
  copies = [key for key in made(programs[name]) if key[1] in matrices(params)]
  assert copies == []
  outputs = jax.tree.leaves(programs[name].out_info)
  assert not [x.shape for x in outputs if tuple(sorted(x.shape)) in matrices(params)]


def test_the_search_for_copies_finds_one():
  params = {"kernel": jax.numpy.ones((512, 384))}

  def turned_before_the_loop(params, x_BD, n):
    kernel_DV = params["kernel"].T

    def step(_, x_BD):
      return jax.numpy.tanh(x_BD @ kernel_DV @ params["kernel"])

    return jax.lax.fori_loop(0, n, step, x_BD)

  program = jax.jit(turned_before_the_loop).lower(params, np.ones((3, 384)), 7).compile()
  assert [key for key in made(program) if key[1] in matrices(params)]
