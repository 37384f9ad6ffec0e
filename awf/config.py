"""Checks every config value and combination before a model is loaded or a device touched."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from awf import grpo_config
from awf.chips import TARGETS
from awf.config_io import (
  PATH_FIELDS,
  find_path,
  flatten,
  get_field,
  is_object_name,
  named_paths,
)
from awf.remat import POLICIES
from awf.types import UserError

REWARDS = ("parse", "static", "smoke", "runs", "score")
REMOTES = ("executor", "search")  # groups with a field `remote`
REMATS = ("none", "full", *POLICIES)
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUICKSTART = "configs/quickstart.py"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Rule:
  """A test of one value and the words for what was expected."""

  holds: Callable[[Any], bool]
  expected: str
  known: tuple[str, ...] = ()  # of a choice: the nearest one is named


def one_of(*known: str) -> Rule:
  return Rule(lambda v: v in known, f"one of {', '.join(known)}", known)


def some_of(*known: str) -> Rule:
  return Rule(
    lambda v: bool(v) and set(v) <= set(known) and len(set(v)) == len(v),
    f"some of {', '.join(known)}, each once",
    known,
  )


def at_least(low: float) -> Rule:
  return Rule(lambda v: v >= low, f"at least {_text(low)}")


def between(low: float, high: float) -> Rule:
  return Rule(lambda v: low <= v <= high, f"a number in [{_text(low)}, {_text(high)}]")


def _text(number: float) -> str:
  return str(number) if isinstance(number, int) else f"{number:g}"


def above(low: float, high: float = math.inf) -> Rule:
  limit = f" and at most {high:g}" if high < math.inf else ""
  return Rule(lambda v: low < v <= high, f"more than {low:g}{limit}")


_TOKENS = 1 << 20  # of a context, at most; what is far beyond overflows inside the compiler


def _is_lengths(text: str) -> bool:
  match = re.fullmatch(r"([0-9]{1,7})-([0-9]{1,7})", text)
  return text in ("fixed", "mixed") or bool(match and 0 < int(match[1]) <= int(match[2]) <= _TOKENS)


_DTYPES = one_of("auto", "float32", "bfloat16")
_SHARE = between(0, 1)
_SAMPLING = {
  "temperature": between(0, 10),
  "top_p": above(0, 1),
  "top_k": at_least(0),
  "min_p": between(0, 1),
  "max_new_tokens": at_least(1),
}
_REMOTE = {
  "timeout": above(0),
  "retries": between(0, 100),
  "concurrency": between(1, 4096),
  "requests_per_minute": at_least(0),
  "tokens_per_minute": at_least(0),
}
_PRICES = Rule(
  lambda v: len(v) == 2 and min(v) >= 0, "two prices: of a million prompt and generated tokens"
)
_MESH = Rule(lambda v: v == -1 or v >= 1, "a positive size, or -1 for what is left")

RULES: dict[str, Rule] = {
  "seed": between(0, 2**31 - 1),
  "name": Rule(
    lambda v: bool(re.fullmatch(r"[\w.-]+", v)), "letters, digits, dots, dashes and underscores"
  ),
  "metrics": Rule(
    lambda v: all(map(is_object_name, v)) and len(set(v)) == len(v),
    "package.module:function, each once",
  ),
  "model.policy": Rule(is_object_name, "package.module:Class, such as awf.policy:QwenPolicy"),
  "model.dtype": _DTYPES,
  "model.compute_dtype": _DTYPES,
  "model.quant": one_of("none", "int8", "int4"),
  "model.quant_group": at_least(1),
  "model.architecture.family": one_of("qwen2", "qwen3"),
  "model.architecture.vocab_size": at_least(0),
  **{
    f"model.architecture.{name}": at_least(1)
    for name in (
      "hidden_size",
      "intermediate_size",
      "num_hidden_layers",
      "num_attention_heads",
      "num_key_value_heads",
      "head_dim",
      "max_position_embeddings",
    )
  },
  "model.architecture.rope_theta": above(0),
  "sft.save_dtype": one_of("float32", "bfloat16", "float16"),
  "lora.rank": at_least(1),
  "lora.alpha": above(0),
  "lora.targets": some_of(*LORA_TARGETS),
  **{f"{group}.{k}": rule for group in ("sampler", "executor") for k, rule in _SAMPLING.items()},
  "sampler.rows": between(1, 1 << 25),
  "sampler.context": between(16, _TOKENS),
  "sampler.prefill_rows": between(1, 65536),
  "sampler.steps_per_dispatch": between(1, 4096),
  "sampler.queue": at_least(1),
  "sampler.prompt_cache_gb": between(0, 65536),
  "executor.concurrency": at_least(1),
  **{f"{group}.remote.{k}": rule for group in REMOTES for k, rule in _REMOTE.items()},
  **{f"{group}.prices": _PRICES for group in REMOTES},
  "task.name": Rule(
    lambda v: ":" not in v or is_object_name(v), "a data set's name, or package.module:Class"
  ),
  "task.limit": at_least(0),
  "task.split_seed": between(0, 2**31 - 1),
  "task.validation_share": Rule(lambda v: 0 < v < 1, "a share strictly between 0 and 1"),
  "sandbox.workers": between(0, 4096),
  "sandbox.max_children": between(1, 400),
  "sandbox.cpu_seconds": between(0.01, 86_400),
  "sandbox.wall_seconds": between(0.01, 86_400),
  "sandbox.memory_mb": between(64, 1 << 20),
  "sandbox.output_bytes": between(1000, 32 << 20),
  "sandbox.max_calls": between(1, 1_000_000),
  "search.scope": one_of("dataset", "problem"),
  "search.draws": at_least(1),
  "search.selection": one_of("aflow", "uct", "puct"),
  "search.rounds": at_least(0),
  "search.parents": at_least(1),
  "search.sample": at_least(1),
  "search.mix_lambda": _SHARE,
  "search.mix_alpha": at_least(0),
  "search.uct_c": at_least(0),
  "search.converge_rounds": at_least(0),
  "search.converge_z": at_least(0),
  "search.max_calls": at_least(0),
  "search.max_tokens": at_least(0),
  "search.prompt": one_of("full", "compact"),
  "search.operators": Rule(
    lambda v: all(n.isidentifier() or is_object_name(n) for n in v) and len(set(v)) == len(v),
    "names of operators or package.module:Class, each once",
  ),
  "search.repairs": between(0, 3),
  "search.logs": at_least(0),
  "search.experience": at_least(0),
  "search.smoke_problems": at_least(1),
  "search.subset_problems": at_least(1),
  "search.full_problems": at_least(0),
  "search.full_top": at_least(0),
  "search.curriculum": one_of("none", "easy_first", "hard_first"),
  "search.curriculum_share": _SHARE,
  "search.start_share": _SHARE,
  "search.driver": one_of("awf", "aflow"),
  "aflow.validation_rounds": between(1, 100),
  **{f"reward.{stage}": between(-10, 10) for stage in REWARDS},
  "reward.function": Rule(lambda v: not v or is_object_name(v), "package.module:function"),
  "executor.client": Rule(lambda v: not v or is_object_name(v), "package.module:Class"),
  "grpo.group_size": at_least(2),
  "grpo.advantage": one_of(*grpo_config.ADVANTAGES),
  "grpo.loss": one_of(*grpo_config.LOSSES),
  "grpo.kl": one_of(*grpo_config.KL_ESTIMATES),
  "grpo.kl_in": one_of(*grpo_config.KL_PLACES),
  "grpo.importance": one_of(*grpo_config.IMPORTANCE),
  "grpo.gamma": _SHARE,
  "grpo.lam": _SHARE,
  "grpo.value_clip": at_least(0),
  "grpo.dual_clip": at_least(0),
  "grpo.ratio_max": at_least(0),
  "grpo.cispo_max": above(0),
  "grpo.sapo_tau_pos": above(0),
  "grpo.sapo_tau_neg": above(0),
  **{f"grpo.entropy_{name}": at_least(0) for name in ("coef", "target", "delta", "min", "max")},
  "grpo.importance_min": at_least(0),
  "grpo.importance_max": above(0),
  "grpo.horizon": at_least(0),
  "grpo.overlong_buffer": at_least(0),
  "grpo.overlong_penalty": at_least(0),
  "grpo.refill": at_least(0),
  "grpo.remat": Rule(
    lambda v: str(v).lower().removesuffix("_saveable") in (*REMATS, "true", "false"),
    f"one of {', '.join(REMATS)}",
    REMATS,
  ),
  "grpo.std_eps": above(0),
  "grpo.clip_low": between(0, 1),
  "grpo.clip_high": at_least(0),
  "grpo.beta": at_least(0),
  "grpo.aggregation": one_of(*grpo_config.AGGREGATIONS),
  "grpo.steps_per_batch": at_least(1),
  "grpo.micro_batch": at_least(1),
  "grpo.vocab_chunk": at_least(1),
  "optim.learning_rate": at_least(0),
  "optim.schedule": one_of("constant", "cosine", "linear"),
  "optim.warmup_steps": at_least(0),
  "optim.total_steps": at_least(0),
  "optim.weight_decay": at_least(0),
  "optim.b1": Rule(lambda v: 0 <= v < 1, "a number in [0, 1)"),
  "optim.b2": Rule(lambda v: 0 <= v < 1, "a number in [0, 1)"),
  "optim.eps": above(0),
  "optim.grad_clip": at_least(0),
  "optim.critic_learning_rate": at_least(0),
  "train.epochs": at_least(1),
  "train.episodes": at_least(1),
  "train.problems": at_least(0),
  "train.checkpoint_every": at_least(1),
  "train.keep_checkpoints": at_least(1),
  "train.minutes": at_least(0),
  "train.nonfinite_limit": at_least(1),
  "eval.samples": at_least(1),
  "eval.pass_k": Rule(lambda v: bool(v) and all(k >= 1 for k in v), "positive integers"),
  "eval.votes": between(1, 1000),
  "eval.problems": at_least(0),
  "eval.parent_count": at_least(0),
  "eval.proposals_per_parent": at_least(1),
  "eval.parent_problems": at_least(1),
  "eval.bootstrap": at_least(100),
  "mesh.data": _MESH,
  "mesh.fsdp": _MESH,
  "mesh.tensor": _MESH,
  "distributed.num_processes": at_least(0),
  "distributed.process_id": at_least(-1),
  "distributed.timeout": at_least(5),
  "sft.weights": one_of("lora", "all"),
  "sft.steps": at_least(1),
  "sft.batch": at_least(1),
  "sft.length": at_least(8),
  "sft.prompt_weight": _SHARE,
  "sft.log_every": at_least(1),
  "export.format": one_of("peft", "merged"),
  "export.dtype": one_of("auto", "float32", "bfloat16", "float16"),
  "export.shard_bytes": at_least(1),
  "generate.sampling": one_of("config", "checkpoint"),
  "serve.port": between(0, 65535),
  "serve.max_body_mb": above(0, 65536),
  "serve.shutdown_seconds": between(0, 86400),
  "bench.what": one_of("sampler", "update", "workflow"),
  "bench.batch": between(1, 65536),
  "bench.prompt": between(1, _TOKENS),
  "bench.new": between(1, _TOKENS),
  "bench.group": at_least(1),
  "bench.lengths": Rule(_is_lengths, "fixed, mixed, or LOW-HIGH such as 32-256"),
  "bench.repeats": at_least(1),
  "bench.weights": one_of("checkpoint", "random"),
  "plan.target": one_of(*TARGETS),
  "plan.programs": some_of("sampler", "update", "logprobs"),
  "plan.prompt": at_least(0),
  "plan.new": at_least(0),
  "plan.problem_prompt": at_least(1),
  "plan.calls": at_least(1),
  "plan.reserve_gb": at_least(0),
  "plan.trials": at_least(0),
  "backup.keep": at_least(1),
  "backup.wait": at_least(0),
}


def validate(config: ConfigDict, mode: str = "train") -> None:
  """Checks ranges, combinations and named files of a config for one mode.

  Raises:
    UserError: the first value that cannot work: field, what was expected, what it is.
  """
  for name, value in flatten(config).items():
    if isinstance(value, float) and not math.isfinite(value):
      raise UserError(f"config.{name} = {value}: expected a finite number")
    rule = RULES.get(name)
    if rule and not rule.holds(value):
      raise UserError(f"config.{name} = {value!r}: expected {rule.expected}{_nearest(rule, value)}")
  _check_combinations(config)
  for group in REMOTES:
    _check_remote(config[group].remote, f"config.{group}.remote")
  if config.executor.client and config.executor.remote.url:
    raise UserError(
      "config.executor.client and config.executor.remote.url: expected one of them, both answer "
      "the calls of workflows; leave the other empty"
    )
  if mode in ("train", "bench") and config.search.remote.url:
    raise UserError(
      f"config.search.remote.url: mode {mode} is about the policy that proposes; use "
      "--mode=search, or config.executor.remote for the workflows' calls"
    )
  if config.search.driver == "aflow":
    _check_aflow(config, mode)
  from_nothing = mode == "sft" and not config.model.path and config.model.architecture.vocab_size
  if mode != "report" and not from_nothing and not is_remote_alone(config, mode):
    _check_model(config)
  if mode == "sft" and not config.sft.path:
    raise UserError(
      "config.sft.path is empty: mode sft needs JSON lines of {prompt, response}; set "
      "--config.sft.path"
    )
  for name in PATH_FIELDS:
    text = get_field(config, name)
    if name.startswith("task.") and text.startswith("hf://"):
      continue  # looked up when the data set is loaded
    if text and name != "model.path" and not _exists(text):
      raise UserError(
        f"config.{name} = {text!r}: no such file; set --config.{name} to one that exists"
      )
  _check_adapters(config)


def is_remote_alone(config: ConfigDict, mode: str = "search") -> bool:
  """Whether remote models answer and propose, so that no local model is loaded."""
  return mode in ("search", "eval") and all(config[group].remote.url for group in REMOTES)


def _check_aflow(config: ConfigDict, mode: str) -> None:
  """What upstream AFlow cannot be combined with."""
  if mode == "train":
    raise UserError(
      "config.search.driver = 'aflow': AFlow searches and trains nothing; use --mode=search, or "
      "config.search.driver=awf"
    )
  if not config.aflow.path and mode == "search":
    raise UserError(
      "config.aflow.path is empty: config.search.driver=aflow needs a checkout of "
      "FoundationAgents/AFlow"
    )
  for group in REMOTES:
    if config[group].remote.url:
      raise UserError(
        f"config.{group}.remote.url: with config.search.driver=aflow our own server answers; give "
        "the endpoint to AFlow itself, or set config.search.driver=awf"
      )
  if config.distributed.coordinator:
    raise UserError("config.distributed.coordinator: AFlow (config.search.driver) is one process")


def _check_remote(remote: ConfigDict, field: str) -> None:
  """An address without a password, a model's name, and no key where the name of one belongs.

  What might hold a secret is not repeated.
  """
  if remote.key_env and not re.fullmatch(r"[A-Za-z_]\w*", remote.key_env):
    raise UserError(
      f"{field}.key_env: expected the name of an environment variable, such as OPENAI_API_KEY; "
      "the key itself belongs in none of the config's fields"
    )
  if not remote.url:
    return
  try:
    parts = urllib.parse.urlsplit(remote.url)
    is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
  except ValueError:
    is_address = False
  if not is_address or parts.username or parts.password or parts.query:
    raise UserError(
      f"{field}.url: expected http(s)://HOST[:PORT]/PATH without user, password and query; "
      f"a key is read from the environment variable that {field}.key_env names"
    )
  if not remote.model:
    raise UserError(f"{field}.model is empty: expected the name that {remote.url} has for it")


def _exists(text: str) -> bool:
  """Whether a file is there, or may be: of other places than this machine nothing is known."""
  return "://" in text or find_path(text).exists()


def _check_adapters(config: ConfigDict) -> None:
  """The adapters to load are directories of PEFT's layout."""
  adapters = {f"lora.paths ({n})": path for n, path in named_paths(config.lora.paths).items()}
  if config.lora.init_path:
    adapters["lora.init_path"] = config.lora.init_path
  for field, text in adapters.items():
    if not (find_path(text) / "adapter_config.json").is_file():
      raise UserError(
        f"config.{field} = {text!r}: expected the directory of a PEFT adapter, found no "
        "adapter_config.json there"
      )


