"""Qwen2 / Qwen2.5 / Qwen3 dense as one Flax Linen module.

Parameters are nested dicts, one subtree per layer; a matrix may be quantised (awf.qwen.quant). LoRA
is a second collection with the same paths:
`apply({"params": base}, ...)` is the base, `apply({"params": base, "lora": lora}, ...)` the policy.
A LoRA leaf is [in, R] / [R, out] (one adapter for all rows) or [A, in, R] / [A, R, out] (stacked;
`adapter_B` says which adapter each row uses, 0 is the base). The factor alpha / rank is folded into
`b` by the caller (awf.qwen.lora).

Source: transformers modeling_qwen2.py and modeling_qwen3.py, whose float32 logits are matched
within 1e-4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.core import Tracer

from awf.qwen.adapted import adapted_matmul
from awf.qwen.config import QwenConfig, Yarn
from awf.qwen.quant import (
  FEW_ROWS,
  Kernel,
  QuantKernel,
  Transposed,
  at_compute_dtype,
  embedding_rows,
  linear_kernel,
  logits,
  matmul,
)
from awf.remat import remat_name, remat_wrapper

# attend(q_BTNH, k_BTKH, v_BTKH, cache_of_layer) -> (out_BTNH, cache_of_layer)
Attend = Callable[[jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]

NEG_INF = -1e30  # finite: a fully masked row gives a uniform distribution, not NaN


class Linear(nn.Module):
  """A dense layer `x @ kernel (+ bias)` with an optional delta from the `lora` collection."""

  features: int
  use_bias: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BTi: jax.Array, adapter_B: jax.Array | None = None) -> jax.Array:
    if self.has_variable("params", "kernel_q") or self.has_variable("params", "kernel_t"):
      kernel: Kernel = linear_kernel(self.variables["params"])
    else:
      shape = (x_BTi.shape[-1], self.features)
      kernel = self.param("kernel", nn.initializers.normal(0.02), shape)
    adapter = None
    if self.has_variable("lora", "a"):
      adapter = self.get_variable("lora", "a"), self.get_variable("lora", "b")
    if adapter is not None and adapter[0].ndim == 2:
      y = adapted_matmul(x_BTi, kernel, *adapter)
    else:
      y = matmul(x_BTi, at_compute_dtype(kernel, self.dtype))
    if self.use_bias:
      bias = self.param("bias", nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)[None, None]
    if adapter is not None and adapter[0].ndim == 3:
      y = y + stacked_delta(x_BTi, *adapter, adapter_B).astype(self.dtype)
    return y


def stacked_delta(x_BTi, a, b, adapter_B):
  """Each row's low-rank update in the adapter's dtype (float32); of adapter 0 exactly zero."""
  x = x_BTi.astype(a.dtype)
  is_chosen_BA = adapter_B[:, None] == jnp.arange(1, a.shape[0] + 1)[None]
  low = jnp.where(is_chosen_BA[:, None, :, None], jnp.einsum("bti,air->btar", x, a), 0)
  return jnp.einsum("btar,aro->bto", low, b)


class Embed(nn.Module):
  """Rows of the table `embedding` [V, D], or of the quantised one."""

  vocab_size: int
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, tokens_BT: jax.Array) -> jax.Array:
    if self.has_variable("params", "embedding_q"):
      q, scale = (self.get_variable("params", f"embedding_{x}") for x in ("q", "scale"))
      return embedding_rows(q, scale, tokens_BT, self.dtype)
    shape = (self.vocab_size, self.features)
    table = self.param("embedding", nn.initializers.normal(0.02), shape)
    return jnp.take(table, tokens_BT, axis=0).astype(self.dtype)


class RMSNorm(nn.Module):
  """Root-mean-square norm over the last axis, computed in float32."""

  eps: float
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
    scale = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (scale * x32).astype(self.dtype)


class Rotation(NamedTuple):
  """Cosines and sines of the rotary angles, float32 [B, T, 1, H / 2]; the same for all layers."""

  cos: jax.Array
  sin: jax.Array


def rotation(
  positions_BT: jax.Array, head_dim: int, theta: float, yarn: Yarn | None = None
) -> Rotation:
  """Rotary angles of the positions, for heads of size `head_dim`."""
  half = head_dim // 2
  if yarn is None:
    freq = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  else:
    freq = jnp.asarray(yarn.frequencies(head_dim, theta))
  angle = positions_BT.astype(jnp.float32)[..., None, None] * freq[None, None, None]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return Rotation(cos, sin) if yarn is None else Rotation(cos * yarn.scale, sin * yarn.scale)


def shared_rotation(
  positions_BT: jax.Array, head_dim: int, theta: float, yarn: Yarn | None = None
) -> Rotation:
  """`rotation`, made once for all layers, behind something that the compiler fuses nothing across.

  XLA's CPU backend takes optimisation barriers away before it fuses, and then makes the sines again
  beside each of their uses: 20 times the work of turning a head. A branch it leaves alone.
  """

  def make(positions_BT):
    return rotation(positions_BT, head_dim, theta, yarn)

  def nothing(positions_BT):
    zero = jnp.zeros((*positions_BT.shape, 1, head_dim // 2), jnp.float32)
    return Rotation(zero, zero)

  def in_branch(positions_BT):
    is_real = positions_BT[0, 0] > jnp.iinfo(jnp.int32).min
    return jax.lax.cond(is_real, make, nothing, positions_BT)

  def in_line(positions_BT):
    return Rotation(*jax.lax.optimization_barrier(make(positions_BT)))

  return jax.lax.platform_dependent(positions_BT, cpu=in_branch, default=in_line)


def rotate(x_BTxH: jax.Array, by: Rotation) -> jax.Array:
  """Rotary position embedding; halves rotate against each other, as Hugging Face's rotate_half."""
  x1, x2 = jnp.split(x_BTxH.astype(jnp.float32), 2, axis=-1)
  turned = [x1 * by.cos - x2 * by.sin, x2 * by.cos + x1 * by.sin]
  return jnp.concatenate(turned, axis=-1).astype(x_BTxH.dtype)


