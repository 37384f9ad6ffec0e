"""Mode serve with the shipped model, a process of its own, and OpenAI's own client."""

import asyncio
import concurrent.futures
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import jax
import numpy as np
import openai
import pytest
import uvicorn
from conftest import ROOT, until
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.testclient import TestClient

from awf.config_io import load_config as read_config
from awf.policy import QwenPolicy
from awf.qwen.hf import fingerprint, load_config
from awf.qwen.lora import LoRAConfig, init_lora
from awf.qwen.peft import save_adapter
from awf.sampler.remote import RemoteLLM
from awf.sampler.request import Part
from awf.sampler.text import TextStream
from awf.serve import Server, _bind, _token
from awf.serve_answer import Choice
from awf.serve_app import EventStream, Service, make_app
from awf.types import SamplingParams, UserError

KEY, ORIGIN = "a-token", "https://app.example"
CHAT = [{"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples has he?"}]
NANO = ROOT / "data" / "nano" / "model"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """(base url, process, its stderr so far) of a running server."""
  folder = tmp_path_factory.mktemp("serve")
  config = load_config(NANO)
  lora_config = LoRAConfig(4, 8.0)
  noise = np.random.default_rng(0)
  lora = jax.tree.map(
    lambda x: x + 0.2 * noise.standard_normal(x.shape, np.float32),
    init_lora(config, lora_config, jax.random.key(0)),
  )
  save_adapter(folder / "tuned", lora, lora_config, "nano", fingerprint(NANO))
  argv = [
    sys.executable, str(ROOT / "launch.py"), "--config=configs/quickstart.py", "--mode=serve",
    "--config.serve.port=0", f"--config.lora.paths=tuned={folder / 'tuned'}",
    "--config.serve.model_name=nano", "--config.sampler.rows=16", "--config.sampler.context=512",
    "--config.sampler.max_new_tokens=192", "--config.executor.max_new_tokens=192",
    "--config.sampler.steps_per_dispatch=4", "--config.sampler.queue=80",
    "--config.serve.max_body_mb=0.1", f"--config.serve.cors={ORIGIN}",
    f"--workdir={folder / 'run'}",
  ]  # fmt: skip
  env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  process = subprocess.Popen(
    argv, cwd=ROOT, env=env | {"AWF_API_KEY": f"{KEY}\n"}, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  said, ready = [], threading.Event()

  def read():
    for line in process.stderr:
      said.append(line)
      if "serving" in line:
        ready.set()
    ready.set()  # it has ended

  reader = threading.Thread(target=read, daemon=True)
  reader.start()
  try:
    assert ready.wait(400), "".join(said)
    assert process.poll() is None, "".join(said)
    (url,) = re.findall(r"http://\S+", "".join(said))
    yield url, process, said
  finally:
    process.kill()
    process.communicate()
  assert not (folder / "run").exists()


@pytest.fixture(scope="module")
def client(server):
  with openai.OpenAI(base_url=server[0], api_key=KEY, timeout=300, max_retries=0) as client:
    yield client


@pytest.fixture(scope="module")
def http(server):
  headers = {"Authorization": f"Bearer {KEY}"}
  with httpx.Client(base_url=server[0], headers=headers, timeout=300) as http:
    yield http


def chat(client, messages=CHAT, model="nano", **fields):
  return client.chat.completions.create(
    messages=messages, model=model, **{"max_tokens": 24, "seed": 1} | fields
  )


def engine_counts(http):
  root = str(http.base_url).removesuffix("v1/").rstrip("/")
  text = http.get(f"{root}/metrics").text
  return {k: float(v) for k, v in re.findall(r"^awf_(\w+) (\S+)$", text, re.M)}


def wait_until(http, holds, seconds=120):
  end = time.monotonic() + seconds
  while not holds(found := engine_counts(http)):
    assert time.monotonic() < end, found
    time.sleep(0.1)
  return found


def test_models_are_the_base_and_the_adapters(client):
  assert [model.id for model in client.models.list()] == ["nano", "tuned"]
  assert client.models.retrieve("tuned").object == "model"
  with pytest.raises(openai.NotFoundError) as caught:
    client.models.retrieve("gpt")
  assert caught.value.code == "model_not_found"


def test_a_chat_is_answered_and_counted(client):
  one = chat(client, temperature=0)
  again = chat(client, temperature=0, seed=7)
  (choice,) = one.choices
  assert one.object == "chat.completion" and choice.message.role == "assistant"
  assert choice.message.content == again.choices[0].message.content != ""
  assert one.usage.total_tokens == one.usage.prompt_tokens + one.usage.completion_tokens
  assert 0 < one.usage.completion_tokens <= 24 and choice.finish_reason in ("stop", "length")
  parts = [{"role": "user", "content": [{"type": "text", "text": CHAT[0]["content"]}]}]
  assert chat(client, parts, temperature=0).choices[0].message.content == choice.message.content
  many = chat(client, n=3, temperature=1.2)
  assert many.choices == chat(client, n=3, temperature=1.2).choices
  assert [c.index for c in many.choices] == [0, 1, 2]
  assert len({c.message.content for c in many.choices}) == 3
  free = [chat(client, seed=None, temperature=1.5).choices[0].message.content for _ in range(2)]
  assert free[0] != free[1], "without a seed the noise is new"
  short = chat(client, max_completion_tokens=3, max_tokens=None, temperature=1)
  assert short.usage.completion_tokens <= 3


def test_another_model_is_another_adapter(client):
  base, tuned = (chat(client, model=m, temperature=0) for m in ("nano", "tuned"))
  assert tuned.model == "tuned"
  assert base.choices[0].message.content != tuned.choices[0].message.content


def test_a_stream_says_what_the_whole_answer_says(client):
  for fields in ({}, {"stop": ["e", " 7"]}, {"max_tokens": 5}):
    fields |= {"n": 2, "temperature": 1.1, "logprobs": True}
    whole = chat(client, **fields)
    texts, reasons, logprobs, usage = ["", ""], [None] * 2, [[], []], None
    for chunk in chat(client, stream=True, stream_options={"include_usage": True}, **fields):
      usage = chunk.usage or usage
      for choice in chunk.choices:
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        logprobs[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [c.message.content for c in whole.choices]
    assert reasons == [c.finish_reason for c in whole.choices]
    for got, choice in zip(logprobs, whole.choices, strict=True):
      assert got[: len(choice.logprobs.content)] == choice.logprobs.content
    assert usage == whole.usage
    for stop in fields.get("stop", ()):
      assert not any(stop in text for text in texts)


def test_completions_of_texts_and_ids_with_log_probs(client):
  prompt = "Tom has 3 apples"
  make = client.completions.create
  one = make(model="nano", prompt=prompt, max_tokens=12, seed=2, logprobs=1)
  (choice,) = one.choices
  found = choice.logprobs
  assert one.object == "text_completion" and choice.text == "".join(found.tokens)
  assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(len(found.tokens))]
  assert all(p <= 0 for p in found.token_logprobs)
  assert [list(x.values())[0] for x in found.top_logprobs] == found.token_logprobs
  two = make(model="nano", prompt=[prompt, "Ann"], max_tokens=12, seed=2, n=2)
  assert [c.index for c in two.choices] == [0, 1, 2, 3] and two.choices[0].text == choice.text
  assert two.choices[0].logprobs is None
  default = make(model="nano", prompt=[5, 6, 7], seed=1, extra_body={"ignore_eos": True})
  assert (default.usage.prompt_tokens, default.usage.completion_tokens) == (3, 16)
  assert default.choices[0].finish_reason == "length"
  streamed = make(model="nano", prompt=[prompt, "Ann"], max_tokens=12, seed=2, n=2, stream=True)
  texts = [""] * 4
  for chunk in streamed:
    for c in chunk.choices:
      texts[c.index] += c.text
  assert texts == [c.text for c in two.choices]


def test_a_chats_log_probs(client):
  found = chat(client, temperature=1, logprobs=True).choices[0]
  content = found.logprobs.content
  assert "".join(token.token for token in content) == found.message.content
  assert all(token.logprob <= 0 and token.top_logprobs == [] for token in content)
  # Those before the cut: what a narrow top-p takes away shows in none of them.
  cut = chat(client, temperature=1, logprobs=True, top_p=0.01).choices[0].logprobs.content
  greedy = chat(client, temperature=0, logprobs=True).choices[0].logprobs.content
  assert [t.token for t in cut] == [t.token for t in greedy]
  np.testing.assert_allclose([t.logprob for t in cut], [t.logprob for t in greedy], atol=1e-4)


def test_bytes_of_tokens_make_the_text_where_a_token_is_a_part_of_a_character(client):
  made = chat(client, temperature=1000, n=4, max_tokens=64, logprobs=True, top_logprobs=2)
  broken = 0
  for choice in made.choices:
    content = choice.logprobs.content
    joined = b"".join(bytes(token.bytes) for token in content)
    assert joined.decode("utf-8", "replace") == choice.message.content
    for one in (one for token in content for one in (token, *token.top_logprobs)):
      assert bytes(one.bytes).decode("utf-8", "replace") == one.token
      broken += "\ufffd" in one.token
  assert broken


def test_calls_of_other_seeds_share_no_noise(client):
  seen = set()
  for seed in range(4):
    made = client.completions.create(
      model="nano", prompt=["Tom has"] * 4, max_tokens=24, seed=seed, temperature=2
    )
    seen |= {choice.text for choice in made.choices}
  assert len(seen) == 16


class Letters:
  """A tokenizer of a few texts."""

  texts = ("x", "a", "bc", "d")

  def decode(self, ids, skip_special=True):
    return "".join(self.texts[i] for i in ids)

  def token_bytes(self, token_id):
    return self.texts[token_id].encode()


def test_offsets_count_characters_of_the_text():
  letters = Letters()
  letters.decode = lambda ids, skip_special=True: b"".join(
    (b"a", b"\xe2\x82", b"\xac", b"bc")[i] for i in ids
  ).decode("utf-8", "replace")
  choice = Choice(0, TextStream(letters.decode), letters)
  ids = (0, 1, 2, 3, 1, 3)
  text, rows = choice.take(Part(0, ids, (-1.0,) * 6, "length", (-1.0,) * 6))
  assert text == "a\u20acbc\ufffdbc"
  assert [row.place for row in rows] == [0, 1, 1, 2, 4, 5]


@pytest.mark.parametrize("split", [1, 2, 3])
@pytest.mark.parametrize(("ids", "stop"), [((0, 1, 2), "abc"), ((0, 1, 3), None)])
def test_a_stream_shows_the_tokens_of_its_text_alone(ids, stop, split):
  """Tokens whose text a stop string may take back wait for it, wherever the parts are cut."""

  def taken(*cuts):
    letters = Letters()
    choice = Choice(0, TextStream(letters.decode, ("abc",)), letters)
    text, tokens = "", []
    for start, end in zip((0, *cuts), (*cuts, 3), strict=True):
      ending = ("stop" if stop else "length", stop) if end == 3 else (None, None)
      logprobs = (-1.0,) * (end - start)
      part = Part(0, ids[start:end], logprobs, ending[0], logprobs, ending[1])
      new, rows = choice.take(part)
      text, tokens = text + new, tokens + [row.drawn.text for row in rows]
    return text, tokens

  whole = taken()
  assert whole == (("x", ["x"]) if stop else ("xad", ["x", "a", "d"]))
  assert (taken(split) if split < 3 else taken(1, 2)) == whole


def test_the_likeliest_tokens_come_where_they_are_asked_for(client):
  fields = {"temperature": 1.2, "logprobs": True}
  plain = chat(client, **fields).choices[0]
  found = chat(client, top_logprobs=20, **fields).choices[0]
  assert found.message == plain.message, "asking for them changes no token"
  for token, own in zip(found.logprobs.content, plain.logprobs.content, strict=True):
    top = token.top_logprobs
    assert (token.token, token.logprob) == (own.token, own.logprob) and own.top_logprobs == []
    assert len(top) == 20 and top == sorted(top, key=lambda one: -one.logprob)
    assert 0.3 < sum(np.exp(one.logprob) for one in top) < 1.0001
    same = [one.logprob for one in top if one.token == token.token]
    assert not same or token.logprob in same
  several = chat(client, top_logprobs=20, n=8, **fields).choices  # rendered by a thread
  assert len(several) == 8 and all(
    len(token.top_logprobs) == 20 for choice in several for token in choice.logprobs.content
  )
  streamed = []
  for chunk in chat(client, top_logprobs=20, stream=True, **fields):
    streamed += [t for c in chunk.choices if c.logprobs for t in c.logprobs.content]
  assert streamed == found.logprobs.content
  greedy = chat(client, temperature=0, logprobs=True, top_logprobs=2).choices[0]
  for token in greedy.logprobs.content:
    assert len(token.top_logprobs) == 2 and token.top_logprobs[0].token == token.token
  made = client.completions.create(
    model="nano", prompt="Tom has 3 apples", max_tokens=12, seed=2, temperature=2, logprobs=3
  )
  rows = made.choices[0].logprobs
  for token, logprob, top in zip(rows.tokens, rows.token_logprobs, rows.top_logprobs, strict=True):
    assert 1 <= len(top) <= 4 and top[token] == logprob
  assert max(map(len, rows.top_logprobs)) >= 3


@pytest.mark.parametrize(
  ("fields", "kind", "param", "words"),
  [
    ({"model": "gpt"}, openai.NotFoundError, "model", "one of nano, tuned"),
    ({"messages": []}, openai.BadRequestError, "messages", "at least one message"),
    ({"messages": [{"role": "boss", "content": "x"}]}, openai.BadRequestError, "messages", "role"),
    ({"messages": [{"role": "user"}]}, openai.BadRequestError, "messages", "content"),
    ({"temperature": -1}, openai.BadRequestError, "temperature", "finite number >= 0"),
    ({"temperature": "hot"}, openai.BadRequestError, "temperature", "a number"),
    ({"top_p": 0}, openai.BadRequestError, "top_p", "more|in"),
    ({"n": 0}, openai.BadRequestError, "n", "1 to 128"),
    ({"n": True}, openai.BadRequestError, "n", "whole number"),
    ({"stop": ""}, openai.BadRequestError, "stop", "not empty"),
    ({"stop": ["a"] * 17}, openai.BadRequestError, "stop", "at most 16"),
    ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", "at least 1"),
    ({"max_tokens": 300}, openai.BadRequestError, "max_tokens", "at most 192"),
    ({"presence_penalty": 0.5}, openai.BadRequestError, "presence_penalty", "not supported"),
    ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "top_logprobs", "0 to 20"),
    ({"top_logprobs": 3}, openai.BadRequestError, "top_logprobs", "logprobs: true"),
    ({"extra_body": {"stop_token_ids": list(range(9))}}, openai.BadRequestError, "stop_token_ids",
     "stop_token_ids: .* at most 8 ids, the model's own among them, got 9"),
    ({"extra_body": {"stop_token_ids": [5, 2**31]}}, openai.BadRequestError, "stop_token_ids",
     "got 2147483648$"),
    ({"extra_body": {"stop_token_ids": 0}}, openai.BadRequestError, "stop_token_ids", "a list"),
    ({"extra_body": {"ignore_eos": "false"}}, openai.BadRequestError, "ignore_eos", "true or"),
    ({"extra_body": {"messages": "x"}}, openai.BadRequestError, "messages", "a list"),
    ({"stream_options": {"include_usage": "no"}}, openai.BadRequestError, "include_usage", "true"),
    ({"stream_options": {"usage": True}}, openai.BadRequestError, "stream_options", "unknown"),
    ({"model": "m" * 9000}, openai.NotFoundError, "model", "^.{,300}$"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
     openai.BadRequestError, "messages", r"messages\[0\].tool_calls is not supported"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "see"}]}]},
     openai.BadRequestError, "messages", "text parts"),
    ({"extra_body": {"beams": 3}}, openai.BadRequestError, "beams", "Unrecognized"),
    *(({"messages": [{"role": "user", "content": "apple " * count}]}, openai.BadRequestError,
       "messages", "maximum context length is 512") for count in (900, 15_000)),
  ],
)  # fmt: skip
def test_mistakes_are_named(client, fields, kind, param, words):
  with pytest.raises(kind) as caught:
    chat(client, **fields)
  assert caught.value.param == param and re.search(words, caught.value.message)
  assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")


