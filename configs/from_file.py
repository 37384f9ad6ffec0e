"""A YAML or JSON file laid over a config: `--config=configs/from_file.py:PATH`.

The file names the config that it changes (`base: aime:model=qwen3-0.6b`; left out, every default is
that of configs/base.py) and holds the fields it sets, nested or dotted:

  base: quickstart
  seed: 3
  search: {rounds: 20}
  grpo.group_size: 16

Unknown fields and wrong types are refused with the nearest known field. Flags given on the command
line come last.
"""

import re

from awf.config_io import find_path, load_config, overlay, read_values
from awf.types import UserError
from configs.base import base_config


def get_config(arg=None):
  if not arg:
    raise UserError("--config=configs/from_file.py needs a file: configs/from_file.py:PATH.yaml")
  path = find_path(arg)
  values = read_values(path)
  base = values.pop("base", "")
  if not isinstance(base, str):
    raise UserError(f"{path}: base: expected the name of a config, got {base!r}")
  if base.startswith("from_file"):
    raise UserError(f"{path}: base: a file can only be laid over a Python config, got {base!r}")
  if base:
    name, _, text = base.partition(":")
    config = load_config(f"configs/{name}.py" + (f":{text}" if text else ""))
  else:
    config = base_config()
  config.name = re.sub(r"[^\w.-]", "-", path.stem)
  return overlay(config, values, str(path))
