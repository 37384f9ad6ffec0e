"""The remote client against a real HTTP server on the loopback device."""

import asyncio
import contextlib
import http.server
import json
import logging
import shlex
import socket
import struct
import threading
import time

import pytest
from conftest import ROOT

from awf import cli
from awf.config import validate
from awf.config_io import load_config, resolve_paths
from awf.evaluate import run_eval
from awf.sampler.limits import RateLimit, Window, retry_after
from awf.sampler.remote import RemoteError, RemoteLLM
from awf.train import run_search, run_train
from awf.types import LLM, Completion, SamplingParams, UserError
from awf.workdir import Workdir

SECRET = "a-key-that-nobody-may-see"
CHAT = [{"role": "user", "content": "2 + 2?"}]
ANSWER = {
  "choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
  "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
}


@contextlib.contextmanager
def endpoint(*answers):
  """Serves answers in turn, the last one for ever; yields (url, requests).

  An answer is (status, body), (status, body, headers), "reset" (the connection breaks), a number
  of seconds in which nothing comes, or a function of the request's body that gives such an answer.
  """
  left, seen, lock = list(answers), [], threading.Lock()

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802  (the base class looks for this name)
      body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
      with lock:
        seen.append((self.path, self.headers.get("Authorization"), body))
        answer = left.pop(0) if len(left) > 1 else left[0]
      answer = answer(body) if callable(answer) else answer
      if answer == "reset":
        linger = struct.pack("ii", 1, 0)  # closing sends RST
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        return
      if isinstance(answer, float):
        time.sleep(answer)
        answer = (200, ANSWER)
      status, content, headers = (*answer, {})[:3]
      data = content if isinstance(content, bytes) else json.dumps(content).encode()
      with contextlib.suppress(OSError):  # the client may be gone
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
          self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
      """Keeps the test's output clean."""

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
      yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
      server.shutdown()
      thread.join()


def ask(url, sampling=SamplingParams(), key=5, count=1, adapter=0, **options):  # noqa: B008
  llm = RemoteLLM(url, "some-model", api_key=SECRET, **{"first_wait": 0.001, **options})
  assert isinstance(llm, LLM)

  async def go():
    return await asyncio.gather(*(llm.complete(CHAT, sampling, key, adapter) for _ in range(count)))

  try:
    return asyncio.run(go()), llm.stats()
  finally:
    llm.close()


def test_request_and_completion():
  sampling = SamplingParams(0.7, 0.9, 20, 64, min_p=0.05, stop=("###",))
  with endpoint((200, ANSWER)) as (url, seen):
    (completion,), stats = ask(url, sampling, key=2**40 + 5)
  assert completion == Completion((), (), (), "4", "stop", usage=(7, 2))
  assert completion.counts == (7, 2)
  path, token, body = seen[0]
  assert (path, token) == ("/v1/chat/completions", f"Bearer {SECRET}")
  assert body == {
    "model": "some-model", "messages": CHAT, "temperature": 0.7, "top_p": 0.9, "top_k": 20,
    "min_p": 0.05, "stop": ["###"], "max_tokens": 64, "seed": 5,
  }  # fmt: skip
  counts = {"requests": 1, "retries": 0, "prompt_tokens": 7, "tokens": 2, "without_usage": 0}
  assert stats == counts


def test_top_k_is_left_out_when_off_and_length_is_passed_on(caplog):
  cut = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
  with endpoint((200, cut)) as (url, seen), caplog.at_level(logging.WARNING, "awf"):
    (completion, _), stats = ask(url, count=2)
  assert not {"top_k", "min_p", "stop"} & set(seen[0][2])
  assert (completion.text, completion.finish_reason) == ("", "length")
  assert stats["without_usage"] == 2 and caplog.text.count("reports no usage") == 1


@pytest.mark.parametrize(
  "fault",
  [(429, {}), (503, {}), (500, b"broken"), "reset", 3.0, (200, b"<html>"), (200, b'{"choices": [')],
)
def test_what_may_pass_is_asked_again(fault):
  with endpoint(fault, fault, (200, ANSWER)) as (url, seen):
    (completion,), stats = ask(url, timeout=1.0 if fault == 3.0 else 60.0)
  assert completion.text == "4" and len(seen) == 3 and stats["retries"] == 2


