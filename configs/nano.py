"""Trains the shipped nano model from random weights; two CPU cores, about two hours.

  python -m data.nano.build                                              (tokenizer and text)
  python launch.py --config=configs/nano.py --mode=sft --config.sft.save=data/nano/model

Four layers of width 256 in the Qwen2 layout, vocabulary of 1,200 pieces, on generated text: worked
word problems, small programs, and edits of workflows in the proposal format. With `:smoke` two
steps from the shipped weights.
"""

from configs.args import parse_args
from configs.base import base_config
from configs.common import shrink, use_nano_model


def get_config(arg=None):
  args = parse_args(arg, smoke=False)
  c = use_nano_model(base_config())
  c.name = "nano"
  c.model.path = ""  # from random weights
  c.model.tokenizer = "runs/nano_data/tokenizer.model"
  c.model.architecture.vocab_size = 1200
  c.task.name = "nano"
  c.task.path = "data/nano/problems.jsonl"

  c.sft.path = "runs/nano_data/sft.jsonl"
  c.sft.weights = "all"
  c.sft.steps = 20_000
  c.sft.batch = 8
  c.sft.length = 512
  c.sft.prompt_weight = 0.1

  c.optim.learning_rate = 2.2e-3
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 60
  c.optim.weight_decay = 0.05
  c.optim.b2 = 0.98
  if args.smoke:
    shrink(c)
    c.model.path = "data/nano/model"
    c.model.tokenizer = ""
    c.sft.path = "data/smoke/sft.jsonl"
    c.optim.warmup_steps = 1
  return c