def _nearest(rule: Rule, value: Any) -> str:
  """`; did you mean X?` for a value that is near a choice."""
  wrong = [v for v in (value if isinstance(value, tuple) else (value,)) if v not in rule.known]
  near = [x for v in wrong for x in difflib.get_close_matches(str(v), rule.known, n=1, cutoff=0.5)]
  return f"; did you mean {near[0]}?" if near else ""


def longest_completion(config: ConfigDict) -> int:
  """Most new tokens that any request of this config asks for."""
  return max(config.sampler.max_new_tokens, config.executor.max_new_tokens)


def _check_combinations(config: ConfigDict) -> None:
  """Values that are fine alone and wrong together."""
  c = config
  grpo_config.GRPOConfig.from_config(c.grpo, c.sampler.max_new_tokens)
  for field in ("sampler.max_new_tokens", "executor.max_new_tokens"):
    if get_field(c, field) >= c.sampler.context:
      raise UserError(
        f"config.{field} = {get_field(c, field)} leaves no room for a prompt in "
        f"config.sampler.context = "
        f"{c.sampler.context}; lower the first or raise the second"
      )
  if max(c.eval.pass_k) > c.eval.samples:
    raise UserError(
      f"config.eval.pass_k = {c.eval.pass_k}: pass@k needs at least k samples; "
      f"raise config.eval.samples = {c.eval.samples} to {max(c.eval.pass_k)}"
    )
  if c.bench.batch % c.bench.group:
    raise UserError(
      f"config.bench.batch = {c.bench.batch} counts rows: expected a multiple of "
      f"config.bench.group = {c.bench.group}"
    )
  if c.bench.what == "workflow" and c.bench.weights == "random":
    raise UserError(
      "config.bench.weights = 'random': random weights write no answers; measure config.bench.what "
      "= sampler or update with them"
    )
  if c.model.quant != "none" and c.sft.weights == "all":
    raise UserError(
      f"config.model.quant = {c.model.quant!r}: a quantised base is frozen; set "
      "config.model.quant=none, or config.sft.weights=lora"
    )
  a = c.model.architecture
  if a.num_attention_heads % a.num_key_value_heads:
    raise UserError(
      f"config.model.architecture.num_key_value_heads = {a.num_key_value_heads}: expected a "
      f"divisor of config.model.architecture.num_attention_heads = {a.num_attention_heads}"
    )
  sizes = [c.mesh.data, c.mesh.fsdp, c.mesh.tensor]
  if sizes.count(-1) > 1:
    raise UserError(
      f"config.mesh.data, config.mesh.fsdp, config.mesh.tensor = {sizes}: at most one may be -1"
    )
  if 0 < c.optim.total_steps < c.optim.warmup_steps:
    raise UserError(
      f"config.optim.warmup_steps = {c.optim.warmup_steps}: expected at most "
      f"config.optim.total_steps = "
      f"{c.optim.total_steps}"
    )
  if c.search.start_share > 0 and not c.search.starts:
    raise UserError(
      "config.search.start_share > 0 needs start workflows: set config.search.starts, or "
      "config.search.start_share=0"
    )
  if c.train.problems and c.search.scope != "problem":
    raise UserError(
      f"config.train.problems = {c.train.problems}: expected 0 with config.search.scope = "
      f"{c.search.scope!r}, which searches on all problems at once; set config.search.scope=problem"
    )
  if c.search.workspace and c.search.scope == "problem":
    raise UserError(
      "config.search.workspace: a workspace of AFlow is a search over a data set; set "
      "config.search.scope=dataset, or leave it empty"
    )
  if c.eval.parent_count > 0 and not c.eval.parents:
    raise UserError(
      "config.eval.parent_count > 0 needs held-out parents: set config.eval.parents, or "
      "config.eval.parent_count=0"
    )
  if c.sandbox.wall_seconds < c.sandbox.cpu_seconds:
    raise UserError(
      f"config.sandbox.wall_seconds = {c.sandbox.wall_seconds:g}: expected at least "
      f"config.sandbox.cpu_seconds = {c.sandbox.cpu_seconds:g}"
    )


def _check_model(config: ConfigDict) -> None:
  """The model is a directory with a config.json, or looks like a hub id (`owner/name`)."""
  text = config.model.path
  hint = (
    "set --config.model.path to a Hugging Face directory, or try "
    f"--config={QUICKSTART}, which needs no download"
  )
  if not text:
    raise UserError(f"config.model.path is empty; {hint}")
  path = find_path(text)
  if path.exists():
    if not Path(path, "config.json").is_file():
      raise UserError(f"config.model.path = {text!r} has no config.json; {hint}")
  elif not _HUB_ID.fullmatch(text):
    raise UserError(f"config.model.path = {text!r}: no such directory; {hint}")
