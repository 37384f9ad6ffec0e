"""Meshes change where numbers live, not what they are; tensor mode moves no base matrix."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_checkpoint import random_params

from awf.grpo.config import GRPOConfig
from awf.grpo.loss import head_loss
from awf.grpo.objective import grpo_token_loss
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora, scaled, target_shapes
from awf.qwen.model import Qwen, head, head_kernel
from awf.qwen.quant import QuantConfig, quantise
from awf.sampler.cache import init_cache
from awf.sampler.decode import compile_dispatch, empty_work
from awf.sampler.device import cache_shardings
from awf.sampler.shapes import make_shapes
from awf.sharding import make_mesh, tree_shardings

KIND = LoRAConfig(3, 6.0)
GRPO = GRPOConfig(beta=0.1, entropy_coef=0.01)
MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 2), (1, 1, 8)]


def make_config(**changes):
  """Every dimension has a size of its own, so that a matrix is known by its shape."""
  sizes = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
  )
  return QwenConfig(**{**sizes, **changes})


CONFIGS = {
  "float": (make_config(), None),
  "int8": (make_config(), QuantConfig("int8")),
  "tied": (make_config(tie_word_embeddings=True), None),
  # 5 heads, a width and a vocabulary that 2 and 8 do not divide
  "uneven": (
    make_config(
      vocab_size=331, hidden_size=70, intermediate_size=99, num_attention_heads=5,
      num_key_value_heads=5, head_dim=14, family="qwen3",
    ),
    None,
  ),
}  # fmt: skip


@functools.cache
def world(name):
  """(config, params, lora, batch) on the host."""
  config, quant = CONFIGS[name]
  params = random_params(config, size=0.2)
  params = params if quant is None else quantise(params, quant)
  rng = np.random.default_rng(0)
  lora = init_lora(config, KIND, jax.random.key(0))
  lora = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), lora)
  shape = (8, 24)
  batch = {
    "tokens": rng.integers(0, config.vocab_size, shape).astype(np.int32),
    "target": rng.integers(0, config.vocab_size, shape).astype(np.int32),
    "is_target": rng.random(shape) < 0.7,
    "advantage": rng.standard_normal(shape).astype(np.float32),
    "old_logp": -np.abs(rng.standard_normal(shape)).astype(np.float32) - 5,
    "ref_logp": -np.abs(rng.standard_normal(shape)).astype(np.float32) - 5,
    "weight": np.full(shape, 0.01, np.float32),
  }
  return jax.tree.map(np.asarray, (params, lora, batch))


def figures(config, params, lora, batch):
  """(logits, loss, LoRA gradient) as the learner computes them."""

  def loss_of(lora):
    batch_ = dict(batch)
    tokens = batch_.pop("tokens")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    variables = {"params": params, "lora": scaled(lora, KIND)}
    hidden, _ = Qwen(config, remat=True).apply(variables, tokens, positions)
    kernel = jax.lax.stop_gradient(head_kernel(params))
    scalars = {"has_old": jnp.bool_(True), "total": jnp.float32(100)}
    scalars["entropy_coef"] = jnp.float32(GRPO.entropy_coef)
    fn = functools.partial(grpo_token_loss, config=GRPO)
    loss, _ = head_loss(kernel, hidden, batch_, scalars, jnp.int32(tokens.shape[1]), fn)
    return loss, head(params, hidden)

  (loss, logits), grad = jax.value_and_grad(loss_of, has_aux=True)(lora)
  return logits, loss, grad


def compiled(name, sizes):
  config = CONFIGS[name][0]
  params, lora, batch = world(name)
  mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
  placed = (
    jax.device_put(params, tree_shardings(params, mesh)),
    jax.device_put(lora, tree_shardings(lora, mesh)),
    jax.device_put(batch, rows),
  )
  step = jax.jit(functools.partial(figures, config)).lower(*placed).compile()
  return step, placed


@functools.cache
def alone(name):
  step, placed = compiled(name, (1, 1, 1))
  return jax.device_get(step(*placed))


CASES = [("float", sizes) for sizes in MESHES]
CASES += [("int8", (2, 2, 2)), ("tied", (2, 2, 2)), ("uneven", (2, 2, 2)), ("uneven", (1, 1, 8))]


@pytest.mark.parametrize(("name", "sizes"), CASES)
def test_a_mesh_changes_no_figure(name, sizes):
  step, placed = compiled(name, sizes)
  logits, loss, grad = jax.device_get(step(*placed))
  want_logits, want_loss, want_grad = alone(name)
  assert np.abs(want_logits).max() > 1 and abs(want_loss) > 1e-3
  np.testing.assert_allclose(logits, want_logits, atol=1e-5, rtol=1e-5)
  np.testing.assert_allclose(loss, want_loss, atol=1e-5)
  assert max(np.abs(g).max() for g in jax.tree.leaves(want_grad)) > 1e-3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grad, want_grad)


# ---------------------------------------------------------------------------- what moves


MOVES = re.compile(
  r"= (.*?) (?:all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", re.M
)


def moved_shapes(text):
  """Shapes of the results of all collectives of an HLO text."""
  found = set()
  for result in MOVES.findall(text):
    for dims in re.findall(r"\w+\[([\d,]*)\]", result):
      found.add(tuple(int(d) for d in dims.split(",") if d and d != "1"))
  return found


def whole_matrices(config):
  shapes = {*target_shapes(config).values(), (config.hidden_size, config.vocab_size)}
  return {order for a, b in shapes for order in ((a, b), (b, a))}


@pytest.mark.parametrize(("name", "size"), [("float", 8), ("int8", 2), ("tied", 2)])
def test_tensor_mode_moves_no_base_matrix(name, size):
  step, _ = compiled(name, (1, 1, size))
  text = step.as_text()
  assert MOVES.search(text)  # there are collectives, on activations
  assert not moved_shapes(text) & whole_matrices(CONFIGS[name][0])


def test_the_check_sees_the_gathers_of_fsdp():
  step, _ = compiled("float", (1, 8, 1))
  seen = moved_shapes(step.as_text()) & whole_matrices(CONFIGS["float"][0])
  assert len(seen) >= 3


@pytest.mark.parametrize("name", ["int8"])
def test_the_sampler_in_tensor_mode_moves_no_base_matrix(name):
  config = CONFIGS[name][0]
  params, _, _ = world(name)
  mesh = make_mesh(1, 1, 2, devices=jax.devices()[:2])
  shapes = make_shapes(config, 4, 128, 2, 4)
  cache = jax.eval_shape(lambda: init_cache(config, shapes.cache))
  place = functools.partial(
    jax.tree.map, lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  )
  placed = place(params, tree_shardings(params, mesh))
  cache = place(cache, cache_shardings(config, mesh))
  step = compile_dispatch(config, shapes).lower(placed, None, cache, empty_work(shapes)).compile()
  text = step.as_text()
  assert MOVES.search(text)
  assert not moved_shapes(text) & whole_matrices(config)
