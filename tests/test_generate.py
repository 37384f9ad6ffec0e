"""Mode generate: lines are checked before anything runs, and come back in order, whole."""

import json
import logging
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from tiny_checkpoint import make_checkpoint

from awf.generate import run_generate as run_mode
from awf.policy import QwenPolicy
from awf.sampler.generate import run_generate
from awf.types import SamplingParams, UserError
from configs.base import base_config

KEYS = ["prompt_ids", "text", "token_ids", "logprobs", "finish_reason", "index", "sample"]
CHAT = [{"role": "user", "content": "the cat"}]
SAMPLING = SamplingParams(temperature=1.0, max_new_tokens=8)
CONTEXT = 128


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  config = base_config()
  config.model.path = str(make_checkpoint(tmp_path_factory.mktemp("generate") / "tiny"))
  config.lora.rank = 4
  config.mesh.data = 1
  with config.unlocked():
    config.sampler.update(rows=4, context=CONTEXT, prefill_rows=2, steps_per_dispatch=4)
    config.sampler.update(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=8)
    config.executor.max_new_tokens = 40  # a row holds 64 new tokens
  return config


@pytest.fixture(scope="module")
def policy(config):
  policy = QwenPolicy.from_config(config)
  yield policy
  policy.close()


@pytest.fixture
def generate(policy, tmp_path):
  """Runs lines (objects or raw text) and gives (figures, written lines)."""

  def run(*lines, seed=0, sampling=SAMPLING):
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "in.jsonl").write_text("\n".join(text) + "\n")
    out = tmp_path / "out.jsonl"
    figures = run_generate(
      policy, str(tmp_path / "in.jsonl"), str(out), sampling=sampling, seed=seed, adapter=0
    )
    return figures, [json.loads(line) for line in out.read_text().splitlines()]

  return run


def test_each_kind_of_prompt_in_input_order(generate, policy):
  ids = policy.tokenizer.encode("the cat has")
  figures, rows = generate(
    {"prompt": "the cat has", "max_new_tokens": 60},
    {"messages": CHAT, "n": 3},
    "",
    {"prompt_ids": ids, "max_new_tokens": 1},
    {"prompt": "<|im_start|>user"},
  )
  assert [(row["index"], row["sample"]) for row in rows] == [
    (0, 0), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0),
  ]  # fmt: skip
  assert all(list(row) == KEYS for row in rows)
  assert rows[0]["prompt_ids"] == rows[4]["prompt_ids"] == ids
  assert rows[1]["prompt_ids"] == policy.tokenizer.chat_ids(CHAT)
  assert rows[5]["prompt_ids"] == policy.tokenizer.encode("<|im_start|>user", allow_special=True)
  assert len(rows[4]["token_ids"]) == 1
  for row in rows:
    stopped = row["finish_reason"] == "stop"
    assert stopped == (row["token_ids"][-1] in policy.tokenizer.stop_ids)
    spoken = row["token_ids"][:-1] if stopped else row["token_ids"]
    assert row["text"] == policy.tokenizer.decode(spoken)
  assert figures["lines"] == 4 and figures["completions"] == 6
  assert figures["tokens"] == sum(len(row["token_ids"]) for row in rows)
  assert figures["tokens_per_second"] == figures["tokens"] / figures["wall_seconds"] > 0
  assert figures["output"].endswith("out.jsonl")


def test_logprobs_survive_the_file_and_equal_a_full_forward(generate, policy):
  _, rows = generate({"messages": CHAT, "n": 2}, {"prompt": "x = 12"})
  for row in rows:
    want = policy.logprobs(row["prompt_ids"], row["token_ids"], adapter=0)
    np.testing.assert_allclose(row["logprobs"], want, atol=1e-5)


def test_seed_and_index_decide_unless_the_line_has_a_seed(generate):
  line, seeded = {"messages": CHAT, "max_new_tokens": 20}, {"messages": CHAT, "seed": 11}
  _, first = generate(line, line, seeded, seeded)
  assert generate(line, line, seeded, seeded)[1] == first
  assert first[0]["token_ids"] != first[1]["token_ids"]
  assert first[2]["token_ids"] == first[3]["token_ids"]
  _, other = generate(line, line, seeded, seeded, seed=1)
  assert other[0]["token_ids"] != first[0]["token_ids"]
  assert other[2:] == first[2:]
  _, fewer = generate(line, "", line)  # blank lines do not count
  assert fewer == first[:2]


