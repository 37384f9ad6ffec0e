"""AFlow's contract: graphs in its form, with its header and every operator, run as they are.

With AFLOW_PATH set to a checkout of FoundationAgents/AFlow its own seed graphs run too.
"""

import os
from pathlib import Path

import pytest
from scripted import ScriptedLLM, new_sandbox, run

from awf.types import Problem, WorkflowSource
from awf.workflow import contract
from awf.workflow.canonical import canonical
from awf.workflow.static import static_check

KINDS = {
  "DROP": "qa", "HotpotQA": "qa", "GSM8K": "math", "MATH": "math", "HumanEval": "code",
  "MBPP": "code",
}  # fmt: skip
CODE = "def add(a, b):\n    return a + b"
PROBLEMS = {
  "qa": Problem("p", "Context: Ida was born in Oslo.\n\nQuestion: Where?\n\nAnswer:"),
  "math": Problem("p", "What is 6*7?"),
  "code": Problem("p", "Add.", entry_point="add", public_tests=("assert add(1, 2) == 3",)),
}
AFLOW = os.environ.get("AFLOW_PATH", "")


@pytest.fixture(scope="module")
def sandbox():
  with new_sandbox() as one:
    yield one


def seed(name, kind):
  """A seed in AFlow's own shape: header, wide signature, docstring, no newline at the end."""
  build = "self.custom = operator.Custom(self.llm)"
  call = "self.custom(input=problem, instruction='')"
  arguments = "problem: str"
  if kind == "code":
    build += "\n        self.coder = operator.CustomCodeGenerate(self.llm)"
    call = "self.coder(problem=problem, entry_point=entry_point, instruction='')"
    arguments += ", entry_point:str"
  graph = f'''from typing import Literal
import workspace.{name}.workflows.template.operator as operator
import workspace.{name}.workflows.round_1.prompt as prompt_custom
from scripts.async_llm import create_llm_instance


from scripts.evaluator import DatasetType

class Workflow:
    def __init__(
        self,
        name: str,
        llm_config,
        dataset: DatasetType,
    ) -> None:
        self.name = name
        self.dataset = dataset
        self.llm = create_llm_instance(llm_config)
        {build}

    async def __call__(self, {arguments}):
        """
        One call.
        """
        # await self.custom(input=, instruction="")
        found = await {call} # the code or the text
        return found['response'], self.llm.get_usage_summary()["total_cost"]'''
  return WorkflowSource(graph, '# SOLVE = """\n#\n# """\n')


def model(prompt, key):
  """A model that replies to every operator in the form that it asks for."""
  letter = next((line[0] for line in prompt.splitlines() if line[1:] == ": 42"), "A")
  if "Define solve()" in prompt:
    return "```python\ndef solve():\n    return 6 * 7\n```"
  if "corrected code" in prompt or "must define add" in prompt:
    return f"```python\n{CODE}\n```"
  for mark, text in (
    ("<solution_letter>", f"<thought>t</thought><solution_letter>{letter}</solution_letter>"),
    ("<review_result>", "<review_result>false</review_result><feedback>too low</feedback>"),
    ("<solution>", "<solution>42</solution>"),
    ("<answer>", "<thought>t</thought><answer>42</answer>"),
  ):
    if mark in prompt:
      return text
  return "42" if "answer alone" in prompt else "The answer is 41."


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_seeds_in_aflows_form_run_unmodified(sandbox, name, kind):
  source = seed(name, kind)
  result = run(sandbox, ScriptedLLM(model), source, PROBLEMS[kind], kind=kind, dataset=name)
  assert result.failure is None and result.calls == 1
  assert result.answer == (CODE if kind == "code" else "The answer is 41.")
  assert static_check(source, contract.operators_of(kind)) is None
  assert canonical(source) == canonical(contract.seed_source(kind)) or kind == "code"


