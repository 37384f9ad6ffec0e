"""The remote client against a real HTTP server on the loopback device."""

import asyncio
import contextlib
import http.server
import json
import threading

import pytest

from awf.sampler.remote import RemoteError, RemoteLLM
from awf.types import LLM, SamplingParams, UserError

CHAT = [{"role": "user", "content": "2 + 2?"}]
ANSWER = {
  "choices": [{"message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}],
  "usage": {"prompt_tokens": 7, "completion_tokens": 2},
}


@contextlib.contextmanager
def endpoint(*answers):
  """Serves the (status, body) answers in turn, the last one for ever; yields (url, requests)."""
  left, seen = list(answers), []

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802  (the base class looks for this name)
      body = self.rfile.read(int(self.headers["Content-Length"]))
      seen.append((self.path, self.headers.get("Authorization"), json.loads(body)))
      status, answer = left.pop(0) if len(left) > 1 else left[0]
      data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
      self.send_response(status)
      self.send_header("Content-Length", str(len(data)))
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
  async def go():
    llm = RemoteLLM(url, "some-model", api_key="secret", first_wait=0.001, **options)
    assert isinstance(llm, LLM)
    try:
      done = await asyncio.gather(
        *(llm.complete(CHAT, sampling, key, adapter) for _ in range(count))
      )
    finally:
      await llm.close()
    return done, llm.stats()

  return asyncio.run(go())


def test_request_and_answer():
  sampling = SamplingParams(0.3, 0.9, 20, max_new_tokens=11, min_p=0.05, stop=("###",))
  with endpoint((200, ANSWER)) as (url, seen):
    (completion,), stats = ask(url, sampling, key=2**40 + 3)
  ((path, authorization, body),) = seen
  assert path == "/v1/chat/completions" and authorization == "Bearer secret"
  assert body == {
    "model": "some-model",
    "messages": CHAT,
    "temperature": 0.3,
    "top_p": 0.9,
    "top_k": 20,
    "min_p": 0.05,
    "stop": ["###"],
    "max_tokens": 11,
    "seed": 3,
  }
  assert (completion.text, completion.finish_reason, completion.token_ids) == ("4", "stop", ())
  assert stats == {"requests": 1, "retries": 0, "prompt_tokens": 7, "tokens": 2}


def test_top_k_is_left_out_when_off_and_length_is_passed_on():
  cut = {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
  with endpoint((200, cut)) as (url, seen):
    (completion,), _ = ask(url)
  assert not {"top_k", "min_p", "stop"} & set(seen[0][2])
  assert (completion.text, completion.finish_reason) == ("", "length")


def test_busy_endpoint_is_asked_again():
  with endpoint((429, {}), (503, {}), (200, ANSWER)) as (url, seen):
    (completion,), stats = ask(url)
  assert completion.text == "4" and len(seen) == 3 and stats["retries"] == 2


def test_many_at_once():
  with endpoint((200, ANSWER)) as (url, seen):
    completions, stats = ask(url, count=12, concurrency=3)
  assert len(completions) == len(seen) == 12 and stats["tokens"] == 24


def test_an_endpoint_that_stays_down_is_an_infrastructure_failure():
  with endpoint((500, b"broken")) as (url, seen):
    with pytest.raises(RemoteError, match="3 tries: status 500: broken"):
      ask(url, retries=2)
    assert len(seen) == 3
  with pytest.raises(RemoteError, match="no answer in 2 tries: ConnectError"):
    ask(url, retries=1)


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_the_users_mistake_and_not_repeated(status):
  with endpoint((status, b"no such model")) as (url, seen):
    with pytest.raises(UserError, match=f"'some-model': status {status}: no such model"):
      ask(url)
    assert len(seen) == 1


@pytest.mark.parametrize("answer", [b"<html>", {"choices": []}, {"error": "x"}, [1]])
def test_an_answer_that_is_no_completion(answer):
  with endpoint((200, answer)) as (url, _), pytest.raises(RemoteError, match="expected"):
    ask(url)


def test_wrong_arguments():
  with pytest.raises(UserError, match="http"):
    RemoteLLM("localhost:8000", "m")
  with endpoint((200, ANSWER)) as (url, _), pytest.raises(ValueError, match="adapter"):
    ask(url, adapter=1)
