"""Operators in the real sandbox, and the extraction of answers, tags and code."""

import asyncio
import random
import textwrap

import pytest
from scripted import (
  COST,
  PROBLEM,
  ScriptedLLM,
  answer,
  failure,
  make_runner,
  new_sandbox,
  run,
  script,
  source,
)

from awf.python_text import code_of
from awf.tasks.code import find_solution
from awf.types import Problem, WorkflowSource
from awf.workflow import prompts
from awf.workflow.extract import choice_letter, normal_answer, numbers, tag


@pytest.fixture(scope="module")
def sandbox():
  with new_sandbox() as one:
    yield one


# Operators.


def test_ensemble_counts_equal_answers(sandbox):
  solutions = ["I get 7.", "<answer>42</answer>", "", "so 42.0", "\\boxed{7}, no: 42"]
  llm = script("A")
  body = f"s = await self.sc_ensemble(solutions={solutions!r}, problem=problem)\n"
  assert answer(sandbox, llm, body + f"return s['response'], {COST}") == "I get 7."
  assert llm.prompts == [prompts.sc_ensemble(["I get 7.", "<answer>42</answer>"], "What is 6*7?")]
  three = [*solutions, "It is 42"]
  body = f"s = await self.sc_ensemble({three!r})\nreturn s['response'], {COST}"
  llm = script("unused")
  assert answer(sandbox, llm, body) == "<answer>42</answer>" and not llm.requests


@pytest.mark.parametrize(
  ("reply", "chosen"),
  [
    ("<thought>x</thought>\n<solution_letter>B</solution_letter>", "2"),
    ("<solution_letter> b. ", "2"),
    ("I think that C is right", "3"),
  ],
)
def test_ensemble_reads_letters_leniently(sandbox, reply, chosen):
  body = f"s = await self.sc_ensemble(['1', '2', '3'], problem)\nreturn s['response'], {COST}"
  assert answer(sandbox, script(reply), body) == chosen


LETTER = "letter from A to C in <solution_letter>"
BALLOT = "s = await self.sc_ensemble(['1', '2', '3'], problem)\n" + f"return s['response'], {COST}"
VOTES = (
  "md = operator.MdEnsemble(self.llm, vote_count=3)\n"
  "s = await md(solutions=['x', 'y', 'z'], problem=problem)\n"
  f"return s['solution'], {COST}"
)
STEPS = f"a = await self.answer_generate(problem)\nreturn a['thought'] + '|' + a['answer'], {COST}"
REVIEW = (
  "r = await operator.Review(self.llm)(problem, '41')\n"
  f"return r['review_result'] + r['feedback'], {COST}"
)
REVISE = (
  "r = await operator.Revise(self.llm)(problem, '41', feedback='low')\n"
  f"return r['solution'], {COST}"
)
CODED = (
  f"r = await self.custom_code_generate(problem, 'f', instruction='')\nreturn r['response'], {COST}"
)
TRUE_TAGS = "<review_result>maybe</review_result><feedback>x</feedback>"


@pytest.mark.parametrize(
  ("body", "bad", "good", "expected", "wanted"),
  [
    (BALLOT, ("<solution_letter>Z</solution_letter>", "no idea"), "B", "2", LETTER),
    (BALLOT, ("",), "<solution_letter>C</solution_letter>", "3", LETTER),
    (STEPS, ("42!", "<thought>x</thought>"), "<thought>t</thought><answer>42</answer>", "t|42",
     "<thought> and <answer>"),
    (REVIEW, (TRUE_TAGS, "<review_result>true</review_result>"),
     "<review_result> True.</review_result><feedback>x</feedback>", "truex",
     "<review_result> of true or false and <feedback>"),
    (REVISE, ("42", ""), "<solution>42</solution>", "42", "<solution>"),
    (CODED, ("", "```python\n\n```"), "```python\ndef f(): pass\n```", "def f(): pass",
     "Python code"),
  ],
)  # fmt: skip
def test_a_malformed_reply_is_asked_for_again_and_then_a_typed_failure(
  sandbox, body, bad, good, expected, wanted
):
  llm = script(*bad, good)
  assert answer(sandbox, llm, body) == expected
  first, *later = llm.prompts
  assert later == [prompts.again(first, wanted)] * len(bad)
  for reply in bad:
    llm = script(reply)
    failed = failure(sandbox, llm, body)
    assert failed.kind == "format" and failed.message.endswith(f"no {wanted} in 3 replies")
    assert len(llm.requests) == 3
  caught = body.replace("await", "await asyncio.sleep(0) or await", 1)
  caught = "try:\n" + "".join(f"  {line}\n" for line in caught.splitlines())
  caught += f"except Exception as error:\n  return 'caught', {COST}"
  workflow = source(caught)
  workflow = WorkflowSource("import asyncio\n" + workflow.graph, "")
  assert run(sandbox, script(bad[0]), workflow).answer == "caught"


