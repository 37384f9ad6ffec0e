"""The nearest change of named fields that makes a config fit, found by planning each candidate."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

from ml_collections import ConfigDict

from awf.chips import GIB
from awf.config_io import set_field
from awf.plan_estimate import is_full
from awf.plan_target import Target
from awf.types import UserError

log = logging.getLogger("awf")

Change = dict[str, Any]


def candidates(config: ConfigDict, sampler_is_the_peak: bool) -> Iterator[Change]:
  """Changes from mild to strong: one field, then more; those of the failing part first."""
  singles = [*_learner(config), *_sampler(config)]
  if sampler_is_the_peak:
    singles = [*_sampler(config), *_learner(config)]
  quant: list[Change] = [{"model.quant": "int8"}] if config.model.quant == "none" else []
  yield from singles
  yield from quant
  if config.model.quant == "int8":
    yield {"model.quant": "int4"}
  pairs = [a | b for a in _learner(config)[-1:] for b in _sampler(config)]
  yield from pairs
  for change in (*singles, *pairs):
    if quant:
      yield quant[0] | change


def _learner(config: ConfigDict) -> list[Change]:
  changes: list[Change] = [] if is_full(config) else [{"grpo.remat": "full"}]
  remat = changes[0] if changes else {}
  size = config.grpo.micro_batch
  while size > 1:
    size //= 2
    changes.append(remat | {"grpo.micro_batch": size})
  return changes


def _sampler(config: ConfigDict) -> list[Change]:
  changes: list[Change] = []
  rows = config.sampler.rows
  while rows > 1 and rows % 2 == 0:
    rows //= 2
    changes.append({"sampler.rows": rows})
  context = config.sampler.context // 2
  least = max(config.sampler.max_new_tokens, config.executor.max_new_tokens)
  if context > least:
    changes.append({"sampler.context": context})
  return changes


def nearest_change(
  config: ConfigDict,
  target: Target,
  result: dict[str, Any],
  plan: Callable[[ConfigDict, Target], dict[str, Any]],
) -> tuple[Change | None, list[dict[str, Any]]]:
  """Plans candidates in order until one fits, at most `config.plan.trials` of them.

  A candidate whose resident arrays alone are more than the chip has is left out without compiling:
  no program can make them smaller.

  Returns:
    (the change or None, every trial with its peak or the reason why it was not compiled).
  """
  from awf.plan_programs import make_setup

  peaks = {name: p["peak_gb"] for name, p in result["programs"].items()}
  peaks = peaks or {"sampler": 0.0}  # resident arrays alone are too much: most of them are KV
  capacity = result["capacity_gb"]
  tried: list[dict[str, Any]] = []
  left = config.plan.trials
  for change in candidates(config, max(peaks, key=lambda k: peaks[k]) == "sampler"):
    changed = copy.deepcopy(config)
    changed.unlock()
    for field, value in change.items():
      set_field(changed, field, value)
    try:
      least = sum(make_setup(changed, target).memory().values()) / GIB
    except UserError as error:
      tried.append({"change": change, "refused": str(error)})
      continue
    if least > capacity:
      tried.append({"change": change, "resident_gb": round(least, 3), "fits": False})
      continue
    if not left:
      break
    left -= 1
    log.info("plan: trying %s", change)
    found = plan(changed, target)
    tried.append({"change": change, "peak_gb": found["peak_gb"], "fits": found["fits"]})
    if found["fits"]:
      return change, tried
  return None, tried
