"""Loading for real: memory, slices, YaRN, the hub, damaged files."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from tiny_checkpoint import make_checkpoint, random_params

from awf.qwen import hf
from awf.qwen.config import QwenConfig, Yarn
from awf.qwen.layout import checkpoint_layout
from awf.qwen.model import rope
from awf.qwen.quant import QuantConfig
from awf.qwen.shards import Shards
from awf.sharding import make_mesh
from awf.types import UserError

SIZES = dict(
  vocab_size=48,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=4,
)


# ---------------------------------------------------------------------------- memory and slices


def write_zeros(folder, config, shard_bytes):
  """A sharded bfloat16 checkpoint of constants, made without holding it."""
  leaf = np.zeros(1, "bfloat16")
  shapes = {where: t.shape for where, t in checkpoint_layout(config).items()}
  configs = ({"model_type": "qwen2", **SIZES}, None)
  return hf.write_checkpoint(
    folder, lambda w: np.broadcast_to(leaf, shapes[w]), config, configs, (), "bfloat16", shard_bytes
  )


CHILD = r"""
import re, sys
import jax
from awf.qwen import hf
from awf.qwen.config import QwenConfig
from awf.qwen.quant import QuantConfig, num_bytes
def peak_bytes():  # since this program began; ru_maxrss counts its parent's too
  with open("/proc/self/status") as f:
    return int(re.search(r"VmHWM:\s+(\d+) kB", f.read())[1]) * 1024
