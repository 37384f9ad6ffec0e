"""The nano model's training text: executor calls in the operators' own prompts, and proposals.

`make_corpus(tokens)` yields (prompt messages, response) pairs in a fixed order for a seed. No reserved problem
(`families.problem_sets`) occurs in it, whatever its phrasing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from awf.search.compact import compact_prompt
from awf.types import WorkflowSource
from awf.workflow import prompts
from data.nano import families, proposals
from data.nano.families import FAMILIES, Item, make_slip

SLIP = {"steps": 0.16, "careful": 0.11}  # probability of a slip in each line of a worked solution
POLICY_SHARE = 0.25  # share of examples that are proposals (about 39 % of the tokens)
SPLITS_HELD_OUT = ("validation", "test", "card")


def terse(item: Item) -> str:
  return f"<answer>{item.answer}</answer>"


def worked(item: Item, r: random.Random, probability: float) -> str:
  lines, answer = item.work(make_slip(r, probability))
  return "\n".join(lines) + f"\n<answer>{answer}</answer>"


def program(item: Item) -> str:
  body = "\n".join("    " + line for line in item.program or ("return None",))
  return f"```python\ndef solve():\n{body}\n```"


def instructed(item: Item, r: random.Random, kind: str) -> str:
  """What the executor answers to an instruction of this kind; "" is no instruction."""
  if kind in SLIP:
    return worked(item, r, SLIP[kind])
  return terse(item)


def custom_example(item: Item, r: random.Random) -> tuple[str, str]:
  """One Custom call: an instruction of a random kind, and sometimes a draft in the input."""
  kind = r.choice(("", "steps", "steps", "steps", "steps", "careful", "careful", "short", "role"))
  text = item.question
  instruction = r.choice(proposals.INSTRUCTIONS[kind]) + "\n" if kind else ""
  if r.random() < 0.12:
    draft_kind = r.choice(("", "steps", "careful"))
    text += "\nDraft: " + instructed(item, r, draft_kind)
    check = r.choice(proposals.CHECK)
    steps = "Give the final" not in check and "Compare" not in check
    return prompts.custom(check + "\n", text), (
      worked(item, r, SLIP["steps"]) if steps else terse(item)
    )
  return prompts.custom(instruction, text), instructed(item, r, kind)


def program_example(item: Item, r: random.Random) -> tuple[str, str]:
  analysis, feedback = "None", ""
  if r.random() < 0.2:
    analysis = instructed(item, r, r.choice(("", "steps", "careful", "short")))
  if r.random() < 0.05:
    feedback = r.choice(
      ("SyntaxError: invalid syntax", "NameError: name 'b' is not defined", "no code")
    )
  return prompts.programmer(item.question, analysis, feedback), program(item)


def ensemble_example(item: Item, r: random.Random) -> tuple[str, str]:
  """A tie: the model names one letter, and learns no rule to prefer one (it cannot tell them apart)."""
  solutions = [worked(item, r, 0.3) for _ in range(r.randint(2, 5))]
  letter = chr(65 + r.randrange(len(solutions)))
  text = prompts.sc_ensemble(solutions, item.question)
  return text, f"<thought>It agrees with most.</thought>\n<solution_letter>{letter}</solution_letter>"


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


def make_corpus(examples: int, seed: int = 1) -> Iterator[tuple[str, str]]:
  """Yields (user message, reply) pairs."""
  r = random.Random(seed)
  sets = families.problem_sets()
  reserved = {(i.family, i.key) for name in SPLITS_HELD_OUT for i in sets[name]}
  makers = list(FAMILIES.values())
  made = 0
  while made < examples:
    if r.random() < POLICY_SHARE:
      yield proposal_example(r)
    else:
      item = r.choice(makers)(r)
      if (item.family, item.key) in reserved:
        continue
      draw = r.random()
      if draw < 0.62:
        yield custom_example(item, r)
      elif draw < 0.98:
        yield program_example(item, r)
      else:
        yield ensemble_example(item, r)
    made += 1


def held_out_parents(count: int, seed: int) -> list[WorkflowSource]:
  """Distinct random parents for starts and comparisons."""
  r, states = random.Random(seed), []
  while len(states) < count:
    state = proposals.random_state(r)
    if state not in states:
      states.append(state)
  return [proposals.render(s) for s in states]