def test_retry_after_holds_all_requests_back():
  with endpoint((429, {}, {"Retry-After": "1"}), (200, ANSWER)) as (url, seen):
    began = time.monotonic()
    completions, stats = ask(url, count=4, concurrency=1)
    assert time.monotonic() - began >= 1.0
  assert len(completions) == 4 and len(seen) == 5 and stats["retries"] == 1
  with endpoint((503, b"closed", {"Retry-After": "86400"})) as (url, seen):
    with pytest.raises(RemoteError, match="asks to wait 86400 s"):
      ask(url)
    assert len(seen) == 1


def test_retry_after_is_read_in_both_forms():
  assert [retry_after(text) for text in (None, "", "2.5", "-1", "soon")] == [0, 0, 2.5, 0, 0]
  assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
  assert retry_after("Fri, 31 Dec 2026 23:59:59 +9999999999999") == 0, "no date that there is"
  assert retry_after("Wed, 21 Oct 2199 07:28:00 GMT") > 1e9


def test_no_stretch_of_a_window_sees_more_than_the_limit():
  window, now, taken = Window(10, 60.0), 0.0, []
  for cost in (4, 4, 4, 9, 1, 25, 3) * 5:  # 25 counts as the whole limit
    now += window.delay(cost, now)
    assert window.delay(cost, now) == 0
    window.take(cost, now)
    taken.append((now, min(cost, 10)))
  for start, _ in taken:
    assert sum(cost for at, cost in taken if start <= at < start + 60) <= 10
  assert now <= 60 * sum(cost for _, cost in taken) / 5  # it waits no longer than it must
  window = Window(10, 60.0)
  window.take(10, 0.0)[1] = 3.0  # it was less in the end
  assert window.delay(7, 1.0) == 0 and window.delay(8, 1.0) == 59


def test_requests_and_tokens_a_minute_are_kept():
  with endpoint((200, ANSWER)) as (url, seen):
    for limit in (RateLimit(2, 0, 0.3), RateLimit(0, 20, 0.3)):  # 9 tokens each: two in a window
      began = time.monotonic()
      ask(url, count=5, limit=limit, sampling=SamplingParams(max_new_tokens=8))
      assert time.monotonic() - began >= 0.6 and limit.waited > 0
  assert len(seen) == 10


def test_many_at_once_from_several_event_loops():
  with endpoint((200, ANSWER)) as (url, seen):
    completions, stats = ask(url, count=12, concurrency=3)
    assert len(completions) == len(seen) == 12 and stats["tokens"] == 24
    llm = RemoteLLM(url, "m", api_key="")
    for _ in range(2):
      done = asyncio.run(llm.propose(CHAT, 3, 7, SamplingParams()))
      assert [c.text for c in done] == ["4"] * 3
    llm.close()
    llm.close()
  seeds = [body["seed"] for _, token, body in seen[12:] if token is None]
  assert (
    len(seeds) == 6 and len(set(seeds)) == 3
  )  # a proposal's seed is a function of key and place


def test_a_caller_that_gives_up_frees_its_place():
  with endpoint(2.0, (200, ANSWER)) as (url, _):
    llm = RemoteLLM(url, "m", api_key="", concurrency=1)

    async def go():
      with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
          await llm.complete(CHAT, SamplingParams(), 0)
      return await llm.complete(CHAT, SamplingParams(), 0)

    assert asyncio.run(go()).text == "4"
    llm.close()


def test_an_endpoint_that_stays_down_is_an_infrastructure_failure():
  with endpoint((500, b"broken")) as (url, seen):
    with pytest.raises(RemoteError, match="3 tries: status 500: broken"):
      ask(url, retries=2)
    assert len(seen) == 3
  with pytest.raises(RemoteError, match="no answer in 2 tries: ConnectError"):
    ask(url, retries=1)
  llm = RemoteLLM(url, "m", retries=0, field="config.search.remote")
  with pytest.raises(UserError, match="config.search.remote: .* gave no answer in 1 tries"):
    asyncio.run(llm.propose(CHAT, 2, 0, SamplingParams()))
  with pytest.raises(UserError, match="config.search.remote: .* gave no answer"):
    asyncio.run(llm.check())
  llm.close()


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404])
def test_a_refusal_is_the_users_mistake_not_repeated_and_without_the_key(status):
  with endpoint((status, f"no such model for\n{SECRET}".encode())) as (url, seen):
    with pytest.raises(UserError, match=r"'some-model': status \d+: no such model for \*\*\*") as e:
      ask(url)
    assert len(seen) == 1 and SECRET not in str(e.value) and "\n" not in str(e.value)
    assert ("key_env" in str(e.value)) is (status in (401, 403))


