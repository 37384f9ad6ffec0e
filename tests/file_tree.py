"""Writes docs/layout.md: every source file in the first sentence of its docstring (`make tree`)."""

import ast
import re
import subprocess
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("awf", "configs", "data", "tests")
HEAD = """# Every file in one clause

Made by `make tree` from the first sentence of each file's docstring.
"""


def clause(path):
  """The first sentence of a module's docstring, without its stop; "" without a docstring."""
  text = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8"))) or ""
  first = re.split(r"(?<=[a-z`)\]}0-9])\.(?:\s|$)|\n\n", text, maxsplit=1)[0]
  return " ".join(first.split()).rstrip(".")


def tree():
  """The page: one list per folder."""
  command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
  listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  paths = [p for p in sorted(set(listed.split())) if p.endswith(".py") and (ROOT / p).is_file()]
  paths = [p for p in paths if p == "launch.py" or p.startswith(tuple(f"{f}/" for f in FOLDERS))]
  parts = [HEAD]
  for folder, files in groupby(sorted(paths, key=lambda p: (str(Path(p).parent), p)), parent):
    lines = [f"- `{Path(p).name}`: {clause(p)}" for p in files if clause(p)]
    if lines:
      parts.append(f"## {folder}\n\n" + "\n".join(lines) + "\n")
  return "\n".join(parts)


def parent(path):
  """The folder's heading; `./` is the top."""
  return f"`{Path(path).parent.as_posix()}/`"


if __name__ == "__main__":
  (ROOT / "docs" / "layout.md").write_text(tree(), encoding="utf-8")
