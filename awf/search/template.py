"""The files of AFlow's `template/` folder: our operators behind AFlow's own model client.

They are made from the very sources that the sandbox runs, so a workflow found here behaves alike
under AFlow. Only operators that execute code (Programmer, Test) need awf to be importable there:
they use its sandbox.
"""

from __future__ import annotations

import inspect
import json
import textwrap

from awf import python_text
from awf.tasks.code import NO_PUBLIC_TESTS
from awf.workflow import contract, extract, operators, prompts
from awf.workflow.own import own_sources

# Import lines of awf/workflow/operators.py and what stands for them inside the folder.
_IMPORTS = (
  ("from awf.python_text import ", "from .python_text import "),
  ("from awf.workflow import prompts\n", "from . import op_prompt as prompts\n"),
  ("from awf.workflow.client import ", "from .bridge import "),
  ("from awf.workflow.extract import ", "from .operator_an import "),
)

_BRIDGE = '''"""Puts AFlow's AsyncLLM behind the operators; programs run in awf's sandbox."""

from __future__ import annotations

import json
from typing import Any

# The public tests of AFlow's own Test, and the functions that it has none for.
TEST_FILE = "@file@"
UNTESTED = """@untested@""".split()


class Session:
  """What Programmer and Test ask for beside the model."""

  _sandbox: Any = None

  def tests_of(self, entry_point: str) -> tuple[str, ...]:
    """The public tests of a function."""
    if not TEST_FILE or entry_point in UNTESTED:
      return ()
    with open(TEST_FILE) as file:
      for row in map(json.loads, filter(str.strip, file)):
        if row["entry_point"] == entry_point:
          tests = row["test"]
          return (tests,) if isinstance(tests, str) else tuple(tests)
    return ()

  async def call(self, method: str, params: Any) -> Any:
    """Runs a program (reply: failure, none, text) or a test (reply: passed, error)."""
    try:
      from awf.sandbox import Job, Sandbox, SandboxConfig
    except ImportError:
      raise RuntimeError("operators that execute code need awf's sandbox: install awf") from None
    if Session._sandbox is None:
      Session._sandbox = Sandbox(SandboxConfig())
    entry = {"program": "run_program", "test": "run_tests"}[method]
    done = await Session._sandbox.run(Job(f"awf.sandbox.program:{entry}", params))
    if done.failure is not None:
      message = done.failure.message
      failure = {"kind": done.failure.kind, "message": message}
      return {"failure": failure, "none": True, "text": "", "passed": False, "error": message}
    value = done.value
    none = method == "program" and value.get("text") in (None, "None")
    return {"failure": None, "none": none, "text": value.get("text", ""), **value}


class ModelClient:
  """AFlow's model with the session beside it."""

  def __init__(self, llm: Any) -> None:
    self._llm = llm
    self.session = Session()

  async def __call__(self, prompt: str) -> str:
    return await self._llm(prompt)

  def get_usage_summary(self) -> dict[str, Any]:
    return self._llm.get_usage_summary()


def malformed(message: str) -> ValueError:
  """The error of an operator whose model does not reply in the form that was asked for."""
  return ValueError(message)


def client_of(llm: Any, operator_name: str) -> ModelClient:
  """The client behind an operator."""
  return llm if isinstance(llm, ModelClient) else ModelClient(llm)
'''


def _bridge(dataset: str) -> str:
  if dataset not in NO_PUBLIC_TESTS:
    return _BRIDGE.replace("@file@", "").replace("@untested@", "")
  names = textwrap.indent(textwrap.fill(" ".join(sorted(NO_PUBLIC_TESTS[dataset])), 90), "  ")
  text = _BRIDGE.replace("@file@", f"data/datasets/{dataset.lower()}_public_test.jsonl")
  return text.replace("@untested@", f"\n{names}\n")


def operator_json(names: tuple[str, ...]) -> str:
  """operator.json: description and interface of the operators that are offered."""
  specs = {name: contract.OPERATORS[name] for name in names}
  data = {n: {"description": s.description, "interface": s.interface} for n, s in specs.items()}
  return json.dumps(data, indent=4) + "\n"


def template_files(operators_offered: tuple[str, ...], dataset: str = "") -> dict[str, str]:
  """File name -> text of the template folder of a data set, named as AFlow names it."""
  text = inspect.getsource(operators)
  for ours, theirs in _IMPORTS:
    if text.count(ours) != 1:
      raise ValueError(f"expected one line {ours!r} in awf/workflow/operators.py")
    text = text.replace(ours, theirs)
  return {
    "operator.json": operator_json(operators_offered),
    "operator.py": text + own_sources(operators_offered),
    "operator_an.py": inspect.getsource(extract).replace(*_IMPORTS[0]),
    "python_text.py": inspect.getsource(python_text),
    "op_prompt.py": inspect.getsource(prompts),
    "bridge.py": _bridge(dataset),
  }
