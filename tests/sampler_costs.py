"""What parts of the sampler cost on this machine, in turns with the same work without them.

  python tests/sampler_costs.py --model=CHECKPOINT [--works=top-p,adapters,first] [--rounds=5]

top-p     16 rows at top-p 0.95 against plain sampling, processor seconds of a decode step. The
          model is the checkpoint's architecture with random weights and a vocabulary of 151,936,
          at a temperature that makes its distributions about as narrow as a language model's
adapters  16 rows of which half use an adapter of rank 16, against the base alone, likewise
first     seconds of the first call of a new process with a warm compilation cache, engine and all:
          16 prompts of 128 tokens are prefilled, a token of each is drawn; `again` is the same call
          with other prompts
first-one the same with a single prompt

The last line is JSON: every round, and medians of ratios or of seconds.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from side_by_side import turned

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

ROWS, PROMPT, NEW = 16, 128, 64
VOCAB, TEMPERATURE = 151_936, 0.1  # logits of the random model have a deviation of 0.48
RANK = 16


def engine(config, params):
  from awf.sampler.engine import Engine

  return Engine(
    config, params, rows=ROWS, context=PROMPT + NEW, prefill_rows=8, steps_per_dispatch=16,
    max_new_tokens=NEW,
  )  # fmt: skip


def call(engine, salt, rows=ROWS, **fields):
  """Draws NEW tokens in each of these rows; `fields` of requests may be functions of the row."""
  from awf.sampler.request import Request

  return engine.generate(
    Request(
      tuple(100 + (salt * 7919 + i * 104729 + j * 31) % 30_000 for j in range(PROMPT)),
      seed=1000 * salt + i,
      ignore_eos=True,
      **{"max_new_tokens": NEW, **{k: x(i) if callable(x) else x for k, x in fields.items()}},
    )
    for i in range(rows)
  )


def in_turns(engine, rounds, plain, other):
  """Processor seconds of the decode steps: [{plain, other}]; sides are (adapters, fields)."""
  found = []
  for number in range(-1, rounds):  # the first compiles
    spent = {}
    for name in ("plain", "other")[:: 1 if number % 2 else -1]:
      loras, fields = plain if name == "plain" else other
      engine.set_adapters(loras)
      call(engine, 1000 + number, **{**fields, "max_new_tokens": 1})  # its prompts are known now
      began = time.process_time()
      call(engine, 1000 + number, **fields)
      spent[name] = round(time.process_time() - began, 3)
    if number >= 0:
      found.append(spent)
  return found


def load(args):
  from awf.policy import load_base
  from awf.qwen import hf
  from awf.qwen.quant import QuantConfig

  config = hf.load_config(Path(args.model), "float32")
  return config, load_base(Path(args.model), config, "float32", None, QuantConfig())


def top_p(args):
  import jax
  import jax.numpy as jnp

  from awf.qwen import hf
  from awf.qwen.model import init_params

  config = hf.load_config(Path(args.model), "float32")
  config = dataclasses.replace(config, vocab_size=VOCAB)
  params = turned(jax.tree.map(jnp.asarray, init_params(config, jax.random.key(0))))
  with engine(config, params) as made:
    plain = {"temperature": TEMPERATURE}
    return in_turns(made, args.rounds, (None, plain), (None, plain | {"top_p": 0.95}))


def adapters(args):
  import jax

  from awf.qwen.lora import LoRAConfig, init_lora, scaled, stack_adapters

  config, params = load(args)
  lora_config = LoRAConfig(rank=RANK, alpha=2.0 * RANK)
  lora = scaled(init_lora(config, lora_config, jax.random.key(1)), lora_config)
  with engine(config, params) as made:
    mixed = {"adapter": lambda row: row % 2}
    return in_turns(made, args.rounds, (None, {}), (stack_adapters([lora]), mixed))


def first(args, rows=ROWS):
  """Seconds in processes of their own: [{wall, processor, again}]; the first fills the cache."""
  found = []
  for _ in range(args.rounds + 1):
    command = [sys.executable, __file__, f"--model={args.model}", f"--one-call={rows}"]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found.append(json.loads(line.splitlines()[-1]))
  return found[1:]


def one_call(args):
  config, params = load(args)
  import jax

  jax.block_until_ready(params)
  began, spent = time.perf_counter(), time.process_time()
  with engine(config, params) as made:
    call(made, 1, args.one_call, max_new_tokens=1)
    wall, processor = time.perf_counter() - began, time.process_time() - spent
    began = time.perf_counter()
    call(made, 2, args.one_call, max_new_tokens=1)
    again = time.perf_counter() - began
  return {"wall": round(wall, 3), "processor": round(processor, 3), "again": round(again, 3)}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--model", required=True)
  parser.add_argument(
    "--works", default="top-p,adapters,first,first-one", type=lambda x: x.split(",")
  )
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--one-call", type=int, default=0, help="rows; what `first` starts itself")
  args = parser.parse_args()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from awf.runtime_setup import setup_jax

  setup_jax()
  if args.one_call:
    print(json.dumps(one_call(args)))
    return
  sides = {"top-p": top_p, "adapters": adapters, "first": first}
  sides["first-one"] = functools.partial(first, rows=1)
  found = {}
  for work in args.works:
    rounds = sides[work](args)
    found[work] = {"rounds": rounds}
    if work.startswith("first"):
      for part in rounds[0]:
        found[work][part] = statistics.median(r[part] for r in rounds)
    else:
      found[work]["ratio"] = round(statistics.median(r["other"] / r["plain"] for r in rounds), 3)
    print(f"{work} {json.dumps(found[work])}", file=sys.stderr, flush=True)
  print(json.dumps(found))


if __name__ == "__main__":
  main()
