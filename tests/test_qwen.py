"""Model and adapter: NumPy readings of the formulas, invariances, the contract with a cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awf.qwen.config import QwenConfig
from awf.qwen.lora import (
  TARGETS,
  LoRAConfig,
  count,
  init_lora,
  merge,
  scaled,
  stack_adapters,
  target_shapes,
)
from awf.qwen.model import (
  Qwen,
  causal_attend,
  head,
  head_kernel,
  init_params,
  masked_attention,
  rope,
  swiglu,
)
from awf.qwen.quant import FEW_ROWS
from awf.types import UserError

SIZES = dict(
  vocab_size=50,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=8,
  rope_theta=1e4,
)


def make(family: str = "qwen2", tied: bool = True):
  config = QwenConfig(**SIZES, family=family, tie_word_embeddings=tied)
  params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
  # Larger weights and non-trivial biases and norms: every parameter must matter.
  return config, with_noise(params, 0.2, seed=1)


def with_noise(tree, size, seed):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(x + size * rng.standard_normal(x.shape), jnp.float32), tree
  )


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request):
  return make(request.param)


def positions(tokens):
  return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)


@functools.partial(jax.jit, static_argnums=0)
def _logits(config, params, lora, tokens, positions_BT, segments_BT, adapter_B):
  collections = {"params": params} if lora is None else {"params": params, "lora": lora}
  attend = causal_attend(segments_BT)
  hidden, _ = Qwen(config).apply(collections, tokens, positions_BT, attend, adapter_B=adapter_B)
  return head(params, hidden)


def logits_of(config, params, tokens, lora=None, where=None, segments=None, adapter_B=None):
  where = positions(tokens) if where is None else where
  segments = jnp.ones(tokens.shape, jnp.int32) if segments is None else segments
  return np.asarray(_logits(config, params, lora, tokens, where, segments, adapter_B))


def random_tokens(shape, seed=0):
  return jax.random.randint(jax.random.key(seed), shape, 0, SIZES["vocab_size"], jnp.int32)


def noisy_lora(config, lora_config, seed=3):
  return with_noise(init_lora(config, lora_config, jax.random.key(seed)), 0.1, seed)


def numpy_forward(c, params, ids):
  """The architecture once more, position by position, in float64."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  n, k, h, t = c.num_attention_heads, c.num_key_value_heads, c.head_dim, len(ids)

  def norm(x, scale):
    return scale * x / np.sqrt(np.mean(x * x, -1, keepdims=True) + c.rms_norm_eps)

  def turn(x):  # [T, heads, H]
    angle = np.outer(np.arange(t), c.rope_theta ** (-np.arange(0, h, 2) / h))[:, None]
    x1, x2 = x[..., : h // 2], x[..., h // 2 :]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)

  x = p["embed"]["embedding"][np.asarray(ids)]
  for i in range(c.num_hidden_layers):
    w = p[f"layers_{i}"]
    y = norm(x, w["input_layernorm"]["scale"])
    q, key, v = (
      (y @ w[m]["kernel"] + w[m].get("bias", 0.0)).reshape(t, -1, h)
      for m in ("q_proj", "k_proj", "v_proj")
    )
    if c.qk_norm:
      q, key = norm(q, w["q_norm"]["scale"]), norm(key, w["k_norm"]["scale"])
    q, key = turn(q), turn(key)
    out = np.zeros((t, n, h))
    for head_index in range(n):
      shared = head_index // (n // k)
      for step in range(t):
        score = key[: step + 1, shared] @ q[step, head_index] / np.sqrt(h)
        weight = np.exp(score - score.max())
        out[step, head_index] = weight / weight.sum() @ v[: step + 1, shared]
    x = x + out.reshape(t, n * h) @ w["o_proj"]["kernel"]
    y = norm(x, w["post_attention_layernorm"]["scale"])
    gate = y @ w["gate_proj"]["kernel"]
    up = gate / (1 + np.exp(-gate)) * (y @ w["up_proj"]["kernel"])
    x = x + up @ w["down_proj"]["kernel"]
  head_DV = p["lm_head"]["kernel"] if "lm_head" in p else p["embed"]["embedding"].T
  return norm(x, p["norm"]["scale"]) @ head_DV


@pytest.mark.parametrize(
  ("family", "tied"), [("qwen2", True), ("qwen2", False), ("qwen3", True), ("qwen3", False)]
)
def test_forward_equals_numpy_reading(family, tied):
  config, params = make(family, tied)
  tokens = random_tokens((2, 9))
  got = logits_of(config, params, tokens)
  assert got.dtype == np.float32 and got.shape == (2, 9, config.vocab_size)
  want = np.stack([numpy_forward(config, params, row) for row in np.asarray(tokens)])
  np.testing.assert_allclose(got, want, atol=2e-4, rtol=1e-4)
  assert sum(x.size for x in jax.tree.leaves(params)) == config.num_parameters


def test_every_parameter_changes_the_logits(model):
  config, params = model
  tokens = random_tokens((1, 6))
  cotangent = jax.random.normal(jax.random.key(9), (1, 6, config.vocab_size))

  def loss(p):
    hidden, _ = Qwen(config).apply({"params": p}, tokens, positions(tokens))
    return jnp.sum(head(p, hidden) * cotangent)

  grads = jax.jit(jax.grad(loss))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    name = jax.tree_util.keystr(path)
    if config.family == "qwen2" and "k_proj" in name and "bias" in name:
      continue  # nearly cancels in the softmax
    assert float(jnp.max(jnp.abs(leaf))) > 1e-6, name


def test_remat_gives_the_same_gradient(model):
  config, params = model
  tokens = random_tokens((2, 7))

  def loss(p, remat):
    hidden, _ = Qwen(config, remat).apply({"params": p}, tokens, positions(tokens))
    return jnp.sum(jnp.sin(hidden))

  plain, remat = (jax.jit(jax.grad(loss), static_argnums=1)(params, r) for r in (False, True))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4), plain, remat)


