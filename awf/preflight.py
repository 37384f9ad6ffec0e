"""What can be known to be wrong before the sandbox or a device is started: files and their fit.

It reads what later parts read again: configs, headers and rows, no weights. JAX is not imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from awf.config import is_remote_alone
from awf.config_io import find_path, get_field
from awf.types import UserError

_SEARCHES = ("train", "search", "eval")  # modes with a data set and workflows


def check_files(config: ConfigDict, mode: str, input: str = "", output: str = "") -> None:
  """Checks the files that a mode will read, as far as they are on this machine.

  Args:
    config: resolved.
    mode: one of cli.MODES.
    input: the flags of mode generate.
    output: likewise.

  Raises:
    UserError: the first that cannot be used, with the field that names it.
  """
  if mode == "report":
    return
  if input and not Path(input).exists():
    raise UserError(f"--input={input}: no such file; expected JSON lines of {{prompt}}")
  if input and Path(input).is_dir():
    raise UserError(f"--input={input}: a folder; expected a file with JSON lines of {{prompt}}")
  if output and not os.access(Path(output).absolute().parent, os.W_OK):
    raise UserError(f"--output={output}: cannot write there; choose another folder")
  fields = ("model.policy", "task.name", "reward.function", "executor.client")
  named = [(field, get_field(config, field)) for field in fields]
  named += [("metrics", name) for name in config.metrics]
  named += [("search.operators", name) for name in config.search.operators]
  for field, name in named:
    if ":" in name:
      _check_module(name, f"config.{field}")
  is_local = not is_remote_alone(config, mode)
  if is_local and config.model.path and find_path(config.model.path).exists():
    _check_model(config, mode)
  if mode == "search" and config.search.driver == "aflow":
    _check_aflow(config)
  if mode in _SEARCHES:
    _check_task(config)
    _check_workflows(config)


def _check_module(name: str, field: str) -> None:
  """The module of `package.module:name` is there; it is not run, for it may import JAX."""
  module = name.partition(":")[0]
  here = os.getcwd()
  if here not in sys.path:
    sys.path.append(here)
  try:
    found = importlib.util.find_spec(module)
  except (ImportError, ValueError):  # a package of it is not there
    found = None
  if found is None:
    raise UserError(f"cannot import {field} = {name!r}: no module {module!r} here or on the path")


def _check_model(config: ConfigDict, mode: str) -> None:
  """The checkpoint's config, and its files by name and header."""
  from awf.qwen.hf_config import load_config
  from awf.qwen.shards import Shards
  from awf.qwen.tokenizer import tokenizer_file

  path = find_path(config.model.path)
  model = load_config(path)
  if mode == "plan":
    return
  Shards(path)
  if mode in (*_SEARCHES, "generate", "sft"):  # others speak no text
    tokenizer_file(find_path(config.model.tokenizer) if config.model.tokenizer else path)
  if mode in (*_SEARCHES, "generate") and config.sampler.context > model.max_position_embeddings:
    raise UserError(
      f"config.sampler.context: {config.sampler.context} is more than the model's "
      f"{model.max_position_embeddings} positions; lower it"
    )


def _check_aflow(config: ConfigDict) -> None:
  """The checkout, its interpreter, and a data set that it has, when that is one of ours."""
  from awf.search.aflow_driver import check_checkout
  from awf.tasks import TASKS

  task = TASKS.get(config.task.name)
  if task is not None:
    check_checkout(config.aflow.path, config.aflow.python, task.dataset)


class _NoSandbox:
  """Stands in for the sandbox where nothing is graded."""


def _check_task(config: ConfigDict) -> None:
  """The data set, when it is a known one with its file here: every row, and both splits."""
  from awf.tasks import make_task

  if ":" in config.task.name or not config.task.path or not find_path(config.task.path).exists():
    return
  from awf.system import hold_out

  nothing: Any = _NoSandbox()
  validation, _ = make_task(config.task, nothing).split_dataset()
  count = config.eval.parent_problems if config.eval.parent_count else 0
  hold_out(validation, count, config.seed)


def _check_workflows(config: ConfigDict) -> None:
  """The files of workflows: further starts, and held-out parents."""
  from awf.compare import held_out_parents
  from awf.search.config import load_starts

  load_starts(config.search.starts)
  if config.eval.parent_count:
    held_out_parents(config)
