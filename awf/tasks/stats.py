"""pass@k, solved@k and bootstrap intervals (NumPy)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
  """Chance that at least one of k samples drawn without replacement is correct.

  Args:
    num_samples: n, samples of the problem.
    num_correct: c, correct ones among them, 0 <= c <= n.
    k: 1 <= k <= n; a larger k cannot be estimated from n samples.

  Returns:
    1 - C(n - c, k) / C(n, k), unbiased, exact to rounding.

  Raises:
    ValueError: arguments out of these ranges.

  Source: Chen et al. 2021, arXiv:2107.03374, equation 1.
  """
  if not 0 <= num_correct <= num_samples:
    raise ValueError(f"expected 0 <= num_correct <= {num_samples}, got {num_correct}")
  if not 1 <= k <= num_samples:
    raise ValueError(
      f"pass@{k} needs 1 <= k <= {num_samples} samples per problem: raise config.eval.samples or "
      "lower config.eval.pass_k"
    )
  return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def pass_at_k_values(correct: Mapping[str, Sequence[bool]], k: int) -> dict[str, float]:
  """pass@k of each problem from its samples' verdicts; their mean is the data set's pass@k."""
  return {
    problem: pass_at_k(len(verdicts), sum(map(bool, verdicts)), k)
    for problem, verdicts in correct.items()
  }


def solved_at_k(solved: Sequence[Iterable[str]], problems: Sequence[str]) -> float:
  """Share of problems solved by any of the k workflows given.

  Args:
    solved: for each of the k best workflows, the ids of the problems that it solved.
    problems: ids of all problems.

  Raises:
    ValueError: no problem, or a solved problem that is not among them.
  """
  everything = set(problems)
  if not everything:
    raise ValueError("solved@k needs at least one problem")
  union = set().union(*map(set, solved)) if solved else set()
  if not union <= everything:
    raise ValueError(f"solved problems {sorted(union - everything)[:3]} are not in the data set")
  return len(union) / len(everything)


def bootstrap_interval(
  values: Sequence[float] | np.ndarray,
  groups: Sequence[Hashable] | None = None,
  n: int = 2000,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[float, float]:
  """Percentile bootstrap interval of the mean.

  Args:
    values: float [M]; NaN (no value) is left out.
    groups: [M] labels of values that belong together (samples of a problem); whole groups are
      drawn.
    n: resamples.
    seed: of the resampling; equal arguments give equal intervals.
    level: coverage in (0, 1).

  Returns:
    (low, high).

  Raises:
    ValueError: no finite value, n < 1, level outside (0, 1) or labels of another length.
  """
  values_M = np.asarray(values, dtype=np.float64)
  labels = list(range(len(values_M))) if groups is None else list(groups)
  if len(labels) != len(values_M):
    raise ValueError(f"expected one group per value, got {len(labels)} for {len(values_M)}")
  keep_M = np.isfinite(values_M)
  numbering: dict[Hashable, int] = {}
  group_M = np.array(
    [
      numbering.setdefault(label, len(numbering))
      for label, keep in zip(labels, keep_M, strict=True)
      if keep
    ],
    dtype=np.int64,
  )
  if not len(group_M):
    raise ValueError("a bootstrap interval needs at least one finite value")
  total_Q = np.bincount(group_M, weights=values_M[keep_M])
  count_Q = np.bincount(group_M).astype(np.float64)
  drawn = _resample(total_Q, n, seed, level)
  means = np.array([total_Q[index_Q].sum() / count_Q[index_Q].sum() for index_Q in drawn])
  return _percentiles(means, level)


def paired_bootstrap(
  before: Mapping[str, Sequence[float]],
  after: Mapping[str, Sequence[float]],
  n: int = 2000,
  seed: int = 0,
  level: float = 0.95,
) -> tuple[float, float, float]:
  """Gain of `after` over `before`, paired by parent: parents are drawn, never single proposals.

  Args:
    before, after: parent -> scores of its proposals; NaN is left out, as is a parent without a
      finite score on both sides.

  Returns:
    (mean over parents of the difference of means, low, high).

  Raises:
    ValueError: different parents, or none that is left.
  """
  if before.keys() != after.keys():
    raise ValueError("before and after must have the same parents")
  means = []
  for parent in sorted(before):
    pair = [np.asarray(scores[parent], dtype=np.float64) for scores in (before, after)]
    old, new = (scores[np.isfinite(scores)] for scores in pair)
    if len(old) and len(new):
      means.append(new.mean() - old.mean())
  if not means:
    raise ValueError("a paired bootstrap needs a parent with scores on both sides")
  gain_Q = np.array(means)
  drawn = _resample(gain_Q, n, seed, level)
  low, high = _percentiles(np.array([gain_Q[index_Q].mean() for index_Q in drawn]), level)
  return float(gain_Q.mean()), low, high


def _resample(values_Q: np.ndarray, n: int, seed: int, level: float) -> Iterable[np.ndarray]:
  if n < 1 or not 0.0 < level < 1.0:
    raise ValueError(
      f"expected n >= 1 and 0 < level < 1, got {n} and {level}: config.eval.bootstrap"
    )
  generator = np.random.default_rng(seed)
  size = len(values_Q)
  return (generator.integers(0, size, size) for _ in range(n))


def _percentiles(means: np.ndarray, level: float) -> tuple[float, float]:
  tail = (1.0 - level) / 2.0
  low, high = np.quantile(means, [tail, 1.0 - tail])
  return float(low), float(high)
