"""What must not change an update (pieces, packing, loops, devices), and its head's memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_grpo import (
  GRPO,
  LORA,
  OPTIM,
  SHALLOW,
  first_layer,
  flat,
  make_rollouts,
  padded,
  scaled,
)

from awf.grpo import trainer as trainer_module
from awf.grpo.advantages import group_advantages
from awf.grpo.attention import block_attend
from awf.grpo.batch import fitted_size, make_batch
from awf.grpo.config import GRPOConfig
from awf.grpo.loss import head_chunk, head_loss, logp_and_entropy
from awf.grpo.objective import Sampling, grpo_token_loss
from awf.grpo.trainer import GRPOTrainer
from awf.qwen.adapted import MERGE_ROWS, adapted_matmul
from awf.qwen.config import QwenConfig
from awf.qwen.lora import init_lora
from awf.qwen.model import Qwen, head, init_params, swiglu
from awf.qwen.quant import QuantConfig, quantise
from awf.remat import remat_name
from awf.sharding import make_mesh
from awf.types import Rollout, UserError

OBJECTIVE = dataclasses.replace(GRPO, beta=0.1, entropy_coef=0.01, clip_low=0.1)
ROLLOUTS = make_rollouts(groups=6, size=8, longest=60)  # about 1,500 tokens: several bins


@functools.cache
def weights():
  """(base, adapter) of one layer, far from zero."""
  params = init_params(SHALLOW, jax.random.key(0))
  params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)
  noise = np.random.default_rng(0)
  lora = init_lora(SHALLOW, LORA, jax.random.key(1))
  lora = jax.tree.map(lambda x: x + 0.05 * noise.standard_normal(x.shape, np.float32), lora)
  return first_layer(params), first_layer(lora)


def updated(mesh=None, is_looped=None, **changes):
  """(metrics, LoRA gradient) of one step; Adam's first moment is (1 - b1) times the gradient."""
  grpo = dataclasses.replace(OBJECTIVE, **changes)
  args = (SHALLOW, *weights(), LORA, grpo, OPTIM, mesh, jax.random.key(7))
  trainer = GRPOTrainer(*args, is_looped=is_looped)
  metrics = trainer.update(ROLLOUTS)
  return metrics, flat(trainer.state.opt_state[0].mu) / (1 - OPTIM.b1)


@functools.cache
def usual():
  return updated()


def assert_same(got, want):
  (metrics, grad), (want_metrics, want_grad) = got, want
  np.testing.assert_allclose(grad, want_grad, atol=1e-5)
  assert set(metrics) == set(want_metrics)
  for name, value in want_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-5, err_msg=name)


def test_padded_rows_give_the_same_gradient():
  params, lora = weights()
  tokens_BT, is_completion_BT = padded(ROLLOUTS)
  advantage = group_advantages([r.reward for r in ROLLOUTS], [r.group for r in ROLLOUTS], "grpo")
  advantage_B1 = advantage.values_B[:, None]

  def terms(lora):
    variables = {"params": params} | ({"lora": scaled(lora, LORA)} if lora else {})
    positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
    hidden, _ = Qwen(SHALLOW).apply(variables, tokens_BT, positions)
    logp = jax.nn.log_softmax(head(params, hidden)[:, :-1])
    entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
    return jnp.take_along_axis(logp, tokens_BT[:, 1:, None], 2)[..., 0], entropy

  ref = jax.jit(terms)({})[0]

  def loss(lora):
    logp, entropy = terms(lora)
    ratio = jnp.exp(logp - jax.lax.stop_gradient(logp))  # 1: no clipping
    kl = jnp.exp(ref - logp) - (ref - logp) - 1
    each = -ratio * advantage_B1 + OBJECTIVE.beta * kl - OBJECTIVE.entropy_coef * entropy
    return jnp.sum(jnp.where(is_completion_BT, each, 0.0)) / np.sum(is_completion_BT)

  value, grad = jax.jit(jax.value_and_grad(loss))(lora)
  metrics, got = usual()
  assert np.abs(flat(grad)).max() > 1e-2
  np.testing.assert_allclose(got, flat(grad), atol=1e-5)
  np.testing.assert_allclose(metrics["loss"], value, atol=1e-5)


