"""Supervised training on prompt/response pairs: all weights of a model, or its LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awf.grpo.attention import block_attend, dense_attend, prefers_blocks
from awf.grpo.config import OptimConfig, clip_by_norm, learning_rate_at, make_optimizer
from awf.grpo.loss import weighted_nll
from awf.grpo.packed import pack_examples
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, scaled
from awf.qwen.model import Qwen, head_kernel
from awf.sharding import replicated, tree_shardings
from awf.types import UserError

__all__ = ["SFTState", "SFTTrainer", "batches", "pack_examples"]

Batch = dict[str, np.ndarray]
Traced = dict[str, jax.Array]  # a Batch inside a compiled step
MICRO_TOKENS = (
  1024  # activations of one pass stay near the caches of a CPU; measured best for the nano model
)


@partial(
  jax.tree_util.register_dataclass, data_fields=("weights", "opt_state", "step"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class SFTState:
  """What a step changes; donated to it."""

  weights: Any  # the trained tree: all parameters, or the LoRA
  opt_state: Any
  step: jax.Array  # int32, steps done


class SFTTrainer:
  """Next-token training with weighted tokens, AdamW, a schedule and gradient clipping.

  The loss of a batch is sum(weight x NLL) / sum(weight), whatever the micro batches and devices.

  Args:
    model_config: architecture and compute dtype.
    params: base parameters; with weights="all" a copy is trained, found in `self.params`.
    optim: optimiser settings.
    mesh: rows go over its data and fsdp axes; None is a single device.
    weights: "all" or "lora".
    lora: LoRA tree to train, for weights="lora".
    lora_config: its rank and scale.
    micro_tokens: tokens per device of one forward/backward pass.
    remat: recompute layers in the backward pass.
  """

  def __init__(
    self,
    model_config: QwenConfig,
    params: Any,
    optim: OptimConfig,
    mesh: Mesh | None = None,
    *,
    weights: str = "all",
    lora: Any = None,
    lora_config: LoRAConfig | None = None,
    micro_tokens: int = MICRO_TOKENS,
    remat: bool = False,
  ):
    if weights not in ("all", "lora"):
      raise UserError(f"config.sft.weights: expected 'all' or 'lora', got {weights!r}")
    if weights == "lora" and (lora is None or lora_config is None):
      raise ValueError("weights='lora' needs the LoRA tree to train and its config")
    self.config, self.optim, self.mesh, self.weights = model_config, optim, mesh, weights
    self.micro_tokens = micro_tokens
    self._lora_config = lora_config if weights == "lora" else None
    self._is_flat = prefers_blocks(mesh)  # rows of a micro batch laid end to end
    self._model = Qwen(model_config, remat=remat)
    self._base = params if weights == "lora" else {}
    if mesh is not None:
      self._base = jax.device_put(self._base, tree_shardings(self._base, mesh))
    self._optimizer = make_optimizer(optim)
    self.traces = 0  # times that the step was traced

    trained = params if weights == "all" else lora
    # A copy: the state is donated, the caller's arrays are not.
    if mesh is None:
      trained = jax.tree.map(jnp.copy, trained)
      opt_state = self._optimizer.init(trained)
    else:
      put = jax.jit(
        lambda t: jax.tree.map(jnp.copy, t), out_shardings=tree_shardings(trained, mesh)
      )
      trained = put(trained)
      abstract = jax.eval_shape(self._optimizer.init, trained)
      opt_state = jax.jit(self._optimizer.init, out_shardings=tree_shardings(abstract, mesh))(
        trained
      )
    self.state = SFTState(trained, opt_state, self._put(jnp.int32(0)))
    self._step = jax.jit(self._train_step, donate_argnums=0, static_argnums=3)
    self._loss = jax.jit(self._batch_loss, static_argnums=3)

  @property
  def params(self) -> Any:
    """The trained tree (all weights, or the LoRA); valid until the next `step`."""
    return self.state.weights

  def step(self, batch: Batch) -> dict[str, jax.Array]:
    """One optimiser step on a packed batch (`pack_examples`).

    Returns:
      loss, grad_norm, learning_rate and tokens as device scalars: reading one waits for the step.
    """
    batch, num_micro = self._micro(batch)
    self.state, metrics = self._step(self.state, self._base, batch, num_micro)
    return metrics

  def evaluate(self, batch: Batch) -> float:
    """Mean weighted loss of a packed batch, without training."""
    batch, num_micro = self._micro(batch)
    return float(self._loss(self.state.weights, self._base, batch, num_micro))

  def train(self, rows: Iterable[Batch]) -> dict[str, float]:
    """A step for each batch; returns the last metrics, {} without a batch."""
    metrics: dict[str, jax.Array] = {}
    for batch in rows:
      metrics = self.step(batch)
    return {k: float(v) for k, v in metrics.items()}

  def _put(self, x: Any) -> Any:
    return x if self.mesh is None else jax.device_put(x, replicated(self.mesh))

  def _micro(self, batch: Batch) -> tuple[Batch, int]:
    """Splits [B, T] into [steps, rows, T], rows divisible over the devices; empty rows fill up."""
    rows, length = batch["tokens_BT"].shape
    devices = 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    per_device = max(1, self.micro_tokens // length)
    per_device = min(per_device, -(-rows // devices))
    micro = per_device * devices
    num_micro = -(-rows // micro)
    missing = num_micro * micro - rows

    def split(x):
      x = np.concatenate([x, np.zeros((missing, length), x.dtype)]) if missing else x
      x = x.reshape(num_micro, micro, length)
      if self.mesh is None:
        return x
      spec = PartitionSpec(None, ("data", "fsdp"))
      return jax.device_put(x, NamedSharding(self.mesh, spec))

    return {k: split(np.asarray(v)) for k, v in batch.items()}, num_micro

  def _micro_loss(self, weights: Any, base: Any, batch: Traced) -> jax.Array:
    """Sum over one micro batch of weight x NLL of each token given those before it."""
    if self._lora_config is None:
      variables = {"params": weights}
    else:
      variables = {"params": base, "lora": scaled(weights, self._lora_config)}
    tokens, segments = batch["tokens_BT"], batch["segments_BT"]
    positions = batch["positions_BT"]
    target = jnp.roll(tokens, -1, axis=1).reshape(-1)
    if self._is_flat:
      rows, length = tokens.shape
      segments += jnp.where(segments > 0, jnp.arange(rows)[:, None] * length, 0)  # unique over rows
      tokens, positions, segments = (x.reshape(1, -1) for x in (tokens, positions, segments))
      attend = block_attend(segments[0], segments[0])
    else:
      attend = dense_attend(segments, segments)
    hidden, _ = self._model.apply(variables, tokens, positions, attend)
    weight = jnp.roll(batch["weights_BT"], -1, axis=1).at[:, -1].set(0.0).reshape(-1)
    kernel = head_kernel(variables["params"])
    return weighted_nll(
      kernel, hidden.reshape(-1, hidden.shape[-1]), target, weight, self.weights == "all"
    )

  def _batch_loss(self, weights: Any, base: Any, batch: Traced, num_micro: int) -> jax.Array:
    del num_micro
    total = jnp.maximum(jnp.sum(batch["weights_BT"]), 1e-9)
    losses = jax.lax.map(lambda b: self._micro_loss(weights, base, b), batch)
    return jnp.sum(losses) / total

  def _train_step(self, state: SFTState, base: Any, batch: Traced, num_micro: int):
    self.traces += 1
    total = jnp.maximum(jnp.sum(batch["weights_BT"]), 1e-9)
    value_and_grad = jax.value_and_grad(self._micro_loss)

    def add(carry, micro):
      loss, grads = value_and_grad(state.weights, base, micro)
      return jax.tree.map(jnp.add, carry, (loss, grads)), None

    if num_micro == 1:
      loss, grads = value_and_grad(state.weights, base, jax.tree.map(lambda x: x[0], batch))
    else:
      zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.weights))
      (loss, grads), _ = jax.lax.scan(add, zero, batch)
    grads = jax.tree.map(lambda g: g / total.astype(g.dtype), grads)
    grads, norm = clip_by_norm(grads, self.optim.grad_clip)
    updates, opt_state = self._optimizer.update(grads, state.opt_state, state.weights)
    metrics = {
      "loss": loss / total,
      "grad_norm": norm,
      "learning_rate": learning_rate_at(self.optim, state.step),
      "tokens": jnp.sum(batch["segments_BT"] > 0),
    }
    weights = optax.apply_updates(state.weights, updates)
    return SFTState(weights, opt_state, state.step + 1), metrics


def batches(packed: Batch, rows: int, seed: int = 0) -> Iterable[Batch]:
  """Endless batches of `rows` packed rows, in a new seeded order each epoch, remainders left out.

  Raises:
    UserError: fewer packed rows than one batch.
  """
  total = packed["tokens_BT"].shape[0]
  if total < rows:
    raise UserError(
      f"config.sft.batch: expected at most {total} (packed rows there are), got {rows}"
    )
  epoch = 0
  while True:
    order = np.random.default_rng((seed, epoch)).permutation(total)
    for start in range(0, total - rows + 1, rows):
      chosen = order[start : start + rows]
      yield {k: v[chosen] for k, v in packed.items()}
    epoch += 1
