"""The GRPO learner: rollouts in, several clipped steps on the LoRA, metrics out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from awf.grpo.attention import block_attend, dense_attend, has_kernels, packed_block
from awf.grpo.batch import Batch, bin_size, fitted_size, make_batch
from awf.grpo.config import (
  GRPOConfig,
  OptimConfig,
  clip_by_norm,
  learning_rate_at,
  make_optimizer,
)
from awf.grpo.critic import init_critic
from awf.grpo.guard import keep_if
from awf.grpo.loss import head_chunk, head_loss
from awf.grpo.objective import (
  Sampling,
  adapt_entropy_coef,
  entropy_coef_now,
  grpo_token_loss,
  objective,
)
from awf.grpo.passes import (
  gradient_of_rows,
  importance_of_rows,
  make_row_sum,
  over_bins,
  put,
  room,
  train_critic,
  values_of,
  zeros,
)
from awf.grpo.rows import Layout
from awf.grpo.update import Update, scalars_of
from awf.qwen.config import QwenConfig
from awf.qwen.looped import looped_hidden
from awf.qwen.lora import LoRAConfig, init_lora, scaled
from awf.qwen.model import Attend, Qwen, head_kernel
from awf.remat import remat_name
from awf.sharding import (
  abstract,
  fetch,
  is_abstract,
  make_mesh,
  place,
  replicated,
  tree_shardings,
)
from awf.types import Rollout

_MIN_STEPS = 8  # room for this many passes from the start, so that small batches share a shape
MLP_CHUNK = 2048  # tokens that pass the MLP at a time where layers are looped and recomputed
_ROW_TOKENS = 256  # a bin has room for grpo.micro_batch rows of this size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a step changes; donated to it."""

  lora: Any  # float32, not scaled
  opt_state: Any
  step: jax.Array  # int32, optimiser steps done
  key: jax.Array  # typed PRNG key; a new one after each step
  # What only some settings have: "critic" (awf.grpo.critic), "entropy" (coefficient, last entropy).
  extra: Any = dataclasses.field(default_factory=dict)


