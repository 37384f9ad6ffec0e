"""Gets a public data set once: pinned address, checksum, cached file, clear words when offline.

Every file that came from elsewhere has its checksum in the cache, written at its first use and
verified at each later one; where a `Source` pins one, the first use is verified too.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import pathlib
import tempfile

from awf.terminal import track
from awf.types import UserError

MAX_BYTES = 100 << 20


@dataclasses.dataclass(frozen=True)
class Source:
  """A public file by its address, `https://...` or `hf://datasets/...`.

  `sha256` is that of the file as served; "" where only its first use can tell.
  """

  url: str
  sha256: str = ""


# The model of a run without network has to be here too.
OFFLINE = (
  " (and --config.model.path to a local model), or run --config=configs/quickstart.py, which needs "
  "no download"
)


def cache_dir() -> pathlib.Path:
  """$AWF_CACHE, or awf/ in the user's cache directory.

  Switched off it keeps no programs (`awf.runtime_setup`); a file that was downloaded is kept.
  """
  own = os.environ.get("AWF_CACHE", "")
  if own and own.lower() not in ("off", "none", "0"):
    return pathlib.Path(own).expanduser() / "datasets"
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "awf" / "datasets"


def local_file(path: str, field: str = "config.task.path") -> pathlib.Path:
  """A local file, or a file of the Hugging Face hub by `hf://datasets/OWNER/NAME/FILE[@REVISION]`."""
  if path.startswith("hf://"):
    return _verified(_hub_file(path, field), path)
  file = pathlib.Path(path).expanduser()
  if not file.is_file():
    raise UserError(f"no such file: {path}; expected JSON or JSON lines in {field}")
  return file


def fetch(source: Source) -> pathlib.Path:
  """The cached copy of a source, downloaded when it is not there; gzip is unpacked.

  Raises:
    UserError: no network, a file that is not the pinned one, or one that changed since.
  """
  if source.url.startswith("hf://"):
    return local_file(source.url)
  name = source.url.rsplit("/", 1)[-1]
  pinned = source.sha256 or hashlib.sha256(source.url.encode()).hexdigest()
  target = cache_dir() / f"{pinned[:16]}-{name.removesuffix('.gz')}"
  if target.is_file():
    return _verified(target, source.url)
  raw = _get(source.url)
  digest = hashlib.sha256(raw).hexdigest()
  if source.sha256 and digest != source.sha256:
    raise UserError(
      f"{source.url} has sha256 {digest}, expected {source.sha256}: the file was changed on its "
      "way; download it yourself and set config.task.path"
    )
  _write(target, gzip.decompress(raw) if name.endswith(".gz") else raw)
  return _verified(target, source.url)


def _verified(file: pathlib.Path, address: str) -> pathlib.Path:
  """The file, if it is still what it was at its first use; records that now when there was none.

  Raises:
    UserError: another content.
  """
  with open(file, "rb") as f:
    digest = hashlib.file_digest(f, "sha256").hexdigest()
  record = cache_dir() / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}.sha256"
  if not record.is_file():
    _write(record, f"{digest}  {address}\n".encode())
    return file
  expected = record.read_text(encoding="utf-8").partition(" ")[0]
  if digest != expected:
    raise UserError(
      f"{file}, from {address}, has sha256 {digest}, but {expected} when it was first used: it was "
      f"damaged, or its home has a new version; remove {record} to accept it, remove the file to "
      "get it again, or set config.task.path"
    )
  return file


def _write(target: pathlib.Path, data: bytes) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
    part.write(data)
  os.replace(part.name, target)


def _get(url: str) -> bytes:
  import httpx

  try:
    with (
      httpx.stream("GET", url, follow_redirects=True, timeout=30.0) as response,
      track(f"download {url.rsplit('/', 1)[-1]}", unit="B") as shown,
    ):
      response.raise_for_status()
      shown.total = float(response.headers.get("Content-Length", 0)) or None
      chunks = []
      for chunk in response.iter_raw():
        shown.advance(len(chunk))
        if shown.done > MAX_BYTES:
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