def test_votes_are_counted_over_shuffled_options(sandbox):
  def best(prompt, key):
    lines = [line for line in prompt.splitlines() if line[1:3] == ": "]
    return next(line[0] for line in lines if line.endswith("y"))

  llm = ScriptedLLM(best)
  assert answer(sandbox, llm, VOTES) == "y" and len(llm.requests) == 3
  orders = {tuple(line for line in p.splitlines() if line[1:3] == ": ") for p in llm.prompts}
  assert len(orders) > 1
  again = ScriptedLLM(best)
  assert answer(sandbox, again, VOTES) == "y" and again.prompts == llm.prompts
  assert answer(sandbox, script("A"), VOTES) in ("x", "y", "z")
  one = "md = operator.MdEnsemble(self.llm)\ns = await md(['x', 'x'], problem)\n"
  assert answer(sandbox, script("-"), one + f"return s['solution'], {COST}") == "x"
  failed = failure(sandbox, script("-"), VOTES)
  assert failed.kind == "format" and failed.message.startswith("MdEnsemble: no letter from A to C")


def test_format_gives_the_short_answer(sandbox):
  body = "f = await operator.Format(self.llm)(problem=problem, solution='So it is 42.')\n"
  llm = script(" 42\n")
  assert answer(sandbox, llm, body + f"return f['response'], {COST}") == "42"
  assert llm.prompts == [prompts.short_answer("What is 6*7?", "So it is 42.")]


def test_ensemble_of_nothing(sandbox):
  body = f"s = await self.sc_ensemble([], problem)\nreturn s['response'] + '!', {COST}"
  assert answer(sandbox, script("x"), body) == "!"


PROGRAM = "```python\ndef solve():\n    return {}\n```"
PROGRAMMER = (
  "p = await self.programmer(problem=problem)\n"
  f"return p['output'] + '|' + p['error'] + '|' + p['code'], {COST}"
)


def test_programmer_runs_the_program(sandbox):
  llm = script(PROGRAM.format("6 * 7"))
  result = run(sandbox, llm, source(PROGRAMMER))
  assert result.answer == "42||def solve():\n    return 6 * 7" and result.programs == 1
  assert llm.prompts == [prompts.programmer("What is 6*7?")]


def test_programmer_repairs_a_failing_program(sandbox):
  llm = script(PROGRAM.format("1 // 0"), "sorry", PROGRAM.format("'ok'"))
  result = run(sandbox, llm, source(PROGRAMMER))
  assert result.answer.startswith("ok||") and result.calls == 3
  assert "The last program failed: ZeroDivisionError" in llm.prompts[1]
  assert "The last program failed: " in llm.prompts[2] and llm.prompts[2] != llm.prompts[1]


def test_programmer_gives_up_after_three_tries(sandbox):
  llm = script(PROGRAM.format("open('/etc/passwd').read()"))
  text = answer(sandbox, llm, PROGRAMMER)
  assert text.startswith("|") and "Error" in text.split("|")[1] and len(llm.requests) == 3


def test_a_program_that_returns_none_is_no_failure(sandbox):
  llm = script(PROGRAM.format("None"))
  assert answer(sandbox, llm, PROGRAMMER).startswith("||def") and len(llm.requests) == 1
  assert answer(sandbox, script(PROGRAM.format("'None'")), PROGRAMMER).startswith("None||")


def test_equal_programs_run_once(sandbox):
  runner = make_runner(sandbox, script(PROGRAM.format("6 * 7")))
  body = (
    "found = await asyncio.gather(*[self.programmer(problem) for _ in range(4)])\n"
    f"return ' '.join(p['output'] for p in found), {COST}"
  )
  workflow = source(body)
  workflow = WorkflowSource("import asyncio\n" + workflow.graph, "")
  result = asyncio.run(runner.run(workflow, PROBLEM))
  assert result.answer == "42 42 42 42" and (result.calls, result.programs) == (4, 1)
  assert runner.stats()["cached_programs"] == 3


def test_review_and_revise(sandbox):
  body = (
    "review, revise = operator.Review(self.llm), operator.Revise(self.llm)\n"
    "r = await review(problem, '41')\n"
    "s = await revise(problem, '41', r['feedback'])\n"
    f"return r['review_result'] + r['feedback'] + s['solution'], {COST}"
  )
  llm = script(
    "<review_result>False</review_result><feedback>too low</feedback>", "<solution>42</solution>"
  )
  assert answer(sandbox, llm, body) == "falsetoo low42"
  assert llm.prompts == [
    prompts.review("What is 6*7?", "41"),
    prompts.revise("What is 6*7?", "41", "too low"),
  ]


