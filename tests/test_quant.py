"""Quantised bases: numbers, both layouts in every reader, gradients, memory, shardings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import make_checkpoint, random_params

from awf.grpo.loss import head_loss, weighted_nll
from awf.policy import ADAPTER, QwenPolicy
from awf.qwen import hf
from awf.qwen.config import QwenConfig
from awf.qwen.layout import abstract_params
from awf.qwen.lora import LoRAConfig, init_lora, merge, scaled
from awf.qwen.model import Qwen, head, head_kernel, init_params
from awf.qwen.quant import (
  QuantConfig,
  QuantKernel,
  dequantise,
  frozen_logits,
  is_quantised,
  matmul,
  num_bytes,
  quantise,
  quantise_rows,
)
from awf.qwen.random_base import random_base
from awf.sampler.engine import Request
from awf.sharding import make_mesh, tree_shardings
from awf.types import UserError
from configs.base import base_config

LAYOUTS = {
  "int8": QuantConfig("int8"),
  "int8 kernels": QuantConfig("int8", embedding=False),
  "int4": QuantConfig("int4", group=8),
}


def make_config(**changes):
  sizes = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    tie_word_embeddings=True,
  )
  return QwenConfig(**{**sizes, **changes})


CONFIGS = {
  "tied": make_config(),
  "untied": make_config(tie_word_embeddings=False),
  "qwen3": make_config(family="qwen3", head_dim=8),
}
TOKENS = np.random.default_rng(0).integers(0, 48, (3, 11), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(config, params, lora=None, adapter_B=None):
  positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1])[None], TOKENS.shape)
  collections = {"params": params} if lora is None else {"params": params, "lora": lora}
  hidden, _ = Qwen(config).apply(collections, TOKENS, positions, adapter_B=adapter_B)
  return head(params, hidden)


def make_lora(config, seed=0):
  lora = init_lora(config, LoRAConfig(3), jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), lora)


def test_rows_follow_the_formula():
  rows = np.random.default_rng(0).standard_normal((5, 16)).astype(np.float32)
  rows[2] = 0.0
  rows[3, 4] = -50.0
  integers, scale = quantise_rows(rows, "int8")
  want = np.abs(rows).max(axis=1) / 127
  np.testing.assert_allclose(scale, want)
  assert integers.dtype == np.int8 and integers[3, 4] == -127 and not integers[2].any()
  assert (np.abs(integers * scale[:, None] - rows) <= scale[:, None] * 0.5001).all()
  integers, scale = quantise_rows(rows, "int4", 8)
  assert integers.dtype == jnp.int4 and scale.shape == (5, 2)
  wide = integers.astype(np.float32)
  assert (np.abs(wide) <= 7).all()
  back = (wide.reshape(5, 2, 8) * scale[..., None]).reshape(5, 16)
  assert (np.abs(back - rows) <= np.repeat(scale, 8, axis=1) * 0.5001).all()


PAIRS = [("tied", "int8"), ("untied", "int4"), ("untied", "int8 kernels"), ("qwen3", "int4")]


@pytest.mark.parametrize(("name", "layout"), PAIRS)
def test_the_model_reads_both_layouts_alike(name, layout):
  config = CONFIGS[name]
  params = random_params(config, size=0.3)
  quant = quantise(params, LAYOUTS[layout])
  assert is_quantised(quant) and not is_quantised(params)
  wide = dequantise(quant)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.2), wide, params)
  np.testing.assert_allclose(logits(config, quant), logits(config, wide), atol=1e-5)
  if layout != "int8":
    return
  lora = make_lora(config)
  np.testing.assert_allclose(logits(config, quant, lora), logits(config, wide, lora), atol=1e-5)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), lora, make_lora(config, 1))
  adapter_B = jnp.array([0, 2, 1])
  np.testing.assert_allclose(
    logits(config, quant, stacked, adapter_B), logits(config, wide, stacked, adapter_B), atol=1e-5
  )


@pytest.mark.parametrize("layout", ["none", *LAYOUTS])
@pytest.mark.parametrize("name", CONFIGS)
def test_abstract_params_are_what_loading_gives(name, layout, tmp_path):
  config, quant = CONFIGS[name], LAYOUTS.get(layout, QuantConfig())
  params = random_params(config, size=0.3)
  hf.save_checkpoint(tmp_path, params, config)
  loaded = hf.load_params(tmp_path, config, "bfloat16", quant=quant)
  abstract = abstract_params(config, "bfloat16", quant)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), loaded) == jax.tree.map(
    lambda x: (x.shape, x.dtype), abstract
  )
  assert num_bytes(abstract) == num_bytes(loaded)
  made = jax.tree.map(lambda x: x.astype("bfloat16"), params) if layout == "none" else None
  made = made or quantise(params, quant)
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), loaded, made)


def test_int8_is_about_half_of_bfloat16():
  config = make_config(vocab_size=4096, hidden_size=256, intermediate_size=512, head_dim=64)
  half = num_bytes(abstract_params(config, "bfloat16", QuantConfig("int8")))
  whole = num_bytes(abstract_params(config, "bfloat16"))
  assert 0.5 < half / whole < 0.51
  quarter = num_bytes(abstract_params(config, "bfloat16", QuantConfig("int4", 128)))
  assert quarter < half


def test_a_group_that_does_not_divide_is_refused():
  with pytest.raises(UserError, match="128 does not divide the 16 inputs.*instance 16"):
    abstract_params(make_config(), "float32", QuantConfig("int4"))
  with pytest.raises(UserError, match="config.model.quant: expected one of"):
    QuantConfig("int3")


@pytest.mark.parametrize(("name", "layout"), PAIRS[:2])
def test_lora_gradients_are_those_on_the_float_base(name, layout):
  config = CONFIGS[name]
  quant = quantise(random_params(config, size=0.3), LAYOUTS[layout])
  wide, lora_config = dequantise(quant), LoRAConfig(3)
  target = np.roll(TOKENS, -1, axis=1)

  def token_loss(logits_BcV, data, _):
    logp = jax.nn.log_softmax(logits_BcV)
    return -jnp.sum(jnp.take_along_axis(logp, data[..., None], axis=-1)), data

  def losses(lora, params):
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1])[None], TOKENS.shape)
    variables = {"params": params, "lora": scaled(lora, lora_config)}
    hidden, _ = Qwen(config, remat=True).apply(variables, TOKENS, positions)
    kernel = jax.lax.stop_gradient(head_kernel(params))
    one, _ = head_loss(kernel, hidden, target, (), jnp.int32(11), token_loss, 4)
    flat = hidden.reshape(-1, config.hidden_size)
    two = weighted_nll(kernel, flat, target.reshape(-1), jnp.ones(target.size), False, 8)
    return one + 0.5 * two

  grad = jax.jit(jax.value_and_grad(losses))
  lora = make_lora(config)
  ours, theirs = grad(lora, quant), grad(lora, wide)
  largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(theirs[1]))
  assert largest > 1e-2
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * largest, rtol=1e-4), ours, theirs
  )


@pytest.mark.parametrize("layout", ["none", *LAYOUTS])
def test_a_random_base_has_the_leaves_of_a_checkpoint(layout):
  config = CONFIGS["qwen3"]
  quant = LAYOUTS.get(layout, QuantConfig())
  base, again, other = (
    random_base(config, "bfloat16", None, quant, False, seed) for seed in (0, 0, 1)
  )
  wanted = abstract_params(config, "bfloat16", quant)
  jax.tree.map(lambda x, y: (x.shape, x.dtype) == (y.shape, y.dtype) or pytest.fail(), base, wanted)
  jax.tree.map(np.testing.assert_array_equal, base, again)
  wide, wide_other = (
    (dequantise(x) if is_quantised(x) else x)["layers_0"]["up_proj"]["kernel"]
    for x in (base, other)
  )
  assert not np.array_equal(wide, wide_other)
  assert 0.015 < float(jnp.std(jnp.asarray(wide, jnp.float32))) < 0.025
  assert not np.array_equal(wide, base["layers_1"]["up_proj"].get("kernel"))


@pytest.mark.parametrize("layout", ["none", "int8"])
def test_frozen_logits_have_the_gradient_of_the_product(layout):
  params = random_params(CONFIGS["untied"], size=0.3)
  params = quantise(params, LAYOUTS[layout]) if layout in LAYOUTS else params
  x = jax.random.normal(jax.random.key(0), (5, 16))
  kernel = head_kernel(params)

  def loss(product, x):
    return jnp.sum(jnp.sin(product(x, kernel)))

  ours, wanted = (
    jax.value_and_grad(functools.partial(loss, f))(x) for f in (frozen_logits, matmul)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, wanted)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_no_loop_holds_a_float_copy_of_the_whole(method):
  """Temporaries of a loop over eight matrices, forward and backward: about one matrix at a time."""
  inner, outer, count = 256, 1024, 8
  rng = np.random.default_rng(0)
  kernels = []
  for _ in range(count):
    integers, scale = quantise_rows(rng.standard_normal((outer, inner)), method, 64)
    kernels.append(QuantKernel(jnp.asarray(integers.T), jnp.asarray(scale.T)))

  def chain(x, kernels):
    for kernel in kernels:
      x = jnp.tanh(matmul(x, kernel)[:, :inner])
    return x

  def loop(x, kernels):
    return jax.lax.fori_loop(0, 9, lambda _, x: chain(x, kernels), x)

  def slope(x, kernels):
    return jax.grad(lambda x: jnp.sum(chain(x, kernels)))(x)

  for fn in (loop, slope):
    stats = jax.jit(fn).lower(jnp.ones((4, inner)), kernels).compile().memory_analysis()
    assert stats.temp_size_in_bytes < 3.5 * 4 * inner * outer  # all eight would be 8


@pytest.mark.parametrize("layout", ["int8"])
def test_the_sampler_agrees_with_the_learner(layout, tmp_path):
  folder = make_checkpoint(tmp_path / "tiny")
  config, quant = base_config(), LAYOUTS[layout]
  config.model.path = str(folder)
  config.model.quant, config.model.quant_group = quant.method, quant.group
  config.model.quant_embedding = quant.embedding
  with config.unlocked():
    config.sampler.update(rows=4, context=128, prefill_rows=2, steps_per_dispatch=4)
  policy = QwenPolicy.from_config(config)
  try:
    assert is_quantised(policy.params)
    policy.set_lora(make_lora_of(policy))
    prompt = policy.tokenizer.encode("the cat has 12 apples")
    for adapter in (0, ADAPTER):
      request = Request(tuple(prompt), seed=3, max_new_tokens=10, adapter=adapter)
      ((output,),) = policy.engine.generate([request])
      scored = policy.logprobs(prompt, output.token_ids, adapter)
      np.testing.assert_allclose(scored, output.logprobs, atol=1e-5)
  finally:
    policy.close()


def make_lora_of(policy):
  rng = np.random.default_rng(1)
  noise = init_lora(policy.params, policy.lora_config, jax.random.key(1))
  return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), noise)


@pytest.mark.parametrize("layout", ["int8", "int4"])
def test_on_a_mesh_integers_lie_as_their_floats(layout):
  config = CONFIGS["untied"]
  quant = quantise(random_params(config, size=0.3), LAYOUTS[layout])
  mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  split = jax.device_put(quant, tree_shardings(quant, mesh))
  shards = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), split)
  layer = shards["layers_0"]
  assert layer["gate_proj"]["kernel_q"] == (8, 12) and layer["down_proj"]["kernel_q"] == (12, 8)
  assert layer["gate_proj"]["kernel_scale"][-1] == 12
  np.testing.assert_allclose(logits(config, split), logits(config, quant), atol=1e-5)
  abstract = abstract_params(config, "float32", LAYOUTS[layout], mesh)
  assert jax.tree.map(lambda x: x.sharding, abstract) == jax.tree.map(lambda x: x.sharding, split)


def test_hash_sees_integers_and_scales():
  quant = quantise(random_params(CONFIGS["tied"]), LAYOUTS["int4"])
  base = hf.base_hash(quant)
  assert base == hf.base_hash(jax.tree.map(jnp.copy, quant))
  leaf = quant["layers_0"]["q_proj"]
  changed = {**leaf, "kernel_q": (leaf["kernel_q"].astype(jnp.int8) ^ 1).astype(jnp.int4)}
  assert base != hf.base_hash({**quant, "layers_0": {**quant["layers_0"], "q_proj": changed}})


# Few rows are multiplied turned; many have the adapter summed into the matrix.
@pytest.mark.parametrize("rows", [3, 300])
def test_a_turned_base_is_the_same_model(rows, tmp_path):
  config = make_config()
  hf.save_checkpoint(tmp_path, init_params(config, jax.random.key(0)), config)
  plain = hf.load_params(tmp_path, config)
  turned = hf.load_params(tmp_path, config, is_turned=True)
  kernel = plain["layers_0"]["down_proj"]["kernel"]
  np.testing.assert_array_equal(turned["layers_0"]["down_proj"]["kernel_t"], kernel.T)
  assert hf.base_hash(turned) == hf.base_hash(plain)
  tokens = jax.random.randint(jax.random.key(1), (rows, 1), 0, config.vocab_size)
  lora = jax.tree.map(lambda x: x + 0.1, init_lora(turned, LoRAConfig(2, 4.0), jax.random.key(2)))

  def logits(params, lora=None):
    variables = {"params": params} | ({} if lora is None else {"lora": lora})
    positions = jnp.zeros((rows, 1), jnp.int32)
    return head(params, Qwen(config).apply(variables, tokens, positions)[0])

  np.testing.assert_allclose(logits(turned), logits(plain), atol=1e-5)
  np.testing.assert_allclose(logits(turned, lora), logits(plain, lora), atol=1e-4)
  np.testing.assert_allclose(logits(merge(turned, lora)), logits(plain, lora), atol=1e-4)
