"""Hugging Face checkpoints of Qwen2, Qwen2.5 and Qwen3 dense: in (safetensors) and out."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from awf.qwen.config import QwenConfig
from awf.qwen.hf_config import config_json, generation_defaults, load_config
from awf.qwen.hub import resolve_path
from awf.qwen.layout import (
  DTYPES,
  Tensor,
  Where,
  checkpoint_layout,
  get,
  leaves_of,
  put,
  sharding_of,
)
from awf.qwen.quant import CHUNK_VALUES, QuantConfig, num_bytes, quantise_stored
from awf.qwen.shards import FLOATS, Shards
from awf.terminal import track
from awf.types import UserError

__all__ = [
  "DTYPES", "SHARD_BYTES", "base_hash", "check_weights", "checkpoint_layout", "fingerprint",
  "generation_defaults", "load_config", "load_params", "read_float", "resolve_path",
  "save_checkpoint", "write_checkpoint",
]  # fmt: skip

log = logging.getLogger("awf")

SHARD_BYTES = 4 * 2**30  # largest weight file that is written
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # a constant that old checkpoints carried along
_SHOWN = 20  # ill tensors named in one message


def load_params(
  path: str | os.PathLike[str],
  config: QwenConfig,
  dtype: str = "float32",
  mesh: Mesh | None = None,
  quant: QuantConfig | None = None,
  is_turned: bool = False,
) -> dict[str, Any]:
  """Reads the weights, tensor by tensor, onto the default device or sharded over a mesh.

  Beside the result the host holds one tensor in its final layout and a few rows as floats; a device
  gets its own part alone.

  Args:
    path: directory or hub id, with model.safetensors or shards and their index.
    config: the architecture, of `load_config`.
    dtype: stored dtype: float32, bfloat16 or float16.
    mesh: where the parameters live; None is the default device.
    quant: the layout to load them in; None is the float one.
    is_turned: float matrices as `kernel_t` [out, in] (awf.qwen.quant), on one device.

  Raises:
    UserError: all missing, unexpected and ill-shaped tensors in one message, or an unreadable file.
  """
  if dtype not in DTYPES:
    raise UserError(f"config.model.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
  folder, quant = resolve_path(path), quant or QuantConfig()
  began, layout = time.perf_counter(), checkpoint_layout(config, is_turned)
  leaves = {where: leaves_of(where, t.shape, DTYPES[dtype], quant) for where, t in layout.items()}
  shards = check_weights(folder, config)
  order = {name: i for i, name in enumerate(shards.tensors)}  # one file after the other
  params: dict[str, Any] = {}
  total = sum(math.prod(s) * jnp.dtype(k).itemsize for x in leaves.values() for s, k in x.values())
  with track("load weights", total, unit="B") as shown:
    for where, tensor in sorted(layout.items(), key=lambda item: order[item[1].name]):
      for leaf, part in _parts(shards, tensor, leaves[where], quant).items():
        placed = _place(leaf, leaves[where][leaf][0], part, mesh)
        put(params, leaf, placed)
        shown.advance(placed.nbytes)
  if num_bytes(params) > 1e9:
    log.info("loaded %.1f GB in %.0f s", num_bytes(params) / 1e9, time.perf_counter() - began)
  return params


_Part = Callable[[tuple[slice, ...]], np.ndarray]  # index -> that part of a leaf


def _parts(
  shards: Shards, tensor: Tensor, leaves: Mapping, quant: QuantConfig
) -> dict[Where, _Part]:
  """For each leaf that a stored tensor becomes, how to get a part of it."""
  (first, (_, kind)), *rest = leaves.items()
  if not rest:
    return {first: lambda index: read_float(shards, tensor, kind, index)}
  integers, scale = quantise_stored(
    lambda start, stop: shards.rows(tensor.name, start, stop),
    shards.tensors[tensor.name].shape,
    kind,
    quant.group,
  )
  integers = integers.T if tensor.is_transposed else integers
  return {
    first: lambda index: np.ascontiguousarray(integers[index]),
    rest[0][0]: lambda index: np.ascontiguousarray(scale.T[index]),
  }


def _place(where: Where, shape: Sequence[int], part: _Part, mesh: Mesh | None) -> jax.Array:
  """Puts one leaf where it belongs, and waits: else the host would hold many of them."""
  sharding = sharding_of(where, shape, mesh)
  if sharding is None:
    return jax.block_until_ready(jax.device_put(part((slice(None),) * len(shape))))
  made: dict[str, np.ndarray] = {}

  def once(index: tuple[slice, ...] | None) -> np.ndarray:
    if index is None:
      index = (slice(None),) * len(shape)
    return made.setdefault(str(index), part(index)) if str(index) not in made else made[str(index)]

  return jax.block_until_ready(jax.make_array_from_callback(tuple(shape), sharding, once))


def read_float(
  shards: Shards, tensor: Tensor, kind: Any, index: tuple[slice, ...] | None = None
) -> np.ndarray:
  """Part of a stored tensor in our orientation and dtype, a few rows at a time."""
  index = (slice(None),) * len(tensor.shape) if index is None else index
  ranges = [s.indices(size) for s, size in zip(index, tensor.shape, strict=True)]
  ranges = ranges[::-1] if tensor.is_transposed else ranges
  (start, stop, _), *columns = ranges
  inner = tuple(slice(a, b) for a, b, _ in columns)
  out = np.empty([b - a for a, b, _ in ranges][:: -1 if tensor.is_transposed else 1], kind)
  rows = out.T if tensor.is_transposed else out
  step = max(1, CHUNK_VALUES // int(np.prod(tensor.stored_shape[1:])))
  for a in range(start, stop, step):
    b = min(a + step, stop)
    rows[a - start : b - start] = shards.rows(tensor.name, a, b)[(slice(None), *inner)]
  return out


def check_weights(folder: Path, config: QwenConfig) -> Shards:
  """The weights of a checkpoint, after a look at their headers alone.

  Raises:
    UserError: all tensors that are missing, unexpected or ill-shaped, or an unreadable file.
  """
  shards = Shards(folder)
  problems = _compare(checkpoint_layout(config), shards, config.tie_word_embeddings)
  if problems:
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    text = "; ".join(problems[:_SHOWN] + more)
    raise UserError(f"config.model.path: {folder} does not fit its config.json: {text}")
  return shards


def fingerprint(path: str | os.PathLike[str]) -> str:
  """Tells one base from another, whatever its sharding, float type or quantisation here."""
  return Shards(resolve_path(path)).fingerprint()


def _compare(layout: Mapping[Any, Tensor], shards: Shards, tied: bool) -> list[str]:
  """One sentence for each tensor that is missing, unexpected, ill-shaped or not of a float type."""
  wanted = {tensor.name: tensor.stored_shape for tensor in layout.values()}
  problems = [f"{name} is missing" for name in wanted if name not in shards.tensors]
  for name, stored in shards.tensors.items():
    if name in wanted:
      if stored.shape != wanted[name]:
        problems.append(f"{name} has shape {stored.shape}, expected {wanted[name]}")
      if stored.code not in FLOATS:
        problems.append(f"{name} has type {stored.code}, expected one of {', '.join(FLOATS)}")
    elif not (_IGNORED.search(name) or (tied and name == "lm_head.weight")):
      problems.append(f"{name} is unexpected")
  return problems


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
  """Writes a model that was made here as a checkpoint in Hugging Face's layout.

  Args:
    path: directory, made if absent.
    params: base parameters (no adapter, not quantised).
    config: their architecture.
    tokenizer_files: copied under their own names.
    dtype: stored dtype.
    stop_ids: end-of-turn ids for config.json and generation_config.json.
    pad_id: pad id for the same files.
    shard_bytes: largest weight file; more are indexed.
  """
  ids = {"eos_token_id": list(stop_ids) or None, "pad_token_id": pad_id}
  ids = {name: value for name, value in ids.items() if value is not None}
  configs = (config_json(config, dtype) | ids, ids or None)
  write_checkpoint(
    path, lambda where: get(params, where), config, configs, tokenizer_files, dtype, shard_bytes
  )


def write_checkpoint(
  path: str | os.PathLike[str],
  source: Callable[[Where], Any],
  config: QwenConfig,
  configs: tuple[Mapping[str, Any], Mapping[str, Any] | None],
  tokenizer_files: Iterable[str | os.PathLike[str]] = (),
  dtype: str = "float32",
  shard_bytes: int = SHARD_BYTES,
) -> int:
  """Writes a checkpoint, one weight file at a time; config.json last, so half of one has none.

  Args:
    path: directory, made if absent.
    source: path of a parameter -> its array, in our orientation.
    config: architecture.
    configs: contents of config.json and, or None, of generation_config.json.
    tokenizer_files: copied under their own names.
    dtype: stored dtype.
    shard_bytes: largest weight file; the host holds one at a time. More are indexed.

  Returns:
    Weight files written.
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
      array = np.asarray(source(where)).astype(DTYPES[dtype], copy=False)
      if array.shape != tensor.shape:
        raise ValueError(f"{'/'.join(where)}: expected shape {tensor.shape}, got {array.shape}")
      tensors[tensor.name] = np.ascontiguousarray(array.T if tensor.is_transposed else array)
      total += array.nbytes
    save_file(tensors, str(folder / name), metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)
  if len(shards) > 1:
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
  if configs[1] is not None:
    _write_json(folder / "generation_config.json", configs[1])
  _write_json(folder / "config.json", configs[0])
  return len(shards)


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


def _write_json(file: Path, data: Mapping[str, Any]) -> None:
  file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def base_hash(params: Mapping[str, Any]) -> str:
  """Hex digest of names, shapes, dtypes and bits of all parameters, whatever device or mesh."""
  digest = hashlib.sha256()
  for path, leaf in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda x: str(x[0])):
    name, shape = jax.tree_util.keystr(path), list(leaf.shape)
    is_turned = path[-1].key == "kernel_t"
    if is_turned:  # hashed as the matrix that it is
      name, shape = name.replace("kernel_t", "kernel"), shape[::-1]
    lanes = np.asarray(_mix_bits(leaf, is_turned)).tolist()
    digest.update(json.dumps([name, shape, str(leaf.dtype), lanes]).encode())
  return digest.hexdigest()[:32]


@functools.partial(jax.jit, static_argnums=1)
def _mix_bits(x: jax.Array, is_turned: bool) -> jax.Array:
  """Two 32-bit sums over all elements, each mixed with its index (MurmurHash3's finaliser)."""
  x = x.T if is_turned else x
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