CODE = Problem("c", "Add.", entry_point="add", public_tests=("assert candidate(1, 2) == 3",))
TESTED = "t = await self.test(problem, 'def add(a, b):\\n  return a - b', entry_point)\n"
TESTED += f"return str(t['result']) + t['solution'], {COST}"


@pytest.mark.parametrize(
  ("reply", "expected", "calls"),
  [
    ("```python\ndef add(a, b):\n  return a + b\n```", "Truedef add(a, b):\n  return a + b", 1),
    ("def add(a, b):\n  return 3.5", "Falsedef add(a, b):\n  return 3.5", 3),
  ],
)
def test_test_operator_repairs_until_the_public_tests_pass(sandbox, reply, expected, calls):
  llm = script(reply)
  workflow = source(TESTED, "", "problem, entry_point")
  result = run(sandbox, llm, workflow, CODE, kind="code", dataset="HumanEval")
  assert (result.answer, len(llm.requests)) == (expected, calls), result
  assert "It fails: AssertionError" in llm.prompts[0]


def test_test_operator_passes_without_public_tests(sandbox):
  problem = Problem("c", "Add.", entry_point="add")
  workflow = source(TESTED, "", "problem, entry_point")
  result = run(sandbox, script("x"), workflow, problem, kind="code")
  assert result.answer.startswith("True") and result.calls == result.programs == 0


# Extraction.


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("<answer>12</answer> then <answer> 7 </answer> of 9", "7"),
    ("<answer>42 apples</answer>", "42"),
    ("<answer>The  Eiffel Tower.</answer>", "the eiffel tower"),
    ("<answer>5", "5"),
    ("so \\boxed{\\text{1,234}} done 5", "1234"),
    ("\\boxed{x^{2}}", "x^{2}"),
    ("\\boxed{9\\pi}", "9\\pi"),
    ("\\boxed{3x}", "3x"),
    ("\\boxed{x + 3}", "x + 3"),
    ("\\boxed{3 i}", "3 i"),
    *(
      (f"<answer>{text}</answer>", text)
      for text in ("sqrt(2)", "log(3)", "pi/4", "x/5", "f(3)", "(x, 5)", "2*pi", "3 / x", "pi * 4")
    ),
    *(
      (f"<answer>{text}</answer>", "5")
      for text in (
        "5 dollars a day",
        "$5 a piece",
        "5 °C",
        "5 N",
        "**5**",
        "(5)",
        "about 5 (rounded)",
      )
    ),
    ("\\boxed{5^\\circ C}", "5"),
    ("\\boxed{5!}", "5!"),
    ("\\boxed{50^\\circ}", "50"),
    ("\\boxed{5~\\text{cm}}", "5"),
    ("\\boxed{(5)}", "5"),
    ("<answer>5 km/h</answer>", "5"),
    ("The answer is 42!", "42"),
    ("Answer: `42` (apples)", "42"),
    ("\\boxed{x = -3}", "-3"),
    ("so it is \\boxed{\\$18\\text{ in all}}", "18"),
    ("<answer>\n**US$ 1,800**\n</answer>", "1800"),
    ("<answer>3 million</answer>", "3 million"),
    ("October 1, 1990", "october 1, 1990"),
    ("in 1990", "1990"),
    ("from 1990 to 1995", "from 1990 to 1995"),
    ("The total is $18.", "18"),
    ("\\boxed{(1, 2)}", "(1, 2)"),
    ("I get 3, then 7.", "7"),
    ("the sum is 1,234.50", "2469/2"),
    ("it is 72.0", "72"),
    ("about .5", "1/2"),
    ("2/4", "1/2"),
    ("1/0", "1"),
    ("They met on 12/25/2020 and won by 7 points.", "7"),
    ("They won by 7 points when they met on 12/25/2020.", "12/25/2020"),
    ("<answer>9/11/2001</answer>", "9/11/2001"),
    ("on 9 / 11 / 2001", "9/11/2001"),
    ("\\boxed{1/2/3}", "1/2/3"),
    ("so 8/4/2 = 1", "1"),
    ("it weighs\n-\t5 of 1/2e5 and 3", "3"),
    ("one\u00a0half is 1\u00a0/\u00a02 of it", "1/2"),
    ("3e4", "30000"),
    ("1e999999", "1e999999"),
    ("-5", "-5"),
    ("10-4", "4"),
    ("3+4=7 apples", "7"),
    ("x = \u22127", "-7"),
    ("Yes.", "yes"),
    ("", ""),
    ("```python\ndef f(x):\n  return 1\n```", "def f(x):\n  return 1"),
    ("def f(x):\n\n  return 2  \n", "def f(x):\n  return 2"),
  ],
)
def test_normal_answer(text, expected):
  assert normal_answer(text) == expected


