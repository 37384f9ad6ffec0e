"""Tokens are drawn from the distribution that the settings describe, with noise of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from awf.sampler.draw import VOCAB_BLOCK, draw, uniforms

V = 2 * VOCAB_BLOCK + 44  # three blocks, the last one not full
N = 20_000
SETTINGS = [  # temperature, top_p, top_k
  (1.0, 1.0, 0),
  (0.5, 1.0, 0),
  (1.7, 1.0, 0),
  (1.0, 1.0, 7),
  (1.0, 0.8, 0),
  (0.7, 0.9, 0),
  (1.3, 0.6, 40),
  (1.0, 0.999, 250),
  (0.8, 0.05, 5),
]
draw_rows = jax.jit(draw)


@pytest.fixture(scope="module")
def logits_V():
  return (2.0 * np.random.default_rng(0).standard_normal(V)).astype(np.float32)


def reference(logits_V, temperature, top_p, top_k):
  """Probabilities [V] in float64, by sorting: top-k first, then the smallest set of mass top_p."""
  scaled = logits_V.astype(np.float64) / temperature
  order = np.argsort(-scaled)
  kept = order[: top_k or None]
  weights = np.exp(scaled[kept] - scaled.max())
  share = np.cumsum(weights) / weights.sum()
  kept = kept[: 1 + np.searchsorted(share, top_p)] if top_p < 1 else kept
  probability = np.zeros(len(logits_V))
  probability[kept] = np.exp(scaled[kept] - scaled.max())
  return probability / probability.sum()


def noise(n, seed=(1, 2), sample=0, start=0):
  seed_B2 = np.tile(np.asarray(seed, np.uint32), (n, 1))
  index_B = np.arange(start, start + n, dtype=np.int32)
  return np.asarray(uniforms(seed_B2, np.full(n, sample, np.int32), index_B))


def settings_of(n, temperature=1.0, top_p=1.0, top_k=0):
  return np.full(n, temperature, np.float32), np.full(n, top_p, np.float32), np.full(n, top_k)


def drawn(logits_BV, uniform_B, temperature_B, top_p_B, top_k_B):
  id_B, logp_B = draw_rows(
    jnp.asarray(logits_BV), uniform_B, temperature_B, top_p_B, top_k_B.astype(np.int32)
  )
  return np.asarray(id_B), np.asarray(logp_B)


@pytest.mark.parametrize(("temperature", "top_p", "top_k"), SETTINGS)
def test_frequencies_and_logprobs_are_those_of_the_truncated_softmax(
  logits_V, temperature, top_p, top_k
):
  want_V = reference(logits_V, temperature, top_p, top_k)
  rows = np.broadcast_to(logits_V, (N, V))
  id_B, logp_B = drawn(rows, noise(N), *settings_of(N, temperature, top_p, top_k))
  assert (want_V[id_B] > 0).all()
  np.testing.assert_allclose(logp_B, np.log(want_V[id_B]), atol=2e-5)
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
  for temperature, top_p, top_k in SETTINGS:
    rows = np.broadcast_to(logits_V, (n, V))
    id_B, _ = drawn(rows, uniform_B, *settings_of(n, temperature, top_p, top_k))
    cdf_V = np.cumsum(reference(logits_V, temperature, top_p, top_k))
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
  for top_p, top_k in ((1.0, 0), (0.3, 2)):
    id_B, logp_B = drawn(logits_BV, noise(64), *settings_of(64, 0.0, top_p, top_k))
    np.testing.assert_array_equal(id_B, logits_BV.argmax(-1))
    want = [np.log(reference(row, 1.0, 1.0, 0).max()) for row in logits_BV]
    np.testing.assert_allclose(logp_B, want, atol=2e-5)


def test_top_k_of_one_and_tiny_top_p_are_argmax_with_certainty():
  logits_BV = np.random.default_rng(2).standard_normal((32, V)).astype(np.float32)
  for top_p, top_k in ((1.0, 1), (1e-6, 0)):
    id_B, logp_B = drawn(logits_BV, noise(32), *settings_of(32, 1.0, top_p, top_k))
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
  """Neighbours switch branches on and off (greedy, top-k, top-p): a row keeps every bit."""
  rng = np.random.default_rng(3)
  n = 8 * len(SETTINGS)
  logits_BV = 2 * rng.standard_normal((n, V)).astype(np.float32)
  table = np.tile(np.asarray([*SETTINGS[1:], (0.0, 1.0, 0)]), (8, 1))
  columns = (table[:, 0].astype(np.float32), table[:, 1].astype(np.float32), table[:, 2])
  mixed = drawn(logits_BV, noise(n), *columns)
  for i, setting in enumerate(table[: len(SETTINGS)]):
    alike = drawn(logits_BV, noise(n), *settings_of(n, *setting))
    for one, other in zip(mixed, alike, strict=True):
      np.testing.assert_array_equal(one[i :: len(SETTINGS)], other[i :: len(SETTINGS)])
  order = rng.permutation(n)
  moved = drawn(logits_BV[order], noise(n)[order], *(column[order] for column in columns))
  for one, other in zip(mixed, moved, strict=True):
    np.testing.assert_array_equal(one[order], other)


def test_settings_are_traced_not_compiled():
  traces = []
  count = jax.jit(lambda *args: traces.append(1) or draw(*args))
  logits_BV = np.random.default_rng(4).standard_normal((4, V)).astype(np.float32)
  for setting in SETTINGS:
    temperature_B, top_p_B, top_k_B = settings_of(4, *setting)
    count(logits_BV, noise(4), temperature_B, top_p_B, top_k_B.astype(np.int32))
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
