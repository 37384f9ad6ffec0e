"""From the command line to a checked `Command`: absl flags, overrides, one-line mistakes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from awf.config import validate
from awf.config_io import check_field, coerce, flatten, get_field, load_config, set_field
from awf.types import UserError


@dataclasses.dataclass(frozen=True)
class Mode:
  """One value of --mode: where its function lives and what the command line must offer it."""

  function: str  # module:function, imported when the mode runs
  does: str
  owns_workdir: bool = False  # locks DIR, writes config.json and run.log
  resumes: bool = False  # what it has done is kept when it is interrupted
  needs: tuple[str, ...] = ()  # flags without which it cannot run
  spans_hosts: bool = False  # may run as several processes (config.distributed)


MODES: dict[str, Mode] = {
  "train": Mode(
    "awf.train:run_train",
    "search, collect, GRPO, checkpoint; resumes by itself",
    True,
    True,
    spans_hosts=True,
  ),
  "search": Mode(
    "awf.train:run_search", "search with a frozen policy", True, True, spans_hosts=True
  ),
  "eval": Mode(
    "awf.evaluate:run_eval",
    "score the test split: best, seed, plain call, self-consistency",
    True,
    spans_hosts=True,
  ),
  "sft": Mode("awf.sft:run_sft", "supervised cold start on {prompt, response} lines", True, True),
  "generate": Mode(
    "awf.generate:run_generate", "JSON lines in, completions out", needs=("input", "output")
  ),
  "serve": Mode("awf.serve:run_serve", "OpenAI-compatible HTTP server, adapters as model names"),
  "export": Mode("awf.export:run_export", "the adapter as PEFT files, or merged for Hugging Face"),
  "bench": Mode("awf.bench:run_bench", "throughput of sampler, update or workflows"),
  "plan": Mode("awf.plan:run_plan", "does it fit? memory, FLOPs, bytes and speed before you pay"),
  "report": Mode("awf.report:run_report", "one HTML page of a run"),
}

USAGE = """awf: trains a Qwen model to write better agent workflows.

python launch.py --config=configs/NAME.py[:ARGS] [--workdir=DIR] [--mode=MODE]
                 [--config.a.b=VALUE ...]

{modes}