def test_future_tokens_do_not_change_the_past(model):
  config, params = model
  tokens = random_tokens((1, 8))
  changed = tokens.at[0, 5:].set((tokens[0, 5:] + 1) % config.vocab_size)
  a, b = logits_of(config, params, tokens), logits_of(config, params, changed)
  np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-5)
  assert np.abs(a[:, 5:] - b[:, 5:]).max() > 1e-3


def test_left_padding_and_neighbours_do_not_change_a_row(model):
  config, params = model
  tokens, pad = random_tokens((1, 6)), 4
  alone = logits_of(config, params, tokens)
  padded = jnp.concatenate([jnp.full((1, pad), 7, jnp.int32), tokens], axis=1)
  padded = jnp.concatenate([padded, random_tokens((2, 6 + pad), seed=5)])
  segments = jnp.ones(padded.shape, jnp.int32).at[0, :pad].set(0)
  where = positions(padded).at[0].add(-pad)
  got = logits_of(config, params, padded, where=where, segments=segments)
  np.testing.assert_allclose(got[:1, pad:], alone, atol=2e-5)


def test_packed_segments_equal_separate_rows(model):
  config, params = model
  a, b = random_tokens((1, 5), 1), random_tokens((1, 4), 2)
  packed = jnp.concatenate([a, b], axis=1)
  segments = jnp.array([[1] * 5 + [2] * 4], jnp.int32)
  where = jnp.array([[*range(5), *range(4)]], jnp.int32)
  got = logits_of(config, params, packed, where=where, segments=segments)
  np.testing.assert_allclose(got[:, :5], logits_of(config, params, a), atol=2e-5)
  np.testing.assert_allclose(got[:, 5:], logits_of(config, params, b), atol=2e-5)