HEAD = """from typing import Literal
import workspace.{name}.workflows.template.operator as operator
import workspace.{name}.workflows.round_7.prompt as prompt_custom
from scripts.async_llm import create_llm_instance
from scripts.evaluator import DatasetType
from scripts.logs import logger
import asyncio

class Workflow:
    def __init__(self, name: str, llm_config, dataset: DatasetType) -> None:
        self.name = name
        self.dataset = dataset
        self.llm = create_llm_instance(llm_config)
        self.custom = operator.Custom(self.llm)
        self.answer_generate = operator.AnswerGenerate(self.llm)
        self.custom_code_generate = operator.CustomCodeGenerate(self.llm)
        self.sc_ensemble = operator.ScEnsemble(self.llm)
        self.md_ensemble = operator.MdEnsemble(self.llm, vote_count=3)
        self.programmer = operator.Programmer(self.llm)
        self.test = operator.Test(self.llm)
        self.format = operator.Format(self.llm)
        self.review = operator.Review(self.llm)
        self.revise = operator.Revise(self.llm)
"""
EVERY = (
  HEAD
  + """
    async def __call__(self, problem: str):
        raw = await self.custom(input=problem, instruction=prompt_custom.SOLVE_PROMPT)
        steps = await self.answer_generate(input=problem)
        program = await self.programmer(problem=problem, analysis=raw['response'])
        code = await self.custom_code_generate(problem='Add.', entry_point='add', instruction='')
        tested = await self.test(problem='Add.', solution=code['response'], entry_point='add')
        judged = await self.review(problem=problem, solution=raw['response'])
        solutions = [raw['response'], steps['answer'], str(program['output'])]
        if judged['review_result'] == 'false':
            revised = await self.revise(problem=problem, solution=raw['response'],
                                        feedback=judged['feedback'])
            solutions.append(revised['solution'])
        voted = await self.md_ensemble(solutions=solutions, problem=problem)
        chosen = await self.sc_ensemble(solutions=solutions, problem=problem)
        alone = await self.sc_ensemble(solutions=[voted['solution'], chosen['response']])
        short = await self.format(problem=problem, solution=alone['response'])
        logger.info(short)
        found = [short['response'], steps['thought'], program['code'], str(tested['result'])]
        return "|".join(found), self.llm.get_usage_summary()["total_cost"]
"""
)


@pytest.mark.parametrize(
  "module", ["workspace.MATH.workflows.template.operator", "scripts.operators"]
)
def test_a_graph_with_every_operator_runs_unmodified(sandbox, module):
  graph = EVERY.format(name="MATH").replace("workspace.MATH.workflows.template.operator", module)
  source = WorkflowSource(graph, 'SOLVE_PROMPT = """Solve it.\n"""\n')
  llm = ScriptedLLM(model)
  problem = Problem("p", "What is 6*7?", public_tests=PROBLEMS["code"].public_tests)
  result = run(sandbox, llm, source, problem)
  assert result.failure is None, result.failure
  assert result.answer == "42|t|def solve():\n    return 6 * 7|True"
  assert result.programs == 2 and result.calls == len(llm.requests) == 10
  names = contract.allowed_operators(contract.operators_of("math"), graph)
  assert set(names) == set(contract.OPERATORS)
  assert static_check(source, names, is_code=False) is None
  refused = static_check(source, contract.operators_of("math"))
  assert "unknown operator AnswerGenerate" in refused.message


def test_every_operator_has_its_specification():
  from awf.workflow import operators

  assert [one.__name__ for one in operators.CLASSES] == list(contract.OPERATORS)
  assert set(contract.OPERATORS) == {
    "Custom", "AnswerGenerate", "CustomCodeGenerate", "ScEnsemble", "MdEnsemble", "Programmer",
    "Test", "Format", "Review", "Revise",
  }  # fmt: skip


def test_the_model_may_be_built_by_hand(sandbox):
  graph = seed("GSM8K", "math").graph.replace(
    "import create_llm_instance", "import create_llm_instance, AsyncLLM, LLMConfig"
  )
  graph = graph.replace("create_llm_instance(llm_config)", "AsyncLLM(llm_config, 'Be brief.')")
  llm = ScriptedLLM(model)
  assert run(sandbox, llm, WorkflowSource(graph, ""), PROBLEMS["math"]).failure is None
  assert llm.requests[0][0][0] == {"role": "system", "content": "Be brief."}


@pytest.mark.skipif(not AFLOW, reason="AFLOW_PATH names no checkout of AFlow")
@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_aflows_own_seeds_run_unmodified(sandbox, name, kind):
  folder = Path(AFLOW) / "workspace" / name / "workflows" / "round_1"
  source = WorkflowSource(
    (folder / "graph.py").read_text(encoding="utf-8"),
    (folder / "prompt.py").read_text(encoding="utf-8"),
  )
  result = run(sandbox, ScriptedLLM(model), source, PROBLEMS[kind], kind=kind, dataset=name)
  assert result.failure is None and result.calls == 1
  assert static_check(source, contract.operators_of(kind)) is None
