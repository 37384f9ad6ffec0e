"""Hugging Face checkpoints of Qwen2, Qwen2.5 and Qwen3 dense: in (safetensors) and out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from awf.qwen.config import QwenConfig
from awf.qwen.layout import DTYPES, Tensor, checkpoint_layout, get, leaves_of, put, sharding_of
from awf.qwen.quant import QuantConfig, quantise_rows
from awf.types import UserError

SHARD_BYTES = 4 * 2**30  # largest weight file that is written
_FLOAT_CODES = ("F32", "BF16", "F16")
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a constant that old checkpoints carried along
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ("*.json", "*.safetensors", "merges.txt", "tokenizer.model", "*.jinja")
_SIZES = (
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
)


def resolve_path(path: str | os.PathLike[str]) -> Path:
  """The local directory of a checkpoint; a hub id (owner/name) is downloaded or cached.

  Raises:
    UserError: no such directory, and no such model can be had from the hub.
  """
  folder = Path(path).expanduser()
  if str(path) and folder.is_dir():
    return folder
  if not _HUB_ID.fullmatch(str(path)):
    raise UserError(
      f"config.model.path: expected a Hugging Face directory or hub id (owner/name), got {path!r}"
    )
  import httpx
  import huggingface_hub

  try:
    return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(_HUB_FILES)))
  except (OSError, ValueError, httpx.HTTPError, huggingface_hub.errors.HfHubHTTPError) as error:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    raise UserError(
      f"config.model.path: {str(path)!r} is no local directory and could not be downloaded "
      f"({reason[0]}); pass a local copy with --config.model.path=DIR, or run "
      "--config=configs/quickstart.py, which needs no download"
    ) from error


def _read_json(file: Path) -> dict[str, Any]:
  try:
    data = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"config.model.path: {file.name} is missing in {file.parent}") from error
  except ValueError as error:
    raise UserError(f"config.model.path: {file} is not valid JSON: {error}") from error
  if not isinstance(data, dict):
    raise UserError(f"config.model.path: {file} must hold a JSON object")
  return data


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
  raw = _read_json(folder / "config.json")
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
  rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
  try:
    return QwenConfig(
      **{name: raw[name] for name in _SIZES},
      num_key_value_heads=raw.get("num_key_value_heads") or heads,
      head_dim=head_dim,
      family=family,
      rope_theta=float(raw.get("rope_theta") or rope.get("rope_theta") or 10_000.0),
      rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
      tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
      max_position_embeddings=int(raw.get("max_position_embeddings", 32768)),
      dtype=dtype,
    )
  except ValueError as error:
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
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
      found.append(f"rope scaling ({field} {kind!r})")
  if raw.get("hidden_act", "silu") != "silu":
    found.append(f"hidden_act {raw['hidden_act']!r}")
  if family == "qwen3" and raw.get("attention_bias"):
    found.append("attention_bias in a qwen3 model")
  if raw.get("quantization_config"):
    method = raw["quantization_config"].get("quant_method", "unknown")
    found.append(f"quantised weights (quant_method {method!r})")
  return found


def load_params(
  path: str | os.PathLike[str],
  config: QwenConfig,
  dtype: str = "float32",
  mesh: Mesh | None = None,
  quant: QuantConfig | None = None,
) -> dict[str, Any]:
  """Reads the weights, tensor by tensor, onto the default device or sharded over a mesh.

  Args:
    path: directory or hub id, with model.safetensors or shards and their index.
    config: the architecture, of `load_config`.
    dtype: stored dtype: float32, bfloat16 or float16.
    mesh: where the parameters live; None is the default device.
    quant: the layout to load them in; None is the float one.

  Raises:
    UserError: all missing, unexpected and ill-shaped tensors in one message, or an unreadable file.
  """
  if dtype not in DTYPES:
    raise UserError(f"config.model.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
  folder, quant = resolve_path(path), quant or QuantConfig()
  layout = checkpoint_layout(config)
  with _Reader(folder) as reader:
    problems = _compare(layout, reader, config.tie_word_embeddings)
    if problems:
      more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
      text = "; ".join(problems[:20] + more)
      raise UserError(f"config.model.path: {folder} does not fit its config.json: {text}")
    params: dict[str, Any] = {}
    for where, tensor in layout.items():
      array = reader.read(tensor.name)
      leaves = leaves_of(where, tensor.shape, DTYPES[dtype], quant)
      for path, value in zip(leaves, _values(array, tensor, leaves, quant), strict=True):
        sharding = sharding_of(path, value.shape, mesh)
        put(params, path, jax.device_put(np.ascontiguousarray(value), sharding))
  return params


def _values(array, tensor, leaves, quant):
  """The arrays of a tensor's leaves, in their order."""
  kinds = [kind for _, kind in leaves.values()]
  if len(leaves) == 1:
    return [(array.T if tensor.is_transposed else array).astype(kinds[0], copy=False)]
  method = "int8" if kinds[0] == np.int8 else "int4"
  integers, scale = quantise_rows(array, method, quant.group)
  return [integers.T if tensor.is_transposed else integers, scale.T]


def _compare(layout: Mapping[Any, Tensor], reader: _Reader, tied: bool) -> list[str]:
  """One sentence for each tensor that is missing, unexpected, ill-shaped or not of a float type."""
  wanted = {tensor.name: tensor.stored_shape for tensor in layout.values()}
  problems = [f"{name} is missing" for name in wanted if name not in reader.names]
  for name in reader.names:
    if name in wanted:
      shape, code = reader.describe(name)
      if shape != wanted[name]:
        problems.append(f"{name} has shape {shape}, expected {wanted[name]}")
      if code not in _FLOAT_CODES:
        problems.append(f"{name} has type {code}, expected one of {', '.join(_FLOAT_CODES)}")
    elif not (_IGNORED.search(name) or (tied and name == "lm_head.weight")):
      problems.append(f"{name} is unexpected")
  return problems


