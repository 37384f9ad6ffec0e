"""colab.ipynb: its form, and a run of it from top to bottom in smoke sizes, without network."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import CACHE, ROOT

from configs.common import MODELS

NOTEBOOK = ROOT / "colab.ipynb"
MAX_LINES = 20
# In a process of its own: the kernel's libraries warn, and the tests' JAX stays out of it.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
  nbclient.NotebookClient(notebook, timeout=3000, startup_timeout=600).execute()
finally:
  nbformat.write(notebook, sys.argv[2])
"""


def cells(kind, path=NOTEBOOK):
  return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def test_the_notebook_is_clean_and_readable():
  import nbformat

  nbformat.validate(nbformat.read(NOTEBOOK, as_version=4))
  code = cells("code")
  assert len(code) > 10 and code[0]["metadata"]["tags"] == ["parameters"]
  for cell in code:
    assert not cell["outputs"] and cell["execution_count"] is None
    assert len(cell["source"]) <= MAX_LINES, "".join(cell["source"])
    assert "import jax" not in "".join(cell["source"]).split("LOOK")[0]  # it would hold the chip
  titles = [c["source"][0].strip("# \n") for c in cells("markdown")]
  parts = (
    "Install", "The chip", "Does it fit?", "The quickstart", "Drive", "AIME 2024", "The test split",
    "TensorBoard", "The report", "After a disconnect", "The adapter, for PEFT",
  )  # fmt: skip
  for part in parts:
    assert part in titles, part


def test_a_model_that_it_picks_fits_by_the_table_of_the_readme():
  """The memory from which it takes a model is at least the planned peak of the whole run."""
  (line,) = [x for c in cells("code") for x in c["source"] if x.startswith("MODELS = ")]
  picked = re.findall(r'\(([\d.]+), "([\w.-]+)"\)', line)
  assert len(picked) == 3 and picked == sorted(picked, key=lambda row: -float(row[0]))
  table = re.findall(r"^\| (Qwen\S+) \| \w+ \| ([\d.]+) ·", (ROOT / "README.md").read_text(), re.M)
  peaks = {f"Qwen/{name}": float(peak) for name, peak in table}
  for least, name in picked:
    assert peaks[MODELS[name]] < float(least)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """A clone's folder in which the notebook ran, and the text that its cells printed."""
  folder = tmp_path_factory.mktemp("notebook")
  for name in ("awf", "configs", "data", "launch.py", "requirements.txt"):
    (folder / name).symlink_to(ROOT / name)
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  env |= {"AWF_SMOKE": "1", "AWF_CACHE": str(CACHE), "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
  command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), "done.ipynb"]
  ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=3000)
  text = "".join(
    "".join(output.get("text", "")) + "\n".join(output.get("traceback", ()))
    for cell in cells("code", folder / "done.ipynb")
    for output in cell["outputs"]
  )
  assert ran.returncode == 0, f"{text[-3000:]}\n{ran.stderr[-1000:]}"
  return folder, text


def test_jax_is_pinned_before_anything_is_installed(done):
  pins = (done[0] / "constraints.txt").read_text().split()
  for name in ("jax", "jaxlib"):
    assert f"{name}=={importlib.metadata.version(name)}" in pins
  assert all(pin.startswith(("jax", "libtpu", "nvidia-")) for pin in pins)


def test_it_plans_runs_backs_up_resumes_reports_and_exports(done):
  folder, text = done
  assert "(cpu): configs/aime.py:smoke" in text and "GiB: fits" in text
  for name in ("quickstart", "aime"):
    assert (folder / "runs" / name / "metrics.csv").is_file() and f"runs/{name}/tb/events" in text
  (kept,) = (folder / "backups").glob("aime-*")
  assert any(kept.glob("*.tar"))
  lost, found = folder / "runs" / "aime_of_the_lost_machine", folder / "runs" / "aime"
  assert f"restored {found.relative_to(folder)} from checkpoint" in text
  assert (found / "metrics.jsonl").read_bytes() == (lost / "metrics.jsonl").read_bytes()
  adapter = json.loads((found / "peft" / "adapter_config.json").read_text())
  assert adapter["peft_type"] == "LORA" and (found / "peft/adapter_model.safetensors").is_file()
  shown = [o for c in cells("code", folder / "done.ipynb") for o in c["outputs"] if "data" in o]
  assert any("<iframe srcdoc=" in "".join(o["data"].get("text/html", "")) for o in shown)
