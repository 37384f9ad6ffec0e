"""The search's configuration: a frozen, validated copy of config.search and config.reward."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from awf.search.curriculum import ORDERS
from awf.search.propose import STYLES
from awf.types import UserError, WorkflowSource
from awf.workflow.contract import OPERATORS, operators_of
from awf.workflow.own import operator_names

SELECTIONS = ("aflow", "uct", "puct")
QUESTION_TYPES = ("qa", "math", "code")


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """Rewards by the stage that a proposal reaches; one that runs earns `runs + score x mean`."""

  parse: float = 0.0  # does not parse
  static: float = 0.05  # fails the static check, or copies its parent
  smoke: float = 0.1  # fails the smoke run
  runs: float = 0.2
  score: float = 0.8
  function: str = ""  # package.module:function that has the last word; "" = none


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """How to search; field by field config.search (see configs/base.py), with what the task adds."""

  dataset: str  # AFlow's folder name, for example GSM8K
  question_type: str = "math"  # qa, math, code
  group_size: int = 8  # config.grpo.group_size: children proposed for one parent
  refill: int = 0  # config.grpo.refill: groups a round that are drawn again for want of a spread
  selection: str = "aflow"
  rounds: int = 10
  parents: int = 4
  sample: int = 4
  mix_lambda: float = 0.3
  mix_alpha: float = 0.2
  uct_c: float = 1.0
  uct_adapt: bool = False
  converge_rounds: int = 0
  converge_z: float = 0.0
  max_calls: int = 0
  max_tokens: int = 0
  prompt: str = "full"
  operators: tuple[str, ...] = ()  # offered to the optimiser; () becomes those of the question type
  repairs: int = 0
  logs: int = 3
  experience: int = 8
  smoke_problems: int = 1
  subset_problems: int = 8
  full_problems: int = 0
  full_top: int = 4
  curriculum: str = "none"
  curriculum_share: float = 0.5
  start_share: float = 0.0
  executor_prices: tuple[float, float] = (0.0, 0.0)  # config.executor.prices
  reward: RewardConfig = RewardConfig()

  def __post_init__(self) -> None:
    for name, known in (
      ("selection", SELECTIONS), ("prompt", STYLES), ("curriculum", ORDERS),
    ):  # fmt: skip
      if getattr(self, name) not in known:
        raise UserError(
          f"config.search.{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
        )
    if self.question_type not in QUESTION_TYPES:
      raise UserError(f"config.task: expected a question type among {QUESTION_TYPES}")
    unknown = [name for name in self.operators if name not in OPERATORS]
    if unknown or len(set(self.operators)) != len(self.operators):
      raise UserError(
        f"config.search.operators: expected names among {', '.join(OPERATORS)}, each once, got "
        f"{', '.join(map(str, self.operators))}"
      )
    object.__setattr__(self, "operators", self.operators or operators_of(self.question_type))
    if not self.dataset.isidentifier():
      raise UserError(
        f"config.task.name: the data set's folder must be a Python name, got {self.dataset!r}"
      )
    for name, low in (
      ("rounds", 0), ("parents", 1), ("sample", 1), ("logs", 0), ("repairs", 0), ("experience", 0),
      ("smoke_problems", 0), ("subset_problems", 1), ("full_problems", 0), ("full_top", 0),
      ("uct_c", 0), ("mix_alpha", 0), ("converge_rounds", 0), ("converge_z", 0),
      ("max_calls", 0), ("max_tokens", 0),
    ):  # fmt: skip
      if getattr(self, name) < low:
        raise UserError(f"config.search.{name}: expected at least {low}, got {getattr(self, name)}")
    for name in ("mix_lambda", "start_share", "curriculum_share"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise UserError(
          f"config.search.{name}: expected a share in [0, 1], got {getattr(self, name)}"
        )
    if self.group_size < 1:
      raise UserError(f"config.grpo.group_size: expected at least 1, got {self.group_size}")

  @property
  def is_code(self) -> bool:
    """Whether workflows get an entry point."""
    return self.question_type == "code"

  @staticmethod
  def from_config(
    search: Mapping[str, Any],
    reward: Mapping[str, Any],
    *,
    group_size: int,
    refill: int = 0,
    prices: tuple[float, float] = (0.0, 0.0),
    dataset: str,
    question_type: str,
  ) -> SearchConfig:
    """Makes it from `config.search` and `config.reward`; other parts' fields are left out."""
    names = {f.name for f in dataclasses.fields(SearchConfig)} - {"reward"}
    fields = {k: v for k, v in search.items() if k in names}
    fields["operators"] = operator_names(fields.get("operators", ()))
    return SearchConfig(
      dataset=dataset,
      question_type=question_type,
      group_size=group_size,
      refill=refill,
      executor_prices=prices,
      reward=RewardConfig(**dict(reward)),
      **fields,
    )


def load_starts(path: str, field: str = "config.search.starts") -> tuple[WorkflowSource, ...]:
  """Workflows from JSON lines of {graph, prompt}; "" gives none. `field` names them in messages.

  Raises:
    UserError: no such file, or a malformed line (with its number).
  """
  if not path:
    return ()
  try:
    lines = Path(path).read_text(encoding="utf-8").splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise UserError(f"{field}: cannot read {path}: {e}") from None
  starts = []
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    try:
      data = json.loads(line)
    except json.JSONDecodeError as e:
      raise UserError(f"{field}: {path} line {number} is not JSON: {e.msg}") from None
    fields = data if isinstance(data, dict) else {}
    graph, prompt = fields.get("graph"), fields.get("prompt")
    if not (isinstance(graph, str) and isinstance(prompt, str)):
      raise UserError(f'{field}: {path} line {number}: expected {{"graph": text, "prompt": text}}')
    starts.append(WorkflowSource(graph, prompt))
  return tuple(starts)
