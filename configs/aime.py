"""AIME 2024: searches and learns workflows for 30 competition problems (24 validation, 6 test).

  python launch.py --config=configs/aime.py                        (Qwen2-7B-Instruct, int8 base)
  python launch.py --config=configs/aime.py:model=qwen2.5-0.5b     (fits an 8 GB chip)
  python launch.py --config=configs/aime.py:smoke  (CPU, under a minute, no download)

The base of the 7B and 8B models is held in int8 (7.6 GB for Qwen2-7B, 15 GB in bfloat16, by
--config.model.quant=none). `--mode=plan --config.plan.target=v5e-1` says what fits a chip.
Without access to the hub, give the files:
  --config.model.path=DIR_OF_THE_MODEL --config.task.path=AIME.jsonl    (fields id, problem, answer)
"""

from configs.args import Choice, parse_args
from configs.base import base_config
from configs.common import MODELS, shrink


def get_config(arg=None):
  args = parse_args(arg, model=Choice("qwen2-7b", MODELS), smoke=False)
  c = base_config()
  c.name = "aime"
  c.model.path = MODELS[args.model]
  c.model.quant = "int8" if args.model.endswith(("-7b", "-8b")) else "none"
  c.task.name = "aime"

  # With these sizes Qwen2-7B in int8 searches and trains on one chip of 16 GB (v5e-1).
  c.sampler.context = 5120  # the full prompt with its failure log, and the proposal
  c.sampler.max_new_tokens = 1024
  if args.model == "qwen2-7b":
    c.sampler.prompt_cache_gb = 1.0  # four full prompts and some more
  c.executor.max_new_tokens = 1024
  c.executor.temperature = 0.7
  c.executor.top_p = 0.95

  c.search.rounds = 20
  c.search.parents = 4
  c.search.subset_problems = 8
  c.search.full_problems = 0
  c.search.full_top = 1
  c.grpo.group_size = 8
  c.grpo.micro_batch = 24  # 6,144 tokens a pass: a prompt of 4,096 and two proposals of 1,024
  c.grpo.remat = "full"
  c.optim.learning_rate = 1e-5
  if args.smoke:
    shrink(c)
    c.task.path = "data/smoke/aime.jsonl"
  return c
