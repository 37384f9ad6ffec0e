"""DatasetEvaluator: how a data set is read, split and graded. A new data set is one subclass."""

from __future__ import annotations

import abc
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from awf.tasks import download
from awf.types import Grade, Problem, UserError, stable_hash

if TYPE_CHECKING:
  from awf.sandbox import Sandbox

SPLITS = ("validation", "test")
_SPLIT_NAMES = {
  **dict.fromkeys(("train", "dev", "val", "validation"), "validation"),
  "test": "test",
}
MAX_FILE_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class TaskConfig:
  """The fields of `config.task`, validated; paths "" mean the data set's public home."""

  name: str
  path: str = ""
  test_path: str = ""
  limit: int = 0
  split_seed: int = 42
  validation_share: float = 0.8

  def __post_init__(self) -> None:
    if isinstance(self.limit, bool) or self.limit < 0:
      raise UserError(f"expected config.task.limit >= 0 (0 = all), got {self.limit}")
    if not 0.0 < self.validation_share < 1.0:
      raise UserError(
        "expected config.task.validation_share between 0 and 1 (both excluded), got "
        f"{self.validation_share}"
      )
    if self.test_path and not self.path:
      raise UserError("config.task.test_path is set without config.task.path: set both")

  @classmethod
  def make(cls, fields: Mapping[str, Any]) -> TaskConfig:
    """From a ConfigDict or mapping; fields that do not belong to a task are refused."""
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields.keys()) - known)
    if unknown:
      raise UserError(f"unknown config.task fields {unknown}: expected some of {sorted(known)}")
    return cls(**{name: fields[name] for name in fields.keys()})


