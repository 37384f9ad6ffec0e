"""Random workflows and random one- or two-step edits of them, in AFlow's proposal format.

A `State` is what the workflow does; `render` writes it as AFlow graph and prompt text,
`read_state` reads it back.
Good and bad edits are equally likely: which ones help is for the search and GRPO to find out.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable

from awf.types import WorkflowSource

# Instructions by what they make the nano executor do (data/nano/corpus.py trains exactly this).
STEPS = (
  "Think step by step.", "Solve it in small steps.", "Work it out line by line.",
  "Show your work, then answer.", "Go through it one step at a time.", "Break it into steps.",
  "Write down each step first.", "Reason in steps before you answer.", "Explain how you get there.",
  "Do the sums one after the other.", "List the steps of your solution.", "Solve slowly, in steps.",
)  # fmt: skip
CAREFUL = (
  "Write every calculation on its own line and check it.", "Compute each step twice.",
  "Do each step with care and verify it.", "Work in steps and check every result.",
  "Solve step by step, double-check each line.", "Be exact: one checked calculation a line.",
)  # fmt: skip
SHORT = (
  "Answer with one number.", "Reply with the number only.", "Give only the result.",
  "No explanation, just the answer.", "Be brief.", "One number, nothing else.",
  "State the answer at once.", "Do not show any steps.", "Answer fast.", "Keep it short.",
)  # fmt: skip
ROLE = (
  "You are a friendly teacher.", "You are a famous poet.", "Be polite.", "You are good at numbers.",
  "Take the role of a clerk.", "Trust your feeling.", "Read the question.", "Here is a question.",
  "You are an expert.", "Guess if you must.",
)  # fmt: skip
CHECK = (
  "Check the draft and give the right answer.", "Is the draft right? Answer again.",
  "Correct the draft.", "Look at the draft and solve it in steps.", "Repair the draft if needed.",
  "Give the final answer of the draft.", "Compare with the draft.", "Use the draft to answer.",
)  # fmt: skip
INSTRUCTIONS = {"steps": STEPS, "careful": CAREFUL, "short": SHORT, "role": ROLE}
KIND_OF = {text: kind for kind, texts in INSTRUCTIONS.items() for text in texts}

VOTES = (1, 3, 5, 7)
PROGRAMS = ("none", "first", "only", "analysed")


@dataclasses.dataclass(frozen=True)
class State:
  """What a workflow does: instruction of the call, number of votes, use of a program, second
  pass.
  """

  instruction: str = ""
  votes: int = 1
  program: str = "none"  # none; first (fall back to calls); only; analysed (call, then program)
  tries: int = 1  # programs that vote, for "only"
  check: str = ""  # instruction of a second pass over the draft

  def normal(self) -> State:
    """Drops what the chosen use of a program makes unreachable."""
    s = self
    if s.program == "only":
      s = dataclasses.replace(s, votes=1, check="", instruction="")
    else:
      s = dataclasses.replace(s, tries=1)
    if s.program == "analysed":
      s = dataclasses.replace(s, votes=1, check="")
    return s


def random_state(r: random.Random) -> State:
  """A start or parent workflow, good or bad."""
  kind = r.choice(("", "", "steps", "short", "role", "careful"))
  return State(
    instruction=r.choice(INSTRUCTIONS[kind]) if kind else "",
    votes=r.choice((1, 1, 3, 5)),
    program=r.choice(("none", "none", "none", "first", "only", "analysed")),
    tries=r.choice((1, 1, 3)),
    check=r.choice(CHECK) if r.random() < 0.2 else "",
  ).normal()


def render(s: State) -> WorkflowSource:
  """AFlow's graph and prompt text of a state."""
  ops, body = ["self.custom = operator.Custom(self.llm)"], []
  usage = 'self.llm.get_usage_summary()["total_cost"]'
  instruction = "prompt_custom.SOLVE_PROMPT" if s.instruction else '""'
  if s.program != "none":
    ops.append("self.programmer = operator.Programmer(self.llm)")
  if s.votes > 1 or s.tries > 1:
    ops.append("self.sc_ensemble = operator.ScEnsemble(self.llm)")
  call = f"await self.custom(input=problem, instruction={instruction})"
  if s.program == "only" and s.tries == 1:
    body += ["program = await self.programmer(problem=problem)",
             f"return program['output'], {usage}"]  # fmt: skip
  elif s.program == "only":
    body += ["solutions = []", f"for _ in range({s.tries}):",
             "    program = await self.programmer(problem=problem)",
             "    solutions.append(program['output'])",
             "solution = await self.sc_ensemble(solutions=solutions, problem=problem)",
             f"return solution['response'], {usage}"]  # fmt: skip
  elif s.program == "analysed":
    body += [f"solution = {call}",
             "program = await self.programmer(problem=problem, analysis=solution['response'])",
             f"return program['output'] or solution['response'], {usage}"]  # fmt: skip
  else:
    if s.program == "first":
      body += ["program = await self.programmer(problem=problem)", "if program['output']:",
               f"    return program['output'], {usage}"]  # fmt: skip
    if s.votes > 1:
      body += [
        "solutions = []",
        f"for _ in range({s.votes}):",
        f"    solution = {call}",
        "    solutions.append(solution['response'])",
        # fmt: skip
        "solution = await self.sc_ensemble(solutions=solutions, problem=problem)",
      ]
    else:
      body += [f"solution = {call}"]
    if s.check:
      body += [
        "draft = problem + \"\\nDraft: \" + solution['response']",
        # fmt: skip
        "solution = await self.custom(input=draft, instruction=prompt_custom.CHECK_PROMPT)",
      ]
    body += [f"return solution['response'], {usage}"]
  lines = [
    "class Workflow:",
    "    def __init__(self, name: str, llm_config, dataset: DatasetType) -> None:",
    "        self.name = name",
    "        self.dataset = dataset",
    "        self.llm = create_llm_instance(llm_config)",
    *("        " + op for op in ops),
    "",
    "    async def __call__(self, problem: str):",
    *("        " + line for line in body),
  ]
  prompts = []
  if s.instruction:
    prompts.append(f'SOLVE_PROMPT = """{s.instruction}\n"""')
  if s.check:
    prompts.append(f'CHECK_PROMPT = """{s.check}\n"""')
  return WorkflowSource("\n".join(lines), "\n".join(prompts) or "# no prompt is used")


