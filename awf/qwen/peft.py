"""LoRA adapters in PEFT's file format: adapter_config.json and adapter_model.safetensors.

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
from awf.types import UserError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def _stored_name(layer: int, target: str, side: str) -> str:
  module = f"layers.{layer}.{parent_module(target)}.{target}"
  return f"base_model.model.model.{module}.lora_{side}.weight"


def save_adapter(
  path: str | os.PathLike[str], lora: Lora, lora_config: LoRAConfig, base_path: str = ""
) -> None:
  """Writes an adapter (not scaled: PEFT applies alpha / rank itself), float32.

  Args:
    path: directory, made if absent.
    lora: the adapter.
    lora_config: its rank, alpha and targets.
    base_path: name of the base model, for PEFT's `base_model_name_or_path`.
  """
  from safetensors.numpy import save_file

  folder = Path(path)
  folder.mkdir(parents=True, exist_ok=True)
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
    "use_rslora": False,
    "use_dora": False,
    "fan_in_fan_out": False,
    "inference_mode": True,
  }
  save_file(tensors, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})
  (folder / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", "utf-8")


def load_adapter(
  path: str | os.PathLike[str], model_config: QwenConfig, field: str = "config.lora.init_path"
) -> tuple[Lora, LoRAConfig]:
  """Reads an adapter for a model.

  Raises:
    UserError: no LoRA adapter there, a variant that is not built (named), or tensors that do not
      fit the model (all named in one message).
  """
  import safetensors.numpy

  folder = Path(path)
  try:
    raw = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    stored = safetensors.numpy.load_file(str(folder / WEIGHTS_FILE))
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise UserError(f"{field}: {folder} is no readable PEFT adapter: {error}") from error
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
        if name not in stored:
          problems.append(f"{name} is missing")
        elif stored[name].shape != shape:
          problems.append(f"{name} has shape {stored[name].shape}, expected {shape}")
        else:
          leaf[side.lower()] = jnp.asarray(stored[name].T, jnp.float32)
      lora[f"layers_{i}"][target] = leaf
  problems += [f"{name} is unexpected" for name in sorted(set(stored) - wanted)]
  if problems:
    raise UserError(f"{field}: {folder} does not fit the model: " + "; ".join(problems[:20]))
  return lora, lora_config


def _adapter_config(raw: dict[str, Any], folder: Path, field: str) -> LoRAConfig:
  """The LoRAConfig of an adapter_config.json; refuses variants that change the formula."""
  refused = [name for name in ("use_rslora", "use_dora", "fan_in_fan_out") if raw.get(name)]
  if raw.get("bias", "none") != "none":
    refused.append(f"bias {raw['bias']!r}")
  refused += [name for name in ("rank_pattern", "alpha_pattern") if raw.get(name)]
  if raw.get("peft_type") != "LORA" or refused:
    what = ", ".join(refused) or f"peft_type {raw.get('peft_type')!r}"
    raise UserError(f"{field}: {folder} uses {what}; expected a plain LoRA adapter")
  targets = raw.get("target_modules") or ()
  targets = {targets} if isinstance(targets, str) else set(targets)
  known = tuple(name for name in TARGETS if name in targets)
  if targets - set(TARGETS) or not known:
    raise UserError(
      f"{field}: {folder} targets {sorted(targets)}; expected names among {', '.join(TARGETS)}"
    )
  return LoRAConfig(rank=raw.get("r", 0), alpha=float(raw.get("lora_alpha", 0)), targets=known)