def test_bodies_routes_and_tokens_that_cannot_be(server, client, http):
  root = server[0].removesuffix("/v1")
  for path, content, status in (
    ("chat/completions", b"{", 400),
    ("chat/completions", b"[]", 400),
    ("chat/completions", b'{"model": "nano", "\\ud800": 1}', 400),
    ("chat/completions", b'{"model": "nano", "messages": [], "x": "' + b"a" * 200_000, 413),
    ("embeddings", b"{}", 404),
    ("models", b"{}", 405),
  ):
    answer = http.post(path, content=content)
    assert answer.status_code == status, path
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
  assert answer.headers["allow"] == "GET, HEAD" or answer.headers["allow"] == "HEAD, GET"
  lower = {"Authorization": f"bearer {KEY}"}
  assert httpx.get(f"{root}/v1/models", headers=lower).status_code == 200

  def counted():
    text = httpx.get(f"{root}/metrics", headers=lower).text
    return [int(x) for x in re.findall(r"^awf_http_(?:requests|errors)_total (\d+)$", text, re.M)]

  before = counted()
  assert [httpx.get(f"{root}/{name}").status_code for name in ("nope", "health")] == [401, 200]
  assert counted() == [before[0] + 3, before[1] + 1]
  for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
    for path in ("/v1/models", "/metrics"):
      answer = httpx.get(root + path, headers=headers)
      assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
  with pytest.raises(openai.AuthenticationError):
    chat(client.with_options(api_key="wrong"))
  assert httpx.get(f"{root}/health").json() == {"status": "ok"}, "no token needed"
  assert read_config("configs/quickstart.py").serve.cors == (), "browsers are not let in unasked"
  wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x"}
  for origin, allowed in ((ORIGIN, ORIGIN), ("https://example.org", None)):
    for headers in ({"Origin": origin}, {"Origin": origin, **wanted}):
      verb = "OPTIONS" if wanted.items() <= headers.items() else "GET"
      found = httpx.request(verb, f"{root}/v1/models", headers=headers).headers
      assert found.get("access-control-allow-origin") == allowed, (verb, origin)
  assert root.startswith("http://127.0.0.1:")


