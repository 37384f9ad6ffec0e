"""The real 135M model: log-probs of mode generate, and what quantisation costs."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from test_parity_hf import CHATS, MORE_CHATS

from awf.generate import run_generate
from awf.qwen import hf
from awf.qwen.model import Qwen, head
from awf.qwen.quant import QuantConfig
from awf.qwen.tokenizer import load_tokenizer
from configs.base import base_config

pytestmark = pytest.mark.parity

WINDOW = 512


def test_log_probs_of_generate(real_checkpoint, tmp_path, record_property):
  lines = [{"messages": chat, "n": 2} for chat in (*CHATS, *MORE_CHATS)]
  lines.append({"prompt": "Once upon a time", "temperature": 0.0})
  (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
  config = base_config()
  config.model.path = str(real_checkpoint)
  config.mesh.data = 1
  with config.unlocked():
    config.sampler.update(rows=8, context=256, prefill_rows=4, max_new_tokens=32)
  figures = run_generate(config, None, str(tmp_path / "in"), str(tmp_path / "out"))
  assert figures["completions"] == 17
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    real_checkpoint, dtype=torch.float32
  ).eval()
  worst = count = 0
  for row in map(json.loads, (tmp_path / "out").read_text().splitlines()):
    ids = torch.tensor([row["prompt_ids"] + row["token_ids"]])
    with torch.no_grad():
      logp = torch.log_softmax(reference(ids).logits[0].double(), dim=-1)
    first = len(row["prompt_ids"])
    for i, (token, got) in enumerate(zip(row["token_ids"], row["logprobs"], strict=True)):
      worst = max(worst, abs(float(logp[first + i - 1, token]) - got))
      count += 1
  record_property("max_abs_error", float(worst))
  print(f"log-probs of {count} tokens: max abs error {worst:.2e}")
  assert count > 300 and worst <= 1e-3


@functools.partial(jax.jit, static_argnums=0)
def log_probs(config, params, tokens_BT):
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  hidden, _ = Qwen(config).apply({"params": params}, tokens_BT, positions_BT)
  return jax.nn.log_softmax(head(params, hidden), axis=-1)


@pytest.fixture(scope="module")
def float_log_probs(real_checkpoint, shared):
  """1,024 tokens of GSM8K, 1,024 of HumanEval, and the float32 model's log-probs of them."""
  tokenizer = load_tokenizer(real_checkpoint)
  texts = []
  for name, fields in (
    ("gsm8k/test_400.jsonl", ("question", "answer")),
    ("humaneval/HumanEval.jsonl", ("prompt", "canonical_solution")),
  ):
    rows = map(json.loads, (shared / "data" / name).read_text().splitlines()[:40])
    between = "\n" if name.startswith("gsm8k") else ""
    texts.append("\n\n".join(between.join(row[f] for f in fields) for row in rows))
  tokens = np.asarray([tokenizer.encode(text)[: 2 * WINDOW] for text in texts], np.int32)
  tokens = tokens.reshape(4, WINDOW)
  config = hf.load_config(real_checkpoint)
  params = hf.load_params(real_checkpoint, config, "float32")
  return tokens, [np.asarray(log_probs(config, params, row[None]))[0] for row in tokens]


def compare(real_checkpoint, float_log_probs, quant):
  """(mean KL to float32 in nats, share of equal top-1 ids, tokens)."""
  tokens, wanted = float_log_probs
  config = hf.load_config(real_checkpoint)
  params = hf.load_params(real_checkpoint, config, "float32", quant=quant)
  kl, same = [], []
  for row, want in zip(tokens, wanted, strict=True):
    got = np.asarray(log_probs(config, params, row[None]))[0]
    kl.append(np.sum(np.exp(want) * (want - got), axis=-1, dtype=np.float64))
    same.append(want.argmax(-1) == got.argmax(-1))
  return float(np.mean(kl)), float(np.mean(same)), tokens.size


BOUNDS = {
  "int8": (QuantConfig("int8"), 0.01, 0.97),
  "int8 kernels": (QuantConfig("int8", embedding=False), 0.01, 0.97),
  "int4, groups of 32": (QuantConfig("int4", 32), 1.0, 0.5),  # no promise: its figures are kept
}


@pytest.mark.parametrize("name", BOUNDS)
def test_what_quantisation_costs(name, real_checkpoint, float_log_probs, record_property):
  quant, most, least = BOUNDS[name]
  kl, same, count = compare(real_checkpoint, float_log_probs, quant)
  record_property("mean_kl", float(kl))
  record_property("top1", float(same))
  print(f"{name}: mean KL {kl:.5f} nats, top-1 {100 * same:.2f} % of {count} tokens")
  assert count >= 2000 and kl <= most and same >= least
