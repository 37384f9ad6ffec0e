"""The optimiser's prompt for a node, and the parser of its reply.

What builds the prompt never receives an expected answer, reference code or verdict text.
"""

from __future__ import annotations

import dataclasses
import random
import re
import textwrap
from collections.abc import Mapping, Sequence

from awf.search.compact import compact_prompt
from awf.search.text import excerpt, forbidden, neutralise, one_line, without_chat_tokens
from awf.search.tree import LogEntry, Node
from awf.types import Failure, Problem, WorkflowSource
from awf.workflow.contract import (
  MAX_GRAPH_CHARS,
  MAX_PROMPT_CHARS,
  OPERATORS_BY_TYPE,
  SEED_PROMPT,
  allowed_operators,
  describe,
  strip_header,
)

STYLES = ("full", "compact")

_THINKING = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[\w+-]*[ \t]*")
MAX_REPLY_CHARS = 64_000  # of a reply without its thoughts: twice what the three elements may hold
QUESTION_CHARS = 600  # of a failed problem
FULL_RULES = """\
You improve a workflow: Python code that solves {kind} problems with calls to a language model.
Its score is the share of validation problems that it answers correctly, at most 1.

Rules
- Change one thing, in a few lines of code or in the prompts. Keep what works. The result must
  differ from the workflow above and from every edit already tried.
- The class is called Workflow. Its constructor is
  __init__(self, name: str, llm_config, dataset: DatasetType); it sets
  self.llm = create_llm_instance(llm_config) and builds each operator as operator.NAME(self.llm).
- Its answer comes from {call}, which returns the pair
  (answer, self.llm.get_usage_summary()["total_cost"]). Every operator call is awaited.
- `operator`, `prompt_custom`, `create_llm_instance` and `DatasetType` are there already. Import
  what else you need, from Python's standard library only.
- Custom joins instruction and input as they are: an instruction stands before the input, and
  placeholders in it are not filled. Prompts are constants of the prompt module, used as
  prompt_custom.NAME; define all that the code uses, and no others.
- The workflow must work for every problem of the data set: no answers to single problems.
- Useful ideas: better instructions, an ensemble over several answers, a program, a review and a
  revision of the answer, a loop until two answers agree, operators that are not used yet.

Reply with exactly these three elements: the edit in one line, the whole class, the whole prompt
module. No Markdown fences.
<modification>one line that names the change</modification>
<graph>
class Workflow:
    ...
</graph>
<prompt>
NAME = \"\"\"...\"\"\"
</prompt>"""


@dataclasses.dataclass(frozen=True)
class Edit:
  """A parsed proposal."""

  modification: str  # one inert line
  source: WorkflowSource


def experience_lines(children: Sequence[Node], limit: int) -> list[str]:
  """The newest `limit` children, a line each: `MODIFICATION -> 0.48` or `-> failed: KIND`."""
  lines = []
  for node in children:
    if node.evaluated:
      lines.append(f"{one_line(node.modification)} -> {node.score:.2f}")
    elif node.failure is not None and node.failure.kind != "infrastructure":
      lines.append(f"{one_line(node.modification)} -> failed: {node.failure.kind}")
  return lines[-limit:] if limit > 0 else []


def _question(problem: Problem) -> str:
  """What is asked; of a long text both ends, as its question stands behind the passages."""
  text = str(problem.hidden.get("question", problem.prompt))
  if len(text) <= QUESTION_CHARS:
    return excerpt(text, QUESTION_CHARS)
  half = QUESTION_CHARS // 2
  return f"{excerpt(text, half)}\n{excerpt(text, half, tail=True)}"


def log_text(
  log: Sequence[LogEntry], problems: Mapping[str, Problem], count: int, rng: random.Random
) -> str:
  """Up to `count` failed problems: the question, the wrong answer, what was read in it."""
  shown = []
  for entry in rng.sample(list(log), min(count, len(log))):
    lines = [f"Question: {_question(problems[entry.problem])}"]
    lines.append(f"Wrong answer of the workflow: {excerpt(entry.output, 400, tail=True)}")
    if entry.extracted:
      lines.append(f"Read as: {one_line(entry.extracted, 80)}")
    shown.append("\n".join(lines))
  return "\n\n".join(shown)


