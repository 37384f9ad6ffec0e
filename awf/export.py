"""Mode export: a trained adapter leaves as PEFT files, or merged as a Hugging Face checkpoint.

A merge reads the original float weights again, one weight file at a time, also when training used a
quantised base: what quantisation lost is then not in the result.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from awf.qwen import hf
from awf.qwen.config import QwenConfig
from awf.qwen.hf_config import copied_configs
from awf.qwen.layout import Tensor, Where, get
from awf.qwen.lora import Lora, LoRAConfig, count
from awf.qwen.peft import load_adapter, save_adapter
from awf.qwen.quant import dequantised
from awf.qwen.shards import FLOATS, Shards
from awf.qwen.tokenizer import load_tokenizer
from awf.types import UserError

log = logging.getLogger("awf")

LOST = (
  "merged into the {method} base, as its original weights are not at hand: every matrix keeps the "
  "rounding of {method} (up to half a step of its scale)"
)


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What is exported, and where it comes from."""

  lora: Lora  # not scaled
  config: LoRAConfig
  source: str
  step: int | None = None  # of the checkpoint


def run_export(config: ConfigDict, workdir: Any) -> dict[str, Any]:
  """Writes the newest adapter of DIR (or that of `config.lora.init_path`) to `config.export.path`.

  Args:
    config: resolved config; `config.export` says in which format, where and in which dtype.
    workdir: directory of a run; only looked at.

  Returns:
    Format, path, where the adapter came from, sizes, the base and, for a merge, what was lost.

  Raises:
    UserError: nothing to export, another base, or a target that cannot be written.
  """
  export = config.export
  folder = hf.resolve_path(config.model.path)
  model_config = hf.load_config(folder)
  base = hf.check_weights(folder, model_config).fingerprint()
  adapter = find_adapter(config, workdir, model_config, base)
  target = _target(export.path or Path(workdir) / export.format, folder)
  part = target.with_name(f".{target.name}.{os.getpid()}.part")
  result: dict[str, Any] = {"format": export.format, "path": str(target)}
  try:
    part.parent.mkdir(parents=True, exist_ok=True)
    if export.format == "peft":
      save_adapter(part, adapter.lora, adapter.config, str(config.model.path), base)
    else:
      result |= write_merged(part, folder, model_config, adapter, export.dtype, export.shard_bytes)
    part.rename(target)
  except OSError as error:
    raise UserError(f"config.export.path: cannot write {target} ({error.strerror})") from error
  finally:
    shutil.rmtree(part, ignore_errors=True)
  log.info("%s of %s is in %s", export.format, adapter.source, target)
  return result | {
    "adapter": adapter.source,
    "step": adapter.step,
    "rank": adapter.config.rank,
    "trainable_parameters": count(adapter.lora),
    "base": str(config.model.path),
    "base_fingerprint": base,
    "bytes": sum(f.stat().st_size for f in target.iterdir()),
  }


def find_adapter(config: ConfigDict, workdir: Any, model_config: QwenConfig, base: str) -> Adapter:
  """The adapter of a run's newest sound checkpoint, or of `config.lora.init_path`.

  Args:
    config: resolved config.
    workdir: an `awf.workdir.Workdir`.
    model_config: architecture of the base.
    base: its fingerprint.

  Raises:
    UserError: neither is there, or it belongs to another base.
  """
  record = workdir.record()
  if record is None:
    if not config.lora.init_path:
      raise UserError(
        f"--workdir={workdir} holds no run and config.lora.init_path is empty: nothing to export; "
        "give one of them"
      )
    lora, lora_config = load_adapter(config.lora.init_path, model_config, base_fingerprint=base)
    return Adapter(lora, lora_config, str(config.lora.init_path))
  trained_on = record.get("base_fingerprint", "")
  if trained_on and trained_on != base:
    raise UserError(
      f"--workdir={workdir} was trained on another base (fingerprint {trained_on[:12]}) than "
      f"config.model.path ({base[:12]}); set config.model.path to "
      f"{record['config'].get('model', {}).get('path')}"
    )
  return _of_run(record, workdir)