def test_a_prompt_that_is_too_long_is_refused_like_at_home():
  for message in (
    {"error": {"code": "context_length_exceeded", "message": "too long"}},
    {"message": "This model's maximum context length is 8 tokens."},
  ):
    with endpoint((400, message)) as (url, _):
      (completion,), _ = ask(url)
    assert completion.finish_reason == "refused" and completion.counts == (0, 0)


def test_models_that_want_another_name_for_the_limit_get_it():
  error = {"error": {"message": "Use 'max_completion_tokens' instead.", "param": "max_tokens"}}
  with endpoint((400, error), (200, ANSWER)) as (url, seen):
    ask(url, SamplingParams(max_new_tokens=11), count=3, concurrency=1)
  limits = [{k: v for k, v in body.items() if k.startswith("max")} for _, _, body in seen]
  assert limits == [{"max_tokens": 11}] + 3 * [{"max_completion_tokens": 11}]


@pytest.mark.parametrize("answer", [{"choices": []}, {"error": "x"}, [1], {"choices": "ab"}])
def test_an_answer_that_is_no_completion(answer):
  with endpoint((200, answer)) as (url, _), pytest.raises(RemoteError, match="expected"):
    ask(url)


def test_a_lone_surrogate_is_sent_as_a_question_mark(monkeypatch):
  monkeypatch.setitem(CHAT[0], "content", "a\ud800b")
  with endpoint((200, ANSWER)) as (url, seen):
    ask(url)
    assert seen[0][2]["messages"][0]["content"] == "a?b"


def test_wrong_arguments():
  with pytest.raises(UserError, match="http"):
    RemoteLLM("localhost:8000", "m")
  for url in ("http://ex\u00e4mple..x/v1", "http://xn--/v1", "http://[::1/v1", "http://a:b/v1"):
    with pytest.raises(UserError, match="config.executor.remote: expected a valid address"):
      RemoteLLM(url, "m", field="config.executor.remote")
  for key in ("schl\u00fcssel", "two\nlines"):
    with pytest.raises(UserError, match="printable ASCII") as refused:
      RemoteLLM("http://localhost:1/v1", "m", api_key=key)
    assert key not in str(refused.value)
  with endpoint((200, ANSWER)) as (url, _), pytest.raises(ValueError, match="adapter"):
    ask(url, adapter=1)


@pytest.mark.parametrize("group", ["executor", "search"])
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"url": "localhost:8000/v1", "model": "m"}, ".url: expected http(s)://HOST"),
    ({"url": f"https://me:{SECRET}@host/v1", "model": "m"}, ".url: expected http(s)://HOST"),
    ({"url": f"https://host/v1?key={SECRET}", "model": "m"}, "without user, password and query"),
    ({"url": "http://host:99999/v1", "model": "m"}, ".url: expected http(s)://HOST"),
    ({"url": "https://host/v1"}, ".model is empty"),
    ({"key_env": SECRET}, ".key_env: expected the name of an environment variable"),
    ({"retries": -1}, "remote.retries"),
    ({"timeout": 0.0}, "remote.timeout"),
  ],
)
def test_mistakes_in_the_config_are_named_and_show_no_secret(group, changes, message):
  config = load_config("configs/quickstart.py:smoke")
  config[group].remote.update(changes)
  with pytest.raises(UserError) as refused:
    validate(config, "search")
  assert message in str(refused.value) and f"config.{group}.remote" in str(refused.value)
  assert SECRET not in str(refused.value)


def test_a_key_that_is_not_there_and_a_remote_optimiser_that_should_be_trained():
  config = load_config("configs/quickstart.py:smoke")
  config.search.remote.update({"url": "http://localhost:1/v1", "model": "m"})
  validate(config, "search")
  with pytest.raises(UserError, match="config.search.remote.url: mode train is about the policy"):
    validate(config, "train")
  config.search.remote.key_env = "AWF_NO_SUCH_VARIABLE"
  with pytest.raises(UserError, match="key_env.* is not set") as refused:
    RemoteLLM.from_config(config.search.remote, "search.remote")
  assert "AWF_NO_SUCH_VARIABLE" not in str(refused.value)
  config.search.prices = (1.0,)
  with pytest.raises(UserError, match="two prices"):
    validate(config, "search")


