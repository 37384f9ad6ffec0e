"""Requests that wait, stream, are called off or fail, and how full the rows are meanwhile."""

import asyncio
import concurrent.futures
import dataclasses
import heapq
import os
import random
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import until
from test_sampler import CONTEXT, TINY, check_logprobs, crowd, prompt, random_lora
from tiny_checkpoint import random_params

from awf.qwen.lora import stack_adapters
from awf.sampler.decode import COLUMN, FULL, RUNNING
from awf.sampler.engine import Engine, QueueFull, Request
from awf.sampler.job import Job, Waiting
from awf.sampler.pages import PageTable, Version
from awf.sampler.scheduler import Scheduler
from awf.sampler.shapes import make_shapes

PARAMS = random_params(TINY, size=0.3)
WAIT = 600  # seconds before a test gives up
SIZES = dict(rows=4, context=CONTEXT, prefill_rows=2, steps_per_dispatch=2)
LONG = Request(prompt(20, 1), seed=1, max_new_tokens=200)
SHORT = Request(prompt(10, 2), seed=2, max_new_tokens=12)


@pytest.fixture(scope="module")
def shared_engine():
  with Engine(TINY, PARAMS, **SIZES) as engine:
    yield engine


@pytest.fixture
def engine(shared_engine):
  """One engine for all tests; each leaves it idle and as it was."""
  yield shared_engine
  shared_engine.set_adapters(None)
  end = time.monotonic() + WAIT
  while (stats := shared_engine.stats())["running"] or stats["waiting"]:
    assert time.monotonic() < end, stats
    time.sleep(0.005)
  assert busy_pages(shared_engine) == 0 and not shared_engine._scheduler.unready


@pytest.fixture(scope="module")
def alone(shared_engine):
  """Outputs of LONG and SHORT with nobody beside."""
  return {request: shared_engine.generate([request])[0] for request in (LONG, SHORT)}


class Gate:
  """A callback that holds the engine's thread between two dispatches until `go`."""

  def __init__(self):
    self.arrived, self.released = threading.Event(), threading.Event()
    self.parts = []

  def __call__(self, part):
    self.parts.append(part)
    if len(self.parts) == 1:
      self.arrived.set()
      assert self.released.wait(WAIT)

  def wait(self):
    assert self.arrived.wait(WAIT)

  def go(self):
    self.released.set()


def busy_pages(engine):
  return sum(page.readers > 0 for page in engine._scheduler.pages._by_index.values())


# --- occupancy


def test_a_burst_of_mixed_requests_keeps_the_rows_full():
  """512 requests for 32 rows, counted in decoded places, the last completions included."""
  draw = random.Random(0)
  requests = [
    Request(prompt(draw.randint(8, 120), i), seed=i, max_new_tokens=draw.randint(1, 64))
    for i in range(512)
  ]
  sizes = SIZES | {"rows": 32, "prefill_rows": 8, "steps_per_dispatch": 16}
  with Engine(TINY, PARAMS, **sizes) as engine:
    outputs = engine.generate(requests)
    stats = engine.stats()
  tokens = sum(len(output.token_ids) for (output,) in outputs)
  assert stats["row_steps"] == tokens == sum(r.max_new_tokens for r in requests)
  assert stats["row_slots"] == 32 * stats["steps"]
  assert stats["occupancy"] == tokens / stats["row_slots"] >= 0.85


def decoded(scheduler, work):
  """What a device would answer: every running row goes on until its limit."""
  table, (_, _, _, steps, most_ended, _) = work.table_BX, work.counts_6
  status, made = (table[:, COLUMN[name]].copy() for name in ("status", "made"))
  began, count = int(np.sum(status == RUNNING)), 0
  while count < steps and 0 <= began - np.sum(status == RUNNING) < min(most_ended, began):
    made += status == RUNNING
    status[(status == RUNNING) & (made >= table[:, COLUMN["limit"]])] = FULL
    count += 1
  drawn = np.zeros((3 * scheduler.shapes.steps, len(table)), np.int32)
  return np.concatenate([drawn, [status, made, np.full_like(made, count)]]), count


