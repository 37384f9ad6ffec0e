"""Times the sampler beside vLLM, Hugging Face generate and Tunix on the same work, in turns.

  python tests/sampler_beside.py --model=CHECKPOINT --vllm=VLLM/bin/python --hf=TORCH/bin/python
  python tests/sampler_beside.py --works=small --tunix=TUNIX/bin/python
  python tests/sampler_beside.py --works=16 --model=CHECKPOINT --tunix=TUNIX/bin/python

Each side loads, compiles and warms up in a process of its own; then they work by turns, the others
stopped meanwhile. Every row draws all its tokens at temperature 1 from the whole distribution,
stop ids ignored; prompts are new in every turn. Works (rows, prompt, new, group):

16      16 distinct prompts of 128, 128 new
64      64 distinct prompts of 128, 128 new
8x8     8 prompts of 512 with 8 samples each, 64 new
mixed   128 requests, in and out uniform in 32-256, seed 0
small   the model of 5M parameters of side_by_side.py, 16 prompts of 128, 128 new

The last line is JSON: seconds of every round, tokens/s and the medians of the rounds' ratios.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from side_by_side import SMALL, Ids, tunix_model, turned

ROOT = Path(__file__).resolve().parent.parent
WORKS = {  # rows, prompt, new, group; None: lengths are uniform in 32-256
  "16": (16, 128, 128, 1),
  "64": (64, 128, 128, 1),
  "8x8": (64, 512, 64, 8),
  "mixed": (128, None, None, 1),
  "small": (16, 128, 128, 1),
}
LOW, HIGH = 32, 256


def requests(work, salt):
  """[(prompt ids, new tokens, samples)]; prompts differ from their first token on."""
  rows, prompt, new, group = WORKS[work]
  draw, vocab = random.Random(0), SMALL["vocab_size"] if work == "small" else 30_000
  sizes = [
    (prompt or draw.randint(LOW, HIGH), new or draw.randint(LOW, HIGH))
    for _ in range(rows // group)
  ]
  return [
    ([100 + (salt * 7919 + i * 104729 + j * 31) % (vocab - 100) for j in range(size)], more, group)
    for i, (size, more) in enumerate(sizes)
  ]


def num_tokens(work):
  return sum(new * n for _, new, n in requests(work, 0))


class Awf:
  """The engine in its default (strict) mode, or with --fast without it."""

  def __init__(self, args):
    sys.path[:0] = [str(ROOT)]
    from awf.runtime_setup import setup_jax

    setup_jax()
    import jax
    import jax.numpy as jnp

    from awf.policy import load_base
    from awf.qwen import hf
    from awf.qwen.config import QwenConfig
    from awf.qwen.model import init_params
    from awf.qwen.quant import QuantConfig

    self.args, self.engines = args, {}
    if args.works == ["small"]:
      self.config = QwenConfig(**SMALL)
      # In the layout that a checkpoint of this size would get here.
      self.params = turned(jax.tree.map(jnp.asarray, init_params(self.config, jax.random.key(0))))
    else:
      path = Path(args.model)
      self.config = hf.load_config(path, "float32")
      self.params = load_base(path, self.config, "float32", None, QuantConfig())

  def prepare(self, work):
    from awf.sampler.engine import Engine

    rows, prompt, new, group = WORKS[work]
    context = -(-((prompt or HIGH) + (new or HIGH)) // 128) * 128
    self.engines[work] = Engine(
      self.config, self.params, rows=min(rows, self.args.rows), context=context,
      prefill_rows=min(8, rows // group), steps_per_dispatch=16, max_new_tokens=new or HIGH,
      strict=not self.args.fast,
    )  # fmt: skip

  def turn(self, work, salt):
    from awf.sampler.request import Request

    asked = [
      Request(tuple(ids), n=n, seed=1000 * salt + i, max_new_tokens=new, ignore_eos=True)
      for i, (ids, new, n) in enumerate(requests(work, salt))
    ]
    outputs = self.engines[work].generate(asked)
    return sum(len(o.token_ids) for found in outputs for o in found)


class Vllm:
  """One LLM for all works; --dtype is the one it is fastest with on this machine."""

  def __init__(self, args):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM

    self.llm = LLM(args.model, dtype=args.dtype, max_model_len=640, max_num_seqs=128)

  def prepare(self, work):
    pass

  def turn(self, work, salt):
    from vllm import SamplingParams

    asked = requests(work, salt)
    params = [
      SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, n=n, seed=None)
      for _, new, n in asked
    ]
    found = self.llm.generate(
      [{"prompt_token_ids": ids} for ids, _, _ in asked], params, use_tqdm=False
    )
    return sum(len(o.token_ids) for one in found for o in one.outputs)


class HuggingFace:
  """`generate` on one batch; lengths that differ are not its work."""

  def __init__(self, args):
    import torch
    from transformers import AutoModelForCausalLM

    self.torch = torch
    self.model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)

  def prepare(self, work):
    pass

  def turn(self, work, salt):
    asked = requests(work, salt)
    new = asked[0][1]
    rows = self.torch.tensor([ids for ids, _, n in asked for _ in range(n)])
    out = self.model.generate(
      rows, attention_mask=self.torch.ones_like(rows), max_new_tokens=new, min_new_tokens=new,
      do_sample=True, top_k=0, top_p=1.0, pad_token_id=self.model.config.eos_token_id,
    )  # fmt: skip
    return out[:, rows.shape[1] :].numel()


class Tunix:
  """Its Sampler on the small model, or on the checkpoint's shapes with random weights."""

  def __init__(self, args):
    from tunix.generate import sampler

    sizes = SMALL
    if args.model:
      found = json.loads((Path(args.model) / "config.json").read_text())
      heads = found["num_attention_heads"]
      sizes = {"head_dim": found["hidden_size"] // heads} | found
    self.vocab = sizes["vocab_size"]
    model, config = tunix_model(sizes)
    _, prompt, new, _ = WORKS["small"]  # those of works 16 and 64 too
    self.sampler = sampler.Sampler(
      model,
      Ids(),
      sampler.CacheConfig(
        cache_size=prompt + new, num_layers=config.num_layers, num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
      ),
    )  # fmt: skip

  def prepare(self, work):
    assert WORKS[work][1:] == WORKS["small"][1:], "Tunix has no batch of mixed lengths here"

  def turn(self, work, salt):
    _, prompt, new, _ = WORKS[work]
    found = self.sampler(
      [" ".join(map(str, ids)) for ids, _, _ in requests(work, salt)],
      max_generation_steps=new, max_prompt_length=prompt, temperature=1.0, top_p=1.0, top_k=None,
      seed=salt, eos_tokens=[self.vocab + 7], return_logprobs=True,
    )  # fmt: skip
    return sum(len(ids) for ids in found.tokens)


SIDES = {"awf": Awf, "vllm": Vllm, "hf": HuggingFace, "tunix": Tunix}


def worker(args):
  """One side: a line of JSON [work, salt] starts a turn, one with its seconds ends it."""
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print goes to stderr
  side = SIDES[args.worker](args)
  for line in sys.stdin:
    work, salt = json.loads(line)
    if salt == 0:
      side.prepare(work)
    started = time.perf_counter()
    made = side.turn(work, salt)
    seconds = time.perf_counter() - started
    assert made == num_tokens(work), (made, num_tokens(work))
    answers.write(json.dumps(seconds) + "\n")


class Side:
  """A worker's process, stopped but for its turns."""

  def __init__(self, name, python, flags):
    command = [python, str(ROOT / "tests" / "sampler_beside.py"), f"--worker={name}", *flags]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}
    env |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    self.process = subprocess.Popen(
      command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
      start_new_session=True,
    )  # fmt: skip

  def turn(self, work, salt):
    os.killpg(self.process.pid, signal.SIGCONT)
    self.process.stdin.write(json.dumps([work, salt]) + "\n")
    self.process.stdin.flush()
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"a side ended with {self.process.wait()}")
    os.killpg(self.process.pid, signal.SIGSTOP)
    return json.loads(line)