def test_64_clients_at_once(server, client):
  async def run():
    async with openai.AsyncOpenAI(
      base_url=server[0], api_key=KEY, timeout=300, max_retries=0
    ) as many:
      return await asyncio.gather(
        *(
          many.chat.completions.create(
            model=("nano", "tuned")[i % 2], messages=CHAT, max_tokens=16, seed=i, temperature=1
          )
          for i in range(64)
        )
      )

  answers = asyncio.run(run())
  assert len({a.choices[0].message.content for a in answers}) > 20
  for i in (0, 33):
    alone = chat(client, model=("nano", "tuned")[i % 2], max_tokens=16, seed=i, temperature=1)
    assert alone.choices == answers[i].choices


def long(n):
  return {"n": n, "max_tokens": 180, "temperature": 1, "extra_body": {"ignore_eos": True}}


def test_a_client_that_leaves_cancels_its_rows(client, http):
  before = engine_counts(http)["cancelled_total"]
  with chat(client, stream=True, **long(128)) as stream:
    for chunk in stream:
      if chunk.choices[0].delta.content:
        break
  wait_until(http, lambda x: x["running"] == 0 and x["cancelled_total"] == before + 1)

  async def leave():
    async with openai.AsyncOpenAI(
      base_url=str(client.base_url), api_key=KEY, timeout=300, max_retries=0
    ) as one:
      asked = asyncio.ensure_future(chat(one, **long(128)))
      while not (await asyncio.to_thread(engine_counts, http))["running"]:
        assert not asked.done()
      asked.cancel()
      with pytest.raises(asyncio.CancelledError):
        await asked

  asyncio.run(leave())
  found = wait_until(http, lambda x: x["running"] == 0 and x["cancelled_total"] == before + 2)
  assert found["clients_gone_total"] >= 2
  assert chat(client, temperature=0).choices[0].message.content


