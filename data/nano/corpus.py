"""The nano model's training text: executor calls in the operators' own prompts, and proposals.

`make_corpus(phase)` yields (user message, reply) pairs, a function of the phase alone. No reserved
problem (`problem_sets`) occurs in it, whatever its phrasing.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator

from awf.search.compact import compact_prompt
from awf.types import WorkflowSource
from awf.workflow import prompts
from data.nano import families, proposals
from data.nano.families import FAMILIES, Item, make_slip


@dataclasses.dataclass(frozen=True)
class Phase:
  """One phase of the cold start: seed, numbers, shares of the kinds of examples, slips."""

  seed: int
  wide: bool  # larger numbers
  policy: float  # share of examples that are proposals
  custom: float  # shares of the other examples; the rest are ties of ScEnsemble
  program: float
  drill: float
  steps_slip: float  # probability of a slip in each line of a worked solution
  careful_slip: float  # the same when care was asked for


# Phase 1 learns to read, to copy and to write programs and proposals; phase 2 learns to calculate,
# with the numbers of the shipped problems.
PHASES = {
  1: Phase(1, True, 0.25, 0.62, 0.36, 0.0, 0.16, 0.11),
  2: Phase(2, False, 0.15, 0.46, 0.17, 0.35, 0.12, 0.07),
}
EXAMPLES = 150_000  # of a phase


def terse(item: Item) -> str:
  return f"<answer>{item.answer}</answer>"


def worked(item: Item, r: random.Random, probability: float) -> str:
  lines, answer = item.work(make_slip(r, probability))
  return "\n".join(lines) + f"\n<answer>{answer}</answer>"


def program(item: Item) -> str:
  body = "\n".join("    " + line for line in item.program or ("return None",))
  return f"```python\ndef solve():\n{body}\n```"


def instructed(item: Item, r: random.Random, kind: str, phase: Phase) -> str:
  """What the executor answers to an instruction of this kind; "" is no instruction."""
  if kind == "steps":
    return worked(item, r, phase.steps_slip)
  return worked(item, r, phase.careful_slip) if kind == "careful" else terse(item)


def custom_example(item: Item, r: random.Random, phase: Phase) -> tuple[str, str]:
  """One Custom call: an instruction of a random kind, and sometimes a draft in the input."""
  kind = r.choice(("", "steps", "steps", "steps", "steps", "careful", "careful", "short", "role"))
  text = item.question
  instruction = r.choice(proposals.INSTRUCTIONS[kind]) + "\n" if kind else ""
  if r.random() < 0.12:
    draft_kind = r.choice(("", "steps", "careful"))
    text += "\nDraft: " + instructed(item, r, draft_kind, phase)
    check = r.choice(proposals.CHECK)
    steps = "Give the final" not in check and "Compare" not in check
    return prompts.custom(check + "\n", text), (
      worked(item, r, phase.steps_slip) if steps else terse(item)
    )
  return prompts.custom(instruction, text), instructed(item, r, kind, phase)


def program_example(item: Item, r: random.Random, phase: Phase) -> tuple[str, str]:
  analysis, feedback = "None", ""
  if r.random() < 0.2:
    analysis = instructed(item, r, r.choice(("", "steps", "careful", "short")), phase)
  if r.random() < 0.05:
    feedback = r.choice(
      ("SyntaxError: invalid syntax", "NameError: name 'b' is not defined", "no code")
    )
  return prompts.programmer(item.question, analysis, feedback), program(item)


def drill_example(item: Item, r: random.Random, phase: Phase) -> tuple[str, str]:
  """Single lines of worked solutions, all right, in any order: arithmetic without a story."""
  lines = list(item.work(lambda value: value)[0])
  while len(lines) < 8:
    other = r.choice(list(FAMILIES.values()))(r, phase.wide)
    lines += other.work(lambda value: value)[0]
  r.shuffle(lines)
  lines = [line.split(": ")[-1] for line in lines[:8]]
  asked = "\n".join(line.split("=")[0] for line in lines)
  return "Compute each line.\n" + asked, "\n".join(lines)


def ensemble_example(item: Item, r: random.Random) -> tuple[str, str]:
  """A tie: the model names one letter, and learns no rule to prefer one (it cannot tell them
  apart).
  """
  solutions = [worked(item, r, 0.3) for _ in range(r.randint(2, 5))]
  letter = chr(65 + r.randrange(len(solutions)))
  text = prompts.sc_ensemble(solutions, item.question)
  return (
    text,
    f"<thought>It agrees with most.</thought>\n<solution_letter>{letter}</solution_letter>",
  )


def plausible_score(s: proposals.State, r: random.Random) -> float:
  """A score that such a workflow could have had; noisy, for the prompt only."""
  kind = proposals.KIND_OF.get(s.instruction, "")
  call = {"steps": 0.55, "careful": 0.62}.get(kind, 0.18) + (0.1 if s.votes > 1 else 0.0)
  base = {"none": call, "only": 0.6, "first": 0.6 + 0.33 * call, "analysed": 0.6 + 0.33 * call}
  return min(1.0, max(0.0, base[s.program] + r.gauss(0, 0.12)))


def proposal_prompt(s: proposals.State, r: random.Random) -> str:
  """The compact proposal prompt for a parent, with a random past of evaluated children."""
  experience = []
  for _ in range(r.choice((0, 0, 0, 1, 2, 4, 8))):
    text, child = proposals.propose(s, r)
    failed = r.random() < 0.08
    experience.append(f"{text} -> failed: crash" if failed else
                      f"{text} -> {plausible_score(child, r):.2f}")  # fmt: skip
  return compact_prompt(proposals.render(s), plausible_score(s, r), experience)


def proposal_example(r: random.Random) -> tuple[str, str]:
  state = proposals.random_state(r)
  for _ in range(r.choice((0, 0, 1, 2))):  # parents deeper in a tree
    state = proposals.propose(state, r)[1]
  text, child = proposals.propose(state, r)
  return proposal_prompt(state, r), proposals.reply(text, proposals.render(child))


def make_corpus(phase: int, examples: int = EXAMPLES) -> Iterator[tuple[str, str]]:
  """Yields (user message, reply) pairs."""
  for _, pair in _make(phase, examples):
    yield pair


def _make(phase: int, examples: int) -> Iterator[tuple[Item | None, tuple[str, str]]]:
  """Pairs with the problem that each is about (None for a proposal)."""
  chosen = PHASES[phase]
  r = random.Random(chosen.seed)
  reserved = reserved_keys(phase)
  makers = list(FAMILIES.values())
  made = 0
  while made < examples:
    if r.random() < chosen.policy:
      yield None, proposal_example(r)
    else:
      item = r.choice(makers)(r, chosen.wide)
      if (item.family, item.key) in reserved:
        continue
      draw = r.random()
      if draw < chosen.custom:
        yield item, custom_example(item, r, chosen)
      elif draw < chosen.custom + chosen.program:
        yield item, program_example(item, r, chosen)
      elif draw < chosen.custom + chosen.program + chosen.drill:
        yield item, drill_example(item, r, chosen)
      else:
        yield item, ensemble_example(item, r)
    made += 1


@functools.cache
def reserved_keys(phase: int) -> frozenset[tuple]:
  """(family, key) of the problems that a phase must not meet."""
  sets = problem_sets(phase)
  return frozenset((i.family, i.key) for items in sets.values() for i in items)


@functools.cache
def problem_sets(phase: int = 2) -> dict[str, list[Item]]:
  """The reserved problems of a phase; those of phase 2 are the shipped ones, new to phase 1 as
  well.

  `power` and `squares` have few problems, all but the reserved ones met in phase 1: there phase 2
  keeps them.
  """
  first = families.problem_sets(wide=True)
  if phase == 1:
    return first
  seen = frozenset((i.family, i.key) for i, _ in _make(1, EXAMPLES) if i is not None)
  second = families.problem_sets(
    seed=12, seen={key for key in seen if key[0] not in ("power", "squares")}
  )
  same = ("power", "squares")
  return {
    name: [i for i in first[name] if i.family in same]
    + [i for i in second[name] if i.family not in same]
    for name in first
  }


def held_out_parents(count: int, seed: int) -> list[WorkflowSource]:
  """Distinct random parents for starts and comparisons."""
  r, states = random.Random(seed), []
  while len(states) < count:
    state = proposals.random_state(r)
    if state not in states:
      states.append(state)
  return [proposals.render(s) for s in states]
