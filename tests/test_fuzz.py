"""Hostile proposals, in short: `python tests/fuzz_proposals.py` does it at length, with times."""

import pytest
from fuzz_proposals import Fuzzer, fuzz, read, reply

from awf.search.propose import MAX_REPLY_CHARS, parse_reply
from awf.search.text import excerpt, one_line
from awf.types import Failure, WorkflowSource
from awf.workflow.contract import ALL_OPERATORS, seed_source
from awf.workflow.parse import MAX_CONSTANT, SourceError, prompt_constants
from awf.workflow.static import static_check

SEED = seed_source("math")


def test_nothing_raises_and_every_kind_is_made():
  found = fuzz(inputs=350, seed=7)
  assert found["raised"] == []
  assert set(found["kinds"]) == set(Fuzzer(0).kinds)
  assert set(found["ends"]) == {"format", "static", "valid"}


def test_the_inputs_are_a_function_of_the_seed():
  first, second, other = (Fuzzer(seed) for seed in (3, 3, 4))
  texts = [[make() for _ in range(20)] for make in (first, second, other)]
  assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
  "line",
  [
    "A{i} = A{j} + A{j}",
    "A{i} = [A{j}, A{j}]",
    "A{i} = f'{{A{j}}}{{A{j}}}'",
    "A{i} = (A{j}, A{j})",
  ],
)
def test_constants_that_double_with_every_line_are_refused_before_they_are_made(line):
  lines = [line.format(i=i, j=i - 1) for i in range(1, 60)]
  with pytest.raises(SourceError, match="too large in line 1[0-9]"):
    prompt_constants("\n".join(["A0 = 'x'", *lines]))
  small = "\n".join(["A0 = 'x'", *lines[:5]])
  assert static_check(WorkflowSource(SEED.graph, small), ALL_OPERATORS, False) is None
  longest = f"A = '{'x' * 15_000}'\nB = A + A + A"
  assert len(prompt_constants(longest)["B"]) == 45_000 < MAX_CONSTANT


def test_a_reply_keeps_what_stands_in_its_last_complete_elements():
  texts = [reply(WorkflowSource(f"class Workflow:\n    x = {i}", SEED.prompt)) for i in (1, 2)]
  assert parse_reply("\n".join(texts)).source.graph.endswith("x = 2")
  assert parse_reply(texts[0] + "<graph>\nclass Workflow").source.graph.endswith("x = 1")
  for fence in ("```", "```python", "  ```py3 \t"):
    fenced = (
      texts[0].replace("<graph>\n", f"<graph>\n{fence}\n").replace("</graph>", "```\n</graph>")
    )
    assert parse_reply(fenced) == parse_reply(texts[0])
  half = texts[0].replace("<graph>\n", "<graph>\n```python\n")
  assert parse_reply(half).source.graph.startswith("```python")


@pytest.mark.parametrize(
  "text",
  ["SOLVE_PROMPT = 0x{f}", "x = 0b{one}", "x = self.custom(input=problem)[0x{f}]"],
)
def test_integers_that_python_does_not_write_are_refused(text):
  line = text.format(f="f" * 4_000, one="1" * 15_000)
  graph = SEED.graph.replace("        return ", f"        {line}\n        return ", 1)
  sources = [WorkflowSource(graph, ""), WorkflowSource(SEED.graph, line)]
  for source in sources[: 2 if "self" not in text else 1]:
    failure = static_check(source, ALL_OPERATORS, False)
    assert failure is not None and "integer of too many digits" in failure.message


def test_a_text_of_symbols_is_refused_before_it_is_parsed():
  for text in ("[" + "1," * 7_000 + "]", "f'" + "{x}" * 5_000 + "'", "''" * 7_000):
    failure = static_check(WorkflowSource(SEED.graph, f"A = {text}"), ALL_OPERATORS, False)
    assert failure is not None and "more than 4000 symbols" in failure.message


def test_a_reply_without_end_is_refused():
  failure = parse_reply("<graph>" * MAX_REPLY_CHARS)
  assert isinstance(failure, Failure) and "characters, at most 64000" in failure.message
  assert read(f"<think>{'x' * 200_000}</think>{reply(SEED)}") == "valid"


def test_nested_tags_cost_no_pass_over_the_whole_text():
  deep = "<score " * 40_000 + ">" * 40_000
  for text in (one_line(deep), excerpt(deep, 600), excerpt(deep, 600, tail=True)):
    assert len(text) <= 600
  assert one_line("<score >" * 3) == "[score ][score ][score ]"
