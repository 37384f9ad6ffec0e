"""The one parser of a config's string argument: `configs/NAME.py:model=qwen3-0.6b,smoke`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from awf.types import UserError

_TRUE, _FALSE = ("1", "true", "yes"), ("0", "false", "no")


@dataclasses.dataclass(frozen=True)
class Choice:
  """An argument that takes one of a few names."""

  default: str
  known: tuple[str, ...]

  def __init__(self, default: str, known: Iterable[str]) -> None:
    object.__setattr__(self, "default", default)
    object.__setattr__(self, "known", tuple(known))
    if default not in self.known:
      raise ValueError(f"the default {default!r} is not among {self.known}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
  """`; did you mean X?` for the nearest known name, or an empty string."""
  near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f"; did you mean {near[0]}?" if near else ""


def parse_args(arg: str | None, **spec: Any) -> SimpleNamespace:
  """Parses a config's comma-separated argument against the names that the config knows.

  Args:
    arg: text after the colon of `--config=FILE:ARG`; None or "" leaves every default.
    **spec: name -> default. The default's type is the argument's type (bool, int, float, str); a
      `Choice` takes one of its names. A bool may be given by its name alone; the value of a
      `Choice` too (`aime.py:qwen3-0.6b`).

  Returns:
    A namespace with one attribute per name of `spec`.

  Raises:
    UserError: unknown name, ill-typed value, or a name given twice; the message lists what is
      known.
  """
  defaults = {k: v.default if isinstance(v, Choice) else v for k, v in spec.items()}
  values = dict(defaults)
  given: set[str] = set()
  for part in filter(None, (p.strip() for p in (arg or "").split(","))):
    name, _, text = (p.strip() for p in part.partition("="))
    if "=" not in part and name not in spec:
      owner = next((k for k, v in spec.items() if isinstance(v, Choice) and name in v.known), None)
      name, text = (owner, name) if owner else (name, text)
    if name not in spec:
      names = [*spec, *(k for v in spec.values() if isinstance(v, Choice) for k in v.known)]
      raise UserError(
        f"config argument {part!r} is unknown; known: {describe(spec)}{did_you_mean(name, names)}"
      )
    if name in given:
      raise UserError(f"config argument {name!r} is given twice in {arg!r}; give it once")
    given.add(name)
    values[name] = _convert(name, text, spec[name], bare="=" not in part)
  return SimpleNamespace(**values)


def describe(spec: dict[str, Any]) -> str:
  """One line that lists the arguments of a config with their types or choices."""
  if not spec:
    return "none (this config takes no argument)"
  shown = []
  for name, default in spec.items():
    if isinstance(default, Choice):
      shown.append(f"{name}={'|'.join(default.known)}")
    else:
      shown.append(name if isinstance(default, bool) else f"{name}=<{type(default).__name__}>")
  return ", ".join(shown)


def _convert(name: str, text: str, default: Any, bare: bool) -> Any:
  """Turns the text of one argument into the type of its default."""
  if isinstance(default, Choice):
    if text in default.known:
      return text
    raise UserError(
      f"config argument {name}={text!r}: expected one of {', '.join(default.known)}"
      f"{did_you_mean(text, default.known)}"
    )
  if isinstance(default, bool):
    if bare or text.lower() in _TRUE:
      return True
    if text.lower() in _FALSE:
      return False
  elif not bare:
    try:
      return type(default)(text)
    except ValueError:
      pass  # reported below together with every other ill-typed value
  raise UserError(f"config argument {name}={text!r}: expected {type(default).__name__}")