class GRPOTrainer:
  """Group-relative policy optimisation of a LoRA on a frozen base.

  Attributes:
    state: TrainState; replace it to resume (same structure, any placement).
    traces: how often the step was traced; 1 until a longer row or a larger batch needs more room.
    flops: what the last update's passes had to compute (`Update.flops`).

  Args:
    model_config: architecture and compute dtype.
    params: base parameters, shared with the sampler, never changed. Shapes (jax.ShapeDtypeStruct)
      in their place make a trainer without arrays, which can only be lowered.
    lora: adapter to train (copied), or None for a new one drawn from `key`.
    lora_config: its rank and scale.
    grpo: the objective.
    optim: the optimiser.
    mesh: rows go over its data and fsdp axes; None is one device.
    key: typed PRNG key.
    temperature, top_p, top_k, min_p: the sampler's. The policy that is trained is the distribution
      that tokens were drawn from: tempered, cut and renormalised.
    is_looped: one loop over the layers (awf.qwen.looped) instead of a program with all of them;
      None: on an accelerator.

  Source: GRPO, arXiv:2402.03300; token-level loss and clip range of DAPO, arXiv:2503.14476.
  """

  def __init__(
    self,
    model_config: QwenConfig,
    params: Any,
    lora: Any,
    lora_config: LoRAConfig,
    grpo: GRPOConfig,
    optim: OptimConfig,
    mesh: Mesh | None,
    key: jax.Array,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float = 0.0,
    is_looped: bool | None = None,
  ):
    self.grpo, self.optim, self.lora_config = grpo, optim, lora_config
    self.mesh = make_mesh(1, devices=jax.local_devices()[:1]) if mesh is None else mesh
    self._config, self.num_parameters = model_config, model_config.num_parameters
    platform = self.mesh.devices.flat[0].platform
    self.is_looped = platform != "cpu" if is_looped is None else is_looped
    self._params = params
    self._bins = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    self.block = packed_block(self.mesh, model_config.head_dim)  # 0: over all keys at once
    self._has_kernels = has_kernels(self.mesh, model_config.head_dim)
    self._size = grpo.micro_batch * _ROW_TOKENS  # tokens per bin; grows, never shrinks; on a CPU
    # the most that `fitted_size` may choose
    self._num_steps = _MIN_STEPS  # likewise; padded steps cost a few integers
    self._optimizer = make_optimizer(optim)
    # A sampler at temperature 0 records log-probs of the plain softmax.
    self.sampling = Sampling(temperature, top_p, top_k, min_p) if temperature > 0 else Sampling()
    keeps_support = self.sampling.is_truncated and grpo.steps_per_batch > 1
    self._support_bytes = -(-model_config.vocab_size // 8) if keeps_support else 0
    self._token_loss = partial(
      grpo_token_loss,
      config=grpo,
      sampling=self.sampling,
      keeps_support=keeps_support,
    )
    self.head_chunk = min(grpo.vocab_chunk, head_chunk(model_config.vocab_size))
    self.traces, self.flops = 0, 0.0

    def first_state(key: jax.Array) -> TrainState:
      init_key, key = jax.random.split(key)
      tree = init_lora(model_config, lora_config, init_key) if lora is None else lora
      return TrainState(tree, self._optimizer.init(tree), jnp.int32(0), key, first_extra())

    def first_extra() -> dict[str, Any]:
      extra: dict[str, Any] = {}
      if grpo.has_critic:
        extra["critic"] = init_critic(model_config.hidden_size, optim)
      if grpo.is_entropy_adaptive:
        extra["entropy"] = jnp.array([grpo.entropy_coef, jnp.inf], jnp.float32)
      return extra

    if is_abstract(params):
      state = jax.eval_shape(first_state, key)
      self.state = abstract(state, tree_shardings(state, self.mesh))
    else:
      # A copy: the state is donated, the caller's arrays are not.
      state = jax.tree.map(jnp.copy, first_state(key))
      self.state = place(state, tree_shardings(state, self.mesh))
    self._step = jax.jit(self._train_step, donate_argnums=0)
    self._score = jax.jit(self._score_batch)
    self._row_gradient = jax.jit(partial(gradient_of_rows, grpo))
    self._importance = jax.jit(partial(importance_of_rows, grpo))
    self._values = jax.jit(
      lambda head, base, batch: values_of(partial(self._hidden, {}, base), head, batch)
    )
    self._critic = jax.jit(
      lambda critic, base, batch, data: train_critic(
        partial(self._hidden, {}, base), critic, batch, data, grpo, optim
      ),
      donate_argnums=0,
    )

  def update(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """`grpo.steps_per_batch` optimiser steps on one batch, clipped against its first log-probs.

    Rows whose gradient is zero whatever the policy (zero advantage, no KL or entropy term) are not
    computed; they count in the aggregation. Entropy, KL and ratio metrics are over computed rows
    and averaged over the steps.

    Returns:
      Metrics by the names of the metrics files. `skipped` is 1 when no row has a gradient, or no
      step a finite loss and gradient (`nonfinite_steps` counts those): the state is unchanged then,
      and the metrics of the steps are left out.
    """
    return Update(self, rollouts).run()

  @property
  def room(self) -> tuple[int, int, int]:
    """Tokens per bin and steps of a batch's arrays, and the `micro_batch` that they began with.

    They grow, and packing decides the order of sums, so that a resumed run needs what the
    interrupted one had; but for the bin, when another `micro_batch` asks for another one.
    """
    return self._size, self._num_steps, self.grpo.micro_batch

  @room.setter
  def room(self, sizes: Sequence[int]) -> None:
    size, self._num_steps, micro_batch = (*sizes, self.grpo.micro_batch)[:3]  # older runs have two
    if micro_batch == self.grpo.micro_batch:
      self._size = size

  def logprobs(self, rollouts: Sequence[Rollout], is_base: bool = False) -> list[np.ndarray]:
    """Log-probability of each completion token under the present policy (or the base), float32."""
    layout = Layout(rollouts)
    batch = self.pack(rollouts)
    logp_n = np.zeros(layout.size)
    if layout.size:
      lora = {} if is_base else self.state.lora
      logp_ZBU = self._score(lora, self._params, self._place(batch))["logp"]
      logp_n = layout.out_of(batch, fetch(logp_ZBU))
    return np.split(logp_n.astype(np.float32), np.cumsum(layout.length_B)[:-1])

  def pack(self, rollouts: Sequence[Rollout]) -> Batch[np.ndarray]:
    """The batch that all completions of `rollouts` make, on the host."""
    return self._batch(rollouts, [i for i, r in enumerate(rollouts) if r.token_ids])

  def lower(self, batch: Batch[np.ndarray]) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """Lowers the programs for batches of this one's shape; nothing is put on a device.

    Returns:
      By name, a function that traces and lowers: `update`, one optimiser step, and `logprobs`, one
      pass over the same batch.
    """
    placed = abstract(batch, self._shardings(batch))
    names = ["advantage", "old_logp", "weight"]
    names += ["ref_logp"] if self.grpo.has_kl_in_loss else []
    names += ["policy_grad"] if self.grpo.is_sequence_loss else []
    if self.grpo.importance != "none":
      names.append("importance" if self.grpo.needs_old_logp else "sampler_logp")
    zero = np.zeros(batch.target_ZBU.shape, np.float32)
    data: dict[str, Any] = dict.fromkeys(names, zero)
    if self._support_bytes:
      data["support"] = np.broadcast_to(np.uint8(0), (*zero.shape, self._support_bytes))
    data = abstract(data, self._shardings(data))
    scalars = scalars_of(self.grpo, False, 1.0)
    scalars = abstract(scalars, self._shardings(scalars))
    return {
      "update": lambda: self._step.lower(self.state, self._params, placed, data, scalars),
      "logprobs": lambda: self._score.lower(self.state.lora, self._params, placed),
    }

  def _batch(self, rollouts: Sequence[Rollout], rows: Sequence[int]) -> Batch[np.ndarray]:
    if self.block and self.mesh.devices.flat[0].platform == "cpu":
      size = fitted_size(rollouts, rows, self._size, self.block)
    else:
      size = self._size = bin_size([rollouts[i] for i in rows], self._size)
    batch = make_batch(rollouts, rows, size, self._bins, self._num_steps, self.block)
    self._num_steps = batch.tokens_ZBT.shape[0]
    return batch

  def _place(self, tree: Any) -> Any:
    """Host arrays to the devices: [Z, B, ...] with bins over data and fsdp, the rest whole."""
    return place(tree, self._shardings(tree))

  def _shardings(self, tree: Any) -> Any:
    rows = NamedSharding(self.mesh, PartitionSpec(None, ("data", "fsdp")))
    whole = replicated(self.mesh)
    return jax.tree.map(lambda x: rows if np.ndim(x) > 1 else whole, tree)

  def _hidden(self, lora: Any, base: Any, bins: Batch[jax.Array]) -> jax.Array:
    """Final hidden states [B, U, D] that the targets of one step's bins are predicted from."""
    if self.block:
      attend = block_attend(
        bins.segments_ZBT[0], bins.parents_ZBT[0], self.block, self._has_kernels
      )
    else:
      attend = dense_attend(bins.segments_ZBT, bins.parents_ZBT)
    lora = scaled(lora, self.lora_config) if lora else {}
    hidden_BTD = self._final_hidden(lora, base, bins, attend)
    return jnp.take_along_axis(hidden_BTD, bins.source_ZBU[..., None], axis=1)

  def _forward(
    self, lora: Any, base: Any, bins: Batch[jax.Array], data: Any, scalars: Any, fn: Any = None
  ) -> tuple[jax.Array, Any]:
    """Loss and per-token aux of one step's bins (leaves [B, ...]); `fn` is the loss of a chunk."""
    hidden_BUD = self._hidden(lora, base, bins)
    data = data | {"target": bins.target_ZBU, "is_target": bins.is_target_ZBU}
    kernel = jax.lax.stop_gradient(head_kernel(base))
    fn, num_targets = fn or self._token_loss, bins.num_targets_Z
    return head_loss(kernel, hidden_BUD, data, scalars, num_targets, fn, self.head_chunk)

  def _final_hidden(
    self, lora: Any, base: Any, bins: Batch[jax.Array], attend: Attend
  ) -> jax.Array:
    """Final hidden states [B, T, D] of one step's bins."""
    tokens, positions, remat = bins.tokens_ZBT, bins.positions_ZBT, self.grpo.remat
    if self.is_looped:
      chunk = MLP_CHUNK if remat_name(remat) == "full" else 0
      return looped_hidden(
        self._config, base, lora, tokens, positions, attend, remat=remat, mlp_chunk=chunk
      )
    variables = {"params": base} | ({"lora": lora} if lora else {})
    return Qwen(self._config, remat=remat).apply(variables, tokens, positions, attend)[0]

  def _score_batch(
    self, lora: Any, base: Any, batch: Batch[jax.Array], support_ZBUX: jax.Array | None = None
  ) -> dict[str, jax.Array]:
    """logp [Z, B, U] of the targets; kl_logp, the log-probs uncut, where the support is cut.

    `support_ZBUX` is the packed support of the old policy; None takes that of this one.
    """
    keeps = support_ZBUX is not None
    fn = partial(grpo_token_loss, config=_SCORE, sampling=self.sampling, keeps_support=keeps)
    scalars = {"has_old": jnp.bool_(keeps), "total": jnp.float32(1)}

    def of_bins(x):
      bins, data = x
      zero = dict.fromkeys(("advantage", "old_logp", "weight"), jnp.zeros(bins.target_ZBU.shape))
      aux = self._forward(lora, base, bins, data | zero, scalars, fn)[1]
      return {k: x for k, x in aux.items() if k in ("logp", "kl_logp")}

    data = {} if support_ZBUX is None else {"support": support_ZBUX}
    return over_bins(of_bins, batch, data, room(batch, self.sampling))

  def _train_step(
    self, state: TrainState, base: Any, batch: Batch[jax.Array], data: Any, scalars: Any
  ):
    self.traces += 1
    steps = dataclasses.replace(batch, num_steps=None)
    loss_and_grad = jax.value_and_grad(self._forward, has_aux=True)
    if self.grpo.is_entropy_adaptive:
      scalars = scalars | {"entropy_coef": entropy_coef_now(state.extra["entropy"], self.grpo)}

    def one(z, carry):
      grads, aux = carry
      bins, data_z = jax.tree.map(lambda x: x[z], (steps, data))
      (_, new_aux), new = loss_and_grad(state.lora, base, bins, data_z, scalars)
      return jax.tree.map(jnp.add, grads, new), put(aux, z, new_aux)

    zero = jax.tree.map(jnp.zeros_like, state.lora)
    with jax.named_scope("bins"):
      start = (zero, room(batch, self.sampling, self._support_bytes) | {"entropy": zeros(batch)})
      grads, aux = jax.lax.fori_loop(0, batch.num_steps, one, start)
    grads, norm = clip_by_norm(grads, self.optim.grad_clip)
    updates, opt_state = self._optimizer.update(grads, state.opt_state, state.lora)
    key, _ = jax.random.split(state.key)
    lora = optax.apply_updates(state.lora, updates)
    entropy_ZBU = aux.pop("entropy")
    metrics = self._objective_metrics(aux, entropy_ZBU, batch, data, scalars)
    metrics |= {"grad_norm": norm, "learning_rate": learning_rate_at(self.optim, state.step)}
    extra = dict(state.extra)
    if self.grpo.is_entropy_adaptive:
      metrics["entropy_coef"] = extra["entropy"][0]
      extra["entropy"] = adapt_entropy_coef(extra["entropy"], metrics["entropy"], self.grpo)
    is_sound = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
    metrics["nonfinite_steps"] = jnp.where(is_sound, 0.0, 1.0)
    new = TrainState(lora, opt_state, state.step + 1, key, extra)
    return keep_if(is_sound, new, state), aux, metrics

  def _objective_metrics(
    self, aux: Any, entropy_ZBU: jax.Array, batch: Batch[jax.Array], data: Any, scalars: Any
  ) -> dict[str, jax.Array]:
    """Loss and metrics of the whole batch from its log-probs."""
    data = data | {"is_target": batch.is_target_ZBU}
    data |= {"kl_logp": aux["kl_logp"]} if "kl_logp" in aux else {}
    row_sum = make_row_sum(batch)
    return objective(aux["logp"], entropy_ZBU, data, scalars, self.grpo, row_sum)[1]


_SCORE = GRPOConfig()  # of a pass that only wants log-probs
