"""The engine on tiny random models: exact against a full forward, and blind to its neighbours."""

import asyncio
import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import random_params

from awf.qwen.config import QwenConfig
from awf.qwen.lora import LoRAConfig, init_lora, merge, scaled, stack_adapters
from awf.qwen.model import Qwen, head
from awf.sampler.engine import Engine, Output, Request
from awf.sampler.shapes import make_shapes

V, CONTEXT, ROWS = 60, 256, 32
TINY = QwenConfig(
  vocab_size=V,
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=2,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=16,  # products of 8 hide what depends on the neighbours
  tie_word_embeddings=True,
)
QWEN3 = dataclasses.replace(
  TINY, family="qwen3", tie_word_embeddings=False, num_attention_heads=6, num_key_value_heads=3
)
PAD = 0  # what unused places hold
LORA = LoRAConfig(4, 8.0)


def make_engine(config, params, **sizes):
  sizes = {"rows": ROWS, "context": CONTEXT, "prefill_rows": 2, "steps_per_dispatch": 6} | sizes
  return Engine(config, params, strict=True, **sizes)


@pytest.fixture(scope="module")
def params():
  return random_params(TINY, size=0.3)


@pytest.fixture(scope="module")
def engine(params):
  with make_engine(TINY, params) as engine:
    yield engine


@pytest.fixture(autouse=True)
def only_the_base(request):
  """Adapters of one test do not reach the next."""
  yield
  if "engine" in request.fixturenames:
    request.getfixturevalue("engine").set_adapters(None)


def prompt(length, seed=0):
  return tuple(np.random.default_rng([seed, length]).integers(0, V, length).tolist())


def run(engine, *args, **fields):
  (outputs,) = engine.generate([Request(*args, **fields)])
  return outputs


@jax.jit
def _full(params, tokens_BT):
  config = QWEN3 if "lm_head" in params else TINY
  positions_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
  hidden_BTD, _ = Qwen(config).apply({"params": params}, tokens_BT, positions_BT)
  return head(params, hidden_BTD[0])


def full_logits(params, prompt_ids, token_ids):
  """[T, V] logits before each token of the completion, from one pass without a cache."""
  ids = [*prompt_ids, *token_ids]
  tokens_BT = np.zeros((1, CONTEXT), np.int32)  # what stands behind does not reach back
  tokens_BT[0, : len(ids)] = ids
  logits_TV = np.asarray(_full(params, tokens_BT), np.float64)
  return logits_TV[len(prompt_ids) - 1 : len(ids) - 1]


def log_softmax(logits_TV):
  peak = logits_TV.max(-1, keepdims=True)
  return logits_TV - peak - np.log(np.exp(logits_TV - peak).sum(-1, keepdims=True))


def check_logprobs(params, prompt_ids, output, temperature=1.0):
  assert len(output.token_ids) == len(output.logprobs) > 0
  logits_TV = full_logits(params, prompt_ids, output.token_ids) / temperature
  want_T = log_softmax(logits_TV)[np.arange(len(output.token_ids)), output.token_ids]
  np.testing.assert_allclose(output.logprobs, want_T, atol=1e-5, rtol=0)


# --- exactness

LENGTHS = (1, 2, 31, 32, 33, 34, 127, 128, 129, 130, 200)  # around blocks (32) and chunks (128)


@pytest.mark.parametrize("config", [TINY, QWEN3], ids=["qwen2-tied", "qwen3-untied"])
def test_sampler_logprobs_equal_a_full_forward(config, params, engine):
  own = params if config is TINY else random_params(config, size=0.3)
  used = engine if config is TINY else make_engine(config, own, rows=4)
  try:
    requests = [Request(prompt(n), seed=n, max_new_tokens=40) for n in LENGTHS]
    for request, (output,) in zip(requests, used.generate(requests), strict=True):
      assert len(output.token_ids) == 40
      check_logprobs(own, request.prompt_ids, output)
      assert np.std(output.logprobs) > 0.1  # a model with opinions
  finally:
    if used is not engine:
      used.close()