@pytest.mark.parametrize(
  ("rows", "prompts", "new"),
  [(32, (300, 800), (1, 128)), (64, (8, 900), (1, 200)), (64, (512, 512), (64, 64))],
)
def test_a_burst_of_long_prompts_keeps_the_rows_full(rows, prompts, new):
  """A dispatch fills 2,048 prompt tokens at most: not more rows may end in it than begin."""
  shapes = make_shapes(TINY, rows, 2048, prefill_rows=8, steps=16, platform="cpu")
  scheduler, draw = Scheduler(shapes, 2048), random.Random(0)
  for i in range(512):
    ids = tuple(draw.randrange(TINY.vocab_size) for _ in range(draw.randint(*prompts)))
    request = Request(ids, seed=i, max_new_tokens=draw.randint(*new))
    scheduler.waiting.add(Job(request, Future(), Version(), number=i))
  slots = ended = 0
  while (work := scheduler.plan()) is not None:
    packed, steps = decoded(scheduler, work)
    slots += steps * rows
    ended += len(scheduler.harvest(packed, None)[1])
  assert ended == 512 and scheduler.row_steps / slots >= 0.85


# --- called off


def test_a_cancelled_request_frees_rows_and_pages_before_the_next_dispatch(engine, alone):
  gate, seen, before = Gate(), [], engine.stats()["cancelled"]
  kept = engine.submit(LONG, lambda part: seen.append((engine.stats()["running"], len(seen))))
  gone = engine.submit(
    Request(prompt(150, 3), n=3, seed=3, temperature=1.3, max_new_tokens=90), gate
  )
  gate.wait()  # the three have begun
  assert engine.stats()["running"] == 4 and busy_pages(engine) == 3
  steps = len(gate.parts)
  assert gone.cancel() and gone.cancelled()
  later = engine.submit(SHORT)
  gate.go()
  assert later.result() == alone[SHORT], "in a row and on pages that were used before"
  assert kept.result() == alone[LONG]
  assert len(gate.parts) <= steps + 2, "the dispatch that was under way, and none after it"
  assert min(running for running, _ in seen) <= 2
  assert engine.stats()["cancelled"] == before + 1


def test_whoever_waits_for_a_cancelled_request_is_told(engine):
  gate, before = Gate(), engine.stats()["cancelled"]
  futures = [engine.submit(LONG, gate), *(engine.submit(LONG) for _ in range(9))]
  gate.wait()
  for future in futures:
    assert future.cancel()
  gate.go()
  done, left = concurrent.futures.wait(futures, timeout=WAIT)
  assert not left and all(future.cancelled() for future in done)
  assert len(engine.generate([SHORT])[0][0].token_ids) == 12
  assert engine.stats()["cancelled"] == before + 10


def test_a_cancelled_asyncio_caller_cancels_its_request(engine, alone):
  async def run():
    gone = [asyncio.ensure_future(engine.asubmit(LONG)) for _ in range(6)]
    while not engine.stats()["running"]:
      await asyncio.sleep(0.01)
    for task in gone:
      task.cancel()
    kept = await engine.asubmit(SHORT)
    results = await asyncio.gather(*gone, return_exceptions=True)
    return kept, results

  before = engine.stats()
  kept, results = asyncio.run(run())
  assert kept == alone[SHORT]
  assert all(isinstance(result, asyncio.CancelledError) for result in results)
  until(lambda: engine.stats()["cancelled"] - before["cancelled"] == 6)
  stats = engine.stats()
  assert stats["tokens"] - before["tokens"] == 12