def rope(
  x_BTxH: jax.Array, positions_BT: jax.Array, theta: float, yarn: Yarn | None = None
) -> jax.Array:
  """`rotate` by the angles of the positions."""
  return rotate(x_BTxH, rotation(positions_BT, x_BTxH.shape[-1], theta, yarn))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def swiglu(gate: jax.Array, up: jax.Array, is_turned: bool = False) -> jax.Array:
  """silu(gate) x up. The backward pass has the two arguments alone, no part of the sigmoid.

  Args:
    gate, up: [..., F].
    is_turned: both come from matrices that lie turned and the result goes to one, so that on a CPU
      few rows of them are columns in memory (`awf.qwen.quant.matmul`); they stay columns then.
  """

  def plain(gate, up):
    return jax.nn.silu(gate) * up

  def in_columns(gate, up):
    columns = (x.reshape(-1, x.shape[-1]).T for x in (gate, up))
    return jax.lax.optimization_barrier(plain(*columns)).T.reshape(gate.shape)

  if not is_turned or math.prod(gate.shape[:-1]) > FEW_ROWS:
    return plain(gate, up)
  return jax.lax.platform_dependent(gate, up, cpu=in_columns, default=plain)


def _swiglu_fwd(gate, up, is_turned):
  del is_turned
  return jax.nn.silu(gate) * up, (gate, up)


def _swiglu_bwd(is_turned, saved, d_y):
  del is_turned
  gate, up = saved
  share = jax.nn.sigmoid(gate)
  d_gate = d_y * up * (share * (1 + gate * (1 - share)))
  return d_gate.astype(gate.dtype), (d_y * (gate * share)).astype(up.dtype)


swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def masked_attention(
  q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, is_visible_BTS: jax.Array
) -> jax.Array:
  """Grouped-query softmax attention with scores in float32.

  Returns:
    [B, T, N, H] in q's dtype. Query head n reads key/value head n // (N / K).
  """
  b, t, n, h = q_BTNH.shape
  k = k_BSKH.shape[2]
  q = q_BTNH.reshape(b, t, k, n // k, h)
  scores = jnp.einsum("btkgh,bskh->bkgts", q, k_BSKH).astype(jnp.float32) * h**-0.5
  scores = jnp.where(is_visible_BTS[:, None, None], scores, NEG_INF)
  weights = jax.nn.softmax(scores, axis=-1).astype(v_BSKH.dtype)
  return jnp.einsum("bkgts,bskh->btkgh", weights, v_BSKH).reshape(b, t, n, h)


def causal_attend(segment_ids_BT: jax.Array) -> Attend:
  """Attention of a sequence on itself: causal, within equal segment ids (padding is its own, 0)."""
  t = segment_ids_BT.shape[1]
  causal_TS = jnp.tril(jnp.ones((t, t), bool))
  same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
  is_visible_BTS = causal_TS[None] & same_BTS

  def attend(q, k, v, cache):
    return masked_attention(q, k, v, is_visible_BTS), cache

  return attend


class Block(nn.Module):
  """One decoder layer: attention and SwiGLU, each with a pre-norm and a residual."""

  config: QwenConfig
  halves: tuple[str, ...] = ("attention", "mlp")  # which of the two are applied

  @nn.compact
  def __call__(self, x_BTD, by: Rotation, attend: Attend, cache, adapter_B):
    if "attention" in self.halves:
      x_BTD, cache = self._attention(x_BTD, by, attend, cache, adapter_B)
    return self._mlp(x_BTD, adapter_B) if "mlp" in self.halves else x_BTD, cache

  def _linear(self, name: str, features: int, bias: bool = False) -> Linear:
    return Linear(features, bias, jnp.dtype(self.config.dtype), name=name)

  def _norm(self, name: str) -> RMSNorm:
    return RMSNorm(self.config.rms_norm_eps, jnp.dtype(self.config.dtype), name=name)

  def _attention(self, x_BTD, by, attend, cache, adapter_B):
    c = self.config
    n, k, h = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    b, t, _ = x_BTD.shape
    y = self._norm("input_layernorm")(x_BTD)
    q = self._linear("q_proj", n * h, c.qkv_bias)(y, adapter_B).reshape(b, t, n, h)
    key = self._linear("k_proj", k * h, c.qkv_bias)(y, adapter_B).reshape(b, t, k, h)
    v = self._linear("v_proj", k * h, c.qkv_bias)(y, adapter_B).reshape(b, t, k, h)
    if c.qk_norm:
      q, key = self._norm("q_norm")(q), self._norm("k_norm")(key)
    q, key = rotate(q, by), rotate(key, by)
    out, cache = attend(q, key, v, cache)
    out = self._linear("o_proj", c.hidden_size)(out.reshape(b, t, n * h), adapter_B)
    return x_BTD + out, cache

  def _mlp(self, x_BTD, adapter_B):
    c = self.config
    y = self._norm("post_attention_layernorm")(x_BTD)
    gate = self._linear("gate_proj", c.intermediate_size)(y, adapter_B)
    up = self._linear("up_proj", c.intermediate_size)(y, adapter_B)
    is_turned = "kernel_t" in self.variables.get("params", {}).get("down_proj", {})
    hidden: Any = swiglu(gate, up, is_turned)
    return x_BTD + self._linear("down_proj", c.hidden_size)(hidden, adapter_B)


class Qwen(nn.Module):
  """The decoder without its head: token ids to final hidden states; `head` gives logits.

  Parameter paths: `embed/embedding` [V, D], `layers_<l>/<q_proj|...>/{kernel,bias}`,
  `layers_<l>/<norm>/scale`, `norm/scale`, and `lm_head/kernel` [D, V] unless the head is tied.
  """

  config: QwenConfig
  remat: bool | str = False  # what the backward pass computes again (awf.remat)

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    attend: Attend | None = None,
    caches: tuple | None = None,
    adapter_B: jax.Array | None = None,
  ) -> tuple[jax.Array, tuple]:
    """Runs all layers.

    Args:
      tokens_BT: int32 ids.
      positions_BT: int32 rotary positions.
      attend: attention of each layer; None is plain causal attention over the T tokens.
      caches: one pytree per layer, handed to `attend` and returned as it gives it back.
      adapter_B: int32, adapter of each row, for stacked LoRA leaves; 0 is the base.

    Returns:
      (hidden_BTD after the final norm, caches).
    """
    c, dtype = self.config, jnp.dtype(self.config.dtype)
    attend = attend or causal_attend(jnp.ones(tokens_BT.shape, jnp.int32))
    caches = caches or (None,) * c.num_hidden_layers
    x = Embed(c.vocab_size, c.hidden_size, dtype, name="embed")(tokens_BT)
    if not c.tie_word_embeddings:
      _HeadWeights(c.vocab_size, name="lm_head")(c.hidden_size)
    is_whole = remat_name(self.remat) == "none"
    if not is_whole or self.is_initializing() or not isinstance(x, Tracer):
      apply_block = self._apply_block
    else:
      apply_block = self._traced_once()
    by = shared_rotation(positions_BT, c.head_dim, c.rope_theta, c.yarn)
    new = []
    for l in range(c.num_hidden_layers):  # noqa: E741  (L is the layer axis)
      x, cache = apply_block(l, x, by, attend, caches[l], adapter_B)
      new.append(cache)
    return RMSNorm(c.rms_norm_eps, dtype, name="norm")(x), tuple(new)

  def _apply_block(self, layer, x_BTD, by, attend, cache, adapter_B):
    block = remat_wrapper(self.remat, nn.remat)(Block, static_argnums=(3,))
    block = block(self.config, name=f"layers_{layer}")
    return block(x_BTD, by, attend, cache, adapter_B)

  def _traced_once(self):
    """`_apply_block` by a function that JAX traces for the first layer alone.

    The compiler inlines its calls, so the program is the same; tracing 30 layers took longer than
    loading the compiled program.
    """
    block = Block(self.config, parent=None)

    @partial(jax.jit, static_argnums=2)
    def apply(variables, x_BTD, attend, by, cache, adapter_B):
      return block.apply(variables, x_BTD, by, attend, cache, adapter_B)

    def apply_block(layer, x_BTD, by, attend, cache, adapter_B):
      name = f"layers_{layer}"
      variables = {k: v[name] for k, v in self.variables.items() if name in v}
      return apply(variables, x_BTD, attend, by, cache, adapter_B)

    return apply_block