--workdir  default runs/NAME; a run found there is resumed if its config agrees
--input, --output  JSON-lines files of mode generate
--quiet  on stderr warnings and errors only; run.log keeps the rest
--config.a.b=VALUE  overrides one field
--config.help, --config.help=WORD  lists every field (those with WORD in their name)
"""


@dataclasses.dataclass(frozen=True)
class Command:
  """What the user asked for, checked."""

  mode: str
  config: ConfigDict  # locked, as given (paths not resolved)
  workdir: Path
  input: str
  output: str
  quiet: bool


def usage() -> str:
  """The text of --help."""
  return USAGE.format(modes="\n".join(f"  --mode={n:<9} {m.does}" for n, m in MODES.items()))


def listing(argv: Sequence[str]) -> str | None:
  """The text of `--config.help` or `--config.help=WORD`; None where it is not asked for.

  Raises:
    UserError: a config that cannot be loaded, or no such field.
  """
  asked = [x for x in argv if re.fullmatch(r"--?config\.help(=.*)?", x)]
  if not asked:
    return None
  from awf.config_help import help_text  # reads source code; only here
  from configs.base import base_config

  _, spec = _take_config(list(argv))
  return help_text(load_config(spec) if spec else base_config(), asked[-1].partition("=")[2])


def parse(argv: Sequence[str]) -> Command:
  """Parses and checks the arguments after the program's name.

  Raises:
    UserError: unknown or ill-typed flag, field, mode, config argument or value.
  """
  argv, spec = _take_config(list(argv))
  mode, workdir = _scan(argv, "mode") or "train", _scan(argv, "workdir")
  check_mode(mode)
  if spec:
    config = load_config(spec)
  elif mode == "report" and workdir:
    config = _config_of_run(Path(workdir))
  else:
    raise UserError(
      "--config is missing: expected --config=configs/NAME.py, for instance "
      "--config=configs/quickstart.py"
    )
  values = _parse_flags(argv, config)
  check_mode(values.mode)
  if spec and config.name == "base":
    config.name = Path(spec.partition(":")[0]).stem
  validate(config, values.mode)
  for name in MODES[values.mode].needs:
    if not getattr(values, name):
      raise UserError(f"--mode={values.mode} needs --{name}=FILE")
  directory = Path(values.workdir) if values.workdir else Path("runs") / config.name
  config.lock()
  return Command(values.mode, config, directory, values.input, values.output, bool(values.quiet))


def check_mode(mode: str) -> None:
  """Raises UserError with the nearest known mode."""
  if mode not in MODES:
    near = difflib.get_close_matches(mode, MODES, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--mode={mode} is unknown; known: {', '.join(MODES)}{hint}")


def json_line(result: dict[str, Any]) -> str:
  """One line of strict JSON; values that JSON lacks (NaN, infinities) become null."""
  return json.dumps(_plain(result), allow_nan=False)


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {str(k): _plain(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_plain(v) for v in value]
  if hasattr(value, "tolist"):  # arrays and their scalars
    return _plain(value.tolist())
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value if isinstance(value, str | int | bool | None) else str(value)


def _take_config(argv: list[str]) -> tuple[list[str], str]:
  """Takes `--config=SPEC` (or `--config SPEC`) out of the arguments; the last one counts."""
  rest, spec = [], ""
  items = iter(argv)
  for item in items:
    if item in ("--config", "-config"):
      spec = next(items, "")
    elif item.startswith(("--config=", "-config=")):
      spec = item.split("=", 1)[1]
    else:
      rest.append(item)
  return rest, spec


def _scan(argv: list[str], name: str) -> str:
  """The last value of a flag, read before the flags proper are parsed (they need the config)."""
  value = ""
  for i, item in enumerate(argv):
    key, has_value, text = item.lstrip("-").partition("=")
    if item.startswith("-") and key == name:
      value = text if has_value else "".join(argv[i + 1 : i + 2])
  return value


def _config_of_run(workdir: Path) -> ConfigDict:
  """The config that a run was started with, for modes that only look at it."""
  from awf.workdir import Workdir

  found = Workdir(workdir).record()
  if found is None:
    raise UserError(
      f"--workdir={workdir} holds no run (no config.json); give the directory of a run"
    )
  return ConfigDict(found["config"])


def _parse_flags(argv: list[str], config: ConfigDict) -> flags.FlagValues:
  """Applies the overrides to `config` in place and returns the other flags."""
  for item in argv:
    match = re.match(r"--?(no)?config\.([^=]*)", item)
    if match:
      check_field(config, match.group(2), "--config.")
  defaults = flatten(config)
  argv = [part for item in argv for part in _one_each(item, defaults)]
  values = flags.FlagValues()
  flags.DEFINE_string("mode", "train", "what to do", flag_values=values)
  flags.DEFINE_string("workdir", "", "directory of the run", flag_values=values)
  flags.DEFINE_string("input", "", "JSON lines to read", flag_values=values)
  flags.DEFINE_string("output", "", "JSON lines to write", flag_values=values)
  flags.DEFINE_boolean("quiet", False, "warnings and errors only", flag_values=values)
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["awf", *argv])
    rest = values(["awf", *argv])[1:]
  except (flags.Error, ValueError, TypeError, LookupError, AttributeError) as e:
    raise UserError(_flag_message(e, defaults)) from e
  if rest:
    raise UserError(
      f"unexpected argument {rest[0]!r}: every option starts with --, for instance --mode=eval"
    )
  for name, old in defaults.items():  # tuples arrive with elements of any type
    new = get_field(config, name)
    if isinstance(old, tuple) and new != old:
      set_field(config, name, coerce(new, old, f"--config.{name}"))
  return values


def _one_each(item: str, defaults: dict[str, Any]) -> list[str]:
  """`--config.a=x:y,z` as a flag for each part: a list of names that is no Python literal."""
  match = re.fullmatch(r"(--?config\.([\w.]+)=)([^\s,'\"()\[\]]+(?:,[^\s,'\"()\[\]]+)+)", item)
  if not match or not isinstance(defaults.get(match[2]), tuple) or not re.search("[:=/]", match[3]):
    return [item]
  return [match[1] + part for part in match[3].split(",")]


def _flag_message(error: Exception, defaults: dict[str, Any]) -> str:
  """One line for what absl and ml_collections say in several shapes."""
  text = " ".join(str(error).split())
  wrong = re.match(r"flag --(?:config\.)?([\w.]+)=(.*?): ", text)
  if isinstance(error, flags.IllegalFlagValueError) and wrong and wrong.group(1) in defaults:
    name = wrong.group(1)
    kind, old = type(defaults[name]).__name__, defaults[name]
    return f"--config.{name}={wrong.group(2)}: expected {kind} (its default is {old!r})"
  if isinstance(error, flags.UnrecognizedFlagError):
    known = ["config", "mode", "workdir", "input", "output", "quiet"]
    near = difflib.get_close_matches(error.flagname.split(".")[0], known, n=1, cutoff=0.4)
    hint = f"; did you mean --{near[0]}?" if near else ""
    return f"--{error.flagname} is unknown; known: {', '.join('--' + k for k in known)}{hint}"
  missing = re.match(r"Missing value for flag (\S+)", text)
  if missing:
    return f"{missing.group(1)} needs a value: write {missing.group(1)}=VALUE"
  return text
