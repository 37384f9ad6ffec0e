"""Operators of a user's own: what `package.module:Class` in config.search.operators names.

The parent learns their interface here, for prompts and the static check; the sandbox's zygote
imports their modules before jobs are forked, and graphs find the classes in `operator`.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from awf.config_io import load_class
from awf.types import UserError
from awf.workflow import contract
from awf.workflow.operators import CLASSES, Operator

_FIELD = "config.search.operators"
_IMPORT = "from awf.workflow.operators import Operator\n"  # absent where AFlow reads the file
_OWN: dict[str, type[Operator]] = {}


def operator_names(entries: Sequence[str]) -> tuple[str, ...]:
  """The names in graphs of entries of config.search.operators: their classes' names."""
  return tuple(entry.rpartition(":")[2] for entry in entries)


def add_operators(entries: Sequence[str]) -> tuple[str, ...]:
  """Makes the user's own operators known; returns their modules, which the sandbox preloads.

  Raises:
    UserError: no such class, a name that is taken, or a class without what prompts need.
  """
  modules = []
  for entry in entries:
    if ":" not in entry:
      continue
    kind = load_class(entry, _FIELD, Operator)
    if kind.__name__ in {one.__name__ for one in CLASSES}:
      raise UserError(f"{_FIELD} = {entry!r}: the name {kind.__name__} is taken; choose another")
    contract.OPERATORS[kind.__name__] = _spec_of(kind, entry)
    _OWN[kind.__name__] = kind
    modules.append(entry.partition(":")[0])
  return tuple(modules)


def own_sources(names: Sequence[str]) -> str:
  """The modules of the user's own operators among `names`, to stand below ours in one file."""
  modules = dict.fromkeys(_OWN[name].__module__ for name in names if name in _OWN)
  texts = (inspect.getsource(sys.modules[name]).replace(_IMPORT, "") for name in modules)
  return "".join(f"\n\n{text.strip()}\n" for text in texts)


def _spec_of(kind: type[Operator], entry: str) -> contract.OperatorSpec:
  """What graphs and prompts see of a class: its arguments, keys and the docstring's first line."""
  parameters = list(inspect.signature(kind.__call__).parameters.values())[1:]
  keys, text = getattr(kind, "keys", ()), (kind.__doc__ or "").strip()
  if kind.__call__ is Operator.__call__ or any(
    p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters
  ):
    raise UserError(f"{_FIELD} = {entry!r}: expected `async def __call__(self, ...)` with names")
  if not text or not (isinstance(keys, tuple) and keys and all(isinstance(k, str) for k in keys)):
    raise UserError(
      f"{_FIELD} = {entry!r}: expected a docstring for the optimiser and `keys`, a tuple with the "
      'names in the result, such as keys = ("response",)'
    )
  attribute = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()
  arguments = ", ".join(_shown(p) for p in parameters)
  named = ("key " if len(keys) == 1 else "keys ") + " and ".join(f"'{key}'" for key in keys)
  return contract.OperatorSpec(
    name=kind.__name__,
    attribute=attribute,
    required=tuple(p.name for p in parameters if p.default is p.empty),
    optional=tuple(p.name for p in parameters if p.default is not p.empty),
    keys=keys,
    description=text.splitlines()[0].rstrip("."),
    interface=f"{attribute}({arguments}) -> dict with {named}",
  )


def _shown(parameter: inspect.Parameter) -> str:
  """`name: type = default` as it stands in a signature, quotes of annotations taken off."""
  kind: Any = parameter.annotation
  if isinstance(kind, str):
    parameter = parameter.replace(annotation=parameter.empty)
    name, equals, default = str(parameter).partition("=")
    return f"{name}: {kind}" + (f" = {default}" if equals else "")
  return str(parameter)
