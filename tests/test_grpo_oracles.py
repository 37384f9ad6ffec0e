"""The objective against numbers that TRL 1.16.0 and verl 0.9.1 gave (tests/parity makes them)."""

import numpy as np
import oracle_cases as oracle
import pytest


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_losses_gradients_and_advantages_equal_those_of_trl_and_verl(dtype):
  with np.load(oracle.GOLDEN) as golden:
    g = dict(golden)
  cases = [(f"TRL {i}", oracle.trl_case(i)[0]) for i in range(oracle.NUM_TRL)]
  cases += [(f"verl {i}", oracle.verl_case(i)[0]) for i in range(oracle.NUM_VERL)]
  assert len(cases) == len(g["loss"]) >= 200
  exact = [(w, c, g["loss"][i], g["grad"][i]) for i, (w, c) in enumerate(cases)]
  if dtype == "float64":  # see verl_case
    exact = [x for x in exact if not (x[0].startswith("verl") and x[1].config.loss == "sapo")]
  gaes = list(zip(range(oracle.NUM_GAE), g["gae"], g["returns"], g["value_loss"], strict=True))
  oracle.check(exact, list(enumerate(g["advantage"])), gaes, dtype)


def test_cases_cover_the_corners():
  cases = [oracle.trl_case(i)[0] for i in range(oracle.NUM_TRL)]
  lengths = [c.arrays["mask"].sum(1) for c in cases]
  assert sum(np.any(n == 0) for n in lengths) > 20
  assert sum(np.any(n == 1) for n in lengths) > 80
  holes = [np.any(np.diff(c.arrays["mask"], axis=1) > 0) for c in cases]
  assert sum(holes) > 50
  drawn = [oracle.advantage_case(i) for i in range(oracle.NUM_ADVANTAGES)]
  assert sum(np.isnan(d[1]).any() for d in drawn) > 5
  assert sum(len(set(d[2])) == oracle.ROWS for d in drawn) > 3  # groups of one
  assert len({c.config.loss for c in cases}) == 4 and len({c.config.importance for c in cases}) == 5