def test_a_lines_fields_come_before_the_configs(generate, policy):
  greedy = {"messages": CHAT, "temperature": 0, "max_new_tokens": 12}
  _, (free, again, narrow, short) = generate(
    greedy,
    {**greedy, "seed": 5},
    {"messages": CHAT, "top_k": 1, "top_p": 0.5, "max_new_tokens": 12},
    {**greedy, "max_new_tokens": 2},
    sampling=SamplingParams(temperature=2.0, max_new_tokens=3),
  )
  assert len(free["token_ids"]) > 2
  assert free["token_ids"] == again["token_ids"] == narrow["token_ids"]
  assert short["token_ids"] == free["token_ids"][:2] and short["finish_reason"] == "length"
  stop = free["token_ids"][1]
  end = free["token_ids"].index(stop) + 1
  _, (cut, huge) = generate({**greedy, "stop_ids": [stop]}, {**greedy, "top_k": 2**40})
  assert (cut["token_ids"], cut["finish_reason"]) == (free["token_ids"][:end], "stop")
  assert cut["text"] == policy.tokenizer.decode(cut["token_ids"][:-1])
  assert huge["token_ids"] == free["token_ids"]


def test_a_stop_string_cuts_the_text_and_keeps_the_ids(generate, policy):
  line = {"messages": CHAT, "temperature": 2.0, "seed": 3, "max_new_tokens": 30, "stop_ids": []}
  _, (free,) = generate(line)
  stop = free["text"][7:10]
  text = free["text"][: free["text"].index(stop)]
  _, (cut, several, at_once) = generate(
    {**line, "stop": stop}, {**line, "stop": ["\u2603", stop]}, {**line, "stop": free["text"][0]}
  )
  assert cut == {**several, "index": 0}
  assert (cut["text"], cut["finish_reason"]) == (text, "stop")
  count = len(cut["token_ids"])
  assert cut["token_ids"] == free["token_ids"][:count]
  assert cut["logprobs"] == free["logprobs"][:count]
  assert stop in policy.tokenizer.decode(cut["token_ids"])
  assert stop not in policy.tokenizer.decode(cut["token_ids"][:-1])
  assert at_once["text"] == "" and len(at_once["token_ids"]) == 1


def test_log_probs_of_choice_and_min_p(generate, policy):
  line = {"messages": CHAT, "temperature": 1.5, "min_p": 0.2, "seed": 1, "max_new_tokens": 20}
  _, (none, both, free) = generate(
    {**line, "logprobs": "none"}, {**line, "logprobs": "both"}, {**line, "min_p": 0, "top_k": 0}
  )
  assert none["logprobs"] == [] and list(none) == KEYS
  assert list(both) == [*KEYS, "full_logprobs"]
  assert none["token_ids"] == both["token_ids"]
  want = policy.logprobs(both["prompt_ids"], both["token_ids"], adapter=0, temperature=1.5)
  np.testing.assert_allclose(both["full_logprobs"], want, atol=1e-5)
  assert np.max(np.subtract(both["logprobs"], want)) > 0.01
  want = policy.logprobs(free["prompt_ids"], free["token_ids"], adapter=0, temperature=1.5)
  np.testing.assert_allclose(free["logprobs"], want, atol=1e-5)


def test_log_probs_that_are_no_numbers_are_named(generate, policy, tmp_path):
  lora = policy.lora
  policy.set_lora(jax.tree.map(lambda x: np.full_like(x, 1e30), lora))
  try:
    with pytest.raises(UserError, match=r"in.jsonl, object 1: its log-probs are no finite numbers"):
      generate({"prompt": "the cat"}, {"prompt": "the cat", "adapter": "policy"})
  finally:
    policy.set_lora(lora)
  assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
  assert len(generate({"prompt": "the cat"})[1]) == 1


def test_the_longest_prompt_that_fits_gets_its_one_token(generate):
  _, (row,) = generate({"prompt_ids": [3] * (CONTEXT - 1)})
  assert len(row["token_ids"]) == 1


