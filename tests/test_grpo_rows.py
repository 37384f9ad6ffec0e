"""Plans, weights and the objective without a model: each field of GRPOConfig, each combination."""

import dataclasses

import grpo_reference as plain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awf.grpo.advantages import GROUP_KINDS, gae, group_advantages, overlong_penalty, row_weights
from awf.grpo.batch import make_batch
from awf.grpo.config import GRPOConfig
from awf.grpo.objective import objective
from awf.grpo.passes import make_row_sum
from awf.grpo.rows import Layout, make_plan, rollout_metrics, sampling_metrics, shaped_rewards
from awf.types import Rollout, UserError

LENGTHS = (5, 1, 7, 3, 4, 0, 2, 6)


def make_rollouts(lengths=LENGTHS):
  """A group with a spread, one of four with a lost reward, an empty row and one cut off."""
  rewards = (0.0, 1.0, 0.25, 0.75, 0.5, 0.25, float("nan"), 1.0)
  return [
    Rollout(
      f"g{i // 4}", (1, 2, i), (3,) * n, (-1.0,) * n, r, {"runs": r}, truncated=n == max(lengths)
    )
    for i, (n, r) in enumerate(zip(lengths, rewards, strict=True))
  ]


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_group_advantages_equal_a_plain_reading(kind):
  rng = np.random.default_rng(0)
  rewards = rng.random(20)
  rewards[[3, 17]] = np.nan
  rewards[8:12] = 0.5
  groups = [f"g{i // 4}" for i in range(19)] + ["alone"]
  lengths = rng.integers(1, 9, 20)
  got = group_advantages(rewards, groups, kind, 1e-4, lengths).values_B
  want = plain.advantages(list(rewards), groups, kind, 1e-4, lengths.tolist())
  np.testing.assert_allclose(got, want, atol=1e-7)  # whitening: TRL's and verl's 1e-8 in the mean
  assert np.all(got[[3, 17]] == 0)
  order = rng.permutation(20)
  mixed = group_advantages(rewards[order], [groups[i] for i in order], kind, 1e-4, lengths[order])
  np.testing.assert_allclose(mixed.values_B, got[order], atol=1e-12)


def test_a_group_without_positive_mean_has_no_maxrl_advantage():
  assert np.all(group_advantages([0.0, -1.0], ["a", "a"], "maxrl").values_B == 0)
  assert group_advantages([0.0, 1.0], ["a", "a"], "maxrl").values_B.tolist() == [-1.0, 1.0]
  with pytest.raises(ValueError, match="one group per reward"):
    group_advantages([0.0], ["a", "b"])


def test_gae_skips_masked_tokens_and_whitens():
  rng = np.random.default_rng(1)
  reward, value = rng.normal(size=(2, 3, 9))
  mask = np.ones((3, 9), bool)
  mask[0, 3:5] = mask[1, 7:] = mask[2, 1:] = False
  advantage, returns = gae(reward * mask, value, mask, 0.97, 0.9)
  rows = [plain.gae_row(reward[i, m], value[i, m], 0.97, 0.9) for i, m in enumerate(mask)]
  white = plain.whiten([r[0] for r in rows])
  for i, m in enumerate(mask):
    np.testing.assert_allclose(returns[i, m], rows[i][1], rtol=1e-12)
    np.testing.assert_allclose(advantage[i, m], white[i], atol=1e-7)
  assert abs(advantage[mask].mean()) < 1e-9 and advantage[mask].std(ddof=1) == pytest.approx(1)


def test_weights_are_those_of_the_whole_batch():
  lengths, x = np.array(LENGTHS), np.arange(sum(LENGTHS), dtype=float)
  rows = np.split(x, np.cumsum(lengths)[:-1])
  want = {
    "token_mean": x.mean(),
    "sequence_mean": np.mean([r.mean() if len(r) else 0.0 for r in rows]),
    "sequence_sum": np.mean([r.sum() for r in rows]),
    "constant": np.mean([r.sum() / 16 for r in rows]),
  }
  for kind, value in want.items():
    weight = row_weights(lengths, len(lengths), kind, 16)
    assert np.repeat(weight, lengths) @ x == pytest.approx(value, rel=1e-12)
  with pytest.raises(UserError, match="grpo.aggregation"):
    row_weights(lengths, 8, "mean", 16)


def test_overlong_penalty_grows_over_the_buffer():
  got = overlong_penalty([3, 6, 8, 10, 12], 10, 4, 0.5)
  np.testing.assert_allclose(got, [0, 0, -0.25, -0.5, -0.5])
  assert np.all(overlong_penalty([3, 60], 10, 0, 0.5) == 0)