def compare(args, flags):
  pythons = {"awf": sys.executable, "vllm": args.vllm, "hf": args.hf, "tunix": args.tunix}
  pythons = {name: python for name, python in pythons.items() if python}
  sides, found = {}, {}
  try:
    for name, python in pythons.items():
      sides[name] = Side(name, python, flags)
    for work in args.works:
      names = [n for n in sides if not (n == "hf" and work == "mixed")]
      for name in names:
        print(f"{work} {name} first {sides[name].turn(work, 0):.1f} s", file=sys.stderr, flush=True)
      rounds = []
      for number in range(args.rounds):
        order = names if number % 2 == 0 else names[::-1]
        rounds.append({name: round(sides[name].turn(work, number + 1), 3) for name in order})
        print(f"{work} {rounds[-1]}", file=sys.stderr, flush=True)
      speeds = {n: num_tokens(work) / statistics.median(r[n] for r in rounds) for n in names}
      found[work] = {
        "rounds": rounds,
        "tokens_per_second": {name: round(x, 1) for name, x in speeds.items()},
        "ratio": {
          n: round(statistics.median(r[n] / r["awf"] for r in rounds), 3)
          for n in names if n != "awf"
        },
      }  # fmt: skip
      print(f"{work} {json.dumps(found[work])}", file=sys.stderr, flush=True)
  finally:
    for side in sides.values():
      with contextlib.suppress(ProcessLookupError):
        os.killpg(side.process.pid, signal.SIGKILL)
  print(json.dumps(found))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--worker", choices=list(SIDES))
  parser.add_argument("--model", default="", help="directory of a checkpoint in Qwen2's layout")
  parser.add_argument("--works", default="16,64,8x8,mixed", type=lambda x: x.split(","))
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--rows", type=int, default=64, help="of our engine, at most")
  parser.add_argument("--fast", action="store_true", help="our engine with strict off")
  parser.add_argument("--dtype", default="float32", help="of vLLM")
  for name in ("vllm", "hf", "tunix"):
    parser.add_argument(f"--{name}", default="", help="its Python interpreter")
  args = parser.parse_args()
  if args.tunix and args.model and "small" in args.works:
    parser.error("--model: Tunix has one model, so time small in a run of its own without it")
  if args.worker:
    worker(args)
  else:
    compare(args, sys.argv[1:])


if __name__ == "__main__":
  main()