def test_a_prompt_in_prefill_is_given_up_unless_another_counts_on_it(engine, monkeypatch):
  """64 prompt tokens a dispatch beside a decoding row: the prompts below take several."""
  monkeypatch.setattr(engine._scheduler, "stall_tokens", 64)
  run = engine.device.run

  def held_in_prefill(lora, work):
    drawn = run(lora, work)
    if engine._scheduler.unready and not reached.is_set():
      reached.set()
      assert left.wait(WAIT)
    return drawn

  monkeypatch.setattr(engine.device, "run", held_in_prefill)
  for count in (1, 2):  # alone, and with another that begins alike
    reached, left = threading.Event(), threading.Event()
    start = prompt(140, 100 + count)
    first, second = (
      Request((*start, *prompt(60, 5 + i)), seed=4 + i, max_new_tokens=10) for i in range(2)
    )
    gate = Gate()
    running = engine.submit(LONG, gate)
    gate.wait()
    gone, *kept = [engine.submit(request) for request in (first, second)[:count]]
    gate.go()
    assert reached.wait(WAIT) and gone.cancel()
    left.set()
    found = [future.result() for future in kept] + engine.generate([second])
    assert all(output == found[0] for output in found)
    check_logprobs(PARAMS, second.prompt_ids, found[0][0])  # from pages that hold what they say
    running.cancel()


def test_one_that_shares_a_page_with_a_long_prompt_does_not_wait_for_all_of_it(engine, monkeypatch):
  monkeypatch.setattr(engine._scheduler, "stall_tokens", 64)
  gate, order, begin = Gate(), [], prompt(140, 120)
  running = engine.submit(LONG, gate)
  gate.wait()
  tails = {"long": prompt(110, 7), "short": prompt(5, 8)}
  found = {
    name: engine.submit(
      Request((*begin, *tail), seed=3, max_new_tokens=1), lambda _, name=name: order.append(name)
    )
    for name, tail in tails.items()
  }
  gate.go()
  for name, tail in tails.items():
    check_logprobs(PARAMS, (*begin, *tail), found[name].result(timeout=WAIT)[0])
  assert order == ["short", "long"]
  running.cancel()


def test_pages_of_a_prompt_that_was_given_up_hold_nothing():
  table = PageTable(6, 4)
  filler = table.acquire((tuple(range(13)), 0, None))
  other = table.acquire(((*range(8), 90, 91, 92), 0, None))
  assert not table.is_open(other) and table.is_open(filler)
  assert not table.abandon(filler), "the other counts on its first two pages"
  assert table.num_held == 3
  assert table.abandon(other) and table.num_held == 2
  assert table.abandon(filler) and table.num_held == 0
  again = table.acquire((tuple(range(13)), 0, None))
  assert again.next_token == 0 and not again.is_ready


def test_close_in_mid_decode_with_some_called_off():
  engine = Engine(TINY, PARAMS, **SIZES, queue=3)
  gate = Gate()
  futures = [engine.submit(LONG, gate)]
  gate.wait()
  futures += [engine.submit(dataclasses.replace(LONG, seed=s)) for s in range(3)]
  blocked = threading.Thread(target=lambda: futures.append(engine.submit(LONG)))
  blocked.start()
  until(lambda: engine.stats()["waiting"] == 4)  # it has its request in, and waits for a place
  futures[1].cancel()
  engine._inbox.shut()
  gate.go()
  engine.close()
  blocked.join(WAIT)
  assert not blocked.is_alive() and len(futures) == 5
  for i, future in enumerate(futures):
    if i == 1:
      assert future.cancelled()
    else:
      assert isinstance(future.exception(timeout=5), RuntimeError)


