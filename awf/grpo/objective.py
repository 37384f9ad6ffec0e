"""The objective as functions of log-prob arrays: token losses, KL, corrections, the whole sum.

The head's chunks (`grpo_token_loss`) and the sums over a batch (`objective`) are built of the same
functions. Arrays have any shape; tokens that do not count are False in `is_target`. What couples
the tokens of a row is given by `row_sum`, which sums over a row and lays the sum on each of its
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from awf.grpo.config import GRPOConfig
from awf.grpo.loss import logp_and_entropy
from awf.sampler.draw import support

RowSum = Callable[[jax.Array], jax.Array]


class Sampling(NamedTuple):
  """The distribution that completions were drawn from; what the policy is."""

  temperature: float = 1.0
  top_p: float = 1.0
  top_k: int = 0
  min_p: float = 0.0

  @property
  def is_truncated(self) -> bool:
    return self.top_p < 1 or self.top_k > 0 or self.min_p > 0


PLAIN = Sampling()


def policy_terms(
  logp: jax.Array,
  old_logp: jax.Array,
  advantage: jax.Array,
  config: GRPOConfig,
  log_ratio: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Loss and ratio of each token.

  Args:
    logp: under the policy.
    old_logp: under the policy that the first step of the batch began with; constant.
    advantage: of each token; constant.
    config: loss and its bounds.
    log_ratio: replaces logp - old_logp, for ratios of whole sequences.

  Returns:
    (loss, r = exp(log ratio)). The loss is, with A the advantage,
      grpo, ppo, gspo: max(-min(r, ratio_max) A, -clip(r, 1 - clip_low, 1 + clip_high) A), at
        A < 0 no more than -dual_clip A;
      cispo: -sg(min(r, cispo_max)) A logp;
      sapo: -sigmoid(tau (r - 1)) 4 / tau A, tau by the sign of A;
      reinforce: -logp A.

  Source: PPO, arXiv:1707.06347, eq. 7; the asymmetric range of DAPO, arXiv:2503.14476, eq. 10;
    dual clip, arXiv:1912.09729, eq. 5; two-sided clip as TRL's delta, arXiv:2505.07291; GSPO,
    arXiv:2507.18071; CISPO, arXiv:2506.13585, eq. 4; SAPO, arXiv:2511.20347.
  """
  ratio = jnp.exp(logp - old_logp if log_ratio is None else log_ratio)
  if config.loss == "reinforce":
    return -logp * advantage, ratio
  if config.loss == "cispo":
    weight = jax.lax.stop_gradient(jnp.minimum(ratio, config.cispo_max))
    return -weight * advantage * logp, ratio
  if config.loss == "sapo":
    tau = jnp.where(advantage > 0, config.sapo_tau_pos, config.sapo_tau_neg).astype(ratio.dtype)
    return -jax.nn.sigmoid(tau * (ratio - 1.0)) * (4.0 / tau) * advantage, ratio
  clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
  bounded = jnp.minimum(ratio, config.ratio_max) if config.ratio_max else ratio
  loss = -jnp.minimum(bounded * advantage, clipped * advantage)
  if config.dual_clip:
    loss = jnp.where(advantage < 0, jnp.minimum(loss, -config.dual_clip * advantage), loss)
  return loss, ratio


def kl_estimate(logp: jax.Array, ref_logp: jax.Array, kind: str = "k3") -> jax.Array:
  """Estimate of KL(policy || reference) at each drawn token.

  Args:
    logp: under the policy.
    ref_logp: under the reference.
    kind: "k1" logp - ref_logp; "k2" half its square; "k3" exp(-k1) + k1 - 1, unbiased like k1 and
      never negative.

  Source: Schulman, "Approximating KL divergence", 2020.
  """
  diff = ref_logp - logp
  if kind == "k1":
    return -diff
  if kind == "k2":
    return 0.5 * jnp.square(diff)
  return jnp.exp(diff) - diff - 1.0