def test_a_full_queue_is_429(client, http):
  with chat(client, stream=True, **long(128)):  # 80 may wait; alone, a larger one is let in
    with pytest.raises(openai.RateLimitError) as caught:
      chat(client)
  assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"
  wait_until(http, lambda x: x["running"] == x["waiting"] == 0)
  assert chat(client).choices


def test_many_prompts_of_one_call_stand_in_line(client):
  """12 x 8 completions where 80 may wait: the first prompt has a place, the others follow it."""
  prompts = [f"{i} apples and" for i in range(12)]
  made = client.completions.create(
    model="nano", prompt=prompts, n=8, max_tokens=2, temperature=1, seed=3
  )
  assert len(made.choices) == 96
  stream = client.completions.create(
    model="nano", prompt=prompts, n=8, max_tokens=2, temperature=1, seed=3, stream=True
  )
  texts = [""] * 96
  for chunk in stream:
    for choice in chunk.choices:
      texts[choice.index] += choice.text
  assert texts == [choice.text for choice in made.choices]


@pytest.mark.parametrize("host", ["127.0..1", "\u00fc..x", "x" * 64, "192.0.2.1"])
def test_a_host_that_is_not_this_machines_is_named(host):
  with pytest.raises(UserError, match=r"config.serve.host: .*address of this machine"):
    _bind(host, 0)


