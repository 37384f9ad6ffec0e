"""Pages of prompts: what is shared, what is evicted, and completions that never notice."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sampler import CONTEXT, ROWS, TINY, V, check_logprobs, prompt
from tiny_checkpoint import random_params

from awf.hlo_cost import count_module
from awf.qwen.lora import LoRAConfig, init_lora, scaled, stack_adapters
from awf.sampler.cache import init_cache
from awf.sampler.decode import compile_dispatch, empty_work
from awf.sampler.engine import Engine, Request
from awf.sampler.pages import PageTable
from awf.sampler.shapes import make_shapes

W = 4  # tokens of a page in the tables below


def key(ids, adapter=0, version=None):
  return tuple(ids), adapter, version


def held(table, ids, **fields):
  """Acquires a prompt and fills it."""
  prompt = table.acquire(key(ids, **fields))
  table.finish(prompt)
  return prompt


# --- the table


def test_equal_prompts_are_one_and_common_beginnings_share_whole_pages():
  table = PageTable(8, W)
  first = held(table, range(11))  # 10 known tokens: two whole pages and a part
  assert first.known == 10 and len(first.pages) == 3 and first.next_token == 0
  assert table.acquire(key(range(11))) is first and first.readers == 2
  other = table.acquire(key([*range(8), 90, 91, 92, 93]))
  assert other.pages[:2] == first.pages[:2] and other.pages[2] != first.pages[2]
  assert other.next_token == 8 and not other.is_ready
  assert table.num_held == 4
  inside = table.acquire(key([*range(6), 90]))  # differs within the second page
  assert inside.pages[0] == first.pages[0] and inside.pages[1] not in first.pages
  assert inside.next_token == 4


def test_a_prompt_of_one_token_needs_no_page():
  table = PageTable(1, W)
  prompt = table.acquire(key([5]))
  assert prompt.pages == [] and prompt.known == 0 and prompt.is_ready
  table.release(prompt)


def test_another_adapter_or_version_shares_nothing():
  table = PageTable(8, W)
  pages = [
    held(table, range(9), adapter=a, version=v).pages for a, v in ((0, None), (1, 1), (1, 2))
  ]
  assert len({page for some in pages for page in some}) == 6
  table.release(table.acquire(key(range(9))))


def test_a_beginning_that_is_not_filled_yet_is_waited_for():
  table = PageTable(8, W)
  long = table.acquire(key(range(13)))
  short = table.acquire(key(range(9)))  # all of its pages are there, none is filled
  assert short.next_token == short.known == 8 and not short.is_ready
  table.finish(long)
  assert table.acquire(key(range(5))).is_ready


def test_a_page_is_there_for_others_as_soon_as_it_is_full():
  table = PageTable(8, W)
  long = table.acquire(key(range(13)))
  short = table.acquire(key([*range(4), 90, 91]))
  long.next_token = 3
  table.fill(long)
  assert not table.is_open(short)
  long.next_token = 6
  table.fill(long)
  assert table.is_open(short) and table.acquire(key(range(5))).is_ready
  assert not table.acquire(key(range(9))).is_ready, "its second page is not full"


def test_a_prompt_that_is_given_up_ends_with_what_others_count_on():
  table = PageTable(12, W)
  long, short = table.acquire(key(range(17))), table.acquire(key([*range(4), 90, 91]))
  assert not table.abandon(long)
  assert (long.known, len(long.pages), table.num_held) == (4, 1, 2)
  again = table.acquire(key(range(17)))
  assert again is not long and again.pages[0] == long.pages[0] and again.next_token == 4
  table.finish(long)
  table.release(long)
  assert table.is_open(short) and table.is_open(again) and not again.is_ready
  assert table.acquire(key(range(17))) is again
  partly = table.acquire(key(range(40, 57)))
  partly.next_token = 4
  table.fill(partly)
  assert table.abandon(partly)
  assert table.acquire(key(range(40, 45))).is_ready, "what was full stays"


def test_what_was_used_long_is_as_recent_as_its_end():
  table = PageTable(3, W)
  often, once = held(table, range(5)), held(table, range(20, 25))
  table.release(once)
  table.release(often)
  held(table, range(40, 49))
  assert table.acquire(key(range(5))).is_ready


def test_the_least_recently_used_goes_first_and_never_before_what_follows_it():
  table = PageTable(4, W)
  old, new = held(table, range(9)), held(table, range(20, 29))
  old_pages, new_pages = list(old.pages), list(new.pages)
  table.release(old)
  table.release(new)
  table.release(table.acquire(key(range(9))))  # used again
  third = held(table, range(40, 45))
  assert third.pages == [new_pages[1]], "the end of the least recent, not its beginning"
  assert held(table, range(20, 25)).pages == [new_pages[0]]
  assert table.acquire(key(range(9))).pages == old_pages


def test_pages_in_use_are_never_taken_and_a_failed_try_leaves_no_trace():
  table = PageTable(3, W)
  reading = held(table, range(9))
  assert table.acquire(key(range(50, 59))) is None
  assert table.num_held == 2
  small = held(table, range(50, 55))
  assert small.next_token == 0, "what the failed try claimed holds nothing"
  table.release(small)
  assert table.acquire(key(range(60, 69))) is None
  small = table.acquire(key(range(50, 55)))
  assert small.is_ready, "what nobody reads is not given up for nothing"
  table.release(small)
  table.release(reading)
  assert table.acquire(key([*range(4), 70, 71, 72, 73, 74])).pages[0] == reading.pages[0]


def test_new_adapters_free_what_the_old_ones_made():
  table = PageTable(4, W)
  base, own = held(table, range(9)), held(table, range(9), adapter=1, version=1)
  table.release(base)
  table.release(own)
  table.forget(None, 2)
  assert table.num_held == 2
  assert table.acquire(key(range(9))).is_ready
  assert not table.acquire(key(range(9), adapter=1, version=2)).is_ready
  table.forget(3)
  assert table.num_held == 4, "all are read"


def test_any_course_of_events_keeps_every_page_with_one_owner():
  draw = random.Random(0)
  table, live, unready = PageTable(12, W), [], []
  seen = dict.fromkeys(("released", "abandoned", "counted on", "no room", "waited"), 0)

  def finish(prompt):
    unready.remove(prompt)
    table.finish(prompt)
    live.append(prompt)

  for _ in range(5000):
    if live and draw.random() < 0.4:
      table.release(live.pop(draw.randrange(len(live))))
      seen["released"] += 1
    elif unready and draw.random() < 0.3:
      one = draw.choice(unready)
      if one.readers == 1 and draw.random() < 0.5:
        is_gone = table.abandon(one)
        seen["abandoned" if is_gone else "counted on"] += 1
        if is_gone:
          unready.remove(one)
      elif table.is_open(one):
        finish(one)
      else:
        seen["waited"] += 1
    else:
      length = draw.randint(1, 40)
      ids = [draw.randint(0, 1) if i % W == 0 else i for i in range(length)]
      before = dict(table._pages)
      found = table.acquire(key(ids))
      if found is None:
        assert live or unready, "with nobody reading there is room for any prompt"
        assert dict(table._pages) == before
        seen["no room"] += 1
      elif found.readers == 1:
        (live if found.is_ready else unready).append(found)
      else:  # of one prompt each that reads it
        (unready if found in unready else live).append(found)
    for one in (*live, *unready):
      for i, page in enumerate(one.pages):
        tokens = one.key[0][i * W : min((i + 1) * W, one.known)]
        assert table._by_index[page].name.tokens == tokens
        assert table._by_index[page].readers >= 1
    assert table.num_held + len(table._free) == 12
    assert table._num_unread == sum(not page.readers for page in table._pages.values())
  assert all(seen.values()), seen


# --- the engine


def test_a_step_costs_nothing_more_where_four_times_as_much_is_allocated():
  """Bytes and FLOPs of the compiled program, with the same live tokens."""

  def trips(name):
    return 3.0 if "live_chunks" in name else 4.0 if "prompt_chunks" in name else 1.0

  found = []
  for context in (1024, 4096):
    shapes = make_shapes(TINY, 16, context, prefill_rows=4, steps=4)
    cache, work = jax.eval_shape(lambda s=shapes: init_cache(TINY, s.cache)), empty_work(shapes)
    compiled = compile_dispatch(TINY, shapes).lower(engine_params(), None, cache, work).compile()
    count = count_module(compiled.as_text(), trips)
    found.append(count.total([op for op in count.inside("/decode/while") if op.loops]))
  small, large = found
  assert large.flops == small.flops > 0
  assert large.num_bytes == pytest.approx(small.num_bytes, rel=0.01)


def engine_params():
  return random_params(TINY, size=0.3)


def make_engine(**sizes):
  sizes = {"rows": ROWS, "context": CONTEXT, "prefill_rows": 2, "steps_per_dispatch": 6} | sizes
  return Engine(TINY, engine_params(), **sizes)


@pytest.fixture(scope="module")
def engine():
  with make_engine() as engine:
    yield engine


def with_common_beginning(count, common=150):
  start = prompt(common, 20)
  return [
    Request((*start, *prompt(5 + 9 * i, 21)), n=2, seed=i, max_new_tokens=20) for i in range(count)
  ]


def test_a_common_beginning_is_prefilled_once_and_changes_no_bit(engine):
  requests = with_common_beginning(5)
  alone = []
  for request in requests:
    with make_engine() as fresh:
      alone += fresh.generate([request])
  before = engine.stats()
  assert engine.generate(requests) == alone
  after = engine.stats()
  page = engine.shapes.page
  assert after["reused_tokens"] - before["reused_tokens"] == 4 * page
  prompts = sum(len(request.prompt_ids) - 1 for request in requests)
  assert after["prefill_tokens"] - before["prefill_tokens"] == prompts - 4 * page
  assert engine.generate(requests[::-1]) == alone[::-1], "from pages that earlier requests left"


def test_requests_of_one_completion_read_their_prompt_alone_whoever_else_has_it(engine):
  """On CPU by a path of their own; which one it is hangs on the request and on nothing else."""
  assert engine.shapes.lone_at_once
  ids = prompt(150, 30)
  single = Request(ids, seed=1, max_new_tokens=12, logprobs="both")
  several = [Request(ids, n=n, seed=n, max_new_tokens=12) for n in (2, 4, 5)]  # of groups of 4
  with make_engine() as fresh:
    alone = fresh.generate([single])
  calls = watched_counts(engine, lambda: engine.generate([single, *several, single]))
  assert (3, 2) in calls, "share groups of 4, 4 and 3 rows; two rows that share with nobody"
  found = engine.generate([single, *several, single])
  assert found[0] == found[-1] == alone[0]
  assert found[1:-1] == [engine.generate([request])[0] for request in several]
  for request, outputs in zip([single, *several], found[:-1], strict=True):
    for output in outputs:
      check_logprobs(engine_params(), request.prompt_ids, output)


def watched_counts(engine, call):
  """(share groups, lone rows) of each dispatch while `call` runs."""
  seen, run = [], engine.device.run

  def watch(lora, work, *rest):
    seen.append(tuple(int(x) for x in work.counts_6[1:3]))
    return run(lora, work, *rest)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(engine.device, "run", watch)
    call()
  return seen


def test_a_beginning_made_by_another_adapter_is_not_reused(engine):
  config = LoRAConfig(4, 8.0)
  request = Request(prompt(140, 22), seed=1, max_new_tokens=10)
  (base,) = engine.generate([request])
  outputs = []
  for seed in (1, 2):
    lora = scaled(_moved(init_lora(TINY, config, jax.random.key(seed)), seed), config)
    engine.set_adapters(stack_adapters([lora]))
    before = engine.stats()["reused_tokens"]
    outputs += engine.generate([Request(**{**vars(request), "adapter": 1})])
    assert engine.stats()["reused_tokens"] == before
  engine.set_adapters(None)
  assert len({out[0].logprobs for out in (base, *outputs)}) == 3
  assert engine.generate([request]) == [base]


def _moved(tree, seed):
  def move(x):
    noise = 0.3 * jax.random.normal(jax.random.key(seed), x.shape, jnp.float32)
    return x + noise.astype(x.dtype)

  return jax.tree.map(move, tree)


def test_long_prompts_are_prefilled_in_turns_with_decoding_rows(engine):
  """64 prompt tokens a dispatch: prompts of 200 tokens arrive while others decode."""
  early = [Request(prompt(10, i), seed=i, max_new_tokens=120) for i in range(4)]
  late = [Request(prompt(200, 30 + i), n=2, seed=i, max_new_tokens=15) for i in range(3)]
  want = engine.generate([*early, *late])
  with make_engine() as slow:
    slow._scheduler.stall_tokens = 64
    first = [slow.submit(request) for request in early]
    while not slow.stats()["steps"]:
      pass
    second = [slow.submit(request) for request in late]
    found = [future.result() for future in (*first, *second)]
    assert slow.stats()["dispatches"] > 3 * 200 // 64
  assert found == want


def test_few_pages_make_requests_wait_and_change_no_bit(engine):
  requests = [
    Request(prompt(60 + 20 * i, 40 + i), n=3, seed=i, max_new_tokens=12) for i in range(9)
  ]
  want = engine.generate(requests)
  with make_engine(prompt_bytes=1) as small:
    assert small.shapes.pages == CONTEXT // small.shapes.page, "one prompt of full length"
    assert small.generate(requests) == want
    assert small.generate(requests[:2]) == want[:2]


def test_a_cache_of_one_chunk_gives_the_same_completions(engine):
  """Few tokens of few rows are one chunk that no loop visits; neighbours change no bit there."""
  requests = [
    Request(prompt(20 + 30 * i, 60 + i), n=3, seed=i, max_new_tokens=10 + 40 * i) for i in range(3)
  ]
  with make_engine(max_new_tokens=128) as small:
    assert (small.shapes.chunks, small.shapes.chunk) == (1, 128)
    together = small.generate(requests)
    assert [small.generate([request])[0] for request in requests] == together
  assert engine.shapes.chunks > 1
  for want, found in zip(engine.generate(requests), together, strict=True):
    for one, other in zip(want, found, strict=True):
      assert one.token_ids == other.token_ids
      np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def test_rows_keep_room_for_the_longest_completion_alone():
  shapes = make_shapes(TINY, ROWS, CONTEXT, 2, 6, max_new_tokens=100)
  assert shapes.chunks * shapes.chunk == 128
  with make_engine(max_new_tokens=100) as engine:
    request = Request(prompt(30, 50), seed=1, max_new_tokens=128)
    (output,) = engine.generate([request])[0]
    assert len(output.token_ids) == 128
    check_logprobs(engine_params(), request.prompt_ids, output)
    with pytest.raises(ValueError, match=r"max_new_tokens: expected at most 128, got 129.*config"):
      engine.submit(Request(prompt(30, 50), max_new_tokens=129))
    nearly = Request(prompt(CONTEXT - 20, 51), max_new_tokens=1000)
    assert len(engine.generate([nearly])[0][0].token_ids) == 20, "the context ends it before"


def test_a_dispatch_takes_as_many_prompts_as_rows(engine):
  requests = [Request(prompt(40, 60 + i), seed=i, max_new_tokens=3) for i in range(3 * ROWS)]
  outputs = engine.generate(requests)
  assert all(len(output.token_ids) == 3 for (output,) in outputs)
  assert all(0 <= i < V for (output,) in outputs for i in output.token_ids)