def importance_weights(
  old_logp: jax.Array,
  sampler_logp: jax.Array,
  is_target: jax.Array,
  config: GRPOConfig,
  row_sum: RowSum | None = None,
) -> jax.Array:
  """Weight that corrects a token for having been drawn by the sampler instead of the learner.

  Args:
    old_logp: by the learner, under the distribution that was drawn from.
    sampler_logp: as the sampler recorded them; NaN where it recorded none (no correction).
    is_target: tokens that count.
    config: importance, importance_min, importance_max.
    row_sum: for the kinds over sequences.

  Returns:
    w = exp(old_logp - sampler_logp), or exp of the difference's sum over the row; truncated to
    [importance_min, importance_max], or 0 outside of it ("mask"). Constant: no gradient.

  Source: TRL's vllm_importance_sampling_mode; clipped weights as IMPALA's, arXiv:1802.01561.
  """
  diff = jnp.where(is_target & ~jnp.isnan(sampler_logp), old_logp - sampler_logp, 0.0)
  if config.importance.startswith("sequence"):
    if row_sum is None:
      raise ValueError("weights over sequences need row_sum")
    diff = row_sum(diff)
  weight = jnp.exp(diff)
  low, high = config.importance_min, config.importance_max
  if config.importance.endswith("truncate"):
    weight = jnp.clip(weight, low, high)
  else:
    weight = jnp.where((weight < low) | (weight > high), 0.0, weight)
  return jax.lax.stop_gradient(weight)


def row_mean_log_ratio(
  logp: jax.Array, old_logp: jax.Array, is_target: jax.Array, row_sum: RowSum
) -> jax.Array:
  """Mean over the row of logp - old_logp, on each of its tokens: the log of GSPO's ratio.

  Source: GSPO, arXiv:2507.18071, eq. 7.
  """
  length = row_sum(is_target.astype(logp.dtype))
  return row_sum(jnp.where(is_target, logp - old_logp, 0.0)) / jnp.maximum(length, 1.0)


class TokenTerms(NamedTuple):
  """Terms of each token, before the weights of the aggregation."""

  policy: jax.Array  # with the correction for the sampler
  ratio: jax.Array
  kl: jax.Array  # 0 without a KL term in the loss


def token_terms(
  logp: jax.Array, data: dict, scalars: dict, config: GRPOConfig, row_sum: RowSum | None = None
) -> TokenTerms:
  """The loss of each token and what it is made of.

  Args:
    logp: under the policy.
    data: like logp: is_target bool; advantage, old_logp; where the config asks for them ref_logp,
      kl_logp (instead of logp in the KL), sampler_logp, importance (instead of sampler_logp).
    scalars: has_old, bool; False takes the old log-probs to be the present ones.
    config: the objective.
    row_sum: for losses and corrections over sequences.
  """
  old_logp = jnp.where(scalars["has_old"], data["old_logp"], jax.lax.stop_gradient(logp))
  log_ratio = None
  if config.is_sequence_loss:
    if row_sum is None:
      raise ValueError(f"loss {config.loss!r} needs row_sum")
    log_ratio = row_mean_log_ratio(logp, old_logp, data["is_target"], row_sum)
  policy, ratio = policy_terms(logp, old_logp, data["advantage"], config, log_ratio)
  if "importance" in data:
    policy *= data["importance"]
  elif config.importance != "none":
    is_target = data["is_target"]
    policy *= importance_weights(old_logp, data["sampler_logp"], is_target, config, row_sum)
  kl = jnp.zeros_like(logp)
  if config.has_kl_in_loss:
    kl = kl_estimate(data.get("kl_logp", logp), data["ref_logp"], config.kl)
  return TokenTerms(policy, ratio, kl)


