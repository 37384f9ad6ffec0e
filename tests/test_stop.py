"""Text of growing completions, and stop strings that lie over several tokens."""

import dataclasses
import random

import numpy as np
import pytest
from test_sampler import CONTEXT, TINY, V, crowd, prompt
from tiny_checkpoint import random_params

from awf.sampler.engine import Engine, Request
from awf.sampler.text import TextStream, cut, first_stop

# Tokens with one to three letters, and the single bytes of characters that take two to four.
BYTES = [bytes(97 + (i * 7 + j) % 5 for j in range(1 + i % 3)) for i in range(V - 9)]
BYTES += [bytes([b]) for b in "é€😀".encode()]
assert len(BYTES) == V


def decode(ids):
  return b"".join(BYTES[i] for i in ids).decode("utf-8", "replace")


def ids_of(text):
  """Ids whose text it is; characters beyond ASCII byte by byte."""
  single = {one: i for i, one in enumerate(BYTES) if len(one) == 1}
  return [single[bytes([b])] for b in text.encode()]


# --- text


def test_whole_characters_appear_as_soon_as_they_are_whole():
  stream, seen = TextStream(decode), []
  for token_id in ids_of("aé€b😀"):
    stream.add(token_id)
    seen.append(stream.text)
  assert seen == ["a", "a", "aé", "aé", "aé", "aé€", "aé€b"] + ["aé€b"] * 3 + ["aé€b😀"]


def test_text_of_the_parts_is_the_text_of_the_whole():
  draw = random.Random(0)
  for _ in range(300):
    ids = [draw.randrange(V) for _ in range(draw.randint(1, 60))]
    stream = TextStream(decode)
    for token_id in ids:
      assert not stream.add(token_id)
      assert decode(ids).startswith(stream.text.rstrip("\ufffd"))
    stream.close()
    assert stream.text.replace("\ufffd", "") == decode(ids).replace("\ufffd", "")


def reference(ids, stop):
  """(tokens kept, text) by trying every length."""
  for end in range(1, len(ids) + 1):
    if any(one in decode(ids[:end]) for one in stop):
      return end, cut(decode(ids[:end]), stop)
  return len(ids), decode(ids)


def test_a_stop_string_is_found_at_the_token_that_completes_it():
  draw, ends = random.Random(1), []
  for _ in range(1000):
    ids = [draw.randrange(V - 9) for _ in range(40)]
    stop = ["".join(draw.choices("abcde", k=draw.randint(1, 6))) for _ in range(draw.randint(1, 3))]
    stream = TextStream(decode, stop)
    end = next((i + 1 for i, token_id in enumerate(ids) if stream.add(token_id)), len(ids))
    want, text = reference(ids, stop)
    assert end == want
    assert stream.text[: stream.sure] == text or stream.stop is None
    assert (stream.stop is not None) == any(one in decode(ids) for one in stop)
    ends.append(end)
  assert 100 < sum(end < 40 for end in ends) < 1000


def test_a_stop_string_of_several_bytes_and_one_inside_a_token():
  stream = TextStream(decode, ["€b", "zz"])
  assert [stream.add(i) for i in ids_of("aé€b")] == [False] * 6 + [True]
  assert (stream.stop, stream.text[: stream.sure]) == ("€b", "aé")
  token_id = next(i for i, one in enumerate(BYTES) if len(one) == 3)
  inside = BYTES[token_id].decode()[1]
  stream = TextStream(decode, [inside])
  assert stream.add(token_id) and stream.text[: stream.sure] == BYTES[token_id].decode()[0]


@pytest.mark.parametrize("stray", [13, 14, 15, 16, 29])
def test_a_stop_string_of_several_bytes_behind_stray_ones(stray):
  (*_, last) = ids_of("é")
  for text in ("€", "😀"):
    stream, ids = TextStream(decode, [text]), [last] * stray + ids_of(text)
    assert [stream.add(i) for i in ids] == [False] * (len(ids) - 1) + [True]
    assert stream.text == decode(ids) and stream.stop == text


def test_what_may_begin_a_stop_string_is_not_sure():
  stream, sure = TextStream(decode, ["abc", "cd"]), []
  for token_id in ids_of("ababab"):
    stream.add(token_id)
    sure.append(stream.text[: stream.sure])
  assert sure == ["", "", "ab", "ab", "abab", "abab"]
  stream.add(ids_of("c")[0])
  assert stream.stop == "abc" and stream.text[: stream.sure] == "abab"


