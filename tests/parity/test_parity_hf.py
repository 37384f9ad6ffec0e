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
from awf.qwen.model import Qwen, causal_attend, head
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
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ODD_YARN = {**YARN, "factor": 7.5, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
ODD_YARN |= {"mscale": 0.8, "mscale_all_dim": 0.3}
FAMILIES = {
  "qwen2": ("qwen2", dict(tie_word_embeddings=True), 1e6, {}),
  "qwen2.5 untied": ("qwen2", dict(tie_word_embeddings=False), 1e6, {}),
  "qwen3": ("qwen3", dict(tie_word_embeddings=True, head_dim=32), 1e6, {}),
  "qwen3 untied, theta 1e4": ("qwen3", dict(tie_word_embeddings=False, head_dim=16), 1e4, {}),
  "qwen2.5 yarn": ("qwen2", dict(tie_word_embeddings=False), 1e6, YARN),
  "qwen3 yarn": ("qwen3", dict(tie_word_embeddings=True, head_dim=32), 1e4, ODD_YARN),
}


def make_reference(name):
  """A random model whose biases and norms are not at their initial constants."""
  family, switches, theta, scaling = FAMILIES[name]
  kind, model = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
  }[family]
  torch.manual_seed(0)
  rope = {"rope_type": "default", "rope_theta": theta, **scaling}
  reference = model(kind(**SHAPE, **switches, rope_parameters=rope)).eval()
  with torch.no_grad():
    for parameter in reference.parameters():
      parameter.add_(0.08 * torch.randn_like(parameter))
  return reference


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: QwenConfig, params, lora, tokens_BT, mask_BT=None):
  """Logits [B, T, V]; `mask_BT` (1 is a token) may leave padding on either side."""
  collections = {"params": params} if lora is None else {"params": params, "lora": lora}
  mask_BT = jnp.ones(tokens_BT.shape, jnp.int32) if mask_BT is None else mask_BT
  positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
  hidden, _ = Qwen(config).apply(collections, tokens_BT, positions_BT, causal_attend(mask_BT))
  return head(params, hidden)


def reference_logits(model, ids):
  with torch.no_grad():
    return model(torch.tensor(np.asarray(ids), dtype=torch.long)).logits.numpy()


def worst(ours, theirs, record_property):
  error = float(np.abs(np.asarray(ours) - theirs).max())
  record_property("max_abs_error", float(error))
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_shrunk_logits_with_padding(shrunk, side, record_property):
  reference, folder = shrunk
  config = hf.load_config(folder)
  params = hf.load_params(folder, config)
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, config.vocab_size, (3, 300), np.int32)
  mask = np.ones(tokens.shape, np.int32)
  for row, missing in enumerate((0, 7, 180)):
    mask[row, slice(0, missing) if side == "left" else slice(300 - missing, 300)] = 0
  positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
  with torch.no_grad():
    theirs = reference(
      torch.tensor(tokens, dtype=torch.long),
      attention_mask=torch.tensor(mask),
      position_ids=torch.tensor(positions, dtype=torch.long),
    ).logits.numpy()
  ours = np.asarray(logits_of(config, params, None, tokens, mask))
  keep = mask.astype(bool)
  assert worst(ours[keep], theirs[keep], record_property) <= 1e-4


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


MORE_CHATS = tuple(
  [{"role": "user", "content": text}]
  for text in (
    "List three uses of a paper clip.",
    "Why is the sky blue? Answer in two sentences.",
    "Translate to French: The cat sleeps on the red sofa.",
    "Write a short poem about the sea in winter.",
    "If a train leaves at 3 pm and travels for 2.5 hours, when does it arrive?",
  )
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
  prompts = [tuple(tokenizer.chat_ids(chat)) for chat in (*CHATS, *MORE_CHATS)]
  assert len(prompts) == 8
  with Engine(config, params, rows=8, context=256, prefill_rows=4, steps_per_dispatch=16) as engine:
    outputs = engine.generate(
      Request(ids, temperature=0.0, max_new_tokens=64, stop_ids=tokenizer.stop_ids)
      for ids in prompts
    )
  for ids, (output,) in zip(prompts, outputs, strict=True):
    with torch.no_grad():
      out = reference.generate(torch.tensor([ids]), max_new_tokens=64, do_sample=False)
    want = out[0, len(ids) :].tolist()
    assert list(output.token_ids) == want
    text = tokenizer.decode(output.token_ids)
    assert text == tokenizer.decode(want) != ""
    print(repr(text))
