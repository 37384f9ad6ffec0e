"""From counted programs to speeds (tokens, steps, problems) and the two ratios of a plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from awf.chips import Chip
from awf.hlo_cost import Cost, Count, count_module
from awf.hlo_text import parse_module
from awf.plan_ideal import Load, decode_step_bytes, update_flops
from awf.plan_target import Target
from awf.qwen.lora import target_shapes

if TYPE_CHECKING:
  from awf.plan import Program
  from awf.plan_programs import Setup

PARTS = ("prefill", "decode")


def count_program(
  config: ConfigDict, setup: Setup, name: str, text: str, chip: Chip
) -> tuple[dict[str, Cost], list[str]]:
  """Costs of a program's parts, and what had to be guessed.

  The sampler: one `prefill` call, one `decode` step in the middle of proposals and one of the calls
  that workflows make (`decode_calls`), and what a dispatch does once (`once`). The learner:
  `whole`, one pass over all bins.
  """
  module = parse_module(text)
  if name != "sampler":
    count = count_module(module, lambda n: learner_trips(setup, n))
    return {"whole": count.total(None, chip.flops, chip.bandwidth)}, _guessed(count)
  taken = {
    "top_k": config.sampler.top_k > 0 or config.executor.top_k > 0,
    "top_p": config.sampler.top_p < 1 or config.executor.top_p < 1,
    "min_p": config.sampler.min_p > 0 or config.executor.min_p > 0,
    "greedy": config.sampler.temperature <= 0 or config.executor.temperature <= 0,
  }
  is_special = any(taken.values())
  # The second log-prob and the likeliest tokens, which training does not ask for, and the branch
  # around all of these but the latter.
  taken |= {"full_logp": False, "likeliest": False, "special": is_special}

  def is_taken(op_name: str) -> bool | None:
    return next((v for k, v in taken.items() if f"/{k}/" in op_name), None)

  def counted(load: Load) -> Count:
    return count_module(module, lambda n: sampler_trips(setup, n, load), is_taken)

  count = counted(proposals(config, setup))
  parts = {part: count.inside(f"/{part}/while") for part in PARTS}
  inside = {id(op) for ops in parts.values() for op in ops if op.loops}
  parts = {k: [op for op in ops if op.loops] for k, ops in parts.items()}
  parts["once"] = [op for op in count.ops if id(op) not in inside]
  calls = counted(workflow_calls(config, setup)).inside("/decode/while")
  parts["decode_calls"] = [op for op in calls if op.loops]
  costs = {k: count.total(ops, chip.flops, chip.bandwidth) for k, ops in parts.items()}
  return costs, _guessed(count)


def proposals(config: ConfigDict, setup: Setup) -> Load:
  """All rows complete proposals of full length."""
  rows, group = setup.shapes.rows, config.grpo.group_size
  return Load(-(-rows // group), min(rows, group), setup.prompt, setup.new)


def workflow_calls(config: ConfigDict, setup: Setup) -> Load:
  """All rows answer calls of workflows; no two prompts are alike."""
  new = config.executor.max_new_tokens
  prompt = min(config.plan.problem_prompt, config.sampler.context - new)
  return Load(setup.shapes.rows, 1, prompt, new)


def sampler_trips(setup: Setup, op_name: str, load: Load) -> float | None:
  """Trips of the dispatch's loops that depend on data."""
  s = setup.shapes
  if op_name.endswith("/share_groups/while"):
    is_lone = load.group == 1 and s.lone_at_once
    return 0.0 if is_lone else -(-load.prompts * -(-load.group // s.share) // s.at_once)
  if op_name.endswith("/lone_rows/while"):
    return -(-load.prompts * (load.group == 1) // s.lone_at_once)
  if op_name.endswith("/prompt_chunks/while"):
    return -(-load.prompt // s.page)
  if op_name.endswith("/live_chunks/while"):
    if "/decode/" in op_name:
      return -(-load.new / 2 // s.chunk)
    blocks = -(-load.prompt // s.block)
    return sum(i * s.block // s.page + 1 for i in range(blocks)) / blocks
  if op_name.endswith("/while") and ("/top_k/" in op_name or "/top_p/" in op_name):
    return 32.0  # steps of a bisection over float32, at most
  return 1.0 if op_name.endswith(tuple(f"/{part}/while" for part in PARTS)) else None


def learner_trips(setup: Setup, op_name: str) -> float | None:
  """Trips of the learner's loops that depend on data."""
  from awf.plan_programs import average_key_blocks

  batch, trainer = setup.batch, setup.trainer
  if op_name.endswith("/bins/while"):
    return float(batch.num_steps)
  if op_name.endswith("head_chunks/while") or op_name.endswith("head_chunks)/while"):
    chunk = min(trainer.head_chunk, batch.target_ZBU.shape[2])
    steps = batch.num_targets_Z[: int(batch.num_steps)]
    return float(sum(-(-int(n) // chunk) for n in steps)) / len(steps)
  if op_name.endswith(("/layers/while", "(layers)/while", "layers))/while")):
    return float(setup.model.num_hidden_layers)
  if "key_blocks" in op_name and op_name.endswith("/while"):
    return average_key_blocks(batch, trainer.block)
  return None


def is_full(config: ConfigDict) -> bool:
  """Whether the update computes every layer again in its backward pass."""
  from awf.remat import remat_name

  return remat_name(config.grpo.remat) == "full"


def _guessed(count: Count) -> list[str]:
  return [*dict.fromkeys(count.unknown_loops), *count.unknown_calls]


def ratios(config: ConfigDict, setup: Setup, programs: dict[str, Program]) -> dict[str, Any]:
  """What the compiled programs move and compute against what they must.

  `decode_bytes`: bytes that one decode step reads / (weights and adapters once + live KV).
  `update_flops`: FLOPs of one update / (forward + recomputation + backward to activations and
  LoRA), of the tokens that there are. `update_padding`: tokens of the bins / tokens in them, a part
  of that excess. `update_prompt_copies`: tokens in the bins / tokens with every prompt once, which
  is beside that ratio (bins too small for a whole group hold its prompt again).
  """
  found: dict[str, Any] = {}
  sampler, update = programs.get("sampler"), programs.get("update")
  if sampler and sampler.parts:
    must = decode_step_bytes(
      setup.model, setup.params, setup.lora, proposals(config, setup), setup.mesh.shape["tensor"]
    )
    read = sampler.parts["decode"].read
    found["decode_bytes"] = round(read / must["total"], 4)
    found["decode_step"] = {"read": read, **{f"must_{k}": v for k, v in must.items()}}
  if update and update.parts:
    batch = setup.batch
    must = update_flops(
      setup.model, config.lora.rank, tuple(config.lora.targets), batch, is_full(config)
    )
    spread = setup.mesh.size
    done = update.parts["whole"].flops * spread
    filled = batch.tokens_ZBT.shape[2] * batch.tokens_ZBT.shape[1] * int(batch.num_steps)
    found["update_flops"] = round(done / must["total"], 4)
    found["update_padding"] = round(filled / max(1, batch.num_tokens), 4)
    once = setup.prompt + config.grpo.group_size * (setup.new - 1)
    copies = batch.num_tokens / (once * config.search.parents)
    found["update_prompt_copies"] = round(copies, 4)
    found["update_step"] = {"flops": done, **{f"must_{k}": v for k, v in must.items()}}
  return found


def extrapolate(ends: Sequence[Program], depths: tuple[int, int], depth: int) -> Program:
  """A program of `depth` layers on the line through two shallow ones."""
  share = (depth - depths[0]) / (depths[1] - depths[0])

  def line(a: float, b: float) -> float:
    return max(0.0, a + (b - a) * share)

  first, second = (p.compiled for p in ends)
  names = ("arguments", "outputs", "aliased", "temporaries", "code")
  compiled = dataclasses.replace(
    first,
    **{n: line(getattr(first, n), getattr(second, n)) for n in names},
    text="",
    seconds=first.seconds + second.seconds,
  )
  parts = {}
  for name in first.text and second.text and ends[0].parts or {}:
    pair = [dataclasses.astuple(p.parts[name]) for p in ends]
    parts[name] = Cost(*(line(a, b) for a, b in zip(*pair, strict=True)))
  return dataclasses.replace(ends[0], compiled=compiled, parts=parts)


# --- speed


def estimates(config: ConfigDict, setup: Setup, programs: dict[str, Program]) -> dict[str, Any]:
  """Roofline speed of a wave of proposals, of a step, and of the loop; None where not counted."""
  sampler, update = programs.get("sampler"), programs.get("update")
  parts = sampler.parts if sampler else {}
  seconds = {k: v.seconds for k, v in parts.items()}
  step = update.parts["whole"].seconds if update and update.parts else None
  if "logprobs" in programs and step is not None and config.grpo.beta:
    whole = programs["logprobs"].parts.get("whole")
    extra = whole.seconds if whole else 0.0
  else:
    extra = 0.0
  per_batch = None if step is None else step * config.grpo.steps_per_batch + extra
  return _speeds(config, setup, seconds, per_batch)


def _speeds(config, setup: Setup, seconds: dict[str, float], per_batch: float | None):
  if not seconds:
    return dict(tokens_per_second=None, seconds_per_step=per_batch, problems_per_hour=None)
  rows = setup.shapes.rows
  wave = _wave(setup, seconds, proposals(config, setup), seconds["decode"])
  speed = rows * setup.new / wave
  problem = _wave(setup, seconds, workflow_calls(config, setup), seconds["decode_calls"])
  result = {
    "tokens_per_second": round(speed, 1),
    "seconds_per_step": None if per_batch is None else round(per_batch, 4),
    "problems_per_hour": None,
  }
  if per_batch is not None:
    children = config.search.parents * config.grpo.group_size
    problems = children * config.search.subset_problems
    round_seconds = (
      wave * max(1.0, children / rows)
      + problem * max(1.0, problems * config.plan.calls / rows)
      + per_batch
    )
    result["problems_per_hour"] = round(3600 * problems / round_seconds, 1)
    result["seconds_per_round"] = round(round_seconds, 3)
  return result


def _wave(setup: Setup, seconds: dict[str, float], load: Load, step: float) -> float:
  """Seconds in which all rows are filled once and run to their last token."""
  s = setup.shapes
  calls = -(-load.prompts * -(-load.prompt // s.block) // s.blocks)
  dispatches = -(-load.new // s.steps)
  return calls * seconds["prefill"] + load.new * step + dispatches * seconds["once"]


def estimate_counted(config: ConfigDict, setup: Setup, target: Target) -> dict[str, Any]:
  """Speed of a chip that nothing is compiled for: what must be read and computed at its figures."""
  chip, model, s = target.chip, setup.model, setup.shapes

  def step(load: Load) -> float:
    return decode_step_bytes(model, setup.params, setup.lora, load)["total"] / chip.bandwidth

  matrices = model.num_hidden_layers * sum(i * o for i, o in target_shapes(model).values())
  seconds = {
    "prefill": max(step(Load(1, 1, 0, 0)), 2.0 * matrices * s.blocks * s.block / chip.flops),
    "decode": step(proposals(config, setup)),
    "decode_calls": step(workflow_calls(config, setup)),
    "once": 0.0,
  }
  must = update_flops(
    model, config.lora.rank, tuple(config.lora.targets), setup.batch, is_full(config)
  )
  per_batch = must["total"] / chip.flops * config.grpo.steps_per_batch
  return _speeds(config, setup, seconds, per_batch) | {"ratios": {}}
