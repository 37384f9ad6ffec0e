"""A run directory of any size, made up: forest, problems, trajectories, metrics, timings."""

import dataclasses
import json
import math
import random

from awf.search.tree import LogEntry, Node, add_event, expand_event
from awf.types import Failure, WorkflowSource

GRAPH = """class Workflow:
    def __init__(self, name: str, llm_config, dataset: DatasetType) -> None:
        self.name = name
        self.dataset = dataset
        self.llm = create_llm_instance(llm_config)
        self.custom = operator.Custom(self.llm)
        self.sc_ensemble = operator.ScEnsemble(self.llm)

    async def __call__(self, problem: str):
        solutions = []
        for _ in range(3):
            solution = await self.custom(input=problem, instruction=prompt_custom.SOLVE_PROMPT)
            solutions.append(solution['response'])
        solution = await self.sc_ensemble(solutions=solutions, problem=problem)
        return solution['response'], self.llm.get_usage_summary()["total_cost"]"""
PROMPT = 'SOLVE_PROMPT = """Reason in steps before you answer.\n"""'
WORDS = (
  "apples train speed each hour total left share equal price boxes number of the sum first then "
  "how many after before twice half remaining students paid litres metres sold bought during"
).split()
FAILURES = (
  ("format", Failure("format", "no <graph> tag")),
  ("static", Failure("policy", "line 9: the name open is not allowed")),
  ("smoke", Failure("crash", "TypeError: 'NoneType' object is not subscriptable")),
)


def sentence(rng, count):
  return " ".join(rng.choice(WORDS) for _ in range(count))


def edited(rng, source, id):
  """A workflow with one line put in, and another prompt."""
  lines = source.graph.split("\n")
  at = rng.randrange(9, len(lines))
  lines.insert(at, f"        note_{id} = {sentence(rng, 6)!r}")
  prompt = f'SOLVE_PROMPT = """{sentence(rng, 14)}\n"""'
  return WorkflowSource("\n".join(lines[:40]), rng.choice([source.prompt, prompt]))


def made_nodes(rng, count, problems, log):
  """Nodes in the order of their ids: a few parents have most of the children, some chains grow."""
  nodes = [node(rng, 1, 0, WorkflowSource(GRAPH, PROMPT), 0.2, problems, log)]
  for id in range(2, count + 1):
    good = [n for n in nodes[:: max(1, len(nodes) // 60)] + nodes[-30:] if n.failure is None]
    parent = max(rng.sample(good, min(3, len(good))), key=lambda n: n.score)
    source = edited(rng, parent.source, id)
    if rng.random() < 0.25:
      stage, failure = rng.choice(FAILURES)
      made = Node(
        id, parent.id, source, f"c{id}", sentence(rng, 8), stage, failure, before=parent.score
      )
    else:
      aim = min(0.98, max(0.02, parent.score + rng.gauss(0.004, 0.1)))
      made = node(rng, id, parent.id, source, aim, problems, log)
    nodes.append(dataclasses.replace(made, born=1 + id // 9))
  return nodes


def node(rng, id, parent, source, aim, problems, log):
  scores = {p: float(rng.random() < aim) for p in problems}
  wrong = [p for p, score in scores.items() if not score][:log]
  entries = tuple(
    LogEntry(p, sentence(rng, 60) + "\n<answer>17</answer>", rng.choice(["17", ""])) for p in wrong
  )
  edit = sentence(rng, 10)
  return Node(
    id, parent, source, f"c{id}", edit, "full", scores=scores, before=aim, born=1, log=entries
  )


def write_lines(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_run(path, count=2000, seed=0, log=16):
  """Writes the run and returns its nodes."""
  rng = random.Random(seed)
  problems = {f"train-{i}": sentence(rng, 45) + "?" for i in range(40)}
  nodes = made_nodes(rng, count, list(problems), log)
  folder = path / "workspace" / "NANO"
  folder.mkdir(parents=True)
  (path / "trajectories").mkdir()
  rounds = max(n.born for n in nodes)
  journal = [event for n in nodes for event in (add_event(n), expand_event(n.id))]
  for round in range(1, rounds + 1):
    journal.append({"event": "round", "round": round, "calls": 900, "tokens": 60_000})
    rows = [
      {
        "round": round, "parent": n.parent, "key": n.canonical, "modification": n.modification,
        "reward": 0.1, "tokens": 400, "calls": 120, "run_tokens": 7_000, "stage": n.stage,
        "text": n.source.graph,
      }
      for n in nodes if n.born == round and n.parent
    ]  # fmt: skip
    write_lines(path / "trajectories" / f"round_{round:04d}.jsonl", rows)
  write_lines(folder / "journal.jsonl", journal)
  (path / "problems.json").write_text(json.dumps(problems))
  names = ["reward", "mcts/best_score", "mcts/pass@1", "mcts/pass@4", "mcts/pass@8", "loss", "kl"]
  names += [f"more/metric_{i}" for i in range(40)]
  head = {"level": "batch", "epoch": 0}
  write_lines(
    path / "metrics.jsonl",
    [
      {**head, "step": step}
      | {name: math.log1p(step + k) / 6 + rng.gauss(0, 0.02) for k, name in enumerate(names)}
      for step in range(1, rounds + 1)
    ],
  )
  times = {"time/step": 60.0, "time/search": 50.0, "time/rollout": 20.0, "time/update": 9.0}
  write_lines(
    path / "timings.jsonl", [{**head, "step": step, **times} for step in range(1, rounds + 1)]
  )
  config = {"name": "made", "seed": 0, "sampler": {"strict": True}}
  record = {"config": config, "mode": "train", "commit": "0123456789ab", "backend": "cpu"}
  record["command"] = "python launch.py --config=configs/quickstart.py"
  (path / "config.json").write_text(json.dumps(record))
  return nodes