def test_a_program_that_ends_with_rows_at_work_ends_well():
  """The runtime's threads are gone when the interpreter is, and a dispatch would abort it."""
  program = (
    "from test_queue import *\n"
    "engine = Engine(TINY, PARAMS, **SIZES)\n"
    "engine.submit(dataclasses.replace(LONG, n=50))\n"
    "engine.generate([SHORT])\n"
    "print('at work', engine.stats()['running'] > 0)\n"
    "raise KeyError('nobody closes it')\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    cwd=Path(__file__).parent,
    capture_output=True,
    text=True,
    timeout=WAIT,
  )
  assert done.stdout == "at work True\n" and done.returncode == 1, done.stderr
  assert done.stderr.rstrip().endswith("KeyError: 'nobody closes it'")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_the_device_fails_all_that_is_open_and_ends_the_engine():
  engine = Engine(TINY, PARAMS, **SIZES, queue=2)

  def fault(*_):
    raise MemoryError("no memory left")

  engine.device.run = fault
  with engine._inbox.lock:
    futures = [engine._put(SHORT).future for _ in range(5)]
  for future in futures:
    with pytest.raises(RuntimeError, match="engine stopped: MemoryError.*no memory left"):
      future.result(timeout=WAIT)
  engine.close()
  assert not engine.is_alive
  with pytest.raises(RuntimeError, match="closed") as caught:
    engine.submit(SHORT)
  assert isinstance(caught.value.__cause__, MemoryError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_between_two_rows_fails_those_that_have_ended_too():
  calls = []

  def decode(ids):
    calls.append(ids)
    if len(calls) > 4:  # the third row's
      raise LookupError("no such token")
    return "x" * len(ids)

  engine = Engine(TINY, PARAMS, **SIZES, decode=decode)
  asked = [Request((1, 2), seed=s, max_new_tokens=1, stop=("y",)) for s in range(4)]
  for future in engine.submit_all(asked):
    with pytest.raises(RuntimeError, match="no such token"):
      future.result(timeout=WAIT)
  engine.close()


# --- the queue


def test_who_finds_the_queue_full_waits_or_is_told(engine, alone, monkeypatch):
  monkeypatch.setattr(engine._inbox, "_most", 6)
  gate, order = Gate(), []
  first = engine.submit(dataclasses.replace(LONG, n=4), gate)
  gate.wait()
  waiting = [engine.submit(SHORT) for _ in range(6)]  # as many as the queue holds

  def late(i):
    future = engine.submit(SHORT)
    order.append(i)
    assert future.result() == alone[SHORT]

  threads = [threading.Thread(target=late, args=(i,)) for i in range(3)]
  for i, thread in enumerate(threads):
    thread.start()
    while engine.stats()["waiting"] < 7 + i:
      time.sleep(0.01)
  assert order == [], "they wait"
  with pytest.raises(QueueFull, match="queue is full: 6 completions wait"):
    engine.submit(SHORT, wait=False)
  never = engine.submit(Request(prompt(CONTEXT, 1), n=2))
  assert [x.finish_reason for x in never.result(timeout=0)] == ["refused"] * 2, "at once"
  gate.go()
  for thread in threads:
    thread.join(WAIT)
  assert len(order) == 3
  assert [future.result() for future in waiting] == [alone[SHORT]] * 6
  first.cancel()
  assert len(engine.submit(SHORT, wait=False).result()) == 1


def test_a_request_larger_than_the_queue_has_it_to_itself(engine, monkeypatch):
  monkeypatch.setattr(engine._inbox, "_most", 2)
  huge = dataclasses.replace(SHORT, n=9)

  async def run():
    return await asyncio.gather(*(engine.asubmit(r) for r in (huge, SHORT, huge, SHORT)))

  found = asyncio.run(run())
  assert [len(outputs) for outputs in found] == [9, 1, 9, 1]
  assert found[0] == found[2] and found[1] == found[3] == found[0][:1]


def test_one_that_waits_for_the_queue_can_be_called_off(engine, monkeypatch):
  monkeypatch.setattr(engine._inbox, "_most", 1)
  gate = Gate()
  holder = engine.submit(dataclasses.replace(LONG, n=4), gate)
  gate.wait()
  before = engine.stats()["cancelled"]

  async def run():
    tasks = [asyncio.ensure_future(engine.asubmit(SHORT)) for _ in range(3)]
    await asyncio.sleep(0.05)
    tasks[1].cancel()
    await asyncio.sleep(0)
    gate.go()
    holder.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)

  one, gone, three = asyncio.run(run())
  assert isinstance(gone, asyncio.CancelledError) and one == three
  assert engine.stats()["cancelled"] == before + 2


# --- fairness


def job(number, n=1, version=None, new=16):
  request = Request((1,), n=n, adapter=int(version is not None), max_new_tokens=new)
  made = Job(request, Future(), version)
  made.number = number
  return made


def take(waiting, count, stuck=()):
  """Jobs of the next rows; those in `stuck` never find a place."""
  found = []
  for _ in range(count):
    passed = {}
    for one in waiting.turns(passed):
      if one not in stuck:
        waiting.start(one, passed)
        found.append(one.number)
        break
      passed[one] = None
  return found