def test_greedy_decode_with_cache_equals_full_forward(params, engine):
  requests = [Request(prompt(n, 1), temperature=0.0, max_new_tokens=30) for n in LENGTHS]
  for request, (output,) in zip(requests, engine.generate(requests), strict=True):
    logits_TV = full_logits(params, request.prompt_ids, output.token_ids)
    np.testing.assert_array_equal(output.token_ids, logits_TV.argmax(-1))
    check_logprobs(params, request.prompt_ids, output)


def test_logprobs_are_those_of_the_tempered_and_truncated_distribution(params, engine):
  ids = prompt(20, 2)
  hot = run(engine, ids, seed=3, temperature=2.5, max_new_tokens=60)[0]
  check_logprobs(params, ids, hot, temperature=2.5)
  cut = run(engine, ids, seed=3, temperature=1.5, top_k=4, top_p=0.9, max_new_tokens=60)[0]
  logits_TV = full_logits(params, ids, cut.token_ids) / 1.5
  for logits_V, token, logp in zip(logits_TV, cut.token_ids, cut.logprobs, strict=True):
    kept = np.argsort(-logits_V)[:4]
    share = np.cumsum(np.exp(log_softmax(logits_V[kept][None])[0]))
    kept = kept[: 1 + np.searchsorted(share, 0.9)].tolist()
    want = log_softmax(logits_V[kept][None])[0]
    assert token in kept
    np.testing.assert_allclose(logp, want[kept.index(token)], atol=1e-5)


def test_a_pad_id_in_prompt_and_completion_leaves_no_hole(params, engine):
  for ids in ((PAD, PAD, PAD, 5), (5, PAD), prompt(40, 3) + (PAD,) * 3):
    outputs = run(engine, ids, n=4, seed=4, temperature=3.0, max_new_tokens=100)
    assert sum(output.token_ids.count(PAD) for output in outputs) > 3
    for output in outputs:
      assert len(output.token_ids) == 100
      check_logprobs(params, ids, output, temperature=3.0)


# --- ends


def test_the_stop_token_is_the_last_id_and_has_its_logprob(params, engine):
  ids = prompt(12, 4)
  free = run(engine, ids, seed=5, max_new_tokens=50)[0]
  assert free.finish_reason == "length" and len(free.token_ids) == 50
  stop = free.token_ids[20]
  first = free.token_ids.index(stop)
  cut = run(engine, ids, seed=5, max_new_tokens=50, stop_ids=(V - 1, stop, 0, 3))[0]
  first = min(free.token_ids.index(i) for i in (V - 1, stop, 0, 3) if i in free.token_ids)
  assert cut == Output(free.token_ids[: first + 1], free.logprobs[: first + 1], "stop")
  check_logprobs(params, ids, cut)
  ignoring = run(engine, ids, seed=5, max_new_tokens=50, stop_ids=(stop,), ignore_eos=True)[0]
  assert ignoring == free


def test_a_stop_token_at_the_limit_is_a_stop(engine):
  ids = prompt(12, 4)
  free = run(engine, ids, seed=5, max_new_tokens=50)[0]
  first = next(i for i, token in enumerate(free.token_ids) if token not in free.token_ids[:i] and i)
  stop = free.token_ids[first]
  for limit, reason in ((first, "length"), (first + 1, "stop"), (first + 2, "stop")):
    output = run(engine, ids, seed=5, max_new_tokens=limit, stop_ids=(stop,))[0]
    assert output.finish_reason == reason
    assert output.token_ids == free.token_ids[: min(limit, first + 1)]


def test_a_full_context_ends_a_completion(params, engine):
  for length in (CONTEXT - 1, CONTEXT - 5):
    ids = prompt(length, 5)
    output = run(engine, ids, max_new_tokens=1000)[0]
    assert output.finish_reason == "length" and len(output.token_ids) == CONTEXT - length
    check_logprobs(params, ids, output)


@pytest.mark.parametrize("length", [0, CONTEXT, CONTEXT + 50])
def test_a_prompt_that_does_not_fit_is_refused(engine, length):
  fine = Request(prompt(5), max_new_tokens=3)
  refused, served = engine.generate([Request(prompt(length), n=2), fine])
  assert refused == [Output((), (), "refused")] * 2
  assert len(served[0].token_ids) == 3


# --- one program


