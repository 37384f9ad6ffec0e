"""Mode bench: throughput of the sampler, of the update and of workflow evaluation.

The first call compiles and is not counted; every repeat has prompts that no cache has seen. Figures
are medians over `bench.repeats`. JAX is imported inside the functions: the sandbox starts first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from awf.chips import find_chip
from awf.types import Rollout, UserError
from awf.workdir import commit, versions

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from awf.qwen.config import QwenConfig
  from awf.sampler.request import Request

log = logging.getLogger("awf")

_BLOCK = 128  # contexts are rounded up to a multiple


def run_bench(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Runs the benchmark that `config.bench.what` names.

  Args:
    config: resolved config.
    workdir: directory of the run; nothing is written there.

  Returns:
    `tokens_per_second`, the sizes, every measured time, device, versions and commit.

  Raises:
    UserError: sizes that do not go together.
  """
  if config.bench.what == "workflow":
    result = bench_workflow(config, workdir)
  else:
    result = (bench_sampler if config.bench.what == "sampler" else bench_update)(config)
  import jax  # by now the benchmark has imported it

  result.update(
    what=config.bench.what,
    device=jax.devices()[0].device_kind,
    devices=jax.device_count(),
    versions=versions(),
    commit=commit(),
  )
  result["peak_memory_gb"] = round(_peak_bytes(jax.devices()[0]) / 1e9, 3)
  return result