def test_answers_that_the_end_cuts_off_say_so(caplog):
  """Whole and streamed, and one whose request is not all there."""
  config = read_config("configs/quickstart.py")
  with config.unlocked():
    config.sampler.update(rows=2, context=512, max_new_tokens=192)
  policy = QwenPolicy.from_config(config)
  engine, held, go = policy.engine, threading.Event(), threading.Event()
  run = engine.device.run

  def hold(*args):
    drawn = run(*args)
    held.set()
    assert go.wait(400)
    return drawn

  engine.device.run = hold
  app = make_app(Service(policy, {"nano": 0}, SamplingParams(), 1 << 20))
  server = Server(uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1))
  with _bind("127.0.0.1", 0) as bound:
    port = bound.getsockname()[1]
    url, body = f"http://127.0.0.1:{port}/v1/completions", {"model": "nano", "prompt": "Tom"}
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])))
    thread.start()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      answers = [
        pool.submit(httpx.post, url, json={**body, "stream": stream}, timeout=400)
        for stream in (False, True)
      ]
      half = socket.create_connection(("127.0.0.1", port), timeout=400)
      half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
      until(lambda: held.is_set() and engine.stats()["requests"] == 2)
      server.should_exit = True
      whole, streamed = (answer.result() for answer in answers)
      assert b" 503 " in half.recv(100)
      half.close()
    thread.join(400)
  go.set()
  assert whole.status_code == 503 and whole.json()["error"]["code"] == "shutting_down"
  *_, last, done = streamed.text.strip().split("\n\n")
  assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
  assert done == "data: [DONE]" and engine.stats()["cancelled"] == 2
  policy.close()
  assert "Traceback" not in caplog.text


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_a_reader_that_stands_still_does_not_keep_the_server():
  async def endless():
    while True:
      yield {"x": "y" * 20_000}
      await asyncio.sleep(0)

  def ends():
    app = Starlette(routes=[Route("/", lambda request: EventStream(endless()))])
    settings = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    server = Server(settings)
    with _bind("127.0.0.1", 0) as bound:
      thread = threading.Thread(target=lambda: asyncio.run(server.serve([bound])), daemon=True)
      thread.start()
      with socket.create_connection(bound.getsockname(), timeout=400) as reader:
        reader.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert reader.recv(100).startswith(b"HTTP/1.1 200")
        server.should_exit = True
        thread.join(400)
        return not thread.is_alive()

  assert ends()
  gc.collect()  # its connection, which nobody closed


