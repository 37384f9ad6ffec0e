"""Adapters: scale, several at once, their base, mistakes that leave nothing behind."""

import json

import jax
import numpy as np
import pytest
from tiny_checkpoint import make_checkpoint, random_params, train_fast

import launch
from awf.config_io import named_paths
from awf.policy import ADAPTER, QwenPolicy, initial_lora
from awf.qwen import hf, peft
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora, stack_adapters, widen
from awf.sampler.engine import Request
from awf.sampler.generate import run_generate
from awf.types import SamplingParams, UserError
from configs.base import base_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("adapters") / "tiny")


def noisy(config, lora_config, seed):
  lora = init_lora(config, lora_config, jax.random.key(seed))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), lora)


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
  """Three adapters of different ranks, targets and scales, as PEFT directories."""
  config, base = hf.load_config(folder), hf.fingerprint(folder)
  kinds = {
    "math": LoRAConfig(4, 8.0),
    "code": LoRAConfig(2, 3.0, ("q_proj", "down_proj"), rslora=True),
    "prose": LoRAConfig(3, 3.0, ("v_proj",)),
  }
  paths = {}
  for seed, (name, kind) in enumerate(kinds.items()):
    paths[name] = tmp_path_factory.mktemp("peft") / name
    peft.save_adapter(paths[name], noisy(config, kind, seed), kind, "tiny", base)
  return paths


def make_config(folder, **lora):
  config = base_config()
  config.model.path = str(folder)
  with config.unlocked():
    config.sampler.update(rows=4, context=128, prefill_rows=2, steps_per_dispatch=4)
    config.sampler.update(max_new_tokens=8)
    config.lora.update(rank=4, alpha=8.0)
    config.lora.update(lora)
  return config


@pytest.fixture(scope="module")
def policy(folder, saved):
  paths = (f"math={saved['math']}", str(saved["code"]), f"prose={saved['prose']}")
  policy = QwenPolicy.from_config(make_config(folder, paths=paths))
  yield policy
  policy.close()


def test_rank_stabilised_scale():
  assert LoRAConfig(16, 32.0).scale == 2.0
  assert LoRAConfig(16, 32.0, rslora=True).scale == 8.0


def test_rslora_is_kept_in_peft_files(folder, saved):
  lora, found = peft.load_adapter(saved["code"], hf.load_config(folder))
  assert found == LoRAConfig(2, 3.0, ("q_proj", "down_proj"), rslora=True)
  raw = json.loads((saved["code"] / peft.CONFIG_FILE).read_text())
  assert raw["use_rslora"] is True and raw["base_model_name_or_path"] == "tiny"
  np.testing.assert_array_equal(
    jax.tree.leaves(lora)[0], jax.tree.leaves(noisy(hf.load_config(folder), found, 1))[0]
  )


def test_widening_changes_no_product():
  config = QwenConfig(48, 16, 24, 1, 4, 2, 4)
  kinds = LoRAConfig(3, targets=("q_proj", "o_proj")), LoRAConfig(5, targets=("q_proj", "v_proj"))
  adapters = [noisy(config, kind, 0) for kind in kinds]
  wide = widen(adapters)
  stacked = stack_adapters(wide)["layers_0"]
  assert stacked["q_proj"]["a"].shape == (2, 16, 5) and stacked["o_proj"]["b"].shape == (2, 3, 16)
  for narrow, full in zip(adapters, wide, strict=True):
    for target in ("q_proj", "o_proj", "v_proj"):
      leaf = full["layers_0"][target]
      want = narrow["layers_0"].get(target)
      product = 0.0 if want is None else want["a"] @ want["b"]
      np.testing.assert_allclose(leaf["a"] @ leaf["b"], product, atol=1e-6)


def test_rows_of_one_batch_use_their_own_adapters(policy, saved):
  prompt = tuple(policy.tokenizer.encode("the cat has 12"))
  names = ["base", "math", "code", "prose"]
  assert [policy.adapter_index(n) for n in ("base", "policy", "math", "code")] == [0, 1, 2, 3]
  requests = [
    Request(prompt, temperature=0.0, max_new_tokens=8, adapter=policy.adapter_index(name))
    for name in names
  ]
  outputs = [output for (output,) in policy.engine.generate(requests)]
  assert len({output.token_ids for output in outputs}) == 4
  alone = policy.lora, policy.lora_config
  for name, output in zip(names[1:], outputs[1:], strict=True):
    policy.lora_config = peft.load_adapter(saved[name], policy.config)[1]
    policy.set_lora(peft.load_adapter(saved[name], policy.config)[0])
    scored = policy.logprobs(prompt, output.token_ids, ADAPTER)
    np.testing.assert_allclose(scored, output.logprobs, atol=1e-4)
  policy.lora_config = alone[1]
  policy.set_lora(alone[0])
  with pytest.raises(UserError, match="'poetry' is not loaded; expected one of base, policy, math"):
    policy.adapter_index("poetry")


