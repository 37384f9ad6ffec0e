"""The static check and the canonical text of workflows."""

import random
import re

import pytest

from awf.types import WorkflowSource
from awf.workflow import contract
from awf.workflow.parse import MESSAGE_CHARS, SourceError, prompt_constants
from awf.workflow.static import canonical, static_check
from data.nano import proposals

MATH = contract.OPERATORS_BY_TYPE["math"]
COST = 'self.llm.get_usage_summary()["total_cost"]'


def graph(body, init="", imports=""):
  """A math workflow whose `__call__` has this body (lines)."""
  head = contract.seed_source("math").graph.partition("\n\n    async")[0]
  built = "".join(f"\n        {line}" for line in init.splitlines())
  lines = "".join(f"\n        {line}" for line in body.splitlines())
  return f"{imports}{head}{built}\n\n    async def __call__(self, problem: str):{lines}\n"


def check(body="", init="", prompt="", imports="", operators=MATH):
  return static_check(WorkflowSource(graph(body, init, imports), prompt), operators)


GOOD_BODY = f"s = await self.custom(input=problem, instruction='')\nreturn s['response'], {COST}"

GOOD = {
  "gather": (
    "tasks = [self.custom(input=problem, instruction='') for _ in range(3)]\n"
    "found = await asyncio.gather(*tasks)\n"
    f"return found[0]['response'], {COST}",
    "",
    "import asyncio\n",
  ),
  "coroutine kept in a name": (
    "one = self.custom(problem, '')\ntwo = self.custom(input=problem, instruction='x')\n"
    f"a, b = await asyncio.gather(one, two)\nreturn a['response'] + b['response'], {COST}",
    "",
    "import asyncio\n",
  ),
  "awaited later": (
    f"one = self.custom(problem, '')\none = await one\nreturn one['response'], {COST}",
    "",
    "",
  ),
  "parenthesised await": (
    f"return (await self.custom(problem, ''))['response'], {COST}",
    "",
    "",
  ),
  "raw model": (f"return await self.llm(problem), {COST}", "", ""),
  "result changed in place": (
    f"s = await self.custom(problem, '')\ns['extra'] = 1\nreturn str(s['extra']), {COST}",
    "",
    "",
  ),
  "name that is two things": (
    "s = {'answer': ''}\nif problem:\n    s = await self.custom(problem, '')\n"
    f"return s['answer'], {COST}",
    "",
    "",
  ),
  "pair in a name": (
    f"s = await self.custom(problem, '')\npair = (s['response'], 0.0)\nreturn pair{' '}",
    "",
    "",
  ),
  "nested function": (
    f"def pick(x):\n    return x['response']\nreturn pick(await self.custom(problem, '')), {COST}",
    "",
    "",
  ),
  "imports": (
    "n = re.sub('[^0-9]', '', problem)\ns = await self.custom(problem, '')\n"
    f"return s['response'] + str(math.sqrt(len(n))), {COST}",
    "",
    "import re\nimport math\nfrom collections import Counter\n",
  ),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_workflows_pass(name):
  body, init, imports = GOOD[name]
  assert check(body, init, "", imports) is None


@pytest.mark.parametrize("kind", sorted(contract.OPERATORS_BY_TYPE))
def test_seeds_pass_with_and_without_the_header(kind):
  seed = contract.seed_source(kind)
  operators = contract.OPERATORS_BY_TYPE[kind]
  assert static_check(seed, operators) is None
  whole = WorkflowSource(contract.graph_header("MATH", 7) + seed.graph + "\n", seed.prompt)
  assert static_check(whole, operators) is None
  assert contract.strip_header(whole.graph) == seed.graph


def test_the_nano_proposals_pass():
  for seed in range(200):
    source = proposals.render(proposals.random_state(random.Random(seed)))
    assert static_check(source, MATH) is None, source


LLM = "self.llm"
BAD = {
  # name: (body, init, prompt, imports, kind, what the message says)
  "undefined prompt": (
    f"s = await self.custom(problem, prompt_custom.SOLVE)\nreturn s['response'], {COST}",
    "", 'CHECK = "x"', "", "format", r"prompt_custom.SOLVE is not defined.*CHECK"),
  "unknown operator": (
    GOOD_BODY, "self.x = operator.Debate(self.llm)", "", "", "format",
    "unknown operator Debate, expected one of Custom, ScEnsemble, Programmer"),
  "operator of another type": (
    GOOD_BODY, "self.x = operator.Test(self.llm)", "", "", "format", "unknown operator Test"),
  "operator without model": (
    GOOD_BODY, "self.p = operator.Programmer()", "", "", "format",
    r"write operator.Programmer\(self.llm\)"),
  "operator with the config": (
    GOOD_BODY, "self.p = operator.Programmer(llm_config)", "", "", "format",
    r"write operator.Programmer\(self.llm\)"),
  "operator never built": (
    f"p = await self.programmer(problem)\nreturn p['output'], {COST}", "", "", "", "format",
    r"add `self.programmer = operator.Programmer\(self.llm\)`"),
  "attribute never set": (
    f"return self.best, {COST}", "", "", "", "format", "self.best is used but never set"),
  "unknown argument": (
    f"s = await self.custom(prompt=problem)\nreturn s['response'], {COST}", "", "", "", "format",
    "Custom has no argument 'prompt', expected input, instruction"),
  "missing argument": (
    f"s = await self.custom(input=problem)\nreturn s['response'], {COST}", "", "", "", "format",
    "Custom lacks the argument instruction"),
  "too many arguments": (
    f"s = await self.custom(problem, '', 1)\nreturn s['response'], {COST}", "", "", "", "format",
    "got 3 arguments"),
  "argument twice": (
    f"s = await self.custom(problem, '', input='')\nreturn s['response'], {COST}", "", "", "",
    "format", "gets input twice"),
  "missing await": (
    f"s = self.custom(problem, '')\nreturn s['response'], {COST}", "", "", "", "format",
    r"write s = await self.custom\(...\)"),
  "missing await in the return": (
    f"return self.custom(problem, ''), {COST}", "", "", "", "format", "missing await"),
  "statement without await": (
    f"self.custom(problem, '')\nreturn '', {COST}", "", "", "", "format", "missing await"),
  "await of the subscript": (
    f"s = await self.custom(problem, '')['response']\nreturn s, {COST}", "", "", "", "format",
    r"\(await self.custom\(...\)\) before"),
  "model without await": (
    f"text = self.llm(problem)\nreturn text, {COST}", "", "", "", "format",
    r"text = await self.llm"),
  "await in a plain function": (
    f"def f():\n    return await self.custom(problem, '')\nreturn f(), {COST}", "", "", "",
    "format", "syntax error"),
  "wrong key": (
    f"s = await self.custom(problem, '')\nreturn s['answer'], {COST}", "", "", "", "format",
    "no key 'answer', expected 'response'"),
  "wrong key at once": (
    f"return (await self.custom(problem, ''))['text'], {COST}", "", "", "", "format",
    "no key 'text'"),
  "single value": (
    "s = await self.custom(problem, '')\nreturn s['response']", "", "", "", "format",
    r"must return the pair \(answer, cost\)"),
  "result returned": (
    "s = await self.custom(problem, '')\nreturn s", "", "", "", "format", "must return the pair"),
  "bare return": ("return", "", "", "", "format", "must return the pair"),
  "triple": (f"return '', '', {COST}", "", "", "", "format", "returns 3 values"),
  "empty tuple": ("return ()", "", "", "", "format", "returns 0 values"),
  "whole result as the answer": (
    f"s = await self.custom(problem, '')\nreturn s, {COST}", "", "", "", "format",
    "the answer is a result dict"),
  "no return": ("s = await self.custom(problem, '')", "", "", "", "format", "returns nothing"),
  "undefined name": (
    f"return probelm, {COST}", "", "", "", "format", "the name 'probelm' is not defined"),
  "module not imported": (
    f"return re.sub('a', '', problem), {COST}", "", "", "", "format", "add `import re`"),
  "provided name redefined": (
    f"operator = 1\nreturn '', {COST}", "", "", "", "format", "operator is already provided"),
  "provided name imported": (
    GOOD_BODY, "", "", "import operator\n", "format", "operator is already provided"),
  "homoglyph": (
    f"pr\u043eblem = 1\nreturn '', {COST}", "", "", "", "format", "not ASCII"),
  "import of os": (GOOD_BODY, "", "", "import os\n", "policy", "import of 'os' is not allowed"),
  "import from below": (
    GOOD_BODY, "", "", "from os.path import join\n", "policy", "import of 'os.path'"),
  "relative import": (GOOD_BODY, "", "", "from . import x\n", "policy", "relative imports"),
  "eval": (f"return eval('1'), {COST}", "", "", "", "policy", "eval is not allowed"),
  "dunder import": (
    f"__import__('os')\nreturn '', {COST}", "", "", "", "policy", "__import__ is not allowed"),
  "frame walk": (
    f"return str(self.custom.__class__), {COST}", "", "", "", "policy", "__class__"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_each_mistake_has_its_line(name):
  body, init, prompt, imports, kind, message = BAD[name]
  failure = check(body, init, prompt, imports)
  assert failure is not None and failure.kind == kind
  assert re.search(message, failure.message), failure.message
  assert "\n" not in failure.message and len(failure.message) <= MESSAGE_CHARS


SEED = contract.seed_source("math").graph
WHOLE = {
  "fence": (f"```python\n{SEED}\n```", "Markdown fence in line 1"),
  "xml": (f"<node>\n{SEED}\n</node>", "a tag in line 1"),
  "prose": ("I would add a review step.", "syntax error in line 1"),
  "nothing": ("", "defines 0 classes"),
  "two classes": (f"{SEED}\n\n{SEED}", "defines 2 classes"),
  "base": (SEED.replace("Workflow:", "Workflow(object):"), "without a base class"),
  "other name": (SEED.replace("Workflow", "Flow"), "defines 0 classes"),
  "sync call": (SEED.replace("async def", "def").replace("await ", ""), "needs `async def"),
  "no init": (SEED.replace("__init__", "setup"), "needs `def __init__"),
  "init without arguments": (
    SEED.replace("dataset: DatasetType", "dataset, extra"),
    "needs `def __init__",
  ),
  "call with two arguments": (
    SEED.replace("problem: str)", "problem: str, entry_point: str)"),
    "other arguments",
  ),
  "deep parentheses": (f"x = {'(' * 5000}", "more than 4000 symbols"),
  "deep nesting": ("x = " + "-" * 3000 + "1", "nested too deeply"),
  "deep blocks": ("\n".join(" " * i + "if x:" for i in range(90)) + "pass", "nested too deeply"),
  "long sum": ("x = " + "+".join(["1"] * 7000), "format"),
  "many nodes": ("x = [" + "1," * 7000 + "]", "more than"),
  "large": ("#" * 20_000, "at most 16000"),
  "null byte": (SEED + "\0", "null bytes"),
  "surrogate": (SEED + "\n# \ud800", "no Python|syntax"),
  "byte order mark": ("\ufeff" + SEED, "syntax error"),
  "huge integer": (f"x = {'9' * 6000}", "syntax error"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_texts_that_are_no_workflow(name):
  text, message = WHOLE[name]
  failure = static_check(WorkflowSource(text, ""), MATH)
  assert failure is not None and failure.kind == "format"
  assert message == "format" or re.search(message, failure.message), failure.message
  assert failure.message.isascii() and failure.message.isprintable()
  assert canonical(WorkflowSource(text, ""))


def test_code_workflows_take_the_entry_point():
  operators = contract.OPERATORS_BY_TYPE["code"]
  failure = static_check(contract.seed_source("math"), operators)
  assert failure is not None and "entry_point: str" in failure.message
  livecode = contract.seed_source("code").graph.replace(
    "entry_point: str)", "entry_point: str, question_id: str)"
  )
  assert static_check(WorkflowSource(livecode, ""), operators) is None


PROMPTS = {
  "": {},
  "# only a comment": {},
  'A = """x\ny"""': {"A": "x\ny"},
  'A = ("x " "y")\nB = A + "z"': {"A": "x y", "B": "x yz"},
  'A: str = "x"\nB = f"{A}!"': {"A": "x", "B": "x!"},
  'A = B = """\n x """.strip()': {"A": "x", "B": "x"},
  '"""Doc."""\nA = r"\\d"\nB = "\\d"': {"A": "\\d", "B": "\\d"},
  'A = ["x", ("y", 1)]\nB = {"k": None}': {"A": ["x", ("y", 1)], "B": {"k": None}},
}


@pytest.mark.parametrize("text", PROMPTS)
def test_prompt_constants(text):
  assert prompt_constants(text) == PROMPTS[text]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("A = open('x').read()", "not a constant"),
    ("import os", "not NAME = text"),
    ("A = B", "not a constant"),
    ("A = 'x' * 10**9", "not a constant"),
    ("A = f'{1:>1000000000}'", "not a constant"),
    ("a.b = 'x'", "no plain name"),
    ("```\nA = 'x'\n```", "Markdown fence"),
    ("Think step by step.", "syntax error"),
  ],
)
def test_prompts_hold_constants_only(text, message):
  with pytest.raises(SourceError, match=message):
    prompt_constants(text)
  failure = static_check(WorkflowSource(SEED, text), MATH)
  assert failure is not None and failure.kind == "format"


BASE = WorkflowSource(
  graph(
    "found = []\nfor i in range(3):\n    s = await self.custom(problem, prompt_custom.SOLVE)\n"
    f"    found.append(s['response'])\nreturn found[0], {COST}"
  ),
  'SOLVE = """Think."""\n',
)


def variant(graph_change=(), prompt=None):
  text = BASE.graph
  for old, new in graph_change:
    assert old in text
    text = text.replace(old, new)
  return WorkflowSource(text, BASE.prompt if prompt is None else prompt)


EQUAL = {
  "formatting": variant([("range(3)", "range( 3 )"), ("found = []", "found = [ ]  # start")]),
  "docstring": variant([("class Workflow:", 'class Workflow:\n    """Solves."""\n')]),
  "annotation": variant([("problem: str)", "problem)"), (") -> None:", "):")]),
  "local names": variant([("found", "kept"), ("s =", "reply ="), ("s[", "reply["), (" i ", " _ ")]),
  "name of the prompt": variant([("SOLVE", "OTHER")], 'OTHER = "Think."'),
  "unused prompt": variant([], BASE.prompt + 'UNUSED = "x"\n# and a comment\n'),
  "prompt in place": variant([("prompt_custom.SOLVE", "'Think.'")], ""),
  "header": WorkflowSource(contract.graph_header("MATH", 3) + BASE.graph, BASE.prompt),
}  # fmt: skip

DIFFERENT = {
  "number": variant([("range(3)", "range(5)")]),
  "prompt": variant([], 'SOLVE = """Think!"""'),
  "answer": variant([("found[0]", "found[-1]")]),
  "literal": variant([("'response'", "'answer'")]),
  "true is not one": variant([("found[0]", "found[False]")]),
  "import": WorkflowSource("import math\n" + BASE.graph, BASE.prompt),
  "foreign header": WorkflowSource(
    "from scripts.formatter import XmlFormatter\n" + BASE.graph, BASE.prompt
  ),
  "broken": WorkflowSource(BASE.graph + ")", BASE.prompt),
  "whole prompt module": variant([("found = []", "found = [prompt_custom]")]),
}


@pytest.mark.parametrize("name", EQUAL)
def test_form_does_not_change_the_canonical_text(name):
  assert canonical(EQUAL[name]) == canonical(BASE)


def test_what_behaves_differently_has_another_canonical_text():
  texts = [canonical(one) for one in (BASE, *DIFFERENT.values())]
  assert len(set(texts)) == len(texts)


def test_locals_that_could_mean_something_else_keep_their_names():
  body = "found = [{0} for {0} in (1, 2)]\nreturn str(found) + {0}.dumps([]), 0.0"
  one, two = (
    WorkflowSource(graph(body.format(name), "", "import json, copy\n"), "")
    for name in ("json", "copy")
  )
  assert canonical(one) != canonical(two)
  seen = f"x = 1\nreturn str(locals()), {COST}"
  other = seen.replace("x =", "y =")
  assert canonical(WorkflowSource(graph(seen), "")) != canonical(WorkflowSource(graph(other), ""))


def test_nano_states_that_differ_have_different_canonical_texts():
  states = {proposals.random_state(random.Random(seed)) for seed in range(300)}
  texts = {canonical(proposals.render(state)) for state in states}
  assert len(texts) == len(states) > 50


def test_describe_and_header():
  text = contract.describe(MATH)
  assert [line.split(":")[0] for line in text.splitlines()] == [
    "1. Custom",
    "2. ScEnsemble",
    "3. Programmer",
  ]
  for name in MATH:
    spec = contract.OPERATORS[name]
    assert spec.interface in text and spec.interface.startswith(spec.attribute + "(")
