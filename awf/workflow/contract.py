"""What a workflow may rely on: operators, the header of a graph file, imports; and the seeds.

Read by the optimiser's prompt (`describe`), the static check, the child (runtime.py) and the
workspace files; free of JAX and NumPy.

Source: FoundationAgents/AFlow, `workspace/*/workflows/template/operator.json` and
  `scripts/optimizer.py` for the interfaces, `scripts/optimizer_utils/graph_utils.py` for the
  header.
"""

from __future__ import annotations

import dataclasses
import re

from awf.types import UserError, WorkflowSource


@dataclasses.dataclass(frozen=True)
class OperatorSpec:
  """One operator as graphs and prompts see it."""

  name: str  # class name: operator.NAME(self.llm)
  attribute: str  # usual attribute of the workflow: self.ATTRIBUTE(...)
  required: tuple[str, ...]  # arguments without a default, in order
  optional: tuple[str, ...]  # arguments with a default, in order, after the required ones
  keys: tuple[str, ...]  # keys of the result dict
  description: str
  interface: str


def _spec(
  name: str,
  attribute: str,
  required: tuple[str, ...],
  optional: tuple[str, ...],
  keys: tuple[str, ...],
  description: str,
  interface: str,
) -> tuple[str, OperatorSpec]:
  return name, OperatorSpec(name, attribute, required, optional, keys, description, interface)


OPERATORS: dict[str, OperatorSpec] = dict(
  (
    _spec(
      "Custom",
      "custom",
      ("input", "instruction"),
      (),
      ("response",),
      "Asks the model with the instruction followed by the input",
      "custom(input: str, instruction: str) -> dict with key 'response' of type str",
    ),
    _spec(
      "AnswerGenerate",
      "answer_generate",
      ("input",),
      (),
      ("thought", "answer"),
      "Lets the model think step by step and then give a short final answer",
      "answer_generate(input: str) -> dict with keys 'thought' and 'answer' of type str",
    ),
    _spec(
      "CustomCodeGenerate",
      "custom_code_generate",
      ("problem", "entry_point", "instruction"),
      (),
      ("response",),
      "Writes Python code that defines the entry point, by the instruction and the problem",
      "custom_code_generate(problem: str, entry_point: str, instruction: str) -> dict with key"
      " 'response' of type str",
    ),
    _spec(
      "ScEnsemble",
      "sc_ensemble",
      ("solutions",),
      ("problem",),
      ("response",),
      "Returns the solution whose answer is the most frequent one; on a tie the model chooses",
      "sc_ensemble(solutions: List[str], problem: str) -> dict with key 'response' of type str",
    ),
    _spec(
      "MdEnsemble",
      "md_ensemble",
      ("solutions", "problem"),
      ("mode",),
      ("solution",),
      "Lets the model vote five times on the solutions, in a new order each time; returns the one"
      " with most votes",
      "md_ensemble(solutions: List[str], problem: str) -> dict with key 'solution' of type str",
    ),
    _spec(
      "Programmer",
      "programmer",
      ("problem",),
      ("analysis",),
      ("code", "output", "error"),
      "Writes a Python program for the problem, runs it and repairs it when it fails; 'output' is"
      " empty when no program worked",
      "programmer(problem: str, analysis: str = 'None') -> dict with keys 'code' and 'output' of"
      " type str",
    ),
    _spec(
      "Test",
      "test",
      ("problem", "solution", "entry_point"),
      ("test_loop", "question_id"),
      ("result", "solution"),
      "Runs the public tests on the solution and lets the model repair it when one fails",
      "test(problem: str, solution: str, entry_point: str) -> dict with keys 'result' of type bool"
      " and 'solution' of type str",
    ),
    _spec(
      "Format",
      "format",
      ("problem", "solution"),
      ("mode",),
      ("response",),
      "Takes the short final answer out of a solution",
      "format(problem: str, solution: str) -> dict with key 'response' of type str",
    ),
    _spec(
      "Review",
      "review",
      ("problem", "solution"),
      ("mode",),
      ("review_result", "feedback"),
      "Lets the model check a solution and say what is wrong with it",
      "review(problem: str, solution: str) -> dict with keys 'review_result' ('true' or 'false')"
      " and 'feedback' of type str",
    ),
    _spec(
      "Revise",
      "revise",
      ("problem", "solution", "feedback"),
      ("mode",),
      ("solution",),
      "Lets the model correct a solution by the feedback",
      "revise(problem: str, solution: str, feedback: str) -> dict with key 'solution' of type str",
    ),
  )
)

OPERATORS_BY_TYPE: dict[str, tuple[str, ...]] = {
  "qa": ("Custom", "AnswerGenerate", "ScEnsemble"),
  "math": ("Custom", "ScEnsemble", "Programmer"),
  "code": ("Custom", "CustomCodeGenerate", "ScEnsemble", "Test"),
}

# Names that a graph uses without importing them.
PROVIDED_NAMES = (
  "operator",
  "prompt_custom",
  "create_llm_instance",
  "DatasetType",
  "Literal",
)

