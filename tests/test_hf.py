"""Checkpoints: round trips, refusals by name, all errors at once, sharding, hashes, PEFT files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_checkpoint import random_params

from awf.qwen import hf, peft
from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora
from awf.sharding import make_mesh
from awf.types import UserError


def make_config(**changes):
  sizes = dict(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
  )
  return QwenConfig(**{**sizes, **changes})


CONFIGS = {
  "qwen2 tied": make_config(tie_word_embeddings=True),
  "qwen2 untied": make_config(),
  "qwen3": make_config(family="qwen3", head_dim=8),
}


def assert_equal_trees(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  folder = tmp_path_factory.mktemp("saved")
  config = CONFIGS["qwen2 untied"]
  params = random_params(config)
  hf.save_checkpoint(folder, params, config)
  return folder, config, params


def copy_of(folder, target):
  target.mkdir(exist_ok=True)
  for file in folder.iterdir():
    (target / file.name).write_bytes(file.read_bytes())
  return target


def edit_json(file, **changes):
  data = json.loads(file.read_text())
  data.update(changes)
  file.write_text(json.dumps(data))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shard_bytes", [hf.SHARD_BYTES, 2000])
def test_round_trip_is_exact(name, shard_bytes, tmp_path):
  config, params = CONFIGS[name], random_params(CONFIGS[name])
  extra = tmp_path / "tokenizer.model"
  extra.write_bytes(b"words")
  folder = tmp_path / "out"
  hf.save_checkpoint(
    folder, params, config, [extra], stop_ids=(3, 5), pad_id=5, shard_bytes=shard_bytes
  )
  assert hf.load_config(folder) == config
  assert_equal_trees(hf.load_params(folder, config), params)
  assert (folder / "tokenizer.model").read_bytes() == b"words"
  assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [3, 5]
  assert len(list(folder.glob("*.safetensors"))) == 1 or shard_bytes == 2000
  assert (folder / "model.safetensors.index.json").exists() == (shard_bytes == 2000)


def test_saving_again_leaves_no_old_shards(tmp_path):
  config = CONFIGS["qwen3"]
  hf.save_checkpoint(tmp_path, random_params(config), config, shard_bytes=2000)
  params = random_params(config, seed=4)
  hf.save_checkpoint(tmp_path, params, config)
  assert [f.name for f in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
  assert_equal_trees(hf.load_params(tmp_path, config), params)


def test_stored_names_and_layout_are_hugging_faces(saved):
  folder, config, params = saved
  tensors = load_file(str(folder / "model.safetensors"))
  kernel = np.asarray(params["layers_1"]["k_proj"]["kernel"])
  np.testing.assert_array_equal(tensors["model.layers.1.self_attn.k_proj.weight"], kernel.T)
  np.testing.assert_array_equal(
    tensors["model.embed_tokens.weight"], np.asarray(params["embed"]["embedding"])
  )
  assert tensors["lm_head.weight"].shape == (config.vocab_size, config.hidden_size)
  assert sum(x.size for x in tensors.values()) == config.num_parameters


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_round_once(saved, tmp_path, dtype):
  _, config, params = saved
  hf.save_checkpoint(tmp_path, params, config, dtype=dtype)
  loaded = hf.load_params(tmp_path, config, dtype)
  assert_equal_trees(loaded, jax.tree.map(lambda x: x.astype(dtype), params))
  wide = hf.load_params(tmp_path, config, "float32")
  assert_equal_trees(wide, jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params))


def test_tied_checkpoint_may_carry_the_head(tmp_path):
  config = CONFIGS["qwen2 tied"]
  params = random_params(config)
  hf.save_checkpoint(tmp_path, params, config)
  file = str(tmp_path / "model.safetensors")
  tensors = load_file(file)
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
  save_file(tensors, file)
  assert_equal_trees(hf.load_params(tmp_path, config), params)


def test_all_ill_tensors_are_named_at_once(saved, tmp_path):
  folder, config, _ = saved
  copy_of(folder, tmp_path)
  file = str(tmp_path / "model.safetensors")
  tensors = load_file(file)
  del tensors["model.norm.weight"]
  tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
  tensors["model.layers.9.extra.weight"] = np.zeros(1, np.float32)
  tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
  save_file(tensors, file)
  with pytest.raises(UserError) as error:
    hf.load_params(tmp_path, config)
  text = str(error.value)
  assert "model.norm.weight is missing" in text
  assert "model.layers.0.mlp.up_proj.weight has shape (3, 3), expected (24, 16)" in text
  assert "model.layers.9.extra.weight is unexpected" in text
  assert "lm_head.weight has type I8" in text
  assert "\n" not in text


@pytest.mark.parametrize(
  ("changes", "word"),
  [
    ({"model_type": "llama"}, "'llama'"),
    ({"model_type": "qwen3_moe"}, "mixture of experts 'qwen3_moe'"),
    ({"num_experts": 8}, "num_experts 8"),
    ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, "sliding window"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope scaling (rope_scaling 'linear')"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "expected factor >= 1"),
    ({"rope_parameters": {"rope_type": "dynamic"}}, "rope scaling (rope_parameters 'dynamic')"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"num_key_value_heads": 3}, "num_key_value_heads (3)"),
  ],
)
def test_unfit_architectures_are_refused_by_name(saved, tmp_path, changes, word):
  copy_of(saved[0], tmp_path)
  edit_json(tmp_path / "config.json", **changes)
  with pytest.raises(UserError) as error:
    hf.load_config(tmp_path)
  assert word in str(error.value) and "config.model.path" in str(error.value)


@pytest.mark.parametrize(
  "changes",
  [
    {"use_sliding_window": False, "sliding_window": 64, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    {"rope_scaling": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": None},
  ],
)
def test_inactive_switches_are_fine(saved, tmp_path, changes):
  copy_of(saved[0], tmp_path)
  edit_json(tmp_path / "config.json", **changes)
  assert hf.load_config(tmp_path) == saved[1]


def test_defaults_of_a_sparse_config_are_transformers(tmp_path):
  raw = dict(
    model_type="qwen2",
    vocab_size=10,
    hidden_size=32,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=4,
  )
  (tmp_path / "config.json").write_text(json.dumps(raw))
  config = hf.load_config(tmp_path, "bfloat16")
  assert (config.head_dim, config.num_key_value_heads, config.dtype) == (8, 4, "bfloat16")
  assert (config.rope_theta, config.rms_norm_eps) == (10_000.0, 1e-6)
  assert not config.tie_word_embeddings


def test_broken_files_are_user_errors(saved, tmp_path):
  folder, config, _ = saved
  with pytest.raises(UserError, match="config.json is missing"):
    hf.load_config(tmp_path)
  copy_of(folder, tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(UserError, match="not valid JSON"):
    hf.load_config(tmp_path)
  data = (tmp_path / "model.safetensors").read_bytes()
  (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
  with pytest.raises(UserError, match="cannot be read"):
    hf.load_params(tmp_path, config)
  (tmp_path / "model.safetensors").unlink()
  with pytest.raises(UserError, match="expected model.safetensors"):
    hf.load_params(tmp_path, config)
  with pytest.raises(UserError, match="config.model.dtype"):
    hf.load_params(folder, config, "int3")


def test_missing_shard_is_a_user_error(tmp_path):
  config = CONFIGS["qwen3"]
  hf.save_checkpoint(tmp_path, random_params(config), config, shard_bytes=2000)
  sorted(tmp_path.glob("*.safetensors"))[1].unlink()
  with pytest.raises(UserError, match="cannot be read"):
    hf.load_params(tmp_path, config)


def test_hub_id_offline_tells_what_to_do(monkeypatch, tmp_path):
  import huggingface_hub.constants

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  with pytest.raises(UserError) as error:
    hf.load_config("Qwen/Qwen2-7B-Instruct")
  assert "--config.model.path=DIR" in str(error.value)
  assert "configs/quickstart.py" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["", "nowhere", "a/b/c", "/nowhere/at/all"])
def test_paths_that_are_neither_directory_nor_id(path):
  with pytest.raises(UserError, match=r"config\.model\.path"):
    hf.resolve_path(path)


def test_loading_onto_a_mesh_splits_and_keeps_values(saved):
  folder, config, params = saved
  mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  loaded = hf.load_params(folder, config, mesh=mesh)
  assert_equal_trees(loaded, params)
  kernel = loaded["layers_0"]["gate_proj"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (8, 12)
  assert hf.base_hash(loaded) == hf.base_hash(params)


def test_base_hash_sees_every_change(saved):
  _, config, params = saved
  base = hf.base_hash(params)
  assert base == hf.base_hash(random_params(config))

  def changed(edit):
    copy = jax.tree.map(lambda x: x, params)
    edit(copy)
    return hf.base_hash(copy)

  kernel = params["layers_1"]["up_proj"]["kernel"]

  def set_kernel(value):
    return lambda tree: tree["layers_1"]["up_proj"].update(kernel=value)

  hashes = {
    base,
    changed(set_kernel(kernel.at[3, 4].add(1e-6))),
    changed(set_kernel(kernel[::-1])),
    changed(set_kernel(kernel.at[0, 0].set(kernel[0, 1]).at[0, 1].set(kernel[0, 0]))),
    changed(set_kernel(kernel.astype(jnp.bfloat16))),
    changed(lambda tree: tree.update(norm={"scale": -params["norm"]["scale"]})),
  }
  assert len(hashes) == 6


def test_saving_refuses_other_shapes(saved, tmp_path):
  _, config, params = saved
  other = dataclasses.replace(config, hidden_size=20)
  with pytest.raises(ValueError, match="expected shape"):
    hf.save_checkpoint(tmp_path, params, other)
  assert not (tmp_path / "config.json").exists()


# ---------------------------------------------------------------------------- adapters


def test_adapter_round_trip(saved, tmp_path):
  config = saved[1]
  lora_config = LoRAConfig(rank=3, alpha=6.0, targets=("o_proj", "q_proj", "down_proj"))
  lora = init_lora(config, lora_config, jax.random.key(0))
  lora = jax.tree.map(lambda x: x + 1.5, lora)
  peft.save_adapter(tmp_path, lora, lora_config, "some/base")
  loaded, found = peft.load_adapter(tmp_path, config)
  assert_equal_trees(loaded, lora)
  assert (found.rank, found.alpha, set(found.targets)) == (3, 6.0, set(lora_config.targets))
  tensors = load_file(str(tmp_path / peft.WEIGHTS_FILE))
  name = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
  assert tensors[name].shape == (3, config.intermediate_size)


@pytest.mark.parametrize(
  ("changes", "word"),
  [
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "bias 'all'"),
    ({"peft_type": "IA3"}, "peft_type 'IA3'"),
    ({"target_modules": ["c_attn"]}, "c_attn"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"r": 4}, "expected (4, 16)"),
    ({"target_modules": ["q_proj", "k_proj"]}, "k_proj.lora_A.weight is missing"),
    ({"target_modules": ["q_proj"], "r": 2}, "v_proj.lora_B.weight is unexpected"),
  ],
)
def test_unfit_adapters_are_refused(saved, tmp_path, changes, word):
  config, lora_config = saved[1], LoRAConfig(rank=2, targets=("q_proj", "v_proj"))
  peft.save_adapter(tmp_path, init_lora(config, lora_config, jax.random.key(0)), lora_config)
  edit_json(tmp_path / peft.CONFIG_FILE, **changes)
  with pytest.raises(UserError) as error:
    peft.load_adapter(tmp_path, config)
  assert word in str(error.value) and "config.lora.init_path" in str(error.value)


def test_an_adapter_that_is_not_finite_is_refused(saved, tmp_path):
  config, lora_config = saved[1], LoRAConfig(rank=2, targets=("q_proj",))
  lora = init_lora(config, lora_config, jax.random.key(0))
  lora["layers_1"]["q_proj"]["b"] = lora["layers_1"]["q_proj"]["b"].at[1, 0].set(jnp.nan)
  peft.save_adapter(tmp_path, lora, lora_config)
  with pytest.raises(
    UserError, match="layers.1.*q_proj.lora_B.weight holds values that are not fin"
  ):
    peft.load_adapter(tmp_path, config)


def test_missing_adapter_is_a_user_error(saved, tmp_path):
  with pytest.raises(UserError, match="no readable PEFT adapter"):
    peft.load_adapter(tmp_path, saved[1])
