"""The nano model's world: problems, programs, proposals and the text it was trained on."""

import itertools
import json
import random
import re

import pytest
from conftest import ROOT

from awf.search.propose import Edit, parse_reply
from awf.types import Failure
from awf.workflow.contract import OPERATORS_BY_TYPE, seed_source
from awf.workflow.static import canonical, static_check
from data.nano import corpus, proposals
from data.nano.families import FAMILIES, SIZES, make_slip


def lines(name):
  return [json.loads(x) for x in (ROOT / "data/nano" / name).read_text().splitlines()]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("wide", (False, True))
def test_worked_solutions_and_programs_give_the_answer(family, wide):
  r = random.Random(0)
  for _ in range(200):
    item = FAMILIES[family](r, wide)
    steps, answer = item.work(lambda value: value)
    assert answer == item.answer and 0 <= answer <= 999
    for step in steps:  # each line is true arithmetic
      left, right = step.split(": ")[-1].split("=")
      assert eval(left) == int(right), step
    if item.program:
      space = {}
      exec("def solve():\n  " + "\n  ".join(item.program), space)
      assert space["solve"]() == item.answer


def test_slips_come_at_their_rate_and_change_the_value():
  r = random.Random(1)
  slip = make_slip(r, 0.2)
  changed = sum(slip(50) != 50 for _ in range(5000)) / 5000
  assert 0.17 < changed < 0.23
  assert all(make_slip(r, 0.0)(v) == v for v in range(100))


def test_shipped_problems_are_the_reserved_ones():
  rows, sets = lines("problems.jsonl"), corpus.problem_sets()
  for split in ("validation", "test"):
    shipped = [(x["problem"], x["answer"]) for x in rows if x["split"] == split]
    assert shipped == [(i.question, str(i.answer)) for i in sets[split]]
    assert len(shipped) == SIZES[split] * len(FAMILIES)
  assert len({x["id"] for x in rows}) == len(rows)
  keys = [(i.family, i.key) for items in sets.values() for i in items]
  assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("phase", (1, 2))
def test_no_shipped_problem_is_in_the_training_text(phase):
  shipped = {x["problem"] for x in lines("problems.jsonl")}
  reserved = corpus.reserved_keys(2)
  for item, (prompt, _) in itertools.islice(corpus._make(phase, corpus.EXAMPLES), 40_000):
    assert item is None or (item.family, item.key) not in reserved
    assert not any(part in shipped for part in prompt.split("\n"))


def test_rendered_workflows_are_valid_read_back_and_differ():
  r = random.Random(2)
  operators = OPERATORS_BY_TYPE["math"]
  texts = {}
  for _ in range(300):
    state = proposals.random_state(r)
    source = proposals.render(state)
    assert static_check(source, operators) is None
    assert proposals.read_state(source) == state
    assert texts.setdefault(canonical(source), state) == state
  assert proposals.render(proposals.State()).graph.strip() == seed_source("math").graph.strip()


def test_proposals_change_the_parent_as_they_say():
  r = random.Random(3)
  for _ in range(300):
    before = proposals.random_state(r)
    text, after = proposals.propose(before, r)
    assert after != before and proposals.agrees(text, before, after)
    other = proposals.propose(after, r)[1]
    if other not in (before, after):
      assert not proposals.agrees(text, before, other)
    edit = parse_reply(proposals.reply(text, proposals.render(after)))
    assert isinstance(edit, Edit) and proposals.read_state(edit.source) == after


def test_starts_and_held_out_parents_do_not_overlap():
  starts, parents = lines("starts.jsonl"), lines("parents.jsonl")
  texts = [(x["graph"], x["prompt"]) for x in (*starts, *parents)]
  assert len(set(texts)) == len(texts) and len(parents) >= 16


def test_the_shipped_model_proposes_valid_workflows():
  """Real weights, real sampler: most proposals for the seed pass the check, and they differ."""
  from awf.config_io import load_config, resolve_paths
  from awf.policy import QwenPolicy
  from awf.search.compact import compact_prompt
  from awf.types import SamplingParams

  config = load_config("configs/quickstart.py:smoke")
  policy = QwenPolicy.from_config(resolve_paths(config))
  ids = policy.prompt_ids([{"role": "user", "content": compact_prompt(seed_source("math"), 0.1)}])
  request = policy.request(ids, SamplingParams(1.0, max_new_tokens=192), 7, 16, 0)
  (outputs,) = policy.engine.generate([request])
  texts = [policy.completion(request, output).text for output in outputs]
  policy.close()
  edits = [parse_reply(text) for text in texts]
  valid = [e.source for e in edits if not isinstance(e, Failure)]
  valid = [s for s in valid if static_check(s, OPERATORS_BY_TYPE["math"]) is None]
  assert len(valid) >= 10
  assert len({canonical(s) for s in valid}) >= 6


def test_model_card_has_its_tables():
  card = (ROOT / "data/nano/README.md").read_text()
  assert "@@" not in card
  table = re.search(r"\| method \|.*\n\|[-|]+\n((?:\|.*\n)+)", card).group(1)
  assert {row.split("|")[1].strip() for row in table.splitlines()} >= {"terse", "steps", "program"}
  size = sum(p.stat().st_size for p in (ROOT / "data/nano").rglob("*") if p.is_file())
  assert size <= 16 * 2**20