GOOD = {"prompt": "the cat"}
BAD_LINES = [
  ("{", "expected one JSON object"),
  ("[1, 2]", "expected one JSON object"),
  ("7" * 5000, "expected one JSON object"),
  ("[" * 100_000, "expected one JSON object"),
  ({}, "expected exactly one of prompt, messages, prompt_ids, got none"),
  ({**GOOD, "prompt_ids": [1]}, "got prompt, prompt_ids"),
  ({**GOOD, "temprature": 1}, "unknown field 'temprature'; expected some of prompt"),
  ({"prompt": ""}, "prompt: expected a text"),
  ({"prompt": 3}, "prompt: expected a text"),
  ({"prompt": None}, "prompt: expected a text"),
  ({"prompt_ids": []}, "empty"),
  ({"prompt_ids": "12"}, "prompt_ids: expected a list of token ids"),
  ({"prompt_ids": [1, True]}, "prompt_ids: expected a list of token ids"),
  ({"prompt_ids": [1, 10**9]}, "prompt_ids: expected ids from 0"),
  ({"prompt_ids": [-1]}, "prompt_ids: expected ids from 0"),
  ({"prompt_ids": [3] * CONTEXT}, "at most 127.*config.sampler.context"),
  ({"prompt": "the cat " * 300}, "config.sampler.context"),
  ({**GOOD, "max_new_tokens": 65}, "max_new_tokens: expected at most 64.*config.sampler.max_new"),
  ({"messages": []}, "messages: expected at least one message"),
  ({"messages": ["hello"]}, "messages: expected a list of"),
  ({"messages": [{"role": "boss", "content": "x"}]}, r"messages\[0\]: expected a role"),
  ({**GOOD, "temperature": "hot"}, "temperature: expected a number"),
  ({**GOOD, "temperature": True}, "temperature: expected a number"),
  ({**GOOD, "temperature": -1}, "temperature: expected a finite number"),
  ('{"prompt": "x", "temperature": NaN}', "temperature: expected a finite number"),
  ({**GOOD, "top_p": 0}, "top_p: expected a number in"),
  ({**GOOD, "top_k": 1.5}, "top_k: expected a whole number"),
  ({**GOOD, "min_p": 1.5}, "min_p: expected a number in"),
  ({**GOOD, "min_p": -0.1}, "min_p: expected a number in"),
  ({**GOOD, "min_p": "0.1"}, "min_p: expected a number"),
  ({**GOOD, "stop": ""}, "stop: expected a text that is not empty, or a list"),
  ({**GOOD, "stop": ["a", ""]}, "stop: expected a text that is not empty, or a list"),
  ({**GOOD, "stop": 3}, "stop: expected a text that is not empty, or a list"),
  ({**GOOD, "logprobs": "all"}, "logprobs: expected one of none, drawn, both"),
  ({**GOOD, "logprobs": True}, "logprobs: expected a text"),
  ({**GOOD, "adapter": "nobody"}, "adapter 'nobody' is not loaded; expected one of base"),
  ({**GOOD, "top_k": -1}, "top_k: expected 0"),
  ({**GOOD, "max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
  ({**GOOD, "n": 0}, "n: expected 1 to"),
  ({**GOOD, "seed": -4}, "seed: expected an integer in"),
  ({**GOOD, "stop_ids": 3}, "stop_ids: expected a list of token ids"),
  ({**GOOD, "stop_ids": [10**9]}, "stop_ids: expected ids from 0"),
  ({**GOOD, "stop_ids": list(range(20))}, "stop_ids: expected at most"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_named_before_anything_runs(generate, policy, tmp_path, line, message):
  before = policy.engine.stats()["requests"]
  with pytest.raises(UserError, match=message) as caught:
    generate(GOOD, "", line, GOOD)
  said = str(caught.value)
  assert f"{tmp_path}/in.jsonl, line 3: " in said and "\n" not in said and len(said) < 600
  assert policy.engine.stats()["requests"] == before
  assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_files_that_cannot_be_used_are_user_errors(generate, policy, tmp_path, monkeypatch):
  good = tmp_path / "good.jsonl"
  good.write_text(json.dumps(GOOD))
  (tmp_path / "blank.jsonl").write_text("\n \n")
  (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}\n')
  before = policy.engine.stats()["requests"]
  cases = (
    (tmp_path / "none.jsonl", tmp_path / "o", "--input: expected a JSON-lines file"),
    (tmp_path, tmp_path / "o", "--input: expected a JSON-lines file"),
    (tmp_path / "blank.jsonl", tmp_path / "o", "holds no line"),
    (tmp_path / "latin.jsonl", tmp_path / "o", "line 1: expected UTF-8"),
    (good, tmp_path, "--output: expected the path of a file"),
    (good, good, "is the input"),
    (good, good / "under" / "a_file", "--output: cannot write"),
    (good, os.devnull, "--output: expected the path of a file"),
    (good, tmp_path / "stdout", "is the standard output, whose last line"),
  )
  (tmp_path / "stdout").touch()
  kept = os.fstat
  monkeypatch.setattr(os, "fstat", lambda fd: kept(fd) if fd != 1 else (tmp_path / "stdout").stat())
  for source, target, message in cases:
    with pytest.raises(UserError, match=message):
      run_generate(policy, str(source), str(target), sampling=SAMPLING, seed=0, adapter=0)
  assert policy.engine.stats()["requests"] == before
  assert good.read_text() == json.dumps(GOOD)


def test_the_old_output_stays_until_the_new_one_is_whole(policy, tmp_path):
  source, target = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
  source.write_text("\n".join([json.dumps(GOOD)] * 3))
  run_generate(policy, str(source), str(target), sampling=SAMPLING, seed=0, adapter=0)
  old = target.read_text()
  assert len(old.splitlines()) == 3

  class Breaks(QwenPolicy):
    def completion(self, request, output):
      if request.seed != first_seed:
        raise RuntimeError("the disk is full")
      return super().completion(request, output)

  parts = policy.config, policy.params, policy.tokenizer, policy.lora, policy.lora_config
  broken, first_seed = Breaks(*parts, policy.engine), 3
  source.write_text("\n".join(json.dumps({**GOOD, "seed": s}) for s in (3, 4, 5)))
  with pytest.raises(RuntimeError, match="the disk is full"):
    run_generate(broken, str(source), str(target), sampling=SAMPLING, seed=0, adapter=0)
  assert target.read_text() == old
  assert [path.name for path in target.parent.iterdir()] == ["out.jsonl"]


def test_ctrl_c_in_mid_decode_stops_cleanly_and_harms_no_other_request(policy, tmp_path):
  source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
  source.write_text(json.dumps({**GOOD, "n": 200, "max_new_tokens": 60, "temperature": 3.0}))
  (mine,) = policy.engine.generate([policy.request((5, 6, 7), SAMPLING, 1, 1, 0)])
  began, steps = threading.Event(), policy.engine.stats()["steps"]

  def press():
    while policy.engine.stats()["steps"] == steps:
      time.sleep(0.005)
    began.set()
    os.kill(os.getpid(), signal.SIGINT)

  presser = threading.Thread(target=press)
  handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # off in background jobs
  try:
    presser.start()
    with pytest.raises(KeyboardInterrupt):
      run_generate(policy, str(source), str(target), sampling=SAMPLING, seed=0, adapter=0)
    presser.join()
  finally:
    signal.signal(signal.SIGINT, handler)
  assert began.is_set() and [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
  assert policy.engine.generate([policy.request((5, 6, 7), SAMPLING, 1, 1, 0)]) == [mine]
  stats = policy.engine.stats()
  assert (stats["running"], stats["waiting"]) == (0, 0)


def test_text_beyond_ascii_is_written_as_utf8(generate, policy, tmp_path):
  _, rows = generate({"prompt": "caf\u00e9 \u2603", "temperature": 5.0, "max_new_tokens": 60})
  assert policy.tokenizer.decode(rows[0]["prompt_ids"]) == "caf\u00e9 \u2603"
  text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
  assert rows[0]["text"].isascii() or not text.isascii()
  assert text.count("\n") == 1


def test_progress_goes_to_the_log(generate, monkeypatch, caplog):
  monkeypatch.setattr("awf.sampler.generate._REPORT_SECONDS", -1.0)
  with caplog.at_level(logging.INFO, logger="awf"):
    generate(GOOD, GOOD)
  assert "1 of 2 lines" in caplog.text and "2 of 2 lines" in caplog.text


def test_the_mode_with_base_and_with_adapter(config, policy, tmp_path):
  """The command line's function: the base, or the adapter that the config names."""
  source = tmp_path / "in.jsonl"
  source.write_text(json.dumps({"messages": CHAT, "temperature": 0}))
  figures = run_mode(config, None, str(source), str(tmp_path / "base.jsonl"))
  assert figures["lines"] == 1
  base = json.loads((tmp_path / "base.jsonl").read_text())
  key = np.random.default_rng(0)
  before = policy.lora
  lora = jax.tree.map(lambda x: x + 0.3 * key.standard_normal(x.shape, np.float32), before)
  policy.set_lora(lora)
  policy.save(tmp_path / "adapter")
  policy.set_lora(before)
  tuned = config.copy_and_resolve_references()
  tuned.lora.init_path = str(tmp_path / "adapter")
  run_mode(tuned, None, str(source), str(tmp_path / "tuned.jsonl"))
  own = json.loads((tmp_path / "tuned.jsonl").read_text())
  assert own["prompt_ids"] == base["prompt_ids"] and own["token_ids"] != base["token_ids"]