def test_the_readmes_command_is_understood():
  text = (ROOT / "README.md").read_text().split("\n### Remote models\n")[1].split("```")[1]
  key, program, script, *argv = shlex.split(text.replace("\\\n", " "))
  assert (key, program, script) == ("OPENAI_API_KEY=...", "python", "launch.py")
  config = cli.parse(argv).config
  assert config.search.remote.model == "gpt-4o" and config.search.prices == (2.5, 10.0)
  assert config.search.remote.requests_per_minute == 500


EDIT = (
  "<modification>Work in steps.</modification>\n<graph>\n{graph}\n</graph>\n"
  '<prompt>\nSTEPS = """Think first.\n"""\n</prompt>'
)


def scripted(body):
  """An endpoint that proposes one edit, and answers every problem with 7."""
  text = "<answer>7</answer>"
  if "Improve this workflow." in body["messages"][-1]["content"]:
    seed = body["messages"][-1]["content"].split("<graph>\n")[1].split("\n</graph>")[0]
    text = EDIT.format(graph=seed.replace('instruction=""', "instruction=prompt_custom.STEPS"))
  usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
  message = {"role": "assistant", "content": text}
  return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}


def run(mode, folder, *argv):
  command = cli.parse(
    [
      "--config=configs/quickstart.py:smoke", f"--mode={mode}", f"--workdir={folder}",
      "--config.mesh.data=1", "--config.sandbox.wall_seconds=600",
      "--config.sandbox.preload_numeric=false", *argv,
    ]
  )  # fmt: skip
  function = {"search": run_search, "train": run_train, "eval": run_eval}[mode]
  with Workdir(command.workdir) as workdir:
    workdir.open(command.config, mode)
    return function(resolve_paths(command.config), workdir)


def test_a_search_with_a_remote_optimiser(tmp_path, monkeypatch, caplog):
  monkeypatch.setenv("A_KEY", SECRET)
  with endpoint((429, {}, {"Retry-After": "0.1"}), scripted) as (url, seen):
    figures = run(
      "search", tmp_path / "run", f"--config.search.remote.url={url}",
      "--config.search.remote.model=big", "--config.search.remote.key_env=A_KEY",
      "--config.search.prices=2,10", "--config.search.rounds=1",
    )  # fmt: skip
  asked = [body for _, token, body in seen if token == f"Bearer {SECRET}"]
  assert len(asked) == len(seen) == 2 + 8  # the check, busy once; two parents, four proposals each
  assert figures["rounds"] == 1 and figures["updates"] == 0
  assert figures["cost_usd"] == pytest.approx(8 * (1000 * 2 + 100 * 10) / 1e6)
  lines = (tmp_path / "run/trajectories/round_0001.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert {row["modification"] for row in rows} == {"Work in steps."}
  assert all(row["tokens"] == 100 and row["failure"] is None for row in rows)
  for file in (p for p in (tmp_path / "run").rglob("*") if p.is_file()):
    assert SECRET.encode() not in file.read_bytes(), file
  assert SECRET not in caplog.text


def test_remote_models_alone_need_no_local_one(tmp_path, monkeypatch):
  """Executor and optimiser elsewhere: a search and its evaluation load no model."""
  monkeypatch.setattr("awf.policy.make_policy", None)
  with endpoint(scripted) as (url, _):
    argv = [
      "--config.model.path=", "--config.task.limit=10", "--config.search.prices=2,10",
      *(f"--config.{g}.remote.{k}={v}" for g in ("executor", "search")
        for k, v in (("url", url), ("model", "big"))),
    ]  # fmt: skip
    figures = run("search", tmp_path / "run", *argv)
    assert run("search", tmp_path / "run", *argv) == figures  # it is complete
    evaluated = run("eval", tmp_path / "run", *argv, "--config.executor.prices=1,4")
  assert figures["rounds"] == 1 and figures["tokens"] == 100 * (figures["llm_calls"] + 8 + 2)
  assert evaluated["cost_usd"] == pytest.approx(evaluated["llm_calls"] * (1000 + 400) / 1e6)


def test_training_with_a_remote_executor(tmp_path):
  with endpoint(scripted) as (url, seen):
    figures = run(
      "train", tmp_path / "run", f"--config.executor.remote.url={url}",
      "--config.executor.remote.model=big", "--config.executor.prices=1,4",
    )  # fmt: skip
  calls = len(seen) - 1  # one was the check
  assert figures["rounds"] == 1 and figures["updates"] + figures["skipped_updates"] == 1
  assert figures["llm_calls"] == calls > 8 and figures["tokens"] > 100 * calls
  assert figures["cost_usd"] == pytest.approx(calls * (1000 + 400) / 1e6)