def test_layout_moves_values_between_rows_and_bins():
  rollouts = make_rollouts()
  layout = Layout(rollouts)
  batch = make_batch(rollouts, [0, 2, 3, 7], 512, 2)
  value_n = np.arange(1.0, layout.size + 1)
  inside = layout.is_in(batch)
  assert inside.sum() == 5 + 7 + 3 + 6
  laid = layout.into(batch, value_n)
  np.testing.assert_array_equal(layout.out_of(batch, laid), value_n * inside)
  sums = layout.row_sums(value_n)
  assert sums[5] == 0 and sums[1] == 6
  np.testing.assert_array_equal(layout.table(value_n).sum(1), sums)
  arrays = jax.tree.map(jnp.asarray, batch)
  by_row = layout.out_of(batch, np.asarray(make_row_sum(arrays)(jnp.asarray(laid))))
  np.testing.assert_allclose(by_row, layout.repeat(sums) * inside)


def test_rows_that_do_not_count():
  rollouts, c = make_rollouts(), GRPOConfig()
  layout = Layout(rollouts)
  reward_B, _ = shaped_rewards(rollouts, c)
  plan = make_plan(rollouts, layout, c, reward_B)
  assert plan.rows == [0, 1, 2, 3, 4, 7] and plan.total == 26  # all tokens but the lost row's
  masked = dataclasses.replace(c, mask_truncated=True)
  plan = make_plan(rollouts, layout, masked, reward_B)
  assert 2 not in plan.rows and plan.total == 19
  flat = [dataclasses.replace(r, reward=0.5) if r.group == "g1" else r for r in rollouts]
  kept = make_plan(flat, layout, c, shaped_rewards(flat, c)[0])
  dropped = dataclasses.replace(c, drop_uniform=True, aggregation="sequence_sum")
  dropped = make_plan(flat, layout, dropped, shaped_rewards(flat, c)[0])
  assert kept.rows == dropped.rows == [0, 1, 2, 3]
  assert kept.total == 28 and dropped.total == 16
  np.testing.assert_allclose(dropped.weight_n[:16], 1 / 4)


def fingerprint(c):
  """All that a setting can change: advantages, weights, loss and its gradient on random arrays."""
  rng = np.random.default_rng(2)
  uniform = [Rollout("u", (1, i), (3,) * n, (-1.0,) * n, 0.4) for i, n in enumerate((3, 2))]
  rollouts = make_rollouts() + uniform
  layout = Layout(rollouts)
  kl_n, value_n = rng.random(layout.size), rng.normal(size=layout.size)
  reward_B, _ = shaped_rewards(rollouts, c)
  kl_n = kl_n if c.has_kl_in_reward else None
  plan = make_plan(rollouts, layout, c, reward_B, kl_n, value_n if c.has_critic else None)
  logp, old, ref, sampled = (jnp.asarray(x) for x in rng.normal(-1, 0.5, (4, layout.size)))
  data = {"advantage": plan.advantage_n, "weight": plan.weight_n, "old_logp": old}
  data |= {"ref_logp": ref, "sampler_logp": sampled, "is_target": plan.weight_n > 0}
  data = jax.tree.map(jnp.asarray, data)
  row = np.repeat(np.arange(10), layout.length_B)

  def row_sum(x):
    return jax.ops.segment_sum(x, row, 10)[row]

  scalars = {"has_old": jnp.bool_(True), "total": plan.total, "entropy_coef": c.entropy_coef}
  fn = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
  (loss, _), grads = fn(logp, jnp.abs(ref), data, scalars, c, row_sum)
  returns = np.zeros(layout.size) if plan.return_n is None else plan.return_n
  parts = [plan.advantage_n, plan.weight_n, returns, np.ravel(loss), *map(np.ravel, grads)]
  return np.nan_to_num(np.concatenate(parts))


