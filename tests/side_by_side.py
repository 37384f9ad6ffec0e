"""Times the update, and a whole GRPO iteration, beside torch + peft or Tunix, in turns.

  python tests/side_by_side.py --other=tunix --python=TUNIX/bin/python
  python tests/side_by_side.py --other=torch --python=TORCH/bin/python --model=CHECKPOINT --group=8

Both sides load, compile and warm up first, each in a process of its own; then they work by turns,
one round after the other, while the other one waits. Work of a side:

awf    GRPOTrainer.update: the reference pass, and the train step with its metrics ("step"); for an
       iteration the engine's rollouts and the new adapter besides. Weights lie as the program puts
       a checkpoint's on a CPU.
tunix  its GRPOLearner on the same architecture: update_actor (the train step, to be compared with
       our "step"; ratio "update" is against our whole update), the reference pass, the iteration.
torch  transformers + peft: reference log-probs with the adapter off, log-probs of the completions,
       the same loss, backward to the LoRA, AdamW. Head on completion tokens alone, in chunks of
       --chunk, rows in micro-batches of --micro (ours of --own-micro): try which are fastest.

Without --model it is a random model of 5M parameters. The last line is JSON: seconds of every
round, medians and ratios (median of the rounds' ratios).
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(
  vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
  num_attention_heads=4, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
RANK, BETA, LEARNING_RATE = 16, 0.04, 1e-5
CLIP = 0.2


def token_rows(args, vocab_size, salt):
  """(prompts, completions, rewards) of a batch; the rows of a group share their prompt."""
  draw = random.Random(f"{args.seed}/{salt}")

  def ids(size):
    return [draw.randrange(3, vocab_size) for _ in range(size)]

  prompts = [p for p in (ids(args.prompt) for _ in range(args.rows // args.group))]
  rows = [prompts[i // args.group] for i in range(args.rows)]
  return rows, [ids(args.new) for _ in rows], [float(i % 2) for i in range(args.rows)]


def odd_share(ids):
  return sum(int(x) % 2 for x in ids) / max(1, len(ids))


def turned(params):
  """Plain weights in the layout that a checkpoint gets on a CPU (awf.policy.load_base)."""
  import jax.numpy as jnp

  if not isinstance(params, dict):
    return params
  return {
    ("kernel_t" if name == "kernel" else name): jnp.array(x.T) if name == "kernel" else turned(x)
    for name, x in params.items()
  }


class Awf:
  """This project's side."""

  def __init__(self, args):
    sys.path[:0] = [str(ROOT)]
    from awf.runtime_setup import setup_jax

    setup_jax()
    import jax
    import jax.numpy as jnp

    from awf.grpo.config import GRPOConfig, OptimConfig
    from awf.grpo.trainer import GRPOTrainer
    from awf.policy import load_base
    from awf.qwen import hf
    from awf.qwen.config import QwenConfig
    from awf.qwen.lora import LoRAConfig
    from awf.qwen.model import init_params
    from awf.qwen.quant import QuantConfig

    self.args, self.jax = args, jax
    if args.model:
      self.config = hf.load_config(Path(args.model), "float32")
      self.params = load_base(Path(args.model), self.config, "float32", None, QuantConfig())
    else:
      self.config = QwenConfig(**SMALL)
      self.params = turned(jax.tree.map(jnp.asarray, init_params(self.config, jax.random.key(0))))
    self.lora_config = LoRAConfig(rank=RANK, alpha=2.0 * RANK)
    self.trainer = GRPOTrainer(
      self.config, self.params, None, self.lora_config,
      GRPOConfig(
        group_size=args.group, beta=BETA, clip_low=CLIP, clip_high=CLIP, horizon=args.new,
        micro_batch=args.own_micro, remat=args.remat,
      ),
      OptimConfig(learning_rate=LEARNING_RATE), None, jax.random.key(1),
    )  # fmt: skip
    self.engine = self._engine() if args.iteration else None
    self.spent_on_reference = 0.0
    self._score, self.trainer._score = self.trainer._score, self._timed_score

  def _timed_score(self, *args):
    begun = time.perf_counter()
    found = self.jax.block_until_ready(self._score(*args))
    self.spent_on_reference += time.perf_counter() - begun
    return found

  def _engine(self):
    from awf.sampler.engine import Engine

    args = self.args
    context = -(-(args.prompt + args.new) // 128) * 128
    engine = Engine(
      self.config, self.params, rows=args.rows, context=context,
      prefill_rows=args.rows // args.group, steps_per_dispatch=16, max_new_tokens=args.new,
    )  # fmt: skip
    self._serve(engine)
    return engine

  def _serve(self, engine):
    from awf.qwen.lora import scaled, stack_adapters

    engine.set_adapters(stack_adapters([scaled(self.trainer.state.lora, self.lora_config)]))

  def turn(self, number):
    from awf.types import Rollout

    rows, completions, rewards = token_rows(self.args, self.config.vocab_size, number)
    start, spent = time.perf_counter(), {}
    if self.engine is not None:
      completions, logps = self._rollouts(rows, number)
      rewards = [odd_share(ids) for ids in completions]
      spent["rollout"] = time.perf_counter() - start
    else:
      logps = [(-1.0,) * self.args.new] * len(rows)
    rollouts = [
      Rollout(
        group=str(i // self.args.group), prompt_ids=tuple(rows[i]), token_ids=tuple(completions[i]),
        logprobs=tuple(logps[i]), reward=rewards[i],
      )
      for i in range(len(rows))
    ]  # fmt: skip
    begun, self.spent_on_reference = time.perf_counter(), 0.0
    metrics = self.trainer.update(rollouts)
    self.jax.block_until_ready(self.trainer.state)
    spent["update"] = time.perf_counter() - begun
    spent["reference"] = self.spent_on_reference
    spent["step"] = spent["update"] - spent["reference"]
    assert not metrics["skipped"]
    if self.engine is not None:
      self._serve(self.engine)
      spent["iteration"] = time.perf_counter() - start
    return spent

  def _rollouts(self, rows, number):
    from awf.sampler.request import Request

    group = self.args.group
    requests = [
      Request(
        tuple(rows[i]), n=group, seed=1000 * number + i, max_new_tokens=self.args.new, adapter=1,
        ignore_eos=True,
      )
      for i in range(0, len(rows), group)
    ]  # fmt: skip
    outputs = [o for found in self.engine.generate(requests) for o in found]
    return [o.token_ids for o in outputs], [o.logprobs for o in outputs]


class Torch:
  """transformers + peft."""

  def __init__(self, args):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    self.args, self.torch = args, torch
    if args.model:
      model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=args.attention
      )
    else:
      sizes = {k: v for k, v in SMALL.items() if k != "head_dim"}
      config = Qwen2Config(**sizes, attn_implementation=args.attention)
      model = Qwen2ForCausalLM(config)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    self.model = get_peft_model(
      model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=projections)
    )
    self.inner = self.model.get_base_model()
    self.hidden = torch.compile(self.inner.model) if args.compile else self.inner.model
    self.vocab_size = self.inner.config.vocab_size
    trained = [p for p in self.model.parameters() if p.requires_grad]
    self.trained = trained
    self.optimizer = torch.optim.AdamW(
      trained, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0
    )

  def logps(self, tokens, no_grad):
    """Log-probs [rows, new] of the completions."""
    torch, args = self.torch, self.args
    hidden = self.hidden(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
    hidden = hidden[:, args.prompt - 1 :].reshape(-1, hidden.shape[-1])
    targets = tokens[:, args.prompt :].reshape(-1)
    size = args.chunk or len(targets)

    def of_chunk(h, t):
      return -torch.nn.functional.cross_entropy(self.inner.lm_head(h), t, reduction="none")

    def run(h, t):
      if no_grad or size == len(targets):
        return of_chunk(h, t)
      return torch.utils.checkpoint.checkpoint(of_chunk, h, t, use_reentrant=False)

    parts = [run(hidden[i : i + size], targets[i : i + size]) for i in range(0, len(targets), size)]
    return torch.cat(parts).reshape(len(tokens), -1)

  def turn(self, number):
    torch, args = self.torch, self.args
    rows, completions, rewards = token_rows(args, self.vocab_size, number)
    start = time.perf_counter()
    tokens = torch.tensor([p + c for p, c in zip(rows, completions, strict=True)])
    reward = torch.tensor(rewards).reshape(-1, args.group)
    mean, std = reward.mean(1, keepdim=True), reward.std(1, keepdim=True)
    advantage = ((reward - mean) / (std + 1e-4)).reshape(-1, 1)
    size, total = args.micro or args.rows, args.rows * args.new
    for i in range(0, args.rows, size):
      part, a = tokens[i : i + size], advantage[i : i + size]
      with torch.no_grad(), self.model.disable_adapter():
        ref = self.logps(part, True)
      logp = self.logps(part, False)
      ratio = torch.exp(logp - logp.detach())
      clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
      k3 = torch.exp(ref - logp) - (ref - logp) - 1
      loss = (-torch.minimum(ratio * a, clipped * a) + BETA * k3).sum() / total
      loss.backward()
    torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
    self.optimizer.step()
    self.optimizer.zero_grad(set_to_none=True)
    return {"update": time.perf_counter() - start}


def tunix_model(sizes=SMALL):
  """A model of these sizes as Tunix has it, and its config; its weights are noise."""
  import jax
  import jax.numpy as jnp
  from flax import nnx
  from tunix.models.qwen2 import model as qwen2

  config = qwen2.ModelConfig(
    num_layers=sizes["num_hidden_layers"], vocab_size=sizes["vocab_size"],
    embed_dim=sizes["hidden_size"], hidden_dim=sizes["intermediate_size"],
    num_heads=sizes["num_attention_heads"], head_dim=sizes["head_dim"],
    num_kv_heads=sizes["num_key_value_heads"], rope_theta=1_000_000, norm_eps=1e-6,
    use_tied_embedding=True, dtype=jnp.float32, param_dtype=jnp.float32,
  )  # fmt: skip
  graph, state = nnx.split(qwen2.Qwen2(config, rngs=nnx.Rngs(0)))  # MLP kernels start at zero
  leaves, form = jax.tree.flatten(state)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  leaves = [
    0.02 * jax.random.normal(k, x.shape, x.dtype) if x.ndim > 1 else x
    for k, x in zip(keys, leaves, strict=True)
  ]
  return nnx.merge(graph, jax.tree.unflatten(form, leaves)), config


class Tunix:
  """GRPOLearner; a turn is one of its steps, held back where it asks for rollouts."""

  def __init__(self, args):
    os.environ.setdefault("WANDB_MODE", "disabled")
    self.args = args
    self.waited, self.last, self.spent = 0.0, 0.0, {}

  def run(self, wait, tell):
    """Trains; before each step `wait()` blocks, after it `tell(seconds)` is called."""
    import jax
    import numpy as np
    import optax
    import qwix
    from flax import nnx
    from tunix.rl import rl_cluster
    from tunix.rl.grpo import grpo_learner
    from tunix.rl.rollout import base_rollout

    args = self.args
    base, _ = tunix_model()
    provider = qwix.LoraProvider(
      module_path=".*(q|k|v|o|gate|up|down)_proj", rank=RANK, alpha=2.0 * RANK
    )
    actor = qwix.apply_lora_to_model(base, provider, rngs=nnx.Rngs(0), **base.get_model_input())
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    roles = rl_cluster.Role
    cluster_config = rl_cluster.ClusterConfig(
      role_to_mesh={r: mesh for r in (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT)},
      rollout_engine="vanilla",
      offload_to_cpu=False,
      training_config=rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(LEARNING_RATE), eval_every_n_steps=10_000, max_steps=args.steps
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=args.new, max_prompt_length=args.prompt,
        kv_cache_size=args.prompt + args.new, temperature=1.0, top_p=1.0, top_k=None,
        return_logprobs=True,
      ),
    )  # fmt: skip
    make = getattr(rl_cluster, "RLEngine", None) or rl_cluster.RLCluster
    engine = make(actor=actor, reference=base, tokenizer=Ids(), cluster_config=cluster_config)
    clock = time.perf_counter

    def hold(fn):
      def inner(*a, **k):
        asked = clock()
        wait()
        begun = clock()
        self.waited += begun - asked
        found = fn(*a, **k)
        self.spent["rollout"] = clock() - begun
        return found

      return inner

    def timed(name, fn, ready):
      def inner(*a, **k):
        begun = clock()
        found = fn(*a, **k)
        jax.block_until_ready(ready(found))
        self.spent[name] = clock() - begun
        return found

      return inner

    def told(fn):
      def inner(*a, **k):
        found = fn(*a, **k)
        now = clock()
        self.spent["iteration"] = now - self.last - self.waited
        self.last, self.waited = now, 0.0
        tell(self.spent)
        self.spent = {}
        return found

      return inner

    engine.generate = hold(engine.generate)
    engine.get_ref_per_token_logps = timed("reference", engine.get_ref_per_token_logps, lambda x: x)
    update = timed(
      "update",
      engine.update_actor,
      lambda _: jax.tree.leaves(nnx.state(engine.actor_trainer.model)),
    )
    engine.update_actor = told(update)
    algorithm = grpo_learner.GRPOConfig(
      num_generations=args.group, num_iterations=1, beta=BETA, epsilon=CLIP
    )

    def reward(prompts, completions, **_):
      return [odd_share(text.split()) for text in completions]

    key = "rl_engine" if hasattr(rl_cluster, "RLEngine") else "rl_cluster"
    learner = grpo_learner.GRPOLearner(**{key: engine}, reward_fns=reward, algo_config=algorithm)
    data = []
    for number in range(args.steps):
      rows = token_rows(args, SMALL["vocab_size"], number)[0][:: args.group]
      data.append({"prompts": np.array([" ".join(map(str, row)) for row in rows])})
    self.last = clock()
    with mesh:
      learner.train(data)


