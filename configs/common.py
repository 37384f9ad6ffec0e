"""What several configs share: the models by name, the nano model, and shrinking to a smoke run."""

from __future__ import annotations

from ml_collections import ConfigDict

# Short name -> hub id. All dense Qwen instruct models whose layout awf/qwen knows.
MODELS = {
  "qwen2-7b": "Qwen/Qwen2-7B-Instruct",
  "qwen2-1.5b": "Qwen/Qwen2-1.5B-Instruct",
  "qwen2-0.5b": "Qwen/Qwen2-0.5B-Instruct",
  "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
  "qwen2.5-3b": "Qwen/Qwen2.5-3B-Instruct",
  "qwen2.5-1.5b": "Qwen/Qwen2.5-1.5B-Instruct",
  "qwen2.5-0.5b": "Qwen/Qwen2.5-0.5B-Instruct",
  "qwen3-8b": "Qwen/Qwen3-8B",
  "qwen3-4b": "Qwen/Qwen3-4B",
  "qwen3-1.7b": "Qwen/Qwen3-1.7B",
  "qwen3-0.6b": "Qwen/Qwen3-0.6B",
}


def use_nano_model(c: ConfigDict) -> ConfigDict:
  """The shipped model, with an engine and a prompt that fit it; changes `c` and returns it."""
  c.model.path = "data/nano/model"
  c.lora.rank = 16
  c.lora.alpha = 32.0
  c.sampler.rows = 64
  c.sampler.context = 640
  c.sampler.max_new_tokens = 192
  c.sampler.prefill_rows = 8
  c.executor.max_new_tokens = 192
  c.search.prompt = "compact"  # the proposal format that the model was trained on
  c.search.logs = 0
  c.search.experience = 4
  c.grpo.micro_batch = 16
  return c


def shrink(c: ConfigDict) -> ConfigDict:
  """The same experiment in under a minute on two CPU cores: every stage once, on a few problems."""
  use_nano_model(c)
  c.model.quant = "none"
  c.sampler.rows = 16
  c.sampler.prompt_cache_gb = 0.0  # what these rows need: one compiled sampler for all smoke runs
  c.task.limit = 0
  c.search.rounds = 1
  c.search.parents = 2
  c.search.subset_problems = 2
  c.search.full_problems = 4
  c.search.full_top = 1
  c.search.starts = ""
  c.search.start_share = 0.0
  c.grpo.group_size = 4
  c.eval.samples = 2
  c.eval.pass_k = (1, 2)
  c.eval.problems = 4
  c.eval.parents = ""
  c.eval.parent_count = 0
  c.eval.bootstrap = 200
  c.sft.steps = 2
  c.sft.batch = 4
  c.sft.length = 256
  c.bench.batch = 4
  c.bench.prompt = 16
  c.bench.new = 16
  c.bench.repeats = 1
  return c