def _peak_bytes(device: Any) -> int:
  """Most memory that the device held so far; on a CPU the whole process."""
  import resource
  import sys

  stats = device.memory_stats() or {}
  if "peak_bytes_in_use" in stats:
    return stats["peak_bytes_in_use"]
  unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
  return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def bench_sampler(config: ConfigDict) -> dict[str, Any]:
  """Generated tokens per second; the time covers prefill and decode of all rows.

  A further, untimed call runs prefill and decode of each dispatch apart, for `prefill` and
  `decode`: their seconds, what they did, and what they reached of the chips' peaks where those are
  known (products with the weights alone, attention left out).
  """
  model_config, params, mesh = _load(config)
  from awf.sampler.engine import Engine

  bench, sampler = config.bench, config.sampler
  (_, prompt), (_, new) = length_ranges(config)
  context = -(-(prompt + new) // _BLOCK) * _BLOCK
  if prompt + new > model_config.max_position_embeddings:
    fields = "bench.prompt + config.bench.new" if "-" not in bench.lengths else "bench.lengths"
    raise UserError(
      f"config.{fields}: {prompt + new} tokens of a row are more than the model's "
      f"{model_config.max_position_embeddings} positions; lower them"
    )
  rows = bench.batch if bench.lengths == "fixed" else min(bench.batch, sampler.rows)
  drawn: list[int] = []
  with _compile_seconds() as compiling:
    engine = Engine(
      model_config,
      params,
      rows=rows,
      context=context,
      prefill_rows=min(sampler.prefill_rows, bench.batch // bench.group),
      steps_per_dispatch=sampler.steps_per_dispatch,
      max_new_tokens=new,
      prompt_bytes=int(sampler.prompt_cache_gb * 2**30),
      strict=sampler.strict,
      queue=max(sampler.queue, bench.batch),
      mesh=_placement(mesh),
    )

    def call(salt: int) -> None:
      requests = sampler_requests(config, model_config.vocab_size, salt)
      outputs = engine.generate(requests)
      drawn.append(sum(len(o.token_ids) for group in outputs for o in group))

    try:
      first, seconds = _time(call, bench.repeats)
      before = engine.stats()
      engine.device.is_split = True
      call(bench.repeats + 1)
      after = engine.stats()
    finally:
      engine.close()
  speeds = [tokens / s for tokens, s in zip(drawn[1:], seconds, strict=False)]
  return {
    "tokens_per_second": round(statistics.median(speeds), 1),
    **_sizes(config),
    "quant": config.model.quant,
    "rows": rows,
    "context": context,
    "strict": sampler.strict,
    "seconds": seconds,
    "first_call_seconds": first,
    "compile_seconds": round(sum(compiling), 2),
    **_model_facts(model_config, params),
    **_sampler_parts(model_config, params, {k: after[k] - before[k] for k in after}),
  }


def _sampler_parts(model_config: QwenConfig, params: Any, gain: dict[str, float]) -> dict[str, Any]:
  """Occupancy, and prefill and decode apart, from what the engine's counters gained."""
  from awf.qwen.quant import num_bytes

  weights = num_bytes(params)
  out: dict[str, Any] = {"occupancy": round(gain["row_steps"] / gain["row_slots"], 4)}
  for name, tokens, passes in (
    ("prefill", gain["prefill_tokens"], 0.0),
    ("decode", gain["row_steps"], gain["steps"]),
  ):
    seconds = max(gain[f"{name}_seconds"], 1e-9)
    flops, moved = 2 * model_config.num_parameters * tokens / seconds, weights * passes / seconds
    out[name] = {
      "seconds": round(seconds, 6),
      "tokens": int(tokens),
      "tokens_per_second": round(tokens / seconds, 1),
      "gflops_per_second": round(flops / 1e9, 2),
      **({"steps": int(passes), "gb_per_second": round(moved / 1e9, 2)} if passes else {}),
      **_utilisation(flops, moved),
    }
  return out


@contextlib.contextmanager
def _compile_seconds() -> Iterator[list[float]]:
  """Collects the seconds that JAX lowers and compiles, or loads from its cache."""
  import jax.monitoring

  seconds: list[float] = []

  def listen(event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith(("/jaxpr_to_mlir_module_duration", "/backend_compile_duration")):
      seconds.append(duration_secs)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield seconds
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def length_ranges(config: ConfigDict) -> tuple[tuple[int, int], tuple[int, int]]:
  """((least, most) prompt tokens, (least, most) new tokens) that `bench.lengths` asks for."""
  bench = config.bench
  if bench.lengths == "fixed":
    return (bench.prompt, bench.prompt), (bench.new, bench.new)
  if bench.lengths == "mixed":
    return (max(1, bench.prompt // 8), bench.prompt), (max(1, bench.new // 8), bench.new)
  low, high = map(int, bench.lengths.split("-"))
  return (low, high), (low, high)


def sampler_requests(config: ConfigDict, vocab_size: int, salt: int) -> list[Request]:
  """Requests of one repeat: the prompts are random, and others in every repeat.

  With `bench.lengths` "mixed", prompts and completions have lengths uniform in [1/8, 1] of
  `bench.prompt` and `bench.new`; with "LOW-HIGH", uniform in that. The same in every repeat.
  """
  import numpy as np

  from awf.sampler.request import Request

  bench, requests = config.bench, []
  low = min(100, vocab_size // 4)
  ids_of = np.random.default_rng([config.seed, salt])
  draw = random.Random(config.seed)
  prompts, news = length_ranges(config)
  for i in range(bench.batch // bench.group):
    prompt, new = draw.randint(*prompts), draw.randint(*news)
    ids = ids_of.integers(low, vocab_size, prompt).tolist()
    requests.append(
      Request(
        prompt_ids=tuple(ids),
        n=bench.group,
        seed=config.seed * 1_000_003 + salt * 1_009 + i,
        temperature=config.sampler.temperature,
        top_p=config.sampler.top_p,
        top_k=config.sampler.top_k,
        min_p=config.sampler.min_p,
        max_new_tokens=new,
        ignore_eos=True,
      )
    )
  return requests


def bench_update(config: ConfigDict) -> dict[str, Any]:
  """Prompt and completion tokens per second of one GRPO update (forward, backward, optimiser)."""
  model_config, params, mesh = _load(config)
  import jax

  from awf.grpo.config import GRPOConfig, OptimConfig
  from awf.grpo.trainer import GRPOTrainer
  from awf.qwen.lora import LoRAConfig, init_lora

  bench = config.bench
  group = bench.group if bench.group > 1 else config.grpo.group_size
  if bench.batch % group:
    raise UserError(
      f"config.bench.batch = {bench.batch}: expected a multiple of the group of {group} rows "
      "(config.bench.group, or config.grpo.group_size where that is 1)"
    )
  lora_config = LoRAConfig.from_config(config.lora)
  key_lora, key = jax.random.split(jax.random.key(config.seed))
  grpo = dataclasses.replace(GRPOConfig.from_config(config.grpo, bench.new), group_size=group)
  trainer = GRPOTrainer(
    model_config,
    params,
    init_lora(model_config, lora_config, key_lora),
    lora_config,
    grpo,
    OptimConfig.from_config(config.optim, bench.repeats + 1),
    mesh,
    key,
  )

  def call(salt: int) -> None:
    trainer.update(update_rollouts(config, group, model_config.vocab_size, salt))
    jax.block_until_ready(trainer.state)

  first, seconds = _time(call, bench.repeats)
  tokens = bench.batch * (bench.prompt + bench.new)
  speed = tokens / statistics.median(seconds)
  return {
    "tokens_per_second": round(speed, 1),
    "seconds_per_step": round(statistics.median(seconds), 4),
    **_sizes(config),
    "group": group,
    "micro_batch": grpo.micro_batch,
    "lora_rank": lora_config.rank,
    "seconds": seconds,
    "first_call_seconds": first,
    **_model_facts(model_config, params),
    **_utilisation(trainer.flops / statistics.median(seconds), 0.0),
  }


def update_rollouts(config: ConfigDict, group: int, vocab_size: int, salt: int) -> list[Rollout]:
  """Random rows of full length whose rewards differ within each group."""
  bench = config.bench
  draw = random.Random(f"{config.seed}/{salt}")
  rollouts = []
  for i in range(bench.batch):
    if i % group == 0:
      prompt = tuple(draw.randrange(vocab_size) for _ in range(bench.prompt))
    rollouts.append(
      Rollout(
        group=f"{salt}/{i // group}",
        prompt_ids=prompt,
        token_ids=tuple(draw.randrange(vocab_size) for _ in range(bench.new)),
        logprobs=(-1.0,) * bench.new,
        reward=float(i % 2),
      )
    )
  return rollouts


def bench_workflow(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Seed workflow on `bench.batch` validation problems at once: sandbox, calls, sampler."""
  import asyncio

  from awf.system import System

  with System(config, workdir) as system:
    problems = system.validation[: config.bench.batch]
    tokens, failed = [], []

    def call(salt: int) -> None:
      runner = system.runner(salt)  # noise and caches of its own

      async def run_all() -> list[Any]:
        return await asyncio.gather(*(runner.run(system.seed_source, p) for p in problems))

      results = asyncio.run(run_all())
      failed.append(sum(r.failure is not None for r in results))
      tokens.append(sum(r.completion_tokens for r in results))

    first, seconds = _time(call, config.bench.repeats)
    facts = _model_facts(system.policy.config, system.policy.params)
  speeds = [n / s for n, s in zip(tokens[1:], seconds, strict=True)]
  return {
    "tokens_per_second": round(statistics.median(speeds), 1),
    "workflows_per_second": round(len(problems) / statistics.median(seconds), 2),
    "batch": len(problems),
    "failed": max(failed),
    "concurrency": config.executor.concurrency,
    "rows": config.sampler.rows,
    "seconds": seconds,
    "first_call_seconds": first,
    **facts,
  }


def _load(config: ConfigDict) -> tuple[QwenConfig, Any, Mesh]:
  """Architecture, parameters and mesh; no tokenizer is needed."""
  import jax

  from awf.config_io import find_path
  from awf.policy import base_is_turned, dtype_name, load_base
  from awf.qwen import hf
  from awf.qwen.known import find_architecture
  from awf.qwen.quant import QuantConfig
  from awf.qwen.random_base import random_base
  from awf.runtime_setup import setup_jax
  from awf.sharding import make_mesh

  setup_jax()
  mesh = make_mesh(**config.mesh)
  computed = dtype_name(config.model.compute_dtype, "compute_dtype")
  dtype, quant = dtype_name(config.model.dtype, "dtype"), QuantConfig.from_config(config.model)
  where = _placement(mesh)
  if config.bench.weights == "random":
    model_config = find_architecture(config.model.path, find_path(config.model.path), computed)
    is_turned = base_is_turned(where, quant)
    params = random_base(model_config, dtype, where, quant, is_turned, config.seed)
  else:
    path = hf.resolve_path(config.model.path)
    model_config = hf.load_config(path, computed)
    params = load_base(path, model_config, dtype, where, quant)
  return model_config, jax.block_until_ready(params), mesh


def _placement(mesh: Mesh) -> Mesh | None:
  """A mesh of one device is the default device."""
  return mesh if mesh.size > 1 else None


def _time(call: Callable[[int], None], repeats: int) -> tuple[float, list[float]]:
  """Seconds of the first call (compiles) and of each repeat."""
  seconds = []
  for salt in range(repeats + 1):
    start = time.perf_counter()
    call(salt)
    seconds.append(round(time.perf_counter() - start, 4))
    log.info("bench call %d of %d: %.3f s", salt, repeats, seconds[-1])
  return seconds[0], seconds[1:]


def _sizes(config: ConfigDict) -> dict[str, Any]:
  is_range = config.bench.lengths not in ("fixed", "mixed")
  names = ("batch", *(() if is_range else ("prompt", "new")), "group", "lengths")
  return {name: config.bench[name] for name in names}


def _model_facts(model_config: QwenConfig, params: Any) -> dict[str, Any]:
  from awf.qwen.quant import num_bytes

  return {
    "parameters": model_config.num_parameters,
    "dtype": str(params["norm"]["scale"].dtype),
    "compute_dtype": model_config.dtype,
    "weight_gb": round(num_bytes(params) / 1e9, 3),
  }


def _utilisation(flops_per_second: float, bytes_per_second: float) -> dict[str, float]:
  """Shares of the chips' peaks (weights only, attention left out); empty for unknown chips."""
  import jax

  chip = find_chip(jax.devices()[0].device_kind)
  if chip is None:
    return {}
  chips = jax.device_count()
  out = {"mfu": round(flops_per_second / chip.flops / chips, 4)}
  if bytes_per_second:
    out["mbu"] = round(bytes_per_second / chip.bandwidth / chips, 4)
  return out
