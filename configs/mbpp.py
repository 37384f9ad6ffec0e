"""MBPP: short Python functions, graded by their hidden assertions in a second sandbox.

  python launch.py --config=configs/mbpp.py                          (Qwen2.5-1.5B-Instruct)
  python launch.py --config=configs/mbpp.py:model=qwen3-0.6b
  python launch.py --config=configs/mbpp.py:smoke  (CPU, under a minute, no download)

The home is the sanitised set of 427, split 342 / 85. AFlow's files by their folder
(mbpp_validate.jsonl, mbpp_test.jsonl, mbpp_public_test.jsonl; fields prompt, entry_point,
code, test):
  --config.task.path=AFlow/data/datasets
"""

from configs.args import Choice, parse_args
from configs.base import base_config
from configs.common import MODELS, shrink


def get_config(arg=None):
  args = parse_args(arg, model=Choice("qwen2.5-1.5b", MODELS), smoke=False)
  c = base_config()
  c.name = "mbpp"
  c.model.path = MODELS[args.model]
  c.task.name = "mbpp"

  c.sampler.context = 6144
  c.sampler.max_new_tokens = 1024
  c.executor.max_new_tokens = 768
  c.executor.temperature = 0.7

  c.search.rounds = 20
  c.search.subset_problems = 12
  c.search.full_problems = 0
  c.search.full_top = 1
  c.grpo.micro_batch = 2
  c.grpo.remat = "full"
  c.optim.learning_rate = 1e-5
  if args.smoke:
    shrink(c)
    c.task.path = "data/smoke/mbpp.jsonl"
  return c