@pytest.mark.parametrize("cut", [{}, {"top_k": 3}])
def test_a_place_without_a_target_has_no_gradient_whatever_its_logits(cut):
  """Log-probs of -400 there: compared with the 0 of padding their exp is inf."""
  grpo = GRPOConfig(beta=0.1, kl="k3")
  logits_1TV = jnp.zeros((1, 2, 8)).at[0, 1, 1:].set(400.0)
  names = ("advantage", "old_logp", "ref_logp")
  data = {name: jnp.array([[-1.0, 0.0]]) for name in names}
  data |= {"weight": jnp.array([[1.0, 0.0]]), "target": jnp.zeros((1, 2), jnp.int32)}
  data["is_target"] = jnp.array([[True, False]])
  scalars = {"total": 1.0, "entropy_coef": 0.0, "has_old": True}

  def loss(logits):
    return grpo_token_loss(logits, data, scalars, config=grpo, sampling=Sampling(1.0, **cut))[0]

  value, gradient = jax.value_and_grad(loss)(logits_1TV)
  assert np.isfinite(value) and np.isfinite(gradient).all() and np.abs(gradient[0, 0]).max() > 0
  assert not gradient[0, 1].any()


@pytest.mark.parametrize("rows", [1, 2])
def test_micro_batches_change_nothing(rows):
  assert_same(updated(micro_batch=rows, vocab_chunk=100 * rows), updated(micro_batch=8))


SHAPES = [(2, 1, 1), (1, 4, 1), (2, 2, 2), (8, 1, 1), (1, 1, 2)]


@pytest.mark.parametrize("sizes", SHAPES)
def test_devices_change_nothing(sizes):
  mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
  assert_same(updated(mesh), usual())


@pytest.mark.parametrize("remat", ["none", "full", "dots_with_no_batch_dims"])
def test_a_loop_over_the_layers_changes_nothing(remat, monkeypatch):
  monkeypatch.setattr(trainer_module, "MLP_CHUNK", 256)
  assert_same(updated(is_looped=True, remat=remat), usual())


def test_a_loop_over_the_layers_on_a_mesh_changes_nothing(monkeypatch):
  monkeypatch.setattr(trainer_module, "MLP_CHUNK", 256)
  mesh = make_mesh(1, 2, 2, devices=jax.devices()[:4])
  assert_same(updated(mesh, is_looped=True, remat="full"), usual())


def test_what_is_kept_for_the_backward_pass_goes_by_name():
  assert_same(updated(remat="dots_with_no_batch_dims_saveable"), usual())
  assert [remat_name(x) for x in (False, "none", True, "True", "full")] == [
    "none", "none", "full", "full", "full",
  ]  # fmt: skip
  assert remat_name("everything_saveable") == "everything"
  with pytest.raises(UserError, match="config.grpo.remat: expected none, full or one of"):
    GRPOConfig(remat="perhaps")


# The parts by themselves


def test_gradients_of_the_log_prob_and_the_entropy_are_those_of_the_formulas():
  rng = np.random.default_rng(0)
  logits = jnp.array(rng.standard_normal((2, 5, 40)) * 3, jnp.float32)
  target = jnp.array(rng.integers(0, 40, (2, 5)), jnp.int32)
  weight = rng.standard_normal((2, 2, 5)).astype(np.float32)

  def plain(logits, target):
    logp = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logp, target[..., None], -1)[..., 0]
    return chosen, -jnp.sum(jnp.exp(logp) * logp, -1)

  def total(f, x):
    logp, entropy = f(x, target)
    return jnp.sum(weight[0] * logp + weight[1] * entropy)

  got, want = (jax.grad(functools.partial(total, f))(logits) for f in (logp_and_entropy, plain))
  np.testing.assert_allclose(got, want, atol=2e-6)
  gate, up = jnp.array(rng.standard_normal((2, 3, 7)), jnp.float32)
  for i in (0, 1):
    got = jax.grad(lambda *x: jnp.sum(jnp.sin(swiglu(*x))), i)(gate, up)
    want = jax.grad(lambda g, u: jnp.sum(jnp.sin(jax.nn.silu(g) * u)), i)(gate, up)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("rows", [3, MERGE_ROWS])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_adapted_products_and_their_gradients(rows, kind):
  rng = np.random.default_rng(1)
  x, w, a, b = (
    jnp.array(rng.standard_normal(s) / np.sqrt(s[0]), jnp.float32)
    for s in ((rows, 24), (24, 40), (24, 4), (4, 40))
  )
  kernel = w
  if kind == "int8":
    params = quantise({"layers_0": {"q_proj": {"kernel": w}}}, QuantConfig("int8"))
    module = params["layers_0"]["q_proj"]
    from awf.qwen.quant import linear_kernel

    kernel = linear_kernel(module)
    w = module["kernel_q"].astype(jnp.float32) * module["kernel_scale"][None]
  x = x[None].astype(jnp.bfloat16 if kind == "bfloat16" else jnp.float32)
  weight = rng.standard_normal((1, rows, 40)).astype(np.float32)

  def loss(f):
    return lambda x, a, b: jnp.sum(weight * f(x, a, b).astype(jnp.float32))

  def plain(x, a, b):
    x = x.astype(jnp.float32)
    return x @ w + (x @ a) @ b

  tolerance = 0.1 if kind == "bfloat16" else 1e-5
  got, want = (
    jax.jit(jax.value_and_grad(loss(f), (0, 1, 2)))(x, a, b)
    for f in (lambda *v: adapted_matmul(v[0], kernel, *v[1:]), plain)
  )
  scale = max(1.0, np.sqrt(rows))
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, atol=tolerance * scale, rtol=tolerance), got, want
  )
  assert got[1][0].dtype == x.dtype and got[1][1].dtype == jnp.float32