def read_state(source: WorkflowSource) -> State | None:
  """The state that renders to this text, or None when no state does."""
  constants = dict(re.findall(r'(\w+) = """(.*?)\n"""', source.prompt, re.DOTALL))
  graph = source.graph
  loops = re.findall(r"range\((\d+)\)", graph)
  only = "solutions.append(program['output'])" in graph
  program = "none"
  if "analysis=solution" in graph:
    program = "analysed"
  elif "if program['output']:" in graph:
    program = "first"
  elif "self.programmer(" in graph:
    program = "only"
  n = int(loops[0]) if loops else 1
  state = State(
    instruction=constants.get("SOLVE_PROMPT", ""),
    votes=1 if only else n,
    program=program,
    tries=n if only else 1,
    check=constants.get("CHECK_PROMPT", ""),
  )
  same = render(state)
  strip = lambda text: re.sub(r"\s+", " ", text).strip()  # noqa: E731
  return state if strip(same.graph) == strip(graph) else None


# Each edit: (name, applies to a state, descriptions, new state).
Edit = tuple[str, Callable[[State], bool], tuple[str, ...], Callable[[State, random.Random], State]]


def _to(kind: str) -> Callable[[State, random.Random], State]:
  return lambda s, r: dataclasses.replace(s, instruction=r.choice(INSTRUCTIONS[kind]))


def _set(**fields) -> Callable[[State, random.Random], State]:
  return lambda s, r: dataclasses.replace(s, **fields)


def _calls(s: State) -> bool:  # the workflow's answer comes from calls that an edit can change
  return s.program in ("none", "first")


