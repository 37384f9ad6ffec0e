"""QwenPolicy: base weights, adapter, tokenizer and sampler engine behind one object.

Adapter index 0 is the base (the executor that workflows call), 1 the policy's own adapter. Both run
on the same arrays. Subclass it for an own policy: `prompt_ids` decides what the model reads,
`complete` and `propose` how it answers.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from awf.config_io import load_class
from awf.qwen import hf
from awf.qwen.config import QwenConfig
from awf.qwen.lora import Lora, LoRAConfig, init_lora, scaled, stack_adapters
from awf.qwen.model import Qwen, head
from awf.qwen.peft import load_adapter, save_adapter
from awf.qwen.tokenizer import Tokenizer, load_tokenizer
from awf.sampler.engine import Engine, Output, Request
from awf.sharding import tree_shardings
from awf.types import Completion, SamplingParams, UserError, stable_hash

if TYPE_CHECKING:
  from ml_collections import ConfigDict

BASE, ADAPTER = 0, 1  # adapter indices of the engine
_CHUNK = 128  # positions whose logits exist at a time while scoring


class QwenPolicy:
  """A base model with one adapter; implements `awf.types.LLM`.

  Attributes:
    config: architecture.
    params: frozen base parameters, shared with the engine and the learner.
    tokenizer: text and chat messages to ids.
    lora: the adapter, not scaled, or None for the bare base.
    lora_config: its rank, alpha and targets.
    engine: the sampler.
  """

  def __init__(
    self,
    config: QwenConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer,
    lora: Lora | None,
    lora_config: LoRAConfig,
    engine: Engine,
  ) -> None:
    self.config, self.params, self.tokenizer = config, params, tokenizer
    self.lora_config, self.engine = lora_config, engine
    self.set_lora(lora)

  @classmethod
  def from_config(cls, config: ConfigDict, mesh: Mesh | None = None) -> QwenPolicy:
    """Loads model and tokenizer, makes (or reads) the adapter and starts the engine.

    Args:
      config: a resolved config with the fields of configs/base.py.
      mesh: where the weights live; None is the default device.

    Raises:
      UserError: a checkpoint, adapter or field that cannot be used, named.
    """
    if config.model.quant != "none":
      raise UserError(f"config.model.quant: expected 'none', got {config.model.quant!r}")
    path = hf.resolve_path(config.model.path)
    model_config = hf.load_config(path, dtype_name(config.model.compute_dtype, "compute_dtype"))
    tokenizer = load_tokenizer(path)
    _check_sizes(config, model_config, tokenizer)
    params = hf.load_params(path, model_config, dtype_name(config.model.dtype, "dtype"), mesh)
    lora_config = LoRAConfig(config.lora.rank, config.lora.alpha, tuple(config.lora.targets))
    if config.lora.init_path:
      lora, found = load_adapter(config.lora.init_path, model_config)
      if _comparable(found) != _comparable(lora_config):
        raise UserError(
          f"config.lora: {config.lora.init_path} has {found}, the config asks for {lora_config}; "
          "set config.lora.rank, alpha and targets to the adapter's"
        )
    else:
      lora = init_lora(
        model_config, lora_config, jax.random.key(stable_hash(config.seed, "lora") >> 32)
      )
    engine = Engine(
      model_config,
      params,
      rows=config.sampler.rows,
      context=config.sampler.context,
      prefill_rows=config.sampler.prefill_rows,
      steps_per_dispatch=config.sampler.steps_per_dispatch,
      strict=config.sampler.strict,
      pad_id=tokenizer.pad_id,
      mesh=mesh,
    )
    lora = jax.device_put(lora, tree_shardings(lora, mesh)) if mesh is not None else lora
    return cls(model_config, params, tokenizer, lora, lora_config, engine)

  def set_lora(self, lora: Lora | None) -> None:
    """Puts an adapter in place for requests submitted from now on; None leaves the base alone."""
    own = None if lora is None else scaled(lora, self.lora_config)
    self.lora, self._scaled = lora, own
    self.engine.set_adapters(None if own is None else stack_adapters([own]))

  def prompt_ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """Ids of a chat up to the assistant's turn."""
    return tuple(self.tokenizer.chat_ids(messages, add_generation_prompt=True))

  async def complete(
    self,
    messages: list[dict[str, str]],
    sampling: SamplingParams,
    key: int,
    adapter: int = BASE,
  ) -> Completion:
    """Draws one completion; a function of its arguments and the adapter's values alone."""
    request = self.request(self.prompt_ids(messages), sampling, key, 1, adapter)
    (output,) = await self.engine.asubmit(request)
    return self.completion(request, output)

  async def propose(
    self, messages: list[dict[str, str]], n: int, key: int, sampling: SamplingParams
  ) -> list[Completion]:
    """Draws n completions of one prompt with the policy's adapter: a group."""
    adapter = BASE if self.lora is None else ADAPTER
    request = self.request(self.prompt_ids(messages), sampling, key, n, adapter)
    return [self.completion(request, output) for output in await self.engine.asubmit(request)]

  def request(
    self, prompt_ids: Sequence[int], sampling: SamplingParams, key: int, n: int, adapter: int
  ) -> Request:
    """An engine request that also stops at the tokenizer's end-of-turn ids."""
    if adapter != BASE and (self.lora is None or adapter != ADAPTER):
      raise ValueError(f"adapter: expected 0 (base) or 1 (a set adapter), got {adapter}")
    return Request(
      prompt_ids=tuple(prompt_ids),
      n=n,
      seed=key,
      temperature=sampling.temperature,
      top_p=sampling.top_p,
      top_k=sampling.top_k,
      max_new_tokens=sampling.max_new_tokens,
      stop_ids=tuple(sorted({*self.tokenizer.stop_ids, *sampling.stop_ids})),
      adapter=adapter,
    )

  def completion(self, request: Request, output: Output) -> Completion:
    """An engine output with its text; the stop token stays in the ids and leaves the text."""
    spoken = output.token_ids[:-1] if output.finish_reason == "stop" else output.token_ids
    return Completion(
      prompt_ids=tuple(request.prompt_ids),
      token_ids=tuple(output.token_ids),
      logprobs=tuple(output.logprobs),
      text=self.tokenizer.decode(spoken),
      finish_reason=output.finish_reason,
    )

  def logprobs(
    self,
    prompt_ids: Sequence[int],
    token_ids: Sequence[int],
    adapter: int = ADAPTER,
    temperature: float = 1.0,
  ) -> list[float]:
    """Log-probabilities of a completion by one full forward pass, without the sampler's cache.

    Args:
      prompt_ids: at least one id.
      token_ids: the completion's ids.
      adapter: 0 is the base, 1 the policy's adapter.
      temperature: of the softmax, positive; top-k and top-p are not applied.

    Returns:
      One float per completion id.
    """
    if not prompt_ids or temperature <= 0:
      raise ValueError("expected at least one prompt id and a positive temperature")
    if not token_ids:
      return []
    ids = [*prompt_ids, *token_ids]
    size = max(_CHUNK, 1 << (len(ids) - 1).bit_length())  # powers of two: few traces
    tokens_BT = np.zeros((1, size + 1), np.int32)
    tokens_BT[0, : len(ids)] = ids
    lora = self._scaled if adapter == ADAPTER else None
    logp_T = _score(self.config, self.params, lora, tokens_BT, np.float32(temperature))
    return np.asarray(logp_T)[len(prompt_ids) - 1 : len(ids) - 1].tolist()

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes the adapter as a PEFT directory; the base stays where it is.

    Raises:
      ValueError: there is no adapter.
    """
    if self.lora is None:
      raise ValueError("this policy has no adapter to save")
    save_adapter(path, self.lora, self.lora_config)

  def load(self, path: str | os.PathLike[str]) -> None:
    """Reads a PEFT directory and puts its adapter in place.

    Raises:
      UserError: the adapter does not fit the model.
    """
    lora, self.lora_config = load_adapter(path, self.config, field=str(path))
    self.set_lora(lora)

  def close(self) -> None:
    """Ends the engine's thread."""
    self.engine.close()


