"""Every block and command of README.md and docs/ is run or resolved, or has a test that runs it."""

import re
import shlex
import subprocess

import pytest
import yaml
from conftest import ROOT
from file_tree import clause
from test_extend import snippets

from awf import __version__, cli
from awf.config import RULES
from awf.config_io import check_field, get_field, overlay
from awf.types import UserError
from configs.base import base_config

LAYOUT = "docs/layout.md"  # made of docstrings
PAGES = ("README.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))))
PAGES = tuple(page for page in PAGES if page != LAYOUT)
# What a mode does is shown by a test that calls its function.
RUN_BY = {
  "train": "test_train.py",
  "search": "test_extend.py",
  "eval": "../colab.ipynb",
  "sft": "test_cli.py",
  "generate": "test_generate.py",
  "serve": "test_serve.py",
  "export": "test_export.py",
  "plan": "test_plan.py",
  "report": "test_report.py",
  "bench": "test_cli.py",
}
# Files of other programs, by their first key: the test that lets such a program read it.
FOREIGN = {"models": ("test_serve.py", "config2.yaml")}
# Lines around commands that only another machine can run; the command inside them is resolved.
WRAPPERS = (
  r"srun --ntasks-per-node=8 --gpus-per-node=8 {}",
  r'gcloud compute tpus tpu-vm ssh NAME --worker=all --command="cd awf && {}"',
  r"for i in 0 1; do {} & done; wait",
)
PLACES = {"NAME": "qwen2.5-0.5b", "TARGET": "v5e-1", "DIR": "data/nano/model", "$i": "0"}
SYNOPSIS = "--config=configs/NAME.py[:ARGS]"


def blocks(page):
  """(language, text) of every block between three backticks."""
  text = (ROOT / page).read_text(encoding="utf-8")
  found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
  assert text.count("```") == 2 * len(found), f"{page}: a block that does not end"
  return found


def commands(page):
  """Every command line of a page: of its blocks, without comments, and of its inline code."""
  lines = []
  for language, text in blocks(page):
    if not language:
      whole = (re.sub(r"(^|\s{2,})#.*", "", line) for line in text.replace("\\\n", " ").split("\n"))
      lines += [" ".join(line.split()) for line in whole if line.strip()]
  prose = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.DOTALL | re.MULTILINE)
  spans = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose))
  starts = ("python launch.py ", "python tests/", "pip install ", "make ", "tensorboard ")
  return lines + [span for span in spans if span.startswith(starts)]


def fill(text):
  """A command with real values for the names that stand for the user's own."""
  for name, value in PLACES.items():
    text = re.sub(rf"(?<![\w/]){re.escape(name)}(?!\w)", value, text)
  return text