def test_no_text_of_digits_and_signs_fails_to_be_read():
  parts = [*"0123456789/.,-+%{}$()e= \t\n", "\u2212", "\u00a0", "\u0663", "12", "a"]
  parts += ["\\boxed{", "<answer>", "</answer>", "9/11/", "1,234", "\\frac"]
  draw = random.Random(7)
  for _ in range(5000):
    text = "".join(draw.choices(parts, k=draw.randrange(1, 14)))
    assert isinstance(normal_answer(text), str), text
    assert all(any(map(str.isdigit, number)) for number in numbers(text)), text


def test_extraction_is_bounded_on_hostile_text():
  for text in ("9" * 100_000, "1," * 50_000, "-" * 100_000, "<answer>" * 10_000, "```\n" * 20_000,
               "<answer>5" + " " * 100_000 + "(-", "Answer: " + "*" * 50_000 + " 5 -",
               "<answer>^" + " " * 100_000, "<answer>5" + "(" * 50_000, "1/" * 50_000):  # fmt: skip
    assert isinstance(normal_answer(text), str)
    assert isinstance(code_of(text), str)
  assert numbers("9" * 100) == ["9" * 100]


def test_code_and_tags():
  assert (
    code_of("a\n```py\nx = 1\n```\nb\n```text\nno\n```\n```python\ny = 2\n```") == "x = 1\n\ny = 2"
  )
  assert code_of("```\nx = 1\n```") == "x = 1"
  assert code_of("so\n```python\nx = 1\ny =") == "x = 1\ny ="
  assert code_of("x = 1\n") == "x = 1"
  assert tag("<a>1</a><a> 2 </a>", "a") == "2"
  assert tag("<A>cut off", "a") == "cut off" and tag("nothing", "a") is None
  assert choice_letter("(B)", 2) == 1 and choice_letter("(C)", 2) is None


@pytest.mark.parametrize(
  ("reply", "index"),
  [
    ("B is a better choice", 1), ("C, as a matter of fact", 2), ("B. I checked it.", 1),
    ("b", 1), ("(a)", 0), ("solution b", 1), ("The best is B", 1), ("I", None), ("Z", None),
  ],
)  # fmt: skip
def test_an_article_is_no_letter(reply, index):
  assert choice_letter(f"<solution_letter>{reply}</solution_letter>", 3) == index


ADD = "def add(a, b):\n  return a + b"
FENCED = {
  "in a list": "1. Code:\n   ```python\n   def add(a, b):\n     return a + b\n   ```\n2. Done.",
  "behind a text": f"``Here`` is `add`: ```python\n{ADD}\n```",
  "other line ends": f"```python\n{ADD}\n```\n".replace("\n", "\r\n"),
  "a glued end": f"```python\n{ADD}```\nThat is all.",
  "a title": f'```python title="add.py"\n{ADD}\n```',
  "four signs": f"````python\n{ADD}\n````",
  "no end": f"```py\n{ADD}",
  "code within a line": f"Use ```add``` so: ```2 + 3``` is ```add(2, 3)```\n```\n{ADD}\n```",
  "prose around": f"The code is\n\n{ADD}\n\nand it's simple:\nfrom 1 and 2 it makes 3.",
}
DOCUMENTED = 'def add(a, b):\n  """Adds.\n\n  ```python\n  add(1, 2)\n  ```\n  """\n  return a + b'


@pytest.mark.parametrize("text", FENCED.values(), ids=FENCED)
def test_code_is_found_however_it_is_fenced(text):
  assert code_of(text) == find_solution(text, "", "add").strip() == ADD


def test_a_fence_in_a_docstring_ends_nothing():
  text = f"```python\n{DOCUMENTED}\n```\nor\n```python\n1 +\n```\n```text\nx\n```"
  assert code_of(text) == f"{DOCUMENTED}\n\n1 +"
  assert find_solution(text, "", "add") == DOCUMENTED


def test_a_fence_in_a_docstring_of_a_list_ends_nothing():
  text = textwrap.indent(f"```python\n{DOCUMENTED}\n```", "   ")
  assert code_of(f"1. Code:\n{text}\n2. Done.") == DOCUMENTED


def test_imports_and_helpers_stay_with_bare_code():
  code = f"import math\n\ndef one():\n  return 1\n\n{ADD}"
  assert code_of(f"So:\n{code}\nIt's done.") == code
  assert find_solution(f"So:\n{code}\nIt's done.", "", "add") == code
  assert code_of("from what I see, none\nimport it yourself!") == (
    "from what I see, none\nimport it yourself!"
  )