EDITS: tuple[Edit, ...] = (
  ("steps", lambda s: s.program != "only" and KIND_OF.get(s.instruction) != "steps",
   ("Ask for steps.", "Let the model reason in steps."), _to("steps")),
  ("careful", lambda s: s.program != "only" and KIND_OF.get(s.instruction) != "careful",
   ("Ask for checked steps.", "Demand care in every step."), _to("careful")),
  ("short", lambda s: s.program != "only" and KIND_OF.get(s.instruction) != "short",
   ("Ask for a short answer.", "Make the reply brief."), _to("short")),
  ("role", lambda s: s.program != "only" and KIND_OF.get(s.instruction) != "role",
   ("Set another tone.", "Give the model a role."), _to("role")),
  ("bare", lambda s: s.program != "only" and s.instruction != "",
   ("Drop the instruction.",), _set(instruction="")),
  ("vote3", lambda s: _calls(s) and s.votes != 3, ("Vote over three answers.",), _set(votes=3)),
  ("vote5", lambda s: _calls(s) and s.votes != 5, ("Vote over five answers.",), _set(votes=5)),
  ("vote7", lambda s: _calls(s) and s.votes != 7, ("Vote over seven answers.",), _set(votes=7)),
  ("once", lambda s: _calls(s) and s.votes > 1, ("Ask only once.",), _set(votes=1)),
  ("first", lambda s: s.program != "first",
   ("Try a program first.", "Run a program, fall back to a call."), _set(program="first")),
  ("only", lambda s: s.program != "only",
   ("Rely on a program alone.",), _set(program="only", tries=1)),
  ("programs3", lambda s: not (s.program == "only" and s.tries == 3),
   ("Let three programs vote.",), _set(program="only", tries=3)),
  ("analysed", lambda s: s.program != "analysed",
   ("Write a program after a first analysis.",), _set(program="analysed")),
  ("none", lambda s: s.program != "none", ("Remove the program.",), _set(program="none")),
  ("check", lambda s: _calls(s) and not s.check,
   ("Add a second pass over the draft.",),
   lambda s, r: dataclasses.replace(s, check=r.choice(CHECK))),
  ("uncheck", lambda s: _calls(s) and s.check != "", ("Remove the second pass.",), _set(check="")),
)  # fmt: skip
NAME_OF = {text: name for name, _, texts, _ in EDITS for text in texts}


def propose(s: State, r: random.Random) -> tuple[str, State]:
  """A random edit of one or two steps: (description, new state), always different from `s`."""
  while True:
    state, texts, touched = s, [], set()
    for _ in range(r.choice((1, 2, 2, 2))):
      open_edits = [e for e in EDITS if e[1](state) and _AXIS[e[0]] not in touched]
      if not open_edits:
        break
      axis = r.choice(sorted({_AXIS[e[0]] for e in open_edits}))
      touched.add(axis)
      _, _, descriptions, change = r.choice([e for e in open_edits if _AXIS[e[0]] == axis])
      state = change(state, r)
      texts.append(r.choice(descriptions))
    if state.normal() != s and agrees(" ".join(texts), s, state.normal()):
      return " ".join(texts), state.normal()


_AXIS = {
  **dict.fromkeys(("steps", "careful", "short", "role", "bare"), "instruction"),
  **dict.fromkeys(("vote3", "vote5", "vote7", "once"), "votes"),
  **dict.fromkeys(("first", "only", "programs3", "analysed", "none"), "program"),
  **dict.fromkeys(("check", "uncheck"), "check"),
}


def agrees(modification: str, before: State, after: State) -> bool:
  """Whether the description names exactly the edits that lead from `before` to `after`.

  What a change of the program's use makes unreachable (`State.normal`) may go without being named.
  """
  names = [NAME_OF.get(text.strip()) for text in re.findall(r"[^.]+\.", modification)]
  if not names or None in names:
    return False
  edits = {name: change for name, _, _, change in EDITS}
  state = before
  for name in names:
    state = edits[name](state, random.Random(0))
    if _AXIS[name] == "instruction" and name != "bare":
      if KIND_OF.get(after.instruction) != name:
        return False
      state = dataclasses.replace(state, instruction=after.instruction)
    if name == "check":
      if after.check not in CHECK:
        return False
      state = dataclasses.replace(state, check=after.check)
  return state.normal() == after


def reply(modification: str, source: WorkflowSource) -> str:
  """The reply format that awf.search.propose parses."""
  return (
    f"<modification>{modification}</modification>\n<graph>\n{source.graph}\n</graph>\n"
    f"<prompt>\n{source.prompt}\n</prompt>"
  )
