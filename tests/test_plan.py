"""Mode plan: figures of a small model on the CPU target, and for a TPU where its compiler is."""

import copy
import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awf.chips import CHIPS, SLICES, TARGETS, chip_named, find_chip
from awf.config import validate
from awf.grpo.batch import make_batch
from awf.plan import plan_once, run_plan
from awf.plan_ideal import Load, bytes_of, decode_step_bytes, update_flops, visible_pairs
from awf.plan_programs import compile_program, make_setup, sizes, wanted_libtpu
from awf.plan_search import candidates
from awf.plan_target import find_target
from awf.qwen.known import ARCHITECTURES
from awf.types import Rollout, UserError
from configs.base import base_config
from configs.common import MODELS

HAS_TPU_COMPILER = importlib.util.find_spec("libtpu") is not None
SMALL = dict(
  model_type="qwen2", vocab_size=512, hidden_size=128, intermediate_size=2048, num_hidden_layers=2,
  num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory):
  """A directory with a config.json and no weights."""
  folder = tmp_path_factory.mktemp("small")
  (folder / "config.json").write_text(json.dumps(SMALL))
  return str(folder)


def make_config(path, target="cpu", **changes):
  c = base_config()
  c.model.path = path
  c.mesh.data = 1
  c.plan.target = target
  fields = {
    "sampler.rows": 16, "sampler.context": 640, "sampler.max_new_tokens": 128,
    "executor.max_new_tokens": 64, "lora.rank": 4, "grpo.group_size": 4, "grpo.micro_batch": 4,
    "grpo.remat": "full", "search.parents": 2, "plan.programs": ("sampler", "update"),
    "plan.problem_prompt": 64,
  } | changes  # fmt: skip
  for name, value in fields.items():
    part, field = name.split(".")
    c[part][field] = value
  return c


@pytest.fixture(scope="module")
def result(small):
  return run_plan(make_config(small), None)


def test_the_plan_has_every_figure_and_allocates_nothing(result):
  assert result["fits"] is True and result["verdict"] == "fits"
  assert result["compiled"] is True and result["extrapolated"] is False
  assert 0 < result["peak_gb"] < result["capacity_gb"]
  for name in ("tokens_per_second", "seconds_per_step", "problems_per_hour"):
    assert result[name] > 0
  sampler, update = (result["programs"][x] for x in ("sampler", "update"))
  assert set(sampler["parts"]) == {"prefill", "decode", "decode_calls", "once"}
  assert sampler["guessed"] == update["guessed"] == []
  assert "change" not in result
  json.dumps(result)


def test_memory_is_that_of_the_arrays(small, result):
  setup = make_setup(make_config(small), find_target("cpu"))
  d, f, v, k = 128, 2048, 512, 2 * 32
  layer = 2 * d * d + 2 * d * k + d + 2 * k + 3 * d * f + 2 * d
  memory = setup.memory()
  assert memory["weights"] == 4 * (2 * layer + 2 * v * d + d) == bytes_of(setup.params)
  s = setup.shapes
  assert memory["kv"] == 2 * 2 * 4 * k * ((s.pages + 1) * s.page + s.rows * s.chunks * s.chunk)
  lora = 4 * 4 * 2 * (2 * (d + d) + 2 * (d + k) + 3 * (d + f))
  assert memory["lora"] == 3.5 * lora
  assert memory["optimizer"] == pytest.approx(2 * lora, rel=0.01)
  program = result["programs"]["sampler"]
  held = (memory["weights"] + memory["kv"] + lora) / 2**30
  assert program["arguments_gb"] == pytest.approx(held, abs=2e-3)