class DatasetEvaluator(abc.ABC):
  """Base of all data sets: `to_problem` reads one row, `grade` judges one response.

  Everything else (files, download, split, limit, checks) is shared. Expected answers and hidden
  tests stay in `Problem.answer` and `Problem.hidden`, in this process.

  Args:
    config: the task's configuration; only data sets with `needs_sandbox` use `sandbox`.
  """

  name: ClassVar[str]  # of config.task.name
  dataset: ClassVar[str]  # AFlow's name, folder of the workspace
  question_type: ClassVar[str]  # qa, math or code: which operators a workflow may use
  needs_sandbox: ClassVar[bool] = False
  sources: ClassVar[Mapping[str, download.Source]] = {}  # split or "all" -> public home

  def __init__(self, config: TaskConfig | None = None, sandbox: Sandbox | None = None):
    self.config = config or TaskConfig(name=self.name)
    self.sandbox = sandbox
    if self.needs_sandbox and sandbox is None:
      raise UserError(f"config.task.name={self.name} runs code to grade it and needs a sandbox")

  @abc.abstractmethod
  def to_problem(self, row: Mapping[str, Any], index: int) -> Problem:
    """Makes a problem of one row; ValueError says what is wrong with the row."""

  @abc.abstractmethod
  async def grade(self, problem: Problem, response: str) -> Grade:
    """Judges a response. A NaN score: the grader itself failed; mask it, never count it."""

  def load_dataset(self, path: str | os.PathLike[str] = "", limit: int = 0) -> list[Problem]:
    """Reads problems and fixes the split of each in `hidden["split"]`.

    The split is made before the limit, so that no limit moves a test problem to validation. A limit
    takes the first problems of each split, in the ratio `validation_share`.

    Args:
      path: JSON list or JSON lines, or a folder with AFlow's file names
        (`<data set>_validate.jsonl`, `_test.jsonl` and, for code, `_public_test.jsonl`); "" =
        `config.task.path` (and test_path) or the public home.
      limit: number of problems; 0 = `config.task.limit`.

    Raises:
      UserError: no such file, malformed row (with its line number), doubled id, no problem.
    """
    files = self._files(os.fspath(path))
    problems: list[Problem] = []
    for file, split in files:
      for row, line in read_rows(file):
        problems.append(self._problem(row, line, file, split, len(problems)))
    if not problems:
      raise UserError(f"no problem in {files[0][0]}: expected rows in config.task.path")
    _check_ids(problems)
    problems = self._assign(problems)
    return self._limited(problems, limit or self.config.limit)

  def raw_rows(self) -> Iterable[tuple[Mapping[str, Any], Problem]]:
    """The rows of the data set's files as they stand there, each with its problem."""
    index = 0
    for file, split in self._files(""):
      for row, line in read_rows(file):
        yield row, self._problem(row, line, file, split, index)
        index += 1

  def split_dataset(
    self, problems: Sequence[Problem] | None = None
  ) -> tuple[list[Problem], list[Problem]]:
    """Returns (validation, test). Search and training see the first, `eval` alone the second.

    Problems without a split of their own are divided by a seeded hash of their text, so the split
    depends neither on the order of the file nor on the platform, and equal texts stay together.

    Raises:
      UserError: one of the two would be empty.
    """
    problems = self._assign(self.load_dataset() if problems is None else list(problems))
    validation, test = (
      [problem for problem in problems if problem.hidden["split"] == split] for split in SPLITS
    )
    for split, part in zip(SPLITS, (validation, test), strict=True):
      if not part:
        raise UserError(
          f"the {split} split of {self.name} is empty ({len(problems)} problems): give more "
          "problems in config.task.path, or change config.task.limit or .validation_share"
        )
    return validation, test

  def _files(self, path: str) -> list[tuple[pathlib.Path, str]]:
    """(file, its split or "") of what is to be read."""
    folder = self._folder(path)
    if folder is not None:
      names = {"validation": "validate", "test": "test"}
      return [(self._aflow_file(folder, names[split]), split) for split in SPLITS]
    if path:
      return [(download.local_file(path), "")]
    if self.config.path:
      first = download.local_file(self.config.path)
      if not self.config.test_path:
        return [(first, "")]
      test = download.local_file(self.config.test_path, "config.task.test_path")
      return [(first, "validation"), (test, "test")]
    if not self.sources:
      raise UserError(f"the data set {self.name} has no public home: set config.task.path")
    return [
      (download.fetch(source), "" if split == "all" else split)
      for split, source in self.sources.items()
    ]

  def _folder(self, path: str = "") -> pathlib.Path | None:
    """The folder of AFlow's files, when the path is one."""
    text = path or self.config.path
    folder = pathlib.Path(text).expanduser()
    return folder if text and not text.startswith("hf://") and folder.is_dir() else None

  def _aflow_file(self, folder: pathlib.Path, kind: str) -> pathlib.Path:
    return download.local_file(str(folder / f"{self.dataset.lower()}_{kind}.jsonl"))

  def _problem(self, row: Any, line: int, file: pathlib.Path, split: str, index: int) -> Problem:
    where = f"{file}, line {line}"
    if not isinstance(row, dict):
      raise UserError(
        f"{where}: expected a JSON object, got {type(row).__name__} (config.task.path)"
      )
    try:
      problem = self.to_problem(row, index)
    except ValueError as error:
      raise UserError(
        f"{where}: {error} (config.task.path, config.task.name={self.name})"
      ) from error
    own = split or row.get("split", "")
    if not own:
      return problem
    if not isinstance(own, str) or own not in _SPLIT_NAMES:
      raise UserError(
        f"{where}: expected 'split' among {sorted(_SPLIT_NAMES)}, got {str(own)[:40]!r} "
        "(config.task.path)"
      )
    return dataclasses.replace(problem, hidden={**problem.hidden, "split": _SPLIT_NAMES[own]})

  def _assign(self, problems: list[Problem]) -> list[Problem]:
    """Gives a split to all problems when some have none; a partly split data set is a mistake."""
    without = sum("split" not in problem.hidden for problem in problems)
    if not without:
      return problems
    if without != len(problems):
      raise UserError(
        f"{without} of {len(problems)} problems of {self.name} have no split: "
        "give it to all or none (config.task.path)"
      )
    ranked = sorted(problems, key=lambda p: (stable_hash(self.config.split_seed, p.prompt), p.id))
    count = round(len(ranked) * self.config.validation_share)
    if len(ranked) > 1:
      count = min(max(count, 1), len(ranked) - 1)
    while 0 < count < len(ranked) and ranked[count - 1].prompt == ranked[count].prompt:
      count += 1
    chosen = {problem.id for problem in ranked[:count]}
    return [
      dataclasses.replace(p, hidden={**p.hidden, "split": SPLITS[p.id not in chosen]})
      for p in problems
    ]

  def _limited(self, problems: list[Problem], limit: int) -> list[Problem]:
    if limit < 0:
      raise UserError(f"expected config.task.limit >= 0 (0 = all), got {limit}")
    if not limit or limit >= len(problems):
      return problems
    share = min(max(round(limit * self.config.validation_share), 1), max(limit - 1, 1))
    left = {"validation": share, "test": limit - share}
    kept = []
    for problem in problems:
      if left[problem.hidden["split"]] > 0:
        left[problem.hidden["split"]] -= 1
        kept.append(problem)
    return kept