class Ids:
  """A tokenizer of numbers."""

  def encode(self, text, **_):
    return [int(x) for x in text.split()]

  def decode(self, ids, **_):
    return " ".join(str(int(i)) for i in ids)

  def bos_id(self):
    return 0

  def eos_id(self):
    return 2

  def pad_id(self):
    return 0


def worker(args):
  """One side: a line on stdin starts a turn, a line of JSON on stdout ends it."""
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what libraries print goes to stderr

  def wait():
    if not sys.stdin.readline():
      raise SystemExit(0)

  def tell(spent):
    answers.write(json.dumps(spent) + "\n")

  if args.worker == "tunix":
    Tunix(args).run(wait, tell)
    return
  side = {"awf": Awf, "torch": Torch}[args.worker](args)
  for number in range(args.steps):
    wait()
    tell(side.turn(number))


class Side:
  """A worker's process."""

  def __init__(self, name, python, flags):
    command = [python, str(ROOT / "tests" / "side_by_side.py"), f"--worker={name}", *flags]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "OMP_WAIT_POLICY": "passive"}
    self.process = subprocess.Popen(
      command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

  def start(self):
    self.process.stdin.write("go\n")
    self.process.stdin.flush()

  def turn(self):
    self.start()
    return self.result()

  def result(self):
    line = self.process.stdout.readline()
    if not line:
      raise SystemExit(f"a side ended with {self.process.wait()}")
    return json.loads(line)


def compare(args, flags):
  sides = {
    "awf": Side("awf", args.own_python, flags),
    args.other: Side(args.other, args.python, flags),
  }
  for _ in range(args.warm):  # both at once: nothing is measured yet
    for side in sides.values():
      side.start()
    for name, side in sides.items():
      print(f"{name} warm: {side.result()}", file=sys.stderr, flush=True)
  rounds = []
  for number in range(args.rounds):
    if args.hold and number % args.at_once == 0:
      args.hold.unlink(missing_ok=True)
      print("ready", file=sys.stderr, flush=True)
      while not args.hold.exists():
        time.sleep(0.05)
    names = list(sides) if number % 2 == 0 else list(sides)[::-1]
    rounds.append({name: sides[name].turn() for name in names})
    print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
  if args.hold:
    args.hold.unlink(missing_ok=True)
  for side in sides.values():
    side.process.kill()
  print(json.dumps(result(args, rounds)))


def result(args, rounds):
  def column(side, part):
    return [r[side][part] for r in rounds]

  found = {"rounds": rounds, "median": {}, "ratio": {}}
  for side in ("awf", args.other):
    for part in rounds[0][side]:
      found["median"][f"{side} {part}"] = round(statistics.median(column(side, part)), 4)
  pairs = [(p, p) for p in ("rollout", "reference", "update", "iteration")]
  if args.other == "tunix":  # whose update is the train step alone
    pairs.append(("update", "step"))
  for theirs, ours in pairs:
    if theirs in rounds[0][args.other] and ours in rounds[0]["awf"]:
      ratios = [b / a for a, b in zip(column("awf", ours), column(args.other, theirs), strict=True)]
      found["ratio"][ours] = round(statistics.median(ratios), 3)
  return found


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--worker", choices=["awf", "torch", "tunix"])
  parser.add_argument("--other", choices=["torch", "tunix"], default="tunix")
  parser.add_argument("--python", help="of the other side", default=sys.executable)
  parser.add_argument("--own-python", default=sys.executable)
  parser.add_argument("--hold", type=Path, help="wait for this file before --at-once rounds")
  for name, default in (
    ("rows", 16), ("prompt", 128), ("new", 128), ("group", 4), ("rounds", 5), ("warm", 2),
    ("steps", 40), ("seed", 0), ("threads", 2), ("micro", 0), ("own-micro", 8), ("chunk", 0),
    ("at-once", 100),
  ):  # fmt: skip
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument("--model", default="")
  parser.add_argument("--attention", default="sdpa")
  parser.add_argument("--remat", default="none")
  parser.add_argument("--compile", action="store_true")
  parser.add_argument("--iteration", action="store_true")
  args = parser.parse_args()
  if args.worker:
    with contextlib.suppress(BrokenPipeError):
      worker(args)
  else:
    own = ("--other", "--python", "--own-python", "--hold", "--rounds", "--warm", "--at-once")
    compare(args, [x for x in sys.argv[1:] if not x.startswith(own)])


if __name__ == "__main__":
  main()