def test_cached_decode_equals_full_forward(model):
  """Token by token through `attend` and `caches`, as a sampler does, against one pass."""
  config, params = model
  tokens = random_tokens((2, 6))
  full = logits_of(config, params, tokens)
  shape = (2, 6, config.num_key_value_heads, config.head_dim)
  caches = tuple((jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.num_hidden_layers))

  @jax.jit
  def step(params, token_BT, t, caches):
    def attend(q, k, v, cache):
      keys, values = cache[0].at[:, t].set(k[:, 0]), cache[1].at[:, t].set(v[:, 0])
      is_visible = jnp.broadcast_to(jnp.arange(6)[None, None] <= t, (2, 1, 6))
      return masked_attention(q, keys, values, is_visible), (keys, values)

    where = jnp.full((2, 1), t, jnp.int32)
    hidden, caches = Qwen(config).apply({"params": params}, token_BT, where, attend, caches)
    return head(params, hidden)[:, 0], caches

  for t in range(6):
    logits, caches = step(params, tokens[:, t : t + 1], jnp.int32(t), caches)
    np.testing.assert_allclose(np.asarray(logits), full[:, t], atol=2e-5)


def test_rope_scores_depend_on_distance_alone():
  q = jax.random.normal(jax.random.key(0), (1, 1, 1, 16))
  k = jax.random.normal(jax.random.key(1), (1, 1, 1, 16))

  def score(i, j):
    at = [jnp.array([[x]], jnp.int32) for x in (i, j)]
    return float(jnp.sum(rope(q, at[0], 1e6) * rope(k, at[1], 1e6)))

  assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
  assert abs(score(7, 3) - score(3, 7)) > 1e-3
  np.testing.assert_allclose(rope(q, jnp.zeros((1, 1), jnp.int32), 1e6), q)


def test_sines_are_made_once_for_all_layers(model):
  config, params = model
  tokens = jnp.ones((3, 2), jnp.int32)

  def hidden(params, tokens, positions):
    return Qwen(config).apply({"params": params}, tokens, positions)[0]

  text = jax.jit(hidden).lower(params, tokens, jnp.asarray(tokens)).compile().as_text()
  assert text.count(" cosine(") == text.count(" sine(") == 1


@pytest.mark.parametrize("rows", [3, FEW_ROWS + 1])
def test_swiglu_in_columns_is_the_same_to_the_bit(rows):
  gate, up = jax.random.normal(jax.random.key(0), (2, rows, 1, 40))
  plain, columns = (jax.jit(swiglu, static_argnums=2)(gate, up, x) for x in (False, True))
  assert columns.shape == gate.shape
  np.testing.assert_array_equal(columns, plain)
  got = jax.grad(lambda *x: jnp.sum(swiglu(*x, True) ** 2), (0, 1))(gate, up)
  want = jax.grad(lambda g, u: jnp.sum((jax.nn.silu(g) * u) ** 2), (0, 1))(gate, up)
  for one, other in zip(got, want, strict=True):
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_fully_masked_row_is_finite():
  x = jnp.ones((1, 2, 2, 4))
  out = masked_attention(x, x[:, :, :1], x[:, :, :1], jnp.zeros((1, 2, 2), bool))
  assert np.isfinite(np.asarray(out)).all()


def test_bfloat16_compute_stays_close(model):
  config, params = model
  tokens = random_tokens((1, 8))
  low = dataclasses.replace(config, dtype="bfloat16")
  a, b = logits_of(config, params, tokens), logits_of(low, params, tokens)
  assert b.dtype == np.float32
  assert np.abs(a - b).max() / np.abs(a).max() < 0.05


@pytest.mark.parametrize(
  ("change", "word"),
  [
    ({"family": "llama"}, "family"),
    ({"num_key_value_heads": 3}, "multiple"),
    ({"head_dim": 7}, "even"),
  ],
)
def test_config_refuses(change, word):
  with pytest.raises(ValueError, match=word):
    QwenConfig(**{**SIZES, **change})


# ---------------------------------------------------------------------------- adapters


def test_new_adapter_equals_base(model):
  config, params = model
  tokens = random_tokens((2, 6))
  lora_config = LoRAConfig(rank=3, alpha=6.0)
  lora = init_lora(config, lora_config, jax.random.key(2))
  with_adapter = logits_of(config, params, tokens, scaled(lora, lora_config))
  np.testing.assert_allclose(with_adapter, logits_of(config, params, tokens), atol=1e-5)
  assert all(float(jnp.std(leaf["a"])) > 0 for leaf in lora["layers_0"].values())
  assert count(lora) == sum(2 * 3 * (i + o) for i, o in target_shapes(config).values())


