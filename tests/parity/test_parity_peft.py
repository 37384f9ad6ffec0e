"""Adapters and merged checkpoints against the `peft` package, both ways, float32."""

import json
import warnings

import jax
import numpy as np
import pytest
import torch
import transformers
from test_parity_hf import FAMILIES, logits_of, make_reference, reference_logits, worst

from awf.export import Adapter, write_merged
from awf.grpo.config import OptimConfig
from awf.grpo.sft import SFTTrainer
from awf.qwen import hf, peft
from awf.qwen.lora import TARGETS, LoRAConfig, init_lora, scaled

with warnings.catch_warnings():
  warnings.simplefilter("ignore")  # of packages that peft looks for
  import peft as reference_peft

pytestmark = [
  pytest.mark.parity,
  # peft asks transformers by a name that is about to go
  pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

IDS = np.random.default_rng(0).integers(0, 320, (2, 40), np.int32)
CASES = {
  "qwen2": LoRAConfig(4, 6.0),
  "qwen2.5 untied": LoRAConfig(8, 6.0, rslora=True),
  "qwen3": LoRAConfig(3, 6.0, ("q_proj", "v_proj", "down_proj")),
  "qwen2.5 yarn": LoRAConfig(2, 4.0, ("o_proj", "gate_proj")),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
  assert request.param in FAMILIES
  folder = tmp_path_factory.mktemp("base")
  make_reference(request.param).save_pretrained(folder)
  config = hf.load_config(folder)
  return folder, config, hf.load_params(folder, config), CASES[request.param]


def load_reference(folder):
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def noisy(config, kind):
  rng = np.random.default_rng(0)
  lora = init_lora(config, kind, jax.random.key(0))
  return jax.tree.map(lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), lora)


def test_peft_loads_what_we_save(case, tmp_path, record_property):
  folder, config, params, kind = case
  lora = noisy(config, kind)
  peft.save_adapter(tmp_path, lora, kind, str(folder), hf.fingerprint(folder))
  model = reference_peft.PeftModel.from_pretrained(load_reference(folder), tmp_path).eval()
  theirs = reference_logits(model, IDS)
  assert np.abs(theirs - reference_logits(load_reference(folder), IDS)).max() > 0.1
  ours = logits_of(config, params, scaled(lora, kind), IDS)
  assert worst(ours, theirs, record_property) <= 1e-4


def train_with_peft(folder, kind, path):
  """A few steps of an adapter in torch, saved as peft saves it."""
  torch.manual_seed(0)
  wanted = reference_peft.LoraConfig(
    r=kind.rank,
    lora_alpha=kind.alpha,
    target_modules="all-linear" if set(kind.targets) == set(TARGETS) else list(kind.targets),
    use_rslora=kind.rslora,
    task_type="CAUSAL_LM",
  )
  model = reference_peft.get_peft_model(load_reference(folder), wanted)
  optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
  ids = torch.tensor(IDS, dtype=torch.long)
  for _ in range(4):
    loss = model(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
  model.save_pretrained(path)
  return model.eval(), float(loss.detach())


def test_an_adapter_trained_by_peft_loads_and_trains_on(case, tmp_path, record_property):
  folder, config, params, kind = case
  model, _ = train_with_peft(folder, kind, tmp_path)
  lora, found = peft.load_adapter(tmp_path, config, base_fingerprint=hf.fingerprint(folder))
  assert (found.rank, found.alpha, found.rslora) == (kind.rank, kind.alpha, kind.rslora)
  assert set(found.targets) == set(kind.targets)
  ours = logits_of(config, params, scaled(lora, found), IDS)
  assert worst(ours, reference_logits(model, IDS), record_property) <= 1e-4
  ones = np.ones(IDS.shape, np.int32)
  batch = {
    "tokens_BT": IDS,
    "segments_BT": ones,
    "positions_BT": np.tile(np.arange(IDS.shape[1], dtype=np.int32), (len(IDS), 1)),
    "weights_BT": np.where(np.arange(IDS.shape[1]) > 0, 1.0, 0.0)[None] * np.float32(ones),
  }
  trainer = SFTTrainer(
    config, params, OptimConfig(0.01), None, weights="lora", lora=lora, lora_config=found
  )
  losses = [float(trainer.step(batch)["loss"]) for _ in range(4)]
  with torch.no_grad():
    ids = torch.tensor(IDS, dtype=torch.long)
    start = float(model(ids, labels=ids).loss)
  assert abs(losses[0] - start) < 1e-4  # where peft left off
  assert losses[-1] < losses[0] - 0.01
  print(f"loss {start:.4f} in peft, then {losses}")


def test_a_merged_export_is_the_peft_model(case, tmp_path, record_property):
  folder, config, params, kind = case
  model, _ = train_with_peft(folder, kind, tmp_path / "adapter")
  lora, found = peft.load_adapter(tmp_path / "adapter", config)
  (folder / "tokenizer.model").unlink(missing_ok=True)
  from tiny_checkpoint import train_fast

  train_fast(folder)
  written = write_merged(
    tmp_path / "merged", folder, config, Adapter(lora, found, "peft"), "float32", 200_000
  )
  assert written["weight_files"] > 1 and written["lost"] is None
  merged = load_reference(tmp_path / "merged")
  theirs = reference_logits(model, IDS)
  assert worst(reference_logits(merged, IDS), theirs, record_property) <= 1e-4
  again = hf.load_params(tmp_path / "merged", hf.load_config(tmp_path / "merged"))
  assert worst(logits_of(config, again, None, IDS), theirs, record_property) <= 1e-4
  chat = [{"role": "user", "content": "the cat has 12 apples"}]
  tokenizers = [
    transformers.AutoTokenizer.from_pretrained(p) for p in (folder, tmp_path / "merged")
  ]
  texts = [t.apply_chat_template(chat, tokenize=False) for t in tokenizers]
  assert texts[0] == texts[1] != ""
  assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"