def test_the_oldest_goes_first_and_nobody_takes_all_rows():
  waiting = Waiting(16)
  jobs = [job(0, n=100), job(1, n=2), job(2, n=6), job(3)]
  for one in jobs:
    waiting.add(one)
  assert waiting.count == 109
  assert take(waiting, 13) == [0] * 4 + [1] * 2 + [2] * 4 + [3] + [0, 0]
  jobs[2].running -= 1
  assert take(waiting, 2) == [2, 0]
  waiting.remove(jobs[0])
  assert waiting.count == 1 and list(waiting) == [jobs[2]]


def test_the_longest_go_first_when_the_queue_runs_out():
  waiting = Waiting(2)
  for i, new in enumerate((5, 9, 7, 9, 30, 9)):
    waiting.add(job(i, new=new))
  assert take(waiting, 2) == [0, 1], "six wait, then five: more than all rows take in two turns"
  assert take(waiting, 4) == [4, 3, 5, 2], "the older of equals first"


def test_a_short_one_is_passed_over_for_a_while_and_then_comes_next():
  waiting, found = Waiting(2), []
  waiting.add(job(0, new=1))
  for i in range(1, 9):
    waiting.add(job(i, new=99))
    found += take(waiting, 1)
  assert found == [1, 2, 3, 4, 0, 5, 6, 7], "by as many as two rows take in two turns"


def test_mixed_lengths_end_together():
  """128 requests for 64 rows, by their tokens alone; in order of arrival 453 steps are needed."""
  draw, waiting, number = random.Random(0), Waiting(64), 0
  for number in range(128):
    waiting.add(job(number, new=(draw.randint(32, 256), draw.randint(32, 256))[1]))
  total = sum(one.request.max_new_tokens for one in waiting)
  ends, step = [0] * 64, 0  # of the rows
  while waiting:
    step = heapq.heappop(ends)
    one = next(waiting.turns({}))
    waiting.start(one, {})
    heapq.heappush(ends, step + one.request.max_new_tokens)
  assert max(ends) * 64 * 0.95 < total


def test_one_without_a_place_is_overtaken_for_a_while_and_then_waited_for():
  waiting, found = Waiting(4), []
  older, stuck, younger = jobs = [job(i, n=20) for i in range(3)]
  for one in jobs:
    waiting.add(one)
  for _ in range(30):
    found += take(waiting, 1, stuck=(stuck,))
    older.running = 1 if len(found) < 9 else 0  # has its share at first
    younger.running = 0
  assert found == [0] + [2] * 8 + [0] * 19, "twice as many as there are rows; then the older alone"
  assert stuck.overtaken == 8 and not take(waiting, 1, stuck=(stuck,))
  assert take(waiting, 2) == [1, 2], "its place is there: the others go on"


def test_a_large_request_does_not_hold_up_a_small_one(engine, alone):
  gate, ended = Gate(), []
  large = engine.submit(dataclasses.replace(LONG, n=40, max_new_tokens=30), gate)
  gate.wait()
  small = engine.submit(SHORT)
  small.add_done_callback(
    lambda _: ended.append(sum(part.finish_reason is not None for part in gate.parts))
  )
  gate.go()
  assert small.result() == alone[SHORT]
  large.result()
  assert ended[0] <= 8, "completions of the large one that came before it, of 40"


def test_requests_that_lack_pages_let_others_pass_and_come_to_their_turn():
  """Two pages: a prompt of two has to wait until nobody reads either."""
  short = [
    Request(prompt(20 + i, 30 + i), seed=i, max_new_tokens=6 + 9 * (i % 2)) for i in range(60)
  ]
  long = Request(prompt(250, 6), seed=1, max_new_tokens=5)
  with Engine(TINY, PARAMS, **SIZES, prompt_bytes=1) as engine:
    assert engine.shapes.pages == 2
    gate, order = Gate(), []
    first = engine.submit(LONG, gate)
    gate.wait()
    futures = [engine.submit(request) for request in (*short[:2], long, *short[2:])]
    for i, future in enumerate(futures):
      future.add_done_callback(lambda _, i=i: order.append(i))
    gate.go()
    concurrent.futures.wait(futures, timeout=WAIT)
    first.result()
    place = order.index(2)
    assert 2 < place <= 2 + 3 * 4, "some passed, and no more than twice the rows"
    check_logprobs(PARAMS, long.prompt_ids, futures[2].result()[0])