def objective(
  logp: jax.Array,
  entropy: jax.Array,
  data: dict,
  scalars: dict,
  config: GRPOConfig,
  row_sum: RowSum | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The loss of a whole batch, and what the metrics files say about it.

  Args:
    logp: under the policy.
    entropy: of the policy at each token, nats.
    data: as in `token_terms`, and weight, the token's share in the aggregation
      (awf.grpo.advantages.row_weights).
    scalars: has_old; total, trained tokens of the batch; entropy_coef.
    config: the objective.
    row_sum: for losses and corrections over sequences.

  Returns:
    (sum of weight (policy + beta KL) - entropy_coef sum of entropy / total, metrics). Means of the
    metrics are over the tokens given; those of the clip ratios over rows where ratios belong to
    rows.
  """
  is_target = data["is_target"]
  terms = token_terms(logp, data, scalars, config, row_sum)

  def total(x):
    return jnp.sum(jnp.where(is_target, x, 0.0))

  policy_loss = total(data["weight"] * terms.policy)
  loss = policy_loss
  if config.has_kl_in_loss:
    loss += config.beta * total(data["weight"] * terms.kl)
  if config.has_entropy:
    loss -= scalars["entropy_coef"] * total(entropy) / scalars["total"]
  count = jnp.maximum(jnp.sum(is_target), 1)
  metrics = {
    "loss": loss,
    "policy_loss": policy_loss,
    "entropy": total(entropy) / count,
    "kl": total(terms.kl) / count,
  }
  share = jnp.ones_like(logp)
  if config.is_sequence_loss and row_sum is not None:
    share = 1.0 / jnp.maximum(row_sum(is_target.astype(logp.dtype)), 1.0)
  is_low, is_high = _clipped(terms.ratio, data["advantage"], config)
  for name, x in (("low", is_low), ("high", is_high), ("region", is_low | is_high)):
    metrics[f"clip_ratio/{name}_mean"] = total(share * x) / jnp.maximum(total(share), 1.0)
  return loss, metrics


def _clipped(ratio: jax.Array, advantage: jax.Array, config: GRPOConfig):
  """(clipped below, clipped above): where a bound takes a token's gradient or limits its weight."""
  none = jnp.zeros(ratio.shape, bool)
  if config.loss == "cispo":
    return none, (ratio > config.cispo_max) & (advantage > 0)
  if config.loss in ("sapo", "reinforce"):
    return none, none
  is_low = (ratio < 1 - config.clip_low) & (advantage < 0)
  return is_low, (ratio > 1 + config.clip_high) & (advantage > 0)


def policy_gradient(
  logp: jax.Array, data: dict, scalars: dict, config: GRPOConfig, row_sum: RowSum
) -> jax.Array:
  """Derivative of the policy's part of the loss by each log-prob, for losses over sequences.

  With it the loss is linear in the log-probs as far as a first derivative goes, so that it can be
  summed token by token.
  """

  def policy_loss(x):
    terms = token_terms(x, data, scalars, config, row_sum)
    return jnp.sum(jnp.where(data["is_target"], data["weight"] * terms.policy, 0.0))

  return jax.grad(policy_loss)(logp)


def entropy_coef_now(state_2: jax.Array, config: GRPOConfig) -> jax.Array:
  """The adaptive coefficient that a step applies: 0 while the entropy is above its target.

  Args:
    state_2: float32 [2]: the coefficient, and the entropy of the step before (infinite at first).
    config: entropy_target.
  """
  return jnp.where(state_2[1] <= config.entropy_target, state_2[0], 0.0)


def adapt_entropy_coef(state_2: jax.Array, entropy: jax.Array, config: GRPOConfig) -> jax.Array:
  """State after a step with this mean entropy: the coefficient moves by entropy_delta.

  Source: Skywork Open Reasoner 1, arXiv:2505.22312, section 4; TRL's use_adaptive_entropy.
  """
  is_low = entropy <= config.entropy_target
  coef = state_2[0] + jnp.where(is_low, config.entropy_delta, -config.entropy_delta)
  return jnp.stack([jnp.clip(coef, config.entropy_min, config.entropy_max), entropy])


def grpo_token_loss(
  logits_BcV: jax.Array,
  data: dict,
  scalars: dict,
  *,
  config: GRPOConfig,
  sampling: Sampling = PLAIN,
  keeps_support: bool = False,
) -> tuple[jax.Array, dict]:
  """The objective summed over one chunk of target tokens, for `head_loss`.

  Args:
    logits_BcV: float32.
    data: leaves [B, c]: target int32, is_target bool, and those of `objective`; policy_grad
      (`policy_gradient`) in place of what a loss over sequences would need; support uint8
      [B, c, V / 8], the tokens that could be drawn, packed, with keeps_support.
    scalars: as in `objective`.
    config: the objective.
    sampling: the policy is the softmax of tempered logits, cut to the support that top-k and top-p
      leave and renormalised; the token that was drawn belongs to it always.
    keeps_support: the support is that of the old policy (scalars["has_old"]), not of the present.

  Returns:
    (loss, aux [B, c], 0 where there is no target): logp and entropy (of the tempered softmax,
    uncut); with a cut also kl_logp, the log-prob uncut; with keeps_support also support.
  """
  if sampling.temperature != 1.0:
    logits_BcV = logits_BcV / sampling.temperature
  logp, entropy = logp_and_entropy(logits_BcV, data["target"])
  aux = {"logp": logp, "entropy": entropy}
  if sampling.is_truncated:
    aux["kl_logp"] = logp
    data = data | {"kl_logp": logp}
    is_kept = _kept(logits_BcV, data, scalars, sampling, keeps_support)
    # -inf would make NaN of a gradient; a shift far below any logit is as good.
    cut = jnp.where(is_kept, logits_BcV, jax.lax.stop_gradient(jnp.min(logits_BcV)) - 1e4)
    logp = aux["logp"] = logp_and_entropy(cut, data["target"])[0]
    if keeps_support:
      aux["support"] = jnp.packbits(is_kept, axis=-1)
  # Elsewhere 0, as all that it is compared with: an exp of anything else may be inf, and its
  # gradient NaN, though no weight lets it in.
  is_target = data["is_target"]
  if "kl_logp" in data:
    data = data | {"kl_logp": jnp.where(is_target, data["kl_logp"], 0.0)}
  loss = _chunk_terms(jnp.where(is_target, logp, 0.0), entropy, data, scalars, config)
  aux = {k: x if x.ndim > 2 else jnp.where(is_target, x, 0.0) for k, x in aux.items()}
  return jnp.sum(jnp.where(is_target, loss, 0.0)), aux


def _chunk_terms(logp, entropy, data, scalars, config):
  """Weighted terms of the objective, token by token."""
  if "policy_grad" in data:
    loss = data["policy_grad"] * logp
    if config.has_kl_in_loss:
      kl = kl_estimate(data.get("kl_logp", logp), data["ref_logp"], config.kl)
      loss += data["weight"] * config.beta * kl
  else:
    terms = token_terms(logp, data, scalars, config)
    loss = terms.policy
    if config.has_kl_in_loss:
      loss += config.beta * terms.kl
    loss *= data["weight"]
  if config.has_entropy:
    loss -= scalars["entropy_coef"] / scalars["total"] * entropy
  return loss


def _kept(logits_BcV, data, scalars, sampling, keeps_support):
  """bool [B, c, V]: tokens that could be drawn."""
  shape = logits_BcV.shape

  def by_rule(_):
    flat = jax.lax.stop_gradient(logits_BcV).reshape(-1, shape[-1])
    rows = flat.shape[:1]
    is_kept = support(
      flat,
      jnp.full(rows, sampling.top_p, jnp.float32),
      jnp.full(rows, sampling.top_k, jnp.int32),
      jnp.full(rows, sampling.min_p, jnp.float32),
    ).reshape(shape)
    index = jax.lax.broadcasted_iota(jnp.int32, shape, 2)
    return is_kept | (index == data["target"][..., None])

  if not keeps_support:
    return by_rule(None)

  def as_before(_):
    return jnp.unpackbits(data["support"], axis=-1, count=shape[-1]).astype(bool)

  return jax.lax.cond(scalars["has_old"], as_before, by_rule, None)
