"""Runs a workflow inside the sandbox's child: `awf.workflow.runtime:run_workflow`.

The graph's text, with or without AFlow's own header, is executed as a module; the modules that the
header names exist in memory only. The import rule here gives honest graphs a clear reason; the
boundary is the process' jail.
"""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import logging
import types
import typing
from collections.abc import Iterator
from typing import Any

from awf.sandbox.child import CallError, JobError, describe
from awf.workflow import contract, operators
from awf.workflow.client import Call, ModelClient, Session

GRAPH_FILE = "<graph>"
PROMPT_FILE = "<prompt>"
DatasetType = str  # AFlow: a Literal of its data sets; only ever an annotation

_real_import = builtins.__import__

# Imported before the fork, so that a jail that denies opening files takes nothing from graphs.
for _name in contract.ALLOWED_IMPORTS:
  importlib.import_module(_name)


@dataclasses.dataclass
class ModelConfig:
  """What a workflow gets as `llm_config`; the parent decides on the model and its sampling."""

  model: str = "executor"
  temperature: float = 1.0
  key: str = ""
  base_url: str = ""
  top_p: float = 1.0


class _Importer:
  """`__import__` of graphs: the header's in-memory modules, then the allow list."""

  def __init__(self, modules: dict[str, types.ModuleType]) -> None:
    self._modules = modules  # "operator", "prompt", "scripts.async_llm", "scripts.evaluator"

  def _virtual(self, name: str) -> types.ModuleType | None:
    if contract.OPERATOR_MODULE.fullmatch(name):
      return self._modules["operator"]
    if contract.PROMPT_MODULE.fullmatch(name):
      return self._modules["prompt"]
    return self._modules.get(name)

  def __call__(
    self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0
  ) -> Any:
    """Imports for a graph.

    Raises:
      JobError: kind "policy", when the module is not on the list.
    """
    if level == 0 and type(name) is str:
      found = self._virtual(name)
      if found is not None:
        return found if fromlist else _package(name, found)
      inner = {one: self._virtual(f"{name}.{one}") for one in fromlist or ()}
      if inner and all(inner.values()):
        return _module(name, **inner)
      if name.partition(".")[0] in contract.ALLOWED_IMPORTS:
        return _real_import(name, globals, locals, fromlist, level)
    raise JobError("policy", f"import of {str(name)[:80]!r} is not allowed in a workflow")


def _package(name: str, module: types.ModuleType) -> types.ModuleType:
  """The outermost of nested packages that lead to `module`: what `import a.b.c` binds."""
  first, *inner = name.split(".")
  top = package = types.ModuleType(first)
  for part in inner[:-1]:
    following = types.ModuleType(part)
    setattr(package, part, following)
    package = following
  setattr(package, inner[-1], module)
  return top


def _module(name: str, **members: Any) -> types.ModuleType:
  module = types.ModuleType(name)
  vars(module).update(members)
  return module


def _family(kind: type) -> Iterator[type]:
  """All subclasses: our operators, and those of preloaded modules of the user's own."""
  for one in kind.__subclasses__():
    yield one
    yield from _family(one)


def _execute(text: str, file: str, namespace: dict[str, Any], what: str) -> None:
  try:
    code = compile(text, file, "exec", dont_inherit=True)
  except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
    reason = error.msg if isinstance(error, SyntaxError) else describe(error)
    raise JobError("format", f"{what} does not compile: {reason}") from None
  exec(code, namespace)


def load_workflow(payload: dict[str, Any], session: Session) -> Any:
  """Executes prompt module and graph and returns the `Workflow` instance.

  Raises:
    JobError: kinds "format" and "policy". Whatever the graph's own code raises comes through.
  """

  class AsyncLLM(ModelClient):
    """AFlow's name and constructor of the model."""

    def __init__(self, config: Any = None, system_msg: str | None = None) -> None:
      super().__init__(session, config, system_msg)

  def create_llm_instance(llm_config: Any = None) -> ModelClient:
    return AsyncLLM(llm_config)

  operator = _module("operator", Operator=operators.Operator)
  for one in _family(operators.Operator):
    setattr(operator, one.__name__, one)
  prompt = types.ModuleType("prompt_custom")
  modules = {
    "operator": operator,
    "prompt": prompt,
    "scripts.async_llm": _module(
      "scripts.async_llm",
      create_llm_instance=create_llm_instance,
      LLMConfig=ModelConfig,
      AsyncLLM=AsyncLLM,
    ),
    "scripts.logs": _module("scripts.logs", logger=logging.getLogger("workflow")),
    "scripts.evaluator": _module("scripts.evaluator", DatasetType=DatasetType),
  }
  scope = {**vars(builtins), "__import__": _Importer(modules)}
  prompt.__dict__["__builtins__"] = scope
  _execute(payload["prompt"], PROMPT_FILE, prompt.__dict__, "the prompt module")
  namespace = {
    "__name__": "graph",
    "__builtins__": scope,
    "operator": operator,
    "prompt_custom": prompt,
    "create_llm_instance": create_llm_instance,
    "DatasetType": DatasetType,
    "Literal": typing.Literal,
  }
  _execute(payload["graph"], GRAPH_FILE, namespace, "the graph")
  kind = namespace.get("Workflow")
  if not isinstance(kind, type):
    raise JobError("format", "the graph defines no class Workflow")
  return kind(payload["dataset"], ModelConfig(), payload["dataset"])


def _answer(result: Any) -> str:
  if not isinstance(result, (tuple, list)) or len(result) != 2:
    what = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
    raise JobError("format", f"__call__ returned {what}, expected the pair (answer, cost)")
  answer = result[0]
  if isinstance(answer, (int, float)):
    answer = str(answer)
  if not isinstance(answer, str):
    raise JobError(
      "format", f"__call__ returned an answer of type {type(answer).__name__}, expected str"
    )
  if len(answer) > contract.MAX_ANSWER_CHARS:
    raise JobError(
      "format",
      f"the answer has {len(answer)} characters, at most {contract.MAX_ANSWER_CHARS} are allowed",
    )
  return "".join(answer)


async def run_workflow(payload: dict[str, Any], call: Call) -> dict[str, Any]:
  """Runs a workflow on one problem.

  Args:
    payload: "graph", "prompt" (texts), "problem", "dataset", "public_tests" (list of texts),
      "prices" (USD of a million prompt and of a million generated tokens); for code data sets
      "entry_point", for LiveCodeBench "question_id", both else "".
    call: the channel to the parent: methods "llm", "program" and "test".

  Returns:
    "answer": the first half of the pair that the workflow returned.

  Raises:
    JobError: kinds "format" and "policy". Other exceptions of the graph end the job as kind
      "crash"; a call that the parent refused ends it with the parent's kind.
  """
  session = Session(call, tuple(payload["public_tests"]), tuple(payload["prices"]))
  arguments = [payload["problem"]]
  if payload["entry_point"]:
    arguments.append(payload["entry_point"])
    if payload["question_id"]:
      arguments.append(payload["question_id"])
  try:
    workflow = load_workflow(payload, session)
    result = await workflow(*arguments)
  except (JobError, CallError):
    raise
  except NameError as error:
    # The name of a local variable is not part of the canonical text, so it is kept out of the
    # result.
    raise JobError(
      "crash", f"{type(error).__name__}: a name has no value when it is used"
    ) from None
  return {"answer": _answer(result)}