def test_new_adapters_wait_for_the_old_ones_while_the_base_goes_on(engine, alone):
  with_lora = dataclasses.replace(LONG, adapter=1)
  want = []
  for seed in (2, 3):
    engine.set_adapters(stack_adapters([random_lora(seed)]))
    want.append(engine.generate([with_lora])[0])
  engine.set_adapters(stack_adapters([random_lora(2)]))
  gate, order = Gate(), []
  old = engine.submit(with_lora, gate)
  gate.wait()
  engine.set_adapters(stack_adapters([random_lora(3)]))
  new, base = engine.submit(with_lora), engine.submit(SHORT)
  for name, future in (("old", old), ("new", new), ("base", base)):
    future.add_done_callback(lambda _, name=name: order.append(name))
  gate.go()
  assert (old.result(), new.result()) == tuple(want) and want[0] != want[1]
  # With adapters there the base's rows are computed by the same program as theirs.
  assert [x.token_ids for x in base.result()] == [x.token_ids for x in alone[SHORT]]
  until(lambda: len(order) == 3)  # a result is there before its callbacks are called
  assert order == ["base", "old", "new"]


def test_a_row_of_the_base_keeps_its_program_when_an_adapter_is_asked_for():
  lora = stack_adapters([random_lora(2)])
  asked = dataclasses.replace(SHORT, adapter=1)
  with Engine(TINY, PARAMS, **SIZES) as engine:
    engine.set_adapters(lora)
    (want,) = engine.generate([LONG])
    gate = Gate()
    base = engine.submit(LONG, gate)
    gate.wait()
    own = engine.submit(asked)
    gate.go()
    assert base.result() == want and own.done(), "they ran beside each other"
    assert engine.stats()["traces"] == 1
    # Adapters of another shape are another program: rows of the base end with their own.
    engine.set_adapters(None)
    (plain,) = engine.generate([LONG])
    gate = Gate()
    base = engine.submit(LONG, gate)
    gate.wait()
    engine.set_adapters(lora)
    other, later, order = engine.submit(asked), engine.submit(LONG), []
    for name, future in (("other", other), ("later", later), ("base", base)):
      future.add_done_callback(lambda _, name=name: order.append(name))
    gate.go()
    assert other.result() == own.result() and base.result() == plain
    assert later.result() == want, "with a prompt of this program's own"
    assert order[0] == "base" and engine.stats()["traces"] == 2


def test_an_idle_engine_forgets_adapters_that_nobody_asked_for(engine):
  for seed in range(5):
    engine.set_adapters(stack_adapters([random_lora(seed)]))
  until(lambda: len(engine._adapters) <= 2)


def test_adapters_whose_turn_it_is_may_be_looked_past(engine):
  """The longest first: the oldest is not the first that is looked at."""
  gate, futures = Gate(), []
  for seed, new in ((2, 200), (3, 5), (4, 20), (4, 20)):
    if seed != 4 or len(futures) == 2:
      engine.set_adapters(stack_adapters([random_lora(seed)]))
    request = dataclasses.replace(SHORT, adapter=1, max_new_tokens=new)
    futures.append(engine.submit(request, gate if not futures else None))
    gate.wait()
  gate.go()
  for future in futures:
    future.result(timeout=WAIT)