def make_policy(config: ConfigDict, mesh: Mesh | None = None) -> QwenPolicy:
  """The policy that `config.model.policy` names: QwenPolicy, or a subclass of the user's own.

  Raises:
    UserError: no such class, or as `QwenPolicy.from_config`.
  """
  chosen = load_class(config.model.policy, "config.model.policy", QwenPolicy)
  return chosen.from_config(config, mesh)


@functools.partial(jax.jit, static_argnums=(0,))
def _score(config, params, lora, tokens_BT, temperature):
  """log p of each next token, [T]; logits of `_CHUNK` positions exist at a time."""
  collections = {"params": params} if lora is None else {"params": params, "lora": lora}
  inputs_BT, targets_T = tokens_BT[:, :-1], tokens_BT[0, 1:]
  positions_BT = jnp.arange(inputs_BT.shape[1], dtype=jnp.int32)[None]
  hidden_BTD, _ = Qwen(config).apply(collections, inputs_BT, positions_BT)

  def chunk(part):
    hidden_CD, targets_C = part
    logp_CV = jax.nn.log_softmax(head(params, hidden_CD) / temperature, axis=-1)
    return jnp.take_along_axis(logp_CV, targets_C[:, None], axis=-1)[:, 0]

  parts = (hidden_BTD[0].reshape(-1, _CHUNK, config.hidden_size), targets_T.reshape(-1, _CHUNK))
  return jax.lax.map(chunk, parts).reshape(-1)


def _comparable(config: LoRAConfig) -> tuple[int, float, frozenset[str]]:
  return config.rank, config.alpha, frozenset(config.targets)


def dtype_name(name: str, field: str) -> str:
  """Resolves "auto" (float32 on CPU, bfloat16 elsewhere) and checks the name.

  Raises:
    UserError: an unknown dtype of `config.model.<field>`.
  """
  if name == "auto":
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"
  if name not in hf.DTYPES:
    raise UserError(f"config.model.{field}: expected auto, {', '.join(hf.DTYPES)}, got {name!r}")
  return name


def _check_sizes(config: ConfigDict, model_config: QwenConfig, tokenizer: Tokenizer) -> None:
  if config.sampler.context > model_config.max_position_embeddings:
    raise UserError(
      f"config.sampler.context: {config.sampler.context} is more than the model's "
      f"{model_config.max_position_embeddings} positions; lower it"
    )
  if tokenizer.vocab_size > model_config.vocab_size:
    raise UserError(
      f"config.model.path: the tokenizer knows {tokenizer.vocab_size} ids, the model only "
      f"{model_config.vocab_size}; expected files of one checkpoint"
    )
