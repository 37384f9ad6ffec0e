"""QwenPolicy on a tiny saved checkpoint and the real engine."""

import asyncio

import jax
import numpy as np
import pytest
from tiny_checkpoint import make_checkpoint

from awf.policy import ADAPTER, BASE, QwenPolicy, dtype_name
from awf.qwen import hf
from awf.qwen.lora import LoRAConfig, init_lora, merge, scaled
from awf.sharding import make_mesh
from awf.types import LLM, SamplingParams, UserError
from configs.base import base_config

CHAT = [{"role": "user", "content": "the cat has 12 apples"}]
DRAW = SamplingParams(temperature=1.0, max_new_tokens=12)
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return make_checkpoint(tmp_path_factory.mktemp("policy") / "tiny")


def make_config(checkpoint, **fields):
  config = base_config()
  config.model.path = str(checkpoint)
  config.lora.rank = 4
  config.lora.alpha = 8.0
  with config.unlocked():
    config.sampler.update(rows=4, context=128, prefill_rows=2, steps_per_dispatch=4)
  for name, value in fields.items():
    part, field = name.split("__")
    config[part][field] = value
  return config


@pytest.fixture(scope="module")
def policy(checkpoint):
  policy = QwenPolicy.from_config(make_config(checkpoint))
  yield policy
  policy.close()


@pytest.fixture(scope="module")
def trained(policy):
  """An adapter that changes the model a lot."""
  rng = np.random.default_rng(0)
  lora = init_lora(policy.config, policy.lora_config, jax.random.key(1))
  return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape, np.float32), lora)


def complete(policy, sampling=DRAW, key=1, adapter=BASE, chat=CHAT):
  return asyncio.run(policy.complete(chat, sampling, key, adapter))


def propose(policy, n=3, key=1, sampling=DRAW):
  return asyncio.run(policy.propose(CHAT, n, key, sampling))


def test_is_an_llm_with_well_formed_completions(policy):
  assert isinstance(policy, LLM)
  out = complete(policy)
  assert out.prompt_ids == tuple(policy.tokenizer.chat_ids(CHAT))
  assert 1 <= len(out.token_ids) == len(out.logprobs) <= 12
  assert all(x <= 0 for x in out.logprobs)
  stopped = out.token_ids[-1] in policy.tokenizer.stop_ids
  assert out.finish_reason == ("stop" if stopped else "length")
  spoken = out.token_ids[:-1] if stopped else out.token_ids
  assert out.text == policy.tokenizer.decode(spoken)


def test_completion_is_a_function_of_its_arguments(policy):
  async def both():
    first = policy.complete(CHAT, DRAW, 7)
    others = [policy.complete(CHAT, DRAW, key) for key in range(20, 29)]
    return await asyncio.gather(*others, first)

  crowd = asyncio.run(both())
  assert crowd[-1] == complete(policy, key=7)
  assert len({out.token_ids for out in crowd}) > 5


def test_group_differs_within_and_repeats_by_key(policy):
  group = propose(policy, n=4, key=5)
  assert len({out.token_ids for out in group}) > 1
  assert group == propose(policy, n=4, key=5)
  assert group != propose(policy, n=4, key=6)


def test_sampling_stop_ids_are_added(policy):
  free = complete(policy, GREEDY)
  assert len(free.token_ids) > 1
  stop = free.token_ids[1]
  cut = complete(policy, SamplingParams(temperature=0.0, max_new_tokens=12, stop_ids=(stop,)))
  first = free.token_ids.index(stop)
  assert cut.token_ids == free.token_ids[: first + 1] and cut.finish_reason == "stop"
  assert cut.text == policy.tokenizer.decode(cut.token_ids[:-1])


def test_a_prompt_that_does_not_fit_is_refused(policy):
  out = complete(policy, chat=[{"role": "user", "content": "the cat " * 300}])
  assert (out.finish_reason, out.token_ids, out.text) == ("refused", (), "")


@pytest.mark.parametrize("adapter", [BASE, ADAPTER])
def test_sampler_logprobs_equal_full_forward(policy, trained, adapter):
  policy.set_lora(trained)
  out = complete(policy, adapter=adapter, key=11)
  scored = policy.logprobs(out.prompt_ids, out.token_ids, adapter)
  np.testing.assert_allclose(scored, out.logprobs, atol=1e-5)
  other = policy.logprobs(out.prompt_ids, out.token_ids, BASE + ADAPTER - adapter)
  assert np.abs(np.subtract(other, scored)).max() > 1e-2


def test_logprobs_do_not_depend_on_the_bucket(policy):
  ids = list(complete(policy, key=2).prompt_ids) * 12
  short = policy.logprobs(ids[:100], ids[100:110], BASE)
  long = policy.logprobs(ids[:100], ids[100:200], BASE)
  np.testing.assert_allclose(long[:10], short, atol=1e-5)
  hot = policy.logprobs(ids[:100], ids[100:110], BASE, temperature=50.0)
  assert np.std(hot) < np.std(short)
  assert policy.logprobs(ids[:3], (), BASE) == []
  with pytest.raises(ValueError, match="at least one prompt id"):
    policy.logprobs((), (1,), BASE)