class _Reader:
  """The safetensors files of a directory as one mapping from tensor name to array."""

  def __init__(self, folder: Path) -> None:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
      self._files = [single]
    elif index.is_file():
      names = sorted(set(_read_json(index).get("weight_map", {}).values()))
      self._files = [folder / name for name in names]
    else:
      raise UserError(
        f"config.model.path: expected model.safetensors or model.safetensors.index.json in {folder}"
      )
    self._open: list[Any] = []
    self.names: dict[str, Any] = {}

  def __enter__(self) -> _Reader:
    import safetensors

    for file in self._files:
      try:
        opened = safetensors.safe_open(str(file), framework="np")
      except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"config.model.path: {file} cannot be read: {error}") from error
      self._open.append(opened)
      self.names |= dict.fromkeys(opened.keys(), opened)
    return self

  def __exit__(self, *unused: object) -> None:
    self.names, self._open = {}, []

  def describe(self, name: str) -> tuple[tuple[int, ...], str]:
    part = self.names[name].get_slice(name)
    return tuple(part.get_shape()), part.get_dtype()

  def read(self, name: str) -> np.ndarray:
    return self.names[name].get_tensor(name)


def save_checkpoint(
  path: str | os.PathLike[str],
  params: Mapping[str, Any],
  config: QwenConfig,
  tokenizer_files: Iterable[str | os.PathLike[str]] = (),
  dtype: str = "float32",
  stop_ids: Sequence[int] = (),
  pad_id: int | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes a checkpoint in Hugging Face's layout; config.json last, so half of one has none.

  Args:
    path: directory, made if absent.
    params: base parameters (no adapter).
    config: their architecture.
    tokenizer_files: copied under their own names.
    dtype: stored dtype.
    stop_ids: end-of-turn ids for config.json and generation_config.json.
    pad_id: pad id for the same files.
    shard_bytes: largest weight file; more are indexed.
  """
  from safetensors.numpy import save_file

  folder = Path(path)
  folder.mkdir(parents=True, exist_ok=True)
  for old in [folder / "config.json", *folder.glob("model*.safetensors*")]:
    old.unlink(missing_ok=True)
  for file in tokenizer_files:
    if Path(file).resolve().parent != folder.resolve():
      shutil.copy(file, folder / Path(file).name)
  shards = list(_shards(checkpoint_layout(config), np.dtype(DTYPES[dtype]).itemsize, shard_bytes))
  weight_map, total = {}, 0
  for i, shard in enumerate(shards):
    name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
    name = name if len(shards) > 1 else "model.safetensors"
    tensors = {}
    for where, tensor in shard:
      array = np.asarray(get(params, where)).astype(DTYPES[dtype])
      if array.shape != tensor.shape:
        raise ValueError(f"{'/'.join(where)}: expected shape {tensor.shape}, got {array.shape}")
      tensors[tensor.name] = np.ascontiguousarray(array.T if tensor.is_transposed else array)
      total += array.nbytes
    save_file(tensors, str(folder / name), metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
  ids = {"eos_token_id": list(stop_ids) or None, "pad_token_id": pad_id}
  ids = {name: value for name, value in ids.items() if value is not None}
  if ids:
    _write_json(folder / "generation_config.json", ids)
  _write_json(folder / "config.json", _config_json(config, dtype) | ids)


def _shards(
  layout: Mapping[tuple[str, ...], Tensor], itemsize: int, limit: int
) -> Iterator[list[tuple[tuple[str, ...], Tensor]]]:
  """Splits the layout, in order, into parts of at most `limit` bytes (one tensor at least)."""
  part, size = [], 0
  for where, tensor in layout.items():
    nbytes = int(np.prod(tensor.shape)) * itemsize
    if part and size + nbytes > limit:
      yield part
      part, size = [], 0
    part.append((where, tensor))
    size += nbytes
  yield part


def _config_json(config: QwenConfig, dtype: str) -> dict[str, Any]:
  fields = dataclasses.asdict(config)
  family = fields.pop("family")
  fields |= {"model_type": family, "hidden_act": "silu", "use_sliding_window": False}
  fields |= {"architectures": [family.capitalize() + "ForCausalLM"], "dtype": dtype}
  return fields


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_hash(params: Mapping[str, Any]) -> str:
  """Hex digest of names, shapes, dtypes and bits of all parameters, whatever device or mesh."""
  digest = hashlib.sha256()
  for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda x: str(x[0])):
    name = jax.tree_util.keystr(path)
    lanes = np.asarray(_mix_bits(leaf)).tolist()
    digest.update(json.dumps([name, list(leaf.shape), str(leaf.dtype), lanes]).encode())
  return digest.hexdigest()[:32]


@jax.jit
def _mix_bits(x: jax.Array) -> jax.Array:
  """Two 32-bit sums over all elements, each mixed with its index (MurmurHash3's finaliser)."""
  if jnp.issubdtype(x.dtype, jnp.integer):
    bits = x.astype(jnp.int32).astype(jnp.uint32)
  else:
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
  index = jnp.zeros(x.shape, jnp.uint32)
  for axis, size in enumerate(x.shape):
    index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
  lanes = []
  for seed in (0x9E3779B9, 0x7FEB352D):
    h = bits.astype(jnp.uint32) ^ (index * np.uint32(seed))
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    lanes.append(jnp.sum(h ^ (h >> 16), dtype=jnp.uint32))
  return jnp.stack(lanes)