def _of_run(record: dict[str, Any], workdir: Any) -> Adapter:
  from awf.checkpoint import Checkpointer

  found = None
  if workdir.checkpoints.is_dir():
    checkpoints = Checkpointer(workdir.checkpoints)
    try:
      found = checkpoints.arrays(("lora.", "weights."))
    finally:
      checkpoints.close()
  is_lora = found is not None and all(name.endswith((".a", ".b")) for name in found[1])
  if found is None or not is_lora or not found[1]:
    what = "no checkpoint yet" if found is None else "no adapter in its checkpoint"
    raise UserError(
      f"--workdir={workdir} (mode {record.get('mode')}) has {what}: nothing to export; train "
      "first, or give config.lora.init_path and another --workdir"
    )
  lora: Lora = {}
  for name, array in found[1].items():
    _, layer, target, leaf = name.split(".")
    lora.setdefault(layer, {}).setdefault(target, {})[leaf] = jnp.asarray(array)
  fields = {"rslora": False, **record["config"]["lora"]}
  lora_config = LoRAConfig.from_config(ConfigDict(fields))
  return Adapter(lora, lora_config, f"{workdir}, checkpoint {found[0]}", found[0])


def _target(path: str | os.PathLike[str], base: Path) -> Path:
  """Where to write; it must not hold anything yet."""
  target = Path(path).expanduser().absolute()
  if target.resolve() == base.resolve():
    raise UserError(f"config.export.path: {target} is the base itself; choose another")
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise UserError(f"config.export.path: {target} is not empty; choose another, or remove it")
  return target


def write_merged(
  path: str | os.PathLike[str],
  folder: Path,
  model_config: QwenConfig,
  adapter: Adapter,
  dtype: str = "auto",
  shard_bytes: int = hf.SHARD_BYTES,
  params: Any = None,
) -> dict[str, Any]:
  """Writes base + adapter as a checkpoint with tokenizer, chat template and generation config.

  Args:
    path: directory to write.
    folder: the base's checkpoint.
    model_config: its architecture.
    adapter: what to merge.
    dtype: stored dtype; "auto" is that of the base's weights.
    shard_bytes: largest weight file.
    params: quantised base in memory, to be merged when `folder` has no weights any more.

  Returns:
    `dtype`, `weight_files`, and `lost`: None, or what a merge without the original weights lost.

  Raises:
    UserError: neither original weights nor `params` are there.
  """
  lost, stored = None, "float32"
  try:
    shards = hf.check_weights(folder, model_config)
    layout = hf.checkpoint_layout(model_config)
    stored = FLOATS[next(iter(shards.tensors.values())).code].name

    read = partial(_read_stored, shards, layout)
  except UserError:
    if params is None:
      raise
    read = _reader(params)
    lost = LOST.format(method=_method(params))
    log.warning("%s", lost)
  dtype = stored if dtype == "auto" else dtype
  merged = _with_adapter(read, adapter)
  count_files = hf.write_checkpoint(
    path,
    merged,
    model_config,
    copied_configs(folder, dtype),
    load_tokenizer(folder).files,
    dtype,
    shard_bytes,
  )
  return {"dtype": dtype, "weight_files": count_files, "lost": lost}


def _read_stored(shards: Shards, layout: Mapping[Where, Tensor], where: Where) -> np.ndarray:
  return hf.read_float(shards, layout[where], np.float32)


def _with_adapter(read: Callable[[Where], np.ndarray], adapter: Adapter) -> Callable[[Where], Any]:
  """Weights of a path in float32, an adapter's product added where it has one."""

  def merged(where: Where) -> np.ndarray:
    weight = read(where)
    leaf = adapter.lora.get(where[0], {}).get(where[1]) if where[-1] == "kernel" else None
    if leaf is None:
      return weight
    a, b = (np.asarray(leaf[x], np.float32) for x in ("a", "b"))
    return weight + a @ (b * np.float32(adapter.config.scale))

  return merged


def _reader(params: Any) -> Callable[[Where], np.ndarray]:
  """Float32 weights of a base in memory, one leaf at a time."""

  def read(where: Where) -> np.ndarray:
    module = get(params, where[:-1])
    if where[-1] in module:
      return np.asarray(module[where[-1]], np.float32)
    if f"{where[-1]}_t" in module:
      return np.asarray(module[f"{where[-1]}_t"], np.float32).T
    q, scale = (module[f"{where[-1]}_{x}"] for x in ("q", "scale"))
    return np.asarray(dequantised(q, scale, where[-1] == "embedding"))

  return read


def _method(params: Any) -> str:
  kernel = params["layers_0"]["q_proj"].get("kernel_q")
  return "float" if kernel is None else str(kernel.dtype)