def test_the_string_that_begins_first_counts():
  assert first_stop("abcde", ["de", "cd", "bcde"]) == (1, "bcde")
  assert cut("abcde", ["de", "x"]) == "abc"
  assert cut("abcde", ["x"]) == "abcde" and first_stop("abc", []) is None


# --- the engine


@pytest.fixture(scope="module")
def engine():
  with Engine(
    TINY, random_params(TINY, size=0.3), rows=32, context=CONTEXT, prefill_rows=2,
    steps_per_dispatch=6, decode=decode,
  ) as engine:  # fmt: skip
    yield engine


def test_a_row_ends_where_its_text_has_a_stop_string_and_nothing_else_changes(engine):
  free = [Request(prompt(9, s), n=2, seed=s, max_new_tokens=60) for s in range(8)]
  plain = engine.generate(free)
  others = crowd(5)
  alone = engine.generate(others)
  stopped = [dataclasses.replace(r, stop=("bcd", "eab", "dd")) for r in free]
  mixed = engine.generate([*others[:20], *stopped, *others[20:]])
  assert mixed[:20] + mixed[28:] == alone, "rows that are freed within a dispatch disturb nobody"
  reasons = []
  for outputs, wants in zip(mixed[20:28], plain, strict=True):
    for output, want in zip(outputs, wants, strict=True):
      end, _ = reference(want.token_ids, stopped[0].stop)
      assert output.token_ids == want.token_ids[:end]
      assert output.logprobs == want.logprobs[:end], "log-probs as drawn, the last one included"
      is_there = any(one in decode(output.token_ids) for one in stopped[0].stop)
      assert output.finish_reason == ("stop" if is_there else "length")
      assert output.stop in stopped[0].stop if is_there else output.stop is None
      reasons.append(output.finish_reason)
  assert reasons.count("stop") > 8
  assert engine.generate(free) == plain, "and no later request"
  assert engine.stats()["traces"] == 1


def test_at_the_limit_a_stop_string_is_a_stop_and_a_stop_id_comes_before_its_text(engine):
  request = Request(prompt(9, 1), seed=3, max_new_tokens=40)
  ((free,),) = engine.generate([request])
  text = decode(free.token_ids[:12])[-4:]
  end, _ = reference(free.token_ids, [text])
  at_limit = dataclasses.replace(request, stop=(text,), max_new_tokens=end)
  before = dataclasses.replace(at_limit, max_new_tokens=end - 1)
  by_id = dataclasses.replace(at_limit, stop_ids=(free.token_ids[end - 1],))
  ignoring = dataclasses.replace(at_limit, ignore_eos=True)
  (one,), (two,), (three,), (four,) = engine.generate([at_limit, before, by_id, ignoring])
  assert (one.finish_reason, one.stop, one.token_ids) == ("stop", text, free.token_ids[:end])
  assert (two.finish_reason, two.stop) == ("length", None)
  assert (three.finish_reason, three.stop) == ("stop", None)
  assert three.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[end - 1]) + 1]
  assert (four.finish_reason, four.stop) == ("length", None)


def test_empty_stop_strings_and_engines_without_text_are_errors(engine):
  for stop in (("",), ("a", ""), (3,)):
    with pytest.raises(ValueError, match="stop: expected texts that are not empty"):
      Request((1,), stop=stop)
  with Engine(
    TINY, random_params(TINY), rows=1, context=CONTEXT, prefill_rows=1, steps_per_dispatch=1
  ) as bare:
    with pytest.raises(ValueError, match="stop: this engine was made without `decode`"):
      bare.submit(Request((1,), stop=("a",)))
  assert len(engine.generate([Request((1,), max_new_tokens=2)])[0][0].token_ids) == 2


# --- log-probs of choice


@pytest.mark.parametrize("cuts", [{}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.7}])
def test_log_probs_that_are_wanted(engine, cuts):
  request = Request(prompt(12, 2), n=2, seed=1, temperature=1.7, max_new_tokens=20, **cuts)
  none, drawn, both = engine.generate(
    [dataclasses.replace(request, logprobs=x) for x in ("none", "drawn", "both")]
  )
  for a, b, c in zip(none, drawn, both, strict=True):
    assert a.token_ids == b.token_ids == c.token_ids
    assert a.logprobs == a.full_logprobs == b.full_logprobs == ()
    assert b.logprobs == c.logprobs
    gain = np.subtract(c.logprobs, c.full_logprobs)
    if not cuts:
      assert c.full_logprobs == c.logprobs
    else:
      assert (gain > -1e-6).all() and gain.max() > 0.02
  with pytest.raises(ValueError, match="logprobs: expected one of none, drawn, both, got 'all'"):
    dataclasses.replace(request, logprobs="all")