def test_adapter_equals_merged_weights(model):
  config, params = model
  tokens = random_tokens((2, 6))
  lora_config = LoRAConfig(rank=3, alpha=12.0, targets=("q_proj", "o_proj", "down_proj"))
  lora = scaled(noisy_lora(config, lora_config), lora_config)
  got = logits_of(config, params, tokens, lora)
  np.testing.assert_allclose(
    got, logits_of(config, merge(params, lora), tokens), atol=5e-4, rtol=1e-4
  )
  assert np.abs(got - logits_of(config, params, tokens)).max() > 1e-2


@pytest.mark.usual_compile
def test_each_row_uses_its_own_adapter(model):
  config, params = model
  tokens = jnp.tile(random_tokens((1, 6)), (3, 1))
  lora_config = LoRAConfig(rank=2, alpha=2.0)
  first, second = (scaled(noisy_lora(config, lora_config, s), lora_config) for s in (3, 30))
  stacked = stack_adapters([first, second])
  rows = jnp.array([2, 0, 1], jnp.int32)
  got = logits_of(config, params, tokens, stacked, adapter_B=rows)
  for row, lora in enumerate((second, None, first)):
    want = logits_of(config, params, tokens[:1], lora)
    np.testing.assert_allclose(got[row : row + 1], want, atol=1e-4)
  # Adapter 0 is exactly the base, whatever the other rows and adapters hold.
  zero = jax.tree.map(jnp.zeros_like, stacked)
  base = logits_of(config, params, tokens, zero, adapter_B=jnp.ones_like(rows))
  np.testing.assert_array_equal(got[1], base[1])


def test_alpha_and_rank_scale_b_alone(model):
  config, _ = model
  lora = noisy_lora(config, LoRAConfig(rank=4, alpha=8.0))
  out = scaled(lora, LoRAConfig(rank=4, alpha=8.0))
  leaf, new = lora["layers_1"]["v_proj"], out["layers_1"]["v_proj"]
  np.testing.assert_array_equal(new["a"], leaf["a"])
  np.testing.assert_allclose(new["b"], 2.0 * leaf["b"])


def test_init_depends_on_key_and_name_alone(model):
  config, params = model
  key = jax.random.key(5)
  every = init_lora(config, LoRAConfig(rank=2), key)
  some = init_lora(params, LoRAConfig(rank=2, targets=("up_proj",)), key)
  a = every["layers_1"]["up_proj"]["a"]
  np.testing.assert_array_equal(some["layers_1"]["up_proj"]["a"], a)
  assert list(some["layers_0"]) == ["up_proj"] and set(every["layers_0"]) == set(TARGETS)
  assert not np.array_equal(every["layers_0"]["up_proj"]["a"], a)
  assert float(jnp.max(jnp.abs(a))) <= config.hidden_size**-0.5


@pytest.mark.parametrize(
  ("fields", "word"),
  [
    ({"rank": 0}, "config.lora.rank"),
    ({"rank": 2.5}, "config.lora.rank"),
    ({"alpha": 0.0}, "config.lora.alpha"),
    ({"targets": ("w_pack",)}, "config.lora.targets"),
    ({"targets": ()}, "config.lora.targets"),
    ({"targets": ("q_proj", "q_proj")}, "config.lora.targets"),
  ],
)
def test_lora_config_refuses(fields, word):
  with pytest.raises(UserError, match=word):
    LoRAConfig(**fields)


def test_stacking_refuses_unequal_adapters(model):
  config, _ = model
  key = jax.random.key(0)
  a = init_lora(config, LoRAConfig(rank=2), key)
  b = init_lora(config, LoRAConfig(rank=3), key)
  with pytest.raises(ValueError, match="adapter 1 differs"):
    stack_adapters([a, b])
  with pytest.raises(ValueError, match="at least one"):
    stack_adapters([])


def test_untied_head_reads_its_own_kernel():
  _, params = make(tied=False)
  assert head_kernel(params) is params["lm_head"]["kernel"]
