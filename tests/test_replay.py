"""The replay of staged against full evaluation, on a matrix that is made up; the search is real."""

import asyncio
import gzip
import json
import random

import pytest
from replay import RIGHT, WRONG, Replayed, compare, load, pack, search, settings

from awf.config_io import ROOT
from awf.search.config import load_starts
from awf.search.stages import key_of
from awf.types import Problem
from awf.workflow.contract import seed_source

BLOCKS, FAMILIES = 4, 9


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
  """A collection of the shipped workflows; program i solves a share of i / 29 of the problems."""
  folder = tmp_path_factory.mktemp("collected")
  rng = random.Random(0)
  sources = [seed_source("math"), *load_starts(str(ROOT / "data/nano/starts.jsonl"))[:29]]
  programs = {key_of(source): [source.graph, source.prompt] for source in sources}
  keys = list(programs)
  proposals = [[keys[0], rng.choice([*keys[5:], ""])] for _ in range(80)]
  found = {"starts": keys[:5], "proposals": proposals, "programs": programs}
  (folder / "searches.json").write_text(json.dumps(found))
  with open(folder / "matrix.jsonl", "w") as out:
    for block in range(BLOCKS):
      ids = [f"{split}-{block}-{f}" for split in ("validation", "test") for f in range(FAMILIES)]
      for i, key in enumerate(keys[: None if block < 3 else 7]):  # the last block was cut off
        outcomes = "".join(RIGHT if rng.random() < i / 29 else WRONG for _ in ids)
        row = {"key": key, "block": block, "problems": ids, "outcomes": outcomes}
        out.write(json.dumps({**row, "tokens": [10 + i] * len(ids)}) + "\n")
  return folder


@pytest.fixture(scope="module")
def matrix(collected):
  file = collected / "matrix.json.gz"
  file.write_bytes(gzip.compress(json.dumps(pack(collected)).encode()))
  return load(file)


def test_a_pack_holds_the_complete_blocks(matrix, collected):
  assert len(matrix.validation) == len(matrix.test) == 3 * FAMILIES
  assert all(id.startswith("validation") for id in matrix.validation)
  assert matrix.test[:2] == ("test-0-0", "test-0-1")
  rows = [json.loads(x) for x in (collected / "matrix.jsonl").read_text().splitlines()]
  key = rows[12]["key"]
  own = [row for row in rows if row["key"] == key and row["block"] < 3]
  half = [(row["outcomes"][:FAMILIES], row["outcomes"][FAMILIES:]) for row in own]
  assert matrix.programs[key]["outcomes"] == "".join(a for a, _ in half) + "".join(
    b for _, b in half
  )
  share = sum(b.count(RIGHT) for _, b in half) / len(matrix.test)
  assert matrix.score(key, matrix.test) == pytest.approx(share)


def test_full_evaluation_runs_every_program_on_every_problem_and_takes_the_best(matrix):
  full = search(matrix, settings(matrix, True, rounds=3, parents=3), seed=1)
  assert full["runs"] % len(matrix.validation) == 0
  place = {key: i for i, key in enumerate(matrix.programs)}
  assert full["validation"] == matrix.score(full["key"], matrix.validation)
  assert place[full["key"]] > 20  # the best of what three rounds have proposed
  again = search(matrix, settings(matrix, True, rounds=3, parents=3), seed=1)
  assert again == full


def test_staging_costs_less_and_is_compared_seed_by_seed(matrix):
  found = compare(matrix, range(3), rounds=3, parents=3)
  assert found["seeds"] == 3 and found["programs"] == 30 and found["problems"] == [27, 27]
  assert 0.0 < found["token_share"] < 1.0 and 0.0 < found["run_share"] < 1.0
  gain = found["test_score_staged"] - found["test_score_full"]
  assert found["difference"] == pytest.approx(gain)
  low, high = found["interval"]
  assert low <= found["difference"] <= high
  assert found["test_score_full"] > found["test_score_seed"]


def test_the_policy_proposes_what_was_proposed_for_the_parent(matrix):
  replayed = Replayed(matrix)
  source = matrix.source(matrix.starts[0])
  text = f"<graph>\n{source.graph}\n</graph>\n<prompt>\n{source.prompt}\n</prompt>"
  made = asyncio.run(replayed.propose([{"role": "user", "content": text}], 40, 5))
  known = {matrix.source(key).graph for key in matrix.proposals[matrix.starts[0]] if key}
  graphs = {c.text.partition("<graph>\n")[2].partition("\n</graph>")[0] for c in made}
  assert graphs - {""} <= known and "" in graphs and len(graphs) > 5
  problem = Problem(matrix.validation[0], "text", "1")
  result = asyncio.run(replayed.run(source, problem))
  assert result.answer == WRONG and replayed.tokens == result.completion_tokens == 10
