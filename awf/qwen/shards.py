"""Safetensors files of a checkpoint, read by rows: no file is mapped or held in memory as a whole.

Source: the safetensors format: 8 bytes of header length, a JSON header, then the data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from awf.types import UserError

FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16)}
FLOATS["BF16"] = np.dtype(ml_dtypes.bfloat16)
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2}
_BYTES |= {"U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_MAX_HEADER = 100 << 20
_SAMPLE = 64  # values at the start and in the middle of a tensor that a fingerprint reads


@dataclasses.dataclass(frozen=True)
class Stored:
  """One tensor as a file describes it."""

  file: Path
  code: str  # the format's name of the type
  shape: tuple[int, ...]
  offset: int  # of its first byte in the file


class Shards:
  """All tensors of a directory by name; only headers are read at first.

  Args:
    folder: the directory.
    files: safetensors files in it; None finds a model's.
    field: config field that messages name.

  Attributes:
    tensors: name -> Stored, in the order of files and offsets.
    metadata: free text fields of the files' headers.

  Raises:
    UserError: no weights, or a file that is missing, cut short or no safetensors file.
  """

  def __init__(
    self, folder: Path, files: Sequence[Path] | None = None, field: str = "config.model.path"
  ) -> None:
    self.folder, self._field = folder, field
    self.tensors: dict[str, Stored] = {}
    self.metadata: dict[str, Any] = {}
    for file in _files(folder) if files is None else files:
      tensors, metadata = _header(file, field)
      self.tensors |= tensors
      self.metadata |= metadata

  def rows(self, name: str, start: int, stop: int) -> np.ndarray:
    """Rows start ... stop - 1 of a tensor, in its stored type."""
    stored = self.tensors[name]
    width, kind = math.prod(stored.shape[1:]), FLOATS[stored.code]
    offset = stored.offset + start * width * kind.itemsize
    try:
      values = np.fromfile(stored.file, kind, (stop - start) * width, offset=offset)
      return values.reshape(stop - start, *stored.shape[1:])
    except (OSError, ValueError) as error:
      raise UserError(f"{self._field}: {stored.file} cannot be read: {error}") from error

  def fingerprint(self) -> str:
    """Hex digest of names, shapes and a sample of each tensor's values.

    It is the same for every sharding and for every wider float type, so it tells one base from
    another whatever form it is kept in. The head of a tied model and constants do not count.
    """
    digest = hashlib.sha256()
    for name, stored in sorted(self.tensors.items()):
      if name == "lm_head.weight" or stored.code not in FLOATS or not math.prod(stored.shape):
        continue
      width, kind = math.prod(stored.shape), FLOATS[stored.code]
      digest.update(json.dumps([name, stored.shape]).encode())
      for start in (0, width // 2):
        offset = stored.offset + start * kind.itemsize
        count = min(_SAMPLE, width - start)
        digest.update(np.fromfile(stored.file, kind, count, offset=offset).astype("<f4").tobytes())
    return digest.hexdigest()[:32]


def read_json(file: Path) -> dict[str, Any]:
  """A JSON object of a checkpoint.

  Raises:
    UserError: it is missing or not one.
  """
  try:
    data = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError as error:
    raise UserError(f"config.model.path: {file.name} is missing in {file.parent}") from error
  except (OSError, ValueError) as error:
    raise UserError(f"config.model.path: {file} is not valid JSON: {error}") from error
  if not isinstance(data, dict):
    raise UserError(f"config.model.path: {file} must hold a JSON object")
  return data


def _files(folder: Path) -> list[Path]:
  """The weight files, each there."""
  single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
  if single.is_file():
    return [single]
  if not index.is_file():
    raise UserError(
      f"config.model.path: expected model.safetensors or model.safetensors.index.json in {folder}"
      + _partial(folder, "model.safetensors")
    )
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise UserError(f"config.model.path: {index} has no weight_map; download it again")
  files = [folder / str(name) for name in sorted(set(weight_map.values()))]
  missing = [file.name for file in files if not file.is_file()]
  if missing:
    raise UserError(
      f"config.model.path: {index.name} names {len(files)} files, of which {len(missing)} cannot "
      f"be read: {', '.join(missing[:4])}{' ...' * (len(missing) > 4)} not in {folder}"
      f"{_partial(folder, missing[0])}; finish the download, or copy them there"
    )
  return files


def _partial(folder: Path, name: str) -> str:
  """Words on the remains of an interrupted download, if any."""
  for place in (folder, folder / ".cache/huggingface/download", folder.parent.parent / "blobs"):
    for file in (place / f"{name}.incomplete", *sorted(place.glob("*.incomplete"))):
      if file.is_file():
        return f" ({file.name} is half of a download)"
  return ""


def _pair(offsets: Any) -> tuple[int, int]:
  start, stop = offsets
  return int(start), int(stop)


def _header(file: Path, field: str) -> tuple[dict[str, Stored], dict[str, Any]]:
  """The tensors of one file, in the order of their bytes, and its metadata; its size is checked."""

  def broken(reason: str) -> UserError:
    return UserError(f"{field}: {file} cannot be read: {reason}; download or copy it again")

  try:
    size = file.stat().st_size
    with file.open("rb") as opened:
      length = int.from_bytes(opened.read(8), "little")
      text = opened.read(length) if 2 <= length <= min(_MAX_HEADER, size - 8) else b""
  except OSError as error:
    raise broken(error.strerror or str(error)) from error
  if not text:
    raise broken(f"no safetensors header in its {size} bytes")
  try:
    header = json.loads(text)
    metadata = header.pop("__metadata__", None) or {}
    tensors: dict[str, tuple[str, tuple[int, ...], int, int]] = {
      name: (entry["dtype"], tuple(map(int, entry["shape"])), *_pair(entry["data_offsets"]))
      for name, entry in header.items()
    }
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise broken(f"its header is no safetensors header ({error})") from error
  data = 8 + length
  end = data + max((entry[3] for entry in tensors.values()), default=0)
  if end > size:
    raise broken(f"it has {size} bytes, its header says {end}: cut short")
  for name, (code, shape, start, stop) in tensors.items():
    if code in _BYTES and stop - start != math.prod(shape) * _BYTES[code]:
      raise broken(
        f"{name} has {stop - start} bytes, its shape {shape} and type {code} need others"
      )
  ordered = sorted(tensors.items(), key=lambda item: item[1][2])
  stored = {
    name: Stored(file, code, shape, data + start) for name, (code, shape, start, _) in ordered
  }
  return stored, dict(metadata)
