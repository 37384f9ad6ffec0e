"""Gets a public data set once: pinned address, checksum, cached file, clear words when offline."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import pathlib
import tempfile

from awf.types import UserError

MAX_BYTES = 100 << 20


@dataclasses.dataclass(frozen=True)
class Source:
  """A file at a fixed commit; `sha256` is that of the file as served."""

  url: str
  sha256: str


# The model of a run without network has to be here too.
OFFLINE = (
  " (and --config.model.path to a local model), or run --config=configs/quickstart.py, which needs "
  "no download"
)


def cache_dir() -> pathlib.Path:
  """$AWF_CACHE, or awf/ in the user's cache directory."""
  own = os.environ.get("AWF_CACHE")
  if own:
    return pathlib.Path(own) / "datasets"
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "awf" / "datasets"


def local_file(path: str, field: str = "config.task.path") -> pathlib.Path:
  """A local file, or a file of the Hugging Face hub by `hf://datasets/OWNER/NAME/FILE[@REVISION]`."""
  if path.startswith("hf://"):
    return _hub_file(path, field)
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise UserError(f"no such file: {path}; expected JSON or JSON lines in {field}")
  return file


def fetch(source: Source) -> pathlib.Path:
  """The cached copy of a source, downloaded when it is not there; gzip is unpacked.

  Raises:
    UserError: no network, or a file that is not the pinned one.
  """
  name = source.url.rsplit("/", 1)[-1]
  target = cache_dir() / f"{source.sha256[:16]}-{name.removesuffix('.gz')}"
  if target.is_file():
    return target
  raw = _get(source.url)
  digest = hashlib.sha256(raw).hexdigest()
  if digest != source.sha256:
    raise UserError(
      f"{source.url} has sha256 {digest}, expected {source.sha256}: the file was changed on its "
      "way; download it yourself and set config.task.path"
    )
  data = gzip.decompress(raw) if name.endswith(".gz") else raw
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
    part.write(data)
  os.replace(part.name, target)
  return target


def _get(url: str) -> bytes:
  import httpx

  try:
    with httpx.stream("GET", url, follow_redirects=True, timeout=30.0) as response:
      response.raise_for_status()
      chunks, size = [], 0
      for chunk in response.iter_raw():
        size += len(chunk)
        if size > MAX_BYTES:
          raise UserError(f"{url} is larger than {MAX_BYTES} bytes: set config.task.path to a file")
        chunks.append(chunk)
  except (httpx.HTTPError, OSError) as error:
    raise UserError(
      f"cannot download {url} ({type(error).__name__}): go online once, or set config.task.path to "
      f"the file on this machine{OFFLINE}"
    ) from error
  return b"".join(chunks)


def _hub_file(path: str, field: str) -> pathlib.Path:
  parts = path.removeprefix("hf://").split("/", 3)
  if len(parts) < 4 or parts[0] != "datasets":
    raise UserError(f"expected {field} like hf://datasets/OWNER/NAME/FILE[@REVISION], got {path}")
  import huggingface_hub
  from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

  file, _, revision = parts[3].partition("@")
  try:
    found = huggingface_hub.hf_hub_download(
      f"{parts[1]}/{parts[2]}", file, repo_type="dataset", revision=revision or None
    )
  except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
    raise UserError(
      f"cannot get {path} from the hub ({type(error).__name__}): check name and network, or "
      f"set {field} to a local JSON or JSON-lines file{OFFLINE}"
    ) from error
  return pathlib.Path(found)
