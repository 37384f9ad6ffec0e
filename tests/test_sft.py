"""Supervised training: packing, the weighted loss, and what must not change it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from awf.grpo.config import OptimConfig, make_optimizer
from awf.grpo.loss import weighted_nll
from awf.grpo.sft import SFTTrainer, batches, pack_examples
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora, scaled
from awf.qwen.model import Qwen, head, init_params
from awf.sharding import make_mesh
from awf.types import UserError

TIED = QwenConfig(53, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)
UNTIED = QwenConfig(53, 32, 48, 2, 4, 2, 8, family="qwen3")
OPTIM = OptimConfig(learning_rate=1.0, eps=1.0, grad_clip=0.0)


def make_examples(count=40, seed=0, longest=14):
  rng = np.random.default_rng(seed)

  def ids(low):
    return tuple(rng.integers(0, 53, rng.integers(low, longest)).tolist())

  return [(ids(1), ids(1)) for _ in range(count)]


def unpack(packed):
  """Every segment's (tokens, weights), sorted."""
  found = []
  for b in range(packed["tokens_BT"].shape[0]):
    for segment in range(1, packed["segments_BT"][b].max() + 1):
      at = packed["segments_BT"][b] == segment
      np.testing.assert_array_equal(packed["positions_BT"][b][at], np.arange(at.sum()))
      found.append((tuple(packed["tokens_BT"][b][at]), tuple(packed["weights_BT"][b][at])))
  return sorted(found)


def plain_loss(config, params, lora, examples, prompt_weight):
  """One example a row, right-padded (causal attention does not see it), whole logits."""
  tokens = np.zeros((len(examples), 32), np.int32)
  weights = np.zeros((len(examples), 32), np.float32)
  for i, (prompt, response) in enumerate(examples):
    size = len(prompt) + len(response)
    tokens[i, :size] = (*prompt, *response)
    weights[i, 1:size] = [prompt_weight] * (len(prompt) - 1) + [1.0] * len(response)
  variables = {"params": params} | ({"lora": lora} if lora else {})
  positions = jnp.broadcast_to(jnp.arange(32), tokens.shape)
  hidden, _ = Qwen(config).apply(variables, tokens, positions)
  logp = jax.nn.log_softmax(head(params, hidden)[:, :-1])
  chosen = jnp.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0]
  return -jnp.sum(weights[:, 1:] * chosen) / np.sum(weights)


def flat(tree):
  return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def test_packing_keeps_every_example_and_depends_on_the_seed_alone():
  examples = make_examples(200)
  packed = pack_examples(examples, 32, 0.25, seed=3)
  expected = sorted(
    ((*p, *r), (0.0,) + (0.25,) * (len(p) - 1) + (1.0,) * len(r)) for p, r in examples
  )
  assert unpack(packed) == expected
  assert (packed["segments_BT"] > 0).mean() > 0.95
  assert np.all(packed["weights_BT"][packed["segments_BT"] == 0] == 0)
  again = pack_examples(examples, 32, 0.25, seed=3)
  other = pack_examples(examples, 32, 0.25, seed=4)
  assert all(np.array_equal(packed[k], again[k]) for k in packed)
  assert not np.array_equal(packed["tokens_BT"], other["tokens_BT"])


def test_packing_leaves_out_what_is_too_long(caplog):
  packed = pack_examples([((1, 2), (3,)), ((1,) * 9, (2,) * 9)], 8)
  assert unpack(packed) == [((1, 2, 3), (0.0, 0.0, 1.0))]
  assert "left out 1 examples" in caplog.text
  with pytest.raises(UserError, match="config.sft.length.*at most 2 tokens.*shortest: 3"):
    pack_examples([((1, 2), (3,))], 2)


def test_batches_visit_every_row_once_an_epoch():
  packed = {"tokens_BT": np.arange(6)[:, None]}
  order = [b["tokens_BT"].ravel().tolist() for b in itertools.islice(batches(packed, 2), 6)]
  first, second = sum(order[:3], []), sum(order[3:], [])
  assert sorted(first) == sorted(second) == list(range(6)) and first != second
  with pytest.raises(UserError, match="config.sft.batch: expected at most 6"):
    next(iter(batches(packed, 7)))


