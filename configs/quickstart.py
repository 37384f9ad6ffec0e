"""The whole loop with what ships: nano model, nano problems, two CPU cores, no network.

  python launch.py --config=configs/quickstart.py            (this is `make run`)
  python launch.py --config=configs/quickstart.py:smoke      (one round, under a minute)

A 3-million-parameter Qwen-layout model both proposes workflows (base + LoRA) and answers the LLM
calls that these workflows make (base). Groups of 8 proposals for each of 6 parents are scored on
the same problems, and GRPO trains the LoRA. At the end proposals for held-out parents are compared
before and after training. Results of dated runs are in LOG.md.
"""

from configs.args import parse_args
from configs.base import base_config
from configs.common import shrink, use_nano_model


def get_config(arg=None):
  args = parse_args(arg, smoke=False)
  c = use_nano_model(base_config())
  c.name = "quickstart"
  c.task.name = "nano"
  c.task.path = "data/nano/problems.jsonl"

  c.search.rounds = 12
  c.search.parents = 6
  c.search.subset_problems = 16
  c.search.full_problems = 64
  c.search.full_top = 1
  c.search.starts = "data/nano/starts.jsonl"
  c.search.start_share = 0.5

  c.grpo.group_size = 8
  c.optim.learning_rate = 3e-4

  c.eval.parents = "data/nano/parents.jsonl"
  c.eval.parent_count = 24
  c.eval.problems = 100
  return shrink(c) if args.smoke else c