def test_many_that_wait_for_new_adapters_let_the_base_pass():
  shapes = make_shapes(TINY, 8, CONTEXT, prefill_rows=2, steps=6)
  scheduler = Scheduler(shapes, CONTEXT)
  old, new = Version(1, 1), Version(2, 1)
  running = Job(dataclasses.replace(LONG, adapter=1), Future(), old)
  base = Job(SHORT, Future(), old)
  several = [Job(dataclasses.replace(SHORT, adapter=1), Future(), new) for _ in range(300)]
  for i, one in enumerate([running, *several, base]):
    one.number = i
    scheduler.waiting.add(one)
    scheduler.plan(new)
  assert [s.job for s in scheduler.rows if s] == [running, base]
  assert scheduler.version == old
  fits, asked = scheduler._fits_adapters, []
  scheduler._fits_adapters = lambda job: asked.append(job) or fits(job)
  scheduler.plan(new)
  assert asked == several[:1], "once for all with the same adapters"


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_an_adapter_that_overflows_spoils_its_own_rows_alone(size):
  """Its values stay where other requests come to lie, and those are masked, not cleared."""
  good = random_lora(2)
  bad = jax.tree.map(lambda x: np.full_like(x, size), good)
  wild = dataclasses.replace(LONG, prompt_ids=prompt(90, 5), n=2, adapter=2)
  tame = [
    Request(prompt(5, 3), n=4, seed=2, max_new_tokens=30),
    dataclasses.replace(SHORT, adapter=1),
  ]
  with Engine(TINY, PARAMS, **SIZES) as engine:
    engine.set_adapters(stack_adapters([good, good]))
    want = engine.generate(tame)
    engine.set_adapters(stack_adapters([good, bad]))
    assert not np.isfinite(engine.generate([wild])[0][0].logprobs).all()
    assert engine.generate(tame) == want
    assert engine.generate([wild, *tame])[1:] == want


def test_rows_decode_while_a_long_prompt_is_filled(engine, monkeypatch):
  monkeypatch.setattr(engine._scheduler, "stall_tokens", 64)
  gate = Gate()
  running = engine.submit(LONG, gate)
  gate.wait()
  before = len(gate.parts)
  filled = engine.submit(Request(prompt(250, 70), max_new_tokens=1))
  gate.go()
  filled.result()
  assert len(gate.parts) >= before + 3, "a part for each of the dispatches that it took"
  running.cancel()


def test_a_long_prompt_does_not_hold_up_short_ones(engine, monkeypatch):
  monkeypatch.setattr(engine._scheduler, "stall_tokens", 64)
  gate, order = Gate(), []
  running = engine.submit(LONG, gate)
  gate.wait()
  long = engine.submit(Request(prompt(250, 7), max_new_tokens=1), lambda _: order.append("long"))
  short = engine.submit(Request(prompt(30, 8), max_new_tokens=1), lambda _: order.append("short"))
  gate.go()
  long.result(), short.result()
  assert order == ["short", "long"]
  running.cancel()


# --- parts


def joined(parts, sample):
  mine = [part for part in parts if part.sample == sample]
  assert [part.finish_reason for part in mine[:-1]] == [None] * (len(mine) - 1)
  ids = sum((part.token_ids for part in mine), ())
  logprobs = sum((part.logprobs for part in mine), ())
  return ids, logprobs, mine[-1].finish_reason


def test_parts_are_the_output_as_it_grows(engine):
  request = dataclasses.replace(LONG, n=6, max_new_tokens=25, stop_ids=(3, 5))
  (want,) = engine.generate([request])
  parts, threads = [], set()
  future = engine.submit(
    request, lambda part: (parts.append(part), threads.add(threading.current_thread().name))
  )
  assert future.result() == want and threads == {"awf-engine"}
  for i, output in enumerate(want):
    assert joined(parts, i) == (output.token_ids, output.logprobs, output.finish_reason)
  assert max(len(part.token_ids) for part in parts) <= 2, "two steps a dispatch"
  refused = []
  engine.submit(Request((), n=2), refused.append).result()
  assert [(part.sample, part.finish_reason) for part in refused] == [(0, "refused"), (1, "refused")]


@pytest.mark.parametrize("kind", [OSError, asyncio.CancelledError, SystemExit, KeyboardInterrupt])
def test_a_callback_that_raises_ends_its_own_request_alone(engine, alone, kind):
  def broken(part):
    raise kind("the client is gone")

  before = engine.stats()["failed"]
  bad, good = engine.submit(LONG, broken), engine.submit(SHORT)
  with pytest.raises((kind, concurrent.futures.CancelledError)):
    bad.result(timeout=WAIT)
  assert good.result() == alone[SHORT]
  assert engine.stats()["failed"] == before + 1
  last = engine.submit(SHORT)
  last.add_done_callback(broken)
  assert last.result(timeout=WAIT) == alone[SHORT] == engine.generate([SHORT])[0]