def test_weighted_nll_and_its_gradients_match_whole_logits():
  keys = jax.random.split(jax.random.key(0), 3)
  kernel, hidden = jax.random.normal(keys[0], (8, 11)), jax.random.normal(keys[1], (21, 8))
  target = jax.random.randint(keys[2], (21,), 0, 11)
  weight = jnp.arange(21.0) % 4

  def whole(kernel, hidden):
    logp = jax.nn.log_softmax(hidden @ kernel)
    return -jnp.sum(weight * jnp.take_along_axis(logp, target[:, None], 1)[:, 0])

  def chunked(kernel, hidden, is_trained=True):
    return weighted_nll(kernel, hidden, target, weight, is_trained, 8)

  want, want_grads = jax.value_and_grad(whole, (0, 1))(kernel, hidden)
  got, grads = jax.value_and_grad(chunked, (0, 1))(kernel, hidden)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  for a, b in zip(grads, want_grads, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  frozen = jax.grad(lambda k, h: chunked(k, h, False), (0, 1))(kernel, hidden)
  np.testing.assert_array_equal(frozen[0], jnp.zeros_like(kernel))
  np.testing.assert_allclose(frozen[1], want_grads[1], atol=1e-5)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied-qwen3"])
def test_step_equals_the_plain_reading(config):
  params = init_params(config, jax.random.key(0))
  examples = make_examples(24)
  packed = pack_examples(examples, 32, 0.3)
  trainer = SFTTrainer(config, params, OPTIM, micro_tokens=64)
  metrics = trainer.step(packed)

  value, grads = jax.jit(jax.value_and_grad(lambda p: plain_loss(config, p, None, examples, 0.3)))(
    params
  )
  optimizer = make_optimizer(OPTIM)
  updates, _ = optimizer.update(grads, optimizer.init(params), params)
  expected = optax.apply_updates(params, updates)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["grad_norm"], np.linalg.norm(flat(grads)), rtol=1e-4)
  np.testing.assert_allclose(flat(trainer.params), flat(expected), atol=2e-6)
  assert int(metrics["tokens"]) == sum(len(p) + len(r) for p, r in examples)
  assert params["norm"]["scale"] is not None  # the caller's arrays are not donated


def test_lora_step_leaves_the_base_alone():
  params, lora_config = init_params(TIED, jax.random.key(0)), LoRAConfig(2, 4.0)
  lora = init_lora(TIED, lora_config, jax.random.key(1))
  examples = make_examples(12)
  trainer = SFTTrainer(
    TIED, params, OPTIM, weights="lora", lora=lora, lora_config=lora_config, micro_tokens=64
  )
  before = flat(params)
  loss = trainer.step(pack_examples(examples, 32))["loss"]
  value, grads = jax.jit(
    jax.value_and_grad(lambda x: plain_loss(TIED, params, scaled(x, lora_config), examples, 0.0))
  )(lora)
  np.testing.assert_allclose(loss, value, rtol=1e-5)
  optimizer = make_optimizer(OPTIM)
  updates, _ = optimizer.update(grads, optimizer.init(lora), lora)
  np.testing.assert_allclose(
    flat(trainer.params), flat(optax.apply_updates(lora, updates)), atol=2e-6
  )
  np.testing.assert_array_equal(flat(params), before)


def test_micro_batches_packing_and_mesh_change_nothing():
  params, examples = init_params(TIED, jax.random.key(0)), make_examples(30)
  packed = pack_examples(examples, 32, 0.5)
  reference = SFTTrainer(TIED, params, OPTIM, micro_tokens=4096)
  want = reference.step(packed)
  cases = {
    "micro": (packed, None, 64),
    "unpacked": (pack_examples([(p, r) for p, r in examples], 28, 0.5, seed=1), None, 4096),
    "mesh": (packed, make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]), 64),
  }
  for name, (batch, mesh, micro_tokens) in cases.items():
    trainer = SFTTrainer(TIED, params, OPTIM, mesh, micro_tokens=micro_tokens)
    got = trainer.step(batch)
    np.testing.assert_allclose(got["loss"], want["loss"], rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(flat(trainer.params), flat(reference.params), atol=5e-6)


def test_a_lora_on_a_mesh_has_its_base_there_and_trains_alike():
  params, packed = init_params(TIED, jax.random.key(0)), pack_examples(make_examples(30), 32, 0.5)
  config = LoRAConfig(4, 8.0)
  mesh = make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
  found = []
  for where in (None, mesh):
    lora = init_lora(TIED, config, jax.random.key(1))
    trainer = SFTTrainer(
      TIED, params, OPTIM, where, weights="lora", lora=lora, lora_config=config
    )  # fmt: skip
    found.append((trainer.step(packed)["loss"], flat(trainer.params)))
  np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
  np.testing.assert_allclose(found[0][1], found[1][1], atol=5e-6)
  for leaf in jax.tree.leaves(trainer._base):
    assert set(leaf.sharding.device_set) == set(mesh.devices.flat)
  kernel = trainer._base["layers_0"]["gate_proj"]["kernel"]
  assert kernel.addressable_shards[0].data.size < kernel.size, "each device its part"


def test_training_lowers_the_loss_with_one_trace():
  params = init_params(TIED, jax.random.key(0))
  packed = pack_examples(make_examples(40), 32)
  optim = OptimConfig(3e-2, "cosine", warmup_steps=2, total_steps=30)
  trainer = SFTTrainer(TIED, params, optim, micro_tokens=128)
  before = trainer.evaluate(packed)
  last = trainer.train(itertools.islice(batches(packed, 8), 30))
  assert trainer.evaluate(packed) < before - 0.5
  assert trainer.traces == 1
  assert last["learning_rate"] < 1e-3


def test_bad_weights_are_refused():
  params = init_params(TIED, jax.random.key(0))
  with pytest.raises(UserError, match="config.sft.weights"):
    SFTTrainer(TIED, params, OPTIM, weights="head")
