"""config.json and generation_config.json of Qwen checkpoints: in, and out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awf.qwen.config import QwenConfig, Yarn, yarn_scale
from awf.qwen.hub import resolve_path
from awf.qwen.shards import read_json
from awf.types import UserError

_SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)


def load_config(path: str | os.PathLike[str], dtype: str = "float32") -> QwenConfig:
  """The architecture of a checkpoint.

  Args:
    path: directory or hub id.
    dtype: compute dtype of the returned config.

  Raises:
    UserError: another architecture (named), or a switch that is not built (named).

  Source: transformers configuration_qwen2.py and configuration_qwen3.py, including their defaults.
  """
  folder = resolve_path(path)
  raw = read_json(folder / "config.json")
  family = str(raw.get("model_type", "missing"))
  refused = _refusals(raw, family)
  if refused:
    raise UserError(
      f"config.model.path: {folder} needs {'; '.join(refused)}; "
      "expected a dense Qwen2, Qwen2.5 or Qwen3 checkpoint"
    )
  missing = [name for name in _SIZES if not isinstance(raw.get(name), int)]
  if missing:
    raise UserError(f"config.model.path: {folder}/config.json lacks {', '.join(missing)}")
  heads = raw["num_attention_heads"]
  head_dim = raw.get("head_dim") or (128 if family == "qwen3" else raw["hidden_size"] // heads)
  rope = _rope(raw)
  try:
    return QwenConfig(
      **{name: raw[name] for name in _SIZES},
      num_key_value_heads=raw.get("num_key_value_heads") or heads,
      head_dim=head_dim,
      family=family,
      rope_theta=float(rope.get("rope_theta") or raw.get("rope_theta") or 10_000.0),
      rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
      tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
      max_position_embeddings=int(raw.get("max_position_embeddings", 32768)),
      dtype=dtype,
      yarn=_yarn(raw, rope),
    )
  except (ValueError, TypeError) as error:
    raise UserError(f"config.model.path: {folder}/config.json: {error}") from error


def _refusals(raw: Mapping[str, Any], family: str) -> list[str]:
  """Names of the features of a config.json that this program does not have."""
  if family not in ("qwen2", "qwen3"):
    kind = "mixture of experts" if "moe" in family else "model_type"
    return [f"{kind} {family!r}"]
  found = []
  if raw.get("num_experts"):
    found.append(f"mixture of experts (num_experts {raw['num_experts']})")
  layers = raw.get("num_hidden_layers", 0)
  window = raw.get("use_sliding_window") and raw.get("sliding_window", 4096)
  kinds = raw.get("layer_types")
  if kinds is None and window and raw.get("max_window_layers", 28) < layers:
    kinds = ["sliding_attention"]
  if window and kinds and set(kinds) != {"full_attention"}:
    found.append(f"sliding window attention (use_sliding_window, window {window})")
  for field in ("rope_scaling", "rope_parameters"):
    rope = raw.get(field) or {}
    kind = _rope_type(rope)
    if kind not in ("default", "yarn"):
      found.append(f"rope scaling ({field} {kind!r})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
      found.append(f"partial_rotary_factor {rope['partial_rotary_factor']}")
  if raw.get("hidden_act", "silu") != "silu":
    found.append(f"hidden_act {raw['hidden_act']!r}")
  if family == "qwen3" and raw.get("attention_bias"):
    found.append("attention_bias in a qwen3 model")
  if raw.get("quantization_config"):
    method = raw["quantization_config"].get("quant_method", "unknown")
    found.append(f"quantised weights (quant_method {method!r})")
  return found


def _rope(raw: Mapping[str, Any]) -> Mapping[str, Any]:
  """The rotary fields under either name; the older one counts when both are there."""
  return raw.get("rope_scaling") or raw.get("rope_parameters") or {}


def _rope_type(rope: Mapping[str, Any]) -> str:
  return str(rope.get("rope_type", rope.get("type", "default")))


def _yarn(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> Yarn | None:
  if _rope_type(rope) != "yarn":
    return None
  longest = int(raw.get("max_position_embeddings", 32768))
  original = int(rope.get("original_max_position_embeddings") or longest)
  factor = float(rope.get("factor") or longest / original)
  scale = rope.get("attention_factor")
  top, bottom = rope.get("mscale"), rope.get("mscale_all_dim")
  if scale is None and top and bottom:
    scale = yarn_scale(factor, top) / yarn_scale(factor, bottom)
  return Yarn(
    factor=factor,
    original_max_position_embeddings=original,
    beta_fast=float(rope.get("beta_fast") or 32),
    beta_slow=float(rope.get("beta_slow") or 1),
    attention_factor=None if scale is None else float(scale),
    truncate=bool(rope.get("truncate", True)),
  )


def config_json(config: QwenConfig, dtype: str) -> dict[str, Any]:
  """The fields of a config.json for a model that is stored in `dtype`."""
  fields = dataclasses.asdict(config)
  family, yarn = fields.pop("family"), fields.pop("yarn")
  fields |= {"model_type": family, "hidden_act": "silu", "use_sliding_window": False}
  fields |= {"architectures": [family.capitalize() + "ForCausalLM"], "dtype": dtype}
  if yarn is not None:
    fields["rope_scaling"] = {"rope_type": "yarn", "rope_theta": config.rope_theta, **yarn}
  return fields


def generation_defaults(path: str | os.PathLike[str]) -> dict[str, float | int]:
  """Sampling that a checkpoint's generation_config.json asks for.

  Returns:
    Those of temperature, top_p, top_k and min_p that it sets; temperature 0 where it turns sampling
    off; nothing without the file. Its stop ids are the tokenizer's (awf.qwen.tokenizer).

  Raises:
    UserError: the file is no JSON object, or a value is no number.
  """
  file = resolve_path(path) / "generation_config.json"
  if not file.is_file():
    return {}
  raw = read_json(file)
  found: dict[str, float | int] = {}
  kinds = {"temperature": float, "top_p": float, "top_k": int, "min_p": float}
  for name, kind in kinds.items():
    value = raw.get(name)
    if value is None:
      continue
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise UserError(f"config.model.path: {file}: {name} must be a number, got {value!r}")
    found[name] = kind(value)
  if raw.get("do_sample") is False and found:
    found["temperature"] = 0.0
  return found


def copied_configs(folder: Path, dtype: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """A checkpoint's own config.json, for weights in `dtype`, and its generation config if any."""
  config = read_json(folder / "config.json")
  config.pop("torch_dtype", None)
  config["dtype"] = dtype
  file = folder / "generation_config.json"
  return config, read_json(file) if file.is_file() else None
