"""Imports point down only, heavy packages stay in place, and the modules of the child are light."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

# Lower may not import higher; parts of one level do not know each other, except at the top.
LEVELS = {
  **dict.fromkeys(("types",), 0),
  **dict.fromkeys(
    (
      "sharding",
      "chips",
      "config_io",
      "runtime_setup",
      "faults",
      "files",
      "interrupt",
      "python_text",
      "remat",
      "terminal",
      "hub",
      "hosts",
      "membership",
    ),
    1,
  ),
  **dict.fromkeys(("config", "workdir", "grpo_config", "snapshot"), 2),
  "qwen": 3,
  **dict.fromkeys(("sampler", "sandbox"), 4),
  **dict.fromkeys(("workflow", "tasks"), 5),
  **dict.fromkeys(("search", "grpo", "policy", "checkpoint", "metrics", "backup"), 6),
  "top": 7,  # train, evaluate, sft, bench, report, modes and whatever else launch.py starts
  "launch": 8,
}
ALLOWED_ONLY_IN = {
  "flax": ("awf/qwen/", "awf/grpo/critic.py"),
  "orbax": ("awf/checkpoint.py",),
  "tensorboardX": ("awf/metrics.py",),
  "torch": ("tests/parity/",),
}
CHILD = (
  "awf.types",
  "awf.python_text",
  "awf.sandbox",
  "awf.workflow.runtime",
  "awf.workflow.operators",
  "awf.workflow.contract",
  "awf.workflow.prompts",
  "awf.workflow.static",
  "awf.workflow.extract",
)


def sources():
  return sorted(p for folder in ("awf", "configs") for p in (ROOT / folder).rglob("*.py"))


def imported(path):
  """(line, dotted module) of every import in a file, at any depth."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      yield from ((node.lineno, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}:{node.lineno}: relative import"
      yield node.lineno, node.module
      yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def level(module):
  """(part, level) of awf.<part>...; parts without an entry sit at the top."""
  part = module.split(".")[1]
  return part, LEVELS.get(part, LEVELS["top"])


def violations(pairs):
  """Imports `(importer, imported, where)` that point up or sideways."""
  found = []
  for importer, target, where in pairs:
    (part, own), (other, its) = level(importer), level(target)
    sideways = its == own and other != part and 2 < own < LEVELS["top"]
    if its > own or sideways:
      found.append(f"{where}: {importer} imports {target}")
  return found


def module_name(path):
  return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_point_down_only():
  pairs = []
  for path in sources():
    name = module_name(path)
    for line, target in imported(path):
      if target.count(".") and target.startswith("awf.") and name.count("."):
        if name.startswith("awf.") and (target_path(target)):
          pairs.append((name, target, f"{path.relative_to(ROOT)}:{line}"))
  assert len(pairs) > 30
  assert violations(pairs) == []


def target_path(target):
  """Whether awf.<part> is a module or package (and not a name inside awf/__init__.py)."""
  base = ROOT / "awf" / target.split(".")[1]
  return base.is_dir() or base.with_suffix(".py").is_file()


def test_the_check_finds_upward_and_sideways_imports():
  assert violations([("awf.qwen.model", "awf.search.tree", "x:1")])
  assert violations([("awf.sampler.engine", "awf.sandbox", "x:1")])
  assert violations([("awf.policy", "awf.train", "x:1")])
  assert not violations([("awf.train", "awf.bench", "x:1"), ("awf.search.tree", "awf.types", "x")])


@pytest.mark.parametrize("package", sorted(ALLOWED_ONLY_IN))
def test_heavy_packages_stay_in_their_places(package):
  found = []
  for path in sources():
    where = str(path.relative_to(ROOT))
    if where.startswith(ALLOWED_ONLY_IN[package]):
      continue
    found += [f"{where}:{line}" for line, m in imported(path) if m.split(".")[0] == package]
  assert found == []


def test_configs_do_not_import_jax():
  for path in (ROOT / "configs").glob("*.py"):
    assert not [m for _, m in imported(path) if m.split(".")[0] in ("jax", "flax", "numpy")], path


def test_modules_of_the_child_and_of_the_command_line_need_no_jax():
  code = """
import builtins, importlib, sys
class Blocker:
  def find_spec(self, name, path=None, target=None):
    if name.split('.')[0] in ('jax', 'jaxlib', 'flax', 'numpy'):
      raise AssertionError(f'{name} was imported')
sys.meta_path.insert(0, Blocker())
for name in sys.argv[1:]:
  importlib.import_module(name)
"""
  for names in (CHILD, ("launch", "awf.bench", "awf.config", "awf.generate")):
    done = subprocess.run(
      [sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