def test_a_fault_of_the_server_counts_and_a_client_that_left_does_not(caplog):
  async def broken(request):
    raise MemoryError("no more")

  async def left(request):
    raise ClientDisconnect

  service = Service(None, {"nano": 0}, SamplingParams(), 1 << 20)
  service.health, service.list_models = broken, left
  client = TestClient(make_app(service), raise_server_exceptions=False)
  assert client.get("/health").status_code == 500 and "no more" in caplog.text
  assert client.get("/v1/models").status_code == 499
  assert (service.counts["http_requests"], service.counts["http_errors"]) == (2, 1)


def test_a_key_of_blanks_opens_nothing(monkeypatch):
  monkeypatch.setenv("AWF_API_KEY", " \n")
  with pytest.raises(UserError, match="AWF_API_KEY: expected a key, got blanks"):
    _token("")
  assert _token(" own ") == "own"
  monkeypatch.delenv("AWF_API_KEY")
  assert _token("") == ""


def test_fields_of_openais_stream_options_are_known(client):
  options = {"include_usage": False, "include_obfuscation": False}
  content = [{"type": "text", "text": "Tom"}, {"text": " has"}]
  chunks = list(
    chat(
      client, stream=True, stream_options=options, messages=[{"role": "user", "content": content}]
    )
  )
  assert chunks[-1].choices


