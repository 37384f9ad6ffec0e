"""Lowers and compiles the real programs of a config for a target, from shapes alone.

The sampler's one dispatch comes from awf.sampler.decode, the learner's passes from
awf.grpo.trainer; nothing is put on a device and no weight is read.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from awf.config import longest_completion
from awf.config_io import find_path
from awf.grpo.batch import Batch
from awf.grpo.config import GRPOConfig, OptimConfig
from awf.grpo.trainer import GRPOTrainer
from awf.plan_ideal import bytes_of
from awf.plan_target import Target
from awf.qwen.config import QwenConfig
from awf.qwen.known import find_architecture
from awf.qwen.layout import abstract_params
from awf.qwen.lora import LoRAConfig, init_lora, stack_adapters
from awf.qwen.quant import QuantConfig
from awf.runtime_setup import cache_dir
from awf.sampler.cache import init_cache
from awf.sampler.decode import Shapes, compile_dispatch, empty_work
from awf.sampler.device import cache_shardings
from awf.sampler.shapes import make_shapes
from awf.sharding import abstract, make_mesh, replicated, tree_shardings
from awf.types import Rollout, UserError

log = logging.getLogger("awf")

_OUT_OF_MEMORY = re.compile(
  r"\((\d+(?:\.\d+)?)([KMG])\) exceeds available|Used (\d[\d.]*)([KMG]) of"
)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler says of one program, per device; bytes."""

  arguments: float
  outputs: float
  aliased: float
  temporaries: float
  code: float
  text: str  # optimised HLO; "" when the compiler gave up for want of memory
  seconds: float = 0.0  # it took to compile

  @property
  def peak(self) -> float:
    """Arguments, results that are no arguments, and temporaries; code is counted apart."""
    return self.arguments + max(0.0, self.outputs - self.aliased) + self.temporaries


@dataclasses.dataclass
class Setup:
  """A config made ready to be lowered: architecture, mesh, abstract arguments, sizes."""

  model: QwenConfig
  mesh: jax.sharding.Mesh
  params: Any
  lora: Any  # stacked adapters of the sampler
  cache: Any
  shapes: Shapes
  trainer: GRPOTrainer
  batch: Batch
  prompt: int
  new: int
  lower: dict[str, Callable[[], jax.stages.Lowered]]

  def arguments(self, program: str) -> float:
    """Bytes per device of a program's large arguments."""
    weights, state = bytes_of(self.params), self.trainer.state
    if program == "sampler":
      return weights + bytes_of(self.lora) + bytes_of(self.cache)
    return weights + bytes_of(state.lora) + (program == "update") * bytes_of(state.opt_state)

  def memory(self) -> dict[str, float]:
    """Bytes per device of what stays between programs."""
    state = self.trainer.state
    one = bytes_of(state.lora)
    return {
      "weights": bytes_of(self.params),
      # The learner's, the policy's scaled copy of `b`, the sampler's stack, and the stack that it
      # replaces after an update.
      "lora": one + one / 2 + 2 * bytes_of(self.lora),
      "optimizer": bytes_of(state.opt_state),
      "kv": bytes_of(self.cache),
    }


def model_config(config: ConfigDict, dtype: str, layers: int = 0) -> QwenConfig:
  """The architecture of `config.model.path`, in `layers` layers if that is not 0."""
  found = find_architecture(config.model.path, find_path(config.model.path), dtype)
  return dataclasses.replace(found, num_hidden_layers=layers) if layers else found