def read_rows(file: pathlib.Path) -> Iterable[tuple[Any, int]]:
  """Yields (row, line number) of a JSON list or a JSON-lines file; empty lines are left out.

  Raises:
    UserError: not UTF-8 or not JSON, with the line.
  """
  if file.stat().st_size > MAX_FILE_BYTES:
    raise UserError(f"{file} is larger than {MAX_FILE_BYTES} bytes: split it (config.task.path)")
  try:
    text = file.read_text(encoding="utf-8-sig")
  except UnicodeDecodeError as error:
    line = file.read_bytes()[: error.start].count(b"\n") + 1
    raise UserError(f"{file}, line {line}: expected UTF-8 text (config.task.path)") from error
  if text.lstrip().startswith("["):
    yield from _read_list(text, file)
    return
  # Not splitlines(): U+2028 and its like are legal inside a JSON string.
  for number, line in enumerate(text.split("\n"), 1):
    if line.strip():
      yield _decode(line, file, number), number


def _read_list(text: str, file: pathlib.Path) -> Iterable[tuple[Any, int]]:
  rows = _decode(text, file, 1)
  if not isinstance(rows, list):
    raise UserError(f"{file}: expected a JSON list of objects (config.task.path)")
  # A second, cheap pass finds each row's line for messages.
  decoder, position, line = (
    json.JSONDecoder(),
    text.index("[") + 1,
    text[: text.index("[")].count("\n") + 1,
  )
  for row in rows:
    start = position
    while text[position] in " \t\r\n,":
      position += 1
    line += text.count("\n", start, position)
    yield row, line
    _, end = decoder.raw_decode(text, position)
    line += text.count("\n", position, end)
    position = end


def _decode(text: str, file: pathlib.Path, line: int) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError as error:
    raise UserError(
      f"{file}, line {line + error.lineno - 1}, column {error.colno}: not JSON: {error.msg} "
      "(config.task.path)"
    ) from error
  except RecursionError as error:
    raise UserError(f"{file}, line {line}: JSON nested too deeply (config.task.path)") from error


def _check_ids(problems: Sequence[Problem]) -> None:
  seen: dict[str, int] = {}
  for i, problem in enumerate(problems):
    if problem.id in seen:
      raise UserError(
        f"problems {seen[problem.id] + 1} and {i + 1} have the same id {problem.id!r}: "
        "ids must differ (config.task.path, config.task.test_path)"
      )
    seen[problem.id] = i


def text_field(row: Mapping[str, Any], *names: str) -> str:
  """The first of the named fields as non-empty text; ValueError names what was expected."""
  for name in names:
    if name in row:
      value = row[name]
      if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected {name!r} to be a non-empty text, got {str(value)[:40]!r}")
      return value
  raise ValueError(f"no field {' or '.join(map(repr, names))}; it has {sorted(map(str, row))[:8]}")


def id_field(row: Mapping[str, Any], default: str, *names: str) -> str:
  """The row's id as text (fields `names`, else `id`), or `default` when it has none."""
  for name in (*names, "id"):
    value = row.get(name)
    if value is not None:
      if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"expected {name!r} to be a text or an integer, got {str(value)[:40]!r}")
      return str(value)
  return default
