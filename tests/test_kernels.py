"""The attention kernels of GPUs, interpreted here, against the plain form and a full forward."""

import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import CONTEXT, QWEN3, TINY, check_logprobs, prompt
from tiny_checkpoint import random_params

from awf.grpo.attention import block_attend
from awf.qwen.kernel import serves
from awf.sampler.cache import init_cache
from awf.sampler.decode import dispatch, empty_work
from awf.sampler.engine import Engine, Request
from awf.sampler.shapes import GPU_STALL_TOKENS, STALL_TOKENS, make_shapes

ROWS = 8


@pytest.fixture(params=[1, 4, 0], ids=["whole", "in-parts", "no-kernels"])
def as_on_a_gpu(request, monkeypatch):
  """Engines that are made meanwhile have the shapes of a GPU, with kernels and without."""
  splits = request.param

  def shapes(config, rows, context, prefill_rows, steps, *_):
    found = make_shapes(config, rows, context, prefill_rows, steps, "gpu", has_kernels=bool(splits))
    assert found.lone_at_once == (0 if splits else rows)
    return dataclasses.replace(found, splits=splits, block=64)

  monkeypatch.setattr("awf.sampler.engine.make_shapes", shapes)


def make_engine(config, params):
  return Engine(config, params, rows=ROWS, context=CONTEXT, prefill_rows=2, steps_per_dispatch=6)


def requests():
  """Prompts within a page, at its end, over pages and of one token; groups and single ones."""
  lengths = (1, 2, 64, 65, 128, 129, 130, 200, 31, 7)
  return [
    Request(prompt(length, i), n=1 + 2 * (i % 2), seed=i, max_new_tokens=10 + 7 * i)
    for i, length in enumerate(lengths)
  ]


@pytest.mark.parametrize("config", [TINY, QWEN3], ids=["qwen2", "qwen3"])
def test_an_engine_draws_the_same_tokens(config, as_on_a_gpu, monkeypatch):
  params = random_params(config, size=0.3)
  with make_engine(config, params) as engine:
    assert engine.shapes.stall == GPU_STALL_TOKENS
    found = engine.generate(requests())
  monkeypatch.undo()
  with make_engine(config, params) as engine:
    assert engine.shapes.stall == STALL_TOKENS
    wanted = engine.generate(requests())
  for request, ours, plain in zip(requests(), found, wanted, strict=True):
    assert [x.token_ids for x in ours] == [x.token_ids for x in plain]
    for one, other in zip(ours, plain, strict=True):
      np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    check_logprobs(params, request.prompt_ids, ours[0])


def test_a_row_depends_on_nothing_but_itself(as_on_a_gpu):
  params = random_params(TINY, size=0.3)
  with make_engine(TINY, params) as engine:
    together = engine.generate(requests())
  for request, there in list(zip(requests(), together, strict=True))[::3]:
    with make_engine(TINY, params) as engine:
      assert engine.generate([request]) == [there]


def test_the_learners_kernels_equal_its_blocks_and_their_gradient():
  """A prompt and its completions, a second prompt, padding; ids that begin within a block."""
  segments, parents = np.zeros((2, 200), np.int32)
  for i, (start, stop, parent) in enumerate(
    ((0, 60, 1), (60, 90, 1), (90, 91, 1), (91, 150, 1), (150, 170, 5)), 1
  ):
    segments[start:stop], parents[start:stop] = i, parent
  draw = np.random.default_rng(0)
  q, d_out = (jnp.array(draw.standard_normal((1, 200, 4, 16)), jnp.float32) for _ in range(2))
  k, v = (jnp.array(draw.standard_normal((1, 200, 2, 16)), jnp.float32) for _ in range(2))
  is_token = jnp.array(segments > 0)[None, :, None, None]

  def run(has_kernels):
    attend = block_attend(jnp.array(segments), jnp.array(parents), 64, has_kernels)
    out, pull = jax.vjp(lambda *x: attend(*x, None)[0] * is_token, q, k, v)
    return out, pull(d_out)

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), run(True), run(False))


def lowered(fn, *args):
  """The program that an NVIDIA GPU would get; JAX from 0.11 on wants one here to make it."""
  try:
    return jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
  except RuntimeError as error:
    pytest.skip(str(error).splitlines()[0])


@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_triton_takes_every_kernel(dtype, monkeypatch):
  config = dataclasses.replace(QWEN3, dtype=dtype, head_dim=64)
  shapes = make_shapes(config, ROWS, CONTEXT, 2, 6, "gpu", has_kernels=True)
  params = jax.eval_shape(lambda: random_params(config))
  cache = jax.eval_shape(lambda: init_cache(config, shapes.cache))
  q, k = (jnp.zeros((1, 128, heads, 64), dtype) for heads in (6, 3))
  ids = jnp.ones(128, jnp.int32)

  def learner(q, k):
    out = block_attend(ids, ids, 64, True)(q, k, k, None)[0]
    return jnp.sum(out.astype(jnp.float32))

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  sampler = partial(dispatch, config, shapes)
  text = lowered(sampler, params, None, cache, empty_work(shapes))
  assert text.count("__gpu$xla.gpu.triton") == 3  # a layer's: two to prefill, one to decode
  assert lowered(jax.grad(learner, (0, 1)), q, k).count("__gpu$xla.gpu.triton") == 3


@pytest.mark.parametrize(
  ("platform", "kind", "capability", "head_dim", "wanted"),
  [
    ("gpu", "NVIDIA H200", "9.0", 64, True),
    ("gpu", "Tesla T4", "7.5", 64, False),  # too old for Triton
    ("gpu", "NVIDIA A100-SXM4-40GB", "8.0", 128, True),
    ("gpu", "NVIDIA L4", "8.9", 80, False),  # no power of two
    ("gpu", "AMD Instinct MI300X", "gfx942", 128, False),
    ("cpu", "cpu", None, 64, False),
    ("tpu", "TPU v5 lite", None, 128, False),
  ],
)
def test_where_kernels_serve(platform, kind, capability, head_dim, wanted):
  device = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
  assert serves(device, head_dim) is wanted
