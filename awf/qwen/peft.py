"""LoRA adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

The base that an adapter was trained on is named in the weight file's metadata (`base_fingerprint`,
see `awf.qwen.shards`), which PEFT passes over.

Source: PEFT `LoraConfig`, `save_pretrained`; `lora_A.weight` is [R, in], `lora_B.weight` [out, R].
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from awf.qwen.config import QwenConfig
from awf.qwen.lora import TARGETS, Lora, LoRAConfig, parent_module, target_shapes
from awf.qwen.shards import FLOATS, Shards
from awf.types import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def _stored_name(layer: int, target: str, side: str) -> str:
  module = f"layers.{layer}.{parent_module(target)}.{target}"
  return f"base_model.model.model.{module}.lora_{side}.weight"


def save_adapter(
  path: str | os.PathLike[str],
  lora: Lora,
  lora_config: LoRAConfig,
  base_path: str = "",
  base_fingerprint: str = "",
) -> None:
  """Writes an adapter (not scaled: PEFT applies the scale itself), float32; its config comes last.

  Args:
    path: directory, made if absent.
    lora: the adapter.
    lora_config: its rank, alpha, targets and scale.
    base_path: name of the base model, for PEFT's `base_model_name_or_path`.
    base_fingerprint: of the base's weights; "" leaves it open.
  """
  from safetensors.numpy import save_file

  folder = Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / CONFIG_FILE).unlink(missing_ok=True)
  tensors = {}
  for layer, targets in lora.items():
    index = int(layer.removeprefix("layers_"))
    for target, leaf in targets.items():
      for side, name in (("A", "a"), ("B", "b")):
        array = np.ascontiguousarray(np.asarray(leaf[name], np.float32).T)
        tensors[_stored_name(index, target, side)] = array
  fields = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base_path,
    "r": lora_config.rank,
    "lora_alpha": lora_config.alpha,
    "target_modules": sorted(lora_config.targets),
    "lora_dropout": 0.0,
    "bias": "none",
    "use_rslora": lora_config.rslora,
    "use_dora": False,
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  metadata = {"format": "pt"} | ({"base_fingerprint": base_fingerprint} if base_fingerprint else {})
  save_file(tensors, str(folder / WEIGHTS_FILE), metadata=metadata)
  (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")


def load_adapter(
  path: str | os.PathLike[str],
  model_config: QwenConfig,
  field: str = "config.lora.init_path",
  base_fingerprint: str = "",
) -> tuple[Lora, LoRAConfig]:
  """Reads an adapter for a model.

  Args:
    path: PEFT directory.
    model_config: architecture of the base.
    field: config field that messages name.
    base_fingerprint: of the base at hand; an adapter that names another one is refused. "" checks
      shapes alone.

  Raises:
    UserError: no LoRA adapter there, a variant that is not built (named), tensors that do not fit
      the model (all named in one message), or another base.
  """
  folder = Path(path)
  raw, shards = _open(folder, field)
  lora_config = _adapter_config(raw, folder, field)
  shapes = target_shapes(model_config)
  lora: Lora = {}
  problems, wanted = [], set()
  for i in range(model_config.num_hidden_layers):
    lora[f"layers_{i}"] = {}
    for target in lora_config.targets:
      fan_in, fan_out = shapes[target]
      leaf = {}
      for side, shape in (("A", (lora_config.rank, fan_in)), ("B", (fan_out, lora_config.rank))):
        name = _stored_name(i, target, side)
        wanted.add(name)
        stored = shards.tensors.get(name)
        if stored is None:
          problems.append(f"{name} is missing")
        elif stored.shape != shape:
          problems.append(f"{name} has shape {stored.shape}, expected {shape}")
        elif stored.code not in FLOATS:
          problems.append(f"{name} has type {stored.code}, expected one of {', '.join(FLOATS)}")
        else:
          values = shards.rows(name, 0, shape[0]).astype(np.float32)
          leaf[side.lower()] = jnp.asarray(values.T)
          if not np.isfinite(values).all():
            problems.append(f"{name} holds values that are not finite")
      lora[f"layers_{i}"][target] = leaf
  problems += [f"{name} is unexpected" for name in sorted(set(shards.tensors) - wanted)]
  if problems:
    raise UserError(f"{field}: {folder} does not fit the model: " + "; ".join(problems[:20]))
  trained_on = shards.metadata.get("base_fingerprint", "")
  if base_fingerprint and trained_on and trained_on != base_fingerprint:
    raise UserError(
      f"{field}: {folder} was trained on another base ({raw.get('base_model_name_or_path')}, "
      f"fingerprint {trained_on[:12]}) than config.model.path ({base_fingerprint[:12]}); give it "
      "the base that it was trained on"
    )
  return lora, lora_config


def _open(folder: Path, field: str) -> tuple[dict[str, Any], Shards]:
  try:
    raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if not isinstance(raw, dict):
      raise TypeError(f"{CONFIG_FILE} holds no JSON object")
    if not (folder / WEIGHTS_FILE).is_file():
      raise FileNotFoundError(f"{WEIGHTS_FILE} is missing")
  except (OSError, ValueError, TypeError) as error:
    raise UserError(f"{field}: {folder} is no readable PEFT adapter: {error}") from error
  return raw, Shards(folder, [folder / WEIGHTS_FILE], field)


def _adapter_config(raw: dict[str, Any], folder: Path, field: str) -> LoRAConfig:
  """The LoRAConfig of an adapter_config.json; refuses variants that change the formula."""
  refused = [name for name in ("use_dora", "fan_in_fan_out", "modules_to_save") if raw.get(name)]
  if raw.get("bias", "none") != "none":
    refused.append(f"bias {raw['bias']!r}")
  patterns = ("rank_pattern", "alpha_pattern", "layers_to_transform", "exclude_modules")
  refused += [name for name in patterns if raw.get(name)]
  if raw.get("peft_type") != "LORA" or refused:
    what = ", ".join(refused) or f"peft_type {raw.get('peft_type')!r}"
    raise UserError(f"{field}: {folder} uses {what}; expected a plain LoRA adapter")
  targets = raw.get("target_modules") or ()
  if targets == "all-linear":
    targets = TARGETS
  targets = {targets} if isinstance(targets, str) else set(targets)
  known = tuple(name for name in TARGETS if name in targets)
  if targets - set(TARGETS) or not known:
    raise UserError(
      f"{field}: {folder} targets {sorted(targets)}; expected names among {', '.join(TARGETS)}"
    )
  return LoRAConfig(
    rank=raw.get("r", 0),
    alpha=float(raw.get("lora_alpha", 0)),
    targets=known,
    rslora=bool(raw.get("use_rslora")),
  )
