"""GSM8K: grade-school word problems; the data set to compare small models on.

  python launch.py --config=configs/gsm8k.py                       (Qwen2.5-0.5B-Instruct)
  python launch.py --config=configs/gsm8k.py:model=qwen3-0.6b
  python launch.py --config=configs/gsm8k.py:smoke  (CPU, under a minute, no download)

The first 400 problems are used, split 320 / 80. Without access to the hub, give the files:
  --config.model.path=DIR_OF_THE_MODEL --config.task.path=GSM8K.jsonl    (fields question, answer)
"""

from configs.args import Choice, parse_args
from configs.base import base_config
from configs.common import MODELS, shrink


def get_config(arg=None):
  args = parse_args(arg, model=Choice("qwen2.5-0.5b", MODELS), smoke=False)
  c = base_config()
  c.name = "gsm8k"
  c.model.path = MODELS[args.model]
  c.task.name = "gsm8k"
  c.task.limit = 400

  c.sampler.context = 6144
  c.sampler.max_new_tokens = 1024
  c.executor.max_new_tokens = 512
  c.executor.temperature = 0.7

  c.search.rounds = 20
  c.search.subset_problems = 16
  c.search.full_problems = 96
  c.search.full_top = 1
  c.grpo.micro_batch = 2
  c.grpo.remat = "full"
  c.optim.learning_rate = 2e-5
  if args.smoke:
    shrink(c)
    c.task.path = "data/smoke/gsm8k.jsonl"
  return c
