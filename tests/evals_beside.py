"""Times the evaluation of workflows beside AFlow's own evaluator, in turns, on one served model.

  python tests/evals_beside.py --aflow=CHECKOUT --python=VENV/bin/python

AFlow's benchmark class, in a process of its own with its packages, evaluates a graph through
`--mode=serve`; our runner evaluates the same graph on the same problems in its own process. Both
have the same engine, model, temperature and limit of new tokens; every round has other problems, as
far as there are, and other noise. AFlow pays for HTTP, for one request a call, and for what it does
with a failure (the whole workflow anew, up to five times, a second apart); we pay for a jailed
process of each workflow on each problem. Both grade, AFlow writes its CSV and log.json besides.

aflow     AFlow with its own default, 50 problems in flight
aflow64   AFlow with as many in flight as we have (--flight)
awf       ours

one       AFlow's seed workflow: one call
five      five calls, one after the other, of one prompt
ensemble  the same, then ScEnsemble, whose tag a small model seldom gives
fails     one call, then a key that its reply has not, as in many a proposal of a search

With --matrix=FILE.json.gz (see tests/replay.py) and --count=N the graphs are N programs of its real
searches, evenly spread over all that were proposed, under names of their own; our side evaluates
all of them once more together, as a search does, with as many problems in flight as before.

The last line is JSON: what every turn took and used, evaluations/s, medians of the rounds' ratios,
and of all graphs: the seconds of each side as a multiple of ours, one after the other and together.
"""

import argparse
import asyncio
import contextlib
import gzip
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = {"aflow": 50, "aflow64": None, "awf": None}  # problems in flight; None: --flight
MODEL = "served"
HEAD = """class Workflow:
    def __init__(self, name: str, llm_config, dataset: DatasetType) -> None:
        self.name = name
        self.dataset = dataset
        self.llm = create_llm_instance(llm_config)
        self.custom = operator.Custom(self.llm)
        self.sc_ensemble = operator.ScEnsemble(self.llm)

    async def __call__(self, problem: str):
"""
FIVE = """        solutions = []
        for _ in range(5):
            solution = await self.custom(input=problem, instruction=prompt_custom.STEPS_PROMPT)
            solutions.append(solution["response"])
"""
TAIL = '        return %s, self.llm.get_usage_summary()["total_cost"]\n'
CALL = '        solution = await self.custom(input=problem, instruction="")\n'
VOTE = "        solution = await self.sc_ensemble(solutions=solutions, problem=problem)\n"
GRAPHS = {
  "one": HEAD + CALL + TAIL % 'solution["response"]',
  "five": HEAD + FIVE + TAIL % "solutions[-1]",
  "ensemble": HEAD + FIVE + VOTE + TAIL % 'solution["response"]',
  "fails": HEAD + CALL + TAIL % 'solution["answer"]',
}
STEPS = 'STEPS_PROMPT = """Think step by step.\\n"""\n'


