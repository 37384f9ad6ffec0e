"""Tokens are drawn from the distribution that the settings describe, with noise of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from awf.sampler.draw import VOCAB_BLOCK, draw, uniforms

V = 2 * VOCAB_BLOCK + 44  # three blocks, the last one not full
N = 20_000
SETTINGS = [  # temperature, top_p, top_k, min_p
  (1.0, 1.0, 0, 0.0),
  (0.5, 1.0, 0, 0.0),
  (1.7, 1.0, 0, 0.0),
  (1.0, 1.0, 7, 0.0),
  (1.0, 0.8, 0, 0.0),
  (0.7, 0.9, 0, 0.0),
  (1.3, 0.6, 40, 0.0),
  (1.0, 0.999, 250, 0.0),
  (0.8, 0.05, 5, 0.0),
  (1.0, 1.0, 0, 0.05),
  (1.6, 1.0, 0, 0.2),
  (1.0, 1.0, 9, 0.1),
  (1.4, 0.7, 0, 0.15),
  (1.4, 0.95, 60, 0.02),
  (0.6, 0.9, 30, 1.0),
]
draw_rows = jax.jit(draw)


@pytest.fixture(scope="module")
def logits_V():
  return (2.0 * np.random.default_rng(0).standard_normal(V)).astype(np.float32)


def reference(logits_V, temperature, top_p, top_k, min_p=0.0):
  """Probabilities [V] in float64, by sorting: top-k first, then the smallest set of mass top_p,
  then what has min_p of the likeliest one's probability.
  """
  scaled = logits_V.astype(np.float64) / temperature
  order = np.argsort(-scaled)
  kept = order[: top_k or None]
  weights = np.exp(scaled[kept] - scaled.max())
  share = np.cumsum(weights) / weights.sum()
  kept = kept[: 1 + np.searchsorted(share, top_p)] if top_p < 1 else kept
  kept = kept[scaled[kept] >= scaled.max() + (np.log(min_p) if min_p else -np.inf) - 1e-12]
  probability = np.zeros(len(logits_V))
  probability[kept] = np.exp(scaled[kept] - scaled.max())
  return probability / probability.sum()


def noise(n, seed=(1, 2), sample=0, start=0):
  seed_B2 = np.tile(np.asarray(seed, np.uint32), (n, 1))
  index_B = np.arange(start, start + n, dtype=np.int32)
  return np.asarray(uniforms(seed_B2, np.full(n, sample, np.int32), index_B))


def settings_of(n, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0):
  temperature_B, top_p_B, min_p_B = (np.full(n, x, np.float32) for x in (temperature, top_p, min_p))
  return temperature_B, top_p_B, np.full(n, top_k, np.int32), min_p_B


def drawn_full(logits_BV, uniform_B, *settings, wants_full=True):
  """(ids, log-probs as drawn, log-probs before the cut)."""
  wants_B = np.broadcast_to(np.asarray(wants_full), len(logits_BV))
  return [np.asarray(x) for x in draw_rows(jnp.asarray(logits_BV), uniform_B, *settings, wants_B)]


def drawn(logits_BV, uniform_B, *settings):
  return drawn_full(logits_BV, uniform_B, *settings, wants_full=False)[:2]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_frequencies_and_logprobs_are_those_of_the_truncated_softmax(logits_V, setting):
  want_V = reference(logits_V, *setting)
  rows = np.broadcast_to(logits_V, (N, V))
  id_B, logp_B, full_B = drawn_full(rows, noise(N), *settings_of(N, *setting))
  assert (want_V[id_B] > 0).all()
  np.testing.assert_allclose(logp_B, np.log(want_V[id_B]), atol=2e-5)
  uncut_V = reference(logits_V, setting[0], 1.0, 0)
  np.testing.assert_allclose(full_B, np.log(uncut_V[id_B]), atol=2e-5)
  count_V = np.bincount(id_B, minlength=V)
  is_common = N * want_V >= 5
  count = np.append(count_V[is_common], count_V[~is_common].sum())
  expected = N * np.append(want_V[is_common], want_V[~is_common].sum())
  count, expected = count[expected > 0], expected[expected > 0]
  if len(count) > 1:
    assert 1e-4 < stats.chisquare(count, expected).pvalue
  else:
    assert count[0] == N


def test_the_chi_square_notices_a_wrong_temperature(logits_V):
  rows = np.broadcast_to(logits_V, (N, V))
  id_B, _ = drawn(rows, noise(N), *settings_of(N, temperature=1.05))
  want_V = reference(logits_V, 1.0, 1.0, 0)
  is_common = N * want_V >= 5
  count = np.append(np.bincount(id_B, minlength=V)[is_common], 0)
  count[-1] = N - count.sum()
  expected = N * np.append(want_V[is_common], want_V[~is_common].sum())
  assert stats.chisquare(count, expected).pvalue < 1e-4


def test_one_uniform_picks_the_token_by_the_inverse_cdf(logits_V):
  uniform_B = np.linspace(0, 1, 4001, endpoint=False, dtype=np.float32)
  n = len(uniform_B)
  for setting in SETTINGS:
    rows = np.broadcast_to(logits_V, (n, V))
    id_B, _ = drawn(rows, uniform_B, *settings_of(n, *setting))
    cdf_V = np.cumsum(reference(logits_V, *setting))
    assert (np.diff(id_B) >= 0).all()
    low, high = (np.searchsorted(cdf_V, uniform_B + e, side="right") for e in (-1e-5, 1e-5))
    assert ((low <= id_B) & (id_B <= np.minimum(high, V - 1))).all()


def test_the_ends_of_the_uniform_stay_inside_the_support():
  logits_V = -20 - np.arange(V, dtype=np.float32) / 100  # no ties
  logits_V[[140, 141, 260]] = 2.0, 1.0, 3.0
  ends = np.array([0.0, np.finfo(np.float32).tiny, 0.5, 1 - 2**-24], np.float32)
  for top_p, top_k in ((1.0, 3), (0.9, 0), (0.99, 3)):
    id_B, logp_B = drawn(np.tile(logits_V, (4, 1)), ends, *settings_of(4, 1.0, top_p, top_k))
    allowed = np.flatnonzero(reference(logits_V, 1.0, top_p, top_k))
    assert np.isin(id_B, allowed).all() and np.isfinite(logp_B).all()
    assert id_B[0] == allowed[0] and id_B[-1] == allowed[-1]


def test_greedy_is_argmax_under_the_plain_softmax():
  rng = np.random.default_rng(1)
  logits_BV = 3 * rng.standard_normal((64, V)).astype(np.float32)
  for cuts in ((1.0, 0, 0.0), (0.3, 2, 0.0), (1.0, 0, 0.5)):
    id_B, logp_B, full_B = drawn_full(logits_BV, noise(64), *settings_of(64, 0.0, *cuts))
    np.testing.assert_array_equal(logp_B, full_B)
    np.testing.assert_array_equal(id_B, logits_BV.argmax(-1))
    want = [np.log(reference(row, 1.0, 1.0, 0).max()) for row in logits_BV]
    np.testing.assert_allclose(logp_B, want, atol=2e-5)


def test_top_k_of_one_tiny_top_p_and_min_p_of_one_are_argmax_with_certainty():
  logits_BV = np.random.default_rng(2).standard_normal((32, V)).astype(np.float32)
  for cuts in ((1.0, 1, 0.0), (1e-6, 0, 0.0), (1.0, 0, 1.0)):
    id_B, logp_B = drawn(logits_BV, noise(32), *settings_of(32, 1.0, *cuts))
    np.testing.assert_array_equal(id_B, logits_BV.argmax(-1))
    np.testing.assert_allclose(logp_B, 0, atol=1e-6)


def test_tokens_that_tie_with_the_last_kept_one_are_kept():
  logits_V = np.zeros(V, np.float32)
  logits_V[:4] = 5.0, 4.0, 4.0, 4.0
  n = 2000
  rows = np.broadcast_to(logits_V, (n, V))
  id_B, _ = drawn(rows, noise(n), *settings_of(n, 1.0, 1.0, 2))
  assert set(id_B) == {0, 1, 2, 3}


def test_a_top_k_beyond_the_vocabulary_is_off(logits_V):
  rows = np.broadcast_to(logits_V, (500, V))
  free = drawn(rows, noise(500), *settings_of(500))
  wide = drawn(rows, noise(500), *settings_of(500, top_k=10 * V))
  np.testing.assert_array_equal(free[0], wide[0])
  np.testing.assert_array_equal(free[1], wide[1])


def test_rows_depend_on_nothing_but_themselves():
  """Neighbours switch branches on and off (greedy, each cut, second log-prob): a row keeps every
  bit.
  """
  rng = np.random.default_rng(3)
  n = 8 * len(SETTINGS)
  logits_BV = 2 * rng.standard_normal((n, V)).astype(np.float32)
  table = np.tile(np.asarray([*SETTINGS[1:], (0.0, 1.0, 0, 0.0)]), (8, 1))
  kinds = (np.float32, np.float32, np.int32, np.float32)
  columns = [table[:, i].astype(kind) for i, kind in enumerate(kinds)]
  mixed = drawn_full(logits_BV, noise(n), *columns)
  for i, setting in enumerate(table[: len(SETTINGS)]):
    alike = drawn_full(logits_BV, noise(n), *settings_of(n, *setting))
    for one, other in zip(mixed, alike, strict=True):
      np.testing.assert_array_equal(one[i :: len(SETTINGS)], other[i :: len(SETTINGS)])
  few = np.arange(n) % 5 == 0  # want the second one
  some = drawn_full(logits_BV, noise(n), *columns, wants_full=few)
  for one, other in zip(mixed[:2], some[:2], strict=True):
    np.testing.assert_array_equal(one, other)
  np.testing.assert_array_equal(mixed[2][few], some[2][few])
  order = rng.permutation(n)
  moved = drawn_full(logits_BV[order], noise(n)[order], *(column[order] for column in columns))
  for one, other in zip(mixed, moved, strict=True):
    np.testing.assert_array_equal(one[order], other)


def test_settings_are_traced_not_compiled():
  traces = []
  count = jax.jit(lambda *args: traces.append(1) or draw(*args))
  logits_BV = np.random.default_rng(4).standard_normal((4, V)).astype(np.float32)
  for i, setting in enumerate(SETTINGS):
    count(logits_BV, noise(4), *settings_of(4, *setting), np.full(4, i % 2 == 0))
  assert len(traces) == 1


def test_noise_is_uniform_and_differs_between_positions_samples_and_requests():
  base = noise(N)
  assert base.dtype == np.float32 and 0 <= base.min() and base.max() < 1
  assert stats.kstest(base, "uniform").pvalue > 1e-3
  assert len(np.unique(base)) > 0.99 * N
  for other in (noise(N, sample=1), noise(N, (1, 3)), noise(N, (2, 2)), noise(N, (2, 1))):
    assert np.mean(other == base) < 1e-3
    assert abs(np.corrcoef(base, other)[0, 1]) < 0.03
  assert abs(np.corrcoef(base[:-1], base[1:])[0, 1]) < 0.03


def test_noise_is_a_function_of_seed_sample_and_position_alone():
  np.testing.assert_array_equal(noise(100)[37:40], noise(3, start=37))
  np.testing.assert_array_equal(noise(1, (7, 9), sample=5, start=2), noise(3, (7, 9), 5)[2:])


def test_streams_of_noise_differ_for_every_seed_sample_and_position():
  """Compared as streams of 24 bits: single float32 uniforms must meet by chance."""
  streams = {}
  for seed in [(0, 0), (0, 1), (1, 0), (1, 1), (2**31, 5), (2**31 - 1, 2**32 - 1)]:
    for sample in (0, 1, 2, 255, 2**20):
      for start in (0, 1, 7, 1000):
        streams[seed, sample, start] = tuple(noise(6, seed, sample, start).tolist())
  assert len(set(streams.values())) == len(streams) == 120
  for seed, sample, start in streams:
    assert streams[seed, sample, start] == tuple(noise(6, seed, sample, start).tolist())


def test_the_second_log_prob_costs_a_pass_only_where_it_is_asked_for():
  """The program has the pass in a branch of its own, which needs a row that is cut and asks."""
  text = draw_rows.lower(
    np.zeros((4, V), np.float32), noise(4), *settings_of(4), np.zeros(4, bool)
  ).as_text(debug_info=True)
  assert "full_logp" in text
  calls = []

  def pass_over(x, **options):
    jax.debug.callback(lambda: calls.append(1))
    return jnp.log(jnp.sum(jnp.exp(x), **options))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("awf.sampler.draw.jax.nn.logsumexp", pass_over)
    watched = jax.jit(lambda *args: draw(*args))
    for setting, wants, passes in (
      ((1.0, 0.8, 0, 0.0), False, 0),
      ((1.0, 1.0, 0, 0.0), True, 0),
      ((0.0, 0.8, 3, 0.1), True, 0),
      ((1.0, 0.8, 0, 0.0), True, 1),
      ((1.0, 1.0, 3, 0.0), True, 1),
      ((1.0, 1.0, 0, 0.1), True, 1),
    ):
      calls.clear()
      logits_BV = np.random.default_rng(5).standard_normal((4, V)).astype(np.float32)
      jax.block_until_ready(
        watched(logits_BV, noise(4), *settings_of(4, *setting), np.full(4, wants))
      )
      jax.effects_barrier()
      assert len(calls) == passes, setting