jax.block_until_ready(jax.device_put(jax.numpy.zeros(8)))
config = QwenConfig(**eval(sys.argv[2]))
before = peak_bytes()
params = hf.load_params(sys.argv[1], config, "bfloat16", quant=QuantConfig(sys.argv[3]))
print(peak_bytes() - before, num_bytes(params))
"""


@pytest.mark.parametrize("quant", ["none", "int8"])
def test_the_host_never_holds_much_beside_the_result(quant, tmp_path):
  """On a CPU the result itself lies in host memory; what comes on top is what loading needs."""
  sizes = {**SIZES, "vocab_size": 40_000, "hidden_size": 512, "intermediate_size": 2048}
  sizes |= {"num_hidden_layers": 24, "head_dim": 128}
  config = QwenConfig(**sizes)
  count = write_zeros(tmp_path, config, 60 << 20)
  files = [f.stat().st_size for f in tmp_path.glob("*.safetensors")]
  assert count == len(files) > 3 and sum(files) > 250e6
  # glibc keeps some freed blocks for reuse, which ones changes by the run; given back at once, only
  # what is held counts. Then 43 and 45 MB come on top, of which 41 are one tensor and its copy.
  keeps = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
  run = subprocess.run(
    [sys.executable, "-c", CHILD, str(tmp_path), repr(sizes), quant],
    env={**os.environ, **keeps, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  grown, held = map(int, run.stdout.split())
  print(
    f"peak {grown / 1e6:.0f} MB for {held / 1e6:.0f} MB of weights, shard {max(files) / 1e6:.0f}"
  )
  assert grown - held < max(files)


@pytest.mark.parametrize("layout", ["none", "int8", "int4"])
def test_each_device_gets_its_slice(layout, tmp_path):
  config = QwenConfig(**SIZES)
  params = random_params(config)
  hf.save_checkpoint(tmp_path, params, config, shard_bytes=2000)
  quant = QuantConfig(layout, group=4)
  mesh = make_mesh(data=1, fsdp=2, tensor=4)
  split = hf.load_params(tmp_path, config, mesh=mesh, quant=quant)
  whole = hf.load_params(tmp_path, config, quant=quant)
  jax.tree.map(np.testing.assert_array_equal, split, whole)
  name = "kernel" if layout == "none" else "kernel_q"
  kernel = split["layers_1"]["down_proj"][name]
  assert {s.data.shape for s in kernel.addressable_shards} == {(6, 8)}
  assert len(split["norm"]["scale"].addressable_shards) == 8


def test_sizes_that_an_axis_does_not_divide_stay_whole(tmp_path):
  config = QwenConfig(**{**SIZES, "vocab_size": 47, "num_key_value_heads": 1})
  params = random_params(config)
  hf.save_checkpoint(tmp_path, params, config)
  loaded = hf.load_params(tmp_path, config, mesh=make_mesh(data=1, fsdp=1, tensor=8))
  jax.tree.map(np.testing.assert_array_equal, loaded, params)
  assert loaded["lm_head"]["kernel"].sharding.shard_shape((16, 47)) == (16, 47)
  assert loaded["layers_0"]["up_proj"]["kernel"].sharding.shard_shape((16, 24)) == (16, 3)


# ---------------------------------------------------------------------------- YaRN, defaults


def write_config(folder, **fields):
  raw = {"model_type": "qwen2", "max_position_embeddings": 64, **SIZES, **fields}
  (folder / "config.json").write_text(json.dumps(raw))
  return hf.load_config(folder)


@pytest.mark.parametrize(
  "fields",
  [
    {"rope_theta": 5e5, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_slow": None}},
    {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "beta_fast": 32}},
    {
      "rope_theta": 5e5,
      "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 64},
      "max_position_embeddings": 256,
    },
  ],
)
def test_yarn_in_both_spellings(fields, tmp_path):
  config = write_config(tmp_path, **fields)
  assert config.rope_theta == 5e5
  assert config.yarn == Yarn(4.0, 64) and abs(config.yarn.attention_factor - 1.1386294) < 1e-6


def test_yarn_attention_factor_and_its_substitutes(tmp_path):
  def scale(**fields):
    rope = {"rope_type": "yarn", "factor": 40.0, **fields}
    return write_config(tmp_path, rope_scaling=rope).yarn.attention_factor

  assert scale(attention_factor=1.5) == 1.5
  assert abs(scale(mscale=0.707, mscale_all_dim=1.0) - 1.26080 / 1.36889) < 1e-4
  assert abs(scale(mscale=0.707) - 1.36889) < 1e-4


def test_yarn_slows_low_frequencies_alone_and_is_saved(tmp_path):
  yarn = Yarn(8.0, 4096, attention_factor=1.0)
  freq = yarn.frequencies(128, 1e6)
  plain = 1e6 ** (-np.arange(64) / 64)
  np.testing.assert_allclose(freq[:13], plain[:13], rtol=1e-6)
  np.testing.assert_allclose(freq[-15:], plain[-15:] / 8, rtol=1e-6)
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 1, 128)), jnp.float32)
  at = jnp.array([[0, 9000]])
  stretched, usual = rope(x, at, 1e6, yarn), rope(x, at, 1e6)
  np.testing.assert_allclose(stretched[:, 0], usual[:, 0])
  assert float(jnp.abs(stretched - usual).max()) > 0.1
  config = QwenConfig(**SIZES, yarn=Yarn(4.0, 64, beta_fast=16, truncate=False))
  hf.save_checkpoint(tmp_path, random_params(config), config)
  assert hf.load_config(tmp_path) == config


def test_sampling_defaults_of_a_checkpoint(tmp_path):
  write_config(tmp_path)
  assert hf.generation_defaults(tmp_path) == {}
  file = tmp_path / "generation_config.json"
  file.write_text(json.dumps({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20}))
  assert hf.generation_defaults(tmp_path) == {"temperature": 0.7, "top_p": 0.8, "top_k": 20}
  file.write_text(json.dumps({"temperature": 0.5, "min_p": 0.1}))
  assert hf.generation_defaults(tmp_path) == {"temperature": 0.5, "min_p": 0.1}
  file.write_text(json.dumps({"do_sample": False, "top_p": 0.8, "eos_token_id": [1]}))
  assert hf.generation_defaults(tmp_path) == {"temperature": 0.0, "top_p": 0.8}
  file.write_text(json.dumps({"temperature": "hot"}))
  with pytest.raises(UserError, match="temperature must be a number"):
    hf.generation_defaults(tmp_path)


# ---------------------------------------------------------------------------- damaged files


@pytest.fixture
def sharded(tmp_path):
  config = QwenConfig(**SIZES)
  hf.save_checkpoint(tmp_path, random_params(config), config, shard_bytes=4000)
  files = sorted(tmp_path.glob("*.safetensors"))
  assert len(files) > 2
  return tmp_path, config, files


def one_line(config, folder):
  with pytest.raises(UserError) as error:
    hf.load_params(folder, config)
  text = str(error.value)
  assert "\n" not in text and text.startswith("config.model.path: ")
  assert text.count("config.model.path") == 1
  return text


def test_half_downloaded_shard(sharded):
  folder, config, files = sharded
  files[1].rename(files[1].with_name(files[1].name + ".incomplete"))
  text = one_line(config, folder)
  assert files[1].name in text and ".incomplete is half of a download" in text


@pytest.mark.parametrize("keep", [0, 5, 60, 0.5, -1])
def test_truncated_shard(sharded, keep):
  folder, config, files = sharded
  data = files[2].read_bytes()
  size = int(len(data) * keep) if isinstance(keep, float) else keep
  files[2].write_bytes(data[:size])
  assert "cannot be read" in one_line(config, folder)


def test_files_that_are_not_safetensors(sharded):
  folder, config, files = sharded
  files[0].write_bytes(b"<html>404</html>" * 100)
  assert "no safetensors header" in one_line(config, folder)
  files[0].write_bytes((20).to_bytes(8, "little") + b'{"a": [1, 2, 3, 4]} ' + bytes(100))
  assert "no safetensors header" in one_line(config, folder)
  (folder / "model.safetensors.index.json").write_text("{}")
  assert "no weight_map" in one_line(config, folder)


def test_config_that_contradicts_the_tensors(sharded):
  folder, _, _ = sharded
  raw = json.loads((folder / "config.json").read_text())
  wrong = {**raw, "num_hidden_layers": 3, "hidden_size": 20, "head_dim": 4}
  (folder / "config.json").write_text(json.dumps(wrong))
  text = one_line(hf.load_config(folder), folder)
  assert "does not fit its config.json" in text
  assert "model.layers.2.self_attn.q_proj.weight is missing" in text
  assert "model.embed_tokens.weight has shape (48, 16), expected (48, 20)" in text
  assert "and " in text.rsplit("; ", 1)[1]


def test_weights_that_are_not_finite_are_not_quantised(tmp_path):
  config = QwenConfig(**SIZES)
  params = random_params(config)
  params["norm"]["scale"] = params["norm"]["scale"]
  kernel = params["layers_0"]["up_proj"]["kernel"]
  params["layers_0"]["up_proj"]["kernel"] = kernel.at[1, 1].set(jnp.nan)
  hf.save_checkpoint(tmp_path, params, config)
  with pytest.raises(UserError, match="not finite"):
    hf.load_params(tmp_path, config, quant=QuantConfig("int8"))


def test_a_fingerprint_names_the_base_not_its_form(sharded, tmp_path):
  folder, config, _ = sharded
  params = hf.load_params(folder, config)
  own = Shards(folder).fingerprint()
  rounded = jax.tree.map(lambda x: x.astype("bfloat16"), params)
  for name, dtype in (("a", "bfloat16"), ("b", "float32")):
    hf.save_checkpoint(tmp_path / name, rounded, config, dtype=dtype)
  assert hf.fingerprint(tmp_path / "a") == hf.fingerprint(tmp_path / "b") != own
  hf.save_checkpoint(tmp_path / "c", params, config)
  assert hf.fingerprint(tmp_path / "c") == own


# ---------------------------------------------------------------------------- the hub


def digest(data):
  return hashlib.sha1(data).hexdigest()


class Hub(http.server.ThreadingHTTPServer):
  """One repository over HTTP, as huggingface_hub asks for it; the first weight file breaks off."""

  def __init__(self, folder):
    super().__init__(("127.0.0.1", 0), Handler)
    self.files = {f.name: f.read_bytes() for f in folder.iterdir() if f.is_file()}
    self.files["pytorch_model.bin"] = b"x" * 100
    self.files["onnx/config.json"] = b"{}"
    self.ranges, self.asked, self.breaks, self.refused = [], set(), 1, ""
    self.others = threading.Event()  # three files were asked for beside the refused one


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  commit = "a" * 40

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path, hub = self.path.split("?")[0], self.server
    if path.startswith("/api/models/"):
      siblings = [{"rfilename": name, "size": len(data)} for name, data in hub.files.items()]
      if "/tree/" in path:
        body = [
          {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
          for name, data in hub.files.items()
        ]
      else:
        body = {"id": "tiny/qwen", "sha": self.commit, "siblings": siblings}
      return self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})
    name = path.split(f"/resolve/{self.commit}/")[-1].split("/resolve/main/")[-1]
    data = hub.files.get(name)
    if data is None:
      return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
    if name == hub.refused:
      hub.others.wait(20)
      return self.reply(403, b"", {})
    headers = {"ETag": f'"{digest(data)}"', "X-Repo-Commit": self.commit}
    headers["Accept-Ranges"] = "bytes"
    if self.command == "GET":
      hub.asked.add(name)
      if len(hub.asked) >= 3:
        hub.others.set()
    asked = self.headers.get("Range")
    if asked and asked.startswith("bytes=") and self.command == "GET":
      start = int(asked.removeprefix("bytes=").split("-")[0])
      hub.ranges.append((name, start))
      headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
      return self.reply(206, data[start:], headers)
    cut = self.command == "GET" and name.endswith(".safetensors") and hub.breaks
    if cut:
      hub.breaks -= 1
    return self.reply(200, data, headers, len(data) // 2 if cut else None)

  def reply(self, code, body, headers, cut=None):
    self.send_response(code)
    for key, value in {**headers, "Content-Length": str(len(body))}.items():
      self.send_header(key, value)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(body if cut is None else body[:cut])
    if cut is not None:
      self.close_connection = True


FETCH = """
import contextlib, sys
from awf import terminal
from awf.qwen import hf, hub
from awf.types import UserError