def test_a_program_whose_callback_never_returns_ends_all_the_same(engine, alone, monkeypatch):
  never, gate = threading.Event(), Gate()
  monkeypatch.setattr("awf.sampler.engine.EXIT_SECONDS", 0.2)
  own = Engine(TINY, PARAMS, **SIZES)
  own.submit(SHORT, lambda part: (gate.arrived.set(), never.wait(WAIT)))
  gate.wait()
  own._at_exit()
  assert own.is_alive
  never.set()
  own.close()
  assert not own.is_alive


def test_waiting_in_the_engines_own_thread_is_an_error(engine, alone):
  future = engine.submit(SHORT, lambda part: engine.generate([SHORT]))
  with pytest.raises(RuntimeError, match="own thread"):
    future.result(timeout=WAIT)
  assert engine.generate([SHORT])[0] == alone[SHORT]


def test_a_callback_that_raises_leaves_its_places_in_the_queue(engine, alone, monkeypatch):
  monkeypatch.setattr(engine._inbox, "_most", 1)
  gate = Gate()

  def broken(part):
    gate(part)
    raise OSError("the client is gone")

  bad = engine.submit(dataclasses.replace(LONG, n=9), broken)  # five of them wait
  gate.wait()
  with pytest.raises(QueueFull):
    engine.submit(SHORT, wait=False)
  (late,) = engine.submit_all([SHORT])
  gate.go()
  assert late.result(timeout=WAIT) == alone[SHORT]
  assert isinstance(bad.exception(timeout=WAIT), OSError)


def test_requests_of_one_call_stand_in_line_behind_its_first(engine, alone, monkeypatch):
  monkeypatch.setattr(engine._inbox, "_most", 3)
  gate = Gate()
  holder = engine.submit(dataclasses.replace(LONG, n=4), gate)
  gate.wait()
  futures = engine.submit_all([SHORT] * 9, wait=False)
  with pytest.raises(QueueFull):
    engine.submit_all([SHORT] * 2, wait=False)
  gate.go()
  assert [future.result(timeout=WAIT) for future in futures] == [alone[SHORT]] * 9
  holder.cancel()


def test_a_stream_in_asyncio_and_what_leaving_it_does(engine, alone):
  async def run():
    parts = [part async for part in engine.stream(SHORT)]
    with engine.stream(LONG) as stream:
      async for part in stream:
        if part.token_ids:
          break
    kept = await engine.asubmit(SHORT)
    return parts, kept

  async def read_again():
    stream = engine.stream(SHORT)
    parts = [part async for part in stream]
    assert parts and [part async for part in stream] == []

  asyncio.run(asyncio.wait_for(read_again(), WAIT))
  before = engine.stats()["cancelled"]
  parts, kept = asyncio.run(run())
  (output,) = alone[SHORT]
  assert joined(parts, 0) == (output.token_ids, output.logprobs, output.finish_reason)
  assert kept == alone[SHORT]
  assert engine.stats()["cancelled"] == before + 1


# --- fast mode


def test_fast_mode_takes_a_smaller_program_for_few_rows_and_agrees_within_rounding():
  sizes = SIZES | {"rows": 32}
  requests = [dataclasses.replace(LONG, n=2), SHORT, Request(prompt(150, 9), max_new_tokens=30)]
  with Engine(TINY, PARAMS, **sizes) as engine:
    want = engine.generate(requests)
    strict_slots = engine.stats()["row_slots"]
  with Engine(TINY, PARAMS, **sizes, strict=False) as engine:
    found = engine.generate(requests)
    assert engine.stats()["row_slots"] * 4 == strict_slots, "8 rows for 4 completions"
    many = crowd(7)
    crowded = engine.generate([*many, *requests])[len(many) :]
    assert engine.stats()["traces"] == 2
  for outputs in (found, crowded):
    for one, other in zip(outputs, want, strict=True):
      for a, b in zip(one, other, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4, rtol=0)
  assert jax.default_backend() == "cpu"