def test_settings_change_without_recompiling_and_each_has_an_effect(engine):
  ids = prompt(15, 6)
  base = Request(ids, seed=1, max_new_tokens=30)
  want = engine.generate([base])
  traces = engine.stats()["traces"]
  changes = (
    {"seed": 2},
    {"seed": 2**62 + 1},
    {"temperature": 0.0},
    {"temperature": 0.4},
    {"top_k": 2},
    {"top_p": 0.3},
    {"min_p": 0.5},
    {"logprobs": "both", "min_p": 0.1},
    {"logprobs": "none"},
    {"stop_ids": (want[0][0].token_ids[3],)},
    {"max_new_tokens": 7},
    {"prompt_ids": prompt(150, 6)},
  )
  for change in changes:
    assert engine.generate([dataclasses.replace(base, **change)]) != want, change
  engine.generate([dataclasses.replace(base, n=5), base])
  assert engine.generate([base]) == want
  assert engine.stats()["traces"] == traces == 1


def test_noise_differs_between_steps_samples_and_seeds(engine):
  flat = Request(prompt(6, 7), n=8, seed=1, temperature=50.0, max_new_tokens=40)
  outputs = engine.generate([flat, dataclasses.replace(flat, seed=2)])
  streams = [output.token_ids for group in outputs for output in group]
  assert len(set(streams)) == 16
  agreement = np.mean([np.equal(a, b).mean() for a in streams for b in streams if a is not b])
  assert agreement < 0.1  # 1 / 60 by chance
  assert all(len(set(stream)) > 15 for stream in streams)


# --- a completion is a function of its request alone


def crowd(seed):
  rng = np.random.default_rng(seed)
  return [
    Request(
      prompt(int(rng.integers(1, 200)), seed),
      n=int(rng.integers(1, 4)),
      seed=int(rng.integers(2**62)),
      temperature=float(rng.choice([0.0, 0.7, 1.0])),
      top_k=int(rng.choice([0, 5])),
      top_p=float(rng.choice([1.0, 0.8])),
      min_p=float(rng.choice([0.0, 0.1])),
      max_new_tokens=int(rng.integers(1, 50)),
    )
    for _ in range(40)
  ]


@pytest.fixture(scope="module")
def requests():
  return [
    Request(prompt(10, 8), n=3, seed=1, max_new_tokens=40),
    Request(prompt(140, 8), n=2, seed=2, temperature=0.8, top_p=0.9, max_new_tokens=60),
    Request(prompt(1, 8), seed=3, temperature=0.0, max_new_tokens=20),
    Request(prompt(33, 8), n=2, seed=4, top_k=10, max_new_tokens=100),
  ]


@pytest.fixture(scope="module")
def alone(engine, requests):
  return [run(engine, **vars(request)) for request in requests]


@pytest.mark.parametrize("seed", [1, 2])
def test_bit_equal_among_neighbours_and_after_refill(engine, requests, alone, seed):
  """More completions than rows: some of ours start in a row that another one left."""
  others = crowd(seed)
  assert sum(request.n for request in others) > 2 * ROWS
  mixed = [*others[:25], *requests, *others[25:]]
  assert engine.generate(mixed)[25:29] == alone


