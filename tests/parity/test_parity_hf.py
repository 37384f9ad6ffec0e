"""Logits, greedy text and chat ids against Hugging Face transformers on torch, float32, CPU.

Bounds: 1e-4 on shrunk random models of each family, 1e-3 on a real pre-trained one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from awf.qwen import hf, peft
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora, scaled
from awf.qwen.model import Qwen, head
from awf.qwen.tokenizer import load_tokenizer
from awf.sampler.engine import Engine, Request

pytestmark = pytest.mark.parity

SHAPE = dict(
  vocab_size=320,
  hidden_size=64,
  intermediate_size=160,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  max_position_embeddings=4096,
  rms_norm_eps=1e-6,
)
FAMILIES = {
  "qwen2": ("qwen2", dict(tie_word_embeddings=True), 1e6),
  "qwen2.5 untied": ("qwen2", dict(tie_word_embeddings=False), 1e6),
  "qwen3": ("qwen3", dict(tie_word_embeddings=True, head_dim=32), 1e6),
  "qwen3 untied, theta 1e4": ("qwen3", dict(tie_word_embeddings=False, head_dim=16), 1e4),
}


def make_reference(name):
  """A random model whose biases and norms are not at their initial constants."""
  family, switches, theta = FAMILIES[name]
  kind, model = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
  }[family]
  torch.manual_seed(0)
  rope = {"rope_type": "default", "rope_theta": theta}
  reference = model(kind(**SHAPE, **switches, rope_parameters=rope)).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(0.08 * torch.randn_like(parameter))
  return reference


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: QwenConfig, params, lora, tokens_BT):
  collections = {"params": params} if lora is None else {"params": params, "lora": lora}
  positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
  hidden, _ = Qwen(config).apply(collections, tokens_BT, positions_BT)
  return head(params, hidden)


def reference_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.numpy()


def worst(ours, theirs, record_property):
  error = float(np.abs(np.asarray(ours) - theirs).max())
  record_property("max_abs_error", error)
  print(f"max abs error {error:.2e}, logits up to {np.abs(theirs).max():.1f}")
  return error


@pytest.fixture(scope="module", params=list(FAMILIES))
def shrunk(request, tmp_path_factory):
  reference = make_reference(request.param)
  folder = tmp_path_factory.mktemp("shrunk")
  reference.save_pretrained(folder, max_shard_size="200KB")
  return reference, folder


@pytest.mark.parametrize("length", [17, 600])
def test_shrunk_logits(shrunk, length, record_property):
  reference, folder = shrunk
  config = hf.load_config(folder)
  params = hf.load_params(folder, config)
  assert sum(p.numel() for p in reference.parameters()) == config.num_parameters
  ids = np.random.default_rng(length).integers(0, config.vocab_size, (2, length), np.int32)
  ours = logits_of(config, params, None, ids)
  assert worst(ours, reference_logits(reference, ids), record_property) <= 1e-4


def test_transformers_reads_what_we_save(shrunk, tmp_path, record_property):
  reference, folder = shrunk
  config = hf.load_config(folder)
  hf.save_checkpoint(
    tmp_path, hf.load_params(folder, config), config, stop_ids=(3,), pad_id=4, shard_bytes=300_000
  )
  again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
  assert type(again) is type(reference)
  ids = np.arange(40, dtype=np.int32)[None]
  error = worst(reference_logits(again, ids), reference_logits(reference, ids), record_property)
  assert error == 0.0


def test_adapter_means_what_peft_means(shrunk, tmp_path, record_property):
  """The saved adapter's tensors, read as PEFT's formula says, merged into the torch model."""
  _, folder = shrunk
  config = hf.load_config(folder)
  params = hf.load_params(folder, config)
  lora_config = LoRAConfig(rank=4, alpha=6.0)
  lora = init_lora(config, lora_config, jax.random.key(0))
  rng = np.random.default_rng(0)
  lora = jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), lora)
  peft.save_adapter(tmp_path, lora, lora_config)
  from safetensors.torch import load_file

  tensors = load_file(tmp_path / peft.WEIGHTS_FILE)
  merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
  weights = dict(merged.named_parameters())
  with torch.no_grad():
    for name, a in tensors.items():
      if ".lora_A." in name:
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        base = name.removeprefix("base_model.model.").replace(".lora_A.weight", ".weight")
        weights[base].add_(b @ a * (6.0 / 4))
  ids = np.arange(50, dtype=np.int32)[None]
  ours = logits_of(config, params, scaled(lora, lora_config), ids)
  assert worst(ours, reference_logits(merged, ids), record_property) <= 1e-4


# ---------------------------------------------------------------------------- the real model


CHATS = (
  [{"role": "user", "content": "What is the capital of France?"}],
  [
    {"role": "system", "content": "You are a careful teacher."},
    {"role": "user", "content": "A box holds 12 apples.\n\nHow many apples are in 7 boxes?"},
  ],
  [{"role": "user", "content": "  Write a Python function `add(a, b)`, naïvely. 日本 🙂\n"}],
)


@pytest.fixture(scope="module")
def real(real_checkpoint):
  reference = transformers.AutoModelForCausalLM.from_pretrained(
    real_checkpoint, dtype=torch.float32
  ).eval()
  config = hf.load_config(real_checkpoint)
  return reference, config, hf.load_params(real_checkpoint, config, "float32")


def test_real_chat_ids(real_checkpoint):
  ours = load_tokenizer(real_checkpoint)
  theirs = transformers.AutoTokenizer.from_pretrained(real_checkpoint)
  for chat in CHATS:
    want = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.chat_ids(chat) == list(want)
    assert ours.decode(want, False) == theirs.decode(want, clean_up_tokenization_spaces=False)
  assert theirs.eos_token_id in ours.stop_ids


@pytest.mark.parametrize("chat", range(len(CHATS)))
def test_real_logits(real, real_checkpoint, chat, record_property):
  reference, config, params = real
  ids = np.asarray([load_tokenizer(real_checkpoint).chat_ids(CHATS[chat])], np.int32)
  theirs = reference_logits(reference, ids)
  assert worst(logits_of(config, params, None, ids), theirs, record_property) <= 1e-3


def test_real_logits_of_a_long_text(real, real_checkpoint, record_property):
  reference, config, params = real
  text = "The quick brown fox jumps over the lazy dog, then sleeps. " * 60
  ids = np.asarray([load_tokenizer(real_checkpoint).encode(text)[:640]], np.int32)
  theirs = reference_logits(reference, ids)
  assert worst(logits_of(config, params, None, ids), theirs, record_property) <= 1e-3


def test_real_greedy_text(real, real_checkpoint):
  """The sampler at temperature 0 against `generate`, prompts of unequal length in one batch."""
  reference, config, params = real
  tokenizer = load_tokenizer(real_checkpoint)
  prompts = [tuple(tokenizer.chat_ids(chat)) for chat in CHATS[:2]]
  with Engine(config, params, rows=2, context=128, prefill_rows=2, steps_per_dispatch=8) as engine:
    outputs = engine.generate(
      Request(ids, temperature=0.0, max_new_tokens=24, stop_ids=tokenizer.stop_ids)
      for ids in prompts
    )
  for ids, (output,) in zip(prompts, outputs, strict=True):
    with torch.no_grad():
      out = reference.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
    want = out[0, len(ids) :].tolist()
    assert list(output.token_ids) == want
    text = tokenizer.decode(output.token_ids)
    assert text == tokenizer.decode(want) != ""
    print(repr(text))
