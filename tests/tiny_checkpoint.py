"""Tiny tokenizers and checkpoints that the tests make themselves."""

import io
import random

import jax
import jax.numpy as jnp
import numpy as np

from awf.qwen import hf
from awf.qwen.config import QwenConfig
from awf.qwen.model import init_params
from awf.qwen.tokenizer import CHATML_TEMPLATE, load_tokenizer

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
WORDS = "the cat has 12 apples ; solve def return <answer> </answer> x = y + 3 Workflow".split()


def corpus(n=600):
  rng = random.Random(0)
  return [" ".join(rng.choice(WORDS) for _ in range(10)) + "\n" for _ in range(n)]


def train_sentencepiece(path, **changes):
  import sentencepiece

  model = io.BytesIO()
  options = dict(
    vocab_size=340,
    model_type="bpe",
    byte_fallback=True,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    hard_vocab_limit=False,
    user_defined_symbols=list(SPECIAL),
    bos_id=-1,
    eos_id=-1,
    pad_id=-1,
    unk_id=0,
    minloglevel=2,
    num_threads=1,
  )
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(corpus()), model_writer=model, **{**options, **changes}
  )
  path.write_bytes(model.getvalue())
  return path


def train_fast(folder, template=CHATML_TEMPLATE):
  """A byte-level BPE tokenizer with Qwen's special tokens, saved as a checkpoint has it."""
  import tokenizers
  import transformers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=330,
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    special_tokens=list(SPECIAL),
    show_progress=False,
  )
  tokenizer.train_from_iterator(corpus(), trainer)
  fast = transformers.PreTrainedTokenizerFast(
    tokenizer_object=tokenizer,
    eos_token="<|im_end|>",
    pad_token="<|endoftext|>",
    additional_special_tokens=["<|im_start|>"],
    clean_up_tokenization_spaces=False,
  )
  fast.chat_template = template
  fast.save_pretrained(str(folder))
  return folder


def random_params(config: QwenConfig, seed: int = 0, size: float = 1.0):
  """Normal noise in every leaf, norms and biases included."""
  shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(size * rng.standard_normal(x.shape), x.dtype), shapes)


def make_checkpoint(folder, **changes):
  """A two-layer random model with a SentencePiece tokenizer, as `--mode=sft` would save one."""
  folder.mkdir(parents=True, exist_ok=True)
  tokenizer = load_tokenizer(train_sentencepiece(folder / "tokenizer.model"))
  sizes = dict(
    vocab_size=-(-tokenizer.vocab_size // 8) * 8,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
    max_position_embeddings=512,
  )
  config = QwenConfig(**{**sizes, **changes})
  params = random_params(config, size=0.3)
  hf.save_checkpoint(
    folder, params, config, tokenizer.files, stop_ids=tokenizer.stop_ids, pad_id=tokenizer.pad_id
  )
  return folder
