"""Loading a configuration from files and laying values over it, before anything heavy is imported.

A config file is a Python program with `get_config(arg)`; a YAML or JSON file can be laid over one.
Whatever a user gets wrong ends in one `UserError` that names the field, what was expected and the
nearest known field.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ml_collections import ConfigDict

from awf.types import UserError

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
_OBJECT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")

# Fields that hold a file or directory; a relative one is looked up below the working directory,
# then the repository.
PATH_FIELDS = (
  "model.path",
  "model.tokenizer",
  "lora.init_path",
  "task.path",
  "task.test_path",
  "search.starts",
  "search.workspace",
  "eval.parents",
  "aflow.path",
  "sft.path",
)


def load_config(spec: str) -> ConfigDict:
  """Loads `FILE.py` or `FILE.py:ARG` and returns what its `get_config` gives.

  Raises:
    UserError: no such file (the files beside it are listed), no `get_config`, or an argument it
      refuses.
  """
  text, _, arg = spec.partition(":")
  path = find_path(text)
  if not path.is_file():
    known = sorted(str(p) for p in Path("configs").glob("*.py") if has_config(p)) or sorted(
      f"configs/{p.name}" for p in (ROOT / "configs").glob("*.py") if has_config(p)
    )
    near = difflib.get_close_matches(text, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--config={text}: no such file; known: {', '.join(known)}{hint}")
  module = _import_file(path)
  if not hasattr(module, "get_config"):
    raise UserError(f"--config={text}: expected a Python file that defines get_config(arg)")
  config = module.get_config(arg) if arg else module.get_config()
  if not isinstance(config, ConfigDict):
    raise UserError(
      f"--config={text}: get_config must return a ConfigDict, got {type(config).__name__}"
    )
  if config.get("name", "base") == "base":
    config.name = path.stem
  return config


def has_config(path: Path) -> bool:
  """Whether a Python file is an experiment, that is, defines `get_config`."""
  return "\ndef get_config(" in path.read_text(encoding="utf-8", errors="replace")


def _import_file(path: Path):
  spec = importlib.util.spec_from_file_location(f"awf_config_{path.stem}", path)
  if spec is None or spec.loader is None:
    raise UserError(
      f"--config={path}: expected a Python file (for YAML or JSON: "
      f"--config=configs/from_file.py:{path})"
    )
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except SyntaxError as e:
    raise UserError(f"--config={path}: line {e.lineno}: {e.msg}") from e
  return module


def is_object_name(text: str) -> bool:
  """Whether a text has the form `package.module:name`; nothing is imported."""
  return _OBJECT.fullmatch(text) is not None


def load_object(name: str, field: str) -> Any:
  """Imports what `package.module:name` names, from Python's path or the working directory.

  Args:
    name: as the user gave it.
    field: the config field that holds it, for messages.

  Raises:
    UserError: another form, no such module or name, or a module that is not valid Python.
  """
  if not is_object_name(name):
    raise UserError(f"{field} = {name!r}: expected package.module:name")
  module, _, attribute = name.partition(":")
  here = os.getcwd()
  if here not in sys.path:
    sys.path.append(here)  # last: a user's file never hides a module of ours
  try:
    found = importlib.import_module(module)
  except (ImportError, SyntaxError) as error:
    raise UserError(f"cannot import {field} = {name!r}: {error}") from error
  if not hasattr(found, attribute):
    raise UserError(f"{field} = {name!r}: the module {module} has no {attribute!r}")
  return getattr(found, attribute)


def load_class(name: str, field: str, base: type[T]) -> type[T]:
  """As `load_object`, for a subclass of `base`.

  Raises:
    UserError: as `load_object`, or something else than a subclass.
  """
  found = load_object(name, field)
  if not (isinstance(found, type) and issubclass(found, base)):
    raise UserError(f"{field} = {name!r}: expected a subclass of {base.__name__}")
  return found


def named_paths(paths: tuple[str, ...]) -> dict[str, str]:
  """`NAME=DIR` entries (or `DIR`, whose last part is the name) of `config.lora.paths`.

  Raises:
    UserError: a name that is taken, reserved (base, policy) or no plain word.
  """
  found: dict[str, str] = {}
  for text in paths:
    name, is_named, path = text.partition("=")
    if not is_named:
      name, path = Path(text).name, text
    if not re.fullmatch(r"[\w.-]+", name) or name in found or name in ("base", "policy"):
      raise UserError(
        f"config.lora.paths: expected NAME=DIR with a name of its own beside base and policy, got "
        f"{text!r}"
      )
    found[name] = path
  return found


def find_path(text: str) -> Path:
  """The path as given, or below the repository when only that exists; `~` is expanded."""
  path = Path(text).expanduser()
  if not path.is_absolute() and not path.exists() and (ROOT / path).exists():
    return ROOT / path
  return path


def resolve_paths(config: ConfigDict) -> ConfigDict:
  """A copy in which relative paths that exist are absolute; hub ids stay as they are."""
  out = ConfigDict(config.to_dict())
  for name in PATH_FIELDS:
    text = get_field(out, name)
    path = find_path(text) if text else None
    if path is not None and path.exists():
      set_field(out, name, str(path.resolve()))
  return out


def flatten(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
  """`{"a.b": value}` for every leaf field."""
  return dict(_leaves(config, ""))


def _leaves(config: Mapping[str, Any] | ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
  for key, value in config.items():
    if isinstance(value, ConfigDict | Mapping):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


def get_field(config: ConfigDict, name: str) -> Any:
  """The value at the dotted `name`."""
  for part in name.split("."):
    config = config[part]
  return config


def set_field(config: ConfigDict, name: str, value: Any) -> None:
  """Sets the value at the dotted `name`; the caller has checked name and type."""
  *groups, last = name.split(".")
  for part in groups:
    config = config[part]
  config[last] = value


def nearest_field(config: ConfigDict, name: str) -> str:
  """The known leaf field nearest to `name`: by its last part first, then by its whole spelling."""
  known = sorted(flatten(config))
  last = name.rsplit(".", 1)[-1]
  same = [k for k in known if k.rsplit(".", 1)[-1] == last]
  scored = difflib.get_close_matches(name, same or known, n=1, cutoff=0.0)
  return scored[0] if scored else known[0]


def check_field(config: ConfigDict, name: str, source: str = "--config.") -> Any:
  """Returns the leaf value at `name`.

  Raises:
    UserError: no such field (the nearest known one is named), or `name` is a group of fields.
  """
  known = flatten(config)
  if name in known:
    return known[name]
  group = [k for k in known if k.startswith(f"{name}.")]
  if group:
    raise UserError(
      f"{source}{name} is a group of fields; set one of {', '.join(source + g for g in group[:4])}"
      + (" ..." if len(group) > 4 else "")
    )
  raise UserError(
    f"{source}{name} is unknown; the nearest known field is {source}{nearest_field(config, name)}"
  )


def overlay(config: ConfigDict, values: Mapping[str, Any], source: str) -> ConfigDict:
  """Lays nested (or dotted) values over a config in place and returns it.

  Args:
    config: the base; every key of `values` must exist in it with the same type (an int may stand
      for a float, a list for a tuple).
    values: as read from YAML or JSON.
    source: file name for messages.

  Raises:
    UserError: unknown key (with the nearest known one) or wrong type.
  """
  for name, value in flatten(values).items():
    old = check_field(config, name, f"{source}: ")
    set_field(config, name, coerce(value, old, f"{source}: {name}"))
  return config


def coerce(value: Any, old: Any, where: str) -> Any:
  """`value` in the type of `old`, the field's default.

  Raises:
    UserError: another type that does not convert without loss.
  """
  if isinstance(old, tuple) and isinstance(value, list | tuple | str):
    parts = value.split(",") if isinstance(value, str) else list(value)
    if len(parts) == 1 and isinstance(parts[0], str):
      parts = parts[0].split(",")
    kind = type(old[0]) if old else str
    parts = [p.strip() if isinstance(p, str) else p for p in parts]
    return tuple(coerce(p, kind(), f"{where}[{i}]") for i, p in enumerate(parts) if p != "")
  if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if type(value) is type(old):
    return value
  if isinstance(old, float) and isinstance(value, str):  # YAML reads 1e-5 as text
    try:
      return float(value)
    except ValueError:
      pass  # reported below like every other wrong type
  raise UserError(f"{where}: expected {type(old).__name__}, got {type(value).__name__} {value!r}")


def read_values(path: Path) -> dict[str, Any]:
  """Reads a YAML (.yaml, .yml) or JSON (.json) mapping.

  Raises:
    UserError: missing file, other suffix, a syntax error (with its line), or no mapping at the top.
  """
  import yaml  # ml_collections depends on it; read only here

  if not path.is_file():
    raise UserError(f"{path}: no such file; expected a YAML or JSON file with config fields")
  text = path.read_text(encoding="utf-8")
  try:
    if path.suffix == ".json":
      values = json.loads(text)
    elif path.suffix in (".yaml", ".yml"):
      values = yaml.safe_load(text) or {}
    else:
      raise UserError(f"{path}: expected a name that ends in .yaml, .yml or .json")
  except json.JSONDecodeError as e:
    raise UserError(f"{path}: line {e.lineno}: {e.msg}") from e
  except yaml.YAMLError as e:
    mark = getattr(e, "problem_mark", None)
    line = f"line {mark.line + 1}: " if mark else ""
    raise UserError(f"{path}: {line}{getattr(e, 'problem', None) or 'not YAML'}") from e
  if not isinstance(values, dict):
    raise UserError(f"{path}: expected config fields at the top, got {type(values).__name__}")
  return values