def test_bit_equal_in_any_order_and_from_many_threads(engine, requests, alone):
  assert engine.generate(requests[::-1]) == alone[::-1]
  found = {}

  def work(i):
    found[i] = engine.submit(requests[i]).result()

  threads = [threading.Thread(target=work, args=(i,)) for i in (2, 0, 3, 1)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert [found[i] for i in range(4)] == alone


def test_bit_equal_when_joining_running_rows(engine, requests, alone):
  async def both():
    long = [engine.asubmit(Request(prompt(50, s), seed=s, max_new_tokens=200)) for s in range(20)]
    tasks = [asyncio.ensure_future(one) for one in long]
    while not engine.stats()["running"]:
      assert not tasks[0].done()
      await asyncio.sleep(0.001)
    mine = await asyncio.gather(*(engine.asubmit(request) for request in requests))
    await asyncio.gather(*tasks)
    return mine

  assert asyncio.run(both()) == alone


def test_a_pinned_cache_layout_changes_no_bit(params, requests, alone, monkeypatch):
  """The form that TPUs get, run here."""
  shapes = make_shapes(TINY, ROWS, CONTEXT, 2, 6)
  pinned = dataclasses.replace(shapes, is_pinned=True)
  monkeypatch.setattr("awf.sampler.engine.make_shapes", lambda *_, **__: pinned)
  with make_engine(TINY, params) as engine:
    assert engine.generate([*crowd(3)[:8], *requests])[8:] == alone


def test_bit_equal_in_an_engine_with_no_cached_prompt(params, requests, alone):
  with make_engine(TINY, params) as fresh:
    assert fresh.generate(requests) == alone
    assert fresh.stats()["prompt_misses"] == len(requests)


def test_bit_equal_with_matrices_as_a_cpu_has_them(params, requests):
  """[out, in], with products of their own for few rows."""

  def turned(tree):
    return {
      "kernel_t" if name == "kernel" else name: turned(x) if isinstance(x, dict) else x.T
      if name == "kernel" else x
      for name, x in tree.items()
    }  # fmt: skip

  with make_engine(TINY, turned(params)) as engine:
    own = [run(engine, **vars(request)) for request in requests]
    others = crowd(4)
    assert engine.generate([*others[:25], *requests, *others[25:]])[25:29] == own
    assert engine.generate(requests[::-1]) == own[::-1]
  check_logprobs(params, requests[0].prompt_ids, own[0][2])


def test_a_sample_does_not_depend_on_how_many_are_asked_for(engine, requests, alone):
  many = run(engine, **{**vars(requests[0]), "n": 7})
  assert many[:3] == alone[0]


def test_more_completions_than_rows_all_finish(params):
  with make_engine(TINY, params, rows=4, prefill_rows=1, steps_per_dispatch=3) as small:
    requests = [Request(prompt(3 + s, s), n=3, seed=s, max_new_tokens=1 + s) for s in range(15)]
    outputs = small.generate(requests)
    for request, group in zip(requests, outputs, strict=True):
      assert [len(output.token_ids) for output in group] == [request.max_new_tokens] * 3
      check_logprobs(params, request.prompt_ids, group[2])
    stats = small.stats()
    assert stats["running"] == stats["waiting"] == 0
    assert stats["tokens"] == sum(3 * request.max_new_tokens for request in requests)
    assert stats["traces"] == 1


# --- prefill


def test_samples_share_one_prefill(engine):
  ids = prompt(77, 9)
  before = engine.stats()
  run(engine, ids, n=10, max_new_tokens=4)
  run(engine, ids, n=2, seed=1, max_new_tokens=4)
  after = engine.stats()
  change = {k: after[k] - before[k] for k in ("prompt_misses", "prompt_hits", "prefill_tokens")}
  # The last prompt token is the first that decode reads.
  assert change == {"prompt_misses": 1, "prompt_hits": 11, "prefill_tokens": 76}


def test_more_prompts_than_the_pool_holds(params):
  with make_engine(TINY, params, rows=2, prefill_rows=1) as small:
    first = [Request(prompt(5 + s, s), seed=s, max_new_tokens=5) for s in range(9)]
    want = small.generate(first)
    assert small.generate(first) == want
    assert small.stats()["prompt_misses"] > 9


# --- adapters


def random_lora(seed, size=0.3):
  rng = np.random.default_rng(seed)
  lora = init_lora(TINY, LORA, jax.random.key(seed))
  lora = jax.tree.map(lambda x: x + jnp.asarray(size * rng.standard_normal(x.shape), x.dtype), lora)
  return scaled(lora, LORA)


def test_new_lora_and_adapter_0_equal_the_base(engine):
  request = Request(prompt(40, 10), n=2, seed=6, max_new_tokens=30)
  (base,) = engine.generate([request])
  fresh = scaled(init_lora(TINY, LORA, jax.random.key(0)), LORA)
  engine.set_adapters(stack_adapters([fresh, random_lora(1)]))
  asked = [dataclasses.replace(request, adapter=i) for i in (0, 1, 2)]
  as_base, as_fresh, as_random = engine.generate(asked)
  assert as_random != base
  for outputs in (as_base, as_fresh):
    for output, want in zip(outputs, base, strict=True):
      assert output.token_ids == want.token_ids
      np.testing.assert_allclose(output.logprobs, want.logprobs, atol=1e-5)


def test_adapters_of_one_batch_each_equal_their_merged_model(params, engine):
  loras = [random_lora(2), random_lora(3)]
  engine.set_adapters(stack_adapters(loras))
  models = [params, *(merge(params, lora) for lora in loras)]
  requests = [
    Request(prompt(n, 11), seed=n, max_new_tokens=30, adapter=i) for n in (1, 70) for i in (0, 1, 2)
  ]
  together = engine.generate(requests)
  for request, (output,) in zip(requests, together, strict=True):
    ids = request.prompt_ids
    logits_TV = full_logits(models[request.adapter], ids, output.token_ids)
    want = log_softmax(logits_TV)[np.arange(30), output.token_ids]
    np.testing.assert_allclose(output.logprobs, want, atol=5e-5)
    assert run(engine, **vars(request)) == [output]
  assert len({output.token_ids for (output,) in together}) == len(requests)


def test_new_adapter_values_reach_later_requests_without_recompiling(engine):
  request = Request(prompt(30, 12), seed=1, max_new_tokens=60, adapter=1)
  want = []
  for seed in (4, 5):
    engine.set_adapters(stack_adapters([random_lora(seed)]))
    want.append(engine.generate([request])[0])
  assert want[0] != want[1]
  traces = engine.stats()["traces"]
  futures = []
  for seed in (4, 5, 4):
    engine.set_adapters(stack_adapters([random_lora(seed)]))
    futures.append(engine.submit(request))
  assert [future.result() for future in futures] == [want[0], want[1], want[0]]
  assert len(engine._adapters) <= 3  # old ones are freed
  assert engine.stats()["traces"] == traces


def test_adapters_of_a_learners_mesh_are_the_same_program(params):
  """A mesh of one device is the device, but JAX compiles anew for arrays that name it."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
  there = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  request = Request(prompt(30, 12), seed=1, max_new_tokens=20, adapter=1)
  with make_engine(TINY, params, rows=4) as own:
    stacked = stack_adapters([random_lora(4)])
    want = []
    for lora in (stacked, jax.device_put(stacked, there), jax.tree.map(np.asarray, stacked)):
      own.set_adapters(lora)
      want += own.generate([request]) + own.generate([request])
    assert want == want[:1] * 6
    (program,) = own.device._programs.values()
    assert own.stats()["traces"] == program._cache_size() == 1


@pytest.mark.parametrize(
  "fields",
  [{"top_k": 2**40}, {"temperature": 1e-40}, {"temperature": 1e300}, {"temperature": 10**400}],
)
def test_extreme_settings_are_drawn_from_and_harm_no_later_request(engine, fields):
  request = Request(prompt(5, 13), seed=3, max_new_tokens=8, **fields)
  (output,) = engine.generate([request])[0]
  assert len(output.token_ids) == 8 and np.isfinite(output.logprobs).all()
  if fields.get("temperature") == 1e-40:
    greedy = Request(prompt(5, 13), seed=3, max_new_tokens=8, temperature=0.0)
    assert engine.generate([greedy])[0][0].token_ids == output.token_ids
    assert output.logprobs == (0.0,) * 8, "of the distribution that was drawn from"


# --- mistakes and the end


@pytest.mark.parametrize(
  ("fields", "word"),
  [
    ({"prompt_ids": (1, V)}, "prompt_ids"),
    ({"prompt_ids": (-1,)}, "prompt_ids"),
    ({"stop_ids": (V,)}, "stop_ids"),
    ({"adapter": 1}, "adapter"),
  ],
)
def test_a_request_that_the_model_cannot_serve_is_an_error_of_its_caller(engine, fields, word):
  with pytest.raises(ValueError, match=word):
    engine.submit(Request(**{"prompt_ids": (1, 2), **fields}))
  assert len(run(engine, (1, 2), max_new_tokens=2)[0].token_ids) == 2


@pytest.mark.parametrize(
  "fields",
  [
    {"n": 0},
    {"seed": -1},
    {"seed": 2**63},
    {"temperature": -0.1},
    {"temperature": float("nan")},
    {"top_p": 0.0},
    {"top_p": 1.1},
    {"top_k": -1},
    {"min_p": -0.1},
    {"min_p": 1.01},
    {"min_p": float("nan")},
    {"max_new_tokens": 0},
    {"stop_ids": tuple(range(9))},
    {"stop_ids": ("a",)},
    {"stop": "abc"},
    {"n": 2.0},
    {"seed": 5.0},
    {"prompt_ids": (1, 2.5)},
  ],
)
def test_settings_out_of_range_are_refused(fields):
  (name,) = fields
  with pytest.raises(ValueError, match=name):
    Request(**{"prompt_ids": (1,), **fields})


def test_lists_and_numbers_of_other_libraries_are_taken(engine):
  plain = Request((1, 2, 3), n=2, seed=7, max_new_tokens=4, stop_ids=(5,))
  other = Request(
    np.arange(1, 4), n=np.int64(2), seed=np.uint8(7), max_new_tokens=np.int32(4), stop_ids=[5],
    stop=[],
  )  # fmt: skip
  assert other == plain and hash(other) == hash(plain)
  assert engine.generate([other]) == engine.generate([plain])


def test_a_request_that_cannot_be_sampled_takes_the_others_of_its_call_with_it(engine):
  before = engine.stats()
  with pytest.raises(ValueError, match="prompt_ids"):
    engine.generate([*(Request((1,), seed=s, max_new_tokens=200) for s in range(5)), Request((V,))])
  assert len(run(engine, (1, 2), max_new_tokens=2)[0].token_ids) == 2
  after = engine.stats()
  assert after["tokens"] == before["tokens"] + 2 and after["cancelled"] == before["cancelled"] + 5


def test_close_ends_the_thread_and_fails_what_is_open(params):
  engine = make_engine(TINY, params, rows=2, prefill_rows=1, steps_per_dispatch=1)
  engine.generate([Request((1,), max_new_tokens=1)])
  names = {thread.name for thread in threading.enumerate()}
  futures = [engine.submit(Request((1,), seed=s, max_new_tokens=250)) for s in range(50)]
  engine.close()
  assert isinstance(futures[-1].exception(timeout=5), RuntimeError)
  with pytest.raises(RuntimeError, match="closed"):
    engine.submit(Request((1,)))
  engine.close()  # twice is fine
  assert "awf-engine" in names and not engine._thread.is_alive()


# --- the likeliest tokens


def test_likeliest_tokens_are_those_of_a_full_forward_and_cost_nobody_else_a_bit(params):
  plain = Request(prompt(40, 9), n=3, seed=4, temperature=1.3, top_k=5, max_new_tokens=30)
  asking = [
    Request(prompt(33, 9), seed=5, temperature=t, top_p=p, logprobs="both", top_logprobs=k,
            max_new_tokens=20)
    for t, p, k in ((1.0, 1.0, 20), (0.0, 1.0, 1), (1.7, 0.6, 4))
  ]  # fmt: skip
  with make_engine(TINY, params, rows=8) as own:
    (alone,) = own.generate([plain])
    (among, *found) = own.generate([plain, *asking])
    again = own.generate([dataclasses.replace(r, top_logprobs=0) for r in asking])
    assert own.stats()["traces"] == 1, "one program, whoever asks"
  assert among == alone and not any(output.top_logprobs for output in among)
  for request, (output,), (without,) in zip(asking, found, again, strict=True):
    assert dataclasses.replace(output, top_logprobs=()) == without
    logits_TV = full_logits(params, request.prompt_ids, output.token_ids)
    want_TV = log_softmax(logits_TV / (request.temperature or 1.0))
    assert len(output.top_logprobs) == len(output.token_ids)
    for top, want_V, drawn, full in zip(
      output.top_logprobs, want_TV, output.token_ids, output.full_logprobs, strict=True
    ):
      ids, logps = zip(*top, strict=True)
      assert len(set(ids)) == len(ids) == request.top_logprobs
      np.testing.assert_allclose(logps, -np.sort(-want_V)[: len(ids)], atol=1e-5, rtol=0)
      np.testing.assert_allclose(logps, want_V[list(ids)], atol=1e-5, rtol=0)
      assert dict(top).get(drawn, full) == full
      assert request.temperature or ids == (drawn,)
  with pytest.raises(ValueError, match="top_logprobs: expected logprobs 'both'"):
    Request((1,), top_logprobs=1)
  with pytest.raises(ValueError, match="top_logprobs: expected 0 to 20, got 21"):
    Request((1,), logprobs="both", top_logprobs=21)