# Batches


def test_bins_fit_the_batch():
  def rows(count, length):
    return [Rollout(f"{i // 4}", (i // 4 + 1,) * 128, (5,) * length, (), 1.0) for i in range(count)]

  even = rows(16, 128)  # a group is 128 + 4 x 128 tokens
  assert fitted_size(even, range(16), 4096, 64) == 1280
  assert fitted_size(even, range(16), 1024, 64) == 1024
  many = rows(160, 40)
  assert fitted_size(many, range(160), 4096, 64) in (1024, 1280, 1536, 1792, 2048)
  batch = make_batch(even, range(16), 1280, block=64)
  assert int(batch.num_steps) == 2
  starts = np.flatnonzero(np.diff(batch.segments_ZBT[0, 0], prepend=0) > 0)
  assert not np.any(starts % 64)  # each sequence begins a block of the attention
  exact = [Rollout("a", (1,) * 60, (5,) * 453, (), 1.0)]  # as long as the bin: no room for padding
  assert make_batch(exact, [0], 512, block=64).num_tokens == 512


def test_one_token_completions_find_room_for_their_targets():
  rollouts = [Rollout("a", (1,), (2 + i % 5,), (), float(i)) for i in range(700)]
  batch = make_batch(rollouts, range(700), 512)
  assert int(batch.is_target_ZBU.sum()) == 700 and int(batch.num_steps) == 2


def test_blocks_named_by_ranges_of_ids_hold_every_visible_token():
  rng = np.random.default_rng(3)
  segments = rng.permutation(np.repeat(np.arange(6), 32)).astype(np.int32)  # in no order
  parents = np.where(segments > 2, 1, segments).astype(np.int32)
  q, k, v = (jnp.array(rng.standard_normal((1, 192, 2, 8)), jnp.float32) for _ in range(3))
  whole = block_attend(jnp.array(segments), jnp.array(parents), 192)(q, k, v, None)[0]
  parts = block_attend(jnp.array(segments), jnp.array(parents), 32)(q, k, v, None)[0]
  keep = segments > 0
  np.testing.assert_allclose(parts[0, keep], whole[0, keep], atol=2e-6)


# Memory


def test_the_head_of_a_large_vocabulary_takes_an_eighth_of_its_logits():
  num_t, config = 4096, QwenConfig(151_936, 64, 64, 1, 1, 1, 64)
  shape = jax.ShapeDtypeStruct
  fn = functools.partial(grpo_token_loss, config=OBJECTIVE, sampling=Sampling(0.7))
  names = ("advantage", "old_logp", "ref_logp", "weight")
  data = {k: shape((1, num_t), jnp.float32) for k in names}
  data |= {"target": shape((1, num_t), jnp.int32), "is_target": shape((1, num_t), bool)}

  def loss_and_grad(kernel, hidden, data, num_targets):
    scalars = {"has_old": jnp.bool_(True), "total": jnp.float32(num_t)}
    scalars["entropy_coef"] = jnp.float32(0.003)
    chunk = head_chunk(config.vocab_size)
    f = lambda h: head_loss(kernel, h, data, scalars, num_targets, fn, chunk)  # noqa: E731
    return jax.value_and_grad(f, has_aux=True)(hidden)

  args = (shape((64, 151_936), jnp.float32), shape((1, num_t, 64), jnp.float32))
  lowered = jax.jit(loss_and_grad).lower(*args, data, shape((), jnp.int32))
  memory = lowered.compile().memory_analysis()
  assert memory is not None
  assert memory.temp_size_in_bytes < num_t * config.vocab_size * 4 / 8
