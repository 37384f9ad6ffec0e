"""Mode plan: does a config fit a chip, and how fast can it be? No chip is needed.

The sampler's dispatch and the learner's passes are compiled for the target from shapes alone. Their
memory is the compiler's own account; their arithmetic and bytes are counted over the compiled
program (awf.hlo_cost); times are roofline times, the best that the chip's figures allow.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from awf.chips import GIB
from awf.plan_report import print_table
from awf.plan_target import Target, find_target

if TYPE_CHECKING:
  from awf.hlo_cost import Cost
  from awf.plan_programs import Compiled, Setup

log = logging.getLogger("awf")

PROGRAMS = ("sampler", "update", "logprobs")
_FAST_DEPTHS = (2, 4)


@dataclasses.dataclass
class Program:
  """One compiled program with its figures; bytes per device."""

  name: str
  compiled: Compiled
  beside: float  # bytes that stay resident while it runs and are none of its arguments
  parts: dict[str, Cost]  # sampler: prefill call, share, decode step, rest; else: whole
  guessed: list[str]  # loops and calls that were counted without knowing them

  @property
  def peak(self) -> float:
    return self.compiled.peak + self.beside


def run_plan(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Plans a config for `config.plan.target`.

  Args:
    config: resolved config.
    workdir: directory of the run; nothing is written there.

  Returns:
    `fits`, `peak_gb` and `capacity_gb` (GiB), `tokens_per_second`, `seconds_per_step`,
    `problems_per_hour`, `ratios`, `programs`, `memory`, and `change` when it does not fit.

  Raises:
    UserError: a target that needs libtpu, sizes that do not go together.
  """
  del workdir
  target = find_target(config.plan.target)  # before JAX: it may say which backend there is
  from awf.plan_search import nearest_change

  result = plan_once(config, target)
  print_table(result, sys.stderr)
  if not result["fits"] and target.is_compiled and config.plan.trials > 0:
    change, tried = nearest_change(config, target, result, plan_once)
    result |= {"change": change, "tried": tried}
    words = ", ".join(f"config.{k}={v}" for k, v in (change or {}).items())
    print(f"nearest change that fits: {words or 'none found'}", file=sys.stderr)
  return result


def plan_once(config: ConfigDict, target: Target) -> dict[str, Any]:
  """The figures of one config on one target; see `run_plan`."""
  from awf.plan_estimate import estimate_counted, estimates, ratios
  from awf.plan_programs import make_setup

  setup = make_setup(config, target)
  memory = setup.memory()
  capacity = target.chip.memory - config.plan.reserve_gb * GIB
  head = {
    "target": target.name,
    "model": config.model.path,
    "quant": config.model.quant,
    "layers": setup.model.num_hidden_layers,
    "parameters": setup.model.num_parameters,
    "devices": int(setup.mesh.size),
    "mesh": dict(setup.mesh.shape),
    "compiled": target.is_compiled and sum(memory.values()) <= capacity,
    "extrapolated": bool(config.plan.fast and target.is_compiled),
    "counted": not target.is_compiled,  # from operands, at the chip's figures
    "gb": "GiB (2**30 bytes), per device",
    "sizes": {
      "rows": setup.shapes.rows, "context": config.sampler.context,
      "prompt_pages": setup.shapes.pages, "page": setup.shapes.page,
      "prompt": setup.prompt, "new": setup.new, "group": config.grpo.group_size,
      "bin_tokens": int(setup.batch.tokens_ZBT.shape[2]), "bins": int(setup.batch.num_steps),
    },
    "memory_gb": {k: _gib(v) for k, v in memory.items()},
  }  # fmt: skip
  if not target.is_compiled:
    peak = sum(memory.values())
    body = estimate_counted(config, setup, target)
    return head | _verdict(peak, capacity) | body | {"programs": {}}
  if sum(memory.values()) > capacity:  # no program can make that smaller
    speeds = dict.fromkeys(("tokens_per_second", "seconds_per_step", "problems_per_hour"))
    return head | _verdict(sum(memory.values()), capacity) | speeds | {"programs": {}}
  programs = _compile_all(config, target, setup)
  code = sum(p.compiled.code for p in programs.values())
  peak = max(p.peak for p in programs.values()) + code
  table = {name: _row(p, target) for name, p in programs.items()}
  return (
    head
    | _verdict(peak, capacity)
    | estimates(config, setup, programs)
    | {"ratios": ratios(config, setup, programs), "code_gb": _gib(code), "programs": table}
  )


def _verdict(peak: float, capacity: float) -> dict[str, Any]:
  return {
    "fits": peak <= capacity,
    "verdict": "fits" if peak <= capacity else "does not fit",
    "peak_gb": _gib(peak),
    "capacity_gb": _gib(capacity),
    "peak_bytes": int(peak),
  }


def _compile_all(config: ConfigDict, target: Target, setup: Setup) -> dict[str, Program]:
  names = [n for n in PROGRAMS if n in config.plan.programs]
  if not config.plan.fast:
    return {name: _program(config, target, setup, name) for name in names}
  from awf.plan_estimate import extrapolate
  from awf.plan_programs import make_setup

  depth = setup.model.num_hidden_layers
  small = [make_setup(config, target, layers) for layers in _FAST_DEPTHS]
  found = {}
  for name in names:
    ends = [_program(config, target, s, name) for s in small]
    found[name] = extrapolate(ends, _FAST_DEPTHS, depth)
    found[name].beside = _beside(setup, name)
  return found


def _beside(setup: Setup, name: str) -> float:
  """Bytes that stay while a program runs and that it does not take as arguments."""
  from awf.plan_ideal import bytes_of

  memory = setup.memory()
  if name == "sampler":
    return memory["lora"] - bytes_of(setup.lora) + memory["optimizer"]
  own = bytes_of(setup.trainer.state.lora)
  rest = 0.0 if name == "update" else memory["optimizer"]
  return memory["kv"] + memory["lora"] - own + rest


def _program(config: ConfigDict, target: Target, setup: Setup, name: str) -> Program:
  from awf.plan_estimate import count_program
  from awf.plan_programs import compile_program

  log.info("plan: compiling %s, %d layers", name, setup.model.num_hidden_layers)
  compiled = compile_program(setup.lower[name](), target, setup.arguments(name))
  log.info(
    "plan: %s in %.0f s, %.2f GiB of temporaries",
    name,
    compiled.seconds,
    compiled.temporaries / GIB,
  )
  parts, guessed = {}, []
  if compiled.text:
    parts, guessed = count_program(config, setup, name, compiled.text, target.chip)
  return Program(name, compiled, _beside(setup, name), parts, guessed)


def _row(program: Program, target: Target) -> dict[str, Any]:
  """A program's line of the JSON table."""
  c = program.compiled
  return {
    "peak_gb": _gib(program.peak),
    "arguments_gb": _gib(c.arguments),
    "temporaries_gb": _gib(c.temporaries),
    "beside_gb": _gib(program.beside),
    "code_gb": _gib(c.code),
    "compile_seconds": c.seconds,
    "guessed": program.guessed,
    "parts": {
      name: {
        "flops": cost.flops,
        "elementwise": cost.elementwise,
        "bytes": cost.num_bytes,
        "bytes_read": cost.read,
        "roofline_seconds": cost.seconds,
      }
      for name, cost in program.parts.items()
    },
  }


def _gib(x: float) -> float:
  return round(x / GIB, 3)