# The pure part of the standard library; what else a module imports is its own affair, inside the
# jail.
ALLOWED_IMPORTS = (
  "abc",
  "array",
  "asyncio",
  "bisect",
  "calendar",
  "cmath",
  "collections",
  "contextlib",
  "copy",
  "dataclasses",
  "datetime",
  "decimal",
  "difflib",
  "enum",
  "fractions",
  "functools",
  "heapq",
  "itertools",
  "json",
  "math",
  "numbers",
  "operator",
  "random",
  "re",
  "statistics",
  "string",
  "textwrap",
  "typing",
  "unicodedata",
)

ENTRY = "awf.workflow.runtime:run_workflow"
PRELOAD = ("awf.workflow.runtime",)  # what a Sandbox that runs workflows must preload

MAX_GRAPH_CHARS = 16_000
MAX_PROMPT_CHARS = 16_000
MAX_ANSWER_CHARS = 20_000

_HEADER_LINE = re.compile(
  r"from typing import Literal"
  r"|import workspace\.[\w.]+\.template\.operator as operator"
  r"|import workspace\.[\w.]+\.round_\d+\.prompt as prompt_custom"
  r"|from scripts\.async_llm import create_llm_instance"
  r"|from scripts\.evaluator import DatasetType"
)
# What graphs may import of AFlow's scripts; runtime.py makes these modules.
SCRIPT_MODULES = ("scripts.async_llm", "scripts.evaluator", "scripts.logs")
OPERATOR_MODULE = re.compile(r"workspace\.[\w.]+\.template\.operator|scripts\.operators")
PROMPT_MODULE = re.compile(r"workspace\.[\w.]+\.round_\d+\.prompt")


def describe(operators: tuple[str, ...]) -> str:
  """The operators as a numbered list for the optimiser's prompt, one line each."""
  specs = [OPERATORS[name] for name in operators]
  return "\n".join(
    f"{i}. {spec.name}: {spec.description}, with interface {spec.interface}."
    for i, spec in enumerate(specs, start=1)
  )


def operators_of(question_type: str) -> tuple[str, ...]:
  """The operator names offered for a question type.

  Raises:
    UserError: the type is not qa, math or code.
  """
  if question_type not in OPERATORS_BY_TYPE:
    raise UserError(
      f"question type {question_type!r} is unknown, expected one of {sorted(OPERATORS_BY_TYPE)}: "
      "change the task named by config.task.name"
    )
  return OPERATORS_BY_TYPE[question_type]


_USED = re.compile(r"\boperator\.([A-Z]\w*)")


def allowed_operators(offered: tuple[str, ...], *graphs: str) -> tuple[str, ...]:
  """What an edit of graphs may use: the operators that are offered and those that they have."""
  used = {name for graph in graphs for name in _USED.findall(graph)}
  return offered + tuple(name for name in OPERATORS if name in used and name not in offered)


def graph_header(dataset: str, round_number: int) -> str:
  """The fixed imports that AFlow writes above a graph's text, ending in a blank line."""
  return (
    "from typing import Literal\n"
    f"import workspace.{dataset}.workflows.template.operator as operator\n"
    f"import workspace.{dataset}.workflows.round_{round_number}.prompt as prompt_custom\n"
    "from scripts.async_llm import create_llm_instance\n"
    "from scripts.evaluator import DatasetType\n\n"
  )


def strip_header(text: str) -> str:
  """The graph text of an AFlow `graph.py`: without the header, with other imports it has."""
  lines = text.splitlines()
  end = next((i for i, line in enumerate(lines) if line.startswith("class ")), len(lines))
  head = [line for line in lines[:end] if not _HEADER_LINE.fullmatch(line.rstrip())]
  return "\n".join(head + lines[end:]).strip()


_HEAD = """class Workflow:
    def __init__(self, name: str, llm_config, dataset: DatasetType) -> None:
        self.name = name
        self.dataset = dataset
        self.llm = create_llm_instance(llm_config)
"""
_COST = 'self.llm.get_usage_summary()["total_cost"]'
_SEED = f"""{_HEAD}        self.custom = operator.Custom(self.llm)

    async def __call__(self, problem: str):
        solution = await self.custom(input=problem, instruction="")
        return solution['response'], {_COST}
"""
_CODE_SEED = f"""{_HEAD}        self.custom = operator.Custom(self.llm)
        self.custom_code_generate = operator.CustomCodeGenerate(self.llm)

    async def __call__(self, problem: str, entry_point: str):
        solution = await self.custom_code_generate(
            problem=problem, entry_point=entry_point, instruction=""
        )
        return solution['response'], {_COST}
"""
SEED_PROMPT = "# no prompt is used"


def seed_source(question_type: str) -> WorkflowSource:
  """The workflow that a search starts from: one call with an empty instruction.

  Raises:
    UserError: the type is not qa, math or code.
  """
  operators_of(question_type)
  graph = _CODE_SEED if question_type == "code" else _SEED
  return WorkflowSource(graph.strip(), SEED_PROMPT)