def test_new_adapter_is_the_base_and_a_trained_one_is_not(policy, trained):
  policy.set_lora(init_lora(policy.config, policy.lora_config, jax.random.key(3)))
  base = complete(policy, GREEDY)
  assert complete(policy, GREEDY, adapter=ADAPTER).token_ids == base.token_ids
  policy.set_lora(trained)
  assert complete(policy, GREEDY) == base
  own = complete(policy, GREEDY, adapter=ADAPTER)
  assert own.token_ids != base.token_ids
  merged = merge(policy.params, scaled(trained, policy.lora_config))
  bare = QwenPolicy(
    policy.config, merged, policy.tokenizer, None, policy.lora_config, policy.engine
  )
  scored = bare.logprobs(own.prompt_ids, own.token_ids, BASE)
  policy.set_lora(trained)
  want = policy.logprobs(own.prompt_ids, own.token_ids, ADAPTER)
  np.testing.assert_allclose(scored, want, atol=1e-4)


def test_without_an_adapter_proposals_come_from_the_base(policy, trained):
  policy.set_lora(None)
  assert propose(policy, n=1, sampling=GREEDY)[0] == complete(policy, GREEDY)
  with pytest.raises(ValueError, match="adapter"):
    complete(policy, adapter=ADAPTER)
  with pytest.raises(ValueError, match="no adapter to save"):
    policy.save("unused")
  policy.set_lora(trained)


def test_save_and_load(policy, trained, tmp_path):
  policy.set_lora(trained)
  want = propose(policy, key=9)
  policy.save(tmp_path)
  policy.set_lora(init_lora(policy.config, policy.lora_config, jax.random.key(4)))
  assert propose(policy, key=9) != want
  policy.load(tmp_path)
  assert propose(policy, key=9) == want
  assert policy.lora_config == LoRAConfig(4, 8.0)


def test_from_config_starts_from_a_saved_adapter(policy, trained, checkpoint, tmp_path):
  policy.set_lora(trained)
  policy.save(tmp_path)
  config = make_config(checkpoint, lora__init_path=str(tmp_path))
  again = QwenPolicy.from_config(config)
  again.close()
  jax.tree.map(np.testing.assert_array_equal, again.lora, trained)
  with pytest.raises(UserError, match="config.lora"):
    QwenPolicy.from_config(make_config(checkpoint, lora__init_path=str(tmp_path), lora__rank=8))


def test_from_config_on_a_mesh_gives_the_same_text(policy, checkpoint):
  mesh = make_mesh(data=1, fsdp=1, tensor=2, devices=jax.devices()[:2])
  split = QwenPolicy.from_config(make_config(checkpoint), mesh)
  try:
    kernel = split.params["layers_0"]["q_proj"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (32, 16)
    assert complete(split, GREEDY).token_ids == complete(policy, GREEDY).token_ids
  finally:
    split.close()


def test_a_subclass_decides_what_the_model_reads(policy):
  class Terse(QwenPolicy):
    def prompt_ids(self, messages):
      return super().prompt_ids([{"role": "system", "content": "be brief"}, *messages])

  terse = Terse(
    policy.config,
    policy.params,
    policy.tokenizer,
    policy.lora,
    policy.lora_config,
    policy.engine,
  )
  assert len(complete(terse).prompt_ids) > len(complete(policy).prompt_ids)


@pytest.mark.parametrize(
  ("fields", "word"),
  [
    ({"model__quant": "int3"}, "config.model.quant"),
    ({"model__dtype": "float8"}, "config.model.dtype"),
    ({"model__compute_dtype": "f32"}, "config.model.compute_dtype"),
    ({"model__path": ""}, "config.model.path"),
    ({"lora__rank": 0}, "config.lora.rank"),
    ({"sampler__context": 1024}, "config.sampler.context"),
  ],
)
def test_unfit_configs_are_user_errors(checkpoint, fields, word):
  with pytest.raises(UserError, match=word):
    QwenPolicy.from_config(make_config(checkpoint, **fields))


def test_a_tokenizer_larger_than_the_model_is_a_user_error(checkpoint, tmp_path):
  folder = make_checkpoint(tmp_path / "small", vocab_size=128)
  with pytest.raises(UserError, match="the tokenizer knows"):
    QwenPolicy.from_config(make_config(folder))


def test_auto_dtype_is_float32_on_cpu(checkpoint):
  assert dtype_name("auto", "dtype") == "float32"
  assert dtype_name("bfloat16", "dtype") == "bfloat16"
  assert hf.load_config(checkpoint).dtype == "float32"
