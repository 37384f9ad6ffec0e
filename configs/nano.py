"""How the shipped nano model was trained: two phases from random weights, 70 minutes on two cores.

  python -m data.nano.build --phase=1                          (tokenizer and 10.6M tokens of text)
  python launch.py --config=configs/nano.py --mode=sft
  python -m data.nano.build --phase=2                          (9.4M tokens)
  python launch.py --config=configs/nano.py:phase=2 --mode=sft
  python -m data.nano.card --model=runs/nano2/model            (its abilities)

Four layers of width 256 in the Qwen2 layout, vocabulary of 1,200 pieces, 3.06M parameters, on text
that the project generates: worked word problems, small programs, and edits of workflows in the
proposal format. Copying numbers emerges late (after about 5M tokens); phase 2 has more arithmetic,
on smaller numbers.
`configs/nano.py:smoke` takes two steps from the shipped weights.
"""

from configs.args import Choice, parse_args
from configs.base import base_config
from configs.common import shrink, use_nano_model


def get_config(arg=None):
  args = parse_args(arg, phase=Choice("1", ("1", "2")), smoke=False)
  c = use_nano_model(base_config())
  c.name = "nano" if args.phase == "1" else "nano2"
  c.task.name = "nano"
  c.task.path = "data/nano/problems.jsonl"

  if args.phase == "1":
    c.model.path = ""
    c.model.tokenizer = "runs/nano_data/tokenizer.model"
    c.model.architecture.vocab_size = 1200
  else:
    c.model.path = "runs/nano/model"

  c.sft.path = f"runs/nano_data/phase{args.phase}.jsonl"
  c.sft.weights = "all"
  c.sft.steps = 2600 if args.phase == "1" else 2300
  c.sft.batch = 8
  c.sft.length = 512
  c.sft.prompt_weight = 0.1
  c.sft.save_dtype = "float32" if args.phase == "1" else "bfloat16"

  c.optim.learning_rate = 2.2e-3 if args.phase == "1" else 2.0e-3
  c.optim.schedule = "cosine"
  c.optim.warmup_steps = 60
  c.optim.weight_decay = 0.05
  c.optim.b2 = 0.98
  if args.smoke:
    shrink(c)
    c.model.tokenizer, c.model.architecture.vocab_size = "", 0
    c.sft.path = "data/smoke/sft.jsonl"
    c.optim.warmup_steps = 1
  return c