def make_setup(config: ConfigDict, target: Target, layers: int = 0) -> Setup:
  """Shapes of everything for one config and target; `layers` overrides the model's depth.

  Raises:
    UserError: sizes that do not go together, or a mesh that the target has no devices for.
  """
  auto = "float32" if target.platform == "cpu" else "bfloat16"
  compute, stored = (
    auto if config.model[x] == "auto" else config.model[x] for x in ("compute_dtype", "dtype")
  )
  model = model_config(config, compute, layers)
  mesh = make_mesh(**config.mesh, devices=target.devices or jax.devices("cpu")[:1])
  params = abstract_params(model, stored, QuantConfig.from_config(config.model), mesh)
  lora_config = LoRAConfig(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
  sampler = config.sampler
  grpo = GRPOConfig.from_config(config.grpo, sampler.max_new_tokens)
  whole = model_config(config, compute)  # its depth decides how many prompts the pool holds
  shapes = make_shapes(
    whole, sampler.rows, sampler.context, sampler.prefill_rows, sampler.steps_per_dispatch,
    target.platform, longest_completion(config), int(sampler.prompt_cache_gb * 2**30),
    target.platform == "gpu",
  )  # fmt: skip
  # Kernels show nothing to count; the loops that they take the place of do.
  shapes = dataclasses.replace(shapes, splits=0)
  key = jax.random.key(0)
  stacked = jax.eval_shape(lambda: stack_adapters([init_lora(model, lora_config, key)]))
  stacked = abstract(stacked, tree_shardings(stacked, mesh))
  cache = jax.eval_shape(lambda: init_cache(model, shapes.cache))
  cache = abstract(cache, cache_shardings(model, mesh))
  work = empty_work(shapes)
  work = abstract(work, jax.tree.map(lambda _: replicated(mesh), work))
  trainer = GRPOTrainer(
    model, params, None, lora_config, grpo, OptimConfig.from_config(config.optim, 1000), mesh, key,
    temperature=sampler.temperature, top_p=sampler.top_p, top_k=sampler.top_k,
    min_p=sampler.min_p,
  )  # fmt: skip
  prompt, new = sizes(config)
  rollouts = _rollouts(config.search.parents, grpo.group_size, prompt, new)
  batch = trainer.pack(rollouts)
  dispatch = compile_dispatch(model, shapes)
  lower = {"sampler": lambda: dispatch.lower(params, stacked, cache, work), **trainer.lower(batch)}
  return Setup(model, mesh, params, stacked, cache, shapes, trainer, batch, prompt, new, lower)


def sizes(config: ConfigDict) -> tuple[int, int]:
  """(prompt, new tokens) of a proposal that the plan counts with.

  Raises:
    UserError: they do not fit the context.
  """
  new = config.plan.new or config.sampler.max_new_tokens
  prompt = config.plan.prompt or config.sampler.context - new
  if prompt < 1 or prompt + new > config.sampler.context:
    raise UserError(
      f"config.plan.prompt + config.plan.new = {prompt} + {new}: expected at most "
      f"config.sampler.context = {config.sampler.context}"
    )
  return prompt, new


def _rollouts(prompts: int, group: int, prompt: int, new: int) -> list[Rollout]:
  """One step's rows at full length; no two prompts are equal."""
  return [
    Rollout(f"{q}", (q, *([0] * (prompt - 1))), (0,) * new, (-1.0,) * new, float(g % 2))
    for q in range(prompts)
    for g in range(group)
  ]


def compile_program(lowered: jax.stages.Lowered, target: Target, arguments: float) -> Compiled:
  """Compiles, or takes the answer of an earlier plan from the cache.

  Args:
    lowered: the program.
    target: what for.
    arguments: bytes of its arguments on a device, for a program that finds no room.

  Returns:
    The compiler's figures. A program that the compiler cannot place in memory is no error: its text
    is empty and its temporaries are what the compiler asked for.
  """
  stamp = (lowered.as_text(), target.name, jax.__version__, _libtpu_version(), len(target.devices))
  folder = cache_dir()
  name = hashlib.sha256(repr(stamp).encode()).hexdigest()[:32]
  file = folder.parent.parent / "plan" / f"{name}.json.gz" if folder else None
  if file and file.exists():
    return Compiled(**json.loads(gzip.decompress(file.read_bytes())))
  start = time.perf_counter()
  try:
    done = lowered.compile()
    m, text = done.memory_analysis(), _program_text(done, target)
    if m is None or text is None:
      raise UserError(
        f"config.plan.target = {target.name!r}: this backend's compiler tells neither memory nor "
        "program; choose another target"
      )
    found = Compiled(
      m.argument_size_in_bytes, m.output_size_in_bytes, m.alias_size_in_bytes,
      m.temp_size_in_bytes, m.generated_code_size_in_bytes, text,
    )  # fmt: skip
  except jax.errors.JaxRuntimeError as error:
    text = str(error)
    asked = _OUT_OF_MEMORY.search(text)
    if "RESOURCE_EXHAUSTED" not in text or not asked:
      raise
    number, unit = (asked.group(1), asked.group(2)) if asked.group(1) else asked.groups()[2:]
    found = Compiled(arguments, 0.0, 0.0, float(number) * _UNIT[unit], 0.0, "")
    log.warning("plan: the compiler found no room: %s", " ".join(text.split())[:200])
  found = dataclasses.replace(found, seconds=round(time.perf_counter() - start, 2))
  if file:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(found)).encode()))
    part.replace(file)
  return found


def _program_text(done: jax.stages.Compiled, target: Target) -> str | None:
  """The compiled program; a TPU compiler that is newer than JAX may write what JAX cannot read."""
  try:
    return done.as_text()
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"config.plan.target = {target.name!r}: jax {jax.__version__} cannot read the program of "
      f"libtpu {_libtpu_version() or '(not installed)'}; pip install '{wanted_libtpu()}' "
      f"({str(error).splitlines()[0][:120]})"
    ) from error


def wanted_libtpu() -> str:
  """The requirement of the installed JAX for its TPU compiler, such as libtpu==0.0.42.*"""
  from importlib import metadata

  wanted = [r for r in metadata.requires("jax") or () if r.startswith("libtpu")]
  return wanted[0].partition(";")[0].strip() if wanted else "jax[tpu]"


def _libtpu_version() -> str:
  from importlib import metadata

  try:
    return metadata.version("libtpu")
  except metadata.PackageNotFoundError:
    return ""


def average_key_blocks(batch: Batch, block: int) -> float:
  """Key blocks that a query block of `awf.grpo.attention.block_attend` visits, mean over bins."""
  counts = []
  for z in range(int(batch.num_steps)):
    segments_T, parents_T = batch.segments_ZBT[z, 0], batch.parents_ZBT[z, 0]
    pad = -len(segments_T) % block
    segments_IX = np.pad(segments_T, (0, pad)).reshape(-1, block)
    parents_IX = np.pad(parents_T, (0, pad)).reshape(-1, block)
    seen = [set(row[row > 0].tolist()) for row in segments_IX]
    wanted = [a | set(row[row > 0].tolist()) for a, row in zip(seen, parents_IX, strict=True)]
    counts += [sum(bool(w & s) for s in seen[: i + 1]) for i, w in enumerate(wanted)]
  return float(np.mean(counts)) if counts else 0.0