def sources(args):
  """Graph and prompt module by name, in the order of their rounds in AFlow's workspace."""
  if not args.matrix:
    return {name: (graph, STEPS) for name, graph in GRAPHS.items()}
  programs = json.loads(gzip.decompress(Path(args.matrix).read_bytes()))["programs"]
  keys = sorted(programs)
  chosen = [keys[i * len(keys) // args.count] for i in range(args.count)]
  return {f"p{i}": (programs[k]["graph"], programs[k]["prompt"]) for i, k in enumerate(chosen)}


def read_rows(args):
  """Problems in GSM8K's form: lines with question or problem, and answer."""
  rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
  return [
    {"question": row.get("question") or row["problem"], "answer": f"#### {row['answer']}"}
    if "####" not in str(row["answer"])
    else {"question": row["question"], "answer": row["answer"]}
    for row in rows
  ]


class AFlow:
  """AFlow's evaluator, with a folder of ours as its working directory."""

  def __init__(self, args):
    self.names = list(sources(args))
    sys.path[:0] = [os.getcwd(), os.environ["AFLOW"]]

  def turn(self, flight, name, temperature, salt, rows):
    del salt
    Path("data/datasets").mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path("data/datasets/gsm8k_validate.jsonl").write_text(lines)
    return asyncio.run(self._evaluate(flight, name, temperature))

  async def _evaluate(self, flight, name, temperature):
    from importlib import import_module

    from scripts.async_llm import LLMConfig
    from scripts.evaluator import Evaluator

    number = 101 + self.names.index(name)
    module = import_module(f"workspace.GSM8K.workflows.round_{number}.graph")
    folder = f"workspace/GSM8K/workflows/round_{number}"
    Path(folder, "log.json").unlink(missing_ok=True)
    fields = {"model": MODEL, "temperature": temperature, "top_p": 1, "key": "none"}
    config = LLMConfig({**fields, "base_url": os.environ["SERVED"]})
    evaluator = Evaluator(folder)
    started = time.perf_counter()
    # What its `graph_evaluate` does, which has no argument for the number in flight.
    kind = evaluator.dataset_configs["GSM8K"]
    path = evaluator._get_data_path("GSM8K", False)
    benchmark = kind(name="GSM8K", file_path=path, log_path=folder)
    params = {"dataset": "GSM8K", "llm_config": config}
    graph = await evaluator._configure_graph("GSM8K", module.Workflow, params)
    score, _, _ = await benchmark.run_evaluation(graph, None, flight)
    seconds = time.perf_counter() - started
    used = graph.llm.get_usage_summary()
    return {
      "seconds": seconds, "score": float(score), "calls": used["call_count"],
      "prompt_tokens": used["total_input_tokens"], "new_tokens": used["total_output_tokens"],
    }  # fmt: skip


class Awf:
  """Our runner and grader, the engine in the same process."""

  def __init__(self, args):
    sys.path[:0] = [str(ROOT)]
    from awf.config_io import resolve_paths
    from awf.sandbox import Sandbox, SandboxConfig
    from awf.tasks import make_task
    from awf.workflow.contract import PRELOAD
    from configs.quickstart import get_config

    config = get_config()
    for field, value in overrides(args).items():
      group, _, name = field.partition(".")
      config[group][name] = value
    config = resolve_paths(config)
    self.sandbox = Sandbox(SandboxConfig(**config.sandbox), preload=PRELOAD)  # before JAX
    from awf.policy import make_policy
    from awf.runtime_setup import setup_jax

    setup_jax()
    self.policy, self.args, self.sources = make_policy(config), args, sources(args)
    self.policy.set_lora(None)  # as mode serve, which has no adapter either
    self.task = make_task({"name": "gsm8k"})

  def turn(self, flight, name, temperature, salt, rows):
    from awf.types import SamplingParams, WorkflowSource
    from awf.workflow.runner import WorkflowRunner

    sampling = SamplingParams(temperature, max_new_tokens=self.args.new)
    problems = [self.task.to_problem(row, i) for i, row in enumerate(rows)]
    sources = [WorkflowSource(*self.sources[one]) for one in name.split("+")]
    started = time.perf_counter()
    runner = WorkflowRunner(
      self.sandbox, self.policy, sampling, seed=salt, dataset="GSM8K", question_type="math",
      concurrency=flight,
    )  # fmt: skip

    async def one(source, problem):
      result = await runner.run(source, problem)
      if result.failure is not None and result.failure.kind == "infrastructure":
        raise SystemExit(f"{source.graph}\n{result.failure}")
      return 0.0 if result.answer is None else (await self.task.grade(problem, result.answer)).score

    async def run():
      return await asyncio.gather(*(one(s, p) for s in sources for p in problems))

    scores = asyncio.run(run())
    used = runner.stats()
    return {
      "seconds": time.perf_counter() - started, "score": statistics.mean(scores),
      "calls": used["llm_calls"], "prompt_tokens": used["prompt_tokens"],
      "new_tokens": used["completion_tokens"], "shared_calls": used["cached_calls"],
    }  # fmt: skip


def worker(args):
  """One side: a line of JSON with the arguments of a turn; one with what it took answers."""
  answers = os.fdopen(os.dup(1), "w", buffering=1)
  os.dup2(2, 1)  # what AFlow and libraries print goes to stderr
  side = Awf(args) if args.worker == "awf" else AFlow(args)
  for line in sys.stdin:
    answers.write(json.dumps(side.turn(*json.loads(line))) + "\n")


def overrides(args):
  """The fields in which both engines differ from the quickstart's."""
  return {
    "model.path": args.model, "sampler.rows": args.rows, "sampler.context": args.context,
    "sampler.max_new_tokens": args.new, "executor.max_new_tokens": args.new,
  }  # fmt: skip


def start_server(args, folder, stack):
  """Mode serve in a process of its own; its address."""
  log = open(folder / "serve.log", "w+")
  flags = {**overrides(args), "serve.port": 0, "serve.model_name": MODEL}
  command = [sys.executable, "launch.py", "--config=configs/quickstart.py", "--mode=serve"]
  command += [f"--config.{name}={value}" for name, value in flags.items()]
  process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
  stack.callback(process.wait)
  stack.callback(process.terminate)
  while not (found := re.search(r"http://\S+", (folder / "serve.log").read_text())):
    if process.poll() is not None:
      raise SystemExit((folder / "serve.log").read_text())
    time.sleep(0.2)
  return found[0]


def start_worker(args, name, folder, served, stack):
  """A function that gives one side a turn."""
  python = sys.executable if name == "awf" else args.python
  command = [python, str(Path(__file__).resolve()), f"--worker={name}", *sys.argv[1:]]
  command += [f"--matrix={Path(args.matrix).resolve()}"] if args.matrix else []
  env = {**os.environ, "SERVED": served, "AFLOW": str(Path(args.aflow).resolve())}
  process = subprocess.Popen(
    command, cwd=ROOT if name == "awf" else folder, env=env, text=True,
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=open(folder / f"{name}.log", "w"),
  )  # fmt: skip
  stack.callback(process.wait)
  stack.callback(process.terminate)

  def turn(*arguments):
    process.stdin.write(json.dumps(arguments) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
      raise SystemExit(f"{name} ended:\n" + (folder / f"{name}.log").read_text()[-3000:])
    return json.loads(line)

  return turn


def write_rounds(args, folder):
  """The graphs as rounds of AFlow's workspace, beside its own template."""
  sys.path[:0] = [str(ROOT)]
  from awf.workflow.contract import graph_header

  for number, (graph, prompt) in enumerate(sources(args).values(), start=101):
    path = folder / f"workspace/GSM8K/workflows/round_{number}"
    path.mkdir(parents=True)
    (path / "graph.py").write_text(graph_header("GSM8K", number) + graph)
    (path / "prompt.py").write_text(prompt)
    (path / "__init__.py").touch()


def compare(args):
  with contextlib.ExitStack() as stack:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    write_rounds(args, folder)
    rows = read_rows(args)
    served = start_server(args, folder, stack)
    workers = {n: start_worker(args, n, folder, served, stack) for n in ("aflow", "awf")}
    found, together = {}, []

    def turn(side, name, temperature, number, count):
      flight = SIDES[side] or args.flight
      some = [rows[(number * args.problems + i) % len(rows)] for i in range(count)]
      return workers[side.removesuffix("64")](flight, name, temperature, number, some)

    for side in ("aflow", "awf"):  # imports, compilation
      turn(side, args.graphs[0], args.temperatures[0], args.rounds, args.flight)
    for name in args.graphs:
      for temperature in args.temperatures:
        rounds = []
        for number in range(args.rounds):
          order = list(SIDES) if number % 2 == 0 else list(SIDES)[::-1]
          done = {s: turn(s, name, temperature, number, args.problems) for s in order}
          rounds.append({side: done[side] for side in SIDES})
          print(name, temperature, json.dumps(rounds[-1]), file=sys.stderr, flush=True)
        found[f"{name} {temperature}"] = summary(rounds, args.problems)
    if args.matrix:
      for temperature in args.temperatures:
        for number in range(args.rounds):
          names = "+".join(args.graphs)
          together.append(turn("awf", names, temperature, number, args.problems)["seconds"])
  print(json.dumps({
    "problems": args.problems, "flight": args.flight, "graphs": found,
    "all": total(found, together),
  }))  # fmt: skip


def total(found, together):
  """Seconds of each side for all graphs, failures included, and as multiples of ours."""
  rounds = [one for graph in found.values() for one in graph["rounds"]]
  seconds = {side: sum(one[side]["seconds"] for one in rounds) for side in SIDES}
  ours = {"awf": seconds["awf"], **({"together": sum(together)} if together else {})}
  ratios = {
    f"{side}/{name}": round(seconds[side] / one, 2)
    for side in SIDES if side != "awf" for name, one in ours.items()
  }  # fmt: skip
  return {"seconds": {**seconds, **ours}, "ratio": ratios}


def summary(rounds, problems):
  """Evaluations/s and our gain over AFlow, medians over the rounds."""
  seconds = {side: [one[side]["seconds"] for one in rounds] for side in SIDES}
  return {
    "evaluations_per_second": {
      side: round(problems / statistics.median(seconds[side]), 2) for side in SIDES
    },
    "ratio": {
      side: round(statistics.median(map(lambda a, b: a / b, seconds[side], seconds["awf"])), 2)
      for side in SIDES if side != "awf"
    },
    "rounds": rounds,
  }  # fmt: skip


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--worker", choices=("aflow", "awf"), help="what the command starts itself")
  parser.add_argument("--aflow", default="", help="a checkout of FoundationAgents/AFlow")
  parser.add_argument("--python", default=sys.executable, help="with AFlow's packages")
  parser.add_argument("--model", default="data/nano/model")
  parser.add_argument("--data", default=str(ROOT / "data/nano/problems.jsonl"))
  parser.add_argument("--problems", type=int, default=64, help="of a turn")
  parser.add_argument("--flight", type=int, default=64, help="problems at a time")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--graphs", default="", help="names with commas; all of them unless given")
  parser.add_argument("--matrix", default="", help="programs of real searches, tests/replay.py")
  parser.add_argument("--count", type=int, default=12, help="of these programs")
  parser.add_argument(
    "--temperatures", default="1.0,0.0", type=lambda x: list(map(float, x.split(",")))
  )
  parser.add_argument("--rows", type=int, default=64, help="of the engine")
  parser.add_argument("--context", type=int, default=640)
  parser.add_argument("--new", type=int, default=192, help="most new tokens, a multiple of 64")
  args = parser.parse_args()
  if args.new % 64:
    parser.error("--new: expected a multiple of 64, in which the engine keeps room")
  args.graphs = args.graphs.split(",") if args.graphs else list(sources(args))
  if args.worker:
    worker(args)
  else:
    compare(args)


if __name__ == "__main__":
  main()