GAE = {"advantage": "gae"}
FIELDS = {
  "advantage": ({}, "dr_grpo"),
  "std_eps": ({}, 1.0),
  "gamma": (GAE, 0.5),
  "lam": (GAE, 0.5),
  "loss": ({}, "sapo"),
  "clip_low": ({}, 0.01),
  "clip_high": ({}, 0.01),
  "dual_clip": ({}, 1.1),
  "ratio_max": ({}, 1.5),
  "cispo_max": ({"loss": "cispo"}, 1.1),
  "sapo_tau_pos": ({"loss": "sapo"}, 2.0),
  "sapo_tau_neg": ({"loss": "sapo"}, 2.0),
  "beta": ({}, 0.5),
  "kl": ({"beta": 0.5}, "k1"),
  "kl_in": ({"beta": 0.5}, "reward"),
  "entropy_coef": ({}, 0.1),
  "importance": ({}, "token_truncate"),
  "importance_min": ({"importance": "token_mask"}, 0.9),
  "importance_max": ({"importance": "sequence_mask"}, 1.1),
  "aggregation": ({}, "sequence_mean"),
  "horizon": ({"aggregation": "constant", "horizon": 9}, 7),
  "overlong_buffer": ({"horizon": 8}, 4),
  "overlong_penalty": ({"horizon": 8, "overlong_buffer": 4}, 0.3),
  "mask_truncated": ({}, True),
  "drop_uniform": ({"aggregation": "sequence_sum"}, True),
}
# Tested with the learner (tests/test_grpo_algorithms.py) or the search; the last four are neutral.
ELSEWHERE = {"value_clip", "entropy_target", "entropy_delta", "entropy_min", "entropy_max"}
ELSEWHERE |= {"steps_per_batch", "refill", "group_size", "micro_batch", "vocab_chunk", "remat"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_changes_the_objective(name):
  before, value = FIELDS[name]
  base = GRPOConfig(**before)
  changed = dataclasses.replace(base, **{name: value})
  assert np.abs(fingerprint(changed) - fingerprint(base)).max() > 1e-4


def test_all_fields_are_tested_somewhere():
  assert set(FIELDS) | ELSEWHERE == {f.name for f in dataclasses.fields(GRPOConfig)}


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"advantage": "best"}, "config.grpo.advantage: expected one of grpo, dr_grpo"),
    ({"loss": "reinforce", "steps_per_batch": 2}, "set config.grpo.steps_per_batch=1"),
    ({"loss": "sapo", "dual_clip": 3.0}, "set config.grpo.dual_clip=0"),
    ({"dual_clip": 0.5}, "more than 1"),
    ({"ratio_max": 1.1}, "set config.grpo.ratio_max=0"),
    ({"kl_in": "reward"}, "raise config.grpo.beta"),
    ({"entropy_target": 1.0, "entropy_coef": 0.1, "entropy_max": 0.01}, "change one of the three"),
    ({"importance": "token_mask", "importance_min": 4.0}, "lower it"),
    ({"aggregation": "constant"}, "config.grpo.horizon = 0"),
    ({"overlong_buffer": 9, "horizon": 8}, "config.grpo.overlong_buffer = 9"),
    ({"advantage": "gae", "drop_uniform": True}, "config.grpo.drop_uniform=false"),
    ({"gamma": 1.5}, "config.grpo.gamma"),
    ({"sapo_tau_pos": 0.0}, "config.grpo.sapo_tau_pos"),
  ],
)
def test_combinations_that_cannot_work_name_their_fix(fields, message):
  with pytest.raises(UserError, match=message):
    GRPOConfig(**fields)


def test_reward_and_sampling_metrics():
  rollouts = make_rollouts()
  metrics = rollout_metrics(rollouts, GRPOConfig(horizon=8, overlong_buffer=4))
  shaped = np.array([r.reward for r in rollouts]) - np.clip((np.array(LENGTHS) - 4) / 4, 0, 1)
  assert metrics["reward"] == pytest.approx(np.nanmean(shaped))
  assert metrics["rewards/overlong/mean"] == pytest.approx(-(1 + 3 + 2) / 4 / 8)
  assert metrics["rewards/runs/mean"] == pytest.approx(np.nanmean([r.reward for r in rollouts]))
  stds = [shaped[:4].std(ddof=1), shaped[[4, 5, 7]].std(ddof=1)]
  assert metrics["reward_std"] == pytest.approx(np.mean(stds))
  assert metrics["frac_reward_zero_std"] == 0.0
  lengths = {"mean": 3.5, "min": 0, "max": 7}
  assert {k: metrics[f"completions/{k}_length"] for k in lengths} == lengths
  assert metrics["completions/clipped_ratio"] == 1 / 8
  got = sampling_metrics(np.array([-1.0, -2.0, -3.0]), np.array([-1.5, np.nan, -2.0]), None)
  name = "sampling/importance_sampling_ratio"
  assert got["sampling/sampling_logp_difference/mean"] == pytest.approx(0.75)
  assert got["sampling/sampling_logp_difference/max"] == pytest.approx(1.0)
  assert got[f"{name}/max"] == pytest.approx(np.exp(0.5))
  assert got[f"{name}/min"] == pytest.approx(np.exp(-1.0))
  assert sampling_metrics(np.ones(2), np.full(2, np.nan), None) == {}
