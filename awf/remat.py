"""Which values of a layer are kept for the backward pass, by name; others are computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from awf.types import UserError

_SUFFIX = "_saveable"
# Policies of jax.checkpoint that take no arguments; each is known with and without the suffix.
POLICIES = (
  "everything",
  "nothing",
  "dots",
  "dots_with_no_batch_dims",
)


def remat_name(value: bool | str) -> str:
  """`config.grpo.remat` in its one spelling: none, full, or a policy's name without suffix.

  Args:
    value: False or "none" keeps all; True or "full" keeps a layer's input alone; else the name of a
      policy of jax.checkpoint, for instance "dots_with_no_batch_dims".

  Raises:
    UserError: none of these.
  """
  text = str(value).lower().removesuffix(_SUFFIX)
  name = {"false": "none", "true": "full"}.get(text, text)
  if name not in ("none", "full", *POLICIES):
    raise UserError(
      f"config.grpo.remat: expected none, full or one of {', '.join(POLICIES)}, got {value!r}"
    )
  return name


def remat_wrapper(value: bool | str, lift: Callable[..., Any] | None = None) -> Callable[..., Any]:
  """What to wrap a layer in: identity, or `lift` (None: jax.checkpoint) with the policy."""
  import jax  # configs are checked without it

  name = remat_name(value)
  if name == "none":
    return lambda layer, **_: layer
  policy = None if name == "full" else getattr(jax.checkpoint_policies, name + _SUFFIX)
  return lambda layer, **options: (lift or jax.checkpoint)(layer, policy=policy, **options)
