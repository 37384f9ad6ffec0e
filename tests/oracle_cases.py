"""Random batches for the comparison with TRL and verl: inputs from seeds, our side of the numbers.

Inputs are float32 numbers, so that both precisions see the same ones.
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from awf.grpo.advantages import gae, group_advantages, row_weights
from awf.grpo.critic import value_terms
from awf.grpo.objective import objective
from awf.grpo_config import GRPOConfig

ROWS, TOKENS, HORIZON = 6, 8, 11
GOLDEN = pathlib.Path(__file__).parent / "golden" / "objectives.npz"
NUM_TRL, NUM_VERL, NUM_ADVANTAGES, NUM_GAE = 110, 90, 70, 20
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
GROUP_SIZES = (1, 2, 3, 6)


@dataclasses.dataclass(frozen=True)
class Case:
  """A batch [B, T] and the settings under which it is judged."""

  config: GRPOConfig
  arrays: dict  # float64: logp, old_logp, ref_logp, sampler_logp, entropy, advantage; mask 0/1


def random_mask(rng, holes):
  """Rows end at random; some are empty, some have one token, some have spans inside left out."""
  lengths = rng.integers(1, TOKENS + 1, ROWS)
  lengths[rng.integers(0, ROWS)] = 1
  if rng.random() < 0.4:
    lengths[rng.integers(0, ROWS)] = 0
  mask = (np.arange(TOKENS)[None] < lengths[:, None]).astype(float)
  if holes:
    row = int(np.argmax(lengths))
    mask[row, 1:3] = 0
  return mask


def arrays_of(rng, holes=True):
  def normal(scale):
    return rng.normal(0, scale, (ROWS, TOKENS)).astype(np.float32).astype(np.float64)

  logp = -np.abs(normal(2.0))
  found = {"logp": logp, "old_logp": logp + normal(0.3), "ref_logp": logp + normal(0.5)}
  found["sampler_logp"] = found["old_logp"] + normal(0.3)
  found = {k: x.astype(np.float32).astype(np.float64) for k, x in found.items()}
  advantage = np.float64(np.float32(rng.normal(0, 1, ROWS)))
  advantage[rng.integers(0, ROWS)] = 0.0
  found["entropy"] = np.abs(normal(1.5))
  return found | {"advantage": advantage, "mask": random_mask(rng, holes)}


def trl_case(seed):
  """What TRL's `_compute_loss` covers: (case, loss_type, importance_sampling_level)."""
  rng = np.random.default_rng((1, seed))
  kinds = {"grpo": "sequence_mean", "dapo": "token_mean", "bnpo": "token_mean"}
  kinds |= {"dr_grpo": "constant", "luspo": "sequence_sum", "cispo": "token_mean"}
  kinds |= {"sapo": "sequence_mean"}
  loss_type = tuple(kinds)[seed % len(kinds)]
  is_whole = loss_type not in ("cispo", "sapo") and rng.random() < 0.4
  loss = "gspo" if is_whole else loss_type if loss_type in ("cispo", "sapo") else "grpo"
  modes = ("none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
  config = GRPOConfig(
    loss=loss,
    aggregation=kinds[loss_type],
    horizon=HORIZON,
    clip_low=float(rng.choice([0.0625, 0.1875])),
    clip_high=float(rng.choice([0.0625, 0.25])),
    cispo_max=1.125,
    ratio_max=float(rng.choice([0.0, 1.375])) if loss in ("grpo", "gspo") else 0.0,
    beta=float(rng.choice([0.0, 0.125])),
    entropy_coef=float(rng.choice([0.0, 0.03125])),
    importance=str(rng.choice(modes)),
    importance_min=float(rng.choice([0.0, 0.75])),
    importance_max=1.25,
  )
  return Case(config, arrays_of(rng)), loss_type, "sequence" if is_whole else "token"


def verl_case(seed):
  """What verl's `core_algos` covers: (case, name of the policy loss)."""
  rng = np.random.default_rng((2, seed))
  name = ("vanilla", "gspo", "cispo", "reinforce", "vanilla", "sapo")[seed % 6]
  # verl divides by L + 1e-8 in seq-mean-token-mean: no 1e-12 there, TRL's cases have it.
  kinds = ("sequence_mean",) if name == "sapo" else ("token_mean", "sequence_sum", "constant")
  # With weights that differ by token, verl's GSPO is its token variant, not the ratio's gradient.
  modes = ("none",) if name == "gspo" else ("none", "token_truncate")
  cispo = {"clip_low": 1.0, "cispo_max": 1.25} if name == "cispo" else {}
  config = GRPOConfig(
    loss={"vanilla": "ppo"}.get(name, name),
    aggregation=str(rng.choice(kinds)),
    horizon=HORIZON,
    dual_clip=float(rng.choice([1.125, 3.0])) if name == "vanilla" else 0.0,
    beta=float(rng.choice([0.0, 0.125])),
    kl=str(rng.choice(["k1", "k2", "k3"])),
    importance=str(rng.choice(modes)),
    importance_max=1.25,
    **({"clip_low": 0.125, "clip_high": 0.25} | cispo),
  )
  return Case(config, arrays_of(rng)), name


def advantage_case(seed):
  """(kind, rewards, labels, mask, std_eps, whether verl can tell)."""
  rng = np.random.default_rng((3, seed))
  trl = ("grpo", "dr_grpo", "batch")
  verl = ("grpo", "dr_grpo", "rloo", "opo", "reinforce_plus_plus_baseline")
  by_verl = seed % 2 == 1
  kind = verl[seed // 2 % 5] if by_verl else trl[seed // 2 % 3]
  size = int(rng.choice(GROUP_SIZES[1:] if by_verl else GROUP_SIZES))
  rewards = np.float64(np.float32(rng.random(ROWS)))
  if seed % 3 == 0:
    rewards[:size] = 0.625  # all alike
  if not by_verl and seed % 4 == 0:
    rewards[rng.integers(0, ROWS)] = np.nan
  labels = [f"g{i // size}" for i in range(ROWS)]
  return kind, rewards, labels, random_mask(rng, True), 1e-6 if by_verl else 1e-4, by_verl


def gae_case(seed):
  rng = np.random.default_rng((4, seed))
  arrays = arrays_of(rng)
  mask = arrays["mask"]
  mask[0, :2] = 1
  reward = arrays["logp"] * mask
  return reward, arrays["old_logp"], mask, arrays["ref_logp"], (1.0, 0.95)[seed % 2], 0.9


def our_loss(case, dtype):
  """(loss, gradient [B, T], sum of absolute terms, metrics), NumPy float64."""
  c = case.config
  with jax.enable_x64(dtype == "float64"):
    x = {k: jnp.asarray(v, dtype) for k, v in case.arrays.items()}
    mask = case.arrays["mask"]
    weight = row_weights(mask.sum(1), ROWS, c.aggregation, c.horizon)
    data = {
      "is_target": jnp.asarray(mask > 0),
      "advantage": x["advantage"][:, None] + jnp.zeros_like(x["logp"]),
      "weight": jnp.asarray(weight, dtype)[:, None] + jnp.zeros_like(x["logp"]),
    }
    data |= {k: x[k] for k in ("old_logp", "ref_logp", "sampler_logp")}
    scalars = {"has_old": jnp.bool_(True), "total": x["mask"].sum()}
    scalars["entropy_coef"] = jnp.asarray(c.entropy_coef, dtype)

    def row_sum(value):
      return jnp.sum(value, axis=1, keepdims=True) + jnp.zeros_like(value)

    def loss(logp):
      return objective(logp, x["entropy"], data, scalars, c, row_sum)

    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(x["logp"])
    found = (np.float64(value), np.asarray(grad, np.float64), metrics)
  return (
    found[0],
    found[1],
    absolute_terms(case, weight),
    {k: float(v) for k, v in found[2].items()},
  )


def absolute_terms(case, weight):
  """Sum of the absolute values of all that is added up, to which errors are compared."""
  a, c, mask = case.arrays, case.config, case.arrays["mask"]
  d, k = a["logp"] - a["old_logp"], a["ref_logp"] - a["logp"]
  size = np.maximum(np.exp(d), 1.0) * np.abs(a["advantage"])[:, None]
  size = size * np.maximum(np.abs(a["logp"]), 1.0) * max(c.importance_max, 1.0)
  size = size + c.beta * (np.exp(k) + np.abs(k) + 1.0 + k**2)
  total = np.sum(weight[:, None] * size * mask)
  return total + c.entropy_coef * np.sum(a["entropy"] * mask) / mask.sum()


def our_advantages(seed):
  kind, rewards, labels, mask, eps, _ = advantage_case(seed)
  return group_advantages(rewards, labels, kind, eps, mask.sum(1)).values_B


def our_gae(seed, dtype):
  """(advantages, returns) where the mask counts, and the value loss, from NumPy and JAX."""
  reward, value, mask, new_value, gamma, lam = gae_case(seed)
  cast = [np.asarray(x, dtype) for x in (reward, value, mask)]
  advantage, returns = gae(*cast, gamma, lam)
  with jax.enable_x64(dtype == "float64"):
    args = (jnp.asarray(x, dtype) for x in (new_value, value, returns))
    terms = np.asarray(value_terms(*args, 0.5), np.float64)
  loss = np.sum(terms * mask) / mask.sum()
  return advantage * mask, returns * mask, loss


def assert_close(got, want, scale, dtype, what):
  error = np.max(np.abs(np.asarray(got, np.float64) - want))
  assert error <= TOLERANCE[dtype] * scale, f"{what}: {error:.3g} of {scale:.3g} in {dtype}"


def check(loss_cases, advantages, gaes, dtype):
  """Compares our numbers with an oracle's.

  Args:
    loss_cases: (what, case, oracle's loss, oracle's gradient).
    advantages: (seed, oracle's advantages).
    gaes: (seed, oracle's advantages, returns and value loss).
    dtype: in which we compute.
  """
  for what, case, loss, grad in loss_cases:
    ours, our_grad, scale, _ = our_loss(case, dtype)
    assert_close(ours, loss, scale, dtype, what)
    assert_close(our_grad, grad, np.abs(grad).sum() + 1e-30, dtype, f"gradient, {what}")
  for seed, wanted in advantages:
    scale = max(np.abs(wanted).sum(), 1.0)
    assert_close(our_advantages(seed), wanted, scale, "float64", f"advantages {seed}")
  for seed, advantage, returns, loss in gaes:
    got = our_gae(seed, dtype)
    for x, want in zip(got, (advantage, returns, loss), strict=True):
      assert_close(x, want, max(np.abs(want).sum(), 1.0), dtype, f"gae {seed}")
