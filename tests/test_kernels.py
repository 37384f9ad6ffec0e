"""The attention kernels of GPUs, interpreted here, against the plain form and a full forward."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import CONTEXT, QWEN3, TINY, check_logprobs, prompt
from tiny_checkpoint import random_params

from awf.grpo.attention import block_attend
from awf.sampler.engine import Engine, Request, make_shapes

ROWS = 8


@pytest.fixture(params=[1, 4], ids=["whole", "in-parts"])
def with_kernels(request, monkeypatch):
  """Engines that are made meanwhile have the shapes of a GPU."""
  splits = request.param

  def shapes(config, rows, context, prefill_rows, steps, *_):
    found = make_shapes(config, rows, context, prefill_rows, steps, "gpu")
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
def test_an_engine_with_kernels_draws_the_same_tokens(config, with_kernels, monkeypatch):
  params = random_params(config, size=0.3)
  with make_engine(config, params) as engine:
    assert engine.shapes.splits
    found = engine.generate(requests())
  monkeypatch.undo()
  with make_engine(config, params) as engine:
    assert not engine.shapes.splits
    wanted = engine.generate(requests())
  for request, ours, plain in zip(requests(), found, wanted, strict=True):
    assert [x.token_ids for x in ours] == [x.token_ids for x in plain]
    for one, other in zip(ours, plain, strict=True):
      np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    check_logprobs(params, request.prompt_ids, ours[0])


def test_a_row_depends_on_nothing_but_itself(with_kernels):
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