class _HeadWeights(nn.Module):
  """Declares the untied head's kernel; it is read by `head_kernel`, never inside the module."""

  vocab_size: int

  @nn.compact
  def __call__(self, width: int) -> None:
    if self.has_variable("params", "kernel_q") or self.has_variable("params", "kernel_t"):
      return
    self.param("kernel", nn.initializers.normal(0.02), (width, self.vocab_size))


def head_kernel(params) -> Kernel:
  """[D, V] head weights: the untied kernel, or the embedding transposed; of any layout."""
  if "lm_head" in params:
    return linear_kernel(params["lm_head"])
  embed = params["embed"]
  if "embedding_q" in embed:
    return QuantKernel(embed["embedding_q"], embed["embedding_scale"], is_transposed=True)
  return Transposed(embed["embedding"])


def head(params, hidden_xD: jax.Array) -> jax.Array:
  """Float32 logits [..., V] of hidden states [..., D]; for few positions, never a whole batch."""
  kernel = at_compute_dtype(head_kernel(params), hidden_xD.dtype)
  return logits(hidden_xD, kernel)


def init_params(config: QwenConfig, key: jax.Array):
  """Random base parameters (normal 0.02, norms one, biases zero), float32."""
  tokens = jnp.zeros((1, 2), jnp.int32)
  return Qwen(config).init(key, tokens, jnp.arange(2, dtype=jnp.int32)[None])["params"]