def test_parts_of_the_sampler_by_hand(small, result):
  """One decode step: every matrix once per row; one prefill call: all but the last layer's MLP."""
  d, f, v, k, rows = 128, 2048, 512, 64, 16
  matrices = 2 * (2 * d * d + 2 * d * k + 3 * d * f) + d * v
  adapters = 2 * 4 * (2 * (d + d) + 2 * (d + k) + 3 * (d + f))
  decode = result["programs"]["sampler"]["parts"]["decode"]["flops"]
  s = make_setup(make_config(small), find_target("cpu")).shapes
  assert (s.share, s.at_once) == (4, 4), "4 prompts make 4 groups"
  assert (s.chunks, s.chunk) == (1, 128), "completions of few rows are read where they lie"
  attention = 2 * 2 * 2 * (4 * 4 * 512 + rows * 128) * d
  assert decode == pytest.approx(2 * rows * (matrices + adapters) + attention, rel=0.25)
  # Of a workflow's calls no two have a prompt in common: each row is a group of its own.
  config = make_config(small)
  new = config.executor.max_new_tokens
  prompt = min(config.plan.problem_prompt, config.sampler.context - new)
  pages, chunks = -(-prompt // s.page), -(-new / 2 // s.chunk)
  attention = 2 * 2 * 2 * (rows * s.share * pages * s.page + rows * chunks * s.chunk) * d
  calls = result["programs"]["sampler"]["parts"]["decode_calls"]["flops"]
  assert calls == pytest.approx(2 * rows * (matrices + adapters) + attention, rel=0.25)


def test_the_ratios_hold_on_cpu(result):
  """A CPU copies a chunk of KV before its product: that is the excess of its decode step."""
  assert 1.0 <= result["ratios"]["update_flops"] <= 1.15
  assert 1.0 <= result["ratios"]["decode_bytes"] <= 3.5
  assert result["ratios"]["update_padding"] >= 1.0


def test_a_config_that_does_not_fit_gets_the_nearest_change(small, result, capsys):
  """The chip is made so small that half the rows fit and all of them do not."""
  config = make_config(small, **{"plan.programs": ("sampler",)})
  chip = find_target("cpu").chip.memory / 2**30
  all_rows = result["programs"]["sampler"]["peak_gb"]
  config.plan.reserve_gb = chip - 0.9 * all_rows
  found = run_plan(config, None)
  assert found["fits"] is False and found["verdict"] == "does not fit"
  assert found["change"] == {"sampler.rows": 8}
  assert found["tried"][-1]["fits"] is True
  assert "config.sampler.rows=8" in capsys.readouterr().err
  changed = copy.deepcopy(config)
  changed.sampler.rows = 8
  assert plan_once(changed, find_target("cpu"))["fits"] is True


def test_resident_arrays_that_are_too_much_need_no_compiler(small):
  config = make_config(small, **{"plan.trials": 0})
  config.plan.reserve_gb = find_target("cpu").chip.memory / 2**30 - 0.001
  found = run_plan(config, None)
  assert found["fits"] is False and found["compiled"] is False and found["programs"] == {}
  assert found["peak_gb"] > found["capacity_gb"] and found["tokens_per_second"] is None


def test_the_fast_plan_agrees_with_the_whole_model(small, tmp_path):
  """Programs of 2 and 4 layers lie on the line on which that of 6 lies."""
  (tmp_path / "config.json").write_text(json.dumps(SMALL | {"num_hidden_layers": 6}))
  config = make_config(str(tmp_path), **{"plan.programs": ("sampler",)})
  whole = plan_once(config, find_target("cpu"))
  config.plan.fast = True
  fast = plan_once(config, find_target("cpu"))
  assert (whole["extrapolated"], fast["extrapolated"]) == (False, True)
  assert fast["peak_bytes"] == pytest.approx(whole["peak_bytes"], rel=0.02)
  for part, cost in whole["programs"]["sampler"]["parts"].items():
    found = fast["programs"]["sampler"]["parts"][part]
    assert found["flops"] == pytest.approx(cost["flops"], rel=1e-6)
    assert found["bytes"] == pytest.approx(cost["bytes"], rel=0.05)


def test_candidates_begin_with_the_part_that_is_the_peak(small):
  config = make_config(small, **{"grpo.remat": "none"})
  assert next(candidates(config, True)) == {"sampler.rows": 8}
  assert next(candidates(config, False)) == {"grpo.remat": "full"}
  every = list(candidates(config, True))
  assert {"model.quant": "int8"} in every
  assert len({json.dumps(c, sort_keys=True) for c in every}) == len(every)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_named_model_is_planned_for_without_a_download(name):
  """h200 is counted from operands; nothing is compiled and nothing is read."""
  config = make_config(MODELS[name], "h200")
  found = run_plan(config, None)
  assert found["compiled"] is False and found["fits"] is True
  assert found["tokens_per_second"] > 100 and found["programs"] == {}


def test_known_architectures_have_the_published_sizes():
  """Parameters in millions, from the models' cards."""
  sizes = {
    "Qwen/Qwen2-7B-Instruct": 7616, "Qwen/Qwen2.5-0.5B-Instruct": 494,
    "Qwen/Qwen2.5-1.5B-Instruct": 1544, "Qwen/Qwen2.5-3B-Instruct": 3086, "Qwen/Qwen3-0.6B": 596,
    "Qwen/Qwen3-1.7B": 1721, "Qwen/Qwen3-4B": 4022, "Qwen/Qwen3-8B": 8191,
  }  # fmt: skip
  for name, millions in sizes.items():
    assert round(ARCHITECTURES[name].num_parameters / 1e6) == millions
  assert set(MODELS.values()) == set(ARCHITECTURES)


def test_what_a_decode_step_must_read():
  model = ARCHITECTURES["Qwen/Qwen2-7B-Instruct"]
  from awf.qwen.layout import abstract_params
  from awf.qwen.quant import QuantConfig

  params = abstract_params(model, "bfloat16", QuantConfig("int8"))
  must = decode_step_bytes(model, params, None, Load(prompts=4, group=8, prompt=600, new=800))
  assert must["kv"] == 4 * (600 + 8 * 400) * 28 * 2 * 4 * 128 * 4
  assert 7.0e9 < must["weights"] < 7.2e9, "int8 matrices and head; of the embedding 32 lines"


def test_visible_pairs_are_those_of_the_mask():
  rollouts = [Rollout(str(i // 2), (i // 2, 5), (1, 2, 3), (), 0.0) for i in range(4)]
  batch = make_batch(rollouts, range(4), 512)
  segments, parents = batch.segments_ZBT[0, 0], batch.parents_ZBT[0, 0]
  seen = (segments[:, None] == segments[None]) | (parents[:, None] == segments[None])
  seen &= np.tri(512, dtype=bool) & (segments > 0)[:, None] & (segments > 0)[None]
  assert visible_pairs(batch) == seen.sum()
  must = update_flops(ARCHITECTURES["Qwen/Qwen3-0.6B"], 8, ("q_proj",), batch, True)
  down = 2 * 28 * 1024 * 3072 * batch.num_tokens
  assert must["recompute"] == must["forward"] - down
  assert (
    update_flops(ARCHITECTURES["Qwen/Qwen3-0.6B"], 8, ("q_proj",), batch, False)["recompute"] == 0
  )
  assert must["total"] == sum(must[k] for k in ("forward", "recompute", "backward", "head"))


def test_chips_and_slices():
  assert set(SLICES) < set(TARGETS)
  assert find_chip("TPU v5 lite").name == "v5e"
  assert find_chip("TPU v5").name == "v5p"
  assert find_chip("NVIDIA H200").name == "h200"
  assert find_chip("cpu") is None
  assert all(chip_named(c.name) is c for c in CHIPS)


def test_mistakes_are_one_line(small):
  config = make_config(small, "v9z-1")
  with pytest.raises(UserError, match="config.plan.target"):
    validate(config, "plan")
  with pytest.raises(UserError, match="config.sampler.context"):
    sizes(make_config(small, **{"plan.prompt": 600, "plan.new": 100}))
  with pytest.raises(UserError, match="config.json"):
    make_setup(make_config("nobody/nothing"), find_target("cpu"))


def test_a_learner_made_of_shapes_has_no_arrays(small):
  setup = make_setup(make_config(small), find_target("cpu"))
  leaves = jax.tree.leaves((setup.trainer.state, setup.params, setup.cache, setup.lora))
  assert leaves and all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  assert setup.cache[0][0].dtype == jnp.float32


def plan_without_the_compiler(small):
  with pytest.raises(UserError, match=r"pip install .jax\[tpu\]"):
    run_plan(make_config(small, "v5e-1"), None)


def plan_with_the_compiler(small):
  """The two ratios of a small model on a v5e, and a mesh of four."""
  found = run_plan(make_config(small, "v5e-1", **{"plan.trials": 0}), None)
  assert found["fits"] is True
  assert found["ratios"]["update_flops"] <= 1.15
  assert found["ratios"]["decode_bytes"] <= 1.25
  config = make_config(small, "v5e-4", **{"plan.programs": ("update",)})
  config.mesh.data, config.mesh.tensor = 2, 2
  assert plan_once(config, find_target("v5e-4"))["devices"] == 4


def test_a_tpu_slice_is_compiled_for_or_its_compiler_is_named(small):
  (plan_with_the_compiler if HAS_TPU_COMPILER else plan_without_the_compiler)(small)


def test_a_program_that_jax_cannot_read_names_the_compiler_to_install(monkeypatch):
  monkeypatch.setenv("AWF_CACHE", "off")
  lowered = jax.jit(lambda x: x + 1).lower(1.0)

  def as_text(self):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure (hlo_instruction.cc:390)")

  monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
  with pytest.raises(UserError, match=r"v5e-1.*cannot read.*pip install 'libtpu==[\d.]+\*'"):
    compile_program(lowered, dataclasses.replace(find_target("cpu"), name="v5e-1"), 0.0)
  assert wanted_libtpu().startswith("libtpu==")
