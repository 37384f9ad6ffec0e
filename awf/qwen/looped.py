"""The model's layers as one loop over separate weights: a program with the code of one layer.

Each turn picks its layer's weights, which stay where they are, one array per layer: a switch copies
the chosen ones (230 MB of a 7B model in int8, 0.6 ms on a v5e, where a pass of 6,000 tokens takes
16 ms of products). Unrolled, the learner's program for 28 layers is a gigabyte of code on a TPU and
takes an hour to compile; a stacked copy of the weights would be one too many.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from awf.qwen.config import QwenConfig
from awf.qwen.model import Attend, Block, Embed, RMSNorm, rotation
from awf.remat import remat_wrapper


def looped_hidden(
  config: QwenConfig,
  params: Any,
  lora: Any,
  tokens_BT: jax.Array,
  positions_BT: jax.Array,
  attend: Attend,
  remat: bool | str = "full",
  mlp_chunk: int = 0,
) -> jax.Array:
  """Final hidden states [B, T, D], as `awf.qwen.model.Qwen` gives them.

  Args:
    config: architecture.
    params: base weights; constant.
    lora: scaled adapter with one set of targets in all layers, or {}; differentiable.
    tokens_BT, positions_BT: int32.
    attend: attention, without caches.
    remat: what is kept of each layer (awf.remat).
    mlp_chunk: tokens that pass the MLP at a time, 0 for all; its activations are the largest of a
      layer.
  """
  c, num_l = config, config.num_hidden_layers
  names = [f"layers_{l}" for l in range(num_l)]  # noqa: E741
  layers = [params[name] for name in names]
  lora_L = jax.tree.map(lambda *x: jnp.stack(x), *(lora[name] for name in names)) if lora else {}
  dtype = jnp.dtype(c.dtype)
  attention, mlp = (Block(c, (half,)) for half in ("attention", "mlp"))
  by = rotation(positions_BT, c.head_dim, c.rope_theta, c.yarn)

  def layer(x_BTD, l, lora):  # noqa: E741
    weights = jax.lax.switch(l, [lambda w=w: w for w in layers])
    variables = {"params": weights} | ({"lora": lora} if lora else {})
    x_BTD = attention.apply(variables, x_BTD, by, attend, None, None)[0]
    return _in_pieces(
      lambda x: mlp.apply(variables, x, None, None, None, None)[0], x_BTD, mlp_chunk
    )

  wrapped = remat_wrapper(remat)(layer)

  def turn(x_BTD: Any, xs: tuple[jax.Array, Any]) -> tuple[Any, None]:
    return wrapped(x_BTD, *xs), None

  embed: Any = Embed(c.vocab_size, c.hidden_size, dtype)
  x_BTD = embed.apply({"params": params["embed"]}, tokens_BT)
  with jax.named_scope("layers"):
    x_BTD, _ = jax.lax.scan(turn, x_BTD, (jnp.arange(num_l), lora_L))
  norm: Any = RMSNorm(c.rms_norm_eps, dtype)
  return norm.apply({"params": params["norm"]}, x_BTD)


def _in_pieces(f: Callable[[jax.Array], Any], x_BTD: jax.Array, most: int) -> jax.Array:
  """`f` over pieces of the T axis, one after the other, each computed again in the backward pass.

  Pieces are as large as `most` (0: any size) allows where they divide T.
  """
  b, t, d = x_BTD.shape
  if not most or t <= most:
    return f(x_BTD)
  num = next(n for n in range(-(-t // most), t + 1) if t % n == 0)
  pieces = jnp.moveaxis(x_BTD.reshape(b, num, t // num, d), 1, 0)
  with jax.named_scope("pieces"):
    pieces = jax.lax.map(jax.checkpoint(f), pieces)
  return jnp.moveaxis(pieces, 0, 1).reshape(b, t, d)
