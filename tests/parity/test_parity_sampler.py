"""The sampler on the real 135M model: recorded log-probs against the learner's forward, bit-equal
rows, stop strings with the real tokenizer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from awf.policy import QwenPolicy
from awf.qwen.model import Qwen, head
from awf.types import SamplingParams
from configs.base import base_config

pytestmark = pytest.mark.parity

PROMPTS = ("Once upon a time", "def add(a, b):", "The capital of France is", "1, 2, 3, 5, 8,")
CUTS = {
  "plain": SamplingParams(1.0, max_new_tokens=24),
  "tempered": SamplingParams(0.7, max_new_tokens=24),
  "top_p": SamplingParams(1.0, 0.9, max_new_tokens=24),
  "top_k": SamplingParams(1.0, 1.0, 20, max_new_tokens=24),
  "min_p": SamplingParams(1.2, min_p=0.05, max_new_tokens=24),
  "all": SamplingParams(1.1, 0.95, 50, min_p=0.02, max_new_tokens=24),
}


@pytest.fixture(scope="module")
def policy(real_checkpoint):
  config = base_config()
  config.model.path = str(real_checkpoint)
  config.mesh.data = 1
  with config.unlocked():
    config.sampler.update(rows=8, context=256, prefill_rows=4, max_new_tokens=64)
    config.executor.max_new_tokens = 64
  policy = QwenPolicy.from_config(config)
  yield policy
  policy.close()


def requests(policy, sampling, seed=0):
  sampling = dataclasses.replace(sampling, logprobs="both")
  ids = [tuple(policy.tokenizer.encode(text)) for text in PROMPTS]
  return [policy.request(x, sampling, seed + i, 2, 0) for i, x in enumerate(ids)]


def log_softmax(logits_TV):
  peak = logits_TV.max(-1, keepdims=True)
  return logits_TV - peak - np.log(np.exp(logits_TV - peak).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, tokens_BT):
  positions = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None]
  hidden, _ = Qwen(config).apply({"params": params}, tokens_BT, positions)
  return head(params, hidden[0])


def whole_forward(policy, prompt_ids, token_ids):
  """float64 logits [T, V] before each token, from one pass without a cache."""
  ids = np.zeros((1, 64), np.int32)
  ids[0, : len(prompt_ids) + len(token_ids)] = [*prompt_ids, *token_ids]
  logits_TV = np.asarray(_forward(policy.config, policy.params, ids), np.float64)
  return logits_TV[len(prompt_ids) - 1 : len(prompt_ids) + len(token_ids) - 1]


def kept(logits_V, s):
  """bool [V]: top-k, then top-p, then min-p, by sorting."""
  order = np.argsort(-logits_V)[: s.top_k or None]
  share = np.cumsum(np.exp(log_softmax(logits_V[order][None])[0]))
  order = order[: 1 + np.searchsorted(share, s.top_p)] if s.top_p < 1 else order
  keep = np.zeros(len(logits_V), bool)
  keep[order] = True
  return keep & (logits_V >= logits_V.max() + (np.log(s.min_p) if s.min_p else -np.inf))


@pytest.mark.parametrize("name", CUTS)
def test_log_probs_equal_the_learners_forward(policy, record_property, name):
  """The whole distribution's and the cut one's; tokens at the very edge of the cut left out."""
  sampling, worst, count = CUTS[name], {"full": 0.0, "drawn": 0.0}, 0
  asked = requests(policy, sampling)
  for request, outputs in zip(asked, policy.engine.generate(asked), strict=True):
    for output in outputs:
      logits_TV = whole_forward(policy, request.prompt_ids, output.token_ids) / sampling.temperature
      scored = policy.logprobs(request.prompt_ids, output.token_ids, 0, sampling.temperature)
      worst["full"] = max(worst["full"], np.abs(np.subtract(scored, output.full_logprobs)).max())
      for logits_V, token, logp in zip(logits_TV, output.token_ids, output.logprobs, strict=True):
        keep = kept(logits_V, sampling)
        cut = np.where(keep, logits_V, -np.inf)
        edges = [kept(logits_V, _moved(sampling, by)).sum() for by in (-1e-5, 1e-5)]
        if edges[0] != edges[1]:
          continue
        assert keep[token]
        worst["drawn"] = max(worst["drawn"], abs(log_softmax(cut[None])[0, token] - logp))
        count += 1
  record_property("max_abs_error", {name: float(x) for name, x in worst.items()})
  print(f"{name}: {count} tokens, max abs error {worst}")
  assert count > 150 and max(worst.values()) <= 1e-4


def _moved(s, by):
  return dataclasses.replace(
    s, top_p=s.top_p + by if s.top_p < 1 else 1.0, min_p=s.min_p + by if s.min_p else 0.0
  )


def test_a_row_is_bit_equal_alone_and_in_any_batch(policy):
  mine = requests(policy, CUTS["all"])
  alone = [policy.engine.generate([request])[0] for request in mine]
  others = requests(policy, CUTS["plain"], 100) + requests(policy, CUTS["top_p"], 200)
  assert policy.engine.generate([*others, *mine])[8:] == alone
  assert policy.engine.generate([*mine[::-1], *others])[:4] == alone[::-1]


def test_a_stop_string_of_the_real_tokenizer(policy):
  (free,) = policy.engine.generate(requests(policy, CUTS["plain"])[:1])
  text = policy.tokenizer.decode(free[0].token_ids)
  stop = text[9:14]
  sampling = dataclasses.replace(CUTS["plain"], stop=(stop,))
  request = requests(policy, sampling)[0]
  output = policy.engine.generate([request])[0][0]
  completion = policy.completion(request, output)
  assert completion.text == text[: text.index(stop)] and completion.finish_reason == "stop"
  assert output.token_ids == free[0].token_ids[: len(output.token_ids)]
  assert stop in policy.tokenizer.decode(output.token_ids)
  assert stop not in policy.tokenizer.decode(output.token_ids[:-1])