def resolve(command):
  """Puts a command through the real parser; returns its mode. Nothing is started.

  Raises:
    ValueError: it is no command that a reader could give.
  """
  for wrapper in WRAPPERS:
    inside = re.fullmatch(re.escape(wrapper).replace(r"\{\}", "(.*)"), command)
    command = inside.group(1) if inside else command
  words = shlex.split(command)
  while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables of the environment
    words.pop(0)
  if words[:2] == ["python", "launch.py"]:
    if SYNOPSIS in words:
      assert " ".join(words) in " ".join(cli.USAGE.split()), command
      return ""
    argv = [fill(word) for word in words[2:]]
    listing = cli.listing(argv)
    return "" if listing else cli.parse(argv).mode
  if words[0] == "python" and words[1].startswith("tests/"):
    assert (ROOT / words[1]).is_file(), command
    return ""
  if words[0] == "make":
    plain = ["make", "-n", *words[1:]]
    done = subprocess.run(plain, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return ""
  if words[:2] == ["pip", "install"]:
    (what,) = [word for word in words[2:] if word != "-r"]
    known = (
          "requirements.txt", "requirements-dev.txt", "jax[tpu]", "jax[cuda13]", "tensorboard",
        )  # fmt: skip
    assert what in known, command
    return ""
  if words[:2] == ["tensorboard", "--logdir"]:
    return ""  # tests/test_metrics.py reads the files that it would show
  raise ValueError(f"a command that no test knows: {command}")


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A working directory with what the pages' commands suppose to be there."""
  (tmp_path / "AFlow" / "workspace").mkdir(parents=True)
  (tmp_path / "AFlow" / "data" / "datasets").mkdir(parents=True)
  for name in ("configs", "data"):
    (tmp_path / name).symlink_to(ROOT / name)
  monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_is_one_that_works(page, folder):
  for command in commands(page):
    mode = resolve(command)
    if mode:
      source = (ROOT / "tests" / RUN_BY[mode]).read_text()
      assert f"run_{mode}" in source or f"--mode={mode}" in source, f"{RUN_BY[mode]}: {mode}"


@pytest.mark.parametrize("page", PAGES)
def test_every_field_that_a_page_sets_takes_that_value(page):
  text = (ROOT / page).read_text()
  for span in re.findall(r"`(--config\.(?!help)[\w.]+=[^`]+)`", text):
    config = base_config()
    cli._parse_flags([fill(word) for word in shlex.split(span)], config)
    for name in re.findall(r"--config\.([\w.]+)=", span):
      rule = RULES.get(name)
      assert rule is None or rule.holds(get_field(config, name)), f"{page}: {span}"
  assert page != "docs/models.md" or "--config.lora.paths=a=DIR,b=DIR" in text


def test_a_command_or_a_block_that_no_test_knows_is_noticed(folder):
  for wrong, error in (
    ("python launch.py --config=configs/quickstart.py --config.sede=1", UserError),
    ("python launch.py --config=configs/quickstart.py --mode=trian", UserError),
    ("python launch.py --config=configs/nothing.py", UserError),
    ("make everything", AssertionError),
    ("pip install awf", AssertionError),
    ("rm -rf runs", ValueError),
  ):
    with pytest.raises(error):
      resolve(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_another_language_is_known(page):
  known = {source for source, _ in snippets().values()}  # tests/test_extend.py runs them
  for language, text in blocks(page):
    if language == "python":
      assert text in known, f"{page}: a snippet that tests/test_extend.py does not run:\n{text}"
    elif language in ("yaml", "json"):
      values = yaml.safe_load(text)
      reader = FOREIGN.get(next(iter(values)))
      if reader:
        assert reader[1] in (ROOT / "tests" / reader[0]).read_text()
      else:
        overlay(base_config(), values, page)
    elif language == "text":  # the picture, or the tree
      paths = re.findall(r"^([\w./-]+(?:/|\.\w+)) {2,}\S", text, re.MULTILINE)
      assert "policy: base + LoRA" in text or len(paths) > 10
      assert not [path for path in paths if not (ROOT / path).exists()]
    else:
      assert not language, f"{page}: no test knows a block of {language}"


@pytest.mark.parametrize("page", PAGES)
def test_fields_modes_files_and_links_that_a_page_names_are_there(page):
  text, config = (ROOT / page).read_text(), base_config()
  for name in re.findall(r"--config\.([\w.]+)", text):
    if name not in ("help", "a.b", "NAME"):
      check_field(config, name.rstrip("."), f"{page}: --config.")
  assert set(re.findall(r"--mode=(\w+)", text)) - {"MODE"} <= set(cli.MODES)
  links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
  named = re.findall(r"`((?:awf|tests|configs|data|docs|\.ci)/[\w./]+)`", text)
  for path in named:
    assert (ROOT / path).exists(), f"{page} names {path}"
  for link in links:
    assert (ROOT / page).parent.joinpath(link).exists(), f"{page} links to {link}"
  assert page == "README.md" or f"({page})" in (ROOT / "README.md").read_text()


def test_every_mode_has_its_line_and_every_config_is_named():
  text = (ROOT / "README.md").read_text()
  for mode in cli.MODES:
    assert f"| `{mode}`" in text, mode
  for path in (ROOT / "configs").glob("*.py"):
    if path.stem not in ("__init__", "args", "base", "common"):
      assert re.search(rf"configs/(\w+|\{{[\w,]*\b{path.stem}\b[\w,]*\}})", text), path.stem


def test_a_newcomer_reads_the_readme_in_five_minutes():
  text = (ROOT / "README.md").read_text()
  for part in ("Start", "First results", "AIME on Colab", "Extend", "Beside others", "Limits"):
    assert f"\n## {part}\n" in text
  prose = re.sub(r"^```.*?^```$|^\|.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
  assert 500 < len(prose.split()) <= 1500
  section = text.split("\n### From AFlow\n")[1].split("\n### ")[0]
  ways = re.findall(r"^```\w*\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
  assert len(ways) == 3 and all(way.count("\n") <= 5 for way in ways)


def test_the_list_of_files_names_files_that_are_there():
  text, folder, paths = (ROOT / LAYOUT).read_text(), "", []
  for heading, name in re.findall(r"^## `([\w./]+)`$|^- `([\w.]+)`: \S", text, re.MULTILINE):
    folder = heading or folder
    paths += [folder + name] if name else []
  assert len(paths) > 150 and [path for path in paths if not (ROOT / path).exists()] == []
  assert clause("tests/file_tree.py") in text


def test_citation_and_changelog_have_their_form():
  cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert {"cff-version", "message", "title", "authors", "license"} <= cited.keys()
  assert cited["version"] == __version__ and cited["license"] == "Apache-2.0"
  heads = re.findall(r"^## \[(.+)\]$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  assert heads[0] == "Unreleased" and heads[1:] == sorted(heads[1:], reverse=True)
  assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", head) for head in heads[1:])
  parts = re.findall(r"^### (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  assert set(parts) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
