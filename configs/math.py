"""MATH: competition problems with LaTeX answers, compared by math-verify.

  python launch.py --config=configs/math.py                          (Qwen2.5-1.5B-Instruct)
  python launch.py --config=configs/math.py:model=qwen3-0.6b
  python launch.py --config=configs/math.py:smoke  (CPU, under a minute, no download)

The home is MATH-500, split 400 / 100. AFlow's files by their folder (math_validate.jsonl,
math_test.jsonl; fields problem, solution):
  --config.task.path=AFlow/data/datasets
"""

from configs.args import Choice, parse_args
from configs.base import base_config
from configs.common import MODELS, shrink


def get_config(arg=None):
  args = parse_args(arg, model=Choice("qwen2.5-1.5b", MODELS), smoke=False)
  c = base_config()
  c.name = "math"
  c.model.path = MODELS[args.model]
  c.task.name = "math"

  c.sampler.context = 6144
  c.sampler.max_new_tokens = 1024
  c.executor.max_new_tokens = 1024
  c.executor.temperature = 0.7

  c.search.rounds = 20
  c.search.subset_problems = 16
  c.search.full_problems = 96
  c.search.full_top = 1
  c.grpo.micro_batch = 2
  c.grpo.remat = "full"
  c.optim.learning_rate = 1e-5
  if args.smoke:
    shrink(c)
    c.task.path = "data/smoke/math.jsonl"
  return c
