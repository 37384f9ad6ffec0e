"""The whole loop with what ships: nano model, nano problems, two CPU cores, no network.

  python launch.py --config=configs/quickstart.py            (this is `make run`)
  python launch.py --config=configs/quickstart.py:smoke      (one round, under a minute)

A 3-million-parameter Qwen-layout model both proposes workflows (base + LoRA) and answers the LLM
calls that these workflows make (base). Groups of 8 proposals for each of 8 parents are scored on
the same problems, and GRPO trains the LoRA. Before and after, proposals for 16 held-out parents are
scored on problems that training never sees. Results of dated runs are in LOG.md.
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

  c.search.rounds = 10
  c.search.parents = 8
  c.search.smoke_problems = 4  # a program alone answers no problem of some families
  c.search.subset_problems = 18
  c.search.full_problems = 90
  c.search.full_top = 1
  c.search.starts = "data/nano/starts.jsonl"
  c.search.start_share = 0.75  # the policy must learn to improve any workflow, not only the best

  c.grpo.group_size = 8
  c.grpo.steps_per_batch = 3  # one step a batch hardly moves the adapter in ten rounds
  c.grpo.beta = 0.02
  c.grpo.entropy_coef = 0.003
  c.optim.learning_rate = 2e-3

  c.eval.parents = "data/nano/parents.jsonl"
  c.eval.parent_count = 16
  c.eval.proposals_per_parent = 8
  c.eval.parent_problems = 27
  return shrink(c) if args.smoke else c