def test_generate_lines_pick_adapters_by_name(policy, tmp_path):
  lines = [{"prompt": "the cat", "seed": 3, "adapter": name} for name in ("base", "code", "math")]
  lines.append({"prompt": "the cat", "seed": 3})
  (tmp_path / "in").write_text("\n".join(map(json.dumps, lines)))
  run = dict(sampling=SamplingParams(max_new_tokens=8), seed=0, adapter=0)
  run_generate(policy, str(tmp_path / "in"), str(tmp_path / "out"), **run)
  rows = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
  ids = [tuple(row["token_ids"]) for row in rows]
  assert ids[0] == ids[3] and len(set(ids)) == 3
  (tmp_path / "in").write_text(json.dumps({"prompt": "x", "adapter": "poetry"}))
  with pytest.raises(UserError, match="line 1: adapter 'poetry' is not loaded"):
    run_generate(policy, str(tmp_path / "in"), str(tmp_path / "out2"), **run)
  assert not (tmp_path / "out2").exists()


def test_training_starts_from_an_adapter_and_says_its_share(folder, saved):
  config = make_config(folder, init_path=str(saved["math"]))
  model_config, kind = hf.load_config(folder), LoRAConfig(4, 8.0)
  lora = initial_lora(config, model_config, kind, hf.fingerprint(folder))
  jax.tree.map(np.testing.assert_array_equal, lora, noisy(model_config, kind, 0))
  for wrong in (LoRAConfig(8, 8.0), LoRAConfig(4, 8.0, rslora=True), LoRAConfig(4, 4.0)):
    with pytest.raises(UserError, match="set config.lora.rank, alpha, targets and rslora"):
      initial_lora(config, model_config, wrong)


def test_an_adapter_of_another_base_is_refused(folder, saved, tmp_path):
  config = hf.load_config(folder)
  hf.save_checkpoint(tmp_path, random_params(config, seed=9), config)
  with pytest.raises(UserError, match="trained on another base .tiny, fingerprint"):
    peft.load_adapter(saved["math"], config, base_fingerprint=hf.fingerprint(tmp_path))
  peft.load_adapter(saved["math"], config, base_fingerprint=hf.fingerprint(folder))
  other = QwenConfig(48, 64, 24, 2, 4, 2, 8)
  with pytest.raises(UserError, match="expected .4, 64."):
    peft.load_adapter(saved["math"], other)


@pytest.mark.parametrize("paths", [("base=x",), ("a=x", "a=y"), ("a b=x",), ("x/policy",)])
def test_names_of_adapters(paths):
  with pytest.raises(UserError, match="config.lora.paths"):
    named_paths(paths)


def test_the_policys_share(policy):
  want = sum(x.size for x in jax.tree.leaves(policy.lora)) / policy.config.num_parameters
  assert 0 < policy.trainable_share == want


def test_sampling_of_the_checkpoint(folder, tmp_path):
  for file in folder.iterdir():
    (tmp_path / file.name).write_bytes(file.read_bytes())
  (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 1}))
  (tmp_path / "in.jsonl").write_text('{"prompt": "the cat", "n": 3}\n')
  argv = [
    "--config=configs/quickstart.py:smoke", "--mode=generate", f"--config.model.path={tmp_path}",
    f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl", "--config.mesh.data=1",
    "--config.sampler.context=256", "--config.sampler.max_new_tokens=6",
    "--config.generate.sampling=checkpoint", f"--workdir={tmp_path}/run",
  ]  # fmt: skip
  assert launch.main(argv) == 0
  rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  assert len({tuple(row["token_ids"]) for row in rows}) == 1  # top_k 1


def test_a_missing_chat_template_leaves_nothing_behind(folder, tmp_path, capsys):
  model = make_checkpoint(tmp_path / "model", vocab_size=352)
  (model / "tokenizer.model").unlink()
  train_fast(model, template=None)
  raw = json.loads((model / "tokenizer.json").read_text())
  text = json.dumps(raw).replace("<|im_start|>", "<|other|>")
  (model / "tokenizer.json").write_text(text)
  for name in ("tokenizer_config.json", "special_tokens_map.json"):
    if (model / name).is_file():
      text = (model / name).read_text().replace("<|im_start|>", "<|other|>")
      (model / name).write_text(text)
  argv = ["--config=configs/quickstart.py:smoke", f"--config.model.path={model}"]
  argv += ["--config.sampler.context=512", f"--workdir={tmp_path}/run"]
  assert launch.main(argv) == 2
  assert "has no chat template" in capsys.readouterr().err
  assert not (tmp_path / "run").exists()


def test_a_truncated_model_leaves_nothing_behind(folder, tmp_path, capsys):
  model = make_checkpoint(tmp_path / "model")
  data = (model / "model.safetensors").read_bytes()
  (model / "model.safetensors").write_bytes(data[:-100])
  argv = ["--config=configs/quickstart.py:smoke", f"--config.model.path={model}"]
  argv += ["--config.sampler.context=512", f"--workdir={tmp_path}/run"]
  assert launch.main(argv) == 2
  err = capsys.readouterr().err
  assert err.splitlines()[-1].startswith("error: config.model.path: ") and "cut short" in err
  assert not (tmp_path / "run").exists()


def test_a_bare_policy_keeps_others(policy):
  own = policy.lora
  policy.set_lora(None)
  try:
    index = policy.adapter_index("math")
    request = Request((1, 2, 3), temperature=0.0, max_new_tokens=2, adapter=index)
    assert policy.engine.generate([request])[0][0].token_ids
    with pytest.raises(UserError, match="'policy' is not loaded"):
      policy.adapter_index("policy")
  finally:
    policy.set_lora(own)
