"""One batch on its way through the learner: what its steps need, the steps, their metrics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from awf.grpo.config import GRPOConfig
from awf.grpo.guard import mean_of_sound
from awf.grpo.objective import kl_estimate
from awf.grpo.passes import uncut
from awf.grpo.rows import (
  Layout,
  Plan,
  make_plan,
  rollout_metrics,
  sampler_logps,
  sampling_metrics,
  shaped_rewards,
)
from awf.sharding import fetch
from awf.types import Rollout

if TYPE_CHECKING:
  from awf.grpo.trainer import GRPOTrainer


def scalars_of(grpo: GRPOConfig, has_old: bool, total: float) -> dict[str, Any]:
  """The traced scalars of a step (`awf.grpo.objective.objective`)."""
  coef = np.float32(grpo.entropy_coef)
  return {"has_old": np.bool_(has_old), "total": np.float32(total), "entropy_coef": coef}


class Update:
  """The update of a trainer's state on one batch.

  Attributes:
    old_logp_n, kl_n, value_n: of every token, where the settings need them before the first step.
    batch, placed: the computed rows, on the host and on the devices.
    data: what a step knows of each token, on the devices.
  """

  def __init__(self, trainer: GRPOTrainer, rollouts: Sequence[Rollout]):
    self.trainer, self.grpo = trainer, trainer.grpo
    self.rollouts, self.layout = rollouts, Layout(rollouts)
    self.old_logp_n: np.ndarray | None = None
    self.kl_n: np.ndarray | None = None
    self.value_n: np.ndarray | None = None
    self.batch: Any = None
    self.placed: Any = None
    self.data: dict[str, Any] = {}

  def run(self) -> dict[str, float]:
    """Steps of the trainer's state; returns the metrics (`GRPOTrainer.update`)."""
    grpo, rollouts = self.grpo, self.rollouts
    self.trainer.flops = 0.0
    reward_B, _ = shaped_rewards(rollouts, grpo)
    metrics = rollout_metrics(rollouts, grpo)
    if any(math.isinf(r.reward) for r in rollouts):  # NaN is a row without a reward, this is none
      return metrics | {"skipped": 1.0, "nonfinite_steps": float(grpo.steps_per_batch)}
    self._look_ahead(reward_B)
    plan = make_plan(rollouts, self.layout, grpo, reward_B, self.kl_n, self.value_n)
    if not plan.rows:
      return metrics | {"skipped": 1.0, "nonfinite_steps": 0.0}
    self.batch = self.trainer._batch(rollouts, plan.rows)
    self.placed = self.trainer._place(self.batch)
    self.data = self._data(plan)
    steps = jax.device_get([self._step(i, plan) for i in range(grpo.steps_per_batch)])
    self.trainer.flops = self.flops()
    metrics |= mean_of_sound(steps)
    if self.kl_n is not None:
      metrics["kl"] = float(self.kl_n[self.layout.is_in(self.batch)].mean())
    return metrics | self._sampling_metrics()

  def flops(self) -> float:
    """Model FLOPs of the batch's passes: 2N a token forward, as many backward to the activations.

    N are the base's parameters (a tied head once) and tokens those that were computed: a prompt
    that completions share counts once. Attention and the adapter are left out, as is what remat
    computes again.
    """
    grpo, steps = self.grpo, self.grpo.steps_per_batch
    passes = 2 * steps + grpo.has_kl_in_loss  # forward and backward; the reference
    passes += grpo.needs_old_logp + grpo.has_kl_in_reward
    passes += (steps - 1) * grpo.is_sequence_loss + (1 + steps) * grpo.has_critic
    return 2.0 * self.trainer.num_parameters * self.batch.num_tokens * passes

  def _step(self, number: int, plan: Plan) -> dict[str, jax.Array]:
    """One optimiser step; its metrics."""
    trainer = self.trainer
    # The first step's forward pass gives the old log-probs: there the ratio is one by definition.
    scalars = scalars_of(self.grpo, number > 0, plan.total)
    if self.grpo.is_sequence_loss:
      self.data["policy_grad"] = self._gradient_of_rows(scalars, number == 0)
    args = (trainer._params, self.placed, self.data, scalars)
    trainer.state, aux, metrics = trainer._step(trainer.state, *args)
    if number == 0:
      self.data["old_logp"] = aux["logp"]
      if trainer._support_bytes:
        self.data["support"] = aux["support"]
    if plan.return_n is not None:
      metrics |= self._train_value_head(plan.return_n)
    return metrics

  def _look_ahead(self, reward_B: np.ndarray) -> None:
    """What advantages and weights need from the models: old log-probs, KL, values of each token."""
    grpo, layout = self.grpo, self.layout
    rows = np.flatnonzero(np.isfinite(reward_B) & (layout.length_B > 0)).tolist()
    if not rows or not (grpo.needs_old_logp or grpo.has_critic):
      return
    batch = self.trainer._batch(self.rollouts, rows)
    placed = self.trainer._place(batch)
    if grpo.needs_old_logp:
      now = self.trainer._score(self.trainer.state.lora, self.trainer._params, placed)
      self.old_logp_n = layout.out_of(batch, fetch(now["logp"]))
      if grpo.has_kl_in_reward:
        ref = self.trainer._score({}, self.trainer._params, placed)
        kl_ZBU = kl_estimate(uncut(now), uncut(ref), grpo.kl)
        self.kl_n = layout.out_of(batch, fetch(kl_ZBU))
    if grpo.has_critic:
      head = self.trainer.state.extra["critic"]["head"]
      self.value_n = layout.out_of(
        batch, fetch(self.trainer._values(head, self.trainer._params, placed))
      )

  def _data(self, plan: Plan) -> dict[str, Any]:
    """What a step knows of each token, on the devices."""
    grpo, into = self.grpo, partial(self.layout.into, self.batch)
    data = {
      "advantage": self.trainer._place(into(plan.advantage_n)),
      "weight": self.trainer._place(into(plan.weight_n)),
      "old_logp": self.trainer._place(into(np.zeros(self.layout.size))),
    }
    if grpo.importance != "none":
      sampler_logp = self.trainer._place(into(sampler_logps(self.rollouts, self.layout)))
      if self.old_logp_n is None:
        data["sampler_logp"] = sampler_logp
      else:
        old_logp = self.trainer._place(into(self.old_logp_n))
        data["importance"] = self.trainer._importance(self.placed, old_logp, sampler_logp)
    if grpo.has_kl_in_loss:
      data["ref_logp"] = uncut(self.trainer._score({}, self.trainer._params, self.placed))
    if self.trainer._support_bytes:
      shape = (*self.batch.target_ZBU.shape, self.trainer._support_bytes)
      data["support"] = jnp.zeros(shape, jnp.uint8, device=data["weight"].sharding)
    return data

  def _gradient_of_rows(self, scalars: dict[str, Any], is_first: bool) -> jax.Array:
    """Derivative of a loss over sequences by each log-prob; the first step knows every ratio: 1."""
    logp_ZBU = self.data["old_logp"]
    if not is_first:
      support = self.data.get("support")
      logp_ZBU = self.trainer._score(
        self.trainer.state.lora, self.trainer._params, self.placed, support
      )["logp"]
    data = {k: x for k, x in self.data.items() if k not in ("policy_grad", "support")}
    return self.trainer._row_gradient(
      self.placed, logp_ZBU, data, scalars | {"has_old": np.bool_(True)}
    )

  def _train_value_head(self, return_n: np.ndarray) -> dict[str, jax.Array]:
    """One step of the critic; its metrics."""
    host = {"old_value": self.value_n, "returns": return_n}
    data = {k: self.trainer._place(self.layout.into(self.batch, x)) for k, x in host.items()}
    data |= {"weight": self.data["weight"], "is_target": self.placed.is_target_ZBU}
    critic, loss = self.trainer._critic(
      self.trainer.state.extra["critic"], self.trainer._params, self.placed, data
    )
    self.trainer.state = dataclasses.replace(
      self.trainer.state, extra=self.trainer.state.extra | {"critic": critic}
    )
    return {"value_loss": loss}

  def _sampling_metrics(self) -> dict[str, float]:
    keep, out_of = self.layout.is_in(self.batch), partial(self.layout.out_of, self.batch)
    old_logp = out_of(fetch(self.data["old_logp"]))[keep]
    sampler_logp, weight = sampler_logps(self.rollouts, self.layout)[keep], None
    if self.grpo.importance != "none":
      data = self.data
      if "importance" not in data:
        args = (self.placed, data["old_logp"], data["sampler_logp"])
        data["importance"] = self.trainer._importance(*args)
      weight = out_of(fetch(data["importance"]))[keep]
    return sampling_metrics(old_logp, sampler_logp, weight)