def test_a_port_that_somebody_has_is_refused_before_a_model_is_loaded():
  with _bind("127.0.0.1", 0) as bound:
    port = bound.getsockname()[1]
    socket.create_connection(("127.0.0.1", port), timeout=60).close()  # it listens
    with pytest.raises(
      UserError, match=f"cannot listen on 127.0.0.1:{port}.*another config.serve.port"
    ):
      _bind("127.0.0.1", port)


def test_our_own_remote_client_reads_it(server, client):
  async def run():
    llm = RemoteLLM(server[0], "nano", api_key=KEY)
    try:
      sampling = SamplingParams(temperature=0, max_new_tokens=24, stop=("#",))
      return await llm.complete(CHAT, sampling, 5)
    finally:
      llm.close()

  assert asyncio.run(run()).text == chat(client, temperature=0, stop="#").choices[0].message.content


def test_a_client_that_speaks_aflows_protocol(server, client, tmp_path):
  """With the README's lines of AFlow's config2.yaml; the stand-in's client, in its own process."""
  text = (ROOT / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
  assert len(text.splitlines()) == 4
  for old, new in (
    ("Qwen2.5-0.5B-Instruct", "nano"), ("http://127.0.0.1:8000/v1", server[0]), ("secret", KEY),
  ):  # fmt: skip
    assert text.count(old) == 1
    text = text.replace(old, new)
  (tmp_path / "config").mkdir()
  (tmp_path / "config" / "config2.yaml").write_text(text)
  code = (
    "from scripts.async_llm import LLMsConfig, ask; import sys, json; "
    "model = {**LLMsConfig.default().get('nano'), 'temperature': 0}; "
    "print(json.dumps(ask(model, sys.argv[1])))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code, CHAT[0]["content"]], cwd=tmp_path, capture_output=True, text=True,
    env={"PYTHONPATH": str(ROOT / "tests" / "mini_aflow"), "PATH": os.environ["PATH"]},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  reply, usage = json.loads(done.stdout)
  expected = chat(client, temperature=0, max_tokens=192)
  assert reply == expected.choices[0].message.content
  assert usage["completion_tokens"] == expected.usage.completion_tokens


def test_sigterm_lets_answers_end_and_the_mode_prints_its_figures(server, client):
  """The last test: it ends the server."""
  _, process, said = server
  stream = chat(client, stream=True, **{**long(2), "max_tokens": 60})
  chunks = [next(stream)]
  process.send_signal(signal.SIGTERM)
  chunks += list(stream)
  reasons = [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason]
  assert reasons == ["length"] * 2
  assert process.wait(120) == 0, "".join(said)
  figures = json.loads(process.stdout.read().splitlines()[-1])
  assert figures["mode"] == "serve" and figures["url"] == server[0]
  assert figures["http_requests"] > 30 and figures["tokens"] > 500
  assert "Traceback" not in "".join(said)
  with pytest.raises(openai.APIConnectionError):
    client.models.list()