def proposal_messages(
  node: Node,
  experience: Sequence[str],
  logs: str,
  *,
  style: str,
  question_type: str,
  operators: tuple[str, ...] = (),
) -> list[dict[str, str]]:
  """The chat messages that ask for an edit of `node`; `operators` are offered beside its own, ()
  those of the question type."""
  prompt = neutralise(node.source.prompt).strip() or SEED_PROMPT
  source = WorkflowSource(neutralise(node.source.graph), prompt)
  shown = compact_prompt(source, node.score, experience, logs)
  if style == "full":
    call = "async __call__(self, problem: str)"
    if question_type == "code":
      call = "async __call__(self, problem: str, entry_point: str)"
    offered = operators or OPERATORS_BY_TYPE[question_type]
    listed = describe(allowed_operators(offered, node.source.graph))
    rules = FULL_RULES.format(kind=question_type, call=call)
    shown = f"{shown}\n<operators>\n{listed}\n</operators>\n\n{rules}"
    if experience:
      shown += "\n\nThe experience lists edits that were tried, each with the score it reached."
    if logs:
      shown += "\nThe logs show some of the problems that it got wrong."
  return [{"role": "user", "content": shown}]


def repair_messages(
  messages: Sequence[dict[str, str]], reply: str, failure: Failure
) -> list[dict[str, str]]:
  """The chat so far, the reply, and what was wrong with it."""
  asked = (
    f"This edit does not work: {one_line(failure.message, 300)}\n"
    "Repair it and reply with the three elements again, whole: modification, graph, prompt."
  )
  shown = without_chat_tokens(_THINKING.sub("", reply))
  return [
    *messages,
    {"role": "assistant", "content": shown},
    {"role": "user", "content": asked},
  ]


def _element(text: str, tag: str) -> str | None:
  """The last complete element, or None; in time that grows with the text, not with its square."""
  found, end = None, 0
  while (start := text.find(f"<{tag}>", end)) >= 0:
    start += len(tag) + 2
    end = text.find(f"</{tag}>", start)
    if end < 0:
      break
    found, end = text[start:end], end + len(tag) + 3
  return found


def _code(text: str) -> str:
  """The text without Markdown fences around it and without common indentation."""
  first, newline, rest = text.strip().partition("\n")
  if newline and rest.endswith("```") and _FENCE.fullmatch(first):
    text = rest[:-3].rstrip(" \t")
  text = text.strip("\n").rstrip()
  return textwrap.dedent(text) if text[:1].isspace() else text


def modification_of(text: str) -> str:
  """The one-line description in a reply, also in one that does not parse; "" when there is none."""
  return one_line(_element(_THINKING.sub("", text), "modification") or "")


def parse_reply(text: str) -> Edit | Failure:
  """Reads a proposal: the last complete `modification`, `graph` and `prompt` element each.

  Tolerated: text around the elements, Markdown fences inside them, AFlow's import header. Not
  tolerated, as descendants would be shown it: format tags and chat-template tokens inside.
  """
  text = _THINKING.sub("", text)
  if len(text) > MAX_REPLY_CHARS:
    return Failure("format", f"the reply has {len(text)} characters, at most {MAX_REPLY_CHARS}")
  parts = {tag: _element(text, tag) for tag in ("modification", "graph", "prompt")}
  missing = [tag for tag, part in parts.items() if part is None]
  if missing:
    return Failure("format", f"no complete <{missing[0]}> element in the reply")
  modification = one_line(parts["modification"] or "")
  graph = strip_header(_code(parts["graph"] or ""))
  prompt = _code(parts["prompt"] or "")
  for tag, part in (("modification", modification), ("graph", graph)):
    if not part.strip():
      return Failure("format", f"the <{tag}> element is empty")
  for tag, part, cap in (("graph", graph, MAX_GRAPH_CHARS), ("prompt", prompt, MAX_PROMPT_CHARS)):
    if len(part) > cap:
      return Failure("format", f"the <{tag}> element has {len(part)} characters, at most {cap}")
    bad = forbidden(part)
    if bad:
      return Failure("format", f"the <{tag}> element holds {bad}, which is reserved")
  return Edit(modification, WorkflowSource(graph, prompt))
