"""Fuzzes what reads a proposal: the reply's parser, the static check, the canonical form.

  python tests/fuzz_proposals.py --inputs=100000 --seed=0

Inputs: mutations of workflows in AFlow's form (the shipped starts and parents, AFlow's seeds),
programs of a grammar, random bytes, deep nesting, huge literals, long runs of one character, and
texts made to be read in quadratic time. Nothing may raise, and no input may take more than 50 ms of
processor time. The last line is JSON: inputs by kind, how they ended, the longest time, failures.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from awf.search.compact import compact_prompt  # noqa: E402
from awf.search.config import load_starts  # noqa: E402
from awf.search.propose import Edit, modification_of, parse_reply  # noqa: E402
from awf.search.stages import key_of  # noqa: E402
from awf.search.text import neutralise, one_line  # noqa: E402
from awf.types import Failure, WorkflowSource  # noqa: E402
from awf.workflow.contract import ALL_OPERATORS, seed_source  # noqa: E402
from awf.workflow.static import static_check  # noqa: E402

LIMIT = 0.050  # seconds of processor time for one input
TRIES = 5  # the fastest counts: a machine with other work has caches that others have emptied
MEMORY = 2 << 30  # bytes of address space that the command may take


def read(text: str) -> str:
  """All that the search does with a reply before it runs anything; how it ended."""
  modification_of(text)
  edit = parse_reply(text)
  if isinstance(edit, Failure):
    one_line(edit.message)
    return "format"
  assert isinstance(edit, Edit)
  failure = static_check(edit.source, ALL_OPERATORS, False)
  if failure is not None:
    assert failure.kind in ("format", "policy") and "\n" not in failure.message
    return "static"
  key_of(edit.source)
  compact_prompt(edit.source, 0.5, [edit.modification], "")
  neutralise(edit.source.graph)
  return "valid"


def reply(source: WorkflowSource, modification: str = "Change it.") -> str:
  return (
    f"<modification>{modification}</modification>\n<graph>\n{source.graph}\n</graph>\n"
    f"<prompt>\n{source.prompt}\n</prompt>"
  )


class Fuzzer:
  """Makes inputs; a function of its seed.

  Attributes:
    kinds: name -> maker of one input.
  """

  def __init__(self, seed: int):
    self.rng = random.Random(seed)
    starts = [*load_starts(str(ROOT / "data/nano/starts.jsonl"))]
    starts += load_starts(str(ROOT / "data/nano/parents.jsonl"))
    self.sources = [*starts, *(seed_source(kind) for kind in ("math", "qa", "code"))]
    self.replies = [reply(source) for source in self.sources]
    self.kinds: dict[str, Callable[[], str]] = {
      "mutated": self.mutated,
      "grammar": lambda: reply(WorkflowSource(self.graph(), self.prompt())),
      "bytes": self.bytes,
      "nested": lambda: self.framed(self.nested()),
      "literals": lambda: self.framed(self.literal()),
      "runs": self.runs,
      "repeated": self.repeated,
    }

  def __call__(self) -> tuple[str, str]:
    """(kind, input)."""
    kind = self.rng.choice(list(self.kinds))
    return kind, self.kinds[kind]()

  def mutated(self) -> str:
    """A real proposal with a few edits: cut, doubled, moved, replaced, spliced with another."""
    text = self.rng.choice(self.replies)
    for _ in range(self.rng.choice((1, 1, 2, 3, 8))):
      text = self.edited(text)[:60_000]
    return text or " "

  def edited(self, text: str) -> str:
    i, j = sorted(self.rng.randrange(len(text) + 1) for _ in range(2))
    j = min(j, i + self.rng.choice((1, 4, 30, 300)))
    other = self.rng.choice(self.replies)
    k = self.rng.randrange(len(other))
    return self.rng.choice(
      (
        lambda: text[:i] + text[j:],
        lambda: text[:j] + text[i:j] * self.rng.choice((1, 2, 50)) + text[j:],
        lambda: text[:i] + self.token() + text[j:],
        lambda: text[:i] + other[k : k + j - i + 8] + text[j:],
        lambda: text.replace(text[i:j][:12] or "x", self.token()),
      )
    )()

  def token(self) -> str:
    rng = self.rng
    return rng.choice(
      (
        "await ", "self.", "operator.", "prompt_custom.X", "\x00", "\ufeff", "\ud800", "```py\n",
        "<|im_end|>", "</graph>", "<graph>", "<think>", "</think>", "lambda: ", "yield ", "(", ")",
        "]", "{", '"""', "'", "\\", "\t", "\r", "\x0c", "\u202e", "global x\n", "import os\n",
        "class Workflow:\n", "async def __call__(self, problem):\n", "match x:\n  case [*_]: 1\n",
        "*", "**", ":=", "if ", "...", "9" * rng.choice((5, 5_000)), "def f[T](x): pass\n", "é" * 9,
        "f'{x!r:{y}}'", "@", "->", "=", "try:\n", "  ", "\n", "_" * 200, "type X = int\n",
      )
    )  # fmt: skip

  def bytes(self) -> str:
    size = self.rng.choice((0, 1, 10, 100, 1_000))
    low, high = self.rng.choice(((0, 255), (32, 126), (0, 0x10FFFF), (9, 13)))
    text = "".join(map(chr, self.rng.choices(range(low, high + 1), k=size)))
    text *= self.rng.choice((1, 1, 15))
    return text if self.rng.random() < 0.5 else self.framed(text)

  def framed(self, text: str) -> str:
    """The text as graph, as prompt, in a method, or as the whole reply."""
    source = self.rng.choice(self.sources)
    inside = source.graph.replace("        return ", f"        x = {text}\n        return ", 1)
    return self.rng.choice(
      (
        lambda: reply(WorkflowSource(text, source.prompt)),
        lambda: reply(WorkflowSource(source.graph, text)),
        lambda: reply(WorkflowSource(source.graph, f"SOLVE_PROMPT = {text}")),
        lambda: reply(WorkflowSource(inside, source.prompt)),
        lambda: reply(source, text),
        lambda: text,
      )
    )()

  def nested(self) -> str:
    depth = self.rng.choice((5, 60, 90, 190, 2_000, 15_000))
    opened, closed = self.rng.choice(
      (
        ("(", ")"), ("[", "]"), ("{1:", "}"), ("-", ""), ("not ", ""), ("lambda:", ""), ("f(", ")"),
        ("x[", "]"), ("await ", ""), ("f'{", "}'"), ("1+", ""), ("1 if x else ", ""), ("x.y", ""),
        ("(yield ", ")"), ("<graph>", "</graph>"), ("<think>", "</think>"), ("<", ">"),
      )
    )  # fmt: skip
    if self.rng.random() < 0.2:
      return "\n".join(" " * i + "if x:" for i in range(min(depth, 150)))
    return opened * depth + "1" + closed * depth

  def literal(self) -> str:
    n = self.rng.choice((100, 4_000, 15_000, 200_000))
    return self.rng.choice(
      (
        lambda: "9" * n, lambda: "0x" + "f" * n, lambda: "1e" + "9" * min(n, 4_000),
        lambda: "'" + "a" * n + "'", lambda: "b'" + "\\x00" * (n // 4) + "'", lambda: "9**9**9**9",
        lambda: "'x'*10**9", lambda: "(1,)*10**8", lambda: "1<<10**9", lambda: "[" + "1," * n + "]",
        lambda: "'\\N{BULLET}'" * (n // 20), lambda: "f'" + "{x}" * (n // 3) + "'",
        lambda: "10**5000", lambda: "1_" * n + "1", lambda: "0b" + "1" * n, lambda: "1j" * n,
        lambda: "''" * n, lambda: "+".join(["'a'"] * (n // 4)), lambda: "\\\n" * n,
      )
    )()  # fmt: skip

  def runs(self) -> str:
    """A long run of one character or tag, where something looks for an end."""
    n = self.rng.choice((1_000, 15_000, 120_000))
    units = (" ", "\n", "\t", "<", "<think>", "<graph>", "```", "``` ", "<|", "</", "-", "<score ")
    units += ("<prompt>\n", " \n", "\u2028", "\\", "<modification>", "'")
    unit = self.rng.choice(units)
    run = unit * max(1, n // len(unit))
    return self.rng.choice((run, self.framed(run), "<graph>" + run, f"```\n{run}x```" + run))

  def repeated(self) -> str:
    """Many statements of one kind, up to the caps."""
    n = self.rng.choice((10, 100, 400, 1_500))
    lines = self.rng.choice(
      (
        "x{i} = self.custom(input=problem, instruction='')",
        "x{i} = await self.custom(input=x{j}, instruction=prompt_custom.A{i})",
        "x{i} = [x{j}, x{j}]", "x{i} = x{j}['response']", "x{i} = self.custom", "self.a{i} = 1",
        "def f{i}(): return x{j}", "await asyncio.gather(x{j}, self.custom(input=problem))",
        "if x{j}: x{i} = 1", "for x{i} in x{j}: pass", "del x{j}", "global x{i}", "import math",
        "return x{j}, x{i}", "solution['response'] = x{j}", "while x{j}: break",
        "x{i} = await self.sc_ensemble(solutions=[x{j}['response']], problem=problem)",
      )
    )  # fmt: skip
    body = "".join(f"        {lines.format(i=i, j=i - 1)}\n" for i in range(1, n))
    source = self.rng.choice(self.sources)
    graph = source.graph.replace("        return ", f"        x0 = 1\n{body}        return ", 1)
    constants = self.rng.choice(
      ("A{i} = A{j} + A{j}\n", "A{i} = [A{j}, A{j}]\n", "A{i} = f'{{A{j}}}{{A{j}}}'\n",
       "A{i} = 'x'\n", "A{i} = {{1: A{j}, 2: A{j}}}\n", "A{i} = A{j}.strip()\n",
       "A{i} = (A{j}, A{j}, 'y')\n")
    )  # fmt: skip
    prompt = "A0 = 'x'\n" + "".join(constants.format(i=i, j=i - 1) for i in range(1, n))
    return reply(WorkflowSource(graph, prompt + source.prompt))

  def prompt(self) -> str:
    names = ("SOLVE_PROMPT", "A", "B", "prompt_custom", "é")
    pick = self.rng.choice
    return "\n".join(
      f"{pick(names)} = {self.expression(self.rng.randrange(4))}"
      for _ in range(self.rng.randrange(6))
    )

  def graph(self) -> str:
    """A class of the right form whose bodies are made by a grammar."""
    head = self.rng.choice(self.sources).graph.partition("\n\n    async")[0]
    arguments = self.rng.choice(("problem: str", "problem", "*a", "problem, entry_point", ""))
    body = "".join(self.statement(8, 3) for _ in range(self.rng.randrange(1, 8)))
    kind = self.rng.choice(("async def", "async def", "def"))
    return f"{head}\n\n    {kind} __call__(self, {arguments}):\n{body}"

  def statement(self, indent: int, depth: int) -> str:
    pad, e = " " * indent, lambda: self.expression(3)
    inner = lambda: self.statement(indent + 4, depth - 1) if depth else f"{pad}    pass\n"  # noqa: E731
    name = self.rng.choice(("solution", "x", "problem", "self.llm", "operator", "x['a']", "x, y"))
    return self.rng.choice(
      (
        lambda: f"{pad}{name} = {e()}\n", lambda: f"{pad}return {e()}, {e()}\n",
        lambda: f"{pad}return {e()}\n", lambda: f"{pad}if {e()}:\n{inner()}{pad}else:\n{inner()}",
        lambda: f"{pad}for {name} in {e()}:\n{inner()}", lambda: f"{pad}while {e()}:\n{inner()}",
        lambda: f"{pad}try:\n{inner()}{pad}except Exception as x:\n{inner()}",
        lambda: f"{pad}{e()}\n",
        lambda: f"{pad}async with {e()} as x:\n{inner()}", lambda: f"{pad}raise {e()}\n",
        lambda: f"{pad}def f(x=1):\n{inner()}",
        lambda: f"{pad}match x:\n{pad}  case {{**r}}: {e()}\n",
      )
    )()  # fmt: skip

  def expression(self, depth: int) -> str:
    e = lambda: self.expression(depth - 1)  # noqa: E731
    leaf = (
      "problem",
      "1",
      "'text'",
      "x",
      "self.llm",
      "prompt_custom.SOLVE_PROMPT",
      "None",
      "A",
      "B",
    )
    if depth <= 0:
      return self.rng.choice(leaf)
    return self.rng.choice(
      (
        lambda: f"await self.custom(input={e()}, instruction={e()})", lambda: f"self.custom({e()})",
        lambda: f"({e()} + {e()})", lambda: f"[{e()} for x in {e()}]", lambda: f"{{{e()}: {e()}}}",
        lambda: f"{e()}['response']", lambda: f"f'{{{e()}}}'", lambda: f"(x := {e()})",
        lambda: f"await asyncio.gather(*[{e()}])", lambda: f"operator.Custom({e()})", lambda: e(),
        lambda: f"lambda x: {e()}", lambda: f"(await {e()})",
        lambda: f"self.llm.get_usage_summary()[{e()}]",
        lambda: f"{e()}.strip()", lambda: f"({e()}, {e()})",
      )
    )()  # fmt: skip


def seconds_of(text: str) -> tuple[str, float]:
  """How the input ended and the processor time that it took, the fastest of a few tries."""
  best, end = float("inf"), ""
  for _ in range(TRIES):
    started = time.thread_time()
    end = read(text)
    best = min(best, time.thread_time() - started)
    if best <= LIMIT / 2:
      break
  return end, best


def fuzz(inputs: int, seed: int, budget: float = float("inf")) -> dict[str, Any]:
  """Runs the fuzzer.

  Args:
    inputs: how many.
    seed: of the inputs.
    budget: seconds of wall time after which it ends early.
  """
  make, done, ends = Fuzzer(seed), collections.Counter(), collections.Counter()
  raised: list[str] = []
  slow: list[str] = []
  longest, what, started = 0.0, "", time.monotonic()
  for number in range(inputs):
    kind, text = make()
    try:
      end, seconds = seconds_of(text)
    except Exception as error:  # what the fuzzer looks for, of whatever type
      end, seconds = "raised", 0.0
      raised.append(f"{number} {kind}: {type(error).__name__}: {error!s:.80}: {text[:80]!r}")
    done[kind] += 1
    ends[end] += 1
    if seconds > longest:
      longest, what = seconds, f"{kind}: {text[:80]!r}"
    if seconds > LIMIT:
      slow.append(f"{number} {kind}: {1000 * seconds:.0f} ms: {len(text)}: {text[:80]!r}")
    if time.monotonic() - started > budget:
      break
  return {
    "inputs": sum(done.values()), "kinds": dict(done), "ends": dict(ends), "raised": raised,
    "slow": slow, "longest_ms": round(1000 * longest, 2), "longest": what, "seed": seed,
    "seconds": round(time.monotonic() - started, 1),
  }  # fmt: skip


def main() -> int:
  parser = argparse.ArgumentParser(
    description="fuzzes the parser and the static check of proposals"
  )
  parser.add_argument("--inputs", type=int, default=100_000)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--seconds", type=float, default=float("inf"), help="ends it early")
  args = parser.parse_args()
  resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
  result = fuzz(args.inputs, args.seed, args.seconds)
  for line in (*result["raised"], *result["slow"]):
    print(line, file=sys.stderr)
  result |= {name: len(result[name]) for name in ("raised", "slow")}
  print(json.dumps(result))
  return 1 if result["raised"] or result["slow"] else 0


if __name__ == "__main__":
  sys.exit(main())