@contextlib.contextmanager
def told(*args, **kwargs):
  with terminal.track(*args, **kwargs) as stage:
    yield stage
    print("progress", stage.done, stage.total, file=sys.stderr)

hub.track = told
try:
  folder = hf.resolve_path("tiny/qwen")
  config = hf.load_config(folder)
  hf.load_params(folder, config)
  print(folder, *sorted(f.name for f in folder.iterdir()))
except UserError as error:
  print("error:", error)
"""


def fetch(endpoint, home, **env):
  env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "XLA_FLAGS": "", **env}
  env = {k: v for k, v in env.items() if k not in ("HF_HUB_CACHE", "https_proxy", "http_proxy")}
  run = subprocess.run(
    [sys.executable, "-c", FETCH],
    env={**env, "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"},
    capture_output=True,
    text=True,
  )
  assert run.returncode == 0, run.stderr
  return run


def test_download_takes_what_is_needed_and_goes_on_where_it_broke_off(tmp_path):
  folder = make_checkpoint(tmp_path / "tiny", vocab_size=200_000)  # parts of 10 MB are kept
  hub = Hub(folder)
  thread = threading.Thread(target=hub.serve_forever)
  thread.start()
  endpoint, home = f"http://127.0.0.1:{hub.server_port}", tmp_path / "home"
  try:
    hub.refused = "model.safetensors"
    failed = fetch(endpoint, home, HF_HUB_OFFLINE="0")
    asked, hub.asked, hub.refused = hub.asked, set(), ""
    run = fetch(endpoint, home, HF_HUB_OFFLINE="0")
  finally:
    hub.shutdown()
    thread.join()
    hub.server_close()
  assert failed.stdout.startswith("error: config.model.path: 'tiny/qwen'")
  assert failed.stdout.count("\n") == 1
  names = run.stdout.split()[1:]
  assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(names)
  assert not {"pytorch_model.bin", "onnx/config.json"} & (asked | hub.asked)
  assert "config.json" in asked and hub.asked == {"model.safetensors"}  # the rest was there
  assert ("model.safetensors", 10 << 20) in hub.ranges  # after the connection broke off
  done, total = (float(x) for x in re.search(r"progress (\S+) (\S+)", run.stderr).groups())
  assert done == total > 25e6  # bytes, what was there before included
  again = fetch(endpoint, home, HF_HUB_OFFLINE="1")
  assert again.stdout.split()[1:] == names


def test_no_hub_is_one_line(tmp_path):
  run = fetch("http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="0")
  assert run.stdout.startswith("error: config.model.path: 'tiny/qwen' is no local directory")
  assert run.stdout.count("\n") == 1 and "--config.model.path=DIR" in run.stdout
